// Programmatic dependent launch (sm_90 and later): within a Chain a kernel may start while the one
// before it still runs, which hides the launch, and waits for it where it calls await_last_kernel.
//
// Every kernel launched in a chain calls both functions below in each of its threads, and before
// the wait touches only what no kernel of the chain writes. Kernels that have ended have waited for
// their predecessors, so the wait covers all of the chain before. Without a chain both do nothing.
#pragma once
#include <cuda_runtime.h>

namespace bertfast::cuda {

__device__ __forceinline__ void await_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// While one lives, this thread's launches form a chain. The first kernel waits for the stream as
// any kernel does.
class Chain {
 public:
  explicit Chain(int device) {
#ifdef __CUDACC__
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    launched_ = major >= 9 ? 0 : kNone;
#else
    (void)device;
#endif
  }
  ~Chain() { launched_ = kNone; }
  Chain(const Chain&) = delete;

  // Whether the launch that asks is a chain's second or later.
  static bool follows() { return launched_ != kNone && launched_++ > 0; }

 private:
  static constexpr int kNone = -1;
  static inline thread_local int launched_ = kNone;
};

}  // namespace bertfast::cuda
