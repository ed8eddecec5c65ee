// A linear layer's weights into the panels of packed_linear.h.
#pragma once
#include <cmath>

#include "operators.h"
#include "packed_linear.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// `valid` rows [k] into panel p, but for the bias.
template <Unit u, class T>
void pack_rows(const Linear<u>& to, int64_t p, const T* rows, int64_t valid) {
  using L = Linear<u>;
  auto* panel = reinterpret_cast<char*>(const_cast<Stored<u>*>(to.panel(p)));
  auto* scale = const_cast<float*>(to.scale) + p * NR;
  auto* sum = const_cast<float*>(to.sum) + p * NR;
  constexpr bool bytes = is_int8(u);
  if constexpr (u == Unit::wide_bf16) {
    auto* out = reinterpret_cast<bf16*>(panel);
    for (int64_t k = 0; k < to.k; k += W)
      for (int64_t lane = 0; lane < NR; lane += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i)
          r[i] = lane + i < valid ? load_upto(rows + (lane + i) * to.k + k, to.k - k) : vf{};
        transpose(r);
        for (int64_t i = 0; i < min(W, to.k - k); ++i) store(out + (k + i) * NR + lane, r[i]);
      }
  } else if constexpr (!bytes) {
    constexpr Unit packed = u == Unit::split ? Unit::fp32 : u;
    auto* out = reinterpret_cast<float*>(panel);
    if (std::is_same_v<T, bf16> && packed == Unit::bf16 && to.k % 2 == 0)  // a unit lies as it is
      pack_panel<Unit::fp32, NR>(out, reinterpret_cast<const float*>(rows), to.k / 2, 1, valid,
                                 to.k / 2);
    else
      pack_panel<packed, NR>(out, rows, to.k, 1, valid, to.k);
    const int64_t used = ceil_div(to.k, kPer<packed>);
    std::memset(out + used * NR, 0, (to.units - used) * NR * sizeof(float));
  }
  for (int64_t i = 0; i < NR; ++i) {
    scale[i] = 1, sum[i] = 0;
    if (!bytes) continue;
    const T* row = i < valid ? rows + i * to.k : nullptr;
    float poison = 0;  // NaN where a weight is inf or NaN: so are all results of the row
    float top = 0, sums[2][2] = {};  // weights of one sign among four, see isa/sums16.h
    for (int64_t k = 0; row && k < to.k; ++k) {
      const float w = to_float(row[k]);
      poison += w * 0.f;
      top = std::fmax(top, std::fabs(w));
      if (k % 8 == 0) std::memset(sums, 0, sizeof sums);
      float& sum = sums[k / 2 % 2][w < 0];
      sum += std::fabs(w);
      if (kSums16<u>) top = std::fmax(top, sum);
    }
    // Each of four weights may be rounded up by a half.
    if (top > 0) scale[i] = top / (kSums16<u> ? 126 : 127);
    int64_t total = 0;
    for (int64_t k = 0; k < to.units * L::kPerUnit; ++k) {
      const int64_t at = (k / L::kPerUnit * NR + i) * L::kPerUnit + k % L::kPerUnit;
      const float w = row && k < to.k ? to_float(row[k]) : 0;
      const int q = poison == 0 ? int(std::lrintf(w / scale[i])) : 0;
      reinterpret_cast<int8_t*>(panel)[at] = int8_t(q);
      total += q;
    }
    scale[i] += poison;
    sum[i] = scale[i] * float(total);
  }
}

// Where a packed column comes from; a row past the part's last where it is padding.
struct Source {
  int part;
  int64_t row;
};
inline Source source(const LinearWeights& from, int64_t n) {
  if (from.gated) return {int(n / W % 2), n / (2 * W) * W + n % W};
  int part = 0;
  while (part + 1 < from.parts && n >= from.rows[part]) n -= from.rows[part++];
  return {part, n};
}
inline int64_t columns(const LinearWeights& from) {
  if (from.gated) return 2 * round_up(from.rows[0], W);
  int64_t n = 0;
  for (int i = 0; i < from.parts; ++i) n += from.rows[i];
  return n;
}

