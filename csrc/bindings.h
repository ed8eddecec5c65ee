// bertfast._C by families: each adds its functions and classes to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace bertfast {

void bind_encoder(pybind11::module_& m);
void bind_layouts(pybind11::module_& m);

}  // namespace bertfast
