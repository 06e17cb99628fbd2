// Which experts to copy where, chosen from one batch's load; and the split that comes with it, certified.
//
// Experts have contiguous homes; each rank has free slots beside them. A candidate plan aims at a limit on the rank
// loads: each rank above it, the busiest first or last, gives of its largest expert to a rank with a free slot below
// the limit, again and again, until it is within the limit, too. What it gives mostly fills the other rank up to the
// limit exactly, which wastes no slot: where that is more than the giver has in excess, the giver has room for others'
// copies in its own slots. Which rank receives, and how much, is a candidate's rule:
//
//   kFill         the receiver with the least room that is enough for the excess, or with the most room where none is;
//                 filled up, even if the whole expert goes
//   kFit          likewise, but a whole expert goes only where nothing else is left
//   kMost         the receiver with the most room; a whole expert goes only where it is less than the excess
//
// No one rule and limit is best for all loads, so all of a list are tried side by side, a warp each. The best has the
// lowest largest rank load, where no less than the target counts; then the fewest copies; then a certificate.
//
// The split. A copy that fills a rank up settles it for good, and so does one that takes a rank's excess, no more: each
// rank is settled once at most, and hangs on the rank at the copy's other end, in trees. A tree carries a load that no
// split can change, so that its mean bounds the largest rank load from below; and the copies can make all ranks of a
// tree equal, each carrying what the ranks that hang on it have too little or too much. That proves the split optimal
// for these copies. Where an expert has not as much to give as that asks for, the plan's own split stays, the gap
// tells, and the interior-point method solves (see `planned` in solve.h). A copy that settles no rank has taken all
// that its expert had left, and keeps it.
//
// Where ranks have speeds, limits and the largest rank load are of load / speed. Trees are then not levelled: the plan
// is for its copies, and their split and its certificate are left to the solve.
//
// Integers, scaled by a power of two: CPU, CUDA and the pure JAX in jax_lplb/_plan.py give the same bits. A product of
// floats stands alone, for no compiler to contract.
//
// One text for both platforms. A Warp runs a candidate; a value of each rank is a Word: a few registers of the lanes
// (CUDA), or an array (CPU).
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"
#include "solve.h"

namespace lplb {

constexpr int kMaxCandidates = 16;
constexpr float kCertified = 1e-4f;  // gap at which a candidate counts as certified, whatever the tolerance asked for
enum Rule : uint8_t { kFill = 0, kFit = 1, kMost = 2 };

// Those that are tried are listed in jax_lplb._plan.candidates.
struct Candidate {
  float slack;  // the limit is (1 + slack) times the mean rank load
  Rule rule;
  bool busiest_last;  // of the ranks that give

  // As the custom calls' attributes have them.
  static Candidate make(float slack, int rule) { return {slack, static_cast<Rule>(rule % 4), rule >= 4}; }
};

struct PlanShape {
  SolveShape solve;         // homes and free slots of each rank; log2phy is a result
  int experts_per_rank;     // homes
  uint32_t rank_of_expert;  // see rank_factor
  int max_sends;            // most copies of a rank's experts
  float slack;              // within which the largest rank load is even enough
  int num_candidates;
  Candidate candidates[kMaxCandidates];

