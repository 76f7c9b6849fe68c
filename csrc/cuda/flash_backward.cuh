// flash_attention, backward, for tensor cores of the sm_80 family (mma.sync, cp.async).
//
// FlashAttention-2 (arXiv 2307.08691, algorithm 2), but as two kernels that have P = exp(S − lse) each,
// so that every sum is one thread's, in one order: no atomics, and the same bits every time. A small
// kernel before them has delta = rowsum(dout · out) − dlse.
//
//   dS = P · (dP − delta), dP = dout vᵀ;  dv = Pᵀ dout, dk = dSᵀ q;  dq = dS k
//
// Products begin at −delta where dP is meant. Scores come out of them transposed in the kernel for
// keys, and as they are in that for queries: always as the next product takes its first operand, so
// that P and dS stay in registers.
#pragma once

#include <cmath>

#include "flash_problem.cuh"

namespace t2i::cuda {

// p = 2^(c x − log2_sum), x a score or, with a softcap, what squash makes of it.
struct Scale {
  float c, cap_in;

  explicit Scale(const FlashAttention& call) {
    const bool capped = call.softcap > 0;
    c = (capped ? call.softcap : call.scale) * float(M_LOG2E);
    cap_in = capped ? 2 * call.scale / call.softcap * float(M_LOG2E) : 0;
  }
};

// Rows of a warp: two blocks of 16, see FlashForwardKernel.
template <class Element_, int kDim_, bool kSoftcap_>
struct FlashBackwardBase {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kBlocks = 2, kRows = 2 * kBlocks, kWarpRows = 16 * kBlocks;
  using Layout = Tile<kDim>;
  using Operand = uint32_t[kBlocks][4];  // 16 columns of a first operand
  using Sums = float[kBlocks][kDim / 8][4];

  // The i-th 16 columns to go by: those whose addresses differ by a constant follow each other.
  T2I_DEVICE static constexpr int columns_in_turn(int i) {
    return i / (kDim / 64) + i % (kDim / 64) * 4;
  }

  T2I_DEVICE static void load_operand(Operand& a, uint32_t rows, int d) {
    T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
      ptx::ldmatrix<false>(a[m], Layout::columns(rows, d) + m * 16 * Layout::kRowBytes);
    }
  }

  // x += a bᵀ of their d-th 16 columns, rows of b being at ``columns``; the first time x begins at
  // start, which may be one for all blocks of rows or columns.
  template <int kColumns, int kStartM, int kStartN>
  T2I_DEVICE static void multiply(float (&x)[kBlocks][kColumns / 8][4], const Operand& a,
                                  uint32_t columns, int d, const float (&start)[kStartM][kStartN][4]) {
    T2I_UNROLL for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix<false>(b, Layout::columns(columns, d) + n * 16 * Layout::kRowBytes);
      T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          float(&sum)[4] = x[m][2 * n + half];
          if (d == 0) {
            const auto& from = start[m % kStartM][(2 * n + half) % kStartN];
            ptx::mma<Element>(sum, a[m], b[2 * half], b[2 * half + 1], from);
          } else {
            ptx::mma<Element>(sum, a[m], b[2 * half], b[2 * half + 1], sum);
          }
        }
      }
    }
  }

  // sums += a b of 16 columns of a; the rows of b, as many, are at ``rows``.
  T2I_DEVICE static void accumulate(Sums& sums, const Operand& a, uint32_t rows) {
    T2I_UNROLL for (int i = 0; i < kDim / 16; ++i) {
      const int d = columns_in_turn(i);
      uint32_t b[4];
      ptx::ldmatrix<true>(b, Layout::columns(rows, d));
      T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
        ptx::mma<Element>(sums[m][2 * d], a[m], b[0], b[1], sums[m][2 * d]);
        ptx::mma<Element>(sums[m][2 * d + 1], a[m], b[2], b[3], sums[m][2 * d + 1]);
      }
    }
  }

  // tanh of a score over the softcap, and 1 − tanh², its derivative: with r = 1 / (1 + e^2x) they are
  // 1 − 2 r and 4 r (1 − r).
  struct Squashed {
    float value, slope;
  };
  T2I_DEVICE static Squashed squash(float score, float cap_in) {
    const float r = ptx::reciprocal(1 + ptx::ex2(score * cap_in));
    return {fmaf(-2, r, 1), 4 * fmaf(-r, r, r)};
  }
};

