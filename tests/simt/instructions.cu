// One instruction a kernel.
#include "cuda/ptx.cuh"
#include "planted.h"

namespace {

using namespace t2i;

template <bool kTransposed>
void ldmatrix(const uint16_t* rows, uint32_t* to) {
  ptx::SharedArrays shared;
  const uint32_t tile = shared.take(512);
  const int lane = threadIdx.x;
  ptx::store_shared_16(tile + lane * 16, ptx::load_global_16(rows + lane * 8));
  __syncwarp();
  uint32_t x[4];
  ptx::ldmatrix<kTransposed>(x, tile + lane * 16);
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = x[i];
}

template <class Element>
void mma(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t a_lane[4];
  float c_lane[4], d_lane[4];
  for (int i = 0; i < 4; ++i) a_lane[i] = a[lane * 4 + i];
  for (int i = 0; i < 4; ++i) c_lane[i] = c[lane * 4 + i];
  ptx::mma<Element>(d_lane, a_lane, b[lane * 2], b[lane * 2 + 1], c_lane);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = d_lane[i];
}

// Rows of 64 to shared memory, as wgmma wants them.
void fill_swizzled(uint32_t to, const uint16_t* from, int rows, int stride) {
  for (int i = threadIdx.x; i < rows * 8; i += blockDim.x) {
    const int row = i / 8, chunk = i % 8;
    ptx::store_shared_16(to + row * 128 + (chunk ^ row % 8) * 16,
                         ptx::load_global_16(from + row * stride + chunk * 8));
  }
}

template <class Element, bool kTransposed, int kRegisters>
void wgmma(const uint16_t* a, const uint16_t* b, float* d, bool a_in_registers) {
  constexpr int kColumns = 2 * kRegisters;
  ptx::SharedArrays shared;
  const uint32_t a_tile = shared.take(64 * 128), b_tile = shared.take(kColumns * 128);
  fill_swizzled(a_tile, a, 64, 64);
  if constexpr (kTransposed) {
    for (int n = 0; n < kColumns; n += 64) fill_swizzled(b_tile + n * 128, b + n, 64, kColumns);
  } else {
    fill_swizzled(b_tile, b, kColumns, 64);
  }
  ptx::fence_async();
  __syncthreads();
  const int thread = threadIdx.x, lane = thread % 32;
  float sums[kRegisters];
  ptx::wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const uint64_t b_step = kTransposed ? ptx::swizzled(b_tile + step * 2048, 1024, 64 * 128)
                                        : ptx::swizzled(b_tile + step * 32);
    if (a_in_registers) {
      uint32_t x[4];
      for (int r = 0; r < 4; ++r) {
        const int row = thread / 32 * 16 + lane / 4 + r % 2 * 8;
        std::memcpy(&x[r], a + row * 64 + step * 16 + lane % 4 * 2 + r / 2 * 8, 4);
      }
      ptx::wgmma<Element, kTransposed>(sums, x, b_step, step > 0);
    } else {
      ptx::wgmma<Element, kTransposed>(sums, ptx::swizzled(a_tile + step * 32), b_step, step > 0);
    }
    if (step == 1) ptx::wgmma_commit();
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kRegisters; ++i) d[thread * kRegisters + i] = sums[i];
}

template <class Change>
void numbers(const uint32_t* in, uint32_t* out, int count, Change change) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = change(in[i]);
}

template <class Change>
void each(const uint32_t* in, uint32_t* out, int count, Change change) {
  const dim3 grid{unsigned(count + 255) / 256};
  simt::launch(numbers<Change>, grid, dim3{256}, 0, in, out, count, change);
}

}  // namespace

void run_ldmatrix(bool transposed, const uint16_t* rows, uint32_t* to) {
  simt::launch(transposed ? ldmatrix<true> : ldmatrix<false>, dim3{}, dim3{32}, 512, rows, to);
}

void run_mma(bool bf16, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  simt::launch(bf16 ? mma<ptx::Bf16> : mma<ptx::Fp16>, dim3{}, dim3{32}, 0, a, b, c, d);
}

void run_wgmma(bool bf16, bool transposed, bool a_in_registers, const uint16_t* a,
               const uint16_t* b, float* d) {
  auto kernel = transposed ? wgmma<ptx::Fp16, true, 32> : wgmma<ptx::Fp16, false, 32>;
  if (bf16) kernel = transposed ? wgmma<ptx::Bf16, true, 64> : wgmma<ptx::Bf16, false, 64>;
  simt::launch(kernel, dim3{}, dim3{128}, 3 * 64 * 128, a, b, d, a_in_registers);
}

void run_numbers(const std::string& name, const uint32_t* in, uint32_t* out, int count) {
  auto run = [&](const char* its, auto change) {
    if (name == its) each(in, out, count, change);
  };
  auto number = [](uint32_t x) { return __uint_as_float(x); };
  auto bits = [](float x) { return __float_as_uint(x); };
  run("ex2", [=](uint32_t x) { return bits(ptx::ex2(number(x))); });
  run("reciprocal", [=](uint32_t x) { return bits(ptx::reciprocal(number(x))); });
  run("pack_fp16", [=](uint32_t x) { return ptx::pack<ptx::Fp16>(number(x), -number(x)); });
  run("pack_bf16", [=](uint32_t x) { return ptx::pack<ptx::Bf16>(number(x), -number(x)); });
  run("low_fp16", [=](uint32_t x) { return bits(ptx::low<ptx::Fp16>(x)); });
  run("low_bf16", [=](uint32_t x) { return bits(ptx::low<ptx::Bf16>(x)); });
  run("high_fp16", [=](uint32_t x) { return bits(ptx::high<ptx::Fp16>(x)); });
  run("high_bf16", [=](uint32_t x) { return bits(ptx::high<ptx::Bf16>(x)); });
}
