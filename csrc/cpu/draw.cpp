// See draw.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY.
#include "cpu/draw.h"

#include <cmath>

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 64;  // codes whose noise is looked at together
static_assert(kBlock % kLanes == 0);

// ---- Noise -------------------------------------------------------------------------------------

// SplitMix64's finaliser.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline uint64_t bits_of(uint64_t state, int64_t code) {
  return mix(state + uint64_t(code + 1) * 0x9E3779B97F4A7C15u);
}

double gumbel(uint64_t bits) {
  const double uniform = (double(int64_t(bits >> 12)) + 0.5) * 0x1p-52;
  return -std::log(-std::log(uniform));
}

// ---- The likely codes --------------------------------------------------------------------------

// The k-th largest of x, which it reorders (Hoare, "Find", 1961).
float kth_largest(float* x, int64_t count, int64_t k) {
  int64_t low = 0, high = count - 1;
  const int64_t target = k - 1;
  while (low < high) {
    const float pivot = x[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const float swapped = x[i];
        x[i++] = x[j];
        x[j--] = swapped;
      }
    }
    if (target <= j) {
      high = j;
    } else if (target >= i) {
      low = i;
    } else {
      break;
    }
  }
  return x[target];
}

// The score of the k-th most likely code. scratch: codes. k blocks have a largest score each: the
// k-th largest of a block's is a score that k codes reach, and few more do.
float kth_score(const float* scores, int64_t codes, int64_t k, float* scratch) {
  int64_t block = 1;
  while (2 * block * k <= codes) block *= 2;
  float bound = -kInf;
  if (block >= kLanes) {
    int64_t blocks = 0;
    for (int64_t first = 0; first + block <= codes; first += block) {
      Vec largest = Vec::loadu(scores + first);
      for (int64_t i = kLanes; i < block; i += kLanes) {
        largest = at::vec::maximum(largest, Vec::loadu(scores + first + i));
      }
      float lanes[kLanes], most = -kInf;
      largest.store(lanes);
      for (int64_t i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
      scratch[blocks++] = most;
    }
    bound = kth_largest(scratch, blocks, k);
  }
  int64_t count = 0;
  for (int64_t i = 0; i < codes; ++i) {
    scratch[count] = scores[i];
    count += scores[i] >= bound;
  }
  return kth_largest(scratch, count, k);
}

// The lowest of the most likely scores, those >= least, whose probabilities reach p. scratch: codes.
// Scores are divided into steps below the largest; one step alone has to be sorted.
float nucleus_score(const float* scores, int64_t codes, float top, float least, double p,
                    float* scratch) {
  constexpr int kSteps = 256;
  constexpr float kPerStep = 1.f / 16;  // nats
  double mass[kSteps] = {}, total = 0;
  const auto step_of = [&](float score) {
    const float steps = (top - score) / kPerStep;
    return steps < kSteps - 1 ? int(steps) : kSteps - 1;
  };
  for (int64_t i = 0; i < codes; ++i) {
    if (scores[i] >= least) mass[step_of(scores[i])] += std::exp(double(scores[i]) - top);
  }
  for (double m : mass) total += m;
  int step = 0;
  double before = 0;
  while (step + 1 < kSteps && before + mass[step] < p * total) before += mass[step++];
  int64_t count = 0;
  for (int64_t i = 0; i < codes; ++i) {
    if (scores[i] >= least && step_of(scores[i]) == step) scratch[count++] = scores[i];
  }
  // A heap gives the largest first, and only as many as it takes.
  const auto sink = [&](int64_t i) {
    while (2 * i + 1 < count) {
      int64_t child = 2 * i + 1;
      if (child + 1 < count && scratch[child + 1] > scratch[child]) ++child;
      if (scratch[i] >= scratch[child]) return;
      const float swapped = scratch[i];
      scratch[i] = scratch[child];
      scratch[child] = swapped;
      i = child;
    }
  };
  for (int64_t i = count / 2; i-- > 0;) sink(i);
  float lowest = top;
  while (count > 0 && before < p * total) {
    lowest = scratch[0];
    before += std::exp(double(lowest) - top);
    scratch[0] = scratch[--count];
    sink(0);
  }
  return lowest;
}

// ---- The draw ----------------------------------------------------------------------------------

// The argmax of score + g. Of few codes the noise is computed: g = -log(-log u) <= -log(1 - u), so a
// code beats the best so far only if 1 - u <= e^(score - best), which the first bits of u decide.
int64_t noisy_argmax(const float* scores, int64_t codes, int64_t likeliest, float least,
                     uint64_t state) {
  int64_t best_code = likeliest;
  double best = double(scores[likeliest]) + gumbel(bits_of(state, likeliest));
  for (int64_t first = 0; first < codes; first += kBlock) {
    int32_t low[kBlock];  // 2^23 (1 - u), rounded down
    for (int64_t i = 0; i < kBlock; ++i) {
      low[i] = 0x7fffff - int32_t(bits_of(state, first + i) >> 41);
    }
    uint64_t possible = 0;
    // Lower by far more than the rounding of it and of what follows.
    const Vec bound(float(best) - 1e-3f - 1e-6f * std::fabs(float(best)));
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      using Int = at::vec::Vectorized<int32_t>;
      const Vec remainder = at::vec::convert_to_fp_of_same_size<float>(Int::loadu(low + i));
      const Vec score = Vec::loadu(scores + first + i);  // behind the last code: -inf
      const Vec ahead = at::vec::clamp_max(score - bound, Vec(0.f));
      const Vec reach = exp2(ahead * Vec(kLog2e)) * Vec(0x1p23f);
      const Vec yes = (remainder <= reach) & (score >= Vec(least));
      possible |= uint64_t(uint32_t(yes.zero_mask()) ^ uint32_t((uint64_t(1) << kLanes) - 1)) << i;
    }
    for (; possible; possible &= possible - 1) {
      const int64_t code = first + __builtin_ctzll(possible);
      const double score = double(scores[code]) + gumbel(bits_of(state, code));
      if (score > best || (score == best && code < best_code)) {
        best = score;
        best_code = code;
      }
    }
  }
  return best_code;
}

