// bertfast._C: the C++ kernels on raw pointers (integers); bertfast/ops checks what it passes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef BERTFAST_WITH_CUDA
#include "cuda/bindings.h"
#endif
#include "dispatch.h"

namespace py = pybind11;
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

// An encoder's weights for inference. Holds pointers alone: Python keeps the tensors.
class Encoder {
 public:
  // Each layer: the packed qkv, out, up and down, then both LayerNorms' weights and biases.
  // first_center: the bias of the LayerNorm before the first, see EncoderArgs.
  Encoder(const std::vector<std::array<ptr, 8>>& layers, ptr first_center, int64_t heads,
          int64_t hidden, int64_t inner, int activation, float eps, int precision)
      : first_center_(at<const float>(first_center)) {
    for (const auto& p : layers)
      layers_.push_back({at(p[0]), at(p[1]), at(p[2]), at(p[3]), at<const float>(p[4]),
                         at<const float>(p[5]), at<const float>(p[6]), at<const float>(p[7])});
    args_.heads = heads, args_.hidden = hidden, args_.inner = inner;
    args_.activation = activation, args_.eps = eps, args_.precision = precision;
  }
  // Each layer: weights as torch has them, in the order of LayerWeights in bertfast/model/layer.py.
  Encoder(const std::vector<std::array<ptr, 16>>& layers, bool bf16, int64_t heads, int64_t hidden,
          int64_t inner, int activation, float eps, int precision)
      : Encoder(std::vector<std::array<ptr, 8>>{}, 0, heads, hidden, inner, activation, eps,
                precision) {
    for (const auto& p : layers) {
      const auto norm = [&](int i) { return at<const float>(p[i]); };
      const auto linear = [&](int i) {
        return LinearWeights{{at(p[i])}, {at<const float>(p[i + 1])}, 1, bf16};
      };
      LiveWeights live{linear(0), linear(6), linear(10), linear(12)};
      live.qkv.parts = 3;
      for (int i = 1; i < 3; ++i)
        live.qkv.weight[i] = at(p[2 * i]), live.qkv.bias[i] = at<const float>(p[2 * i + 1]);
      live_.push_back(live);
      layers_.push_back({{}, {}, {}, {}, norm(8), norm(9), norm(14), norm(15)});
    }
  }
  // Layers [first, last) on packed tokens; seqused_k and rows may be null.
  void forward(int64_t first, int64_t last, ptr x, bool x_bf16, ptr y, bool y_bf16, ptr cu_seqlens,
               ptr seqused_k, int64_t batch, int64_t tokens, ptr rows, int64_t n_rows) const {
    if (first < 0 || last > int64_t(layers_.size()) || first >= last)
      throw std::invalid_argument("encoder: no such layers");
    py::gil_scoped_release release;
    run(first, last, x, x_bf16, y, y_bf16, at<const int32_t>(cu_seqlens),
        at<const int32_t>(seqused_k), batch, tokens, at<const int64_t>(rows), n_rows);
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
    const int64_t tokens = int64_t(rows.size()), hidden = args_.hidden;
    std::vector<float> statistics(2 * tokens);
    EmbeddingArgs e{};
    e.ids = words.data(), e.positions = positions.data(), e.types = kinds.data();
    e.word = at(tables[0]), e.position = at(tables[1]), e.type = at(tables[2]);
    e.weight = at(tables[3]), e.bias = at(tables[4]), e.eps = eps, e.bf16 = bf16;
    e.tokens = tokens, e.hidden = hidden, e.y = at<void>(x);
    e.mean = statistics.data(), e.rstd = e.mean + tokens;
    kernels().embedding_layer_norm(e);
    run(0, int64_t(layers_.size()), x, bf16, tokens < batch * seqlen ? packed : y, y_bf16,
        starts.data(), nullptr, batch, tokens, nullptr, 0);
    if (tokens < batch * seqlen)
      kernels().scatter_rows(at<const char>(packed), rows.data(), at<char>(y), tokens,
                             batch * seqlen, hidden * (y_bf16 ? 2 : 4));
  }

 private:
  void run(int64_t first, int64_t last, ptr x, bool x_bf16, ptr y, bool y_bf16,
           const int32_t* cu_seqlens, const int32_t* seqused_k, int64_t batch, int64_t tokens,
           const int64_t* rows, int64_t n_rows) const {
    EncoderArgs g = args_;
    g.layers = layers_.data() + first, g.count = last - first;
    g.center = first ? layers_[first - 1].norm2_bias : first_center_;
    g.live = live_.empty() ? nullptr : live_.data() + first;
    g.x = at(x), g.y = at<void>(y), g.x_bf16 = x_bf16, g.y_bf16 = y_bf16;
    g.cu_seqlens = cu_seqlens, g.seqused_k = seqused_k, g.batch = batch, g.tokens = tokens;
    g.rows = rows, g.n_rows = n_rows;
    kernels().encoder(g);
  }
  static void check_ids(const char* name, const std::vector<int64_t>& ids, int64_t size) {
    if (ids.empty()) return;
    const auto [low, high] = std::minmax_element(ids.begin(), ids.end());
    if (*low < 0 || *high >= size)
      throw py::index_error(std::string(name) + " run from " + std::to_string(*low) + " to " +
                            std::to_string(*high) + ", expected 0 to " + std::to_string(size - 1));
  }

  std::vector<EncoderLayer> layers_;
  std::vector<LiveWeights> live_;
  const float* first_center_;
  EncoderArgs args_{};
};

static void pack_weights(ptr weight, ptr bias, int64_t n, int64_t k, int precision, ptr out) {
  const LinearWeights from{{at(weight)}, {at<const float>(bias)}, 1, false};
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
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<const std::vector<std::array<ptr, 8>>&, ptr, int64_t, int64_t, int64_t, int,
                    float, int>())
      .def(py::init<const std::vector<std::array<ptr, 16>>&, bool, int64_t, int64_t, int64_t, int,
                    float, int>())
      .def("forward", &Encoder::forward)
      .def("texts", &Encoder::texts);
#ifdef BERTFAST_WITH_CUDA
  cuda::bind(m);
#endif
}
