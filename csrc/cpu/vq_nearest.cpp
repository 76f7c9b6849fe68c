// See vq_nearest.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY (no std:: containers, no statics), or the linker could keep an AVX-512
// copy of it for every machine.
#include "cpu/vq_nearest.h"

#include <cmath>

#include "cpu/vec.h"
#if defined(CPU_CAPABILITY_AMX)
#include "cpu/vq_coarse.h"
#endif

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

#if !defined(CPU_CAPABILITY_AMX)
// Without AMX there is no first pass in bf16.
constexpr int64_t coarse_depth(int64_t) { return 0; }
constexpr double coarse_epsilon(int64_t) { return 0; }
inline void pack_coarse(const float*, int64_t, uint16_t*) {}
inline void load_coarse(const float*, int64_t, uint32_t*) {}
inline void score_coarse(const VqCodebook&, int64_t, int64_t, const uint32_t*, const float*,
                         const float*, float*, float*) {}
#endif

// The scores held in registers: of up to kMaxVecs vectors of queries, one query a lane, by a few
// codes, whose coordinates are broadcast.
#if defined(CPU_CAPABILITY_AMX)
constexpr int kMaxVecs = 2, kCodes = 8;  // as many as two tiles of AMX have columns
#elif defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kMaxVecs = 3, kCodes = 8;  // 24 of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kMaxVecs = 3, kCodes = 4;  // 12 of 16
#else
constexpr int kMaxVecs = 1, kCodes = 4;  // no intrinsics here, and two SSE registers a vector
#endif
constexpr int64_t kTileQueries = kMaxVecs * kLanes;
constexpr int64_t kTiles = 192 / kTileQueries;  // that share what is loaded of the codebook
constexpr int64_t kShared = 1 << 16;            // values of it: half of a small second cache
constexpr int64_t kDepth = 128;                 // dimensions at a time: the first cache holds a tile
constexpr int64_t kPanel = 512;                 // blocks whose minima are kept at a time
constexpr int64_t kCoarseMeasured = 16;  // a first pass pays if it leaves one block of these

static_assert(kBlock % kLanes == 0 && kBlock % kCodes == 0 && kWide % kLanes == 0);

// ---- Points ------------------------------------------------------------------------------------

// The sum of term(j) for j below count, in an order that vectors of any length may take.
template <typename Term>
inline __attribute__((always_inline)) double sum_of(int64_t count, Term term) {
  double sums[8] = {}, sum = 0;
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) sums[i] += term(j + i);
  }
  for (; j < count; ++j) sum += term(j);
  for (int64_t half = 4; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sum + sums[0];
}

double norm(const float* x, int64_t dim) {
  return std::sqrt(sum_of(dim, [&](int64_t j) { return double(x[j]) * x[j]; }));
}

// x is its point times this. fp64 holds the squares of all fp32 values, subnormal or huge.
double divisor(const float* x, int64_t dim, Metric metric) {
  if (metric == Metric::l2) return 1;
  const double length = norm(x, dim);
  return length > 0 ? length : 1;
}

bool is_zero(const float* x, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) {
    if (x[j] != 0) return false;
  }
  return true;
}

// The largest magnitude as bits, which order as the values do; NaN and inf are above all others.
uint32_t max_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

bool is_finite(const float* x, int64_t count) { return max_magnitude(x, count) < 0x7f800000u; }

// The exact distance, as fp64 has it: squared l2 between the points, or 2 from the zero vector by
// cosine.
inline double distance_to_code(const VqCodebook& codebook, int64_t dim, const double* point,
                               int64_t k) {
  const float* code = codebook.codes + k * dim;
  if (codebook.metric == Metric::l2) {
    return sum_of(dim, [&](int64_t j) { return (point[j] - code[j]) * (point[j] - code[j]); });
  }
  if (is_zero(code, dim)) return 2;
  const double length = norm(code, dim);
  return sum_of(dim, [&](int64_t j) {
    const double difference = point[j] - code[j] / length;
    return difference * difference;
  });
}

// ---- The codebook ------------------------------------------------------------------------------

// The code at a place of the packed codebook, or -1.
int64_t code_at(const VqCodebook& codebook, int64_t place) {
  if (codebook.order) return codebook.order[place];
  return place < codebook.num_codes ? place : -1;
}

