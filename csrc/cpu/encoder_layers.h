// The encoder's layers: with weights packed once, or live ones, packed anew when their turn comes.
#pragma once
#include "crew.h"
#include "lying_linear.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// A layer's matrix. late: each panel of live weights is made, or taken as it lies, by the thread
// that multiplies it.
template <Unit u>
struct Matrix {
  Linear<u> packed;
  LinearWeights live;
  bool late;

  bool lies(int64_t rows) const { return late && LyingLinear<u>::worth(live, packed.k, rows); }
  // Floats for a late panel and its rows, or for `rows` that meet those that lie.
  static int64_t scratch(int64_t k, int64_t rows) {
    const int64_t panel = Linear<u>(nullptr, NR, k).panel_bytes() / 4;
    return NR * k + max(panel, LyingLinear<u>::floats(k, rows));
  }
  // The thread's share, of what is not made late; whoever reads it must meet the others first.
  void pack(const Team& team, float* scratch) const {
    if (late) return;
    for (int64_t p = team.begin(packed.panels); p < team.end(packed.panels); ++p)
      pack_linear(live, packed, p, scratch);
  }
};

// Its panels, see linear; scratch is the thread's.
template <Unit u>
struct MatrixPanels {
  const Matrix<u>& m;
  float* scratch;

  const Stored<u>* panel(int64_t p) const {
    if (!m.late) return m.packed.panel(p);
    const int64_t size = m.packed.units * NR;
    Linear<u> here = m.packed;
    here.data = reinterpret_cast<const Stored<u>*>(scratch) - p * size;
    pack_linear(m.live, here, p, scratch + m.packed.panel_bytes() / 4);
    return here.panel(p);
  }
  Stretch from(int64_t p) const {
    return m.late ? rows_of(m.live, p, m.packed.k) : Panels<u>{m.packed}.from(p);
  }
};

template <Unit u, Unit qkv_unit>
class Layers {
 public:
  // together: all rows meet a panel one after the other. So a live one is packed late, by who
  // multiplies it and into its cache: a layer's weights cross memory once.
  Layers(const EncoderArgs& args, bool together) : g(args), late_(args.live && together) {}

  Matrix<qkv_unit> qkv(int64_t i) const {
    const int64_t keys = g.specs->keys();
    const LayerWeights& w = of(i);
    return matrix<qkv_unit>(
        place(i).qkv, {{w.query, w.key, w.value}, {hidden, keys, keys}, 3, false, g.live_bf16},
        hidden);
  }
  Matrix<u> out(int64_t i) const {
    return matrix<u>(place(i).out, {{of(i).out}, {hidden}, 1, false, g.live_bf16}, hidden);
  }
  // With the gate, where there is one.
  Matrix<u> up(int64_t i) const {
    const bool gated = g.specs->gated;
    return matrix<u>(place(i).up,
                     {{of(i).up, of(i).gate}, {inner, inner}, 1 + gated, gated, g.live_bf16},
                     hidden);
  }
  Matrix<u> down(int64_t i) const {
    return matrix<u>(place(i).down, {{of(i).down}, {hidden}, 1, false, g.live_bf16}, inner);
  }
  const Parameter& norm1(int64_t i) const { return g.live ? g.live[i].norm1 : g.packed[i].norm1; }
  const Parameter& norm2(int64_t i) const { return g.live ? g.live[i].norm2 : g.packed[i].norm2; }

  const float* smooth(int64_t i) const { return g.live ? nullptr : g.packed[i].smooth; }

  // For live weights, of one layer.
  void make_room(Buffer& buffer) {
    if (!g.live) return;
    const int64_t sizes[] = {qkv(0).packed.bytes(), out(0).packed.bytes(), up(0).packed.bytes(),
                             down(0).packed.bytes()};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 64);
    char* at = buffer.get<char>(total);
    room_.qkv = at;
    room_.out = at += round_up(sizes[0], 64);
    room_.up = at += round_up(sizes[1], 64);
    room_.down = at += round_up(sizes[2], 64);
  }
  // The thread's share of what is live, if any. scratch [NR, hidden] is its own.
  void pack_qkv(int64_t i, const Team& team, float* scratch) const {
    if (g.live && i < g.layers) qkv(i).pack(team, scratch);
  }
  void pack_rest(int64_t i, const Team& team, float* scratch) const {
    if (!g.live) return;
    for (const Matrix<u>& m : {out(i), up(i), down(i)}) m.pack(team, scratch);
  }

 private:
  const PackedLayer& place(int64_t i) const { return g.live ? room_ : g.packed[i]; }
  LayerWeights of(int64_t i) const { return g.live ? g.live[i] : LayerWeights{}; }
  // weights: but for their sizes, those of live ones.
  template <Unit v>
  Matrix<v> matrix(const void* packed, const LinearWeights& weights, int64_t k) const {
    return {Linear<v>(packed, columns(weights), k), weights, late_};
  }

  const EncoderArgs& g;
  const int64_t hidden = g.specs->hidden, inner = g.specs->inner;
  const bool late_;
  PackedLayer room_{};  // of a live layer
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
