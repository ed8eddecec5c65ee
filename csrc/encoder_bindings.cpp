// The encoder for inference in bertfast._C: what describes it, its packed weights and its calls.
#include <algorithm>
#include <array>
#include <atomic>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "bindings.h"
#include "dispatch.h"

namespace bertfast {
namespace {

using ptr = std::uintptr_t;

template <class T = const void>
T* at(ptr p) {
  return reinterpret_cast<T*>(p);
}

// What encoders spend on each of their parts, while somebody asks: see watch_parts.
std::atomic<bool> watched = false;
std::array<double, std::size(kEncoderParts)> spent{};

using Tables = std::vector<std::array<ptr, 2>>;  // RelativeTables of each layer

// An encoder's weights for inference. Of packed weights it holds pointers alone: Python keeps them.
class Encoder {
 public:
  // center: the bias of the LayerNorm before the first layer, see EncoderArgs.
  Encoder(std::vector<LayerSpec> specs, std::vector<PackedLayer> layers, int precision, ptr center,
          const Tables& relative)
      : specs_(std::move(specs)), packed_(std::move(layers)), center_(at<const float>(center)) {
    args_.precision = Precision(precision);
    check_layers(relative);
  }
  // Of LayerWeights, which are copied, with the matrices in bf16 or fp32. narrow: of each
  // parameter, the length of a vector that is in bf16, 0 of any other; none at all where there are
  // none.
  Encoder(std::vector<LayerSpec> specs, ptr weights, std::vector<int64_t> narrow, bool bf16,
          int precision, const Tables& relative)
      : specs_(std::move(specs)),
        live_(at<const LayerWeights>(weights), at<const LayerWeights>(weights) + specs_.size()),
        narrow_(std::move(narrow)) {
    if (!narrow_.empty() && narrow_.size() != live_.size() * kParameters)
      throw std::invalid_argument("encoder: expected a length of each parameter");
    args_.precision = Precision(precision), args_.live_bf16 = bf16;
    check_layers(relative);
  }
  // Layers [first, last).
  void forward(int64_t first, int64_t last, const Batch& batch) const {
    if (first < 0 || last > layers() || first >= last)
      throw std::invalid_argument("encoder: no such layers");
    const Running running;
    run(first, last, batch);
  }
  // All layers on a padded batch of ids, int64 [batch, seqlen] as mask and types, which may be
  // null; y [batch, seqlen, hidden], zeros where the mask is. tables: the words', positions' and
  // types' embeddings, their LayerNorm's weight and bias. x and packed take [batch * seqlen,
  // hidden].
  void texts(const std::array<ptr, 5>& tables, bool bf16, float eps, int64_t vocabulary,
             int64_t type_count, ptr ids, ptr mask, ptr types, int64_t batch, int64_t seqlen, ptr x,
             ptr packed, ptr y, bool y_bf16) const {
    const Running running;
    std::vector<int64_t> rows, positions, words, kinds;
    std::vector<int32_t> starts{0};
    for (auto* v : {&rows, &positions, &words, &kinds}) v->reserve(batch * seqlen);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0, i = b * seqlen; j < seqlen; ++j, ++i) {
        if (mask && !at<const int64_t>(mask)[i]) continue;
        rows.push_back(i), positions.push_back(j);
        words.push_back(at<const int64_t>(ids)[i]);
        kinds.push_back(types ? at<const int64_t>(types)[i] : 0);
      }
      starts.push_back(int32_t(rows.size()));
    }
    check_ids("input_ids", words, vocabulary);
    check_ids("token_type_ids", kinds, type_count);
    const int64_t tokens = int64_t(rows.size()), hidden = specs_[0].hidden;
    std::vector<float> statistics(2 * tokens);
    EmbeddingArgs e{};
    e.ids = words.data(), e.positions = positions.data(), e.types = kinds.data();
    e.word = at(tables[0]), e.position = at(tables[1]), e.type = at(tables[2]);
    e.weight = at(tables[3]), e.bias = at(tables[4]), e.eps = eps, e.bf16 = bf16;
    e.tokens = tokens, e.hidden = hidden, e.y = at<void>(x);
    e.mean = statistics.data(), e.rstd = e.mean + tokens;
    kernels().embedding_layer_norm(e);
    Batch all{};
    all.hidden = at(x), all.dtype = bf16, all.out_dtype = y_bf16;
    all.out = at<void>(tokens < batch * seqlen ? packed : y);
    all.cu_seqlens = starts.data(), all.batch = batch, all.tokens = tokens, all.longest = seqlen;
    run(0, layers(), all);
    if (tokens < batch * seqlen)
      kernels().scatter_rows(at<const char>(packed), rows.data(), at<char>(y), tokens,
                             batch * seqlen, hidden * (y_bf16 ? 2 : 4));
  }

