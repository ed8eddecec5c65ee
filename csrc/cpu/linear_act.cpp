// Matrix product with bias and activation in the epilogue, and the activation's backward.
#include <omp.h>

#include <type_traits>

#include "operators.h"
#include "tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t KC = 512;      // k of a block: a panel of b stays in L1 or nearly
constexpr int64_t MC = 32 * MR;  // rows of a task: its block of a stays in L2
constexpr int64_t MS = 10 * MC;  // rows packed at a time: bounds the scratch memory

struct Block {  // of the operands, packed
  float *a, *b;
  int64_t m0, m, k0, k, units;
};

// Panel p of b over the block's k; the parts may meet inside it.
template <Math math>
void pack_b(const GemmArgs& g, const Block& block, int64_t p) {
  const int64_t n0 = p * NR, part_k = g.split_k ? g.k / g.parts : g.k;
  const int64_t part_n = g.split_k ? g.n : g.n / g.parts;
  float* dst = block.b + p * block.units * NR;
  const auto pack = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // Rows of one part at a time; a panel that spans two is packed by element.
    const int64_t part = n0 / part_n, end = min(n0 + NR, g.n);
    if (!g.split_k && end <= (part + 1) * part_n) {
      const T* src = static_cast<const T*>(g.b[part]) + (n0 - part * part_n) * g.b_row;
      pack_panel<math, NR>(dst, src + block.k0 * g.b_k, g.b_row, g.b_k, end - n0, block.k);
      return;
    }
    if (g.split_k && block.k0 / part_k == (block.k0 + block.k - 1) / part_k) {
      const int64_t q = block.k0 / part_k;
      const T* src = static_cast<const T*>(g.b[q]) + n0 * g.b_row + (block.k0 - q * part_k) * g.b_k;
      pack_panel<math, NR>(dst, src, g.b_row, g.b_k, end - n0, block.k);
      return;
    }
    constexpr int per = kPerUnit<math>;
    const auto at = [&](int64_t n, int64_t k) {
      if (n >= g.n || k >= block.k0 + block.k) return 0.f;
      const int64_t q = g.split_k ? k / part_k : n / part_n;
      const T* src = static_cast<const T*>(g.b[q]);
      return to_float(src[(g.split_k ? n : n - q * part_n) * g.b_row +
                          (g.split_k ? k - q * part_k : k) * g.b_k]);
    };
    for (int64_t u = 0; u < block.units; ++u)
      for (int i = 0; i < NR; ++i) {
        const int64_t k = block.k0 + u * per;
        vf v = splat(at(n0 + i, k));
        if constexpr (math == Math::bf16) v = pair_up(v, splat(at(n0 + i, k + 1)));
        dst[u * NR + i] = v[0];
      }
  };
  if (g.b_bf16)
    pack(static_cast<bf16*>(nullptr));
  else
    pack(static_cast<float*>(nullptr));
}

template <Math math>
void pack_a(const GemmArgs& g, const Block& block, int64_t p) {
  const int64_t m0 = block.m0 + p * MR, offset = m0 * g.a_row + block.k0 * g.a_k;
  const int64_t valid = min(MR, block.m0 + block.m - m0);
  float* dst = block.a + p * block.units * MR;
  if (g.a_bf16)
    pack_panel<math, MR>(dst, static_cast<const bf16*>(g.a) + offset, g.a_row, g.a_k, valid,
                         block.k);
  else
    pack_panel<math, MR>(dst, static_cast<const float*>(g.a) + offset, g.a_row, g.a_k, valid,
                         block.k);
}

struct Bias {
  vf value[NV];
};

Bias load_bias(const GemmArgs& g, int64_t n0) {
  float values[NR] = {};
  const int64_t part_n = g.split_k ? g.n : g.n / g.parts;
  for (int i = 0; g.bias[0] && i < NR && n0 + i < g.n; ++i) {
    const int64_t part = (n0 + i) / part_n, j = (n0 + i) % part_n;
    values[i] = g.bias_bf16 ? to_float(static_cast<const bf16*>(g.bias[part])[j])
                            : static_cast<const float*>(g.bias[part])[j];
  }
  Bias bias;
  for (int j = 0; j < NV; ++j) bias.value[j] = load(values + j * W);
  return bias;
}

// A finished tile: bias, the pre-activation if kept, activation, conversion.
template <int activation, class T>
void epilogue(const GemmArgs& g, const float* tile, int64_t tile_row, const Bias& bias, int64_t m0,
              int64_t rows, int64_t n0) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < NV; ++j) {
      const int64_t n = n0 + j * W, valid = g.n - n, at = (m0 + i) * g.c_row + n;
      if (valid <= 0) break;
      const vf z = load(tile + i * tile_row + j * W) + bias.value[j];
      if (g.z) store_upto(static_cast<T*>(g.z) + at, z, valid);
      store_upto(static_cast<T*>(g.c) + at, activate<activation>(z), valid);
    }
}

using Epilogue = void (*)(const GemmArgs&, const float*, int64_t, const Bias&, int64_t, int64_t,
                          int64_t);

