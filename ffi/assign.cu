#include <type_traits>

#include "assign.h"
#include "launch.cuh"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 16, kLeastWarps = 4;  // powers of two
constexpr int kMaxIds = 4;                      // of a thread at once, where there are many
constexpr int kNarrowRow = 4;                   // replicas of a row that a thread reads
constexpr int kWideLanes = 8;                   // that read a row with more, together
constexpr int kMostOfLane = 8;                  // replicas of it that a lane has at once
constexpr size_t kSharedBytes = 98 * 1024;      // what every device has

// A block's shared memory. Experts are padded so that each warp's counts can be stored eight at a time.
struct Shared {
  uint16_t* of_warp;  // [num_warps, padded experts] tokens of the tile, then those up to and with each warp's
  uint32_t* seen;     // [padded experts] number of the tile's first token
  char* end;          // of the counts

  __host__ __device__ static int padded(int experts) { return (experts + 7) / 8 * 8; }
  // Of the counts, which share it with the ranks' sums.
  __host__ __device__ static size_t bytes(const AssignShape& shape, int num_warps) {
    const size_t bytes = padded(shape.count.num_experts) * (num_warps * sizeof(uint16_t) + sizeof(uint32_t));
    const size_t for_ranks = (shape.num_ranks + 3) / 4 * 4 * sizeof(uint32_t);
    return bytes < for_ranks ? for_ranks : bytes;
  }
  __device__ Shared(void* memory, const AssignShape& shape, int num_warps)
      : of_warp(static_cast<uint16_t*>(memory)),
        seen(reinterpret_cast<uint32_t*>(of_warp + num_warps * padded(shape.count.num_experts))),
        end(static_cast<char*>(memory) + bytes(shape, num_warps)) {}
};

// What follows the counts: where experts have few replicas, and all fit, a row of shares for each; else this (kWide).
struct Wide {
  uint32_t* used;        // how many shares were asked for
  uint32_t* num_listed;  // experts
  int32_t* heads;        // [padded experts] see head_of
  uint16_t* listed;      // [padded experts] those with kNarrowRow replicas or more
  Share* shares;         // of experts with several replicas: next to each other, experts in any order, it does not show

  static constexpr size_t kCounters = 4 * sizeof(uint32_t);
  // Of all but the shares.
  __host__ __device__ static size_t bytes(int experts) {
    return kCounters + Shared::padded(experts) * (sizeof(int32_t) + sizeof(uint16_t));
  }
  __device__ Wide(char* memory, int experts)
      : used(reinterpret_cast<uint32_t*>(memory)),
        num_listed(used + 1),
        heads(reinterpret_cast<int32_t*>(memory + kCounters)),
        listed(reinterpret_cast<uint16_t*>(heads + Shared::padded(experts))),
        shares(reinterpret_cast<Share*>(memory + bytes(experts))) {}
};

// Waits for the launch before this one, where this kernel was launched ahead of its end.
template <bool kAhead>
__device__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kAhead) cudaGridDependencySynchronize();
#endif
}

// ---- Shares ---------------------------------------------------------------------------------------------------------

// The first replicas of an expert's row: as many at a time as its place allows.
__device__ void read_first(const float* split, const int32_t* log2phy, int replicas, Replica (&row)[kNarrowRow]) {
  if (replicas % 4 == 0) {
    const float4 parts = *reinterpret_cast<const float4*>(split);
    const int4 slots = *reinterpret_cast<const int4*>(log2phy);
    row[0] = {parts.x, slots.x}, row[1] = {parts.y, slots.y};
    row[2] = {parts.z, slots.z}, row[3] = {parts.w, slots.w};
    return;
  }
#pragma unroll
  for (int r = 0; r < kNarrowRow; r += 2) {
    row[r] = row[r + 1] = {0.0f, -1};
    if (replicas % 2 == 0) {
      if (r >= replicas) continue;
      const float2 parts = *reinterpret_cast<const float2*>(split + r);
      const int2 slots = *reinterpret_cast<const int2*>(log2phy + r);
      row[r] = {parts.x, slots.x}, row[r + 1] = {parts.y, slots.y};
    } else {
      if (r < replicas) row[r] = {split[r], log2phy[r]};
      if (r + 1 < replicas) row[r + 1] = {split[r + 1], log2phy[r + 1]};
    }
  }
}

