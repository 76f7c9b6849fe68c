// Fibers, barriers, collectives, shared memory and the launch. What is only of use with a checker is
// behind the hooks.
#include "simt.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>

#include "hooks.h"

// SIMT_UCONTEXT: as on other processors; ten times slower.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Options options;
uint64_t switches = 0;
Hooks hooks = {};
Place here = {};

namespace {

constexpr size_t kStack = 128 << 10, kBelowStack = 64 << 10;  // unmapped
constexpr size_t kUnmapped = 1 << 20;                         // before and behind a buffer
constexpr size_t kGuard = 128;                                // bytes between shared arrays
constexpr size_t kMaxShared = 227 << 10;  // of a block, dynamic (CUDA C++ Programming Guide)
constexpr unsigned kBarriers = 16, kMaxWarps = kMaxThreads / 32;

// ---- Contexts -----------------------------------------------------------------------------------

#if !defined(SIMT_UCONTEXT)

struct Context {
  void* stack_pointer;
};

extern "C" void simt_switch_stacks(void** save, void* load);
// The registers that a callee keeps; control words are the same in all fibers.
asm(R"(
.text
.type simt_switch_stacks, @function
simt_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void switch_context(Context& from, Context& to) {
  simt_switch_stacks(&from.stack_pointer, to.stack_pointer);
}

void prepare_context(Context& context, char* stack, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;
  *top = nullptr;  // where a return address would be: the stack is aligned as in a called function
  *--top = reinterpret_cast<void*>(start);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

void prepare_context(Context& context, char* stack, void (*start)()) {
  getcontext(&context.state);
  context.state.uc_stack = {stack, 0, kStack};
  context.state.uc_link = nullptr;
  makecontext(&context.state, start, 0);
}

#endif

// ---- A block ------------------------------------------------------------------------------------

enum class State : uint8_t { ready, in_collective, in_barrier, in_mbarrier, done };

struct Copy {  // cp.async
  uint32_t to;
  const void* from;
  unsigned bytes, source_bytes;
  int group;
  const void* instruction;
};

struct BulkCopy {
  uint32_t to;
  const void* from;
  unsigned bytes;
  uint32_t mbarrier;
  const Thread* copier;
  const void* instruction;
};

struct Meeting {  // of lanes of a warp
  const char* name;
  Site site;
  Collective run;
  uint32_t mask, arrived = 0;
  void* operands[32];
};

struct Fiber : Thread {
  Context context;
  State state;
  Site site;  // where it waits, and in what:
  unsigned barrier;
  uint32_t mbarrier;
  unsigned parity;
  std::vector<Copy> copies;
  int group;
};

struct Barrier {
  unsigned arrived, expected;
  bool whole_block;
  Site site;
};

struct MBarrier {
  unsigned count, pending;
  int64_t bytes;  // expected and not arrived; negative: the other way round
  unsigned phase;
  char released[2];  // what the arrivals of even and odd phases made known; its address counts
};

struct Array {
  uint32_t address;
  size_t bytes;
};

struct Block {
  Fiber fibers[kMaxThreads];  // in the module: kernels read their indices there
  char* stacks = nullptr;
  Thread copiers[kCopiers];
  std::vector<Meeting> meetings[kMaxWarps];  // with disjoint masks
  Barrier barriers[kBarriers];
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  unsigned bulk_issued = 0;
  std::vector<unsigned> ready;
  size_t next = 0;
  unsigned threads = 0, living = 0;
  uint32_t living_lanes[kMaxWarps];
  Fiber* current = nullptr;
  const Meeting* running = nullptr;
  Context outside;
  Entry entry;
  void* closure;
  char* shared = nullptr;
  size_t shared_capacity = 0, shared_given = 0, shared_taken = 0;
  std::vector<Array> arrays;
  uint64_t random;
  std::string error;
};
Block block;

std::string name_of(Site site) {
  const char* file = std::strrchr(site.file_name(), '/');
  return std::string(file ? file + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

bool same(Site a, Site b) {
  const char *file = a.file_name(), *other = b.file_name();
  return a.line() == b.line() && (file == other || std::strcmp(file, other) == 0);
}

uint64_t random_number() {  // xorshift64
  uint64_t& x = block.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

// One of ``count`` that are equally good.
size_t choose(size_t count) {
  if (options.order == Order::reverse) return count - 1;
  return options.order == Order::random ? random_number() % count : 0;
}

// ---- Scheduling ---------------------------------------------------------------------------------

void run(Fiber* to) {  // null: back to the launch
  Fiber* from = block.current;
  if (from == to) return;
  ++switches;
  block.current = to;
  here.thread = to;
  switch_context(from ? from->context : block.outside, to ? to->context : block.outside);
}

void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  block.ready.push_back(fiber.linear);
}

Fiber* pick() {
  auto& ready = block.ready;
  if (block.next == ready.size()) return nullptr;
  std::swap(ready[block.next], ready[block.next + choose(ready.size() - block.next)]);
  Fiber* fiber = &block.fibers[ready[block.next++]];
  if (block.next == ready.size()) {
    ready.clear();
    block.next = 0;
  } else if (block.next > 4096) {
    ready.erase(ready.begin(), ready.begin() + block.next);
    block.next = 0;
  }
  return fiber;
}

// The one that any of these lanes is in.
Meeting* find_meeting(unsigned warp, uint32_t lanes) {
  for (Meeting& meeting : block.meetings[warp]) {
    if (meeting.mask & lanes) return &meeting;
  }
  return nullptr;
}

std::string describe_wait(const Fiber& fiber) {
  const std::string at = " at " + name_of(fiber.site);
  if (fiber.state == State::in_collective) {
    return "in " + std::string(find_meeting(fiber.warp, 1u << fiber.lane)->name) + at;
  }
  if (fiber.state == State::in_barrier) {
    const Barrier& barrier = block.barriers[fiber.barrier];
    return "in barrier " + std::to_string(fiber.barrier) + at + ", where " +
           std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) + " are";
  }
  const MBarrier& mbarrier = block.mbarriers.at(fiber.mbarrier);
  return "for the mbarrier in " + shared_name(fiber.mbarrier) + at + ", which lacks " +
         std::to_string(mbarrier.pending) + " of " + std::to_string(mbarrier.count) +
         " arrivals and " + std::to_string(mbarrier.bytes) + " bytes";
}

std::string deadlock() {
  std::vector<std::pair<std::string, unsigned>> waits;  // and how many do
  for (unsigned i = 0; i < block.threads; ++i) {
    if (block.fibers[i].state == State::done) continue;
    const std::string wait = describe_wait(block.fibers[i]);
    const auto found =
        std::find_if(waits.begin(), waits.end(), [&](auto& other) { return other.first == wait; });
    if (found != waits.end()) {
      ++found->second;
    } else {
      waits.emplace_back(wait, 1);
    }
  }
  std::string text = "deadlock: " + std::to_string(block.threads - block.living) + " of " +
                     std::to_string(block.threads) + " threads have ended";
  for (size_t i = 0; i < std::min(waits.size(), size_t(4)); ++i) {
    text += (i ? ", " : "; waiting: ") + std::to_string(waits[i].second) + " " + waits[i].first;
  }
  return text;
}

bool deliver_bulk_copy();  // whether there was one

void run_another() {
  Fiber* to = pick();
  while (!to && deliver_bulk_copy()) to = pick();
  if (!to && block.living) fail("%s", deadlock().c_str());
  run(to);
}

void yield() {
  Fiber& me = *block.current;
  Fiber* to = pick();
  if (!to) return;
  make_ready(me);
  run(to);
}

// Lets all go on that wait in a barrier; whoever runs, runs on.
void open_barrier(unsigned id) {
  Barrier& barrier = block.barriers[id];
  barrier.arrived = 0;
  const Thread* waiting[kMaxThreads];
  unsigned count = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state != State::in_barrier || fiber.barrier != id) continue;
    waiting[count++] = &fiber;
    fiber.state = State::ready;
    if (&fiber != block.current) make_ready(fiber);
  }
  if (hooks.meet) hooks.meet(waiting, count, &barrier);
}

// Runs a collective if all are there.
bool try_meeting(Meeting* meeting, unsigned warp) {
  const uint32_t lanes = meeting->mask & block.living_lanes[warp];
  if (meeting->arrived != lanes) return false;
  block.running = meeting;
  meeting->run(meeting->operands, lanes);
  block.running = nullptr;
  auto& meetings = block.meetings[warp];
  meetings.erase(meetings.begin() + (meeting - meetings.data()));
  const Thread* met[32];
  unsigned count = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Fiber& fiber = block.fibers[warp * 32 + lane];
    met[count++] = &fiber;
    if (&fiber != block.current) make_ready(fiber);
  }
  if (hooks.meet) hooks.meet(met, count, nullptr);
  return true;
}

// Those that wait for all others no longer wait for this one.
void leave() {
  Fiber& me = *block.current;
  me.state = State::done;
  --block.living;
  block.living_lanes[me.warp] &= ~(1u << me.lane);
  for (unsigned id = 0; id < kBarriers; ++id) {
    Barrier& barrier = block.barriers[id];
    if (!barrier.arrived || !barrier.whole_block) continue;
    barrier.expected = block.living;
    if (barrier.arrived == barrier.expected) open_barrier(id);
  }
  if (Meeting* meeting = find_meeting(me.warp, 1u << me.lane)) try_meeting(meeting, me.warp);
}

void start_fiber() {
  std::string thrown;
  try {
    block.entry(block.closure);
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) fail("%s", thrown.c_str());
  const auto& copies = block.current->copies;
  if (!copies.empty()) {
    fail("%zu cp.async were never waited for, the first at %s", copies.size(),
         line_of(copies[0].instruction).c_str());
  }
  leave();
  if (!block.living && !block.bulk_copies.empty()) {
    fail("%zu cp.async.bulk were never waited for, the first at %s", block.bulk_copies.size(),
         line_of(block.bulk_copies[0].instruction).c_str());
  }
  run_another();
  std::abort();  // nobody runs it again
}

char* stack_of(unsigned thread) {
  return block.stacks + thread * (kBelowStack + kStack) + kBelowStack;
}

void begin_block(dim3 index) {
  here.block = index;
  ++here.serial;
  block.living = block.threads;
  block.ready.clear();
  block.next = 0;
  block.arrays.clear();
  block.shared_taken = 0;
  block.running = nullptr;
  block.error.clear();
  std::fill(std::begin(block.living_lanes), std::end(block.living_lanes), 0);
  for (auto& meetings : block.meetings) meetings.clear();
  for (Barrier& barrier : block.barriers) barrier.arrived = 0;
  block.mbarriers.clear();
  block.bulk_copies.clear();
  for (unsigned i = 0; i < kCopiers; ++i) block.copiers[i].linear = block.threads + i;
  const dim3 size = here.block_dim;
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.linear = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.copies.clear();
    fiber.group = 0;
    block.living_lanes[fiber.warp] |= 1u << fiber.lane;
    prepare_context(fiber.context, stack_of(i), start_fiber);
    make_ready(fiber);
  }
  if (hooks.block_begins) hooks.block_begins(block.shared, block.shared_capacity, block.threads);
}

}  // namespace