template <class T>
Epilogue choose_epilogue(int activation) {
  switch (activation) {
    case 1:
      return epilogue<1, T>;
    case 2:
      return epilogue<2, T>;
    case 3:
      return epilogue<3, T>;
    default:
      return epilogue<0, T>;
  }
}

template <Math math>
void gemm_in(const GemmArgs& g) {
  if (g.m == 0 || g.n == 0) return;
  const Epilogue finish =
      g.c_bf16 ? choose_epilogue<bf16>(g.activation) : choose_epilogue<float>(g.activation);
  static thread_local Buffer a_buffer, b_buffer, c_buffer;
  constexpr int per = kPerUnit<math>;
  const int64_t panels = ceil_div(g.n, NR), part_k = g.split_k ? g.k / g.parts : g.k;
  // Blocks of k alike in size, whole pairs in each; of one part where they can be.
  const int64_t kc = part_k ? ceil_div(ceil_div(part_k, ceil_div(part_k, KC)), 2) * 2 : 2;
  const int64_t ms = min(MS, ceil_div(g.m, MR) * MR), units = ceil_div(kc, per);
  float* a = a_buffer.get<float>(ms * units);
  float* b = b_buffer.get<float>(panels * units * NR);
  // Sums over several blocks of k wait here in fp32.
  const int64_t sums_row = panels * NR;
  float* sums = g.k > kc ? c_buffer.get<float>(ceil_div(g.m, MR) * MR * sums_row) : nullptr;
  const int threads = g.m * g.n * (g.k + 64) < (1 << 20) ? 1 : omp_get_max_threads();

#pragma omp parallel num_threads(threads)
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kc) {
    Block block{a, b, 0, 0, k0, min(kc, g.k - k0), 0};
    block.units = ceil_div(block.k, per);
    const bool last = k0 + kc >= g.k;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; ++p) pack_b<math>(g, block, p);
    for (block.m0 = 0; block.m0 < g.m; block.m0 += ms) {
      block.m = min(ms, g.m - block.m0);
      const int64_t a_panels = ceil_div(block.m, MR);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < a_panels; ++p) pack_a<math>(g, block, p);
      const int64_t m_tasks = ceil_div(block.m, MC);
      const int64_t group = panels / (8 * threads) + 1, n_tasks = ceil_div(panels, group);
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t mt = 0; mt < m_tasks; ++mt)
        for (int64_t nt = 0; nt < n_tasks; ++nt)
          for (int64_t m = mt * MC; m < min((mt + 1) * MC, block.m); m += MR)
            for (int64_t p = nt * group; p < min((nt + 1) * group, panels); ++p) {
              const Bias bias = load_bias(g, p * NR);
              alignas(64) float tile[MR * NR];
              float* out = sums ? sums + (block.m0 + m) * sums_row + p * NR : tile;
              const int64_t out_row = sums ? sums_row : NR;
              tile_packed<math>(block.a + m * block.units, block.b + p * block.units * NR,
                                block.units, out, out_row, k0 > 0);
              if (last) finish(g, out, out_row, bias, block.m0 + m, min(MR, block.m - m), p * NR);
            }
    }
  }
}

template <int activation, class T>
void activation_backward_in(const ActivationBackwardArgs& g) {
  // Columns are independent: no partial sums, so the result is the same for any thread count.
  constexpr int64_t step = 4 * W;
#pragma omp parallel for schedule(static) if (g.m * g.n > (1 << 15))
  for (int64_t n0 = 0; n0 < g.n; n0 += step) {
    vf total[4] = {};
    for (int64_t m = 0; m < g.m; ++m)
      for (int j = 0; j < 4; ++j) {
        const int64_t n = n0 + j * W, valid = g.n - n;
        if (valid <= 0) break;
        vf v = load_upto(static_cast<const T*>(g.grad) + m * g.grad_row + n, valid);
        if (activation) {
          const vf z = load_upto(static_cast<const T*>(g.z) + m * g.n + n, valid);
          v *= derivative<activation>(z);
          store_upto(static_cast<T*>(g.dz) + m * g.n + n, v, valid);
        }
        total[j] += v;
      }
    for (int j = 0; j < 4; ++j)
      if (n0 + j * W < g.n) store_upto(g.column_sum + n0 + j * W, total[j], g.n - n0 - j * W);
  }
}

template <class T>
void activation_backward_of(const ActivationBackwardArgs& g) {
  switch (g.activation) {
    case 1:
      return activation_backward_in<1, T>(g);
    case 2:
      return activation_backward_in<2, T>(g);
    case 3:
      return activation_backward_in<3, T>(g);
    default:
      return activation_backward_in<0, T>(g);
  }
}

}  // namespace

void gemm(const GemmArgs& g) {
  // In bf16 where an operand has no more precision than that; else fp32 throughout.
  if (kHasBf16 && g.a_bf16)
    gemm_in<Math::bf16>(g);
  else
    gemm_in<Math::fp32>(g);
}

void activation_backward(const ActivationBackwardArgs& g) {
  if (g.bf16)
    activation_backward_of<bf16>(g);
  else
    activation_backward_of<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
