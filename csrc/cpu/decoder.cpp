// A step of a decoder with a cache: one token of every row through all layers and the head, in one
// parallel region; the threads share each product's panels, for rows are few.
#include <algorithm>
#include <cmath>

#include "encoder_norm.h"
#include "operators.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// softmax(scale q k^T) v of one query and n keys: key j is at at(j), its value `value` floats on.
template <class At>
void attend(const float* q, int64_t dim, int64_t n, float scale, int64_t value, const At& at,
            float* scores, float* out) {
  float top = -kInf;
  for (int64_t j = 0; j < n; ++j) {
    const float* k = at(j);
    vf s = {};
    for (int64_t d = 0; d < dim; d += W) s += load_upto(q + d, dim - d) * load_upto(k + d, dim - d);
    scores[j] = sum(s) * scale;
    top = scores[j] > top ? scores[j] : top;
  }
  vf total = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf e = only(exp(load(scores + j) - top), n - j);
    store(scores + j, e);
    total += e;
  }
  const float inverse = n ? 1 / sum(total) : 0;
  for (int64_t d = 0; d < dim; d += W) {
    vf o = {};
    for (int64_t j = 0; j < n; ++j) o += scores[j] * load_upto(at(j) + value + d, dim - d);
    store_upto(out + d, o * inverse, dim - d);
  }
}

// Whether a is chosen before b: as torch, the first NaN, or else the first of the largest.
inline bool before(float a, int64_t i, float b, int64_t j) {
  if (std::isnan(a) != std::isnan(b)) return std::isnan(a);
  return a == b || std::isnan(a) ? i < j : a > b;
}

struct Decoder {
  static constexpr Unit u = unit_of(Precision::fp32);

  const DecodeArgs& g;
  const LayerSpec& spec = g.spec;
  const int64_t hidden = spec.hidden, rows = g.rows, dim = spec.dim();
  const int64_t row = round_up(hidden, 64) + 64, inner_row = round_up(spec.inner, 64) + 64,
                qkv_row = round_up(3 * hidden, 64) + 64;
  float *states, *sum, *context, *qkv;
  Operand<u> operand{}, inner{};
  PerThread<float> panels, scores, found;

  explicit Decoder(const DecodeArgs& args) : g(args) {}

  // A product, each thread's share of the panels.
  template <class Put>
  void product(const void* packed, int64_t n, int64_t k, const Operand<u>& a, const Team& team,
               const Put& put) const {
    const Linear<u> w(packed, n, k);
    const Part part{team.begin(w.panels), team.end(w.panels), 0, k};
    linear(w, a, rows, part, panels.mine(), Panels<u>{w}, put);
    team.meet();
  }
  void to_operand(const float* from, const Team& team) const {
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
      put_row(operand, m, from + m * row, hidden);
    team.meet();
  }
  // states = norm(states + the product of `from`), the next operand too.
  void output(const void* packed, int64_t k, const Operand<u>& from, const Parameter& norm,
              const Team& team) const {
    product(packed, hidden, k, from, team, [&](int64_t m, int64_t n, vf v) {
      store(sum + m * row + n, v + load(states + m * row + n));
    });
    normalise(spec, norm, {sum, states, sum, row}, rows, operand, team);
  }
  // work(row, head), shared out.
  template <class Work>
  void each_head(const Team& team, const Work& work) const {
    for (int64_t t = team.begin(rows * spec.heads); t < team.end(rows * spec.heads); ++t)
      work(t / spec.heads, t % spec.heads);
    team.meet();
    to_operand(context, team);
  }

