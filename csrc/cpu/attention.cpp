// Attention over packed sequences: a task is one head of one sequence, see attention_head.h.
#include "attention_task.h"
#include "operators.h"
#include "philox.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t kBlockTiles = 8;  // of queries that meet relative positions together

template <class T>
void forward(const AttentionArgs& g) {
  const int64_t tasks = g.batch * g.heads;
  if (tasks == 0) return;
  const Distances distances = distances_of<T>(g, false);
  const bool relative = g.rel_index;
  static thread_local Buffer buffer;
  const PerThread<float> scratch(
      buffer, most(g, [&](const Task& t) {
        const int64_t block = min(kBlockTiles * MR, t.queries);
        return t.queries * t.dim_row() + t.row + 64 +
               Head<Unit::fp32>::floats(t.keys, g.dim, t.reach) +
               (relative ? t.keys * t.dim_row() + RelativeScores<>::floats(block, t.keys, t.reach)
                         : 0);
      }));
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const Task task(g, index / g.heads, index % g.heads);
    const int64_t m = task.queries, n = task.keys, dim_row = task.dim_row();
    if (m == 0) continue;
    float* q = scratch.mine();
    float* memory = q + m * dim_row;
    float* bits_memory = memory + Head<Unit::fp32>::floats(n, g.dim, task.reach);
    uint32_t* bits = reinterpret_cast<uint32_t*>(bits_memory);
    float* k = bits_memory + task.row + 64;
    widen(q, task.query<T>(), g.q_token, m, g.dim, dim_row);
    if (distances.has(kKeys)) widen(k, task.of_key<T>(g.k), g.k_token, n, g.dim, dim_row);
    const Head<Unit::fp32> head(task.of_key<T>(g.k), task.of_key<T>(g.v), g.k_token, n, g.dim,
                                false, memory, task.reach);
    RelativeScores<> positions(distances, task.h, q, k, dim_row, min(kBlockTiles * MR, m), n, g.dim,
                               task.reach, k + (relative ? n * dim_row : 0));
    const auto adjust = [&](float* s, int64_t query, Span keys) {
      if (relative) positions.add(s, query, keys);
      task.adjust(s, query, keys);
      return 1.f;
    };
    const auto done = [&](float* p, int64_t query, Span keys, float shift, float z) {
      const int64_t token = task.start + query;
      // A row without a key sums to 0; +inf makes its probabilities 0 in backward too.
      g.lse[task.h * g.tokens + token] = z == 0 ? kInf : shift + __builtin_logf(z);
      if (!g.dropout.seed) return;
      philox_row(g.dropout.seed, token * g.heads + task.h, keys.end, bits, keys.first);
      for (int64_t j = 0; j < keys.count(); j += W)
        store(p + j, drop(load(p + j), bits + j, g.dropout));
    };
    const int64_t tiles = tile_count<Unit::fp32>(m);
    const auto begin = [&](int64_t tile) { return tile_begin<Unit::fp32>(m, min(tile, tiles)); };
    for (int64_t t = 0; t < tiles; ++t) {
      if (relative) {
        if (t % kBlockTiles == 0)
          positions.start_block(begin(t), begin(t + kBlockTiles) - begin(t));
        positions.start_tile(begin(t), begin(t + 1) - begin(t));
      }
      head.attend(q, dim_row, m, t, tiles, adjust, done,
                  static_cast<T*>(g.out) + (task.start * g.heads + task.h) * g.dim,
                  g.heads * g.dim);
    }
  }
}

}  // namespace

void attention(const AttentionArgs& g) {
  if (g.bf16)
    forward<bf16>(g);
  else
    forward<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
