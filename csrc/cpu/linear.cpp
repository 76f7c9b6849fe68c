// See linear.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY.
#include "cpu/linear.h"

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int kVecs = int(kPanelOutputs / kLanes);  // of a panel
static_assert(kPanelOutputs % kLanes == 0);

// One row is summed up in four panels at once, each a stream of memory; more rows in tiles of as many
// rows by panels as leave their sums in registers. While rows beyond a tile read what is in the cache,
// memory waits: where rows are many, tiles have more of them and fewer panels.
constexpr int kStreams = 4;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileStreams = 4, kTileRows = 6, kQuantizedTileRows = 3;
constexpr int kTallStreams = 2, kTallRows = 12, kQuantizedTallRows = 6;
#else
constexpr int kTileStreams = 2, kTileRows = 3, kQuantizedTileRows = 2;
constexpr int kTallStreams = 2, kTallRows = 3, kQuantizedTallRows = 2;
#endif

static_assert(kStreams <= kLinearPanels && kTileStreams <= kLinearPanels &&
              kTallStreams <= kLinearPanels);

// Inputs at once: what the panels of a tile have for them is read again by further rows, and stays in
// the second cache.
constexpr int64_t kDepth = 512;
static_assert(kDepth % kBlockInputs == 0);

// The sums of 16 outputs.
struct Sums {
  Vec v[kVecs];
};

inline void add_product(Sums& sums, const Vec (&weight)[kVecs], const Vec& x) {
  for (int v = 0; v < kVecs; ++v) sums.v[v] = at::vec::fmadd(weight[v], x, sums.v[v]);
}

// The low and the high halves of 16 words, as bf16.
inline void widen(const uint8_t* words, Vec (&low)[kVecs], Vec (&high)[kVecs]) {
  using Int = at::vec::Vectorized<int32_t>;
  for (int v = 0; v < kVecs; ++v) {
    const Int pair = Int::loadu(words + v * kLanes * 4);
    low[v] = at::vec::cast<float>(pair << Int(16));
    high[v] = at::vec::cast<float>(pair & Int(int32_t(0xffff0000)));
  }
}

// ---- Sums of products of bytes -----------------------------------------------------------------

// 16 sums of int32. kBias is what was added to a byte of weights that was packed as w + 128, and is
// still in it.
#if defined(CPU_CAPABILITY_AVX512)

struct Ints {
  __m512i v;
};

inline Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }

inline Sums to_float(const Ints& x) { return {{Vec(_mm512_cvtepi32_ps(x.v))}}; }

struct Bytes {
  __m512i v;
};

inline Bytes bytes(const uint8_t* line) { return {_mm512_loadu_si512(line)}; }

inline Bytes low_nibbles(const Bytes& x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(0x0f))};
}

inline Bytes high_nibbles(const Bytes& x) { return low_nibbles({_mm512_srli_epi16(x.v, 4)}); }

#if defined(__AVX512VNNI__)
constexpr int32_t kBias = 128;

inline void add_products(Ints& sum, const Bytes& weights, int32_t x) {
  sum.v = _mm512_dpbusd_epi32(sum.v, weights.v, _mm512_set1_epi32(x));
}

inline void add_small_products(Ints& sum, const Bytes& weights, int32_t x) {
  add_products(sum, weights, x);
}
#else
constexpr int32_t kBias = 0;

inline void add_pairs(Ints& sum, const __m512i& a, const __m512i& b) {
  const __m512i pairs = _mm512_maddubs_epi16(a, b);
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

// |x| and w with the sign of x: pairs of products of a full byte by a signed one would overflow.
inline void add_products(Ints& sum, const Bytes& weights, int32_t x) {
  const __m512i values = _mm512_set1_epi32(x), zero = _mm512_setzero_si512();
  const __m512i w = _mm512_xor_si512(weights.v, _mm512_set1_epi8(int8_t(0x80)));
  const __m512i turned = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(values), zero, w);
  add_pairs(sum, _mm512_abs_epi8(values), turned);
}

inline void add_small_products(Ints& sum, const Bytes& weights, int32_t x) {
  add_pairs(sum, weights.v, _mm512_set1_epi32(x));
}
#endif

#elif defined(CPU_CAPABILITY_AVX2)

struct Ints {
  __m256i v[2];
};

inline Ints ints(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }

inline Sums to_float(const Ints& x) {
  return {{Vec(_mm256_cvtepi32_ps(x.v[0])), Vec(_mm256_cvtepi32_ps(x.v[1]))}};
}

struct Bytes {
  __m256i v[2];
};

