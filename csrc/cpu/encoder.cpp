// The encoder for inference in one call: weights packed once or layer by layer, a block of rows
// taken through all of a layer but its attention while it is in cache, one parallel region for all
// layers.
#include "encoder_attention.h"
#include "encoder_layers.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>  // of the weights
struct Encoder {
  static constexpr Unit kQkv = qkv_unit(u);
  static constexpr Unit kHeads = is_fp32(kQkv) || kBf16Unit != Unit::bf16 ? Unit::fp32 : Unit::bf16;
  using A = Element<u>;
  using T = Element<kHeads>;
  // So few rows are worked on together: weights cross memory once, each thread reads its part.
  static constexpr int64_t kTogether = 128;

  const EncoderArgs& g;
  const LayerSpec& spec = g.spec;
  const Batch& batch = g.batch;
  // Row lengths in elements: whole panels, and whole units of a matrix tile; 64 more, for the rows
  // of a tile would share sets of the L1 cache where they lie multiples of 4 KB apart.
  const int64_t hidden_row = round_up(spec.hidden, 64) + 64;
  const int64_t inner_row = round_up(spec.inner, 64) + 64;
  const int64_t qkv_row = round_up(3 * spec.hidden, 64) + 64;
  const int threads = omp_get_max_threads();
  const int64_t block_columns = u == Unit::split ? min(inner_row, 512) : inner_row;
  float* hidden;   // [tokens, hidden_row], the residual stream
  T* qkv;          // [tokens, qkv_row]
  T* context;      // [tokens, hidden_row]
  int64_t tokens;  // of hidden and context, fewer once only some rows are wanted
  Layers<u, kQkv> layers;
  // Each thread's: for a block of rows, and for split panels or for rows to pack.
  PerThread<float> block_memory, panel_memory;

  // What one block of rows needs, for one thread or shared by all.
  struct Scratch {
    float* sum;         // [rows, hidden_row]
    Operand<kQkv> qkv;  // the projection's
    Operand<u> operand, inner;
    T* wide;  // [rows, inner_row]: int8's inner activations before they are quantised

    // With `inner_columns` of the inner activations at a time, a multiple of 64.
    static int64_t floats(const Encoder& e, int64_t rows, int64_t inner_columns) {
      const int64_t padded = rows + kMaxTileRows, most = kParts<u> + 2;
      return rows * e.hidden_row + 6 * padded + padded * most * (e.hidden_row + inner_columns);
    }
    Scratch(const Encoder& e, float* memory, int64_t rows, int64_t inner_columns) : sum(memory) {
      const int64_t padded = rows + kMaxTileRows;
      operand.scale = sum + rows * e.hidden_row;
      operand.low = operand.scale + padded;
      inner.scale = operand.low + padded;
      inner.low = inner.scale + padded;
      qkv.scale = inner.low + padded;
      qkv.low = qkv.scale + padded;
      qkv.data = reinterpret_cast<Element<kQkv>*>(qkv.low + padded);
      qkv.row = e.hidden_row;
      operand.data = reinterpret_cast<A*>(qkv.data + qkv.elements(padded, e.hidden_row));
      operand.row = e.hidden_row;
      inner.data = operand.data + operand.elements(padded, e.hidden_row);
      inner.row = inner_columns;
      wide = reinterpret_cast<T*>(inner.data + inner.elements(padded, inner_columns));
    }
  };

  explicit Encoder(const EncoderArgs& args)
      : g(args), tokens(args.batch.tokens), layers(args, !kMatrix<u> && tokens <= kTogether) {}

  // A product, or the team's part of its panels.
  template <Unit p, class Put>
  void product(const Matrix<p>& w, Part part, const Operand<p>& a, int64_t rows, const Team& team,
               const Put& put) const {
    const int64_t p0 = part.p0, panels = part.p1 - p0;
    part.p0 = p0 + team.begin(panels), part.p1 = p0 + team.end(panels);
    float* scratch = panel_memory.mine();
    const auto fetch = [&](int64_t i) { return w.panel(i, scratch); };
    linear(w.packed, a, rows, part, scratch, fetch, put);
    team.meet();
  }

  void project_qkv(int64_t index, int64_t m0, int64_t rows, const Scratch& s,
                   const Team& team) const {
    T* to = qkv + m0 * qkv_row;
    const Matrix<kQkv> w = layers.qkv(index);
    product(w, w.packed.whole(), s.qkv, rows, team,
            [&](int64_t m, int64_t n, vf v) { store(to + m * qkv_row + n, v); });
  }