int64_t center(VqCodebook& codebook) {
  const int64_t dim = codebook.dim;
  const uint32_t largest_bits = max_magnitude(codebook.codes, codebook.num_codes * dim);
  if (largest_bits >= 0x7f800000u) {
    for (int64_t k = 0;; ++k) {
      if (!is_finite(codebook.codes + k * dim, dim)) return k;
    }
  }
  double* __restrict mean = codebook.center;
  for (int64_t j = 0; j < dim; ++j) mean[j] = 0;
  for (int64_t k = 0; k < codebook.num_codes; ++k) {
    const float* code = codebook.codes + k * dim;
    const double inverse = 1 / divisor(code, dim, codebook.metric);
    for (int64_t j = 0; j < dim; ++j) mean[j] += code[j] * inverse;
  }
  for (int64_t j = 0; j < dim; ++j) mean[j] /= double(codebook.num_codes);

  // Coordinates of centred codes end below 2^31: their squares are far from overflow, and even
  // where all codes differ in the last bit only, their differences are far from underflow.
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (codebook.metric == Metric::cosine) largest = 1;
  codebook.scale = largest > 0 ? std::ldexp(1.0, 29 - std::ilogb(double(largest))) : 1;
  return -1;
}

// gamma_n of the header with n = d + 16: d + 1 for the sum, 1 for half_norm, 2 for z and c, 3 for
// upper = lowest + E, 3 for score - E, and some to spare for second-order terms and for |z| and C,
// which are rounded up.
double error_gamma(int64_t dim) {
  const double nu = double(dim + 16) * 0x1p-24;
  return nu < 0.25 ? nu / (1 - nu) : std::numeric_limits<double>::infinity();
}

// The fp64 distance that decides is off by at most this times the squares of both lengths, in units
// of scores: whatever it may find to be nearest has to be measured, so that the answer does not
// depend on how codes are packed.
double measure_gamma(int64_t dim) { return double(dim + 4) * 0x1p-51; }

float above(double x) { return float(x * (1 + 0x1p-20)); }

void pack(const VqCodebook& codebook, int64_t begin, int64_t end, double* point) {
  const int64_t dim = codebook.dim;
  const double scale = codebook.scale;
  const double gamma = error_gamma(dim);
  // Points on the unit sphere are themselves rounded, to fp64.
  const double unit_error =
      codebook.metric == Metric::cosine ? double(dim + 8) * 0x1p-53 * scale : 0;

  for (int64_t b = begin; b < end; ++b) {
    double largest = 0;  // C^2
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const int64_t k = code_at(codebook, b * kBlock + lane);
      float* packed = codebook.packed + b * dim * kBlock + lane;
      if (k < 0) {
        for (int64_t j = 0; j < dim; ++j) packed[j * kBlock] = 0;
        codebook.half_norm[b * kBlock + lane] = kInf;
        continue;
      }
      const float* code = codebook.codes + k * dim;
      const bool whole = codebook.metric == Metric::l2;
      const double length = divisor(code, dim, codebook.metric);
      for (int64_t j = 0; j < dim; ++j) {
        point[j] = ((whole ? double(code[j]) : code[j] / length) - codebook.center[j]) * scale;
      }
      for (int64_t j = 0; j < dim; ++j) packed[j * kBlock] = -float(point[j]);
      double norm2 = sum_of(dim, [&](int64_t j) { return point[j] * point[j]; });
      // cos = 0 is the score of a point at right angles, which is as long as the others.
      if (codebook.metric == Metric::cosine && is_zero(code, dim)) norm2 += scale * scale;
      codebook.half_norm[b * kBlock + lane] = float(norm2 / 2);
      largest = norm2 > largest ? norm2 : largest;
    }
    if (gamma < 1) {
      const double radius = std::sqrt(largest);
      // The constants are for underflow, at most 2^-126 |z_i| a product: |z_i| <= 2^60, see below.
      codebook.error_base[b] =
          above((gamma / 2 + measure_gamma(dim)) * largest + 2 * unit_error * radius +
                   double(dim + 1) * 0x1p-60);
      codebook.error_slope[b] = above(gamma * radius + unit_error + 0x1p-100);
    } else {  // every code is measured; still finite, so that -inf stays below all
      codebook.error_base[b] = 0x1p126f;
      codebook.error_slope[b] = 1;
    }
    if (codebook.coarse) {  // 1.02: the terms of a rounded product may be that much larger
      const double radius = std::sqrt(largest), terms = error_gamma(coarse_depth(dim)) * 1.02;
      codebook.coarse_base[b] = above(codebook.error_base[b] + terms * largest);
      codebook.coarse_slope[b] =
          above(codebook.error_slope[b] + (terms + coarse_epsilon(dim)) * radius);
      pack_coarse(codebook.packed + b * dim * kBlock, dim,
                  codebook.coarse + b * coarse_depth(dim) * kBlock);
    }
  }
}

