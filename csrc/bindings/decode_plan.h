// How the attention of a decoding step is cut into tasks, by rows, key heads, blocks of tokens, and
// parts of their slots, at places that depend on a row alone; and how a team of threads runs them.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "bindings/common.h"
#include "bindings/team.h"
#include "cpu/decode_attention.h"

namespace t2i {

inline cpu::CacheType cache_type(const char* op, const Tensor& cache) {
  if (cache.scalar_type() == ScalarType::Char) return cpu::CacheType::int8;
  switch (float_type(op, cache, "cache")) {
    case cpu::FloatType::f32: return cpu::CacheType::f32;
    case cpu::FloatType::bf16: return cpu::CacheType::bf16;
    case cpu::FloatType::f16: return cpu::CacheType::f16;
  }
  return cpu::CacheType::f32;
}

// That rows have a place in the cache each, and rotary tables fit to them.
inline void check_places(const char* op, int64_t batch, int64_t head_dim, const Tensor& seqlens,
                         const Tensor& start, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin) {
  check(op, seqlens.numel() == batch && start.numel() == batch, "seqlens and start must have ",
        batch, " numbers, got ", seqlens.numel(), " and ", start.numel());
  check(op, cos.has_value() == sin.has_value(), "rotary_cos and rotary_sin: give both or none");
  if (!cos) return;
  check(op, cos->dim() == 2 && shape(*cos) == shape(*sin) && 2 * cos->size(1) <= head_dim,
        "rotary_cos and rotary_sin must be [positions, R/2] with R at most ", head_dim, ", got ",
        shape(*cos), " and ", shape(*sin));
}

template <typename... Args>
void check_index(const char* op, bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  text << op << ": ";
  (text << ... << message);
  throw std::out_of_range(text.str());  // Python: IndexError
}

// That new tokens fit into the cache, before anything is written. positions: of the rotary tables.
inline void check_slots(const char* op, const cpu::DecodeStep& step, int64_t batch, int64_t slots,
                        const int64_t* positions) {
  if (batch == 0) return;
  int64_t low = step.seqlens[0], high = step.seqlens[0], earliest = step.start[0], last = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = step.seqlens[b] + step.tokens - 1;
    low = std::min<int64_t>(low, step.seqlens[b]);
    high = std::max<int64_t>(high, end);
    earliest = std::min<int64_t>(earliest, step.start[b]);
    last = std::max<int64_t>(last, end - (step.positions_from_start ? step.start[b] : 0));
  }
  check_index(op, low >= 0 && high < slots, "cache.seqlens puts the new tokens into slots ", low,
              " to ", high, ", but the cache has ", slots, " slots");
  check_index(op, earliest >= 0, "cache.start is ", earliest, ", below 0");
  check_index(op, !positions || last < *positions, "position ", last,
              " is outside rotary_cos, which has ", positions ? *positions : 0);
}

// The parts of a group write the same outputs, and follow each other.
struct DecodePlan {
  std::vector<cpu::DecodeTask> parts;
  std::vector<int64_t> groups;  // where each begins; behind them, the end

  int64_t num_groups() const { return int64_t(groups.size()) - 1; }
  int64_t num_parts() const { return int64_t(parts.size()); }
};

inline DecodePlan plan_decode(const cpu::DecodeStep& step, int64_t batch) {
  DecodePlan plan;
  const int64_t block = cpu::decode_tokens(step);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = step.start[b];
    for (int64_t h = 0; h < step.kv_heads; ++h) {
      for (int64_t token = 0; token < step.tokens; token += block) {
        const int64_t token_end = std::min(step.tokens, token + block);
        const int64_t end = step.seqlens[b] + token_end;
        int64_t slot = std::max<int64_t>(begin, step.seqlens[b] + token - step.window);
        slot = std::min(end, begin + (slot - begin) / cpu::kDecodeSlots * cpu::kDecodeSlots);
        plan.groups.push_back(plan.num_parts());
        do {
          const int64_t stop = std::min(end, slot + cpu::kDecodeSlots);
          plan.parts.push_back({b, h, token, token_end, slot, stop});
          slot = stop;
        } while (slot < end);
      }
    }
  }
  plan.groups.push_back(plan.num_parts());
  return plan;
}

// Floats of one part's result.
inline int64_t partial_size(const cpu::DecodeStep& step) {
  return step.groups * cpu::decode_tokens(step) * (round_up(step.dim) + 2);
}

// What the parts of a plan give, in partial_size floats each.
inline std::vector<cpu::DecodePartial> partials_in(const cpu::DecodeStep& step,
                                                   const DecodePlan& plan, float* memory) {
  std::vector<cpu::DecodePartial> partials;
  const int64_t rows = step.groups * cpu::decode_tokens(step), width = round_up(step.dim);
  for (int64_t i = 0; i < plan.num_parts(); ++i, memory += partial_size(step)) {
    partials.push_back({memory, memory + rows * width, memory + rows * (width + 1)});
  }
  return partials;
}

// One member's part in all tasks; it does not throw. next: 0, and the same for all members;
// workspace: this member's.
inline void run_decode(const Member& member, const cpu::DecodeKernels& kernels,
                       const cpu::DecodeStep& step, int64_t batch, const DecodePlan& plan,
                       const std::vector<cpu::DecodePartial>& partials,
                       std::atomic<int64_t>& next, float* workspace) {
  // A single token goes into the last part of its row, which appends it before it attends. Several
  // are all appended first.
  const bool single = step.tokens == 1;
  if (!single) {
    const auto [begin, end] = member.share(batch * step.kv_heads);
    for (int64_t i = begin; i < end; ++i) {
      kernels.append(step, i / step.kv_heads, i % step.kv_heads, workspace);
    }
    member.wait();
  }
  const int64_t parts = plan.num_parts();
  const bool whole = parts == plan.num_groups();
  for (int64_t i = next++; i < parts; i = next++) {
    const cpu::DecodeTask& task = plan.parts[i];
    if (single && task.slot_end == step.seqlens[task.row] + 1) {
      kernels.append(step, task.row, task.head, workspace);
    }
    kernels.attend(step, task, partials[i], workspace);
    if (whole) kernels.finish(step, task, &partials[i], 1);
  }
  if (whole) return;
  member.wait();
  const auto [begin, end] = member.share(plan.num_groups());
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = plan.groups[group], last = plan.groups[group + 1];
    kernels.finish(step, plan.parts[first], &partials[first], last - first);
  }
}

}  // namespace t2i
