// All layers of an encoder for a few tokens: every kernel of them queued by one call, each able to
// start before the one ahead of it ends. See chain.h.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "check.h"
#include "kernels.h"

namespace bertfast::cuda {
namespace {

// The scratch that one layer needs and hands on to the next, cut from one piece of memory.
struct Workspace {
  char *qkv, *context, *picked, *residual, *projected, *middle, *inner, *state;
  float *mean, *rstd, *lse, *partial;
  int64_t bytes = 0;

  // At address 0 it only counts the bytes.
  Workspace(uintptr_t memory, const LayerSpec& spec, const Batch& batch) {
    const int64_t hidden = spec.hidden, tokens = batch.tokens, count = batch.results();
    const auto cut = [&](int64_t size) {
      char* at = reinterpret_cast<char*>(memory + uintptr_t(bytes));
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    const int64_t row = 2 * hidden;                // bytes
    const int64_t rows = std::max(tokens, count);  // a token can be asked for more than once
    qkv = cut(3 * tokens * row), context = cut(tokens * row), state = cut(tokens * row);
    picked = cut(count * row), residual = cut(count * row);
    projected = cut(rows * row), middle = cut(rows * row), inner = cut(rows * 2 * spec.inner);
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(cut(4 * n)); };
    mean = floats(rows), rstd = floats(rows), lse = floats(spec.heads * tokens);
    int64_t most = linear_splits(tokens, hidden, hidden, 3) * tokens * 3 * hidden;
    for (const int64_t m : {tokens, count}) {
      const auto values = [&](int64_t n, int64_t k) { return linear_splits(m, n, k, 1) * m * n; };
      most = std::max(
          {most, values(hidden, hidden), values(spec.inner, hidden), values(hidden, spec.inner)});
    }
    partial = floats(most);
  }
};

}  // namespace

int64_t encoder_workspace(const LayerSpec& spec, const Batch& batch) {
  return Workspace(0, spec, batch).bytes;
}

void encoder(const LayerSpec& spec, const LayerWeights* weights, int64_t layers, const Batch& batch,
             void* workspace, int device, void* stream) {
  if (batch.tokens == 0) return;
  if (batch.out_dtype != batch.dtype)
    throw std::invalid_argument("encoder: the result is of another dtype than the hidden states");
  const DeviceGuard guard(device);
  const Workspace s(reinterpret_cast<uintptr_t>(workspace), spec, batch);
  const int64_t hidden = spec.hidden, inner = spec.inner, tokens = batch.tokens;
  const int64_t dim = hidden / spec.heads;
  const int dtype = batch.dtype;
  const Bias& bias = batch.bias;
  const Chain chain(device);

  const auto product = [&](const void* from, int64_t m, int64_t n, int64_t k, const void* weight,
                           const void* bias, int activation, void* to) {
    linear(dtype, from, m, n, k, 1, weight, nullptr, nullptr, bias, nullptr, nullptr, false,
           activation, to, nullptr, s.partial, device, stream);
  };
  // The bias of the product before it is added here.
  const auto norm = [&](const void* residual, int64_t m, const void* x_bias, const Parameter& w,
                        void* to) {
    add_layer_norm(dtype, s.projected, residual, w.weight, false, w.bias, false, x_bias, false,
                   nullptr, 1, 0, spec.eps, m, hidden, to, s.mean, s.rstd, device, stream);
  };
  const void* x = batch.hidden;
  for (int64_t i = 0; i < layers; ++i, x = s.state) {
    const LayerWeights& w = weights[i];
    linear(dtype, x, tokens, hidden, hidden, 3, w.query.weight, w.key.weight, w.value.weight,
           w.query.bias, w.key.bias, w.value.bias, false, 0, s.qkv, nullptr, s.partial, device,
           stream);
    attention(dtype, s.qkv, s.qkv + 2 * hidden, 3 * hidden, dim, 3 * hidden, hidden, dim,
              batch.cu_seqlens, batch.cu_seqlens, batch.seqused_k, batch.batch, tokens, spec.heads,
              dim, batch.longest, batch.longest, 1 / std::sqrt(float(dim)), bias.data,
              bias.dtype == kFp32, bias.batch, bias.head, bias.query, nullptr, 1, 0, false,
              s.context, s.lse, device, stream);
    const void *context = s.context, *residual = x;
    int64_t m = tokens;
    const bool last = i + 1 == layers;
    if (last && batch.rows) {  // what comes after the attention is done for these alone
      m = batch.count;
      gather_rows(context, batch.rows, s.picked, m, 2 * hidden, device, stream);
      gather_rows(residual, batch.rows, s.residual, m, 2 * hidden, device, stream);
      context = s.picked, residual = s.residual;
    }
    product(context, m, hidden, hidden, w.out.weight, nullptr, 0, s.projected);
    norm(residual, m, w.out.bias, w.norm1, s.middle);
    product(s.middle, m, inner, hidden, w.up.weight, w.up.bias, spec.activation, s.inner);
    product(s.inner, m, hidden, inner, w.down.weight, nullptr, 0, s.projected);
    norm(s.middle, m, w.down.bias, w.norm2, last ? batch.out : s.state);
  }
}

}  // namespace bertfast::cuda
