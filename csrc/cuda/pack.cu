// Rows between the padded and the packed layout.
#include "check.h"
#include "kernels.h"

namespace bertfast::cuda {
namespace {

constexpr int kThreads = 256;

// One block a row; Unit is the widest type that rows are aligned to.
template <class Unit, bool scatter>
__global__ void copy_rows(const Unit* x, const int64_t* rows, Unit* out, int64_t units) {
  start_next_kernel();
  await_last_kernel();
  const int64_t packed = int64_t(blockIdx.x) * units, padded = rows[blockIdx.x] * units;
  const Unit* from = x + (scatter ? packed : padded);
  Unit* to = out + (scatter ? padded : packed);
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

template <bool scatter>
void copy(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
          void* stream) {
  if (tokens == 0 || row_bytes == 0) return;
  const auto start = [&](auto unit) {
    using Unit = decltype(unit);
    launch("copy_rows", copy_rows<Unit, scatter>, dim3(unsigned(tokens)), kThreads, 0, stream,
           static_cast<const Unit*>(x), rows, static_cast<Unit*>(out),
           row_bytes / int64_t(sizeof(Unit)));
  };
  const uint64_t alignment = uint64_t(x) | uint64_t(out) | uint64_t(row_bytes);
  if (alignment % 16 == 0)
    start(uint4());
  else if (alignment % 4 == 0)
    start(uint32_t());
  else
    start(char());
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
  copy<false>(x, rows, out, tokens, row_bytes, stream);
}

void scatter_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  check(cudaMemsetAsync(out, 0, size_t(out_rows * row_bytes), static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
  copy<true>(x, rows, out, tokens, row_bytes, stream);
}

}  // namespace bertfast::cuda
