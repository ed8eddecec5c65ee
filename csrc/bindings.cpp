// bertfast._C: the C++ kernels on raw pointers (integers); bertfast/ops checks what it passes.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#ifdef BERTFAST_WITH_CUDA
#include "cuda/bindings.h"
#endif
#include "dispatch.h"

using namespace bertfast;
using ptr = std::uintptr_t;

template <class T = const void>
T* at(ptr p) {
  return reinterpret_cast<T*>(p);
}

static Dropout dropout(ptr seed, float scale, uint32_t threshold) {
  return {at<const int64_t>(seed), scale, threshold};
}

static void gemm(int64_t m, int64_t n, int64_t k, ptr a, int64_t a_row, int64_t a_k, bool a_bf16,
                 const std::vector<ptr>& b, int64_t b_row, int64_t b_k, bool b_bf16, bool split_k,
                 const std::vector<ptr>& bias, bool bias_bf16, ptr c, int64_t c_row, bool c_bf16,
                 ptr z, int activation, bool accumulate) {
  if (b.empty() || b.size() > 3 || (split_k ? k : n) % int64_t(b.size()) ||
      (!bias.empty() && bias.size() != b.size()))
    throw std::invalid_argument("gemm: parts do not divide the product");
  GemmArgs g{};
  g.m = m, g.n = n, g.k = k, g.a = at(a), g.a_row = a_row, g.a_k = a_k, g.a_bf16 = a_bf16;
  g.parts = int(b.size()), g.b_row = b_row, g.b_k = b_k, g.b_bf16 = b_bf16, g.split_k = split_k;
  for (size_t i = 0; i < b.size(); ++i) g.b[i] = at(b[i]);
  for (size_t i = 0; i < bias.size(); ++i) g.bias[i] = at(bias[i]);
  g.bias_bf16 = bias_bf16, g.c = at<void>(c), g.c_row = c_row, g.c_bf16 = c_bf16;
  g.z = at<void>(z), g.activation = activation, g.accumulate = accumulate;
  py::gil_scoped_release release;
  kernels().gemm(g);
}

static void activation_backward(ptr grad, int64_t grad_row, ptr z, ptr dz, ptr column_sum,
                                int64_t m, int64_t n, bool bf16, int activation) {
  const ActivationBackwardArgs g{at(grad), grad_row, at(z), at<void>(dz), at<float>(column_sum),
                                 m,        n,        bf16,  activation};
  py::gil_scoped_release release;
  kernels().activation_backward(g);
}

static AttentionArgs attention_args(ptr q, ptr k, ptr v, int64_t q_token, int64_t q_head,
                                    int64_t k_token, int64_t k_head, ptr starts_q, ptr starts_k,
                                    ptr seqused_k, int64_t batch, int64_t tokens, int64_t heads,
                                    int64_t dim, float scale, ptr bias, int64_t bias_batch,
                                    int64_t bias_head, int64_t bias_query, bool bias_bf16, ptr seed,
                                    float keep_scale, uint32_t threshold, bool causal, bool bf16) {
  AttentionArgs g{};
  g.q = at(q), g.k = at(k), g.v = at(v);
  g.q_token = q_token, g.q_head = q_head, g.k_token = k_token, g.k_head = k_head;
  g.starts_q = at<const int32_t>(starts_q), g.starts_k = at<const int32_t>(starts_k);
  g.seqused_k = at<const int32_t>(seqused_k);
  g.batch = batch, g.tokens = tokens, g.heads = heads, g.dim = dim, g.scale = scale;
  g.bias = at(bias), g.bias_batch = bias_batch, g.bias_head = bias_head;
  g.bias_query = bias_query, g.bias_bf16 = bias_bf16;
  g.dropout = dropout(seed, keep_scale, threshold), g.causal = causal, g.bf16 = bf16;
  return g;
}

static void attention(ptr q, ptr k, ptr v, int64_t q_token, int64_t q_head, int64_t k_token,
                      int64_t k_head, ptr starts_q, ptr starts_k, ptr seqused_k, int64_t batch,
                      int64_t tokens, int64_t heads, int64_t dim, float scale, ptr bias,
                      int64_t bias_batch, int64_t bias_head, int64_t bias_query, bool bias_bf16,
                      ptr seed, float keep_scale, uint32_t threshold, bool causal, bool bf16,
                      ptr out, ptr lse) {
  AttentionArgs g =
      attention_args(q, k, v, q_token, q_head, k_token, k_head, starts_q, starts_k, seqused_k,
                     batch, tokens, heads, dim, scale, bias, bias_batch, bias_head, bias_query,
                     bias_bf16, seed, keep_scale, threshold, causal, bf16);
  g.out = at<void>(out), g.lse = at<float>(lse);
  py::gil_scoped_release release;
  kernels().attention(g);
}

