// t2i::draw.cpu on torch's stable ABI. The schema is defined in kernels/t2i_kernels/draw/api.py.
#include "cpu/draw.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "bindings/common.h"

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
  check(kOp, positions.numel() == images, "positions have ", positions.numel(), " numbers for ",
        images, " seeds");
  check(kOp, !guidance || guidance->numel() == images * tokens, "guidance must have ",
        images * tokens, " scales");
  const Tensor seed = torch::stable::contiguous(seeds);
  const Tensor position = torch::stable::contiguous(positions);
  std::optional<Tensor> scale;
  if (guidance) scale = torch::stable::contiguous(*guidance);
  Tensor out = torch::stable::empty({images, tokens}, ScalarType::Long);
  const float* x = logits.const_data_ptr<float>();
  int64_t* drawn = out.mutable_data_ptr<int64_t>();
  const cpu::DrawCode draw_one = cpu::draw_code();
  std::atomic<bool> undefined{false};
  run_tasks(images * tokens, cpu::draw_workspace(codes), [&](int64_t i, float* space) {
    const int64_t image = i / tokens;
    cpu::Draw d;
    d.logits = x + i * codes;
    d.unconditional = guidance ? d.logits + images * tokens * codes : nullptr;
    d.guidance = guidance ? scale->const_data_ptr<float>()[i] : 1;
    d.codes = codes;
    d.seed = seed.const_data_ptr<int64_t>()[image];
    d.position = position.const_data_ptr<int64_t>()[image] + i % tokens;
    d.temperature = float(temperature);
    d.top_k = top_k;
    d.top_p = top_p;
    drawn[i] = draw_one(d, space);
    if (drawn[i] < 0) undefined = true;
  });
  check(kOp, !undefined, "logits: expected numbers, got NaN or inf, or -inf alone");
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("draw.cpu", TORCH_BOX(&t2i::draw)); }
