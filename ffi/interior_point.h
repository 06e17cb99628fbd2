// The balancing linear program of one group, by a feasible primal-dual interior-point method.
//
//   minimise T   subject to   sum_{p in e} x_p = w_e,   b_g + sum_{p on g} x_p + s_g = T,   x, s >= 0
//
// x_p is the load that replica p takes of its expert e(p) with load w_e; b_g is the load of the experts that
// have one copy only, on rank g. Duals: y_e of the experts, lambda_g of the ranks (they sum to 1), and the
// reduced costs z_p = lambda_{g(p)} - y_{e(p)}. Every iterate is strictly feasible in both, so Mehrotra's
// predictor-corrector needs no infeasibility terms and any iterate is an answer.
//
// The Newton system reduces to the ranks. With D_p = x_p / z_p and H_e = sum_{p in e} D_p,
//
//   K = diag(s / lambda) + sum_e [diag(D) - D D^T / H_e]      K dlambda + dT 1 = r,   1^T dlambda = 0
//
// K is a graph Laplacian plus a positive diagonal that vanishes on the busy ranks as the method converges: the
// ones vector becomes a null vector. Because dlambda sums to zero, K may be replaced with K + rho 1 1^T at no
// loss; that keeps the float32 inverse accurate where K alone is nearly singular. The inverse, projected to
// sum(dlambda) = 0, turns each of the two directions of an iteration into one matrix-vector product.
//
// One text for both platforms: a Block runs it with many threads that share memory (CUDA) or with one (CPU).
// A value that belongs to one variable or one rank is private to the thread that owns it; what other threads
// read lies in Shared, and is written and read on different sides of a block.sync(). Sums run in a fixed
// order, so that equal inputs give equal bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "solve.h"

#ifdef __CUDACC__
#define LPLB_DEVICE __device__ __forceinline__
#define LPLB_UNROLL _Pragma("unroll")
#else
#define LPLB_DEVICE inline
#define LPLB_UNROLL
#endif

namespace lplb {

// Smallest scaled load (the mean rank load is 1) an expert takes part with: keeps idle experts strictly inside,
// and is far below the tolerance even when 2,048 of them sit on one rank.
constexpr float kFloor = 1e-8f;
constexpr float kTinyPrimal = 1e-12f;
constexpr float kTinyDual = 1e-12f;
constexpr float kTinySlack = 1e-9f;
constexpr float kStepShare = 0.99f;    // of the way to the boundary
constexpr float kRegulariser = 2e-6f;  // of K's diagonal: the Laplacian part keeps a margin over rounding

// Views into the group's working memory, `shared_bytes` long, aligned to 16 bytes.
struct Shared {
  float* matrix;         // [num_ranks + 1, num_ranks + 1]: K, then its projected inverse; last row gives dT
  float* scaled_d;       // [num_variables] D_p / sqrt(H_e)
  float* exchange;       // [num_variables] a value of each variable, for its siblings or its rank
  uint32_t* variable;    // [num_variables] packed: first sibling (11 bits), number of siblings (9), rank (7)
  uint16_t* on_rank;     // [num_ranks, slots_per_rank] first the rank's variables
  float* lambda;         // [num_ranks] up to a common factor
  float* right_side;     // [num_ranks]
  float* step_lambda;    // [num_ranks + 1] dlambda, then dT
  int32_t* fixed_load;   // [num_ranks] tokens
  int32_t* num_on_rank;  // [num_ranks]
  uint32_t* total;       // [1] tokens of the group
  int32_t* head;         // [1 + threads] running counts of a scan
};

LPLB_DEVICE uint32_t pack_variable(int first, int count, int rank) {
  return static_cast<uint32_t>(first) | static_cast<uint32_t>(count) << 11 | static_cast<uint32_t>(rank) << 20;
}
LPLB_DEVICE int first_sibling(uint32_t packed) { return packed & 0x7ff; }
LPLB_DEVICE int num_siblings(uint32_t packed) { return packed >> 11 & 0x1ff; }
LPLB_DEVICE int rank_of(uint32_t packed) { return packed >> 20; }

// Carves Shared out of one allocation; with memory == nullptr only counts the bytes.
inline
#ifdef __CUDACC__
    __host__ __device__
#endif
        size_t carve_shared(char* memory, const SolveShape& shape, int num_threads, Shared* out) {
  const size_t ranks = shape.group_size, variables = shape.max_variables;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* here = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 15) / 16 * 16;
    return here;
  };
  Shared shared;
  shared.matrix = reinterpret_cast<float*>(take((ranks + 1) * (ranks + 1) * sizeof(float)));
  shared.scaled_d = reinterpret_cast<float*>(take(variables * sizeof(float)));
  shared.exchange = reinterpret_cast<float*>(take(variables * sizeof(float)));
  shared.variable = reinterpret_cast<uint32_t*>(take(variables * sizeof(uint32_t)));
  shared.on_rank = reinterpret_cast<uint16_t*>(take(ranks * shape.slots_per_rank * sizeof(uint16_t)));
  shared.lambda = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.right_side = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.step_lambda = reinterpret_cast<float*>(take((ranks + 1) * sizeof(float)));
  shared.fixed_load = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.num_on_rank = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.total = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t)));
  shared.head = reinterpret_cast<int32_t*>(take((num_threads + 1) * sizeof(int32_t)));
  if (out != nullptr) *out = shared;
  return used;
}