// ---- dk and dv ----------------------------------------------------------------------------------

// A block holds 128 keys and walks over tiles of queries of all heads that share them. It is two teams
// of four warps, 32 keys a warp: one has S and sums up dv, the other has dP and sums up dk, because the
// sums of both would not fit a thread's registers. What they do is the same, with other operands:
//
//   team   first product   between               second product
//   0      Sᵀ = k qᵀ       P, which team 1 gets  dv += Pᵀ dout
//   1      dPᵀ = v doutᵀ   dS = P · dP           dk += dSᵀ q
template <class Element, int kDim, bool kSoftcap>
struct FlashBackwardKeys : FlashBackwardBase<Element, kDim, kSoftcap> {
  using Base = FlashBackwardBase<Element, kDim, kSoftcap>;
  using typename Base::Layout, typename Base::Operand, typename Base::Sums;
  using Base::kBlocks, Base::kRows, Base::kWarpRows;
  static constexpr int kKeys = 128, kQueries = 64, kThreads = 256, kPairs = kKeys / kWarpRows;
  // Queries whose scores are in registers.
  static constexpr int kStep = kDim == 64 ? 64 : kSoftcap ? 16 : 32;
  static constexpr int kTileBytes = kQueries * Layout::kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;      // a tile of q and one of dout
  static constexpr int kSumsBytes = kQueries * 4;         // log2_sum of a tile
  static constexpr int kStartsBytes = kQueries * 8;       // minus_delta, as products begin with it
  static constexpr int kNumbersBytes = kSumsBytes + kStartsBytes;
  static constexpr int kPassedBytes = kKeys * kStep * 2;  // P of a team
  static constexpr int kSharedBytes = 2 * kStageBytes + 2 * kPassedBytes + 3 * 1024;
  using Scores = float[kBlocks][kStep / 8][4];
  using Packed = Operand[kStep / 16];

  // With log2_sum and minus_delta of the first of the heads.
  struct Kept : cuda::Kept {
    static constexpr uint32_t kBytes = cuda::Kept::kBytes + 16;

    T2I_DEVICE void write_numbers(const FlashBackward& call, int q_row) const {
      const int64_t rows = int64_t(blockIdx.z) * call.heads + int(blockIdx.y) * call.group;
      const int64_t at = rows * call.length_q + q_row;
      ptx::store_shared_8(address + cuda::Kept::kBytes, reinterpret_cast<uint64_t>(call.log2_sum + at));
      ptx::store_shared_8(address + cuda::Kept::kBytes + 8,
                          reinterpret_cast<uint64_t>(call.minus_delta + at));
    }
    T2I_DEVICE const float* numbers(int i) const {
      return reinterpret_cast<const float*>(ptx::load_shared_8(address + cuda::Kept::kBytes + 8 * i));
    }
  };

  struct Shared {
    uint32_t tiles;    // two stages; keys and values to begin with
    uint32_t numbers;  // two stages
    uint32_t zeros;    // to begin with, too
    uint32_t passed;   // from team to team, two buffers
    Kept problem;
  };

  T2I_DEVICE static int team() { return threadIdx.x / (kThreads / 2); }
  T2I_DEVICE static int pair() { return threadIdx.x / kWarp % kPairs; }

  // Of the tile of keys.
  T2I_DEVICE static int row_of(int r) {
    return pair() * kWarpRows + r / 2 * 16 + r % 2 * 8 + threadIdx.x % kWarp / 4;
  }

