// flash_attention, forward, for tensor cores of sm_90a (wgmma).
//
// A warpgroup copies keys and values to shared memory, a tile of each while the ones before are in
// use; two or three others have 64 queries each and walk over the tiles, and one may be in its softmax
// while another multiplies (FlashAttention-3, arXiv 2407.08608, puts them in turn; here nothing does).
// Probabilities stay in registers, where wgmma takes them from.
// It copies by cp.async: 16 bytes each go to a place of their own, and bulk copies do that only with
// tensor maps, which the driver makes.
// With head_dim 128 a warpgroup also overlaps the two by itself, where registers allow: while values
// are added up it takes the softmax of the next tile.
//
// No maximum is taken where it can be helped, as in flash_forward.cuh. Scores are still in registers
// when the sums say that it cannot, and the output is brought to the new base once wgmma is done with
// it, so that a warp decides without asking the rest of its warpgroup.
#pragma once

#include <cmath>

#include "flash_problem.cuh"

namespace t2i::cuda {

template <class Element_, int kDim_, bool kSoftcap_>
struct FlashForwardSm90Kernel {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kWarpgroup = 128, kOfWarpgroup = 64;  // threads, queries
  static constexpr int kConsumers = kDim == 64 && !kSoftcap ? 3 : 2;  // as registers allow
  static constexpr int kQueries = kConsumers * kOfWarpgroup, kKeys = 128;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kStages = 2;
  static constexpr bool kOverlap = kDim == 128 && !kSoftcap;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  // A tile is in panels of 64 columns, rows of 128 bytes each.
  using Panel = Tile<64>;
  static constexpr int kPanels = kDim / 64;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kQueryBytes = kOfWarpgroup * kRowBytes;
  static constexpr int kSharedBytes = kConsumers * kQueryBytes + 2 * kStages * kTileBytes + 1024;

  // A lane has rows l / 4 and l / 4 + 8 of its warp's 16: "row" 0 and 1 below. Of each 8 columns it has
  // 2 (l % 4) and the next: element e of row h is at 4 n + 2 h + e.
  using Scores = float[kKeys / 2];
  using Probabilities = uint32_t[kKeys / 16][4];  // packed: A operands
  using Outputs = float[kDim / 2];
  struct Softmax {
    float base[2], sum[2];
  };

  // Tiles in shared memory, and for each the mbarriers that say that it is there, or free again.
  struct Shared {
    uint32_t q, k, v, barriers;
    Kept problem;

    T2I_DEVICE Shared() {
      ptx::SharedArrays arrays;
      q = arrays.take(kConsumers * kQueryBytes);
      k = arrays.take(kStages * kTileBytes);
      v = arrays.take(kStages * kTileBytes);
      barriers = arrays.take(4 * kStages * 8 + Kept::kBytes);
      problem = {barriers + 4 * kStages * 8};
    }
    T2I_DEVICE uint32_t full(bool values, int stage) const {
      return barriers + (values * kStages + stage) * 8;
    }
    T2I_DEVICE uint32_t empty(bool values, int stage) const {
      return full(values, stage) + 2 * kStages * 8;
    }
  };

  // ---- Copying ----------------------------------------------------------------------------------

  static constexpr int kCopiers = kWarpgroup / 2;  // of keys, and of values

  template <int kRows>
  T2I_DEVICE static void load(uint32_t to, const char* rows, const Strides& strides, int first,
                              int length, int size) {
    T2I_UNROLL for (int i = 0; i < kPanels; ++i) {
      load_tile<64, kCopiers, kRows>(to + i * kRows * 128, rows + i * 128, int(strides.row * 2), first,
                                     length, size - i * 64);
    }
  }

  // wgmma sees what a thread wrote, once that has said so by a fence of its own.
  T2I_DEVICE static void publish(uint32_t mbarrier) {
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    ptx::fence_async();
    ptx::mbarrier_arrive(mbarrier);
  }

  T2I_DEVICE static void produce(const FlashForward& call, const Problem& problem,
                                 const Shared& shared) {
    if (problem.begin >= problem.end) return;
    const bool values = threadIdx.x >= kCopiers;
    if (!values) {  // they are there when the first keys are
      T2I_UNROLL for (int i = 0; i < kConsumers; ++i) {
        load<kOfWarpgroup>(shared.q + i * kQueryBytes,
                           rows_of(call.q, call.q_strides, problem.q_row, blockIdx.y), call.q_strides,
                           problem.first + i * kOfWarpgroup, problem.length_q, call.dim);
      }
    }
    const char* rows = values ? problem.passing[1] : problem.passing[0];
    const Strides& strides = values ? call.v_strides : call.k_strides;
    const int size = values ? call.value_dim : call.dim;
    const uint32_t tiles = values ? shared.v : shared.k;
    for (int i = 0; problem.begin + i < problem.end; ++i) {
      const int stage = i % kStages;
      ptx::mbarrier_wait(shared.empty(values, stage), i / kStages % 2 ^ 1);
      load<kKeys>(tiles + stage * kTileBytes, rows, strides, (problem.begin + i) * kKeys,
                  problem.length_k, size);
      publish(shared.full(values, stage));
    }
  }