static void attention_backward(ptr q, ptr k, ptr v, int64_t q_token, int64_t q_head,
                               int64_t k_token, int64_t k_head, ptr starts_q, ptr starts_k,
                               ptr seqused_k, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t dim, float scale, ptr bias, int64_t bias_batch,
                               int64_t bias_head, int64_t bias_query, bool bias_bf16, ptr seed,
                               float keep_scale, uint32_t threshold, bool causal, bool bf16,
                               ptr grad, ptr lse, ptr dq, ptr dk, ptr dv, int64_t dq_token,
                               int64_t dk_token, ptr dbias, int64_t dbias_rows,
                               int64_t dbias_cols) {
  AttentionArgs g =
      attention_args(q, k, v, q_token, q_head, k_token, k_head, starts_q, starts_k, seqused_k,
                     batch, tokens, heads, dim, scale, bias, bias_batch, bias_head, bias_query,
                     bias_bf16, seed, keep_scale, threshold, causal, bf16);
  g.grad = at(grad), g.lse = at<float>(lse);
  g.dq = at<void>(dq), g.dk = at<void>(dk), g.dv = at<void>(dv);
  g.dq_token = dq_token, g.dk_token = dk_token;
  g.dbias = at<float>(dbias), g.dbias_rows = dbias_rows, g.dbias_cols = dbias_cols;
  py::gil_scoped_release release;
  kernels().attention_backward(g);
}

static void add_layer_norm(ptr x, ptr residual, ptr weight, ptr bias, ptr x_bias, ptr seed, ptr y,
                           ptr mean, ptr rstd, int64_t tokens, int64_t hidden, float eps,
                           float keep_scale, uint32_t threshold, bool bf16, bool weight_bf16,
                           bool bias_bf16, bool x_bias_bf16) {
  AddLayerNormArgs g{};
  g.x = at(x), g.residual = at(residual), g.weight = at(weight), g.bias = at(bias);
  g.x_bias = at(x_bias), g.dropout = dropout(seed, keep_scale, threshold);
  g.tokens = tokens, g.hidden = hidden, g.eps = eps, g.bf16 = bf16, g.weight_bf16 = weight_bf16;
  g.bias_bf16 = bias_bf16, g.x_bias_bf16 = x_bias_bf16;
  g.y = at<void>(y), g.mean = at<float>(mean), g.rstd = at<float>(rstd);
  py::gil_scoped_release release;
  kernels().add_layer_norm(g);
}

static void add_layer_norm_backward(ptr grad, ptr x, ptr residual, ptr weight, ptr x_bias, ptr seed,
                                    ptr mean, ptr rstd, ptr dx, ptr dresidual, ptr columns,
                                    int64_t tokens, int64_t hidden, float keep_scale,
                                    uint32_t threshold, bool bf16, bool weight_bf16,
                                    bool x_bias_bf16) {
  AddLayerNormArgs g{};
  g.grad = at(grad), g.x = at(x), g.residual = at(residual), g.weight = at(weight);
  g.x_bias = at(x_bias), g.dropout = dropout(seed, keep_scale, threshold);
  g.mean = at<float>(mean), g.rstd = at<float>(rstd);
  g.dx = at<void>(dx), g.dresidual = at<void>(dresidual), g.columns = at<float>(columns);
  g.tokens = tokens, g.hidden = hidden, g.bf16 = bf16, g.weight_bf16 = weight_bf16;
  g.x_bias_bf16 = x_bias_bf16;
  py::gil_scoped_release release;
  kernels().add_layer_norm_backward(g);
}

static EmbeddingArgs embedding_args(ptr ids, ptr positions, ptr types, ptr word, ptr position,
                                    ptr type, ptr weight, ptr seed, ptr mean, ptr rstd,
                                    int64_t tokens, int64_t hidden, float keep_scale,
                                    uint32_t threshold, bool bf16) {
  EmbeddingArgs g{};
  g.ids = at<const int64_t>(ids), g.positions = at<const int64_t>(positions);
  g.types = at<const int64_t>(types), g.word = at(word), g.position = at(position);
  g.type = at(type), g.weight = at(weight), g.dropout = dropout(seed, keep_scale, threshold);
  g.mean = at<float>(mean), g.rstd = at<float>(rstd), g.tokens = tokens, g.hidden = hidden;
  g.bf16 = bf16;
  return g;
}

