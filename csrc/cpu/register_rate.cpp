// The rate of the tile of packed_linear.h alone: what a layer's products are held against.
#include <chrono>

#include "operators.h"
#include "packed_linear.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>
double rate() {
  constexpr int64_t kUnits = 4 * kStep, rows = kTileRows<u>;  // of one part
  constexpr int64_t k = kUnits * (u == Unit::split ? 2 : kPer<u>);
  double total = 0;
#pragma omp parallel reduction(+ : total)
  {
    alignas(64) float a[kMaxTileRows * kUnits * kParts<u>] = {};
    alignas(64) Stored<u> b[(kUnits * kParts<u> + 1) * NR * 4 / sizeof(float)] = {};
    alignas(64) float out[kMaxTileRows * NR];
    [[maybe_unused]] const MatrixScope<u> scope{};
    using Clock = std::chrono::steady_clock;
    int64_t units = kUnits;
    asm("" : "+r"(units));  // or the compiler, which knows it, makes another tile, and spills sums
    const auto start = Clock::now();
    double seconds = 0, done = 0;
    for (; seconds < 0.05; seconds = std::chrono::duration<double>(Clock::now() - start).count())
      for (int i = 0; i < 100; ++i, done += 2. * rows * NR * k) {
        if constexpr (kMatrix<u>)
          Isa::matrix_product<u>({a, kStep, kParts<u> * kBlock}, rows,
                                 reinterpret_cast<const float*>(b), kUnits / kStep, out, NR, false,
                                 [] {});
        else
          multiply<u>(a, kUnits, rows, b, NR, units, out, NR);
        asm volatile("" : : "r"(out) : "memory");
      }
    total += done / seconds;
  }
  return total;
}

}  // namespace

double register_rate(Precision precision) {
  return by_precision(precision, [](auto unit) { return rate<decltype(unit)::value>(); });
}

}  // namespace bertfast::BERTFAST_ISA