std::string line_of(const void* instruction) {
  return hooks.line ? hooks.line(instruction) : "an unknown line (no checker)";
}

std::string shared_name(uint32_t address) {
  std::string text = "byte " + std::to_string(address) + " of shared memory";
  for (size_t i = 0; i < block.arrays.size(); ++i) {
    const auto [begin, bytes] = block.arrays[i];
    if (address < begin && i > 0) break;
    const std::string array = " shared array " + std::to_string(i);
    if (address < begin) {
      text = std::to_string(begin - address) + " bytes before" + array;
    } else if (address < begin + bytes) {
      text = "byte " + std::to_string(address - begin) + " of" + array;
    } else {
      text = std::to_string(address - begin - bytes) + " bytes behind the end of" + array + " of " +
             std::to_string(bytes) + " bytes";
    }
  }
  return text;
}

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block.current) throw Error(text);
  block.error = text;
  if (block.running) {
    block.error += std::string(" in ") + block.running->name + " at " + name_of(block.running->site);
  }
  const dim3 index = here.block;
  std::snprintf(text, sizeof text, " (block %u,%u,%u, thread %u)", index.x, index.y, index.z,
                block.current->linear);
  block.error += text;
  run(nullptr);
  std::abort();
}

namespace {

Barrier& arrive(Site site, unsigned id, unsigned threads) {
  if (id >= kBarriers) fail("barrier %u at %s: there are 16", id, name_of(site).c_str());
  if (threads % 32 != 0 || threads > kMaxThreads) {
    fail("barrier %u at %s: %u threads, expected a multiple of a warp up to 1024", id,
         name_of(site).c_str(), threads);
  }
  Barrier& barrier = block.barriers[id];
  const unsigned expected = threads ? threads : block.living;
  if (!barrier.arrived) {
    barrier = {0, expected, threads == 0, site};
  } else if (barrier.expected != expected || (threads == 0 && !same(barrier.site, site))) {
    fail("divergent barrier: %s, but others are at %s", name_of(site).c_str(),
         name_of(barrier.site).c_str());
  }
  ++barrier.arrived;
  return barrier;
}

}  // namespace

