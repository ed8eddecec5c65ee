// The encoder for inference in one call: weights packed once or layer by layer, a block of rows
// taken through all of a layer but its attention while it is in cache, one parallel region for all
// layers.
#include <optional>

#include "encoder_attention.h"
#include "encoder_layers.h"
#include "encoder_norm.h"
#include "encoder_scratch.h"
#include "rotary.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// Adds what the first thread spends while it lives.
class Watch {
 public:
  Watch(const EncoderArgs& g, EncoderPart part)
      : to_(g.seconds && omp_get_thread_num() == 0 ? g.seconds + int(part) : nullptr) {
    if (to_) *to_ -= omp_get_wtime();
  }
  ~Watch() {
    if (to_) *to_ += omp_get_wtime();
  }

 private:
  double* to_;
};

template <Unit u>  // of the weights
struct Encoder {
  static constexpr Unit kQkv = qkv_unit(u);
  static constexpr Unit kHeads = is_fp32(kQkv) || kBf16Unit != Unit::bf16 ? Unit::fp32 : Unit::bf16;
  using A = Element<u>;
  using T = Element<kHeads>;
  static constexpr bool kRounded = !std::is_same_v<T, float>;
  using Block = Scratch<u, kQkv, T>;
  // So few rows are worked on together: weights cross memory once, each thread reads its part.
  static constexpr int64_t kTogether = 128;

  const EncoderArgs& g;
  const LayerSpec& spec = *g.specs;  // but for its window and rotary positions
  const Batch& batch = g.batch;
  // Row lengths in elements: whole panels, and whole units of a matrix tile; 64 more, for the rows
  // of a tile would share sets of the L1 cache where they lie multiples of 4 KB apart.
  const int64_t hidden_row = round_up(spec.hidden, 64) + 64;
  const int64_t inner_row = round_up(spec.inner, 64) + 64;
  const int64_t qkv_row = round_up(spec.hidden + 2 * spec.keys(), 64) + 64;
  const int threads = omp_get_max_threads();
  const int64_t block_columns = u == Unit::split ? min(inner_row, 512) : inner_row;
  float* hidden;   // [tokens, hidden_row], the residual stream
  T* qkv;          // [tokens, qkv_row]
  T* context;      // [tokens, hidden_row]
  int64_t tokens;  // of hidden and context, fewer once only some rows are wanted
  Layers<u, kQkv> layers;
  // Each thread's: for a block of rows, and for split panels or for rows to pack.
  PerThread<float> block_memory, panel_memory;

  explicit Encoder(const EncoderArgs& args)
      : g(args), tokens(args.batch.tokens), layers(args, !kMatrix<u> && tokens <= kTogether) {}

  // A product, or the team's part of its panels.
  template <Unit p, class Put>
  void product(const Matrix<p>& w, Part part, const Operand<p>& a, int64_t rows, const Team& team,
               const Put& put) const {
    const int64_t p0 = part.p0, panels = part.p1 - p0;
    part.p0 = p0 + team.begin(panels), part.p1 = p0 + team.end(panels);
    float* scratch = panel_memory.mine();
    bool done = false;
    if constexpr (kLies<p>)
      if ((done = w.lies(rows)))
        LyingLinear<p>{w.live, w.packed, scratch}.multiply(a, rows, part, put);
    if (!done) linear(w.packed, a, rows, part, scratch, MatrixPanels<p>{w, scratch}, put);
    team.meet();
  }

  // sum = x + a product; of x what the next panel meets is fetched.
  auto onto(const float* x, float* sum) const {
    return [x, sum, row = hidden_row](int64_t m, int64_t n, vf v) {
      const int64_t at = m * row + n;
      __builtin_prefetch(x + at + NR);
      store(sum + at, v + load(x + at));
    };
  }

