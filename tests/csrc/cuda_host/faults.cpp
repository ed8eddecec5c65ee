// Kernels with one fault each, which the host harness must show; test_cuda_host.py runs them.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "check.h"
#include "math.h"
#include "mma.h"

using namespace bertfast::cuda;

float* shared() { return reinterpret_cast<float*>(shared_memory()); }

// Each thread passes its index to the thread opposite, through shared memory.
template <bool barrier>
void pass_on(float* out) {
  shared()[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared()[blockDim.x - 1 - threadIdx.x];
}

void divergent_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}
void divergent_shuffle(float* out) {
  const float mine = float(threadIdx.x);
  out[threadIdx.x] =
      threadIdx.x % 2 ? __shfl_xor_sync(~0u, mine, 1) : float(__shfl_xor_sync(~0u, 1, 1));
}
void early_return_of_a_lane(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = warp_sum(1);
}
void shared_out_of_bounds(float* out) {
  shared()[threadIdx.x + 1] = 0;
  out[threadIdx.x] = shared()[threadIdx.x + 1];
}
void global_out_of_bounds(float* out) { out[threadIdx.x + 1] = 0; }

template <bool wait>
void use_of_a_copy(float* out) {
  alignas(16) static const float source[4] = {7, 7, 7, 7};
  copy_async(shared() + threadIdx.x * 4, source, true);
  close_copies();
  if (wait) wait_copies<0>();
  out[threadIdx.x] = shared()[threadIdx.x * 4];
  if (!wait) wait_copies<0>();
}
void forgotten_copy(float* out) {
  copy_async(shared() + threadIdx.x * 4, out, true);
  close_copies();
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  constexpr int n = 64;
  float* out = static_cast<float*>(std::aligned_alloc(16, n * sizeof(float)));
  void (*kernel)(float*) = nullptr;
  size_t shared_bytes = n * 4;
  if (name == "right") kernel = pass_on<true>;
  if (name == "missing barrier") kernel = pass_on<false>;
  if (name == "divergent barrier") kernel = divergent_barrier;
  if (name == "divergent shuffle") kernel = divergent_shuffle;
  if (name == "early return of a lane") kernel = early_return_of_a_lane;
  if (name == "shared out of bounds") kernel = shared_out_of_bounds;
  if (name == "global out of bounds") kernel = global_out_of_bounds;
  if (name == "copy") kernel = use_of_a_copy<true>, shared_bytes = n * 16;
  if (name == "copy not awaited") kernel = use_of_a_copy<false>, shared_bytes = n * 16;
  if (name == "forgotten copy") kernel = forgotten_copy, shared_bytes = n * 16;
  try {
    launch(name.c_str(), kernel, dim3(1), n, shared_bytes, nullptr, out);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  for (int i = 0; i < n; ++i) std::printf("%g ", out[i]);
  std::free(out);
}
