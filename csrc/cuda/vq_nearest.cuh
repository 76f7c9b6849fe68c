// vq_nearest on tensor cores of the sm_80 family, exactly.
//
// The nearest code has the largest score z·c − |c|²/2, or z·c/|c| for the cosine. Scores are
// coarse, but within a bound of the exact ones: each lane keeps, of a vector, the largest score of
// its share of a block of codes, the block, and the largest of all its other blocks. Blocks within
// twice the bound of the best are looked at again, code by code in fp32; if more than one code is
// left, fp64 distances of the given values decide, ties to the lowest index. Where a lane's other
// blocks are within the bound, too, a warp goes through all codes. So the answer is always that of
// fp64.
//
// Where there are too few vectors to fill a GPU, codes are split among blocks, each of which finds
// the nearest of its own; the last one done takes the nearest of those.
//
// Products are of fp16, sums in fp32. Every number is the sum of two in fp16, |c|²/2 of three, and
// lies in the depth of the instruction as [zh | zh | zl | f f f] · [ch | cl | ch | −b0 −b1 −b2], 15
// of 16 at d = 4 and 27 of 32 at d = 8. Codes are scaled by the power of two that brings the
// largest entry of the codebook to [8, 16), a vector by one that does so for its own, and f, a
// power of two, brings |c|²/2 to the scale of the product.
//
// The bound. Z = |z| and C = max |c| are of scaled values, M = Z C + f C²/2 bounds Σ |terms|, u =
// 2^-23. Two fp16 numbers leave 2^-22 of a number, or 2^-25 where they are subnormal; zl·cl is
// dropped, 2^-22 Z C. Thus 3 · 2^-22 Z C + √d 2^-25 (Z + C), and the latter is below u Z C for Z, C
// >= 8 and d <= 128. Three leave 2^-33 of |c|²/2, which fp32 rounded before: u f C²/2 at most.
// Rounding c/|c| costs u Z C. f may not be below 2^-24, nor above 2^15: if it should be below,
// 2^-24 C²/2 is off, at most 6 u Z C for C < 16 √d and Z >= 8; if above, z is scaled less, and its
// 2^-25 is far below u f C²/2, as C >= 8. All that is less than 15 u M. A matrix instruction cuts
// off each of what it adds at 2^-23 of the largest (Fasi et al., Numerical behavior of NVIDIA
// tensor cores, 2021): at most 20 u M an instruction, for two halves of 8 products, a sum and a
// result each. fp32's own scores, d + 4 roundings, are within. fp64's distances are within (d + 4)
// 2^-53 of themselves; a code that only they favour may be farther by twice that, (d + 4) 2^-51
// (|z|² + C²) at most in units of scores.
#pragma once

#include <cmath>

#include "tile.cuh"
#include "vq_nearest.h"

namespace t2i::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kVqUnit = 0x1p-23f;
// Of the largest entry when scaled: |c|²/2 fits into fp16 with 128 dimensions.
constexpr int kVqExponent = 3;

T2I_DEVICE float load_value(const void* values, FloatType type, int64_t i) {
  if (type == FloatType::fp32) return static_cast<const float*>(values)[i];
  const uint32_t bits = static_cast<const uint16_t*>(values)[i];
  return type == FloatType::fp16 ? ptx::low<ptx::Fp16>(bits) : ptx::low<ptx::Bf16>(bits);
}

T2I_DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
constexpr uint32_t kInfinity = 0x7f800000u;

// Of the number whose magnitude that is; some exponent for 0.
T2I_DEVICE int exponent_of(uint32_t magnitude, int of_zero) {
  return magnitude == 0 ? of_zero : ilogbf(__uint_as_float(magnitude));
}

// x as the sum of fp16 numbers: rounds it, keeps the rest.
T2I_DEVICE uint32_t split(float& x) {
  const uint32_t rounded = ptx::pack<ptx::Fp16>(x, 0.0f);
  x -= ptx::low<ptx::Fp16>(rounded);
  return rounded;
}

T2I_DEVICE const void* row_of_z(const VqNearest& call, int64_t i) {
  const int64_t at = i / call.inner * call.outer_stride + i % call.inner * call.inner_stride;
  return static_cast<const char*>(call.z) + at * (call.z_type == FloatType::fp32 ? 4 : 2);
}

T2I_DEVICE float load_code(const VqNearest& call, int code, int j) {
  return load_value(call.codebook, call.codebook_type,
                    code * call.code_stride + j * call.code_dim_stride);
}

