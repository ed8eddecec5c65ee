// Every CUDA call's result becomes an exception; the caller's device comes back.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

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

}  // namespace bertfast::cuda
