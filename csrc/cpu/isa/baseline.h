// Any processor: what the compiler makes of plain vectors (SSE2).
#pragma once
#include "generic.h"

namespace bertfast::isa {
namespace {

struct baseline : Generic<4, 6> {};  // 12 accumulators of 16 registers

}  // namespace
}  // namespace bertfast::isa