  // ``head`` of those that share the keys.
  T2I_DEVICE static void load_queries(const FlashBackward& call, const Shared& shared, int stage,
                                      int head, int first) {
    const Kept kept = shared.problem;
    const uint32_t to = shared.tiles + stage * kStageBytes;
    load_tile<kDim, kThreads, kQueries>(to, kept.passing(0) + head * call.q_strides.head * 2,
                                        int(call.q_strides.row * 2), first, kept.length_q(), call.dim);
    load_tile<kDim, kThreads, kQueries>(
        to + kTileBytes, kept.passing(1) + head * call.dout_strides.head * 2,
        int(call.dout_strides.row * 2), first, kept.length_q(), call.value_dim);
    if (threadIdx.x < 2 * kQueries) {
      const int row = threadIdx.x % kQueries, deltas = threadIdx.x / kQueries;
      const float* from = kept.numbers(deltas) + int64_t(head) * call.length_q + first + row;
      const uint32_t numbers = shared.numbers + stage * kNumbersBytes;
      const bool inside = first + row < kept.length_q();
      // Of queries x and y the product's lanes begin with x, y, x, y. Each half of a warp copies
      // another half of that first, to other banks.
      const uint32_t start = numbers + kSumsBytes + row / 2 * 16 + row / 16 % 2 * 8 + row % 2 * 4;
      ptx::copy_async_4(deltas ? start : numbers + row * 4, from, inside);
      if (deltas) ptx::copy_async_4(start ^ 8, from, inside);
    }
    ptx::copy_async_commit();
  }

  // To the next tile of queries.
  T2I_DEVICE static void advance(int& head, int& first, int begin, int end) {
    first += kQueries;
    if (first >= end) {
      first = begin;
      ++head;
    }
  }

  // P of the k-th 16 queries as the next product takes it, and what times dP is dS.
  T2I_DEVICE static void exponentiate(const Scores& scores, int k, const Scale& scale,
                                      uint32_t log2_sum, Operand& p, Operand& slope) {
    T2I_UNROLL for (int half = 0; half < 2; ++half) {
      const int n = 2 * k + half;
      const float2 sums = ptx::load_shared_floats(log2_sum + n * 32);
      T2I_UNROLL for (int r = 0; r < kRows; ++r) {
        float x = scores[r / 2][n][r % 2 * 2], y = scores[r / 2][n][r % 2 * 2 + 1];
        uint32_t &both = p[r / 2][2 * half + r % 2], &both_slope = slope[r / 2][2 * half + r % 2];
        if constexpr (kSoftcap) {
          const auto a = Base::squash(x, scale.cap_in), b = Base::squash(y, scale.cap_in);
          x = ptx::ex2(fmaf(a.value, scale.c, -sums.x));
          y = ptx::ex2(fmaf(b.value, scale.c, -sums.y));
          both = ptx::pack<Element>(x, y);
          both_slope = ptx::pack<Element>(x * a.slope, y * b.slope);
        } else {
          x = ptx::ex2(fmaf(x, scale.c, -sums.x));
          y = ptx::ex2(fmaf(y, scale.c, -sums.y));
          both = both_slope = ptx::pack<Element>(x, y);
        }
      }
    }
  }

