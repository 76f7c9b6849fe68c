// See decode_attention.h. Compiled once per instruction set: nothing here may define a symbol
// outside the namespace CPU_CAPABILITY.
#include "cpu/decode_attention.h"

#include <cmath>

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
  float *q, *k, *v;  // [groups * tokens of a task, padded dim], [kSlots, padded dim]
  float* scores;     // [groups * tokens of a task, kSlots]
  float* row;        // [2, padded dim]

  Space(const DecodeStep& step, float* space) {
    const int64_t rows = step.groups * decode_tokens(step), width = padded_dim(step);
    q = space;
    k = q + rows * width;
    v = k + kSlots * width;
    scores = v + kSlots * width;
    row = scores + rows * kSlots;
  }

  static int64_t size(const DecodeStep& step) {
    const int64_t rows = step.groups * decode_tokens(step), width = padded_dim(step);
    return rows * (width + kSlots) + 2 * kSlots * width + 2 * width;
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

// Slots of one head as fp32 rows.
struct SlotRows {
  const float* data;
  int64_t stride;
};

// The slots [slot, slot + count), where they are if that will do, else in scratch [kSlots, padded
// dim], 0 behind dim.
SlotRows read_slots(const DecodeStep& step, const Tokens& cache, const Scales& scales, int64_t row,
                    int64_t head, int64_t slot, int64_t count, float* scratch) {
  const int64_t width = padded_dim(step), first = element(cache, row, slot, head);
  if (step.cache_type == CacheType::f32 && width == step.dim) {
    return {static_cast<const float*>(cache.data) + first, cache.token_stride};
  }
  for (int64_t j = 0; j < count; ++j) {
    float* out = scratch + j * width;
    const int64_t at = first + j * cache.token_stride;
    if (step.cache_type != CacheType::int8) {
      load_row(cache.data, float_type(step.cache_type), at, step.dim, out);
    } else {
      const int8_t* x = static_cast<const int8_t*>(cache.data) + at;
      const float scale = scales.data[row * scales.batch_stride + (slot + j) * scales.slot_stride +
                                      head * scales.head_stride];
      for (int64_t d = 0; d < step.dim; ++d) out[d] = float(x[d]) * scale;
    }
    for (int64_t d = step.dim; d < width; ++d) out[d] = 0;
  }
  return {scratch, width};
}

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

// scores[R, kSlots]: q[R, width] . k, for count slots, which are read once, in their order: what
// the processor fetches ahead by itself is the most that memory gives.
template <int R>
void dot(const float* q, const SlotRows& k, int64_t width, int64_t count, float* scores) {
  for (int64_t first = 0; first < count; first += kLanes) {
    Vec x[R][kLanes];
    const int64_t here = min_of(kLanes, count - first);
    for (int64_t i = 0; i < here; ++i) {
      const float* row = k.data + (first + i) * k.stride;
      Vec sum[R];
      for (int r = 0; r < R; ++r) sum[r] = Vec(0.f);
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec key = Vec::loadu(row + d);
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

// The same for any number of rows of q.
void dot(const float* q, int64_t rows, const SlotRows& k, int64_t width, int64_t count,
         float* scores) {
  for (; rows >= 4; rows -= 4, q += 4 * width, scores += 4 * kSlots) {
    dot<4>(q, k, width, count, scores);
  }
  if (rows == 3) dot<3>(q, k, width, count, scores);
  if (rows == 2) dot<2>(q, k, width, count, scores);
  if (rows == 1) dot<1>(q, k, width, count, scores);
}

void attend(const DecodeStep& step, const DecodeTask& task, const DecodePartial& partial,
            float* workspace) {
  const Space space(step, workspace);
  const int64_t row = task.row, head = task.head, width = padded_dim(step);
  const int64_t rows = step.groups * (task.token_end - task.token);
  const int64_t start = step.start[row], seqlen = step.seqlens[row];
  const float factor = step.softcap > 0 ? step.scale / step.softcap : step.scale;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = task.token + r / step.groups;
    float* q = space.q + r * width;
    const int64_t q_head = head * step.groups + r % step.groups;
    load_row(step.q.data, step.type, element(step.q, row, token, q_head), step.dim, q);
    rotate(step, seqlen + token, start, q, space.row);
    for (int64_t d = 0; d < step.dim; ++d) q[d] *= factor;
    for (int64_t d = step.dim; d < width; ++d) q[d] = 0;
    partial.largest[r] = -kInf;
    partial.sum[r] = 0;
  }
  std::memset(partial.out, 0, size_t(rows * width) * sizeof(float));

  int64_t count;
  for (int64_t begin = task.slot; begin < task.slot_end; begin += count) {
    // Up to the next multiple of kSlots from start.
    count = min_of(kSlots - (begin - start) % kSlots, task.slot_end - begin);
    const SlotRows k =
        read_slots(step, step.k, step.k_scale, row, head, begin, count, space.k);
    const SlotRows v =
        read_slots(step, step.v, step.v_scale, row, head, begin, count, space.v);
    dot(space.q, rows, k, width, count, space.scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = space.scores + r * kSlots;
      const int64_t own = seqlen + task.token + r / step.groups;
      const int64_t first = own - step.window;  // no task has slots before start
      for (int64_t j = 0; j < kSlots; ++j) {
        if (j >= count || begin + j < first || begin + j > own) scores[j] = -kInf;
      }
      Vec top(partial.largest[r]);
      for (int64_t j = 0; j < kSlots; j += kLanes) {
        Vec score = Vec::loadu(scores + j);
        if (step.softcap > 0) {
          // tanh of -inf is -1, and would be seen.
          const Vec capped = tanh(score) * Vec(step.softcap);
          score = Vec::blendv(capped, score, score == Vec(-kInf));
          score.store(scores + j);
        }
        top = at::vec::clamp_min(top, score);
      }
      const float largest = largest_lane(top);
      const float shift = largest == -kInf ? 0 : largest;
      Vec total(0.f);
      for (int64_t j = 0; j < kSlots; j += kLanes) {
        const Vec p = exp_difference(Vec::loadu(scores + j), Vec(shift));
        total = total + p;
        p.store(scores + j);
      }
      float lanes[kLanes], sum = 0;
      total.store(lanes);
      for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
      const float scale = std::exp(partial.largest[r] - shift);
      partial.largest[r] = largest;
      partial.sum[r] = partial.sum[r] * scale + sum;
      float* out = partial.out + r * width;
      for (int64_t d = 0; d < width; ++d) out[d] *= scale;
    }
    multiply<By::rows>(space.scores, kSlots, v.data, v.stride, partial.out, width, rows, width,
                       count);
  }
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