// What the preparation leaves for the search.
template <int kDim_>
struct VqCodes {
  static constexpr int kDim = kDim_;                      // vectors are filled up with zeros
  static constexpr int kSteps = (3 * kDim + 3 + 15) / 16;  // matrix instructions deep
  // Codes that are copied to shared memory at a time, and those that share a maximum.
  static constexpr int kTile = kSteps == 1 ? 256 : kSteps == 2 ? 128 : kSteps <= 7 ? 64 : 32;
  static constexpr int kBlock = kTile < 128 ? kTile : 128;
  static constexpr int kPairBytes = kSteps * kWarp * 16;  // 16 codes, two instructions wide
  static constexpr int kTileBytes = kTile / 16 * kPairBytes;
  static constexpr int kSurveyors = 256;  // warps, at most

  struct Summary {
    uint32_t largest[kSurveyors];  // magnitudes
    uint32_t invalid[kSurveyors];  // first codes
    int32_t exponent;              // of the largest magnitude
    uint32_t longest;              // C, as bits
    uint32_t padding[2];
  };

  Summary* summary;
  uint4* packed;       // [padded / 16][kSteps][lane]
  float* scaled;       // [num_codes][kDim]
  float* half_square;  // [num_codes]
  int64_t bytes;

  __host__ __device__ static int64_t padded(int64_t num_codes) {
    return (num_codes + kTile - 1) / kTile * kTile;
  }
  __host__ __device__ static VqCodes in(void* workspace, int64_t num_codes) {
    const int64_t packed_bytes = padded(num_codes) / 16 * kPairBytes;
    char* at = static_cast<char*>(workspace);
    VqCodes codes;
    codes.summary = reinterpret_cast<Summary*>(at);
    codes.packed = reinterpret_cast<uint4*>(at += sizeof(Summary));
    codes.scaled = reinterpret_cast<float*>(at += packed_bytes);
    codes.half_square = reinterpret_cast<float*>(at += num_codes * kDim * 4);
    codes.bytes = int64_t(sizeof(Summary)) + packed_bytes + num_codes * (kDim + 1) * 4;
    return codes;
  }
};

// ---- Preparation --------------------------------------------------------------------------------

