#include <algorithm>
#include <memory>

#include "interior_point.h"

namespace lplb {
namespace {

// One thread owns everything; barriers and sums over threads fall away.
struct SerialBlock {
  static constexpr int kThreads = 1;
  static constexpr int kVariables = kMaxGroupSlots;
  static constexpr int kRanks = kMaxGroupRanks;
  static constexpr bool kPairs = false;

  float* inverse;  // [ranks + 1, ranks + 1], negated

  int thread() const { return 0; }
  void sync() const {}
  float sibling(float value) const { return value; }
  float divide(float a, float b) const { return a / b; }
  template <class T>
  void add(T* target, T value) const {
    *target += value;
  }
  int scan(int mine, int* total) const {
    *total = mine;
    return 0;
  }
  template <bool kLargest, int kSums, int kExtremes>
  void reduce(float (&)[kSums], float (&)[kExtremes]) const {}

  // Moves the entries of each row that are not `none` to its front, and says where they went.
  template <class Moved>
  void collect(uint16_t* rows, int num_rows, int row_size, uint16_t none, int32_t* counts, Moved moved) const {
    for (int g = 0; g < num_rows; ++g) {
      uint16_t* row = rows + g * row_size;
      int n = 0;
      for (int i = 0; i < row_size; ++i) {
        if (row[i] == none) continue;
        moved(row[i], g * row_size + n);
        row[n++] = row[i];
      }
      counts[g] = n;
    }
  }

  // The negated inverse of [[matrix + shift, 1], [1^T, 0]], by symmetric sweeps (Gauss-Jordan on the diagonal): safe
  // without pivoting, because the matrix is positive definite.
  void factorise(const float* matrix, int stride, int n) const {
    float smallest = matrix[0];
    for (int i = 1; i < n; ++i) smallest = std::min(smallest, matrix[i * (stride + 1)]);
    const float shift = smallest / static_cast<float>(n);
    const int order = n + 1;
    for (int i = 0; i < order; ++i) {
      for (int j = 0; j < order; ++j) {
        inverse[i * order + j] = i < n && j < n ? matrix[i * stride + j] + shift : i == j ? 0.0f : 1.0f;
      }
    }
    float column[kMaxGroupRanks + 1];
    for (int k = 0; k < order; ++k) {
      for (int i = 0; i < order; ++i) column[i] = inverse[i * order + k];
      const float r = 1.0f / column[k];
      for (int i = 0; i < order; ++i) {
        float* row = inverse + i * order;
        const float t = column[i] * r;
        if (i == k) {
          for (int j = 0; j < order; ++j) row[j] = column[j] * r;
          row[k] = -r;
        } else {
          for (int j = 0; j < order; ++j) row[j] -= t * column[j];
          row[k] = t;
        }
      }
    }
  }
  // result [n + 1] = the inverse times [right_side, 0].
  void apply(const float* right_side, int n, float* result) const {
    for (int i = 0; i <= n; ++i) {
      float s = 0.0f;
      for (int j = 0; j < n; ++j) s -= inverse[i * (n + 1) + j] * right_side[j];
      result[i] = s;
    }
  }
};

}  // namespace

void solve_cpu(const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
  const std::unique_ptr<char[]> memory(new char[carve_shared(nullptr, shape, nullptr)]);
  Shared shared;
  carve_shared(memory.get(), shape, &shared);
  const size_t order = shape.group_size + 1;
  const std::unique_ptr<float[]> inverse(new float[order * order]);
  for (int batch = 0; batch < shape.num_batches; ++batch) {
    for (int group = 0; group < shape.num_groups; ++group) {
      // On the heap: its arrays of variables are large for a worker thread's stack.
      const auto solver = std::make_unique<InteriorPoint<SerialBlock>>(SerialBlock{inverse.get()}, shape, in, out,
                                                                       batch, group, shared);
      solver->run();
    }
  }
}

}  // namespace lplb
