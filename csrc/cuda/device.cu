#include "device.h"

#include "launch.cuh"

namespace t2i::cuda {

int compute_capability() {
#if defined(__CUDACC__)
  int device, major, minor;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
#else
  return simt::options.compute_capability;
#endif
}

}  // namespace t2i::cuda
