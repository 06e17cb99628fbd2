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
// K is a graph Laplacian with positive weights plus a positive diagonal, the excess s / lambda, which vanishes on the
// busy ranks as the method converges; there K is singular but for it, and weights span many orders of magnitude. All
// else is float32, but K is inverted in float64, each diagonal entry summed up from the weights of its row: in float32,
// or with a regularised diagonal, one instance in some hundreds stalls short of 1e-4 with steps that go nowhere. The
// inverse of [[K, 1], [1^T, 0]] turns each of the two directions of an iteration into one matrix-vector product.
//
// One text for both platforms: a Block runs it with many threads that share memory (CUDA) or with one (CPU).
// A value that belongs to one variable or one rank is private to the thread that owns it; what other threads read lies
// in Shared, and is written and read on different sides of a block.sync(), or passes through the block's reduce() and,
// for pairs, sibling(). Sums run in a fixed order, so that equal inputs give equal bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "solve.h"

#ifdef __CUDACC__
#define LPLB_DEVICE __device__ __forceinline__
#define LPLB_UNROLL _Pragma("unroll")
#define LPLB_UNROLL_BY(n) _Pragma(LPLB_STRING(unroll n))
#define LPLB_STRING(text) #text
#else
#define LPLB_DEVICE inline
#define LPLB_UNROLL
#define LPLB_UNROLL_BY(n)
#endif

namespace lplb {

// Smallest scaled load (the mean rank load is 1) an expert takes part with: keeps idle experts strictly inside. 2,048
// of them add 2e-5 at most.
constexpr float kFloor = 1e-8f;
constexpr float kTiny = 1e-12f;  // of x, lambda and z
constexpr float kTinySlack = 1e-9f;
constexpr float kStepShare = 0.99f;  // of the way to the boundary

// A variable as others see it. Its place is where it lies in arrays that run rank by rank; its expert's variables are
// neighbours, from v - index to v - index + last.
struct Variable {
  static constexpr int kPlaceBits = 11, kRankBits = 7, kIndexBits = 7;
  static_assert(kMaxGroupSlots <= 1 << kPlaceBits && kMaxGroupRanks <= 1 << kRankBits, "must fit 32 bits");
  uint32_t packed;

  LPLB_DEVICE static Variable make(int place, int rank, int index, int last) {
    return {static_cast<uint32_t>(place) | static_cast<uint32_t>(rank) << kPlaceBits |
            static_cast<uint32_t>(index) << (kPlaceBits + kRankBits) |
            static_cast<uint32_t>(last) << (kPlaceBits + kRankBits + kIndexBits)};
  }
  LPLB_DEVICE int place() const { return packed & ((1 << kPlaceBits) - 1); }
  LPLB_DEVICE int rank() const { return packed >> kPlaceBits & ((1 << kRankBits) - 1); }
  LPLB_DEVICE int index() const { return packed >> (kPlaceBits + kRankBits) & ((1 << kIndexBits) - 1); }
  LPLB_DEVICE int last() const { return packed >> (kPlaceBits + kRankBits + kIndexBits); }
};

// Views into the group's working memory.
struct Shared {
  float* matrix;        // [ranks, ranks + 1] K off its diagonal; the spare column keeps rows in different banks
  float* excess;        // [ranks] s / lambda
  float* exchange;      // [places] a value of each variable, for its rank and its siblings
  float* weight;        // [places] pairs: D_1 D_2 / H of the expert; else D_p / sqrt(H) of the variable
  Variable* variable;   // [variables]
  uint16_t* at_place;   // [places] variable, or for pairs the sibling's rank; a rank's places are filled from the front
  float* lambda;        // [ranks] up to a common factor
  float* right_side;    // [ranks]
  float* step;          // [ranks + 1] dlambda, then dT
  int32_t* fixed_load;  // [ranks] tokens
  int32_t* num_placed;  // [ranks]
  uint32_t* total;      // [1] tokens of the group
};

// Carves Shared out of one allocation, aligned to 16 bytes; with memory == nullptr only counts the bytes.
inline
#ifdef __CUDACC__
    __host__ __device__
#endif
        size_t carve_shared(char* memory, const SolveShape& shape, Shared* out) {
  const size_t ranks = shape.group_size, places = ranks * shape.slots_per_rank;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* here = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 15) / 16 * 16;
    return here;
  };
  Shared shared;
  shared.matrix = reinterpret_cast<float*>(take(ranks * (ranks + 1) * sizeof(float)));
  shared.excess = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.exchange = reinterpret_cast<float*>(take(places * sizeof(float)));
  shared.weight = reinterpret_cast<float*>(take(places * sizeof(float)));
  shared.variable = reinterpret_cast<Variable*>(take(shape.max_variables * sizeof(Variable)));
  shared.at_place = reinterpret_cast<uint16_t*>(take(places * sizeof(uint16_t)));
  shared.lambda = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.right_side = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.step = reinterpret_cast<float*>(take((ranks + 1) * sizeof(float)));
  shared.fixed_load = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.num_placed = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.total = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t)));
  if (out != nullptr) *out = shared;
  return used;
}

