// What native code asks of the machine it runs on: XLA's threads, and the instructions that the processor has.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

enum Level { kPortable, kAvx2, kAvx512 };  // the order of build.LEVELS

// The best instruction set that the machine has, up to `level`.
inline Level best_level(int64_t level) {
#if defined(__x86_64__)
  static const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level >= kAvx512 && has512) return kAvx512;
  if (level >= kAvx2 && has2) return kAvx2;
#endif
  return kPortable;
}

// body(i) for i < count, on XLA's threads and this one. This one may be one of XLA's: it never waits for work that has
// not begun, and what begins late finds nothing left and touches nothing of the caller's.
template <class Body>
void parallel(xla::ffi::ThreadPool pool, int64_t count, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const auto drain = [count, &body](State& s) {
    for (int64_t i; (i = s.next.fetch_add(1)) < count; s.done.fetch_add(1, std::memory_order_release)) body(i);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state, drain] { drain(*state); });
  drain(*state);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count;)
    if (++spins > 256) std::this_thread::yield();
}
