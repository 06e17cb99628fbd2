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
// Where ranks have speeds s_g, T is the largest load / speed, and rank g may carry s_g T: s_g then stands beside lambda
// where the duals sum to 1, and in the place of the border's ones.
//
// It starts from a split that a few rounds of a simple rule have balanced, and from the prices that fit it, which
// halves the iterations.
//
// One text for both platforms: a Block runs it with many threads that share memory (CUDA) or with one (CPU).
// A value that belongs to one variable or one rank is private to the thread that owns it; what other threads read lies
// in Shared, and is written and read on different sides of a block.sync(), or passes through the block's reduce() and,
// for pairs, sibling(). Sums run in a fixed order, so that equal inputs give equal bits. Threads that own nothing go
// through the same arithmetic, on values that nobody uses: branches cost more.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"
#include "solve.h"

namespace lplb {

// Smallest scaled load (the mean rank load is 1) an expert takes part with: keeps idle experts strictly inside. 2,048
// of them add 2e-5 at most.
constexpr float kFloor = 1e-8f;
constexpr float kTiny = 1e-12f;  // of x, lambda and z
constexpr float kTinySlack = 1e-9f;
constexpr float kStepShare = 0.999f;  // of the way to the boundary
constexpr float kInside = 0.05f;      // of an expert's load, that each replica has more than in a plan
constexpr int kNotPlaced = 0xffff;

// A variable as others see it. Its expert's variables are neighbours, from v - index to v - index + last.
struct Variable {
  static_assert(kMaxGroupRanks <= 256, "must fit 8 bits");
  uint32_t packed;

  LPLB_DEVICE static Variable make(int rank, int index, int last) {
    return {static_cast<uint32_t>(rank) | static_cast<uint32_t>(index) << 8 | static_cast<uint32_t>(last) << 16};
  }
  LPLB_DEVICE int rank() const { return packed & 0xff; }
  LPLB_DEVICE int index() const { return packed >> 8 & 0xff; }
  LPLB_DEVICE int last() const { return packed >> 16; }
};

// Where a lower triangle without its diagonal, packed row by row, has entry (row, column).
LPLB_DEVICE int packed(int row, int column) { return row * (row - 1) / 2 + column; }

// Views into the group's working memory. A rank's variables have the first of its places, `stride` to a rank; places
// without one hold 0.
struct Shared {
  float* matrix;         // K below its diagonal, packed
  float* by_place;       // [ranks, stride] a value of each variable, for its rank
  float* weight;         // pairs: [ranks, stride] D_1 D_2 / H of the expert; else [variables] D_p / sqrt(H)
  uint16_t* at_place;    // [ranks, stride] variable, or for pairs the sibling's rank
  float* by_variable;    // [variables] a value of each variable, for its siblings
  Variable* variable;    // [variables]
  int32_t* result;       // [variables] where its fraction goes
  float* excess;         // [ranks] s / lambda
  float* lambda;         // [ranks] up to a common factor
  float* right_side;     // [ranks]
  float* step;           // [ranks + 1] dlambda, then dT
  int32_t* fixed_load;   // [ranks] tokens of experts that have one copy
  int32_t* home_load;    // [ranks] tokens of all experts at home
  int32_t* num_placed;   // [ranks]
  uint32_t* total;       // [1] tokens of the group
  int32_t* num_fitting;  // [1] variables that fit
  float* speed;          // [ranks], where they have speeds
  int stride;
};

// Carves Shared out of one allocation, aligned to 16 bytes; with memory == nullptr only counts the bytes.
inline
#ifdef __CUDACC__
    __host__ __device__
#endif
        size_t carve_shared(char* memory, const SolveShape& shape, Shared* out) {
  const size_t ranks = shape.group_size, stride = (shape.slots_per_rank + 3) / 4 * 4, places = ranks * stride;
  const size_t variables = shape.max_variables;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* here = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 15) / 16 * 16;
    return here;
  };
  Shared shared;
  shared.matrix = reinterpret_cast<float*>(take(ranks * (ranks - 1) / 2 * sizeof(float)));
  shared.by_place = reinterpret_cast<float*>(take(places * sizeof(float)));
  shared.weight = reinterpret_cast<float*>(take((places > variables ? places : variables) * sizeof(float)));
  shared.at_place = reinterpret_cast<uint16_t*>(take(places * sizeof(uint16_t)));
  shared.by_variable = reinterpret_cast<float*>(take(variables * sizeof(float)));
  shared.variable = reinterpret_cast<Variable*>(take(variables * sizeof(Variable)));
  shared.result = reinterpret_cast<int32_t*>(take(variables * sizeof(int32_t)));
  shared.excess = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.lambda = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.right_side = reinterpret_cast<float*>(take(ranks * sizeof(float)));
  shared.step = reinterpret_cast<float*>(take((ranks + 1) * sizeof(float)));
  shared.fixed_load = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.home_load = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.num_placed = reinterpret_cast<int32_t*>(take(ranks * sizeof(int32_t)));
  shared.total = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t)));
  shared.num_fitting = reinterpret_cast<int32_t*>(take(sizeof(int32_t)));
  shared.speed = reinterpret_cast<float*>(take(shape.by_speed ? ranks * sizeof(float) : 0));
  shared.stride = static_cast<int>(stride);
  if (out != nullptr) *out = shared;
  return used;
}