  // Zeros where one of the 16 queries from ``first`` on does not see a key.
  T2I_DEVICE static void mask(Operand& p, Operand& slope, int first, Kept problem) {
    const int first_of_lane = first + threadIdx.x % 4 * 2 + problem.shift();
    const int first_key = problem.first(), left = problem.left(), right = problem.right();
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      // Of this lane's queries those from begin on, so many.
      const int begin = first_key + row_of(r) - right - first_of_lane;
      const unsigned seeing = unsigned(left) + unsigned(right) + 1;
      T2I_UNROLL for (int half = 0; half < 2; ++half) {
        const uint32_t low = unsigned(half * 8 - begin) < seeing ? 0xffffu : 0u;
        const uint32_t high = unsigned(half * 8 + 1 - begin) < seeing ? 0xffff0000u : 0u;
        p[r / 2][2 * half + r % 2] &= low | high;
        slope[r / 2][2 * half + r % 2] &= low | high;
      }
    }
  }

  // ds = dP · what was passed
  T2I_DEVICE static void differentiate(const Scores& dp, uint32_t passed, Packed& ds) {
    T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
      T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
        const uint4 four = ptx::load_shared_16(passed + (k * kBlocks + m) * kThreads / 2 * 16);
        const uint32_t slope[4] = {four.x, four.y, four.z, four.w};
        T2I_UNROLL for (int i = 0; i < 4; ++i) {
          const float* two = &dp[m][2 * k + i / 2][i % 2 * 2];
          ds[k][m][i] = ptx::pack<Element>(two[0] * ptx::low<Element>(slope[i]),
                                           two[1] * ptx::high<Element>(slope[i]));
        }
      }
    }
  }

  T2I_DEVICE static void run(const FlashBackward& call, const Scale& scale, Problem problem) {
    ptx::SharedArrays arrays;
    Shared shared;
    shared.tiles = arrays.take(2 * kStageBytes);
    shared.passed = arrays.take(2 * kPassedBytes);
    shared.numbers = arrays.take(2 * kNumbersBytes + kStep * 8 + Kept::kBytes);
    shared.zeros = shared.numbers + 2 * kNumbersBytes;
    shared.problem.address = shared.zeros + kStep * 8;
    if (threadIdx.x < kStep * 2) ptx::store_shared(shared.zeros + threadIdx.x * 4, 0.0f);
    if (threadIdx.x == 0) {
      shared.problem.write(problem);
      shared.problem.write_numbers(call, problem.q_row);
    }

    Operand rows[kDim / 16];  // of this warp's keys or values
    load_tile<kDim, kThreads, kKeys>(
        shared.tiles, rows_of(call.k, call.k_strides, problem.k_row, blockIdx.y),
        int(call.k_strides.row * 2), problem.first, problem.length_k, call.dim);
    load_tile<kDim, kThreads, kKeys>(
        shared.tiles + kStageBytes, rows_of(call.v, call.v_strides, problem.k_row, blockIdx.y),
        int(call.v_strides.row * 2), problem.first, problem.length_k, call.value_dim);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    const uint32_t rows_at =
        shared.tiles + team() * kStageBytes + Layout::a_offset(pair() * kWarpRows);
    T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) Base::load_operand(rows[d], rows_at, d);
    __syncthreads();  // all have theirs

    const int begin = int(ptx::uniform(problem.begin)), end = int(ptx::uniform(problem.end));
    int head = begin < end ? 0 : call.group, first = begin;
    if (head < call.group) load_queries(call, shared, 0, head, first);

    const uint32_t columns_at = shared.tiles + team() * kTileBytes + Layout::b_offset(0);
    const uint32_t second_at = shared.tiles + (1 - team()) * kTileBytes + Layout::a_offset(0);
    Sums sums = {};

    for (int stage = 0; head < call.group; stage ^= 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // the tile is there, and all have done with the one before
      int next_head = head, next = first;
      advance(next_head, next, begin, end);
      if (next_head < call.group) {
        load_queries(call, shared, stage ^ 1, next_head, next);
      }
      T2I_ROLLED for (int step = 0; step < kQueries; step += kStep) {
        const int thread = int(ptx::opaque(threadIdx.x));
        const uint32_t tile = stage * kStageBytes + step * Layout::kRowBytes;
        const uint32_t numbers = shared.numbers + stage * kNumbersBytes;
        const uint32_t passed = shared.passed +
                                (unsigned(step) / kStep + stage * (kQueries / kStep)) % 2 * kPassedBytes +
                                thread % (kThreads / 2) * 16;
        const uint32_t starts = team() ? numbers + kSumsBytes + step * 8 : shared.zeros;
        float start[1][kStep / 8][4];
        T2I_UNROLL for (int n = 0; n < kStep / 8; ++n) {
          ptx::load_shared_floats(start[0][n], starts + thread % 4 * 16 + n * 64);
        }
        Scores scores;
        const uint32_t columns = ptx::opaque(columns_at) + tile;
        T2I_UNROLL for (int i = 0; i < kDim / 16; ++i) {
          const int d = Base::columns_in_turn(i);
          Base::template multiply<kStep>(scores, rows[d], columns, d, start);
        }
        Packed p;
        if (team() == 0) {
          const Kept kept = shared.problem;
          const bool masked = kept.masked(first + step, first + step + kStep);
          Packed slope;
          T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
            exponentiate(scores, k, scale, numbers + step * 4 + thread % 4 * 8, p[k], slope[k]);
          }
          if (masked) {
            T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
              mask(p[k], slope[k], first + step + k * 16, kept);
            }
          }
          T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
            T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
              const auto& x = slope[k][m];
              ptx::store_shared_16(passed + (k * kBlocks + m) * kThreads / 2 * 16,
                                   {x[0], x[1], x[2], x[3]});
            }
          }
        }
        ptx::barrier_sync(1 + pair(), 2 * kWarp);
        if (team() == 1) differentiate(scores, passed, p);
        const uint32_t second = ptx::opaque(second_at) + tile;
        T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
          Base::accumulate(sums, p[k], second + k * 16 * Layout::kRowBytes);
        }
      }
      advance(head, first, begin, end);
    }
    __syncthreads();

    const Kept kept = shared.problem;
    const int row = kept.first() + pair() * kWarpRows;
    const Strides& strides = team() ? call.dk_strides : call.dv_strides;
    const char* to = rows_of(team() ? call.dk : call.dv, strides, kept.k_row() + row, blockIdx.y);
    const float factor = team() ? call.scale : 1.0f;
    T2I_UNROLL for (int i = 0; i < kBlocks * kDim / 2; ++i) {
      sums[i % kBlocks][i / kBlocks / 4][i / kBlocks % 4] *= factor;
    }
    write_rows<Element, kDim>(
        sums, shared.tiles + threadIdx.x / kWarp * kWarpRows * Layout::kRowBytes,
        const_cast<char*>(to), strides.row * 2, kept.length_k() - row,
        team() ? call.dim : call.value_dim);
  }
};

