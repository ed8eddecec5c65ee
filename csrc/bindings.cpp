// bertfast._C: the C++ kernels on raw pointers (integers); bertfast/ops checks what it passes.
#include "bindings.h"

#include <omp.h>

#include "bind.h"
#include "dispatch.h"
#ifdef BERTFAST_WITH_CUDA
#include "cuda/bindings.h"
#endif

// std::shared_ptr asks glibc 2.32 for this; a wheel is for older ones too. 0: counts are atomic.
extern "C" {
char __libc_single_threaded = 0;
}

namespace bertfast {
namespace {

// A kernel of the instruction set, by its arguments one by one ...
template <class... Arguments>
void add(py::module_& m, const char* name, void (*Kernels::*kernel)(Arguments...)) {
  m.def(name, [kernel](Crossing<Arguments>... values) {
    const Running running;
    (kernels().*kernel)(Cross<Arguments>::arrived(values)...);
  });
}
// ... or by fields of the struct that it takes.
template <class Args, class F>
void add(py::module_& m, const char* name, void (*Kernels::*kernel)(const Args&), F fields) {
  m.def(name, from_fields<Args>(fields, [kernel](const Args& args) {
          const Running running;
          (kernels().*kernel)(args);
        }));
}

void bind_products(py::module_& m) {
  using G = GemmArgs;
  using A = ActivationBackwardArgs;
  add(m, "gemm", &Kernels::gemm,
      Fields<&G::m, &G::n, &G::k, &G::a, &G::a_row, &G::a_k, &G::a_bf16, &G::b, &G::b_row, &G::b_k,
             &G::b_bf16, &G::split_k, &G::bias, &G::bias_bf16, &G::c, &G::c_row, &G::c_bf16, &G::z,
             &G::activation, &G::accumulate>());
  add(m, "activation_backward", &Kernels::activation_backward,
      Fields<&A::grad, &A::grad_row, &A::z, &A::dz, &A::column_sum, &A::m, &A::n, &A::bf16,
             &A::activation>());
  using H = GatedActArgs;
  constexpr Fields<&H::up, &H::up_row, &H::gate, &H::gate_row, &H::rows, &H::n, &H::activation,
                   &H::dropout, &H::bf16>
      gated;
  add(m, "gated_act", &Kernels::gated_act, gated + Fields<&H::y>());
  add(m, "gated_act_backward", &Kernels::gated_act_backward,
      gated + Fields<&H::grad, &H::grad_row, &H::dup, &H::dgate>());
}

// layers: an array of DecoderLayer, each the addresses of DECODER_PARTS.
void bind_decoder(py::module_& m) {
  m.attr("DECODER_PARTS") = py::tuple(
      py::cast(std::vector<const char*>(std::begin(kDecoderParts), std::end(kDecoderParts))));
  using D = DecodeArgs;
  add(m, "decode", &Kernels::decode,
      Fields<&D::layers, &D::count, &D::spec, &D::rows, &D::hidden, &D::cache, &D::room, &D::slots,
             &D::done, &D::origin, &D::origin_row, &D::source, &D::cu_seqlens, &D::longest,
             &D::transform, &D::words, &D::norm, &D::vocabulary, &D::logits, &D::best>());
}

void bind_attention(py::module_& m) {
  using A = AttentionArgs;
  constexpr Fields<&A::q, &A::k, &A::v, &A::q_token, &A::q_head, &A::k_token, &A::k_head,
                   &A::starts_q, &A::starts_k, &A::seqused_k, &A::batch, &A::tokens, &A::heads,
                   &A::dim, &A::scale, &A::bias, &A::dropout, &A::causal, &A::bf16, &A::window,
                   &A::rel_key, &A::rel_query, &A::rel_index>
      common;
  add(m, "attention", &Kernels::attention, common + Fields<&A::out, &A::lse>());
  add(m, "attention_backward", &Kernels::attention_backward,
      common + Fields<&A::grad, &A::lse, &A::dq, &A::dk, &A::dv, &A::dq_token, &A::dk_token,
                      &A::dbias, &A::dbias_rows, &A::dbias_cols, &A::drel_key, &A::drel_query>());
  using R = RotaryArgs;
  add(m, "rotary", &Kernels::rotary,
      Fields<&R::qkv, &R::angles, &R::tokens, &R::heads, &R::dim, &R::inverse, &R::bf16,
             &R::out>());
}

void bind_norms(py::module_& m) {
  using N = AddLayerNormArgs;
  constexpr Fields<&N::x, &N::residual, &N::weight, &N::x_bias, &N::dropout, &N::mean, &N::rstd,
                   &N::tokens, &N::hidden, &N::bf16, &N::weight_bf16, &N::x_bias_bf16, &N::rms>
      norm;
  add(m, "add_layer_norm", &Kernels::add_layer_norm,
      norm + Fields<&N::bias, &N::bias_bf16, &N::eps, &N::y>());
  add(m, "add_layer_norm_backward", &Kernels::add_layer_norm_backward,
      norm + Fields<&N::grad, &N::dx, &N::dresidual, &N::columns>());
  using E = EmbeddingArgs;
  constexpr Fields<&E::ids, &E::positions, &E::types, &E::word, &E::position, &E::type, &E::weight,
                   &E::dropout, &E::mean, &E::rstd, &E::tokens, &E::hidden, &E::bf16>
      embedding;
  add(m, "embedding_layer_norm", &Kernels::embedding_layer_norm,
      embedding + Fields<&E::bias, &E::eps, &E::y>());
  add(m, "embedding_layer_norm_backward", &Kernels::embedding_layer_norm_backward,
      embedding + Fields<&E::grad, &E::ds, &E::columns>());
}

void bind_rows(py::module_& m) {
  using C = CrossEntropyArgs;
  add(m, "cross_entropy_rows", &Kernels::cross_entropy_rows,
      Fields<&C::logits, &C::labels, &C::loss, &C::rows, &C::vocabulary, &C::ignore_index,
             &C::gradient, &C::bf16>());
  add(m, "scatter_add", &Kernels::scatter_add);
  add(m, "gather_rows", &Kernels::gather_rows);
  add(m, "scatter_rows", &Kernels::scatter_rows);
}

py::dict build_info() {
  py::dict info;
  info["cpu_isa"] = kernels().isa;
  info["bf16_products"] = kernels().bf16;
  info["int8_sums16"] = kernels().sums16;
  info["isas_built"] = built_isas();
#ifdef BERTFAST_WITH_CUDA
  cuda::add_build_info(info);
#else
  info["cuda_built"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace bertfast

PYBIND11_MODULE(_C, m) {
  using namespace bertfast;
  m.doc() = "bertfast's C++ kernels; call them through bertfast.ops";
  m.def("build_info", &build_info);
  // Ends the thread's team of OpenMP, torch's too, which a process forked from it would wait for.
  m.def("end_threads", [] { return omp_pause_resource_all(omp_pause_hard); });
  bind_products(m);
  bind_attention(m);
  bind_norms(m);
  bind_rows(m);
  bind_encoder(m);
  bind_layouts(m);
  bind_decoder(m);
#ifdef BERTFAST_WITH_CUDA
  cuda::bind(m);
#endif
}
