// Sends every token to a replica of its expert: the rule, and its launchers. Raw pointers, no framework.
//
// The tokens of an expert are numbered 0 .. m-1 over the whole axis, by token order. Its split, as integer
// quotas q_0 .. q_{k-1} that sum to m, is interleaved along that order: token o goes to replica 0 if a multiple
// of m / q_0 falls into [o, o+1), so that any run of n tokens sends n q_0 / m of them there, to within one; the
// rest, renumbered, go on to replica 1, and so forth. Where tokens are to stay near where they are, those of a rank go
// through the replicas of this rank first, then through those of its node: see Nearby.
#pragma once

#include <cstdint>

#include "count.h"
#include "device.h"

namespace lplb {

struct AssignShape {
  CountShape count;  // how the ids are cut into chunks
  int num_physical;
  int max_replicas;
  int num_ranks;
  int ranks_per_node = 0;  // where tokens are to stay near where they are, see Nearby; 0: no matter where they are
};

// All slots of a placement whose tokens may stay near where they are: near shares of so many replicas fit into shared
// memory, whatever their experts are.
constexpr int kMaxNearSlots = 2048;

struct AssignOperands {
  const int32_t* expert_ids;  // [batch, num_ids]
  const int32_t* starts;      // [batch, num_chunks, num_experts], from count
  const float* split;         // [batch, num_experts, max_replicas], in any unit
  const int32_t* load;        // [batch, num_experts] m
  const int32_t* offset;      // [batch, num_experts] number of the first token here
  const int32_t* log2phy;     // [batch, num_experts, max_replicas]
  // Where ranks_per_node > 0:
  const int32_t* loads = nullptr;  // [batch, num_ranks, num_experts] tokens of each expert on each rank
  const int32_t* rank = nullptr;   // [batch] that of these tokens
};

struct AssignResults {
  int32_t* physical_ids;      // [batch, num_ids]
  int32_t* rank_load;         // [batch, num_ranks] the sum of the quotas of each rank's slots
  int32_t* shares = nullptr;  // [batch, shares_rows(), 4] to work in, on CUDA; what it is left with means nothing
};

// What one thread block makes of a batch element, for all blocks, where experts may have many replicas: how many shares
// there are, these, what there is of each expert, and each share's expert; in rows of 16 bytes. See shares.cuh.
LPLB_INLINE int64_t shares_rows(int num_experts, int num_physical) {
  return 1 + static_cast<int64_t>(num_physical) + (num_experts + 3) / 4 + (num_physical + 3) / 4;
}

void assign_cpu(const AssignShape& shape, const AssignOperands& in, const AssignResults& out);

#ifdef LPLB_CUDA
// As prepare_solve_cuda.
cudaError_t prepare_assign_cuda();
cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out);
// Where the launch before this one on the stream is that of the solve which writes `split`, a plan before it may have
// written log2phy, and all else is older: on devices that can, tokens are numbered while it runs (programmatic
// dependent launch).
cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    const AssignResults& out);
// For how many shares these need room; 0: they make none ahead, as experts have few replicas.
uint32_t room_for_shares(const AssignShape& shape);
// The two launches that these consist of, for drivers, and the second alone where the solve has made the shares.
// `ahead`: of the end of the launch before, on devices that can.
cudaError_t shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out, bool ahead);
cudaError_t assign_by_shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                  const AssignResults& out, bool ahead);
// Shares, of which there is room for so many; once before, as prepare_solve_cuda, with shared memory for the most.
cudaError_t prepare_shares_cuda(size_t most_bytes);
cudaError_t make_shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* shares,
                             uint32_t room, bool ahead);
#endif

// ---- Shares: what each replica takes --------------------------------------------------------------------------------

// What a replica takes of the tokens that those before it left. An expert's last share has quota == left; so has any
// that nothing is left after. An expert without replicas has one share, of no slot.
struct alignas(16) Share {
  int32_t slot;  // -1: none
  uint32_t quota;
  uint32_t left;   // of the first share, the expert's load
  uint32_t ratio;  // see ratio(); divides by `left` without dividing
};

struct Replica {
  float part;  // of the split
  int32_t slot;

  // An expert's replicas are the leading entries of its row that are slots.
  LPLB_INLINE bool is_slot(int num_physical) const {
    return static_cast<uint32_t>(slot) < static_cast<uint32_t>(num_physical);
  }
  // Negative and NaN count as nothing.
  LPLB_INLINE float positive() const { return part > 0.0f ? part : 0.0f; }
};

