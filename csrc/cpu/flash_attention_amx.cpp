// Attention of bf16 tensors on AMX: products of 16×32 by 32×16 tiles of bf16 with sums in fp32.
// Everything else, and what AMX does not serve (other types, softcap), is as in flash_attention.cpp.
//
// Rows lie along the lanes here too, so that the pairs of P that a right factor wants (amx.h) are two
// registers of neighbouring keys packed into one.
#include <cmath>

#include "cpu/amx.h"
#include "cpu/attention_rows.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 64;      // of a block of scores
constexpr int64_t kGradRows = 64;  // rows of such a block in the backward pass
constexpr int64_t kPair = 2 * kSide;  // rows that are brought up to date together

const AttentionKernels& plain() { return AVX512::attention_kernels; }

bool serves(const Attention& a) {
  return a.type == FloatType::bf16 && a.softcap == 0 && a.scale != 0;
}

// All of C [rows, columns], multiples of 32.
void multiply_all(const Factor& a, const Factor& b, int64_t rows, int64_t columns, int64_t depth,
                  float* c, int64_t c_stride, bool add) {
  for (int64_t i = 0; i < rows; i += 2 * kSide) {
    for (int64_t n = 0; n < columns; n += 2 * kSide) {
      multiply_2x2(a, i / kSide, b, n / kSide, depth, c + i * c_stride + n, c_stride, add);
    }
  }
}

// ---- Packing -----------------------------------------------------------------------------------

// The elements [first, first + width) of data, 0 up to padded; with negate of the other sign.
void load_half(const void* data, int64_t first, int64_t width, int64_t padded, bool negate,
               Half* out) {
  if (width) std::memcpy(out, static_cast<const Half*>(data) + first, size_t(width) * 2);
  for (int64_t d = width; d < padded; ++d) out[d] = 0;
  if (negate) {
    for (int64_t d = 0; d < width; ++d) out[d] = Half(out[d] ^ 0x8000);
  }
}

