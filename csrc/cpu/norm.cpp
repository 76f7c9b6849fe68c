// See norm.h. Compiled once per instruction set: nothing here may define a symbol outside the
// namespace CPU_CAPABILITY.
#include "cpu/norm.h"

#include <cmath>

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

// f(offset, number of channels) of each vector of them.
template <typename F>
void each(int64_t channels, F f) {
  for (int64_t d = 0; d < channels; d += kLanes) f(d, min_of(kLanes, channels - d));
}

Vec load(const float* x, int64_t count) {
  return count == kLanes ? Vec::loadu(x) : Vec::loadu(x, int(count));
}

float sum_of(const Vec& x) {
  float lanes[kLanes], sum = 0;
  x.store(lanes);
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

void normalise(const float* x, int64_t channels, const Norm& norm, float* out) {
  float mean = 0;
  if (norm.centered) {
    Vec sum(0.f);
    each(channels, [&](int64_t d, int64_t count) { sum = sum + load(x + d, count); });
    mean = sum_of(sum) / float(channels);
  }
  float squares = 0;
  Vec sum(0.f);
  each(channels, [&](int64_t d, int64_t count) {
    if (count < kLanes) {  // beyond the end, 0 is not the mean
      for (int64_t i = d; i < d + count; ++i) squares += (x[i] - mean) * (x[i] - mean);
      return;
    }
    const Vec difference = Vec::loadu(x + d) - Vec(mean);
    sum = at::vec::fmadd(difference, difference, sum);
  });
  squares += sum_of(sum);
  const float factor = 1 / std::sqrt(squares / float(channels) + norm.eps);
  each(channels, [&](int64_t d, int64_t count) {
    Vec y = (load(x + d, count) - Vec(mean)) * Vec(factor) * load(norm.weight + d, count);
    if (norm.bias) y = y + load(norm.bias + d, count);
    count == kLanes ? y.store(out + d) : y.store(out + d, int(count));
  });
}

}  // namespace

extern const NormRow norm_row = normalise;

}  // namespace t2i::cpu::CPU_CAPABILITY
