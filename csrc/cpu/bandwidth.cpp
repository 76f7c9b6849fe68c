// The speed of memory, for those who want to know what share of it they reach.
#include "cpu/bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

namespace {

typedef float Vec __attribute__((vector_size(16)));
constexpr int64_t kStreams = 4;  // one alone does not keep enough reads in flight
constexpr int64_t kAhead[] = {0, 32, 64, 128};  // which is best depends on the processor

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Reads count vectors, a multiple of kStreams * 4, and asks for those that come `ahead` vectors later.
void read(const Vec* data, int64_t count, int64_t ahead) {
  const int64_t stream = count / kStreams;
  Vec sum[kStreams] = {};
  for (int64_t i = 0; i < stream; i += 4) {
    for (int64_t s = 0; s < kStreams; ++s) {
      const Vec* at = data + s * stream + i;
      __builtin_prefetch(at + ahead);
      sum[s] += (at[0] + at[1]) + (at[2] + at[3]);
    }
  }
  for (Vec& x : sum) asm volatile("" ::"m"(x));  // is used
}

// Runs work(thread) on every thread at once; returns the seconds until the last one is done.
template <typename Work>
double timed(int threads, const Work& work) {
  std::vector<std::thread> pool;
  const double began = now();
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (std::thread& thread : pool) thread.join();
  return now() - began;
}

}  // namespace

double t2i_read_bandwidth(int threads, int64_t size) {
  threads = std::max(threads, 1);
  const int64_t step = 16 * 4 * kStreams;  // bytes, in which all reads are
  const int64_t part = std::max<int64_t>(size / threads / step, 1) * step, total = part * threads;
  void* memory = mmap(nullptr, size_t(total), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size_t(total), MADV_HUGEPAGE);
  char* bytes = static_cast<char*>(memory);
  timed(threads, [&](int t) { std::fill_n(bytes + t * part, part, char(1)); });
  // Rounds of 20 ms at least, so that starting threads does not count.
  double best = 0;
  int64_t repeats = 1;
  for (int round = 0; round < 12; ++round) {
    const int64_t ahead = kAhead[round % 4];
    const double seconds = timed(threads, [&](int t) {
      for (int64_t i = 0; i < repeats; ++i) {
        read(reinterpret_cast<const Vec*>(bytes + t * part), part / 16, ahead);
      }
    });
    best = std::max(best, double(total) * double(repeats) / seconds);
    if (seconds < 0.02) repeats = int64_t(double(repeats) * 0.03 / std::max(seconds, 1e-5)) + 1;
  }
  munmap(memory, size_t(total));
  return best;
}
