// See flash_attention.h. Compiled once per instruction set: nothing here may define a symbol outside
// the namespace CPU_CAPABILITY.
#include "cpu/flash_attention.h"

#include <cmath>

#include "cpu/attention_rows.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 64;      // of a block of scores
constexpr int64_t kGradRows = 64;  // rows of such a block in the backward pass
constexpr int64_t kGradKeys = 16;  // keys whose first and last row are looked up together

static_assert(kRows % kTileLanes == 0 && kGradRows % kTileLanes == 0);

// Tiles of rows that are only partly seen are cut, so that less is computed in vain.
constexpr int64_t kMaskedLanes = 2 * kLanes;

// ---- Scores ------------------------------------------------------------------------------------

// The factor of q that makes products with keys scores or, with a softcap, its argument.
float score_factor(const Attention& a) {
  return a.softcap > 0 ? a.scale / a.softcap : a.scale;
}

// scores[count, stride] = k q^T for vecs vectors of rows; with a softcap bounded by it. k is
// [count, dim], q is [dim, kTileLanes].
template <int R>
void score_keys(const Attention& a, const float* k, const float* q, int64_t count, float* scores,
                int64_t stride) {
  panel_product<By::rows, R>(
      k, a.dim, q, kTileLanes, count, a.dim, [](int64_t, int) { return Vec(0.f); },
      [&](int64_t j, int r, const Vec& x) { x.store(scores + j * stride + r * kLanes); });
  if (a.softcap > 0) {
    const Vec cap(a.softcap);
    for (int64_t j = 0; j < count; ++j) {
      for (int r = 0; r < R; ++r) {
        float* at = scores + j * stride + r * kLanes;
        (tanh(Vec::loadu(at)) * cap).store(at);
      }
    }
  }
}

// ---- Forward -----------------------------------------------------------------------------------

struct ForwardSpace {
  float *q, *out;          // [tiles, dim or v_dim, kTileLanes]
  float *k, *v;            // [kKeys, dim or v_dim]
  float* scores;           // [kKeys, kTileLanes]
  float *largest, *sum;    // [rows], of the scores and of their exponentials
  float* rows;             // [kTileLanes, dim or v_dim]: rows on their way

  static int64_t size(const Attention& a, int64_t count) {
    const int64_t padded = round_up(count, kTileLanes);
    return (padded + kKeys + kTileLanes) * (a.dim + a.v_dim) + kKeys * kTileLanes + 2 * padded;
  }

  ForwardSpace(const Attention& a, int64_t count, float* space) {
    const int64_t padded = round_up(count, kTileLanes);
    scores = space;
    k = scores + kKeys * kTileLanes;
    v = k + kKeys * a.dim;
    q = v + kKeys * a.v_dim;
    out = q + padded * a.dim;
    largest = out + padded * a.v_dim;
    sum = largest + padded;
    rows = sum + padded;
  }
};

