// A linear layer's weights in the panels of packed_linear.h.
#include "pack_weights.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <int precision>
void pack(const PackArgs& g) {
  const Linear<precision> to(g.out, g.n, g.k);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < to.panels; ++p) pack_linear(g.from, to, p, nullptr);  // of one part
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, int precision) {
  return precision == 0   ? Linear<0>(nullptr, n, k).bytes()
         : precision == 1 ? Linear<1>(nullptr, n, k).bytes()
                          : Linear<2>(nullptr, n, k).bytes();
}

int qkv_precision(int precision) { return precision == 2 ? kQkvPrecision<2> : precision; }

void pack_weights(const PackArgs& g) {
  if (g.precision == 0) return pack<0>(g);
  if (g.precision == 1) return pack<1>(g);
  pack<2>(g);
}

}  // namespace bertfast::BERTFAST_ISA
