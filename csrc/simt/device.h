// What CUDA C++ has and C++ lacks: built-in variables, barriers, shuffles, votes, atomics.
#pragma once

#include <algorithm>

#include "simt.h"

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};

#define threadIdx (simt::here.thread->index)
#define blockIdx (simt::here.block)
#define blockDim (simt::here.block_dim)
#define gridDim (simt::here.grid_dim)

// Inlined, so that the line is the caller's.
#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt {

// One value from every lane, one back to each: ``combine`` sees them all.
template <class T>
struct Exchange {
  T in;
  int lane;
  T out;
};

enum class Shuffle { index, exclusive_or, up, down };

template <Shuffle kMode, class T>
SIMT_UNCHECKED T shuffle(const char* name, Site site, uint32_t mask, T value, int lane) {
  Exchange<T> mine{value, lane, value};
  collective(site, name, mask, &mine, [](void* const(&operands)[32], uint32_t lanes) {
    for (int l = 0; l < 32; ++l) {
      if (!(lanes >> l & 1)) continue;
      auto* to = static_cast<Exchange<T>*>(operands[l]);
      int from = to->lane & 31;
      if (kMode == Shuffle::exclusive_or) from = l ^ to->lane;
      if (kMode == Shuffle::up) from = l - to->lane;
      if (kMode == Shuffle::down) from = l + to->lane;
      if (from < 0 || from > 31) from = l;
      if (!(lanes >> from & 1)) fail("lane %d reads lane %d, which is not among %08x", l, from, lanes);
      to->out = static_cast<Exchange<T>*>(operands[from])->in;
    }
  });
  return mine.out;
}

template <class T, class Combine>
SIMT_UNCHECKED T reduce(const char* name, Site site, uint32_t mask, T value, Combine) {
  Exchange<T> mine{value, 0, value};
  collective(site, name, mask, &mine, [](void* const(&operands)[32], uint32_t lanes) {
    bool first = true;
    T result{};
    for (int l = 0; l < 32; ++l) {
      if (!(lanes >> l & 1)) continue;
      const T in = static_cast<Exchange<T>*>(operands[l])->in;
      result = first ? in : Combine()(result, in);
      first = false;
    }
    for (int l = 0; l < 32; ++l) {
      if (lanes >> l & 1) static_cast<Exchange<T>*>(operands[l])->out = result;
    }
  });
  return mine.out;
}


template <class T, class Change>
SIMT_UNCHECKED __attribute__((noinline)) T atomic(T* pointer, Change change) {
  access(pointer, sizeof(T), Access::atomic, __builtin_return_address(0));
  const T old = *pointer;
  *pointer = change(old);
  return old;
}

}  // namespace simt

SIMT_UNCHECKED inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::barrier(site);
}
SIMT_UNCHECKED inline void __syncwarp(uint32_t mask = 0xffffffffu,
                                      simt::Site site = simt::Site::current()) {
  simt::collective(site, "__syncwarp", mask, nullptr, [](void* const(&)[32], uint32_t) {});
}

template <class T>
SIMT_UNCHECKED T __shfl_sync(uint32_t mask, T value, int lane,
                             simt::Site site = simt::Site::current()) {
  return simt::shuffle<simt::Shuffle::index>("__shfl_sync", site, mask, value, lane);
}
template <class T>
SIMT_UNCHECKED T __shfl_xor_sync(uint32_t mask, T value, int bits,
                                 simt::Site site = simt::Site::current()) {
  return simt::shuffle<simt::Shuffle::exclusive_or>("__shfl_xor_sync", site, mask, value, bits);
}
template <class T>
SIMT_UNCHECKED T __shfl_up_sync(uint32_t mask, T value, int lanes,
                                simt::Site site = simt::Site::current()) {
  return simt::shuffle<simt::Shuffle::up>("__shfl_up_sync", site, mask, value, lanes);
}
template <class T>
SIMT_UNCHECKED T __shfl_down_sync(uint32_t mask, T value, int lanes,
                                  simt::Site site = simt::Site::current()) {
  return simt::shuffle<simt::Shuffle::down>("__shfl_down_sync", site, mask, value, lanes);
}

SIMT_UNCHECKED inline uint32_t __ballot_sync(uint32_t mask, bool predicate,
                                             simt::Site site = simt::Site::current()) {
  const uint32_t bit = predicate ? 1u << simt::here.thread->lane : 0;
  return simt::reduce("__ballot_sync", site, mask, bit, [](uint32_t a, uint32_t b) { return a | b; });
}
SIMT_UNCHECKED inline bool __any_sync(uint32_t mask, bool predicate,
                                      simt::Site site = simt::Site::current()) {
  return simt::reduce("__any_sync", site, mask, predicate, [](bool a, bool b) { return a || b; });
}
SIMT_UNCHECKED inline bool __all_sync(uint32_t mask, bool predicate,
                                      simt::Site site = simt::Site::current()) {
  return simt::reduce("__all_sync", site, mask, predicate, [](bool a, bool b) { return a && b; });
}
template <class T>
SIMT_UNCHECKED T __reduce_add_sync(uint32_t mask, T value, simt::Site site = simt::Site::current()) {
  return simt::reduce("__reduce_add_sync", site, mask, value, [](T a, T b) { return T(a + b); });
}
template <class T>
SIMT_UNCHECKED T __reduce_min_sync(uint32_t mask, T value, simt::Site site = simt::Site::current()) {
  return simt::reduce("__reduce_min_sync", site, mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
SIMT_UNCHECKED T __reduce_max_sync(uint32_t mask, T value, simt::Site site = simt::Site::current()) {
  return simt::reduce("__reduce_max_sync", site, mask, value, [](T a, T b) { return a < b ? b : a; });
}

template <class T>
SIMT_INLINE T atomicAdd(T* pointer, T value) {
  return simt::atomic(pointer, [=](T old) { return T(old + value); });
}
template <class T>
SIMT_INLINE T atomicMin(T* pointer, T value) {
  return simt::atomic(pointer, [=](T old) { return value < old ? value : old; });
}
template <class T>
SIMT_INLINE T atomicMax(T* pointer, T value) {
  return simt::atomic(pointer, [=](T old) { return old < value ? value : old; });
}
template <class T>
SIMT_INLINE T atomicExch(T* pointer, T value) {
  return simt::atomic(pointer, [=](T) { return value; });
}
template <class T>
SIMT_INLINE T atomicCAS(T* pointer, T expected, T value) {
  return simt::atomic(pointer, [=](T old) { return old == expected ? value : old; });
}
SIMT_UNCHECKED inline void __threadfence() { simt::fence(); }

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
// Rounded each, and never made one fused multiply-add.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __clz(uint32_t bits) { return std::countl_zero(bits); }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
using std::max;
using std::min;
