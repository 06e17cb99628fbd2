// The shares of all experts, made once by one thread block: all blocks that assign tokens read them.
#pragma once

#include "assign.h"

namespace lplb {
namespace {

// What there is of an expert: the slot of its only replica, or kNoSlot, or, negative too, the place of the first of its
// shares, or that there was no room for them.
constexpr int32_t kNoSlot = -1, kNotKept = INT32_MIN;
__device__ bool is_only_slot(int32_t head) { return head >= kNoSlot; }
__device__ int32_t head_of(uint32_t place, uint32_t count, uint32_t room) {
  return place + count <= room ? kNoSlot - 1 - static_cast<int32_t>(place) : kNotKept;
}
__device__ uint32_t place_of(int32_t head) { return static_cast<uint32_t>(kNoSlot - 1 - head); }

// Where the shares of a batch element are: see AssignResults. They are those of experts with several replicas, an
// expert's next to each other; experts come in any order, it does not show.
struct MadeShares {
  uint32_t* used;  // how many there are
  Share* shares;
  int32_t* heads;      // [num_experts]
  int32_t* expert_of;  // of each share

  __device__ MadeShares(int32_t* memory, int64_t batch, int num_experts, int num_physical)
      : used(reinterpret_cast<uint32_t*>(memory + 4 * batch * shares_rows(num_experts, num_physical))),
        shares(reinterpret_cast<Share*>(used) + 1),
        heads(reinterpret_cast<int32_t*>(shares + num_physical)),
        expert_of(heads + (num_experts + 3) / 4 * 4) {}
};

// What the shares of a batch element's experts are made of.
struct Rows {
  const float* split;
  const int32_t* log2phy;
  const int32_t* load;
  int num_experts, max_replicas, num_physical;

  __device__ Rows(const AssignShape& shape, const AssignOperands& in, int64_t batch)
      : Rows(in.split, in.log2phy, in.load, batch, shape.count.num_experts, shape.max_replicas, shape.num_physical) {}
  __device__ Rows(const float* split, const int32_t* log2phy, const int32_t* load, int64_t batch, int num_experts,
                  int max_replicas, int num_physical)
      : split(split + batch * num_experts * max_replicas),
        log2phy(log2phy + batch * num_experts * max_replicas),
        load(load + batch * num_experts),
        num_experts(num_experts),
        max_replicas(max_replicas),
        num_physical(num_physical) {}
  __device__ int64_t entry(int e, int r) const { return static_cast<int64_t>(e) * max_replicas + r; }
  // None beyond the row's end.
  __device__ Replica replica(int e, int r) const {
    if (r >= max_replicas) return {0.0f, kNoSlot};
    return {split[entry(e, r)], log2phy[entry(e, r)]};
  }
  // From the row's entry r on, which is even: all loads before the first use of any.
  template <int kCount>
  __device__ void replicas(int e, int r, Replica (&row)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      if (max_replicas % 2 == 0) {
        int2 slots = {kNoSlot, kNoSlot};
        float2 parts = {0.0f, 0.0f};
        if (r + k < max_replicas) {
          slots = *reinterpret_cast<const int2*>(log2phy + entry(e, r + k));
          parts = *reinterpret_cast<const float2*>(split + entry(e, r + k));
        }
        row[k] = {parts.x, slots.x}, row[k + 1] = {parts.y, slots.y};
      } else {
        row[k] = replica(e, r + k), row[k + 1] = replica(e, r + k + 1);
      }
    }
  }
};

// Makes them, by `num_threads` threads of the block, which are all that have not left. First a thread has an expert: it
// finds places for its shares, and sums up the weights of its replicas. Then one has a share, which two of these sums
// make.
class ShareMaker {
 public:
  // Of shared memory.
  __host__ __device__ static constexpr size_t bytes(uint32_t room) { return room * sizeof(Place); }
  // `room`: for so many shares, num_physical at most and fewer than 2^16. `used`: in shared memory, as `memory`.
  __device__ ShareMaker(const Rows& in, const MadeShares& out, uint32_t room, void* memory, uint32_t* used)
      : in_(in), out_(out), room_(static_cast<int>(room)), places_(static_cast<Place*>(memory)), used_(used) {}