inline Bytes bytes(const uint8_t* line) {
  const __m256i* v = reinterpret_cast<const __m256i*>(line);
  return {{_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)}};
}

inline Bytes low_nibbles(const Bytes& x) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {{_mm256_and_si256(x.v[0], mask), _mm256_and_si256(x.v[1], mask)}};
}

inline Bytes high_nibbles(const Bytes& x) {
  return low_nibbles({{_mm256_srli_epi16(x.v[0], 4), _mm256_srli_epi16(x.v[1], 4)}});
}

constexpr int32_t kBias = 0;

inline void add_pairs(__m256i& sum, const __m256i& a, const __m256i& b) {
  const __m256i pairs = _mm256_maddubs_epi16(a, b);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// |x| and w with the sign of x: pairs of products of a full byte by a signed one would overflow.
inline void add_products(Ints& sum, const Bytes& weights, int32_t x) {
  const __m256i values = _mm256_set1_epi32(x), size = _mm256_abs_epi8(values);
  for (int i = 0; i < 2; ++i) {
    const __m256i w = _mm256_xor_si256(weights.v[i], _mm256_set1_epi8(int8_t(0x80)));
    add_pairs(sum.v[i], size, _mm256_sign_epi8(w, values));
  }
}

inline void add_small_products(Ints& sum, const Bytes& weights, int32_t x) {
  const __m256i values = _mm256_set1_epi32(x);
  for (int i = 0; i < 2; ++i) add_pairs(sum.v[i], weights.v[i], values);
}

#else

struct Ints {
  int32_t v[16];
};

inline Ints ints(int32_t x) {
  Ints out;
  for (int32_t& v : out.v) v = x;
  return out;
}

inline Sums to_float(const Ints& x) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = float(x.v[i]);
  Sums out;
  for (int v = 0; v < kVecs; ++v) out.v[v] = Vec::loadu(lanes + v * kLanes);
  return out;
}

struct Bytes {
  uint8_t v[64];
};

inline Bytes bytes(const uint8_t* line) {
  Bytes out;
  std::memcpy(out.v, line, 64);
  return out;
}

inline Bytes low_nibbles(const Bytes& x) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = x.v[i] & 0x0f;
  return out;
}

inline Bytes high_nibbles(const Bytes& x) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = x.v[i] >> 4;
  return out;
}

constexpr int32_t kBias = 128;

inline void add_products(Ints& sum, const Bytes& weights, int32_t x) {
  int8_t values[4];
  std::memcpy(values, &x, 4);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) sum.v[i] += int32_t(weights.v[4 * i + j]) * values[j];
  }
}

inline void add_small_products(Ints& sum, const Bytes& weights, int32_t x) {
  add_products(sum, weights, x);
}

#endif

// ---- Tiles: M rows by R panels -----------------------------------------------------------------

// Where panels have what belongs to an input.
template <WeightType type>
constexpr int64_t offset_of(int64_t input) {
  switch (type) {
    case WeightType::f32: return input * 64;
    case WeightType::bf16: return input / 2 * 64;
    case WeightType::int8: return input / kBlockInputs * 17 * 64;
    case WeightType::int4: return input / kBlockInputs * 9 * 64;
  }
}

// How far ahead a tile of M rows asks for memory. Where M rows keep the processor longer than memory
// takes for a line, too few lines are under way unless they are asked for early.
template <WeightType type, int M>
int64_t bytes_ahead() {
  constexpr int memory_bound_rows = type == WeightType::f32 ? 6 : 2;
  return M > memory_bound_rows ? kPrefetchDistance : prefetch_distance();
}