// The largest magnitude of each warp's codes, and the first that is not finite.
template <class Codes>
__global__ void __launch_bounds__(256) vq_survey_kernel(const __grid_constant__ VqNearest call) {
  const Codes codes = Codes::in(call.workspace, call.num_codes);
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  uint32_t largest = 0, invalid = ~0u;
  for (int64_t k = thread; k < call.num_codes; k += gridDim.x * blockDim.x) {
    uint32_t most = 0;
    for (int j = 0; j < call.dim; ++j) most = max(most, magnitude(load_code(call, int(k), j)));
    if (most >= kInfinity) {
      invalid = min(invalid, uint32_t(k));
    } else {
      largest = max(largest, most);
    }
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  invalid = __reduce_min_sync(kAllLanes, invalid);
  if (threadIdx.x % kWarp == 0) {
    codes.summary->largest[thread / kWarp] = largest;
    codes.summary->invalid[thread / kWarp] = invalid;
  }
  if (thread == 0) codes.summary->longest = 0;
}

// A thread scales and packs a code. ``surveyors``: warps of the survey. ``done`` [blocks] is
// cleared.
template <class Codes>
__global__ void __launch_bounds__(128)
    vq_pack_kernel(const __grid_constant__ VqNearest call, int surveyors, uint32_t* done,
                   int blocks) {
  constexpr int kDim = Codes::kDim;
  const Codes codes = Codes::in(call.workspace, call.num_codes);
  const int lane = threadIdx.x % kWarp;
  uint32_t largest = 0, invalid = ~0u;
  for (int i = lane; i < surveyors; i += kWarp) {
    largest = max(largest, codes.summary->largest[i]);
    invalid = min(invalid, codes.summary->invalid[i]);
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  invalid = __reduce_min_sync(kAllLanes, invalid);
  const int exponent = exponent_of(largest, 0);
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k == 0) {
    codes.summary->exponent = exponent;
    call.invalid[0] = -1;
    call.invalid[1] = invalid == ~0u ? -1 : int64_t(invalid);
  }

  for (int64_t i = k; i < blocks; i += gridDim.x * blockDim.x) done[i] = 0;

  const bool there = k < call.num_codes;
  double square = 0;
  if (there) {
    for (int j = 0; j < call.dim; ++j) {
      const double x = load_code(call, int(k), j);
      square = fma(x, x, square);
    }
  }
  const double length = sqrt(square);
  auto scaled = [&](int j) -> float {
    if (!there || j >= call.dim) return 0;
    const float x = load_code(call, int(k), j);
    if (call.cosine) return length > 0 ? float(x / length * (1 << kVqExponent)) : 0.0f;
    return scalbnf(x, kVqExponent - exponent);
  };

  float longest = 0;
  float bias = -INFINITY;
  if (there) {
    const double scaled_length =
        call.cosine ? (length > 0 ? 1 << kVqExponent : 0) : ldexp(length, kVqExponent - exponent);
    const float half_square = call.cosine ? 0.0f : float(scaled_length * scaled_length / 2);
    longest = float(scaled_length * (1 + 0x1p-20));
    bias = -half_square;
    codes.half_square[k] = half_square;
    for (int j = 0; j < kDim; ++j) codes.scaled[k * kDim + j] = scaled(j);
    if (call.counts) call.counts[k] = 0;
  }
  const uint32_t longest_bits = __reduce_max_sync(kAllLanes, __float_as_uint(longest));
  if (lane == 0) atomicMax(&codes.summary->longest, longest_bits);
  if (k >= Codes::padded(call.num_codes)) return;

  const uint32_t b0 = split(bias);
  if (!there) bias = 0;  // it was -inf, in b0 alone: no score is below
  const uint32_t b1 = split(bias), b2 = split(bias);
  auto slot = [&](int i) -> uint32_t {
    const int rest = i - 3 * kDim;
    if (rest >= 0) return rest == 0 ? b0 : rest == 1 ? b1 : rest == 2 ? b2 : 0;
    float x = there ? codes.scaled[k * kDim + i % kDim] : 0;
    const uint32_t high = split(x);
    return i / kDim == 1 ? split(x) : high;
  };
  // Lane 4 n + i of a column of 8 codes holds, of code n, depths 2 i and 2 i + 8 and their next.
  uint2* to = reinterpret_cast<uint2*>(codes.packed + k / 16 * Codes::kSteps * kWarp);
  for (int step = 0; step < Codes::kSteps; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int first = step * 16 + 2 * i;
      to[(step * kWarp + k % 8 * 4 + i) * 2 + k / 8 % 2] = {
          slot(first) | slot(first + 1) << 16, slot(first + 8) | slot(first + 9) << 16};
    }
  }
}

// ---- Search -------------------------------------------------------------------------------------

// What blocks that share the vectors of a block have found.
struct VqSplits {
  struct Nearest {
    double distance;
    int64_t code;
  };
  Nearest* nearest;  // [splits][num_vectors]
  uint32_t* done;    // of each block's vectors, splits that are
};

template <int kDim>
struct VqSearch {
  using Codes = VqCodes<kDim>;
  static constexpr int kSteps = Codes::kSteps;
  static constexpr int kThreads = 128;
  // A warp has blocks of 16 vectors. Lane l has, of each, vectors l / 4 and l / 4 + 8: "row" h of
  // block m is 2 m + h below. Of each 8 codes it has 2 (l % 4) and the next.
  static constexpr int kBlocks = kSteps <= 7 ? 2 : 1, kRows = 2 * kBlocks;
  static constexpr int kVectors = kThreads / kWarp * 16 * kBlocks;  // of a block
  // As many as the 99 KB allow that a block can have on sm_86, 89 and 120.
  static constexpr int kStages = kSteps <= 13 ? 3 : 2;
  static constexpr int kTileBytes = Codes::kTileBytes;
  // Of a vector in shared memory: 16 bytes of eight in a row are in different banks.
  static constexpr int kPitch = kDim / 4 % 2 == 0 ? kDim + 4 : kDim;
  static constexpr int kSharedBytes = kStages * kTileBytes + kVectors * (kPitch + 2) * 4 + 3 * 1024;

  using Operands = uint32_t[kSteps][kBlocks][4];

  // Vectors in shared memory, scaled; f; and twice the bound, or -1 where nothing is searched for.
  struct Vectors {
    uint32_t scaled, factor, margin;

