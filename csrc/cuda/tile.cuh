// Tiles of 16-bit elements in shared memory, and how warps read and fill them.
//
// A row is a whole number of 128-byte lines, or half of one. Its 16-byte chunk c is kept at c ^
// (line % 8), so that the eight rows of an ldmatrix, and the chunks that a quarter of a warp
// copies, are in different banks.
#pragma once

#include "ptx.cuh"

namespace t2i {

constexpr int kWarp = 32;

template <int kDim>
struct Tile {
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kChunks = kDim / 8;

  T2I_DEVICE static int swizzle(int row) { return kRowBytes < 128 ? row >> 1 & 3 : row & 7; }
  T2I_DEVICE static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }

  // ``address`` is in a row below n, a power of 2; the result is i rows further, a multiple of n.
  T2I_DEVICE static uint32_t rows_on(uint32_t address, int i) {
    return (address ^ (swizzle(i) << 4)) + i * kRowBytes;
  }

  // Where a lane's row of a 16×16 block at (row, 0) is, as ldmatrix wants it for a matrix whose
  // rows are rows of the block (an A operand), or columns (a B operand; transposed: keys are rows).
  T2I_DEVICE static uint32_t a_offset(int row, int lane = threadIdx.x % kWarp) {
    return offset(row + (lane & 15), lane >> 4);
  }
  T2I_DEVICE static uint32_t b_offset(int row, int lane = threadIdx.x % kWarp) {
    return offset(row + (lane & 7) + ((lane >> 4) << 3), lane >> 3 & 1);
  }

  // ``address`` is in the first 16 columns of its row, the result in the i-th 16.
  T2I_DEVICE static uint32_t columns(uint32_t address, int i) {
    return (address ^ ((i & 3) << 5)) + (i >> 2) * 128;
  }
};

// Starts copying rows first, first + 1, … of a [length, size] matrix to the tile at ``to``, kThreads at
// work. Those from ``length`` on are zeros. ``stride``: bytes from row to row.
//
// Where to copy is computed anew each time: between copies it would hold registers.
template <int kDim, int kThreads, int kRows>
T2I_DEVICE void load_tile(uint32_t to, const void* rows, int stride, int first, int length, int size) {
  using Layout = Tile<kDim>;
  constexpr int kRowsAtOnce = kThreads / Layout::kChunks;
  static_assert(kRowsAtOnce % 8 == 0, "a thread's chunk would not be the same in all its rows");
  const uint32_t thread = ptx::opaque(threadIdx.x % kThreads);
  const int row = int(thread / Layout::kChunks), chunk = int(thread % Layout::kChunks);
  const char* from = static_cast<const char*>(rows) + int64_t(first + row) * stride + chunk * 16;
  const int left = length - first - row;
  to += Layout::offset(row, chunk);
  T2I_UNROLL for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const bool inside = chunk * 8 < size && i * kRowsAtOnce < left;
    ptx::copy_async_16(to + i * kRowsAtOnce * Layout::kRowBytes,
                       from + int64_t(i * kRowsAtOnce) * stride, inside);
  }
}

// Writes x, a warp's rows of a [length, size] matrix as mma leaves them, by way of the tile at
// ``through``, so that 16 bytes are written at a time. ``stride``: bytes from row to row.
template <class Element, int kDim, int kBlocks>
T2I_DEVICE void write_rows(const float (&x)[kBlocks][kDim / 8][4], uint32_t through, void* to,
                           int64_t stride, int length, int size) {
  using Layout = Tile<kDim>;
  const int lane = threadIdx.x % kWarp;
  T2I_UNROLL for (int r = 0; r < 2 * kBlocks; ++r) {
    const int row = r / 2 * 16 + r % 2 * 8 + lane / 4;
    T2I_UNROLL for (int n = 0; n < kDim / 8; ++n) {
      const float* two = &x[r / 2][n][r % 2 * 2];
      ptx::store_shared(through + Layout::offset(row, n) + lane % 4 * 4,
                        ptx::pack<Element>(two[0], two[1]));
    }
  }
  __syncwarp();
  T2I_UNROLL for (int i = 0; i < 16 * kBlocks * Layout::kChunks / kWarp; ++i) {
    const int piece = i * kWarp + lane;
    const int row = piece / Layout::kChunks, chunk = piece % Layout::kChunks;
    if (row >= length || chunk * 8 >= size) continue;
    ptx::store_global_16(static_cast<char*>(to) + row * stride + chunk * 16,
                         ptx::load_shared_16(through + Layout::offset(row, chunk)));
  }
}

}  // namespace t2i
