#include "decode_attention_instance.cuh"

namespace t2i::cuda {
template void launch_decode_attention<Element::bf16, 64, true>(const DecodeAttention&, void*);
}
