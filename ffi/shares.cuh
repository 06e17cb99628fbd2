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
      : split(in.split + batch * shape.count.num_experts * shape.max_replicas),
        log2phy(in.log2phy + batch * shape.count.num_experts * shape.max_replicas),
        load(in.load + batch * shape.count.num_experts),
        num_experts(shape.count.num_experts),
        max_replicas(shape.max_replicas),
        num_physical(shape.num_physical) {}
  // None beyond the row's end.
  __device__ int32_t slot(int e, int r) const {
    return r < max_replicas ? log2phy[static_cast<int64_t>(e) * max_replicas + r] : kNoSlot;
  }
  __device__ Replica replica(int e, int r) const {
    return {r < max_replicas ? split[static_cast<int64_t>(e) * max_replicas + r] : 0.0f, slot(e, r)};
  }
};

// Makes them, by all threads of the block, of which there are whole warps. `used`: in shared memory. `room`: for so
// many shares, num_physical at most.
class ShareMaker {
 public:
  __device__ ShareMaker(const Rows& in, const MadeShares& out, uint32_t room, uint32_t* used)
      : in_(in), out_(out), room_(room), used_(used), lane_(threadIdx.x % kWarp) {}

  // A lane looks whether an expert has several replicas; then the warp makes the shares of those that do, a replica a
  // lane.
  __device__ void run() const {
    const int num_warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    const int each = min((in_.num_experts - 1) / num_warps + 1, kWarp);
    if (threadIdx.x == 0) *used_ = 0;
    __syncthreads();
#pragma unroll 1
    for (int first = warp * each; first < in_.num_experts; first += num_warps * each) {
      const int e = first + lane_;
      const bool is_one = lane_ < each && e < in_.num_experts;
      const Replica home = {0.0f, is_one ? in_.slot(e, 0) : kNoSlot}, copy = {0.0f, is_one ? in_.slot(e, 1) : kNoSlot};
      const bool has_home = home.is_slot(in_.num_physical), has_several = has_home && copy.is_slot(in_.num_physical);
      if (is_one && !has_several) out_.heads[e] = has_home ? home.slot : kNoSlot;
      // The next row is read while one is worked on.
      const auto read = [&](unsigned left) {
        return left != 0 ? in_.replica(first + __ffs(left) - 1, lane_) : Replica{};
      };
      unsigned left = __ballot_sync(kFullWarp, has_several);
      Replica next = read(left);
#pragma unroll 1
      while (left != 0) {
        const int which = first + __ffs(left) - 1;
        const Replica replica = next;
        left &= left - 1;
        next = read(left);
        make_row(which, replica);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) *out_.used = min(*used_, room_);
  }

 private:
  static constexpr int kWarp = 32;
  static constexpr unsigned kFullWarp = 0xffffffffu;

  // The warp makes an expert's shares. `first`: the lane's replica of the first so many.
  __device__ void make_row(int e, const Replica& first) const {
    const uint32_t load = static_cast<uint32_t>(max(in_.load[e], 0));
    const auto replica = [&](uint32_t r) { return r < kWarp ? first : in_.replica(e, r); };
    uint32_t count = 0;
    float largest = 0.0f;
    for (int leading = kWarp; leading == kWarp; count += leading) {
      const Replica own = replica(count + lane_);
      const unsigned none = ~__ballot_sync(kFullWarp, own.is_slot(in_.num_physical));
      leading = none == 0 ? kWarp : __ffs(none) - 1;
      if (lane_ < leading) largest = fmaxf(largest, own.positive());
    }
    uint32_t place = 0;
    if (lane_ == 0) {
      place = atomicAdd(used_, count);
      out_.heads[e] = head_of(place, count, room_);
    }
    place = __shfl_sync(kFullWarp, place, 0);
    largest = __uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(largest)));  // not negative
    const Weigher weigher(largest, in_.max_replicas);
    uint32_t total = 0;
    for (uint32_t r = lane_; r < count; r += kWarp) total += weigher.weight(replica(r));
    total = __reduce_add_sync(kFullWarp, total);
    const bool is_even = total == 0;  // nothing for any of them
    if (is_even) total = count;
    uint32_t sum = 0;  // of the weights of those before
#pragma unroll 1
    for (uint32_t begin = 0; begin < count; begin += kWarp) {
      const uint32_t r = begin + lane_, i = place + r;
      const Replica own = replica(r);
      const uint32_t weight = r >= count ? 0 : is_even ? 1 : weigher.weight(own);
      uint32_t upto = weight;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFullWarp, upto, step);
        if (lane_ >= step) upto += other;
      }
      upto += sum;
      sum = __shfl_sync(kFullWarp, upto, kWarp - 1);
      if (r >= count || i >= room_) continue;
      const uint32_t from = tokens_upto(upto - weight, total, load), to = tokens_upto(upto, total, load);
      // Where there is no room for all of an expert's, those that there is room for take nothing.
      out_.shares[i] = place + count <= room_ ? make_share(own.slot, from, to, load) : Share{own.slot, 0, 0, 0};
      out_.expert_of[i] = e;
    }
  }

  const Rows& in_;
  const MadeShares& out_;
  const uint32_t room_;
  uint32_t* const used_;
  const int lane_;
};

}  // namespace
}  // namespace lplb
