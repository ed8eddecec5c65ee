// What goes row by row: layer norm in fp32 and its backward, and sums over rows.
#pragma once
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// A parameter vector in either precision.
struct Vector {
  const void* data;
  bool is_bf16;
  vf at(int64_t j, int64_t n) const {
    return is_bf16 ? load_upto(static_cast<const bf16*>(data) + j, n - j)
                   : load_upto(static_cast<const float*>(data) + j, n - j);
  }
};

inline float inverse_root(float variance, float eps) {
  return 1.f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
}

// 1 / sqrt(mean of s^2 + eps)
inline float row_rms(const float* s, int64_t n, float eps) {
  vf squares = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf v = only(load(s + j), n - j);
    squares += v * v;
  }
  return inverse_root(sum(squares) / float(n), eps);
}

// The mean of s as mean + low, for one float rounds off digits of a spread far below it, and
// 1 / sqrt(var + eps), in two passes; s is padded to whole registers.
inline void row_statistics(const float* s, int64_t n, float eps, float& mean, float& low,
                           float& rstd) {
  const float first = s[0];  // taken off, that the sum stays small
  vf total = {};
  for (int64_t j = 0; j < n; j += W) total += only(load(s + j) - first, n - j);
  mean = first + sum(total) / float(n);
  vf rest = {}, squares = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf c = only(load(s + j) - mean, n - j);
    rest += c;
    squares += c * c;
  }
  low = sum(rest) / float(n);
  rstd = inverse_root(sum(squares) / float(n) - low * low, eps);
}

// For one row: grad and the sum that was normalised in s, in place: s becomes that sum's gradient,
// grad is scratch; dweight and dbias gain this row's share. All padded to whole registers. After
// row_rms, rms is true and mean 0.
inline void row_backward(float* grad, float* s, const Vector& weight, int64_t n, float mean,
                         float rstd, float* dweight, float* dbias, bool rms = false) {
  vf rest = {}, a = {}, b = {};
  for (int64_t j = 0; j < n; j += W) rest += only(load(s + j) - mean, n - j);
  const float low = rms ? 0 : sum(rest) / float(n);
  for (int64_t j = 0; j < n; j += W) {
    const vf normed = only((load(s + j) - mean - low) * rstd, n - j), g = load(grad + j);
    const vf scaled = g * weight.at(j, n);
    a += scaled;
    b += scaled * normed;
    store(s + j, normed);
    store(grad + j, scaled);  // as it was summed up: a fused product would differ by its rounding
    store(dweight + j, load(dweight + j) + g * normed);
    store(dbias + j, load(dbias + j) + g);
  }
  const float mean_a = rms ? 0 : sum(a) / float(n), mean_b = sum(b) / float(n);
  for (int64_t j = 0; j < n; j += W)
    store(s + j, (load(grad + j) - mean_a - load(s + j) * mean_b) * rstd);
}

inline int64_t padded(int64_t n) { return ceil_div(n, 64) * 64; }

// Column sums over rows in a fixed number of chunks, whatever the threads: one result always.
inline int64_t row_chunks(int64_t rows) { return rows < 64 ? 1 : min(rows / 32, 16); }

inline void add_chunks(const float* partial, int64_t chunks, int64_t columns, int64_t n,
                       float* out) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t j = 0; j < n; j += W) {
      vf total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += load(partial + (chunk * columns + c) * padded(n) + j);
      store_upto(out + c * n + j, total, n - j);
    }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
