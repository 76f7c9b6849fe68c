// t2i::draw.cpu on torch's stable ABI. The schema is defined in kernels/t2i_kernels/draw/api.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "bindings/draw.h"

namespace t2i {
namespace {

constexpr const char* kOp = "draw";

Tensor draw(Tensor logits, Tensor seeds, Tensor positions, std::optional<Tensor> guidance,
            double temperature, int64_t top_k, double top_p) {
  check(kOp, logits.is_cpu() && logits.dim() == 3 && logits.scalar_type() == ScalarType::Float,
        "logits must be float32 [rows, tokens, codes] on the CPU");
  logits = torch::stable::contiguous(logits);
  const int64_t images = seeds.numel(), tokens = logits.size(1), codes = logits.size(2);
  check(kOp, logits.size(0) == images * (guidance ? 2 : 1), "logits have ", logits.size(0),
        " rows for ", images, " seeds", guidance ? " with guidance" : "");
  const DrawCodes draw =
      DrawCodes::bind(kOp, seeds, positions, guidance, temperature, top_k, top_p, tokens);
  Tensor out = torch::stable::empty({images, tokens}, ScalarType::Long);
  draw.run(kOp, logits.const_data_ptr<float>(), tokens, codes, 0, out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("draw.cpu", TORCH_BOX(&t2i::draw)); }
