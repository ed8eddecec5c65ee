// Every CUDA call's result becomes an exception; the caller's device comes back.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "chain.h"

namespace bertfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), as a call that C++ has too.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (shared_bytes > (48 << 10))  // more than a kernel gets unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
#ifdef __CUDACC__
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = Chain::follows();
#endif
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace bertfast::cuda