// ---- The search --------------------------------------------------------------------------------

// The nearest code that was measured.
struct Nearest {
  double distance = std::numeric_limits<double>::infinity();
  int64_t code = 0;
};

// A vector to search for.
struct Query {
  float norm = 0;       // when scaled; inf: nothing can be said about its scores
  float slack = 0;      // measure_gamma times its square
  float upper = -kInf;  // bound on the best true score; -inf: there is nothing to search for
  Nearest nearest;
  bool finite = true;
};

// Writes its point and, scaled, x: 0 where there is nothing to search for.
inline __attribute__((always_inline)) Query load_query(const VqCodebook& codebook, int64_t dim,
                                                       const float* row, double* point,
                                                       float* x) {
  Query query;
  for (int64_t j = 0; j < dim; ++j) x[j] = 0;
  query.finite = is_finite(row, dim);
  if (!query.finite) return query;
  double length = 1;
  if (codebook.metric == Metric::cosine) {
    if (is_zero(row, dim)) {
      query.nearest.distance = 2;  // from every code
      return query;
    }
    length = norm(row, dim);
  }
  query.upper = kInf;
  const bool whole = codebook.metric == Metric::l2;
  for (int64_t j = 0; j < dim; ++j) point[j] = whole ? double(row[j]) : row[j] / length;
  const double norm2 = sum_of(dim, [&](int64_t j) {
    const double scaled = (point[j] - codebook.center[j]) * codebook.scale;
    x[j] = float(scaled);
    return scaled * scaled;
  });
  if (norm2 <= 0x1p120) {
    query.norm = above(std::sqrt(norm2));
    query.slack = above(measure_gamma(dim) * norm2);
  } else {  // 2^29 times farther away than the codebook is wide: scores could overflow
    query.norm = kInf;
    for (int64_t j = 0; j < dim; ++j) x[j] = 0;
  }
  return query;
}

// Measures the code at a place; whether it is the nearest so far. The lowest index keeps a tie.
inline bool measure_code(const VqCodebook& codebook, int64_t dim, int64_t place,
                         const double* point, Nearest& nearest) {
  const int64_t k = code_at(codebook, place);
  if (k < 0) return false;
  const double distance = distance_to_code(codebook, dim, point, k);
  const bool nearer = distance < nearest.distance ||
                      (distance == nearest.distance && k < nearest.code);
  if (nearer) nearest = {distance, k};
  return nearer;
}

// Bits of the lanes where a <= b; the least of all lanes, where none is NaN; and list[0 ...] = first
// + each of the bits, whose number is returned. AVX-512 has instructions for them, which may write
// kLanes elements.
#if defined(CPU_CAPABILITY_AVX512)
inline unsigned lanes_le(const Vec& a, const Vec& b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
inline float least_of(const Vec& x) { return _mm512_reduce_min_ps(x); }
inline int64_t append(int32_t* list, int64_t first, unsigned bits) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first)));
  _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(__mmask16(bits), numbers));
  return __builtin_popcount(bits);
}
#else
inline unsigned lanes_le(const Vec& a, const Vec& b) {
  return ~unsigned((a <= b).zero_mask()) & unsigned((uint64_t(1) << kLanes) - 1);
}
inline float least_of(const Vec& x) {
  float lanes[kLanes];
  x.store(lanes);
  float least = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) least = lanes[i] < least ? lanes[i] : least;
  return least;
}
inline int64_t append(int32_t* list, int64_t first, unsigned bits) {
  int64_t count = 0;
  for (; bits; bits &= bits - 1) list[count++] = int32_t(first + __builtin_ctz(bits));
  return count;
}
#endif

