// decode_attention for tensor cores of the sm_80 family (mma.sync, cp.async): rotate, append,
// attend and combine in one launch.
//
// A block has a split of the slots of one row and key head, and all queries of that head, up to 16:
// the new tokens times the heads of a group. Scores are computed transposed, Sᵀ = K Qᵀ, and so is
// the output, Oᵀ = Vᵀ Pᵀ: keys, then channels fill the 16 rows of the matrix unit, and queries its
// 8 columns. Each warp walks over slices of the split of its own, from the last slot down, with a
// ring of its own in shared memory: none waits for another before the end. The last block of a row
// to finish combines what all have found, in the order of the splits (Flash-Decoding,
// pytorch.org/blog/flash-decoding).
//
// New tokens are put into the rings by hand, for what is written to the cache cannot be read back
// in the same launch by other blocks. They are in the first slices, as these are walked from the
// end.
//
// As in flash_forward.cuh, the base of probabilities 2^(score − base) is raised only where they
// would grow large.
//
// What is read of an int8 cache is multiplied in fp16, which has all bytes exactly. A key's scale
// multiplies its scores, a value's its probabilities. Queries are brought near the upper end of
// fp16 by a power of two for each, and scales of values below 2 by one for all, so that nothing is
// lost or overflows whatever the scales are.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "decode_attention.h"
#include "tile.cuh"

namespace t2i::cuda {

// 2^n times the x of these bits is in [2^to, 2^(to + 1)), for all x that are not next to the ends
// of fp32: (2^n, 2^-n).
struct PowerOfTwo {
  float power, inverse;

  T2I_DEVICE static PowerOfTwo bring(uint32_t bits, int to) {
    const int n = min(max(254 + to - int(bits >> 23), 1), 253);
    return {__uint_as_float(uint32_t(n) << 23), __uint_as_float(uint32_t(254 - n) << 23)};
  }
};

template <class Element_, int kDim_, bool kInt8_, int kQueryTiles_>
struct DecodeAttentionKernel {
  using Element = Element_;
  static constexpr int kDim = kDim_, kQueryTiles = kQueryTiles_;
  static constexpr bool kInt8 = kInt8_;
  using Operand = std::conditional_t<kInt8, ptx::Fp16, Element>;  // of the matrix unit
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kKeyBytes = kDim * (kInt8 ? 1 : 2);
  static constexpr int kSplit = decode_split(kKeyBytes);
  static constexpr int kStep = 4096 / kKeyBytes;  // keys of a slice
  static constexpr int kStages = 2;
  static_assert(kStages == 2, "the loop goes from one to the other");
  static_assert(kMostNewTokens <= (kWarps - 1) * kStep + 1, "not all would be in first slices");
  using Layout = Tile<kKeyBytes / 2>;
  using QueryLayout = Tile<kDim>;
  static constexpr int kSliceBytes = kStep * kKeyBytes;  // of keys, or of values
  static constexpr int kStageBytes = 2 * kSliceBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp

  // Where warps' outputs are added. Rows of queries, apart by 4 more than a multiple of 16 floats:
  // what lanes write at a time is in different banks.
  static constexpr int kRowFloats = kDim + 4;
  static constexpr int kFoundBytes = kQueries * kRowFloats * 4;
  static_assert(kFoundBytes <= kRingBytes);

  static constexpr int kQueryBytes = kQueries * QueryLayout::kRowBytes;
  static constexpr int kScaleBytes = kInt8 ? kSplit * 4 : 0;
  static constexpr int kSharedBytes =
      kWarps * kRingBytes + kQueryBytes + 2 * kScaleBytes + 2 * 1024;

  // Probabilities: the largest when a base is chosen, and what a lane's sum of a slice may come to.
  // In between they are far from both ends of fp16.
  static constexpr float kChosen = 4;  // log2
  static constexpr float kMostInLane = 8192;

  // The base where no key was seen: that of any key is above, and -inf minus it is no NaN.
  static constexpr float kNoKey = -3e38f;

  // Of each tile of 8 queries, lane l has 2 (l % 4) and the next; of 16 keys or channels l / 4 and
  // l / 4 + 8, or for int8 channels 2 (l / 4) and the next.
  static constexpr int kColumns = 2 * kQueryTiles;
  using Queries = uint32_t[kDim / 16][kQueryTiles][2];
  using Scores = float[kStep / 16][kQueryTiles][4];
  using Outputs = float[kDim / 16][kQueryTiles][4];

