#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "isas.h"  // made by CMake: those built, best first

namespace bertfast {

#define BERTFAST_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
BERTFAST_ISAS(BERTFAST_DECLARE)

namespace {

struct Candidate {
  const Kernels* table;
  bool supported, preferred;
};

std::vector<Candidate> candidates() {
#define BERTFAST_CANDIDATE(name) {&name::table, isa::name::supported(), isa::name::preferred()},
  std::vector<Candidate> list{BERTFAST_ISAS(BERTFAST_CANDIDATE)};
#ifdef BERTFAST_EVERY_ISA  // emulated
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
