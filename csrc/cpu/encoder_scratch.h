// What one block of the encoder's rows needs, for one thread or shared by all.
#pragma once
#include "packed_linear.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u, Unit qkv_unit, class T>  // of the weights, and an element of queries
struct Scratch {
  float* sum;             // [rows, hidden_row]
  Operand<qkv_unit> qkv;  // the projection's
  Operand<u> operand, inner;
  T* wide;        // [rows, inner_row]: int8's inner activations before they are quantised
  float* turned;  // [rows, turned_row]: queries, keys and values before they are turned and rounded

  // Row lengths in elements: `inner` of as many inner activations as there are at a time, a
  // multiple of 64; turned 0 where there are no such rows.
  struct Row {
    int64_t hidden, inner, turned;
  };

  static int64_t floats(int64_t rows, const Row& row) {
    return others(rows, row) + rows * row.turned;
  }
  Scratch(float* memory, int64_t rows, const Row& row) : sum(memory) {
    const int64_t padded = rows + kMaxTileRows;
    operand.scale = sum + rows * row.hidden;
    operand.low = operand.scale + padded;
    inner.scale = operand.low + padded;
    inner.low = inner.scale + padded;
    qkv.scale = inner.low + padded;
    qkv.low = qkv.scale + padded;
    qkv.data = reinterpret_cast<Element<qkv_unit>*>(qkv.low + padded);
    qkv.row = row.hidden;
    operand.data = reinterpret_cast<Element<u>*>(qkv.data + qkv.elements(padded, row.hidden));
    operand.row = row.hidden;
    inner.data = operand.data + operand.elements(padded, row.hidden);
    inner.row = row.inner;
    wide = reinterpret_cast<T*>(inner.data + inner.elements(padded, row.inner));
    turned = memory + others(rows, row);
  }

 private:
  static int64_t others(int64_t rows, const Row& row) {
    const int64_t padded = rows + kMaxTileRows, most = kParts<u> + 2;
    return rows * row.hidden + 6 * padded + padded * most * (row.hidden + row.inner);
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
