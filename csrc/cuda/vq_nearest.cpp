// Checks a call of vq_nearest, and chooses the instantiation.
#include "vq_nearest.h"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace t2i::cuda {
namespace {

void check(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument("vq_nearest: " + message);
}

// Calls use with the smallest instantiation that holds ``dim``, as an integral constant.
template <class Use>
auto with_dim(int32_t dim, Use use) {
  check(dim >= 0 && dim <= kVqMaxDim,
        "dim is " + std::to_string(dim) + ", expected 0 to " + std::to_string(kVqMaxDim));
  if (dim <= 4) return use(std::integral_constant<int, 4>());
  if (dim <= 8) return use(std::integral_constant<int, 8>());
  if (dim <= 16) return use(std::integral_constant<int, 16>());
  if (dim <= 32) return use(std::integral_constant<int, 32>());
  if (dim <= 64) return use(std::integral_constant<int, 64>());
  return use(std::integral_constant<int, 128>());
}

void check_sizes(int64_t num_vectors, int32_t num_codes) {
  check(num_vectors >= 0 && num_vectors < int64_t(1) << 36,
        "num_vectors is " + std::to_string(num_vectors) + ", expected less than 2^36");
  check(num_codes >= 0 && num_codes < 1 << 30,
        "num_codes is " + std::to_string(num_codes) + ", expected less than 2^30");
}

}  // namespace

int64_t vq_nearest_workspace(int64_t num_vectors, int32_t num_codes, int32_t dim) {
  check_sizes(num_vectors, num_codes);
  return with_dim(
      dim, [&](auto k) { return vq_nearest_workspace_of<k()>(num_vectors, num_codes); });
}

void vq_nearest(const VqNearest& call, void* stream) {
  check_sizes(call.num_vectors, call.num_codes);
  check(call.num_codes > 0 || call.num_vectors == 0, "codebook: there are no codes to choose from");
  check(call.inner > 0, "inner is " + std::to_string(call.inner) + ", expected at least 1");
  check(reinterpret_cast<uintptr_t>(call.workspace) % 16 == 0,
        "workspace: not aligned to 16 bytes");
  with_dim(call.dim, [&](auto k) { launch_vq_nearest<k()>(call, stream); });
}

}  // namespace t2i::cuda
