// t2i::flash_attention.cuda and its backward on torch's stable ABI. The schemas are defined in
// kernels/t2i_kernels/flash_attention/api.py.
#include "cuda/flash_attention.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "bindings/cuda.h"

namespace t2i {
namespace {

using namespace t2i::cuda;

constexpr const char* kOp = "flash_attention";

int32_t window_of(int64_t keys) { return int32_t(std::min<int64_t>(keys, 1 << 30)); }

// What forward and backward have in common.
template <class Call>
void describe(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
              const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k, bool causal,
              int64_t window_left, int64_t window_right, double softcap, double scale) {
  const bool packed = cu_q.has_value();
  const int64_t rows = packed ? 0 : 1, heads = rows + 1, dim = rows + 2;
  call.element = element_of(kOp, q);
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.q_strides = strides_of(q);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.cu_q = packed ? cu_q->const_data_ptr<int32_t>() : nullptr;
  call.cu_k = packed ? cu_k->const_data_ptr<int32_t>() : nullptr;
  call.sequences = packed ? int32_t(cu_q->size(0) - 1) : 1;
  call.batch = packed ? 1 : int32_t(q.size(0));
  call.heads = int32_t(q.size(heads));
  call.group = k.size(heads) > 0 ? int32_t(q.size(heads) / k.size(heads)) : 1;
  call.length_q = int32_t(q.size(rows));
  call.length_k = int32_t(k.size(rows));
  call.dim = int32_t(q.size(dim));
  call.value_dim = int32_t(v.size(dim));
  call.window_left = window_of(window_left);
  call.window_right = causal ? 0 : window_of(window_right);
  call.softcap = float(softcap);
  call.scale = float(scale);
}

std::tuple<Tensor, Tensor> flash_attention(Tensor q, Tensor k, Tensor v,
                                           std::optional<Tensor> cu_q, std::optional<Tensor> cu_k,
                                           bool causal, int64_t window_left, int64_t window_right,
                                           double softcap, double scale) {
  const OnDevice device(q);
  q = with_aligned_rows(q);
  k = with_aligned_rows(k);
  v = with_aligned_rows(v);
  if (cu_q) cu_q = torch::stable::contiguous(*cu_q);
  if (cu_k) cu_k = torch::stable::contiguous(*cu_k);
  const bool packed = cu_q.has_value();
  std::vector<int64_t> shape = sizes_of(q);
  shape.back() = v.size(v.dim() - 1);
  Tensor out = torch::stable::new_empty(q, shape);
  const int64_t rows = q.size(packed ? 0 : 1), heads = q.size(packed ? 1 : 2);
  shape = packed ? std::vector<int64_t>{heads, rows} : std::vector<int64_t>{q.size(0), heads, rows};
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  FlashForward call = {};
  describe(call, q, k, v, cu_q, cu_k, causal, window_left, window_right, softcap, scale);
  call.out = out.mutable_data_ptr();
  call.out_strides = strides_of(out);
  call.lse = lse.mutable_data_ptr<float>();
  flash_forward(call, device.stream());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, bool causal, int64_t window_left,
    int64_t window_right, double softcap, double scale) {
  const OnDevice device(q);
  for (Tensor* rows : {&dout, &q, &k, &v, &out}) *rows = with_aligned_rows(*rows);
  for (auto* ends : {&cu_q, &cu_k}) {
    if (*ends) *ends = torch::stable::contiguous(**ends);
  }
  lse = torch::stable::contiguous(lse);
  if (dlse) dlse = torch::stable::contiguous(*dlse);
  Tensor dq = torch::stable::new_empty(q, sizes_of(q));
  Tensor dk = torch::stable::new_empty(k, sizes_of(k));
  Tensor dv = torch::stable::new_empty(v, sizes_of(v));
  Tensor log2_sum = torch::stable::new_empty(lse, sizes_of(lse));
  Tensor minus_delta = torch::stable::new_empty(lse, sizes_of(lse));
  FlashBackward call = {};
  describe(call, q, k, v, cu_q, cu_k, causal, window_left, window_right, softcap, scale);
  call.dout = dout.const_data_ptr();
  call.out = out.const_data_ptr();
  call.lse = lse.const_data_ptr<float>();
  call.dlse = dlse ? dlse->const_data_ptr<float>() : nullptr;
  call.log2_sum = log2_sum.mutable_data_ptr<float>();
  call.minus_delta = minus_delta.mutable_data_ptr<float>();
  call.dq = dq.mutable_data_ptr();
  call.dk = dk.mutable_data_ptr();
  call.dv = dv.mutable_data_ptr();
  call.dout_strides = strides_of(dout);
  call.out_strides = strides_of(out);
  call.dq_strides = strides_of(dq);
  call.dk_strides = strides_of(dk);
  call.dv_strides = strides_of(dv);
  flash_backward(call, device.stream());
  return {dq, dk, dv};
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CUDA, m) {
  m.impl("flash_attention.cuda", TORCH_BOX(&t2i::flash_attention));
  m.impl("flash_attention_backward.cuda", TORCH_BOX(&t2i::flash_attention_backward));
}
