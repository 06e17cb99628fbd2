// Sends every token to a replica of its expert: the rule, and its launchers. Raw pointers, no framework.
//
// The tokens of an expert are numbered 0 .. m-1 over the whole axis, by token order. Its split, as integer
// quotas q_0 .. q_{k-1} that sum to m, is interleaved along that order: token o goes to replica 0 if a multiple
// of m / q_0 falls into [o, o+1), so that any run of n tokens sends n q_0 / m of them there, to within one; the
// rest, renumbered, go on to replica 1, and so forth.
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
};

struct AssignOperands {
  const int32_t* expert_ids;  // [batch, num_ids]
  const int32_t* starts;      // [batch, num_chunks, num_experts], from count
  const float* split;         // [batch, num_experts, max_replicas], in any unit
  const int32_t* load;        // [batch, num_experts] m
  const int32_t* offset;      // [batch, num_experts] number of the first token here
  const int32_t* log2phy;     // [batch, num_experts, max_replicas]
};

// physical_ids [batch, num_ids]; rank_load [batch, num_ranks]: the sum of the quotas of each rank's slots
void assign_cpu(const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids, int32_t* rank_load);

#ifdef LPLB_CUDA
// As prepare_solve_cuda.
cudaError_t prepare_assign_cuda();
cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids,
                        int32_t* rank_load);
// Where the launch before this one on the stream is that of the solve which writes `split`, and all else is older: on
// devices that can, tokens are numbered while it runs (programmatic dependent launch).
cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    int32_t* physical_ids, int32_t* rank_load);
#endif

// The integer quotas of one expert. Replicas share m as the split does, and evenly where that has nothing for any of
// them: bounds between them are fractions in units of 2^-30, rounded to whole tokens, so that quotas sum to m whatever
// the split's unit and rounding.
class Quotas {
 public:
  LPLB_INLINE Quotas(const float* split, const int32_t* log2phy, int max_replicas, int num_physical, int32_t load)
      : split_(split),
        log2phy_(log2phy),
        max_replicas_(max_replicas),
        load_(load > 0 ? static_cast<uint32_t>(load) : 0) {
    constexpr int kAtOnce = 4;  // reads that do not wait for each other
    bool more = true;
    for (int first = 0; more && first < max_replicas_; first += kAtOnce) {
      Replica replicas[kAtOnce];
      LPLB_UNROLL
      for (int k = 0; k < kAtOnce; ++k) replicas[k] = read(first + k);
      LPLB_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        more = more && first + k < max_replicas_ && is_slot(replicas[k].slot, num_physical);
        num_replicas_ += more ? 1 : 0;
        total_ += more ? positive(replicas[k].part) : 0.0f;
      }
    }
    even_ = !(total_ > 0.0f);
    if (even_) total_ = static_cast<float>(num_replicas_);
  }

  // Replicas are the leading entries of log2phy that are slots.
  LPLB_INLINE static bool is_slot(int32_t entry, int num_physical) { return entry >= 0 && entry < num_physical; }

  LPLB_INLINE int max_replicas() const { return max_replicas_; }
  LPLB_INLINE uint32_t load() const { return load_; }
  // Whether the next replica is the last, or there is none.
  LPLB_INLINE bool last() const { return replica_ + 1 >= num_replicas_; }

  // Quota of the next replica, which is not the last; that one has the rest.
  LPLB_INLINE uint32_t next() { return next(split_[replica_]); }

  // Calls visit(replica, its slot, its quota) for all.
  template <class Visit>
  LPLB_INLINE void each(Visit visit) const {
    Quotas rest = *this;
    const auto visit_next = [&](int r, const Replica& replica) {
      visit(r, replica.slot, rest.last() ? load_ - rest.before_ : rest.next(replica.part));
    };
    if (num_replicas_ > 0) visit_next(0, read(0));
    Replica ahead = read(1);
    LPLB_UNROLL_BY(1)
    for (int r = 1; r < max_replicas_ && r < num_replicas_; ++r) {
      const Replica replica = ahead;
      ahead = read(r + 1);
      visit_next(r, replica);
    }
  }

 private:
  struct Replica {
    float part;
    int32_t slot;
  };
  // The last one again for those beyond: no branch, so that several can be read at once.
  LPLB_INLINE Replica read(int r) const {
    const int index = r < max_replicas_ ? r : max_replicas_ - 1;
    return {split_[index], log2phy_[index]};
  }
  // Negative and NaN count as nothing.
  LPLB_INLINE static float positive(float part) { return part > 0.0f ? part : 0.0f; }

  LPLB_INLINE uint32_t next(float part) {
    constexpr uint32_t kOne = 1u << 30;
    sum_ += even_ ? 1.0f : positive(part);
    ++replica_;
    const float share = sum_ / total_;
    const uint32_t fraction = share < 1.0f ? static_cast<uint32_t>(share * static_cast<float>(kOne)) : kOne;
    const uint32_t upto = static_cast<uint32_t>((static_cast<uint64_t>(fraction) * load_ + kOne / 2) >> 30);
    const uint32_t quota = upto - before_;
    before_ = upto;
    return quota;
  }

  const float* split_;
  const int32_t* log2phy_;
  int max_replicas_;
  uint32_t load_, before_ = 0;
  int num_replicas_ = 0, replica_ = 0;
  float total_ = 0.0f, sum_ = 0.0f;
  bool even_;
};

