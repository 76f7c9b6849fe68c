// Kernels with planted bugs, each beside its right version. The lines that a message has to name end
// in the kernel's name.
#include "planted.h"

#include "cuda/ptx.cuh"

namespace {

using namespace t2i;
constexpr uint32_t kAll = 0xffffffff;

float* shared_floats(unsigned index, int count) {
  return static_cast<float*>(simt::shared_array(index, count * sizeof(float), 16));
}

uint32_t shared_bytes(unsigned index, int count) {
  return simt::shared_address(simt::shared_array(index, count, 1024));
}

// ---- Bounds and alignment -----------------------------------------------------------------------

template <bool kBug>
void global_read(Arguments a) {
  const int i = threadIdx.x;
  const float x = a.in[kBug ? i + 1 : i];  // [global_read]
  a.out[i] = x;
}

template <bool kBug>
void global_write(Arguments a) {
  const int i = threadIdx.x;
  a.out[kBug ? i - 1 : i] = 1;  // [global_write]
}

// Far from all buffers.
template <bool kBug>
void wild_read(Arguments a) {
  static float constant = 3;
  const float* from = kBug ? a.in + (int64_t(1) << 36) : &constant;
  a.out[threadIdx.x] = *from;  // [wild_read]
}

template <bool kBug>
void shared_write(Arguments a) {
  float* x = shared_floats(0, 64);
  float* y = shared_floats(1, 64);
  const int i = threadIdx.x;
  x[i] = y[i] = 0;
  if (i == 63) x[kBug ? 64 : 63] = 1;  // [shared_write]
  a.out[i] = x[i] + y[i];
}

template <bool kBug>
void too_much_shared(Arguments a) {
  float* x = shared_floats(0, kBug ? 129 : 128);
  x[threadIdx.x] = 1;
  a.out[threadIdx.x] = x[threadIdx.x];
}

template <bool kBug>
void misaligned_read(Arguments a) {
  const int i = threadIdx.x % 8;
  const uint4 x = ptx::load_global_16(a.in + i * 4 + (kBug ? 1 : 0));  // [misaligned_read]
  a.out[threadIdx.x] = __uint_as_float(x.x);
}

template <bool kBug>
void misaligned_write(Arguments a) {
  const int i = threadIdx.x;
  char* to = reinterpret_cast<char*>(a.out + i) + (kBug ? 2 : 0);
  if (i < 63) *reinterpret_cast<float*>(to) = 1;  // [misaligned_write]
}

template <bool kBug>
void misaligned_ldmatrix(Arguments a) {
  const uint32_t tile = shared_bytes(0, 1024);
  const int i = threadIdx.x;
  for (int j = i; j < 256; j += 64) ptx::store_shared(tile + j * 4, 0u);
  __syncthreads();
  uint32_t x[4];
  ptx::ldmatrix<false>(x, tile + i % 32 * 16 + (kBug ? 8 : 0));  // [misaligned_ldmatrix]
  a.out[i] = __uint_as_float(x[0]);
}

// ---- Shared memory ------------------------------------------------------------------------------

// With zeros that all know of: what is read too early is not uninitialised.
float* shared_zeros(int count) {
  float* x = shared_floats(0, count);
  if (int(threadIdx.x) < count) x[threadIdx.x] = 0;
  __syncthreads();
  return x;
}

template <bool kBug>
void write_read(Arguments a) {
  float* x = shared_zeros(64);
  const int i = threadIdx.x;
  x[i] = a.in[i];  // [write_read]
  if (!kBug) __syncthreads();
  a.out[i] = x[63 - i];  // [write_read]
}

template <bool kBug>
void read_write(Arguments a) {
  float* x = shared_floats(0, 64);
  const int i = threadIdx.x;
  x[i] = a.in[i];
  __syncthreads();
  const float other = x[63 - i];  // [read_write]
  if (!kBug) __syncthreads();
  x[i] = 2 * other;  // [read_write]
  a.out[i] = x[i];
}

// Thread 0 writes where all have read: the last reader is not the only one.
template <bool kBug>
void all_read_one_writes(Arguments a) {
  float* x = shared_floats(0, 1);
  const int i = threadIdx.x;
  if (i == 0) x[0] = a.in[0];
  __syncthreads();
  a.out[i] = x[0];  // [all_read_one_writes]
  if (!kBug) __syncthreads();
  if (i == 0) x[0] = 1;  // [all_read_one_writes]
}

template <bool kBug>
void write_write(Arguments a) {
  float* x = shared_floats(0, 64);
  const int i = threadIdx.x;
  x[kBug ? 0 : i] = 1;  // [write_write]
  a.out[i] = 1;
}

template <bool kBug>
void lanes_of_a_warp(Arguments a) {
  float* x = shared_zeros(64);
  const int i = threadIdx.x;
  x[i] = a.in[i];  // [lanes_of_a_warp]
  if (!kBug) __syncwarp();
  a.out[i] = x[i ^ 1];  // [lanes_of_a_warp]
}

// A barrier of half a warp orders nothing in the other half.
template <bool kBug>
void half_a_warp(Arguments a) {
  float* x = shared_zeros(64);
  const int i = threadIdx.x, lane = i % 32;
  x[i] = a.in[i];  // [half_a_warp]
  __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
  a.out[i] = x[i ^ (kBug ? 16 : 8)];  // [half_a_warp]
}

template <bool kBug>
void uninitialised(Arguments a) {
  float* x = shared_floats(0, 64);
  const int i = threadIdx.x;
  if (!kBug || i != 40) x[i] = a.in[i];
  __syncthreads();
  a.out[i] = x[i];  // [uninitialised]
}

template <bool kBug>
void atomic_and_plain(Arguments a) {
  float* x = shared_floats(0, 1);
  if (threadIdx.x == 0) x[0] = 0;
  __syncthreads();
  atomicAdd(x, 1.0f);  // [atomic_and_plain]
  if (!kBug) __syncthreads();
  a.out[threadIdx.x] = x[0];  // [atomic_and_plain]
}

// ---- Barriers and collectives -------------------------------------------------------------------

template <bool kBug>
void divergent_barrier(Arguments a) {
  const int i = threadIdx.x;
  if (kBug && i < 32) {
    __syncthreads();  // [divergent_barrier]
  } else {
    __syncthreads();  // [divergent_barrier]
  }
  a.out[i] = 1;
}

// The halves of a warp may go separate ways with masks that say so.
template <bool kBug>
void divergent_shuffle(Arguments a) {
  const int i = threadIdx.x, lane = i % 32;
  float x;
  if (lane < 16) {
    x = __shfl_xor_sync(kBug ? kAll : 0xffffu, a.in[i], 1);  // [divergent_shuffle]
  } else {
    x = __shfl_xor_sync(kBug ? kAll : 0xffff0000u, a.in[i], 2);  // [divergent_shuffle]
  }
  a.out[i] = x;
}

template <bool kBug>
void shuffle_from_outside(Arguments a) {
  const int i = threadIdx.x;
  if (i % 32 >= 16) return;
  a.out[i] = __shfl_sync(0xffffu, a.in[i], kBug ? 16 : 15);  // [shuffle_from_outside]
}

template <bool kBug>
void not_in_own_mask(Arguments a) {
  const int i = threadIdx.x;
  a.out[i] = __any_sync(kBug ? 0xffffu : kAll, a.in[i] > 0);  // [not_in_own_mask]
}

template <bool kBug>
void exit_before_ldmatrix(Arguments a) {
  const uint32_t tile = shared_bytes(0, 1024);
  const int i = threadIdx.x;
  for (int j = i; j < 256; j += 64) ptx::store_shared(tile + j * 4, 0u);
  __syncthreads();
  if (kBug && i == 31) return;
  uint32_t x[4];
  ptx::ldmatrix<false>(x, tile + i % 32 * 16);  // [exit_before_ldmatrix]
  a.out[i] = __uint_as_float(x[0]);
}

template <bool kBug>
void exit_before_barrier(Arguments a) {
  const int i = threadIdx.x;
  if (kBug && i < 32) return;
  ptx::barrier_sync(1, 64);  // [exit_before_barrier]
  a.out[i] = 1;
}

// The second warp waits for what the first has written; the first goes on.
template <bool kBug>
void named_barrier(Arguments a) {
  float* x = shared_floats(0, 32);
  const int i = threadIdx.x;
  if (i < 32) {
    x[i] = a.in[i];
    ptx::barrier_arrive(kBug ? 3 : 2, 64);
  } else {
    ptx::barrier_sync(2, 64);  // [named_barrier]
    a.out[i] = x[i - 32];
  }
}

// bar.arrive makes known, but does not learn.
template <bool kBug>
void arrive_is_no_wait(Arguments a) {
  float* x = shared_zeros(32);
  const int i = threadIdx.x;
  if (i < 32) {
    if (kBug) {
      ptx::barrier_arrive(2, 64);
    } else {
      ptx::barrier_sync(2, 64);
    }
    a.out[i] = x[i];  // [arrive_is_no_wait]
  } else {
    x[i - 32] = a.in[i];  // [arrive_is_no_wait]
    ptx::barrier_sync(2, 64);
  }
}

// ---- cp.async -----------------------------------------------------------------------------------

template <bool kBug>
void copy_not_waited(Arguments a) {
  const uint32_t x = shared_bytes(0, 1024);
  const int i = threadIdx.x;
  ptx::copy_async_16(x + i * 16, a.in + i % 16 * 4);
  ptx::copy_async_commit();
  if (!kBug) ptx::copy_async_wait<0>();
  a.out[i] = ptx::load_shared_float(x + i * 16);  // [copy_not_waited]
  ptx::copy_async_wait<0>();
}

template <bool kBug>
void copy_too_few_groups(Arguments a) {
  const uint32_t x = shared_bytes(0, 2048);
  const int i = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    ptx::copy_async_16(x + group * 1024 + i * 16, a.in + i % 16 * 4);
    ptx::copy_async_commit();
  }
  ptx::copy_async_wait<1>();
  a.out[i] = ptx::load_shared_float(x + i * 16);
  ptx::copy_async_wait<kBug ? 1 : 0>();
  a.out[i] += ptx::load_shared_float(x + 1024 + i * 16);  // [copy_too_few_groups]
  ptx::copy_async_wait<0>();
}