  LPLB_INLINE int redundants() const { return solve.slots_per_rank - experts_per_rank; }
  LPLB_INLINE int num_experts() const { return solve.group_size * experts_per_rank; }  // of a group
  LPLB_INLINE int max_copies() const { return solve.group_size * redundants(); }       // of a group
};

struct PlanOperands {
  const int32_t* load;           // [batch, num_experts] tokens
  const int32_t* least;          // [batch] tokens that the plan gives to a copy at the least
  const float* speed = nullptr;  // as of SolveOperands; may be 0, with a large inverse all the same
};

struct PlanResults {
  int32_t* phy2log;    // [batch, num_physical], -1 in free slots
  int32_t* log2phy;    // [batch, num_experts, max_replicas], the home first, then by slot
  SolveResults split;  // status kMaxIterations where the gap is above the tolerance
};

// nullptr where the shape can be planned, else what is wrong with it.
inline const char* check(const PlanShape& s) {
  if (const char* wrong = check(s.solve); wrong != nullptr) return wrong;
  if (s.experts_per_rank < 1 || s.redundants() < 1) return "plan: a rank has at least one home and one free slot";
  if (s.solve.num_groups * s.num_experts() != s.solve.num_experts) return "plan: experts are the ranks' homes";
  if (s.num_candidates < 1 || s.num_candidates > kMaxCandidates) return "plan: 1 to 16 candidates";
  return nullptr;
}

void plan_cpu(const PlanShape& shape, const PlanOperands& in, const PlanResults& out);
#ifdef LPLB_CUDA
// As prepare_solve_cuda.
cudaError_t prepare_plan_cuda();
// A cluster of thread blocks for each group and batch, or one block on devices without clusters.
cudaError_t plan_cuda(cudaStream_t stream, const PlanShape& shape, const PlanOperands& in, const PlanResults& out);
#endif

// Tokens of an expert that a rank takes from its home, and what that settles for good: the receiver, the giver, or,
// where the expert had no more, neither. Experts and ranks are of the group.
enum Settles : uint32_t { kReceiver, kGiver, kNeither };
struct alignas(8) Copy {
  static_assert(kMaxGroupRanks <= 1 << 7 && kMaxGroupSlots <= 1 << 16, "must fit");
  uint32_t tokens;
  uint32_t packed;

  LPLB_INLINE static Copy make(uint32_t tokens, uint32_t expert, int giver, int receiver, Settles settles) {
    return {tokens,
            expert | static_cast<uint32_t>(giver) << 16 | static_cast<uint32_t>(receiver) << 23 | settles << 30};
  }
  LPLB_INLINE int expert() const { return static_cast<int>(packed & 0xffff); }
  LPLB_INLINE int giver() const { return static_cast<int>(packed >> 16 & 0x7f); }
  LPLB_INLINE int receiver() const { return static_cast<int>(packed >> 23 & 0x7f); }
  LPLB_INLINE Settles settles() const { return static_cast<Settles>(packed >> 30); }
};

// A warp's working memory.
struct PlanMemory {
  uint32_t* at_home;  // [experts] tokens that have not been given away; 0 where the expert gives no more
  Copy* copies;       // [2, max_copies] of the best candidate so far, and of the one at work
  uint32_t* tokens;   // [ranks] to work in
  uint32_t* ranks;    // [ranks] to work in
  uint8_t* replicas;  // [experts]

  LPLB_INLINE static size_t experts(const PlanShape& shape) { return (shape.num_experts() + 15) / 16 * 16; }
  LPLB_INLINE static size_t max_copies(const PlanShape& shape) { return (shape.max_copies() + 7) / 8 * 8; }
  LPLB_INLINE static size_t num_ranks(const PlanShape& shape) { return (shape.solve.group_size + 3) / 4 * 4; }
  LPLB_INLINE static size_t bytes(const PlanShape& shape) {
    return experts(shape) * (sizeof(uint32_t) + sizeof(uint8_t)) + 2 * num_ranks(shape) * sizeof(uint32_t) +
           max_copies(shape) * 2 * sizeof(Copy);
  }
  LPLB_INLINE PlanMemory(char* memory, const PlanShape& shape)
      : at_home(reinterpret_cast<uint32_t*>(memory)),
        copies(reinterpret_cast<Copy*>(at_home + experts(shape))),
        tokens(reinterpret_cast<uint32_t*>(copies + 2 * max_copies(shape))),
        ranks(tokens + num_ranks(shape)),
        replicas(reinterpret_cast<uint8_t*>(ranks + num_ranks(shape))) {}
};

// The first of a rank's experts that have most to give.
struct Largest {
  uint32_t tokens;
  int expert;

  // Of experts in their order.
  LPLB_INLINE void take(uint32_t other, int which) {
    expert = other > tokens ? which : expert;
    tokens = other > tokens ? other : tokens;
  }
};

// A rank that may give: its load with all experts at home, and the first of those that have most of it.
struct alignas(16) Giver {
  uint32_t home;
  int rank;
  Largest from;
};

// What a group's candidates start from, in scaled tokens.
struct PlanLoads {
  uint32_t* expert;  // [experts] of the group
  uint32_t* left;    // [experts] as much, for the writing
  uint32_t* home;    // [ranks] with all experts at home
  Largest* largest;  // [ranks]
  Giver* busiest;    // [ranks], the busiest first, the first of those that are as busy
  uint32_t total;
  uint32_t least;  // that the plan gives to a copy; at least 1
  // [ranks], where they have speeds.
  const float* speed = nullptr;
  const float* inverse = nullptr;

