// The encoder for inference in one call: weights packed once, a block of rows taken through all of
// a layer but its attention while it is in cache, one parallel region for all layers.
#include <omp.h>

#include <cmath>

#include "operators.h"
#include "rows.h"
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// --- packed weights ---

// The view of a block of packed weights: panels, then bias, scale and sum by output.
template <int precision>
struct Linear {
  using Weight = typename Format<precision>::Weight;
  using A = typename Format<precision>::A;
  int64_t n, k, panels, units;
  const Weight* data;
  const float *bias, *scale;  // scale: of int8 weights
  const int32_t* sum;         // of an output's int8 weights

  Linear(const void* packed, int64_t n_, int64_t k_)
      : n(n_),
        k(k_),
        panels(ceil_div(n_, NR)),
        units(round_up(ceil_div(k_, kPer<A>), kUnits<Weight>)),
        data(static_cast<const Weight*>(packed)) {
    const char* end = static_cast<const char*>(packed) + round_up(panel_bytes() * panels, 64);
    bias = reinterpret_cast<const float*>(end);
    scale = bias + panels * NR;
    sum = reinterpret_cast<const int32_t*>(scale + panels * NR);
  }
  int64_t panel_bytes() const { return units * NR * int64_t(sizeof(Weight)); }
  int64_t bytes() const {
    return reinterpret_cast<const char*>(sum + panels * NR) - reinterpret_cast<const char*>(data);
  }
  const Weight* panel(int64_t p) const { return data + p * units * NR; }
};

template <int precision>
void pack(const PackArgs& g) {
  using L = Linear<precision>;
  const L view(g.out, g.n, g.k);
  auto* data = static_cast<char*>(g.out);
  auto *bias = const_cast<float*>(view.bias), *scale = const_cast<float*>(view.scale);
  auto* sum = const_cast<int32_t*>(view.sum);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < view.panels; ++p)
    for (int64_t i = 0; i < NR; ++i) {
      const int64_t n = p * NR + i;
      const float* row = n < g.n ? g.weight + n * g.k : nullptr;
      float top = 0;
      for (int64_t k = 0; row && k < g.k; ++k) top = std::fmax(top, std::fabs(row[k]));
      scale[n] = precision == 2 ? (top > 0 ? top / 127 : 1) : 1;
      bias[n] = row && g.bias ? g.bias[n] : 0;
      sum[n] = 0;
      constexpr int per = kPer<typename L::A>;
      for (int64_t u = 0; u < view.units; ++u)
        for (int j = 0; j < per; ++j) {
          const int64_t k = u * per + j, at = (p * view.units + u) * NR + i;
          const float w = row && k < g.k ? row[k] : 0;
          if constexpr (precision == 0) {
            reinterpret_cast<float*>(data)[at] = w;
          } else if constexpr (precision == 1) {
            reinterpret_cast<uint16_t*>(data)[at * per + j] = uint16_t(round_bf16(splat(w))[0]);
          } else {
            const int q = int(std::lrintf(w / scale[n]));
            reinterpret_cast<int8_t*>(data)[at * per + j] = int8_t(q);
            sum[n] += q;
          }
        }
      bias[n] += g.low * scale[n] * float(sum[n]);
    }
}

// --- products ---

// Rows of a, and for int8 the scale of each.
template <class A>
struct Operand {
  A* data;
  int64_t row;  // elements, a multiple of what a tile reads, zeros behind k
  float* scale;
};