static void embedding_layer_norm(ptr ids, ptr positions, ptr types, ptr word, ptr position,
                                 ptr type, ptr weight, ptr bias, ptr seed, ptr y, ptr mean,
                                 ptr rstd, int64_t tokens, int64_t hidden, float eps,
                                 float keep_scale, uint32_t threshold, bool bf16) {
  EmbeddingArgs g = embedding_args(ids, positions, types, word, position, type, weight, seed, mean,
                                   rstd, tokens, hidden, keep_scale, threshold, bf16);
  g.bias = at(bias), g.y = at<void>(y), g.eps = eps;
  py::gil_scoped_release release;
  kernels().embedding_layer_norm(g);
}

static void embedding_layer_norm_backward(ptr grad, ptr ids, ptr positions, ptr types, ptr word,
                                          ptr position, ptr type, ptr weight, ptr seed, ptr mean,
                                          ptr rstd, ptr ds, ptr columns, int64_t tokens,
                                          int64_t hidden, float keep_scale, uint32_t threshold,
                                          bool bf16) {
  EmbeddingArgs g = embedding_args(ids, positions, types, word, position, type, weight, seed, mean,
                                   rstd, tokens, hidden, keep_scale, threshold, bf16);
  g.grad = at(grad), g.ds = at<float>(ds), g.columns = at<float>(columns);
  py::gil_scoped_release release;
  kernels().embedding_layer_norm_backward(g);
}

static void scatter_add(ptr x, ptr rows, ptr out, int64_t tokens, int64_t hidden, int64_t table) {
  py::gil_scoped_release release;
  kernels().scatter_add(at<const float>(x), at<const int64_t>(rows), at<float>(out), tokens, hidden,
                        table);
}

static void cross_entropy_rows(ptr logits, ptr labels, ptr loss, int64_t rows, int64_t vocabulary,
                               int64_t ignore_index, bool gradient, bool bf16) {
  const CrossEntropyArgs g{at<float>(logits), at<const int64_t>(labels),
                           at<float>(loss),   rows,
                           vocabulary,        ignore_index,
                           gradient,          bf16};
  py::gil_scoped_release release;
  kernels().cross_entropy_rows(g);
}

static void gather_rows(ptr x, ptr rows, ptr out, int64_t tokens, int64_t row_bytes) {
  py::gil_scoped_release release;
  kernels().gather_rows(at<const char>(x), at<const int64_t>(rows), at<char>(out), tokens,
                        row_bytes);
}

static void scatter_rows(ptr x, ptr rows, ptr out, int64_t tokens, int64_t out_rows,
                         int64_t row_bytes) {
  py::gil_scoped_release release;
  kernels().scatter_rows(at<const char>(x), at<const int64_t>(rows), at<char>(out), tokens,
                         out_rows, row_bytes);
}

static py::dict build_info() {
  py::dict info;
  info["cpu_isa"] = kernels().isa;
  info["isas_built"] = built_isas();
#ifdef BERTFAST_WITH_CUDA
  cuda::add_build_info(info);
#else
  info["cuda_built"] = false;
#endif
  return info;
}