// A thread writes the shares of an expert with up to kNarrowRow replicas.
__device__ void store_shares(const AssignShape& shape, const AssignOperands& in, int64_t batch, int e, Share* shares) {
  const int replicas = shape.max_replicas;
  const int64_t expert = batch * shape.count.num_experts + e, begin = expert * replicas;
  const int32_t load = in.load[expert];
  Replica row[kNarrowRow] = {};
  const auto read = [&](int r) { return row[r]; };
  if (replicas == 2) {
    // The most frequent kind.
    const float2 parts = reinterpret_cast<const float2*>(in.split)[expert];
    const int2 slots = reinterpret_cast<const int2*>(in.log2phy)[expert];
    row[0] = {parts.x, slots.x}, row[1] = {parts.y, slots.y};
    write_shares<2>(read, 2, shape.num_physical, load, shares);
  } else {
    read_first(in.split + begin, in.log2phy + begin, replicas, row);
    write_shares<kNarrowRow>(read, replicas, shape.num_physical, load, shares);
  }
}

// What kWide has of each expert: the slot of its only replica, or kNoSlot, or, negative too, the place of its first
// share, or that its shares did not fit.
constexpr int32_t kNoSlot = -1, kNotKept = INT32_MIN;
__device__ bool is_only_slot(int32_t head) { return head >= kNoSlot; }
__device__ int32_t head_of(uint32_t place, int count, uint32_t room) {
  return place + count <= room ? kNoSlot - 1 - static_cast<int32_t>(place) : kNotKept;
}
__device__ uint32_t place_of(int32_t head) { return static_cast<uint32_t>(kNoSlot - 1 - head); }

// What a share is made of, in its place: weights up to and with its replica, those of all replicas of its expert, and
// the expert's load, with another bit where it is the first.
constexpr uint32_t kFirst = 1u << 31;
__device__ Share prepared_share(int32_t slot, uint32_t weights, uint32_t total, uint32_t load, bool first) {
  return {slot, weights, total, first ? load | kFirst : load};
}
__device__ Share finished_share(const Share& prepared, const Share& before) {
  const uint32_t load = prepared.ratio & ~kFirst, total = prepared.left;
  const uint32_t begin = prepared.ratio == load ? tokens_upto(before.quota, total, load) : 0;
  return make_share(prepared.slot, begin, tokens_upto(prepared.quota, total, load), load);
}

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
};