// put(row, column, register) for all rows and the columns of panels [p0, p1); the columns run on
// to the end of the last panel.
template <Sign sign, int precision, class Put>
void linear(const Linear<precision>& w, const Operand<typename Format<precision>::A>& a,
            int64_t rows, int64_t p0, int64_t p1, const Put& put) {
  using Weight = typename Format<precision>::Weight;
  using A = typename Format<precision>::A;
  [[maybe_unused]] const std::conditional_t<kMatrixUnit<Weight>, AmxScope, int> scope{};
  alignas(64) float tile[kMaxTileRows * NR];
  const int64_t step = tile_rows<Weight>(rows);
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t m = 0; m < rows; m += step) {
      const int64_t valid = min(step, rows - m);
      multiply<Weight, sign>(reinterpret_cast<const float*>(a.data + m * a.row), a.row / kPer<A>,
                             valid, w.panel(p), int64_t(NR), w.units, tile, NR);
      for (int64_t i = 0; i < valid; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
          const int64_t n = p * NR + j * W;
          vf v = load(tile + i * NR + j * W);
          if constexpr (std::is_same_v<Weight, quad>) {
            vi sum;
            __builtin_memcpy(&sum, w.sum + n, sizeof sum);
            v = __builtin_convertvector((vi)v - kOffset<sign> * sum, vf) *
                (load(w.scale + n) * a.scale[m + i]);
          } else if constexpr (std::is_same_v<Weight, int8_t>) {
            v *= load(w.scale + n);
          }
          put(m + i, n, v + load(w.bias + n));
        }
    }
}

// A row of floats or bf16 as a's elements, zeros from n to a's whole row. As unsigned int8, 0
// stands for `low`, which no value is below.
template <Sign sign = Sign::both, class A, class T>
void convert_row(const T* from, int64_t n, A* to, int64_t row, float* scale, float low = 0) {
  if constexpr (sizeof(A) == 1) {
    vf top = {}, poison = {};  // inf and NaN make the row NaN
    for (int64_t j = 0; j < n; j += W) {
      const vf v = only(load(from + j), n - j);
      top = max(top, sign == Sign::both && v < 0 ? -v : v);
      poison += v * 0.f;
    }
    const float most = max_of(top) - low,
                inverse = most > 0 ? (sign == Sign::both ? 127 : 255) / most : 1;
    *scale = 1 / inverse + sum(poison);
    for (int64_t j = 0; j < row; j += W) {
      const vf v = (j < n ? only(load(from + j), n - j) - low : vf{}) * inverse;
      // Adding 1.5 * 2^23 rounds to an integer in the low bits.
      const vi q = (vi)(v + 12582912.f) - 0x4B400000 + kOffset<sign>;
      typedef int8_t vb __attribute__((vector_size(W)));
      const vb b = __builtin_convertvector(q, vb);
      __builtin_memcpy(to + j, &b, sizeof b);
    }
  } else {
    for (int64_t j = 0; j < row; j += W) store(to + j, j < n ? only(load(from + j), n - j) : vf{});
  }
}

// --- the encoder ---

template <int precision>
struct Encoder {
  // int8 leaves the projection to queries, keys and values, and attention, to bf16: layer norm's
  // outliers cost its operand most (MiniLM: cosine 0.997 of mean-pooled text, 0.999 with bf16).
  static constexpr int kQkv = precision == 2 ? 1 : precision;
  using F = Format<precision>;
  using A = typename F::A;
  using T = typename Format<kQkv>::A;  // also of what attention makes
  using Key = std::conditional_t<std::is_same_v<T, float>, float, pair>;

  const EncoderArgs& g;
  const int64_t dim = g.hidden / g.heads;
  // Row lengths in elements: whole panels, and whole units of a matrix tile.
  const int64_t hidden_row = round_up(g.hidden, 64), inner_row = round_up(g.inner, 64);
  const int64_t qkv_row = round_up(3 * g.hidden, 64) + 64;
  float* hidden;   // [tokens, hidden_row], the residual stream
  T* qkv;          // [tokens, qkv_row]
  T* context;      // [tokens, hidden_row]
  int64_t tokens;  // of hidden and context, fewer once only some rows are wanted

