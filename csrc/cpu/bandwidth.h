#pragma once

#include <cstdint>

// For Python (ctypes): bytes a second that so many threads read of `size` bytes, again and again; 0
// where the system has no memory for them. Takes half a second or so.
extern "C" __attribute__((visibility("default"))) double t2i_read_bandwidth(int threads,
                                                                            int64_t size);
