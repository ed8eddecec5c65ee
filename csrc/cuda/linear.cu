// activation(x weight^T + bias) for few tokens, where a library's tiles would leave the device
// idle: small tiles, the sum over k shared out among thread blocks where even those are few.
#include <algorithm>

#include "check.h"
#include "kernels.h"
#include "math.h"
#include "mma.h"

namespace bertfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64, kDepth = 64;  // a tile's columns of y, and of k in a stage
constexpr int kStages = 4;
constexpr int kPitch = kDepth + 8;        // values from row to row: eight rows meet all banks once
constexpr int kTilePitch = kColumns + 8;  // of the finished tile, floats
constexpr int64_t kFewRows = 32;          // up to these tiles of 16 rows, then of 64; unmeasured
constexpr int64_t kBlocks = 128;          // as many blocks as splitting k may make; unmeasured
constexpr int64_t kStepsOfSplit = 4;      // stages that a share of k has at least; unmeasured
constexpr int64_t kReduceThreads = 256;

template <class T>
struct Linear {
  const T *x, *w0, *w1, *w2;  // [m, k]; [n, k] each, `parts` of them
  Parameter<T> b0, b1, b2;    // [n], data may be null
  T *y, *z;                   // [m, parts * n]; z, of before the activation, may be null
  float* partial;             // [splits, m, parts * n] where there are several
  int64_t m, n, k;
  int parts, splits, activation;
  bool whole;  // rows of y, z and the biases in 16-byte accesses

  __device__ __forceinline__ const T* weight(int part) const {
    return part == 0 ? w0 : part == 1 ? w1 : w2;
  }
  __device__ __forceinline__ Parameter<T> bias(int part) const {
    return part == 0 ? b0 : part == 1 ? b1 : b2;
  }

  // Bias, activation and stores for a product's values [j, j + 8) of a row in one part.
  __device__ __forceinline__ void finish(float (&v)[kVector], int64_t row, int part,
                                         int64_t j) const {
    const int64_t left = n - j, at = (row * parts + part) * n + j;
    if (b0.data) {
      float b[kVector];
      bias(part).load(b, j, left, whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += b[i];
    }
    if (z) store8(z + at, v, left, whole);
    if (activation == 1) activate8<1>(v);
    if (activation == 2) activate8<2>(v);
    if (activation == 3) activate8<3>(v);
    store8(y + at, v, left, whole);
  }
  template <int which>
  __device__ __forceinline__ static void activate8(float (&v)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = activate<which>(v[i]);
  }
};

// A stage in shared memory: kRows rows of x, then kColumns of the weight.
template <int kRows>
constexpr int kStageValues = (kRows + kColumns) * kPitch;

// Grid (column tiles of all parts, row tiles, splits). Four warps: side by side on 16 rows, or two
// by two on 64.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) linear_tile(const Linear<T> g) {
  constexpr int kWarp = kRows == 16 ? 16 : 32;  // a warp's rows and columns
  constexpr int kAcross = kColumns / kWarp, kBlocks16 = kWarp / 16;
  T* const memory = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = int((g.n + kColumns - 1) / kColumns), part = int(blockIdx.x) / tiles;
  const int64_t column = int64_t(int(blockIdx.x) % tiles) * kColumns;
  const int64_t row = int64_t(blockIdx.y) * kRows;
  const int steps = int((g.k + kDepth - 1) / kDepth);
  const int first = steps * int(blockIdx.z) / g.splits;
  const int end = steps * (int(blockIdx.z) + 1) / g.splits;
  const T* const weight = g.weight(part);

  const auto load = [&](int step, const T* from, int64_t start, int64_t rows, int count, int at) {
    T* const to = memory + step % kStages * kStageValues<kRows> + at * kPitch;
    for (int i = threadIdx.x; i < count * (kDepth / 8); i += kThreads) {
      const int64_t r = start + i / (kDepth / 8), c = int64_t(step) * kDepth + i % (kDepth / 8) * 8;
      const bool valid = r < rows && c < g.k;
      copy_async(to + i / (kDepth / 8) * kPitch + i % (kDepth / 8) * 8,
                 from + (valid ? r * g.k + c : 0), valid);
    }
  };
  const auto load_x = [&](int step) {
    if (step < end) load(step, g.x, row, g.m, kRows, 0);
  };
  const auto load_weight = [&](int step) {
    if (step < end) load(step, weight, column, g.n, kColumns, kRows);
  };