// out[width]: the words (a, b) of two rows.
void interleave(const Half* a, const Half* b, int64_t width, Word* out) {
  for (int64_t d = 0; d < width; d += kSide) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + d)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + d)));
    _mm512_storeu_si512(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// out[width, 16]: the transpose of 32 rows [32, width], in words of two neighbouring rows. scratch:
// [16, width].
void pack_transposed(const Half* rows, int64_t width, Word* out, Word* scratch) {
  for (int64_t i = 0; i < kSide; ++i) {
    interleave(rows + 2 * i * width, rows + (2 * i + 1) * width, width, scratch + i * width);
  }
  for (int64_t d = 0; d < width; d += kSide) {
    transpose_words(scratch + d, width, out + d * kSide, kSide);
  }
}

__m512i paired(const Vec& even, const Vec& odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// 2^x within 1e-4, which rounding to bf16 hides, but not in the sum that becomes the logsumexp.
Vec exp2_coarse(const Vec& x) {
  constexpr float kOnUnit[] = {6.951168180e-1f, 2.276448011e-1f, 7.706720382e-2f};
  return _mm512_scalef_ps(polynomial(kOnUnit, Vec(_mm512_reduce_ps(x, 1))), x);
}

// ---- Forward -----------------------------------------------------------------------------------

// Memory, taken from the front.
struct Space {
  Word* memory;  // null: only to count
  int64_t used = 0;

  Word* words(int64_t count) {
    Word* taken = memory ? memory + used : nullptr;
    used += round_up(count, kSide);
    return taken;
  }
  Half* halves(int64_t count) { return reinterpret_cast<Half*>(words(count / 2)); }
  float* floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }
};

struct ForwardSpace {
  int64_t width, v_width;  // dim and v_dim, multiples of 32
  Half *rows, *k;          // [32, the larger width], [kKeys, width]
  Word *q, *v, *p;         // [groups of 16 rows, width / 2, 16], [kKeys / 32, v_width, 16],
                           // [2, kKeys / 2, 16]
  Word* scratch;           // [16, v_width]
  float *scores, *out;     // [kKeys, 32], [tiles, v_width, 32]
  float *largest, *sum;    // [rows]
  float* row;              // [32, v_dim]
  int64_t size;            // in words

  ForwardSpace(const Attention& a, int64_t count, float* workspace) {
    Space space = {reinterpret_cast<Word*>(workspace)};
    const int64_t padded = round_up(count, kPair);
    width = round_up(a.dim, kTileDepth);
    v_width = round_up(a.v_dim, kTileDepth);
    rows = space.halves(kTileDepth * max_of(width, v_width));
    k = space.halves(kKeys * width);
    q = space.words(padded * width / 2);
    v = space.words(kKeys * v_width / 2);
    p = space.words(kKeys * kSide);
    scratch = space.words(kSide * v_width);
    scores = space.floats(kKeys * kPair);
    out = space.floats(padded * v_width);
    largest = space.floats(padded);
    sum = space.floats(padded);
    row = space.floats(kPair * a.v_dim);
    size = space.used;
  }
};

int64_t forward_workspace(const Attention& a, int64_t count) {
  return max_of(ForwardSpace(a, count, nullptr).size, plain().forward_workspace(a, count));
}

// Brings one tile of 32 rows up to date with the keys of a block that it sees.
void attend(const Attention& a, const Sequence& s, int64_t row, int64_t count, Range keys,
            int64_t begin, float scale, const ForwardSpace& space, int64_t first) {
  const int64_t half_begin = (keys.begin - begin) / kTileDepth;
  const int64_t half_end = (keys.end - begin + kTileDepth - 1) / kTileDepth;
  const int64_t width = space.width, v_width = space.v_width;
  const Factor k = {space.k, 2 * width, kSide * 2 * width, 2 * kTileDepth};
  const Factor q = {space.q + first * width / 2, 64, width / 2 * 64, kSide * 64};
  for (int64_t h = half_begin; h < half_end; ++h) {
    multiply_2x2(k, 2 * h, q, 0, width / kTileDepth, space.scores + h * kTileDepth * kPair, kPair,
                 false);
  }
  const Range all = intersection(seen_by_all(a, s, row, count), keys);
  const Vec factor_log2e(scale * kLog2e);
  bool rescale = false;
  Vec factor[2];
  for (int r = 0; r < 2; ++r) {
    float* column = space.scores + r * kSide;
    const Sight sight(a, s, row + r * kSide);
    for (int64_t j = half_begin * kTileDepth; j < half_end * kTileDepth; ++j) {
      const int64_t key = begin + j;
      if (key == all.begin && all.end > all.begin) {
        j += all.end - all.begin - 1;
        continue;
      }
      float* at = column + j * kPair;
      const bool seen_by_some = key >= keys.begin && key < keys.end;
      const Vec seen = seen_by_some ? sight.of(key) : Vec(0.f);
      Vec::blendv(Vec(-kInf), Vec::loadu(at), seen).store(at);
    }
    const Vec before = Vec::loadu(space.largest + first + r * kSide);
    Vec top[4] = {before, before, before, before};
    for (int64_t j = half_begin * kTileDepth; j < half_end * kTileDepth; j += 4) {
      for (int i = 0; i < 4; ++i) {
        top[i] = at::vec::clamp_min(top[i], Vec::loadu(column + (j + i) * kPair));
      }
    }
    const Vec now = at::vec::clamp_min(at::vec::clamp_min(top[0], top[1]),
                                       at::vec::clamp_min(top[2], top[3]));
    const Vec shift = at::vec::clamp_min(now, Vec(std::numeric_limits<float>::lowest()));
    Vec total[2] = {Vec(0.f), Vec(0.f)};
    Word* p = space.p + r * kKeys / 2 * kSide;
    for (int64_t j = half_begin * kTileDepth; j < half_end * kTileDepth; j += 2) {
      Vec pair[2];
      for (int i = 0; i < 2; ++i) {
        pair[i] = exp2((Vec::loadu(column + (j + i) * kPair) - shift) * factor_log2e);
        total[i] = total[i] + pair[i];
      }
      _mm512_storeu_si512(p + j / 2 * kSide, paired(pair[0], pair[1]));
    }
    factor[r] = exp2((before - shift) * factor_log2e);
    rescale = rescale || (factor[r] != Vec(1.f)).zero_mask() != (1 << kSide) - 1;
    now.store(space.largest + first + r * kSide);
    float* sum = space.sum + first + r * kSide;
    at::vec::fmadd(Vec::loadu(sum), factor[r], total[0] + total[1]).store(sum);
  }
  float* out = space.out + first * v_width;
  if (rescale) {
    for (int64_t d = 0; d < v_width; ++d) {
      for (int r = 0; r < 2; ++r) {
        float* at = out + d * kPair + r * kSide;
        (Vec::loadu(at) * factor[r]).store(at);
      }
    }
  }
  const Factor v = {space.v + half_begin * v_width * kSide, 64, kSide * 64, v_width * 64};
  const Factor p = {space.p + half_begin * kSide * kSide, 64, kKeys / 2 * 64, kSide * 64};
  multiply_all(v, p, v_width, kPair, half_end - half_begin, out, kPair, true);
}

void forward(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row, int64_t count,
             int64_t key, int64_t key_end, const Partial* partial, float* workspace) {
  if (!serves(a)) {
    plain().forward(a, s, kv_head, row, count, key, key_end, partial, workspace);
    return;
  }
  const Tiles tiles;
  const ForwardSpace space(a, count, workspace);
  const int64_t width = space.width, v_width = space.v_width;
  // Scores are divided by |scale| here, so that q keeps its bits.
  const float scale = std::fabs(a.scale);
  for (int64_t first = 0; first < count; first += kPair) {
    for (int64_t group = 0; group < 2; ++group) {
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t r = first + group * kSide + i;
        Half* to = space.rows + i * width;
        if (r < count) {
          load_half(s.q.data, stacked(a, s.q, kv_head, row + r), a.dim, width, a.scale < 0, to);
        } else {
          std::memset(to, 0, size_t(width) * sizeof(Half));
        }
      }
      pack_columns(space.rows, width, space.q + (first + group * kSide) * width / 2);
    }
  }
  const int64_t padded = round_up(count, kPair);
  std::memset(space.out, 0, size_t(padded * v_width) * sizeof(float));
  for (int64_t r = 0; r < padded; ++r) {
    space.largest[r] = -kInf;
    space.sum[r] = 0;
  }

  const Range range = intersection(seen_by_any(a, s, row, count), {key, key_end});
  for (int64_t begin = first_block(key, range, kKeys); begin < range.end; begin += kKeys) {
    const Range block = intersection({begin, begin + kKeys}, range);
    // Whatever the task sees of it, the block is whole: 0 times what is loaded may be NaN.
    const int64_t loaded = min_of(begin + kKeys, key_end);
    for (int64_t j = 0; j < kKeys; ++j) {
      Half* to = space.k + j * width;
      if (begin + j < loaded) {
        load_half(s.k.data, element(s.k, begin + j, kv_head), a.dim, width, false, to);
      } else {
        std::memset(to, 0, size_t(width) * sizeof(Half));
      }
    }
    for (int64_t h = 0; h < kKeys / kTileDepth; ++h) {
      for (int64_t j = 0; j < kTileDepth; ++j) {
        Half* to = space.rows + j * v_width;
        const int64_t at = begin + h * kTileDepth + j;
        if (at < loaded) {
          load_half(s.v.data, element(s.v, at, kv_head), a.v_dim, v_width, false, to);
        } else {
          std::memset(to, 0, size_t(v_width) * sizeof(Half));
        }
      }
      pack_transposed(space.rows, v_width, space.v + h * v_width * kSide, space.scratch);
    }
    for (int64_t first = 0; first < count; first += kPair) {
      const int64_t here = min_of(kPair, count - first);
      const Range keys = intersection(seen_by_any(a, s, row + first, here), block);
      if (keys.begin < keys.end) attend(a, s, row + first, here, keys, begin, scale, space, first);
    }
  }

  for (int64_t r = 0; r < count; ++r) {
    if (r % kPair == 0) {
      transpose(space.out + r * v_width, kPair, a.v_dim, kPair, 1, space.row, a.v_dim);
    }
    const bool unseeing = space.sum[r] == 0;
    const float inverse = unseeing ? 0 : 1 / space.sum[r];
    float* out = space.row + r % kPair * a.v_dim;
    for (int64_t d = 0; d < a.v_dim; ++d) out[d] *= inverse;
    const float logsumexp = unseeing ? -kInf : space.largest[r] * scale + std::log(space.sum[r]);
    store_result(a, s, kv_head, row + r, out, logsumexp, partial, r);
  }
}