// What a replica takes of the tokens that those before it left.
struct Share {
  uint32_t quota;
  uint32_t ratio;  // see ratio(); divides by `left` without dividing
};

// 2^32 quota / left, rounded down, or less by one: in two steps of 20 bits, each rounded down, where a division of 64
// bits would take longer than all else. 0 <= quota <= left < 2^31, left > 0.
LPLB_INLINE uint32_t ratio(uint32_t quota, uint32_t left) {
  constexpr float kDown = 1.0f - 0x1p-20f;  // more than four roundings of 2^-23
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(left)));
#else
  const float inverse = 1.0f / static_cast<float>(left);
#endif
  const uint32_t high = static_cast<uint32_t>(static_cast<float>(quota) * inverse * (0x1p32f * kDown));
  const uint64_t rest = (static_cast<uint64_t>(quota) << 32) - static_cast<uint64_t>(high) * left;
  return high + static_cast<uint32_t>(static_cast<float>(rest) * (inverse * kDown));
}

// The shares of an expert's replicas but the last, in order.
class Shares {
 public:
  LPLB_INLINE explicit Shares(const Quotas& quotas) : quotas_(quotas), left_(quotas.load()) {}
  LPLB_INLINE uint32_t load() const { return quotas_.load(); }
  LPLB_INLINE bool last() const { return quotas_.last(); }
  LPLB_INLINE Share next() {
    const uint32_t quota = quotas_.next();
    Share share = {quota, 0};
    if (left_ > 0) share.ratio = ratio(quota, left_);
    left_ -= quota;
    return share;
  }

 private:
  Quotas quotas_;
  uint32_t left_;
};

// The same, computed once for all tokens of an expert: `size` integers.
class StoredShares {
 public:
  LPLB_INLINE static int size(int max_replicas) { return 2 * max_replicas - 1; }
  LPLB_INLINE static void store(const Quotas& quotas, uint32_t* stored) {
    *stored++ = quotas.load();
    uint32_t left = quotas.load();
    int num_replicas = 0;
    quotas.each([&](int replica, int32_t, uint32_t quota) {
      num_replicas = replica + 1;
      if (num_replicas == quotas.max_replicas()) return;
      stored[2 * replica] = quota;
      stored[2 * replica + 1] = left > 0 ? ratio(quota, left) : 0;
      left -= quota;
    });
    if (num_replicas < quotas.max_replicas()) stored[2 * (num_replicas > 0 ? num_replicas - 1 : 0)] = kLast;
  }

  LPLB_INLINE StoredShares(const uint32_t* stored, int max_replicas)
      : next_(stored + 1), end_(stored + size(max_replicas)), load_(*stored) {}
  LPLB_INLINE uint32_t load() const { return load_; }
  LPLB_INLINE bool last() const { return next_ == end_ || *next_ == kLast; }
  LPLB_INLINE Share next() {
    const Share share = {next_[0], next_[1]};
    next_ += 2;
    return share;
  }

 private:
  static constexpr uint32_t kLast = 0xffffffffu;  // no quota: those are below 2^31
  const uint32_t *next_, *end_;
  uint32_t load_;
};

// Replica of token `index` of an expert with these shares; 0 where the load does not know of the token.
template <class AnyShares>
LPLB_INLINE int choose_replica(AnyShares shares, uint32_t index) {
  uint32_t left = shares.load();
  if (left == 0) return 0;
  uint32_t o = index < left ? index : index % left;
  for (int r = 0;; ++r) {
    if (shares.last()) return r;
    const Share share = shares.next();
    // floor(o * quota / left), or one less: o is below 2^31, and the ratio at most 2 / 2^32 too small. The remainder
    // is then below 2 * left and so below 2^32.
    uint32_t taken = static_cast<uint32_t>((static_cast<uint64_t>(o) * share.ratio) >> 32);
    uint32_t remainder = o * share.quota - taken * left;
    if (remainder >= left) {
      remainder -= left;
      ++taken;
    }
    if (remainder + share.quota >= left) return r;
    o -= taken;
    left -= share.quota;
  }
}

}  // namespace lplb
