// A register of floats of the instruction set that the file is compiled for, see isa/. All in an
// anonymous namespace, as there.
#pragma once
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "../kernels.h"

#include BERTFAST_ISA_FILE

namespace bertfast::BERTFAST_ISA {
namespace {

using namespace isa;
using Isa = isa::BERTFAST_ISA;
using vf = Isa::vf;
using vi = Isa::vi;
using vu = Isa::vu;
constexpr int W = Isa::kLanes;
constexpr Unit unit_of(Precision p) { return Isa::kUnits[int(p)]; }

constexpr float kInf = std::numeric_limits<float>::infinity();

inline vf splat(float x) { return x - vf{}; }
inline vu bits(vf v) { return (vu)v; }

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) { return Isa::load_bf16(p); }
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) { Isa::store_bf16(p, v); }
// The first n < W elements; the rest of a load is zero.
template <class T>
inline vf load_n(const T* p, int64_t n) {
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_n(T* p, vf v, int64_t n) {
  T part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}
template <class T>
inline vf load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
inline void store_upto(T* p, vf v, int64_t n) {
  if (n >= W)
    store(p, v);
  else
    store_n(p, v, n);
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline vf max(vf a, vf b) { return a > b ? a : b; }

template <int S, int... I>
inline vf rotate(vf v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + S) % W)...);
}
// v[0] of what `op` makes of all lanes, halving them each time.
template <int S = W / 2, class Op>
inline float reduce(vf v, const Op& op) {
  v = op(v, rotate<S>(v, std::make_integer_sequence<int, W>{}));
  if constexpr (S > 1)
    return reduce<S / 2>(v, op);
  else
    return v[0];
}
inline float sum(vf v) {
  return reduce(v, [](vf a, vf b) { return a + b; });
}
inline float max_of(vf v) {
  return reduce(v, [](vf a, vf b) { return max(a, b); });
}

// v with other lanes from lane n on.
inline vf only(vf v, int64_t n, vf other = vf{}) {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes < int32_t(n) ? v : other;
}

// e^x to 1 ulp or so for x <= 88: range reduction by log 2, then a polynomial. 0 below -87.3.
inline vf exp(vf x) {
  const vf low = splat(-87.33f), high = splat(88.37f);
  const vf t = x < low ? low : (x > high ? high : x);  // a NaN passes both
  const vf magic = splat(12582912.f);                  // 1.5 * 2^23: the sum rounds to an integer
  const vf shifted = t * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const vf power = (vf)((bits(shifted) - bits(magic) + 127) << 23);
  return x < low ? vf{} : p * power;
}

// 2^x to 1 ulp or so for x <= 0, by a polynomial fitted for the least relative error where
// |x - n| <= 1/2; 0 below -126.
inline vf exp2_down(vf x) {
  const vf magic = splat(12582912.f);  // as in exp
  const vf shifted = x + magic, r = x - (shifted - magic);
  vf p = r * 0.00015345811f + 0.00133999309f;
  p = p * r + 0.00961848907f;
  p = p * r + 0.0555032864f;
  p = p * r + 0.240226462f;
  p = p * r + 0.693147182f;
  p = p * r + 1.f;
  const vf power = (vf)((bits(shifted) << 23) + (127 << 23));
  return x < -126.f ? vf{} : p * power;
}

inline vf sigmoid_of_twice(vf u) {  // 1 / (1 + e^-2u)
  return 1.f / (1.f + exp(u * -2.f));
}

constexpr float kTanhScale = 0.79788456f, kTanhCubic = 0.044715f;
constexpr float kSiluEnd = 88;  // beyond, x sigmoid(x) is 0 or x

// GELU without exp or division: Phi(x) - 1/2 is odd, fitted as x p(x^2), p of degree 14, where
// |x| <= 5.4; beyond, Phi is 0 or 1 to 4e-8. The fit's error in x Phi(x) is 6e-8.
inline vf gelu(vf x) {
  const vf s = x * x * 0.0685871056f - 1.f;
  vf p = s * 0.000315587615f - 0.000961970429f;
  p = p * s + 0.00109943283f;
  p = p * s - 0.00137342117f;
  p = p * s + 0.00340788531f;
  p = p * s - 0.00651506242f;
  p = p * s + 0.00978684202f;
  p = p * s - 0.0140648961f;
  p = p * s + 0.019608765f;
  p = p * s - 0.0257218122f;
  p = p * s + 0.0321210323f;
  p = p * s - 0.0392093263f;
  p = p * s + 0.0484994018f;
  p = p * s - 0.0653279834f;
  p = p * s + 0.130928114f;
  const vf y = x * (x * p + 0.5f);
  return x > 5.4f ? x : (x < -5.4f ? vf{} : y);
}

