// t2i::linear.cpu on torch's stable ABI. The schema is defined in kernels/t2i_kernels/linear/api.py.
#include "bindings/linear.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/team.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kOp = "linear";

Tensor linear(Tensor x, Tensor weights, int64_t outputs, std::string type) {
  check(kOp, x.is_cpu() && x.dim() >= 1 && x.scalar_type() == ScalarType::Float,
        "x must be float32 on the CPU");
  check(kOp, weights.is_cpu() && weights.scalar_type() == ScalarType::Byte &&
            weights.is_contiguous(), "weights must be contiguous uint8 on the CPU");
  x = torch::stable::contiguous(x);
  std::vector<int64_t> out_shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) out_shape.push_back(x.size(i));
  out_shape.push_back(outputs);
  Tensor out = torch::stable::empty(out_shape, ScalarType::Float);
  const int64_t inputs = x.size(x.dim() - 1);
  const PackedMatrix matrix{weight_type(kOp, type), outputs, inputs,
                            weights.const_data_ptr<uint8_t>()};
  check(kOp, weights.numel() == matrix.panels() * matrix.panel_bytes(), "weights must be ",
        matrix.panels() * matrix.panel_bytes(), " bytes for ", outputs, " outputs of ", inputs,
        " inputs, got ", weights.numel());
  const int64_t rows = inputs > 0 ? x.numel() / inputs : (outputs > 0 ? out.numel() / outputs : 0);
  if (rows == 0 || outputs == 0) return out;

  LinearInputs in{rows, x.const_data_ptr<float>(), inputs, {}};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), matrix.panels());
  const Floats space = allocate(threads * kLinearWorkspace);
  Floats quantized;
  if (matrix.quantized()) {
    quantized = allocate(quantized_size(rows, inputs));
    in.quantized = quantized_in(quantized.get(), rows, inputs);
  }
  const LinearOutputs to{out.mutable_data_ptr<float>(), outputs, Epilogue::store};
  const LinearKernels& kernels = linear_kernels();
  run_team(threads, [&](const Member& member) {
    if (matrix.quantized()) {
      const auto [begin, end] = member.share(rows);
      for (int64_t row = begin; row < end; ++row) {
        kernels.quantize(in.x + row * inputs, inputs, quantized_row(in.quantized, row, inputs));
      }
      member.wait();
    }
    const auto [begin, end] = member.share(matrix.panels());
    kernels.multiply(matrix, in, begin, end, to, space.get() + member.index * kLinearWorkspace);
  });
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("linear.cpu", TORCH_BOX(&t2i::linear)); }