    T2I_DEVICE float at(int row, int j) const {
      return ptx::load_shared_float(scaled + (row * kPitch + j) * 4);
    }
    T2I_DEVICE float factor_of(int row) const { return ptx::load_shared_float(factor + row * 4); }
    T2I_DEVICE float margin_of(int row) const { return ptx::load_shared_float(margin + row * 4); }
  };

  // The nearest code that was measured.
  struct Nearest {
    double distance = INFINITY;
    int code = 0;

    T2I_DEVICE void take(const Nearest& other) {
      const bool first = other.distance == distance && other.code < code;
      if (other.distance < distance || first) *this = other;
    }
    // The nearest of lanes whose numbers differ in these bits.
    T2I_DEVICE void reduce(int lanes) {
      for (int bit = 1; bit < lanes; bit *= 2) {
        Nearest other;
        other.distance = __shfl_xor_sync(kAllLanes, distance, bit);
        other.code = __shfl_xor_sync(kAllLanes, code, bit);
        take(other);
      }
    }
  };

  // Of a lane, for each of its rows.
  struct Best {
    float score[kRows], other[kRows];
    int block[kRows];

    // Through shared memory the rows can be finished one by one, by code that is there once.
    T2I_DEVICE void store(uint32_t to) const {
      T2I_UNROLL for (int r = 0; r < kRows; ++r) {
        ptx::store_shared(at(to, r, 0), score[r]);
        ptx::store_shared(at(to, r, 1), other[r]);
        ptx::store_shared(at(to, r, 2), uint32_t(block[r]));
      }
    }
    T2I_DEVICE static uint32_t at(uint32_t to, int r, int field) {
      return to + ((r * 3 + field) * kThreads + threadIdx.x) * 4;
    }
  };