// Block: kThreads, kVariables and kRanks (most variables and ranks a thread owns), kPairs (every replicated
// expert has two replicas), thread(), sync(), reduce(), invert(), add(), scan(), sibling(), collect(), teams.
template <class Block>
class InteriorPoint {
 public:
  LPLB_DEVICE InteriorPoint(Block block, const SolveShape& shape, const SolveOperands& in, const SolveResults& out,
                            int batch, int group, const Shared& shared)
      : block_(block), shape_(shape), shared_(shared), thread_(block.thread()) {
    const int64_t experts = shape.num_experts, slots = shape.num_physical, replicas = shape.max_replicas;
    const int64_t groups = shape.num_groups, ranks = shape.group_size;
    load_ = in.load + batch * experts;
    phy2log_ = in.phy2log + batch * slots;
    log2phy_ = in.log2phy + batch * experts * replicas;
    fraction_ = out.fraction + batch * experts * replicas;
    rank_load_ = out.rank_load + (batch * groups + group) * ranks;
    gap_ = out.gap + batch * groups + group;
    iterations_ = out.iterations + batch * groups + group;
    status_ = out.status + batch * groups + group;
    num_ranks_ = shape.group_size;
    num_slots_ = shape.group_size * shape.slots_per_rank;
    first_slot_ = group * num_slots_;
  }

  LPLB_DEVICE void run() {
    find_variables();
    if (num_variables_ == 0 || *shared_.total == 0) {
      finish(/*gap=*/0.0f, /*iterations=*/0, num_variables_ == 0 ? kSkipped : kConverged);
      return;
    }
    start();
    int iteration = 0;
    float gap = certify();
    while (gap > shape_.tol && iteration < shape_.max_iterations) {
      factorise();
      if (!predict_and_correct()) break;  // rounding broke the Newton system: the last iterate stands
      advance();
      ++iteration;
      gap = certify();
    }
    finish(gap, iteration, gap <= shape_.tol ? kConverged : best_is_even_ ? kEvenSplit : kMaxIterations);
  }

 private:
  static constexpr int kVariables = Block::kVariables;
  static constexpr int kRanks = Block::kRanks;

  template <class F>
  LPLB_DEVICE void each_variable(F body) const {
    LPLB_UNROLL
    for (int i = 0; i < kVariables; ++i) {
      const int v = thread_ + i * Block::kThreads;
      if (v < num_variables_) body(i, v);
    }
  }
  template <class F>
  LPLB_DEVICE void each_rank(F body) const {
    LPLB_UNROLL
    for (int i = 0; i < kRanks; ++i) {
      const int g = thread_ + i * Block::kThreads;
      if (g < num_ranks_) body(i, g);
    }
  }