// ---- dq -----------------------------------------------------------------------------------------

// A block holds 64 queries and walks over tiles of keys. Two warps share 32 queries: each has half of a
// tile's keys, and their sums are added in the end.
template <class Element, int kDim, bool kSoftcap>
struct FlashBackwardQueries : FlashBackwardBase<Element, kDim, kSoftcap> {
  using Base = FlashBackwardBase<Element, kDim, kSoftcap>;
  using typename Base::Layout, typename Base::Operand, typename Base::Sums;
  using Base::kBlocks, Base::kRows, Base::kWarpRows;
  static constexpr int kQueries = 64, kKeys = kDim == 64 ? 128 : 64, kThreads = 128;
  static constexpr int kStep = 32;  // keys whose scores are in registers
  static constexpr int kQueriesBytes = kQueries * Layout::kRowBytes;
  static constexpr int kKeysBytes = kKeys * Layout::kRowBytes;
  static constexpr int kHeld = kDim == 64 ? 4 : 2;  // of q's 16s of columns, in registers
  static constexpr int kSharedBytes = 2 * kQueriesBytes + 3 * kKeysBytes + 1024;
  using Scores = float[kBlocks][kStep / 8][4];

  T2I_DEVICE static int half() { return threadIdx.x / kWarp % 2; }

  // Of the tile of queries.
  T2I_DEVICE static int first_row() { return threadIdx.x / kWarp / 2 * kWarpRows; }
  T2I_DEVICE static int row_of(int r) {
    return first_row() + r / 2 * 16 + r % 2 * 8 + threadIdx.x % kWarp / 4;
  }