// The inputs [begin, end) of rows that begin at x.
template <WeightType type, int M, int R>
inline __attribute__((always_inline)) void float_tile(const uint8_t* const (&panels)[R],
                                                      const float* x, int64_t stride,
                                                      int64_t begin, int64_t end,
                                                      Sums (&sums)[M][R]) {
  constexpr int64_t step = type == WeightType::f32 ? 1 : 2;
  const int64_t whole = begin + (end - begin) / step * step;
  int64_t offset = offset_of<type>(begin);
  const int64_t ahead = bytes_ahead<type, M>();
  // A line of a panel: its weights of the first input and, in bf16, of the second.
  const auto read = [&](int r, Vec (&first)[kVecs], Vec (&second)[kVecs]) {
    const uint8_t* line = panels[r] + offset;
    __builtin_prefetch(line + ahead);
    if constexpr (step == 2) {
      widen(line, first, second);
    } else {
      for (int v = 0; v < kVecs; ++v) first[v] = Vec::loadu(line + v * kLanes * 4);
    }
  };
#pragma GCC unroll 2
  for (int64_t k = begin; k < whole; k += step, offset += 64) {
    // The fewer are held beside the sums, weights of all panels or inputs of all rows; the others
    // pass by. Otherwise sums leave their registers.
    if constexpr (R * kVecs < M) {
      Vec first[R][kVecs], second[R][kVecs];
      for (int r = 0; r < R; ++r) read(r, first[r], second[r]);
      for (int m = 0; m < M; ++m) {
        const Vec input(x[m * stride + k]);
        for (int r = 0; r < R; ++r) add_product(sums[m][r], first[r], input);
      }
      for (int m = 0; step == 2 && m < M; ++m) {
        const Vec input(x[m * stride + k + 1]);
        for (int r = 0; r < R; ++r) add_product(sums[m][r], second[r], input);
      }
    } else {
      Vec inputs[step][M];
      for (int i = 0; i < step; ++i) {
        for (int m = 0; m < M; ++m) inputs[i][m] = Vec(x[m * stride + k + i]);
      }
      for (int r = 0; r < R; ++r) {
        Vec first[kVecs], second[kVecs];
        read(r, first, second);
        for (int m = 0; m < M; ++m) {
          add_product(sums[m][r], first, inputs[0][m]);
          if constexpr (step == 2) add_product(sums[m][r], second, inputs[1][m]);
        }
      }
    }
  }
  if (whole == end) return;
  for (int r = 0; r < R; ++r) {  // an odd one is left, and the other half of its words is 0
    Vec low[kVecs], high[kVecs];
    widen(panels[r] + offset, low, high);
    for (int m = 0; m < M; ++m) add_product(sums[m][r], low, Vec(x[m * stride + whole]));
  }
}

// The blocks of inputs [begin, end) of the rows from `row` on.
template <WeightType type, int M, int R>
inline __attribute__((always_inline)) void quantized_tile(const uint8_t* const (&panels)[R],
                                                          const Quantized& x, int64_t row,
                                                          int64_t blocks, int64_t begin,
                                                          int64_t end, Sums (&sums)[M][R]) {
  constexpr bool int4 = type == WeightType::int4;
  constexpr int kWords = int(kGroupInputs / 4), kLines = int4 ? kWords / 2 : kWords;
  constexpr int32_t bias = int4 ? 8 : kBias;
  const int64_t ahead = bytes_ahead<type, M>();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t offset = offset_of<type>(block * kBlockInputs);
    for (int half = 0; half < 2; ++half) {
      const int64_t group = 2 * block + half;
      const int8_t* values[M];
      Ints products[M][R];
      for (int m = 0; m < M; ++m) {
        const int64_t at = (row + m) * 2 * blocks + group;
        values[m] = x.values + at * kGroupInputs;
        for (int r = 0; r < R; ++r) products[m][r] = ints(-bias * x.sums[at]);
      }
      const auto word = [&](int m, int j) {
        int32_t out;
        std::memcpy(&out, values[m] + 4 * j, 4);
        return out;
      };
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line) {
        for (int r = 0; r < R; ++r) {
          const uint8_t* at = panels[r] + offset + 64 * (1 + half * kLines + line);
          __builtin_prefetch(at + ahead);
          const Bytes weights = bytes(at);
          if constexpr (int4) {
            const Bytes low = low_nibbles(weights), high = high_nibbles(weights);
            for (int m = 0; m < M; ++m) {
              add_small_products(products[m][r], low, word(m, line));
              add_small_products(products[m][r], high, word(m, line + kLines));
            }
          } else {
            for (int m = 0; m < M; ++m) add_products(products[m][r], weights, word(m, line));
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        Vec scales[2][kVecs];
        widen(panels[r] + offset, scales[0], scales[1]);
        for (int m = 0; m < M; ++m) {
          const Vec scale(x.scales[(row + m) * 2 * blocks + group]);
          const Sums product = to_float(products[m][r]);
          for (int v = 0; v < kVecs; ++v) {
            sums[m][r].v[v] =
                at::vec::fmadd(product.v[v], scales[half][v] * scale, sums[m][r].v[v]);
          }
        }
      }
    }
  }
}

// ---- Products ----------------------------------------------------------------------------------

