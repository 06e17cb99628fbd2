// The shares of all experts, made once by one thread block: all blocks that assign tokens read them.
#pragma once

#include "assign.h"

namespace lplb {
namespace {

constexpr int kNarrowRow = 4;  // replicas of an expert whose shares a thread makes

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
  // None beyond the row's end.
  __device__ Replica replica(int e, int r) const {
    if (r >= max_replicas) return {0.0f, kNoSlot};
    const int64_t entry = static_cast<int64_t>(e) * max_replicas + r;
    return {split[entry], log2phy[entry]};
  }
  // The first kNarrowRow of an expert's row, all loads before the first use of any.
  __device__ void first_replicas(int e, Replica (&row)[kNarrowRow]) const {
    const int64_t entry = static_cast<int64_t>(e) * max_replicas;
#pragma unroll
    for (int r = 0; r < kNarrowRow; r += 2) {
      if (max_replicas % 2 == 0 && r < max_replicas) {
        const int2 slots = *reinterpret_cast<const int2*>(log2phy + entry + r);
        const float2 parts = *reinterpret_cast<const float2*>(split + entry + r);
        row[r] = {parts.x, slots.x}, row[r + 1] = {parts.y, slots.y};
      } else {
        row[r] = replica(e, r), row[r + 1] = replica(e, r + 1);
      }
    }
  }
};

// Makes them, by `num_threads` threads of the block, whole warps, which are all that have not left. `used`: in shared
// memory. `room`: for so many shares, num_physical at most.
class ShareMaker {
 public:
  __device__ ShareMaker(const Rows& in, const MadeShares& out, uint32_t room, uint32_t* used)
      : in_(in), out_(out), room_(room), used_(used), lane_(threadIdx.x % kWarp) {}

  // A lane makes the shares of an expert with few replicas; then the warp those of the others, a replica a lane.
  __device__ void run(int num_threads) const {
    const int num_warps = num_threads / kWarp, warp = threadIdx.x / kWarp;
    const int each = min((in_.num_experts - 1) / num_warps + 1, kWarp);
    if (threadIdx.x == 0) *used_ = 0;
    __syncthreads();
#pragma unroll 1
    for (int first = warp * each; first < in_.num_experts; first += num_warps * each) {
      const bool is_expert = lane_ < each && first + lane_ < in_.num_experts;
      const bool is_long = is_expert && !make_narrow_row(first + lane_);
      // The next row is read while one is worked on.
      const auto read = [&](unsigned left) {
        return left != 0 ? in_.replica(first + __ffs(left) - 1, lane_) : Replica{};
      };
      unsigned left = __ballot_sync(kFullWarp, is_long);
      Replica next = read(left);
#pragma unroll 1
      while (left != 0) {
        const int e = first + __ffs(left) - 1;
        const Replica replica = next;
        left &= left - 1;
        next = read(left);
        make_row(e, replica);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) *out_.used = min(*used_, room_);
  }

 private:
  static constexpr int kWarp = 32;
  static constexpr unsigned kFullWarp = 0xffffffffu;

  // The place of an expert's first share.
  __device__ uint32_t find_place(int e, uint32_t count) const {
    const uint32_t place = atomicAdd(used_, count);
    out_.heads[e] = head_of(place, count, room_);
    return place;
  }
  // Share r of `count`. Where there is no room for all of an expert's, those that there is room for take nothing.
  __device__ void store(int e, uint32_t place, uint32_t r, uint32_t count, const Share& share) const {
    const uint32_t i = place + r;
    if (i >= room_) return;
    out_.shares[i] = place + count <= room_ ? share : Share{share.slot, 0, 0, 0};
    out_.expert_of[i] = e;
  }
  // Unless its row goes on.
  __device__ bool make_narrow_row(int e) const {
    Replica row[kNarrowRow];
    in_.first_replicas(e, row);
    const int32_t load = in_.load[e];
    uint32_t count = 0;
#pragma unroll
    for (int r = 0; r < kNarrowRow && row[r].is_slot(in_.num_physical); ++r) ++count;
    if (count <= 1) {
      out_.heads[e] = count > 0 ? row[0].slot : kNoSlot;
      return true;
    }
    if (count == kNarrowRow && in_.max_replicas > kNarrowRow) return false;
    const uint32_t place = find_place(e, count);
    const auto read = [&](int r) { return row[r]; };
    Shares<decltype(read), kNarrowRow> shares(read, in_.max_replicas, in_.num_physical, load);
#pragma unroll
    for (uint32_t r = 0; r < kNarrowRow; ++r) {
      if (r < count) store(e, place, r, count, shares.next(r));
    }
    return true;
  }
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
    const uint32_t place = __shfl_sync(kFullWarp, lane_ == 0 ? find_place(e, count) : 0, 0);
    largest = __uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(largest)));  // not negative
    const Weigher weigher(largest, in_.max_replicas);
    uint32_t total = 0;
    for (uint32_t r = lane_; r < count; r += kWarp) total += weigher.weight(replica(r));
    total = __reduce_add_sync(kFullWarp, total);
    const bool is_even = total == 0;  // nothing for any of them
    if (is_even) total = count;
    uint32_t before = 0;  // the sum of weights
#pragma unroll 1
    for (uint32_t begin = 0; begin < count; begin += kWarp) {
      const uint32_t r = begin + lane_;
      const Replica own = replica(r);
      const uint32_t weight = r >= count ? 0 : is_even ? 1 : weigher.weight(own);
      uint32_t upto = weight;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFullWarp, upto, step);
        if (lane_ >= step) upto += other;
      }
      upto += before;
      before = __shfl_sync(kFullWarp, upto, kWarp - 1);
      if (r >= count) continue;
      const uint32_t from = tokens_upto(upto - weight, total, load), to = tokens_upto(upto, total, load);
      store(e, place, r, count, make_share(own.slot, from, to, load));
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