  // Load / speed.
  template <bool kBySpeed>
  LPLB_DEVICE uint32_t level(uint32_t load, int g) const {
    return kBySpeed ? static_cast<uint32_t>(fminf(static_cast<float>(load) * inverse[g], 0x1p31f)) : load;
  }
  // What a rank may carry at a limit; less than `load` where that is above the limit.
  template <bool kBySpeed>
  LPLB_DEVICE uint32_t limit_of(uint32_t limit, uint32_t load, int g) const {
    if constexpr (!kBySpeed) return limit;
    const float allowed = fminf(static_cast<float>(limit) * speed[g], 0x1.fffffep30f);
    const uint32_t tokens = static_cast<uint32_t>(allowed);
    return tokens >= load && level<kBySpeed>(load, g) > limit ? load - 1 : tokens;
  }
};

// Keys tell which rank is preferred: the largest has the highest order, then the largest value but for its last bits,
// then the first rank. None is 0.
constexpr uint32_t kRankBits = 127, kValueBits = (1u << 30) - 1 - kRankBits, kLastBits = 255;
static_assert(kMaxGroupRanks <= kRankBits + 1, "must fit");
enum Order : uint32_t { kMostRoom = 1u << 30, kMostFilled = 2u << 30, kEnough = 3u << 30 };
LPLB_INLINE uint32_t room_key(Order order, uint32_t value, int rank) {
  return order | (value >> 1 & kValueBits) | (kRankBits - static_cast<uint32_t>(rank));
}
// What a rank may still receive, and its keys where the most is looked for, and where the least that is enough.
struct Room {
  uint32_t tokens, most, enough;

  LPLB_INLINE Room(uint32_t room, int rank, uint32_t least)
      : tokens(room >= least ? room : 0),
        most(room >= least ? room_key(kMostRoom, room, rank) : 0),
        enough(room_key(kEnough, ~room, rank)) {}
};
LPLB_INLINE int rank_of_key(uint32_t key) { return static_cast<int>(kRankBits - (key & kRankBits)); }

// How good a candidate is: the smaller the better, the first number first.
struct PlanScore {
  uint32_t rated = ~0u;    // the largest rank load, but no less than the target
  uint32_t copies = ~0u;   // twice their number, and one more where there is no certificate
  uint32_t largest = ~0u;  // rank load
  uint32_t bound = 0;      // what the busiest rank has at the least, with these copies
  int candidate = 0;

  LPLB_INLINE int num_copies() const { return copies == ~0u ? 0 : static_cast<int>(copies / 2); }
  LPLB_INLINE bool better_than(const PlanScore& other) const {
    if (rated != other.rated) return rated < other.rated;
    if (copies != other.copies) return copies < other.copies;
    return largest < other.largest;  // of equal ones the first
  }
};

LPLB_INLINE uint32_t plan_limit(uint32_t mean, float slack) {
  const float more = static_cast<float>(mean) * slack;
  const uint32_t limit = mean + static_cast<uint32_t>(more < 0x1p31f ? more : 0x1p31f);
  return limit < INT32_MAX ? limit : INT32_MAX;  // no load is more
}

// How far the largest rank load may be from the best there is.
LPLB_INLINE float plan_gap(uint32_t largest, uint32_t bound) {
  return largest > bound ? static_cast<float>(largest - bound) / static_cast<float>(largest) : 0.0f;
}

template <class Warp, bool kBySpeed>
class Planner {
 public:
  using Word = typename Warp::Word;

  LPLB_DEVICE Planner(const Warp& warp, const PlanShape& shape, const PlanLoads& loads, const PlanMemory& memory)
      : warp_(warp),
        shape_(shape),
        loads_(loads),
        memory_(memory),
        room_(static_cast<int>(PlanMemory::max_copies(shape))) {}

