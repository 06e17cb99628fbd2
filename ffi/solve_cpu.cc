#include <algorithm>
#include <memory>

#include "interior_point.h"

namespace lplb {
namespace {

// One thread owns everything; barriers and sums over threads fall away.
template <bool kSpeeds>
struct SerialBlock {
  static constexpr int kThreads = 1, kSetupThreads = 1, kLanes = 1, kBalancingRounds = 8;
  static constexpr int kVariables = kMaxGroupSlots;
  static constexpr int kRanks = kMaxGroupRanks;
  static constexpr bool kPairs = false, kBySpeed = kSpeeds;

  double* inverse;  // [ranks + 1, ranks + 1], negated

  int thread() const { return 0; }
  void sync() const {}
  void sync_setup() const {}
  void sync_lanes() const {}
  struct Four {
    float v[4];
  };
  Four load4(const float* from) const { return {{from[0], from[1], from[2], from[3]}}; }
  float reciprocal(float value) const { return 1.0f / value; }
  void add(int32_t* targets, int which, int32_t value, bool wanted) const {
    if (wanted) targets[which] = static_cast<int32_t>(static_cast<uint32_t>(targets[which]) + value);  // may wrap
  }
  void add_all(uint32_t* target, uint32_t value) const { *target += value; }
  int scan(int mine, int* total) const {
    *total = mine;
    return 0;
  }
  template <bool kLargest, int kSums, int kExtremes>
  void reduce(float (&)[kSums], float (&)[kExtremes]) const {}

  // Numbers the variables of each rank, and counts them.
  void place(const int (&rank)[kVariables], int num_variables, int, int (&place)[kVariables], int32_t* counts) const {
    for (int v = 0; v < num_variables; ++v) place[v] = counts[rank[v]]++;
  }

  // The negated inverse of [[K, s], [s^T, 0]], s the speeds, or ones, by symmetric sweeps (Gauss-Jordan on the
  // diagonal): safe without pivoting, because K is positive definite. K has the packed lower triangle `matrix` off its
  // diagonal, and rows that sum to `excess`.
  void factorise(const float* matrix, const float* excess, int n, const float* speed) const {
    const auto border = [&](int i) { return kSpeeds ? static_cast<double>(speed[i]) : 1.0; };
    const int order = n + 1;
    for (int i = 0; i < order; ++i) {
      double* row = inverse + i * order;
      double sum = 0.0;
      for (int j = 0; j < n; ++j) {
        row[j] = i == n ? border(j) : i == j ? 0.0 : matrix[packed(std::max(i, j), std::min(i, j))];
        sum += row[j];
      }
      row[n] = i == n ? 0.0 : border(i);
      if (i < n) row[i] = excess[i] - sum;
    }
    double column[kMaxGroupRanks + 1];
    for (int k = 0; k < order; ++k) {
      for (int i = 0; i < order; ++i) column[i] = inverse[i * order + k];
      const double r = 1.0 / column[k];
      for (int i = 0; i < order; ++i) {
        double* row = inverse + i * order;
        const double t = i == k ? -r : column[i] * r;
        if (i == k) std::fill_n(row, order, 0.0);
        for (int j = 0; j < order; ++j) row[j] -= t * column[j];
        row[k] = t;
      }
    }
  }
  // result [n + 1] = the inverse times [right_side, 0].
  void apply(const float* right_side, int n, float* result) const {
    for (int i = 0; i <= n; ++i) {
      double s = 0.0;
      for (int j = 0; j < n; ++j) s -= inverse[i * (n + 1) + j] * right_side[j];
      result[i] = static_cast<float>(s);
    }
  }
};

template <bool kBySpeed>
void solve_groups(const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
  const std::unique_ptr<char[]> memory(new char[carve_shared(nullptr, shape, nullptr)]);
  Shared shared;
  carve_shared(memory.get(), shape, &shared);
  const size_t order = shape.group_size + 1;
  const std::unique_ptr<double[]> inverse(new double[order * order]);
  for (int batch = 0; batch < shape.num_batches; ++batch) {
    for (int group = 0; group < shape.num_groups; ++group) {
      // On the heap: its arrays of variables are large for a worker thread's stack.
      using Block = SerialBlock<kBySpeed>;
      const auto solver =
          std::make_unique<InteriorPoint<Block>>(Block{inverse.get()}, shape, in, out, batch, group, shared);
      solver->run();
    }
  }
}

}  // namespace

void solve_cpu(const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
  return shape.by_speed ? solve_groups<true>(shape, in, out) : solve_groups<false>(shape, in, out);
}

}  // namespace lplb
