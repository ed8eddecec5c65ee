#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#ifdef BERTFAST_HAS_avx512_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bertfast {

#define BERTFAST_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
#ifdef BERTFAST_HAS_baseline
BERTFAST_DECLARE(baseline)
#endif
#ifdef BERTFAST_HAS_avx2
BERTFAST_DECLARE(avx2)
#endif
#ifdef BERTFAST_HAS_avx512
BERTFAST_DECLARE(avx512)
#endif
#ifdef BERTFAST_HAS_avx512_bf16
BERTFAST_DECLARE(avx512_bf16)
#endif
#ifdef BERTFAST_HAS_avx512_amx
BERTFAST_DECLARE(avx512_amx)
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool supported, preferred = true;
};

#ifdef BERTFAST_HAS_avx512_amx
// Whether the processor has the matrix unit and the system lets this process use it.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kBf16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#ifdef BERTFAST_HAS_avx512_amx
  list.push_back({&avx512_amx::table,
                  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && has_amx()});
#endif
#ifdef BERTFAST_HAS_avx512_bf16
  list.push_back({&avx512_bf16::table,
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vnni"),
                  // Intel runs the bf16 dot product at half the flops of fp32 (measured on
                  // Emerald Rapids: 160 against 320 GFLOP/s), Zen 5 at twice.
                  !__builtin_cpu_is("intel")});
#endif
#ifdef BERTFAST_HAS_avx512
  list.push_back({&avx512::table, __builtin_cpu_supports("avx512dq") &&
                                      __builtin_cpu_supports("avx512vl") &&
                                      __builtin_cpu_supports("avx512bw")});
#endif
#ifdef BERTFAST_HAS_avx2
  list.push_back({&avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#ifdef BERTFAST_HAS_baseline
  list.push_back({&baseline::table, true});
#endif
#ifdef BERTFAST_EMULATED
  for (Candidate& c : list) c.supported = true;
#endif
  return list;
}

const Kernels& choose() {
  const char* forced = std::getenv("BERTFAST_CPU_ISA");
  std::string names;
  for (const Candidate& c : candidates()) {
    if (forced && *forced) {
      names += std::string(names.empty() ? "" : ", ") + c.table->isa;
      if (forced != std::string(c.table->isa)) continue;
      if (!c.supported)
        throw std::runtime_error(std::string("BERTFAST_CPU_ISA is ") + forced +
                                 ", which this processor lacks; unset it or choose another");
      return *c.table;
    }
    if (c.supported && c.preferred) return *c.table;
  }
  throw std::runtime_error(forced && *forced
                               ? std::string("BERTFAST_CPU_ISA is ") + forced +
                                     ", expected one of the instruction sets built: " + names
                               : std::string("no built instruction set runs on this processor"));
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.table->isa);
  return names;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bertfast