  // Tries one candidate, and keeps it where it is better than those before.
  LPLB_DEVICE void attempt(int number) {
    const Candidate& candidate = shape_.candidates[number];
    const uint32_t mean = loads_.total / static_cast<uint32_t>(shape_.solve.group_size);
    const uint32_t even_enough = plan_limit(mean, shape_.slack) | kLastBits;  // as far as keys tell
    const uint32_t given = give(plan_limit(mean, candidate.slack), candidate);
    // With more copies than a candidate that is even enough, there is nothing to win.
    if (given <= even_enough) warp_.announce(num_copies_);
    if (warp_.any(num_copies_ > warp_.fewest())) return;
    PlanScore score;
    score.candidate = number;
    score.largest = given;
    if constexpr (!kBySpeed) {
      const uint32_t levelled = level(mean, &score.bound);
      score.largest = levelled <= given ? levelled : given;
      if (levelled <= given) take_levels();
    }
    score.rated = score.largest > even_enough ? score.largest : even_enough;
    const bool open = plan_gap(score.largest, score.bound) > kCertified;
    score.copies = 2 * static_cast<uint32_t>(num_copies_) + (open ? 1 : 0);
    if (!score.better_than(best_)) return;
    best_ = score;
    at_work_ = room_ - at_work_;
  }
  LPLB_DEVICE const PlanScore& best() const { return best_; }
  LPLB_DEVICE const Copy* copies_of_best() const { return memory_.copies + (room_ - at_work_); }

 private:
  LPLB_DEVICE Copy* copies() const { return memory_.copies + at_work_; }

  // ---- The plan ----------------------------------------------------------------------------------------------------