template <bool kBug>
void copy_of_others(Arguments a) {
  const uint32_t x = shared_bytes(0, 1024);
  const int i = threadIdx.x;
  ptx::copy_async_16(x + i * 16, a.in + i % 16 * 4);
  ptx::copy_async_commit();
  if (kBug) __syncthreads();
  ptx::copy_async_wait<0>();
  if (!kBug) __syncthreads();
  if (i == 63) a.out[i] = ptx::load_shared_float(x);  // [copy_of_others]
}

template <bool kBug>
void copy_never_waited(Arguments a) {
  const uint32_t x = shared_bytes(0, 1024);
  const int i = threadIdx.x;
  ptx::copy_async_16(x + i * 16, a.in + i % 16 * 4);  // [copy_never_waited]
  ptx::copy_async_commit();
  if (!kBug) ptx::copy_async_wait<0>();
  a.out[i] = 1;
}

// ---- Blocks -------------------------------------------------------------------------------------

template <bool kBug>
void two_blocks_write(Arguments a) {
  const int i = threadIdx.x;
  if (i < 32) a.out[kBug ? i : blockIdx.x * 32 + i] = 1;  // [two_blocks_write]
}

enum class LastBlock { right, no_counter, no_release, no_acquire, no_barrier };

// The last block sums what all have written.
template <LastBlock kBug>
void last_block(Arguments a) {
  uint32_t* last = static_cast<uint32_t*>(simt::shared_array(0, 4, 4));
  const int i = threadIdx.x;
  if (i == 32) a.out[1 + blockIdx.x] = a.in[blockIdx.x];  // [last_block]
  if (kBug != LastBlock::no_barrier) __syncthreads();
  if (i == 0) {
    if (kBug != LastBlock::no_release) __threadfence();
    const bool counted = kBug != LastBlock::no_counter;
    const unsigned ticket = counted ? atomicAdd(a.counter, 1u) : gridDim.x - 1;
    *last = ticket == gridDim.x - 1;
    if (kBug != LastBlock::no_acquire) __threadfence();
  }
  __syncthreads();
  if (!*last || i > 0) return;
  float sum = 0;
  for (unsigned j = 0; j < gridDim.x; ++j) sum += a.out[1 + j];  // [last_block]
  a.out[0] = sum;
}
// ---- mbarrier and bulk copies -------------------------------------------------------------------

