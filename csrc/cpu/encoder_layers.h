// The encoder's layers: with weights packed once, or live ones, packed anew when their turn comes.
#pragma once
#include "crew.h"
#include "pack_weights.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u, Unit qkv_unit>
class Layers {
 public:
  explicit Layers(const EncoderArgs& args) : g(args) {}

  PackedLayer operator[](int64_t i) const {
    if (!g.live) return g.packed[i];
    PackedLayer layer = repacked_;
    layer.norm1 = g.live[i].norm1, layer.norm2 = g.live[i].norm2;
    return layer;
  }

  // The views of a layer's matrices.
  Linear<qkv_unit> qkv(const PackedLayer& l) const { return {l.qkv, 3 * hidden, hidden}; }
  Linear<u> out(const PackedLayer& l) const { return {l.out, hidden, hidden}; }
  Linear<u> up(const PackedLayer& l) const { return {l.up, inner, hidden}; }
  Linear<u> down(const PackedLayer& l) const { return {l.down, hidden, inner}; }

  // For live weights, of one layer.
  void make_room(Buffer& buffer) {
    if (!g.live) return;
    const int64_t sizes[] = {qkv({}).bytes(), out({}).bytes(), up({}).bytes(), down({}).bytes()};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 64);
    char* at = buffer.get<char>(total);
    repacked_.qkv = at;
    repacked_.out = at += round_up(sizes[0], 64);
    repacked_.up = at += round_up(sizes[1], 64);
    repacked_.down = at += round_up(sizes[2], 64);
  }
  // The thread's share of what is live, if any; whoever reads the panels must meet the others
  // first. scratch [NR, hidden] is its own.
  void pack_qkv(int64_t i, const Team& team, float* scratch) const {
    if (!g.live || i == g.layers) return;
    const LayerWeights& w = g.live[i];
    pack({{w.query, w.key, w.value}, 3, g.live_bf16}, qkv(repacked_), team, scratch);
  }
  void pack_rest(int64_t i, const Team& team, float* scratch) const {
    if (!g.live) return;
    const LayerWeights& w = g.live[i];
    pack({{w.out}, 1, g.live_bf16}, out(repacked_), team, scratch);
    pack({{w.up}, 1, g.live_bf16}, up(repacked_), team, scratch);
    pack({{w.down}, 1, g.live_bf16}, down(repacked_), team, scratch);
  }

 private:
  template <Unit p>
  static void pack(const LinearWeights& from, const Linear<p>& to, const Team& team,
                   float* scratch) {
    for (int64_t i = team.begin(to.panels); i < team.end(to.panels); ++i)
      pack_linear(from, to, i, scratch);
  }

  const EncoderArgs& g;
  const int64_t hidden = g.spec.hidden, inner = g.spec.inner;
  PackedLayer repacked_{};
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
