// t2i::vq_nearest.cpu on torch's stable ABI. The schema is defined in
// kernels/t2i_kernels/vq_nearest/api.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "bindings/common.h"
#include "cpu/vq_nearest.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kOp = "vq_nearest";

// Multiply-adds of a thread, some 10 us at least: what it costs to wake it, or several times that.
constexpr int64_t kGrain = 1 << 19;

// As contiguous fp32, to which bf16 and fp16 convert exactly; a copy only where it is not that
// already.
Tensor to_float(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  check(kOp, type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        name, " must be float32, bfloat16 or float16");
  check(kOp, tensor.is_cpu(), name, " must be on the CPU");
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

// The first row that somebody found to be bad.
struct FirstBad {
  std::atomic<int64_t> row;

  explicit FirstBad(int64_t n) : row(n) {}

  void found(int64_t bad) {
    int64_t first = row.load();
    while (bad >= 0 && bad < first && !row.compare_exchange_weak(first, bad)) {
    }
  }
};

// The arrays of a VqCodebook.
struct Packed {
  VqCodebook book;
  std::vector<double> center;
  Floats packed;  // not initialised, unlike a vector
  AlignedFloats half_norm, error_base, error_slope, coarse_base, coarse_slope;
  std::vector<uint16_t, CacheAligned<uint16_t>> coarse;

  // Of finite codes whose center and scale are known.
  void fill(const VqKernels& kernels, int64_t num_blocks, const int32_t* order) {
    const int64_t dim = book.dim;
    book.num_blocks = num_blocks;
    book.order = order;
    packed = allocate(num_blocks * dim * kBlock);
    half_norm.resize(num_blocks * kBlock);
    error_base.resize(num_blocks);
    error_slope.resize(num_blocks);
    book.packed = packed.get();
    book.half_norm = half_norm.data();
    book.error_base = error_base.data();
    book.error_slope = error_slope.data();
    const int64_t depth = order ? 0 : kernels.coarse_depth(dim);  // not in a tree
    if (depth > 0) {
      coarse.resize((num_blocks + 1) * depth * kBlock);
      coarse_base.resize(num_blocks);
      coarse_slope.resize(num_blocks);
      book.coarse = coarse.data();
      book.coarse_base = coarse_base.data();
      book.coarse_slope = coarse_slope.data();
    }
    torch::stable::parallel_for(0, num_blocks, kGrain / (8 * kBlock * (dim + 1)) + 1,
                                [&](int64_t begin, int64_t end) {
                                  std::vector<double> workspace(dim);
                                  kernels.pack(book, begin, end, workspace.data());
                                });
  }
};

// Codes with what searches among them need, made when the first one needs it.
class Codebook {
 public:
  // A few are kept from call to call: what is made for a search is then paid once, until the codes
  // change. Throws where codes are not finite.
  static std::shared_ptr<Codebook> of(const float* codes, int64_t num_codes, int64_t dim,
                                      Metric metric) {
    static std::mutex mutex;
    static std::array<std::shared_ptr<Codebook>, kKept> kept;  // the last one used first
    std::unique_lock<std::mutex> lock(mutex);
    for (auto& entry : kept) {
      if (!entry || !entry->holds(codes, num_codes, dim, metric)) continue;
      entry->known_ = true;
      std::rotate(kept.data(), &entry, &entry + 1);
      return kept[0];
    }
    lock.unlock();
    auto made = std::make_shared<Codebook>(codes, num_codes, dim, metric);
    if (made->values() > kKeptValues) return made;
    made->copy_.assign(codes, codes + num_codes * dim);
    made->all_.book.codes = made->copy_.data();
    lock.lock();
    for (const auto& entry : kept) {  // what was true of it before its codes changed
      if (entry && entry->all_.book.num_codes == num_codes && entry->all_.book.dim == dim &&
          entry->all_.book.metric == metric) {
        made->calls_without_tree_ = entry->calls_without_tree_.load();
        break;
      }
    }
    std::rotate(kept.begin(), kept.end() - 1, kept.end());
    kept[0] = made;
    int64_t total = 0;
    for (auto& entry : kept) {
      if (entry) total += entry->values();
      if (total > kKeptValues) entry.reset();
    }
    return made;
  }

  Codebook(const float* codes, int64_t num_codes, int64_t dim, Metric metric) {
    all_.book = {codes, num_codes, 0, dim, metric};
    all_.center.resize(dim);
    all_.book.center = all_.center.data();
    const int64_t bad = kernels_.center(all_.book);
    check(kOp, bad < 0, "codebook holds NaN or infinite values, in row ", bad, " of ", num_codes,
          ": no distance is defined");
  }

  // Writes indices [n] and, unless it is null, distance [n]. Returns the first row that is not
  // finite, or -1.
  int64_t search(const float* z, int64_t n, int64_t* indices, float* distance) {
    FirstBad bad(n);
    const bool pays = known_ || n * dim() > kernels_.tree_values *
                                                int64_t(torch::stable::get_num_threads());
    bool found = false;
    if (calls_without_tree_ > 0) {
      --calls_without_tree_;
    } else if (pays && suits_tree(all_.book.num_codes, dim())) {
      found = search_tree(z, n, indices, distance, bad);
      if (!found) calls_without_tree_ = kCallsWithoutTree;
    }
    if (!found) search_all(z, n, indices, distance, bad);
    return bad.row == n ? -1 : bad.row.load();
  }

 private:
  static constexpr int64_t kFewCodes = 256;  // fewer are searched at once
  static constexpr int64_t kKeptValues = 1 << 22;  // of all
  static constexpr int64_t kKept = 16;
  static constexpr int64_t kTreeTile = 64;  // vectors that a thread takes at a time
  static constexpr int64_t kCallsWithoutTree = 64;  // after one did not pay

  static bool suits_tree(int64_t num_codes, int64_t dim) {
    return dim >= 1 && dim <= kMaxTreeDim && num_codes >= kFewCodes &&
           num_codes < int64_t(1) << 31;
  }

  int64_t dim() const { return all_.book.dim; }

  // What it holds for each of its codes, about.
  int64_t values() const {
    return all_.book.num_codes * std::max({dim(), kernels_.coarse_depth(dim()) / 2, int64_t(1)});
  }

  bool holds(const float* codes, int64_t num_codes, int64_t dim, Metric metric) const {
    const VqCodebook& book = all_.book;
    return &kernels_ == &vq_kernels() && num_codes == book.num_codes && dim == book.dim &&
           metric == book.metric &&
           !std::memcmp(codes, book.codes, size_t(num_codes * dim) * sizeof(float));
  }

  void search_all(const float* z, int64_t n, int64_t* indices, float* distance, FirstBad& bad) {
    std::call_once(all_once_, [&] {
      all_.fill(kernels_, (all_.book.num_codes + kBlock - 1) / kBlock, nullptr);
    });
    const VqCodebook& book = all_.book;
    const VqKernels& kernels = vq_kernels();
    const int64_t tiles = (n + kQueries - 1) / kQueries;
    const int64_t tile_cost = kQueries * book.num_blocks * kBlock * (book.dim + 1);
    torch::stable::parallel_for(
        0, tiles, kGrain / tile_cost + 1, [&](int64_t begin, int64_t end) {
          const Floats workspace = allocate(2 * kernels.search_workspace(book));
          bad.found(kernels.search(book, z, n, begin, end, indices, distance,
                                   reinterpret_cast<double*>(workspace.get())));
        });
  }

  void make_tree() {
    const VqCodebook& book = all_.book;
    std::vector<float> points(book.num_codes * book.dim);
    for (int64_t k = 0; k < book.num_codes; ++k) {
      const float* code = book.codes + k * book.dim;
      double norm2 = 0;
      for (int64_t j = 0; j < book.dim; ++j) norm2 += double(code[j]) * code[j];
      const double length = book.metric == Metric::cosine && norm2 > 0 ? std::sqrt(norm2) : 1;
      for (int64_t j = 0; j < book.dim; ++j) {
        points[k * book.dim + j] = float((code[j] / length - book.center[j]) * book.scale);
      }
    }
    tree_ = build_tree(points.data(), book.num_codes, book.dim, memory_);
    leaves_.book = {book.codes, book.num_codes, 0, book.dim, book.metric};
    leaves_.book.center = book.center;
    leaves_.book.scale = book.scale;
    leaves_.fill(kernels_, int64_t(memory_.order.size()) / kBlock, memory_.order.data());
  }

  // Returns false where boxes rule out too little, having searched for some of the vectors.
  bool search_tree(const float* z, int64_t n, int64_t* indices, float* distance, FirstBad& bad) {
    if (n >= int64_t(1) << 31) return false;
    std::call_once(tree_once_, [&] { make_tree(); });
    const VqKernels& kernels = vq_kernels();
    const VqCodebook& book = leaves_.book;

    // Vectors in the order of their leaves, by counting.
    std::vector<int32_t> leaf_of(n), rows(n), leaves(n);
    torch::stable::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
      kernels.route(book, tree_, z, begin, end, leaf_of.data());
    });
    std::vector<int32_t> place(book.num_blocks + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++place[leaf_of[i] + 1];
    for (int64_t leaf = 0; leaf < book.num_blocks; ++leaf) place[leaf + 1] += place[leaf];
    for (int64_t i = 0; i < n; ++i) {
      const int32_t at = place[leaf_of[i]]++;
      rows[at] = int32_t(i);
      leaves[at] = leaf_of[i];
    }

    const int64_t tiles = (n + kTreeTile - 1) / kTreeTile;
    std::vector<char> done(tiles, 0);
    std::atomic<int64_t> scored{0};
    const auto search = [&](int64_t tile, float* workspace) {
      if (done[tile]) return;
      done[tile] = 1;
      int64_t scored_here = 0;
      const int64_t end = std::min(n, (tile + 1) * kTreeTile);
      bad.found(kernels.search_tree(book, tree_, z, rows.data(), leaves.data(), tile * kTreeTile,
                                    end, indices, distance, reinterpret_cast<double*>(workspace),
                                    scored_here));
      scored += scored_here;
    };
    const int64_t workspace = 2 * kernels.search_tree_workspace(book);
    // A few tiles tell what to expect of the rest.
    const int64_t probes = std::min<int64_t>(tiles, 4);
    run_tasks(probes, workspace,
              [&](int64_t i, float* space) { search(i * tiles / probes, space); });
    const double all = double(probes * kTreeTile) * double(book.num_codes);
    const bool pays = double(scored) < kernels.tree_share * all;
    if (!pays && tiles > probes) return false;
    run_tasks(tiles, workspace, search);
    return true;
  }

  const VqKernels& kernels_ = vq_kernels();  // of the instruction set that all is packed for
  std::vector<float> copy_;
  Packed all_, leaves_;
  std::once_flag all_once_, tree_once_;
  VqTree tree_;
  VqTreeMemory memory_;
  std::atomic<bool> known_{false};  // from an earlier call
  std::atomic<int64_t> calls_without_tree_{0};
};