void barrier(Site site, unsigned id, unsigned threads) {
  Fiber& me = *block.current;
  const Barrier& barrier = arrive(site, id, threads);
  me.site = site;
  me.barrier = id;
  me.state = State::in_barrier;
  if (barrier.arrived < barrier.expected) {
    run_another();
    return;
  }
  open_barrier(id);
  if (options.order != Order::forward) yield();
}

void barrier_arrive(Site site, unsigned id, unsigned threads) {
  if (threads == 0) fail("bar.arrive at %s: how many threads?", name_of(site).c_str());
  const Barrier& barrier = arrive(site, id, threads);
  if (hooks.release) hooks.release(&barrier, *block.current);
  if (barrier.arrived == barrier.expected) open_barrier(id);
}

void collective(Site site, const char* name, uint32_t mask, void* operand, Collective run) {
  Fiber& me = *block.current;
  if (!(mask >> me.lane & 1)) {
    fail("%s at %s: lane %u is not in its own mask %08x", name, name_of(site).c_str(), me.lane, mask);
  }
  Meeting* meeting = find_meeting(me.warp, mask);
  if (!meeting) {
    meeting = &block.meetings[me.warp].emplace_back(Meeting{name, site, run, mask, 0, {}});
  } else if (meeting->run != run || meeting->mask != mask || !same(meeting->site, site)) {
    fail("divergent warp: %s at %s with mask %08x, but other lanes are in %s at %s with mask %08x",
         name, name_of(site).c_str(), mask, meeting->name, name_of(meeting->site).c_str(),
         meeting->mask);
  }
  meeting->operands[me.lane] = operand;
  meeting->arrived |= 1u << me.lane;
  if (!try_meeting(meeting, me.warp)) {
    me.site = site;
    me.state = State::in_collective;
    run_another();
  } else if (options.order != Order::forward) {
    yield();
  }
}