// Brings R vectors of rows, from row on, up to date with the keys [keys.begin, keys.end), of which k
// and v hold the values from the first on.
template <int R>
void attend(const Attention& a, const Sequence& s, int64_t row, int64_t count, Range keys,
            const float* q, const float* k, const float* v, float* scores, float* out,
            float* largest, float* sum) {
  const int64_t num_keys = keys.end - keys.begin;
  score_keys<R>(a, k, q, num_keys, scores, kTileLanes);
  const Range all = intersection(seen_by_all(a, s, row, count), keys);
  Vec factor[R];
  for (int r = 0; r < R; ++r) {
    float* column = scores + r * kLanes;
    if (all.begin > keys.begin || all.end < keys.end) {
      const Sight sight(a, s, row + r * kLanes);
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        if (key == all.begin && all.end > all.begin) key = all.end;
        if (key == keys.end) break;
        float* at = column + (key - keys.begin) * kTileLanes;
        Vec::blendv(Vec(-kInf), Vec::loadu(at), sight.of(key)).store(at);
      }
    }
    const Vec before = Vec::loadu(largest + r * kLanes);
    Vec top[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= num_keys; j += 4) {
      for (int i = 0; i < 4; ++i) {
        // In this order a NaN among the scores does not hide the rest.
        top[i] = at::vec::clamp_min(top[i], Vec::loadu(column + (j + i) * kTileLanes));
      }
    }
    for (; j < num_keys; ++j) {
      top[0] = at::vec::clamp_min(top[0], Vec::loadu(column + j * kTileLanes));
    }
    const Vec now = at::vec::clamp_min(at::vec::clamp_min(top[0], top[1]),
                                       at::vec::clamp_min(top[2], top[3]));
    // Where nothing was seen yet any finite number will do: -inf - -inf is NaN.
    const Vec shift = at::vec::clamp_min(now, Vec(std::numeric_limits<float>::lowest()));
    Vec total[2] = {Vec(0.f), Vec(0.f)};
    for (j = 0; j + 2 <= num_keys; j += 2) {
      for (int i = 0; i < 2; ++i) {
        float* at = column + (j + i) * kTileLanes;
        const Vec p = exp_difference(Vec::loadu(at), shift);
        total[i] = total[i] + p;
        p.store(at);
      }
    }
    if (j < num_keys) {
      float* at = column + j * kTileLanes;
      const Vec p = exp_difference(Vec::loadu(at), shift);
      total[0] = total[0] + p;
      p.store(at);
    }
    factor[r] = exp_difference(before, shift);
    now.store(largest + r * kLanes);
    at::vec::fmadd(Vec::loadu(sum + r * kLanes), factor[r], total[0] + total[1])
        .store(sum + r * kLanes);
  }
  panel_product<By::columns, R>(
      v, a.v_dim, scores, kTileLanes, a.v_dim, num_keys,
      [&](int64_t d, int r) { return Vec::loadu(out + d * kTileLanes + r * kLanes) * factor[r]; },
      [&](int64_t d, int r, const Vec& x) { x.store(out + d * kTileLanes + r * kLanes); });
}

void forward(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row, int64_t count,
             int64_t key, int64_t key_end, const Partial* partial, float* workspace) {
  const ForwardSpace space(a, count, workspace);
  load_transposed(a, s.q, kv_head, row, count, a.dim, score_factor(a), space.q, space.rows);
  const int64_t padded = round_up(count, kTileLanes);
  std::memset(space.out, 0, size_t(padded * a.v_dim) * sizeof(float));
  for (int64_t r = 0; r < padded; ++r) {
    space.largest[r] = -kInf;
    space.sum[r] = 0;
  }

  const Range range = intersection(seen_by_any(a, s, row, count), {key, key_end});
  for (int64_t begin = first_block(key, range, kKeys); begin < range.end; begin += kKeys) {
    const Range block = intersection({begin, begin + kKeys}, range);
    load_keys(a, s.k, kv_head, block.begin, block.end - block.begin, a.dim, space.k);
    load_keys(a, s.v, kv_head, block.begin, block.end - block.begin, a.v_dim, space.v);
    for (int64_t first = 0, step; first < count; first += step) {
      const Range all = intersection(
          seen_by_all(a, s, row + first, min_of(kTileLanes, count - first)), block);
      const bool whole = all.end - all.begin == block.end - block.begin;
      step = whole && first % kTileLanes == 0 ? kTileLanes : kMaskedLanes;
      const int64_t here = min_of(step, count - first);
      const Range keys = intersection(seen_by_any(a, s, row + first, here), block);
      if (keys.begin == keys.end) continue;
      const int64_t tile = first / kTileLanes * kTileLanes, lane = first - tile;
      with_vecs(round_up(here, kLanes) / kLanes, [&](auto vecs) {
        attend<vecs>(a, s, row + first, here, keys, space.q + tile * a.dim + lane,
                     space.k + (keys.begin - block.begin) * a.dim,
                     space.v + (keys.begin - block.begin) * a.v_dim, space.scores,
                     space.out + tile * a.v_dim + lane, space.largest + first,
                     space.sum + first);
      });
    }
  }

  for (int64_t r = 0; r < count; ++r) {
    if (r % kTileLanes == 0) {
      transpose(space.out + r * a.v_dim, kTileLanes, a.v_dim, kTileLanes, 1, space.rows, a.v_dim);
    }
    const bool unseeing = space.sum[r] == 0;
    const float inverse = unseeing ? 0 : 1 / space.sum[r];
    float* out = space.rows + r % kTileLanes * a.v_dim;
    for (int64_t d = 0; d < a.v_dim; ++d) out[d] *= inverse;
    const float logsumexp = unseeing ? -kInf : space.largest[r] + std::log(space.sum[r]);
    store_result(a, s, kv_head, row + r, out, logsumexp, partial, r);
  }
}