// What rows of weights may be multiplied in as they lie: floats, bf16, or what becomes floats.
template <Unit u>
constexpr bool kLies = u == Unit::fp32 || u == Unit::bf16 || u == Unit::wide_bf16;
// Whether these may: bf16 in whole units.
template <Unit u>
bool can_lie(const LinearWeights& from, int64_t k) {
  if (u != Unit::bf16) return kLies<u>;
  for (int i = 0; i < from.parts; ++i)
    if (reinterpret_cast<uintptr_t>(from.part[i].weight) % sizeof(float)) return false;
  return from.bf16 && k % kPer<u> == 0;
}

// Rows [NR, k] of panel p, bf16 in Unit::bf16 or else floats, where they lie or in scratch.
template <Unit u>
inline const float* lying_rows(const LinearWeights& from, int64_t k, int64_t p, float* scratch) {
  constexpr bool halves = u == Unit::bf16, rounded = u == Unit::wide_bf16;
  const Source first = source(from, p * NR), last = source(from, (p + 1) * NR - 1);
  const bool there = first.part == last.part && last.row < from.rows[last.part];
  const int64_t units = halves ? k / 2 : k;
  if (there && !from.gated && from.bf16 == halves && !rounded)
    return static_cast<const float*>(from.part[first.part].weight) + first.row * units;
  for (int64_t i = 0; i < NR; ++i) {
    const Source s = source(from, p * NR + i);
    const bool real = s.row < from.rows[s.part];
    const void* weight = from.part[s.part].weight;
    float* to = scratch + i * units;
    if (halves) {
      if (real)
        std::memcpy(to, static_cast<const float*>(weight) + s.row * units, units * sizeof(float));
      else
        std::memset(to, 0, units * sizeof(float));
      continue;
    }
    for (int64_t j = 0; j < k; j += W) {
      const int64_t at = s.row * k + j;
      vf v = {};
      if (real && from.bf16)
        v = load_upto(static_cast<const bf16*>(weight) + at, k - j);
      else if (real)
        v = load_upto(static_cast<const float*>(weight) + at, k - j);
      if (rounded && !from.bf16) v = (vf)(Isa::round_bf16(v) << 16);
      store_upto(to + j, v, k - j);
    }
  }
  return scratch;
}

// What panel p is made of; of a gated layer the first half.
inline Stretch rows_of(const LinearWeights& from, int64_t p, int64_t k) {
  const Source first = source(from, p * NR);
  const int64_t row = k * (from.bf16 ? 2 : 4);
  return {static_cast<const char*>(from.part[first.part].weight) + first.row * row,
          (from.gated ? W : NR) * row};
}

template <Unit u, class T>
void pack_from(const LinearWeights& from, const Linear<u>& to, int64_t p, float* scratch) {
  const int64_t n0 = p * NR, valid = min(NR, to.n - n0);
  const auto row = [&](Source s) {
    return static_cast<const T*>(from.part[s.part].weight) + s.row * to.k;
  };
  const Source first = source(from, n0);
  if (!from.gated && first.part == source(from, n0 + valid - 1).part)
    return pack_rows(to, p, row(first), valid);
  T* rows = reinterpret_cast<T*>(scratch);
  for (int64_t i = 0; i < valid; ++i) {
    const Source s = source(from, n0 + i);
    if (s.row < from.rows[s.part])
      std::memcpy(rows + i * to.k, row(s), to.k * sizeof(T));
    else
      std::memset(rows + i * to.k, 0, to.k * sizeof(T));
  }
  pack_rows(to, p, const_cast<const T*>(rows), valid);
}

template <Unit u>
void pack_bias(const LinearWeights& from, const Linear<u>& to, int64_t p) {
  auto* bias = const_cast<float*>(to.bias);
  for (int64_t n = p * NR; n < (p + 1) * NR; ++n) {
    const Source s = source(from, n);
    const auto* given = static_cast<const float*>(from.part[s.part].bias);
    bias[n] = given && s.row < from.rows[s.part] ? given[s.row] : 0;
  }
}

// Panel p of the weights; scratch [NR, k] is for one in which parts meet, or a gate's.
template <Unit u>
void pack_linear(const LinearWeights& from, const Linear<u>& to, int64_t p, float* scratch) {
  if (from.bf16)
    pack_from<u, bf16>(from, to, p, scratch);
  else
    pack_from<u, float>(from, to, p, scratch);
  pack_bias(from, to, p);
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
