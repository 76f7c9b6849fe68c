// Checks a call of flash_attention, and chooses the instantiation.
#include "flash_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"

namespace t2i::cuda {
namespace {

void check(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument("flash_attention: " + message);
}

void check_rows(const char* name, const void* data, const Strides& strides) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % 8 == 0 &&
                       strides.row % 8 == 0 && strides.head % 8 == 0;
  check(aligned, std::string(name) + ": rows are not aligned to 16 bytes");
  check(strides.row >= 0 && strides.row < 1 << 23,
        std::string(name) + ": the stride of rows is " + std::to_string(strides.row) +
            ", expected less than 2^23");
}

void check_call(const FlashAttention& call) {
  check(call.dim % 8 == 0 && call.value_dim % 8 == 0 && call.dim > 0 && call.value_dim > 0 &&
            std::max(call.dim, call.value_dim) <= 128,
        "head_dim is " + std::to_string(call.dim) + " and " + std::to_string(call.value_dim) +
            ", expected multiples of 8 up to 128");
  check(call.heads <= 65535 && call.batch <= 65535, "more than 65535 heads or batches");
  check_rows("q", call.q, call.q_strides);
  check_rows("k", call.k, call.k_strides);
  check_rows("v", call.v, call.v_strides);
}

template <Element kElement, int kDim>
void forward(const FlashForward& call, void* stream) {
  const bool wgmma = compute_capability() == 90;
  (wgmma ? launch_flash_forward_sm90<kElement, kDim> : launch_flash_forward<kElement, kDim>)(call, stream);
}

}  // namespace

void flash_forward(const FlashForward& call, void* stream) {
  check_call(call);
  check(call.scale > 0 || call.softcap > 0,
        "scale is " + std::to_string(call.scale) + ", expected above 0 where there is no softcap");
  check_rows("out", call.out, call.out_strides);
  if (call.batch == 0 || call.heads == 0 || call.length_q == 0) return;
  const bool wide = std::max(call.dim, call.value_dim) > 64;
  if (call.element == Element::bf16) {
    (wide ? forward<Element::bf16, 128> : forward<Element::bf16, 64>)(call, stream);
  } else {
    (wide ? forward<Element::fp16, 128> : forward<Element::fp16, 64>)(call, stream);
  }
}

void flash_backward(const FlashBackward& call, void* stream) {
  check_call(call);
  check_rows("dout", call.dout, call.dout_strides);
  check_rows("out", call.out, call.out_strides);
  check_rows("dq", call.dq, call.dq_strides);
  check_rows("dk", call.dk, call.dk_strides);
  check_rows("dv", call.dv, call.dv_strides);
  if (call.batch == 0 || call.heads == 0) return;
  const bool wide = std::max(call.dim, call.value_dim) > 64;
  if (call.element == Element::bf16) {
    (wide ? launch_flash_backward<Element::bf16, 128> : launch_flash_backward<Element::bf16, 64>)(call, stream);
  } else {
    (wide ? launch_flash_backward<Element::fp16, 128> : launch_flash_backward<Element::fp16, 64>)(call, stream);
  }
}

}  // namespace t2i::cuda
