// Attention of the encoder for inference.
#pragma once
#include <cmath>

#include "../layer.h"
#include "attention_head.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>  // fp32 or bf16
struct Heads {
  using T = Element<u>;

  const T* qkv;  // [tokens, row]: queries, keys and values, `hidden` each
  int64_t row, hidden, dim;
  T* out;  // [tokens, out_row]
  int64_t out_row;
  Bias bias;

  // One head of sequence b, whose first n tokens are keys; of several parts of its queries, one.
  void attend(int64_t b, int64_t start, int64_t queries, int64_t n, int64_t h, int64_t part,
              int64_t parts, float* memory) const {
    const T* q = qkv + start * row + h * dim;
    const Head<u> head(q + hidden, q + 2 * hidden, row, n, dim, true, memory);
    const Vector biases{bias.data, bias.dtype == kBf16};
    const float scale = 1 / std::sqrt(float(dim));
    const auto factor = [&](float* s, int64_t query, Span keys) {
      if (!bias.data) return scale;
      const int64_t at = bias.row(b, h, query) + keys.first;
      for (int64_t j = 0; j < keys.count(); j += W)
        store(s + j, load(s + j) * scale + biases.at(at + j, at + keys.count()));
      return 1.f;
    };
    head.attend(
        reinterpret_cast<const float*>(q), row / kPer<u>, queries, part, parts, factor,
        [](auto...) {}, out + start * out_row + h * dim, out_row);
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