  // What one block of rows needs, for one thread or shared by all.
  struct Scratch {
    float* sum;      // [rows, hidden_row]
    Operand<T> qkv;  // the projection's; of all but int8 also the others'
    Operand<A> operand, inner;
    T* wide;  // [rows, inner_row]: int8's inner activations before they are quantised

    Scratch(const Encoder& e, Buffer& buffer, int64_t rows) {
      const int64_t padded = rows + kMaxTileRows;
      sum = buffer.get<float>(rows * e.hidden_row + 2 * padded +
                              2 * padded * (e.hidden_row + e.inner_row));
      operand.scale = sum + rows * e.hidden_row;
      inner.scale = operand.scale + padded;
      qkv = {reinterpret_cast<T*>(inner.scale + padded), e.hidden_row, nullptr};
      operand.data = reinterpret_cast<A*>(qkv.data + padded * e.hidden_row),
      operand.row = e.hidden_row;
      inner.data = operand.data + padded * e.hidden_row, inner.row = e.inner_row;
      wide = reinterpret_cast<T*>(inner.data + padded * e.inner_row);
    }
  };

  // The threads that share a block: each takes its part of the rows or panels.
  struct Team {
    int64_t index = 0, size = 1;
    int64_t begin(int64_t n) const { return n * index / size; }
    int64_t end(int64_t n) const { return n * (index + 1) / size; }
    void meet() const {
      if (size > 1) {
#pragma omp barrier
      }
    }
  };

  explicit Encoder(const EncoderArgs& args) : g(args), tokens(args.tokens) {}

  // Every panel of a product, or the team's part of them.
  template <int p = precision, Sign sign = Sign::both, class Put>
  void product(const void* packed, int64_t n, int64_t k, const Operand<typename Format<p>::A>& a,
               int64_t rows, const Team& team, const Put& put) const {
    const Linear<p> w(packed, n, k);
    linear<sign, p>(w, a, rows, team.begin(w.panels), team.end(w.panels), put);
    team.meet();
  }

  void project_qkv(const EncoderLayer& layer, int64_t m0, int64_t rows, const Scratch& s,
                   const Team& team) const {
    T* to = qkv + m0 * qkv_row;
    product<kQkv>(layer.qkv, 3 * g.hidden, g.hidden, s.qkv, rows, team,
                  [&](int64_t m, int64_t n, vf v) { store(to + m * qkv_row + n, v); });
  }

