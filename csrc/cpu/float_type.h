// The types of inputs and outputs; everything between is fp32.
#pragma once

namespace t2i::cpu {

enum class FloatType { f32, bf16, f16 };

}  // namespace t2i::cpu
