// See decode_attention.h. Compiled once per instruction set: nothing here may define a symbol
// outside the namespace CPU_CAPABILITY.
#include "cpu/decode_attention.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kSlots = kDecodeSlots;
static_assert(kSlots % kLanes == 0);

int64_t element(const Tokens& x, int64_t row, int64_t token, int64_t head) {
  return row * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

int64_t padded_dim(const DecodeStep& step) { return round_up(step.dim, kLanes); }

struct Space {
  float* q;       // [groups * tokens of a task, padded dim]
  float* scores;  // [groups * tokens of a task, kSlots]
  float* row;     // [2, padded dim]
  float* padded;  // [2, kSlots, padded dim], where dim is none

  Space(const DecodeStep& step, float* space) {
    const int64_t rows = step.groups * decode_tokens(step), width = padded_dim(step);
    q = space;
    scores = q + rows * width;
    row = scores + rows * kSlots;
    padded = row + 2 * width;
  }

  static int64_t size(const DecodeStep& step) {
    const int64_t rows = step.groups * decode_tokens(step), width = padded_dim(step);
    return rows * (width + kSlots) + 2 * width + (width == step.dim ? 0 : 2 * kSlots * width);
  }
};

// The type of what a cache holds, unless that is int8.
FloatType float_type(CacheType type) {
  return type == CacheType::f32 ? FloatType::f32
         : type == CacheType::bf16 ? FloatType::bf16 : FloatType::f16;
}

// To the type of the tokens and back: what is stored of a value.
void round_to_type(const DecodeStep& step, float* x) {
  if (step.type == FloatType::f32) return;
  for (int64_t d = 0; d < step.dim; ++d) {
    x[d] = step.type == FloatType::bf16 ? from_bf16(to_bf16(x[d])) : from_f16(to_f16(x[d]));
  }
}

// Turns pairs of channels by the angles of a position (RoFormer, arXiv 2104.09864). scratch: dim.
void rotate(const DecodeStep& step, int64_t slot, int64_t start, float* x, float* scratch) {
  if (!step.cos) return;
  if (!step.positions_from_start) start = 0;
  const int64_t position = max_of(slot - start, 0), pairs = step.pairs;
  const float *cos = step.cos + position * pairs, *sin = step.sin + position * pairs;
  std::memcpy(scratch, x, size_t(2 * pairs) * sizeof(float));
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t first = step.interleaved ? 2 * i : i;
    const int64_t second = step.interleaved ? 2 * i + 1 : i + pairs;
    const float a = scratch[first], b = scratch[second];
    x[first] = a * cos[i] - b * sin[i];
    x[second] = a * sin[i] + b * cos[i];
  }
  round_to_type(step, x);
}

// One scale for all of x, of length dim.
float quantize(const float* x, int64_t dim, int8_t* out) {
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = std::fabs(x[d]);
    largest = size > largest || size != size ? size : largest;  // NaN stays
  }
  const float scale = largest / 127;
  const float divisor = scale < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min()
                                                                  : scale;
  for (int64_t d = 0; d < dim; ++d) out[d] = int8_t(std::nearbyint(x[d] / divisor));
  return scale;
}

void append(const DecodeStep& step, int64_t row, int64_t head, float* workspace) {
  const Space space(step, workspace);
  float *x = space.row, *scratch = x + padded_dim(step);
  for (int64_t i = 0; i < step.tokens; ++i) {
    const int64_t slot = step.seqlens[row] + i;
    for (int which = 0; which < 2; ++which) {
      const Tokens &from = which ? step.v_new : step.k_new, &to = which ? step.v : step.k;
      load_row(from.data, step.type, element(from, row, i, head), step.dim, x);
      if (which == 0) rotate(step, slot, step.start[row], x, scratch);
      const int64_t at = element(to, row, slot, head);
      if (step.cache_type != CacheType::int8) {
        store_row(x, step.dim, float_type(step.cache_type), to.data, at);
        continue;
      }
      const Scales& scales = which ? step.v_scale : step.k_scale;
      scales.data[row * scales.batch_stride + slot * scales.slot_stride +
                  head * scales.head_stride] =
          quantize(x, step.dim, static_cast<int8_t*>(to.data) + at);
    }
  }
}

// ---- What a cache holds ------------------------------------------------------------------------

using c10::BFloat16, c10::Half;

// By functions of this namespace: those of c10 would be one for all instruction sets.
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bf16(x.x); }
inline float to_float(Half x) { return from_f16(x.x); }
inline float to_float(int8_t x) { return float(x); }

// kLanes of it as floats; bytes without their scale.
inline Vec load(const float* x) { return Vec::loadu(x); }

inline Vec load(const BFloat16* x) {
  Vec out;
  at::vec::load_fp32_from_bf16(x, out);
  return out;
}

inline Vec load(const Half* x) {
  Vec out;
  at::vec::load_fp32_from_fp16(x, out);
  return out;
}

inline Vec load(const int8_t* x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = to_float(x[i]);
  return Vec::loadu(lanes);
#endif
}

