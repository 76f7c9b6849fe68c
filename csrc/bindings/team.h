// Threads that go through one piece of work together: torch's, in one parallel region, which meet at
// barriers. Forking and joining a region costs microseconds, a barrier a fraction of one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace t2i {

// A core is given up after some time: its next owner may be what all wait for.
template <typename Done>
void spin_until(Done done) {
  for (int64_t tries = 0; !done(); ++tries) {
    if (tries > 10000) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

struct Barrier {
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> generation{0};
};

struct Member {
  int64_t index, size;
  Barrier& barrier;

  // Returns when all members have called it.
  void wait() const {
    const int64_t generation = barrier.generation.load(std::memory_order_relaxed);
    if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      barrier.arrived.store(0, std::memory_order_relaxed);
      barrier.generation.store(generation + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return barrier.generation.load(std::memory_order_acquire) != generation; });
  }

  // This member's share of a count, as [first, second).
  std::pair<int64_t, int64_t> share(int64_t count) const {
    return {count * index / size, count * (index + 1) / size};
  }
};

// Runs work(member) on `threads` threads at most, all at once; it must not throw. torch may give fewer
// threads, each a longer range of what it divides among them: all are there when all is covered. That
// ranges run at once is true of torch with OpenMP, as it is published.
template <typename Work>
void run_team(int64_t threads, const Work& work) {
  Barrier barrier;
  std::atomic<int64_t> members{0}, covered{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t index = members.fetch_add(1);
    covered.fetch_add(end - begin);
    spin_until([&] { return covered.load() == threads; });
    work(Member{index, members.load(), barrier});
  });
}

}  // namespace t2i