// Writes all heads, but those of experts with kNarrowRow replicas or more, which it lists, and prepares the shares of
// experts with fewer. For all threads, with the counters zero. For `room` shares there is room.
__device__ void prepare_narrow_shares(const Rows& in, const Wide& wide, uint32_t room) {
  constexpr int kAtOnce = 2;  // experts whose operands a thread loads together
  const int experts = in.num_experts, threads = blockDim.x, lane = threadIdx.x % kWarp;
  // A warp's lanes go along together.
#pragma unroll 1
  for (int begin = threadIdx.x - lane; begin < experts; begin += kAtOnce * threads) {
    Replica rows[kAtOnce][kNarrowRow];
    int32_t load[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int e = begin + lane + k * threads;
      load[k] = 0;
#pragma unroll
      for (int r = 0; r < kNarrowRow; ++r) rows[k][r] = {0.0f, kNoSlot};
      if (e < experts) {
        load[k] = in.load[e];
        const int64_t row = static_cast<int64_t>(e) * in.max_replicas;
        read_first(in.split + row, in.log2phy + row, in.max_replicas, rows[k]);
      }
    }
#pragma unroll 1
    for (int k = 0, first = begin; k < kAtOnce && first < experts; ++k, first += threads) {
      const int e = first + lane;
      const auto read = [&](int r) { return rows[0][r]; };
      Shares<decltype(read), kNarrowRow> row(read, in.max_replicas, in.num_physical, load[0]);
      const int count = row.count();
      const bool several = count > 1 && count < kNarrowRow;
      // The warp asks for room once. Two bits make up the number of several replicas.
      const unsigned twos = __ballot_sync(kFullWarp, several), ones = __ballot_sync(kFullWarp, several && count == 3);
      const unsigned many = __ballot_sync(kFullWarp, count == kNarrowRow), before = (1u << lane) - 1;
      uint32_t place = 0, at = 0;
      if (lane == 0) {
        place = atomicAdd(wide.used, static_cast<uint32_t>(2 * __popc(twos) + __popc(ones)));
        at = atomicAdd(wide.num_listed, static_cast<uint32_t>(__popc(many)));
      }
      place = __shfl_sync(kFullWarp, place, 0) + 2 * __popc(twos & before) + __popc(ones & before);
      at = __shfl_sync(kFullWarp, at, 0) + __popc(many & before);
      if (count == kNarrowRow) {
        wide.listed[at] = static_cast<uint16_t>(e);
      } else if (e < experts) {
        const int32_t head = several ? head_of(place, count, room) : count > 0 ? rows[0][0].slot : kNoSlot;
        wide.heads[e] = head;
        if (several && head != kNotKept) {
#pragma unroll
          for (int r = 0; r + 1 < kNarrowRow; ++r) {
            if (r >= count) break;
            wide.shares[place + r] =
                prepared_share(rows[0][r].slot, row.next_sum(r), row.total(), row.tokens(), r == 0);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kNarrowRow; ++r) rows[0][r] = rows[1][r];
      load[0] = load[1];
    }
  }
}

// Of the first lanes of a group of kWideLanes up to and with each: their sum.
__device__ uint32_t sum_upto(uint32_t value) {
#pragma unroll
  for (int step = 1; step < kWideLanes; step *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, step, kWideLanes);
    if (threadIdx.x % kWideLanes >= step) value += before;
  }
  return value;
}

// Prepares the shares of the experts listed, kWideLanes lanes those of one, each some that follow each other. For all
// threads.
__device__ void prepare_wide_shares(const Rows& in, const Wide& wide, uint32_t room) {
  const int replicas = in.max_replicas, num_listed = static_cast<int>(*wide.num_listed);
  const int lane = threadIdx.x % kWideLanes, last = kWideLanes - 1, of_warp = threadIdx.x % kWarp / kWideLanes;
  const int of_lane = min((replicas + kWideLanes - 1) / kWideLanes, kMostOfLane), together = of_lane * kWideLanes;
#pragma unroll 1
  for (int first = threadIdx.x / kWarp * (kWarp / kWideLanes); first < num_listed; first += blockDim.x / kWideLanes) {
    // Lanes without an expert go along, with no replicas.
    const bool some = first + of_warp < num_listed;
    const unsigned e = some ? wide.listed[first + of_warp] : 0;
    const uint64_t entry = static_cast<uint64_t>(e) * static_cast<unsigned>(replicas);  // the row's first
    const uint32_t tokens = static_cast<uint32_t>(max(in.load[e], 0));
    Replica row[kMostOfLane];
    // Calls visit(k) for the first n, at most of_lane, of the lane's replicas.
    const auto for_first = [](int n, auto visit) {
#pragma unroll
      for (int k = 0; k < kMostOfLane; ++k) {
        if (k >= n) break;
        visit(k);
      }
    };
    // Reads the row from `begin` on, but not beyond `end`, and returns how much of it is the lane's.
    const auto read_row = [&](int begin, int end) {
      begin += lane * of_lane;
      const int n = min(of_lane, end - begin);
      const uint64_t first_of_lane = entry + begin;
      for_first(n, [&](int k) { row[k] = {in.split[first_of_lane + k], in.log2phy[first_of_lane + k]}; });
      return n;
    };
    int count = 0;
    float largest = 0.0f;
    bool in_registers = true;  // all replicas of the warp's experts, once they are read
#pragma unroll 1
    for (int begin = 0, end = some ? replicas : 0; __any_sync(kFullWarp, begin < end); begin += together) {
      const int n = read_row(begin, end);
      in_registers = begin == 0;
      int leading = 0;
      for_first(n, [&](int k) { leading += leading == k && row[k].is_slot(in.num_physical) ? 1 : 0; });
      // The lane in which replicas end, or the last.
      const unsigned all = __ballot_sync(kFullWarp, leading == of_lane) >> of_warp * kWideLanes;
      const int ends = __ffs(~all | 1u << last) - 1;
      count += ends * of_lane + __shfl_sync(kFullWarp, leading, ends, kWideLanes);
      if (count < begin + together) end = 0;
      if (lane > ends) leading = 0;
      for_first(leading, [&](int k) { largest = fmaxf(largest, row[k].positive()); });
    }
    uint32_t place = 0;
    if (some && lane == 0) {
      place = atomicAdd(wide.used, static_cast<uint32_t>(count));
      wide.heads[e] = head_of(place, count, room);
    }
    place = __shfl_sync(kFullWarp, place, 0, kWideLanes);
#pragma unroll
    for (int step = 1; step < kWideLanes; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
    const Weigher weigher(largest, replicas);
    uint32_t total = 0, sum = 0;  // of the weights of all replicas, and of those before these
    if (!in_registers) {
#pragma unroll 1
      for (int r = lane; r < count; r += kWideLanes) total += weigher.weight({in.split[entry + r], 0});
      total = __shfl_sync(kFullWarp, sum_upto(total), last, kWideLanes);
    }
    const bool fits = place + count <= room;
#pragma unroll 1
    for (int begin = 0; __any_sync(kFullWarp, begin < count); begin += together) {
      if (!in_registers) read_row(begin, count);
      const int first_of_lane = begin + lane * of_lane, n = min(of_lane, count - first_of_lane);
      uint32_t own = 0, upto[kMostOfLane];
      for_first(n, [&](int k) { upto[k] = own += weigher.weight(row[k]); });
      const uint32_t of_lanes = sum_upto(own), here = __shfl_sync(kFullWarp, of_lanes, last, kWideLanes);
      if (in_registers) total = here;
      const uint32_t before = sum + of_lanes - own;
      for_first(fits ? n : 0, [&](int k) {
        const int r = first_of_lane + k;
        // Nothing for any of them: evenly.
        const uint32_t weights = total > 0 ? before + upto[k] : r + 1, all = total > 0 ? total : count;
        wide.shares[place + r] = prepared_share(row[k].slot, weights, all, tokens, r == 0);
      });
      sum += here;
    }
  }
}

// Finishes the first `count` prepared shares, the last first, as each needs the one before it. Where some were not
// kept, the last of these places may hold anything, and nobody reads what becomes of it. For all threads.
__device__ void finish_shares(Share* shares, int count) {
  const int threads = blockDim.x;  // a power of two
#pragma unroll 1
  for (int first = (count - 1) & -threads; first >= 0; first -= threads) {
    const int i = first + threadIdx.x;
    Share share;
    if (i < count) share = finished_share(shares[i], shares[max(i - 1, 0)]);
    __syncthreads();
    if (i < count) shares[i] = share;
  }
}

// Writes all heads and shares (kWide), what follows `at` bytes of shared memory. For all threads, with the counters
// zero. Not inlined: it is large, and called in two places.
__device__ __noinline__ void store_wide_shares(const Rows in, int at, uint32_t room) {
  extern __shared__ uint4 memory[];
  // The compiler does not see where they come from, and would have each load find out.
  __builtin_assume(__isGlobal(in.split));
  __builtin_assume(__isGlobal(in.log2phy));
  __builtin_assume(__isGlobal(in.load));
  const Wide wide(reinterpret_cast<char*>(memory) + at, in.num_experts);
  prepare_narrow_shares(in, wide, room);
  __syncthreads();
  prepare_wide_shares(in, wide, room);
  __syncthreads();
  finish_shares(wide.shares, static_cast<int>(min(*wide.used, room)));
}

// Calls visit(next) as with_shares in assign_kernel does, for an expert whose shares did not fit. Not inlined: this is
// rare, and large.
template <class Visit>
__device__ __noinline__ auto with_computed_shares(const Rows in, int e, Visit visit) {
  const int64_t row = static_cast<int64_t>(e) * in.max_replicas;
  const auto read = [&](int r) { return Replica{in.split[row + r], in.log2phy[row + r]}; };
  Shares<decltype(read)> shares(read, in.max_replicas, in.num_physical, in.load[e]);
  int r = 0;
  return visit([&] { return shares.next(r++); });
}

// ---- Tokens ---------------------------------------------------------------------------------------------------------

// Numbers a warp's ids among those of the same expert, 32 at a time, and adds them to its counts, which are zero.
template <int kIds>
__device__ void number_in_warp(const int32_t (&ids)[kIds], uint16_t* counts, uint32_t (&numbers)[kIds]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kIds; ++k) {
    const unsigned same = __match_any_sync(kFullWarp, ids[k]);
    const unsigned before = k > 0 && ids[k] >= 0 ? counts[ids[k]] : 0;
    numbers[k] = before + __popc(same & ((1u << lane) - 1));
    if (k > 0) __syncwarp();
    // The first of them counts for all.
    if (ids[k] >= 0 && numbers[k] == before) counts[ids[k]] = static_cast<uint16_t>(before + __popc(same));
    if (k + 1 < kIds) __syncwarp();
  }
}

// Counts of each warp become those up to and with it. A thread adds for two experts at once: counts of a tile stay
// below 2^16.
__device__ void add_up_warps(int padded, int num_warps, uint16_t* of_warp) {
  const int pairs = padded / 2;
#pragma unroll 1
  for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
    uint32_t* counts = reinterpret_cast<uint32_t*>(of_warp) + pair;
    uint32_t sum = 0;
    for (int warp = 0; warp < num_warps; warp += kLeastWarps, counts += kLeastWarps * pairs) {
      uint32_t here[kLeastWarps];
#pragma unroll
      for (int w = 0; w < kLeastWarps; ++w) here[w] = counts[w * pairs];
#pragma unroll
      for (int w = 0; w < kLeastWarps; ++w) counts[w * pairs] = sum += here[w];
    }
  }
}