// 1 / value, to within two roundings.
LPLB_INLINE float inverse_of(uint32_t value) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(value)));
  return inverse;
#else
  return 1.0f / static_cast<float>(value);
#endif
}

// 2^32 quota / left, rounded down, or less by one: in two steps of 20 bits, each rounded down, where a division of 64
// bits would take longer than all else. 0 <= quota <= left < 2^31, left > 0.
LPLB_INLINE uint32_t ratio(uint32_t quota, uint32_t left) {
  constexpr float kDown = 1.0f - 0x1p-20f;  // more than four roundings of 2^-23
  const float inverse = inverse_of(left);
  const uint32_t high = static_cast<uint32_t>(static_cast<float>(quota) * inverse * (0x1p32f * kDown));
  const uint64_t rest = (static_cast<uint64_t>(quota) << 32) - static_cast<uint64_t>(high) * left;
  return high + static_cast<uint32_t>(static_cast<float>(rest) * (inverse * kDown));
}

// a / b, correctly rounded. 0 <= a <= b < 2^32, b > 0, whole.
LPLB_INLINE float quotient(uint32_t a, uint32_t b) {
  const float numerator = static_cast<float>(a), denominator = static_cast<float>(b);
#ifdef __CUDA_ARCH__
  // The steps of the compiler's own division, without those for tiny, infinite and zero operands, to which it branches.
  float inverse = inverse_of(b);
  inverse = fmaf(inverse, fmaf(-denominator, inverse, 1.0f), inverse);
  float value = numerator * inverse;
  value = fmaf(inverse, fmaf(-denominator, value, numerator), value);
  return fmaf(inverse, fmaf(-denominator, value, numerator), value);
#else
  return numerator / denominator;
#endif
}

// The split's parts as integers, the largest of an expert's of 24 bits, unless it is tiny, or of fewer, so that 32 bits
// hold the sum of all: these add up exactly, in any order.
struct Weigher {
  float scale, most;

  Weigher() = default;
  LPLB_INLINE Weigher(float largest_part, int max_replicas) {
    int bits = 24;
    while (static_cast<uint32_t>(max_replicas) > 1u << (32 - bits)) --bits;
    const int exponent = bits - 1 - exponent_of(largest_part);
    scale = power_of_two(exponent < 127 ? exponent : 127);
    most = power_of_two(bits) - 1.0f;  // of infinity
  }
  LPLB_INLINE uint32_t weight(const Replica& replica) const {
    const float scaled = replica.positive() * scale;
    return static_cast<uint32_t>(scaled < most ? scaled : most);
  }
};

// Of `load` tokens, those of the replicas up to one, given the sum of the weights of these and of all: a fraction in
// units of 2^-30, rounded to whole tokens, so that quotas sum to the load whatever the split's unit and rounding.
LPLB_INLINE uint32_t tokens_upto(uint32_t sum, uint32_t total, uint32_t load) {
  constexpr uint32_t kOne = 1u << 30;
  const float share = quotient(sum, total);
  const uint32_t fraction = share < 1.0f ? static_cast<uint32_t>(share * static_cast<float>(kOne)) : kOne;
  return static_cast<uint32_t>((static_cast<uint64_t>(fraction) * load + kOne / 2) >> 30);
}

// The share of a replica that takes the tokens from `begin` to `end` of `load`.
LPLB_INLINE Share make_share(int32_t slot, uint32_t begin, uint32_t end, uint32_t load) {
  Share share = {slot, end - begin, load - begin, 0};
  if (share.quota < share.left) share.ratio = ratio(share.quota, share.left);
  return share;
}

