// Rows between the padded and the packed layout.
#include "check.h"
#include "kernels.h"

namespace bertfast::cuda {
namespace {

constexpr int kThreads = 256;

// One block a row; Unit is the widest type that rows are aligned to.
template <class Unit, bool scatter>
__global__ void copy_rows(const Unit* x, const int64_t* rows, Unit* out, int64_t units) {
  const int64_t packed = int64_t(blockIdx.x) * units, padded = rows[blockIdx.x] * units;
  const Unit* from = x + (scatter ? packed : padded);
  Unit* to = out + (scatter ? padded : packed);
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

template <bool scatter>
void launch(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
            cudaStream_t stream) {
  if (tokens == 0 || row_bytes == 0) return;
  const uint64_t alignment = uint64_t(x) | uint64_t(out) | uint64_t(row_bytes);
  const unsigned blocks = unsigned(tokens);
  if (alignment % 16 == 0)
    copy_rows<uint4, scatter><<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint4*>(x), rows, static_cast<uint4*>(out), row_bytes / 16);
  else if (alignment % 4 == 0)
    copy_rows<uint32_t, scatter><<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint32_t*>(x), rows, static_cast<uint32_t*>(out), row_bytes / 4);
  else
    copy_rows<char, scatter><<<blocks, kThreads, 0, stream>>>(static_cast<const char*>(x), rows,
                                                              static_cast<char*>(out), row_bytes);
  check(cudaGetLastError(), "copy_rows launch");
}

}  // namespace

int device_count(std::string& why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  cudaGetLastError();  // or it would show in the next call's check
  why = cudaGetErrorString(status);
  return 0;
}

void gather_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
                 int device, void* stream) {
  const DeviceGuard guard(device);
  launch<false>(x, rows, out, tokens, row_bytes, static_cast<cudaStream_t>(stream));
}

void scatter_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto s = static_cast<cudaStream_t>(stream);
  check(cudaMemsetAsync(out, 0, size_t(out_rows * row_bytes), s), "cudaMemsetAsync");
  launch<true>(x, rows, out, tokens, row_bytes, s);
}

}  // namespace bertfast::cuda