// Block: kThreads; kVariables and kRanks, the most of them that a thread owns; kPairs, every replicated expert has two
// replicas; and thread(), sync(), add(), scan(), collect(), reduce(), divide(), factorise(), apply() and, for pairs,
// sibling().
template <class Block>
class InteriorPoint {
 public:
  LPLB_DEVICE InteriorPoint(const Block& block, const SolveShape& shape, const SolveOperands& in,
                            const SolveResults& out, int batch, int group, const Shared& shared)
      : block_(block), shape_(shape), shared_(shared), thread_(block.thread()) {
    const int64_t experts = shape.num_experts, cells = experts * shape.max_replicas;
    load_ = in.load + batch * experts;
    log2phy_ = in.log2phy + batch * cells;
    fraction_ = out.fraction + batch * cells;
    const int64_t which = static_cast<int64_t>(batch) * shape.num_groups + group;
    rank_load_ = out.rank_load + which * shape.group_size;
    gap_ = out.gap + which;
    iterations_ = out.iterations + which;
    status_ = out.status + which;
    num_ranks_ = shape.group_size;
    num_places_ = shape.group_size * shape.slots_per_rank;
    first_slot_ = group * num_places_;
  }

  LPLB_DEVICE void run() {
    find_variables();
    if (num_variables_ == 0 || *shared_.total == 0) {
      finish_unsolved(num_variables_ == 0 ? kSkipped : kConverged);
      return;
    }
    start();
    int iteration = 0;
    while (gap_now() > shape_.tol && iteration < shape_.max_iterations) {
      factorise();
      if (!predict_and_correct()) break;  // rounding broke the Newton system: the best iterate stands
      advance();
      ++iteration;
    }
    finish(iteration);
  }

 private:
  static constexpr int kVariables = Block::kVariables;
  static constexpr int kRanks = Block::kRanks;
  static constexpr uint16_t kNone = 0xffff;

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
  // Visits the other variables of the same expert.
  template <class F>
  LPLB_DEVICE void each_sibling(int v, const Variable& self, F body) const {
    const int first = v - self.index();
    for (int u = first; u <= first + self.last(); ++u) {
      if (u != v) body(shared_.variable[u]);
    }
  }

  // A slot, counted from the group's first, or -1 where it is not of this group. Contents may be traced, hence
  // anything.
  LPLB_DEVICE int slot_in_group(int32_t slot) const {
    const int64_t local = static_cast<int64_t>(slot) - first_slot_;
    return local >= 0 && local < num_places_ ? static_cast<int>(local) : -1;
  }
  // Number of leading entries of an expert's row that are slots of this group.
  LPLB_DEVICE int count_replicas(const int32_t* row) const {
    if constexpr (Block::kPairs) {
      const int32_t home = row[0], copy = row[1];  // both loads at once
      return slot_in_group(home) < 0 ? 0 : slot_in_group(copy) < 0 ? 1 : 2;
    }
    const int most = shape_.max_replicas < num_ranks_ ? shape_.max_replicas : num_ranks_;
    int count = 0;
    while (count < most && slot_in_group(row[count]) >= 0) ++count;
    return count;
  }