std::tuple<Tensor, Tensor, Tensor> vq_nearest(Tensor z, Tensor codebook, std::string metric,
                                              bool return_distance, bool return_counts) {
  check(kOp, z.dim() >= 1, "z must be [..., d], got a scalar");
  check(kOp, codebook.dim() == 2, "codebook must be [K, d], got ", shape(codebook));
  const int64_t dim = codebook.size(1), num_codes = codebook.size(0);
  check(kOp, z.size(z.dim() - 1) == dim, "z ", shape(z), " and codebook ", shape(codebook),
        " differ in their last dimension");
  check(kOp, metric == "l2" || metric == "cosine", "metric must be 'l2' or 'cosine', got '",
        metric, "'");

  std::vector<int64_t> batch;
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < z.dim(); ++i) {
    batch.push_back(z.size(i));
    n *= z.size(i);
  }
  check(kOp, num_codes > 0 || n == 0, "codebook ", shape(codebook),
        " has no codes to choose from");

  const std::vector<int64_t> none = {0}, per_code = {num_codes};
  const Tensor rows = to_float(z, "z"), codes = to_float(codebook, "codebook");
  Tensor indices = torch::stable::empty(batch, ScalarType::Long);
  Tensor distance = torch::stable::empty(return_distance ? batch : none, ScalarType::Float);
  Tensor counts = torch::stable::empty(return_counts ? per_code : none, ScalarType::Long);
  torch::stable::zero_(counts);
  if (num_codes == 0) return {indices, distance, counts};

  const auto book = Codebook::of(codes.const_data_ptr<float>(), num_codes, dim,
                                 metric == "l2" ? Metric::l2 : Metric::cosine);
  int64_t* found = indices.mutable_data_ptr<int64_t>();
  float* measured = return_distance ? distance.mutable_data_ptr<float>() : nullptr;
  if (n > 0) {
    const int64_t bad = book->search(rows.const_data_ptr<float>(), n, found, measured);
    check(kOp, bad < 0, "z holds NaN or infinite values, in row ", bad, " of ", n,
          ": no distance is defined");
  }
  if (return_counts) {
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) ++count[found[i]];
  }
  return {indices, distance, counts};
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("vq_nearest.cpu", TORCH_BOX(&t2i::vq_nearest)); }