enum class Bulk {
  right,
  few_bytes,
  odd_bytes,
  many_bytes,
  no_wait,
  no_init_barrier,
  no_arrival,
  two_arrivals,
  not_empty,
  never_waited,
};

// Thread 0 brings two tiles of 128 bytes, one after the other, to the same place.
template <Bulk kBug>
void bulk(Arguments a) {
  const uint32_t tile = shared_bytes(0, 128), full = shared_bytes(1, 16), empty = full + 8;
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 63);
  }
  if (kBug != Bulk::no_init_barrier) __syncthreads();
  uint32_t expected = 128;
  if (kBug == Bulk::few_bytes) expected = 64;
  if (kBug == Bulk::odd_bytes) expected = 96;
  if (kBug == Bulk::many_bytes) expected = 144;
  for (uint32_t round = 0; round < 2; ++round) {
    if (i == 0) {
      if (round == 1 && kBug == Bulk::not_empty) ptx::mbarrier_wait(full, 0);
      const bool waits = kBug != Bulk::not_empty && kBug != Bulk::two_arrivals;
      if (round == 1 && waits) ptx::mbarrier_wait(empty, 0);  // [bulk_no_arrival]
      ptx::mbarrier_arrive_expect(full, expected);            // [bulk_two_arrivals]
      for (uint32_t half = 0; half < 2; ++half) {
        const float* from = a.in + round * 32 + half * 16;
        ptx::copy_bulk(tile + half * 64, from, 64, full);  // [bulk_never_waited]
      }
      if (kBug == Bulk::never_waited) return;
      continue;
    }
    if (kBug == Bulk::never_waited) return;
    if (kBug != Bulk::no_wait) {
      ptx::mbarrier_wait(full, round);  // [bulk_odd_bytes] [bulk_many_bytes] [bulk_no_init_barrier]
    }
    const uint32_t at = tile + i % 32 * 4;
    const float x = ptx::load_shared_float(at);  // [bulk_few_bytes] [bulk_no_wait] [bulk_not_empty]
    if (i < 32) a.out[round * 32 + i] = x;
    if (kBug != Bulk::no_arrival || i != 5) ptx::mbarrier_arrive(empty);
  }
}

