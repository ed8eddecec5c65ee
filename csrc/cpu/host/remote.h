// 64-bit ARM's instruction sets, for a test build on another processor: kernels run in a process
// under QEMU (guest.cpp), which sees this one's memory at the same addresses. It shows results, not
// speed.
#pragma once
#include <cstdint>

namespace bertfast::isa {
namespace {

struct Remote {
  static bool supported() { return true; }
  static bool preferred() { return true; }
};
struct neon_bf16 : Remote {};
struct neon_dot : Remote {};
struct neon : Remote {};

// A kernel's call: which of the table's functions, and its arguments, of 64 bits at most or a
// struct's address. Structs are laid out alike on both sides.
struct RemoteCall {
  int64_t function, threads, words[6];
};
struct RemoteReply {
  int64_t value;
  char error[256];  // empty where there was none
};

}  // namespace
}  // namespace bertfast::isa