  // Makes a list of copies, and returns the largest rank load then, or load / speed.
  LPLB_DEVICE uint32_t give(uint32_t limit, const Candidate& candidate) {
    const uint32_t redundants = warp_.keep(shape_.redundants());
    const int per_rank = warp_.keep(shape_.experts_per_rank);
    const uint32_t least = loads_.least;
    const int max_replicas = shape_.solve.max_replicas, max_sends = shape_.max_sends;
    const bool capped = warp_.keep(max_replicas < shape_.solve.group_size || max_sends < shape_.max_copies()) != 0;
    const bool fills = warp_.keep(candidate.rule == kFill) != 0;
    // As masks: where the rule looks for room that is enough only for all that is wanted, or not at all.
    const uint32_t fits_only = warp_.keep(candidate.rule == kFit ? ~0u : 0);
    const uint32_t never = warp_.keep(candidate.rule == kMost ? ~0u : 0);
    const int step = warp_.keep(candidate.busiest_last ? -1 : 1);
    uint32_t* const at_home = warp_.writable(loads_.expert, shape_.num_experts(), memory_.at_home);
    if (capped) warp_.each_of(shape_.num_experts(), [&](int e) { memory_.replicas[e] = 1; });
    Word load, room = {}, used;   // tokens of a rank; those that it may receive; slots that it has used
    Word most = {}, enough = {};  // keys of its room, where the most is looked for, and where the least that is enough
    const auto set_room = [&](int k, bool sets, const Room& to) {
      room.of[k] = sets ? to.tokens : room.of[k];
      most.of[k] = sets ? to.most : most.of[k];
      enough.of[k] = sets ? to.enough : enough.of[k];
    };
    warp_.each_rank([&](int k, int g, bool own) {
      load.of[k] = own ? loads_.home[g] : 0;
      const uint32_t own_limit = own ? loads_.template limit_of<kBySpeed>(limit, load.of[k], g) : limit;
      set_room(k, true, Room(own && load.of[k] < own_limit ? own_limit - load.of[k] : 0, g, least));
      used.of[k] = 0;
    });
    const int num_givers = warp_.count([&](int k, int g) {
      return (kBySpeed && load.of[k] == 0 ? 0 : loads_.template level<kBySpeed>(load.of[k], g)) > limit;
    });
    const Giver* place = loads_.busiest + (candidate.busiest_last && num_givers > 0 ? num_givers - 1 : 0);
    warp_.sync();
    num_copies_ = 0;
    bool stuck = false;
    Giver following = num_givers > 0 ? *place : Giver();
    int fewest = kMaxGroupSlots;
    LPLB_UNROLL_BY(1)
    for (int number = 0; number < num_givers && !stuck; ++number) {
      const int giver = following.rank;
      Largest from = following.from;
      const uint32_t own_limit = loads_.template limit_of<kBySpeed>(limit, following.home, giver);
      int32_t excess = static_cast<int32_t>(following.home - own_limit);
      int sends = 0;
      // What the next giver needs is read ahead, and so is when to stop, which may come late.
      const bool late = warp_.any(num_copies_ > fewest);
      place += number + 1 < num_givers ? step : 0;
      following = *place;
      fewest = warp_.fewest();
      auto own = warp_.own_largest(at_home, giver * per_rank, per_rank);
      LPLB_UNROLL_BY(1)
      while (!stuck) {
        const uint32_t has = from.tokens, wanted = static_cast<uint32_t>(excess);
        // The least room that is enough; else the most that the expert can fill; else the most.
        const uint32_t asked = (wanted <= has ? wanted : has | fits_only) | never, fits = has & fits_only;
        const uint32_t key = warp_.largest([&](int k, int) {
          const uint32_t filled = room.of[k] - 1 < fits ? most.of[k] + (kMostFilled - kMostRoom) : most.of[k];
          return room.of[k] >= asked ? enough.of[k] : filled;
        });
        const int receiver = rank_of_key(key);
        const uint32_t given = !fills && wanted < has && wanted >= least ? wanted : has;  // where the room is enough
        const uint32_t space = warp_.get(room, receiver), tokens = has < space ? given : space;
        stuck = key == 0 || has < least;
        if (stuck) break;
        const Settles settles = tokens == space ? kReceiver : tokens == wanted ? kGiver : kNeither;

        // All lanes write the same.
        const int e = from.expert;
        copies()[num_copies_++] = Copy::make(tokens, static_cast<uint32_t>(e), giver, receiver, settles);
        const Room left(space - tokens, receiver, least);
        warp_.each_rank([&](int k, int g, bool) {
          const bool receives = g == receiver;
          load.of[k] += receives ? tokens : 0;
          used.of[k] += receives ? 1 : 0;
          set_room(k, receives, left);
          if (used.of[k] == redundants) room.of[k] = most.of[k] = 0;
        });
        excess -= static_cast<int32_t>(tokens);
        from.tokens -= tokens;
        if (capped) {
          const int replicas = memory_.replicas[e] + 1;
          if (replicas == max_replicas) from.tokens = 0;  // gives no more
          stuck = ++sends == max_sends && excess > 0;
          warp_.sync();
          memory_.replicas[e] = static_cast<uint8_t>(replicas);
        }
        if (excess <= 0) break;
        warp_.replace(at_home, giver * per_rank, per_rank, from, own);
        from = warp_.largest(own);  // another expert maybe
      }
      // Having given more than its excess, it may receive. (It gives one expert to a rank once at most: what does not
      // fill the rank up is all that the expert has, or all that it has to give.)
      const Room of_giver(excess < 0 ? static_cast<uint32_t>(-excess) : 0, giver, least);
      warp_.each_rank([&](int k, int g, bool) {
        load.of[k] = g == giver ? own_limit + static_cast<uint32_t>(excess) : load.of[k];
        set_room(k, g == giver, of_giver);
      });
      stuck = stuck || late;
    }
    warp_.sync();
    if constexpr (kBySpeed) {
      warp_.each_rank(
          [&](int k, int g, bool own) { load.of[k] = own ? loads_.template level<kBySpeed>(load.of[k], g) : 0; });
    }
    return warp_.most(load);
  }

  // ---- The split ---------------------------------------------------------------------------------------------------