// ---- wgmma --------------------------------------------------------------------------------------

enum class Wgmma { right, no_fence, overwritten, too_few_groups };

template <Wgmma kBug>
void wgmma(Arguments a) {
  const uint32_t tile = shared_bytes(0, 64 * 128);
  const int i = threadIdx.x;
  auto fill = [&](float x) {
    for (int j = i; j < 64 * 32; j += 64) ptx::store_shared(tile + j * 4, x);
  };
  fill(0);
  ptx::fence_async();
  __syncthreads();
  const uint32_t queries[4] = {};
  float sums[32] = {};
  if (kBug != Wgmma::no_fence) ptx::wgmma_fence();
  ptx::wgmma<ptx::Fp16, false>(sums, queries, ptx::swizzled(tile), true);  // [wgmma_no_fence]
  ptx::wgmma_commit();
  if (kBug != Wgmma::overwritten) ptx::wgmma_wait<kBug == Wgmma::too_few_groups ? 1 : 0>();
  const float sum = sums[0];
  __syncthreads();
  fill(1);
  __syncthreads();
  ptx::wgmma_wait<0>();  // [wgmma_overwritten] [wgmma_too_few_groups]
  a.out[i] = sum;
}

// ---- By name ------------------------------------------------------------------------------------

using Kernel = void (*)(Arguments);
struct Planted {
  const char* name;
  Kernel right, wrong;
  unsigned blocks = 1, shared_bytes = 2048;
};

#define PLANTED(name) {#name, name<false>, name<true>}
#define LAST_BLOCK(bug) {"last_block_" #bug, last_block<LastBlock::right>, last_block<LastBlock::bug>, 4}
#define BULK(bug) {"bulk_" #bug, bulk<Bulk::right>, bulk<Bulk::bug>}
#define WGMMA(bug) {"wgmma_" #bug, wgmma<Wgmma::right>, wgmma<Wgmma::bug>, 1, 8192}

const Planted kPlanted[] = {
    PLANTED(global_read),
    PLANTED(global_write),
    PLANTED(wild_read),
    PLANTED(shared_write),
    {"too_much_shared", too_much_shared<false>, too_much_shared<true>, 1, 512},
    PLANTED(misaligned_read),
    PLANTED(misaligned_write),
    PLANTED(misaligned_ldmatrix),
    PLANTED(write_read),
    PLANTED(read_write),
    PLANTED(all_read_one_writes),
    PLANTED(write_write),
    PLANTED(lanes_of_a_warp),
    PLANTED(half_a_warp),
    PLANTED(uninitialised),
    PLANTED(atomic_and_plain),
    PLANTED(divergent_barrier),
    PLANTED(divergent_shuffle),
    PLANTED(shuffle_from_outside),
    PLANTED(not_in_own_mask),
    PLANTED(exit_before_ldmatrix),
    PLANTED(exit_before_barrier),
    PLANTED(named_barrier),
    PLANTED(arrive_is_no_wait),
    PLANTED(copy_not_waited),
    PLANTED(copy_too_few_groups),
    PLANTED(copy_of_others),
    PLANTED(copy_never_waited),
    {"two_blocks_write", two_blocks_write<false>, two_blocks_write<true>, 2},
    LAST_BLOCK(no_counter),
    LAST_BLOCK(no_release),
    LAST_BLOCK(no_acquire),
    LAST_BLOCK(no_barrier),
    BULK(few_bytes),
    BULK(odd_bytes),
    BULK(many_bytes),
    BULK(no_wait),
    BULK(no_init_barrier),
    BULK(no_arrival),
    BULK(two_arrivals),
    BULK(not_empty),
    BULK(never_waited),
    WGMMA(no_fence),
    WGMMA(overwritten),
    WGMMA(too_few_groups),
};

}  // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const Planted& planted : kPlanted) names.push_back(planted.name);
  return names;
}

void run_planted(const std::string& name, bool bug, Arguments arguments) {
  for (const Planted& planted : kPlanted) {
    if (planted.name != name) continue;
    simt::launch(bug ? planted.wrong : planted.right, dim3{planted.blocks}, dim3{64},
                 planted.shared_bytes, arguments);
  }
}