void combine(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row, int64_t count,
             const Partial* partials, int64_t num_partials, float* workspace) {
  plain().combine(a, s, kv_head, row, count, partials, num_partials, workspace);
}

// ---- Backward ----------------------------------------------------------------------------------

struct BackwardSpace {
  int64_t width, v_width;     // dim and v_dim, multiples of 32
  Half *k, *v;                // [keys, width or v_width]
  Word* k_transposed;         // [keys / 32, width, 16]
  float *dk, *dv;             // [keys, width or v_width]
  Half* rows;                 // [kGradRows, the larger width]
  Word *q, *dout;             // [4, width or v_width / 2, 16]
  Word *q_pairs, *dout_pairs; // [kGradRows / 2, width or v_width]
  float *scores, *dp;         // [kKeys, kGradRows]
  Half *p, *ds;               // [kKeys, kGradRows]
  Word* ds_pairs;             // [4, kKeys / 2, 16]
  float* dq;                  // [width, kGradRows]
  float *logsumexp, *delta;   // [kGradRows]
  float *row, *other;         // [kGradRows, the larger width], one row
  Word* scratch;              // [16, width]
  int64_t size;               // in words

  BackwardSpace(const Attention& a, int64_t keys, float* workspace) {
    Space space = {reinterpret_cast<Word*>(workspace)};
    width = round_up(a.dim, kTileDepth);
    v_width = round_up(a.v_dim, kTileDepth);
    const int64_t padded = round_up(keys, kKeys), larger = max_of(width, v_width);
    k = space.halves(padded * width);
    v = space.halves(padded * v_width);
    k_transposed = space.words(padded * width / 2);
    dk = space.floats(padded * width);
    dv = space.floats(padded * v_width);
    rows = space.halves(kGradRows * larger);
    q = space.words(kGradRows * width / 2);
    dout = space.words(kGradRows * v_width / 2);
    q_pairs = space.words(kGradRows / 2 * width);
    dout_pairs = space.words(kGradRows / 2 * v_width);
    scores = space.floats(kKeys * kGradRows);
    dp = space.floats(kKeys * kGradRows);
    p = space.halves(kKeys * kGradRows);
    ds = space.halves(kKeys * kGradRows);
    ds_pairs = space.words(kKeys * kGradRows / 2);
    dq = space.floats(width * kGradRows);
    logsumexp = space.floats(kGradRows);
    delta = space.floats(kGradRows);
    row = space.floats(kGradRows * larger);
    other = space.floats(larger);
    scratch = space.words(kSide * larger);
    size = space.used;
  }
};

