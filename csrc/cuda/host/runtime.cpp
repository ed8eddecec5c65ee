// Runs a kernel's blocks one after another, a block's threads as fibers.
//
// What shows here: out-of-bounds accesses of global and of shared memory (under ASan; shared memory
// is a heap block of the size asked for), shared memory read before it is written (it starts as
// NaN), a barrier or shuffle that some threads never reach, lanes of a warp in different shuffles,
// data of cp.async used before the wait (copies run as late as is allowed). Races: with
// BERTFAST_HOST_ORDER=descending the threads of a block run in the other order, and copies at once,
// which a missing barrier turns into another result.
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace bertfast::host {
namespace {

constexpr size_t kStack = 64 << 10;
enum class State { ready, barrier, warp, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

void run_copy(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  dim3 index;
  std::deque<std::vector<Copy>> groups;  // closed ones, the oldest first
  std::vector<Copy> open;
};

struct Warp {
  void* arguments[kWarp];
  Meeting run;
  int arrived;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // kept for the next block: stacks are large
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  int count = 0, current = 0, at_barrier = 0, done = 0, step = 1;
  std::string fault;
  ucontext_t main;
  const std::function<void()>* kernel;
};

thread_local Block block;

Thread& self() { return *block.threads[block.current]; }

// Runs the next ready thread; where there is none, all are done or wait for ever.
void switch_from(ucontext_t& from) {
  for (int i = 1, next = block.current; i <= block.count && block.fault.empty(); ++i) {
    next = (next + block.step + block.count) % block.count;
    if (block.threads[next]->state != State::ready) continue;
    const bool same = next == block.current && &from == &self().context;
    block.current = next;
    threadIdx = block.threads[next]->index;
    if (!same) swapcontext(&from, &block.threads[next]->context);
    return;
  }
  if (block.done < block.count && block.fault.empty())
    block.fault = "deadlock: " + std::to_string(block.at_barrier) + " of " +
                  std::to_string(block.count) + " threads wait in __syncthreads, " +
                  std::to_string(block.done) + " have returned, the others wait for their warp";
  swapcontext(&from, &block.main);
}

void body() {
  (*block.kernel)();
  Thread& thread = self();
  if (!thread.groups.empty() || !thread.open.empty())
    block.fault = "a thread returned before its cp.async copies were waited for";
  thread.state = State::done;
  ++block.done;
  switch_from(thread.context);
}

void run_block(size_t shared_bytes) {
  block.shared.reset(new char[shared_bytes]);
  std::memset(block.shared.get(), 0xFF, shared_bytes);
  block.warps.assign(block.count / kWarp, Warp{});
  block.at_barrier = block.done = 0;
  block.fault.clear();
  for (int i = 0; i < block.count; ++i) {
    if (size_t(i) == block.threads.size()) block.threads.push_back(std::make_unique<Thread>());
    Thread& t = *block.threads[i];
    t.state = State::ready;
    t.index = dim3(i % blockDim.x, i / blockDim.x);
    t.groups.clear(), t.open.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, body, 0);
  }
  block.current = block.step > 0 ? block.count - 1 : 0;  // the first is its successor
  switch_from(block.main);
  if (!block.fault.empty()) throw std::runtime_error("kernel: " + block.fault);
}

}  // namespace

char* shared_memory() { return block.shared.get(); }

void block_barrier() {
  Thread& thread = self();
  if (++block.at_barrier < block.count) {
    thread.state = State::barrier;
    switch_from(thread.context);
    return;
  }
  block.at_barrier = 0;
  for (int i = 0; i < block.count; ++i) block.threads[i]->state = State::ready;
}

void meet(void* argument, Meeting run) {
  Thread& thread = self();
  const int first = block.current / kWarp * kWarp;
  Warp& warp = block.warps[first / kWarp];
  if (warp.arrived > 0 && warp.run != run)
    block.fault = "lanes of one warp meet in different operations";
  warp.arguments[block.current - first] = argument;
  warp.run = run;
  if (++warp.arrived < kWarp || !block.fault.empty()) {
    thread.state = State::warp;
    switch_from(thread.context);
    return;
  }
  warp.arrived = 0;
  run(warp.arguments);
  for (int i = first; i < first + kWarp; ++i) block.threads[i]->state = State::ready;
}

void copy_later(void* to, const void* from, size_t bytes) {
  self().open.push_back({to, from, bytes});
  if (block.step < 0) run_copy(self().open.back());
}

void close_group() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void finish_groups(int pending) {
  auto& groups = self().groups;
  for (; int(groups.size()) > pending; groups.pop_front())
    if (block.step > 0)
      for (const Copy& copy : groups.front()) run_copy(copy);
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const char* order = std::getenv("BERTFAST_HOST_ORDER");
  block.step = order && std::string(order) == "descending" ? -1 : 1;
  block.kernel = &kernel;
  gridDim = grid, blockDim = size;
  block.count = int(size.x * size.y);
  if (block.count == 0 || block.count % kWarp || block.count > 1024 || size.z != 1)
    throw std::runtime_error("launch: " + std::to_string(block.count) +
                             " threads a block, expected whole warps up to 1024");
  if (shared_bytes > (99 << 10))  // what sm_86 and sm_89 give a block
    throw std::runtime_error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory");
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(shared_bytes);
      }
}

}  // namespace bertfast::host
