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

// Mean and 1 / sqrt(var + eps) of s, in two passes; s is padded to whole registers.
inline void row_statistics(const float* s, int64_t n, float eps, float& mean, float& rstd) {
  vf total = {};
  for (int64_t j = 0; j < n; j += W) total += only(load(s + j), n - j);
  mean = sum(total) / float(n);
  vf squares = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf c = only(load(s + j) - mean, n - j);
    squares += c * c;
  }
  rstd = 1.f / __builtin_sqrtf(sum(squares) / float(n) + eps);
}

// For one row: grad and the normalised s in, in place: s becomes the gradient of the sum that was
// normalised; dweight and dbias gain this row's share. All padded to whole registers.
inline void row_backward(const float* grad, float* s, const Vector& weight, int64_t n, float mean,
                         float rstd, float* dweight, float* dbias) {
  vf a = {}, b = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf normed = only((load(s + j) - mean) * rstd, n - j), g = load(grad + j);
    const vf scaled = g * weight.at(j, n);
    a += scaled;
    b += scaled * normed;
    store(s + j, normed);
    store(dweight + j, load(dweight + j) + g * normed);
    store(dbias + j, load(dbias + j) + g);
  }
  const float mean_a = sum(a) / float(n), mean_b = sum(b) / float(n);
  for (int64_t j = 0; j < n; j += W) {
    const vf scaled = load(grad + j) * weight.at(j, n);
    store(s + j, (scaled - mean_a - load(s + j) * mean_b) * rstd);
  }
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