// Block: kSetupThreads, of which the first kThreads go on to solve, kLanes of them to a rank; kVariables and kRanks,
// the most of them that a thread owns; kPairs, every replicated expert has two replicas; kBySpeed, ranks have speeds;
// kBalancingRounds; and thread(), sync(), sync_lanes(), load4(), reciprocal(), reduce(), factorise(), apply() and, for
// pairs, sibling(); for the setup sync_setup(), add(), add_all(), scan() and place().
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
    if constexpr (Block::kBySpeed) speed_ = speeds_of_group(shape, in.speed, batch, group);
    num_ranks_ = shape.group_size;
    num_slots_ = shape.group_size * shape.slots_per_rank;
    first_slot_ = group * num_slots_;
  }

  // False where there was nothing to do: else only the first kThreads have stayed to the end.
  LPLB_DEVICE bool run() {
    if (shape_.planned && *status_ != kMaxIterations) return false;
    find_variables();
    if (thread_ >= Block::kThreads) return true;
    if (num_variables_ == 0 || *shared_.total == 0) {
      finish_unsolved();
      return true;
    }
    start();
    int iteration = 0;
    while (best_most_ - best_bound_ > shape_.tol * best_most_ && iteration < shape_.max_iterations) {
      factorise();
      if (!predict_and_correct()) break;  // rounding broke the Newton system: the best iterate stands
      advance();
      ++iteration;
    }
    finish(iteration);
    return true;
  }

 private:
  static constexpr int kVariables = Block::kVariables;
  static constexpr int kRanks = Block::kRanks;

  // Runs body(i) for each variable that the thread may own; active(i) says whether it does.
  template <class F>
  LPLB_DEVICE void each_variable(F body) const {
    LPLB_UNROLL
    for (int i = 0; i < kVariables; ++i) {
      if (i > 0 && i * Block::kThreads >= num_variables_) break;  // alike for all threads
      body(i);
    }
  }
  LPLB_DEVICE bool active(int i) const { return thread_ + i * Block::kThreads < num_variables_; }
  LPLB_DEVICE int variable(int i) const { return thread_ + i * Block::kThreads; }
  // Runs body(i, g, own) for each rank that the thread may own; where it does not, g is some rank.
  template <class F>
  LPLB_DEVICE void each_rank(F body) const {
    LPLB_UNROLL
    for (int i = 0; i < kRanks; ++i) {
      const int g = thread_ + i * Block::kThreads;
      if (i > 0 && g >= num_ranks_) break;
      body(i, g < num_ranks_ ? g : num_ranks_ - 1, g < num_ranks_);
    }
  }

  // ---- Setup -------------------------------------------------------------------------------------------------------

  // A slot, counted from the group's first, or -1 where it is not of this group. Contents may be traced, hence
  // anything.
  LPLB_DEVICE int slot_in_group(int32_t slot) const {
    const uint32_t local = static_cast<uint32_t>(slot) - static_cast<uint32_t>(first_slot_);
    return local < static_cast<uint32_t>(num_slots_) ? static_cast<int>(local) : -1;
  }
  LPLB_DEVICE int rank_of(int slot) const {
    return static_cast<int>(static_cast<uint64_t>(slot) * shape_.rank_of_slot >> kRankShift);
  }

  // An expert: where its replicas are, their number, and its load. Its replicas are the leading entries of its row of
  // log2phy that are slots of this group, less those on a rank that has one already.
  struct Expert {
    const int32_t* row;
    int home;  // slot
    int copy;  // slot, for pairs
    int count;
    int32_t load;
  };
  LPLB_DEVICE Expert read_expert(int e) const {
    Expert expert = {log2phy_ + static_cast<int64_t>(e) * shape_.max_replicas, -1, -1, 0, load_[e]};
    if (expert.load < 0) expert.load = 0;
    if constexpr (Block::kPairs) {
      const int home = slot_in_group(expert.row[0]), copy = slot_in_group(expert.row[1]);
      const bool has_home = home >= 0, has_copy = has_home & (copy >= 0) & (rank_of(home) != rank_of(copy));
      expert.home = home;
      expert.copy = copy;
      expert.count = static_cast<int>(has_home) + static_cast<int>(has_copy);
    } else {
      expert.count = each_replica(expert, [](int, int, int) {});
      expert.home = slot_in_group(expert.row[0]);
    }
    return expert;
  }
  // Runs body(column, slot, rank) for each replica; returns their number.
  template <class F>
  LPLB_DEVICE int each_replica(const Expert& expert, F body) const {
    if constexpr (Block::kPairs) {
      body(0, expert.home, rank_of(expert.home));
      body(1, expert.copy, rank_of(expert.copy));
      return 2;
    } else {
      constexpr int kAhead = 4;
      uint64_t seen[(kMaxGroupRanks + 63) / 64] = {};
      int count = 0;
      for (int first = 0; first < shape_.max_replicas; first += kAhead) {
        int slots[kAhead];
        LPLB_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          slots[k] = first + k < shape_.max_replicas ? slot_in_group(expert.row[first + k]) : -1;
        }
        LPLB_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          if (slots[k] < 0) return count;
          const int rank = rank_of(slots[k]);
          const uint64_t bit = uint64_t{1} << rank % 64;
          uint64_t& word = rank < 64 ? seen[0] : seen[1];
          if ((word & bit) != 0) continue;
          word |= bit;
          body(first + k, slots[k], rank);
          ++count;
        }
      }
      return count;
    }
  }
  // Runs body(e, expert) for each expert of this thread, and as often for all threads: with no replicas where there is
  // no expert. The first one was read ahead: with a thread an expert, all are.
  template <class F>
  LPLB_DEVICE void each_expert(const Expert& ahead, F body) const {
    for (int first = 0; first < shape_.num_experts; first += Block::kSetupThreads) {
      const int e = first + thread_;
      body(e, first == 0 ? ahead : e < shape_.num_experts ? read_expert(e) : Expert{nullptr, 0, 0, 0, 0});
    }
  }

  // Replicas of replicated experts become variables, expert by expert; all else is fixed load.
  LPLB_DEVICE void find_variables() {
    Expert ahead = {nullptr, 0, 0, 0, 0};
    if (thread_ < shape_.num_experts) ahead = read_expert(thread_);
    for (int p = thread_; p < num_ranks_ * shared_.stride; p += Block::kSetupThreads) {
      shared_.at_place[p] = kNotPlaced;
      shared_.by_place[p] = shared_.weight[p] = 0.0f;
    }
    for (int g = thread_; g < num_ranks_; g += Block::kSetupThreads) {
      shared_.fixed_load[g] = shared_.home_load[g] = shared_.num_placed[g] = 0;
      if constexpr (Block::kBySpeed) shared_.speed[g] = speed_[g];
    }
    if (thread_ == 0) *shared_.total = 0, *shared_.num_fitting = shape_.max_variables;
    block_.sync_setup();
    int mine = 0;
    uint32_t total = 0;
    each_expert(ahead, [&](int e, const Expert& expert) {
      const int home = rank_of(expert.home);
      block_.add(shared_.fixed_load, home, expert.load, expert.count == 1);
      if (shape_.threshold > 0.0f) block_.add(shared_.home_load, home, expert.load, expert.count > 0);
      if (expert.count > 0) total += static_cast<uint32_t>(expert.load);
      if (expert.count > 1) mine += expert.count;
      // Nothing for an expert without a slot; one of another group is left to that group.
      if (expert.row != nullptr && expert.count == 0 && first_slot_ == 0 &&
          (expert.row[0] < 0 || expert.row[0] >= shape_.num_physical)) {
        fill_row(e, 0);
      }
    });
    block_.add_all(shared_.total, total);
    int first = block_.scan(mine, &num_variables_);
    at_home_ = num_variables_ > 0 && even_enough_at_home();
    if (at_home_) num_variables_ = 0;
    int32_t* loads = reinterpret_cast<int32_t*>(shared_.by_variable);
    each_expert(ahead, [&](int e, const Expert& expert) {
      const bool replicated = expert.count > 1 && !at_home_, fits = first + expert.count <= shape_.max_variables;
      if (expert.count > 0) fill_row(e, (replicated && fits) || expert.load == 0 ? 0 : 1);
      if (replicated && fits) {
        int index = 0;
        each_replica(expert, [&](int column, int, int rank) {
          const int v = first + index;
          shared_.variable[v] = Variable::make(rank, index, expert.count - 1);
          shared_.result[v] = e * shape_.max_replicas + column;
          loads[v] = expert.load;
          ++index;
        });
      }
      // More than the shapes allow for: only contents that name a slot twice, or leave an expert without one.
      if (replicated && !fits && first < shape_.max_variables) *shared_.num_fitting = first;
      block_.add(shared_.fixed_load, rank_of(expert.home), expert.load, replicated && !fits);
      if (expert.count > 1) first += expert.count;
    });
    block_.sync_setup();
    if (num_variables_ > *shared_.num_fitting) num_variables_ = *shared_.num_fitting;
    if (thread_ >= Block::kThreads) return;
    scale_ = *shared_.total > 0 ? static_cast<float>(num_ranks_) / static_cast<float>(*shared_.total) : 0.0f;
    int rank[kVariables];
    each_variable([&](int i) {
      const int v = active(i) ? variable(i) : 0;
      self_[i] = shared_.variable[v];
      rank[i] = self_[i].rank();
      result_[i] = shared_.result[v];
      idle_[i] = loads[v] == 0;
      w_[i] = fmaxf(static_cast<float>(loads[v]) * scale_, kFloor);
    });
    block_.place(rank, num_variables_, num_ranks_, place_, shared_.num_placed);
    each_variable([&](int i) {
      const int v = variable(i);
      place_[i] += rank[i] * shared_.stride;
      if (active(i)) {
        shared_.at_place[place_[i]] = static_cast<uint16_t>(Block::kPairs ? shared_.variable[v ^ 1].rank() : v);
      }
    });
    block_.sync();
    each_rank([&](int i, int g, bool) {
      num_placed_[i] = shared_.num_placed[g];
      fixed_[i] = static_cast<float>(shared_.fixed_load[g]) * scale_;
    });
  }
  // Whether nothing needs to move: the largest rank load at home is within `threshold` of the mean.
  LPLB_DEVICE bool even_enough_at_home() const {
    if (shape_.threshold <= 0.0f || *shared_.total == 0) return false;
    return most_of(shared_.home_load) * static_cast<float>(num_ranks_) <=
           shape_.threshold * static_cast<float>(*shared_.total);
  }
  LPLB_DEVICE float most_of(const int32_t* load) const {
    if constexpr (Block::kBySpeed) {
      float most = 0.0f;
      for (int g = 0; g < num_ranks_; ++g) most = fmaxf(most, level(static_cast<float>(load[g]), g));
      return most;
    } else {
      int32_t most = 0;
      for (int g = 0; g < num_ranks_; ++g) most = most > load[g] ? most : load[g];
      return static_cast<float>(most);
    }
  }
  // Load / speed.
  LPLB_DEVICE float level(float load, int g) const {
    if constexpr (Block::kBySpeed) return load / shared_.speed[g];
    return load;
  }
  // Of a value that all ranks would have, if they were equally fast, that of a rank.
  LPLB_DEVICE float by_speed(float value, int g) const {
    if constexpr (Block::kBySpeed) return value * shared_.speed[g];
    return value;
  }
  // All of the load at home, or nothing anywhere.
  LPLB_DEVICE void fill_row(int e, int at_home) const {
    if (shape_.planned) return;  // is there
    float* row = fraction_ + static_cast<int64_t>(e) * shape_.max_replicas;
    row[0] = static_cast<float>(at_home);
    for (int r = 1; r < shape_.max_replicas; ++r) row[r] = 0.0f;
  }

  // ---- Sums over experts and ranks ---------------------------------------------------------------------------------

  LPLB_DEVICE void publish(const float (&value)[kVariables]) const {
    each_variable([&](int i) {
      if (active(i)) shared_.by_place[place_[i]] = value[i];
    });
  }
  // Of what the variables have published.
  LPLB_DEVICE float rank_sum(const float* by_place, int g, int num_placed) const {
    const float* values = by_place + g * shared_.stride;
    const auto first = block_.load4(values);
    float sum = (first.v[0] + first.v[1]) + (first.v[2] + first.v[3]);
    for (int p = 4; p < num_placed; p += 4) {
      const auto four = block_.load4(values + p);
      sum += (four.v[0] + four.v[1]) + (four.v[2] + four.v[3]);
    }
    return sum;
  }
  // Folds a value over the variables of each expert: a sum, or a minimum. result may be value.
  template <class Fold>
  LPLB_DEVICE void over_expert(const float (&value)[kVariables], float (&result)[kVariables], Fold fold) const {
    if constexpr (Block::kPairs) {
      result[0] = fold(value[0], block_.sibling(value[0]));
    } else {
      each_variable([&](int i) {
        if (active(i)) shared_.by_variable[variable(i)] = value[i];
      });
      block_.sync();
      each_variable([&](int i) {
        if (!active(i)) return;
        const float* values = shared_.by_variable + variable(i) - self_[i].index();
        const int last = self_[i].last();
        float folded = values[0];
        LPLB_UNROLL_BY(4)
        for (int u = 1; u <= last; ++u) folded = fold(folded, values[u]);
        result[i] = folded;
      });
      block_.sync();
    }
  }
  LPLB_DEVICE void expert_sums(const float (&value)[kVariables], float (&sum)[kVariables]) const {
    over_expert(value, sum, [](float a, float b) { return a + b; });
  }
  // Makes x sum to w over each expert.
  LPLB_DEVICE void normalise() {
    float sum[kVariables] = {};
    expert_sums(x_, sum);
    each_variable([&](int i) { x_[i] *= w_[i] * block_.reciprocal(sum[i]); });
  }

  // ---- The method --------------------------------------------------------------------------------------------------

  // From the even split, or from the plan's, a few rounds in which each replica's part is divided by the square of its
  // rank's load. Then the slacks' reciprocals as prices: complementarity near 1 everywhere, as far as the split allows.
  LPLB_DEVICE void start() {
    float most[1] = {0.0f}, nothing[1] = {0.0f};
    each_variable([&](int i) {
      x_[i] = w_[i] / static_cast<float>(self_[i].last() + 1);
      if (shape_.planned) x_[i] = active(i) ? w_[i] * fraction_[result_[i]] : 0.0f;
      best_x_[i] = x_[i];
    });
    for (int round = 0; round <= Block::kBalancingRounds; ++round) {
      publish(x_);
      block_.sync();
      each_rank([&](int i, int g, bool own) {
        rank_[i] = fixed_[i] + rank_sum(shared_.by_place, g, num_placed_[i]);
        const float pull = block_.reciprocal(fmaxf(level(rank_[i], g), 1e-3f));
        if (own) shared_.lambda[g] = pull * pull;
        if (round == 0) best_rank_[i] = rank_[i];
      });
      if (round == Block::kBalancingRounds) break;
      block_.sync();
      each_variable([&](int i) {
        // Away from the bounds, where a plan's split may be.
        if (shape_.planned && round == 0) x_[i] += kInside * w_[i];
        x_[i] = fmaxf(x_[i] * shared_.lambda[self_[i].rank()], kTiny);
      });
      normalise();
    }
    each_rank([&](int i, int g, bool own) { most[0] = own ? fmaxf(most[0], level(best_rank_[i], g)) : most[0]; });
    block_.template reduce<true>(nothing, most);
    best_most_ = most[0];
    best_bound_ = shape_.planned ? best_most_ * (1.0f - *gap_) : 0.0f;
    best_is_first_ = true;

    most[0] = 0.0f;
    each_rank([&](int i, int g, bool own) { most[0] = own ? fmaxf(most[0], level(rank_[i], g)) : most[0]; });
    block_.template reduce<true>(nothing, most);
    top_ = most[0] * 1.02f + 0.005f;
    each_rank([&](int i, int g, bool) { lambda_[i] = block_.reciprocal(by_speed(top_, g) - rank_[i]); });
    settle<true>();
  }

  // Takes the step; x sums to w again, whatever rounding did.
  LPLB_DEVICE void advance() {
    each_variable([&](int i) {
      x_[i] = fmaxf(x_[i] + step_primal_ * step_x_[i], kTiny);
      y_[i] += step_dual_ * step_y_[i];
    });
    each_rank([&](int i, int, bool) { lambda_[i] = fmaxf(lambda_[i] + step_dual_ * step_lambda_[i], kTiny); });
    normalise();
    top_ += step_primal_ * step_top_;
    settle<false>();
  }

  // From x, y, lambda and a top that may be too low: rank loads, slacks, duals with sum(lambda) = 1 and z, the
  // complementarity, and the certificate. Keeps the best x and the best bound so far.
  //
  // Whatever rounding did to the duals, with lambda >= 0 of (weighted) sum 1 and y_e = min over e's ranks of lambda,
  // sum y w + sum lambda b is a lower bound on the largest rank load: an average of rank loads, each over its speed, in
  // which each expert counts where it counts least. At the optimum some lambda is uniform over a set of ranks and 0
  // elsewhere, and that set shows before lambda has converged: the bound is taken of both.
  //
  // The first time the duals are lambda alone; y goes below its bounds by the mean of lambda.
  template <bool kFirst>
  LPLB_DEVICE void settle() {
    publish(x_);
    each_rank([&](int i, int g, bool own) {
      if (own) shared_.lambda[g] = lambda_[i];
    });
    float largest[1] = {0.0f}, nothing[1] = {0.0f};
    each_rank([&](int i, int, bool own) { largest[0] = own ? fmaxf(largest[0], lambda_[i]) : largest[0]; });
    block_.template reduce<true>(nothing, largest);
    const float in_set = 0.5f * largest[0];
    // Sum of lambda, bound, dual objective (or, the first time, sum of w); size of the set, bound of the set.
    float sums[5] = {}, most[1] = {0.0f};
    float own_lambda[kVariables] = {}, lowest[kVariables] = {};
    each_variable([&](int i) { own_lambda[i] = shared_.lambda[self_[i].rank()]; });
    over_expert(own_lambda, lowest, [](float a, float b) { return fminf(a, b); });
    each_variable([&](int i) {
      const bool counts = active(i) && self_[i].index() == 0;
      sums[1] += counts ? lowest[i] * w_[i] : 0.0f;
      sums[2] += counts ? (kFirst ? w_[i] : y_[i] * w_[i]) : 0.0f;
      sums[4] += counts && lowest[i] >= in_set ? w_[i] : 0.0f;
    });
    each_rank([&](int i, int g, bool own) {
      rank_[i] = fixed_[i] + rank_sum(shared_.by_place, g, num_placed_[i]);
      if (own) {
        most[0] = fmaxf(most[0], level(rank_[i], g));
        sums[0] += by_speed(lambda_[i], g);
        sums[1] += lambda_[i] * fixed_[i];
        if (!kFirst) sums[2] += lambda_[i] * fixed_[i];
        sums[3] += lambda_[i] >= in_set ? by_speed(1.0f, g) : 0.0f;
        sums[4] += lambda_[i] >= in_set ? fixed_[i] : 0.0f;
      }
    });
    block_.template reduce<true>(sums, most);
    const float normaliser = block_.reciprocal(sums[0]);
    best_bound_ = fmaxf(best_bound_, fmaxf(sums[1] * normaliser, sums[4] * block_.reciprocal(sums[3])));
    top_ = fmaxf(top_, most[0] * (1.0f + 1e-6f));
    // What is left between the objectives is sum(x z) + sum(s lambda).
    const float mean = sums[0] * block_.reciprocal(static_cast<float>(num_ranks_));
    const float dual = kFirst ? sums[1] - mean * sums[2] : sums[2];
    complementarity_ = fmaxf(top_ - dual * normaliser, kTiny);
    each_variable([&](int i) {
      if (kFirst) y_[i] = lowest[i] - mean;
      z_[i] = fmaxf((own_lambda[i] - y_[i]) * normaliser, kTiny);
      y_[i] *= normaliser;
    });
    each_rank([&](int i, int g, bool) {
      lambda_[i] *= normaliser;
      slack_[i] = fmaxf(by_speed(top_, g) - rank_[i], kTinySlack);
    });
    const bool better = most[0] < best_most_;
    best_most_ = better ? most[0] : best_most_;
    best_is_first_ = best_is_first_ && !better;
    each_variable([&](int i) { best_x_[i] = better ? x_[i] : best_x_[i]; });
    each_rank([&](int i, int, bool) { best_rank_[i] = better ? rank_[i] : best_rank_[i]; });
  }

  // Assembles K and hands it to the block; and the right side of the predictor, which aims at complementarity zero.
  LPLB_DEVICE void factorise() {
    const int entries = packed(num_ranks_, 0);
    for (int i = thread_; i < entries; i += Block::kThreads) shared_.matrix[i] = 0.0f;
    each_variable([&](int i) { d_[i] = x_[i] * block_.reciprocal(z_[i]); });
    expert_sums(d_, inverse_h_);
    each_variable([&](int i) {
      inverse_h_[i] = block_.reciprocal(inverse_h_[i]);
      q_[i] = -x_[i];  // sums to -w over each expert
      sum_q_[i] = -w_[i];
      if (active(i)) shared_.by_place[place_[i]] = d_[i] * w_[i] * inverse_h_[i] - x_[i];
    });
    if constexpr (Block::kPairs) {
      const float weight = d_[0] * block_.sibling(d_[0]) * inverse_h_[0];
      if (active(0)) shared_.weight[place_[0]] = weight;
    } else {
      each_variable([&](int i) {
        if (active(i)) shared_.weight[variable(i)] = d_[i] * sqrtf(inverse_h_[i]);
      });
    }
    block_.sync();
    add_weights();
    each_rank([&](int i, int g, bool own) {
      const float right_side = rank_sum(shared_.by_place, g, num_placed_[i]) - slack_[i];
      if (own) {
        shared_.excess[g] = slack_[i] * block_.reciprocal(lambda_[i]);
        shared_.right_side[g] = right_side;
      }
    });
    block_.sync();
    block_.factorise(shared_.matrix, shared_.excess, num_ranks_, shared_.speed);
  }
  // Adds up K below its diagonal, row by row.
  LPLB_DEVICE void add_weights() const {
    if constexpr (Block::kPairs) {
      each_rank([&](int i, int g, bool own) {
        float* row = shared_.matrix + packed(g, 0);
        for (int p = g * shared_.stride; p < g * shared_.stride + num_placed_[i]; p += 4) {
          const auto weight = block_.load4(shared_.weight + p);
          int other[4];
          float entry[4];
          LPLB_UNROLL
          for (int k = 0; k < 4; ++k) {
            other[k] = shared_.at_place[p + k];
            entry[k] = own && other[k] < g ? row[other[k]] : 0.0f;
          }
          LPLB_UNROLL
          for (int k = 0; k < 4; ++k) {
            LPLB_UNROLL
            for (int m = 0; m < 4; ++m) entry[k] -= other[m] == other[k] ? weight.v[m] : 0.0f;
          }
          LPLB_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (own && other[k] < g) row[other[k]] = entry[k];
          }
        }
      });
    } else {
      // A few threads share a row. The siblings of one variable are on different ranks: no two meet in one entry.
      constexpr int kLanes = Block::kLanes;
      const int lane = thread_ % kLanes;
      for (int g = thread_ / kLanes; g < num_ranks_; g += Block::kThreads / kLanes) {
        float* row = shared_.matrix + packed(g, 0);
        const int begin = g * shared_.stride, end = begin + shared_.num_placed[g];
        for (int p = begin; p < end; ++p) {
          const int v = shared_.at_place[p];
          const Variable self = shared_.variable[v];
          const float own = shared_.weight[v];
          const int last = v - self.index() + self.last();
          LPLB_UNROLL_BY(2)
          for (int u = v - self.index() + lane; u <= last; u += kLanes) {
            const int other = shared_.variable[u].rank();
            if (other < g) row[other] -= own * shared_.weight[u];
          }
          block_.sync_lanes();
        }
      }
    }
  }

  // dlambda and dT of the right side, then dx, dy, dz and ds.
  LPLB_DEVICE void direction() {
    block_.apply(shared_.right_side, num_ranks_, shared_.step);
    block_.sync();
    float own[kVariables], weighted[kVariables] = {};
    each_variable([&](int i) {
      own[i] = shared_.step[self_[i].rank()];
      weighted[i] = d_[i] * own[i];
    });
    expert_sums(weighted, weighted);
    each_variable([&](int i) {
      step_y_[i] = (weighted[i] - sum_q_[i]) * inverse_h_[i];
      step_z_[i] = own[i] - step_y_[i];
      step_x_[i] = q_[i] - d_[i] * step_z_[i];
    });
    publish(step_x_);
    block_.sync();
    step_top_ = shared_.step[num_ranks_];
    each_rank([&](int i, int g, bool) {
      step_lambda_[i] = shared_.step[g];
      step_slack_[i] = by_speed(step_top_, g) - rank_sum(shared_.by_place, g, num_placed_[i]);
    });
  }

  // Longest steps that keep the primal (x, s) and the dual (z, lambda) nonnegative, at most 1; and sum(dx z + ds
  // lambda), sum(x dz + s dlambda) and sum(dx dz + ds dlambda) where there is room for them.
  template <int kSums>
  LPLB_DEVICE void step_lengths(float (&longest)[2], float (&sums)[kSums]) {
    longest[0] = longest[1] = 1.0f;
    const auto visit = [&](bool own, float primal, float step_primal, float dual, float step_dual) {
      const float to_zero[2] = {-primal * block_.reciprocal(step_primal), -dual * block_.reciprocal(step_dual)};
      if (own && step_primal < 0.0f) longest[0] = fminf(longest[0], to_zero[0]);
      if (own && step_dual < 0.0f) longest[1] = fminf(longest[1], to_zero[1]);
      if constexpr (kSums == 3) {
        sums[0] += own ? step_primal * dual : 0.0f;
        sums[1] += own ? primal * step_dual : 0.0f;
        sums[2] += own ? step_primal * step_dual : 0.0f;
      }
    };
    each_variable([&](int i) { visit(active(i), x_[i], step_x_[i], z_[i], step_z_[i]); });
    each_rank([&](int i, int, bool own) { visit(own, slack_[i], step_slack_[i], lambda_[i], step_lambda_[i]); });
    block_.template reduce<false>(sums, longest);
  }

  LPLB_DEVICE bool predict_and_correct() {
    float longest[2], sums[3] = {}, none[1] = {};
    direction();
    step_lengths(longest, sums);
    const float left = complementarity_ + longest[0] * sums[0] + longest[1] * sums[1] +
                       longest[0] * longest[1] * sums[2];  // complementarity after the predictor
    if (!std::isfinite(left)) return false;
    const float ratio = left > 0.0f ? left * block_.reciprocal(complementarity_) : 0.0f;
    const float target =
        ratio * ratio * ratio * complementarity_ * block_.reciprocal(static_cast<float>(num_variables_ + num_ranks_));

    each_variable([&](int i) { q_[i] = (target - step_x_[i] * step_z_[i]) * block_.reciprocal(z_[i]) - x_[i]; });
    expert_sums(q_, sum_q_);
    each_variable([&](int i) {
      if (active(i)) shared_.by_place[place_[i]] = q_[i] - d_[i] * sum_q_[i] * inverse_h_[i];
    });
    block_.sync();
    each_rank([&](int i, int g, bool own) {
      const float right_side = (target - step_slack_[i] * step_lambda_[i]) * block_.reciprocal(lambda_[i]) - slack_[i] +
                               rank_sum(shared_.by_place, g, num_placed_[i]);
      if (own) shared_.right_side[g] = right_side;
    });
    block_.sync();
    direction();
    step_lengths(longest, none);
    step_primal_ = fminf(1.0f, kStepShare * longest[0]);
    step_dual_ = fminf(1.0f, kStepShare * longest[1]);
    return true;
  }

  LPLB_DEVICE void finish(int iterations) {
    const float tokens = static_cast<float>(*shared_.total) / static_cast<float>(num_ranks_);
    each_variable([&](int i) {
      if (active(i)) fraction_[result_[i]] = idle_[i] ? 0.0f : best_x_[i] * block_.reciprocal(w_[i]);
    });
    each_rank([&](int i, int g, bool own) {
      if (own) rank_load_[g] = best_rank_[i] * tokens;
    });
    const float gap = fmaxf((best_most_ - best_bound_) / best_most_, 0.0f);
    report(gap, iterations,
           gap <= shape_.tol                   ? kConverged
           : best_is_first_ && !shape_.planned ? kEvenSplit
                                               : kMaxIterations);
  }
  // Everything stays at home; or there is nothing at all.
  LPLB_DEVICE void finish_unsolved() {
    const int32_t* load = at_home_ ? shared_.home_load : shared_.fixed_load;
    each_rank([&](int, int g, bool own) {
      if (own) rank_load_[g] = static_cast<float>(load[g]);
    });
    const float most = most_of(load), mean = static_cast<float>(*shared_.total) / static_cast<float>(num_ranks_);
    report(at_home_ ? fmaxf((most - mean) / most, 0.0f) : 0.0f, 0, num_variables_ == 0 ? kSkipped : kConverged);
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
  int thread_, num_ranks_, num_slots_, first_slot_, num_variables_ = 0;
  const int32_t *load_, *log2phy_;
  const float* speed_ = nullptr;  // of the group
  float *fraction_, *rank_load_, *gap_;
  int32_t *iterations_, *status_;

  // Of the variables this thread owns.
  Variable self_[kVariables];
  int place_[kVariables], result_[kVariables];
  bool idle_[kVariables];
  float w_[kVariables], x_[kVariables] = {}, y_[kVariables], z_[kVariables], best_x_[kVariables];
  float d_[kVariables] = {}, inverse_h_[kVariables] = {}, q_[kVariables] = {}, sum_q_[kVariables] = {};
  float step_x_[kVariables], step_y_[kVariables], step_z_[kVariables];
  // Of the ranks this thread owns.
  int num_placed_[kRanks];
  float fixed_[kRanks], rank_[kRanks], slack_[kRanks], lambda_[kRanks], best_rank_[kRanks];
  float step_slack_[kRanks], step_lambda_[kRanks];
  // Known to all threads alike.
  float scale_, top_, complementarity_, best_most_, best_bound_;
  float step_top_, step_primal_, step_dual_;
  bool best_is_first_, at_home_ = false;
};

}  // namespace lplb