const Thread& lane_of_warp(unsigned lane) { return block.fibers[block.current->warp * 32 + lane]; }

void preempt() {
  if (options.preempt && random_number() % options.preempt == 0) yield();
}

void access(const void* pointer, size_t bytes, Access access, const void* instruction) {
  preempt();
  if (bytes <= 16 && reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("misaligned: %zu bytes of %p at %s", bytes, pointer, line_of(instruction).c_str());
  }
  if (!hooks.access) return;
  touch(pointer, bytes, access, *block.current, instruction);
  if (access != Access::atomic) {
    hooks.lane_shared(static_cast<const char*>(pointer), bytes, instruction);
  }
}

void touch(const void* pointer, size_t bytes, Access access, const Thread& thread,
           const void* instruction) {
  if (!hooks.access) return;
  hooks.access(static_cast<const char*>(pointer), bytes, access, thread, instruction);
}

void fence() {
  if (hooks.fence) hooks.fence(*block.current);
}

bool in_kernel() { return block.current && !block.running; }

bool on_stack(const void* pointer) {
  return pointer >= block.stacks && pointer < block.stacks + kMaxThreads * (kBelowStack + kStack);
}

// ---- Shared memory ------------------------------------------------------------------------------

void* shared_array(unsigned index, size_t bytes, size_t alignment) {
  if (index < block.arrays.size()) {
    if (block.arrays[index].bytes != bytes) {
      fail("threads disagree about shared array %u: %zu bytes, then %zu", index,
           block.arrays[index].bytes, bytes);
    }
    return block.shared + block.arrays[index].address;
  }
  auto align = [&](size_t x) { return (x + alignment - 1) / alignment * alignment; };
  block.shared_taken = align(block.shared_taken) + bytes;
  if (block.shared_taken > block.shared_given) {
    fail("shared memory: the kernel takes %zu bytes, the launch gave %zu", block.shared_taken,
         block.shared_given);
  }
  size_t end = 0;
  if (!block.arrays.empty()) end = block.arrays.back().address + block.arrays.back().bytes;
  const uint32_t address = uint32_t(align(end + kGuard));
  if (address + bytes + kGuard > block.shared_capacity) fail("shared memory: too many arrays");
  block.arrays.push_back({address, bytes});
  std::memset(block.shared + address, 0xff, bytes);
  if (hooks.array) hooks.array(address, bytes);
  return block.shared + address;
}

