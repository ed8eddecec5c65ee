// Matrix product with bias and activation in the epilogue, and the activation's backward.
#include <omp.h>

#include <stdexcept>
#include <type_traits>

#include "operators.h"
#include "rows.h"
#include "tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t KC = 512;      // k of a block: a panel of b stays in L1 or nearly, split in L2
constexpr int64_t KS = 16 * KC;  // k packed at a time: bounds the scratch memory
constexpr int64_t MC = Isa::kGemmRows;  // rows of a task: its block of a stays in L2 ...
template <Unit u>
constexpr int64_t PC = u == Unit::split ? 1 : 6;  // ... beside this many panels of b

struct Block {  // of an operand along k, packed
  float* data;
  int64_t k0, k, units;  // units of 32 bits that a row has
};
template <Unit u>
int64_t row_units(int64_t k) {
  constexpr int64_t step = kUnitStep<u>;
  return ceil_div(ceil_div(k, kPer<u>), step) * step * kParts<u>;
}

// Panel p of b over the block's k; the parts may meet inside it: `rows` [NR, k] is for that.
template <Unit u>
void pack_b(const GemmArgs& g, const Block& block, int64_t p, float* dst, float* rows) {
  if (block.k == 0) return;
  const int64_t n0 = p * NR, part_k = g.split_k ? g.k / g.b.count : g.k;
  const int64_t part_n = g.split_k ? g.n : g.n / g.b.count;
  const auto pack = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // Rows of one part at a time; a panel that spans two is packed by element.
    const int64_t part = n0 / part_n, end = min(n0 + NR, g.n);
    if (!g.split_k && end <= (part + 1) * part_n) {
      const T* src = static_cast<const T*>(g.b[part]) + (n0 - part * part_n) * g.b_row;
      pack_operand<u, true>(dst, src + block.k0 * g.b_k, g.b_row, g.b_k, end - n0, block.k);
      return;
    }
    if (g.split_k && block.k0 / part_k == (block.k0 + block.k - 1) / part_k) {
      const int64_t q = block.k0 / part_k;
      const T* src = static_cast<const T*>(g.b[q]) + n0 * g.b_row + (block.k0 - q * part_k) * g.b_k;
      pack_operand<u, true>(dst, src, g.b_row, g.b_k, end - n0, block.k);
      return;
    }
    for (int64_t n = n0; n < end; ++n)
      for (int64_t k = block.k0; k < block.k0 + block.k; ++k) {
        const int64_t q = g.split_k ? k / part_k : n / part_n;
        rows[(n - n0) * block.k + k - block.k0] =
            to_float(static_cast<const T*>(g.b[q])[(g.split_k ? n : n - q * part_n) * g.b_row +
                                                   (g.split_k ? k - q * part_k : k) * g.b_k]);
      }
    pack_operand<u, true>(dst, rows, block.k, 1, end - n0, block.k);
  };
  if (g.b_bf16)
    pack(static_cast<bf16*>(nullptr));
  else
    pack(static_cast<float*>(nullptr));
}

// Rows [m0, m0 + rows) of a over the block's k, `tile` in a panel.
template <Unit u>
void pack_a(const GemmArgs& g, const Block& block, int64_t m0, int64_t rows, int64_t tile) {
  const auto pack = [&](auto* a) {
    float* dst = block.data;
    for (int64_t m = 0; m < rows; m += tile, dst += kRows<u> * block.units)
      pack_operand<u, false>(dst, a + (m0 + m) * g.a_row + block.k0 * g.a_k, g.a_row, g.a_k,
                             min(tile, rows - m), block.k);
  };
  if (g.a_bf16)
    pack(static_cast<const bf16*>(g.a));
  else
    pack(static_cast<const float*>(g.a));
}

// The parts' biases side by side in fp32, zeros to the end of the last panel.
void gather_bias(const GemmArgs& g, float* bias, int64_t padded_n) {
  const int64_t part_n = g.split_k ? g.n : g.n / g.b.count;
  for (int64_t n = 0; n < padded_n; ++n) {
    const int64_t part = n / part_n, j = n % part_n;
    bias[n] = g.bias.count == 0 || n >= g.n ? 0.f
              : g.bias_bf16                 ? to_float(static_cast<const bf16*>(g.bias[part])[j])
                                            : static_cast<const float*>(g.bias[part])[j];
  }
}

// A finished tile: bias, the pre-activation if kept, activation, conversion.
template <int activation, class T>
void epilogue(const GemmArgs& g, const float* tile, const float* bias, int64_t m0, int64_t rows,
              int64_t n0) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < NV; ++j) {
      const int64_t n = n0 + j * W, valid = g.n - n, at = (m0 + i) * g.c_row + n;
      if (valid <= 0) break;
      vf z = load(tile + i * NR + j * W) + load(bias + j * W);
      if (g.accumulate) z += load_upto(static_cast<const T*>(g.c) + at, valid);
      if (g.z) store_upto(static_cast<T*>(g.z) + at, z, valid);
      store_upto(static_cast<T*>(g.c) + at, activate<activation>(z), valid);
    }
}