  __device__ void run(int num_threads) const {
    const int thread = threadIdx.x;
    if (thread == 0) *used_ = 0;
    __syncthreads();  // all of the split is written; what was in the memory is read
#pragma unroll 1
    for (int e = thread; e < in_.num_experts; e += num_threads) find_places(e);
    __syncthreads();
    const int used = static_cast<int>(min(*used_, static_cast<uint32_t>(room_)));
    if (thread == 0) *out_.used = used;
#pragma unroll 1
    for (int i = thread; i < used; i += num_threads) {
      const Place own = places_[i];
      out_.shares[i] = make_share_at(own, i);
      out_.expert_of[i] = own.expert;
    }
  }

 private:
  static constexpr int kAtOnce = 8;  // replicas that a thread reads before the first use of any
  static constexpr int kMore = 16;   // and where there are more

  // Of a share. Those of its expert have `count` places from `first` on; 0: there is no room for all of them.
  struct alignas(16) Place {
    uint32_t upto;  // the sum of the weights of the expert's replicas up to this one
    uint32_t load;
    int32_t expert;
    uint16_t first, count;
  };

  __device__ void find_places(int e) const {
    Replica row[kAtOnce];
    in_.replicas(e, 0, row);
    const uint32_t load = static_cast<uint32_t>(max(in_.load[e], 0));
    const int32_t only = row[0].slot;
    float largest = 0.0f;
    int count = add_leading(row, &largest);
    for (int more = count, read = kAtOnce; more == read; read = kMore, count += more) {
      Replica next[kMore];
      in_.replicas(e, count, next);
      more = add_leading(next, &largest);
    }
    if (count <= 1) {
      out_.heads[e] = count > 0 ? only : kNoSlot;
      return;
    }
    const int first = static_cast<int>(atomicAdd(used_, static_cast<uint32_t>(count)));
    const int32_t head = head_of(first, count, room_);
    out_.heads[e] = head;
    const Weigher weigher(largest, in_.max_replicas);
    Place own = {0, load, e, static_cast<uint16_t>(first), static_cast<uint16_t>(head == kNotKept ? 0 : count)};
    const int end = min(first + count, room_);
    for (int i = first; i < end; i += kAtOnce) {
      if (i > first) in_.replicas(e, i - first, row);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        own.upto += weigher.weight(row[k]);
        if (i + k < end) places_[i + k] = own;
      }
    }
  }
  // How many of them are replicas that come before all that are not, and the largest of these' parts.
  template <int kCount>
  __device__ int add_leading(const Replica (&row)[kCount], float* largest) const {
    int count = 0;
    bool leads = true;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      leads &= row[k].is_slot(in_.num_physical);
      if (leads) ++count, *largest = fmaxf(*largest, row[k].part);  // never NaN
    }
    return count;
  }
  __device__ Share make_share_at(const Place& own, int i) const {
    const int r = i - own.first;
    const int32_t slot = in_.log2phy[in_.entry(own.expert, r)];
    if (own.count == 0) return {slot, 0, 0, 0};
    // Weights of the replicas before this one, of those up to it, and of all.
    uint32_t before = r > 0 ? places_[i - 1].upto : 0, upto = own.upto, total = places_[own.first + own.count - 1].upto;
    if (total == 0) before = r, upto = r + 1, total = own.count;  // nothing for any of them
    return make_share(slot, tokens_upto(before, total, own.load), tokens_upto(upto, total, own.load), own.load);
  }

  const Rows& in_;
  const MadeShares& out_;
  const int room_;
  Place* const places_;
  uint32_t* const used_;
};

}  // namespace
}  // namespace lplb