// An expert's shares, of up to max_replicas, one after the other. read(r) gives entry r of its row, a Replica. Replicas
// share the load as the split does, and evenly where that has nothing for any of them. Where kMost > 0, which is no
// less than max_replicas, loops are unrolled, so that a row that `read` has in registers stays there.
template <class Read, int kMost = 0>
class Shares {
 public:
  LPLB_INLINE Shares(Read read, int max_replicas, int num_physical, int32_t load)
      : read_(read), tokens_(load > 0 ? static_cast<uint32_t>(load) : 0) {
    float largest = 0.0f;
    LPLB_UNROLL
    for (int r = 0; r < (kMost > 0 ? kMost : max_replicas); ++r) {
      if (r >= max_replicas) break;
      const Replica replica = read(r);
      if (!replica.is_slot(num_physical)) break;
      ++count_;
      largest = replica.positive() > largest ? replica.positive() : largest;
    }
    weigher_ = Weigher(largest, max_replicas);
    LPLB_UNROLL
    for (int r = 0; r < (kMost > 0 ? kMost : count_); ++r) {
      if (r >= count_) break;
      total_ += weigher_.weight(read(r));
    }
    even_ = total_ == 0;
    if (even_) total_ = static_cast<uint32_t>(count_);
  }
  // Replicas; none has one share, of no slot.
  LPLB_INLINE int count() const { return count_; }
  // Share r, after those before it.
  LPLB_INLINE Share next(int r) {
    if (count_ == 0) return make_share(-1, 0, 0, 0);
    const Replica replica = read_(r);
    sum_ += even_ ? 1 : weigher_.weight(replica);
    const uint32_t begin = end_;
    end_ = r + 1 < count_ ? tokens_upto(sum_, total_, tokens_) : tokens_;
    return make_share(replica.slot, begin, end_, tokens_);
  }

 private:
  Read read_;
  uint32_t tokens_, end_ = 0;
  int count_ = 0;
  Weigher weigher_;
  bool even_;
  uint32_t total_ = 0, sum_ = 0;  // of weights
};

// Writes all shares of an expert, one at least, and returns how many they are.
template <int kMost = 0, class Read>
LPLB_INLINE int write_shares(Read read, int max_replicas, int num_physical, int32_t load, Share* shares) {
  Shares<Read, kMost> row(read, max_replicas, num_physical, load);
  shares[0] = row.next(0);
  LPLB_UNROLL
  for (int r = 1; r < (kMost > 0 ? kMost : row.count()); ++r) {
    if (r >= row.count()) break;
    shares[r] = row.next(r);
  }
  return row.count() > 0 ? row.count() : 1;
}

// ---- Locality: tokens stay near where they are ----------------------------------------------------------------------

// A share that a rank's tokens go on to with another number: `skip` more, for the tokens of ranks before theirs.
struct NearShare : Share {
  uint32_t skip;
};
LPLB_INLINE uint32_t skip_to(const Share&) { return 0; }
LPLB_INLINE uint32_t skip_to(const NearShare& share) { return share.skip; }

// A replica of an expert, and how much of its quota the steps below have filled.
struct alignas(16) Part {
  int32_t slot;
  uint32_t quota;
  uint32_t on_rank;  // by the first step
  uint32_t on_node;  // by the first two
};

// Which tokens fill an expert's quotas: in three steps, for groups of 1, ranks_per_node and all ranks next to each
// other. In each the tokens that are left on a group's ranks, numbered rank after rank, go to what is left of the
// quotas of the group's replicas, one replica after the other. No rank and no node could keep more.
//
// What is left after a step is tokens or quotas of a group, never both. So a rank's tokens go through each replica
// once: those on their rank, those on other ranks of their node, and those elsewhere.
//
// A step of a replica reads what those before it have filled of all replicas of the expert, as Parts.
class Nearby {
 public:
  // A replica on its way through the steps. After them, what the rank's tokens find there.
  struct Own {
    int32_t slot;
    uint32_t quota;
    int step;        // 0 to 2: in which the rank's tokens may go to it
    int place;       // where it is in the order above
    bool is_first;   // of those of its step
    uint32_t skip;   // of its share
    uint32_t taken;  // of the quota, by the steps so far; in the end, in its own step alone
    uint32_t left;   // tokens in its own step that no replica before it takes

    LPLB_INLINE NearShare share(int count) const {
      // Whatever the operands hold, after the last nothing is left.
      return {make_share(slot, 0, taken, place + 1 == count ? taken : left), skip};
    }
  };