  // Replicas of replicated experts become variables, expert by expert; all else is fixed load.
  LPLB_DEVICE void find_variables() {
    for (int p = thread_; p < num_places_; p += Block::kThreads) shared_.at_place[p] = kNone;
    each_rank([&](int, int g) { shared_.fixed_load[g] = 0; });
    if (thread_ == 0) *shared_.total = 0;
    block_.sync();
    int mine = 0;
    uint32_t total = 0;
    LPLB_UNROLL_BY(2)
    for (int e = thread_; e < shape_.num_experts; e += Block::kThreads) {
      const int32_t* row = log2phy_ + static_cast<int64_t>(e) * shape_.max_replicas;
      const int32_t load = load_[e] > 0 ? load_[e] : 0;
      const int count = count_replicas(row);
      if (count == 0) {
        // Nothing for an expert without a slot; one of another group is left to that group.
        if (first_slot_ == 0 && (row[0] < 0 || row[0] >= shape_.num_physical)) fill_row(e, 0);
        continue;
      }
      total += static_cast<uint32_t>(load);
      if (count == 1) {
        keep_home(e, load);
      } else {
        mine += count;
      }
    }
    block_.add(shared_.total, total);
    int first = block_.scan(mine, &num_variables_);
    // More than the shapes allow for: only contents that name a slot twice, or leave an expert without one.
    if (num_variables_ > shape_.max_variables) num_variables_ = shape_.max_variables;
    if constexpr (Block::kPairs) num_variables_ &= ~1;  // whole pairs only
    int32_t* expert_of = reinterpret_cast<int32_t*>(shared_.weight);
    for (int e = thread_; mine > 0 && e < shape_.num_experts; e += Block::kThreads) {
      const int32_t* row = log2phy_ + static_cast<int64_t>(e) * shape_.max_replicas;
      const int count = count_replicas(row);
      if (count < 2) continue;
      const bool fits = first + count <= num_variables_;
      for (int r = 0; r < count && first + r < num_variables_; ++r) {
        const int slot = slot_in_group(row[r]);
        if (fits) shared_.at_place[slot] = static_cast<uint16_t>(first + r);
        shared_.variable[first + r] =
            Variable::make(0, slot / shape_.slots_per_rank, fits ? r : 0, fits ? count - 1 : 0);
        expert_of[first + r] = e;
      }
      if (fits) {
        fill_row(e, count);
      } else {
        keep_home(e, load_[e] > 0 ? load_[e] : 0);
      }
      first += count;
    }
    block_.sync();
    block_.collect(shared_.at_place, num_ranks_, shape_.slots_per_rank, kNone, shared_.num_placed,
                   [&](int v, int place) { shared_.variable[v].packed |= static_cast<uint32_t>(place); });
    block_.sync();
    scale_ = *shared_.total > 0 ? static_cast<float>(num_ranks_) / static_cast<float>(*shared_.total) : 0.0f;
    each_variable([&](int i, int v) {
      self_[i] = shared_.variable[v];
      const int e = expert_of[v];
      result_[i] = e * shape_.max_replicas + self_[i].index();
      w_[i] = fmaxf(static_cast<float>(load_[e]) * scale_, kFloor);
      if constexpr (Block::kPairs) {
        shared_.at_place[self_[i].place()] = static_cast<uint16_t>(shared_.variable[v ^ 1].rank());
      }
    });
  }
  LPLB_DEVICE void keep_home(int e, int32_t load) const {
    const int64_t row = static_cast<int64_t>(e) * shape_.max_replicas;
    block_.add(&shared_.fixed_load[slot_in_group(log2phy_[row]) / shape_.slots_per_rank], load);
    fill_row(e, 1);
  }
  // An even split over the first `count` replicas.
  LPLB_DEVICE void fill_row(int e, int count) const {
    float* row = fraction_ + static_cast<int64_t>(e) * shape_.max_replicas;
    for (int r = 0; r < shape_.max_replicas; ++r) row[r] = r < count ? 1.0f / static_cast<float>(count) : 0.0f;
  }

  LPLB_DEVICE void publish(const float (&value)[kVariables]) const {
    each_variable([&](int i, int) { shared_.exchange[self_[i].place()] = value[i]; });
  }
  // Sum of a variable's value over the variables of its expert, for each variable.
  LPLB_DEVICE void expert_sums(const float (&value)[kVariables], float (&sum)[kVariables]) const {
    if constexpr (Block::kPairs) {
      sum[0] = value[0] + block_.sibling(value[0]);
    } else {
      publish(value);
      block_.sync();
      each_variable([&](int i, int v) {
        const int first = v - self_[i].index();
        sum[i] = 0.0f;
        for (int u = first; u <= first + self_[i].last(); ++u) {
          sum[i] += shared_.exchange[shared_.variable[u].place()];
        }
      });
      block_.sync();
    }
  }
  // Sum over a rank's variables of an array that runs by place.
  LPLB_DEVICE float rank_sum(const float* by_place, int g) const {
    const float* values = by_place + g * shape_.slots_per_rank;
    const int count = shared_.num_placed[g];
    float s = 0.0f;
    LPLB_UNROLL_BY(4)
    for (int i = 0; i < count; ++i) s += values[i];
    return s;
  }