// An encoder's weights for inference. Of packed weights it holds pointers alone: Python keeps them.
class Encoder {
 public:
  // center: the bias of the LayerNorm before the first layer, see EncoderArgs.
  Encoder(const LayerSpec& spec, std::vector<PackedLayer> layers, int precision, ptr center)
      : packed_(std::move(layers)), center_(at<const float>(center)) {
    args_.spec = spec, args_.precision = precision;
  }
  // Of `layers` LayerWeights, which are copied, with the matrices in bf16 or fp32 and the rest in
  // fp32.
  Encoder(const LayerSpec& spec, ptr weights, int64_t layers, bool bf16, int precision)
      : live_(at<const LayerWeights>(weights), at<const LayerWeights>(weights) + layers) {
    args_.spec = spec, args_.precision = precision, args_.live_bf16 = bf16;
  }
  // Layers [first, last).
  void forward(int64_t first, int64_t last, const Batch& batch) const {
    if (first < 0 || last > layers() || first >= last)
      throw std::invalid_argument("encoder: no such layers");
    py::gil_scoped_release release;
    run(first, last, batch);
  }
  // All layers on a padded batch of ids, int64 [batch, seqlen] as mask and types, which may be
  // null; y [batch, seqlen, hidden], zeros where the mask is. tables: the words', positions' and
  // types' embeddings, their LayerNorm's weight and bias. x and packed take [batch * seqlen,
  // hidden].
  void texts(const std::array<ptr, 5>& tables, bool bf16, float eps, int64_t vocabulary,
             int64_t type_count, ptr ids, ptr mask, ptr types, int64_t batch, int64_t seqlen, ptr x,
             ptr packed, ptr y, bool y_bf16) const {
    py::gil_scoped_release release;
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
    const int64_t tokens = int64_t(rows.size()), hidden = args_.spec.hidden;
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
  int64_t layers() const { return int64_t(packed_.size() + live_.size()); }
  void run(int64_t first, int64_t last, const Batch& batch) const {
    EncoderArgs g = args_;
    g.layers = last - first, g.batch = batch;
    if (live_.empty())
      g.packed = packed_.data() + first;
    else
      g.live = live_.data() + first;
    g.center =
        first && g.packed ? static_cast<const float*>(packed_[first - 1].norm2.bias) : center_;
    kernels().encoder(g);
  }
  static void check_ids(const char* name, const std::vector<int64_t>& ids, int64_t size) {
    if (ids.empty()) return;
    const auto [low, high] = std::minmax_element(ids.begin(), ids.end());
    if (*low < 0 || *high >= size)
      throw py::index_error(std::string(name) + " run from " + std::to_string(*low) + " to " +
                            std::to_string(*high) + ", expected 0 to " + std::to_string(size - 1));
  }

  std::vector<PackedLayer> packed_;
  std::vector<LayerWeights> live_;
  const float* center_ = nullptr;
  EncoderArgs args_{};
};

static void pack_weights(ptr weight, ptr bias, int64_t n, int64_t k, int precision, ptr out) {
  const LinearWeights from{{{at(weight), at(bias)}}, 1, false};
  const PackArgs g{from, n, k, precision, at<void>(out)};
  py::gil_scoped_release release;
  kernels().pack_weights(g);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "bertfast's C++ kernels; call them through bertfast.ops";
  m.def("build_info", &build_info);
  m.def("gemm", &gemm);
  m.def("activation_backward", &activation_backward);
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
  m.def("add_layer_norm", &add_layer_norm);
  m.def("add_layer_norm_backward", &add_layer_norm_backward);
  m.def("embedding_layer_norm", &embedding_layer_norm);
  m.def("embedding_layer_norm_backward", &embedding_layer_norm_backward);
  m.def("scatter_add", &scatter_add);
  m.def("cross_entropy_rows", &cross_entropy_rows);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("qkv_precision", [](int precision) { return kernels().qkv_precision(precision); });
  m.def("packed_bytes", [](int64_t n, int64_t k, int precision) {
    return kernels().packed_bytes(n, k, precision);
  });
  m.def("pack_weights", &pack_weights);
  m.attr("ROLES") =
      py::tuple(py::cast(std::vector<const char*>(std::begin(kRoles), std::end(kRoles))));
  m.attr("LAYER_BYTES") = sizeof(LayerWeights);
  bind_struct(m, "LayerSpec", field("hidden", &LayerSpec::hidden),
              field("heads", &LayerSpec::heads), field("inner", &LayerSpec::inner),
              field("activation", &LayerSpec::activation), field("eps", &LayerSpec::eps));
  bind_struct(m, "Batch", field("hidden", &Batch::hidden), field("dtype", &Batch::dtype),
              field("out", &Batch::out), field("out_dtype", &Batch::out_dtype),
              field("cu_seqlens", &Batch::cu_seqlens), optional("seqused_k", &Batch::seqused_k),
              field("batch", &Batch::batch), field("tokens", &Batch::tokens),
              field("longest", &Batch::longest), optional("rows", &Batch::rows),
              optional("count", &Batch::count), optional("bias", &Batch::bias));
  bind_struct(m, "PackedLayer", field("qkv", &PackedLayer::qkv), field("out", &PackedLayer::out),
              field("up", &PackedLayer::up), field("down", &PackedLayer::down),
              field("norm1", &PackedLayer::norm1), field("norm2", &PackedLayer::norm2));
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<const LayerSpec&, std::vector<PackedLayer>, int, ptr>(), py::arg("spec"),
           py::arg("packed"), py::arg("precision"), py::arg("center"))
      .def(py::init<const LayerSpec&, ptr, int64_t, bool, int>(), py::arg("spec"),
           py::arg("weights"), py::arg("layers"), py::arg("bf16"), py::arg("precision"))
      .def("forward", &Encoder::forward)
      .def("texts", &Encoder::texts);
#ifdef BERTFAST_WITH_CUDA
  cuda::bind(m);
#endif
}
