// What an ARM processor has, as its system tells.
#pragma once
#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

namespace bertfast::isa::hwcap {
namespace {

#if defined(__APPLE__)
inline bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
inline bool dot() { return has("hw.optional.arm.FEAT_DotProd"); }
inline bool bf16() { return has("hw.optional.arm.FEAT_BF16"); }
inline bool i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else  // the kernel's bits, of which old headers lack some
inline bool dot() { return getauxval(AT_HWCAP) >> 20 & 1; }
inline bool bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
inline bool i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#endif

}  // namespace
}  // namespace bertfast::isa::hwcap
