// All layers of an encoder for a few tokens: every kernel of them queued by one call, each able to
// start before the one ahead of it ends. See chain.h.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "kernels.h"

namespace bertfast::cuda {
namespace {

// A layer's parameters in the order of LayerWeights in model/layer.py.
struct Weights {
  const void *wq, *bq, *wk, *bk, *wv, *bv, *wo, *bo, *norm1, *norm1_bias;
  const void *w1, *b1, *w2, *b2, *norm2, *norm2_bias;
};

// The scratch that one layer needs and hands on to the next, cut from one piece of memory.
struct Workspace {
  char *qkv, *context, *picked, *residual, *projected, *middle, *inner, *state;
  float *mean, *rstd, *lse, *partial;
  int64_t bytes = 0;

  // At address 0 it only counts the bytes.
  Workspace(uintptr_t memory, int64_t tokens, int64_t count, int64_t heads, int64_t hidden,
            int64_t inner_size) {
    const auto cut = [&](int64_t size) {
      char* at = reinterpret_cast<char*>(memory + uintptr_t(bytes));
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    const int64_t row = 2 * hidden;                // bytes
    const int64_t rows = std::max(tokens, count);  // a token can be asked for more than once
    qkv = cut(3 * tokens * row), context = cut(tokens * row), state = cut(tokens * row);
    picked = cut(count * row), residual = cut(count * row);
    projected = cut(rows * row), middle = cut(rows * row), inner = cut(rows * 2 * inner_size);
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(cut(4 * n)); };
    mean = floats(rows), rstd = floats(rows), lse = floats(heads * tokens);
    int64_t most = linear_splits(tokens, hidden, hidden, 3) * tokens * 3 * hidden;
    for (const int64_t m : {tokens, count}) {
      const auto values = [&](int64_t n, int64_t k) { return linear_splits(m, n, k, 1) * m * n; };
      most = std::max(
          {most, values(hidden, hidden), values(inner_size, hidden), values(hidden, inner_size)});
    }
    partial = floats(most);
  }
};

}  // namespace

int64_t encoder_workspace(int64_t tokens, int64_t count, int64_t heads, int64_t hidden,
                          int64_t inner) {
  return Workspace(0, tokens, count, heads, hidden, inner).bytes;
}

void encoder(int dtype, const void* const* weights, int64_t layers, int64_t heads, int64_t hidden,
             int64_t inner, int activation, float eps, const void* x, const int32_t* cu_seqlens,
             int64_t batch, int64_t tokens, int64_t max_seqlen, const int64_t* rows, int64_t count,
             void* y, void* workspace, int device, void* stream) {
  if (tokens == 0) return;
  const DeviceGuard guard(device);
  const Workspace s(reinterpret_cast<uintptr_t>(workspace), tokens, count, heads, hidden, inner);
  const int64_t dim = hidden / heads;
  const Chain chain(device);

  const auto product = [&](const void* from, int64_t m, int64_t n, int64_t k, const void* weight,
                           const void* bias, int which, void* to) {
    linear(dtype, from, m, n, k, 1, weight, nullptr, nullptr, bias, nullptr, nullptr, false, which,
           to, nullptr, s.partial, device, stream);
  };
  const auto norm = [&](const void* residual, int64_t m, const void* x_bias, const void* weight,
                        const void* bias, void* to) {
    add_layer_norm(dtype, s.projected, residual, weight, false, bias, false, x_bias, false, nullptr,
                   1, 0, eps, m, hidden, to, s.mean, s.rstd, device, stream);
  };
  for (int64_t i = 0; i < layers; ++i) {
    const Weights& w = reinterpret_cast<const Weights*>(weights)[i];
    linear(dtype, x, tokens, hidden, hidden, 3, w.wq, w.wk, w.wv, w.bq, w.bk, w.bv, false, 0, s.qkv,
           nullptr, s.partial, device, stream);
    attention(dtype, s.qkv, s.qkv + 2 * hidden, 3 * hidden, dim, 3 * hidden, hidden, dim,
              cu_seqlens, cu_seqlens, nullptr, batch, tokens, heads, dim, max_seqlen, max_seqlen,
              1 / std::sqrt(float(dim)), nullptr, false, 0, 0, 0, nullptr, 1, 0, false, s.context,
              s.lse, device, stream);
    const void *context = s.context, *residual = x;
    int64_t m = tokens;
    const bool last = i + 1 == layers;
    if (last && rows) {  // what comes after the attention is done for these alone
      gather_rows(context, rows, s.picked, count, 2 * hidden, device, stream);
      gather_rows(residual, rows, s.residual, count, 2 * hidden, device, stream);
      context = s.picked, residual = s.residual, m = count;
    }
    product(context, m, hidden, hidden, w.wo, nullptr, 0, s.projected);
    norm(residual, m, w.bo, w.norm1, w.norm1_bias, s.middle);
    product(s.middle, m, inner, hidden, w.w1, w.b1, activation, s.inner);
    product(s.inner, m, hidden, inner, w.w2, nullptr, 0, s.projected);
    norm(s.middle, m, w.b2, w.norm2, w.norm2_bias, last ? y : s.state);
    x = s.state;
  }
}

}  // namespace bertfast::cuda
