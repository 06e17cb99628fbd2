#include <memory>

#include "interior_point.h"

namespace lplb {
namespace {

// One thread owns everything; teams and barriers fall away.
struct SerialBlock {
  static constexpr int kThreads = 1;
  static constexpr int kVariables = kMaxGroupSlots;
  static constexpr int kRanks = kMaxGroupRanks;
  static constexpr bool kPairs = false;

  struct Team {
    int index = 0, count = 1, lane = 0, size = 1;
    void sync() const {}
    float sum(float value) const { return value; }
  };

  int thread() const { return 0; }
  void sync() const {}
  Team team() const { return {}; }
  float sibling(float value) const { return value; }
  template <int kSums, int kLeast>
  void reduce(float (&)[kSums], float (&)[kLeast]) const {}
  template <class T>
  void add(T* target, T value) const {
    *target += value;
  }
  int scan(int mine, int32_t*, int* total) const {
    *total = mine;
    return 0;
  }
  float total(const float* values, int n) const {
    float s = 0.0f;
    for (int i = 0; i < n; ++i) s += values[i];
    return s;
  }

  // Moves the entries of each row that are not `none` to its front.
  void collect(uint16_t* rows, int num_rows, int row_size, uint16_t none, int32_t* counts) const {
    for (int g = 0; g < num_rows; ++g) {
      uint16_t* row = rows + g * row_size;
      int n = 0;
      for (int i = 0; i < row_size; ++i) {
        if (row[i] != none) row[n++] = row[i];
      }
      counts[g] = n;
    }
  }

  // Inverse of (a + shift) by symmetric sweeps (Gauss-Jordan on the diagonal): safe without pivoting, because the
  // matrix is symmetric positive definite.
  void invert(float* a, int stride, int n, float shift) const {
    float column[kMaxGroupRanks];
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) a[i * stride + j] += shift;
    }
    for (int k = 0; k < n; ++k) {
      for (int i = 0; i < n; ++i) column[i] = a[i * stride + k];
      const float r = 1.0f / column[k];
      for (int i = 0; i < n; ++i) {
        float* row = a + i * stride;
        const float t = column[i] * r;
        if (i == k) {
          for (int j = 0; j < n; ++j) row[j] = column[j] * r;
          row[k] = -r;
        } else {
          for (int j = 0; j < n; ++j) row[j] -= t * column[j];
          row[k] = t;
        }
      }
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) a[i * stride + j] = -a[i * stride + j];
    }
  }
};

}  // namespace

void solve_cpu(const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
  const size_t bytes = carve_shared(nullptr, shape, SerialBlock::kThreads, nullptr);
  const std::unique_ptr<char[]> memory(new char[bytes]);
  // On the heap: its per-variable arrays are large for a worker thread's stack.
  Shared shared;
  carve_shared(memory.get(), shape, SerialBlock::kThreads, &shared);
  for (int batch = 0; batch < shape.num_batches; ++batch) {
    for (int group = 0; group < shape.num_groups; ++group) {
      const auto solver =
          std::make_unique<InteriorPoint<SerialBlock>>(SerialBlock(), shape, in, out, batch, group, shared);
      solver->run();
    }
  }
}

}  // namespace lplb
