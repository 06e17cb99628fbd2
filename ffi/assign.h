// Sends every token to a replica of its expert: the rule, and its launchers. Raw pointers, no framework.
//
// The tokens of an expert are numbered 0 .. m-1 over the whole axis, by token order. Its split, as integer
// quotas q_0 .. q_{k-1} that sum to m, is interleaved along that order: token o goes to replica 0 if a multiple
// of m / q_0 falls into [o, o+1), so that any run of n tokens sends n q_0 / m of them there, to within one; the
// rest, renumbered, go on to replica 1, and so forth.
#pragma once

#include <cstdint>

#include "count.h"

#ifdef __CUDACC__
#define LPLB_INLINE __host__ __device__ inline
#else
#define LPLB_INLINE inline
#endif

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

// The integer quotas of one expert. Replicas share m as the split does: bounds between them are fractions in
// units of 2^-30, rounded to whole tokens, so that quotas sum to m whatever the split's unit and rounding.
class Quotas {
 public:
  LPLB_INLINE Quotas(const float* split, const int32_t* log2phy, int max_replicas, int num_physical, int32_t load)
      : split_(split), load_(load > 0 ? static_cast<uint32_t>(load) : 0) {
    for (; num_replicas_ < max_replicas; ++num_replicas_) {
      const float share = part(num_replicas_);
      if (!is_slot(log2phy[num_replicas_], num_physical)) break;
      total_ += share;
    }
  }

  // Replicas are the leading entries of log2phy that are slots.
  LPLB_INLINE static bool is_slot(int32_t entry, int num_physical) { return entry >= 0 && entry < num_physical; }

  LPLB_INLINE uint32_t load() const { return load_; }
  // Whether the next replica is the last, or there is none.
  LPLB_INLINE bool last() const { return replica_ + 1 >= num_replicas_; }

  // Quota of the next replica, which is not the last; that one has the rest.
  LPLB_INLINE uint32_t next() {
    constexpr uint64_t kOne = 1u << 30;
    sum_ += part(replica_++);
    uint64_t fraction;
    if (total_ > 0.0f) {
      const float share = sum_ / total_;
      fraction = share < 1.0f ? static_cast<uint32_t>(share * static_cast<float>(kOne)) : kOne;
    } else {
      fraction = kOne * static_cast<uint64_t>(replica_) / static_cast<uint64_t>(num_replicas_);
    }
    const uint32_t upto = static_cast<uint32_t>((fraction * load_ + kOne / 2) >> 30);
    const uint32_t quota = upto - before_;
    before_ = upto;
    return quota;
  }

 private:
  // Negative and NaN count as nothing.
  LPLB_INLINE float part(int r) const { return split_[r] > 0.0f ? split_[r] : 0.0f; }

  const float* split_;
  uint32_t load_, before_ = 0;
  int num_replicas_ = 0, replica_ = 0;
  float total_ = 0.0f, sum_ = 0.0f;
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
  LPLB_INLINE static void store(Shares shares, int max_replicas, uint32_t* stored) {
    *stored++ = shares.load();
    for (int r = 1; r < max_replicas; ++r, stored += 2) {
      if (shares.last()) {
        *stored = kLast;
        return;
      }
      const Share share = shares.next();
      stored[0] = share.quota;
      stored[1] = share.ratio;
    }
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
