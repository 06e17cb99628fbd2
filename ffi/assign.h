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
cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids,
                        int32_t* rank_load);
#endif

// The integer quotas of one expert. Replicas share m as the split does: bounds between them are fractions in
// units of 2^-30, rounded to whole tokens, so that quotas sum to m whatever the split's unit and rounding.
class Quotas {
 public:
  LPLB_INLINE Quotas(const float* split, const int32_t* log2phy, int max_replicas, int num_physical, int32_t load)
      : split_(split), load_(load > 0 ? static_cast<uint32_t>(load) : 0) {
    while (num_replicas_ < max_replicas && log2phy[num_replicas_] >= 0 && log2phy[num_replicas_] < num_physical) {
      total_ += part(num_replicas_++);
    }
  }

  // Replicas the expert has: the leading entries of log2phy that are slots.
  LPLB_INLINE int num_replicas() const { return num_replicas_; }
  LPLB_INLINE uint32_t load() const { return load_; }

  // Quota of the next replica, from the first on.
  LPLB_INLINE uint32_t next() {
    constexpr uint64_t kOne = 1u << 30;
    sum_ += part(replica_++);
    uint64_t fraction = kOne;
    if (replica_ < num_replicas_) {
      if (total_ > 0.0f) {
        const float share = sum_ / total_;
        fraction = share < 1.0f ? static_cast<uint64_t>(share * static_cast<float>(kOne)) : kOne;
      } else {
        fraction = kOne * static_cast<uint64_t>(replica_) / static_cast<uint64_t>(num_replicas_);
      }
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

// Slot of token `index` of the expert, or -1 where the expert has no slot.
LPLB_INLINE int32_t choose_slot(Quotas quotas, const int32_t* log2phy, uint32_t index) {
  if (quotas.num_replicas() == 0) return -1;
  uint32_t left = quotas.load();
  if (left == 0) return log2phy[0];  // a token the load does not know of
  uint32_t o = index % left;
  const int last = quotas.num_replicas() - 1;
  for (int r = 0; r < last; ++r) {
    const uint32_t quota = quotas.next();
    const uint64_t product = static_cast<uint64_t>(o) * quota;
    const uint32_t taken = static_cast<uint32_t>(product / left);
    const uint32_t remainder = static_cast<uint32_t>(product - static_cast<uint64_t>(taken) * left);
    if (static_cast<uint64_t>(remainder) + quota >= left) return log2phy[r];
    o -= taken;
    left -= quota;
  }
  return log2phy[last];
}

}  // namespace lplb
