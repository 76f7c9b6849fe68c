// The instructions that CUDA C++ has no word for: the only file with inline PTX. A host compiler gets
// the same functions from csrc/simt, so everything else is plain C++ that runs on both.
//
// Addresses in shared memory are 32 bits wide, as in PTX: half the registers of a pointer.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define T2I_DEVICE __device__ __forceinline__
#define T2I_SITE
#define T2I_ONLY_SITE
#define T2I_UNROLL _Pragma("unroll")
#define T2I_ROLLED _Pragma("unroll 1")
#else
#include "simt/device.h"
#include "simt/hopper.h"
#include "simt/matrix.h"
#define T2I_DEVICE inline __attribute__((always_inline))
#define T2I_ONLY_SITE simt::Site site = simt::Site::current()  // the source line, for messages
#define T2I_SITE , T2I_ONLY_SITE
#define T2I_UNROLL
#define T2I_ROLLED
#endif

namespace t2i::ptx {

#if defined(__CUDACC__)
struct Fp16 {};
struct Bf16 {};
extern __shared__ __align__(1024) unsigned char shared_memory[];
#else
using simt::Bf16;
using simt::Fp16;
#endif

// x, but the compiler does not know that: what follows from it is computed where it is used, and not
// before a loop, where it would hold registers.
T2I_DEVICE uint32_t opaque(uint32_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// x, the same in all lanes. It tells the compiler so, which may keep it in a uniform register.
T2I_DEVICE uint32_t uniform(uint32_t x) { return __reduce_min_sync(0xffffffffu, x); }

// ---- Shared memory ------------------------------------------------------------------------------

// Hands out dynamic shared memory. All threads take the same arrays in the same order.
class SharedArrays {
 public:
  static constexpr uint32_t kAlignment = 1024;

  // The address of an array.
  T2I_DEVICE uint32_t take(uint32_t bytes) {
#if defined(__CUDACC__)
    const uint32_t address =
        static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + taken_;
#else
    const uint32_t address = simt::shared_address(simt::shared_array(index_, bytes, kAlignment));
#endif
    taken_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    ++index_;
    return address;
  }

 private:
  uint32_t taken_ = 0;
  [[maybe_unused]] unsigned index_ = 0;
};

T2I_DEVICE uint32_t load_shared(uint32_t address) {
#if defined(__CUDACC__)
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
#else
  return simt::load<uint32_t>(simt::shared_pointer(address, 4));
#endif
}

T2I_DEVICE float load_shared_float(uint32_t address) { return __uint_as_float(load_shared(address)); }

T2I_DEVICE uint64_t load_shared_8(uint32_t address) {
#if defined(__CUDACC__)
  uint64_t x;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
  return x;
#else
  return simt::load<uint64_t>(simt::shared_pointer(address, 8));
#endif
}

T2I_DEVICE float2 load_shared_floats(uint32_t address) {
#if defined(__CUDACC__)
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
#else
  return simt::load<float2>(simt::shared_pointer(address, 8));
#endif
}

T2I_DEVICE uint4 load_shared_16(uint32_t address) {
#if defined(__CUDACC__)
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
#else
  return simt::load<uint4>(simt::shared_pointer(address, 16));
#endif
}

T2I_DEVICE void store_shared(uint32_t address, uint32_t x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
#else
  simt::store(simt::shared_pointer(address, 4), x);
#endif
}

T2I_DEVICE void store_shared(uint32_t address, float x) { store_shared(address, __float_as_uint(x)); }

T2I_DEVICE void store_shared_8(uint32_t address, uint64_t x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
#else
  simt::store(simt::shared_pointer(address, 8), x);
#endif
}

T2I_DEVICE void store_shared_1(uint32_t address, uint8_t x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.b8 [%0], %1;" ::"r"(address), "r"(uint32_t(x)) : "memory");
#else
  simt::store(simt::shared_pointer(address, 1), x);
#endif
}

T2I_DEVICE void store_shared_2(uint32_t address, uint16_t x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
#else
  simt::store(simt::shared_pointer(address, 2), x);
#endif
}

T2I_DEVICE void store_shared_16(uint32_t address, uint4 x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#else
  simt::store(simt::shared_pointer(address, 16), x);
#endif
}

// Four numbers in 16 bytes.
T2I_DEVICE void store_shared_floats(uint32_t address, const float (&x)[4]) {
  store_shared_16(address, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                            __float_as_uint(x[3])});
}

T2I_DEVICE void load_shared_floats(float (&to)[4], uint32_t address) {
  const uint4 x = load_shared_16(address);
  to[0] = __uint_as_float(x.x), to[1] = __uint_as_float(x.y);
  to[2] = __uint_as_float(x.z), to[3] = __uint_as_float(x.w);
}

// ---- Global memory ------------------------------------------------------------------------------

T2I_DEVICE uint4 load_global_16(const void* pointer) {
#if defined(__CUDACC__)
  return *static_cast<const uint4*>(pointer);
#else
  return simt::load<uint4>(pointer);
#endif
}

T2I_DEVICE void store_global_16(void* pointer, uint4 x) {
#if defined(__CUDACC__)
  *static_cast<uint4*>(pointer) = x;
#else
  simt::store(pointer, x);
#endif
}

// 16 bytes to shared memory, past the first-level cache; zeros, and nothing is read, if not inside.
T2I_DEVICE void copy_async_16(uint32_t to, const void* from, bool inside = true) {
#if defined(__CUDACC__)
  asm volatile(
      "{.reg .pred outside; setp.eq.u32 outside, %2, 0; "
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, outside;}"
      ::"r"(to), "l"(from), "r"(unsigned(inside)) : "memory");
#else
  simt::copy_async(to, from, 16, inside ? 16 : 0);
#endif
}

