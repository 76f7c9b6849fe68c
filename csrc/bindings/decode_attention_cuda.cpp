// t2i::decode_attention_cuda on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/decode_attention/cuda.py.
#include "cuda/decode_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "bindings/cuda.h"

namespace t2i {
namespace {

constexpr const char* kOp = "decode_attention";

Tensor decode_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor k, Tensor v,
                        std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                        Tensor seqlens, Tensor start, std::optional<Tensor> cos,
                        std::optional<Tensor> sin, bool interleaved, int64_t window,
                        double softcap, double scale, Tensor counters) {
  const OnDevice device(q);
  q = with_contiguous_rows(q);
  k_new = with_contiguous_rows(k_new);
  v_new = with_contiguous_rows(v_new);
  for (const Tensor* lengths : {&seqlens, &start}) {
    check(kOp, lengths->scalar_type() == ScalarType::Int, "expected int32 seqlens and start");
  }
  Tensor out = torch::stable::new_empty(q, sizes_of(q));

  cuda::DecodeAttention call = {};
  call.element = element_of(kOp, q);
  call.int8 = k.scalar_type() == ScalarType::Char;
  call.q = q.const_data_ptr();
  call.k_new = k_new.const_data_ptr();
  call.v_new = v_new.const_data_ptr();
  call.k = k.mutable_data_ptr();
  call.v = v.mutable_data_ptr();
  call.out = out.mutable_data_ptr();
  call.q_strides = strides_of(q);
  call.k_new_strides = strides_of(k_new);
  call.v_new_strides = strides_of(v_new);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.out_strides = strides_of(out);
  if (call.int8) {
    call.k_scale = k_scale->mutable_data_ptr<float>();
    call.v_scale = v_scale->mutable_data_ptr<float>();
    call.k_scale_strides = {k_scale->stride(0), k_scale->stride(1), k_scale->stride(2)};
    call.v_scale_strides = {v_scale->stride(0), v_scale->stride(1), v_scale->stride(2)};
  }
  call.seqlens = seqlens.const_data_ptr<int32_t>();
  call.start = start.const_data_ptr<int32_t>();
  call.seqlens_stride = seqlens.stride(0);
  call.start_stride = start.stride(0);
  if (cos) {
    cos = with_contiguous_rows(*cos);
    sin = with_contiguous_rows(*sin);
    call.cos = cos->const_data_ptr<float>();
    call.sin = sin->const_data_ptr<float>();
    call.cos_stride = cos->stride(0);
    call.sin_stride = sin->stride(0);
    call.positions = int32_t(cos->size(0));
    call.rotary_pairs = int32_t(cos->size(1));
  }
  call.batch = int32_t(q.size(0));
  call.tokens = int32_t(q.size(1));
  call.heads = int32_t(q.size(2));
  call.dim = int32_t(q.size(3));
  call.slots = int32_t(k.size(1));
  call.kv_heads = int32_t(k.size(2));
  call.interleaved = interleaved;
  call.window = int32_t(std::min<int64_t>(window, 1 << 30));
  call.softcap = float(softcap);
  call.scale = float(scale);
  Tensor partial = torch::stable::new_empty(
      q, std::vector<int64_t>{cuda::decode_attention_partials(call)}, ScalarType::Float);
  call.partial = partial.mutable_data_ptr<float>();
  check(kOp, counters.size(0) >= cuda::decode_attention_counters(call), "counters: there are ",
        counters.size(0), ", expected ", cuda::decode_attention_counters(call));
  call.counters = counters.mutable_data_ptr<int32_t>();
  cuda::decode_attention(call, device.stream());
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CUDA, m) {
  m.impl("decode_attention_cuda", TORCH_BOX(&t2i::decode_attention));
}