void combine(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row, int64_t count,
             const Partial* partials, int64_t num_partials, float* workspace) {
  for (int64_t r = 0; r < count; ++r) {
    float largest = -kInf;
    for (int64_t i = 0; i < num_partials; ++i) {
      const float x = partials[i].logsumexp[r];
      largest = x > largest ? x : largest;
    }
    const float shift = largest == -kInf ? 0 : largest;
    float sum = 0;
    for (int64_t d = 0; d < a.v_dim; ++d) workspace[d] = 0;
    for (int64_t i = 0; i < num_partials; ++i) {
      const float weight = std::exp(partials[i].logsumexp[r] - shift);
      sum += weight;
      const float* out = partials[i].out + r * a.v_dim;
      for (int64_t d = 0; d < a.v_dim; ++d) workspace[d] += weight * out[d];
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < a.v_dim; ++d) workspace[d] *= inverse;
    const float logsumexp = sum == 0 ? -kInf : shift + std::log(sum);
    store_result(a, s, kv_head, row + r, workspace, logsumexp, nullptr, 0);
  }
}

// ---- Backward ----------------------------------------------------------------------------------

// FlashAttention-2, section 2.3.2, with scores computed again from the logsumexp:
//   P = exp(S - lse), dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta = sum(dO O) - dlse,
//   dQ = scale dS K, dK = scale dS^T Q; a softcap multiplies dS by 1 - (S / cap)^2.
struct BackwardSpace {
  float *q, *dout;                    // [tiles, dim or v_dim, kTileLanes]
  float *q_rows, *dout_rows;          // [kGradRows, width or v_width]
  float* dq;                          // [tiles, dim, kTileLanes]
  float *p, *ds;                      // [kKeys, kGradRows]
  float *logsumexp, *delta;           // [kGradRows]
  float *k, *v;                       // [keys, dim or v_dim]
  float *dk, *dv;                     // [keys, width or v_width]
  float* rows;                        // [kTileLanes, width or v_width]: rows on their way
  int64_t width, v_width;             // dim and v_dim, rounded up to lanes

  static int64_t size(const Attention& a, int64_t keys) {
    const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes);
    return kGradRows * (2 * a.dim + a.v_dim + width + v_width) + 2 * kKeys * kGradRows +
           2 * kGradRows + keys * (a.dim + a.v_dim + width + v_width) +
           kTileLanes * (width + v_width);
  }

  BackwardSpace(const Attention& a, int64_t keys, float* space) {
    const auto take = [&](int64_t count) {
      float* taken = space;
      space += count;
      return taken;
    };
    width = round_up(a.dim, kLanes);
    v_width = round_up(a.v_dim, kLanes);
    q = take(kGradRows * a.dim);
    dout = take(kGradRows * a.v_dim);
    q_rows = take(kGradRows * width);
    dout_rows = take(kGradRows * v_width);
    dq = take(kGradRows * a.dim);
    p = take(kKeys * kGradRows);
    ds = take(kKeys * kGradRows);
    logsumexp = take(kGradRows);
    delta = take(kGradRows);
    k = take(keys * a.dim);
    v = take(keys * a.v_dim);
    dk = take(keys * width);
    dv = take(keys * v_width);
    rows = take(kTileLanes * (width + v_width));
  }
};

// logsumexp and delta of the rows; those that see nothing, and those behind the last, get no P.
void load_statistics(const Attention& a, const Sequence& s, const SequenceGradients& g,
                     int64_t kv_head, int64_t row, int64_t count, const BackwardSpace& space) {
  for (int64_t r = 0; r < kGradRows; ++r) {
    space.logsumexp[r] = kInf;
    space.delta[r] = 0;
    if (r >= count) continue;
    const int64_t stack = row + r;
    const int64_t at = statistic(a, s, kv_head, stack);
    if (s.logsumexp[at] == -kInf) {  // P is 0 there, which 0 * NaN would undo
      for (int64_t d = 0; d < space.v_width; ++d) space.dout_rows[r * space.v_width + d] = 0;
      continue;
    }
    load_row(s.out.data, a.type, stacked(a, s.out, kv_head, stack), a.v_dim, space.rows);
    const float* dout = space.dout_rows + r * space.v_width;
    float sum = 0;
    for (int64_t d = 0; d < a.v_dim; ++d) sum += dout[d] * space.rows[d];
    space.delta[r] = sum - (g.dlogsumexp ? g.dlogsumexp[at] : 0);
    space.logsumexp[r] = s.logsumexp[at];
  }
}