  // ---- Products ---------------------------------------------------------------------------------

  // scores = q kᵀ, of a warpgroup.
  T2I_DEVICE static void score(Scores& scores, uint32_t q, uint32_t k) {
    const uint64_t a = ptx::swizzled(q), b = ptx::swizzled(k);
    ptx::wgmma_fence();
    T2I_UNROLL for (int d = 0; d < kDim; d += 16) {
      const int panel = d / 64 * 128, inside = d % 64 * 2;
      ptx::wgmma<Element, false>(scores, ptx::advanced(a, panel * kOfWarpgroup + inside),
                                 ptx::advanced(b, panel * kKeys + inside), d > 0);
    }
    ptx::wgmma_commit();
  }

  // out += p v
  T2I_DEVICE static void accumulate(Outputs& out, const Probabilities& p, uint32_t v) {
    const uint64_t b = ptx::swizzled(v, 1024, kKeys * 128);
    ptx::wgmma_fence();
    T2I_UNROLL for (int n = 0; n < kKeys / 16; ++n) {
      ptx::wgmma<Element, true>(out, p[n], ptx::advanced(b, n * 16 * 128), true);
    }
    ptx::wgmma_commit();
  }

  // ---- Softmax ----------------------------------------------------------------------------------

  // cap · tanh(x / cap), where tanh x = 1 − 2 / (1 + e^2x)
  T2I_DEVICE static void cap(Scores& scores, const FlashForward& call) {
    const float in = 2 * call.scale * float(M_LOG2E) / call.softcap, out = call.softcap;
    T2I_UNROLL for (int i = 0; i < kKeys / 2; ++i) {
      scores[i] = out - 2 * out * ptx::reciprocal(1 + ptx::ex2(scores[i] * in));
    }
  }

  T2I_DEVICE static int row_of(int h) {  // of the tile of queries
    const int thread = threadIdx.x - kWarpgroup;
    return thread / kWarp * 16 + h * 8 + thread % kWarp / 4;
  }

  // -inf for keys that their query does not see.
  T2I_DEVICE static void mask(Scores& scores, int tile, Kept problem) {
    mask_keys<2, kKeys>(tile * kKeys, problem, row_of, -INFINITY, [&](int h, int n, int e) -> float& {
      return scores[4 * n + 2 * h + e];
    });
  }

  // p = 2^(c scores − base); this lane's sums of it.
  T2I_DEVICE static void exponentiate(Probabilities& p, const Scores& scores, float c,
                                      const float (&base)[2], float (&sum)[2]) {
    sum[0] = sum[1] = 0;
    T2I_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
      T2I_UNROLL for (int h = 0; h < 2; ++h) {
        const float first = ptx::ex2(fmaf(scores[4 * n + 2 * h], c, -base[h]));
        const float second = ptx::ex2(fmaf(scores[4 * n + 2 * h + 1], c, -base[h]));
        sum[h] += first;
        sum[h] += second;
        p[n / 2][n % 2 * 2 + h] = ptx::pack<Element>(first, second);
      }
    }
  }

