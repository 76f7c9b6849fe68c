// The checker: races by happens-before, shared memory that was not written or not waited for, bounds,
// bank conflicts.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler call a function at every load
// and store. Its run-time library is not linked: the functions at the end of this file are called.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <unordered_map>

#include "hooks.h"

namespace simt {
namespace {

// ---- Source lines -------------------------------------------------------------------------------

struct Code {
  std::string file;
  size_t offset;
};

Code code_at(const void* instruction) {
  Dl_info info;
  const char* address = static_cast<const char*>(instruction) - 1;  // in the call, not behind it
  if (!instruction || !dladdr(address, &info)) return {};
  return {info.dli_fname, size_t(address - static_cast<const char*>(info.dli_fbase))};
}

// Of functions that stand for instructions: their callers are of interest.
bool is_wrapper(const std::string& path) {
  for (const char* name : {"/ptx.cuh", "/simt/simt.h", "/simt/device.h", "/simt/matrix.h",
                           "/simt/hopper.h", "?"}) {
    if (path.ends_with(name)) return true;
  }
  return false;
}

std::unordered_map<const void*, std::string> lines;

// Asks addr2line for lines of the kernel's code, by way of what is inlined there.
void find_lines(const std::vector<const void*>& instructions) {
  std::map<std::string, std::vector<const void*>> unknown;
  for (const void* instruction : instructions) {
    if (lines.contains(instruction)) continue;
    const Code code = code_at(instruction);
    char text[32];
    std::snprintf(text, sizeof text, "+0x%zx", code.offset);
    lines[instruction] = code.file.empty() ? "an unknown line" : code.file + text;
    if (!code.file.empty()) unknown[code.file].push_back(instruction);
  }
  for (const auto& [file, wanted] : unknown) {
    std::string command = "addr2line -a -i -e '" + file + "'";
    for (const void* instruction : wanted) {
      char text[32];
      std::snprintf(text, sizeof text, " 0x%zx", code_at(instruction).offset);
      command += text;
    }
    FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
    if (!pipe) continue;
    auto next = wanted.begin();
    std::string* line = nullptr;
    bool found = false;
    char text[4096];
    while (std::fgets(text, sizeof text, pipe)) {
      if (std::strncmp(text, "0x", 2) == 0) {  // the next address; then its frames, innermost first
        line = next == wanted.end() ? nullptr : &lines[*next++];
        found = false;
        continue;
      }
      std::string frame(text, std::strcspn(text, "\n"));
      frame = frame.substr(0, frame.find(" (discriminator"));
      const std::string path = frame.substr(0, frame.rfind(':'));
      if (!line || found || path.ends_with("?")) continue;
      *line = frame.substr(frame.rfind('/') + 1);
      found = !is_wrapper(path);
    }
    pclose(pipe);
  }
}

std::string find_line(const void* instruction) {
  find_lines({instruction});
  return lines[instruction];
}

// ---- What threads know --------------------------------------------------------------------------

// Vector clocks: a thread's own clock ticks whenever it makes what it did known to others, and of every
// thread it knows up to which of its moments all that it did is known.
using Clocks = std::vector<uint32_t>;
using Blocks = std::map<uint32_t, Clocks>;

void join(Clocks& a, const Clocks& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); ++i) a[i] = std::max(a[i], b[i]);
}

void join(Blocks& a, const Blocks& b) {
  for (const auto& [block, clocks] : b) join(a[block], clocks);
}

struct Knowledge {
  Clocks clocks;  // of this block's threads
  Blocks others;
};

void join(Knowledge& a, const Knowledge& b) {
  join(a.clocks, b.clocks);
  join(a.others, b.others);
}

// Shared by those who know the same: copied where one learns more.
using Known = std::shared_ptr<const Knowledge>;

struct Mind {
  Known known;
  uint32_t clock = 1;
  // Between fences and atomics: what a fence has made fit to publish, and what an atomic has read of
  // what others published, which the next fence makes known.
  Blocks fenced, seen;
};

// Who touched a byte. 16 bytes, as there are three for each byte of memory.
struct Stamp {
  uint32_t clock = 0;  // 0: nobody
  uint32_t block = 0;
  int32_t instruction = 0;  // from ``anchor``
  uint16_t thread = 0;
  uint16_t atomic = 0;  // no padding: histories are compared as bytes
};

// The last who wrote it, the first who read it since, and the last who did so at the same time.
struct Byte {
  Stamp write, reads[2];
};

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

