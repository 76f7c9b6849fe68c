// What the bindings share. Errors become Python's ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/float_type.h"

namespace t2i {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
void check(const char* op, bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  text << op << ": ";
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline cpu::FloatType float_type(const char* op, const Tensor& tensor, const char* name) {
  check(op, tensor.is_cpu(), name, " must be on the CPU");
  const ScalarType type = tensor.scalar_type();
  check(op, type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        name, " must be float32, bfloat16 or float16");
  if (type == ScalarType::Float) return cpu::FloatType::f32;
  return type == ScalarType::BFloat16 ? cpu::FloatType::bf16 : cpu::FloatType::f16;
}

inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool contiguous = tensor.stride(last) == 1 || tensor.size(last) <= 1;
  return contiguous ? tensor : torch::stable::contiguous(tensor);
}

// Memory for a kernel, at the start of a cache line, not initialised.
struct FreeAligned {
  void operator()(float* floats) const { ::operator delete[](floats, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

constexpr int64_t round_up(int64_t floats) { return (floats + 15) / 16 * 16; }  // to cache lines

inline Floats allocate(int64_t count) {
  const size_t bytes = size_t(count) * sizeof(float);
  return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

// Runs task(i, workspace) for every i below count on torch's threads. A thread takes the next task
// when it is done with one, so that they may differ in length; which thread runs a task must not
// matter.
template <typename Task>
void run_tasks(int64_t count, int64_t workspace, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Floats space = allocate(workspace);
    for (int64_t i = next++; i < count; i = next++) task(i, space.get());
  });
}

}  // namespace t2i
