// See vq_nearest.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY (no std:: containers, no statics), or the linker could keep an AVX-512
// copy of it for every machine.
#include "cpu/vq_nearest.h"

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
// The scores held in registers: of kMaxVecs vectors of queries, one query a lane, by kCodes codes.
constexpr int kCodes = 4;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kMaxVecs = 4;  // 16 of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kMaxVecs = 2;  // 8 of 16
#else
constexpr int kMaxVecs = 1;  // at::vec has no intrinsics here, and two SSE registers a vector
#endif
constexpr int64_t kPanel = 256;  // blocks whose minima are kept at a time
constexpr float kInf = std::numeric_limits<float>::infinity();

static_assert(kQueries % (kMaxVecs * kLanes) == 0);
static_assert(kBlock % kLanes == 0 && kBlock % kCodes == 0);

// ---- Points ------------------------------------------------------------------------------------

double norm(const float* x, int64_t dim) {
  double sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += double(x[j]) * x[j];
  return std::sqrt(sum);
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
double distance_to_code(const VqCodebook& codebook, const double* point, int64_t k) {
  const float* code = codebook.codes + k * codebook.dim;
  const bool cosine = codebook.metric == Metric::cosine;
  if (cosine && is_zero(code, codebook.dim)) return 2;
  const double length = divisor(code, codebook.dim, codebook.metric);
  double sum = 0;
  for (int64_t j = 0; j < codebook.dim; ++j) {
    const double difference = point[j] - (cosine ? code[j] / length : double(code[j]));
    sum += difference * difference;
  }
  return sum;
}

// ---- The codebook ------------------------------------------------------------------------------

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

float round_up(double x) { return float(x * (1 + 0x1p-20)); }

void pack(const VqCodebook& codebook, int64_t begin, int64_t end, double* point) {
  const int64_t dim = codebook.dim;
  const double scale = codebook.scale;
  const double gamma = error_gamma(dim);
  // Points on the unit sphere are themselves rounded, to fp64.
  const double unit_error =
      codebook.metric == Metric::cosine ? double(dim + 8) * 0x1p-53 * scale : 0;

  for (int64_t b = begin; b < end; ++b) {
    float* packed = codebook.packed + b * dim * kBlock;
    double largest = 0;  // C^2
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const int64_t k = b * kBlock + lane;
      if (k >= codebook.num_codes) {
        for (int64_t j = 0; j < dim; ++j) packed[j * kBlock + lane] = 0;
        codebook.half_norm[b * kBlock + lane] = kInf;
        continue;
      }
      const float* code = codebook.codes + k * dim;
      const double length = divisor(code, dim, codebook.metric);
      for (int64_t j = 0; j < dim; ++j) point[j] = (code[j] / length - codebook.center[j]) * scale;
      double norm2 = 0;
      for (int64_t j = 0; j < dim; ++j) {
        packed[j * kBlock + lane] = -float(point[j]);
        norm2 += point[j] * point[j];
      }
      // cos = 0 is the score of a point at right angles, which is as long as the others.
      if (codebook.metric == Metric::cosine && is_zero(code, dim)) norm2 += scale * scale;
      codebook.half_norm[b * kBlock + lane] = float(norm2 / 2);
      largest = norm2 > largest ? norm2 : largest;
    }
    if (gamma < 1) {
      const double radius = std::sqrt(largest);
      // The constants are for underflow, at most 2^-126 |z_i| a product: |z_i| <= 2^60, see below.
      codebook.error_base[b] =
          round_up(gamma * largest / 2 + 2 * unit_error * radius + double(dim + 1) * 0x1p-60);
      codebook.error_slope[b] = round_up(gamma * radius + unit_error + 0x1p-100);
    } else {  // every code is measured; still finite, so that -inf stays below all
      codebook.error_base[b] = 0x1p126f;
      codebook.error_slope[b] = 1;
    }
  }
}

// ---- The search --------------------------------------------------------------------------------

// The workspace of search(), for a tile of up to kMaxVecs * kLanes queries; width is that number
// rounded up to lanes.
struct Tile {
  double* points;  // [width, dim]
  double best[kQueries];
  int64_t index[kQueries];
  float norms[kQueries];  // of the scaled queries; inf: nothing can be said about its scores
  float upper[kQueries];  // bound on the best true score; -inf: there is nothing to search for
  float* queries;         // [dim, width], scaled
  float* minima;          // [kPanel, width]
  int64_t width;
};