// P and dS of one tile of rows, [keys, kGradRows] each, from first on in the block of rows. Keys
// that no row of the tile sees get 0.
template <int R>
void differentiate(const Attention& a, const Sequence& s, int64_t row, int64_t first,
                   int64_t count, Range block, const float* k, const float* v,
                   const BackwardSpace& space) {
  float *p = space.p + first, *ds = space.ds + first;
  const Range keys = intersection(seen_by_any(a, s, row + first, count), block);
  for (int64_t j = 0; j < block.end - block.begin; ++j) {
    if (j >= keys.begin - block.begin && j < keys.end - block.begin) continue;
    for (int r = 0; r < R; ++r) {
      Vec(0.f).store(p + j * kGradRows + r * kLanes);
      Vec(0.f).store(ds + j * kGradRows + r * kLanes);
    }
  }
  if (keys.begin == keys.end) return;
  const int64_t from = keys.begin - block.begin, num_keys = keys.end - keys.begin;
  p += from * kGradRows;
  ds += from * kGradRows;
  score_keys<R>(a, k + from * a.dim, space.q + first * a.dim, num_keys, p, kGradRows);
  panel_product<By::rows, R>(
      v + from * a.v_dim, a.v_dim, space.dout + first * a.v_dim, kTileLanes, num_keys, a.v_dim,
      [](int64_t, int) { return Vec(0.f); },
      [&](int64_t j, int r, const Vec& x) { x.store(ds + j * kGradRows + r * kLanes); });

  const Range all = intersection(seen_by_all(a, s, row + first, count), keys);
  const Vec inverse_cap(a.softcap > 0 ? 1 / a.softcap : 0.f);
  for (int r = 0; r < R; ++r) {
    const Vec logsumexp = Vec::loadu(space.logsumexp + first + r * kLanes);
    const Vec delta = Vec::loadu(space.delta + first + r * kLanes);
    const Sight sight(a, s, row + first + r * kLanes);
    for (int64_t j = 0; j < num_keys; ++j) {
      float *p_at = p + j * kGradRows + r * kLanes, *ds_at = ds + j * kGradRows + r * kLanes;
      const Vec score = Vec::loadu(p_at);
      Vec probability = exp_difference(score, logsumexp);
      Vec gradient = (Vec::loadu(ds_at) - delta) * probability;
      if (a.softcap > 0) {
        const Vec tanh = score * inverse_cap;
        gradient = gradient * (Vec(1.f) - tanh * tanh);
      }
      const int64_t key = keys.begin + j;
      if (key < all.begin || key >= all.end) {
        const Vec seen = sight.of(key);
        probability = Vec::blendv(Vec(0.f), probability, seen);
        gradient = Vec::blendv(Vec(0.f), gradient, seen);
      }
      probability.store(p_at);
      gradient.store(ds_at);
    }
  }
}

