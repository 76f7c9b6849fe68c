// t2i::decode_attention.cpu on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/decode_attention/api.py.
#include "cpu/decode_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "bindings/common.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kOp = "decode_attention";
constexpr int64_t kPart = 1024;  // slots of a task at most

template <typename... Args>
void check_index(bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  text << kOp << ": ";
  (text << ... << message);
  throw std::out_of_range(text.str());  // Python: IndexError
}

Tokens tokens_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

Scales scales_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0};
  return {const_cast<float*>(tensor->const_data_ptr<float>()), tensor->stride(0),
          tensor->stride(1), tensor->stride(2)};
}

struct Part {
  int64_t row, head, slot, slot_end;
};

Tensor decode_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor k_cache, Tensor v_cache,
                        std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                        Tensor seqlens, Tensor start, std::optional<Tensor> rotary_cos,
                        std::optional<Tensor> rotary_sin, bool rotary_interleaved, int64_t window,
                        double softcap, double scale) {
  for (const Tensor* cache : {&k_cache, &v_cache}) {  // written in place: no copy will do
    check(kOp, cache->is_cpu() && cache->dim() == 4, "cache must be [B, slots, Hkv, D] on the CPU");
    check(kOp, cache->stride(3) == 1 || cache->size(3) <= 1,
          "cache must be contiguous in its last dimension");
  }
  q = with_contiguous_rows(q);
  k_new = with_contiguous_rows(k_new);
  v_new = with_contiguous_rows(v_new);
  check(kOp, q.dim() == 4 && k_new.dim() == 4 && v_new.dim() == 4, "q, k_new and v_new must be "
        "[B, n, heads, D]");
  const int64_t batch = q.size(0), kv_heads = k_new.size(2), slots = k_cache.size(1);
  std::vector<int64_t> out_shape;
  for (int64_t i = 0; i < 4; ++i) out_shape.push_back(q.size(i));
  Tensor out = torch::stable::empty(out_shape, q.scalar_type());

  DecodeStep step;
  step.type = float_type(kOp, q, "q");
  step.cache_type =
      k_cache.scalar_type() == ScalarType::Char ? CacheType::int8 : CacheType::same;
  step.tokens = q.size(1);
  step.kv_heads = kv_heads;
  step.groups = kv_heads > 0 ? q.size(2) / kv_heads : 1;
  step.dim = q.size(3);
  step.q = tokens_of(q);
  step.k_new = tokens_of(k_new);
  step.v_new = tokens_of(v_new);
  step.k = tokens_of(k_cache);
  step.v = tokens_of(v_cache);
  step.out = tokens_of(out);
  step.k_scale = scales_of(k_scale);
  step.v_scale = scales_of(v_scale);
  const Tensor lengths = torch::stable::contiguous(seqlens), starts = torch::stable::contiguous(start);
  step.seqlens = lengths.const_data_ptr<int32_t>();
  step.start = starts.const_data_ptr<int32_t>();
  std::optional<Tensor> cos, sin;
  step.cos = step.sin = nullptr;
  step.pairs = 0;
  int64_t positions = 0;
  if (rotary_cos) {
    cos = torch::stable::contiguous(*rotary_cos);
    sin = torch::stable::contiguous(*rotary_sin);
    step.cos = cos->const_data_ptr<float>();
    step.sin = sin->const_data_ptr<float>();
    positions = cos->size(0);
    step.pairs = cos->size(1);
  }
  step.interleaved = rotary_interleaved;
  constexpr int64_t kUnbounded = int64_t(1) << 40;
  step.window = window < 0 ? kUnbounded : std::min(window, kUnbounded);
  check(kOp, softcap == 0 || softcap >= 1e-20, "softcap must be 0 or at least 1e-20, got ",
        softcap);
  step.softcap = float(softcap);
  step.scale = float(scale);
  if (batch == 0 || step.tokens == 0) return out;

  // Before anything is written.
  int64_t low = step.seqlens[0], high = step.seqlens[0], earliest = step.start[0], last = 0;
  for (int64_t b = 0; b < batch; ++b) {
    low = std::min<int64_t>(low, step.seqlens[b]);
    high = std::max<int64_t>(high, step.seqlens[b]);
    earliest = std::min<int64_t>(earliest, step.start[b]);
    last = std::max<int64_t>(last, step.seqlens[b] + step.tokens - 1 - step.start[b]);
  }
  high += step.tokens - 1;
  check_index(low >= 0 && high < slots, "cache.seqlens puts the new tokens into slots ", low,
              " to ", high, ", but the cache has ", slots, " slots");
  check_index(earliest >= 0, "cache.start is ", earliest, ", below 0");
  check_index(!cos || last < positions, "position ", last, " is outside rotary_cos, which has ",
              positions);

  std::vector<Part> parts;
  std::vector<int64_t> first_part;  // of each (row, head)
  bool cut = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = step.seqlens[b] + step.tokens;
    const int64_t begin =
        std::min(end, std::max<int64_t>(step.start[b], step.seqlens[b] - step.window));
    for (int64_t h = 0; h < kv_heads; ++h) {
      first_part.push_back(int64_t(parts.size()));
      // Cut at multiples of kPart, wherever the row begins.
      int64_t slot = begin;
      do {
        const int64_t stop = std::min(end, (slot / kPart + 1) * kPart);
        parts.push_back({b, h, slot, stop});
        slot = stop;
      } while (slot < end);
      cut = cut || int64_t(parts.size()) - first_part.back() > 1;
    }
  }
  first_part.push_back(int64_t(parts.size()));

  const DecodeKernels& kernels = decode_kernels();
  const int64_t workspace = kernels.workspace(step), rows = step.groups * step.tokens;
  const int64_t width = (step.dim + 15) / 16 * 16, size = rows * (width + 2);
  const auto partial_in = [&](float* memory) {
    return DecodePartial{memory, memory + rows * width, memory + rows * (width + 1)};
  };
  const int64_t heads = batch * kv_heads;
  if (!cut) {
    run_tasks(heads, workspace + size, [&](int64_t i, float* space) {
      const Part& part = parts[i];
      const DecodePartial partial = partial_in(space + workspace);
      kernels.append(step, part.row, part.head, space);
      kernels.attend(step, part.row, part.head, part.slot, part.slot_end, partial, space);
      kernels.finish(step, part.row, part.head, &partial, 1);
    });
    return out;
  }
  const Floats memory = allocate(int64_t(parts.size()) * size);
  std::vector<DecodePartial> partials;
  for (size_t i = 0; i < parts.size(); ++i) {
    partials.push_back(partial_in(memory.get() + int64_t(i) * size));
  }
  run_tasks(heads, workspace, [&](int64_t i, float* space) {
    kernels.append(step, parts[first_part[i]].row, parts[first_part[i]].head, space);
  });
  run_tasks(int64_t(parts.size()), workspace, [&](int64_t i, float* space) {
    const Part& part = parts[i];
    kernels.attend(step, part.row, part.head, part.slot, part.slot_end, partials[i], space);
  });
  run_tasks(heads, 1, [&](int64_t i, float*) {
    const Part& part = parts[first_part[i]];
    kernels.finish(step, part.row, part.head, &partials[first_part[i]],
                   first_part[i + 1] - first_part[i]);
  });
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) {
  m.impl("decode_attention.cpu", TORCH_BOX(&t2i::decode_attention));
}
