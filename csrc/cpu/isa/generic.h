// What an instruction set is made of, in plain C++ for registers of any size. Each has a file here
// with a struct of the file's name that overrides what it has something better for.
//
// All of it stands in an anonymous namespace: were these functions shared, the linker could keep
// one instruction set's copy for all.
#pragma once
#include "unit.h"

namespace bertfast::isa {
namespace {

template <class T, int lanes>
struct Register {
  typedef T Type __attribute__((vector_size(lanes * sizeof(T))));
};

template <int lanes, int tile_rows>
struct Generic {
  // --- dispatch.cpp's, which runs on any processor ---
  static bool supported() { return true; }
  static bool preferred() { return true; }  // else only on request

  // --- sizes ---
  static constexpr int kLanes = lanes;         // floats in a register
  static constexpr int kTileRows = tile_rows;  // of a product, with two registers of columns
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::wide_bf16, Unit::wide_int8};  // by Precision
  static constexpr bool kSums16 = false;  // int8 products of four are added in 16 bits, see dot_two
  // What is taken off the rows' bytes, of 0 to 255: 128 where the instruction wants a sign.
  static constexpr int kByteZero = 0;
  static constexpr bool kHasMatrix = false;             // all units but fp32 go to a matrix unit
  static constexpr int64_t kGemmRows = 16 * tile_rows;  // of a task: they stay in L2
  // What a block of the encoder's activations may take: it stays in L2 beside the weights.
  static constexpr int64_t block_bytes(Unit u) { return (is_int8(u) ? 384 : 768) << 10; }

  // --- registers ---
  using vf = typename Register<float, lanes>::Type;
  using vi = typename Register<int32_t, lanes>::Type;
  using vu = typename Register<uint32_t, lanes>::Type;
  using vq = typename Register<uint64_t, lanes / 2>::Type;
  using vh = typename Register<uint16_t, lanes>::Type;
  using vb = typename Register<uint8_t, lanes>::Type;

  static vf load_bf16(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
  // To nearest, ties to even; a NaN stays one.
  static vu round_bf16(vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return v == v ? rounded : (u >> 16) | 0x40;
  }
  static void store_bf16(bf16* p, vf v) {
    const vh h = __builtin_convertvector(round_bf16(v), vh);
    __builtin_memcpy(p, &h, sizeof h);
  }
  static void store_bytes(uint8_t* p, vi v) {  // of -128 to 255
    const vb b = __builtin_convertvector(v, vb);
    __builtin_memcpy(p, &b, sizeof b);
  }
  // The unit at p in all lanes, its bits as they are: those of units that are no floats.
  static vf broadcast(const float* p) { return *p - vf{}; }
  // The low halves of a's lanes times m, in full.
  static vq multiply_low(vq a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }

  // --- what only sets with these units have ---
  static vf dot_bf16(vf acc, vf a, vf b);  // acc + a b
  static vf dot_int8(vf acc, vf a, vf b);
  static vf dot_two(vf acc, vf a0, vf a1, const float* b0, const float* b1);  // acc + a0 b0 + a1 b1
  static vf narrow(vf x0, vf x1);                                             // x0 as bf16, then x1
  struct MatrixScope {};  // while it lives, the thread may use the matrix unit
  // out[32][32], or [16][32] for 16 rows or less, (+)= a b. Rows of a past the valid ones are read,
  // and their sums mean nothing. `meanwhile` is called at every pause of a step: the matrix unit
  // works on its own, and other instructions cost nothing beside it.
  template <Unit u, class Meanwhile>
  static void matrix_product(const MatrixOperand& a, int64_t rows, const float* b, int64_t steps,
                             float* out, int64_t out_row, bool accumulate,
                             const Meanwhile& meanwhile);
};

}  // namespace
}  // namespace bertfast::isa