  // hidden = LN(sum), and the next product's operand of it, for int8 weights less the bias.
  template <Unit p>
  void normalise(const Parameter& norm, int64_t m0, int64_t rows, const Scratch& s,
                 const Operand<p>& operand, const Team& team) const {
    const float *weight = static_cast<const float*>(norm.weight),
                *bias = static_cast<const float*>(norm.bias);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      float* from = s.sum + m * hidden_row;
      float* to = hidden + (m0 + m) * hidden_row;
      float mean, low, rstd;
      row_statistics(from, spec.hidden, spec.eps, mean, low, rstd);
      for (int64_t j = 0; j < spec.hidden; j += W) {
        const int64_t left = spec.hidden - j;
        const vf v = (load(from + j) - mean - low) * rstd * load_upto(weight + j, left);
        if (is_int8(p)) store(from + j, v);
        store(to + j, v + load_upto(bias + j, left));
      }
      put_row(operand, m, is_int8(p) ? from : to, spec.hidden);
    }
    team.meet();
  }

  // Up and down, some of the inner activations after the other: sum becomes x + the result.
  template <int activation>
  void feed_forward(int64_t index, const float* x, int64_t rows, const Scratch& s,
                    const Team& team) const {
    constexpr bool quantised = u == Unit::int8;
    const Matrix<u> up = layers.up(index), down = layers.down(index);
    for (int64_t c = 0; c < spec.inner; c += s.inner.row) {
      const int64_t columns = min(s.inner.row, spec.inner - c), put_to = round_up(columns, NR);
      product(up, {c / NR, ceil_div(c + columns, NR), 0, spec.hidden}, s.operand, rows, team,
              [&](int64_t m, int64_t n, vf v) {
                if constexpr (activation == 1 && !is_fp32(u))
                  v = gelu_coarse(v);
                else
                  v = activate<activation>(v);
                if constexpr (quantised)
                  store(s.wide + m * inner_row + n, v);
                else
                  s.inner.put(m, n - c, v);
              });
      if constexpr (quantised) {
        for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
          put_row(s.inner, m, s.wide + m * inner_row, spec.inner);
        team.meet();
      } else if (put_to % 64) {
        for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
          for (int64_t n = put_to; n < round_up(put_to, 64); n += W) s.inner.put(m, n, vf{});
        team.meet();
      }
      const float* before = c ? s.sum : x;
      product(down, {0, down.packed.panels, c, columns}, s.inner, rows, team,
              [&](int64_t m, int64_t n, vf v) {
                const int64_t at = m * hidden_row + n;
                store(s.sum + at, v + load(before + at));
              });
    }
  }

  // The operand of the first layer's projection, from x.
  void begin(int64_t m0, int64_t rows, const Scratch& s, const Team& team) const {
    const Vector given{batch.hidden, batch.dtype == kBf16};
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      float* to = hidden + (m0 + m) * hidden_row;
      const int64_t at = (m0 + m) * spec.hidden;
      for (int64_t j = 0; j < spec.hidden; j += W)
        store(to + j, given.at(at + j, at + spec.hidden));
      float* centred = s.sum + m * hidden_row;
      for (int64_t j = 0; is_int8(kQkv) && j < spec.hidden; j += W)
        store(centred + j, load(to + j) - load_upto(g.center + j, spec.hidden - j));
      put_row(s.qkv, m, is_int8(kQkv) ? centred : to, spec.hidden);
    }
    team.meet();
    project_qkv(0, m0, rows, s, team);
  }

  // What follows the attention of a layer, and the next one's projection.
  void finish(int64_t index, int64_t m0, int64_t rows, const Scratch& s, const Team& team) const {
    T* from = context + m0 * hidden_row;
    const float* residual = hidden + m0 * hidden_row;
    Operand<u> operand = s.operand;
    if constexpr (std::is_same_v<A, T> && !kMatrix<u>) {
      operand = {from, hidden_row, nullptr, nullptr};
    } else {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        put_row(operand, m, from + m * hidden_row, spec.hidden);
      team.meet();
    }
    const Matrix<u> out = layers.out(index);
    product(out, out.packed.whole(), operand, rows, team, [&](int64_t m, int64_t n, vf v) {
      const int64_t at = m * hidden_row + n;
      store(s.sum + at, v + load(residual + at));
    });
    normalise(layers.norm1(index), m0, rows, s, s.operand, team);
    switch (spec.activation) {
      case 1:
        feed_forward<1>(index, residual, rows, s, team);
        break;
      case 2:
        feed_forward<2>(index, residual, rows, s, team);
        break;
      case 3:
        feed_forward<3>(index, residual, rows, s, team);
    }
    normalise(layers.norm2(index), m0, rows, s, s.qkv, team);
    if (index + 1 < g.layers) return project_qkv(index + 1, m0, rows, s, team);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
      for (int64_t j = 0; j < spec.hidden; j += W) {
        const vf v = load(hidden + (m0 + m) * hidden_row + j);
        const int64_t at = (m0 + m) * spec.hidden + j;
        if (batch.out_dtype == kBf16)
          store_upto(static_cast<bf16*>(batch.out) + at, v, spec.hidden - j);
        else
          store_upto(static_cast<float*>(batch.out) + at, v, spec.hidden - j);
      }
  }

  // Keeps only the wanted rows of hidden and context.
  void keep(float* hidden_kept, T* context_kept, const Team& team) {
    for (int64_t i = team.begin(batch.count); i < team.end(batch.count); ++i) {
      std::memcpy(hidden_kept + i * hidden_row, hidden + batch.rows[i] * hidden_row,
                  hidden_row * sizeof(float));
      std::memcpy(context_kept + i * hidden_row, context + batch.rows[i] * hidden_row,
                  hidden_row * sizeof(T));
    }
    team.meet();
    if (team.index == 0) {
      hidden = hidden_kept, context = context_kept;
      tokens = batch.count;
    }
    team.meet();
  }

  // Rows of the largest block: it stays in L2.
  int64_t block_most() const {
    const int64_t bytes =
        u == Unit::split ? hidden_row * 10 + block_columns * 6 : block_columns * sizeof(T);
    return max(Isa::block_bytes(u) / bytes, 2 * kTileRows<u>);
  }
  // work(first row, rows, scratch, team) for all rows: shared out in blocks, or, where they are
  // too few for that, each block by all threads together.
  template <class Work>
  void each_block(float* shared, const Team& team, const Work& work) const {
    if (tokens <= kTogether)
      return work(0, tokens, Scratch(*this, shared, kTogether, inner_row), team);
    const int64_t blocks = round_up(ceil_div(tokens, block_most()), team.size);
    const int64_t rows = round_up(ceil_div(tokens, blocks), kTileRows<u>);
    team.crew->share(ceil_div(tokens, rows), [&](int64_t block) {
      const int64_t m0 = block * rows;
      const Scratch own(*this, block_memory.mine(), rows, block_columns);
      work(m0, min(rows, tokens - m0), own, Team{});
    });
  }
  void run() {
    static thread_local Buffer buffer, shared, weights, blocks, heads, panels;
    layers.make_room(weights);
    const int64_t padded = tokens + kMaxTileRows,
                  kept = batch.rows ? batch.count + kMaxTileRows : 0;
    hidden = buffer.get<float>((padded + kept) * hidden_row * 2 + padded * qkv_row);
    float* hidden_kept = hidden + padded * hidden_row;
    context = reinterpret_cast<T*>(hidden_kept + kept * hidden_row);
    T* context_kept = context + padded * hidden_row;
    qkv = context_kept + kept * hidden_row;
    float* together = shared.get<float>(Scratch::floats(*this, kTogether, inner_row));
    const int64_t rows = round_up(min(block_most(), max(tokens, batch.results())), kTileRows<u>);
    block_memory = {blocks, Scratch::floats(*this, rows, block_columns)};
    int64_t longest = 0;
    for (int64_t b = 0; b < batch.batch; ++b)
      longest = max(longest, batch.cu_seqlens[b + 1] - batch.cu_seqlens[b]);
    const Heads<kHeads> attention{qkv,     qkv_row,    spec.hidden, spec.hidden / spec.heads,
                                  context, hidden_row, batch.bias};
    const PerThread<float> head_memory(heads, Head<kHeads>::floats(longest, attention.dim));
    const int64_t widest = max(spec.hidden, spec.inner);
    const int64_t split = 2 * max(split_panel<u>(widest), split_panel<kQkv>(widest));
    panel_memory = {panels, max(split, g.live ? Matrix<u>::scratch(widest) : 0)};
    const int64_t tasks = batch.batch * spec.heads;
    const int64_t parts = tasks < 2 * threads ? ceil_div(2 * threads, tasks) : 1;
    Crew crew;
#pragma omp parallel num_threads(threads)
    {
      const Team team = Team::all(crew);
      layers.pack_qkv(0, team, panel_memory.mine());
      team.meet();
      each_block(together, team, [&](int64_t m0, int64_t rows, const Scratch& s, const Team& team) {
        begin(m0, rows, s, team);
      });
      for (int64_t i = 0; i < g.layers; ++i) {
        layers.pack_rest(i, team, panel_memory.mine());
        layers.pack_qkv(i + 1, team, panel_memory.mine());
        crew.share(tasks * parts, [&](int64_t task) {
          const int64_t b = task / parts / spec.heads, start = batch.cu_seqlens[b];
          const int64_t queries = batch.cu_seqlens[b + 1] - start;
          attention.attend(b, start, queries, batch.seqused_k ? batch.seqused_k[b] : queries,
                           task / parts % spec.heads, task % parts, parts, head_memory.mine());
        });
        if (batch.rows && i + 1 == g.layers) keep(hidden_kept, context_kept, team);
        each_block(together, team,
                   [&](int64_t m0, int64_t rows, const Scratch& s, const Team& team) {
                     finish(i, m0, rows, s, team);
                   });
      }
    }
  }
};

}  // namespace

void encoder(const EncoderArgs& g) {
  if (g.batch.tokens == 0) return;
  const int activation = g.spec.activation;
  if (activation < 1 || activation > 3)
    throw std::invalid_argument("encoder: activation " + std::to_string(activation) +
                                ", expected 1 to 3");
  by_precision(g.precision, [&](auto unit) { Encoder<decltype(unit)::value>(g).run(); });
}

}  // namespace bertfast::BERTFAST_ISA
