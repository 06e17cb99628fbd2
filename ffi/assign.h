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

struct AssignResults {
  int32_t* physical_ids;  // [batch, num_ids]
  int32_t* rank_load;     // [batch, num_ranks] the sum of the quotas of each rank's slots
  int32_t* workspace;     // [batch, workspace_words]; prepared shares on CUDA where rows are wide, else not used
};

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

// Where an expert's prepared shares are.
struct alignas(8) ShareHead {
  uint32_t first;  // into its batch element's shares
  uint32_t count;  // one at least
};

// The shares of all experts, computed before any token is assigned, in a workspace of 32-bit words aligned to 16 bytes.
// Of one batch element: a head for each expert; then num_experts * max_replicas shares, which the heads refer to.
struct PreparedShares {
  ShareHead* heads;
  Share* shares;

  LPLB_INLINE PreparedShares(int32_t* workspace, int num_experts, int max_replicas, int64_t batch = 0)
      : heads(reinterpret_cast<ShareHead*>(workspace + batch * words(num_experts, max_replicas))),
        shares(reinterpret_cast<Share*>(reinterpret_cast<int32_t*>(heads) + head_words(num_experts))) {}

  // Of one batch element.
  LPLB_INLINE static int64_t words(int num_experts, int max_replicas) {
    constexpr int kShareWords = sizeof(Share) / sizeof(int32_t);
    return head_words(num_experts) + static_cast<int64_t>(num_experts) * max_replicas * kShareWords;
  }

 private:
  LPLB_INLINE static int64_t head_words(int num_experts) { return (2 * static_cast<int64_t>(num_experts) + 3) / 4 * 4; }
};

// Rows so narrow that every thread block computes the shares of all experts for itself, and keeps them in shared
// memory: that is faster than a kernel before it, which prepares them.
constexpr int kNarrowRow = 4;
inline bool rows_are_narrow(int num_experts, int max_replicas) {
  return max_replicas <= kNarrowRow && num_experts <= 2048 && num_experts * max_replicas <= 4096;
}

// Of one batch element in AssignResults::workspace, for assign_cuda and assign_after_solve_cuda.
inline int64_t workspace_words(int num_experts, int max_replicas) {
  return rows_are_narrow(num_experts, max_replicas) ? 1 : PreparedShares::words(num_experts, max_replicas);
}

struct Replica {
  float part;  // of the split
  int32_t slot;

  // An expert's replicas are the leading entries of its row that are slots.
  LPLB_INLINE bool is_slot(int num_physical) const { return slot >= 0 && slot < num_physical; }
  // Negative and NaN count as nothing.
  LPLB_INLINE float positive() const { return part > 0.0f ? part : 0.0f; }
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

// Of `load` tokens, those of the replicas up to one, given the split's sum over these and over all: a fraction in units
// of 2^-30, rounded to whole tokens, so that quotas sum to the load whatever the split's unit and rounding.
LPLB_INLINE uint32_t tokens_upto(float sum, float total, uint32_t load) {
  constexpr uint32_t kOne = 1u << 30;
  const float share = sum / total;
  const uint32_t fraction = share < 1.0f ? static_cast<uint32_t>(share * static_cast<float>(kOne)) : kOne;
  return static_cast<uint32_t>((static_cast<uint64_t>(fraction) * load + kOne / 2) >> 30);
}

// The share of a replica that takes the tokens from `begin` to `end` of `load`.
LPLB_INLINE Share make_share(int32_t slot, uint32_t begin, uint32_t end, uint32_t load) {
  Share share = {slot, end - begin, load - begin, 0};
  if (share.quota < share.left) share.ratio = ratio(share.quota, share.left);
  return share;
}

// Writes an expert's shares, of up to max_replicas, and returns how many there are: one at least. read(r) gives entry r
// of its row, a Replica. Replicas share the load as the split does, and evenly where that has nothing for any of them;
// sums are taken one by one. Where kMost > 0, which is no less than max_replicas, loops are unrolled, so that a row
// that `read` has in registers stays there.
template <int kMost = 0, class Read>
LPLB_INLINE int write_shares(Read read, int max_replicas, int num_physical, int32_t load, Share* shares) {
  const int most = kMost > 0 ? kMost : max_replicas;
  const uint32_t tokens = load > 0 ? static_cast<uint32_t>(load) : 0;
  int count = 0;
  float total = 0.0f;
  LPLB_UNROLL
  for (int r = 0; r < most; ++r) {
    if (r >= max_replicas) break;
    const Replica replica = read(r);
    if (!replica.is_slot(num_physical)) break;
    ++count;
    total += replica.positive();
  }
  const bool even = !(total > 0.0f);
  if (even) total = static_cast<float>(count);
  float sum = 0.0f;
  uint32_t begin = 0;
  LPLB_UNROLL
  for (int r = 0; r < most; ++r) {
    if (r >= count) break;
    const Replica replica = read(r);
    sum += even ? 1.0f : replica.positive();
    const uint32_t end = r + 1 < count ? tokens_upto(sum, total, tokens) : tokens;
    shares[r] = make_share(replica.slot, begin, end, tokens);
    begin = end;
  }
  if (count > 0) return count;
  shares[0] = make_share(-1, 0, 0, 0);
  return 1;
}

// Slot of token `index` of an expert with these shares: of the first where the load does not know of the token.
LPLB_INLINE int32_t choose_slot(const Share* shares, uint32_t index) {
  Share share = *shares;
  if (share.left == 0) return share.slot;
  uint32_t o = index < share.left ? index : index % share.left;
  LPLB_UNROLL_BY(1)
  while (share.quota < share.left) {
    const Share next = *++shares;  // read before it is known to be needed
    // floor(o * quota / left), or one less: o is below 2^31, and the ratio at most 2 / 2^32 too small. The remainder
    // is then below 2 * left and so below 2^32.
    uint32_t taken = static_cast<uint32_t>((static_cast<uint64_t>(o) * share.ratio) >> 32);
    uint32_t remainder = o * share.quota - taken * share.left;
    if (remainder >= share.left) {
      remainder -= share.left;
      ++taken;
    }
    if (remainder + share.quota >= share.left) break;
    o -= taken;
    share = next;
  }
  return share.slot;
}

// Calls visit(slot, quota) for the replicas of an expert with these shares, but those after which nothing is left.
template <class Visit>
LPLB_INLINE void for_each_quota(const Share* shares, Visit visit) {
  LPLB_UNROLL_BY(1)
  for (bool more = shares->slot >= 0; more; ++shares) {
    const Share share = *shares;
    visit(share.slot, share.quota);
    more = share.quota < share.left;
  }
}

}  // namespace lplb
