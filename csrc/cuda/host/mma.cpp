// The warp-wide instructions of ../mma.h by their definition, one lane's fragments at a time.
#include "../mma.h"

namespace bertfast::cuda {
namespace {

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return to_float(v);
}

struct Lane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// d += a b of the lanes' fragments, k = 16 of pairs or 8 of single values; `value` reads the h-th
// of a register.
template <int pairs, class F>
void multiply(void* const* lanes, const F& value) {
  constexpr int kDepth = 8 * pairs;
  float a[16][kDepth], b[kDepth][8];
  const auto of = [&](int i) { return static_cast<Lane*>(lanes[i]); };
  for (int i = 0; i < 32; ++i)
    for (int h = 0; h < pairs; ++h) {
      const int k = i % 4 * pairs + h;
      for (int r = 0; r < 4; ++r)
        a[i / 4 + r % 2 * 8][k + r / 2 * kDepth / 2] = value(of(i)->a[r], h);
      for (int r = 0; r < 2; ++r) b[k + r * kDepth / 2][i / 4] = value(of(i)->b[r], h);
    }
  for (int i = 0; i < 32; ++i)
    for (int e = 0; e < 4; ++e) {
      const int row = i / 4 + e / 2 * 8, column = i % 4 * 2 + e % 2;
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      of(i)->d[e] += sum;
    }
}

struct Rows {
  const uint16_t* row;
  uint32_t* r;
};

void load(uint32_t (&r)[4], const void* row, host::Meeting run) {
  Rows lane{static_cast<const uint16_t*>(row), r};
  host::meet(&lane, run);
}

template <bool transposed>
void exchange(void* const* lanes) {
  const auto at = [&](int matrix, int row, int column) {
    return static_cast<Rows*>(lanes[matrix * 8 + row])->row[column];
  };
  for (int i = 0; i < 32; ++i)
    for (int m = 0; m < 4; ++m) {
      const int g = i / 4, t = i % 4 * 2;
      const uint32_t low = transposed ? at(m, t, g) : at(m, g, t);
      const uint32_t high = transposed ? at(m, t + 1, g) : at(m, g, t + 1);
      static_cast<Rows*>(lanes[i])->r[m] = low | high << 16;
    }
}

}  // namespace

void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Lane lane{d, a, {b0, b1}};
  host::meet(&lane, [](void* const* lanes) { multiply<2>(lanes, half_of<bf16>); });
}
void mma(fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Lane lane{d, a, {b0, b1}};
  host::meet(&lane, [](void* const* lanes) { multiply<2>(lanes, half_of<fp16>); });
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Lane lane{d, a, {b0, b1}};
  host::meet(&lane, [](void* const* lanes) {
    multiply<1>(lanes, [](uint32_t v, int) { return __uint_as_float(v & ~0x1FFFu); });
  });
}
void ldmatrix(uint32_t (&r)[4], const void* row) { load(r, row, exchange<false>); }
void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { load(r, row, exchange<true>); }

}  // namespace bertfast::cuda
