// wgmma of sm_90: products of a warpgroup with operands in shared memory, that go on while it does
// other things. Each of its four warps has 16 of the 64 rows and is on its own here.
//
// Results are NaN until they were waited for. Operands in shared memory are read at issue and when they
// are waited for; that they differ is an error.
#pragma once

#include <map>
#include <vector>

#include "matrix.h"

namespace simt {

// Of shared memory with the 128-byte swizzle: 16-byte chunk c of the r-th 128 bytes of 1024 is at c ^ r.
// An operand's rows are those of M or N, with 64 of K in 128 bytes ("K-major"); or those of K, with 64
// of N ("MN-major"), which is what transposes it.
struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start(bits << 4 & 0x3fff0), leading(bits >> 12 & 0x3fff0), stride(bits >> 28 & 0x3fff0) {
    if (bits >> 62 != 1) fail("only the 128-byte swizzle is implemented");
    if (start & 0x380) {
      fail("misaligned: %s is not in the first row of a swizzle pattern", shared_name(start).c_str());
    }
  }
  // Where 8 elements from (row, column) on are; rows are 128 bytes.
  uint32_t chunk(uint32_t row, uint32_t column) const {
    const uint32_t address =
        start + row / 8 * stride + row % 8 * 128 + column / 64 * leading + column % 64 * 2;
    return address ^ (address >> 7 & 7) << 4;
  }
};

struct WarpProduct {
  float* d[32];
  const void* instruction;
  float (*widen)(uint16_t);
  int group, columns;
  bool accumulate;
  std::vector<uint32_t> chunks;   // addresses of what was read
  std::vector<uint16_t> contents, a, b;  // of the chunks; [16][16]; [columns][16]
};

struct WarpProducts {
  uint64_t block = 0;
  std::vector<WarpProduct> pending;
  std::map<float*, std::vector<float>> sums;  // [16][columns], by lane 0's registers
  int group = 0;
  bool fenced = false;
};

inline WarpProducts of_warps[32];

inline WarpProducts& products_of_warp() {
  WarpProducts& products = of_warps[here.thread->warp];
  if (products.block != here.serial) products = {here.serial, {}, {}, 0, false};
  return products;
}

struct IssueWgmma {
  float* d;
  const uint32_t* a;  // or null: in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  const void* instruction;
};

inline void read_chunk(WarpProduct& product, uint32_t address, uint16_t* to, int step) {
  const void* chunk = shared_pointer(address, 16);
  touch(chunk, 16, Access::read, lane_of_warp(0), product.instruction);
  uint16_t elements[8];
  std::memcpy(elements, chunk, 16);
  for (int i = 0; i < 8; ++i) to[i * step] = elements[i];
  product.chunks.push_back(address);
  product.contents.insert(product.contents.end(), elements, elements + 8);
}

inline bool is_pending(const WarpProducts& products, const float* d) {
  for (const WarpProduct& product : products.pending) {
    if (product.d[0] == d) return true;
  }
  return false;
}

// Element (row, column) of the sums is in register i of a lane, as in c of mma.m16n8k16.
template <class Use>
void for_each_sum(int columns, Use use) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      use(lane, i, (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2);
    }
  }
}

