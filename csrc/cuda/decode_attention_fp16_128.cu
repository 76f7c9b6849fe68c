#include "decode_attention_instance.cuh"

namespace t2i::cuda {
template void launch_decode_attention<Element::fp16, 128, false>(const DecodeAttention&, void*);
}