  // Slot (within the group) of the r-th replica of expert e, or -1. Contents may be traced, hence anything: a
  // replica counts only where both arrays agree on it.
  LPLB_DEVICE int replica_slot(int e, int r) const {
    if (r >= shape_.max_replicas) return -1;
    const int slot = log2phy_[static_cast<int64_t>(e) * shape_.max_replicas + r] - first_slot_;
    return slot >= 0 && slot < num_slots_ && phy2log_[first_slot_ + slot] == e ? slot : -1;
  }
  // The expert whose first replica slot p is, or -1, and how many replicas it has.
  LPLB_DEVICE int expert_at(int p, int* num_replicas) const {
    const int e = phy2log_[first_slot_ + p];
    if (e < 0 || e >= shape_.num_experts || replica_slot(e, 0) != p) return -1;
    int count = 1;
    while (count < num_ranks_ && replica_slot(e, count) >= 0) ++count;
    *num_replicas = count;
    return e;
  }

  // Replicas of replicated experts become variables, expert by expert; all else is fixed load.
  LPLB_DEVICE void find_variables() {
    constexpr uint16_t kNone = 0xffff;
    for (int p = thread_; p < num_slots_; p += Block::kThreads) shared_.on_rank[p] = kNone;
    for (int g = thread_; g < num_ranks_; g += Block::kThreads) shared_.fixed_load[g] = 0;
    if (thread_ == 0) *shared_.total = 0;
    int mine = 0;
    for (int p = thread_; p < num_slots_; p += Block::kThreads) {
      int count = 1;
      if (expert_at(p, &count) >= 0 && count > 1) mine += count;
    }
    int first = block_.scan(mine, shared_.head, &num_variables_);
    if (num_variables_ > shape_.max_variables) num_variables_ = shape_.max_variables;
    for (int p = thread_; p < num_slots_; p += Block::kThreads) {
      int count = 1;
      const int e = expert_at(p, &count);
      if (e < 0) continue;
      float* row = fraction_ + static_cast<int64_t>(e) * shape_.max_replicas;
      const int32_t load = load_[e] > 0 ? load_[e] : 0;
      block_.add(shared_.total, static_cast<uint32_t>(load));
      // More variables than the shapes allow: only contents that list one slot twice. Home keeps those.
      const bool split = count > 1 && first + count <= num_variables_;
      if (!split) block_.add(&shared_.fixed_load[p / shape_.slots_per_rank], load);
      for (int r = 0; r < shape_.max_replicas; ++r) {
        row[r] = split ? (r < count ? 1.0f / static_cast<float>(count) : 0.0f) : (r == 0 ? 1.0f : 0.0f);
      }
      if (count > 1) {
        for (int v = first; v < first + count && v < num_variables_; ++v) {
          const int slot = split ? replica_slot(e, v - first) : p;
          shared_.variable[v] =
              split ? pack_variable(first, count, slot / shape_.slots_per_rank) : pack_variable(v, 1, 0);
          shared_.exchange[v] = static_cast<float>(slot);  // read once by the owner, below
          if (split) shared_.on_rank[slot] = static_cast<uint16_t>(v);
        }
        first += count;
      }
    }
    block_.sync();
    const float total = static_cast<float>(*shared_.total);
    scale_ = *shared_.total > 0 ? static_cast<float>(num_ranks_) / total : 0.0f;
    each_variable([&](int i, int v) {
      packed_[i] = shared_.variable[v];
      const int e = phy2log_[first_slot_ + static_cast<int>(shared_.exchange[v])];
      result_[i] = e * shape_.max_replicas + (v - first_sibling(packed_[i]));
      const float w = static_cast<float>(load_[e] > 0 ? load_[e] : 0) * scale_;
      w_[i] = w > kFloor ? w : kFloor;
    });
    block_.collect(shared_.on_rank, num_ranks_, shape_.slots_per_rank, kNone, shared_.num_on_rank);
    block_.sync();
  }

