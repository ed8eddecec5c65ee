// The launchers of kernels.h in bertfast._C, named cuda_*.
#include "bindings.h"

#include <string>

#include "../bind.h"
#include "kernels.h"

namespace bertfast::cuda {
namespace {

template <class Result, class... Arguments>
void add(py::module_& m, const char* name, Result (*launcher)(Arguments...)) {
  m.def(name, [launcher](Crossing<Arguments>... values) {
    py::gil_scoped_release release;
    return launcher(Cross<Arguments>::arrived(values)...);
  });
}

}  // namespace

void bind(py::module_& m) {
  add(m, "cuda_gather_rows", &gather_rows);
  add(m, "cuda_scatter_rows", &scatter_rows);
  add(m, "cuda_add_layer_norm", &add_layer_norm);
  add(m, "cuda_add_layer_norm_backward", &add_layer_norm_backward);
  add(m, "cuda_embedding_layer_norm", &embedding_layer_norm);
  add(m, "cuda_embedding_layer_norm_backward", &embedding_layer_norm_backward);
  add(m, "cuda_activate", &activate);
  add(m, "cuda_activation_backward", &activation_backward);
  add(m, "cuda_linear_splits", &linear_splits);
  add(m, "cuda_linear", &linear);
  add(m, "cuda_cross_entropy_rows", &cross_entropy_rows);
  add(m, "cuda_attention", &attention);
  add(m, "cuda_attention_backward", &attention_backward);
  add(m, "cuda_encoder_workspace", &encoder_workspace);
  add(m, "cuda_encoder", &encoder);
}

void add_build_info(py::dict& info) {
  info["cuda_built"] = true;
#ifdef BERTFAST_CUDA_HOST
  info["cuda_host"] = true;
  info["gpus"] = "none: the CUDA kernels run on the CPU, for tests";
#else
  std::string why = "no GPU";
  const int devices = device_count(why);
  info["gpus"] = devices ? py::object(py::int_(devices)) : py::object(py::str("none: " + why));
#endif
}

}  // namespace bertfast::cuda