  LPLB_INLINE Nearby(const AssignShape& shape, const AssignOperands& in, int64_t batch, int rank)
      : loads_(in.loads + batch * shape.num_ranks * shape.count.num_experts),
        offset_(in.offset + batch * shape.count.num_experts),
        num_experts_(in_register(shape.count.num_experts)),
        ranks_per_node_(in_register(shape.ranks_per_node)),
        slots_per_rank_(in_register(divide(shape.num_physical, inverse_of(shape.num_ranks)))),
        slots_per_node_(in_register(ranks_per_node_ * slots_per_rank_)),
        of_rank_(inverse_of(slots_per_rank_)),
        of_node_(inverse_of(slots_per_node_)),
        rank_(rank),
        node_(in_register(divide(rank * slots_per_rank_, of_node_) * ranks_per_node_)),
        own_rank_(in_register(rank * slots_per_rank_)),
        own_node_(in_register(node_ * slots_per_rank_)) {}

  // The first step of replica i of `count`, whose slots and quotas part(j) gives.
  template <class Parts>
  LPLB_INLINE Own on_rank(int expert, Parts part, int count, int i) const {
    const auto of_own = part(i);
    Own own = {of_own.slot, of_own.quota, step_of(of_own.slot), 0, false, 0, 0, 0};
    const int rank = divide(own.slot, of_rank_), node = divide(own.slot, of_node_) * ranks_per_node_;
    // What the loads say is there only after the loop that needs none of it.
    const int32_t* const of_expert = loads_ + expert;
    const int32_t on_rank = of_expert[rank * num_experts_], offset = offset_[expert];
    const Loads first_loads = read(of_expert, node, 0);
    const int32_t first_slot = rank * slots_per_rank_;
    uint32_t quotas = 0;          // on its rank, of replicas before it
    int closer = 0, earlier = 0;  // replicas of the steps before, and those of this step before this one
    bool has_middle = false;      // whether there are any of the second step
    LPLB_UNROLL_BY(2)
    for (int j = 0; j < count; ++j) {
      const auto other = part(j);
      const int of_other = step_of(other.slot);
      closer += of_other < own.step;
      has_middle |= of_other == 1;
      earlier += j < i && of_other == own.step;
      quotas += j < i && is_within(first_slot, slots_per_rank_, other.slot) ? other.quota : 0;
    }
    uint32_t on_node = 0, before = 0;  // tokens on its node; on the ranks before this one, on theirs
    first_loads.add(&on_node, &before);
    LPLB_UNROLL_BY(1)
    for (int g = Loads::kRanks; g < ranks_per_node_; g += Loads::kRanks) {
      read(of_expert, node, g).add(&on_node, &before);
    }
    own.place = closer + earlier;
    own.is_first = own.step > 0 && earlier == 0;
    // It goes on from numbers among the tokens of a group to those among the next larger one's.
    if (own.is_first) own.skip = own.step == 1 ? before : static_cast<uint32_t>(offset) - (has_middle ? before : 0);
    const uint32_t here = positive(static_cast<uint32_t>(on_rank) - quotas);
    own.taken = here < own.quota ? here : own.quota;
    own.left = own.step == 0 ? here : on_node;
    return own;
  }
  // The second, after which on_node is known, too.
  template <class Parts>
  LPLB_INLINE void on_node(Parts part, int count, int i, Own* own) const {
    if (own->step == 0) return;
    const int32_t first_slot = divide(own->slot, of_node_) * slots_per_node_;
    uint32_t left = own->left, before = 0;
    LPLB_UNROLL_BY(2)
    for (int j = 0; j < count; ++j) {
      const Part other = part(j);
      if (is_within(first_slot, slots_per_node_, other.slot)) left -= j < i ? other.quota : other.on_rank;
      if (is_within(own_node_, own_rank_ - own_node_, other.slot)) before += other.on_rank;
    }
    const uint32_t here = positive(left), rest = own->quota - own->taken, takes = here < rest ? here : rest;
    if (own->step == 2) {
      own->taken += takes;
      return;
    }
    own->taken = takes, own->left = here;
    if (own->is_first) own->skip -= before;
  }
  // The third.
  template <class Parts>
  LPLB_INLINE void anywhere(Parts part, int count, int i, Own* own) const {
    if (own->step < 2) return;
    uint32_t left = 0, before = 0;
    LPLB_UNROLL_BY(2)
    for (int j = 0; j < count; ++j) {
      const Part other = part(j);
      if (j >= i && !is_within(own_node_, slots_per_node_, other.slot)) left += other.quota - other.on_node;
      if (other.slot < own_node_) before += other.on_node;
    }
    own->taken = own->quota - own->taken, own->left = left;
    if (own->is_first) own->skip -= before;
  }

