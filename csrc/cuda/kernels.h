// Launchers of the CUDA kernels: raw device pointers, sizes and a stream; no torch header.
#pragma once
#include <cstdint>
#include <string>

namespace bertfast::cuda {

// How many devices the driver shows, and why there are none.
int device_count(std::string& why);

// Each throws std::runtime_error with CUDA's own message where a launch fails.
void gather_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
                 int device, void* stream);
void scatter_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes, int device, void* stream);

}  // namespace bertfast::cuda
