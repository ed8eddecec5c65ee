// The encoder's layers: with weights packed once, or live ones, packed anew when their turn comes.
#pragma once
#include "crew.h"
#include "pack_weights.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// A layer's matrix, and what a panel that is packed late is packed from.
template <Unit u>
struct Matrix {
  Linear<u> packed;
  LinearWeights live;
  bool late;

  // Floats of one panel, and of rows to pack it from where parts meet.
  static int64_t scratch(int64_t k) { return Linear<u>(nullptr, NR, k).panel_bytes() / 4 + NR * k; }
  // Where panel p is now.
  const Stored<u>* panel(int64_t p, float* scratch) const {
    if (!late) return packed.panel(p);
    const int64_t size = packed.units * NR;
    Linear<u> here = packed;
    here.data = reinterpret_cast<const Stored<u>*>(scratch) - p * size;
    pack_linear(live, here, p, scratch + packed.panel_bytes() / 4);
    return here.panel(p);
  }
  // The thread's share, of what is not packed late; whoever reads it must meet the others first.
  void pack(const Team& team, float* scratch) const {
    if (late) return;
    for (int64_t p = team.begin(packed.panels); p < team.end(packed.panels); ++p)
      pack_linear(live, packed, p, scratch);
  }
};

template <Unit u, Unit qkv_unit>
class Layers {
 public:
  // together: all rows meet a panel one after the other. So a live one is packed late, by who
  // multiplies it and into its cache: a layer's weights cross memory once.
  Layers(const EncoderArgs& args, bool together) : g(args), late_(args.live && together) {}

  Matrix<qkv_unit> qkv(int64_t i) const {
    if (!g.live) return {{g.packed[i].qkv, 3 * hidden, hidden}, {}, false};
    const LayerWeights& w = g.live[i];
    return {{qkv_, 3 * hidden, hidden}, {{w.query, w.key, w.value}, 3, g.live_bf16}, late_};
  }
  Matrix<u> out(int64_t i) const {
    return matrix(i, &PackedLayer::out, &LayerWeights::out, out_, hidden, hidden);
  }
  Matrix<u> up(int64_t i) const {
    return matrix(i, &PackedLayer::up, &LayerWeights::up, up_, inner, hidden);
  }
  Matrix<u> down(int64_t i) const {
    return matrix(i, &PackedLayer::down, &LayerWeights::down, down_, hidden, inner);
  }
  const Parameter& norm1(int64_t i) const { return g.live ? g.live[i].norm1 : g.packed[i].norm1; }
  const Parameter& norm2(int64_t i) const { return g.live ? g.live[i].norm2 : g.packed[i].norm2; }

  // For live weights, of one layer.
  void make_room(Buffer& buffer) {
    if (!g.live) return;
    const int64_t sizes[] = {Linear<qkv_unit>(nullptr, 3 * hidden, hidden).bytes(),
                             Linear<u>(nullptr, hidden, hidden).bytes(),
                             Linear<u>(nullptr, inner, hidden).bytes(),
                             Linear<u>(nullptr, hidden, inner).bytes()};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 64);
    qkv_ = buffer.get<char>(total);
    out_ = qkv_ + round_up(sizes[0], 64);
    up_ = out_ + round_up(sizes[1], 64);
    down_ = up_ + round_up(sizes[2], 64);
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
  Matrix<u> matrix(int64_t i, const void* PackedLayer::* packed, Parameter LayerWeights::* live,
                   const char* room, int64_t n, int64_t k) const {
    if (!g.live) return {{g.packed[i].*packed, n, k}, {}, false};
    return {{room, n, k}, {{g.live[i].*live}, 1, g.live_bf16}, late_};
  }

  const EncoderArgs& g;
  const int64_t hidden = g.spec.hidden, inner = g.spec.inner;
  const bool late_;
  char *qkv_ = nullptr, *out_ = nullptr, *up_ = nullptr, *down_ = nullptr;
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
