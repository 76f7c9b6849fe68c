// Vectors at the start of a cache line: loads of a register's width do not straddle two then.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace t2i::cpu {

template <typename T>
struct CacheAligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheAligned() = default;
  template <typename U>
  CacheAligned(const CacheAligned<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const CacheAligned&) const { return true; }
};

using AlignedFloats = std::vector<float, CacheAligned<float>>;

}  // namespace t2i::cpu