// The epilogue's lines, on their way while the tile is computed.
void prefetch_rows(const GemmArgs& g, int64_t m0, int64_t rows, int64_t n0) {
  const int64_t size = g.c_bf16 ? 2 : 4;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < NR * size; j += 64) {
      const int64_t at = ((m0 + i) * g.c_row + n0) * size + j;
      __builtin_prefetch(static_cast<const char*>(g.c) + at, 1);
      if (g.z) __builtin_prefetch(static_cast<const char*>(g.z) + at, 1);
    }
}

using Epilogue = void (*)(const GemmArgs&, const float*, const float*, int64_t, int64_t, int64_t);

// A finished tile, whose epilogue runs while the next one is computed.
struct Finished {
  const GemmArgs* g;
  Epilogue finish;
  const float *tile = nullptr, *bias = nullptr;
  int64_t m0 = 0, n0 = 0, rows = 0;

  void take(int64_t count) {
    count = min(count, rows);
    if (count) finish(*g, tile, bias, m0, count, n0);
    tile += count * NR, m0 += count, rows -= count;
  }
};

// The next panels of b, on their way to L2 while these are multiplied.
struct Ahead {
  const float *at, *end;
  void take(int64_t lines) {
    for (; lines && at < end; --lines, at += 16) __builtin_prefetch(at, 0, 2);
  }
};

template <class T>
Epilogue choose_epilogue(int activation) {
  return by_activation(activation,
                       [](auto a) -> Epilogue { return epilogue<decltype(a)::value, T>; });
}

template <Unit u>
void gemm_in(const GemmArgs& g) {
  if (g.m == 0 || g.n == 0) return;
  const Epilogue finish =
      g.c_bf16 ? choose_epilogue<bf16>(g.activation) : choose_epilogue<float>(g.activation);
  constexpr int R = kRows<u>;
  const int64_t panels = ceil_div(g.n, NR), part_k = g.split_k ? g.k / g.b.count : g.k;
  // Blocks of k alike in size, whole units in each; of one part where they can be.
  const int64_t whole = 2 * kUnitStep<u>;
  const int64_t kc =
      part_k ? ceil_div(ceil_div(part_k, ceil_div(part_k, KC)), whole) * whole : whole;
  const int64_t ks = min(KS / kc, g.k ? ceil_div(g.k, kc) : 1) * kc, units = row_units<u>(kc);
  const int threads = g.m * g.n * (g.k + 64) < (1 << 20) ? 1 : omp_get_max_threads();
  // Tasks of equal rows, a multiple of the threads; few rows are shared out by columns too.
  const int64_t m_tasks =
      ceil_div(ceil_div(g.m, MC), g.m > MC ? threads : 1) * (g.m > MC ? threads : 1);
  const int64_t mc = ceil_div(ceil_div(g.m, m_tasks), R) * R;
  const int64_t n_tasks = min(panels, ceil_div((u == Unit::split ? 1 : 2) * threads, m_tasks));
  // Of few rows each panel of b meets one task, which packs it right before, into its own cache.
  const bool few = m_tasks == 1;
  const int64_t together = few ? 1 : PC<u>, panel = units * NR, a_size = (mc + R) * units;
  static thread_local Buffer a_buffer, b_buffer, sums_buffer;
  const PerThread<float> scratch(a_buffer, max(a_size, NR * kc) + (few ? panel + NR * kc : 0));
  float* bias = b_buffer.get<float>(panels * (NR + (few ? 0 : ceil_div(ks, kc) * panel)));
  float* b = bias + panels * NR;
  gather_bias(g, bias, panels * NR);
  // Sums over several blocks of k wait here in fp32.
  float* sums = g.k > kc ? sums_buffer.get<float>((g.m + R) * panels * NR) : nullptr;

#pragma omp parallel num_threads(threads)
  for (int64_t s0 = 0; s0 == 0 || s0 < g.k; s0 += ks) {
    const int64_t send = min(s0 + ks, g.k), blocks = g.k ? ceil_div(send - s0, kc) : 1;
    const auto block_at = [&](int64_t i, float* data) {
      const int64_t k0 = s0 + i * kc, k = min(kc, send - k0);
      return Block{data, k0, k, row_units<u>(k)};
    };
    const auto b_block = [&](int64_t i) { return block_at(i, b + i * panels * panel); };
#pragma omp for schedule(static) collapse(2)
    for (int64_t i = 0; i < (few ? 0 : blocks); ++i)
      for (int64_t p = 0; p < panels; ++p) {
        const Block bb = b_block(i);
        pack_b<u>(g, bb, p, bb.data + p * bb.units * NR, scratch.mine());
      }
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t mt = 0; mt < m_tasks; ++mt)
      for (int64_t nt = 0; nt < n_tasks; ++nt) {
        [[maybe_unused]] const MatrixScope<u> scope{};
        const int64_t m0 = mt * mc, rows = min(mc, g.m - m0);
        const int64_t p_end = panels * (nt + 1) / n_tasks;
        if (rows <= 0) continue;
        // Tiles alike in size, since one of few rows would wait for its sums.
        const int64_t tile = kMatrix<u> ? R : ceil_div(rows, ceil_div(rows, R));
        float* fresh = scratch.mine() + a_size;
        alignas(64) float tiles[2][R * NR];
        Finished before{&g, finish};
        int current = 0;
        for (int64_t i = 0; i < blocks; ++i) {
          const Block bb = b_block(i), ab = block_at(i, scratch.mine());
          const bool first = bb.k0 == 0, last = bb.k0 + bb.k == g.k;
          pack_a<u>(g, ab, m0, rows, tile);
          for (int64_t p0 = panels * nt / n_tasks; p0 < p_end; p0 += together) {
            if (few) pack_b<u>(g, bb, p0, fresh, fresh + panel);
            const float *from = few ? fresh : bb.data + p0 * bb.units * NR,
                        *next = from + together * bb.units * NR;
            [[maybe_unused]] Ahead ahead{next, few ? next : next + together * bb.units * NR};
            for (int64_t m = 0, t = 0; m < rows; m += tile, t += R)
              for (int64_t p = p0; p < min(p0 + together, p_end); ++p) {
                const int64_t valid = min(tile, rows - m);
                // Tile by tile: rows of the result would lie pages apart.
                float* out = sums ? sums + ((m0 + t) * panels + p * R) * NR : tiles[current ^= 1];
                if (last) prefetch_rows(g, m0 + m, valid, p * NR);
                tile_packed<u>(ab.data + t * ab.units, valid, from + (p - p0) * bb.units * NR,
                               bb.units, out, !first, [&](int64_t times) {
                                 before.take(ceil_div(R, times));
                                 if constexpr (u == Unit::split) ahead.take(2);
                               });
                before.take(R);
                if (last) before = {&g, finish, out, bias + p * NR, m0 + m, p * NR, valid};
              }
          }
          before.take(R);
        }
      }
  }
}