// To 1.4e-4, for results that go on in bf16 or int8: degree 7 in x^2, |x| <= 4.
inline vf gelu_coarse(vf x) {
  const vf s = x * x * 0.125f - 1.f;
  vf p = s * -0.00272886f + 0.00821125f;
  p = p * s - 0.01326018f;
  p = p * s + 0.02162174f;
  p = p * s - 0.03649531f;
  p = p * s + 0.05605081f;
  p = p * s - 0.08435748f;
  p = p * s + 0.17594775f;
  const vf y = x * (x * p + 0.5f);
  return x > 4.f ? x : (x < -4.f ? vf{} : y);
}

// Its derivative in the same way, with degree 16 and |x| <= 5.6; the error is 3e-7.
inline vf gelu_derivative(vf x) {
  const vf s = x * x * 0.0637755102f - 1.f;
  vf p = s * 0.00316711864f - 0.00800063554f;
  p = p * s + 0.00418461533f;
  p = p * s - 0.00259531802f;
  p = p * s + 0.0204231236f;
  p = p * s - 0.0381617583f;
  p = p * s + 0.0426603369f;
  p = p * s - 0.0516532771f;
  p = p * s + 0.0666107237f;
  p = p * s - 0.0737511739f;
  p = p * s + 0.0716295838f;
  p = p * s - 0.0648823008f;
  p = p * s + 0.0566848777f;
  p = p * s - 0.0509724244f;
  p = p * s + 0.0518079586f;
  p = p * s - 0.0642823055f;
  p = p * s + 0.126416638f;
  const vf y = x * p + 0.5f;
  return x > 5.6f ? splat(1) : (x < -5.6f ? vf{} : y);
}

template <int activation>
inline vf activate(vf z) {
  if (activation == 1) return gelu(z);
  if (activation == 2) {
    const vf y = z * sigmoid_of_twice(kTanhScale * (z + kTanhCubic * z * z * z));
    return z == -kInf ? vf{} : y;
  }
  if (activation == 3) return z < 0 ? vf{} : z;
  if (activation == 4) return z < -kSiluEnd ? vf{} : z * sigmoid_of_twice(0.5f * z);
  return z;
}

template <int activation>
inline vf derivative(vf z) {
  if (activation == 1) return gelu_derivative(z);
  if (activation == 2) {
    const vf s = sigmoid_of_twice(kTanhScale * (z + kTanhCubic * z * z * z));
    return s + 2.f * z * s * (1.f - s) * kTanhScale * (1.f + 3 * kTanhCubic * z * z);
  }
  if (activation == 3) return z > 0 ? splat(1) : vf{};
  if (activation == 4) {
    const vf low = splat(-kSiluEnd), high = splat(kSiluEnd);
    const vf x = z < low ? low : (z > high ? high : z);  // for infinity's limits
    const vf s = sigmoid_of_twice(0.5f * x);
    return s + x * s * (1.f - s);
  }
  return splat(1);
}

// f of the activation's number, see GemmArgs, as a constant.
template <class F>
inline auto by_activation(int activation, const F& f) {
  switch (activation) {
    case 0:
      return f(std::integral_constant<int, 0>());
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
  }
  throw std::invalid_argument("activation " + std::to_string(activation) + ", expected 0 to 4");
}

// A growing 64-byte aligned buffer; what it held is lost when it grows.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 64 + 63) & ~size_t(63);
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A piece of a buffer for each thread, taken before the parallel region that it is for: where
// memory is short, the exception couldn't leave that.
template <class T>
class PerThread {
 public:
  PerThread() = default;
  PerThread(Buffer& buffer, int64_t count)
      : count_(ceil_div(count, 64) * 64), data_(buffer.get<T>(count_ * omp_get_max_threads())) {}
  T* mine() const { return of(omp_get_thread_num()); }
  T* of(int64_t thread) const { return data_ + count_ * thread; }

 private:
  int64_t count_ = 0;
  T* data_ = nullptr;
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
