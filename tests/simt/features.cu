// Kernels whose results are known, and whose bank conflicts are.
#include "cuda/tile.cuh"
#include "planted.h"

namespace {

using namespace t2i;
constexpr uint32_t kAll = 0xffffffff;

// Results go to out[feature * threads + thread].
struct Results {
  uint32_t* out;
  unsigned next = 0;
  void operator()(uint32_t x) { out[next++ * blockDim.x + threadIdx.x] = x; }
};

void shuffles(const uint32_t* in, uint32_t* out) {
  Results results{out};
  const uint32_t x = in[threadIdx.x];
  results(__shfl_sync(kAll, x, 5));
  results(__shfl_sync(kAll, x, int(threadIdx.x) + 33));
  results(__shfl_xor_sync(kAll, x, 6));
  results(__shfl_up_sync(kAll, x, 3));
  results(__shfl_down_sync(kAll, x, 4));
}

void votes(const uint32_t* in, uint32_t* out) {
  Results results{out};
  const uint32_t x = in[threadIdx.x];
  results(__ballot_sync(kAll, x % 3 == 0));
  results(__any_sync(kAll, x == in[7]));
  results(__all_sync(kAll, x == in[7]));
  results(__all_sync(kAll, x <= 0xffffffffu));
  results(__reduce_add_sync(kAll, x));
  results(__reduce_min_sync(kAll, x));
  results(__reduce_max_sync(kAll, x));
  if (threadIdx.x % 2) results(__reduce_add_sync(0xaaaaaaaau, x));
}

void atomics(const uint32_t* in, uint32_t* out) {
  const uint32_t x = in[threadIdx.x];
  atomicAdd(&out[0], x);
  atomicMin(&out[1], x);
  atomicMax(&out[2], x);
  if (atomicExch(&out[3], 1u) == 0) atomicAdd(&out[4], 1u);
  for (uint32_t seen = atomicAdd(&out[5 + threadIdx.x % 2], 0u);;) {
    const uint32_t found = atomicCAS(&out[5 + threadIdx.x % 2], seen, seen + x);
    if (found == seen) break;
    seen = found;
  }
}

void indices(const uint32_t*, uint32_t* out) {
  const dim3 t = threadIdx, b = blockIdx, n = blockDim, g = gridDim;
  const uint32_t thread = t.x + n.x * (t.y + n.y * t.z);
  const uint32_t block = b.x + g.x * (b.y + g.y * b.z);
  const uint32_t digits[] = {b.z, b.y, b.x, t.z, t.y, t.x};
  uint32_t number = 0;
  for (uint32_t digit : digits) number = number * 10 + digit;
  out[block * n.x * n.y * n.z + thread] = number;
}

// Full masks in a warp of 16 lanes, and of those that have not ended.
void partial_warp(const uint32_t* in, uint32_t* out) {
  Results results{out};
  results(__reduce_add_sync(kAll, in[threadIdx.x]));
  __syncthreads();
  results(__ballot_sync(kAll, true));
}

void early_exit(const uint32_t* in, uint32_t* out) {
  if (threadIdx.x % 32 >= 20) return;
  __syncthreads();
  uint32_t x = __reduce_add_sync(kAll, in[threadIdx.x]);
  __syncwarp();
  out[threadIdx.x] = x;
}

// Sums over all warps, twice with the same memory.
void thousand(const uint32_t* in, uint32_t* out) {
  uint32_t* sums = static_cast<uint32_t*>(simt::shared_array(0, 128, 16));
  Results results{out};
  for (uint32_t round = 0; round < 2; ++round) {
    const uint32_t sum = __reduce_add_sync(kAll, in[threadIdx.x] + round);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    results(__reduce_add_sync(kAll, sums[threadIdx.x % 32]));
    __syncthreads();
  }
}

// Two buffers between warps: the first fills, the second reads.
void ping_pong(const uint32_t* in, uint32_t* out) {
  uint32_t* buffers = static_cast<uint32_t*>(simt::shared_array(0, 256, 16));
  const int lane = threadIdx.x % 32;
  for (int round = 0; round < 6; ++round) {
    const int buffer = round % 2, full = 1 + buffer, empty = 3 + buffer;
    if (threadIdx.x < 32) {
      if (round >= 2) ptx::barrier_sync(empty, 64);
      buffers[buffer * 32 + lane] = in[lane] + round;
      ptx::barrier_arrive(full, 64);
    } else {
      ptx::barrier_sync(full, 64);
      out[round * 32 + lane] = buffers[buffer * 32 + 31 - lane];
      if (round < 4) ptx::barrier_arrive(empty, 64);
    }
  }
}

void bank_conflicts(const uint32_t*, uint32_t* out) {
  float* words = static_cast<float*>(simt::shared_array(0, 4096, 1024));
  const int lane = threadIdx.x;
  for (int i = lane; i < 1024; i += 32) words[i] = 0;  // [write]
  __syncthreads();
  float x = words[lane];                               // [stride 1]
  x += words[lane * 2];                                // [stride 2]
  x += words[lane * 32];                               // [stride 32]
  x += words[lane * 33 % 1024];                        // [stride 33]
  x += words[7];                                       // [same]
  x += simt::load<float2>(words + lane * 2).x;         // [8 bytes]
  x += simt::load<float2>(words + lane * 4).x;         // [8 of 16 bytes]
  x += simt::load<float4>(words + lane * 4).x;         // [16 bytes]
  x += simt::load<float4>(words + lane * 8 % 1024).x;  // [16 of 32 bytes]
  if (lane < 8) x += words[lane * 4];                  // [some lanes]
  const uint32_t tile = simt::shared_address(words);
  uint32_t m[4];
  ptx::ldmatrix<false>(m, tile + lane * 128);                 // [ldmatrix rows]
  ptx::ldmatrix<false>(m, tile + Tile<64>::offset(lane, 0));  // [ldmatrix swizzled]
  out[lane] = __float_as_uint(x) + m[0];
}

struct Feature {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*);
  dim3 grid, block;
};
const Feature kFeatures[] = {
    {"shuffles", shuffles, {1}, {32}},
    {"votes", votes, {1}, {32}},
    {"atomics", atomics, {3}, {64}},
    {"indices", indices, {2, 3, 2}, {4, 3, 5}},
    {"partial_warp", partial_warp, {1}, {48}},
    {"early_exit", early_exit, {1}, {64}},
    {"thousand", thousand, {1}, {1024}},
    {"ping_pong", ping_pong, {1}, {64}},
    {"bank_conflicts", bank_conflicts, {1}, {32}},
};

}  // namespace

std::vector<std::string> feature_names() {
  std::vector<std::string> names;
  for (const Feature& feature : kFeatures) names.push_back(feature.name);
  return names;
}

void run_feature(const std::string& name, const uint32_t* in, uint32_t* out) {
  for (const Feature& feature : kFeatures) {
    if (feature.name == name) simt::launch(feature.kernel, feature.grid, feature.block, 4096, in, out);
  }
}