void backward(const Attention& a, const Sequence& s, const SequenceGradients& g, int64_t kv_head,
              int64_t key, int64_t key_end, float* dq, float* workspace) {
  const int64_t keys = key_end - key, rows = a.groups * s.q_length;
  const BackwardSpace space(a, keys, workspace);
  load_keys(a, s.k, kv_head, key, keys, a.dim, space.k);
  load_keys(a, s.v, kv_head, key, keys, a.v_dim, space.v);
  std::memset(space.dk, 0, size_t(keys * space.width) * sizeof(float));
  std::memset(space.dv, 0, size_t(keys * space.v_width) * sizeof(float));

  for (int64_t row = 0; row < rows; row += kGradRows) {
    const int64_t count = min_of(kGradRows, rows - row), padded = round_up(count, kLanes);
    std::memset(space.dq, 0, size_t(kGradRows * a.dim) * sizeof(float));
    const Range range = intersection(seen_by_any(a, s, row, count), {key, key_end});
    if (range.begin < range.end) {
      load_transposed(a, s.q, kv_head, row, count, a.dim, score_factor(a), space.q, space.rows);
      load_transposed(a, g.dout, kv_head, row, count, a.v_dim, 1, space.dout, space.rows);
      load_stacked(a, s.q, kv_head, row, count, a.dim, space.width, space.q_rows);
      load_stacked(a, g.dout, kv_head, row, count, a.v_dim, space.v_width, space.dout_rows);
      for (int64_t r = count; r < padded; ++r) {
        for (int64_t d = 0; d < space.width; ++d) space.q_rows[r * space.width + d] = 0;
        for (int64_t d = 0; d < space.v_width; ++d) space.dout_rows[r * space.v_width + d] = 0;
      }
      load_statistics(a, s, g, kv_head, row, count, space);
    }
    for (int64_t begin = range.begin; begin < range.end; begin += kKeys) {
      const Range block = {begin, min_of(begin + kKeys, range.end)};
      const int64_t num_keys = block.end - begin;
      const float *k = space.k + (begin - key) * a.dim, *v = space.v + (begin - key) * a.v_dim;
      for (int64_t first = 0; first < count; first += kTileLanes) {
        const int64_t here = min_of(kTileLanes, count - first);
        with_vecs(round_up(here, kLanes) / kLanes, [&](auto vecs) {
          differentiate<vecs>(a, s, row, first, here, block, k, v, space);
        });
        // dQ^T += K^T dS^T, over the keys that this tile sees.
        const Range seen = intersection(seen_by_any(a, s, row + first, here), block);
        if (seen.begin == seen.end) continue;
        multiply<By::columns>(space.k + (seen.begin - key) * a.dim, a.dim,
                              space.ds + (seen.begin - begin) * kGradRows + first, kGradRows,
                              space.dq + first * a.dim, kTileLanes, a.dim,
                              round_up(here, kLanes), seen.end - seen.begin);
      }
      // dV += P^T dO and dK += dS^T Q, over the rows that see these keys.
      const Range sure = intersection(seen_by_all(a, s, row, count), block);
      const bool whole = sure.begin == block.begin && sure.end == block.end;
      const int64_t step = whole ? num_keys : kGradKeys;
      for (int64_t j = 0; j < num_keys; j += step) {
        const int64_t part = min_of(step, num_keys - j);
        const Range see = intersection(rows_that_see(a, s, {begin + j, begin + j + part}),
                                       {row, row + count});
        const int64_t from = see.begin - row, depth = see.end - see.begin;
        if (depth == 0) continue;
        multiply<By::rows>(space.p + j * kGradRows + from, kGradRows,
                           space.dout_rows + from * space.v_width, space.v_width,
                           space.dv + (begin + j - key) * space.v_width, space.v_width, part,
                           space.v_width, depth);
        multiply<By::rows>(space.ds + j * kGradRows + from, kGradRows,
                           space.q_rows + from * space.width, space.width,
                           space.dk + (begin + j - key) * space.width, space.width, part,
                           space.width, depth);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      if (r % kTileLanes == 0) {
        transpose(space.dq + r * a.dim, kTileLanes, a.dim, kTileLanes, a.scale, space.rows, a.dim);
      }
      const float* from = space.rows + r % kTileLanes * a.dim;
      if (dq) {
        std::memcpy(dq + (row + r) * a.dim, from, size_t(a.dim) * sizeof(float));
      } else {
        store_row(from, a.dim, a.type, g.dq.data, stacked(a, g.dq, kv_head, row + r));
      }
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    float *dk = space.dk + j * space.width, *dv = space.dv + j * space.v_width;
    for (int64_t d = 0; d < a.dim; ++d) dk[d] *= a.scale;
    store_row(dk, a.dim, a.type, g.dk.data, element(g.dk, key + j, kv_head));
    store_row(dv, a.v_dim, a.type, g.dv.data, element(g.dv, key + j, kv_head));
  }
}

void sum_dq(const Attention& a, const Sequence&, const SequenceGradients& g, int64_t kv_head,
            int64_t row, int64_t row_end, const float* dq, int64_t count, int64_t stride,
            float* workspace) {
  for (int64_t r = row; r < row_end; ++r) {
    for (int64_t d = 0; d < a.dim; ++d) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += dq[i * stride + r * a.dim + d];
      workspace[d] = sum;
    }
    store_row(workspace, a.dim, a.type, g.dq.data, stacked(a, g.dq, kv_head, r));
  }
}

}  // namespace

extern const AttentionKernels attention_kernels = {
    forward, ForwardSpace::size, combine, backward, BackwardSpace::size, sum_dq};

}  // namespace t2i::cpu::CPU_CAPABILITY
