// Checks a call of decode_attention, and chooses the instantiation.
#include "decode_attention.h"

#include <stdexcept>
#include <string>

namespace t2i::cuda {
namespace {

void check(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument("decode_attention: " + message);
}

void check_rows(const char* name, const void* data, const Strides& strides, int size) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                       strides.batch * size % 16 == 0 && strides.row * size % 16 == 0 &&
                       strides.head * size % 16 == 0;
  check(aligned, std::string(name) + ": rows are not aligned to 16 bytes");
  check(strides.row >= 0 && strides.row < 1 << 23,
        std::string(name) + ": the stride of rows is " + std::to_string(strides.row) +
            ", expected less than 2^23");
}

int64_t queries(const DecodeAttention& call) {  // that share a key head
  return int64_t(call.tokens) * (call.heads / call.kv_heads);
}

int64_t tiles(const DecodeAttention& call) {
  const int at_once = decode_queries(queries(call));
  return (queries(call) + at_once - 1) / at_once;
}

int64_t splits(const DecodeAttention& call) {
  const int split = decode_split((call.dim > 64 ? 128 : 64) * (call.int8 ? 1 : 2));
  return (int64_t(call.slots) + split - 1) / split;
}

bool is_empty(const DecodeAttention& call) {
  return call.batch == 0 || call.tokens == 0 || call.heads == 0;
}

void check_call(const DecodeAttention& call) {
  check(call.kv_heads > 0 && call.heads % call.kv_heads == 0,
        "heads is " + std::to_string(call.heads) + ", expected a multiple of the " +
            std::to_string(call.kv_heads) + " of the cache");
  const int multiple = call.int8 ? 16 : 8;
  check(call.dim > 0 && call.dim <= 128 && call.dim % multiple == 0,
        "head_dim is " + std::to_string(call.dim) + ", expected a multiple of " +
            std::to_string(multiple) + " up to 128");
  check(call.tokens <= kMostNewTokens, "tokens is " + std::to_string(call.tokens) +
                                           ", expected at most " + std::to_string(kMostNewTokens));
  check(!call.cos == !call.sin, "cos and sin: expected both or none");
  check(call.rotary_pairs >= 0 && call.rotary_pairs * 2 <= call.dim &&
            (call.cos || !call.rotary_pairs),
        "rotary_pairs is " + std::to_string(call.rotary_pairs) + ", expected at most " +
            (call.cos ? "half of head_dim, " + std::to_string(call.dim) : "0 without cos and sin"));
  check(!call.int8 == !call.k_scale && !call.int8 == !call.v_scale,
        "k_scale and v_scale: expected for int8, and for nothing else");
  check(tiles(call) <= 65535 && splits(call) <= 65535,
        "heads is " + std::to_string(call.heads) + " and slots is " + std::to_string(call.slots) +
            ", expected at most 65535 tiles of queries and splits of slots");
  check(int64_t(call.batch) * call.kv_heads < int64_t(1) << 31,
        "batch is " + std::to_string(call.batch) + ", expected less than 2^31 with all key heads");
  check_rows("k", call.k, call.k_strides, call.int8 ? 1 : 2);
  check_rows("v", call.v, call.v_strides, call.int8 ? 1 : 2);
  check_rows("out", call.out, call.out_strides, 2);
  check(splits(call) <= 1 || (call.partial && reinterpret_cast<uintptr_t>(call.partial) % 16 == 0),
        "partial: expected memory aligned to 16 bytes");
}

template <Element kElement, int kDim>
void launch_dim(const DecodeAttention& call, void* stream) {
  if (call.int8) {
    launch_decode_attention<kElement, kDim, true>(call, stream);
  } else {
    launch_decode_attention<kElement, kDim, false>(call, stream);
  }
}

template <Element kElement>
void launch_element(const DecodeAttention& call, void* stream) {
  if (call.dim > 64) {
    launch_dim<kElement, 128>(call, stream);
  } else {
    launch_dim<kElement, 64>(call, stream);
  }
}

}  // namespace

int64_t decode_attention_partials(const DecodeAttention& call) {
  if (is_empty(call) || splits(call) <= 1) return 0;
  return int64_t(call.batch) * call.tokens * call.heads * splits(call) * (call.dim + 2);
}

int64_t decode_attention_counters(const DecodeAttention& call) {
  if (is_empty(call) || splits(call) <= 1) return 0;
  return int64_t(call.batch) * call.kv_heads * tiles(call);
}

void decode_attention(const DecodeAttention& call, void* stream) {
  if (is_empty(call)) return;
  check_call(call);
  if (call.element == Element::bf16) {
    launch_element<Element::bf16>(call, stream);
  } else {
    launch_element<Element::fp16>(call, stream);
  }
}

}  // namespace t2i::cuda