template <int activation, class T>
void activation_backward_in(const ActivationBackwardArgs& g) {
  const int64_t chunks = row_chunks(g.m);
  static thread_local Buffer buffer;
  float* partial = buffer.get<float>(chunks * padded(g.n));
#pragma omp parallel for schedule(static) if (g.m * g.n > (1 << 15))
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* total = partial + chunk * padded(g.n);
    std::memset(total, 0, padded(g.n) * sizeof(float));
    for (int64_t m = g.m * chunk / chunks; m < g.m * (chunk + 1) / chunks; ++m)
      for (int64_t n = 0; n < g.n; n += W) {
        const int64_t valid = g.n - n;
        vf v = load_upto(static_cast<const T*>(g.grad) + m * g.grad_row + n, valid);
        if (activation) {
          v *= derivative<activation>(load_upto(static_cast<const T*>(g.z) + m * g.n + n, valid));
          store_upto(static_cast<T*>(g.dz) + m * g.n + n, v, valid);
        }
        store(total + n, load(total + n) + v);
      }
  }
  add_chunks(partial, chunks, 1, g.n, g.column_sum);
}

template <class T>
void activation_backward_of(const ActivationBackwardArgs& g) {
  by_activation(g.activation, [&](auto a) { activation_backward_in<decltype(a)::value, T>(g); });
}

}  // namespace

void gemm(const GemmArgs& g) {
  if (g.b.count == 0 || (g.split_k ? g.k : g.n) % g.b.count ||
      (g.bias.count && g.bias.count != g.b.count))
    throw std::invalid_argument("gemm: parts do not divide the product");
  // In bf16 where an operand has no more precision than that; else fp32, on the matrix unit too,
  // whatever the rows: a text's result must not depend on the batch.
  constexpr Unit fp32 = unit_of(Precision::fp32), low = unit_of(Precision::bf16);
  if constexpr (low == Unit::bf16)
    if (g.a_bf16) return gemm_in<low>(g);
  gemm_in<fp32>(g);
}

void activation_backward(const ActivationBackwardArgs& g) {
  if (g.bf16)
    activation_backward_of<bf16>(g);
  else
    activation_backward_of<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
