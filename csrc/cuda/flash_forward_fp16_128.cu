#include "flash_forward.cuh"
#include "flash_forward_instance.cuh"

namespace t2i::cuda {
template void launch_flash_forward<Element::fp16, 128>(const FlashForward&, void*);
}