  // Sum of a variable's value over the variables of its expert, for each variable.
  LPLB_DEVICE void expert_sums(const float (&value)[kVariables], float (&sum)[kVariables]) {
    if constexpr (Block::kPairs) {
      LPLB_UNROLL
      for (int i = 0; i < kVariables; ++i) sum[i] = value[i] + block_.sibling(value[i]);
    } else {
      publish(value);
      each_variable([&](int i, int) {
        float s = 0.0f;
        const int first = first_sibling(packed_[i]), count = num_siblings(packed_[i]);
        for (int u = first; u < first + count; ++u) s += shared_.exchange[u];
        sum[i] = s;
      });
      block_.sync();
    }
  }
  LPLB_DEVICE void publish(const float (&value)[kVariables]) {
    each_variable([&](int i, int v) { shared_.exchange[v] = value[i]; });
    block_.sync();
  }
  // Sum over a rank's variables of what was last published.
  LPLB_DEVICE float rank_sum(int g) const {
    const uint16_t* list = shared_.on_rank + g * shape_.slots_per_rank;
    const int count = shared_.num_on_rank[g];
    float s = 0.0f;
    for (int i = 0; i < count; ++i) s += shared_.exchange[list[i]];
    return s;
  }

  // The even split, and duals in the middle of their feasible set.
  LPLB_DEVICE void start() {
    const float uniform = 1.0f / static_cast<float>(num_ranks_);
    each_variable([&](int i, int) {
      x_[i] = w_[i] / static_cast<float>(num_siblings(packed_[i]));
      y_[i] = -uniform;
      z_[i] = uniform + uniform;
    });
    publish(x_);
    float most = 0.0f;
    each_rank([&](int i, int g) {
      fixed_[i] = static_cast<float>(shared_.fixed_load[g]) * scale_;
      rank_[i] = fixed_[i] + rank_sum(g);
      lambda_[i] = uniform;
      shared_.lambda[g] = uniform;
      most = rank_[i] > most ? rank_[i] : most;
    });
    float sums[1] = {0.0f}, least[1] = {-most};
    block_.reduce(sums, least);
    most_ = -least[0];
    lambda_scale_ = 1.0f;
    top_ = most_ * 1.1f + 0.1f;
    each_rank([&](int i, int) { slack_[i] = top_ - rank_[i]; });
    best_most_ = most_;
    best_bound_ = 0.0f;
    best_is_even_ = true;
    each_variable([&](int i, int) { best_x_[i] = x_[i]; });
    each_rank([&](int i, int) { best_rank_[i] = rank_[i]; });
  }

  // Keeps the best iterate and the best bound so far; returns their relative gap. Whatever rounding did to the
  // duals, lambda >= 0 with sum 1 and y_e = min over e's ranks of lambda make sum y w + sum lambda b a lower
  // bound on the largest rank load: an average of rank loads in which each expert counts where it counts least.
  LPLB_DEVICE float certify() {
    float sums[3] = {0.0f, 0.0f, 0.0f}, least[1] = {0.0f};  // bound, sum of lambda, complementarity
    each_variable([&](int i, int v) {
      const int first = first_sibling(packed_[i]), count = num_siblings(packed_[i]);
      if (v == first) {
        float y = shared_.lambda[rank_of(packed_[i])];
        for (int u = first + 1; u < first + count; ++u) {
          const float other = shared_.lambda[rank_of(shared_.variable[u])];
          y = other < y ? other : y;
        }
        sums[0] += y * w_[i] * lambda_scale_;
      }
      sums[2] += x_[i] * z_[i];
    });
    each_rank([&](int i, int g) {
      const float lambda = shared_.lambda[g] * lambda_scale_;
      sums[0] += lambda * fixed_[i];
      sums[1] += lambda;
      sums[2] += slack_[i] * lambda_[i];
    });
    block_.reduce(sums, least);
    const float bound = sums[0] / sums[1];
    complementarity_ = sums[2];
    if (bound > best_bound_) best_bound_ = bound;
    if (most_ < best_most_) {
      best_most_ = most_;
      best_is_even_ = false;
      each_variable([&](int i, int) { best_x_[i] = x_[i]; });
      each_rank([&](int i, int) { best_rank_[i] = rank_[i]; });
    }
    const float gap = (best_most_ - best_bound_) / best_most_;
    return gap > 0.0f ? gap : 0.0f;
  }