  // The even split, and duals in the middle of their feasible set.
  LPLB_DEVICE void start() {
    const float uniform = 1.0f / static_cast<float>(num_ranks_);
    each_variable([&](int i, int) {
      x_[i] = w_[i] / static_cast<float>(self_[i].last() + 1);
      y_[i] = -uniform;
    });
    each_rank([&](int i, int g) {
      fixed_[i] = static_cast<float>(shared_.fixed_load[g]) * scale_;
      lambda_[i] = uniform;
    });
    best_most_ = 3e38f;
    best_bound_ = 0.0f;
    settle([](float most) { return most * 1.1f + 0.1f; });
    best_is_even_ = true;
  }

  // Takes the step; x sums to w again, whatever rounding did.
  LPLB_DEVICE void advance() {
    float sum[kVariables];
    each_variable([&](int i, int) {
      x_[i] = fmaxf(x_[i] + step_primal_ * step_x_[i], kTiny);
      y_[i] += step_dual_ * step_y_[i];
    });
    each_rank([&](int i, int) { lambda_[i] = fmaxf(lambda_[i] + step_dual_ * step_lambda_[i], kTiny); });
    expert_sums(x_, sum);
    each_variable([&](int i, int) { x_[i] *= block_.divide(w_[i], sum[i]); });
    const float top = top_ + step_primal_ * step_top_;
    settle([top](float most) { return fmaxf(top, most * (1.0f + 1e-6f)); });
  }

  // From x, y and lambda: rank loads, slacks under `top_of(largest rank load)`, duals with sum(lambda) = 1 and z, the
  // complementarity, and the certificate. Keeps the best x and the best bound so far.
  //
  // Whatever rounding did to the duals, with lambda >= 0 of sum 1 and y_e = min over e's ranks of lambda,
  // sum y w + sum lambda b is a lower bound on the largest rank load: an average of rank loads in which each expert
  // counts where it counts least.
  template <class TopOf>
  LPLB_DEVICE void settle(TopOf top_of) {
    publish(x_);
    each_rank([&](int i, int g) { shared_.lambda[g] = lambda_[i]; });
    block_.sync();
    float sums[3] = {0.0f, 0.0f, 0.0f}, most[1] = {0.0f};  // sum of lambda, bound, dual objective
    float own[kVariables] = {}, lowest[kVariables];
    each_variable([&](int i, int) { own[i] = lowest[i] = shared_.lambda[self_[i].rank()]; });
    if constexpr (Block::kPairs) {
      lowest[0] = fminf(own[0], block_.sibling(own[0]));
    } else {
      each_variable([&](int i, int v) {
        if (self_[i].index() > 0) return;
        each_sibling(v, self_[i], [&](Variable u) { lowest[i] = fminf(lowest[i], shared_.lambda[u.rank()]); });
      });
    }
    each_variable([&](int i, int) {
      if (self_[i].index() == 0) {
        sums[1] += lowest[i] * w_[i];
        sums[2] += y_[i] * w_[i];
      }
    });
    each_rank([&](int i, int g) {
      rank_[i] = fixed_[i] + rank_sum(shared_.exchange, g);
      most[0] = fmaxf(most[0], rank_[i]);
      sums[0] += lambda_[i];
      sums[1] += lambda_[i] * fixed_[i];
      sums[2] += lambda_[i] * fixed_[i];
    });
    block_.template reduce<true>(sums, most);
    const float normaliser = 1.0f / sums[0];
    best_bound_ = fmaxf(best_bound_, sums[1] * normaliser);
    top_ = top_of(most[0]);
    // What is left between the objectives is sum(x z) + sum(s lambda).
    complementarity_ = fmaxf(top_ - sums[2] * normaliser, kTiny);
    each_variable([&](int i, int) {
      z_[i] = fmaxf((own[i] - y_[i]) * normaliser, kTiny);
      y_[i] *= normaliser;
    });
    each_rank([&](int i, int) {
      lambda_[i] *= normaliser;
      slack_[i] = fmaxf(top_ - rank_[i], kTinySlack);
    });
    if (most[0] < best_most_) {
      best_most_ = most[0];
      best_is_even_ = false;
      each_variable([&](int i, int) { best_x_[i] = x_[i]; });
      each_rank([&](int i, int) { best_rank_[i] = rank_[i]; });
    }
  }

