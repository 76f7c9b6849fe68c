// t2i::vq_nearest_cuda on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/vq_nearest/cuda.py.
#include "cuda/vq_nearest.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cuda.h"

namespace t2i {
namespace {

constexpr const char* kOp = "vq_nearest";

cuda::FloatType float_type_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(kOp, type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "expected float32, float16 or bfloat16 tensors");
  if (type == ScalarType::Float) return cuda::FloatType::fp32;
  return type == ScalarType::Half ? cuda::FloatType::fp16 : cuda::FloatType::bf16;
}

// Strides of the vectors, if two say where each of them is: images [batch, height, width, dim] that
// were permuted from [batch, dim, height, width] are searched where they are.
bool describe_vectors(const Tensor& z, cuda::VqNearest& call) {
  std::vector<std::pair<int64_t, int64_t>> groups;  // (size, stride), the innermost first
  for (int64_t i = z.dim() - 2; i >= 0; --i) {
    const int64_t size = z.size(i), stride = z.stride(i);
    if (size == 1) continue;
    if (!groups.empty() && stride == groups.back().first * groups.back().second) {
      groups.back().first *= size;
    } else {
      groups.push_back({size, stride});
    }
  }
  if (groups.size() > 2) return false;
  groups.resize(2, {1, 0});
  call.inner = std::max<int64_t>(groups[0].first, 1);
  call.inner_stride = groups[0].second;
  call.outer_stride = groups[1].second;
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_nearest(Tensor z, Tensor codebook, bool cosine,
                                                      bool return_distance, bool return_counts) {
  const OnDevice device(z);
  cuda::VqNearest call = {};
  if (!describe_vectors(z, call)) {
    z = torch::stable::contiguous(z);
    describe_vectors(z, call);
  }
  std::vector<int64_t> shape = sizes_of(z);
  shape.pop_back();
  call.num_vectors = 1;
  for (int64_t size : shape) call.num_vectors *= size;
  const int64_t num_codes = codebook.size(0), dim = codebook.size(1);
  check(kOp, num_codes < int64_t(1) << 30 && dim <= cuda::kVqMaxDim, "codebook ",
        t2i::shape(codebook), " is too large");
  call.num_codes = int32_t(num_codes);
  call.dim = int32_t(dim);
  call.dim_stride = z.stride(z.dim() - 1);
  call.code_stride = codebook.stride(0);
  call.code_dim_stride = codebook.stride(1);
  call.z_type = float_type_of(z);
  call.codebook_type = float_type_of(codebook);
  call.z = z.const_data_ptr();
  call.codebook = codebook.const_data_ptr();
  call.cosine = cosine;

  auto made = [&](const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(z, sizes, type);
  };
  const std::vector<int64_t> none = {0};
  Tensor indices = made(shape, ScalarType::Long);
  Tensor distance = made(return_distance ? shape : none, ScalarType::Float);
  Tensor counts = made({return_counts ? num_codes : 0}, ScalarType::Long);
  Tensor invalid = made({2}, ScalarType::Long);
  const int64_t bytes = cuda::vq_nearest_workspace(call.num_vectors, call.num_codes, call.dim);
  Tensor workspace = made({bytes}, ScalarType::Byte);
  call.indices = indices.mutable_data_ptr<int64_t>();
  call.distance = return_distance ? distance.mutable_data_ptr<float>() : nullptr;
  call.counts = return_counts ? counts.mutable_data_ptr<int64_t>() : nullptr;
  call.invalid = invalid.mutable_data_ptr<int64_t>();
  call.workspace = workspace.mutable_data_ptr();
  cuda::vq_nearest(call, device.stream());
  return {indices, distance, counts, invalid};
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CUDA, m) { m.impl("vq_nearest_cuda", TORCH_BOX(&t2i::vq_nearest)); }
