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
      if (max_replicas % 2 == 0) {
        int2 two = {kNoSlot, kNoSlot};
        if (r + k < max_replicas) two = *reinterpret_cast<const int2*>(log2phy + row(e) + r + k);
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
  __host__ __device__ static size_t bytes(uint32_t room) {
    return room * (sizeof(Place) + sizeof(float) + sizeof(uint32_t));
  }
  // `used`: in shared memory too, beside `memory`.
  __device__ ShareMaker(const Rows& in, const MadeShares& out, uint32_t room, void* memory, uint32_t* used)
      : in_(in),
        out_(out),
        room_(static_cast<int>(room)),
        places_(static_cast<Place*>(memory)),
        parts_(reinterpret_cast<float*>(places_ + room)),
        weights_(reinterpret_cast<uint32_t*>(parts_ + room)),
        used_(used) {}

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
      __pipeline_memcpy_async(parts_ + i, in_.split + in_.row(own.expert) + (i - own.first), sizeof(float));
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < used; i += num_threads) weights_[i] = weight_at(places_[i], i);
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < used; i += num_threads) {
      const Place own = places_[i];
      out_.shares[i] = share_at(own, i);
      out_.expert_of[i] = own.expert;
    }
  }

 private:
  static constexpr int kAtOnce = 8;  // values that a thread reads before the first use of any

  // Whose share has a place: those of the expert have `count` places from `first` on; 0: there is no room for all.
  struct alignas(8) Place {
    int32_t expert;
    uint16_t first, count;
  };

  __device__ void find_places(int e) const {
    int32_t slots[kAtOnce];
    in_.slots(e, 0, slots);
    const int32_t first = slots[0];
    int count = leading(slots);
    for (int more = count; more == kAtOnce; count += more) {
      in_.slots(e, count, slots);
      more = leading(slots);
    }
    if (count <= 1) {
      out_.heads[e] = count > 0 ? first : kNoSlot;
      return;
    }
    const uint32_t place = atomicAdd(used_, static_cast<uint32_t>(count));
    const int32_t head = head_of(place, count, room_);
    out_.heads[e] = head;
    if (place >= static_cast<uint32_t>(room_)) return;
    const Place own = {e, static_cast<uint16_t>(place), static_cast<uint16_t>(head == kNotKept ? 0 : count)};
    const int kept = min(count, room_ - static_cast<int>(place));
    for (int r = 0; r < kept; ++r) places_[place + r] = own;
  }
  // How many of these slots are replicas' that come before all that are not.
  __device__ int leading(const int32_t (&slots)[kAtOnce]) const {
    int count = 0;
    bool leads = true;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) count += leads &= Replica{0.0f, slots[k]}.is_slot(in_.num_physical);
    return count;
  }
  // visit(j, value) for all places of an expert; beyond them the value is 0.
  template <class Value, class Visit>
  __device__ static void for_row(const Place& own, const Value* values, Visit visit) {
    const int end = own.first + own.count;
#pragma unroll 1
    for (int first = own.first; first < end; first += kAtOnce) {
      Value read[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) read[k] = first + k < end ? values[first + k] : Value{};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) visit(first + k, read[k]);
    }
  }
  __device__ uint32_t weight_at(const Place& own, int i) const {
    float largest = 0.0f;
    for_row(own, parts_, [&](int, float part) { largest = fmaxf(largest, part); });  // never NaN
    return Weigher(largest, in_.max_replicas).weight({parts_[i], kNoSlot});
  }
  __device__ Share share_at(const Place& own, int i) const {
    const int r = i - own.first;
    const int32_t slot = in_.log2phy[in_.row(own.expert) + r];
    const uint32_t load = static_cast<uint32_t>(max(in_.load[own.expert], 0));
    if (own.count == 0) return {slot, 0, 0, 0};
    uint32_t total = 0, before = 0, weight = weights_[i];
    for_row(own, weights_, [&](int j, uint32_t other) {
      total += other;
      if (j < i) before += other;
    });
    if (total == 0) total = own.count, before = r, weight = 1;  // nothing for any of them
    return make_share(slot, tokens_upto(before, total, load), tokens_upto(before + weight, total, load), load);
  }

  const Rows& in_;
  const MadeShares& out_;
  const int room_;
  Place* const places_;
  float* const parts_;
  uint32_t* const weights_;
  uint32_t* const used_;
};

}  // namespace
}  // namespace lplb