  T2I_DEVICE static int row_of(int r) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return warp * 16 * kBlocks + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }

  // This thread's share of a tile of codes.
  T2I_DEVICE static void load_codes(uint32_t to, const char* from) {
    constexpr int kChunks = kTileBytes / 16;
    T2I_UNROLL for (int i = 0; i < (kChunks + kThreads - 1) / kThreads; ++i) {
      if (kChunks % kThreads == 0 || i * kThreads + int(threadIdx.x) < kChunks) {
        ptx::copy_async_16(to + i * kThreads * 16, from + i * kThreads * 16);
      }
    }
  }

  // A thread scales a vector.
  T2I_DEVICE static void load_vector(const VqNearest& call, const Codes& codes, Vectors vectors,
                                     int row) {
    const int64_t i = vector_of(row);
    const bool there = i < call.num_vectors;
    const void* z = row_of_z(call, there ? i : 0);
    auto value = [&](int j) { return load_value(z, call.z_type, j * call.dim_stride); };
    uint32_t largest = 0;
    if (there) {
      for (int j = 0; j < call.dim; ++j) largest = max(largest, magnitude(value(j)));
    }
    const bool finite = largest < kInfinity;
    const bool valid = there && finite && call.invalid[1] < 0;
    const int code_scale = kVqExponent - codes.summary->exponent;
    int scale = kVqExponent - exponent_of(valid ? largest : 0, -1000);
    if (!call.cosine) scale = min(scale, code_scale + 15);
    const float factor = call.cosine ? 1.0f : scalbnf(1.0f, max(scale - code_scale, -24));
    float square = 0;
    for (int j = 0; j < kDim; ++j) {
      const float x = valid && j < call.dim ? scalbnf(value(j), scale) : 0.0f;
      square = fmaf(x, x, square);
      ptx::store_shared(vectors.scaled + (row * kPitch + j) * 4, x);
    }
    const float longest = __uint_as_float(codes.summary->longest);
    float terms = sqrtf(square) * longest, measuring = 0;
    if (!call.cosine) {
      terms = fmaf(factor * longest, longest / 2, terms);
      measuring = float(call.dim + 4) * 0x1p-51f * scalbnf(square, code_scale - scale);
    }
    const float bound = (20 * kSteps + 16) * kVqUnit * terms + measuring;
    ptx::store_shared(vectors.factor + row * 4, factor);
    ptx::store_shared(vectors.margin + row * 4, valid ? 2 * bound : -1.0f);
    if (there && !valid && blockIdx.y == 0) {
      call.indices[i] = 0;
      if (call.distance) call.distance[i] = NAN;
      if (!finite) {
        atomicMin(reinterpret_cast<unsigned long long*>(call.invalid),
                  static_cast<unsigned long long>(i));
      }
    }
  }

  T2I_DEVICE static int64_t vector_of(int row) { return int64_t(blockIdx.x) * kVectors + row; }

  T2I_DEVICE static void write(const VqNearest& call, int row, const Nearest& nearest) {
    const int64_t i = vector_of(row);
    call.indices[i] = nearest.code;
    if (call.distance) call.distance[i] = float(nearest.distance);
    if (call.counts) {
      atomicAdd(reinterpret_cast<unsigned long long*>(call.counts + nearest.code), 1ull);
    }
  }

  // The operands of this warp's vectors.
  T2I_DEVICE static void pack_vectors(Operands& a, Vectors vectors) {
    auto slot = [&](int row, int i) -> uint32_t {
      float x = 0;
      if (i < 3 * kDim + 3) x = i < 3 * kDim ? vectors.at(row, i % kDim) : vectors.factor_of(row);
      const uint32_t high = split(x);
      return i / kDim == 2 ? split(x) : high;
    };
    T2I_UNROLL for (int step = 0; step < kSteps; ++step) {
      T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
        T2I_UNROLL for (int i = 0; i < 4; ++i) {
          const int row = row_of(2 * m + i % 2);
          const int first = step * 16 + i / 2 * 8 + int(threadIdx.x) % 4 * 2;
          a[step][m][i] = slot(row, first) | slot(row, first + 1) << 16;
        }
      }
    }
  }

  // Scores a block of codes whose operands are at ``codes``.
  T2I_DEVICE static void score_block(Best& best, const Operands& a, uint32_t codes, int block) {
    float most[kRows];
    T2I_UNROLL for (int r = 0; r < kRows; ++r) most[r] = -INFINITY;
#pragma unroll 2  // more than that takes registers, and wins nothing
    for (int pair = 0; pair < Codes::kBlock / 16; ++pair) {
      float scores[kBlocks][2][4];
      T2I_UNROLL for (int step = 0; step < kSteps; ++step) {
        const uint4 b = ptx::load_shared_16(codes + (pair * kSteps + step) * kWarp * 16);
        T2I_UNROLL for (int m = 0; m < kBlocks; ++m) {
          constexpr float kZeros[4] = {};
          if (step == 0) {
            ptx::mma<ptx::Fp16>(scores[m][0], a[step][m], b.x, b.y, kZeros);
            ptx::mma<ptx::Fp16>(scores[m][1], a[step][m], b.z, b.w, kZeros);
          } else {
            ptx::mma<ptx::Fp16>(scores[m][0], a[step][m], b.x, b.y, scores[m][0]);
            ptx::mma<ptx::Fp16>(scores[m][1], a[step][m], b.z, b.w, scores[m][1]);
          }
        }
      }
      T2I_UNROLL for (int r = 0; r < kRows; ++r) {
        T2I_UNROLL for (int half = 0; half < 2; ++half) {
          const float* two = &scores[r / 2][half][r % 2 * 2];
          most[r] = fmaxf(most[r], fmaxf(two[0], two[1]));
        }
      }
    }
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      best.other[r] = fmaxf(best.other[r], fminf(best.score[r], most[r]));
      best.block[r] = most[r] > best.score[r] ? block : best.block[r];
      best.score[r] = fmaxf(best.score[r], most[r]);
    }
  }

  // In fp32.
  T2I_DEVICE static float score(const Codes& codes, Vectors vectors, int row, int code) {
    float sum = -vectors.factor_of(row) * codes.half_square[code];
#pragma unroll 4
    for (int j = 0; j < kDim; j += 4) {
      const uint4 c = ptx::load_global_16(codes.scaled + int64_t(code) * kDim + j);
      const uint4 z = ptx::load_shared_16(vectors.scaled + (row * kPitch + j) * 4);
      sum = fmaf(__uint_as_float(z.x), __uint_as_float(c.x), sum);
      sum = fmaf(__uint_as_float(z.y), __uint_as_float(c.y), sum);
      sum = fmaf(__uint_as_float(z.z), __uint_as_float(c.z), sum);
      sum = fmaf(__uint_as_float(z.w), __uint_as_float(c.w), sum);
    }
    return sum;
  }

  // The distance of the given values, in fp64.
  T2I_DEVICE static double measure(const VqNearest& call, int row, int code) {
    const void* z = row_of_z(call, vector_of(row));
    double a_length = 1, b_length = 1;
    if (call.cosine) {
      double a_square = 0, b_square = 0;
      for (int j = 0; j < call.dim; ++j) {
        const double a = load_value(z, call.z_type, j * call.dim_stride);
        const double b = load_code(call, code, j);
        a_square = fma(a, a, a_square);
        b_square = fma(b, b, b_square);
      }
      if (a_square == 0 || b_square == 0) return 2;
      a_length = sqrt(a_square);
      b_length = sqrt(b_square);
    }
    double sum = 0;
    for (int j = 0; j < call.dim; ++j) {
      double a = load_value(z, call.z_type, j * call.dim_stride), b = load_code(call, code, j);
      if (call.cosine) {
        a /= a_length;
        b /= b_length;
      }
      sum = fma(a - b, a - b, sum);
    }
    return sum;
  }

  // Calls use(code) for this lane's codes of a block that score at least ``least``.
  template <class Use>
  T2I_DEVICE static void for_candidates(const VqNearest& call, const Codes& codes, Vectors vectors,
                                        int row, int block, float least, Use use) {
    const int first = block * Codes::kBlock + int(threadIdx.x) % 4 * 2;
    for (int i = 0; i < Codes::kBlock / 4; ++i) {
      const int code = first + i / 2 * 8 + i % 2;
      if (code < call.num_codes && score(codes, vectors, row, code) >= least) use(code);
    }
  }

  // The nearest of codes begin, begin + 1, … end - 1, by a whole warp.
  T2I_DEVICE static Nearest search_all(const VqNearest& call, const Codes& codes, Vectors vectors,
                                       int row, float least, int begin, int end) {
    constexpr int kAtOnce = kDim <= 16 ? 4 : 1;
    Nearest nearest;
    for (int first = begin + threadIdx.x % kWarp; first < end; first += kAtOnce * kWarp) {
      float scores[kAtOnce];
      T2I_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        scores[i] = score(codes, vectors, row, min(first + i * kWarp, end - 1));
      }
      T2I_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        const int code = first + i * kWarp;
        if (code < end && scores[i] >= least) nearest.take({measure(call, row, code), code});
      }
    }
    nearest.reduce(kWarp);
    return nearest;
  }

  // Turns what lanes have of a row each, four lanes of the same, into the nearest of codes begin,
  // begin + 1, … end - 1.
  T2I_DEVICE static void finish(const VqNearest& call, const VqSplits& splits, const Codes& codes,
                                Vectors vectors, int row, float score, float other, int block,
                                int begin, int end) {
    const int lane = threadIdx.x % kWarp;
    const float margin = vectors.margin_of(row);
    float least = fmaxf(score, __shfl_xor_sync(kAllLanes, score, 1));
    least = fmaxf(least, __shfl_xor_sync(kAllLanes, least, 2)) - margin;
    const bool wanted = margin >= 0, whole = gridDim.y == 1;
    int candidates = 0, last = 0;
    if (wanted && score >= least) {
      for_candidates(call, codes, vectors, row, block, least, [&](int code) {
        ++candidates;
        last = code;
      });
    }
    int in_row = candidates + __shfl_xor_sync(kAllLanes, candidates, 1);
    in_row += __shfl_xor_sync(kAllLanes, in_row, 2);
    uint32_t unsure = __ballot_sync(kAllLanes, wanted && other >= least);
    const uint32_t lanes_of_row = 0xfu << lane / 4 * 4;

    Nearest nearest;
    if (candidates > 0 && !(unsure & lanes_of_row)) {
      if (in_row == 1 && !call.distance && whole) {
        nearest = {0, last};
      } else if (candidates == 1) {
        nearest = {measure(call, row, last), last};
      } else {
        for_candidates(call, codes, vectors, row, block, least, [&](int code) {
          nearest.take({measure(call, row, code), code});
        });
      }
    }
    while (unsure) {
      const int lane_of_row = __ffs(unsure) - 1;
      const Nearest found =
          search_all(call, codes, vectors, __shfl_sync(kAllLanes, row, lane_of_row),
                     __shfl_sync(kAllLanes, least, lane_of_row), begin, end);
      if (lane / 4 == lane_of_row / 4) nearest = found;
      unsure &= ~(0xfu << lane_of_row / 4 * 4);
    }
    nearest.reduce(4);
    if (!wanted || lane % 4 != 0) return;
    if (whole) {
      write(call, row, nearest);
    } else {
      splits.nearest[blockIdx.y * call.num_vectors + vector_of(row)] = {nearest.distance,
                                                                        nearest.code};
    }
  }

  // The nearest of what all splits found, by the last of them.
  T2I_DEVICE static void combine(const VqNearest& call, const VqSplits& splits, Vectors vectors,
                                 uint32_t is_last) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      const uint32_t before = atomicAdd(splits.done + blockIdx.x, 1u);
      __threadfence();
      ptx::store_shared(is_last, uint32_t(before == gridDim.y - 1));
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (!ptx::load_shared(is_last) || row >= kVectors || vectors.margin_of(row) < 0) return;
    Nearest nearest;
    for (int split = 0; split < int(gridDim.y); ++split) {
      const VqSplits::Nearest& found = splits.nearest[split * call.num_vectors + vector_of(row)];
      nearest.take({found.distance, int(found.code)});
    }
    write(call, row, nearest);
  }

  T2I_DEVICE static void run(const VqNearest& call, const VqSplits& splits) {
    ptx::SharedArrays shared;
    const uint32_t stages = shared.take(kStages * kTileBytes);
    const uint32_t scaled = shared.take(kVectors * kPitch * 4);
    const uint32_t factors = shared.take(2 * kVectors * 4 + 4);
    const Vectors vectors = {scaled, factors, factors + kVectors * 4};
    const Codes codes = Codes::in(call.workspace, call.num_codes);
    const int64_t all_tiles = Codes::padded(call.num_codes) / Codes::kTile;
    const int first_tile = int(all_tiles * blockIdx.y / gridDim.y);
    const int tiles = int(all_tiles * (blockIdx.y + 1) / gridDim.y) - first_tile;

    const uint32_t to = stages + threadIdx.x * 16;
    const char* from = reinterpret_cast<const char*>(codes.packed) +
                       int64_t(first_tile) * kTileBytes + threadIdx.x * 16;
    T2I_UNROLL for (int tile = 0; tile < kStages - 1; ++tile, from += kTileBytes) {
      if (tile < tiles) load_codes(to + tile * kTileBytes, from);
      ptx::copy_async_commit();
    }
    if (threadIdx.x < kVectors) load_vector(call, codes, vectors, threadIdx.x);
    __syncthreads();
    Operands a;
    pack_vectors(a, vectors);
    Best best;
    T2I_UNROLL for (int r = 0; r < kRows; ++r) {
      best.score[r] = best.other[r] = -INFINITY;
      best.block[r] = 0;
    }

    const uint32_t operands = stages + threadIdx.x % kWarp * 16;
    uint32_t reading = 0, writing = (kStages - 1) * kTileBytes;
    auto next = [](uint32_t stage) {
      return stage == (kStages - 1) * kTileBytes ? 0 : stage + kTileBytes;
    };
    for (int tile = 0; tile < tiles; ++tile, from += kTileBytes) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();  // this tile is there, and all have done with the one before
      if (tile + kStages - 1 < tiles) load_codes(to + writing, from);
      ptx::copy_async_commit();
      constexpr int kBlocksOfTile = Codes::kTile / Codes::kBlock;
      T2I_UNROLL for (int i = 0; i < kBlocksOfTile; ++i) {
        score_block(best, a, operands + reading + i * (kTileBytes / kBlocksOfTile),
                    (first_tile + tile) * kBlocksOfTile + i);
      }
      reading = next(reading);
      writing = next(writing);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();

    best.store(stages);
    const int begin = first_tile * Codes::kTile;
    const int end = min(begin + tiles * Codes::kTile, call.num_codes);
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      finish(call, splits, codes, vectors, row_of(r),
             ptx::load_shared_float(Best::at(stages, r, 0)),
             ptx::load_shared_float(Best::at(stages, r, 1)),
             int(ptx::load_shared(Best::at(stages, r, 2))), begin, end);
    }
    if (gridDim.y > 1) combine(call, splits, vectors, factors + 2 * kVectors * 4);
  }
};

// grid: (blocks of vectors, splits)
template <int kDim>
__global__ void __launch_bounds__(VqSearch<kDim>::kThreads, kDim <= 8 ? 5 : kDim <= 16 ? 4 : 2)
    vq_search_kernel(const __grid_constant__ VqNearest call, const VqSplits splits) {
  VqSearch<kDim>::run(call, splits);
}

}  // namespace t2i::cuda
