// A linear layer's weights in the panels of packed_linear.h.
#include <cmath>

#include "operators.h"
#include "packed_linear.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <int precision>
void pack(const PackArgs& g) {
  using L = Linear<precision>;
  const L view(g.out, g.n, g.k);
  auto* data = static_cast<char*>(g.out);
  auto *bias = const_cast<float*>(view.bias), *scale = const_cast<float*>(view.scale);
  auto* sum = const_cast<int32_t*>(view.sum);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < view.panels; ++p)
    for (int64_t i = 0; i < NR; ++i) {
      const int64_t n = p * NR + i;
      const float* row = n < g.n ? g.weight + n * g.k : nullptr;
      float top = 0;
      for (int64_t k = 0; row && k < g.k; ++k) top = std::fmax(top, std::fabs(row[k]));
      scale[n] = precision == 2 ? (top > 0 ? top / 127 : 1) : 1;
      bias[n] = row && g.bias ? g.bias[n] : 0;
      sum[n] = 0;
      constexpr int per = L::kPerUnit;
      for (int64_t u = 0; u < view.units; ++u)
        for (int j = 0; j < per; ++j) {
          const int64_t k = u * per + j, at = ((p * view.units + u) * NR + i) * per + j;
          const float w = row && k < g.k ? row[k] : 0;
          if constexpr (precision == 0) {
            reinterpret_cast<float*>(data)[at] = w;
          } else if constexpr (precision == 1) {
            reinterpret_cast<uint16_t*>(data)[at] = uint16_t(round_bf16(splat(w))[0]);
          } else {
            const int q = int(std::lrintf(w / scale[n]));
            reinterpret_cast<int8_t*>(data)[at] = int8_t(q);
            sum[n] += q;
          }
        }
      if (sizeof(typename L::A) == 1) bias[n] += g.low * scale[n] * float(sum[n]);
    }
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, int precision) {
  return precision == 0   ? Linear<0>(nullptr, n, k).bytes()
         : precision == 1 ? Linear<1>(nullptr, n, k).bytes()
                          : Linear<2>(nullptr, n, k).bytes();
}

void pack_weights(const PackArgs& g) {
  if (g.precision == 0) return pack<0>(g);
  if (g.precision == 1) return pack<1>(g);
  pack<2>(g);
}

}  // namespace bertfast::BERTFAST_ISA
