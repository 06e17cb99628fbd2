// The balancing linear program of one group whose experts have two replicas at most, by edge balance.
//
// Experts that can move between the ranks i and j, in either direction, are one edge {i, j}: its capacity is the sum of
// their loads, and its state how much of that rank i carries; rank j carries the rest. A step equalises the loads of
// both ends as far as the capacity lets it, and edges of one colour of an edge colouring touch no common rank, so that
// they step at once (edge balance: Lyu, proposed for DeepSeek's LPLB, Aug 2026). That is coordinate descent on the sum
// of the squared rank loads, whose minimiser also has the smallest largest load. A step that goes further than to
// equality, by a factor omega < 2, still never raises the larger of the two loads, and takes far fewer sweeps where
// load has to travel far: projected successive over-relaxation (SOR). It starts from the even split, so that no answer
// is worse.
//
// All of it is done in integers, with all loads of a group scaled by one power of two. So the order of sums does not
// show, and CPU, CUDA and the pure JAX in jax_lplb/_edge_balance.py give the same bits. A product or quotient of floats
// here stands alone, for no compiler to contract.
//
// Certificate: of what a set of ranks carries, at most their shares of the edges that leave the set can be moved away,
// so that one of them always carries at least (sum of loads - sum of those shares) / (number of ranks). The set is that
// of the ranks within a little of the largest load.
//
// Where ranks have speeds, loads are compared and equalised as load / speed. What a step moves is then the difference
// of two products, each rounded to an integer by itself; a step that goes beyond equality may raise the larger of two
// loads / speeds for a while, if the other rank is the slower one.
//
// One text for both platforms. A Block runs the passes over experts, with many threads that share memory (CUDA) or with
// one (CPU). A Warp runs the sweeps: one lane for each rank, whose values are a Word: a register of the lane (CUDA), or
// an array over all lanes (CPU). Words are unsigned, so that contents whose loads sum to more than fits wrap.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "device.h"
#include "solve.h"

namespace lplb {

// What the passes over experts and the sweeps hand each other.
struct alignas(16) EdgeShared {
  uint32_t fixed[kMaxEdgeRanks];                       // tokens that stay on a rank
  uint32_t neighbours[kMaxEdgeRanks];                  // bit masks of ranks
  uint32_t at_home[kMaxEdgeRanks][kMaxEdgeRanks + 1];  // tokens that may move, by home and copy
  uint32_t to_move[kMaxEdgeRanks][kMaxEdgeRanks + 1];  // of those, scaled by 2**shift
  int shift;
  int32_t status;
};

// Words of shared memory beside it: for each slot of the group the load of the expert that has its copy there, and then
// for each 1 + that expert's home.
inline size_t edge_slot_words(const SolveShape& shape) {
  return 2 * static_cast<size_t>(shape.group_size) * shape.slots_per_rank;
}

// An expert as the passes see it.
struct EdgeExpert {
  uint32_t load;
  int32_t home_slot;  // as log2phy has them
  int32_t copy_slot;
};

// The step that equalises the ends of an edge is half their difference d; over-relaxed by omega = 2 - 2**(1 - s), it is
// d - (d >> s). A large omega pays where load has to travel far, and costs sweeps elsewhere: so it grows as a problem
// turns out to be of the former kind. The numbers are the best of those measured over rings, cube, hypercube and tori.
LPLB_DEVICE int relaxation_shift(int sweep) {
  return sweep < 2 ? 1 : sweep < 6 ? 2 - sweep % 2 : sweep < 16 ? 2 : sweep < 40 ? 3 : 4;
}

// The certificate's set holds the ranks within this share of the largest load. Once loads have settled, tol certifies
// any of them; before that 2 * tol often does, and so they take turns. The bounds keep the set from being a single rank
// at tol = 0, and its sums within 32 bits.
LPLB_DEVICE float set_width(float tol, int sweep) {
  return fminf(fmaxf(sweep % 4 == 0 ? 2.0f * tol : tol, 0x1p-20f), 0x1p-4f);
}

LPLB_DEVICE float tokens_of(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word)); }
// And back, less a fraction; of what no word holds, the nearest that float32 has.
LPLB_DEVICE uint32_t whole_tokens(float tokens) {
  return static_cast<uint32_t>(static_cast<int32_t>(fminf(fmaxf(tokens, -0x1p31f), 0x1.fffffep30f)));
}

