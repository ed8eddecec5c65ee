// AVX-512 with the matrix unit (AMX): tiles of 16 rows of 64 bytes, two by two at a time.
//
// fp32 operands go as the sum of three bf16 each, most significant first: 24 bits, all that a float
// has. Six of the nine products are formed; the others are below 2^-24 of the result. See Henry,
// Tang & Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512_bf16.h"

// Macros: the instructions take their registers' numbers as literals.
#define BERTFAST_DOT(c, a, b)    \
  if constexpr (u == Unit::int8) \
    _tile_dpbusd(c, a, b);       \
  else                           \
    _tile_dpbf16ps(c, a, b)
#define BERTFAST_LOAD_A(part)                      \
  _tile_loadd(4, at + (part) * kBlock, a.row * 4); \
  if constexpr (low) _tile_loadd(5, at + (part) * kBlock + 16 * a.row, a.row * 4)
#define BERTFAST_LOAD_B(part)                            \
  _tile_loadd(6, bt + (part) * kBlock, kMatrixRows * 4); \
  _tile_loadd(7, bt + (part) * kBlock + 16, kMatrixRows * 4)
#define BERTFAST_DOTS      \
  BERTFAST_DOT(0, 4, 6);   \
  BERTFAST_DOT(1, 4, 7);   \
  if constexpr (low) {     \
    BERTFAST_DOT(2, 5, 6); \
    BERTFAST_DOT(3, 5, 7); \
  }

namespace bertfast::isa {
namespace {

struct avx512_amx : avx512_bf16 {
  // Whether the processor has the matrix unit and the system lets this process use it.
  static bool supported() {
    unsigned a, b, c, d;
    if (!avx512_bf16::supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    if ((d & kBf16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }
  static bool preferred() { return true; }
  static constexpr Unit kUnits[] = {Unit::split, Unit::bf16, Unit::int8};
  static constexpr bool kHasMatrix = true;
  static constexpr int64_t kGemmRows = 256;
  static constexpr int64_t block_bytes(Unit) { return 1600 << 10; }

  // The calling thread's tile registers: eight of 16 rows of 64 bytes. Others may have left them in
  // another shape, so every task that uses them says so anew.
  struct MatrixScope {
    MatrixScope() {
      alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } const config;
      _tile_loadconfig(&config);
    }
    ~MatrixScope() { _tile_release(); }
  };

  template <Unit u, class Meanwhile>
  static void matrix_product(const MatrixOperand& a, int64_t rows, const float* b, int64_t steps,
                             float* out, int64_t out_row, bool accumulate,
                             const Meanwhile& meanwhile) {
    if (rows > 16)
      product<u, true>(a, b, steps, out, out_row, accumulate, meanwhile);
    else
      product<u, false>(a, b, steps, out, out_row, accumulate, meanwhile);
  }

 private:
  // low: the lower 16 rows too
  template <Unit u, bool low, class Meanwhile>
  static void product(const MatrixOperand& a, const float* b, int64_t steps, float* out,
                      int64_t out_row, bool accumulate, const Meanwhile& meanwhile) {
    float* below = out + 16 * out_row;
    if (accumulate) {
      _tile_loadd(0, out, out_row * 4);
      _tile_loadd(1, out + 16, out_row * 4);
      if constexpr (low) {
        _tile_loadd(2, below, out_row * 4);
        _tile_loadd(3, below + 16, out_row * 4);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const float *at = a.data, *bt = b;
    for (int64_t s = 0; s < steps; ++s, at += a.step, bt += kParts<u> * kBlock) {
      BERTFAST_LOAD_A(0);
      if constexpr (u == Unit::split) {  // each load serves two products or more
        BERTFAST_LOAD_B(2);
        BERTFAST_DOTS
        meanwhile();
        BERTFAST_LOAD_B(1);
        BERTFAST_DOTS
        meanwhile();
        BERTFAST_LOAD_A(1);
        BERTFAST_DOTS
        meanwhile();
        BERTFAST_LOAD_B(0);
        BERTFAST_DOTS
        meanwhile();
        BERTFAST_LOAD_A(2);
        BERTFAST_DOTS
        meanwhile();
        BERTFAST_LOAD_A(0);
        BERTFAST_DOTS
        meanwhile();
      } else {
        BERTFAST_LOAD_B(0);
        BERTFAST_DOTS
        meanwhile();
      }
    }
    _tile_stored(0, out, out_row * 4);
    _tile_stored(1, out + 16, out_row * 4);
    if constexpr (low) {
      _tile_stored(2, below, out_row * 4);
      _tile_stored(3, below + 16, out_row * 4);
    }
  }
};

}  // namespace
}  // namespace bertfast::isa

#undef BERTFAST_DOT
#undef BERTFAST_LOAD_A
#undef BERTFAST_LOAD_B
#undef BERTFAST_DOTS
