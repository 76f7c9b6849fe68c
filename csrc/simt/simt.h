// Runs CUDA device code on the CPU, one fiber a thread, and finds what a GPU would not tell.
//
// Included in place of CUDA's headers where a source is compiled by a host compiler. What CUDA C++
// has is in device.h, matrix instructions are in matrix.h and hopper.h. What is checked, how, and what
// cannot be seen: README.md.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__clang__)
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define SIMT_UNCHECKED __attribute__((no_sanitize_thread))
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

// ---- From outside -------------------------------------------------------------------------------

// What a kernel did wrong, with the source line, the block and the thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of the threads that can run does so next, and which block. Right code gives the same in every
// order.
enum class Order { forward, reverse, random };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;     // of Order::random and of preempt
  unsigned preempt = 0;  // before one access in so many another thread goes on; 0: never
  int compute_capability = 80;  // for launchers that choose by it
};
extern Options options;

// Shared memory's passes ("wavefronts") of a source line, summed over the warps that were there.
struct LineCount {
  std::string line;
  uint64_t accesses, wavefronts, ideal;
};
std::vector<LineCount> shared_counts();  // with the checker, since clear_counts
void clear_counts();
extern uint64_t switches;  // from fiber to fiber, since the start

// Memory for kernels: filled with NaN bytes, between unmapped pages. With the checker kernels may
// touch no other, and an access that misses is an error that calls the buffer by its name; without
// it, a fault.
void* allocate(size_t bytes, const char* name);
void release(void* memory);

// Runs a grid, block after block. Throws Error; then the memory holds whatever was written so far.
using Entry = void (*)(void* closure);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Entry entry, void* closure);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments... arguments) {
  auto call = [&]() { kernel(static_cast<Parameters>(arguments)...); };
  run_grid(grid, block, shared_bytes,
           [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}

// ---- From device code ---------------------------------------------------------------------------

using Site = std::source_location;

struct Thread {
  dim3 index;
  unsigned linear, lane, warp;
};

struct Place {
  const Thread* thread;
  dim3 block, block_dim, grid_dim;
  uint64_t serial;  // of the block, in all launches
};
extern Place here;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string line_of(const void* instruction);  // "file:line", with the checker
std::string shared_name(uint32_t address);     // "byte 12 of shared array 0"

// bar.sync: waits for ``threads`` threads, 0 is all of the block that have not ended.
void barrier(Site site, unsigned id = 0, unsigned threads = 0);
// bar.arrive: is one of them, but does not wait.
void barrier_arrive(Site site, unsigned id, unsigned threads);
// All lanes in ``mask`` that have not ended bring their operands, and the last one to come runs
// ``run`` on them all.
using Collective = void (*)(void* const (&operands)[32], uint32_t lanes);
void collective(Site site, const char* name, uint32_t mask, void* operand, Collective run);

// Shared memory is an arena; addresses in it are offsets, as PTX's are in the .shared space. Arrays
// are taken in the same order by all threads, filled with NaN bytes, and surrounded by guards.
void* shared_array(unsigned index, size_t bytes, size_t alignment);
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, size_t bytes);

// The destination is NaN and may not be touched until its group was waited for by the thread that
// issued it.
void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned source_bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

// mbarrier: ends a phase when ``count`` threads have arrived, and as many bytes as they expect.
void mbarrier_init(Site site, uint32_t mbarrier, unsigned count);
void mbarrier_arrive(Site site, uint32_t mbarrier, unsigned expect_bytes = 0);
void mbarrier_wait(Site site, uint32_t mbarrier, unsigned parity);
// cp.async.bulk from global to shared memory. The destination is NaN and may not be touched until the
// data arrive, as late as possible: when no thread can run.
void copy_bulk(Site site, uint32_t to, const void* from, unsigned bytes, uint32_t mbarrier);

enum class Access {
  read,
  write,
  atomic,
  issue,  // of a copy, whose bytes are written later
  sync,   // use of an mbarrier
};
// An access of the running thread that the compiler does not report: through inline assembly on a GPU.
// ``instruction`` is an address in the code that does it, by which lanes' accesses are put together.
void access(const void* pointer, size_t bytes, Access access, const void* instruction);
// A part of a collective, or of a copy.
void touch(const void* pointer, size_t bytes, Access access, const Thread& thread,
           const void* instruction);
const Thread& lane_of_warp(unsigned lane);
// The shared accesses of one warp instruction that was run as a collective.
void count_shared(const void* instruction, const uint32_t* addresses, unsigned lanes, size_t bytes);
void fence();

template <class T>
SIMT_UNCHECKED __attribute__((noinline)) T load(const void* pointer) {
  access(pointer, sizeof(T), Access::read, __builtin_return_address(0));
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <class T>
SIMT_UNCHECKED __attribute__((noinline)) void store(void* pointer, T value) {
  access(pointer, sizeof(T), Access::write, __builtin_return_address(0));
  std::memcpy(pointer, &value, sizeof(T));
}

}  // namespace simt