// How the loads of ranks compare where these are equally fast. A level is a load, or of a fast rank less than its load.
template <class Warp>
struct EqualSpeeds {
  using Word = typename Warp::Word;
  static constexpr bool kNeverRises = true;  // the largest level, in a sweep
  const Warp& warp;

  LPLB_DEVICE EqualSpeeds(const Warp& warp, const SolveShape&, const float*) : warp(warp) {}
  LPLB_DEVICE const Word& level(const Word& load) const { return load; }
  LPLB_DEVICE float tokens(uint32_t level) const { return tokens_of(level); }
  LPLB_DEVICE uint32_t less(uint32_t level, float share) const {
    return level - static_cast<uint32_t>(static_cast<int32_t>(tokens_of(level) * share));
  }
  // What a rank carries at a level.
  LPLB_DEVICE uint32_t load_at(uint32_t level) const { return level; }
  // How much more that is than the loads.
  LPLB_DEVICE Word short_of(uint32_t full, const Word& load) const { return full - load; }
  // Of all ranks of a set at a level.
  LPLB_DEVICE float whole(uint32_t set, uint32_t level, uint32_t) const {
    return tokens_of(level) * static_cast<float>(warp.count(set));
  }
  // The difference of these between the ends of an edge is twice what equalises them.
  LPLB_DEVICE const Word& weighed(int, const Word& load) const { return load; }
};

// And where they have speeds. A level is the bits of a float, which order as the float does.
template <class Warp>
struct BySpeed {
  using Word = typename Warp::Word;
  static constexpr bool kNeverRises = false;
  const Warp& warp;
  Word speed, inverse, weight[Warp::kColours];  // bits

  LPLB_DEVICE BySpeed(const Warp& warp, const SolveShape& shape, const float* speeds) : warp(warp) {
    const float* const inverses = inverses_of_group(shape, speeds);
    warp.each_rank(speed, [&](int g, uint32_t& word) { word = bits_of(g < shape.group_size ? speeds[g] : 1.0f); });
    warp.each_rank(inverse, [&](int g, uint32_t& word) { word = bits_of(g < shape.group_size ? inverses[g] : 1.0f); });
    LPLB_UNROLL
    for (int c = 0; c < warp.num_colours(); ++c) {
      weight[c] = warp.zip(speed, warp.partner(c, speed), [&](uint32_t own, uint32_t other) {
        return bits_of(warp.divide(2.0f * float_from_bits(other), float_from_bits(own) + float_from_bits(other)));
      });
    }
  }
  LPLB_DEVICE Word level(const Word& load) const {
    return warp.zip(load, inverse,
                    [](uint32_t word, uint32_t factor) { return bits_of(tokens_of(word) * float_from_bits(factor)); });
  }
  LPLB_DEVICE float tokens(uint32_t level) const { return float_from_bits(level); }
  LPLB_DEVICE uint32_t less(uint32_t level, float share) const {
    return bits_of(float_from_bits(level) * (1.0f - share));
  }
  LPLB_DEVICE Word load_at(uint32_t level) const {
    return warp.zip(speed, speed, [level](uint32_t own, uint32_t) {
      return whole_tokens(float_from_bits(level) * float_from_bits(own));
    });
  }
  LPLB_DEVICE Word short_of(const Word& full, const Word& load) const {
    return warp.zip(full, load, [](uint32_t more, uint32_t less) {
      return static_cast<int32_t>(more) > static_cast<int32_t>(less) ? more - less : 0;  // less only by rounding
    });
  }
  LPLB_DEVICE float whole(uint32_t set, uint32_t, const Word& full) const {
    return static_cast<float>(warp.sum(set, full));
  }
  LPLB_DEVICE Word weighed(int colour, const Word& load) const {
    return warp.zip(load, weight[colour], [](uint32_t word, uint32_t factor) {
      return whole_tokens(tokens_of(word) * float_from_bits(factor));
    });
  }
};