// ---- All codes ---------------------------------------------------------------------------------

// Up to kTileQueries queries; width is their number rounded up to lanes.
struct Tile {
  double* points;  // [width, dim]
  float* queries;    // [dim, width], scaled
  float* minima;     // [kPanel, width]
  uint32_t* coarse;  // for score_coarse
  int64_t width;
  Nearest nearest[kTileQueries];
  float norms[kTileQueries], slack[kTileQueries], upper[kTileQueries];  // of queries
};

// Loads the vectors [first, first + count) of z. Returns the first that holds NaN or inf, or -1.
// scratch: [kLanes, dim].
int64_t load_queries(const VqCodebook& codebook, const float* z, int64_t first, int64_t count,
                     bool coarse, Tile& tile, float* scratch) {
  const int64_t dim = codebook.dim;
  int64_t bad = -1;
  for (int64_t q = 0; q < tile.width; ++q) {
    float* x = scratch + q % kLanes * dim;
    Query query;
    if (q < count) {
      query = load_query(codebook, dim, z + (first + q) * dim, tile.points + q * dim, x);
      if (!query.finite && bad < 0) bad = first + q;
    } else {
      for (int64_t j = 0; j < dim; ++j) x[j] = 0;
    }
    tile.nearest[q] = query.nearest;
    tile.norms[q] = query.norm;
    tile.slack[q] = query.slack;
    tile.upper[q] = query.upper;
    if (q % kLanes == kLanes - 1) {
      const int64_t group = q + 1 - kLanes;
      transpose(scratch, dim, kLanes, dim, 1, tile.queries + group, tile.width);
      if (coarse) load_coarse(scratch, dim, tile.coarse + group * coarse_depth(dim) / 2);
    }
  }
  return bad;
}