uint32_t shared_address(const void* pointer) {
  const char* at = static_cast<const char*>(pointer);
  if (at < block.shared || at >= block.shared + block.shared_capacity) {
    fail("%p is no address in shared memory", pointer);
  }
  return uint32_t(at - block.shared);
}

void* shared_pointer(uint32_t address, size_t bytes) {
  if (size_t(address) + bytes > block.shared_capacity) {
    fail("out of bounds: shared address %u is beyond the block's %zu bytes", address,
         block.shared_given);
  }
  return block.shared + address;
}

void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned source_bytes) {
  const void* instruction = __builtin_return_address(0);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async: %u bytes, expected 4, 8 or 16", bytes);
  if (source_bytes > bytes) fail("cp.async: %u bytes of %u", source_bytes, bytes);
  if (to % bytes || (source_bytes && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fail("misaligned: cp.async of %u bytes from %p to %s at %s", bytes, from, shared_name(to).c_str(),
         line_of(instruction).c_str());
  }
  Fiber& me = *block.current;
  void* target = shared_pointer(to, bytes);
  touch(target, bytes, Access::issue, me, instruction);
  std::memset(target, 0xff, bytes);
  if (hooks.in_flight) hooks.in_flight(to, bytes, true);
  me.copies.push_back({to, from, bytes, source_bytes, me.group, instruction});
}

void copy_async_commit() { ++block.current->group; }

void copy_async_wait(unsigned pending) {
  Fiber& me = *block.current;
  size_t done = 0;
  for (; done < me.copies.size(); ++done) {
    const Copy& copy = me.copies[done];
    if (copy.group >= me.group - int(pending)) break;
    char* to = static_cast<char*>(shared_pointer(copy.to, copy.bytes));
    if (hooks.in_flight) hooks.in_flight(copy.to, copy.bytes, false);
    if (copy.source_bytes) touch(copy.from, copy.source_bytes, Access::read, me, copy.instruction);
    touch(to, copy.bytes, Access::write, me, copy.instruction);
    if (hooks.lane_shared) hooks.lane_shared(to, copy.bytes, copy.instruction);
    if (copy.source_bytes) std::memcpy(to, copy.from, copy.source_bytes);
    std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + done);
}

void count_shared(const void* instruction, const uint32_t* addresses, unsigned lanes, size_t bytes) {
  if (hooks.warp_shared) hooks.warp_shared(instruction, addresses, lanes, bytes);
}

// ---- mbarrier -----------------------------------------------------------------------------------

namespace {

MBarrier& use_mbarrier(Site site, uint32_t address, const void* instruction) {
  touch(shared_pointer(address, 8), 8, Access::sync, *block.current, instruction);
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) {
    fail("no mbarrier was initialised in %s, used at %s", shared_name(address).c_str(),
         name_of(site).c_str());
  }
  return found->second;
}

void end_phase_if_complete(uint32_t address) {
  MBarrier& mbarrier = block.mbarriers.at(address);
  if (mbarrier.pending || mbarrier.bytes) return;
  const unsigned parity = mbarrier.phase++ % 2;
  mbarrier.pending = mbarrier.count;
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const bool waits = fiber.state == State::in_mbarrier && fiber.mbarrier == address;
    if (waits && fiber.parity == parity) make_ready(fiber);
  }
}