// Loads count queries. Returns the first that holds NaN or inf, or -1.
int64_t load_queries(const VqCodebook& codebook, const float* z, int64_t count, Tile& tile) {
  const int64_t dim = codebook.dim;
  int64_t bad = -1;
  for (int64_t q = 0; q < tile.width; ++q) {
    tile.index[q] = 0;
    tile.best[q] = std::numeric_limits<double>::infinity();
    tile.norms[q] = 0;
    tile.upper[q] = -kInf;
    for (int64_t j = 0; j < dim; ++j) tile.queries[j * tile.width + q] = 0;
    if (q >= count) continue;

    const float* row = z + q * dim;
    if (!is_finite(row, dim)) {
      if (bad < 0) bad = q;
      continue;
    }
    if (codebook.metric == Metric::cosine && is_zero(row, dim)) {
      tile.best[q] = 2;  // from every code
      continue;
    }
    tile.upper[q] = kInf;
    double* point = tile.points + q * dim;
    const double length = divisor(row, dim, codebook.metric);
    double norm2 = 0, largest = 0;
    for (int64_t j = 0; j < dim; ++j) {
      point[j] = row[j] / length;
      const double scaled = (point[j] - codebook.center[j]) * codebook.scale;
      norm2 += scaled * scaled;
      largest = std::fabs(scaled) > largest ? std::fabs(scaled) : largest;
      tile.queries[j * tile.width + q] = float(scaled);
    }
    if (largest <= 0x1p60) {
      tile.norms[q] = round_up(std::sqrt(norm2));
    } else {  // 2^29 times farther away than the codebook is wide: scores could overflow
      tile.norms[q] = kInf;
      for (int64_t j = 0; j < dim; ++j) tile.queries[j * tile.width + q] = 0;
    }
  }
  return bad;
}

// Scores the queries of R vectors against the blocks [begin, end): writes minima, lowers upper.
template <int R>
void score_blocks(const VqCodebook& codebook, int64_t begin, int64_t end, Tile& tile) {
  const int64_t dim = codebook.dim;
  constexpr int64_t width = R * kLanes;
  Vec norms[R], upper[R];
  for (int r = 0; r < R; ++r) {
    norms[r] = Vec::loadu(tile.norms + r * kLanes);
    upper[r] = Vec::loadu(tile.upper + r * kLanes);
  }
  for (int64_t b = begin; b < end; ++b) {
    const float* half_norm = codebook.half_norm + b * kBlock;
    Vec lowest[R];
    for (int r = 0; r < R; ++r) lowest[r] = Vec(kInf);
    for (int64_t c = 0; c < kBlock; c += kCodes) {
      Vec score[kCodes][R];
      for (int i = 0; i < kCodes; ++i) {
        for (int r = 0; r < R; ++r) score[i][r] = Vec(half_norm[c + i]);
      }
      const float* codes = codebook.packed + b * dim * kBlock + c;
      const float* queries = tile.queries;
      for (int64_t j = 0; j < dim; ++j, codes += kBlock, queries += width) {
        Vec query[R];
        for (int r = 0; r < R; ++r) query[r] = Vec::loadu(queries + r * kLanes);
        for (int i = 0; i < kCodes; ++i) {
          const Vec code(codes[i]);
          for (int r = 0; r < R; ++r) score[i][r] = at::vec::fmadd(code, query[r], score[i][r]);
        }
      }
      for (int i = 0; i < kCodes; ++i) {
        // One instruction, unlike at::vec::minimum, which also looks for NaN: there is none.
        for (int r = 0; r < R; ++r) lowest[r] = at::vec::clamp_max(score[i][r], lowest[r]);
      }
    }
    const Vec base(codebook.error_base[b]), slope(codebook.error_slope[b]);
    for (int r = 0; r < R; ++r) {
      lowest[r].store(tile.minima + (b - begin) * width + r * kLanes);
      upper[r] = at::vec::clamp_max(lowest[r] + at::vec::fmadd(norms[r], slope, base), upper[r]);
    }
  }
  for (int r = 0; r < R; ++r) upper[r].store(tile.upper + r * kLanes);
}

// Bits of the lanes where a <= b.
unsigned lanes_le(const Vec& a, const Vec& b) {
  return ~unsigned((a <= b).zero_mask()) & unsigned((uint64_t(1) << kLanes) - 1);
}

