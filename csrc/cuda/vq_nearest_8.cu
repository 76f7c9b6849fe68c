#include "vq_nearest_instance.cuh"

namespace t2i::cuda {
template int64_t vq_nearest_workspace_of<8>(int64_t, int32_t);
template void launch_vq_nearest<8>(const VqNearest&, void*);
}
