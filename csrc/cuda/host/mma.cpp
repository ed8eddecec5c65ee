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

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane{d, a, {b0, b1}};
  host::meet(&lane, [](void* const* lanes) {
    float a[16][16], b[16][8];
    const auto of = [&](int i) { return static_cast<Lane*>(lanes[i]); };
    for (int i = 0; i < 32; ++i)
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          a[i / 4 + r % 2 * 8][i % 4 * 2 + h + r / 2 * 8] = half_of<T>(of(i)->a[r], h);
    for (int i = 0; i < 32; ++i)
      for (int r = 0; r < 2; ++r)
        for (int h = 0; h < 2; ++h) b[i % 4 * 2 + h + r * 8][i / 4] = half_of<T>(of(i)->b[r], h);
    for (int i = 0; i < 32; ++i)
      for (int e = 0; e < 4; ++e) {
        const int row = i / 4 + e / 2 * 8, column = i % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        of(i)->d[e] += sum;
      }
  });
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
  multiply<bf16>(d, a, b0, b1);
}
void mma(fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<fp16>(d, a, b0, b1);
}
void ldmatrix(uint32_t (&r)[4], const void* row) { load(r, row, exchange<false>); }
void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { load(r, row, exchange<true>); }

}  // namespace bertfast::cuda