struct Region {
  Region(const char* begin, size_t size, std::string name)
      : begin(begin), size(size), name(std::move(name)) {
    forget();
  }
  // Zeros from calloc are pages that are only there once they are touched.
  void forget() { bytes.reset(static_cast<Byte*>(std::calloc(size + 1, sizeof(Byte)))); }
  const char* end() const { return begin + size; }

  const char* begin;
  size_t size;
  std::string name;
  std::unique_ptr<Byte[], Free> bytes;
};

enum class Cell : uint8_t { guard, array, in_flight };

struct Checker {
  std::map<const char*, Region> buffers;  // by where they end
  std::unique_ptr<Region> shared;
  std::vector<Cell> cells;  // of shared memory
  uint32_t block = 0;
  std::vector<Mind> minds;
  std::unordered_map<const void*, Knowledge> released;
  std::unordered_map<const void*, Blocks> published;
  const char *module_begin = nullptr, *module_end = nullptr;  // of which kernels are a part
  const char* parameters = nullptr;
} checker;

const char* const anchor = reinterpret_cast<const char*>(&find_line);

bool happened_before(const Stamp& stamp, const Thread& thread) {
  if (stamp.clock == 0) return true;
  const Knowledge& known = *checker.minds[thread.linear].known;
  if (stamp.block == checker.block) {
    return stamp.thread == thread.linear || known.clocks[stamp.thread] >= stamp.clock;
  }
  const auto found = known.others.find(stamp.block);
  return found != known.others.end() && found->second[stamp.thread] >= stamp.clock;
}

void on_release(const void* object, const Thread& thread) {
  Mind& mind = checker.minds[thread.linear];
  Knowledge& released = checker.released[object];
  join(released, *mind.known);
  released.clocks[thread.linear] = mind.clock++;
}

void learn(Mind& mind, const Knowledge& more) {
  Knowledge known = *mind.known;
  join(known, more);
  mind.known = std::make_shared<const Knowledge>(std::move(known));
}

void on_acquire(const void* object, const Thread& thread) {
  const auto found = checker.released.find(object);
  if (found != checker.released.end()) learn(checker.minds[thread.linear], found->second);
}

void count_pending(unsigned warp);

void on_meet(const Thread* const* threads, unsigned count, const void* barrier) {
  if (count == 0) return;
  auto known = std::make_shared<Knowledge>();
  const Knowledge* last = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    const Mind& mind = checker.minds[threads[i]->linear];
    if (mind.known.get() != last) join(*known, *mind.known);
    last = mind.known.get();
  }
  if (barrier) {
    const auto found = checker.released.find(barrier);
    if (found != checker.released.end()) {
      join(*known, found->second);
      checker.released.erase(found);
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    Mind& mind = checker.minds[threads[i]->linear];
    mind.known = known;
    known->clocks[threads[i]->linear] = mind.clock++;
    const bool next_warp = i == 0 || threads[i]->warp != threads[i - 1]->warp;
    if (barrier && next_warp) count_pending(threads[i]->warp);
  }
}

void on_fence(const Thread& thread) {
  Mind& mind = checker.minds[thread.linear];
  if (!mind.seen.empty()) {
    Knowledge more;
    const auto own = mind.seen.find(checker.block);
    if (own != mind.seen.end()) more.clocks = own->second;
    more.others = std::move(mind.seen);
    mind.seen.clear();
    more.others.erase(checker.block);
    learn(mind, more);
  }
  mind.fenced = mind.known->others;
  Clocks& own = mind.fenced[checker.block] = mind.known->clocks;
  own[thread.linear] = mind.clock++;
}

void on_atomic(const void* pointer, const Thread& thread) {
  Mind& mind = checker.minds[thread.linear];
  const auto found = checker.published.find(pointer);
  if (found != checker.published.end()) join(mind.seen, found->second);
  if (!mind.fenced.empty()) join(checker.published[pointer], mind.fenced);
}

// ---- Accesses -----------------------------------------------------------------------------------

const char* verb(Access access) {
  switch (access) {
    case Access::read: return "read";
    case Access::write: return "write";
    case Access::atomic: return "atomic";
    case Access::issue: return "copy";
    case Access::sync: return "use as an mbarrier";
  }
  return "";
}

std::string byte_name(const Region& region, size_t offset) {
  if (&region == checker.shared.get()) return shared_name(uint32_t(offset));
  return "byte " + std::to_string(offset) + " of " + region.name;
}