 private:
  int64_t layers() const { return int64_t(specs_.size()); }
  void check_layers(const Tables& relative) {
    if (specs_.empty() || packed_.size() + live_.size() != specs_.size() ||
        (!relative.empty() && relative.size() != specs_.size()))
      throw std::invalid_argument("encoder: expected a description of each layer, and a layer");
    for (const auto& [key, query] : relative)
      relative_.push_back({at<const float>(key), at<const float>(query)});
  }
  void run(int64_t first, int64_t last, const Batch& batch) const {
    EncoderArgs g = args_;
    if (!relative_.empty()) g.relative = relative_.data() + first;
    if (g.relative && !batch.rel_index)
      throw std::invalid_argument("encoder: the batch lacks relative positions");
    g.specs = specs_.data() + first, g.layers = last - first, g.batch = batch;
    for (int64_t i = 0; i < g.layers; ++i)
      if (g.specs[i].rotary >= batch.angles.count)
        throw std::invalid_argument("encoder: the batch lacks the angles of a layer");
    if (live_.empty())
      g.packed = packed_.data() + first;
    else
      g.live = widened().data() + first;
    g.center =
        first && g.packed ? static_cast<const float*>(packed_[first - 1].norm2.bias) : center_;
    if (watched) g.seconds = spent.data();
    kernels().encoder(g);
  }
  // The weights, with a copy in fp32 of each vector that isn't; a thread's until its next call.
  const std::vector<LayerWeights>& widened() const {
    if (narrow_.empty()) return live_;
    static thread_local std::vector<LayerWeights> layers;
    static thread_local std::vector<uint32_t> wide;
    layers = live_;
    wide.resize(std::accumulate(narrow_.begin(), narrow_.end(), int64_t(0)));
    auto* slots = reinterpret_cast<const void**>(layers.data());
    uint32_t* to = wide.data();
    for (size_t i = 0; i < narrow_.size(); ++i) {
      if (!narrow_[i]) continue;
      const auto* from = static_cast<const uint16_t*>(slots[i]);
      slots[i] = to;
      to =
          std::transform(from, from + narrow_[i], to, [](uint16_t v) { return uint32_t(v) << 16; });
    }
    return layers;
  }
  static void check_ids(const char* name, const std::vector<int64_t>& ids, int64_t size) {
    if (ids.empty()) return;
    const auto [low, high] = std::minmax_element(ids.begin(), ids.end());
    if (*low < 0 || *high >= size)
      throw py::index_error(std::string(name) + " run from " + std::to_string(*low) + " to " +
                            std::to_string(*high) + ", expected 0 to " + std::to_string(size - 1));
  }

  std::vector<LayerSpec> specs_;
  std::vector<RelativeTables> relative_;  // of each layer, or none at all
  std::vector<PackedLayer> packed_;
  std::vector<LayerWeights> live_;
  std::vector<int64_t> narrow_;
  const float* center_ = nullptr;
  EncoderArgs args_{};
};

// Linear layers side by side, each (weight, bias or null, rows) in fp32.
using Linears = std::vector<std::tuple<ptr, ptr, int64_t>>;