  // Assembles K and turns it into its inverse on {sum(dlambda) = 0}, with a last row that gives dT; the right
  // side of the predictor on the way.
  LPLB_DEVICE void factorise() {
    each_variable([&](int i, int) { d_[i] = x_[i] / z_[i]; });
    expert_sums(d_, h_);
    each_variable([&](int i, int v) {
      root_h_[i] = sqrtf(h_[i]);
      shared_.scaled_d[v] = d_[i] / root_h_[i];
      // Towards zero complementarity q = -x, which sums to -w over each expert.
      q_[i] = -x_[i];
      sum_q_[i] = -w_[i];
      shared_.exchange[v] = q_[i] - d_[i] * (sum_q_[i] / h_[i]);
    });
    block_.sync();

    const int stride = num_ranks_ + 1;
    const auto team = block_.team();
    float smallest = 3e38f;
    for (int g = team.index; g < num_ranks_; g += team.count) {
      float* row = shared_.matrix + g * stride;
      for (int j = team.lane; j < num_ranks_; j += team.size) row[j] = 0.0f;
      team.sync();
      const uint16_t* list = shared_.on_rank + g * shape_.slots_per_rank;
      const int count = shared_.num_on_rank[g];
      float degree = 0.0f;
      for (int i = 0; i < count; ++i) {
        const int v = list[i];
        const uint32_t packed = shared_.variable[v];
        const float d = shared_.scaled_d[v];
        for (int r = team.lane; r < num_siblings(packed); r += team.size) {
          const int u = first_sibling(packed) + r;
          if (u == v) continue;
          const float weight = d * shared_.scaled_d[u];
          row[rank_of(shared_.variable[u])] -= weight;
          degree += weight;
        }
        team.sync();  // the next expert's siblings may sit on the same ranks
      }
      degree = team.sum(degree);
      // The diagonal is a sum of magnitudes: as a difference it would lose the matrix to rounding.
      if (team.lane == 0) row[g] = degree * (1.0f + kRegulariser);
    }
    block_.sync();
    each_rank([&](int i, int g) {
      float* diagonal = shared_.matrix + g * (stride + 1);
      *diagonal += slack_[i] / lambda_[i] + 1e-9f;
      smallest = *diagonal < smallest ? *diagonal : smallest;
      shared_.right_side[g] = -slack_[i] + rank_sum(g);
    });
    float sums[1] = {0.0f}, least[1] = {smallest};
    block_.reduce(sums, least);
    block_.invert(shared_.matrix, stride, num_ranks_, least[0] / static_cast<float>(num_ranks_));

    // u = inverse * 1; projected inverse = inverse - u u^T / sum(u); dT = u^T r / sum(u).
    for (int g = team.index; g < num_ranks_; g += team.count) {
      float u = 0.0f;
      for (int j = team.lane; j < num_ranks_; j += team.size) u += shared_.matrix[g * stride + j];
      u = team.sum(u);
      if (team.lane == 0) shared_.step_lambda[g] = u;
    }
    block_.sync();
    const float total = block_.total(shared_.step_lambda, num_ranks_);
    for (int g = team.index; g <= num_ranks_; g += team.count) {
      for (int j = team.lane; j < num_ranks_; j += team.size) {
        const float share = shared_.step_lambda[j] / total;
        float* entry = shared_.matrix + g * stride + j;
        *entry = g == num_ranks_ ? share : *entry - shared_.step_lambda[g] * share;
      }
    }
    block_.sync();
  }