  // Raises the bases to the scores' maxima, and brings sums to the new ones. ``factor``: what outputs
  // are still to be multiplied with.
  T2I_DEVICE static void raise(const Scores& scores, float c, Softmax& softmax, float (&factor)[2]) {
    T2I_UNROLL for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
      T2I_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        most = fmaxf(most, fmaxf(scores[4 * n + 2 * h], scores[4 * n + 2 * h + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float base = fmaxf(softmax.base[h], most * c);
      factor[h] = ptx::ex2(softmax.base[h] - base);
      softmax.base[h] = base;
      softmax.sum[h] *= factor[h];
    }
  }

  // ---- A warpgroup of queries -------------------------------------------------------------------

  struct Consumer {
    const FlashForward& call;
    const Shared& shared;
    int begin, full, partial, end;  // of the problem
    uint32_t q;
    float c;
    Softmax softmax;

    T2I_DEVICE void release(bool values, int stage) const {
      if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(shared.empty(values, stage));
    }

    T2I_DEVICE void finish_scores(Scores& scores, int tile) const {
      if constexpr (kSoftcap) cap(scores, call);
      if (tile < full || tile >= partial) mask(scores, tile, shared.problem);
    }

    // Scores of the first tile, and their softmax.
    T2I_DEVICE void first(Scores& scores, Probabilities& p) {
      ptx::mbarrier_wait(shared.full(false, 0), 0);
      score(scores, q, shared.k);
      ptx::wgmma_wait<0>(scores);
      release(false, 0);
      finish_scores(scores, begin);
      float factor[2];
      raise(scores, c, softmax, factor);
      exponentiate(p, scores, c, softmax.base, softmax.sum);
    }

    // Adds the values of a tile, kStage, and goes on to the scores of ``tile``, the next.
    template <int kStage>
    T2I_DEVICE void step(Scores& scores, const Probabilities& p, Probabilities& next, Outputs& out,
                         int tile, int parity) {
      constexpr int kNext = kStage ^ 1;
      ptx::mbarrier_wait(shared.full(false, kNext), kNext ? parity : parity ^ 1);
      score(scores, q, shared.k + kNext * kTileBytes);
      ptx::mbarrier_wait(shared.full(true, kStage), parity);
      accumulate(out, p, shared.v + kStage * kTileBytes);
      ptx::wgmma_wait<kOverlap ? 1 : 0>(scores);
      release(false, kNext);

      finish_scores(scores, tile);
      float added[2], factor[2];
      exponentiate(next, scores, c, softmax.base, added);
      const bool bounded = added[0] <= kMostInLane && added[1] <= kMostInLane;  // not with a NaN
      const bool again = !__all_sync(0xffffffffu, bounded);
      if (again) {
        raise(scores, c, softmax, factor);
        exponentiate(next, scores, c, softmax.base, added);
      }
      T2I_UNROLL for (int h = 0; h < 2; ++h) softmax.sum[h] += added[h];

      ptx::wgmma_wait<0>(out);
      release(true, kStage);
      if (again) {
        T2I_UNROLL for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      }
    }

    // Adds the values of the last tile.
    T2I_DEVICE void last(const Probabilities& p, Outputs& out, int stage, int parity) const {
      ptx::mbarrier_wait(shared.full(true, stage), parity);
      accumulate(out, p, shared.v + stage * kTileBytes);
      ptx::wgmma_wait<0>(out);
    }

    T2I_DEVICE void attend(Outputs& out) {
      static_assert(kStages == 2);
      Scores scores;
      Probabilities even, other;
      Probabilities& odd = kOverlap ? other : even;
      first(scores, even);
      int tile = begin + 1;
      for (int parity = 0;; parity ^= 1) {
        if (tile == end) return last(even, out, 0, parity);
        step<0>(scores, even, odd, out, tile++, parity);
        if (tile == end) return last(odd, out, 1, parity);
        step<1>(scores, odd, even, out, tile++, parity);
      }
    }

    T2I_DEVICE void write(Outputs& out, int warpgroup) const {
      const int first = shared.problem.first(), q_row = shared.problem.q_row() + first;
      const int rows = shared.problem.length_q() - first;
      const int64_t head = int64_t(blockIdx.z) * call.heads + blockIdx.y;
      float* lse = call.lse + head * call.length_q + q_row;
      float outputs[1][kDim / 8][4];
      T2I_UNROLL for (int h = 0; h < 2; ++h) {
        float sum = softmax.sum[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float inverse = sum == 0 ? 0.0f : ptx::reciprocal(sum);
        T2I_UNROLL for (int n = 0; n < kDim / 8; ++n) {
          T2I_UNROLL for (int e = 0; e < 2; ++e) {
            outputs[0][n][2 * h + e] = out[4 * n + 2 * h + e] * inverse;
          }
        }
        const int row = row_of(h);
        if (threadIdx.x % 4 != 0 || row >= rows) continue;
        const float log2_sum = softmax.base[h] + log2f(sum);
        lse[row] = sum == 0 ? -INFINITY : log2_sum * float(M_LN2);
      }
      ptx::barrier_sync(1 + warpgroup, kWarpgroup);  // its queries are no longer needed
      const int warp = threadIdx.x / kWarp % 4;
      const int of_warp = warpgroup * kOfWarpgroup + warp * 16;
      char* to = const_cast<char*>(rows_of(call.out, call.out_strides, q_row + of_warp, blockIdx.y));
      write_rows<Element, kDim, 1>(outputs, q + warp * 16 * kRowBytes, to, call.out_strides.row * 2,
                                   rows - of_warp, call.value_dim);
    }
  };

  T2I_DEVICE static void run(const FlashForward& call, const Problem& problem) {
    const Shared shared;
    if (threadIdx.x == 0) {
      shared.problem.write(problem);
      T2I_UNROLL for (int i = 0; i < 2 * kStages; ++i) {
        ptx::mbarrier_init(shared.full(i / kStages, i % kStages), kCopiers);
        ptx::mbarrier_init(shared.empty(i / kStages, i % kStages), kConsumers * kWarpgroup / kWarp);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      ptx::give_registers<kProducerRegisters>();
      produce(call, problem, shared);
      return;
    }
    ptx::take_registers<kConsumerRegisters>();
    const int warpgroup = int(ptx::uniform(threadIdx.x / kWarpgroup)) - 1;
    Consumer consumer = {call,
                         shared,
                         problem.begin,
                         problem.full,
                         problem.partial,
                         problem.end,
                         shared.q + warpgroup * kQueryBytes,
                         (kSoftcap ? 1 : call.scale) * float(M_LOG2E),
                         {{kNoKey, kNoKey}, {}}};
    Outputs out = {};
    if (problem.begin < problem.end) consumer.attend(out);
    consumer.write(out, warpgroup);
  }
};

}  // namespace t2i::cuda
