// Drawing the codes of some images, as draw.cpu and draw_tokens.cpu do.
#pragma once

#include <atomic>
#include <optional>

#include "bindings/common.h"
#include "cpu/draw.h"

namespace t2i {

struct DrawCodes {
  Tensor seeds, positions;  // int64 [images]
  std::optional<Tensor> guidance;  // float32 [images, count], a scale for each code
  double temperature;
  int64_t top_k;
  double top_p;
  int64_t count;  // codes of an image, in all calls

  static DrawCodes bind(const char* op, const Tensor& seeds, const Tensor& positions,
                        const std::optional<Tensor>& guidance, double temperature, int64_t top_k,
                        double top_p, int64_t count) {
    const int64_t images = seeds.numel();
    check(op, positions.numel() == images, "positions have ", positions.numel(), " numbers for ",
          images, " seeds");
    check(op, !guidance || guidance->numel() == images * count, "guidance must have ",
          images * count, " scales");
    DrawCodes draw{torch::stable::contiguous(seeds), torch::stable::contiguous(positions), {},
                   temperature, top_k, top_p, count};
    if (guidance) draw.guidance = torch::stable::contiguous(*guidance);
    return draw;
  }

  int64_t images() const { return seeds.numel(); }

  // Codes [first, first + tokens) of every image, into drawn [images, count], from logits [images or
  // with guidance 2 images, tokens, codes].
  void run(const char* op, const float* logits, int64_t tokens, int64_t codes, int64_t first,
           int64_t* drawn) const {
    const int64_t rows = images() * tokens;
    const float* scales = guidance ? guidance->const_data_ptr<float>() : nullptr;
    const int64_t* seed = seeds.const_data_ptr<int64_t>();
    const int64_t* position = positions.const_data_ptr<int64_t>();
    const cpu::DrawCode draw_one = cpu::draw_code();
    std::atomic<bool> undefined{false};
    run_tasks(rows, cpu::draw_workspace(codes), [&](int64_t i, float* space) {
      const int64_t image = i / tokens, token = first + i % tokens, at = image * count + token;
      cpu::Draw d;
      d.logits = logits + i * codes;
      d.unconditional = scales ? d.logits + rows * codes : nullptr;
      d.guidance = scales ? scales[at] : 1;
      d.codes = codes;
      d.seed = seed[image];
      d.position = position[image] + token;
      d.temperature = float(temperature);
      d.top_k = top_k;
      d.top_p = top_p;
      drawn[at] = draw_one(d, space);
      if (drawn[at] < 0) undefined = true;
    });
    check(op, !undefined, "logits: expected numbers, got NaN or inf, or -inf alone");
  }
};

}  // namespace t2i