  void project_qkv(int64_t index, int64_t m0, int64_t rows, const Block& s,
                   const Team& team) const {
    const Watch watch(g, EncoderPart::qkv);
    T* to = qkv + m0 * qkv_row;
    const Matrix<kQkv> w = layers.qkv(index);
    const int rotary = g.specs[index].rotary;
    const bool aside = kRounded && rotary >= 0;
    product(w, w.packed.whole(), s.qkv, rows, team, [&](int64_t m, int64_t n, vf v) {
      const int64_t at = m * qkv_row + n;
      if (aside)
        store(s.turned + at, v);
      else
        store(to + at, v);
    });
    if (rotary < 0) return;
    const int64_t dim = spec.dim(), width = spec.hidden + spec.keys();
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      T* row = to + m * qkv_row;
      const float* from = s.turned + m * qkv_row;
      if constexpr (!kRounded) from = row;
      turn(from, batch.angles.data[rotary] + (m0 + m) * dim, width / dim, dim, 1, row);
      for (int64_t j = width; kRounded && j < width + spec.keys(); j += W)
        store(row + j, load(from + j));
    }
    team.meet();
  }

  // The inner activations [c, c + s.inner.row), as the next product's operand.
  template <int activation>
  void feed_up(int64_t index, int64_t c, int64_t rows, const Block& s, const Team& team) const {
    constexpr bool quantised = u == Unit::int8;
    const Matrix<u> up = layers.up(index);
    const int64_t columns = min(s.inner.row, spec.inner - c), panel = spec.gated ? W : NR;
    const Part part{c / panel, ceil_div(c + columns, panel), 0, spec.hidden};
    const auto activated = [](vf v) {
      if constexpr (activation == 1 && !is_fp32(u)) return gelu_coarse(v);
      return activate<activation>(v);
    };
    const auto put = [&](int64_t m, int64_t n, vf v) {
      if constexpr (quantised)
        store(s.wide + m * inner_row + n, v);
      else
        s.inner.put(m, n - c, v);
    };
    if (spec.gated) {
      vf held{};  // a register of up comes before that of the gate
      product(up, part, s.operand, rows, team, [&](int64_t m, int64_t n, vf v) {
        if (n / W % 2 == 0)
          held = activated(v);
        else
          put(m, n / NR * W, held * v);
      });
    } else {
      product(up, part, s.operand, rows, team,
              [&](int64_t m, int64_t n, vf v) { put(m, n, activated(v)); });
    }
    const int64_t put_to = round_up(columns, panel);
    if constexpr (quantised) {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        put_row(s.inner, m, s.wide + m * inner_row, spec.inner);
      team.meet();
    } else if (put_to % 64) {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        for (int64_t n = put_to; n < round_up(put_to, 64); n += W) s.inner.put(m, n, vf{});
      team.meet();
    }
  }

  // Up and down, some of the inner activations after the other: sum becomes x + the result.
  void feed_forward(int64_t index, const float* x, float* sum, int64_t rows, const Block& s,
                    const Team& team) const {
    const Matrix<u> down = layers.down(index);
    for (int64_t c = 0; c < spec.inner; c += s.inner.row) {
      by_activation(spec.activation, [&](auto activation) {
        const Watch watch(g, EncoderPart::up);
        feed_up<decltype(activation)::value>(index, c, rows, s, team);
      });
      const Watch watch(g, EncoderPart::down);
      const float* before = c ? sum : x;
      const int64_t columns = min(s.inner.row, spec.inner - c);
      product(down, {0, down.packed.panels, c, columns}, s.inner, rows, team, onto(before, sum));
    }
  }

  // The operand of the first layer's projection, from x.
  void begin(int64_t m0, int64_t rows, const Block& s, const Team& team) const {
    const Vector given{batch.hidden, batch.dtype == kBf16};
    float* states = hidden + m0 * hidden_row;
    const float* smooth = layers.smooth(0);
    const bool aside = is_int8(kQkv) && !spec.pre_norm && (g.center || smooth);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      float* to = states + m * hidden_row;
      const int64_t at = (m0 + m) * spec.hidden;
      for (int64_t j = 0; j < spec.hidden; j += W)
        store(to + j, given.at(at + j, at + spec.hidden));
      if (spec.pre_norm) continue;
      float* less = s.sum + m * hidden_row;
      for (int64_t j = 0; aside && j < spec.hidden; j += W) {
        vf v = load(to + j);
        if (g.center) v -= load_upto(g.center + j, spec.hidden - j);
        if (smooth) v *= load_upto(smooth + j, spec.hidden - j);
        store(less + j, v);
      }
      put_row(s.qkv, m, aside ? less : to, spec.hidden);
    }
    if (spec.pre_norm)  // each thread of its own rows
      normalise(spec, layers.norm1(0), {states, nullptr, s.sum, hidden_row, smooth}, rows, s.qkv,
                team);
    else
      team.meet();
    project_qkv(0, m0, rows, s, team);
  }

  // What follows the attention of a layer, and the next one's projection.
  void finish(int64_t index, int64_t m0, int64_t rows, const Block& s, const Team& team) const {
    T* from = context + m0 * hidden_row;
    float* states = hidden + m0 * hidden_row;
    Operand<u> operand = s.operand;
    std::optional<Watch> watch(std::in_place, g, EncoderPart::out);
    if constexpr (std::is_same_v<A, T> && !kMatrix<u>) {
      operand = {from, hidden_row, nullptr, nullptr};
    } else {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        put_row(operand, m, from + m * hidden_row, spec.hidden);
      team.meet();
    }
    float* sum = spec.pre_norm ? states : s.sum;
    const Matrix<u> out = layers.out(index);
    product(out, out.packed.whole(), operand, rows, team, onto(states, sum));
    watch.reset();
    const auto normalised = [&](const Parameter& norm, Normed from, const float* smooth,
                                const auto& to) {
      const Watch watch(g, EncoderPart::norm);
      from.smooth = smooth;
      normalise(spec, norm, from, rows, to, team);
    };
    const Normed post{sum, states, sum, hidden_row}, pre{states, nullptr, s.sum, hidden_row};
    const bool last = index + 1 == g.layers;
    const float* smooth = last ? nullptr : layers.smooth(index + 1);
    if (spec.pre_norm) {
      normalised(layers.norm2(index), pre, nullptr, s.operand);
      feed_forward(index, states, states, rows, s, team);
      if (!last) normalised(layers.norm1(index + 1), pre, smooth, s.qkv);
    } else {
      normalised(layers.norm1(index), post, nullptr, s.operand);
      feed_forward(index, states, sum, rows, s, team);
      normalised(layers.norm2(index), post, smooth, s.qkv);
    }
    if (!last) return project_qkv(index + 1, m0, rows, s, team);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
      for (int64_t j = 0; j < spec.hidden; j += W) {
        const vf v = load(states + m * hidden_row + j);
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
  typename Block::Row row_sizes(int64_t inner_columns) const {
    bool turns = false;
    for (int64_t i = 0; i < g.layers; ++i) turns |= g.specs[i].rotary >= 0;
    return {hidden_row, inner_columns, kRounded && turns ? qkv_row : 0};
  }
  // work(first row, rows, scratch, team) for all rows: shared out in blocks, or, where they are
  // too few for that, each block by all threads together.
  template <class Work>
  void each_block(float* shared, const Team& team, const Work& work) const {
    if (tokens <= kTogether)
      return work(0, tokens, Block(shared, kTogether, row_sizes(inner_row)), team);
    // Alike in size, or a thread would wait for the one with the largest; the matrix unit's tiles
    // are whole.
    const int64_t blocks = round_up(ceil_div(tokens, block_most()), team.size);
    const int64_t rows = round_up(ceil_div(tokens, blocks), kMatrix<u> ? kTileRows<u> : 1);
    team.crew->share(ceil_div(tokens, rows), [&](int64_t block) {
      const int64_t m0 = block * rows;
      const Block own(block_memory.mine(), rows, row_sizes(block_columns));
      work(m0, min(rows, tokens - m0), own, Team{});
    });
  }
  void run() {
    static thread_local Buffer buffer, shared, weights, blocks, heads, panels, laid_out, rows_of;
    layers.make_room(weights);
    const int64_t padded = tokens + kMaxTileRows,
                  kept = batch.rows ? batch.count + kMaxTileRows : 0;
    hidden = buffer.get<float>((padded + kept) * hidden_row * 2 + padded * qkv_row);
    float* hidden_kept = hidden + padded * hidden_row;
    context = reinterpret_cast<T*>(hidden_kept + kept * hidden_row);
    T* context_kept = context + padded * hidden_row;
    qkv = context_kept + kept * hidden_row;
    float* together = shared.get<float>(Block::floats(kTogether, row_sizes(inner_row)));
    const int64_t rows = round_up(min(block_most(), max(tokens, batch.results())), kTileRows<u>);
    block_memory = {blocks, Block::floats(rows, row_sizes(block_columns))};
    int64_t longest = 0;
    for (int64_t b = 0; b < batch.batch; ++b)
      longest = max(longest, batch.cu_seqlens[b + 1] - batch.cu_seqlens[b]);
    const PerThread<float> head_memory(heads,
                                       Heads<kHeads>::floats(longest, spec.dim(), g.relative));
    const auto distances = distances_of<kHeads>(g, longest, laid_out);
    const PerThread<float> distance_rows(rows_of, g.relative ? distances[0].scratch_floats() : 0);
    const int64_t widest = max(spec.hidden, spec.inner);
    const int64_t split = 2 * max(split_panel<u>(widest), split_panel<kQkv>(widest));
    panel_memory = {panels, max(split, g.live ? Matrix<u>::scratch(widest, tokens) : 0)};
    const int64_t tasks = batch.batch * spec.heads;
    const int64_t parts = tasks < 2 * threads ? ceil_div(2 * threads, tasks) : 1;
    Crew crew(threads);
#pragma omp parallel num_threads(threads)
    {
      const Team team = Team::all(crew);
      const auto pack = [&](int64_t i) {  // what comes between a layer's queries and the next one's
        const Watch watch(g, EncoderPart::pack);
        if (i >= 0) layers.pack_rest(i, team, panel_memory.mine());
        layers.pack_qkv(i + 1, team, panel_memory.mine());
      };
      pack(-1);
      team.meet();
      each_block(together, team, [&](int64_t m0, int64_t rows, const Block& s, const Team& team) {
        begin(m0, rows, s, team);
      });
      for (int64_t i = 0; i < g.layers; ++i) {
        pack(i);
        std::optional<Watch> watch(std::in_place, g, EncoderPart::attention);
        if (g.relative)
          crew.share(2 * spec.heads, [&](int64_t n) {
            distances[i].template lay_out<kHeads, float>(n, distance_rows.mine());
          });
        const Heads<kHeads> attention{g.specs[i], qkv,        qkv_row,    context,
                                      hidden_row, batch.bias, batch.even, distances[i]};
        crew.share(tasks * parts, [&](int64_t task) {
          const int64_t b = task / parts / spec.heads, start = batch.cu_seqlens[b];
          const int64_t queries = batch.cu_seqlens[b + 1] - start;
          attention.attend(b, start, queries, batch.seqused_k ? batch.seqused_k[b] : queries,
                           task / parts % spec.heads, task % parts, parts, head_memory.mine());
        });
        watch.reset();
        if (batch.rows && i + 1 == g.layers) keep(hidden_kept, context_kept, team);
        each_block(together, team, [&](int64_t m0, int64_t rows, const Block& s, const Team& team) {
          finish(i, m0, rows, s, team);
        });
      }
    }
  }
};

}  // namespace

void encoder(const EncoderArgs& g) {
  if (g.batch.tokens == 0) return;
  by_activation(g.specs->activation, [](auto) {});  // where it can still raise
  by_precision(g.precision, [&](auto unit) { Encoder<decltype(unit)::value>(g).run(); });
}

}  // namespace bertfast::BERTFAST_ISA