// Measures the codes of block b that may be the nearest of query q. Codes come in ascending order,
// so the lowest index keeps a tie.
void measure_block(const VqCodebook& codebook, int64_t b, int64_t q, Tile& tile) {
  const int64_t dim = codebook.dim;
  const Vec error(codebook.error_base[b] + tile.norms[q] * codebook.error_slope[b]);
  const Vec upper(tile.upper[q]);
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    Vec score = Vec::loadu(codebook.half_norm + b * kBlock + c);
    const float* codes = codebook.packed + b * dim * kBlock + c;
    for (int64_t j = 0; j < dim; ++j) {
      const Vec query(tile.queries[j * tile.width + q]);
      score = at::vec::fmadd(Vec::loadu(codes + j * kBlock), query, score);
    }
    for (unsigned lanes = lanes_le(score - error, upper); lanes; lanes &= lanes - 1) {
      const int64_t k = b * kBlock + c + __builtin_ctz(lanes);
      if (k >= codebook.num_codes) break;
      const double distance = distance_to_code(codebook, tile.points + q * dim, k);
      if (distance < tile.best[q]) {
        tile.best[q] = distance;
        tile.index[q] = k;
      }
    }
  }
}

template <int R>
void search_tile(const VqCodebook& codebook, Tile& tile) {
  constexpr int64_t width = R * kLanes;
  for (int64_t begin = 0; begin < codebook.num_blocks; begin += kPanel) {
    const int64_t last = begin + kPanel;
    const int64_t end = last < codebook.num_blocks ? last : codebook.num_blocks;
    score_blocks<R>(codebook, begin, end, tile);
    for (int r = 0; r < R; ++r) {
      const Vec norms = Vec::loadu(tile.norms + r * kLanes);
      const Vec upper = Vec::loadu(tile.upper + r * kLanes);
      for (int64_t b = begin; b < end; ++b) {
        const Vec error =
            at::vec::fmadd(norms, Vec(codebook.error_slope[b]), Vec(codebook.error_base[b]));
        const Vec lowest = Vec::loadu(tile.minima + (b - begin) * width + r * kLanes);
        for (unsigned lanes = lanes_le(lowest - error, upper); lanes; lanes &= lanes - 1) {
          measure_block(codebook, b, r * kLanes + __builtin_ctz(lanes), tile);
        }
      }
    }
  }
}

int64_t search_workspace(const VqCodebook& codebook) {
  return kQueries * codebook.dim + (kQueries * codebook.dim + kQueries * kPanel) / 2;
}

int64_t search(const VqCodebook& codebook, const float* z, int64_t n, int64_t begin, int64_t end,
               int64_t* indices, float* distance, double* workspace) {
  int64_t bad = -1;
  Tile tile;
  tile.points = workspace;
  tile.queries = reinterpret_cast<float*>(workspace + kQueries * codebook.dim);
  tile.minima = tile.queries + kQueries * codebook.dim;

  const int64_t stop = end * kQueries < n ? end * kQueries : n;
  for (int64_t first = begin * kQueries; first < stop; first += kMaxVecs * kLanes) {
    const int64_t left = stop - first;
    const int64_t count = left < kMaxVecs * kLanes ? left : kMaxVecs * kLanes;
    const int64_t vecs = (count + kLanes - 1) / kLanes;
    tile.width = vecs * kLanes;
    const int64_t bad_here = load_queries(codebook, z + first * codebook.dim, count, tile);
    if (bad_here >= 0 && bad < 0) bad = first + bad_here;
    if (vecs == 1) search_tile<1>(codebook, tile);
    if constexpr (kMaxVecs >= 2) {
      if (vecs == 2) search_tile<2>(codebook, tile);
    }
    if constexpr (kMaxVecs >= 4) {
      if (vecs == 3) search_tile<3>(codebook, tile);
      if (vecs == 4) search_tile<4>(codebook, tile);
    }
    for (int64_t q = 0; q < count; ++q) {
      indices[first + q] = tile.index[q];
      if (distance) distance[first + q] = float(tile.best[q]);
    }
  }
  return bad;
}

}  // namespace

extern const VqKernels vq_kernels = {center, pack, search, search_workspace};

}  // namespace t2i::cpu::CPU_CAPABILITY