[[noreturn]] void race(const Region& region, size_t offset, Access access, const void* instruction,
                       const Stamp& other, const char* what) {
  const unsigned threads = here.block_dim.x * here.block_dim.y * here.block_dim.z;
  const std::string by = other.thread < threads ? "thread " + std::to_string(other.thread)
                                                : std::string("cp.async.bulk");
  fail("race on %s: %s at %s, unordered with the %s by %s%s at %s",
       byte_name(region, offset).c_str(), verb(access), line_of(instruction).c_str(), what, by.c_str(),
       other.block != checker.block ? " of another block" : "",
       line_of(anchor + other.instruction).c_str());
}

[[noreturn]] void out_of_bounds(const char* pointer, size_t bytes, Access access,
                                const void* instruction, const Region& region) {
  const bool before = pointer < region.begin;
  const ptrdiff_t distance = before ? region.begin - pointer : pointer - region.end();
  fail("out of bounds: %zu-byte %s at %s, %td bytes %s %s of %zu bytes", bytes, verb(access),
       line_of(instruction).c_str(), distance, before ? "before" : "behind the end of",
       region.name.c_str(), region.size);
}

// Null: constants of the program, and parameters.
Region* find_region(const char* pointer, size_t bytes, Access access, const void* instruction) {
  Region* shared = checker.shared.get();
  if (pointer >= shared->begin && pointer < shared->end()) return shared;
  if (pointer >= checker.module_begin && pointer < checker.module_end) return nullptr;
  constexpr size_t kParameters = 64 << 10;  // at most 32 KB, and what the launch keeps beside them
  if (pointer >= checker.parameters && pointer < checker.parameters + kParameters) return nullptr;
  const auto above = checker.buffers.upper_bound(pointer);
  if (above != checker.buffers.end() && pointer >= above->second.begin) return &above->second;
  constexpr ptrdiff_t kNear = 1 << 20;
  if (above != checker.buffers.end() && above->second.begin - pointer <= kNear) {
    out_of_bounds(pointer, bytes, access, instruction, above->second);
  }
  if (above != checker.buffers.begin() && pointer - std::prev(above)->first < kNear) {
    out_of_bounds(pointer, bytes, access, instruction, std::prev(above)->second);
  }
  fail("out of bounds: %zu-byte %s at %s of %p, which no buffer is near", bytes, verb(access),
       line_of(instruction).c_str(), pointer);
}

void check_cell(uint32_t offset, size_t bytes, Access access, const void* instruction) {
  if (checker.cells[offset] == Cell::guard) {
    fail("out of bounds: %zu-byte %s at %s, %s", bytes, verb(access), line_of(instruction).c_str(),
         shared_name(offset).c_str());
  }
  if (checker.cells[offset] == Cell::in_flight) {
    fail("not waited for: %s at %s of %s, to which a copy is on its way", verb(access),
         line_of(instruction).c_str(), shared_name(offset).c_str());
  }
  const bool reads = access != Access::write && access != Access::issue;
  if (reads && checker.shared->bytes[offset].write.clock == 0) {
    fail("uninitialised: %s at %s of %s, which nobody has written", verb(access),
         line_of(instruction).c_str(), shared_name(offset).c_str());
  }
}

void on_access(const char* pointer, size_t bytes, Access access, const Thread& thread,
               const void* instruction) {
  if (on_stack(pointer)) return;
  Region* region = find_region(pointer, bytes, access, instruction);
  if (!region) return;
  const bool in_shared = region == checker.shared.get();
  const size_t offset = size_t(pointer - region->begin);
  if (offset + bytes > region->size) out_of_bounds(pointer, bytes, access, instruction, *region);
  if (access == Access::atomic) on_atomic(pointer, thread);
  const bool writes = access != Access::read && access != Access::sync;
  const Stamp now = {checker.minds[thread.linear].clock, checker.block,
                     int32_t(static_cast<const char*>(instruction) - anchor), uint16_t(thread.linear),
                     uint16_t(access == Access::atomic)};
  Byte before;  // of the last byte: what has the same history needs no second look
  bool concurrent_read = false;
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = region->bytes[i];
    if (in_shared) check_cell(uint32_t(i), bytes, access, instruction);
    if (i == offset || std::memcmp(&byte, &before, sizeof byte) != 0) {
      before = byte;
      const bool both_atomic = now.atomic && byte.write.atomic;
      if (!both_atomic && !happened_before(byte.write, thread)) {
        race(*region, i, access, instruction, byte.write, "write");
      }
      for (const Stamp& read : byte.reads) {
        if (writes && !happened_before(read, thread)) {
          race(*region, i, access, instruction, read, "read");
        }
      }
      concurrent_read = !happened_before(byte.reads[0], thread);
    }
    if (writes) {
      byte = {now, {}};
    } else {
      byte.reads[concurrent_read] = now;
    }
  }
}