// Slots of one head.
template <typename T>
struct SlotRows {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t slot) const { return data + slot * stride; }
};

// f(k, v) with the slots of a task where they are, or, where their length is no number of vectors,
// copied and filled up with zeros.
template <typename F>
void with_slots(const DecodeStep& step, const DecodeTask& task, float* padded, F f) {
  const int64_t k_at = element(step.k, task.row, task.slot, task.head);
  const int64_t v_at = element(step.v, task.row, task.slot, task.head);
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    const SlotRows<T> k{static_cast<const T*>(step.k.data) + k_at, step.k.token_stride};
    const SlotRows<T> v{static_cast<const T*>(step.v.data) + v_at, step.v.token_stride};
    const int64_t width = padded_dim(step);
    if (width == step.dim) return f(k, v);
    for (const auto& [from, to] : {std::pair{k, padded}, std::pair{v, padded + kSlots * width}}) {
      std::memset(to, 0, size_t(kSlots * width) * sizeof(float));
      for (int64_t j = 0; j < task.slot_end - task.slot; ++j) {
        for (int64_t d = 0; d < step.dim; ++d) to[j * width + d] = to_float(from[j][d]);
      }
    }
    f(SlotRows<float>{padded, width}, SlotRows<float>{padded + kSlots * width, width});
  };
  switch (step.cache_type) {
    case CacheType::f32: return of_type(float());
    case CacheType::bf16: return of_type(BFloat16());
    case CacheType::f16: return of_type(Half());
    case CacheType::int8: return of_type(int8_t());
  }
}

// x [kSlots] *= the scales of the slots of a task.
void scale_slots(const DecodeTask& task, const Scales& scales, float* x) {
  const float* scale = scales.data + task.row * scales.batch_stride +
                       task.slot * scales.slot_stride + task.head * scales.head_stride;
  for (int64_t j = 0; j < task.slot_end - task.slot; ++j) x[j] *= scale[j * scales.slot_stride];
}

// ---- Products ----------------------------------------------------------------------------------

// Sums over the lanes of kLanes vectors, that of x[i] in lane i: a transposition (see vec.h) that
// adds up what it brings together.
Vec sums(Vec (&x)[kLanes]) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      const auto pair = at::vec::interleave2(x[i], x[i + half]);
      x[i] = pair.first + pair.second;
    }
  }
  return x[0];
}

// Calls f(the constant R, first row) for all rows, up to four at once.
template <typename F>
void by_rows(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(std::integral_constant<int, 4>(), row);
  if (rows - row == 3) f(std::integral_constant<int, 3>(), row);
  if (rows - row == 2) f(std::integral_constant<int, 2>(), row);
  if (rows - row == 1) f(std::integral_constant<int, 1>(), row);
}

// scores[R, kSlots]: q[R, width] . k, for count slots, which are read once, in their order: what
// the processor fetches ahead by itself is the most that memory gives.
template <int R, typename T>
void dot(const float* q, const SlotRows<T>& k, int64_t width, int64_t count, float* scores) {
  for (int64_t first = 0; first < count; first += kLanes) {
    Vec x[R][kLanes];
    const int64_t here = min_of(kLanes, count - first);
    for (int64_t i = 0; i < here; ++i) {
      const T* row = k[first + i];
      Vec sum[R];
      for (int r = 0; r < R; ++r) sum[r] = Vec(0.f);
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec key = load(row + d);
        for (int r = 0; r < R; ++r) {
          sum[r] = at::vec::fmadd(Vec::loadu(q + r * width + d), key, sum[r]);
        }
      }
      for (int r = 0; r < R; ++r) x[r][i] = sum[r];
    }
    for (int64_t i = here; i < kLanes; ++i) {
      for (int r = 0; r < R; ++r) x[r][i] = Vec(0.f);
    }
    for (int r = 0; r < R; ++r) sums(x[r]).store(scores + r * kSlots + first);
  }
}

// Vectors of sums that stay in registers.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kSums = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kSums = 12;
#else
constexpr int kSums = 4;
#endif

// How many vectors of R rows they are, a power of two.
constexpr int sum_vecs(int rows) {
  int vecs = 8;
  while (vecs > 1 && rows * vecs > kSums) vecs /= 2;
  return vecs;
}

