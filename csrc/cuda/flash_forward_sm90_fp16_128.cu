#include "flash_forward_sm90.cuh"
#include "flash_forward_instance.cuh"

namespace t2i::cuda {
template void launch_flash_forward_sm90<Element::fp16, 128>(const FlashForward&, void*);
}