// One group: clear() and, after a barrier, collect() for each expert; after another one solve() by one warp; after a
// third one write() for each expert.
//
// Block: kThreads; thread(); zero(), add(), largest() on shared memory; add_by_rank(); read_pair(), write_pair(),
// divide().
// Warp: Word; kColours, at least num_colours(); kBySpeed; each_rank(), each_edge(), zip(); partner(), sign(),
// shift_right(), clamp(); largest(), sum(), at_least(), count(), leaving(), divide().
class EdgeBalance {
 public:
  LPLB_DEVICE EdgeBalance(const SolveShape& shape, const SolveOperands& in, const SolveResults& out, int batch,
                          int group, EdgeShared& shared, uint32_t* by_slot)
      : shape_(shape), shared_(shared) {
    const int64_t experts = shape.num_experts, cells = experts * 2;
    load_ = in.load + batch * experts;
    log2phy_ = in.log2phy + batch * cells;
    fraction_ = out.fraction + batch * cells;
    const int64_t which = static_cast<int64_t>(batch) * shape.num_groups + group;
    rank_load_ = out.rank_load + which * shape.group_size;
    gap_ = out.gap + which;
    iterations_ = out.iterations + which;
    status_ = out.status + which;
    speed_ = speeds_of_group(shape, in.speed, batch, group);
    num_slots_ = shape.group_size * shape.slots_per_rank;
    first_slot_ = group * num_slots_;
    copy_load_ = by_slot;
    copy_home_ = by_slot + num_slots_;
  }

  template <class Block>
  LPLB_DEVICE EdgeExpert read(const Block& block, int e) const {
    EdgeExpert expert = {0, -1, -1};
    if (e < shape_.num_experts) {
      block.read_pair(log2phy_ + 2 * static_cast<int64_t>(e), &expert.home_slot, &expert.copy_slot);
      const int32_t load = load_[e];
      expert.load = load > 0 ? load : 0;
    }
    return expert;
  }

  // neighbours_of(rank): the bit mask of the ranks at the other ends of its edges.
  template <class Block, class NeighboursOf>
  LPLB_DEVICE void clear(const Block& block, NeighboursOf neighbours_of) const {
    block.zero(&shared_.at_home[0][0], kMaxEdgeRanks * (kMaxEdgeRanks + 1));
    block.zero(copy_load_, 2 * num_slots_);  // and copy_home_
    LPLB_UNROLL_BY(1)
    for (int g = block.thread(); g < kMaxEdgeRanks; g += Block::kThreads) {
      shared_.neighbours[g] = neighbours_of(g);
      shared_.fixed[g] = 0;
    }
  }

  // Adds an expert up; true where it may move. All threads come here together.
  template <class Block>
  LPLB_DEVICE bool collect(const Block& block, const EdgeExpert& expert) const {
    const int home = rank_of(expert.home_slot), copy = rank_of(expert.copy_slot);
    const bool moves = may_move(home, copy);
    block.add_by_rank(shared_.fixed, home, home >= 0 && !moves, expert.load);
    if (moves) {
      const int slot = expert.copy_slot - first_slot_;
      block.add(&shared_.at_home[home][copy], expert.load);
      block.add(&copy_load_[slot], expert.load);
      block.largest(&copy_home_[slot], static_cast<uint32_t>(home) + 1);
    }
    return moves;
  }

  // What solve() found, for report().
  template <class Word>
  struct Outcome {
    Word load;
    float missing, whole;  // the certified gap is their quotient
    int shift, sweeps;
    int32_t status;
  };

  // `replicated`: whether any expert of the group may move.
  template <class Warp>
  LPLB_DEVICE Outcome<typename Warp::Word> solve(const Warp& warp, bool replicated) const {
    using Word = typename Warp::Word;
    constexpr int kColours = Warp::kColours;
    const std::conditional_t<Warp::kBySpeed, BySpeed<Warp>, EqualSpeeds<Warp>> speeds(warp, shape_, speed_);
    const int colours = warp.num_colours();
    Word load, at_home[kColours], share[kColours];
    warp.each_rank(load, [&](int g, uint32_t& word) { word = shared_.fixed[g]; });
    LPLB_UNROLL
    for (int c = 0; c < colours; ++c) {
      warp.each_edge(c, at_home[c], [&](int g, int other, uint32_t& word) { word = shared_.at_home[g][other]; });
      load = load + at_home[c];
    }
    Outcome<Word> outcome = {load, 0.0f, 1.0f, 0, 0, replicated ? kConverged : kSkipped};
    const uint32_t total = warp.sum(kAllRanks, load);
    if (replicated && total > 0) {
      outcome.shift = scaling_bits(total);
      outcome.load = load << outcome.shift;
      LPLB_UNROLL
      for (int c = 0; c < colours; ++c) at_home[c] = at_home[c] << outcome.shift;
      if (!even_enough_at_home(speeds, total, outcome)) balance(speeds, at_home, share, outcome);
    }
    if (outcome.status == kSkipped || total == 0) {
      LPLB_UNROLL
      for (int c = 0; c < colours; ++c) share[c] = at_home[c];
    }
    LPLB_UNROLL
    for (int c = 0; c < colours; ++c) {
      Word moved = at_home[c] - share[c];
      warp.each_edge(c, moved, [&](int g, int other, uint32_t& word) { shared_.to_move[g][other] = word; });
    }
    warp.each_rank(load, [&](int g, uint32_t&) {
      if (g == 0) {
        shared_.shift = outcome.shift;
        shared_.status = outcome.status;
      }
    });
    return outcome;
  }