  // dlambda and dT of the published right side, then dx, dz, ds from them.
  LPLB_DEVICE void direction() {
    const int stride = num_ranks_ + 1;
    const auto team = block_.team();
    for (int g = team.index; g <= num_ranks_; g += team.count) {
      float s = 0.0f;
      for (int j = team.lane; j < num_ranks_; j += team.size) {
        s += shared_.matrix[g * stride + j] * shared_.right_side[j];
      }
      s = team.sum(s);
      if (team.lane == 0) shared_.step_lambda[g] = s;
    }
    block_.sync();
    each_variable([&](int i, int v) {
      const int first = first_sibling(packed_[i]), count = num_siblings(packed_[i]);
      float s = 0.0f;
      for (int u = first; u < first + count; ++u) {
        s += shared_.scaled_d[u] * shared_.step_lambda[rank_of(shared_.variable[u])];
      }
      step_y_[i] = (root_h_[i] * s - sum_q_[i]) / h_[i];
      step_z_[i] = shared_.step_lambda[rank_of(packed_[i])] - step_y_[i];
      step_x_[i] = q_[i] - d_[i] * step_z_[i];
      shared_.exchange[v] = step_x_[i];
    });
    block_.sync();
    step_top_ = shared_.step_lambda[num_ranks_];
    each_rank([&](int i, int g) {
      step_lambda_[i] = shared_.step_lambda[g];
      step_slack_[i] = step_top_ - rank_sum(g);
    });
  }

  // Longest steps that keep the primal (x, s) and the dual (z, lambda) nonnegative, at most 1, together with
  // sum(dx z + ds lambda), sum(x dz + s dlambda) and sum(dx dz + ds dlambda).
  LPLB_DEVICE void step_lengths(float (&longest)[2], float (&sums)[3]) {
    longest[0] = longest[1] = 1.0f;
    sums[0] = sums[1] = sums[2] = 0.0f;
    const auto visit = [&](float primal, float step_primal, float dual, float step_dual) {
      if (step_primal < 0.0f) longest[0] = fminf(longest[0], -primal / step_primal);
      if (step_dual < 0.0f) longest[1] = fminf(longest[1], -dual / step_dual);
      sums[0] += step_primal * dual;
      sums[1] += primal * step_dual;
      sums[2] += step_primal * step_dual;
    };
    each_variable([&](int i, int) { visit(x_[i], step_x_[i], z_[i], step_z_[i]); });
    each_rank([&](int i, int) { visit(slack_[i], step_slack_[i], lambda_[i], step_lambda_[i]); });
    block_.reduce(sums, longest);
  }

  LPLB_DEVICE bool predict_and_correct() {
    float longest[2], sums[3];
    direction();
    step_lengths(longest, sums);
    const float pairs = static_cast<float>(num_variables_ + num_ranks_);
    const float left = complementarity_ + longest[0] * sums[0] + longest[1] * sums[1] +
                       longest[0] * longest[1] * sums[2];  // complementarity after the predictor
    if (!std::isfinite(left)) return false;
    const float ratio = left > 0.0f ? left / complementarity_ : 0.0f;
    const float target = ratio * ratio * ratio * complementarity_ / pairs;

    each_variable([&](int i, int) { q_[i] = (target - step_x_[i] * step_z_[i]) / z_[i] - x_[i]; });
    expert_sums(q_, sum_q_);
    each_variable([&](int i, int v) { shared_.exchange[v] = q_[i] - d_[i] * (sum_q_[i] / h_[i]); });
    block_.sync();
    each_rank([&](int i, int g) {
      shared_.right_side[g] = (target - step_slack_[i] * step_lambda_[i]) / lambda_[i] - slack_[i] + rank_sum(g);
    });
    block_.sync();
    direction();
    step_lengths(longest, sums);
    if (!std::isfinite(sums[0]) || !std::isfinite(sums[1])) return false;
    step_primal_ = fminf(1.0f, kStepShare * longest[0]);
    step_dual_ = fminf(1.0f, kStepShare * longest[1]);
    return true;
  }