// Adds to the sums [M, R, 16] of the rows from `row` on what the inputs [begin, end) give.
template <WeightType type, int M, int R>
void add_rows(const PackedMatrix& w, const uint8_t* const (&panels)[R], const LinearInputs& in,
              int64_t row, int64_t begin, int64_t end, float* at) {
  Sums tile[M][R];
  for (int i = 0; i < M * R * kVecs; ++i) {
    tile[i / (R * kVecs)][i / kVecs % R].v[i % kVecs] =
        begin == 0 ? Vec(0.f) : Vec::loadu(at + i * kLanes);
  }
  if constexpr (type == WeightType::f32 || type == WeightType::bf16) {
    float_tile<type, M, R>(panels, in.x + row * in.stride, in.stride, begin, end, tile);
  } else {
    quantized_tile<type, M, R>(panels, in.quantized, row, w.blocks(), begin / kBlockInputs,
                               (end + kBlockInputs - 1) / kBlockInputs, tile);
  }
  for (int i = 0; i < M * R * kVecs; ++i) {
    tile[i / (R * kVecs)][i / kVecs % R].v[i % kVecs].store(at + i * kLanes);
  }
}

// The same for fewer than M + 1 rows.
template <WeightType type, int M, int R>
void add_last_rows(const PackedMatrix& w, const uint8_t* const (&panels)[R],
                   const LinearInputs& in, int64_t row, int64_t rows, int64_t begin, int64_t end,
                   float* at) {
  if constexpr (M > 0) {
    if (rows == M) {
      add_rows<type, M, R>(w, panels, in, row, begin, end, at);
    } else {
      add_last_rows<type, M - 1, R>(w, panels, in, row, rows, begin, end, at);
    }
  }
}

inline Vec silu(const Vec& x) {
  const Vec power = at::vec::clamp_max(x * Vec(-kLog2e), Vec(126.f));  // the domain of exp2; keeps NaN
  return x / (Vec(1.f) + exp2(power));
}

// From the sums [rows, R, 16] of panels to outputs, those of the first row at `to`.
template <int R>
void finish(const PackedMatrix& w, const int64_t (&panels)[R], int64_t rows, const float* sums,
            float* to, const LinearOutputs& out) {
  const bool swiglu = out.epilogue == Epilogue::swiglu;
  for (int64_t row = 0; row < rows; ++row, to += out.stride) {
    for (int r = 0; r < (swiglu ? R / 2 : R); ++r) {
      const float* sum = sums + (row * R + r) * kPanelOutputs;
      for (int64_t lane = 0; lane < kPanelOutputs; lane += kLanes) {
        const int64_t first = panels[r] * kPanelOutputs + lane;
        const int64_t count = min_of(kLanes, w.outputs - first);
        if (count <= 0) break;
        Vec x = Vec::loadu(sum + lane);
        if (swiglu) {
          x = silu(x) * Vec::loadu(sum + R / 2 * kPanelOutputs + lane);
        } else if (out.epilogue == Epilogue::add) {
          x = x + (count == kLanes ? Vec::loadu(to + first) : Vec::loadu(to + first, int(count)));
        }
        count == kLanes ? x.store(to + first) : x.store(to + first, int(count));
      }
    }
  }
}

// All outputs of R panels.
template <WeightType type, int M, int R>
void multiply_panels(const PackedMatrix& w, const int64_t (&which)[R], const LinearInputs& in,
                     const LinearOutputs& out, float* sums) {
  const int64_t bytes = w.panel_bytes();
  const uint8_t* panels[R];
  for (int r = 0; r < R; ++r) panels[r] = w.data + which[r] * bytes;
  for (int64_t first = 0; first < in.rows; first += kLinearRows) {
    const int64_t rows = min_of(kLinearRows, in.rows - first);
    int64_t begin = 0;
    do {
      const int64_t end = min_of(begin + kDepth, w.inputs);
      int64_t row = 0;
      float* at = sums;
      for (; row + M <= rows; row += M, at += M * R * kPanelOutputs) {
        add_rows<type, M, R>(w, panels, in, first + row, begin, end, at);
      }
      add_last_rows<type, M - 1, R>(w, panels, in, first + row, rows - row, begin, end, at);
      begin = end;
    } while (begin < w.inputs);
    finish(w, which, rows, sums, out.out + first * out.stride, out);
  }
}

