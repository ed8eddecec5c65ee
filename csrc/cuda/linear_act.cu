// The activation after a linear layer, and its backward with the sum over rows that the bias needs.
#include "kernels.h"
#include "rows.h"

namespace bertfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32 * kVector, kRows = kThreads / 32;  // a backward block's tile

template <class T, int activation>
__global__ void __launch_bounds__(kThreads) forward(const T* z, T* y, int64_t n, bool whole) {
  const int64_t j = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  float v[kVector];
  load8(v, z + j, n - j, whole && n - j >= kVector);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = activate<activation>(v[i]);
  store8(y + j, v, n - j, whole && n - j >= kVector);
}

// A block takes 256 columns and every gridDim.y-th group of 8 rows, a warp a row; its warps' sums
// meet in shared memory, those of the gridDim.y blocks in partial [gridDim.y, n].
template <class T, int activation>
__global__ void __launch_bounds__(kThreads)
    backward(const T* grad, const T* z, T* dz, int64_t m, int64_t n, float* partial, bool whole) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t j = int64_t(blockIdx.x) * kColumns + lane * kVector, left = n - j;
  float total[kVector] = {};
  for (int64_t row = int64_t(blockIdx.y) * kRows + warp; row < m; row += gridDim.y * kRows) {
    float g[kVector], v[kVector];
    load8(g, grad + row * n + j, left, whole);
    if (activation) {
      load8(v, z + row * n + j, left, whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) g[i] *= derivative<activation>(v[i]);
      store8(dz + row * n + j, g, left, whole);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] += g[i];
  }
  float (*sums)[kColumns] = reinterpret_cast<float (*)[kColumns]>(shared_memory());
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[warp][lane * kVector + i] = total[i];
  __syncthreads();
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0;
  for (int w = 0; w < kRows; ++w) sum += sums[w][threadIdx.x];
  if (column < n) partial[blockIdx.y * n + column] = sum;
}

template <class F>
void by_activation(int activation, const F& f) {
  if (activation == 0) return f(std::integral_constant<int, 0>());
  if (activation == 1) return f(std::integral_constant<int, 1>());
  if (activation == 2) return f(std::integral_constant<int, 2>());
  if (activation == 3) return f(std::integral_constant<int, 3>());
  throw std::invalid_argument("activation " + std::to_string(activation) + ", expected 0 to 3");
}

}  // namespace

void activate(int dtype, const void* z, void* y, int64_t n, int activation, int device,
              void* stream) {
  if (n == 0) return;
  const DeviceGuard guard(device);
  const int64_t blocks = (n + kThreads * kVector - 1) / (kThreads * kVector);
  by_dtype(dtype, [&](auto value) {
    by_activation(activation, [&](auto which) {
      using T = decltype(value);
      launch("activate", forward<T, decltype(which)::value>, dim3(unsigned(blocks)), kThreads, 0,
             stream, static_cast<const T*>(z), static_cast<T*>(y), n, vectorised(0, z, y));
    });
  });
}

void activation_backward(int dtype, const void* grad, const void* z, void* dz, int64_t m, int64_t n,
                         int activation, float* partial, int64_t blocks, float* column_sum,
                         int device, void* stream) {
  if (n == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid(unsigned((n + kColumns - 1) / kColumns), unsigned(blocks));
  if (blocks > 0)
    by_dtype(dtype, [&](auto value) {
      by_activation(activation, [&](auto which) {
        using T = decltype(value);
        launch("activation_backward", backward<T, decltype(which)::value>, grid, kThreads,
               kRows * kColumns * sizeof(float), stream, static_cast<const T*>(grad),
               static_cast<const T*>(z), static_cast<T*>(dz), m, n, partial,
               vectorised(n, grad, z, dz));
      });
    });
  launch_add_partials(partial, column_sum, blocks, n, stream);
}

}  // namespace bertfast::cuda