// 4 bytes, likewise but through the first-level cache.
T2I_DEVICE void copy_async_4(uint32_t to, const void* from, bool inside = true) {
#if defined(__CUDACC__)
  asm volatile(
      "{.reg .pred outside; setp.eq.u32 outside, %2, 0; "
      "cp.async.ca.shared.global [%0], [%1], 4, outside;}"
      ::"r"(to), "l"(from), "r"(unsigned(inside)) : "memory");
#else
  simt::copy_async(to, from, 4, inside ? 4 : 0);
#endif
}

T2I_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::copy_async_commit();
#endif
}

// Until at most so many of this thread's last groups are on their way. Other threads see the data
// after a barrier.
template <int kPending>
T2I_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::copy_async_wait(kPending);
#endif
}

// ---- Barriers -----------------------------------------------------------------------------------

// Of part of a block: until ``threads`` threads have come to one of these, and for those that only say
// that they were there.
T2I_DEVICE void barrier_sync(int id, int threads T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::barrier(site, id, threads);
#endif
}

T2I_DEVICE void barrier_arrive(int id, int threads T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::barrier_arrive(site, id, threads);
#endif
}

// The rest is for sm_90 and later.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// 8 bytes of shared memory. A phase ends when ``count`` threads have arrived, and as many bytes as
// they expect. Threads and copies may use it after a barrier of the block.
T2I_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t count T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.proxy.async.shared::cta;"
               ::"r"(mbarrier), "r"(count) : "memory");
#else
  simt::mbarrier_init(site, mbarrier, count);
#endif
}

T2I_DEVICE void mbarrier_arrive(uint32_t mbarrier T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  simt::mbarrier_arrive(site, mbarrier);
#endif
}

T2I_DEVICE void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(mbarrier), "r"(bytes) : "memory");
#else
  simt::mbarrier_arrive(site, mbarrier, bytes);
#endif
}

// Until the phase of this parity, the first's is 0, has ended.
T2I_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity T2I_SITE) {
#if defined(__CUDACC__)
  uint32_t ended;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                 "selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended) : "r"(mbarrier), "r"(parity) : "memory");
  } while (!ended);
#else
  simt::mbarrier_wait(site, mbarrier, parity);
#endif
}

// A multiple of 16 bytes to shared memory, of which the mbarrier is told. One thread does it.
T2I_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                          uint32_t mbarrier T2I_SITE) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(mbarrier) : "memory");
#else
  simt::copy_bulk(site, to, from, bytes, mbarrier);
#endif
}

#endif

// ---- Matrices -----------------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements; lane 8 m + i gives the address of row i of matrix m.
template <bool kTransposed>
T2I_DEVICE void ldmatrix(uint32_t (&to)[4], uint32_t row T2I_SITE) {
#if defined(__CUDACC__)
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
  }