  T2I_DEVICE static void load_keys(const char* rows, const Strides& strides, int size, Kept kept,
                                   uint32_t to, int tile) {
    load_tile<kDim, kThreads, kKeys>(to, rows, int(strides.row * 2), tile * kKeys, kept.length_k(),
                                     size);
  }

  // x = p, times the derivative of the softcap, of scores
  T2I_DEVICE static void exponentiate(Scores& x, const Scale& scale, uint32_t log2_sum) {
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      const float sum = ptx::load_shared_float(log2_sum + row_of(r) * 4);
      T2I_UNROLL for (int n = 0; n < kStep / 8; ++n) {
        T2I_UNROLL for (int e = 0; e < 2; ++e) {
          float& score = x[r / 2][n][r % 2 * 2 + e];
          if constexpr (kSoftcap) {
            const auto squashed = Base::squash(score, scale.cap_in);
            score = ptx::ex2(fmaf(squashed.value, scale.c, -sum)) * squashed.slope;
          } else {
            score = ptx::ex2(fmaf(score, scale.c, -sum));
          }
        }
      }
    }
  }

  // Zeros where a query does not see a key of those from ``first`` on.
  T2I_DEVICE static void mask(Scores& p, int first, Kept problem) {
    mask_keys<kRows, kStep>(first, problem, row_of, 0, [&](int r, int n, int e) -> float& {
      return p[r / 2][n][r % 2 * 2 + e];
    });
  }

  T2I_DEVICE static void run(const FlashBackward& call, const Scale& scale, Problem problem) {
    ptx::SharedArrays arrays;
    const uint32_t q_tile = arrays.take(2 * kQueriesBytes), do_tile = q_tile + kQueriesBytes;
    const uint32_t k_tiles = arrays.take(3 * kKeysBytes), v_tile = k_tiles + 2 * kKeysBytes;
    const uint32_t log2_sum = arrays.take(3 * kQueries * 4 + Kept::kBytes);
    const uint32_t starts = log2_sum + kQueries * 4;
    const Kept kept = {starts + kQueries * 8};
    if (threadIdx.x == 0) kept.write(problem);
    __syncthreads();

    load_tile<kDim, kThreads, kQueries>(
        q_tile, rows_of(call.q, call.q_strides, problem.q_row, blockIdx.y),
        int(call.q_strides.row * 2), problem.first, problem.length_q, call.dim);
    load_tile<kDim, kThreads, kQueries>(
        do_tile, rows_of(call.dout, call.dout_strides, problem.q_row, blockIdx.y),
        int(call.dout_strides.row * 2), problem.first, problem.length_q, call.value_dim);
    if (problem.begin < problem.end) {
      load_keys(problem.passing[0], call.k_strides, call.dim, kept,
                k_tiles + problem.begin % 2 * kKeysBytes, problem.begin);
    }
    ptx::copy_async_commit();

    if (threadIdx.x < kQueries) {
      const int row = problem.first + threadIdx.x;
      const int64_t at =
          (int64_t(blockIdx.z) * call.heads + blockIdx.y) * call.length_q + problem.q_row + row;
      const bool inside = row < problem.length_q;
      ptx::store_shared(log2_sum + threadIdx.x * 4, inside ? call.log2_sum[at] : 0);
      // Of rows x and x + 8 the product's lanes begin with −delta as x, x, x + 8, x + 8.
      const int block = threadIdx.x / 16, of_block = threadIdx.x % 16;
      const float start = inside ? call.minus_delta[at] : 0;
      const uint32_t to = starts + (block * 8 + of_block % 8) * 16 + of_block / 8 * 8;
      ptx::store_shared_8(to, __float_as_uint(start) * 0x100000001ull);
    }
    const int first_of_half = half() * kKeys / 2;
    const uint32_t q_at = q_tile + Layout::a_offset(first_row());
    const uint32_t columns_at = k_tiles + Layout::b_offset(first_of_half);
    const uint32_t rows_at = k_tiles + Layout::a_offset(first_of_half);
    const int begin = int(ptx::uniform(problem.begin)), end = int(ptx::uniform(problem.end));
    Operand held[kHeld];
    Sums sums = {};
    ptx::copy_async_wait<0>();
    __syncthreads();  // all that were begun are there
    T2I_UNROLL for (int d = 0; d < kHeld; ++d) Base::load_operand(held[d], q_at, d);

    for (int tile = begin; tile < end; ++tile) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // the keys are there, and all have done with the values before
      load_keys(kept.passing(1), call.v_strides, call.value_dim, kept, v_tile, tile);
      ptx::copy_async_commit();
      if (tile + 1 < end) {
        load_keys(kept.passing(0), call.k_strides, call.dim, kept,
                  k_tiles + (tile + 1) % 2 * kKeysBytes, tile + 1);
      }
      ptx::copy_async_commit();

      T2I_UNROLL for (int step = 0; step < kKeys / 2; step += kStep) {
        const uint32_t k_offset = tile % 2 * kKeysBytes + step * Layout::kRowBytes;
        const uint32_t q = ptx::opaque(q_at), k_columns = ptx::opaque(columns_at) + k_offset;
        const float zeros[1][1][4] = {};
        Scores p, ds;
        T2I_UNROLL for (int i = 0; i < kDim / 16; ++i) {
          const int d = Base::columns_in_turn(i);
          Operand loaded;
          if (d >= kHeld) Base::load_operand(loaded, q, d);
          Base::template multiply<kStep>(p, d < kHeld ? held[d % kHeld] : loaded, k_columns, d, zeros);
        }
        exponentiate(p, scale, log2_sum);
        if (kept.masked(tile, tile + 1)) mask(p, tile * kKeys + first_of_half + step, kept);
        if (step == 0) {
          ptx::copy_async_wait<1>();
          __syncthreads();  // the values are there
        }
        float start[kBlocks][1][4];
        T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
          ptx::load_shared_floats(start[m][0], starts + (first_row() / 2 + m * 8 + threadIdx.x % kWarp / 4) * 16);
        }
        const uint32_t dout = ptx::opaque(q_at) + (do_tile - q_tile);
        const uint32_t v_columns =
            ptx::opaque(columns_at) + (v_tile - k_tiles) + step * Layout::kRowBytes;
        T2I_UNROLL for (int i = 0; i < kDim / 16; ++i) {
          const int d = Base::columns_in_turn(i);
          Operand loaded;
          Base::load_operand(loaded, dout, d);
          Base::template multiply<kStep>(ds, loaded, v_columns, d, start);
        }
        const uint32_t k_rows = ptx::opaque(rows_at) + k_offset;
        T2I_UNROLL for (int k = 0; k < kStep / 16; ++k) {
          Operand a;
          T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
            T2I_UNROLL for (int i = 0; i < 4; ++i) {
              const float* x = &ds[m][2 * k + i / 2][i % 2 * 2];
              const float* y = &p[m][2 * k + i / 2][i % 2 * 2];
              a[m][i] = ptx::pack<Element>(x[0] * y[0], x[1] * y[1]);
            }
          }
          Base::accumulate(sums, a, k_rows + k * 16 * Layout::kRowBytes);
        }
      }
    }
    ptx::copy_async_wait<0>();
    __syncthreads();

    // The sums of the second half, to the warp that has the first.
    const uint32_t passed = k_tiles + first_row() * kDim * 4 + threadIdx.x % kWarp * 16;
    T2I_UNROLL for (int i = 0; i < kBlocks * kDim / 8; ++i) {
      if (half()) ptx::store_shared_floats(passed + i * 16 * kWarp, sums[i % kBlocks][i / kBlocks]);
    }
    __syncthreads();
    if (half()) return;
    bool unseeing[kRows];
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      unseeing[r] = ptx::load_shared_float(log2_sum + row_of(r) * 4) == INFINITY;
    }
    T2I_UNROLL for (int i = 0; i < kBlocks * kDim / 8; ++i) {
      const int m = i % kBlocks;
      float(&sum)[4] = sums[m][i / kBlocks];
      float more[4];
      ptx::load_shared_floats(more, passed + i * 16 * kWarp);
      T2I_UNROLL for (int e = 0; e < 4; ++e) {
        // Of a query that sees no key, whatever its gradient is: 0 · NaN is NaN.
        sum[e] = unseeing[2 * m + e / 2] ? 0 : (sum[e] + more[e]) * call.scale;
      }
    }
    const int row = kept.first() + first_row();
    const char* to = rows_of(call.dq, call.dq_strides, kept.q_row() + row, blockIdx.y);
    write_rows<Element, kDim>(sums, q_tile + first_row() * Layout::kRowBytes, const_cast<char*>(to),
                              call.dq_strides.row * 2, kept.length_q() - row, call.dim);
  }
};