int64_t draw(const Draw& d, float* workspace) {
  const int64_t padded = round_up(d.codes, kBlock);
  float *scores = workspace, *scratch = workspace + padded;
  const float divisor = d.temperature == 0 ? 1 : d.temperature;
  int64_t likeliest = 0;
  float top = -kInf;
  bool finite = true;
  const float* base = d.guidance == 1 ? nullptr : d.unconditional;
  for (int64_t i = 0; i < d.codes; ++i) {
    const float x = d.logits[i];
    const float score = base ? base[i] + d.guidance * (x - base[i]) : x;
    finite = finite && score < kInf;
    scores[i] = score / divisor;
  }
  for (int64_t i = 0; i < d.codes; ++i) {
    if (scores[i] > top) {
      top = scores[i];
      likeliest = i;
    }
  }
  if (!finite || top == -kInf) return -1;
  if (d.temperature == 0) return likeliest;
  for (int64_t i = d.codes; i < padded; ++i) scores[i] = -kInf;

  float least = -std::numeric_limits<float>::max();  // -inf is never drawn
  if (d.top_k > 0 && d.top_k < d.codes) {
    const float kth = kth_score(scores, d.codes, d.top_k, scratch);
    least = kth > least ? kth : least;
  }
  if (d.top_p < 1) least = nucleus_score(scores, d.codes, top, least, d.top_p, scratch);
  const uint64_t state = mix(mix(uint64_t(d.seed)) + uint64_t(d.position));
  return noisy_argmax(scores, d.codes, likeliest, least, state);
}

}  // namespace

extern const DrawCode draw_code = draw;

}  // namespace t2i::cpu::CPU_CAPABILITY