  // No kernel before this one writes weights, so they may arrive while it still runs.
  start_next_kernel();
  for (int s = 0; s < kStages - 1; ++s) load_weight(first + s);
  await_last_kernel();
  for (int s = 0; s < kStages - 1; ++s) {
    load_x(first + s);
    close_copies();
  }
  float d[kBlocks16][2 * kBlocks16][4] = {};
  const int warp_row = warp / kAcross * kWarp, warp_column = warp % kAcross * kWarp;
  for (int step = first; step < end; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // also: all have read the stage that the next load overwrites
    load_x(step + kStages - 1);
    load_weight(step + kStages - 1);
    close_copies();
    const T* const stage = memory + step % kStages * kStageValues<kRows>;
    const T* const x = stage + (warp_row + lane % 16) * kPitch + lane / 16 * 8;
    const T* const w =
        stage + (kRows + warp_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kBlocks16][4], b[4];
#pragma unroll
      for (int i = 0; i < kBlocks16; ++i) ldmatrix(a[i], x + 16 * i * kPitch + k);
#pragma unroll
      for (int j = 0; j < kBlocks16; ++j) {
        ldmatrix(b, w + 16 * j * kPitch + k);
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
          mma(T(), d[i][2 * j], a[i], b[0], b[1]);
          mma(T(), d[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
  __syncthreads();

  // The tile passes through shared memory, so that its rows leave 16 bytes at a time.
  float* const tile = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < kBlocks16; ++i)
#pragma unroll
    for (int j = 0; j < 2 * kBlocks16; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = tile + (warp_row + 16 * i + 8 * half + lane / 4) * kTilePitch +
                          warp_column + 8 * j + lane % 4 * 2;
        to[0] = d[i][j][2 * half], to[1] = d[i][j][2 * half + 1];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns / kVector; i += kThreads) {
    const int r = i / (kColumns / kVector), c = i % (kColumns / kVector) * kVector;
    if (row + r >= g.m || column + c >= g.n) continue;
    float v[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = tile[r * kTilePitch + c + e];
    if (g.splits == 1)
      g.finish(v, row + r, part, column + c);
    else
      store8(g.partial + ((blockIdx.z * g.m + row + r) * g.parts + part) * g.n + column + c, v,
             g.n - column - c, g.whole);
  }
}

// Sums the splits in a fixed order, so that bits never change, eight values a thread.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) linear_reduce(const Linear<T> g) {
  start_next_kernel();
  await_last_kernel();
  const int64_t pieces = (g.n + kVector - 1) / kVector;
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t row = i / pieces / g.parts, j = i % pieces * kVector, left = g.n - j;
  const int part = int(i / pieces % g.parts);
  if (row >= g.m) return;
  float total[kVector] = {};
  for (int s = 0; s < g.splits; ++s) {
    float v[kVector];
    load8(v, g.partial + ((s * g.m + row) * g.parts + part) * g.n + j, left, g.whole);
#pragma unroll
    for (int e = 0; e < kVector; ++e) total[e] += v[e];
  }
  g.finish(total, row, part, j);
}

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t tile_rows(int64_t m) { return m <= kFewRows ? 16 : 64; }

}  // namespace

int64_t linear_splits(int64_t m, int64_t n, int64_t k, int64_t parts) {
  const int64_t blocks = tiles(m, tile_rows(m)) * tiles(n, kColumns) * parts;
  const int64_t most = std::min<int64_t>(8, tiles(k, kDepth) / kStepsOfSplit);
  return std::max<int64_t>(1, std::min(most, kBlocks / std::max<int64_t>(1, blocks)));
}

void linear(int dtype, const void* x, int64_t m, int64_t n, int64_t k, int64_t parts,
            const void* w0, const void* w1, const void* w2, const void* b0, const void* b1,
            const void* b2, bool bias_fp32, int activation, void* y, void* z, float* partial,
            int device, void* stream) {
  if (m == 0 || n == 0) return;
  if (k % 8 || !vectorised(k, x, w0, w1, w2))
    throw std::invalid_argument("linear takes 16-byte aligned rows, k is " + std::to_string(k));
  if (activation < 0 || activation > 3)
    throw std::invalid_argument("linear: activation " + std::to_string(activation) +
                                ", expected 0 to 3");
  const DeviceGuard guard(device);
  const int splits = int(linear_splits(m, n, k, parts));
  by_half(dtype, [&](auto type) {
    using T = decltype(type);
    const auto of = [](const void* p) { return static_cast<const T*>(p); };
    const Linear<T> g{of(x),
                      of(w0),
                      of(w1),
                      of(w2),
                      {b0, bias_fp32},
                      {b1, bias_fp32},
                      {b2, bias_fp32},
                      static_cast<T*>(y),
                      static_cast<T*>(z),
                      partial,
                      m,
                      n,
                      k,
                      int(parts),
                      splits,
                      activation,
                      vectorised(n, b0, b1, b2, y, z, partial)};
    const auto start = [&](auto kernel, int64_t rows) {
      const dim3 grid(unsigned(tiles(n, kColumns) * parts), unsigned(tiles(m, rows)),
                      unsigned(splits));
      launch("linear", kernel, grid, kThreads, kStages * (rows + kColumns) * kPitch * sizeof(T),
             stream, g);
    };
    if (tile_rows(m) == 16)
      start(linear_tile<T, 16>, 16);
    else
      start(linear_tile<T, 64>, 64);
    if (splits > 1)
      launch("linear, sum over splits", linear_reduce<T>,
             dim3(unsigned(tiles(m * parts * tiles(n, kVector), kReduceThreads))), kReduceThreads,
             0, stream, g);
  });
}

}  // namespace bertfast::cuda