// ---- Kernels ------------------------------------------------------------------------------------

// log2_sum and minus_delta of all rows. grid: (blocks of rows, heads, batch)
template <class Element, int kDim>
struct FlashBackwardRows {
  static constexpr int kThreads = 128, kLanes = kDim / 8;  // of a row
  static constexpr int kRows = kThreads / kLanes;

  T2I_DEVICE static void run(const FlashBackward& call) {
    const int row = blockIdx.x * kRows + threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    float sum = 0;
    if (row < call.length_q && chunk * 8 < call.value_dim) {
      auto load = [&](const void* tensor, const Strides& strides) {
        return ptx::load_global_16(rows_of(tensor, strides, row, blockIdx.y) + chunk * 16);
      };
      const uint4 a = load(call.dout, call.dout_strides), b = load(call.out, call.out_strides);
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
      T2I_UNROLL for (int i = 0; i < 4; ++i) {
        sum = fmaf(ptx::low<Element>(x[i]), ptx::low<Element>(y[i]), sum);
        sum = fmaf(ptx::high<Element>(x[i]), ptx::high<Element>(y[i]), sum);
      }
    }
    T2I_UNROLL for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    if (row >= call.length_q || chunk > 0) return;
    const int64_t at = (int64_t(blockIdx.z) * call.heads + blockIdx.y) * call.length_q + row;
    const float lse = call.lse[at];
    const bool unseeing = lse == -INFINITY;  // with +inf, all of its probabilities are 0
    if (call.dlse) sum -= call.dlse[at];
    call.minus_delta[at] = unseeing ? 0 : -sum;
    call.log2_sum[at] = unseeing ? INFINITY : lse * float(M_LOG2E);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    flash_backward_rows_kernel(const __grid_constant__ FlashBackward call) {
  Kernel::run(call);
}

// grid: (tiles of keys, heads of keys, batch)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    flash_backward_keys_kernel(const __grid_constant__ FlashBackward call,
                               const __grid_constant__ Scale scale) {
  Problem problem;
  if (!find_problem<Kernel::kKeys, true>(call, blockIdx.x, problem)) return;
  const int head = blockIdx.y * call.group;
  problem.passing[0] = rows_of(call.q, call.q_strides, problem.q_row, head);
  problem.passing[1] = rows_of(call.dout, call.dout_strides, problem.q_row, head);
  // Not even a tile's first rows are others than it needs: their gradients may be anything, and
  // 0 · NaN is NaN.
  problem.find_queries<Kernel::kKeys>();
  Kernel::run(call, scale, problem);
}

// grid: (tiles of queries, heads, batch)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    flash_backward_queries_kernel(const __grid_constant__ FlashBackward call,
                               const __grid_constant__ Scale scale) {
  Problem problem;
  if (!find_queries_problem<Kernel::kQueries, Kernel::kKeys>(call, problem)) return;
  Kernel::run(call, scale, problem);
}

}  // namespace t2i::cuda
