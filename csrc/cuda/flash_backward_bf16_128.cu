#include "flash_backward_instance.cuh"

namespace t2i::cuda {
template void launch_flash_backward<Element::bf16, 128>(const FlashBackward&, void*);
}
