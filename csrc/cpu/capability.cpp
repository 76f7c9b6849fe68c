#include "cpu/capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstring>

namespace t2i::cpu {
namespace {

constexpr const char* kNames[] = {"DEFAULT", "AVX2", "AVX512", "AVX512_VNNI", "AMX"};

#if defined(__x86_64__) && defined(T2I_AMX)
// Tiles of bf16, and the vectors that feed them. Linux gives the registers to a process that asks.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1), avx512_vnni = c >> 11 & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool avx512_bf16 = a >> 5 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles && avx512_vnni && avx512_bf16 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

// Every set includes the ones before it.
Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && has_amx()) return Capability::AMX;
  if (avx2 && avx512 && __builtin_cpu_supports("avx512vnni")) return Capability::AVX512_VNNI;
  if (avx2 && avx512) return Capability::AVX512;
  if (avx2) return Capability::AVX2;
#endif
  return Capability::DEFAULT;
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> value{best()};
  return value;
}

}  // namespace

int64_t prefetch_distance() {
#if defined(__x86_64__)
  // AMD has AVX-512 from Zen 4 on. best() also initializes what __builtin_cpu_is reads.
  static const bool undisturbed = best() >= Capability::AVX512 && __builtin_cpu_is("amd");
  if (undisturbed) return 0;
#endif
  return kPrefetchDistance;
}

Capability capability() { return current().load(std::memory_order_relaxed); }

}  // namespace t2i::cpu

const char* t2i_cpu_capability() {
  return t2i::cpu::kNames[static_cast<int>(t2i::cpu::capability())];
}

int t2i_set_cpu_capability(const char* name) {
  using namespace t2i::cpu;
  const Capability limit = best();
  if (*name == '\0') {
    current().store(limit);
    return 0;
  }
  for (int i = 0; i <= static_cast<int>(limit); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      current().store(static_cast<Capability>(i));
      return 0;
    }
  }
  return -1;
}
