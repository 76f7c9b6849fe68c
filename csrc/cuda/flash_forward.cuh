// flash_attention, forward, for tensor cores of the sm_80 family (mma.sync, cp.async).
//
// A block of 4 warps holds 128 queries, 32 a warp, and walks over tiles of keys (FlashAttention-2,
// arXiv 2307.08691, algorithm 1). What is different:
//
// No maximum is taken where it can be helped. Probabilities are 2^(c s − base) with the base of
// earlier keys, and are summed anyway; only if a lane's sum of 64 keys says that one of them may be
// above 2^13 are the scores computed again, with their maximum. A softmax is the same whatever base is
// subtracted, as long as nothing overflows, and what a lower base costs fp16 at the small end is below
// what rounding the large ones costs. Tiles that follow the first hardly ever take the second way.
//
// Keys are in two buffers and values in one, so that the scores of a tile can be computed again, and
// that a multiprocessor of 164 KB holds two blocks.
#pragma once

#include <cmath>

#include "flash_problem.cuh"

namespace t2i::cuda {

template <class Element_, int kDim_, bool kSoftcap_>
struct FlashForwardKernel {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kQueries = 128, kKeys = kDim == 64 ? 128 : 64, kThreads = 128;
  static constexpr int kStep = 64;  // keys whose scores are in registers
  static constexpr bool kQueriesInRegisters = kDim == 64;
  using Layout = Tile<kDim>;
  static constexpr int kTileBytes = kKeys * Layout::kRowBytes;
  static constexpr int kSharedBytes = kQueries * Layout::kRowBytes + 3 * kTileBytes + 1024;

  // Rows of a warp: two blocks of 16. Lane l has, of each, rows l / 4 and l / 4 + 8: "row" h of block
  // m is 2 m + h below. Of each 8 columns it has 2 (l % 4) and the next.
  static constexpr int kBlocks = 2, kRows = 2 * kBlocks;
  using Queries = uint32_t[kQueriesInRegisters ? kDim / 16 : 1][kBlocks][4];
  using Scores = float[kBlocks][kStep / 8][4];
  using Probabilities = uint32_t[kBlocks][kStep / 16][4];  // packed: A operands of 16×16
  using Outputs = float[kBlocks][kDim / 8][4];

  // With the base of each row: c times the maximum of its scores when that was last taken.
  struct Kept : cuda::Kept {
    static constexpr uint32_t kBytes = cuda::Kept::kBytes + 4 * kQueries;

    T2I_DEVICE float base(int row) const {
      return ptx::load_shared_float(address + cuda::Kept::kBytes + 4 * row);
    }
    T2I_DEVICE void set_base(int row, float base) const {
      ptx::store_shared(address + cuda::Kept::kBytes + 4 * row, base);
    }
  };

  T2I_DEVICE static void load_keys(const void* rows, const Strides& strides, int size, Kept kept,
                                   uint32_t to, int tile) {
    load_tile<kDim, kThreads, kKeys>(to, rows, int(strides.row * 2), tile * kKeys, kept.length_k(),
                                     size);
  }

  // Of the tile of queries.
  T2I_DEVICE static int row_of(int r) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return warp * 16 * kBlocks + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }

  T2I_DEVICE static void load_queries(uint32_t (&a)[kBlocks][4], uint32_t q, int d) {
    T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
      ptx::ldmatrix<false>(a[m], Layout::columns(q, d) + m * 16 * Layout::kRowBytes);
    }
  }

  // scores = q kᵀ, as the dot product gives them, and with the softcap, if there is one, scaled.
  T2I_DEVICE static void score(Scores& scores, const Queries& queries, uint32_t q, uint32_t k,
                               const FlashForward& call) {
    T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) {
      uint32_t loaded[kBlocks][4];
      if constexpr (!kQueriesInRegisters) load_queries(loaded, q, d);
      const auto& a = kQueriesInRegisters ? queries[d] : loaded;
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix<false>(b, Layout::columns(k, d) + n * 16 * Layout::kRowBytes);
        T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
          T2I_UNROLL for (int half = 0; half < 2; ++half) {
            float(&score)[4] = scores[m][2 * n + half];
            constexpr float kZeros[4] = {};
            if (d == 0) {
              ptx::mma<Element>(score, a[m], b[2 * half], b[2 * half + 1], kZeros);
            } else {
              ptx::mma<Element>(score, a[m], b[2 * half], b[2 * half + 1], score);
            }
          }
        }
      }
    }
    if constexpr (kSoftcap) {
      // cap · tanh(x / cap), where tanh x = 1 − 2 / (1 + e^2x)
      const float in = 2 * call.scale * float(M_LOG2E) / call.softcap, out = call.softcap;
      T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
        T2I_UNROLL for (int n = 0; n < kStep / 8; ++n) {
          T2I_UNROLL for (int e = 0; e < 4; ++e) {
            const float grown = ptx::ex2(scores[m][n][e] * in);
            scores[m][n][e] = out - 2 * out * ptx::reciprocal(1 + grown);
          }
        }
      }
    }
  }

  // -inf for keys that their query does not see.
  T2I_DEVICE static void mask(Scores& scores, int first_key, Kept problem) {
    mask_keys<kRows, kStep>(first_key, problem, row_of, -INFINITY, [&](int r, int n, int e) -> float& {
      return scores[r / 2][n][r % 2 * 2 + e];
    });
  }

  // p = 2^(c scores − base); this lane's sums of it.
  T2I_DEVICE static void exponentiate(Probabilities& p, const Scores& scores, Kept kept, float c,
                                      float (&sum)[kRows]) {
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      const float base = kept.base(row_of(r));
      sum[r] = 0;
      T2I_UNROLL for (int n = 0; n < kStep / 8; ++n) {
        const float* two = &scores[r / 2][n][r % 2 * 2];
        const float first = ptx::ex2(fmaf(two[0], c, -base));
        const float second = ptx::ex2(fmaf(two[1], c, -base));
        sum[r] += first;
        sum[r] += second;
        p[r / 2][n / 2][n % 2 * 2 + r % 2] = ptx::pack<Element>(first, second);
      }
    }
  }

  // Raises the bases to the scores' maxima, brings output and sums to the new ones.
  T2I_DEVICE static void rebase(const Scores& scores, float c, Kept kept, float (&sum)[kRows],
                                Outputs& out) {
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      float most = -INFINITY;
      T2I_UNROLL for (int n = 0; n < kStep / 8; ++n) {
        T2I_UNROLL for (int e = 0; e < 2; ++e) {
          most = fmaxf(most, scores[r / 2][n][r % 2 * 2 + e]);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float before = kept.base(row_of(r)), base = fmaxf(before, most * c);
      __syncwarp();
      if (threadIdx.x % 4 == 0) kept.set_base(row_of(r), base);
      const float factor = ptx::ex2(before - base);
      sum[r] *= factor;
      T2I_UNROLL for (int n = 0; n < kDim / 8; ++n) {
        out[r / 2][n][r % 2 * 2] *= factor;
        out[r / 2][n][r % 2 * 2 + 1] *= factor;
      }
    }
    __syncwarp();
  }

  // out += p v
  T2I_DEVICE static void accumulate(Outputs& out, const Probabilities& p, uint32_t v) {
    T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
      T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ptx::ldmatrix<true>(b, Layout::columns(v, d) + n * 16 * Layout::kRowBytes);
        T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
          ptx::mma<Element>(out[m][2 * d], p[m][n], b[0], b[1], out[m][2 * d]);
          ptx::mma<Element>(out[m][2 * d + 1], p[m][n], b[2], b[3], out[m][2 * d + 1]);
        }
      }
    }
  }

  T2I_DEVICE static void run(const FlashForward& call, const Problem& problem) {
    ptx::SharedArrays shared;
    const uint32_t q_tile = shared.take(kQueries * Layout::kRowBytes);
    const uint32_t k_tiles = shared.take(2 * kTileBytes);
    const uint32_t v_tile = shared.take(kTileBytes);
    const Kept kept = {{shared.take(Kept::kBytes)}};
    if (threadIdx.x == 0) kept.write(problem);
    kept.set_base(threadIdx.x, kNoKey);
    __syncthreads();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const float c = (kSoftcap ? 1 : call.scale) * float(M_LOG2E);

    load_tile<kDim, kThreads, kQueries>(
        q_tile, rows_of(call.q, call.q_strides, problem.q_row, blockIdx.y),
        int(call.q_strides.row * 2), problem.first, problem.length_q, call.dim);
    if (problem.begin < problem.end) {
      load_keys(problem.passing[0], call.k_strides, call.dim, kept,
                k_tiles + problem.begin % 2 * kTileBytes, problem.begin);
    }
    ptx::copy_async_commit();

    const uint32_t q_at = q_tile + Layout::a_offset(warp * 16 * kBlocks, lane);
    const uint32_t k_at = k_tiles + Layout::b_offset(0, lane);
    Queries queries;
    if constexpr (kQueriesInRegisters) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) load_queries(queries[d], q_at, d);
    }
    Outputs outputs = {};
    float sum[kRows] = {};

    for (int tile = problem.begin; tile < kept.end(); ++tile) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // the keys are there, and all have done with the values before
      load_keys(kept.passing(1), call.v_strides, call.value_dim, kept, v_tile, tile);
      ptx::copy_async_commit();
      if (tile + 1 < kept.end()) {
        load_keys(kept.passing(0), call.k_strides, call.dim, kept,
                  k_tiles + (tile + 1) % 2 * kTileBytes, tile + 1);
      }
      ptx::copy_async_commit();

      const bool masked = kept.masked(tile, tile + 1);
      T2I_UNROLL for (int step = 0; step < kKeys; step += kStep) {
        const uint32_t keys = k_at + tile % 2 * kTileBytes + step * Layout::kRowBytes;
        Probabilities p;
        float added[kRows];
        for (bool again = false;; again = true) {
          Scores scores;
          score(scores, queries, ptx::opaque(q_at), keys, call);
          if (masked) mask(scores, tile * kKeys + step, kept);
          if (again) rebase(scores, c, kept, sum, outputs);
          exponentiate(p, scores, kept, c, added);
          bool bounded = true;  // false with a NaN, too
          T2I_UNROLL for (int r = 0; r < kRows; ++r) bounded = bounded && added[r] <= kMostInLane;
          if (again || __all_sync(0xffffffffu, bounded)) break;
        }
        T2I_UNROLL for (int r = 0; r < kRows; ++r) sum[r] += added[r];
        if (step == 0) {
          ptx::copy_async_wait<1>();
          __syncthreads();  // the values are there
        }
        const uint32_t v_at = v_tile + Layout::a_offset(0, ptx::opaque(threadIdx.x) % kWarp);
        accumulate(outputs, p, v_at + step * Layout::kRowBytes);
      }
    }
    ptx::copy_async_wait<0>();

    __syncthreads();
    const int first = kept.first(), rows = kept.length_q() - first, q_row = kept.q_row() + first;
    const int64_t head = int64_t(blockIdx.z) * call.heads + blockIdx.y;
    float* lse = call.lse + head * call.length_q + q_row;
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      const float inverse = sum[r] == 0 ? 0.0f : ptx::reciprocal(sum[r]);
      T2I_UNROLL for (int n = 0; n < kDim / 8; ++n) {
        outputs[r / 2][n][r % 2 * 2] *= inverse;
        outputs[r / 2][n][r % 2 * 2 + 1] *= inverse;
      }
    }
    const int of_warp = warp * 16 * kBlocks;
    char* out = const_cast<char*>(rows_of(call.out, call.out_strides, q_row + of_warp, blockIdx.y));
    write_rows<Element, kDim, kBlocks>(outputs, q_tile + of_warp * Layout::kRowBytes, out,
                                       call.out_strides.row * 2, rows - of_warp, call.value_dim);
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      const int row = row_of(r);
      if (lane % 4 != 0 || row >= rows) continue;
      const float log2_sum = kept.base(row) + log2f(sum[r]);
      lse[row] = sum[r] == 0 ? -INFINITY : log2_sum * float(M_LN2);
    }
  }
};

}  // namespace t2i::cuda