// Scores the queries of R vectors against blocks [begin, end): lowers upper and writes minima.
// partial, [end - begin, kBlock, width], is for scores over the first dimensions.
template <int R>
void score_blocks(const VqCodebook& codebook, int64_t begin, int64_t end, Tile& tile,
                  float* minima, float* partial) {
  const int64_t dim = codebook.dim;
  constexpr int64_t width = R * kLanes;
  Vec norms[R], slack[R], upper[R];
  for (int r = 0; r < R; ++r) {
    norms[r] = Vec::loadu(tile.norms + r * kLanes);
    slack[r] = Vec::loadu(tile.slack + r * kLanes);
    upper[r] = Vec::loadu(tile.upper + r * kLanes);
  }
  for (int64_t depth = 0; depth < max_of(dim, 1); depth += kDepth) {
    const int64_t depth_end = min_of(depth + kDepth, dim);
    float* sums = partial;
    for (int64_t b = begin; b < end; ++b) {
      Vec lowest[R];
      for (int r = 0; r < R; ++r) lowest[r] = Vec(kInf);
      for (int64_t c = 0; c < kBlock; c += kCodes, sums += kCodes * width) {
        const float* half_norm = codebook.half_norm + b * kBlock + c;
        const float* codes = codebook.packed + (b * dim + depth) * kBlock + c;
        const float* queries = tile.queries + depth * width;
        Vec score[kCodes][R];
        for (int k = 0; k < kCodes; ++k) {
          for (int r = 0; r < R; ++r) {
            score[k][r] = depth == 0 ? Vec(half_norm[k])
                                     : Vec::loadu(sums + k * width + r * kLanes);
          }
        }
        for (int64_t j = depth; j < depth_end; ++j, codes += kBlock, queries += width) {
          Vec query[R];
          for (int r = 0; r < R; ++r) {
            query[r] = Vec::loadu(queries + r * kLanes);
            if (r + 1 < R) hold(query[r]);  // there is no register for the last one
          }
          for (int k = 0; k < kCodes; ++k) {
            const Vec code(codes[k]);
            for (int r = 0; r < R; ++r) score[k][r] = at::vec::fmadd(code, query[r], score[k][r]);
          }
        }
        for (int k = 0; k < kCodes; ++k) {
          for (int r = 0; r < R; ++r) {
            if (depth_end < dim) {
              score[k][r].store(sums + k * width + r * kLanes);
            } else {
              // One instruction, unlike at::vec::minimum, which also looks for NaN: there is none.
              lowest[r] = at::vec::clamp_max(score[k][r], lowest[r]);
            }
          }
        }
      }
      if (depth_end < dim) continue;
      const Vec base(codebook.error_base[b]), slope(codebook.error_slope[b]);
      for (int r = 0; r < R; ++r) {
        lowest[r].store(minima + (b - begin) * width + r * kLanes);
        const Vec error = at::vec::fmadd(norms[r], slope, base) + slack[r];
        upper[r] = at::vec::clamp_max(lowest[r] + error, upper[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) upper[r].store(tile.upper + r * kLanes);
}

// Measures the codes of block b that may be the nearest of query q, whose upper their scores may
// lower.
__attribute__((noinline)) void measure_block(const VqCodebook& codebook, int64_t b, int64_t q,
                                             Tile& tile) {
  constexpr int kVecs = kBlock / kLanes;
  constexpr int kSums = kVecs < 4 ? 4 / kVecs : 1;  // a code, of every kSums'th dimension
  const int64_t dim = codebook.dim, width = tile.width;
  Vec sums[kSums][kVecs], score[kVecs];
  for (int i = 0; i < kVecs; ++i) {
    for (int s = 0; s < kSums; ++s) sums[s][i] = Vec(0.f);
    score[i] = Vec::loadu(codebook.half_norm + b * kBlock + i * kLanes);
  }
  const float *codes = codebook.packed + b * kBlock * dim, *x = tile.queries + q;
  const auto add = [&](int64_t j, int s) __attribute__((always_inline)) {
    const Vec query(x[j * width]);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      sums[s][i] = at::vec::fmadd(Vec::loadu(codes + j * kBlock + i * kLanes), query, sums[s][i]);
    }
  };
  int64_t j = 0;
  for (; j + kSums <= dim; j += kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add(j + s, s);
  }
  for (; j < dim; ++j) add(j, 0);
  for (int i = 0; i < kVecs; ++i) {
    for (int s = 0; s < kSums; ++s) score[i] = score[i] + sums[s][i];
  }
  const float error =
      codebook.error_base[b] + tile.norms[q] * codebook.error_slope[b] + tile.slack[q];
  for (int i = 0; i < kVecs; ++i) {
    const float bound = least_of(score[i]) + error;
    tile.upper[q] = bound < tile.upper[q] ? bound : tile.upper[q];
  }
  for (int i = 0; i < kVecs; ++i) {
    unsigned lanes = lanes_le(score[i] - Vec(error), Vec(tile.upper[q]));
    for (; lanes; lanes &= lanes - 1) {
      const int64_t place = b * kBlock + i * kLanes + __builtin_ctz(lanes);
      measure_code(codebook, dim, place, tile.points + q * dim, tile.nearest[q]);
    }
  }
}

// Measures what the blocks [begin, end), whose minima are there, may hold. Returns how many that
// were.
int64_t measure_blocks(const VqCodebook& codebook, bool coarse, int64_t begin, int64_t end,
                       Tile& tile) {
  const float* bases = coarse ? codebook.coarse_base : codebook.error_base;
  const float* slopes = coarse ? codebook.coarse_slope : codebook.error_slope;
  int64_t measured = 0;
  for (int64_t first = 0; first < tile.width; first += kLanes) {
    const Vec norms = Vec::loadu(tile.norms + first);
    const Vec slack = Vec::loadu(tile.slack + first);
    for (int64_t b = begin; b < end; ++b) {
      const Vec error = at::vec::fmadd(norms, Vec(slopes[b]), Vec(bases[b])) + slack;
      const Vec upper = Vec::loadu(tile.upper + first);
      const Vec lowest = Vec::loadu(tile.minima + (b - begin) * tile.width + first);
      for (unsigned lanes = lanes_le(lowest - error, upper); lanes; lanes &= lanes - 1) {
        measure_block(codebook, b, first + __builtin_ctz(lanes), tile);
        ++measured;
      }
    }
  }
  return measured;
}

// In doubles, of a tile.
int64_t tile_workspace(int64_t dim) {
  return kTileQueries * dim +
         kTileQueries * (2 * dim + 2 * kPanel + coarse_depth(dim)) / 4;
}

void place_tile(int64_t dim, double* workspace, Tile& tile) {
  tile.points = workspace;
  tile.queries = reinterpret_cast<float*>(workspace + kTileQueries * dim);
  tile.minima = tile.queries + kTileQueries * dim;
  tile.coarse = reinterpret_cast<uint32_t*>(tile.minima + kTileQueries * kPanel);
}

int64_t shared_blocks(const VqCodebook& codebook) {
  return max_of(kShared / (kBlock * max_of(codebook.dim, 1)) / 2, 1) * 2;  // AMX takes pairs
}

int64_t search_workspace(const VqCodebook& codebook) {
  const bool deep = codebook.dim > kDepth;
  const int64_t partial = deep ? shared_blocks(codebook) * kBlock * kTileQueries : 0;
  return kTiles * tile_workspace(codebook.dim) + (kLanes * codebook.dim + partial) / 2;
}

int64_t search(const VqCodebook& codebook, const float* z, int64_t n, int64_t begin, int64_t end,
               int64_t* indices, float* distance, double* workspace) {
  const int64_t dim = codebook.dim, stop = min_of(end * kQueries, n);
  const int64_t step = shared_blocks(codebook);
  int64_t bad = -1;
  Tile tiles[kTiles];
  for (int64_t t = 0; t < kTiles; ++t) {
    place_tile(dim, workspace + t * tile_workspace(dim), tiles[t]);
  }
  float* scratch = reinterpret_cast<float*>(workspace + kTiles * tile_workspace(dim));
  float* partial = scratch + kLanes * dim;
  bool coarse = coarse_depth(dim) > 0 && codebook.coarse;
  for (int64_t first = begin * kQueries, count; first < stop; first += count) {
    // The first tile tells whether a first pass pays.
    const bool trial = coarse && first == begin * kQueries;
    count = min_of(stop - first, trial ? kTileQueries : kTiles * kTileQueries);
    int64_t measured = 0;
    const int64_t num_tiles = (count + kTileQueries - 1) / kTileQueries;
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t here = min_of(count - t * kTileQueries, kTileQueries);
      tiles[t].width = coarse ? kTileQueries : round_up(here, kLanes);
      const int64_t bad_here =
          load_queries(codebook, z, first + t * kTileQueries, here, coarse, tiles[t], scratch);
      if (bad < 0) bad = bad_here;
    }
    for (int64_t panel = 0; panel < codebook.num_blocks; panel += kPanel) {
      const int64_t panel_end = min_of(panel + kPanel, codebook.num_blocks);
      for (int64_t b = panel; b < panel_end; b += step) {
        const int64_t b_end = min_of(b + step, panel_end);
        for (int64_t t = 0; t < num_tiles; ++t) {
          Tile& tile = tiles[t];
          float* minima = tile.minima + (b - panel) * tile.width;
          if (coarse) {
            score_coarse(codebook, b, b_end, tile.coarse, tile.norms, tile.slack, tile.upper,
                         minima);
            continue;
          }
          with_vecs<kMaxVecs>(tile.width / kLanes, [&](auto R) {
            score_blocks<R>(codebook, b, b_end, tile, minima, partial);
          });
        }
      }
      for (int64_t t = 0; t < num_tiles; ++t) {
        measured += measure_blocks(codebook, coarse, panel, panel_end, tiles[t]);
      }
    }
    for (int64_t q = 0; q < count; ++q) {
      const Nearest& nearest = tiles[q / kTileQueries].nearest[q % kTileQueries];
      indices[first + q] = nearest.code;
      if (distance) distance[first + q] = float(nearest.distance);
    }
    coarse = coarse && measured * kCoarseMeasured <= count * codebook.num_blocks;
  }
  return bad;
}

// ---- The tree ----------------------------------------------------------------------------------

void route(const VqCodebook& codebook, const VqTree& tree, const float* z, int64_t begin,
           int64_t end, int32_t* leaves) {
  const int64_t dim = codebook.dim;
  constexpr int64_t kGroup = 8;  // whose steps overlap
  float points[kGroup * kMaxTreeDim];
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t count = min_of(kGroup, end - first);
    int32_t node[kGroup] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* row = z + (first + i) * dim;
      const double inverse_length = 1 / divisor(row, dim, codebook.metric);
      for (int64_t j = 0; j < dim; ++j) {
        points[i * dim + j] = float((row[j] * inverse_length - codebook.center[j]) * codebook.scale);
      }
    }
    for (int64_t level = 0; level < tree.depth; ++level) {
      for (int64_t i = 0; i < count; ++i) {
        const bool right = points[i * dim + tree.axis[node[i]]] > tree.split[node[i]];
        node[i] = 2 * node[i] + 1 + right;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      leaves[first + i] = node[i] - int32_t((int64_t(1) << tree.depth) - 1);
    }
  }
}

// A bound on the squared distance of a query to its nearest code, against which its distances to
// boxes may be compared.
//
// |z - c|^2 = |z|^2 + 2 score. Points and queries are off by a rounding each, 2^-24 of their length,
// and a distance to a box by some more of itself; with delta for the sum of both lengths times
// 2^-23, (r + delta)^2 <= r^2 (1 + 2^-10) + delta^2 (1 + 2^10).
float radius2_of(const VqTree& tree, const Query& query) {
  const float lengths = query.norm + tree.radius;
  const float radius2 = query.norm * query.norm + 2 * query.upper;
  const float bound = radius2 * (1 + 0x1p-9f) + lengths * lengths * 0x1p-20f + 0x1p-60f;
  // A box that is no node's is at infinity.
  constexpr float kFar = std::numeric_limits<float>::max();
  return bound < kFar ? bound : kFar;
}

// The leaves that were scored, until it is known which of their codes to measure.
struct Scored {
  static constexpr int64_t kMost = 1024;
  int32_t* block;  // [kMost]
  float* scores;   // [kMost, kBlock]
  int64_t count = 0;
};

// D is the codebook's dim where that is known when compiled, else 0.
template <int D>
struct TreeSearch {
  const VqCodebook& codebook;
  const VqTree& tree;
  Scored scored;
  int32_t *groups, *next;  // [num_blocks] each
  int64_t total = 0;       // leaves scored

  // Of the vector that is searched for.
  Query query = {};
  double point[kMaxTreeDim];
  float x[kMaxTreeDim];

  int64_t dim() const { return D ? D : codebook.dim; }

  // The error of its scores in leaf b.
  float error(int64_t b) const {
    return codebook.error_base[b] + query.norm * codebook.error_slope[b] + query.slack;
  }

  // Scores the codes of a leaf; whether that lowered upper.
  bool score(int64_t b) {
    const float* codes = codebook.packed + b * dim() * kBlock;
    float* out = scored.scores + scored.count * kBlock;
    Vec lowest(kInf);
    for (int64_t c = 0; c < kBlock; c += kLanes) {
      Vec score = Vec::loadu(codebook.half_norm + b * kBlock + c);
      for (int64_t j = 0; j < dim(); ++j) {
        score = at::vec::fmadd(Vec::loadu(codes + j * kBlock + c), Vec(x[j]), score);
      }
      score.store(out + c);
      lowest = at::vec::clamp_max(score, lowest);
    }
    scored.block[scored.count++] = int32_t(b);
    const float bound = least_of(lowest) + error(b);
    if (!(bound < query.upper)) return false;
    query.upper = bound;
    return true;
  }

  // Measures what may be nearest among the codes scored. Returns the leaf of the best, or -1 if that
  // is from before.
  int64_t measure() {
    int64_t best = -1;
    for (int64_t i = 0; i < scored.count; ++i) {
      const int64_t b = scored.block[i];
      const Vec off(error(b));
      for (int64_t c = 0; c < kBlock; c += kLanes) {
        const Vec score = Vec::loadu(scored.scores + i * kBlock + c);
        unsigned lanes = lanes_le(score - off, Vec(query.upper));
        for (; lanes; lanes &= lanes - 1) {
          const int64_t place = b * kBlock + c + __builtin_ctz(lanes);
          if (measure_code(codebook, dim(), place, point, query.nearest)) best = b;
        }
      }
    }
    total += scored.count;
    scored.count = 0;
    return best;
  }

  // Squared distances of a point to kLanes boxes.
  Vec distance2(const float* group) const {
    Vec sum(0.f);
    for (int64_t j = 0; j < dim(); ++j) {
      const Vec at(x[j]);
      const Vec below = Vec::loadu(group + j * kWide) - at;
      const Vec above = at - Vec::loadu(group + (dim() + j) * kWide);
      const Vec gap = at::vec::clamp_min(at::vec::clamp_min(below, above), Vec(0.f));
      sum = at::vec::fmadd(gap, gap, sum);
    }
    return sum;
  }

  // Searches the leaves that the query may have its nearest code in: first the one that it falls
  // into and that where a neighbour found its own, which make the radius small. Returns the leaf of
  // the nearest code.
  int64_t search(int64_t home, int64_t neighbour) {
    score(home);
    if (neighbour >= 0 && neighbour != home) score(neighbour);
    float radius2 = radius2_of(tree, query);

    // Down to the groups of leaves, then leaf by leaf.
    int64_t best = -1, count = 1;
    groups[0] = 0;
    for (int64_t l = 0; l + 1 < tree.num_levels; ++l) {
      int64_t children = 0;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t lane = 0; lane < kWide; lane += kLanes) {
          const int64_t first = int64_t(groups[i]) * kWide;
          const Vec distances = distance2(tree.boxes[l] + first * 2 * dim() + lane);
          children += append(next + children, first + lane, lanes_le(distances, Vec(radius2)));
        }
      }
      count = children;
      int32_t* swap = groups;
      groups = next;
      next = swap;
    }
    const float* boxes = tree.boxes[tree.num_levels - 1];
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t lane = 0; lane < kWide; lane += kLanes) {
        const int64_t first = int64_t(groups[i]) * kWide;
        const Vec distances = distance2(boxes + first * 2 * dim() + lane);
        unsigned near = lanes_le(distances, Vec(radius2));
        while (near) {
          const int64_t leaf = first + lane + __builtin_ctz(near);
          near &= near - 1;
          if (leaf == home || leaf == neighbour) continue;
          if (score(leaf)) {
            radius2 = radius2_of(tree, query);
            near &= lanes_le(distances, Vec(radius2));
          }
          if (scored.count == Scored::kMost) {
            const int64_t better = measure();
            best = better >= 0 ? better : best;
          }
        }
      }
    }
    const int64_t better = measure();
    return better >= 0 ? better : best;
  }
};