  void layer(int64_t index, const Team& team) const {
    const DecoderLayer& w = g.layers[index];
    product(w.qkv, 3 * hidden, hidden, operand, team,
            [&](int64_t m, int64_t n, vf v) { store(qkv + m * qkv_row + n, v); });
    float* cache = g.cache + index * g.room * g.slots * 2 * hidden;
    each_head(team, [&](int64_t m, int64_t h) {
      const float* own = qkv + m * qkv_row + h * dim;
      float* kept = cache + (g.done * g.slots + m) * 2 * hidden + h * dim;
      for (int part = 0; part < 2; ++part)
        std::copy_n(own + (part + 1) * hidden, dim, kept + part * hidden);
      const int32_t* slots = g.origin + m * g.origin_row;
      const auto at = [&](int64_t j) -> const float* {
        const int64_t slot = j < g.done ? slots[j] : m;
        return cache + (j * g.slots + slot) * 2 * hidden + h * dim;
      };
      attend(own, dim, g.done + 1, spec.scale, hidden, at, scores.mine(),
             context + m * row + h * dim);
    });
    output(w.out, hidden, operand, w.norm1, team);
    product(w.query, hidden, hidden, operand, team,
            [&](int64_t m, int64_t n, vf v) { store(qkv + m * qkv_row + n, v); });
    each_head(team, [&](int64_t m, int64_t h) {
      const int64_t start = g.cu_seqlens[g.source[m]], end = g.cu_seqlens[g.source[m] + 1];
      attend(
          qkv + m * qkv_row + h * dim, dim, end - start, spec.scale, hidden,
          [&](int64_t j) { return w.keys + (start + j) * 2 * hidden + h * dim; }, scores.mine(),
          context + m * row + h * dim);
    });
    output(w.cross, hidden, operand, w.norm2, team);
    by_activation(spec.activation, [&](auto activation) {
      product(w.up, spec.inner, hidden, operand, team, [&](int64_t m, int64_t n, vf v) {
        inner.put(m, n, activate<decltype(activation)::value>(v));
      });
    });
    // Behind the last panel: the matrix unit multiplies what is there by zeros.
    const int64_t end = round_up(spec.inner, NR);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
      for (int64_t n = end; n < round_up(end, 64); n += W) inner.put(m, n, vf{});
    team.meet();
    output(w.down, spec.inner, inner, w.norm3, team);
  }

  void head(const Team& team) const {
    by_activation(spec.activation, [&](auto activation) {
      product(g.transform, hidden, hidden, operand, team, [&](int64_t m, int64_t n, vf v) {
        store(sum + m * row + n, activate<decltype(activation)::value>(v));
      });
    });
    normalise(spec, g.norm, {sum, states, sum, row}, rows, operand, team);
    vi lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    vf* top = reinterpret_cast<vf*>(found.mine());
    vi* which = reinterpret_cast<vi*>(top + rows);
    for (int64_t m = 0; m < rows; ++m) top[m] = splat(-kInf), which[m] = vi{};
    product(g.words, g.vocabulary, hidden, operand, team, [&](int64_t m, int64_t n, vf v) {
      const int64_t left = g.vocabulary - n;
      if (left <= 0) return;
      if (g.logits) return store_upto(g.logits + m * g.vocabulary + n, v, left);
      v = left < W ? only(v, left, splat(-kInf)) : v;
      const vi better = (v > top[m]) | ((v != v) & (top[m] == top[m]));
      top[m] = better ? v : top[m];
      which[m] = better ? lanes + int32_t(n) : which[m];
    });
    if (g.logits) return;
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      float best = -kInf;
      int64_t at = 0;
      for (int64_t t = 0; t < team.size; ++t) {
        const vf* theirs = reinterpret_cast<const vf*>(found.of(t));
        const vi* indices = reinterpret_cast<const vi*>(theirs + rows);
        for (int i = 0; i < W; ++i)
          if (before(theirs[m][i], indices[m][i], best, at))
            best = theirs[m][i], at = indices[m][i];
      }
      g.best[m] = at;
    }
  }

  void run() {
    static thread_local Buffer buffer, panel_buffer, score_buffer, found_buffer;
    const int64_t padded = rows + kMaxTileRows;
    const int64_t own = Operand<u>::elements(padded, row),
                  wide = Operand<u>::elements(padded, inner_row);
    const int64_t per = sizeof(Element<u>);
    states = buffer.get<float>(padded * (3 * row + qkv_row) + (own + wide) * per / 4 + 64);
    sum = states + padded * row, context = sum + padded * row, qkv = context + padded * row;
    operand.data = reinterpret_cast<Element<u>*>(qkv + padded * qkv_row), operand.row = row;
    inner.data = operand.data + own, inner.row = inner_row;
    panels = {panel_buffer, 2 * max(split_panel<u>(spec.inner), split_panel<u>(hidden))};
    scores = {score_buffer, max(g.done + 1, g.longest) + W};
    found = {found_buffer, 2 * rows * W};
    Crew crew(omp_get_max_threads());
#pragma omp parallel
    {
      const Team team = Team::all(crew);
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        std::copy_n(g.hidden + m * hidden, hidden, states + m * row);
      team.meet();
      to_operand(states, team);
      for (int64_t i = 0; i < g.count; ++i) layer(i, team);
      head(team);
    }
  }
};

}  // namespace

void decode(const DecodeArgs& g) {
  by_activation(g.spec.activation, [](auto) {});  // where it can still raise
  if (g.rows) Decoder(g).run();
}

}  // namespace bertfast::BERTFAST_ISA
