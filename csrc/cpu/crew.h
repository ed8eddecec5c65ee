// The threads of a parallel region: a barrier and a shared-out loop that spin for a while.
//
// libgomp's own sleep at once where all its teams together have more threads than there are
// processors; another Python thread that runs torch, or another library, is enough for that. With
// tens of barriers in a forward of 1 ms, it then took 2.7.
#pragma once
#include <omp.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Crew {
 public:
  explicit Crew(int threads) : parts_(threads) {}
  // Everyone waits for everyone; what a thread wrote before, all see afterwards.
  void meet() {
    const int64_t now = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(now + 1, std::memory_order_release);
      return;
    }
    // Tens of microseconds; then others may run, and those who share few processors by a quota.
    constexpr int kSpins = 2000, kYields = 200;
    for (int i = 0; phase_.load(std::memory_order_acquire) == now; ++i)
      if (i < kSpins)
        relax();
      else if (i < kSpins + kYields)
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  // work(i) for all i < n; then everyone meets. A thread takes its own part, which is the same of
  // the same rows each time and in its cache, then what others haven't come to.
  template <class Work>
  void share(int64_t n, const Work& work) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t turn = parts_[me].shared++ % 2;
    parts_[me].taken[!turn].store(0, std::memory_order_relaxed);  // for the next time
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t t = (me + k) % threads, begin = n * t / threads, end = n * (t + 1) / threads;
      auto& taken = parts_[t].taken[turn];
      while (begin + taken.load(std::memory_order_relaxed) < end) {
        const int64_t i = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (i < end) work(i);
      }
    }
    meet();
  }

 private:
  struct alignas(64) Part {
    std::atomic<int64_t> taken[2] = {};  // of it, in turns of `share`
    int64_t shared = 0;                  // how often, its own thread's
  };
  // Apart: those who wait read one while the other is written.
  alignas(64) std::atomic<int64_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::vector<Part> parts_;
};

// Those who share a piece of work, each taking its part of n rows or panels: the whole crew, or
// one alone.
struct Team {
  Crew* crew = nullptr;
  int64_t index = 0, size = 1;
  static Team all(Crew& crew) { return {&crew, omp_get_thread_num(), omp_get_num_threads()}; }
  int64_t begin(int64_t n) const { return n * index / size; }
  int64_t end(int64_t n) const { return n * (index + 1) / size; }
  void meet() const {
    if (size > 1) crew->meet();
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