// Of nodes, which append() may write past.
int64_t list_size(const VqCodebook& codebook) { return codebook.num_blocks + kWide; }

int64_t search_tree_workspace(const VqCodebook& codebook) {
  return (Scored::kMost * (kBlock + 1) + 2 * list_size(codebook)) / 2;
}

int64_t search_tree(const VqCodebook& codebook, const VqTree& tree, const float* z,
                    const int32_t* rows, const int32_t* leaves, int64_t begin, int64_t end,
                    int64_t* indices, float* distance, double* workspace, int64_t& scored) {
  int64_t bad = -1, neighbour = -1;
  float* scores = reinterpret_cast<float*>(workspace);
  int32_t* scored_blocks = reinterpret_cast<int32_t*>(scores + Scored::kMost * kBlock);
  int32_t* lists = scored_blocks + Scored::kMost;
  const auto run = [&](auto D) {
    TreeSearch<D> search = {codebook, tree, {scored_blocks, scores}, lists,
                            lists + list_size(codebook)};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = rows[i];
      search.query =
          load_query(codebook, search.dim(), z + n * search.dim(), search.point, search.x);
      if (!search.query.finite && (bad < 0 || n < bad)) bad = n;
      if (search.query.upper != -kInf) neighbour = search.search(leaves[i], neighbour);
      indices[n] = search.query.nearest.code;
      if (distance) distance[n] = float(search.query.nearest.distance);
    }
    scored += search.total * kBlock;
  };
  if (codebook.dim == 8) {
    run(std::integral_constant<int, 8>());
  } else if (codebook.dim == 4) {
    run(std::integral_constant<int, 4>());
  } else {
    run(std::integral_constant<int, 0>());
  }
  return bad;
}

}  // namespace

extern const VqKernels vq_kernels = {
    center, pack, search, search_workspace, route, search_tree, search_tree_workspace,
    coarse_depth,
#if defined(CPU_CAPABILITY_AMX)
    0.07, 20000
#elif defined(CPU_CAPABILITY_AVX512)
    0.1, 7000
#else
    0.13, 4000
#endif
};

}  // namespace t2i::cpu::CPU_CAPABILITY
