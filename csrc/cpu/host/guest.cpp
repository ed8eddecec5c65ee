// The other side of remote.h: runs kernels on the memory of its parent, whose pages appear here at
// their own addresses when they are first touched and go back when the kernel is done.
#include <fcntl.h>
#include <omp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "../../dispatch.h"
#include "remote.h"

// glibc's clears by DC ZVA, and after a fault there went past its end under QEMU 7.2.
extern "C" __attribute__((optimize("no-tree-loop-distribute-patterns"))) void* memset(void* to,
                                                                                      int value,
                                                                                      size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<volatile char*>(to)[i] = char(value);
  return to;
}

namespace bertfast {
namespace {

using isa::RemoteCall;
using isa::RemoteReply;

constexpr int64_t kPage = 4096, kSlots = 1 << 20, kMost = kSlots / 2;

struct Page {
  char* at;   // null in a free slot
  char* was;  // null until it is written: then what it held
};

Page slots[kSlots];  // by address
int64_t used[kMost], count = 0;
char* copies;  // room for kMost of them
int memory;    // the parent's
std::atomic_flag busy = ATOMIC_FLAG_INIT;

[[noreturn]] void end(const char* why, const void* at) {
  char text[200];
  const int size = std::snprintf(text, sizeof text, "guest: %s at %p\n", why, at);
  if (write(2, text, size)) _exit(1);
  _exit(1);
}

Page& slot_of(char* at) {
  int64_t i = reinterpret_cast<uint64_t>(at) / kPage * 0x9E3779B97F4A7C15u >> 44;
  while (slots[i].at && slots[i].at != at) i = (i + 1) % kSlots;
  return slots[i];
}

// A page that isn't here comes, to be read; one that is written may be from now on.
void on_fault(int, siginfo_t* info, void*) {
  char* at = static_cast<char*>(info->si_addr);
  at -= reinterpret_cast<uint64_t>(at) % kPage;
  while (busy.test_and_set(std::memory_order_acquire)) {
  }
  Page& page = slot_of(at);
  if (!page.at) {
    if (count == kMost) end("too many pages", at);
    void* room = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pread(memory, room, kPage, reinterpret_cast<int64_t>(at)) != kPage)
      end("no such memory", info->si_addr);
    mprotect(room, kPage, PROT_READ);
    if (mremap(room, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at) end("can't map", at);
    used[count++] = &page - slots;
    page.at = at;
  } else if (!page.was) {
    page.was = copies + (&page - slots) * kPage;
    std::memcpy(page.was, at, kPage);
    mprotect(at, kPage, PROT_READ | PROT_WRITE);
  }
  busy.clear(std::memory_order_release);
}

// What was changed alone: others may have written beside it meanwhile.
void give_back() {
  for (int64_t u = 0; u < count; ++u) {
    const Page& page = slots[used[u]];
    for (int64_t i = 0; page.was && i < kPage;) {
      int64_t n = 0;
      while (i + n < kPage && page.at[i + n] != page.was[i + n]) ++n;
      if (n && pwrite(memory, page.at + i, n, reinterpret_cast<int64_t>(page.at + i)) != n)
        end("can't write", page.at);
      i += n + 1;
    }
    munmap(page.at, kPage);
  }
  for (; count > 0; --count) slots[used[count - 1]] = {};
}

int64_t run(const RemoteCall& call) {
  using F = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  omp_set_num_threads(int(call.threads));
  const auto* functions = reinterpret_cast<const F*>(&kernels().gemm);
  const int64_t* w = call.words;
  return functions[call.function](w[0], w[1], w[2], w[3], w[4], w[5]);
}

bool take(void* to, size_t size) {
  for (size_t done = 0; done < size;) {
    const ssize_t n = read(0, static_cast<char*>(to) + done, size - done);
    if (n <= 0) return false;
    done += n;
  }
  return true;
}

}  // namespace
}  // namespace bertfast

int main() {
  using namespace bertfast;
  memory = open(("/proc/" + std::to_string(getppid()) + "/mem").c_str(), O_RDWR);
  if (memory < 0) end("can't open its parent's memory", nullptr);
  copies = static_cast<char*>(mmap(nullptr, kSlots * kPage, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  RemoteReply reply = {};
  RemoteCall call;
  do {
    if (write(1, &reply, sizeof reply) != sizeof reply) return 1;
    reply = {};
    if (!take(&call, sizeof call)) return 0;
    try {
      reply.value = run(call);
    } catch (const std::exception& e) {
      std::snprintf(reply.error, sizeof reply.error, "%s", e.what());
    }
    give_back();
  } while (true);
}
