// A linear layer's weights in the panels of packed_linear.h.
#include "pack_weights.h"

namespace bertfast::BERTFAST_ISA {

int64_t packed_bytes(const PackArgs& g) {
  return by_precision(g.precision, [&](auto unit) {
    return Linear<decltype(unit)::value>(nullptr, columns(g.from), g.k).bytes();
  });
}

Precision qkv_precision(Precision precision) {
  const Unit u = unit_of(precision);
  return qkv_unit(u) == u ? precision : Precision::bf16;
}

void pack_weights(const PackArgs& g) {
  by_precision(g.precision, [&](auto unit) {
    const Linear<decltype(unit)::value> to(g.out, columns(g.from), g.k);
    static thread_local Buffer buffer;
    const PerThread<float> scratch(buffer, NR * g.k);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < to.panels; ++p) pack_linear(g.from, to, p, scratch.mine());
  });
}

}  // namespace bertfast::BERTFAST_ISA