  // hidden = LN(sum), and the next product's operand of it.
  template <class B>
  void normalise(const float* weight, const float* bias, int64_t m0, int64_t rows, const Scratch& s,
                 const Operand<B>& operand, const Team& team) const {
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      const float* from = s.sum + m * hidden_row;
      float* to = hidden + (m0 + m) * hidden_row;
      float mean, rstd;
      row_statistics(from, g.hidden, g.eps, mean, rstd);
      for (int64_t j = 0; j < g.hidden; j += W) {
        const int64_t left = g.hidden - j;
        const vf v = (load(from + j) - mean) * rstd * load_upto(weight + j, left);
        store(to + j, v + load_upto(bias + j, left));
      }
      convert_row(to, g.hidden, operand.data + m * operand.row, operand.row, operand.scale + m);
    }
    team.meet();
  }

  template <int activation>
  void project_up(const EncoderLayer& layer, int64_t rows, const Scratch& s,
                  const Team& team) const {
    constexpr bool quantised = sizeof(A) == 1;
    product(layer.up, g.inner, g.hidden, s.operand, rows, team, [&](int64_t m, int64_t n, vf v) {
      if constexpr (activation == 1 && precision > 0)
        v = gelu_coarse(v);
      else
        v = activate<activation>(v);
      if constexpr (quantised)
        store(s.wide + m * inner_row + n, v);
      else
        store(s.inner.data + m * inner_row + n, v);
    });
    if constexpr (quantised) {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        convert_row<Sign::none>(s.wide + m * inner_row, g.inner, s.inner.data + m * inner_row,
                                inner_row, s.inner.scale + m, g.low);
      team.meet();
    } else if (inner_row > round_up(g.inner, NR)) {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        std::memset(s.inner.data + m * inner_row + round_up(g.inner, NR), 0,
                    (inner_row - round_up(g.inner, NR)) * sizeof(A));
      team.meet();
    }
  }

  // The operand of the first layer's projection, from x.
  void begin(int64_t m0, int64_t rows, const Scratch& s, const Team& team) const {
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
      float* to = hidden + (m0 + m) * hidden_row;
      const int64_t at = (m0 + m) * g.hidden;
      for (int64_t j = 0; j < g.hidden; j += W)
        store(to + j, g.x_bf16 ? load_upto(static_cast<const bf16*>(g.x) + at + j, g.hidden - j)
                               : load_upto(static_cast<const float*>(g.x) + at + j, g.hidden - j));
      convert_row(to, g.hidden, s.qkv.data + m * s.qkv.row, s.qkv.row, s.qkv.scale);
    }
    team.meet();
    project_qkv(g.layers[0], m0, rows, s, team);
  }

  // What follows the attention of a layer, and the next one's projection.
  void finish(int64_t index, int64_t m0, int64_t rows, const Scratch& s, const Team& team) const {
    const EncoderLayer& layer = g.layers[index];
    T* from = context + m0 * hidden_row;
    const float* residual = hidden + m0 * hidden_row;
    const auto add = [&](int64_t m, int64_t n, vf v) {
      store(s.sum + m * hidden_row + n, v + load(residual + m * hidden_row + n));
    };
    Operand<A> operand = s.operand;
    if constexpr (std::is_same_v<A, T>) {
      operand = {from, hidden_row, nullptr};
    } else {
      for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
        convert_row(from + m * hidden_row, g.hidden, operand.data + m * operand.row, operand.row,
                    operand.scale + m);
      team.meet();
    }
    product(layer.out, g.hidden, g.hidden, operand, rows, team, add);
    normalise(layer.norm1, layer.norm1_bias, m0, rows, s, s.operand, team);
    switch (g.activation) {
      case 1:
        project_up<1>(layer, rows, s, team);
        break;
      case 2:
        project_up<2>(layer, rows, s, team);
        break;
      default:
        project_up<3>(layer, rows, s, team);
    }
    product<precision, Sign::none>(layer.down, g.hidden, g.inner, s.inner, rows, team, add);
    normalise(layer.norm2, layer.norm2_bias, m0, rows, s, s.qkv, team);
    if (index + 1 < g.count) return project_qkv(g.layers[index + 1], m0, rows, s, team);
    for (int64_t m = team.begin(rows); m < team.end(rows); ++m)
      for (int64_t j = 0; j < g.hidden; j += W) {
        const vf v = load(hidden + (m0 + m) * hidden_row + j);
        const int64_t at = (m0 + m) * g.hidden + j;
        if (g.y_bf16)
          store_upto(static_cast<bf16*>(g.y) + at, v, g.hidden - j);
        else
          store_upto(static_cast<float*>(g.y) + at, v, g.hidden - j);
      }
  }

  // One head of one sequence; of several parts of its queries, one.
  void attend(int64_t b, int64_t head, int64_t part, int64_t parts) const {
    constexpr int per = kPer<T>;
    const int64_t start = g.cu_seqlens[b], n = g.cu_seqlens[b + 1] - start;
    if (n == 0) return;
    const T* q = qkv + start * qkv_row + head * dim;
    const T *k = q + g.hidden, *v = k + g.hidden;
    const int64_t keys = round_up(n, NR), row_units = qkv_row / per;
    const int64_t dim_units = round_up(ceil_div(dim, per), kUnits<Key>);
    const int64_t key_units = std::is_same_v<T, float> ? n : keys / per;
    const int64_t dim_panels = ceil_div(dim, NR);
    const int64_t step = tile_rows<Key>(n), tiles = ceil_div(n, step);
    static thread_local Buffer buffer;
    float* key_panels = buffer.get<float>(keys * dim_units + key_units * dim_panels * NR +
                                          kMaxTileRows * (2 * keys + NR));
    float* value_panels = key_panels + keys * dim_units;
    float* scores = value_panels + key_units * dim_panels * NR;  // [tile rows, keys]
    float* probabilities = scores + kMaxTileRows * keys;         // of pairs
    float* out = probabilities + kMaxTileRows * keys;            // [tile rows, NR]
    const Key* values = reinterpret_cast<const Key*>(v);         // floats are read in place
    int64_t value_row = qkv_row;

    for (int64_t p = 0; p * NR < n; ++p) {
      float* panel = key_panels + p * dim_units * NR;
      const int64_t used = ceil_div(dim, per);
      pack_panel<Math::fp32, NR>(panel, reinterpret_cast<const float*>(k + p * NR * qkv_row),
                                 row_units, 1, min(NR, n - p * NR), used);
      std::memset(panel + used * NR, 0, (dim_units - used) * NR * sizeof(float));
    }
    if constexpr (per == 2) {
      for (int64_t u = 0; u < key_units; ++u)
        for (int64_t j = 0; j < dim_panels * NR; j += W) {
          const vf even = 2 * u < n ? load(v + 2 * u * qkv_row + j) : vf{};
          const vf odd = 2 * u + 1 < n ? load(v + (2 * u + 1) * qkv_row + j) : vf{};
          const vf both = (vf)((bits(even) >> 16) | bits(odd));
          store(value_panels + (j / NR * key_units + u) * NR + j % NR, both);
        }
      values = reinterpret_cast<const Key*>(value_panels);
      value_row = NR;
    }
    const float scale = 1 / std::sqrt(float(dim));
    [[maybe_unused]] const std::conditional_t<kMatrixUnit<Key>, AmxScope, int> scope{};
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t m0 = t * step, rows = min(step, n - m0);
      for (int64_t p = 0; p * NR < n; ++p)
        multiply(reinterpret_cast<const float*>(q + m0 * qkv_row), row_units, rows,
                 reinterpret_cast<const Key*>(key_panels) + p * dim_units * NR, int64_t(NR),
                 dim_units, scores + p * NR, keys);
      float inverse[kMaxTileRows];
      for (int64_t i = 0; i < rows; ++i) {
        float* s = scores + i * keys;
        vf top = splat(-kInf), total = {};
        for (int64_t j = 0; j < keys; j += W) {
          if (n - j < W) store(s + j, only(load(s + j), n - j, splat(-kInf)));
          top = max(load(s + j), top);
        }
        const float shift = max_of(top) * scale;
        for (int64_t j = 0; j < keys; j += W) {
          const vf p = exp(load(s + j) * scale - shift);
          total += p;
          if constexpr (per == 2)
            store(reinterpret_cast<bf16*>(probabilities + i * keys) + j, p);
          else
            store(s + j, p);
        }
        inverse[i] = 1 / sum(total);
      }
      const float* a = per == 2 ? probabilities : scores;
      T* to = context + (start + m0) * hidden_row + head * dim;
      for (int64_t p = 0; p < dim_panels; ++p) {
        const Key* panel = per == 2 ? values + p * key_units * NR : values + p * NR;
        multiply(a, keys, rows, panel, value_row, key_units, out, NR);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(NR, dim - p * NR); j += W)
            store_upto(to + i * hidden_row + p * NR + j, load(out + i * NR + j) * inverse[i],
                       dim - p * NR - j);
      }
    }
  }

  // Keeps only the wanted rows of hidden and context.
  void keep(float* hidden_kept, T* context_kept) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.n_rows; ++i) {
      std::memcpy(hidden_kept + i * hidden_row, hidden + g.rows[i] * hidden_row,
                  hidden_row * sizeof(float));
      std::memcpy(context_kept + i * hidden_row, context + g.rows[i] * hidden_row,
                  hidden_row * sizeof(T));
    }