  // Makes all ranks of each tree equal. Returns the largest rank load then, or the largest number there is where an
  // expert has not enough for that; and a bound on the largest rank load of any split.
  LPLB_DEVICE uint32_t level(uint32_t mean_of_all, uint32_t* bound) {
    // Rank loads but for the copies that settle a rank, and the rank that each hangs on, or itself.
    warp_.each_rank([&](int, int g, bool own) {
      if (own) memory_.tokens[g] = loads_.home[g], memory_.ranks[g] = static_cast<uint32_t>(g);
    });
    warp_.sync();
    bool neither = false;  // of some copies settles neither rank
    warp_.each_of(num_copies_, [&](int c) {
      const Copy copy = copies()[c];
      if (copy.settles() == kReceiver) memory_.ranks[copy.receiver()] = static_cast<uint32_t>(copy.giver());
      if (copy.settles() == kGiver) memory_.ranks[copy.giver()] = static_cast<uint32_t>(copy.receiver());
      if (copy.settles() != kNeither) return;
      neither = true;
      warp_.add(&memory_.tokens[copy.giver()], 0u - copy.tokens);
      warp_.add(&memory_.tokens[copy.receiver()], copy.tokens);
    });
    neither = warp_.any(neither);
    warp_.sync();
    // Sums over each rank and those that hang on it, near and far: in each round it passes its sum to the rank above it
    // at twice the distance, if there is one; else `above` is the rank itself.
    Word tokens, ranks, above, root;
    warp_.each_rank([&](int k, int g, bool own) {
      tokens.of[k] = own ? memory_.tokens[g] : 0;
      above.of[k] = root.of[k] = own ? memory_.ranks[g] : static_cast<uint32_t>(g);
      ranks.of[k] = 1;
    });
    LPLB_UNROLL_BY(1)
    while (true) {
      bool any = false;
      warp_.each_rank([&](int k, int g, bool) { any = any || above.of[k] != static_cast<uint32_t>(g); });
      if (!warp_.any(any)) break;
      warp_.sync();
      warp_.each_rank([&](int k, int g, bool own) {
        if (own) memory_.tokens[g] = tokens.of[k], memory_.ranks[g] = ranks.of[k];
      });
      warp_.sync();
      warp_.each_rank([&](int k, int g, bool) {
        if (above.of[k] == static_cast<uint32_t>(g)) return;
        warp_.add(&memory_.tokens[above.of[k]], tokens.of[k]);
        warp_.add(&memory_.ranks[above.of[k]], ranks.of[k]);
      });
      warp_.sync();
      const Word next = warp_.gather(above, above);
      root = warp_.gather(root, root);
      warp_.each_rank([&](int k, int g, bool own) {
        if (own) tokens.of[k] = memory_.tokens[g], ranks.of[k] = memory_.ranks[g];
        above.of[k] = next.of[k] == above.of[k] ? static_cast<uint32_t>(g) : next.of[k];
      });
    }
    const Word of_tree = warp_.gather(tokens, root), size = warp_.gather(ranks, root);
    Word level;
    warp_.each_rank([&](int k, int, bool) { level.of[k] = (of_tree.of[k] + size.of[k] - 1) / size.of[k]; });
    const uint32_t largest = warp_.most(level), below = largest > 0 ? largest - 1 : 0;
    warp_.sync();
    warp_.each_rank([&](int k, int g, bool own) {
      if (!own) return;
      memory_.tokens[g] = level.of[k] * ranks.of[k] - tokens.of[k];  // what comes to the rank where it hangs
      memory_.ranks[g] = level.of[k] == largest;                     // whether it is of a fullest tree
    });
    warp_.each_of(num_copies_, [&](int c) {
      const int e = copies()[c].expert();
      memory_.at_home[e] = loads_.expert[e];
    });
    warp_.sync();
    bool lacks = false;
    warp_.each_of(num_copies_, [&](int c) {
      const uint32_t takes = levelled(copies()[c]);
      lacks = lacks || static_cast<int32_t>(takes) < 0;
      warp_.add(&memory_.at_home[copies()[c].expert()], 0u - takes);
    });
    warp_.sync();
    // The bound is of the fullest trees, whose load can go nowhere else: unless copies that settle neither rank join
    // them to others, and hold, or could take, some of it.
    bool joined = false;
    warp_.each_of(num_copies_, [&](int c) {
      const Copy copy = copies()[c];
      lacks = lacks || static_cast<int32_t>(memory_.at_home[copy.expert()]) < 0;
      if (copy.settles() != kNeither) return;
      const bool from = memory_.ranks[copy.giver()] != 0, to = memory_.ranks[copy.receiver()] != 0;
      joined = joined || (to && !from) || (from && !to && copy.tokens != loads_.expert[copy.expert()]);
    });
    lacks = warp_.any(lacks);
    *bound = neither && (lacks || warp_.any(joined)) ? mean_of_all : below;
    return lacks ? ~0u : largest;
  }
  // What a copy takes where the ranks of each tree are equal.
  LPLB_DEVICE uint32_t levelled(const Copy& copy) const {
    return copy.settles() == kReceiver ? memory_.tokens[copy.receiver()]
           : copy.settles() == kGiver  ? 0u - memory_.tokens[copy.giver()]
                                       : copy.tokens;
  }
  LPLB_DEVICE void take_levels() {
    warp_.each_of(num_copies_, [&](int c) { copies()[c].tokens = levelled(copies()[c]); });
    warp_.sync();
  }

