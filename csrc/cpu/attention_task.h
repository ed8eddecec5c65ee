// What forward and backward of the operator share: one head of one sequence.
#pragma once
#include "attention_relative.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

inline Reach reach_of(const AttentionArgs& g) {
  Reach reach;
  if (g.window >= 0) reach = {g.window, g.window};
  if (g.causal) reach.after = 0;
  return reach;
}

struct Task {
  const AttentionArgs& g;
  int64_t b, h;
  int64_t start, queries;   // the sequence's first query token, and how many it has
  int64_t first_key, keys;  // the same for its keys
  int64_t row;              // keys in whole panels
  Reach reach;

  Task(const AttentionArgs& args, int64_t sequence, int64_t head)
      : g(args),
        b(sequence),
        h(head),
        start(args.starts_q[b]),
        queries(args.starts_q[b + 1] - start),
        first_key(args.starts_k[b]),
        keys(args.seqused_k ? args.seqused_k[b] : args.starts_k[b + 1] - first_key),
        row(round_up(keys, NR)),
        reach(reach_of(args)) {}

  int64_t dim_row() const { return round_up(g.dim, NR); }

  template <class T>
  const T* query() const {
    return static_cast<const T*>(g.q) + start * g.q_token + h * g.q_head;
  }
  template <class T>
  const T* of_key(const void* x) const {  // x is k or v
    return static_cast<const T*>(x) + first_key * g.k_token + h * g.k_head;
  }

  // A row of scores of these keys gets its scale and bias.
  void adjust(float* s, int64_t query, Span keys) const {
    const Vector bias{g.bias.data, g.bias.dtype == kBf16};
    const int64_t offset = g.bias.row(b, h, query) + keys.first;
    for (int64_t j = 0; j < keys.count(); j += W) {
      vf v = load(s + j) * g.scale;
      if (g.bias.data) v += bias.at(offset + j, offset + keys.count());
      store(s + j, v);
    }
  }
};

// The largest of size(task).
template <class Size>
int64_t most(const AttentionArgs& g, const Size& size) {
  int64_t found = 0;
  for (int64_t b = 0; b < g.batch; ++b) found = max(found, size(Task(g, b, 0)));
  return found;
}

template <class T>
Distances distances_of(const AttentionArgs& g, bool by_row) {
  const int64_t longest = most(g, [](const Task& t) { return t.queries; });
  if (!g.rel_index || longest == 0) return {};
  Distances found({{g.rel_key, g.rel_query}, g.rel_index, g.heads, g.dim}, longest, g.dim, by_row);
  static thread_local Buffer buffer, rows;
  found.place(buffer.get<float>(found.floats()));
  const PerThread<float> scratch(rows, found.scratch_floats());
#pragma omp parallel for
  for (int64_t n = 0; n < 2 * g.heads; ++n) found.lay_out<Unit::fp32, T>(n, scratch.mine());
  return found;
}

// x [n, dim] with a row stride as fp32 [n, dim_row], zeros in the padding.
template <class T>
void widen(float* to, const T* x, int64_t stride, int64_t n, int64_t dim, int64_t dim_row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < dim_row; j += W)
      store(to + i * dim_row + j, j < dim ? load_upto(x + i * stride + j, dim - j) : vf{});
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
