// Rows in shared memory, and products of them on tensor cores: what attention's kernels are made
// of.
//
// Half precision: mma m16n8k16. fp32: three TF32 products m16n8k8 of values split in two parts
// (3xTF32, as accurate as fp32 to a few units in the last place). Its operands in fp32 stay where
// they are and are split as they are read: registers would not hold them.
#pragma once
#include "check.h"
#include "math.h"
#include "mma.h"

namespace bertfast::cuda {
namespace {

template <class T, int D>
constexpr int kStage = sizeof(T) == 4 && D == 128 ? 32 : 64;  // rows of a stage in shared memory

template <class T, int D>
constexpr int kRow = D + 16 / int(sizeof(T));  // values from row to row: no bank conflicts

template <class T, int D>
constexpr size_t kStageBytes = 2 * kStage<T, D> * kRow<T, D> * sizeof(T);  // of both operands

// Rows [0, n) of two operands a and b, each [n, D], by stages: all of them at once where
// they fit, to stay; otherwise a ring of two stages that loads one ahead of use.
template <class T, int D>
class Ring {
  static constexpr int kRows = kStage<T, D>, kOperand = kRows * kRow<T, D>;

 public:
  __device__ __forceinline__ Ring(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int n,
                                  int stages)
      : a_(a), b_(b), a_stride_(a_stride), b_stride_(b_stride), n_(n), stages_(stages) {
    resident_ = n <= stages * kRows;
    if (!resident_) return;
    for (int j = 0; j * kRows < n; ++j) load(j);
    close_copies();
    wait_copies<0>();
    __syncthreads();
  }

  // Around a walk over stages [first, end), by all threads of the block.
  __device__ __forceinline__ void begin(int first, int end) {
    if (resident_ || first >= end) return;
    load(first);
    close_copies();
  }
  __device__ __forceinline__ void await(int j, int end) {
    if (resident_) return;
    if (j + 1 < end) load(j + 1);
    close_copies();
    wait_copies<1>();
    __syncthreads();
  }
  __device__ __forceinline__ void release(int j, int end) {
    if (resident_) return;
    if (j + 1 == end) wait_copies<0>();
    __syncthreads();  // all have read what the next load overwrites
  }

  __device__ __forceinline__ const T* a(int j) const { return memory(j); }
  __device__ __forceinline__ const T* b(int j) const { return memory(j) + kOperand; }

 private:
  __device__ __forceinline__ T* memory(int j) const {
    return reinterpret_cast<T*>(shared_memory()) + (resident_ ? j : j % stages_) * 2 * kOperand;
  }
  __device__ __forceinline__ void load(int j) const {
    constexpr int values = 16 / sizeof(T), pieces = D / values;  // of 16 bytes
    for (int i = threadIdx.x; i < kRows * pieces; i += blockDim.x) {
      const int row = j * kRows + i / pieces, column = i % pieces * values;
      const bool valid = row < n_;  // past the end zeros: a NaN of the next sequence stays there
      T* to = memory(j) + i / pieces * kRow<T, D> + column;
      copy_async(to, a_ + (valid ? row * a_stride_ + column : 0), valid);
      copy_async(to + kOperand, b_ + (valid ? row * b_stride_ + column : 0), valid);
    }
  }

  const T *a_, *b_;
  int64_t a_stride_, b_stride_;
  int n_, stages_;
  bool resident_;
};

// Rows [row, row + 16) of x [n, D] in global memory as an a operand.
template <class T, int D>
struct Operand {
  uint32_t a[D / 16][4];  // zeros from row n on

  __device__ __forceinline__ Operand(const T* x, int64_t stride, int row, int n) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + lane / 4 + 8 * half;
      const T* from = x + at * stride + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        a[k][half] = at < n ? *reinterpret_cast<const uint32_t*>(from + 16 * k) : 0;
        a[k][half + 2] = at < n ? *reinterpret_cast<const uint32_t*>(from + 16 * k + 8) : 0;
      }
    }
  }

  // What the lane has of the dot products of its two rows with those of another.
  __device__ __forceinline__ void dot(const Operand& other, float (&sum)[2]) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 x = both(T(), a[k][r]), y = both(T(), other.a[k][r]);
        sum[r % 2] += x.x * y.x + x.y * y.y;
      }
  }
};

template <int D>
struct Operand<float, D> {
  const float* from[2];  // the lane's two rows; row n - 1 stands in for those past it

  __device__ __forceinline__ Operand(const float* x, int64_t stride, int row, int n) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      from[half] = x + min(row + lane / 4 + 8 * half, n - 1) * stride + lane % 4 * 2;
  }
  __device__ __forceinline__ float2 at(int half, int k) const {
    return *reinterpret_cast<const float2*>(from[half] + 8 * k);
  }
  __device__ __forceinline__ void dot(const Operand& other, float (&sum)[2]) const {
#pragma unroll
    for (int k = 0; k < D / 8; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = at(half, k), y = other.at(half, k);
        sum[half] += x.x * y.x + x.y * y.y;
      }
  }
};