  // Takes the step, then restores by projection what rounding took: x sums to w, loads and slacks follow from x,
  // lambda sums to 1, z follows from lambda and y.
  LPLB_DEVICE void advance() {
    float sum_x[kVariables];
    each_variable([&](int i, int) { x_[i] = fmaxf(x_[i] + step_primal_ * step_x_[i], kTinyPrimal); });
    expert_sums(x_, sum_x);
    each_variable([&](int i, int) { x_[i] *= w_[i] / sum_x[i]; });
    publish(x_);
    float sums[1] = {0.0f}, least[1] = {0.0f};
    each_rank([&](int i, int g) {
      rank_[i] = fixed_[i] + rank_sum(g);
      least[0] = fminf(least[0], -rank_[i]);
      lambda_[i] = fmaxf(lambda_[i] + step_dual_ * step_lambda_[i], kTinyDual);
      sums[0] += lambda_[i];
      shared_.lambda[g] = lambda_[i];
    });
    block_.reduce(sums, least);
    most_ = -least[0];
    lambda_scale_ = 1.0f / sums[0];
    top_ = fmaxf(top_ + step_primal_ * step_top_, most_ * (1.0f + 1e-6f));
    each_rank([&](int i, int) {
      lambda_[i] *= lambda_scale_;
      slack_[i] = fmaxf(top_ - rank_[i], kTinySlack);
    });
    each_variable([&](int i, int) {
      const float y = y_[i] + step_dual_ * step_y_[i];
      z_[i] = fmaxf((shared_.lambda[rank_of(packed_[i])] - y) * lambda_scale_, kTinyDual);
      y_[i] = y * lambda_scale_;
    });
  }

  LPLB_DEVICE void finish(float gap, int iterations, Status status) {
    if (status != kSkipped && *shared_.total > 0) {
      const float tokens = static_cast<float>(*shared_.total) / static_cast<float>(num_ranks_);
      each_variable([&](int i, int) {
        if (num_siblings(packed_[i]) > 1) fraction_[result_[i]] = best_x_[i] / w_[i];
      });
      each_rank([&](int i, int g) { rank_load_[g] = best_rank_[i] * tokens; });
    } else {
      each_rank([&](int, int g) { rank_load_[g] = static_cast<float>(shared_.fixed_load[g]); });
    }
    if (thread_ == 0) {
      *gap_ = gap;
      *iterations_ = iterations;
      *status_ = status;
    }
  }

  Block block_;
  const SolveShape& shape_;
  Shared shared_;
  int thread_, num_ranks_, num_slots_, first_slot_, num_variables_ = 0;
  const int32_t *load_, *phy2log_, *log2phy_;
  float *fraction_, *rank_load_, *gap_;
  int32_t *iterations_, *status_;

  // Of the variables this thread owns.
  uint32_t packed_[kVariables];
  int result_[kVariables];
  float w_[kVariables], x_[kVariables], z_[kVariables], y_[kVariables], best_x_[kVariables];
  float d_[kVariables], h_[kVariables], root_h_[kVariables], q_[kVariables], sum_q_[kVariables];
  float step_x_[kVariables], step_y_[kVariables], step_z_[kVariables];
  // Of the ranks this thread owns.
  float fixed_[kRanks], rank_[kRanks], slack_[kRanks], lambda_[kRanks], best_rank_[kRanks];
  float step_slack_[kRanks], step_lambda_[kRanks];
  // Known to all threads alike.
  float scale_, most_, top_, lambda_scale_, complementarity_, best_most_, best_bound_;
  float step_top_, step_primal_, step_dual_;
  bool best_is_even_;
};

}  // namespace lplb