  Warp warp_;
  const PlanShape& shape_;
  const PlanLoads loads_;
  const PlanMemory memory_;
  const int room_;  // for a candidate's copies
  PlanScore best_;
  // Of the candidate at work.
  int at_work_ = 0;  // where its copies begin: a number, so that it shows that they are in shared memory
  int num_copies_ = 0;
};

// One group, by the threads of a Block: reads its loads, and writes down the best candidate.
template <class Block, bool kBySpeed>
class PlanGroup {
 public:
  LPLB_DEVICE PlanGroup(const Block& block, const PlanShape& shape, const PlanOperands& in, const PlanResults& out,
                        int batch, int group, const PlanLoads& loads)
      : block_(block),
        shape_(shape),
        in_(in),
        out_(out),
        loads_(loads),
        batch_(batch),
        group_(group),
        experts_(shape.num_experts()) {
    if constexpr (kBySpeed) {
      loads_.speed = speeds_of_group(shape.solve, in.speed, batch, group);
      loads_.inverse = inverses_of_group(shape.solve, loads_.speed);
    }
  }

  // Fills the loads.
  LPLB_DEVICE void read() {
    const int ranks = shape_.solve.group_size;
    const int32_t least = in_.least[batch_];  // comes while loads do
    uint32_t mine = 0;
    const int32_t* const load = in_.load + static_cast<int64_t>(batch_) * shape_.solve.num_experts + group_ * experts_;
    block_.read(load, experts_, [&](int e, int32_t tokens) {
      loads_.expert[e] = static_cast<uint32_t>(tokens > 0 ? tokens : 0);
      mine += loads_.expert[e];
    });
    const uint32_t total = block_.sum(mine);
    shift_ = scaling_bits(total);
    loads_.total = total << shift_;
    loads_.least = least < 1 ? 1 : least < INT32_MAX >> shift_ ? least << shift_ : INT32_MAX;
    block_.each_rank(
        ranks, shape_.experts_per_rank, [&](int e) { return loads_.left[e] = loads_.expert[e] <<= shift_; },
        loads_.home, loads_.largest);
    block_.sync();
    block_.count_ranks(
        ranks,
        [&](int g, int other) {
          return loads_.template level<kBySpeed>(loads_.home[other], other) + (other < g ? 1 : 0) >
                 loads_.template level<kBySpeed>(loads_.home[g], g);
        },
        [&](int g, int busier) { loads_.busiest[busier] = {loads_.home[g], g, loads_.largest[g]}; });
    block_.sync();
  }
  LPLB_DEVICE const PlanLoads& loads() const { return loads_; }
  // Empties the tables, which takes about as long as the plan.
  LPLB_DEVICE void clear() {
    const Tables tables(*this);
    block_.fill(experts_ * shape_.solve.max_replicas, tables.log2phy, -1, reinterpret_cast<int32_t*>(tables.fraction),
                0);
    block_.fill(tables.num_slots, tables.phy2log, -1, tables.phy2log, -1);
  }
  // Whether the largest rank load at home is within `threshold` of the mean.
  LPLB_DEVICE bool stays_at_home() const {
    const float threshold = shape_.solve.threshold, ranks = static_cast<float>(shape_.solve.group_size);
    return threshold > 0.0f && static_cast<float>(most()) * ranks <= threshold * static_cast<float>(loads_.total);
  }