  // What a block works on. Slots count from the row's first.
  struct Problem {
    int64_t batch;
    int kv_head, split;
    int used, start;             // of the row: slots in use, and first one that is no padding
    int first_query, queries;    // of the tile, of all that share the key head; there are so many
    int begin, fresh, stop;      // slots to attend to: cached ones up to fresh, then new ones
    int seen_by_all, first_own;  // all queries see slots from one to the other

    T2I_DEVICE int token(int query, int group) const { return (first_query + query) / group; }
    T2I_DEVICE bool is_fresh(int slot) const { return slot >= fresh && slot < stop; }
  };

  struct Columns {
    float factor[kColumns];             // of scores, for powers of two
    float c[kColumns];                  // the same before softcap
    int first[kColumns], last[kColumns];  // slots that they see
    float base[kColumns];
    float sum[kColumns];  // this lane's part
  };

  struct Shared {
    uint32_t rings, queries, k_scales, v_scales, small;

    T2I_DEVICE uint32_t ring(int warp) const { return rings + warp * kRingBytes; }
    T2I_DEVICE uint32_t factor(int query) const { return small + query * 4; }
    // (base, sum) of a query, by warp
    T2I_DEVICE uint32_t stats(int warp, int query) const {
      return small + 64 + (warp * kQueries + query) * 8;
    }
    T2I_DEVICE uint32_t is_last() const { return small + 64 + kWarps * kQueries * 8; }
    T2I_DEVICE uint32_t found(int warp, int query, int channel) const {
      return rings + warp * kFoundBytes + (query * kRowFloats + channel) * 4;
    }
  };

  static_assert(64 + kWarps * kQueries * 8 + 4 <= 1024);

  // ---- Queries and new tokens -----------------------------------------------------------------

  // Two channels that are turned together, or just beside each other; bits of both as Element.
  struct Pair {
    int channel[2];
    uint32_t bits;

    T2I_DEVICE float value(int i) const {
      return i ? ptx::high<Element>(bits) : ptx::low<Element>(bits);
    }
  };
  static constexpr int kPairs = kDim / 2 / kWarp;  // of a row, for a lane
  using Pairs = Pair[kPairs];

