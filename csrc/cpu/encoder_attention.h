// Attention of the encoder for inference.
#pragma once
#include "attention_head.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>  // fp32 or bf16
struct Heads {
  using T = Element<u>;

  const LayerSpec& spec;
  const T* qkv;  // [tokens, row]: queries, `hidden` of them, keys and values
  int64_t row;
  T* out;  // [tokens, out_row]
  int64_t out_row;
  Bias bias;

  // Of memory, whatever the window.
  static int64_t floats(int64_t longest, int64_t dim) { return Head<u>::floats(longest, dim); }
  static Reach reach(const LayerSpec& spec) {
    return spec.window < 0 ? Reach{} : Reach{spec.window, spec.window};
  }

  // One head of sequence b, whose first n tokens are keys; of several parts of its queries, one.
  void attend(int64_t b, int64_t start, int64_t queries, int64_t n, int64_t h, int64_t part,
              int64_t parts, float* memory) const {
    const int64_t dim = spec.dim();
    const T *from = qkv + start * row, *q = from + h * dim;
    const T* k = from + spec.hidden + h / spec.groups * dim;
    const Head<u> head(k, k + spec.keys(), row, n, dim, true, memory, reach(spec));
    const Vector biases{bias.data, bias.dtype == kBf16};
    const float scale = spec.scale;
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
