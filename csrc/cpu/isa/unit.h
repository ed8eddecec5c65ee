// What a unit holds, 32 bits along k of what is multiplied: the one vocabulary of all products.
#pragma once
#include <cstdint>
#include <type_traits>

namespace bertfast::isa {
namespace {

struct bf16 {
  uint16_t bits;
};

enum class Unit {
  fp32,       // a float
  bf16,       // two bf16 of neighbouring k, for an instruction that adds their products
  int8,       // four bytes of neighbouring k, uint8 of rows and int8 of weights, likewise
  split,      // as bf16, of one of the parts that a float is made of, for a matrix unit
  wide_bf16,  // a float of rows; weights are one bf16, widened as it is loaded
  wide_int8,  // ... one int8
};

constexpr bool is_fp32(Unit u) { return u == Unit::fp32 || u == Unit::split; }
constexpr bool is_int8(Unit u) { return u == Unit::int8 || u == Unit::wide_int8; }

// An element of rows, of which there are kPer in a unit, and what of packed weights meets a unit.
// 32-bit units travel as floats, whatever they hold; floats of weights are split as they are used.
template <Unit u>
using Element =
    std::conditional_t<u == Unit::int8, uint8_t,
                       std::conditional_t<u == Unit::bf16 || u == Unit::split, bf16, float>>;
template <Unit u>
constexpr int kPer = 4 / sizeof(Element<u>);
template <Unit u>
using Stored = std::conditional_t<u == Unit::wide_bf16, bf16,
                                  std::conditional_t<u == Unit::wide_int8, int8_t, float>>;
template <Unit u>
constexpr int kParts = u == Unit::split ? 3 : 1;

// A matrix unit takes a step of k after the other: [parts][32 rows][16 units] of a and [parts][16
// units][32 columns] of b.
constexpr int64_t kStep = 16, kMatrixRows = 32;
constexpr int64_t kBlock = kMatrixRows * kStep;  // units of a step, of one part
template <Unit u>
constexpr int64_t kPauses = u == Unit::split ? 6 : 1;  // in a step: where other work may run

// Where a step's rows of a lie, and how far the next step is, in units.
struct MatrixOperand {
  const float* data;
  int64_t row, step;
};

}  // namespace
}  // namespace bertfast::isa
