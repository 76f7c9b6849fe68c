// What a source file that holds one instantiation of vq_nearest includes.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "vq_nearest.cuh"

namespace t2i::cuda {

template <int kDim>
struct VqPlan {
  using Codes = VqCodes<kDim>;
  using Search = VqSearch<kDim>;
  // Blocks that fill a GPU, and the most that have to be combined.
  static constexpr int64_t kFill = 512, kMaxSplits = 32;

  Codes codes;
  VqSplits splits;
  int64_t blocks, num_splits, bytes;

  VqPlan(void* workspace, int64_t num_vectors, int64_t num_codes)
      : codes(Codes::in(workspace, num_codes)) {
    blocks = (num_vectors + Search::kVectors - 1) / Search::kVectors;
    const int64_t tiles = Codes::padded(num_codes) / Codes::kTile;
    num_splits = std::min({kFill / std::max<int64_t>(blocks, 1), tiles / 2, kMaxSplits});
    num_splits = std::max<int64_t>(num_splits, 1);
    const int64_t found = num_splits > 1 ? num_splits * num_vectors : 0;
    splits.nearest = reinterpret_cast<VqSplits::Nearest*>(
        static_cast<char*>(workspace) + (codes.bytes + 15) / 16 * 16);
    splits.done = reinterpret_cast<uint32_t*>(splits.nearest + found);
    bytes = reinterpret_cast<char*>(splits.done + blocks) - static_cast<char*>(workspace);
  }
};

template <int kDim>
int64_t vq_nearest_workspace_of(int64_t num_vectors, int32_t num_codes) {
  return VqPlan<kDim>(nullptr, num_vectors, num_codes).bytes;
}

template <int kDim>
void launch_vq_nearest(const VqNearest& call, void* stream) {
  using Codes = VqCodes<kDim>;
  using Search = VqSearch<kDim>;
  const VqPlan<kDim> plan(call.workspace, call.num_vectors, call.num_codes);
  constexpr int kSurveyThreads = 256, kPackThreads = 128;
  auto blocks_of = [](int64_t items, int64_t size) {
    return unsigned(std::max<int64_t>((items + size - 1) / size, 1));
  };
  const unsigned survey = std::min(blocks_of(call.num_codes, kSurveyThreads),
                                   unsigned(Codes::kSurveyors * kWarp / kSurveyThreads));
  launch("vq_nearest", vq_survey_kernel<Codes>, dim3{survey, 1, 1}, dim3{kSurveyThreads, 1, 1}, 0,
         stream, call);
  launch("vq_nearest", vq_pack_kernel<Codes>,
         dim3{blocks_of(Codes::padded(call.num_codes), kPackThreads), 1, 1},
         dim3{kPackThreads, 1, 1}, 0, stream, call, int(survey) * kSurveyThreads / kWarp,
         plan.splits.done, int(plan.blocks));
  if (call.num_vectors == 0) return;
  launch("vq_nearest", vq_search_kernel<kDim>,
         dim3{unsigned(plan.blocks), unsigned(plan.num_splits), 1},
         dim3{unsigned(Search::kThreads), 1, 1}, Search::kSharedBytes, stream, call, plan.splits);
}

}  // namespace t2i::cuda