#pragma omp single
    {
      hidden = hidden_kept;
      context = context_kept;
      tokens = g.n_rows;
    }
  }

  // work(first row, rows, scratch, team) for all rows: shared out in blocks, or, where they are
  // too few for that, each block by all threads together.
  template <class Work>
  void each_block(Buffer& shared, int threads, const Work& work) const {
    using Weight = typename F::Weight;
    const int64_t tile = kTileRows<Weight>;
    if (tokens <= 4 * tile && threads > 1) {
      const Scratch s(*this, shared, 4 * tile);
      return work(0, tokens, s, Team{omp_get_thread_num(), threads});
    }
    // A block's inner activations stay in L2.
    const int64_t fitting = (768 << 10) / (inner_row * int64_t(sizeof(T)));
    const int64_t most = fitting > 2 * tile ? fitting : 2 * tile;
    const int64_t blocks = round_up(ceil_div(tokens, most), threads);
    const int64_t rows = round_up(ceil_div(tokens, blocks), tile);
#pragma omp for schedule(dynamic)
    for (int64_t m0 = 0; m0 < tokens; m0 += rows) {
      static thread_local Buffer own;
      work(m0, min(rows, tokens - m0), Scratch(*this, own, rows), Team{});
    }
  }
  void run() {
    static thread_local Buffer buffer, shared;
    const int64_t padded = tokens + kMaxTileRows, kept = g.rows ? g.n_rows + kMaxTileRows : 0;
    hidden = buffer.get<float>((padded + kept) * hidden_row * 2 + padded * qkv_row);
    float* hidden_kept = hidden + padded * hidden_row;
    context = reinterpret_cast<T*>(hidden_kept + kept * hidden_row);
    T* context_kept = context + padded * hidden_row;
    qkv = context_kept + kept * hidden_row;
    const int threads = omp_get_max_threads();
    {
      const Scratch sized(*this, shared, 4 * kTileRows<typename F::Weight>);
    }
    Buffer& together = shared;
    const int64_t tasks = g.batch * g.heads;
    const int64_t parts = tasks < 2 * threads ? ceil_div(2 * threads, tasks) : 1;
#pragma omp parallel num_threads(threads)
    {
      if (hidden_row > g.hidden)
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
          std::memset(context + t * hidden_row + g.hidden, 0, (hidden_row - g.hidden) * sizeof(T));
      each_block(together, threads,
                 [&](int64_t m0, int64_t rows, const Scratch& s, const Team& team) {
                   begin(m0, rows, s, team);
                 });
      for (int64_t i = 0; i < g.count; ++i) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * parts; ++task)
          attend(task / parts / g.heads, task / parts % g.heads, task % parts, parts);
        if (g.rows && i + 1 == g.count) keep(hidden_kept, context_kept);
        each_block(together, threads,
                   [&](int64_t m0, int64_t rows, const Scratch& s, const Team& team) {
                     finish(i, m0, rows, s, team);
                   });
      }
    }
  }
};

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, int precision) {
  return precision == 0   ? Linear<0>(nullptr, n, k).bytes()
         : precision == 1 ? Linear<1>(nullptr, n, k).bytes()
                          : Linear<2>(nullptr, n, k).bytes();
}

void pack_weights(const PackArgs& g) {
  if (g.precision == 0) return pack<0>(g);
  if (g.precision == 1) return pack<1>(g);
  pack<2>(g);
}

void encoder(const EncoderArgs& g) {
  if (g.tokens == 0) return;
  if (g.precision == 0) return Encoder<0>(g).run();
  if (g.precision == 1) return Encoder<1>(g).run();
  Encoder<2>(g).run();
}

}  // namespace bertfast::BERTFAST_ISA