 private:
  // Of an expert, on so many ranks of a replica's node, and on those ranks of the own one that are before this one. All
  // are read before the first use of any.
  struct Loads {
    static constexpr int kRanks = 8;
    int32_t there[kRanks], here[kRanks];

    LPLB_INLINE void add(uint32_t* on_node, uint32_t* before) const {
      LPLB_UNROLL
      for (int k = 0; k < kRanks; ++k) {
        *on_node += static_cast<uint32_t>(there[k]);
        *before += static_cast<uint32_t>(here[k]);
      }
    }
  };

  // The compiler would rather compute it again each time, which takes longer.
  LPLB_INLINE static int in_register(int value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(value));
#endif
    return value;
  }
  LPLB_INLINE static bool is_within(int32_t first, int count, int32_t slot) {
    return static_cast<uint32_t>(slot - first) < static_cast<uint32_t>(count);
  }
  // In which the rank's tokens may go to a replica.
  LPLB_INLINE int step_of(int32_t slot) const {
    return (is_within(own_rank_, slots_per_rank_, slot) ? 0 : 1) +
           (is_within(own_node_, slots_per_node_, slot) ? 0 : 1);
  }
  // From rank g of the nodes on; `node`: the first rank of the replica's.
  LPLB_INLINE Loads read(const int32_t* of_expert, int node, int g) const {
    const int32_t *there = of_expert + (node + g) * num_experts_, *here = of_expert + (node_ + g) * num_experts_;
    Loads loads;
    LPLB_UNROLL
    for (int k = 0; k < Loads::kRanks; ++k) {
      loads.there[k] = g + k < ranks_per_node_ ? *there : 0;
      loads.here[k] = g + k < rank_ - node_ ? *here : 0;
      there += num_experts_, here += num_experts_;  // quicker than an index
    }
    return loads;
  }
  // An integer that is far below 2^20, divided: quicker than integers are.
  LPLB_INLINE static int divide(int value, float inverse) {
    return static_cast<int>((static_cast<float>(value) + 0.5f) * inverse);
  }
  LPLB_INLINE static uint32_t positive(uint32_t left) { return static_cast<int32_t>(left) > 0 ? left : 0; }

  const int32_t* loads_;   // [num_ranks, num_experts]
  const int32_t* offset_;  // [num_experts]
  int num_experts_, ranks_per_node_, slots_per_rank_, slots_per_node_;
  float of_rank_, of_node_;      // a slot's part of them
  int rank_, node_;              // whose tokens are assigned, and the first of its node
  int32_t own_rank_, own_node_;  // their first slots
};

// ---- Choice ---------------------------------------------------------------------------------------------------------

// Slot of token `index` of an expert whose shares next() gives, one after the other: of the first where the load does
// not know of the token.
template <class Next>
LPLB_INLINE int32_t choose_slot(Next next, uint32_t index) {
  auto share = next();
  if (share.left == 0) return share.slot;
  index += skip_to(share);
  uint32_t o = index < share.left ? index : index % share.left;
  int32_t slot = share.slot;
  // Nothing branches within a step, so that the share after it is read while it is computed.
  LPLB_UNROLL_BY(1)
  for (bool goes_on = share.quota < share.left; goes_on;) {
    const auto following = next();
    // floor(o * quota / left), or one less: o is below 2^31, and the ratio at most 2 / 2^32 too small. The remainder
    // is then below 2 * left and so below 2^32.
    uint32_t taken = static_cast<uint32_t>((static_cast<uint64_t>(o) * share.ratio) >> 32);
    uint32_t remainder = o * share.quota - taken * share.left;
    const bool one_more = remainder >= share.left;
    remainder -= one_more ? share.left : 0;
    o -= taken + (one_more ? 1 : 0);
    o += skip_to(following);
    const bool passes = remainder + share.quota < share.left;
    slot = passes ? following.slot : slot;
    share = following;
    goes_on = passes & (share.quota < share.left);
  }
  return slot;
}

// Calls visit(slot, quota) for the replicas of an expert with these shares, but those after which nothing is left.
template <class Next, class Visit>
LPLB_INLINE void for_each_quota(Next next, Visit visit) {
  Share share = next();
  LPLB_UNROLL_BY(1)
  for (bool more = share.slot >= 0; more;) {
    visit(share.slot, share.quota);
    more = share.quota < share.left;
    if (more) share = next();
  }
}

}  // namespace lplb