#else
  simt::ldmatrix<4, kTransposed>(to, row, site);
#endif
}

// The transpose of an 8×8 matrix of 16-bit elements, of which lane l has 2 (l % 4) and the next of
// row l / 4, before and after.
T2I_DEVICE uint32_t transpose(uint32_t x T2I_SITE) {
#if defined(__CUDACC__)
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#else
  return simt::movmatrix(x, site);
#endif
}

// d = a b + c, 16×8 = 16×16 · 16×8 + 16×8, in fp32.
template <class Element>
T2I_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const float (&c)[4] T2I_SITE) {
#if defined(__CUDACC__)
  if constexpr (__is_same(Element, Fp16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#else
  const uint32_t b[2] = {b0, b1};
  simt::mma_16816<Element>(d, a, b, c, site);
#endif
}

// ---- Products of a warpgroup --------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of what threads have written to shared memory, for bulk copies and wgmma.
T2I_DEVICE void fence_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Of registers, before the first wgmma that uses them.
T2I_DEVICE void wgmma_fence(T2I_ONLY_SITE) {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence(site);
#endif
}

T2I_DEVICE void wgmma_commit(T2I_ONLY_SITE) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit(site);
#endif
}

// Until at most so many of the last groups are being worked on.
template <int kPending>
T2I_DEVICE void wgmma_wait(T2I_ONLY_SITE) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  simt::wgmma_wait(kPending, site);
#endif
}

// The same, and the compiler reads d, a result, no earlier.
template <int kPending, int kRegisters>
T2I_DEVICE void wgmma_wait(float (&d)[kRegisters] T2I_SITE) {
#if defined(__CUDACC__)
  wgmma_wait<kPending>();
  T2I_UNROLL for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
  simt::wgmma_wait(kPending, site);
#endif
}

// Registers for each thread of this warpgroup from now on, a multiple of 8. The sum over all
// warpgroups must not exceed what the block was launched with; who takes waits until others gave.
template <int kRegisters>
T2I_DEVICE void give_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
T2I_DEVICE void take_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// An operand in rows of 128 bytes, whose 16-byte chunk c is at c ^ (row % 8); eight rows are aligned
// to their 1024 bytes. ``stride``: bytes from eight rows to the next; ``leading``: from 64 columns to
// the next.
T2I_DEVICE uint64_t swizzled(uint32_t address, uint32_t stride = 1024, uint32_t leading = 16) {
  return uint64_t(1) << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// The operand ``bytes`` further on, a multiple of 16. Its upper half stays a constant.
T2I_DEVICE uint64_t advanced(uint64_t operand, uint32_t bytes) {
  return operand >> 32 << 32 | uint32_t(uint32_t(operand) + (bytes >> 4));
}

#if defined(__CUDACC__)
#define T2I_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
                  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define T2I_D32(i) T2I_D8(i), T2I_D8(i + 8), T2I_D8(i + 16), T2I_D8(i + 24)
#define T2I_0_31                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define T2I_32_63                                                                    \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define T2I_WGMMA_REGISTERS(type)                                                            \
  if constexpr (kRegisters == 32) {                                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; "                                    \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                 \
                 " {" T2I_0_31 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"                \
                 : T2I_D32(0)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                   "r"(int(accumulate)), "n"(int(kTransposed)));                             \
  } else {                                                                                   \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; "                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                \
                 " {" T2I_0_31 ", " T2I_32_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;}" \
                 : T2I_D32(0), T2I_D32(32)                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                   "r"(int(accumulate)), "n"(int(kTransposed)));                             \
  }
#define T2I_WGMMA_SHARED(type)                                                 \
  if constexpr (kRegisters == 32) {                                            \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; "                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type   \
                 " {" T2I_0_31 "}, %32, %33, p, 1, 1, 0, %35;}"                \
                 : T2I_D32(0)                                                  \
                 : "l"(a), "l"(b),                                             \
                   "r"(int(accumulate)), "n"(int(kTransposed)));               \
  } else {                                                                     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; "                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type  \
                 " {" T2I_0_31 ", " T2I_32_63 "}, %64, %65, p, 1, 1, 0, %67;}" \
                 : T2I_D32(0), T2I_D32(32)                                     \
                 : "l"(a), "l"(b),                                             \
                   "r"(int(accumulate)), "n"(int(kTransposed)));               \
  }