// Adds up the quotas of each rank's slots, in `sums`, which are zero. with_shares(e, visit) as in assign_kernel.
template <class WithShares>
__device__ void add_ranks(const AssignShape& shape, WithShares with_shares, uint32_t* sums, int32_t* rank_load) {
  const unsigned slots_per_rank = shape.num_physical / shape.num_ranks;
  for (int e = threadIdx.x; e < shape.count.num_experts; e += blockDim.x) {
    with_shares(e, [=](auto next) {
      for_each_quota(next, [=](int32_t slot, uint32_t quota) {
        atomicAdd(&sums[static_cast<unsigned>(slot) / slots_per_rank], quota);
      });
      return 0;
    });
  }
  __syncthreads();
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) rank_load[g] = static_cast<int32_t>(sums[g]);
}

// Blocks go through the chunks, the ranks' sums before them, and assign a chunk tile by tile: kIds ids a thread. Each
// block writes the shares of all experts to its shared memory. Where experts have few replicas, and rows of shares fit,
// a thread writes an expert's row. Else (kWide) most experts still have one replica, and a head is all that is kept of
// them; the shares of the others are next to each other. What these are made of is prepared first, by a thread for an
// expert with few replicas, and by kWideLanes lanes for one with more; then all threads finish one share each. Those
// that do not fit are computed anew for each token. The split and log2phy come last, see assign_after_solve_cuda.
template <int kIds, bool kWide, bool kAhead>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, const AssignResults out,
                  const uint32_t room) {
  extern __shared__ uint4 memory[];
  const int experts = shape.count.num_experts, padded = Shared::padded(experts), threads = blockDim.x;
  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Shared shared(memory, shape, num_warps);
  [[maybe_unused]] const Wide wide(shared.end, experts);  // where kWide
  [[maybe_unused]] Share* const rows = reinterpret_cast<Share*>(shared.end);  // elsewhere
  uint16_t* counts = shared.of_warp + warp * padded;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    // Calls visit(next), where next() gives an expert's shares one after the other, and returns what it does.
    const auto with_shares = [&](int e, auto visit) {
      if constexpr (kWide) {
        const int32_t head = wide.heads[e];
        if (is_only_slot(head)) {
          const uint32_t tokens = static_cast<uint32_t>(max(in.load[b * experts + e], 0));
          return visit([&] { return make_share(head, 0, tokens, tokens); });
        }
        if (head == kNotKept) return with_computed_shares(Rows(shape, in, b), e, visit);
        const Share* share = wide.shares + place_of(head);
        return visit([&] { return *share++; });
      } else {
        const Share* share = rows + e * shape.max_replicas;
        return visit([&] { return *share++; });
      }
    };
    const auto store = [&](int e) { store_shares(shape, in, b, e, rows + e * shape.max_replicas); };
    const auto get_shares = [&] {
      wait_for_launch<kAhead>();
      if constexpr (kWide) {
        store_wide_shares(Rows(shape, in, b), static_cast<int>(Shared::bytes(shape, num_warps)), room);
      } else {
        for (int e = threadIdx.x; e < experts; e += threads) store(e);
      }
    };
    if (kWide && threadIdx.x == 0) *wide.used = *wide.num_listed = 0;
    bool has_shares = false;
    for (int item = blockIdx.x; item <= shape.count.num_chunks; item += gridDim.x) {
      if (item == 0) {
        uint32_t* sums = reinterpret_cast<uint32_t*>(memory);
        for (int g = threadIdx.x; g < shape.num_ranks; g += threads) sums[g] = 0;
        __syncthreads();
        get_shares();
        has_shares = true;
        __syncthreads();
        add_ranks(shape, with_shares, sums, out.rank_load + b * shape.num_ranks);
        __syncthreads();
        continue;
      }
      const int64_t chunk = item - 1, begin = chunk * shape.count.chunk_size;
      const int num_ids = static_cast<int>(min(shape.count.num_ids - begin, shape.count.chunk_size));
      const int32_t* expert_ids = in.expert_ids + b * shape.count.num_ids + begin;
      int32_t* results = out.physical_ids + b * shape.count.num_ids + begin;
      const int32_t* starts = in.starts + (b * shape.count.num_chunks + chunk) * experts;
      const int32_t* offset = in.offset + b * experts;

      // A warp's ids are next to each other, and so are 32 of them that it takes at once.
      const int first = warp * kIds * kWarp + lane;
      int32_t ids[kIds];
      const auto load_ids = [&](int tile) {
#pragma unroll
        for (int k = 0; k < kIds; ++k) {
          const int i = tile + first + k * kWarp;
          ids[k] = i < num_ids ? expert_ids[i] : -1;
        }
      };
      const auto clear_counts = [&] {
#pragma unroll 1
        for (int i = lane; i < padded / 8; i += kWarp) reinterpret_cast<uint4*>(counts)[i] = make_uint4(0, 0, 0, 0);
        __syncwarp();
      };
      load_ids(0);
      clear_counts();
      for (int e = threadIdx.x; e < experts; e += threads) {
        // All loads before the first use of any.
        const int32_t start = starts[e], before = offset[e];
        if (!kWide && !kAhead && !has_shares) store(e);
        shared.seen[e] = static_cast<uint32_t>(start) + static_cast<uint32_t>(max(0, before));
      }
      for (int tile = 0; tile < num_ids; tile += kIds * threads) {
        if (tile > 0) {
          load_ids(tile);
          if (warp == num_warps - 1) {
#pragma unroll 1
            for (int e = lane; e < experts; e += kWarp) shared.seen[e] += counts[e];
            __syncwarp();
          }
          clear_counts();
        }
#pragma unroll
        for (int k = 0; k < kIds; ++k) ids[k] = ids[k] < experts ? max(ids[k], -1) : -1;
        uint32_t numbers[kIds];
        number_in_warp(ids, counts, numbers);
        __syncthreads();
        add_up_warps(padded, num_warps, shared.of_warp);
        if ((kWide || kAhead) && !has_shares) get_shares();
        has_shares = true;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kIds; ++k) {
          const int i = tile + first + k * kWarp, e = ids[k];
          if (i >= num_ids) continue;
          int32_t slot = -1;
          if (e >= 0) {
            const uint32_t before = warp > 0 ? counts[e - padded] : 0;
            const uint32_t number = shared.seen[e] + before + numbers[k];
            slot = with_shares(e, [=](auto next) { return choose_slot(next, number); });
          }
          results[i] = slot;
        }
        const bool last =
            tile + kIds * threads >= num_ids && item + static_cast<int>(gridDim.x) > shape.count.num_chunks;
        if (!last || b + gridDim.y < shape.count.num_batches) __syncthreads();
      }
    }
  }
  wait_for_launch<kAhead>();  // a block without ids, too: what comes after this kernel relies on the end
}

