// Softmax cross-entropy of logits, which its gradient may replace.
#include "check.h"
#include "kernels.h"
#include "math.h"

namespace bertfast::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Logits {
  T* row;
  Parameter<T> bias;
  int64_t vocabulary;
  bool whole_row, whole_bias;  // in 16-byte accesses

  // Logits [j, j + 8) with their bias, -inf past the vocabulary.
  __device__ __forceinline__ void load(float (&z)[kVector], int64_t j) const {
    const int64_t left = vocabulary - j;
    load8(z, row + j, left, whole_row);
    if (bias.data) {
      float b[kVector];
      bias.load(b, j, left, whole_bias && left >= kVector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = i < left ? z[i] : -INFINITY;
  }
  __device__ __forceinline__ float at(int64_t j) const {
    const float z = to_float(row[j]);
    if (!bias.data) return z;
    return z + (bias.is_fp32 ? static_cast<const float*>(bias.data)[j]
                             : to_float(static_cast<const T*>(bias.data)[j]));
  }
};

// A block a row. The sum of exponentials is online (Milakov & Gimelshein, arXiv:1805.02867), so
// that logits are read once for the loss and once more for the gradient.
template <class T, bool gradient>
__global__ void __launch_bounds__(kThreads)
    cross_entropy(Logits<T> logits, const int64_t* labels, float* loss, int64_t pitch,
                  int64_t ignore_index) {
  logits.row += blockIdx.x * pitch;
  const int64_t label = labels[blockIdx.x], first = int64_t(threadIdx.x) * kVector;
  const bool labelled = label != ignore_index;
  const bool inside = label >= 0 && label < logits.vocabulary;
  const float at_label = inside ? logits.at(label) : NAN;
  float shift = 0, total = 1;
  if (labelled) {  // the same in all threads
    float max = -INFINITY, sum = 0, z[kVector];
    for (int64_t j = first; j < logits.vocabulary; j += kThreads * kVector) {
      logits.load(z, j);
      float top = max;
#pragma unroll
      for (int i = 0; i < kVector; ++i) top = fmaxf(top, z[i]);
      shift = top == -INFINITY ? 0 : top;  // nothing but -inf so far
      sum *= expf(max - shift);
      max = top;
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += expf(z[i] - shift);
    }
    const float top = block_max<kThreads>(max);
    shift = top == -INFINITY ? 0 : top;
    total = block_sum<kThreads>(sum * expf(max - shift));
  }
  // Never shift + log(total): where the logits are large, its rounding is.
  if (threadIdx.x == 0) loss[blockIdx.x] = labelled ? logf(total) + (shift - at_label) : 0;
  // Zeros in the padding too: products that read pairs of values look one column further.
  for (int64_t j = first; gradient && j < pitch; j += kThreads * kVector) {
    float dz[kVector] = {};
    if (labelled) {
      logits.load(dz, j);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        dz[i] = expf(dz[i] - shift) / total - (j + i == label ? 1.f : 0.f);
    }
    if (logits.vocabulary - j < kVector)
#pragma unroll
      for (int i = 0; i < kVector; ++i) dz[i] = j + i < logits.vocabulary ? dz[i] : 0.f;
    store8(logits.row + j, dz, pitch - j, logits.whole_row);
  }
}

}  // namespace

void cross_entropy_rows(int dtype, void* logits, const void* bias, bool bias_fp32,
                        const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary,
                        int64_t pitch, int64_t ignore_index, bool gradient, int device,
                        void* stream) {
  if (rows == 0) return;
  const DeviceGuard guard(device);
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Logits<T> z{static_cast<T*>(logits),
                      {bias, bias_fp32},
                      vocabulary,
                      vectorised(pitch, logits),
                      vectorised(0, bias)};
    launch("cross_entropy", gradient ? cross_entropy<T, true> : cross_entropy<T, false>,
           dim3(unsigned(rows)), kThreads, kThreads / 32 * sizeof(float), stream, z, labels, loss,
           pitch, ignore_index);
  });
}

}  // namespace bertfast::cuda