// An fp32 a operand [16, 8] in two TF32 parts, and d += a b with it. What the instruction calls
// columns t and t + 4 are here columns 2t and 2t + 1, of a as of b's rows, so that a lane's values
// lie side by side and a product's result is an operand as it is; the sum doesn't mind the order.
struct Split {
  uint32_t high[4], low[4];

  // (first.x, first.y) of row g, (second.x, second.y) of row g + 8
  __device__ __forceinline__ Split(float2 first, float2 second) {
    split(first.x, high[0], low[0]);
    split(second.x, high[1], low[1]);
    split(first.y, high[2], low[2]);
    split(second.y, high[3], low[3]);
  }
  __device__ __forceinline__ void product(float (&d)[4], float b0, float b1) const {
    uint32_t high0, low0, high1, low1;
    split(b0, high0, low0);
    split(b1, high1, low1);
    mma_tf32(d, low, high0, high1);
    mma_tf32(d, high, low0, low1);
    mma_tf32(d, high, high0, high1);
  }

 private:
  // Cut, not rounded: the rest is exact and loses its last two bits of 24.
  __device__ __forceinline__ static void split(float v, uint32_t& high, uint32_t& low) {
    high = __float_as_uint(v) & ~0x1FFFu;
    low = __float_as_uint(v - __uint_as_float(high)) & ~0x1FFFu;
  }
};

// A product's result [16, 16 of it from column tile 2k on], rounded, as the a operand of the next.
template <class T, int tiles>
__device__ __forceinline__ void to_a(uint32_t (&a)[4], const float (&d)[tiles][4], int k) {
  a[0] = pair(T(), d[2 * k][0], d[2 * k][1]);
  a[1] = pair(T(), d[2 * k][2], d[2 * k][3]);
  a[2] = pair(T(), d[2 * k + 1][0], d[2 * k + 1][1]);
  a[3] = pair(T(), d[2 * k + 1][2], d[2 * k + 1][3]);
}

// d = a x^T for rows [row, row + 8 * tiles) of x in shared memory.
template <class T, int D, int tiles>
__device__ __forceinline__ void rows_product(float (&d)[tiles][4], const Operand<T, D>& a,
                                             const T* x, int row) {
  constexpr int pitch = kRow<T, D>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < tiles; ++j) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
  if constexpr (sizeof(T) == 4) {
    const T* at = x + (row + lane / 4) * pitch + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < D / 8; ++k) {
      const Split left(a.at(0, k), a.at(1, k));
#pragma unroll
      for (int j = 0; j < tiles; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(at + 8 * j * pitch + 8 * k);
        left.product(d[j], b.x, b.y);
      }
    }
  } else {
    const T* at = x + (row + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int j = 0; j < tiles; j += 2) {
        uint32_t b[4];
        ldmatrix(b, at + 8 * j * pitch + 16 * k);
        mma(T(), d[j], a.a[k], b[0], b[1]);
        mma(T(), d[j + 1], a.a[k], b[2], b[3]);
      }
  }
}

// d += p x, p [16, 8 * tiles] a product's result, for rows [row, row + 8 * tiles) of x.
template <class T, int D, int tiles>
__device__ __forceinline__ void columns_product(float (&d)[D / 8][4], const float (&p)[tiles][4],
                                                const T* x, int row) {
  constexpr int pitch = kRow<T, D>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
    const T* at = x + (row + lane % 4 * 2) * pitch + lane / 4;
#pragma unroll
    for (int k = 0; k < tiles; ++k) {
      const Split left({p[k][0], p[k][1]}, {p[k][2], p[k][3]});
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        left.product(d[j], at[8 * k * pitch + 8 * j], at[(8 * k + 1) * pitch + 8 * j]);
    }
  } else {
    const T* at = x + (row + lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k) {
      uint32_t a[4], b[4];
      to_a<T>(a, p, k);
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        ldmatrix_transposed(b, at + 16 * k * pitch + 8 * j);
        mma(T(), d[j], a, b[0], b[1]);
        mma(T(), d[j + 1], a, b[2], b[3]);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store2(T* to, float x, float y) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float2*>(to) = {x, y};
  else
    *reinterpret_cast<uint32_t*>(to) = pair(T(), x, y);
}

// Writes d [16, D] times a factor for each of the lane's two rows, where the row is below n.
template <class T, int D>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, const float (&d)[D / 8][4],
                                           float first, float second, int row, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + lane / 4 + 8 * half;
    const float factor = half ? second : first;
    if (at < n)
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        store2(to + at * stride + 8 * j + lane % 4 * 2, d[j][2 * half] * factor,
               d[j][2 * half + 1] * factor);
  }
}

}  // namespace
}  // namespace bertfast::cuda