  // Pairs lane, lane + 32, … of a row; those from ``dim`` on are zeros.
  T2I_DEVICE static void load_pairs(Pairs& pairs, const DecodeAttention& call, const void* row,
                                    int turning, int position) {
    const uint16_t* x = static_cast<const uint16_t*>(row);
    T2I_UNROLL for (int i = 0; i < kPairs; ++i) {
      Pair& pair = pairs[i];
      const int p = threadIdx.x % kWarp + i * kWarp;
      const bool turns = p < turning, halves = turns && !call.interleaved;
      pair.channel[0] = halves ? p : 2 * p;
      pair.channel[1] = pair.channel[0] + (halves ? turning : 1);
      pair.bits = 0;
      if (2 * p >= call.dim) continue;
      pair.bits = x[pair.channel[0]] | uint32_t(x[pair.channel[1]]) << 16;
      if (!turns) continue;
      const float a = pair.value(0), b = pair.value(1);
      const float cos = call.cos[position * call.cos_stride + p];
      const float sin = call.sin[position * call.sin_stride + p];
      pair.bits = ptx::pack<Element>(__fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)),
                                     __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos)));
    }
  }

  // The bits of the largest magnitude of a row; a NaN is above all.
  T2I_DEVICE static uint32_t largest(const Pairs& pairs) {
    uint32_t most = 0;
    T2I_UNROLL for (int i = 0; i < kPairs; ++i) {
      T2I_UNROLL for (int half = 0; half < 2; ++half) {
        most = max(most, __float_as_uint(pairs[i].value(half)) & 0x7fffffffu);
      }
    }
    return __reduce_max_sync(0xffffffffu, most);
  }

  T2I_DEVICE static int position_of(const Problem& problem, int token) {
    return max(problem.used + token - problem.start, 0);
  }

  // The tile's queries, turned, to shared memory. A negative scale is theirs. For int8 the channels
  // of 16 are in the order in which widen_int8 gives those of keys.
  T2I_DEVICE static void prepare_queries(const DecodeAttention& call, const Problem& problem,
                                         const Shared& shared) {
    const int warp = threadIdx.x / kWarp, group = call.heads / call.kv_heads;
    constexpr int kRows = kQueries / kWarps;
    Pairs pairs[kRows];
    T2I_UNROLL for (int i = 0; i < kRows; ++i) {
      const int query = min(problem.first_query + warp + i * kWarps, problem.queries - 1);
      const int token = query / group, head = problem.kv_head * group + query % group;
      const uint16_t* row = static_cast<const uint16_t*>(call.q) +
                            problem.batch * call.q_strides.batch + token * call.q_strides.row +
                            head * call.q_strides.head;
      load_pairs(pairs[i], call, row, call.rotary_pairs, position_of(problem, token));
    }
    T2I_UNROLL for (int i = 0; i < kRows; ++i) {
      const int query = warp + i * kWarps;
      float by = call.scale < 0 ? -1 : 1, inverse = 1;
      if constexpr (kInt8) {
        const PowerOfTwo to = PowerOfTwo::bring(largest(pairs[i]), 14);
        by *= to.power;
        inverse = to.inverse;
      }
      T2I_UNROLL for (int j = 0; j < kPairs; ++j) {
        const Pair& pair = pairs[i][j];
        const uint32_t bits = ptx::pack<Operand>(pair.value(0) * by, pair.value(1) * by);
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          int d = pair.channel[half];
          if constexpr (kInt8) d = (d & ~15) + (d & 1) * 8 + (d >> 2 & 3) * 2 + (d >> 1 & 1);
          ptx::store_shared_2(shared.queries + QueryLayout::offset(query, d / 8) + d % 8 * 2,
                              uint16_t(bits >> 16 * half));
        }
      }
      if (threadIdx.x % kWarp == 0) ptx::store_shared(shared.factor(query), inverse);
    }
  }

  // One row of a new token: to the cache and its scale, unless null, and where it is ``seen``, to a
  // slice's row in shared memory and its scale there.
  T2I_DEVICE static void append(const DecodeAttention& call, const Pairs& pairs, char* cache,
                                float* scale, bool seen, uint32_t slice, int row,
                                uint32_t shared_scale) {
    float divisor = 1;
    if constexpr (kInt8) {
      const float s = __uint_as_float(largest(pairs)) / 127;
      divisor = fmaxf(s, FLT_MIN);
      if (threadIdx.x % kWarp == 0) {
        if (scale) *scale = s;
        if (seen) ptx::store_shared(shared_scale, s);
      }
    }
    T2I_UNROLL for (int i = 0; i < kPairs; ++i) {
      T2I_UNROLL for (int half = 0; half < 2; ++half) {
        const int d = pairs[i].channel[half];
        if constexpr (kInt8) {
          // Adding 1.5 · 2^23 rounds to integers, to even, and leaves them in the lowest bits.
          const float rounded = __fadd_rn(pairs[i].value(half) / divisor, 12582912.0f);
          const uint8_t byte = uint8_t(__float_as_uint(rounded));
          if (seen) ptx::store_shared_1(slice + Layout::offset(row, d / 16) + d % 16, byte);
          if (cache && d < call.dim) reinterpret_cast<uint8_t*>(cache)[d] = byte;
        } else {
          const uint16_t bits = uint16_t(pairs[i].bits >> 16 * half);
          if (seen) ptx::store_shared_2(slice + Layout::offset(row, d / 8) + d % 8 * 2, bits);
          if (cache && d < call.dim) reinterpret_cast<uint16_t*>(cache)[d] = bits;
        }
      }
    }
  }

  // Where the slots of this block's row and head begin.
  T2I_DEVICE static char* cache_of(void* cache, const Strides& strides, const Problem& problem) {
    return static_cast<char*>(cache) + (kInt8 ? 1 : 2) * (problem.batch * strides.batch +
                                                           problem.kv_head * strides.head);
  }
  T2I_DEVICE static float* scales_of(float* scales, const Strides& strides,
                                     const Problem& problem) {
    return scales + problem.batch * strides.batch + problem.kv_head * strides.head;
  }

  // The new tokens of this split, by all warps: into the slices where they are attended to, and, by
  // the last tile of queries alone, into the cache.
  T2I_DEVICE static void append_tokens(const DecodeAttention& call, const Problem& problem,
                                       const Shared& shared, bool keep) {
    const int end = min(problem.used + call.tokens, (problem.split + 1) * kSplit);
    const int top = (problem.stop - 1) / kStep;
    int slot = max(problem.used, problem.split * kSplit) + int(threadIdx.x) / kWarp;
    for (; slot < end; slot += kWarps) {
      const int token = slot - problem.used, warp = top - slot / kStep, row = slot % kStep;
      const bool seen = problem.is_fresh(slot);
      if (!keep && !seen) continue;
      const uint32_t keys = shared.ring(warp), scale_at = slot % kSplit * 4;
      const auto row_of = [&](const void* x, const Strides& strides) {
        return static_cast<const uint16_t*>(x) + problem.batch * strides.batch +
               token * strides.row + problem.kv_head * strides.head;
      };
      Pairs k, v;
      load_pairs(k, call, row_of(call.k_new, call.k_new_strides), call.rotary_pairs,
                 position_of(problem, token));
      load_pairs(v, call, row_of(call.v_new, call.v_new_strides), 0, 0);
      char *k_row = nullptr, *v_row = nullptr;
      float *k_scale = nullptr, *v_scale = nullptr;
      if (keep) {
        constexpr int kSize = kInt8 ? 1 : 2;
        k_row = cache_of(call.k, call.k_strides, problem) + slot * call.k_strides.row * kSize;
        v_row = cache_of(call.v, call.v_strides, problem) + slot * call.v_strides.row * kSize;
        if constexpr (kInt8) {
          k_scale = scales_of(call.k_scale, call.k_scale_strides, problem) +
                    slot * call.k_scale_strides.row;
          v_scale = scales_of(call.v_scale, call.v_scale_strides, problem) +
                    slot * call.v_scale_strides.row;
        }
      }
      append(call, k, k_row, k_scale, seen, keys, row, shared.k_scales + scale_at);
      append(call, v, v_row, v_scale, seen, keys + kSliceBytes, row, shared.v_scales + scale_at);
    }
  }

  // ---- Slices of the cache --------------------------------------------------------------------

  // Copies slices of the cache, each warp its own: every kWarps-th, from the last one down.
  struct Loader {
    const char *k, *v;  // this lane's part of the first slot
    int k_stride, v_stride, first;
    bool inside;  // the lane's part is no padding behind head_dim

    static constexpr int kRowsAtOnce = kWarp / Layout::kChunks;

    T2I_DEVICE static int row() { return int(threadIdx.x) % kWarp / Layout::kChunks; }
    T2I_DEVICE static int chunk() { return int(threadIdx.x) % Layout::kChunks; }

    T2I_DEVICE Loader(const DecodeAttention& call, const Problem& problem, int slice) {
      constexpr int kSize = kInt8 ? 1 : 2;
      k_stride = int(call.k_strides.row) * kSize;
      v_stride = int(call.v_strides.row) * kSize;
      first = slice * kStep;
      const int64_t slot = first + row();
      k = cache_of(call.k, call.k_strides, problem) + slot * k_stride + chunk() * 16;
      v = cache_of(call.v, call.v_strides, problem) + slot * v_stride + chunk() * 16;
      inside = chunk() * 16 < call.dim * kSize;
    }

    T2I_DEVICE static void copy_all(uint32_t to, const char* from, int stride, bool inside) {
      T2I_UNROLL for (int i = 0; i < kStep; i += kRowsAtOnce) {
        ptx::copy_async_16(Layout::rows_on(to, i), from + int64_t(i) * stride, inside);
      }
    }

    // Zeros for what is not attended to; new tokens are left to append_tokens.
    T2I_DEVICE void copy_some(uint32_t to, const Problem& problem) const {
      T2I_ROLLED for (int i = 0; i < kStep; i += kRowsAtOnce) {
        const int slot = first + row() + i;
        if (problem.is_fresh(slot)) continue;
        const bool seen = inside && slot >= problem.begin && slot < problem.stop;
        ptx::copy_async_16(Layout::rows_on(to, i), k + int64_t(i) * k_stride, seen);
        ptx::copy_async_16(Layout::rows_on(to, i) + kSliceBytes, v + int64_t(i) * v_stride, seen);
      }
    }

    // Starts copying to a stage, and goes on to the next slice.
    T2I_DEVICE void load(uint32_t stage, const Problem& problem) {
      const uint32_t to = stage + Layout::offset(row(), chunk());
      if (first >= problem.begin && first + kStep <= problem.fresh) {
        copy_all(to, k, k_stride, inside);
        copy_all(to + kSliceBytes, v, v_stride, inside);
      } else if (first + kStep > problem.begin && first < problem.stop) {
        copy_some(to, problem);
      }
      ptx::copy_async_commit();
      first -= kWarps * kStep;
      k -= int64_t(kWarps * kStep) * k_stride;
      v -= int64_t(kWarps * kStep) * v_stride;
    }
  };

  // Scales of the split's cached slots; zeros for those that are not attended to.
  T2I_DEVICE static void load_scales(uint32_t to, const float* scales, int64_t stride,
                                     const Problem& problem) {
    T2I_UNROLL for (int i = 0; i < kSplit; i += kThreads) {
      const int at = i + int(threadIdx.x), slot = problem.split * kSplit + at;
      if (problem.is_fresh(slot)) continue;
      const bool inside = slot >= problem.begin && slot < problem.stop;
      ptx::store_shared(to + at * 4, inside ? scales[slot * stride] : 0.0f);
    }
  }

  // ---- Attention ------------------------------------------------------------------------------

  T2I_DEVICE static void load_queries(Queries& queries, const Shared& shared) {
    const int lane = threadIdx.x % kWarp;
    T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
      const uint32_t at = shared.queries + QueryLayout::offset(8 * t + lane % 8, lane / 8);
      T2I_UNROLL for (int d = 0; d < kDim / 16; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix<false>(b, QueryLayout::columns(at, d));
        T2I_UNROLL for (int i = 0; i < 4; ++i) queries[d + i / 2][t][i % 2] = b[i];
      }
    }
  }

  // scores = k qᵀ, as the dot product gives them.
  T2I_DEVICE static void multiply(Scores& scores, const Queries& queries, uint32_t k) {
    constexpr int kAtOnce = kInt8 ? 2 : 1;  // blocks of 16 channels that an ldmatrix gives
    T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
      T2I_UNROLL for (int d = 0; d < kDim / 16; d += kAtOnce) {
        uint32_t words[4], a[kAtOnce][4];
        ptx::ldmatrix<false>(words, Layout::columns(k, d / kAtOnce) + n * 16 * Layout::kRowBytes);
        T2I_UNROLL for (int i = 0; i < 4; ++i) {
          if constexpr (kInt8) {
            ptx::widen_int8(words[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
          } else {
            a[0][i] = words[i];
          }
        }
        T2I_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
            const uint32_t(&b)[2] = queries[d + i][t];
            constexpr float kZeros[4] = {};
            if (d + i == 0) {
              ptx::mma<Operand>(scores[n][t], a[i], b[0], b[1], kZeros);
            } else {
              ptx::mma<Operand>(scores[n][t], a[i], b[0], b[1], scores[n][t]);
            }
          }
        }
      }
    }
  }

  // Scales, softcap and masks of a slice's scores.
  T2I_DEVICE static void finish_scores(Scores& scores, const Columns& columns, uint32_t scales,
                                       float softcap, int first_slot, bool masked) {
    const int key_of_lane = threadIdx.x % kWarp / 4;
    if constexpr (kInt8) {
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          const float s = ptx::load_shared_float(scales + (16 * n + 8 * half + key_of_lane) * 4);
          T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
            scores[n][t][2 * half] *= s;
            scores[n][t][2 * half + 1] *= s;
          }
        }
      }
    }
    if (softcap > 0) {
      // tanh x = 1 − 2 / (1 + e^2x)
      const float in = 2 / softcap, out = softcap * float(M_LOG2E);
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
          T2I_UNROLL for (int e = 0; e < 4; ++e) {
            const float grown = ptx::ex2(scores[n][t][e] * columns.c[2 * t + e % 2] * in);
            scores[n][t][e] = out - 2 * out * ptx::reciprocal(1 + grown);
          }
        }
      }
    }
    if (masked) {
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
          T2I_UNROLL for (int e = 0; e < 4; ++e) {
            const int slot = first_slot + 16 * n + e / 2 * 8 + key_of_lane, column = 2 * t + e % 2;
            if (slot < columns.first[column] || slot > columns.last[column]) {
              scores[n][t][e] = -INFINITY;
            }
          }
        }
      }
    }
  }

  // Raises the bases to the scores' maxima, brings output and sums to the new ones.
  T2I_DEVICE static void rebase(const Scores& scores, Columns& columns, Outputs& out) {
    T2I_UNROLL for (int column = 0; column < kColumns; ++column) {
      const int t = column / 2, e = column % 2;
      float most = -INFINITY;
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        most = fmaxf(most, fmaxf(scores[n][t][e], scores[n][t][e + 2]));
      }
      T2I_UNROLL for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
      }
      const float base = fmaxf(columns.base[column], most * columns.factor[column] - kChosen);
      const float keep = ptx::ex2(columns.base[column] - base);
      columns.base[column] = base;
      columns.sum[column] *= keep;
      T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) {
        out[d][t][e] *= keep;
        out[d][t][e + 2] *= keep;
      }
    }
  }

  // scores = 2^(factor scores − base); this lane's sums of them.
  T2I_DEVICE static void exponentiate(Scores& scores, const Columns& columns,
                                      float (&sum)[kColumns]) {
    T2I_UNROLL for (int column = 0; column < kColumns; ++column) {
      sum[column] = 0;
      T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          float& score = scores[n][column / 2][2 * half + column % 2];
          score = ptx::ex2(fmaf(score, columns.factor[column], -columns.base[column]));
          sum[column] += score;
        }
      }
    }
  }

  // out += vᵀ probabilities
  T2I_DEVICE static void accumulate(Outputs& out, Scores& scores, uint32_t v, uint32_t scales,
                                    float weight) {
    constexpr int kAtOnce = kInt8 ? 2 : 1;
    T2I_UNROLL for (int n = 0; n < kStep / 16; ++n) {
      uint32_t b[kQueryTiles][2];
      T2I_UNROLL for (int half = 0; half < 2; ++half) {
        float by = 1;
        if constexpr (kInt8) {
          const int key = 16 * n + 8 * half + int(threadIdx.x) % kWarp / 4;
          by = ptx::load_shared_float(scales + key * 4) * weight;
        }
        T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
          const float* two = &scores[n][t][2 * half];
          b[t][half] = ptx::transpose(ptx::pack<Operand>(two[0] * by, two[1] * by));
        }
      }
      T2I_UNROLL for (int d = 0; d < kDim / 16; d += kAtOnce) {
        uint32_t words[4], a[kAtOnce][4];
        ptx::ldmatrix<true>(words, Layout::columns(v, d / kAtOnce) + n * 16 * Layout::kRowBytes);
        T2I_UNROLL for (int i = 0; i < 4; ++i) {
          if constexpr (kInt8) {
            ptx::widen_int8(words[i], a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
          } else {
            a[0][i] = words[i];
          }
        }
        T2I_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          T2I_UNROLL for (int t = 0; t < kQueryTiles; ++t) {
            ptx::mma<Operand>(out[d + i][t], a[i], b[t][0], b[t][1], out[d + i][t]);
          }
        }
      }
    }
  }

  // ---- Results --------------------------------------------------------------------------------

  // What was found of 8 channels of a query.
  struct Found {
    float base = kNoKey, sum = 0;
    float out[8] = {};
  };

  // Calls run(query of the tile, first of 8 channels) for all that there are, one by each thread at
  // a time.
  template <class Do>
  T2I_DEVICE static void for_results(const DecodeAttention& call, const Problem& problem, Do run) {
    constexpr int kChunks = kDim / 8;
    const int queries = min(kQueries, problem.queries - problem.first_query);
    for (int i = threadIdx.x; i < queries * kChunks; i += kThreads) {
      if (i % kChunks * 8 < call.dim) run(i / kChunks, i % kChunks * 8);
    }
  }

  T2I_DEVICE static void store_out(const DecodeAttention& call, const Problem& problem, int query,
                                   int channel, const Found& found) {
    const int group = call.heads / call.kv_heads, all = problem.first_query + query;
    const int64_t at = problem.batch * call.out_strides.batch + all / group * call.out_strides.row +
                       (problem.kv_head * group + all % group) * call.out_strides.head + channel;
    const float inverse = found.sum == 0 ? 0.0f : 1 / found.sum;
    const auto two = [&](int i) {
      return ptx::pack<Element>(found.out[i] * inverse, found.out[i + 1] * inverse);
    };
    ptx::store_global_16(static_cast<uint16_t*>(call.out) + at, {two(0), two(2), two(4), two(6)});
  }

  // The output of this warp to shared memory, times ``by``.
  T2I_DEVICE static void store_found(const Shared& shared, Columns& columns, const Outputs& out,
                                     float by) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    T2I_UNROLL for (int column = 0; column < kColumns; ++column) {
      const int query = column / 2 * 8 + lane % 4 * 2 + column % 2;
      float sum = columns.sum[column];
      T2I_UNROLL for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      }
      if (lane < 4) {
        ptx::store_shared(shared.stats(warp, query), columns.base[column]);
        ptx::store_shared(shared.stats(warp, query) + 4, sum);
      }
      T2I_UNROLL for (int d = 0; d < kDim / 16; ++d) {
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          const int channel = 16 * d + (kInt8 ? lane / 4 * 2 + half : lane / 4 + 8 * half);
          ptx::store_shared(shared.found(warp, query, channel),
                            out[d][column / 2][2 * half + column % 2] * by);
        }
      }
    }
  }

  T2I_DEVICE static void add(Found& to, float factor, const uint4& low, const uint4& high) {
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    T2I_UNROLL for (int i = 0; i < 8; ++i) to.out[i] += factor * __uint_as_float(bits[i]);
  }

  // Of all warps.
  T2I_DEVICE static Found add_warps(const Shared& shared, int query, int channel) {
    Found all;
    T2I_UNROLL for (int warp = 0; warp < kWarps; ++warp) {
      all.base = fmaxf(all.base, ptx::load_shared_float(shared.stats(warp, query)));
    }
    T2I_UNROLL for (int warp = 0; warp < kWarps; ++warp) {
      const uint32_t stats = shared.stats(warp, query), at = shared.found(warp, query, channel);
      const float factor = ptx::ex2(ptx::load_shared_float(stats) - all.base);
      all.sum += factor * ptx::load_shared_float(stats + 4);
      add(all, factor, ptx::load_shared_16(at), ptx::load_shared_16(at + 16));
    }
    return all;
  }

  // Where blocks leave what they found: outputs of all splits, then (base, sum) of all.
  struct Partial {
    float *out, *stats;

    T2I_DEVICE Partial(const DecodeAttention& call, const Problem& problem, int query, int split) {
      const int64_t queries = problem.queries, splits = gridDim.z;
      const int64_t row = blockIdx.x * queries + problem.first_query + query;
      out = call.partial + (row * splits + split) * call.dim;
      stats = call.partial + gridDim.x * queries * splits * call.dim + (row * splits + split) * 2;
    }
  };

  T2I_DEVICE static void store_partial(const Partial& to, int channel, const Found& found) {
    const auto bits = [&](int i) { return __float_as_uint(found.out[i]); };
    ptx::store_global_16(to.out + channel, {bits(0), bits(1), bits(2), bits(3)});
    ptx::store_global_16(to.out + channel + 4, {bits(4), bits(5), bits(6), bits(7)});
    if (channel == 0) {
      to.stats[0] = found.base;
      to.stats[1] = found.sum;
    }
  }

  // Of splits first…last.
  T2I_DEVICE static Found add_splits(const Partial& partial, int channel, int dim, int count) {
    Found all;
    for (int i = 0; i < count; ++i) all.base = fmaxf(all.base, partial.stats[2 * i]);
    for (int i = 0; i < count; ++i) {
      const float factor = ptx::ex2(partial.stats[2 * i] - all.base);
      const float* out = partial.out + int64_t(i) * dim + channel;
      all.sum += factor * partial.stats[2 * i + 1];
      add(all, factor, ptx::load_global_16(out), ptx::load_global_16(out + 4));
    }
    return all;
  }

  // Whether this block is the last of ``count`` that come here.
  T2I_DEVICE static bool is_last(int32_t* counter, int count, const Shared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      const bool last = atomicAdd(counter, 1) == count - 1;
      __threadfence();
      if (last) *counter = 0;
      ptx::store_shared(shared.is_last(), uint32_t(last));
    }
    __syncthreads();
    return ptx::load_shared(shared.is_last());
  }

  // ---- All of it ------------------------------------------------------------------------------

  T2I_DEVICE static void run(const DecodeAttention& call) {
    Problem problem;
    const int group = call.heads / call.kv_heads, tile = blockIdx.y;
    problem.batch = blockIdx.x / call.kv_heads;
    problem.kv_head = int(blockIdx.x % call.kv_heads);
    problem.split = int(blockIdx.z);
    problem.used = call.seqlens[problem.batch * call.seqlens_stride];
    problem.start = call.start[problem.batch * call.start_stride];
    problem.first_query = tile * kQueries;
    problem.queries = call.tokens * group;
    const bool fits = problem.used >= 0 && problem.used <= call.slots - call.tokens &&
                      problem.start >= 0 &&
                      (!call.cos || problem.used - problem.start <= call.positions - call.tokens);
    if (!fits) {
      Found none;
      none.sum = 1;
      T2I_UNROLL for (float& x : none.out) x = __int_as_float(0x7fffffff);
      const auto store = [&](int query, int channel) {
        store_out(call, problem, query, channel, none);
      };
      if (problem.split == 0) for_results(call, problem, store);
      return;
    }

    const int last_query = min(problem.first_query + kQueries, problem.queries) - 1;
    const int window = call.window < 0 ? call.slots : min(call.window, call.slots);
    problem.first_own = problem.used + problem.first_query / group;
    const int high = problem.used + last_query / group;
    const int low = max(problem.start, problem.first_own - window);
    problem.seen_by_all = max(problem.start, high - window);
    // Also where new tokens go that are padding.
    const int first_split = min(low, problem.used) / kSplit, last_split = high / kSplit;
    if (problem.split < first_split || problem.split > last_split) return;
    problem.begin = max(low, problem.split * kSplit);
    problem.stop = min(high + 1, (problem.split + 1) * kSplit);
    problem.fresh = max(problem.used, problem.begin);

    ptx::SharedArrays arrays;
    Shared shared;
    shared.rings = arrays.take(kWarps * kRingBytes);
    shared.queries = arrays.take(kQueryBytes);
    shared.small = arrays.take(1024);
    if constexpr (kInt8) {
      shared.k_scales = arrays.take(kScaleBytes);
      shared.v_scales = arrays.take(kScaleBytes);
    }
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

    // Slices count from the row's first slot.
    const uint32_t ring = shared.ring(warp);
    const int top = (problem.stop - 1) / kStep - warp;
    Loader loader(call, problem, top);
    T2I_ROLLED for (int stage = 0; stage < kStages; ++stage) {
      loader.load(ring + stage * kStageBytes, problem);
    }

    prepare_queries(call, problem, shared);
    if constexpr (kInt8) {
      load_scales(shared.k_scales, scales_of(call.k_scale, call.k_scale_strides, problem),
                  call.k_scale_strides.row, problem);
      load_scales(shared.v_scales, scales_of(call.v_scale, call.v_scale_strides, problem),
                  call.v_scale_strides.row, problem);
    }
    append_tokens(call, problem, shared, tile == int(gridDim.y) - 1);
    __syncthreads();

    Queries queries;
    load_queries(queries, shared);
    PowerOfTwo weight = {1, 1};
    if constexpr (kInt8) {
      uint32_t most = 0;
      T2I_UNROLL for (int i = 0; i < kSplit; i += kWarp) {
        most = max(most, ptx::load_shared(shared.v_scales + (i + lane) * 4) & 0x7fffffffu);
      }
      weight = PowerOfTwo::bring(__reduce_max_sync(0xffffffffu, most), 0);
    }
    Columns columns;
    T2I_UNROLL for (int column = 0; column < kColumns; ++column) {
      const int query = column / 2 * 8 + lane % 4 * 2 + column % 2;
      // Not 0: 0 times the -inf of a key that is not seen is NaN.
      columns.c[column] = fmaxf(fabsf(call.scale) * float(M_LOG2E), 1e-37f);
      if constexpr (kInt8) columns.c[column] *= ptx::load_shared_float(shared.factor(query));
      columns.factor[column] = call.softcap > 0 ? 1 : columns.c[column];
      columns.last[column] = problem.used + problem.token(query, group);
      columns.first[column] = max(problem.start, columns.last[column] - window);
      columns.base[column] = kNoKey;
      columns.sum[column] = 0;
    }

    Outputs out = {};
    uint32_t stage = 0;
    const int bottom = problem.begin < problem.stop ? problem.begin / kStep : top + 1;
    for (int slice = top; slice >= bottom; slice -= kWarps) {
      ptx::copy_async_wait<kStages - 1>();
      __syncwarp();
      const uint32_t keys = ring + stage, values = keys + kSliceBytes;
      const int first = slice * kStep;
      const uint32_t scales_at = first % kSplit * 4;
      const bool masked = first < problem.seen_by_all || first + kStep > problem.first_own + 1;
      const uint32_t k_at = keys + Layout::a_offset(0);
      const uint32_t v_at = values + (kInt8 ? Layout::a_offset(0) : Layout::b_offset(0));
      Scores scores;
      float sum[kColumns];
      for (bool again = false;;) {
        multiply(scores, queries, k_at);
        finish_scores(scores, columns, shared.k_scales + scales_at, call.softcap, first, masked);
        if (again) rebase(scores, columns, out);
        exponentiate(scores, columns, sum);
        bool bounded = true;  // false with a NaN, too
        T2I_UNROLL for (float x : sum) bounded = bounded && x <= kMostInLane;
        if (again || __all_sync(0xffffffffu, bounded)) break;
        again = true;
      }
      T2I_UNROLL for (int column = 0; column < kColumns; ++column) {
        columns.sum[column] += sum[column];
      }
      accumulate(out, scores, v_at, shared.v_scales + scales_at, weight.power);
      __syncwarp();
      loader.load(ring + stage, problem);
      stage ^= kStageBytes;
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    store_found(shared, columns, out, weight.inverse);
    __syncthreads();

    const int splits = last_split - first_split + 1;
    for_results(call, problem, [&](int query, int channel) {
      const Found all = add_warps(shared, query, channel);
      if (splits == 1) {
        store_out(call, problem, query, channel, all);
      } else {
        store_partial({call, problem, query, problem.split}, channel, all);
      }
    });
    if (splits == 1) return;
    if (!is_last(call.counters + int64_t(blockIdx.x) * gridDim.y + tile, splits, shared)) return;
    for_results(call, problem, [&](int query, int channel) {
      const Partial partial(call, problem, query, first_split);
      store_out(call, problem, query, channel, add_splits(partial, channel, call.dim, splits));
    });
  }
};

// grid: (rows times key heads, tiles of queries, splits)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttention call) {
  Kernel::run(call);
}

}  // namespace t2i::cuda