PackArgs pack_args(const Linears& linears, int64_t k, bool gated, int precision) {
  PackArgs g{};
  if (linears.empty() || linears.size() > std::size(g.from.part) || (gated && linears.size() != 2))
    throw std::invalid_argument("pack_weights: that many linear layers");
  for (const auto& [weight, bias, rows] : linears) {
    g.from.part[g.from.parts] = {at(weight), at(bias)};
    g.from.rows[g.from.parts++] = rows;
  }
  g.from.gated = gated, g.k = k, g.precision = Precision(precision);
  return g;
}

int64_t packed_bytes(const Linears& linears, int64_t k, bool gated, int precision) {
  return kernels().packed_bytes(pack_args(linears, k, gated, precision));
}

void pack_weights(const Linears& linears, int64_t k, bool gated, int precision, ptr out) {
  PackArgs g = pack_args(linears, k, gated, precision);
  g.out = at<void>(out);
  const Running running;
  kernels().pack_weights(g);
}

}  // namespace

void bind_encoder(py::module_& m) {
  m.attr("ROLES") =
      py::tuple(py::cast(std::vector<const char*>(std::begin(kRoles), std::end(kRoles))));
  m.attr("LAYER_BYTES") = sizeof(LayerWeights);
  bind_struct(m, "LayerSpec", field("hidden", &LayerSpec::hidden),
              field("heads", &LayerSpec::heads), field("inner", &LayerSpec::inner),
              field("activation", &LayerSpec::activation), field("eps", &LayerSpec::eps),
              field("scale", &LayerSpec::scale), field("pre_norm", &LayerSpec::pre_norm),
              field("rms", &LayerSpec::rms), field("gated", &LayerSpec::gated),
              field("groups", &LayerSpec::groups), field("window", &LayerSpec::window),
              field("rotary", &LayerSpec::rotary));
  bind_struct(m, "Batch", field("hidden", &Batch::hidden), field("dtype", &Batch::dtype),
              field("out", &Batch::out), field("out_dtype", &Batch::out_dtype),
              field("cu_seqlens", &Batch::cu_seqlens), optional("seqused_k", &Batch::seqused_k),
              field("batch", &Batch::batch), field("tokens", &Batch::tokens),
              field("longest", &Batch::longest), optional("rows", &Batch::rows),
              optional("count", &Batch::count), optional("bias", &Batch::bias),
              optional("angles", &Batch::angles), optional("rel_index", &Batch::rel_index),
              optional("even", &Batch::even));
  bind_struct(m, "PackedLayer", field("qkv", &PackedLayer::qkv), field("out", &PackedLayer::out),
              field("up", &PackedLayer::up), field("down", &PackedLayer::down),
              field("norm1", &PackedLayer::norm1), field("norm2", &PackedLayer::norm2),
              optional("smooth", &PackedLayer::smooth));
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<std::vector<LayerSpec>, std::vector<PackedLayer>, int, ptr, const Tables&>(),
           py::arg("specs"), py::arg("packed"), py::arg("precision"), py::arg("center"),
           py::arg("relative"))
      .def(py::init<std::vector<LayerSpec>, ptr, std::vector<int64_t>, bool, int, const Tables&>(),
           py::arg("specs"), py::arg("weights"), py::arg("narrow"), py::arg("bf16"),
           py::arg("precision"), py::arg("relative"))
      .def("forward", &Encoder::forward)
      .def("texts", &Encoder::texts);
  // While on is true, calls of one thread at a time are timed. Returns the seconds of each part
  // since the last time.
  m.def("watch_parts", [](bool on) {
    std::vector<std::pair<std::string, double>> found;
    for (size_t i = 0; i < spent.size(); ++i) found.emplace_back(kEncoderParts[i], spent[i]);
    watched = on, spent = {};
    return found;
  });
  m.def("register_rate", [](int precision) {
    const Running running;
    return kernels().register_rate(Precision(precision));
  });
  m.def("qkv_precision",
        [](int precision) { return int(kernels().qkv_precision(Precision(precision))); });
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weights", &pack_weights);
}

}  // namespace bertfast