int64_t backward_workspace(const Attention& a, int64_t keys) {
  return max_of(BackwardSpace(a, keys, nullptr).size, plain().backward_workspace(a, keys));
}

// Rows of the stack as both right factors: in columns, and in pairs. Those that see nothing are 0:
// their P is, which 0 * NaN would undo.
void load_rows(const Attention& a, const Rows& from, int64_t kv_head, int64_t row,
               const float* logsumexp, int64_t dim, int64_t width, Half* rows, Word* columns,
               Word* pairs) {
  for (int64_t r = 0; r < kGradRows; ++r) {
    Half* to = rows + r * width;
    if (logsumexp[r] != kInf) {
      load_half(from.data, stacked(a, from, kv_head, row + r), dim, width, false, to);
    } else {
      std::memset(to, 0, size_t(width) * sizeof(Half));
    }
  }
  for (int64_t g = 0; g < kGradRows / kSide; ++g) {
    pack_columns(rows + g * kSide * width, width, columns + g * kSide * width / 2);
  }
  for (int64_t r = 0; r < kGradRows; r += 2) {
    interleave(rows + r * width, rows + (r + 1) * width, width, pairs + r / 2 * width);
  }
}

// P and dS of a block, in all forms that the products want.
void differentiate(const Attention& a, const Sequence& s, int64_t row, int64_t count, Range block,
                   const BackwardSpace& space) {
  const Range any = intersection(seen_by_any(a, s, row, count), block);
  const Range all = intersection(seen_by_all(a, s, row, count), block);
  const Vec scale(a.scale);
  for (int r = 0; r < kGradRows / kSide; ++r) {
    const Vec logsumexp = Vec::loadu(space.logsumexp + r * kSide);
    const Vec delta = Vec::loadu(space.delta + r * kSide);
    const Sight sight(a, s, row + r * kSide);
    Word* pairs = space.ds_pairs + r * kKeys / 2 * kSide;
    Vec before;
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t at = j * kGradRows + r * kSide, key = block.begin + j;
      Vec probability(0.f), gradient(0.f);
      if (key >= any.begin && key < any.end) {
        const Vec difference = Vec::loadu(space.scores + at) * scale - logsumexp;
        probability = exp2_coarse(difference * Vec(kLog2e));
        gradient = (Vec::loadu(space.dp + at) - delta) * probability;
        if (key < all.begin || key >= all.end) {
          const Vec seen = sight.of(key);
          probability = Vec::blendv(Vec(0.f), probability, seen);
          gradient = Vec::blendv(Vec(0.f), gradient, seen);
        }
      }
      _mm256_storeu_si256((__m256i*)(space.p + at), (__m256i)_mm512_cvtneps_pbh(probability));
      _mm256_storeu_si256((__m256i*)(space.ds + at), (__m256i)_mm512_cvtneps_pbh(gradient));
      if (j % 2 == 0) {
        before = gradient;
      } else {
        _mm512_storeu_si512(pairs + j / 2 * kSide, paired(before, gradient));
      }
    }
  }
}

