// Peaks of this machine: fp32 multiply-adds and reads from memory. Usage: machine THREADS
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4, kChains = 12;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work on every thread at once; returns the seconds until the last one is done.
template <typename Work>
double timed(int threads, Work work) {
  std::vector<std::thread> pool;
  const double began = now();
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, t);
  for (auto& thread : pool) thread.join();
  return now() - began;
}

volatile float sink;

double multiply_adds(int threads) {
  constexpr long kSteps = 20'000'000;
  const double seconds = timed(threads, [](int) {
    Vec x[kChains];
    for (int i = 0; i < kChains; ++i) x[i] = Vec{} + float(i);
    const Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
    for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + b;
    }
    float sum = 0;
    for (int i = 0; i < kChains; ++i) sum += x[i][0];
    sink = sum;
  });
  return 2.0 * kLanes * kChains * kSteps * threads / seconds / 1e9;
}

// Four streams a thread: one alone does not keep enough reads in flight.
double reads(int threads) {
  constexpr long kFloats = 64L << 20;
  std::vector<std::vector<float>> memory(threads);
  timed(threads, [&](int t) { memory[t].assign(kFloats, 1.0f); });
  const double seconds = timed(threads, [&](int t) {
    constexpr long kStream = kFloats / 4 / kLanes;
    const Vec* data = reinterpret_cast<const Vec*>(
        (reinterpret_cast<size_t>(memory[t].data()) + kBytes - 1) / kBytes * kBytes);
    Vec sum[4] = {};
    for (long i = 0; i + 1 < kStream; ++i) {
      for (int s = 0; s < 4; ++s) {
        __builtin_prefetch(data + s * kStream + i + 1024 / kBytes);
        sum[s] += data[s * kStream + i];
      }
    }
    sink = sum[0][0] + sum[1][0] + sum[2][0] + sum[3][0];
  });
  return 4.0 * kFloats * threads / seconds / 1e9;
}

template <typename F>
double best_of(int times, F f) {
  double best = 0;
  for (int i = 0; i < times; ++i) {
    const double value = f();
    best = value > best ? value : best;
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("{\"gflops\": %.1f, \"gigabytes_per_second\": %.1f}\n",
              best_of(3, [&] { return multiply_adds(threads); }),
              best_of(3, [&] { return reads(threads); }));
}