  // Writes the tables and the split. Uses up the loads at home, and what is left of them.
  LPLB_DEVICE void write(const PlanScore& score, const Copy* copies) {
    const SolveShape& s = shape_.solve;
    const Tables tables(*this);
    const float unit = power_of_two(-shift_);
    const bool at_home = stays_at_home();
    block_.each_of(score.num_copies(), [&](int c) {
      const Copy copy = copies[c];
      block_.add(&loads_.left[copy.expert()], 0u - copy.tokens);
      block_.add(&loads_.home[copy.giver()], 0u - copy.tokens);
      block_.add(&loads_.home[copy.receiver()], copy.tokens);
    });
    block_.sync();
    block_.each_of(experts_, [&](int e) {
      const int rank = static_cast<int>(static_cast<uint64_t>(e) * shape_.rank_of_expert >> kRankShift);
      const int64_t row = static_cast<int64_t>(e) * s.max_replicas;
      const int slot = rank * s.slots_per_rank + e - rank * shape_.experts_per_rank;
      tables.phy2log[slot] = tables.first_expert + e;
      tables.log2phy[row] = tables.first_slot + slot;
      tables.fraction[row] = share(loads_.left[e], e);
    });
    block_.each_of(score.num_copies(), [&](int c) {
      const Copy copy = copies[c];
      if (copy.tokens == 0) return;
      const int expert = copy.expert(), receiver = copy.receiver();
      int number = 0, column = 1;  // among the receiver's copies, and among the expert's replicas
      // Threads stay together: all go through all, and without branches.
      LPLB_UNROLL_BY(8)
      for (int d = 0; d < score.num_copies(); ++d) {
        number += (copies[d].receiver() == copy.receiver()) & (copies[d].tokens != 0) & (d < c) ? 1 : 0;
      }
      // An expert's copies are among those of its rank, which are next to each other.
      const auto count = [&](int d) {
        column += copies[d].expert() == expert && copies[d].receiver() < receiver && copies[d].tokens != 0;
      };
      LPLB_UNROLL_BY(1)
      for (int d = c; --d >= 0 && copies[d].giver() == copy.giver();) count(d);
      LPLB_UNROLL_BY(1)
      for (int d = c; ++d < score.num_copies() && copies[d].giver() == copy.giver();) count(d);
      const int slot = receiver * s.slots_per_rank + shape_.experts_per_rank + number;
      const int64_t cell = static_cast<int64_t>(expert) * s.max_replicas + column;
      tables.phy2log[slot] = tables.first_expert + expert;
      tables.log2phy[cell] = tables.first_slot + slot;
      tables.fraction[cell] = share(copy.tokens, expert);
    });
    const int64_t which = static_cast<int64_t>(batch_) * s.num_groups + group_;
    float* const rank_load = out_.split.rank_load + which * s.group_size;
    block_.each_of(s.group_size, [&](int g) { rank_load[g] = static_cast<float>(loads_.home[g]) * unit; });
    if (!block_.first()) return;
    out_.split.iterations[which] = 0;
    float& gap = out_.split.gap[which];
    if (score.num_copies() == 0) {
      const float home = static_cast<float>(most()) * static_cast<float>(s.group_size);
      const float more = home - static_cast<float>(loads_.total);
      gap = at_home && more > 0.0f ? more / home : 0.0f;
      out_.split.status[which] = kSkipped;
    } else {
      gap = plan_gap(score.largest, score.bound);
      out_.split.status[which] = gap <= s.tol ? kConverged : kMaxIterations;
    }
  }

 private:
  // Where the group's entries are in the results.
  struct Tables {
    int first_expert, first_slot, num_slots;
    int32_t *phy2log, *log2phy;
    float* fraction;

    LPLB_DEVICE explicit Tables(const PlanGroup& of)
        : first_expert(of.group_ * of.experts_),
          num_slots(of.shape_.solve.group_size * of.shape_.solve.slots_per_rank) {
      const SolveShape& s = of.shape_.solve;
      first_slot = of.group_ * num_slots;
      const int64_t cell = (static_cast<int64_t>(of.batch_) * s.num_experts + first_expert) * s.max_replicas;
      phy2log = of.out_.phy2log + static_cast<int64_t>(of.batch_) * s.num_physical + first_slot;
      log2phy = of.out_.log2phy + cell;
      fraction = of.out_.split.fraction + cell;
    }
  };
  LPLB_DEVICE uint32_t most() const {
    return loads_.template level<kBySpeed>(loads_.busiest[0].home, loads_.busiest[0].rank);
  }
  // Of an expert's tokens; 0 where it has none.
  LPLB_DEVICE float share(uint32_t tokens, int e) const {
    const uint32_t whole = loads_.expert[e];
    return tokens == 0 ? 0.0f : tokens == whole ? 1.0f : static_cast<float>(tokens) / static_cast<float>(whole);
  }

  Block block_;
  const PlanShape& shape_;
  const PlanOperands& in_;
  const PlanResults& out_;
  PlanLoads loads_;
  int batch_, group_;
  int experts_;  // of the group
  int shift_ = 0;
};

}  // namespace lplb
