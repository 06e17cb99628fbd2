// What the framework-free drivers share: errors, device memory, and the PROBLEM files of benchmarks/kernels.py.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "assign.h"
#include "count.h"
#include "plan_solve.h"
#include "solve.h"
#include "solve_assign.h"

#define LPLB_CHECK(call)                                                                             \
  do {                                                                                               \
    const cudaError_t error = (call);                                                                \
    if (error != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                                  \
    }                                                                                                \
  } while (false)

namespace lplb::bench {

constexpr int kMostSweeps = 1000;  // of edge balance

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <class T>
std::vector<T> read(std::FILE* file, size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, file) != count) fail("PROBLEM is too short");
  return values;
}

// Row `row` of rows of `size` values.
inline std::vector<int32_t> slice(const std::vector<int32_t>& rows, int row, size_t size) {
  return {rows.begin() + row * size, rows.begin() + (row + 1) * size};
}

// Device memory, poisoned, so that what a kernel leaves unwritten shows.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    LPLB_CHECK(cudaMalloc(&data_, std::max<size_t>(1, count) * sizeof(T)));
    LPLB_CHECK(cudaMemset(data_, 0x7f, count * sizeof(T)));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    LPLB_CHECK(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() { return data_; }
  size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    LPLB_CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// One placement, and instances of loads and ids.
struct Problem {
  int instances, num_ids, num_experts, num_physical, max_replicas, num_ranks, num_groups;
  CountShape count = {};
  SolveShape solve = {};
  AssignShape assign = {};
  PlanShape plan = {};  // where num_candidates > 0
  bool has_edges;
  EdgeColouring colouring;       // where it has edges
  std::vector<int32_t> log2phy;  // [num_experts, max_replicas]
  std::vector<int32_t> loads;    // [instances, num_experts]
  std::vector<int32_t> ids;      // [instances, num_ids]

  explicit Problem(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    if (file == nullptr) fail("cannot read PROBLEM");
    const std::vector<int32_t> header = read<int32_t>(file, 11);
    instances = header[0], num_ids = header[1], num_experts = header[2], num_physical = header[3];
    max_replicas = header[4], num_ranks = header[5], num_groups = header[6];
    count.num_batches = 1;
    count.num_ids = num_ids;
    count.num_experts = num_experts;
    count.num_chunks = header[7];
    count.chunk_size = header[8];
    assign = {count, num_physical, max_replicas, num_ranks};
    solve.num_batches = 1;
    solve.num_experts = num_experts;
    solve.num_physical = num_physical;
    solve.max_replicas = max_replicas;
    solve.num_groups = num_groups;
    solve.group_size = num_ranks / num_groups;
    solve.slots_per_rank = num_physical / num_ranks;
    solve.rank_of_slot = rank_factor(solve.slots_per_rank);
    solve.max_variables = max_variables(num_experts, num_physical, num_groups);
    solve.tol = read<float>(file, 1)[0];
    solve.max_iterations = 50;
    solve.threshold = 0.0f;
    if (const char* wrong = check(solve); wrong != nullptr) fail(wrong);
    const std::vector<int32_t> partners = read<int32_t>(file, static_cast<size_t>(header[9]) * solve.group_size);
    has_edges = !partners.empty();
    if (has_edges) {
      const char* wrong = check_edges(solve, partners.data(), partners.size(), &colouring);
      if (wrong != nullptr) fail(wrong);
    }
    plan.num_candidates = header[10];
    if (plan.num_candidates > 0) {
      plan.solve = solve;
      plan.experts_per_rank = num_experts / num_ranks;
      plan.rank_of_expert = rank_factor(plan.experts_per_rank);
      plan.max_sends = num_experts;
      plan.slack = read<float>(file, 1)[0];
      const std::vector<float> slacks = read<float>(file, plan.num_candidates);
      const std::vector<int32_t> rules = read<int32_t>(file, plan.num_candidates);
      for (int i = 0; i < plan.num_candidates; ++i) plan.candidates[i] = Candidate::make(slacks[i], rules[i]);
      if (const char* wrong = check(plan); wrong != nullptr) fail(wrong);
    }
    log2phy = read<int32_t>(file, static_cast<size_t>(num_experts) * max_replicas);
    loads = read<int32_t>(file, static_cast<size_t>(instances) * num_experts);
    ids = read<int32_t>(file, static_cast<size_t>(instances) * num_ids);
    std::fclose(file);
  }
};

template <class T>
void print(const char* name, const std::vector<T>& values, const char* format, const char* end) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) std::printf(", ");
    std::printf(format, values[i]);
  }
  std::printf("]%s", end);
}

}  // namespace lplb::bench