  // Certified relative gap of the best x.
  LPLB_DEVICE float gap_now() const { return fmaxf((best_most_ - best_bound_) / best_most_, 0.0f); }

  // Assembles K and hands it to the block; and the right side of the predictor, which aims at complementarity zero.
  LPLB_DEVICE void factorise() {
    const int stride = num_ranks_ + 1;
    for (int i = thread_; i < num_ranks_ * stride; i += Block::kThreads) shared_.matrix[i] = 0.0f;
    each_variable([&](int i, int) { d_[i] = block_.divide(x_[i], z_[i]); });
    expert_sums(d_, h_);
    each_variable([&](int i, int) {
      const float inverse_h = block_.divide(1.0f, h_[i]);
      q_[i] = -x_[i];  // sums to -w over each expert
      sum_q_[i] = -w_[i];
      shared_.exchange[self_[i].place()] = q_[i] + d_[i] * w_[i] * inverse_h;
      root_h_[i] = sqrtf(h_[i]);
      if constexpr (!Block::kPairs) shared_.weight[self_[i].place()] = d_[i] * root_h_[i] * inverse_h;
    });
    if constexpr (Block::kPairs) {
      const float other = block_.sibling(d_[0]);
      each_variable([&](int i, int) { shared_.weight[self_[i].place()] = block_.divide(d_[i] * other, h_[i]); });
    }
    block_.sync();

    // Row g belongs to one thread, which visits the siblings of the rank's variables: a fixed order of sums.
    each_rank([&](int i, int g) {
      float* row = shared_.matrix + g * stride;
      const int first = g * shape_.slots_per_rank, count = shared_.num_placed[g];
      LPLB_UNROLL_BY(2)
      for (int p = first; p < first + count; ++p) {
        const int other = shared_.at_place[p];
        const float own = shared_.weight[p];
        if constexpr (Block::kPairs) {
          row[other] -= own;
        } else {
          each_sibling(other, shared_.variable[other],
                       [&](Variable u) { row[u.rank()] -= own * shared_.weight[u.place()]; });
        }
      }
      shared_.excess[g] = block_.divide(slack_[i], lambda_[i]);
      shared_.right_side[g] = rank_sum(shared_.exchange, g) - slack_[i];
    });
    block_.sync();
    block_.factorise(shared_.matrix, stride, shared_.excess, num_ranks_);
  }

  // dlambda and dT of the right side, then dx, dy, dz and ds.
  LPLB_DEVICE void direction() {
    block_.apply(shared_.right_side, num_ranks_, shared_.step);
    block_.sync();
    float own[kVariables], weighted[kVariables] = {};
    each_variable([&](int i, int) {
      own[i] = shared_.step[self_[i].rank()];
      weighted[i] = d_[i] * own[i];
    });
    if constexpr (Block::kPairs) {
      weighted[0] += block_.sibling(weighted[0]);
    } else {
      each_variable([&](int i, int v) {
        float s = 0.0f;
        each_sibling(v, self_[i], [&](Variable u) { s += shared_.weight[u.place()] * shared_.step[u.rank()]; });
        weighted[i] += s * root_h_[i];
      });
    }
    each_variable([&](int i, int) {
      step_y_[i] = block_.divide(weighted[i] - sum_q_[i], h_[i]);
      step_z_[i] = own[i] - step_y_[i];
      step_x_[i] = q_[i] - d_[i] * step_z_[i];
    });
    publish(step_x_);
    block_.sync();
    step_top_ = shared_.step[num_ranks_];
    each_rank([&](int i, int g) {
      step_lambda_[i] = shared_.step[g];
      step_slack_[i] = step_top_ - rank_sum(shared_.exchange, g);
    });
  }