template <class Element, int kColumns, bool kTransposed>
void issue_wgmma(void* const (&operands)[32], uint32_t lanes) {
  check_whole_warp(lanes);
  auto of = [&](int lane) { return static_cast<const IssueWgmma*>(operands[lane]); };
  WarpProducts& products = products_of_warp();
  WarpProduct product;
  product.instruction = of(0)->instruction;
  product.widen = Element::widen;
  product.group = products.group;
  product.columns = kColumns;
  product.accumulate = of(0)->accumulate;
  product.a.resize(16 * 16);
  product.b.resize(kColumns * 16);
  for (int lane = 0; lane < 32; ++lane) product.d[lane] = of(lane)->d;
  if (of(0)->a) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4 + r % 2 * 8, column = lane % 4 * 2 + r / 2 * 8 + half;
          product.a[row * 16 + column] = uint16_t(of(lane)->a[r] >> 16 * half);
        }
      }
    }
  } else {
    const Descriptor a(of(0)->a_descriptor);
    const int first = here.thread->warp % 4 * 16;
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; k += 8) {
        read_chunk(product, a.chunk(first + row, k), &product.a[row * 16 + k], 1);
      }
    }
  }
  const Descriptor b(of(0)->b_descriptor);
  if (kTransposed) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < kColumns; n += 8) {
        read_chunk(product, b.chunk(k, n), &product.b[n * 16 + k], 16);
      }
    }
  } else {
    for (int n = 0; n < kColumns; ++n) {
      for (int k = 0; k < 16; k += 8) read_chunk(product, b.chunk(n, k), &product.b[n * 16 + k], 1);
    }
  }
  if (!is_pending(products, product.d[0])) {
    if (!products.fenced) fail("no wgmma.fence since registers were last waited for");
    auto& sums = products.sums[product.d[0]];
    sums.resize(16 * kColumns);
    for_each_sum(kColumns, [&](int lane, int i, int at) { sums[at] = product.d[lane][i]; });
    const float nan = std::bit_cast<float>(0xffffffffu);
    for_each_sum(kColumns, [&](int lane, int i, int) { product.d[lane][i] = nan; });
  }
  products.pending.push_back(std::move(product));
}

inline void finish(WarpProducts& products, const WarpProduct& product) {
  for (size_t i = 0; i < product.chunks.size(); ++i) {
    const void* chunk = shared_pointer(product.chunks[i], 16);
    touch(chunk, 16, Access::read, lane_of_warp(0), product.instruction);
    if (std::memcmp(chunk, &product.contents[i * 8], 16) != 0) {
      fail("not waited for: %s changed while it was read by the wgmma at %s,",
           shared_name(product.chunks[i]).c_str(), line_of(product.instruction).c_str());
    }
  }
  const int columns = product.columns;
  auto& sums = products.sums[product.d[0]];
  if (!product.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < columns; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += product.widen(product.a[row * 16 + k]) * product.widen(product.b[n * 16 + k]);
      }
      sums[row * columns + n] += sum;
    }
  }
}

inline void wait_for_wgmma(void* const (&operands)[32], uint32_t lanes) {
  check_whole_warp(lanes);
  const int pending = *static_cast<const int*>(operands[0]);
  WarpProducts& products = products_of_warp();
  while (!products.pending.empty() && products.pending[0].group < products.group - pending) {
    const WarpProduct product = std::move(products.pending[0]);
    products.pending.erase(products.pending.begin());
    finish(products, product);
    if (is_pending(products, product.d[0])) continue;
    const auto& sums = products.sums[product.d[0]];
    for_each_sum(product.columns, [&](int lane, int i, int at) { product.d[lane][i] = sums[at]; });
    products.sums.erase(product.d[0]);
  }
  products.fenced = false;
}

template <class Element, int kColumns, bool kTransposed>
SIMT_UNCHECKED __attribute__((noinline)) void wgmma(float* d, const uint32_t* a,
                                                    uint64_t a_descriptor, uint64_t b_descriptor,
                                                    bool accumulate, Site site) {
  IssueWgmma mine{d, a, a_descriptor, b_descriptor, accumulate, __builtin_return_address(0)};
  collective(site, "wgmma", 0xffffffffu, &mine, issue_wgmma<Element, kColumns, kTransposed>);
}

SIMT_UNCHECKED inline void wgmma_fence(Site site) {
  collective(site, "wgmma.fence", 0xffffffffu, nullptr, [](void* const(&)[32], uint32_t lanes) {
    check_whole_warp(lanes);
    products_of_warp().fenced = true;
  });
}

SIMT_UNCHECKED inline void wgmma_commit(Site site) {
  collective(site, "wgmma.commit_group", 0xffffffffu, nullptr, [](void* const(&)[32], uint32_t lanes) {
    check_whole_warp(lanes);
    ++products_of_warp().group;
  });
}

SIMT_UNCHECKED inline void wgmma_wait(int pending, Site site) {
  collective(site, "wgmma.wait_group", 0xffffffffu, &pending, wait_for_wgmma);
}

}  // namespace simt