#endif

// d = a b, or added to it, 64×n = 64×16 · 16×n in fp32; n is twice the registers of d. ``a`` is as in
// mma, of 16 rows a warp. Rows of b in memory are columns of the product, or, kTransposed, columns of a.
template <class Element, bool kTransposed, int kRegisters>
T2I_DEVICE void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b,
                      bool accumulate T2I_SITE) {
  static_assert(kRegisters == 32 || kRegisters == 64, "not implemented");
#if defined(__CUDACC__)
  if constexpr (__is_same(Element, Fp16)) {
    T2I_WGMMA_REGISTERS("f16")
  } else {
    T2I_WGMMA_REGISTERS("bf16")
  }
#else
  simt::wgmma<Element, 2 * kRegisters, kTransposed>(d, a, 0, b, accumulate, site);
#endif
}

// With a in shared memory: 64 rows.
template <class Element, bool kTransposed, int kRegisters>
T2I_DEVICE void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate T2I_SITE) {
  static_assert(kRegisters == 32 || kRegisters == 64, "not implemented");
#if defined(__CUDACC__)
  if constexpr (__is_same(Element, Fp16)) {
    T2I_WGMMA_SHARED("f16")
  } else {
    T2I_WGMMA_SHARED("bf16")
  }
#else
  simt::wgmma<Element, 2 * kRegisters, kTransposed>(d, nullptr, a, b, accumulate, site);
#endif
}

#undef T2I_WGMMA_SHARED
#undef T2I_WGMMA_REGISTERS
#undef T2I_32_63
#undef T2I_0_31
#undef T2I_D32
#undef T2I_D8
#endif

// ---- Numbers ------------------------------------------------------------------------------------

// Two numbers, rounded to nearest even, the first in the lower half.
template <class Element>
T2I_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  uint32_t x;
  if constexpr (__is_same(Element, Fp16)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  }
  return x;
#else
  return Element::round(low) | uint32_t(Element::round(high)) << 16;
#endif
}

// The lower and the upper of two packed numbers.
template <class Element>
T2I_DEVICE float low(uint32_t x) {
#if defined(__CUDACC__)
  if constexpr (__is_same(Element, Bf16)) return __uint_as_float(x << 16);
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
  return y;
#else
  return Element::widen(uint16_t(x));
#endif
}

template <class Element>
T2I_DEVICE float high(uint32_t x) {
#if defined(__CUDACC__)
  if constexpr (__is_same(Element, Bf16)) return __uint_as_float(x & 0xffff0000u);
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
  return y;
#else
  return Element::widen(uint16_t(x >> 16));
#endif
}

// Four signed bytes to fp16: bytes 0 and 2, and bytes 1 and 3.
//
// A byte with its sign flipped, in the mantissa of 1024, is 1024 + 128 + x.
T2I_DEVICE void widen_int8(uint32_t bytes, uint32_t& even, uint32_t& odd) {
#if defined(__CUDACC__)
  asm("{\n.reg .b32 x, a, less;\n"
      "mov.b32 less, 0x64806480;\n"
      "lop3.b32 a, %2, 0x00ff00ff, less, 0x6a;\n"
      "sub.rn.f16x2 %0, a, less;\n"
      "shr.u32 x, %2, 8;\n"
      "lop3.b32 a, x, 0x00ff00ff, less, 0x6a;\n"
      "sub.rn.f16x2 %1, a, less;\n}"
      : "=&r"(even), "=r"(odd) : "r"(bytes));
#else
  auto byte = [=](int i) { return uint32_t(Fp16::round(float(int8_t(bytes >> 8 * i)))); };
  even = byte(0) | byte(2) << 16;
  odd = byte(1) | byte(3) << 16;
#endif
}

// 2^x within 2^-22 of it; results below 2^-126 are 0.
T2I_DEVICE float ex2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ex2(x);
#endif
}

// 1 / x within 2^-23 of it.
T2I_DEVICE float reciprocal(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::reciprocal(x);
#endif
}

}  // namespace t2i::ptx
