// The instruction set's kernels, chosen once by cpuid or BERTFAST_CPU_ISA.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace bertfast {

std::vector<std::string> built_isas();
// Throws std::runtime_error where BERTFAST_CPU_ISA names what this build or machine lacks.
const Kernels& kernels();

}  // namespace bertfast
