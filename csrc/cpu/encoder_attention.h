// Attention of the encoder for inference.
#pragma once
#include <vector>

#include "attention_relative.h"
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
  const float* even;           // see Batch
  const Distances& distances;  // laid out by units of Head

  static constexpr int64_t kBlockRows = 8 * kTileRows<u>;  // of queries that meet keys' distances

  // Of memory, whatever the window.
  static int64_t floats(int64_t longest, int64_t dim, bool relative) {
    return Head<u>::floats(longest, dim) +
           (relative ? RelativeScores<u>::floats(min(kBlockRows, longest), longest, {}) : 0);
  }
  static Reach reach(const LayerSpec& spec) {
    return spec.window < 0 ? Reach{} : Reach{spec.window, spec.window};
  }

  // The last row of a sequence's, where that sees all places alike: the mean of the values there.
  void attend_evenly(int64_t start, int64_t rows, int64_t h, float share) const {
    const int64_t dim = spec.dim(), last = start + rows - 1;
    const T* v = qkv + spec.hidden + spec.keys() + h / spec.groups * dim;
    for (int64_t j = 0; j < dim; j += W) {
      vf sum = {};
      for (int64_t i = start; i <= last; ++i) sum += load_upto(v + i * row + j, dim - j);
      const vf mean = sum * ((1 - share) / rows) + load_upto(v + last * row + j, dim - j) * share;
      store_upto(out + last * out_row + h * dim + j, mean, dim - j);
    }
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
    const bool relative = distances.has(kQueries) || distances.has(kKeys);
    const float *rows = reinterpret_cast<const float*>(q),
                *others = reinterpret_cast<const float*>(k);
    RelativeScores<u> positions(distances, h, rows, others, row / kPer<u>, min(kBlockRows, queries),
                                n, Head<u>::units(dim), reach(spec),
                                memory + Head<u>::floats(n, dim, reach(spec)));
    const auto factor = [&](float* s, int64_t query, Span keys) {
      // The next head's row is read soon.
      for (const T* next : {q, k, k + spec.keys()})
        for (int64_t j = dim; j < 2 * dim; j += 64 / sizeof(T))
          __builtin_prefetch(next + query * row + j, 0, 2);
      if (relative) positions.add(s, query, keys);
      if (!bias.data) return scale;
      const int64_t at = bias.row(b, h, query) + keys.first;
      for (int64_t j = 0; j < keys.count(); j += W)
        store(s + j, load(s + j) * scale + biases.at(at + j, at + keys.count()));
      return 1.f;
    };
    const auto attend = [&](int64_t part, int64_t parts) {
      head.attend(
          rows, row / kPer<u>, queries, part, parts, factor, [](auto...) {},
          out + start * out_row + h * dim, out_row);
    };
    if (!relative) attend(part, parts);
    const int64_t tiles = tile_count<u>(queries), end = tiles * (part + 1) / parts;
    for (int64_t t = tiles * part / parts, next = t; relative && t < end; ++t) {
      const int64_t m0 = tile_begin<u>(queries, t);
      {
        [[maybe_unused]] const MatrixScope<u> scope{};
        if (t == next) {
          next = min(t + kBlockRows / kTileRows<u>, end);
          positions.start_block(m0, tile_begin<u>(queries, next) - m0);
        }
        positions.start_tile(m0, tile_begin<u>(queries, t + 1) - m0);
      }
      attend(t, tiles);
    }
    if (even && part + 1 == parts && queries > 0) attend_evenly(start, queries, h, even[b]);
  }
};

// Of each layer, in the same memory: they are laid out when its turn comes.
template <Unit u>
std::vector<Distances> distances_of(const EncoderArgs& g, int64_t longest, Buffer& buffer) {
  std::vector<Distances> found(g.layers);
  const int64_t dim = g.specs->dim();
  for (int64_t i = 0; g.relative && i < g.layers; ++i) {
    const auto& [key, query] = g.relative[i];
    found[i] = {
        {{key, query}, g.batch.rel_index, g.specs->heads, dim}, longest, Head<u>::units(dim)};
    found[i].place(buffer.get<float>(found[i].floats()));
  }
  return found;
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
