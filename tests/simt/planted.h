// The kernels that csrc/simt is tested with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// 64 floats each, and zero.
struct Arguments {
  const float* in;
  float* out;
  unsigned* counter;
};

std::vector<std::string> planted_names();
void run_planted(const std::string& name, bool bug, Arguments arguments);

// Kernels whose results are known: features.cu.
std::vector<std::string> feature_names();
void run_feature(const std::string& name, const uint32_t* in, uint32_t* out);

// Single instructions: instructions.cu. Arrays of what the lanes hold, lane by lane.
void run_ldmatrix(bool transposed, const uint16_t* rows, uint32_t* to);
void run_mma(bool bf16, const uint32_t* a, const uint32_t* b, const float* c, float* d);
// 64×n = 64×64 · 64×n, with n 64, for bf16 128; b is [n, 64], or, transposed, [64, n].
void run_wgmma(bool bf16, bool transposed, bool a_in_registers, const uint16_t* a,
               const uint16_t* b, float* d);
void run_numbers(const std::string& name, const uint32_t* in, uint32_t* out, int count);