void backward(const Attention& a, const Sequence& s, const SequenceGradients& g, int64_t kv_head,
              int64_t key, int64_t key_end, float* dq, float* workspace) {
  if (!serves(a)) {
    plain().backward(a, s, g, kv_head, key, key_end, dq, workspace);
    return;
  }
  const Tiles tiles;
  const int64_t keys = key_end - key, padded = round_up(keys, kKeys);
  const int64_t rows = a.groups * s.q_length;
  const BackwardSpace space(a, keys, workspace);
  const int64_t width = space.width, v_width = space.v_width;
  std::memset(space.k, 0, size_t(padded * width) * sizeof(Half));
  std::memset(space.v, 0, size_t(padded * v_width) * sizeof(Half));
  for (int64_t j = 0; j < keys; ++j) {
    load_half(s.k.data, element(s.k, key + j, kv_head), a.dim, width, false, space.k + j * width);
    load_half(s.v.data, element(s.v, key + j, kv_head), a.v_dim, v_width, false,
              space.v + j * v_width);
  }
  for (int64_t j = 0; j < padded; j += kTileDepth) {
    pack_transposed(space.k + j * width, width, space.k_transposed + j / 2 * width, space.scratch);
  }
  std::memset(space.dk, 0, size_t(padded * width) * sizeof(float));
  std::memset(space.dv, 0, size_t(padded * v_width) * sizeof(float));

  for (int64_t row = 0; row < rows; row += kGradRows) {
    const int64_t count = min_of(kGradRows, rows - row);
    std::memset(space.dq, 0, size_t(width * kGradRows) * sizeof(float));
    const Range range = intersection(seen_by_any(a, s, row, count), {key, key_end});
    if (range.begin < range.end) {
      for (int64_t r = 0; r < kGradRows; ++r) {
        space.logsumexp[r] = kInf;  // P is 0
        space.delta[r] = 0;
        const int64_t stack = row + r;
        const int64_t at = statistic(a, s, kv_head, stack);
        if (r >= count || s.logsumexp[at] == -kInf) continue;
        load_row(s.out.data, a.type, stacked(a, s.out, kv_head, stack), a.v_dim, space.other);
        load_row(g.dout.data, a.type, stacked(a, g.dout, kv_head, stack), a.v_dim, space.row);
        float sum = 0;
        for (int64_t d = 0; d < a.v_dim; ++d) sum += space.row[d] * space.other[d];
        space.delta[r] = sum - (g.dlogsumexp ? g.dlogsumexp[at] : 0);
        space.logsumexp[r] = s.logsumexp[at];
      }
      load_rows(a, s.q, kv_head, row, space.logsumexp, a.dim, width, space.rows, space.q,
                space.q_pairs);
      load_rows(a, g.dout, kv_head, row, space.logsumexp, a.v_dim, v_width, space.rows, space.dout,
                space.dout_pairs);
    }
    // Blocks begin at multiples of kKeys from the first key, where the packed tiles do.
    int64_t from = (range.begin - key) / kKeys * kKeys;
    const int64_t end = range.begin < range.end ? range.end - key : from;
    for (; from < end; from += kKeys) {
      const Range block = {key + from, min_of(key + from + kKeys, key_end)};
      const Factor k = {space.k + from * width, 2 * width, kSide * 2 * width, 2 * kTileDepth};
      const Factor v = {space.v + from * v_width, 2 * v_width, kSide * 2 * v_width, 2 * kTileDepth};
      const Factor q = {space.q, 64, width / 2 * 64, kSide * 64};
      const Factor dout = {space.dout, 64, v_width / 2 * 64, kSide * 64};
      multiply_all(k, q, kKeys, kGradRows, width / kTileDepth, space.scores, kGradRows, false);
      multiply_all(v, dout, kKeys, kGradRows, v_width / kTileDepth, space.dp, kGradRows, false);
      differentiate(a, s, row, count, block, space);

      const Factor k_transposed = {space.k_transposed + from / 2 * width, 64, kSide * 64,
                                   width * 64};
      const Factor ds_pairs = {space.ds_pairs, 64, kKeys / 2 * 64, kSide * 64};
      multiply_all(k_transposed, ds_pairs, width, kGradRows, kKeys / kTileDepth, space.dq, kGradRows,
                   true);
      const Factor p = {space.p, 2 * kGradRows, kSide * 2 * kGradRows, 2 * kTileDepth};
      const Factor ds = {space.ds, 2 * kGradRows, kSide * 2 * kGradRows, 2 * kTileDepth};
      const Factor q_pairs = {space.q_pairs, 4 * width, 64, kSide * 4 * width};
      const Factor dout_pairs = {space.dout_pairs, 4 * v_width, 64, kSide * 4 * v_width};
      multiply_all(p, dout_pairs, kKeys, v_width, kGradRows / kTileDepth, space.dv + from * v_width,
                   v_width, true);
      multiply_all(ds, q_pairs, kKeys, width, kGradRows / kTileDepth, space.dk + from * width, width,
                   true);
    }
    transpose(space.dq, kGradRows, a.dim, kGradRows, a.scale, space.row, a.dim);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = space.row + r * a.dim;
      if (dq) {
        std::memcpy(dq + (row + r) * a.dim, from, size_t(a.dim) * sizeof(float));
      } else {
        store_row(from, a.dim, a.type, g.dq.data, stacked(a, g.dq, kv_head, row + r));
      }
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    float *dk = space.dk + j * width, *dv = space.dv + j * v_width;
    for (int64_t d = 0; d < a.dim; ++d) dk[d] *= a.scale;
    store_row(dk, a.dim, a.type, g.dk.data, element(g.dk, key + j, kv_head));
    store_row(dv, a.v_dim, a.type, g.dv.data, element(g.dv, key + j, kv_head));
  }
}

void sum_dq(const Attention& a, const Sequence& s, const SequenceGradients& g, int64_t kv_head,
            int64_t row, int64_t row_end, const float* dq, int64_t count, int64_t stride,
            float* workspace) {
  plain().sum_dq(a, s, g, kv_head, row, row_end, dq, count, stride, workspace);
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward,  forward_workspace,  combine,
                                                   backward, backward_workspace, sum_dq};

}  // namespace t2i::cpu::CPU_CAPABILITY