  // Longest steps that keep the primal (x, s) and the dual (z, lambda) nonnegative, at most 1, together with
  // sum(dx z + ds lambda), sum(x dz + s dlambda) and sum(dx dz + ds dlambda).
  LPLB_DEVICE void step_lengths(float (&longest)[2], float (&sums)[3]) {
    longest[0] = longest[1] = 1.0f;
    sums[0] = sums[1] = sums[2] = 0.0f;
    const auto visit = [&](float primal, float step_primal, float dual, float step_dual) {
      if (step_primal < 0.0f) longest[0] = fminf(longest[0], block_.divide(-primal, step_primal));
      if (step_dual < 0.0f) longest[1] = fminf(longest[1], block_.divide(-dual, step_dual));
      sums[0] += step_primal * dual;
      sums[1] += primal * step_dual;
      sums[2] += step_primal * step_dual;
    };
    each_variable([&](int i, int) { visit(x_[i], step_x_[i], z_[i], step_z_[i]); });
    each_rank([&](int i, int) { visit(slack_[i], step_slack_[i], lambda_[i], step_lambda_[i]); });
    block_.template reduce<false>(sums, longest);
  }

  LPLB_DEVICE bool predict_and_correct() {
    float longest[2], sums[3];
    direction();
    step_lengths(longest, sums);
    const float left = complementarity_ + longest[0] * sums[0] + longest[1] * sums[1] +
                       longest[0] * longest[1] * sums[2];  // complementarity after the predictor
    if (!std::isfinite(left)) return false;
    const float ratio = left > 0.0f ? left / complementarity_ : 0.0f;
    const float target = ratio * ratio * ratio * complementarity_ / static_cast<float>(num_variables_ + num_ranks_);

    each_variable([&](int i, int) { q_[i] = block_.divide(target - step_x_[i] * step_z_[i], z_[i]) - x_[i]; });
    expert_sums(q_, sum_q_);
    each_variable(
        [&](int i, int) { shared_.exchange[self_[i].place()] = q_[i] - d_[i] * block_.divide(sum_q_[i], h_[i]); });
    block_.sync();
    each_rank([&](int i, int g) {
      shared_.right_side[g] = block_.divide(target - step_slack_[i] * step_lambda_[i], lambda_[i]) - slack_[i] +
                              rank_sum(shared_.exchange, g);
    });
    block_.sync();
    direction();
    step_lengths(longest, sums);
    if (!std::isfinite(sums[0]) || !std::isfinite(sums[1])) return false;
    step_primal_ = fminf(1.0f, kStepShare * longest[0]);
    step_dual_ = fminf(1.0f, kStepShare * longest[1]);
    return true;
  }

  LPLB_DEVICE void finish(int iterations) {
    const float tokens = static_cast<float>(*shared_.total) / static_cast<float>(num_ranks_);
    each_variable([&](int i, int) {
      if (self_[i].last() > 0) fraction_[result_[i]] = best_x_[i] / w_[i];
    });
    each_rank([&](int i, int g) { rank_load_[g] = best_rank_[i] * tokens; });
    const float gap = gap_now();
    report(gap, iterations, gap <= shape_.tol ? kConverged : best_is_even_ ? kEvenSplit : kMaxIterations);
  }
  LPLB_DEVICE void finish_unsolved(Status status) {
    each_rank([&](int, int g) { rank_load_[g] = static_cast<float>(shared_.fixed_load[g]); });
    report(0.0f, 0, status);
  }
  LPLB_DEVICE void report(float gap, int iterations, Status status) {
    if (thread_ == 0) {
      *gap_ = gap;
      *iterations_ = iterations;
      *status_ = status;
    }
  }

  Block block_;
  const SolveShape& shape_;
  Shared shared_;
  int thread_, num_ranks_, num_places_, first_slot_, num_variables_ = 0;
  const int32_t *load_, *log2phy_;
  float *fraction_, *rank_load_, *gap_;
  int32_t *iterations_, *status_;

  // Of the variables this thread owns.
  Variable self_[kVariables];
  int result_[kVariables];
  float w_[kVariables], x_[kVariables] = {}, y_[kVariables], z_[kVariables], best_x_[kVariables];
  float d_[kVariables] = {}, h_[kVariables], root_h_[kVariables], q_[kVariables] = {}, sum_q_[kVariables];
  float step_x_[kVariables], step_y_[kVariables], step_z_[kVariables];
  // Of the ranks this thread owns.
  float fixed_[kRanks], rank_[kRanks], slack_[kRanks], lambda_[kRanks], best_rank_[kRanks];
  float step_slack_[kRanks], step_lambda_[kRanks];
  // Known to all threads alike.
  float scale_, top_, complementarity_, best_most_, best_bound_;
  float step_top_, step_primal_, step_dual_;
  bool best_is_even_;
};

}  // namespace lplb
