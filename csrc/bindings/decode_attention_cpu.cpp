// t2i::decode_attention.cpu on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/decode_attention/api.py.
#include "cpu/decode_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "bindings/common.h"
#include "bindings/decode_plan.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kOp = "decode_attention";
constexpr int64_t kMostFloats = 1 << 24;  // of results that wait for each other

Tokens read_only(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

Tokens written(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Scales written_scales(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0};
  return {tensor->mutable_data_ptr<float>(), tensor->stride(0), tensor->stride(1),
          tensor->stride(2)};
}

void attend(const DecodeStep& step, int64_t batch) {
  const DecodePlan plan = plan_decode(step, batch);
  const DecodeKernels& kernels = decode_kernels();
  const int64_t workspace = round_up(kernels.workspace(step));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), plan.num_parts());
  const Floats memory = allocate(plan.num_parts() * partial_size(step));
  const std::vector<DecodePartial> partials = partials_in(step, plan, memory.get());
  const Floats space = allocate(threads * workspace);
  std::atomic<int64_t> next{0};
  run_team(threads, [&](const Member& member) {
    run_decode(member, kernels, step, batch, plan, partials, next,
               space.get() + member.index * workspace);
  });
}

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
  const bool int8 = k_cache.scalar_type() == ScalarType::Char;
  check(kOp, k_scale.has_value() == int8 && v_scale.has_value() == int8,
        "an int8 cache has scales, another has none");
  check(kOp, k_new.size(2) > 0 ? q.size(2) % k_new.size(2) == 0 : q.size(2) == 0,
        "q has ", q.size(2), " heads, no multiple of k_new's ", k_new.size(2));
  const int64_t batch = q.size(0), kv_heads = k_new.size(2), slots = k_cache.size(1);
  check(kOp, shape(k_new) == shape(v_new) && k_new.size(0) == batch && k_new.size(1) == q.size(1) &&
            k_new.size(3) == q.size(3) && k_new.scalar_type() == q.scalar_type() &&
            v_new.scalar_type() == q.scalar_type(),
        "k_new and v_new must be like q ", shape(q), " but for their heads, and of its type, got ",
        shape(k_new), " and ", shape(v_new));
  check(kOp, shape(k_cache) == shape(v_cache) && k_cache.scalar_type() == v_cache.scalar_type() &&
            k_cache.size(0) == batch && k_cache.size(2) == kv_heads && k_cache.size(3) == q.size(3),
        "k_cache and v_cache must be of one type and [", batch, ", slots, ", kv_heads, ", ",
        q.size(3), "], got ", shape(k_cache), " and ", shape(v_cache));
  if (int8) {
    for (const Tensor& s : {*k_scale, *v_scale}) {
      bool fits = s.is_cpu() && s.dim() == 3 && s.scalar_type() == ScalarType::Float;
      for (int64_t i = 0; fits && i < 3; ++i) fits = s.size(i) == k_cache.size(i);
      check(kOp, fits, "k_scale and v_scale must be float32 and have the first three dimensions of "
            "the cache ", shape(k_cache), ", got ", shape(s));
    }
  }
  check_places(kOp, batch, q.size(3), seqlens, start, rotary_cos, rotary_sin);
  std::vector<int64_t> out_shape;
  for (int64_t i = 0; i < 4; ++i) out_shape.push_back(q.size(i));
  Tensor out = torch::stable::empty(out_shape, q.scalar_type());

  DecodeStep step;
  step.type = float_type(kOp, q, "q");
  step.cache_type = cache_type(kOp, k_cache);
  step.tokens = q.size(1);
  step.kv_heads = kv_heads;
  step.groups = kv_heads > 0 ? q.size(2) / kv_heads : 1;
  step.dim = q.size(3);
  step.q = read_only(q);
  step.k_new = read_only(k_new);
  step.v_new = read_only(v_new);
  step.k = written(k_cache);
  step.v = written(v_cache);
  step.out = written(out);
  step.k_scale = written_scales(k_scale);
  step.v_scale = written_scales(v_scale);
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
  step.positions_from_start = true;
  constexpr int64_t kUnbounded = int64_t(1) << 40;
  step.window = window < 0 ? kUnbounded : std::min(window, kUnbounded);
  check(kOp, softcap == 0 || softcap >= 1e-20, "softcap must be 0 or at least 1e-20, got ",
        softcap);
  step.softcap = float(softcap);
  step.scale = float(scale);
  if (batch == 0 || step.tokens == 0 || kv_heads == 0) return out;

  check_slots(kOp, step, batch, slots, cos ? &positions : nullptr);

  // Some tokens at a time, one block of all rows at least, so that what waits for its other parts
  // stays small.
  std::vector<int32_t> used(step.seqlens, step.seqlens + batch);
  const int64_t slots_after = *std::max_element(used.begin(), used.end()) + step.tokens;
  const int64_t block = decode_tokens(step), size = partial_size(step);
  const int64_t blocks = kMostFloats / (batch * kv_heads * (slots_after / kDecodeSlots + 2) * size);
  const int64_t most = block * std::max<int64_t>(blocks, 1), tokens = step.tokens;
  for (int64_t first = 0; first < tokens; first += most) {
    step.tokens = std::min(most, tokens - first);
    step.seqlens = used.data();
    attend(step, batch);
    const int64_t bytes = step.type == FloatType::f32 ? 4 : 2;
    for (Tokens* x : {&step.q, &step.k_new, &step.v_new, &step.out}) {
      x->data = static_cast<char*>(x->data) + step.tokens * x->token_stride * bytes;
    }
    for (int32_t& length : used) length += int32_t(step.tokens);
  }
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) {
  m.impl("decode_attention.cpu", TORCH_BOX(&t2i::decode_attention));
}
