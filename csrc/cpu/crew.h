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
  // Everyone waits for everyone; what a thread wrote before, all see afterwards.
  void meet() {
    const int64_t now = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
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
  // work(i) for all i < n, by whoever is free; then everyone meets.
  template <class Work>
  void share(int64_t n, const Work& work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    meet();
  }

 private:
  // Apart: those who wait read one while the others are written.
  alignas(64) std::atomic<int64_t> phase_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
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
