// What the launcher of vq_nearest takes. No CUDA header: whoever calls needs none.
#pragma once

#include <cstdint>

namespace t2i::cuda {

enum class FloatType { fp32, fp16, bf16 };

// Vector i of z begins at element i / inner · outer_stride + i % inner · inner_stride, so that
// images [batch, dim, height, width] are searched where they are: inner is height · width.
struct VqNearest {
  FloatType z_type, codebook_type;
  const void *z, *codebook;
  int64_t num_vectors, inner;
  int64_t outer_stride, inner_stride, dim_stride;  // elements
  int64_t code_stride, code_dim_stride;
  int32_t num_codes, dim;
  bool cosine;
  void* workspace;   // vq_nearest_workspace bytes, aligned to 16
  int64_t* indices;  // [num_vectors]
  float* distance;   // the same, or null
  int64_t* counts;   // [num_codes], or null
  // The first row of z and of the codebook that holds NaN or infinity; -1: none. Such a vector, and
  // any vector where a code is like that, has index 0 and distance NaN, and is not counted.
  int64_t* invalid;  // [2]
};

constexpr int kVqMaxDim = 128;

// Both raise std::invalid_argument, and vq_nearest std::runtime_error with what CUDA said.
// ``stream``: cudaStream_t.
int64_t vq_nearest_workspace(int64_t num_vectors, int32_t num_codes, int32_t dim);
void vq_nearest(const VqNearest& call, void* stream);

// Each instantiation is a source file of its own, for up to so many dimensions.
template <int kDim>
void launch_vq_nearest(const VqNearest& call, void* stream);
template <int kDim>
int64_t vq_nearest_workspace_of(int64_t num_vectors, int32_t num_codes);

}  // namespace t2i::cuda
