// The instruction sets that kernels are compiled for, and the one that they run with.
#pragma once

#include <cstdint>

namespace t2i::cpu {

enum class Capability { DEFAULT, AVX2, AVX512, AVX512_VNNI, AMX };

// The best one that both this build and this machine have, unless another was forced.
Capability capability();

// How many bytes ahead of a stream of memory to ask for the next line.
constexpr int64_t kPrefetchDistance = 2048;

// The same where memory is what is waited for; 0: the processor's own prefetchers do better
// undisturbed.
int64_t prefetch_distance();

}  // namespace t2i::cpu

// For Python (ctypes): the name of the instruction set in use; a forced one ("DEFAULT", "AVX2",
// "AVX512", "AVX512_VNNI", "AMX"), or none ("") again. Returns 0, or -1 if the build or the machine
// does not have it.
extern "C" {
__attribute__((visibility("default"))) const char* t2i_cpu_capability();
__attribute__((visibility("default"))) int t2i_set_cpu_capability(const char* name);
}