// ---- Bank conflicts -----------------------------------------------------------------------------

// Lanes run one after the other, so what is one instruction of a warp is put together again: the
// n-th time, since the last barrier, that each lane comes by an address of the code.
struct Instruction {
  uint32_t lanes = 0;
  size_t bytes = 0;
  uint32_t addresses[32];
};

struct Occurrences {
  uint32_t first = 0;  // that of pending[0]
  std::array<uint32_t, 32> count{};
  std::vector<Instruction> pending;
};
std::unordered_map<const void*, Occurrences> occurrences[kMaxThreads / 32];
std::unordered_map<const void*, LineCount> totals;

// A pass serves 32 banks of 4 bytes; lanes that read the same word share it.
unsigned passes(const uint32_t* addresses, unsigned lanes, size_t bytes) {
  std::vector<uint32_t> words[32];
  for (unsigned lane = 0; lane < lanes; ++lane) {
    for (uint32_t word = addresses[lane] / 4; word * 4 < addresses[lane] + bytes; ++word) {
      auto& bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
    }
  }
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return unsigned(most);
}

void count_warp(const void* instruction, const uint32_t* addresses, unsigned lanes, size_t bytes) {
  LineCount& total = totals[instruction];
  ++total.accesses;
  // Of 8 bytes by half warps, of 16 by quarters.
  const unsigned together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (unsigned lane = 0; lane < lanes; lane += together) {
    total.wavefronts += passes(addresses + lane, std::min(together, lanes - lane), bytes);
    ++total.ideal;
  }
}

void count_gathered(const void* instruction, const Instruction& gathered) {
  uint32_t addresses[32];
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (gathered.lanes >> lane & 1) addresses[lanes++] = gathered.addresses[lane];
  }
  if (lanes) count_warp(instruction, addresses, lanes, gathered.bytes);
}

void count_lane(const char* pointer, size_t bytes, const void* instruction) {
  const Region& shared = *checker.shared;
  if (pointer < shared.begin || pointer >= shared.end()) return;
  const Thread& thread = *here.thread;
  Occurrences& of = occurrences[thread.warp][instruction];
  const uint32_t index = of.count[thread.lane]++ - of.first;
  if (index >= of.pending.size()) of.pending.resize(index + 1);
  Instruction& gathered = of.pending[index];
  gathered.lanes |= 1u << thread.lane;
  gathered.addresses[thread.lane] = uint32_t(pointer - shared.begin);
  gathered.bytes = bytes;
  size_t whole = 0;
  while (whole < of.pending.size() && of.pending[whole].lanes == 0xffffffffu) {
    count_gathered(instruction, of.pending[whole++]);
  }
  of.pending.erase(of.pending.begin(), of.pending.begin() + whole);
  of.first += uint32_t(whole);
}

void count_pending(unsigned warp) {
  for (const auto& [instruction, of] : occurrences[warp]) {
    for (const Instruction& gathered : of.pending) count_gathered(instruction, gathered);
  }
  occurrences[warp].clear();
}

std::vector<LineCount> on_shared_counts() {
  std::vector<const void*> instructions;
  for (const auto& [instruction, count] : totals) instructions.push_back(instruction);
  find_lines(instructions);
  std::map<std::string, LineCount> by_line;
  for (const auto& [instruction, count] : totals) {
    LineCount& line = by_line[lines[instruction]];
    line.line = lines[instruction];
    line.accesses += count.accesses;
    line.wavefronts += count.wavefronts;
    line.ideal += count.ideal;
  }
  std::vector<LineCount> all;
  for (const auto& [name, line] : by_line) all.push_back(line);
  return all;
}

// ---- Hooks --------------------------------------------------------------------------------------

void grid_begins(const void* parameters) {
  checker.parameters = static_cast<const char*>(parameters);
  checker.block = 0;
  checker.published.clear();
  for (auto& [end, region] : checker.buffers) region.forget();
}