  // Rank loads, gap, sweeps and status; by the warp that solved, when others need not wait for it.
  template <class Warp, class Word>
  LPLB_DEVICE void report(const Warp& warp, Outcome<Word>& outcome) const {
    const float gap = warp.divide(outcome.missing, outcome.whole);
    warp.each_rank(outcome.load, [&](int g, uint32_t& word) {
      if (g < shape_.group_size) rank_load_[g] = tokens_of(word) * power_of_two(-outcome.shift);
      if (g == 0) {
        *gap_ = outcome.status == kConverged ? fminf(gap, shape_.tol) : gap;
        *iterations_ = outcome.sweeps;
        *status_ = outcome.status;
      }
    });
  }

  // The fractions of expert e.
  template <class Block>
  LPLB_DEVICE void write(const Block& block, int e, const EdgeExpert& expert) const {
    if (e >= shape_.num_experts) return;
    float* row = fraction_ + 2 * static_cast<int64_t>(e);
    const int home = rank_of(expert.home_slot), copy = rank_of(expert.copy_slot);
    if (home < 0) {
      // Nothing for an expert without a slot; one of another group is left to that group.
      const bool nowhere = expert.home_slot < 0 || expert.home_slot >= shape_.num_physical;
      if (first_slot_ == 0 && nowhere) block.write_pair(row, 0.0f, 0.0f);
    } else if (expert.load == 0) {
      block.write_pair(row, 0.0f, 0.0f);  // as assign reads it, the even split
    } else if (shared_.status == kSkipped || !may_move(home, copy)) {
      block.write_pair(row, 1.0f, 0.0f);
    } else {
      const uint32_t load = expert.load << shared_.shift, moved = to_move(expert, home, copy);
      const float fraction = block.divide(tokens_of(moved), tokens_of(load));
      block.write_pair(row, 1.0f - fraction, fraction);
    }
  }

 private:
  static constexpr uint32_t kAllRanks = 0xffffffffu;

  // The rank within the group, or -1 where the slot is not of the group. Contents may be traced, hence anything.
  LPLB_DEVICE int rank_of(int32_t slot) const {
    const uint32_t local = static_cast<uint32_t>(slot) - static_cast<uint32_t>(first_slot_);
    return local < static_cast<uint32_t>(num_slots_)
               ? static_cast<int>(static_cast<uint64_t>(local) * shape_.rank_of_slot >> kRankShift)
               : -1;
  }
  LPLB_DEVICE bool may_move(int home, int copy) const {
    return home >= 0 && copy >= 0 && (shared_.neighbours[home] >> copy & 1) != 0;
  }

  // Scaled load that the expert sends to its copy. What an edge moves, its experts send in the order of their slots, so
  // that all but one of them stay whole.
  LPLB_DEVICE uint32_t to_move(const EdgeExpert& expert, int home, int copy) const {
    uint32_t left = shared_.to_move[home][copy];
    if (static_cast<int32_t>(left) <= 0) return 0;
    const uint32_t load = expert.load << shared_.shift, all = shared_.at_home[home][copy] << shared_.shift;
    if (left == all) return load;
    if (load != all) {
      const int slot = expert.copy_slot - first_slot_;
      const uint32_t same = copy_home_[slot];
      uint32_t before = 0;
      for (int p = copy * shape_.slots_per_rank; p < slot; ++p) {
        before += copy_home_[p] == same ? copy_load_[p] : 0;
      }
      left -= before << shared_.shift;
    }
    const int32_t moved = static_cast<int32_t>(left);
    return moved <= 0 ? 0 : moved < static_cast<int32_t>(load) ? left : load;
  }

