// Launchers of the CUDA kernels: raw device pointers, sizes and a stream; no torch header.
//
// Each works on `device`, queues its kernels on `stream` and throws std::runtime_error with CUDA's
// own message where a launch fails. dtype is 0 fp32, 1 bf16, 2 fp16; pointers of void are of that
// type, or of fp32 where a flag says so. Pointers that may be null are named optional.
#pragma once
#include <cstdint>
#include <string>

namespace bertfast::cuda {

// How many devices the driver shows, and why there are none.
int device_count(std::string& why);

void gather_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
                 int device, void* stream);
void scatter_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes, int device, void* stream);

// x, residual (optional), y [tokens, hidden]; weight, bias, x_bias (optional) [hidden]; seed
// (optional) [2]; mean, rstd [tokens]
void add_layer_norm(int dtype, const void* x, const void* residual, const void* weight,
                    bool weight_fp32, const void* bias, bool bias_fp32, const void* x_bias,
                    bool x_bias_fp32, const int64_t* seed, float keep_scale, uint32_t threshold,
                    float eps, int64_t tokens, int64_t hidden, void* y, float* mean, float* rstd,
                    int device, void* stream);
// partial [blocks, 3, hidden] is scratch; columns [3, hidden]: dweight, dbias, dx_bias
void add_layer_norm_backward(int dtype, const void* grad, const void* x, const void* residual,
                             const void* weight, bool weight_fp32, const void* x_bias,
                             bool x_bias_fp32, const int64_t* seed, float keep_scale,
                             uint32_t threshold, const float* mean, const float* rstd,
                             int64_t tokens, int64_t hidden, void* dx, void* dresidual,
                             float* partial, int64_t blocks, float* columns, int device,
                             void* stream);

}  // namespace bertfast::cuda