void block_begins(const char* shared, size_t bytes, unsigned threads) {
  ++checker.block;
  const auto nothing = std::make_shared<const Knowledge>(Knowledge{Clocks(threads + kCopiers), {}});
  checker.minds.assign(threads + kCopiers, Mind{nothing, 1, {}, {}});
  checker.released.clear();
  if (!checker.shared || checker.shared->begin != shared || checker.shared->size != bytes) {
    checker.shared = std::make_unique<Region>(shared, bytes, "shared memory");
  }
  checker.cells.assign(bytes, Cell::guard);
}

void block_ends() {
  for (unsigned warp = 0; warp < kMaxThreads / 32; ++warp) count_pending(warp);
}

void on_array(uint32_t address, size_t bytes) {
  std::fill_n(checker.cells.begin() + address, bytes, Cell::array);
  std::fill_n(checker.shared->bytes.get() + address, bytes, Byte{});
}

void on_in_flight(uint32_t address, size_t bytes, bool begin) {
  std::fill_n(checker.cells.begin() + address, bytes, begin ? Cell::in_flight : Cell::array);
}

void on_allocated(const char* pointer, size_t bytes, const char* name) {
  checker.buffers.try_emplace(pointer + bytes, pointer, bytes, name);
}

void on_released(const char* pointer) {
  std::erase_if(checker.buffers, [&](const auto& entry) { return entry.second.begin == pointer; });
}

// Where this module's code and data are.
int find_module(dl_phdr_info* info, size_t, void*) {
  const char *begin = nullptr, *end = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const char* at = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
    if (!begin) begin = at;
    end = at + header.p_memsz;
  }
  if (anchor < begin || anchor >= end) return 0;
  checker.module_begin = begin;
  checker.module_end = end;
  return 1;
}

const bool installed = [] {
  dl_iterate_phdr(find_module, nullptr);
  hooks = {
      .access = on_access,
      .lane_shared = count_lane,
      .warp_shared = count_warp,
      .array = on_array,
      .in_flight = on_in_flight,
      .release = on_release,
      .acquire = on_acquire,
      .meet = on_meet,
      .fence = on_fence,
      .grid_begins = grid_begins,
      .block_begins = block_begins,
      .block_ends = block_ends,
      .allocated = on_allocated,
      .released = on_released,
      .line = find_line,
      .shared_counts = on_shared_counts,
      .clear_counts = [] { totals.clear(); },
  };
  return true;
}();

void on_compiled_access(void* pointer, size_t bytes, Access kind, const void* instruction) {
  if (in_kernel() && !on_stack(pointer)) access(pointer, bytes, kind, instruction);
}

// In pieces that have an alignment of their own: the compiler knows what it does.
void on_unaligned_access(void* pointer, size_t bytes, Access kind, const void* instruction) {
  if (!in_kernel() || on_stack(pointer)) return;
  on_access(static_cast<const char*>(pointer), bytes, kind, *here.thread, instruction);
}

}  // namespace
}  // namespace simt

#define CALLER __builtin_return_address(0)
#define SIMT_ACCESS(name, kind, bytes)                                    \
  void __tsan_##name(void* p) { simt::on_compiled_access(p, bytes, simt::Access::kind, CALLER); }
#define SIMT_UNALIGNED(name, kind, bytes)                                 \
  void __tsan_unaligned_##name(void* p) {                                 \
    simt::on_unaligned_access(p, bytes, simt::Access::kind, CALLER);      \
  }
#define SIMT_ACCESSES(bytes)                       \
  SIMT_ACCESS(read##bytes, read, bytes)            \
  SIMT_ACCESS(write##bytes, write, bytes)          \
  SIMT_ACCESS(volatile_read##bytes, read, bytes)   \
  SIMT_ACCESS(volatile_write##bytes, write, bytes) \
  SIMT_UNALIGNED(read##bytes, read, bytes)         \
  SIMT_UNALIGNED(write##bytes, write, bytes)

extern "C" {
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) {
  simt::on_unaligned_access(p, bytes, simt::Access::read, CALLER);
}
void __tsan_write_range(void* p, size_t bytes) {
  simt::on_unaligned_access(p, bytes, simt::Access::write, CALLER);
}
// By clang, which has memcpy and memset reported so.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  simt::on_unaligned_access(const_cast<void*>(from), bytes, simt::Access::read, CALLER);
  simt::on_unaligned_access(to, bytes, simt::Access::write, CALLER);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  simt::on_unaligned_access(to, bytes, simt::Access::write, CALLER);
  return std::memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