// out[R, width] = p[R, kSlots] v of the slots [begin, end), from channel d on, C vectors of channels
// at once.
template <int R, int C, typename T>
void weigh(const float* p, const SlotRows<T>& v, int64_t d, int64_t width, int64_t begin,
           int64_t end, float* out) {
  for (; d + C * kLanes <= width; d += C * kLanes) {
    Vec sum[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sum[r][c] = Vec(0.f);
    }
    for (int64_t j = begin; j < end; ++j) {
      const T* row = v[j] + d;
      Vec weight[R];
      for (int r = 0; r < R; ++r) weight[r] = Vec(p[r * kSlots + j]);
      for (int c = 0; c < C; ++c) {
        const Vec value = load(row + c * kLanes);
        for (int r = 0; r < R; ++r) sum[r][c] = at::vec::fmadd(weight[r], value, sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sum[r][c].store(out + r * width + d + c * kLanes);
    }
  }
  if constexpr (C > 1) {
    if (d < width) weigh<R, C / 2>(p, v, d, width, begin, end, out);
  }
}

// From count scores to the weights of a softmax that are not divided by their sum yet. Slots outside
// [begin, end) are not seen.
void exponentiate(float* scores, int64_t count, int64_t begin, int64_t end, float softcap,
                  float* largest, float* sum) {
  const int64_t padded = round_up(count, kLanes);
  for (int64_t j = 0; j < min_of(begin, padded); ++j) scores[j] = -kInf;
  for (int64_t j = max_of(end, 0); j < padded; ++j) scores[j] = -kInf;
  Vec top(-kInf);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Vec score = Vec::loadu(scores + j);
    if (softcap > 0) {
      // tanh of -inf is -1, and would be seen.
      const Vec capped = tanh(score) * Vec(softcap);
      score = Vec::blendv(capped, score, score == Vec(-kInf));
      score.store(scores + j);
    }
    top = at::vec::clamp_min(top, score);
  }
  *largest = largest_lane(top);
  const float shift = *largest == -kInf ? 0 : *largest;
  Vec total(0.f);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec p = exp_difference(Vec::loadu(scores + j), Vec(shift));
    total = total + p;
    p.store(scores + j);
  }
  float lanes[kLanes];
  total.store(lanes);
  *sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) *sum += lanes[i];
}

void attend(const DecodeStep& step, const DecodeTask& task, const DecodePartial& partial,
            float* workspace) {
  const Space space(step, workspace);
  const int64_t row = task.row, head = task.head, width = padded_dim(step);
  const int64_t rows = step.groups * (task.token_end - task.token);
  const int64_t start = step.start[row], seqlen = step.seqlens[row];
  const int64_t count = max_of(task.slot_end - task.slot, 0);
  const bool int8 = step.cache_type == CacheType::int8;
  const float factor = step.softcap > 0 ? step.scale / step.softcap : step.scale;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = task.token + r / step.groups;
    float* q = space.q + r * width;
    const int64_t q_head = head * step.groups + r % step.groups;
    load_row(step.q.data, step.type, element(step.q, row, token, q_head), step.dim, q);
    rotate(step, seqlen + token, start, q, space.row);
    for (int64_t d = 0; d < step.dim; ++d) q[d] *= factor;
    for (int64_t d = step.dim; d < width; ++d) q[d] = 0;
  }
  with_slots(step, task, space.padded, [&](const auto& k, const auto& v) {
    by_rows(rows, [&](auto R, int64_t r) {
      dot<R>(space.q + r * width, k, width, count, space.scores + r * kSlots);
    });
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = space.scores + r * kSlots;
      if (int8) scale_slots(task, step.k_scale, scores);
      const int64_t own = seqlen + task.token + r / step.groups;
      // No task has slots before start.
      exponentiate(scores, count, own - step.window - task.slot, min_of(own + 1 - task.slot, count),
                   step.softcap, partial.largest + r, partial.sum + r);
      if (int8) scale_slots(task, step.v_scale, scores);
    }
    // A task begins at a multiple of its slots: values in front of the first token's window are not
    // numbers that count, and 0 times what is not finite is NaN.
    const int64_t seen = max_of(seqlen + task.token - step.window - task.slot, 0);
    by_rows(rows, [&](auto R, int64_t r) {
      weigh<R, sum_vecs(R)>(space.scores + r * kSlots, v, 0, width, seen, count,
                            partial.out + r * width);
    });
  });
}

void finish(const DecodeStep& step, const DecodeTask& task, const DecodePartial* partials,
            int64_t count) {
  const int64_t rows = step.groups * (task.token_end - task.token), width = padded_dim(step);
  for (int64_t r = 0; r < rows; ++r) {
    float largest = -kInf;
    for (int64_t i = 0; i < count; ++i) {
      const float x = partials[i].largest[r];
      largest = x > largest ? x : largest;
    }
    const float shift = largest == -kInf ? 0 : largest;
    float* out = partials[0].out + r * width;
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float weight = count == 1 ? 1 : std::exp(partials[i].largest[r] - shift);
      const float* part = partials[i].out + r * width;
      sum += weight * partials[i].sum[r];
      for (int64_t d = 0; d < step.dim; ++d) out[d] = (i ? out[d] : 0) + weight * part[d];
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < step.dim; ++d) out[d] *= inverse;
    const int64_t q_head = task.head * step.groups + r % step.groups;
    store_row(out, step.dim, step.type, step.out.data,
              element(step.out, task.row, task.token + r / step.groups, q_head));
  }
}

}  // namespace

extern const DecodeKernels decode_kernels = {append, attend, finish, Space::size};

}  // namespace t2i::cpu::CPU_CAPABILITY
