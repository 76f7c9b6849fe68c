// The GPU that kernels are launched on.
#pragma once

namespace t2i::cuda {

// Of the current device: 80, 90, …
int compute_capability();

}  // namespace t2i::cuda