using Kernel = void (*)(AssignShape, AssignOperands, AssignResults, uint32_t);
// By whether a thread takes several ids at once, kWide, and whether the launch is ahead.
constexpr Kernel kKernels[2][2][2] = {{{assign_kernel<1, false, false>, assign_kernel<1, false, true>},
                                       {assign_kernel<1, true, false>, assign_kernel<1, true, true>}},
                                      {{assign_kernel<kMaxIds, false, false>, assign_kernel<kMaxIds, false, true>},
                                       {assign_kernel<kMaxIds, true, false>, assign_kernel<kMaxIds, true, true>}}};

cudaError_t launch_assign(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                          const AssignResults& out, bool ahead) {
  const int64_t chunk_size = shape.count.chunk_size;
  const int experts = shape.count.num_experts;
  const bool many = chunk_size > kMaxWarps * kWarp;
  // Rows where they fit. Else shares are no more than slots, unless log2phy is not a placement's.
  const size_t in_rows = static_cast<size_t>(experts) * shape.max_replicas;
  const bool wide = shape.max_replicas > kNarrowRow ||
                    Shared::bytes(shape, kLeastWarps) + in_rows * sizeof(Share) > kSharedBytes;
  const size_t wanted = wide ? shape.num_physical : in_rows, others = wide ? Wide::bytes(experts) : 0;
  // Two blocks of those that read wide rows, which takes registers, run beside each other.
  const int most_warps = wide && !many ? kMaxWarps / 2 : kMaxWarps;
  int warps = kLeastWarps;  // leaves room for some shares
  while (warps < most_warps && warps * kWarp * (many ? kMaxIds : 1) < chunk_size &&
         Shared::bytes(shape, 2 * warps) + others + wanted * sizeof(Share) <= kSharedBytes) {
    warps *= 2;
  }
  const size_t before = Shared::bytes(shape, warps) + others, most = (kSharedBytes - before) / sizeof(Share);
  const uint32_t room = static_cast<uint32_t>(wanted < most ? wanted : most);
  return launch(stream, grid_of(shape.count, shape.count.num_chunks + 1), warps * kWarp,
                before + room * sizeof(Share), ahead, kKernels[many][wide][ahead], shape, in, out, room);
}

}  // namespace

cudaError_t prepare_assign_cuda() {
  for (const auto& of_many : kKernels) {
    for (const auto& of_wide : of_many) {
      for (const Kernel kernel : of_wide) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out) {
  return launch_assign(stream, shape, in, out, false);
}

cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    const AssignResults& out) {
  bool hopper;
  const cudaError_t error = runs_hopper_code(&hopper);
  return error != cudaSuccess ? error : launch_assign(stream, shape, in, out, hopper);
}

}  // namespace lplb
