// What the scheduler tells the checker: all null without it.
#pragma once

#include "simt.h"

namespace simt {

struct Hooks {
  void (*access)(const char* pointer, size_t bytes, Access, const Thread&, const void* instruction);
  // One lane's part of an instruction that reads or writes shared memory, and all of one.
  void (*lane_shared)(const char* pointer, size_t bytes, const void* instruction);
  void (*warp_shared)(const void* instruction, const uint32_t* addresses, unsigned lanes, size_t bytes);
  void (*array)(uint32_t address, size_t bytes);                  // one more shared array
  void (*in_flight)(uint32_t address, size_t bytes, bool begin);  // a copy has it
  // What a thread has done so far is known to whoever acquires the object later.
  void (*release)(const void* object, const Thread&);
  void (*acquire)(const void* object, const Thread&);
  // These know all of each other; at a barrier also what others released there.
  void (*meet)(const Thread* const* threads, unsigned count, const void* barrier);
  void (*fence)(const Thread&);
  void (*grid_begins)(const void* parameters);  // on the host's stack, which grows downwards to there
  void (*block_begins)(const char* shared, size_t bytes, unsigned threads);
  void (*block_ends)();
  void (*allocated)(const char* pointer, size_t bytes, const char* name);
  void (*released)(const char* pointer);
  std::string (*line)(const void* instruction);
  std::vector<LineCount> (*shared_counts)();
  void (*clear_counts)();
};
extern Hooks hooks;

constexpr unsigned kMaxThreads = 1024;
// Copies write as threads of their own, numbered after the block's.
constexpr unsigned kCopiers = 32;

bool on_stack(const void* pointer);  // of a fiber: nobody else may see it
bool in_kernel();                    // and not in what a collective does

}  // namespace simt
