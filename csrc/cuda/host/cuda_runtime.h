// Just enough of CUDA's runtime to compile csrc/cuda as C++ and run it on CPU memory: for tests.
// A block's threads are fibers of one OS thread that switch only where they wait for each other,
// so a run is deterministic; runtime.cpp says what faults this shows.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;  // the running fiber's

namespace bertfast::host {

constexpr int kWarp = 32;

char* shared_memory();

void block_barrier();

// All lanes of a warp meet; the last runs `run` on every lane's argument.
using Meeting = void (*)(void* const* arguments);
void meet(void* argument, Meeting run);

// cp.async: copies wait in groups until a thread asks for them. A null source fills with zeros.
void copy_later(void* to, const void* from, size_t bytes);
void close_group();
void finish_groups(int pending);

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T shuffle(T value, int source) {
  struct Lane {
    T value, result;
    int source;
  } lane{value, {}, source};
  meet(&lane, [](void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      Lane& to = *static_cast<Lane*>(lanes[i]);
      to.result = static_cast<Lane*>(lanes[to.source])->value;
    }
  });
  return lane.result;
}

}  // namespace bertfast::host

inline void __syncthreads() { bertfast::host::block_barrier(); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return bertfast::host::shuffle(value, source % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return bertfast::host::shuffle(value, int(threadIdx.x % 32) ^ mask);
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// --- the runtime's calls ---

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (config->gridDim.x == 0) return cudaErrorInvalidValue;
  bertfast::host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                         [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
