#pragma once
#include <pybind11/pybind11.h>

namespace bertfast::cuda {

void bind(pybind11::module_& m);
void add_build_info(pybind11::dict& info);

}  // namespace bertfast::cuda