  // Whether nothing needs to move: the largest level at home is within `threshold` of the mean.
  template <class Speeds, class Word>
  LPLB_DEVICE bool even_enough_at_home(const Speeds& speeds, uint32_t total, Outcome<Word>& outcome) const {
    if (shape_.threshold <= 0.0f) return false;
    const uint32_t most = speeds.warp.largest(speeds.level(outcome.load));
    const float whole = speeds.tokens(most) * static_cast<float>(shape_.group_size);
    const float mean = tokens_of(total << outcome.shift);
    if (whole > shape_.threshold * mean) return false;
    outcome.status = kSkipped;
    outcome.missing = fmaxf(whole - mean, 0.0f);
    outcome.whole = whole;
    return true;
  }

  // Sweeps from the even split until the certified gap is at most tol.
  template <class Speeds, class Word, int kColours>
  LPLB_DEVICE void balance(const Speeds& speeds, const Word (&at_home)[kColours], Word (&share)[kColours],
                           Outcome<Word>& outcome) const {
    const auto& warp = speeds.warp;
    const int colours = warp.num_colours();
    Word& load = outcome.load;
    const Word home_load = load;
    Word capacity[kColours];
    LPLB_UNROLL
    for (int c = 0; c < colours; ++c) capacity[c] = at_home[c] + warp.partner(c, at_home[c]);
    const auto split_evenly = [&] {
      load = home_load;
      LPLB_UNROLL
      for (int c = 0; c < colours; ++c) {
        share[c] = (capacity[c] + (warp.sign(c) >> 31)) >> 1;  // the odd unit goes to the higher rank
        load = load + share[c] - at_home[c];
      }
    };
    split_evenly();
    const uint32_t even_most = warp.largest(speeds.level(load));
    outcome.missing = 1.0f;
    for (int sweeps = 0;; sweeps += 2) {
      outcome.sweeps = sweeps;
      const Word& level = speeds.level(load);
      const uint32_t most = warp.largest(level);
      const uint32_t set = warp.at_least(level, speeds.less(most, set_width(shape_.tol, sweeps)));
      const auto full = speeds.load_at(most);
      Word short_of = speeds.short_of(full, load);
      LPLB_UNROLL
      for (int c = 0; c < colours; ++c) short_of = short_of + warp.leaving(c, set, share[c]);
      const float missing = static_cast<float>(warp.sum(set, short_of));
      const float whole = speeds.whole(set, most, full);
      // Where the largest level never rises, an earlier gap still holds.
      if (!Speeds::kNeverRises || missing * outcome.whole < outcome.missing * whole) {
        outcome.missing = missing;
        outcome.whole = whole;
      }
      if (missing <= shape_.tol * whole) return;
      if (sweeps >= shape_.max_iterations) {
        const bool better = static_cast<int32_t>(most) < static_cast<int32_t>(even_most);
        outcome.status = better ? kMaxIterations : kEvenSplit;
        if (!better) split_evenly();
        return;
      }
      sweep(speeds, capacity, relaxation_shift(sweeps), share, load);
      sweep(speeds, capacity, relaxation_shift(sweeps + 1), share, load);
    }
  }

  template <class Speeds, class Word, int kColours>
  LPLB_DEVICE void sweep(const Speeds& speeds, const Word (&capacity)[kColours], int shift, Word (&share)[kColours],
                         Word& load) const {
    const auto& warp = speeds.warp;
    LPLB_UNROLL
    for (int c = 0; c < warp.num_colours(); ++c) {
      // Of the edge's lower rank, so that both ends round alike.
      const Word& here = speeds.weighed(c, load);
      const Word difference = warp.sign(c) * (here - warp.partner(c, here));
      const Word step = difference - warp.shift_right(difference, shift);
      const Word next = warp.clamp(share[c] - warp.sign(c) * step, capacity[c]);
      load = load + next - share[c];
      share[c] = next;
    }
  }

  const SolveShape& shape_;
  EdgeShared& shared_;
  uint32_t* copy_load_;
  uint32_t* copy_home_;
  const int32_t* load_;
  const int32_t* log2phy_;
  float* fraction_;
  float* rank_load_;
  float* gap_;
  int32_t* iterations_;
  int32_t* status_;
  const float* speed_;  // of the group
  int num_slots_, first_slot_;
};

}  // namespace lplb
