// Norms of the encoder's rows.
#pragma once
#include "crew.h"
#include "packed_linear.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// What a norm of rows makes, all of them `row` floats apart.
struct Normed {
  const float* from;
  float* states;  // null, or the normed rows
  float* spare;   // may be `from`
  int64_t row;
  const float* smooth = nullptr;  // [hidden], or null: what int8's operand is multiplied by
};

// The next product's operand of the norm, for int8 weights less its bias. No weight is no norm.
template <Unit p>
void normalise(const LayerSpec& spec, const Parameter& norm, const Normed& g, int64_t rows,
               const Operand<p>& operand, const Team& team) {
  const float *weight = static_cast<const float*>(norm.weight),
              *bias = static_cast<const float*>(norm.bias);
  const bool aside = is_int8(p) || !g.states;
  for (int64_t m = team.begin(rows); m < team.end(rows); ++m) {
    const float* from = g.from + m * g.row;
    if (!weight) {
      put_row(operand, m, from, spec.hidden);
      continue;
    }
    float *states = g.states ? g.states + m * g.row : nullptr, *spare = g.spare + m * g.row;
    float mean = 0, low = 0, rstd;
    if (spec.rms)
      rstd = row_rms(from, spec.hidden, spec.eps);
    else
      row_statistics(from, spec.hidden, spec.eps, mean, low, rstd);
    for (int64_t j = 0; j < spec.hidden; j += W) {
      const int64_t left = spec.hidden - j;
      const vf v = (load(from + j) - mean - low) * rstd * load_upto(weight + j, left);
      const vf whole = bias ? v + load_upto(bias + j, left) : v;
      const vf bare = g.smooth ? v * load_upto(g.smooth + j, left) : v;
      if (aside) store(spare + j, is_int8(p) ? bare : whole);
      if (states) store(states + j, whole);
    }
    put_row(operand, m, aside ? spare : states, spec.hidden);
  }
  team.meet();
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
