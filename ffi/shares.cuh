// The shares of all experts, made once by one thread block: all blocks that assign tokens read them.
#pragma once

#include <cuda_pipeline_primitives.h>

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
  __device__ int64_t row(int e) const { return static_cast<int64_t>(e) * max_replicas; }
  // None beyond the row's end.
  __device__ int32_t slot(int e, int r) const { return r < max_replicas ? log2phy[row(e) + r] : kNoSlot; }
  __device__ Replica replica(int e, int r) const { return {r < max_replicas ? split[row(e) + r] : 0.0f, slot(e, r)}; }
  // From the row's entry r on, which is even, all loads before the first use of any.
  template <int kSlots>
  __device__ void slots(int e, int r, int32_t (&slots)[kSlots]) const {
#pragma unroll
    for (int k = 0; k < kSlots; k += 2) {
      if (max_replicas % 2 == 0 && r + k < max_replicas) {
        const int2 two = *reinterpret_cast<const int2*>(log2phy + row(e) + r + k);
        slots[k] = two.x, slots[k + 1] = two.y;
      } else {
        slots[k] = slot(e, r + k), slots[k + 1] = slot(e, r + k + 1);
      }
    }
  }
};

// Makes them, by `num_threads` threads of the block, which are all that have not left. A thread has an expert, and
// finds places for its shares; then one has a share.
class ShareMaker {
 public:
  // Of shared memory, for `room` shares, num_physical at most and fewer than 2^16.
  __host__ __device__ static size_t bytes(uint32_t room) { return room * (sizeof(Place) + sizeof(float)); }
  // `used`: in shared memory too, beside `memory`.
  __device__ ShareMaker(const Rows& in, const MadeShares& out, uint32_t room, void* memory, uint32_t* used)
      : in_(in),
        out_(out),
        room_(room),
        places_(static_cast<Place*>(memory)),
        parts_(reinterpret_cast<float*>(places_ + room)),
        used_(used) {}

  __device__ void run(uint32_t num_threads) const {
    if (threadIdx.x == 0) *used_ = 0;
    __syncthreads();  // all of the split is written; what was in the memory is read
#pragma unroll 1
    for (int e = threadIdx.x; e < in_.num_experts; e += num_threads) find_places(e);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    const uint32_t used = min(*used_, room_);
    if (threadIdx.x == 0) *out_.used = used;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < used; i += num_threads) make_share_at(i);
  }

 private:
  static constexpr int kSlots = 8;  // that a thread reads at once
  static constexpr int kParts = 4;

  // Whose share has a place: expert's shares have `count` places from `first` on; 0: there is no room for all of them.
  struct alignas(8) Place {
    int32_t expert;
    uint16_t first, count;
  };

  // Parts of the split are on their way when this returns.
  __device__ void find_places(int e) const {
    int32_t slots[kSlots];
    in_.slots(e, 0, slots);
    const int32_t first = slots[0];
    uint32_t count = leading(slots);
    for (uint32_t more = count; more == kSlots; count += more) {
      in_.slots(e, count, slots);
      more = leading(slots);
    }
    if (count <= 1) {
      out_.heads[e] = count > 0 ? first : kNoSlot;
      return;
    }
    const uint32_t place = atomicAdd(used_, count);
    const bool fits = place + count <= room_;
    out_.heads[e] = head_of(place, count, room_);
    const Place own = {e, static_cast<uint16_t>(place), static_cast<uint16_t>(fits ? count : 0)};
    const float* row = in_.split + in_.row(e);
    for (uint32_t r = 0; r < count && place + r < room_; ++r) {
      places_[place + r] = own;
      __pipeline_memcpy_async(&parts_[place + r], &row[r], sizeof(float));
    }
  }
  // How many of these slots are replicas' that come before all that are not.
  __device__ uint32_t leading(const int32_t (&slots)[kSlots]) const {
    uint32_t count = 0;
    bool leads = true;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) count += leads &= Replica{0.0f, slots[k]}.is_slot(in_.num_physical);
    return count;
  }
  __device__ void make_share_at(uint32_t i) const {
    const Place own = places_[i];
    const int32_t slot = in_.slot(own.expert, i - own.first);
    const uint32_t load = static_cast<uint32_t>(max(in_.load[own.expert], 0));
    out_.expert_of[i] = own.expert;
    if (own.count == 0) {
      out_.shares[i] = {slot, 0, 0, 0};
      return;
    }
    // visit(j, replica), several loads before the first use of any.
    const uint32_t end = own.first + own.count;
    const auto for_row = [&](auto visit) {
#pragma unroll 1
      for (uint32_t first = own.first; first < end; first += kParts) {
        Replica replicas[kParts];
#pragma unroll
        for (uint32_t k = 0; k < kParts; ++k) replicas[k] = {first + k < end ? parts_[first + k] : 0.0f, kNoSlot};
#pragma unroll
        for (uint32_t k = 0; k < kParts; ++k) visit(first + k, replicas[k]);
      }
    };
    float largest = 0.0f;
    for_row([&](uint32_t, const Replica& replica) { largest = fmaxf(largest, replica.positive()); });
    const Weigher weigher(largest, in_.max_replicas);
    uint32_t total = 0, before = 0, weight = 1;  // of weights, `before` those of the replicas before this one
    for_row([&](uint32_t j, const Replica& replica) {
      const uint32_t other = weigher.weight(replica);
      total += other;
      if (j < i) before += other;
      if (j == i) weight = other;
    });
    if (total == 0) total = own.count, before = i - own.first, weight = 1;  // nothing for any of them
    out_.shares[i] =
        make_share(slot, tokens_upto(before, total, load), tokens_upto(before + weight, total, load), load);
  }

  const Rows& in_;
  const MadeShares& out_;
  const uint32_t room_;
  Place* const places_;
  float* const parts_;
  uint32_t* const used_;
};

}  // namespace
}  // namespace lplb
