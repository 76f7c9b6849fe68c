// See vq_nearest.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY (no std:: containers, no statics), or the linker could keep an AVX-512
// copy of it for every machine.
#include "cpu/vq_nearest.h"

#include <cmath>

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

// The scores held in registers: of up to kMaxVecs vectors of queries, one query a lane, by a few
// codes.
template <int R>
constexpr int kCodes = R == 1 ? 8 : 4;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kMaxVecs = 4;  // 16 of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kMaxVecs = 2;  // 8 of 16
#else
constexpr int kMaxVecs = 1;  // at::vec has no intrinsics here, and two SSE registers a vector
#endif
constexpr int64_t kPanel = 256;  // blocks whose minima are kept at a time

static_assert(kQueries % (kMaxVecs * kLanes) == 0);
static_assert(kBlock % kLeafBlock == 0 && kLeafBlock % kLanes == 0 && kWide % kLanes == 0);

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

float round_up(double x) { return float(x * (1 + 0x1p-20)); }

void pack(const VqCodebook& codebook, int64_t begin, int64_t end, double* point) {
  const int64_t dim = codebook.dim;
  const double scale = codebook.scale;
  const double gamma = error_gamma(dim);
  // Points on the unit sphere are themselves rounded, to fp64.
  const double unit_error =
      codebook.metric == Metric::cosine ? double(dim + 8) * 0x1p-53 * scale : 0;

  const int64_t block = codebook.block;
  for (int64_t b = begin; b < end; ++b) {
    float* packed = codebook.packed + b * dim * block;
    double largest = 0;  // C^2
    for (int64_t lane = 0; lane < block; ++lane) {
      const int64_t k = code_at(codebook, b * block + lane);
      if (k < 0) {
        for (int64_t j = 0; j < dim; ++j) packed[j * block + lane] = 0;
        codebook.half_norm[b * block + lane] = kInf;
        continue;
      }
      const float* code = codebook.codes + k * dim;
      const double length = divisor(code, dim, codebook.metric);
      for (int64_t j = 0; j < dim; ++j) point[j] = (code[j] / length - codebook.center[j]) * scale;
      double norm2 = 0;
      for (int64_t j = 0; j < dim; ++j) {
        packed[j * block + lane] = -float(point[j]);
        norm2 += point[j] * point[j];
      }
      // cos = 0 is the score of a point at right angles, which is as long as the others.
      if (codebook.metric == Metric::cosine && is_zero(code, dim)) norm2 += scale * scale;
      codebook.half_norm[b * block + lane] = float(norm2 / 2);
      largest = norm2 > largest ? norm2 : largest;
    }
    if (gamma < 1) {
      const double radius = std::sqrt(largest);
      // The constants are for underflow, at most 2^-126 |z_i| a product: |z_i| <= 2^60, see below.
      codebook.error_base[b] =
          round_up((gamma / 2 + measure_gamma(dim)) * largest + 2 * unit_error * radius +
                   double(dim + 1) * 0x1p-60);
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
  float slack[kQueries];  // measure_gamma times their squares
  float upper[kQueries];  // bound on the best true score; -inf: there is nothing to search for
  float* queries;         // [dim, width], scaled
  float* minima;          // [kPanel, width]
  int64_t width;
};

// Loads count queries: the vectors of z from first on, or those that rows names. Returns the first
// that holds NaN or inf, or -1.
int64_t load_queries(const VqCodebook& codebook, const float* z, const int32_t* rows,
                     int64_t first, int64_t count, Tile& tile) {
  const int64_t dim = codebook.dim;
  int64_t bad = -1;
  for (int64_t q = 0; q < tile.width; ++q) {
    tile.index[q] = 0;
    tile.best[q] = std::numeric_limits<double>::infinity();
    tile.norms[q] = 0;
    tile.slack[q] = 0;
    tile.upper[q] = -kInf;
    for (int64_t j = 0; j < dim; ++j) tile.queries[j * tile.width + q] = 0;
    if (q >= count) continue;

    const int64_t n = rows ? rows[first + q] : first + q;
    const float* row = z + n * dim;
    if (!is_finite(row, dim)) {
      if (bad < 0 || n < bad) bad = n;
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
      point[j] = codebook.metric == Metric::l2 ? row[j] : row[j] / length;
      const double scaled = (point[j] - codebook.center[j]) * codebook.scale;
      norm2 += scaled * scaled;
      largest = std::fabs(scaled) > largest ? std::fabs(scaled) : largest;
      tile.queries[j * tile.width + q] = float(scaled);
    }
    if (largest <= 0x1p60) {
      tile.norms[q] = round_up(std::sqrt(norm2));
      tile.slack[q] = round_up(measure_gamma(dim) * norm2);
    } else {  // 2^29 times farther away than the codebook is wide: scores could overflow
      tile.norms[q] = kInf;
      for (int64_t j = 0; j < dim; ++j) tile.queries[j * tile.width + q] = 0;
    }
  }
  return bad;
}

// Blocks of codes: all of them in order, or those of a list.
struct Blocks {
  const int32_t* list;  // or null
  int64_t count;

  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// Scores the queries of R vectors against blocks [begin, end): lowers upper and, unless it is null,
// writes minima.
template <int R>
void score_blocks(const VqCodebook& codebook, Blocks blocks, int64_t begin, int64_t end, Tile& tile,
                  float* minima) {
  const int64_t dim = codebook.dim, block = codebook.block;
  constexpr int64_t width = R * kLanes;
  constexpr int C = kCodes<R>;
  Vec norms[R], slack[R], upper[R];
  for (int r = 0; r < R; ++r) {
    norms[r] = Vec::loadu(tile.norms + r * kLanes);
    slack[r] = Vec::loadu(tile.slack + r * kLanes);
    upper[r] = Vec::loadu(tile.upper + r * kLanes);
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = blocks[i];
    const float* half_norm = codebook.half_norm + b * block;
    Vec lowest[R];
    for (int r = 0; r < R; ++r) lowest[r] = Vec(kInf);
    for (int64_t c = 0; c < block; c += C) {
      Vec score[C][R];
      for (int k = 0; k < C; ++k) {
        for (int r = 0; r < R; ++r) score[k][r] = Vec(half_norm[c + k]);
      }
      const float* codes = codebook.packed + b * dim * block + c;
      const float* queries = tile.queries;
      for (int64_t j = 0; j < dim; ++j, codes += block, queries += width) {
        Vec query[R];
        for (int r = 0; r < R; ++r) query[r] = Vec::loadu(queries + r * kLanes);
        for (int k = 0; k < C; ++k) {
          const Vec code(codes[k]);
          for (int r = 0; r < R; ++r) score[k][r] = at::vec::fmadd(code, query[r], score[k][r]);
        }
      }
      for (int k = 0; k < C; ++k) {
        // One instruction, unlike at::vec::minimum, which also looks for NaN: there is none.
        for (int r = 0; r < R; ++r) lowest[r] = at::vec::clamp_max(score[k][r], lowest[r]);
      }
    }
    const Vec base(codebook.error_base[b]), slope(codebook.error_slope[b]);
    for (int r = 0; r < R; ++r) {
      if (minima) lowest[r].store(minima + (i - begin) * width + r * kLanes);
      const Vec error = at::vec::fmadd(norms[r], slope, base) + slack[r];
      upper[r] = at::vec::clamp_max(lowest[r] + error, upper[r]);
    }
  }
  for (int r = 0; r < R; ++r) upper[r].store(tile.upper + r * kLanes);
}

// Bits of the lanes where a <= b.
unsigned lanes_le(const Vec& a, const Vec& b) {
  return ~unsigned((a <= b).zero_mask()) & unsigned((uint64_t(1) << kLanes) - 1);
}

// Bits of the lanes where a < b.
unsigned lanes_lt(const Vec& a, const Vec& b) {
  return ~unsigned((a < b).zero_mask()) & unsigned((uint64_t(1) << kLanes) - 1);
}

// Measures the code at a place; whether it is the nearest of query q so far. The lowest index keeps
// a tie.
bool measure_code(const VqCodebook& codebook, int64_t place, int64_t q, Tile& tile) {
  const int64_t k = code_at(codebook, place);
  if (k < 0) return false;
  const double distance = distance_to_code(codebook, tile.points + q * codebook.dim, k);
  const bool nearer = distance < tile.best[q] || (distance == tile.best[q] && k < tile.index[q]);
  if (nearer) {
    tile.best[q] = distance;
    tile.index[q] = k;
  }
  return nearer;
}

// Measures the codes of block b that may be the nearest of query q.
void measure_block(const VqCodebook& codebook, int64_t b, int64_t q, Tile& tile) {
  const int64_t dim = codebook.dim, block = codebook.block;
  const Vec error(codebook.error_base[b] + tile.norms[q] * codebook.error_slope[b] +
                  tile.slack[q]);
  const Vec upper(tile.upper[q]);
  for (int64_t c = 0; c < block; c += kLanes) {
    Vec score = Vec::loadu(codebook.half_norm + b * block + c);
    const float* codes = codebook.packed + b * dim * block + c;
    for (int64_t j = 0; j < dim; ++j) {
      const Vec query(tile.queries[j * tile.width + q]);
      score = at::vec::fmadd(Vec::loadu(codes + j * block), query, score);
    }
    for (unsigned lanes = lanes_le(score - error, upper); lanes; lanes &= lanes - 1) {
      measure_code(codebook, b * block + c + __builtin_ctz(lanes), q, tile);
    }
  }
}

// Measures what the blocks [begin, end), whose minima are there, may hold.
template <int R>
void measure_blocks(const VqCodebook& codebook, Blocks blocks, int64_t begin, int64_t end,
                    Tile& tile) {
  constexpr int64_t width = R * kLanes;
  for (int r = 0; r < R; ++r) {
    const Vec norms = Vec::loadu(tile.norms + r * kLanes);
    const Vec slack = Vec::loadu(tile.slack + r * kLanes);
    const Vec upper = Vec::loadu(tile.upper + r * kLanes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = blocks[i];
      const Vec error =
          at::vec::fmadd(norms, Vec(codebook.error_slope[b]), Vec(codebook.error_base[b])) + slack;
      const Vec lowest = Vec::loadu(tile.minima + (i - begin) * width + r * kLanes);
      for (unsigned lanes = lanes_le(lowest - error, upper); lanes; lanes &= lanes - 1) {
        measure_block(codebook, b, r * kLanes + __builtin_ctz(lanes), tile);
      }
    }
  }
}

template <int R>
void search_blocks(const VqCodebook& codebook, Blocks blocks, Tile& tile) {
  for (int64_t begin = 0; begin < blocks.count; begin += kPanel) {
    const int64_t end = min_of(begin + kPanel, blocks.count);
    score_blocks<R>(codebook, blocks, begin, end, tile, tile.minima);
    measure_blocks<R>(codebook, blocks, begin, end, tile);
  }
}

Tile tile_in(const VqCodebook& codebook, double* workspace) {
  Tile tile;
  tile.points = workspace;
  tile.queries = reinterpret_cast<float*>(workspace + kQueries * codebook.dim);
  tile.minima = tile.queries + kQueries * codebook.dim;
  return tile;
}

int64_t search_workspace(const VqCodebook& codebook) {
  return kQueries * codebook.dim + (kQueries * codebook.dim + kQueries * kPanel) / 2;
}

int64_t search(const VqCodebook& codebook, const float* z, int64_t n, int64_t begin, int64_t end,
               int64_t* indices, float* distance, double* workspace) {
  int64_t bad = -1;
  Tile tile = tile_in(codebook, workspace);
  const Blocks blocks = {nullptr, codebook.num_blocks};
  const int64_t stop = end * kQueries < n ? end * kQueries : n;
  for (int64_t first = begin * kQueries; first < stop; first += kMaxVecs * kLanes) {
    const int64_t left = stop - first;
    const int64_t count = left < kMaxVecs * kLanes ? left : kMaxVecs * kLanes;
    const int64_t vecs = (count + kLanes - 1) / kLanes;
    tile.width = vecs * kLanes;
    const int64_t bad_here = load_queries(codebook, z, nullptr, first, count, tile);
    if (bad < 0) bad = bad_here;
    with_vecs<kMaxVecs>(vecs, [&](auto R) { search_blocks<R>(codebook, blocks, tile); });
    for (int64_t q = 0; q < count; ++q) {
      indices[first + q] = tile.index[q];
      if (distance) distance[first + q] = float(tile.best[q]);
    }
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

// One of a tile's queries, and what is known about it.
struct Query {
  float x[kMaxTreeDim];  // scaled
  float norm, slack;
  float upper;  // bound on the best true score

  // The error of its scores in block b.
  float error(const VqCodebook& codebook, int64_t b) const {
    return codebook.error_base[b] + norm * codebook.error_slope[b] + slack;
  }
};

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
  static constexpr int64_t kMost = kQueries * kPanel / kLeafBlock;
  int32_t* block;  // [kMost]
  float* scores;   // [kMost, kLeafBlock]
  int64_t count = 0;
};

// D is the codebook's dim where that is known when compiled, else 0.
template <int D>
struct TreeSearch {
  const VqCodebook& codebook;
  const VqTree& tree;
  Tile& tile;
  Scored scored;
  int32_t *groups, *next;  // [num_blocks] each
  int64_t total = 0;       // leaves scored

  int64_t dim() const { return D ? D : codebook.dim; }

  // Scores the codes of a leaf; whether that lowered upper.
  bool score(Query& query, int64_t b) {
    const float* codes = codebook.packed + b * dim() * kLeafBlock;
    float* out = scored.scores + scored.count * kLeafBlock;
    Vec lowest(kInf);
    for (int64_t c = 0; c < kLeafBlock; c += kLanes) {
      Vec score = Vec::loadu(codebook.half_norm + b * kLeafBlock + c);
      for (int64_t j = 0; j < dim(); ++j) {
        score = at::vec::fmadd(Vec::loadu(codes + j * kLeafBlock + c), Vec(query.x[j]), score);
      }
      score.store(out + c);
      lowest = at::vec::clamp_max(score, lowest);
    }
    scored.block[scored.count++] = int32_t(b);
    const Vec bounds = lowest + Vec(query.error(codebook, b));
    if (!lanes_lt(bounds, Vec(query.upper))) return false;
    float lanes[kLanes];
    bounds.store(lanes);
    for (int64_t i = 0; i < kLanes; ++i) query.upper = lanes[i] < query.upper ? lanes[i] : query.upper;
    return true;
  }

  // Measures, for query q of the tile, what may be nearest among the codes scored. Returns the leaf
  // of the best, or -1 if that is from before.
  int64_t measure(const Query& query, int64_t q) {
    int64_t best = -1;
    for (int64_t i = 0; i < scored.count; ++i) {
      const int64_t b = scored.block[i];
      const Vec error(query.error(codebook, b));
      for (int64_t c = 0; c < kLeafBlock; c += kLanes) {
        const Vec score = Vec::loadu(scored.scores + i * kLeafBlock + c);
        unsigned lanes = lanes_le(score - error, Vec(query.upper));
        for (; lanes; lanes &= lanes - 1) {
          const int64_t place = b * kLeafBlock + c + __builtin_ctz(lanes);
          if (measure_code(codebook, place, q, tile)) best = b;
        }
      }
    }
    total += scored.count;
    scored.count = 0;
    return best;
  }

  // Squared distances of a point to kLanes boxes.
  Vec distance2(const Query& query, const float* group) const {
    Vec sum(0.f);
    for (int64_t j = 0; j < dim(); ++j) {
      const Vec x(query.x[j]);
      const Vec below = Vec::loadu(group + j * kWide) - x;
      const Vec above = x - Vec::loadu(group + (dim() + j) * kWide);
      const Vec gap = at::vec::clamp_min(at::vec::clamp_min(below, above), Vec(0.f));
      sum = at::vec::fmadd(gap, gap, sum);
    }
    return sum;
  }

  // Searches the leaves that query q may have its nearest code in: first the one that it falls
  // into and that where a neighbour found its own, which make the radius small. Returns the leaf of
  // the nearest code.
  int64_t search(int64_t q, int64_t home, int64_t neighbour) {
    Query query;
    for (int64_t j = 0; j < dim(); ++j) query.x[j] = tile.queries[j * tile.width + q];
    query.norm = tile.norms[q];
    query.slack = tile.slack[q];
    query.upper = tile.upper[q];
    score(query, home);
    if (neighbour >= 0 && neighbour != home) score(query, neighbour);
    float radius2 = radius2_of(tree, query);

    // Down to the groups of leaves, then leaf by leaf.
    int64_t best = -1, count = 1;
    groups[0] = 0;
    for (int64_t l = 0; l + 1 < tree.num_levels; ++l) {
      int64_t children = 0;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t lane = 0; lane < kWide; lane += kLanes) {
          const int64_t first = int64_t(groups[i]) * kWide;
          const Vec distances = distance2(query, tree.boxes[l] + first * 2 * dim() + lane);
          for (unsigned near = lanes_le(distances, Vec(radius2)); near; near &= near - 1) {
            next[children++] = int32_t(first + lane + __builtin_ctz(near));
          }
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
        const Vec distances = distance2(query, boxes + first * 2 * dim() + lane);
        unsigned near = lanes_le(distances, Vec(radius2));
        while (near) {
          const int64_t leaf = first + lane + __builtin_ctz(near);
          near &= near - 1;
          if (leaf == home || leaf == neighbour) continue;
          if (score(query, leaf)) {
            radius2 = radius2_of(tree, query);
            near &= lanes_le(distances, Vec(radius2));
          }
          if (scored.count == Scored::kMost) {
            const int64_t better = measure(query, q);
            best = better >= 0 ? better : best;
          }
        }
      }
    }
    const int64_t better = measure(query, q);
    return better >= 0 ? better : best;
  }
};

int64_t search_tree_workspace(const VqCodebook& codebook) {
  return search_workspace(codebook) + codebook.num_blocks + Scored::kMost;
}

int64_t search_tree(const VqCodebook& codebook, const VqTree& tree, const float* z,
                    const int32_t* rows, const int32_t* leaves, int64_t begin, int64_t end,
                    int64_t* indices, float* distance, double* workspace, int64_t& scored) {
  int64_t bad = -1, neighbour = -1;
  Tile tile = tile_in(codebook, workspace);
  int32_t* space = reinterpret_cast<int32_t*>(workspace + search_workspace(codebook));
  int32_t* lists = space + Scored::kMost;
  const auto run = [&](auto D) {
    TreeSearch<D> tree_search = {codebook, tree, tile, {space, tile.minima}, lists,
                                 lists + codebook.num_blocks};
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = min_of(kLanes, end - first);
      tile.width = kLanes;
      const int64_t bad_here = load_queries(codebook, z, rows, first, count, tile);
      if (bad_here >= 0 && (bad < 0 || bad_here < bad)) bad = bad_here;
      for (int64_t q = 0; q < count; ++q) {
        if (tile.upper[q] != -kInf) {
          neighbour = tree_search.search(q, leaves[first + q], neighbour);
        }
        const int64_t n = rows[first + q];
        indices[n] = tile.index[q];
        if (distance) distance[n] = float(tile.best[q]);
      }
    }
    scored += tree_search.total * kLeafBlock;
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
    center, pack, search, search_workspace, route, search_tree, search_tree_workspace};

}  // namespace t2i::cpu::CPU_CAPABILITY