// One at a time: if a phase ends with it, others of the phase are still on their way.
bool deliver_bulk_copy() {
  auto& copies = block.bulk_copies;
  if (copies.empty()) return false;
  const auto at = copies.begin() + choose(copies.size());
  const BulkCopy copy = *at;
  copies.erase(at);
  char* to = static_cast<char*>(shared_pointer(copy.to, copy.bytes));
  if (hooks.in_flight) hooks.in_flight(copy.to, copy.bytes, false);
  touch(copy.from, copy.bytes, Access::read, *copy.copier, copy.instruction);
  touch(to, copy.bytes, Access::write, *copy.copier, copy.instruction);
  std::memcpy(to, copy.from, copy.bytes);
  MBarrier& mbarrier = block.mbarriers.at(copy.mbarrier);
  if (hooks.release) hooks.release(&mbarrier.released[mbarrier.phase % 2], *copy.copier);
  mbarrier.bytes -= copy.bytes;
  end_phase_if_complete(copy.mbarrier);
  return true;
}

}  // namespace

void mbarrier_init(Site site, uint32_t address, unsigned count) {
  if (address % 8) {
    fail("misaligned: mbarrier in %s at %s", shared_name(address).c_str(), name_of(site).c_str());
  }
  if (!count) fail("mbarrier of no threads at %s", name_of(site).c_str());
  touch(shared_pointer(address, 8), 8, Access::write, *block.current, __builtin_return_address(0));
  block.mbarriers[address] = {count, count, 0, 0, {}};
}

void mbarrier_arrive(Site site, uint32_t address, unsigned expect_bytes) {
  MBarrier& mbarrier = use_mbarrier(site, address, __builtin_return_address(0));
  if (!mbarrier.pending) {
    fail("mbarrier in %s: more than %u arrivals in a phase, at %s", shared_name(address).c_str(),
         mbarrier.count, name_of(site).c_str());
  }
  if (hooks.release) hooks.release(&mbarrier.released[mbarrier.phase % 2], *block.current);
  mbarrier.bytes += expect_bytes;
  --mbarrier.pending;
  end_phase_if_complete(address);
}

void mbarrier_wait(Site site, uint32_t address, unsigned parity) {
  MBarrier& mbarrier = use_mbarrier(site, address, __builtin_return_address(0));
  Fiber& me = *block.current;
  if (mbarrier.phase % 2 == parity % 2) {
    me.site = site;
    me.mbarrier = address;
    me.parity = parity % 2;
    me.state = State::in_mbarrier;
    run_another();
  }
  if (hooks.acquire) hooks.acquire(&mbarrier.released[parity % 2], me);
}

void copy_bulk(Site site, uint32_t to, const void* from, unsigned bytes, uint32_t address) {
  const void* instruction = __builtin_return_address(0);
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) {
    fail("misaligned: cp.async.bulk of %u bytes from %p to %s at %s", bytes, from,
         shared_name(to).c_str(), name_of(site).c_str());
  }
  use_mbarrier(site, address, instruction);
  Fiber& me = *block.current;
  void* target = shared_pointer(to, bytes);
  touch(target, bytes, Access::issue, me, instruction);
  std::memset(target, 0xff, bytes);
  const Thread& copier = block.copiers[block.bulk_issued++ % kCopiers];
  if (hooks.in_flight) {
    hooks.in_flight(to, bytes, true);
    hooks.release(&copier, me);
    hooks.acquire(&copier, copier);
  }
  block.bulk_copies.push_back({to, from, bytes, address, &copier, instruction});
}

