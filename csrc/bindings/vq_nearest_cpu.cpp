// t2i::vq_nearest.cpu on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/vq_nearest/api.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/vq_nearest.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
void check(bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  text << "vq_nearest: ";
  (text << ... << message);
  throw std::invalid_argument(text.str());  // Python: ValueError
}

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// As contiguous fp32, to which bf16 and fp16 convert exactly; a copy only where it is not that
// already.
Tensor to_float(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
        " must be float32, bfloat16 or float16");
  check(tensor.is_cpu(), name, " must be on the CPU");
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor> vq_nearest(Tensor z, Tensor codebook, std::string metric,
                                              bool return_distance, bool return_counts) {
  using namespace t2i::cpu;
  check(z.dim() >= 1, "z must be [..., d], got a scalar");
  check(codebook.dim() == 2, "codebook must be [K, d], got ", shape(codebook));
  const int64_t dim = codebook.size(1), num_codes = codebook.size(0);
  check(z.size(z.dim() - 1) == dim, "z ", shape(z), " and codebook ", shape(codebook),
        " differ in their last dimension");
  check(metric == "l2" || metric == "cosine", "metric must be 'l2' or 'cosine', got '", metric,
        "'");

  std::vector<int64_t> batch;
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < z.dim(); ++i) {
    batch.push_back(z.size(i));
    n *= z.size(i);
  }
  check(num_codes > 0 || n == 0, "codebook ", shape(codebook), " has no codes to choose from");

  const std::vector<int64_t> none = {0}, per_code = {num_codes};
  const Tensor rows = to_float(z, "z"), codes = to_float(codebook, "codebook");
  Tensor indices = torch::stable::empty(batch, ScalarType::Long);
  Tensor distance = torch::stable::empty(return_distance ? batch : none, ScalarType::Float);
  Tensor counts = torch::stable::empty(return_counts ? per_code : none, ScalarType::Long);
  torch::stable::zero_(counts);
  if (num_codes == 0) return {indices, distance, counts};

  const VqKernels& kernels = vq_kernels();
  const int64_t blocks = (num_codes + kBlock - 1) / kBlock;
  VqCodebook book{codes.const_data_ptr<float>(), num_codes, blocks, dim,
                  metric == "l2" ? Metric::l2 : Metric::cosine};
  std::vector<double> center(dim);
  const std::unique_ptr<float[]> packed(new float[blocks * dim * kBlock]);
  std::vector<float> half_norm(blocks * kBlock), error_base(blocks), error_slope(blocks);
  book.center = center.data();
  book.packed = packed.get();
  book.half_norm = half_norm.data();
  book.error_base = error_base.data();
  book.error_slope = error_slope.data();

  const int64_t bad_code = kernels.center(book);
  check(bad_code < 0, "codebook holds NaN or infinite values, in row ", bad_code, " of ", num_codes,
        ": no distance is defined");
  if (n == 0) return {indices, distance, counts};

  // A thread gets work for some 20 us at least, several times what it costs to wake it.
  constexpr int64_t kGrain = 1 << 19;
  torch::stable::parallel_for(0, blocks, kGrain / (8 * kBlock * (dim + 1)) + 1,
                              [&](int64_t begin, int64_t end) {
                                std::vector<double> workspace(dim);
                                kernels.pack(book, begin, end, workspace.data());
                              });

  const float* z_data = rows.const_data_ptr<float>();
  int64_t* index_data = indices.mutable_data_ptr<int64_t>();
  float* distance_data = return_distance ? distance.mutable_data_ptr<float>() : nullptr;
  const int64_t tiles = (n + kQueries - 1) / kQueries;
  const int64_t tile_cost = kQueries * blocks * kBlock * (dim + 1);
  std::atomic<int64_t> bad_row{n};
  torch::stable::parallel_for(
      0, tiles, kGrain / tile_cost + 1, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<double[]> workspace(new double[kernels.search_workspace(book)]);
        const int64_t bad =
            kernels.search(book, z_data, n, begin, end, index_data, distance_data, workspace.get());
        int64_t first = bad_row.load();
        while (bad >= 0 && bad < first && !bad_row.compare_exchange_weak(first, bad)) {
        }
      });
  check(bad_row == n, "z holds NaN or infinite values, in row ", bad_row.load(), " of ", n,
        ": no distance is defined");

  if (return_counts) {
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) ++count[index_data[i]];
  }
  return {indices, distance, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("vq_nearest.cpu", TORCH_BOX(&vq_nearest)); }