// Streams that begin as far from each other as they are long.
template <WeightType type, int M, int R>
void multiply_streams(const PackedMatrix& w, const LinearInputs& in, int64_t begin, int64_t end,
                      const LinearOutputs& out, float* sums) {
  const bool swiglu = out.epilogue == Epilogue::swiglu;
  const int64_t apart = (end - begin) / (swiglu ? R / 2 : R), up = w.panels() / 2;
  for (int64_t panel = begin; panel < begin + apart; ++panel) {
    int64_t which[R];
    for (int r = 0; r < R; ++r) {
      const bool is_up = swiglu && r >= R / 2;
      which[r] = panel + (is_up ? up + (r - R / 2) * apart : r * apart);
    }
    multiply_panels<type, M, R>(w, which, in, out, sums);
  }
  const int64_t rest = begin + apart * (swiglu ? R / 2 : R);
  if constexpr (R > 1) {
    if (rest < end) multiply_streams<type, M, (R > 2 ? 2 : 1)>(w, in, rest, end, out, sums);
  }
}

template <WeightType type>
void multiply_type(const PackedMatrix& w, const LinearInputs& in, int64_t begin, int64_t end,
                   const LinearOutputs& out, float* sums) {
  constexpr bool whole = type == WeightType::f32 || type == WeightType::bf16;
  constexpr int rows = whole ? kTileRows : kQuantizedTileRows;
  constexpr int tall = whole ? kTallRows : kQuantizedTallRows;
  if (in.rows == 1) {
    multiply_streams<type, 1, kStreams>(w, in, begin, end, out, sums);
  } else if (in.rows <= rows) {
    multiply_streams<type, rows, kTileStreams>(w, in, begin, end, out, sums);
  } else {
    multiply_streams<type, tall, kTallStreams>(w, in, begin, end, out, sums);
  }
}

void multiply(const PackedMatrix& w, const LinearInputs& in, int64_t begin, int64_t end,
              const LinearOutputs& out, float* workspace) {
  switch (w.type) {
    case WeightType::f32: return multiply_type<WeightType::f32>(w, in, begin, end, out, workspace);
    case WeightType::bf16:
      return multiply_type<WeightType::bf16>(w, in, begin, end, out, workspace);
    case WeightType::int8:
      return multiply_type<WeightType::int8>(w, in, begin, end, out, workspace);
    case WeightType::int4:
      return multiply_type<WeightType::int4>(w, in, begin, end, out, workspace);
  }
}

// ---- Quantisation ------------------------------------------------------------------------------

// Bytes may alias whatever else there is: results are local until they are complete.
inline __attribute__((always_inline)) void quantize_group(const float* x, int8_t* values,
                                                          float* scale, int32_t* sum) {
  // The largest |x| by its bits, of which NaN has the largest: no step has to look for it.
  using Int = at::vec::Vectorized<int32_t>;
  Int bits(0);
  for (int64_t k = 0; k < kGroupInputs; k += kLanes) {
    bits = at::vec::maximum(bits, at::vec::cast<int32_t>(Vec::loadu(x + k).abs()));
  }
  const float most = largest_magnitude(bits), step = most / 127;
  if (!(most < kInf)) {
    std::memset(values, 0, kGroupInputs);
    *scale = std::numeric_limits<float>::quiet_NaN();
    *sum = 0;
    return;
  }
  const float tiny = std::numeric_limits<float>::min();
  const Vec factor(1 / (step < tiny ? tiny : step));
  int32_t numbers[kGroupInputs];
  for (int64_t k = 0; k < kGroupInputs; k += kLanes) {
    const Vec rounded = (Vec::loadu(x + k) * factor).round();
    at::vec::convert_to_int_of_same_size(rounded).store(numbers + k);
  }
  int8_t bytes[kGroupInputs];
  int32_t total = 0;
  for (int64_t i = 0; i < kGroupInputs; ++i) {
    bytes[i] = int8_t(numbers[i]);
    total += numbers[i];
  }
  std::memcpy(values, bytes, kGroupInputs);
  *scale = step;
  *sum = total;
}

void quantize(const float* x, int64_t inputs, const Quantized& row) {
  const int64_t groups = (inputs + kBlockInputs - 1) / kBlockInputs * 2;
  const int64_t whole = inputs / kGroupInputs;
  for (int64_t group = 0; group < whole; ++group) {
    const int64_t first = group * kGroupInputs;
    quantize_group(x + first, row.values + first, row.scales + group, row.sums + group);
  }
  for (int64_t group = whole; group < groups; ++group) {  // filled up with zeros
    const int64_t first = group * kGroupInputs;
    float padded[kGroupInputs] = {};
    if (first < inputs) std::memcpy(padded, x + first, size_t(inputs - first) * sizeof(float));
    quantize_group(padded, row.values + first, row.scales + group, row.sums + group);
  }
}

}  // namespace

extern const LinearKernels linear_kernels = {quantize, multiply};

}  // namespace t2i::cpu::CPU_CAPABILITY