// ---- Memory -------------------------------------------------------------------------------------

namespace {

char* map_between_unmapped(size_t bytes) {
  char* base = static_cast<char*>(mmap(nullptr, bytes + 2 * kUnmapped, PROT_NONE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED || mprotect(base + kUnmapped, bytes, PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  return base + kUnmapped;
}

void unmap(char* memory, size_t bytes) { munmap(memory - kUnmapped, bytes + 2 * kUnmapped); }

struct Mapping {
  char* begin;
  size_t bytes;
};
std::map<void*, Mapping> mappings;

}  // namespace

void* allocate(size_t bytes, const char* name) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t pages = (bytes + page - 1) / page * page;
  char* begin = map_between_unmapped(pages);
  // Ends where the unmapped pages begin, but for 16-byte alignment.
  char* memory = begin + (pages - bytes) / 16 * 16;
  std::memset(memory, 0xff, bytes);
  mappings[memory] = {begin, pages};
  if (hooks.allocated) hooks.allocated(memory, bytes, name);
  return memory;
}

void release(void* memory) {
  const auto found = mappings.find(memory);
  if (found == mappings.end()) return;
  if (hooks.released) hooks.released(static_cast<char*>(memory));
  unmap(found->second.begin, found->second.bytes);
  mappings.erase(found);
}

// ---- Launch -------------------------------------------------------------------------------------

namespace {

void check_launch(dim3 grid, dim3 threads, size_t shared_bytes) {
  auto text = [](dim3 size) {
    return std::to_string(size.x) + "x" + std::to_string(size.y) + "x" + std::to_string(size.z);
  };
  if (block.current) throw Error("launch: from a kernel");
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads || threads.z > 64) {
    throw Error("launch: a block of " + text(threads) + " threads, expected 1 to 1024, z up to 64");
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    throw Error("launch: a grid of " + text(grid) +
                " blocks, expected at least 1, x below 2^31, y and z below 2^16");
  }
  if (shared_bytes > kMaxShared) {
    throw Error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory, there are " +
                std::to_string(kMaxShared));
  }
}

void map_stacks() {
  if (block.stacks) return;
  const size_t bytes = kMaxThreads * (kBelowStack + kStack);
  void* stacks = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  block.stacks = static_cast<char*>(stacks);
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    if (mprotect(stack_of(i), kStack, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
}

void map_shared(size_t given) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t capacity = (given + (64 << 10) + page - 1) / page * page;  // with room for guards
  if (capacity > block.shared_capacity) {
    if (block.shared) unmap(block.shared, block.shared_capacity);
    block.shared = map_between_unmapped(capacity);
    block.shared_capacity = capacity;
  }
  block.shared_given = given;
}

}  // namespace

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, Entry entry, void* closure) {
  check_launch(grid, threads, shared_bytes);
  map_stacks();
  map_shared(shared_bytes);
  block.threads = threads.x * threads.y * threads.z;
  block.entry = entry;
  block.closure = closure;
  block.random = options.seed * 0x9e3779b97f4a7c15u | 1;
  here.block_dim = threads;
  here.grid_dim = grid;
  if (hooks.grid_begins) hooks.grid_begins(__builtin_frame_address(0));
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);  // of blocks
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < order.size(); ++i) {
    std::swap(order[i], order[i + choose(order.size() - i)]);
    const uint64_t at = order[i];
    begin_block({unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                 unsigned(at / grid.x / grid.y)});
    run(pick());
    if (hooks.block_ends) hooks.block_ends();
    if (!block.error.empty()) throw Error(block.error);
  }
}

std::vector<LineCount> shared_counts() {
  return hooks.shared_counts ? hooks.shared_counts() : std::vector<LineCount>();
}

void clear_counts() {
  if (hooks.clear_counts) hooks.clear_counts();
}

}  // namespace simt
