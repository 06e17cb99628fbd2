#include <algorithm>
#include <array>
#include <type_traits>

#include "assign.h"
#include "launch.cuh"
#include "shares.cuh"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kNarrowRow = 4;                   // replicas of an expert whose shares a thread makes
constexpr int kMaxWarps = 16, kLeastWarps = 4;  // powers of two
constexpr int kMaxIds = 4;                      // of a thread at once, where there are many
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

// What follows the counts, where shares are found by their expert's head; else there is a row of shares for each
// expert.
template <bool kNear>
struct Places {
  using Kind = std::conditional_t<kNear, Part, Share>;

  uint32_t* num_used;
  int32_t* heads;  // [padded experts] see head_of
  Kind* places;    // an expert's next to each other
  uint32_t room;   // how many places there are
  // Where tokens stay near where they are, for each place:
  Share* near;      // in the order in which tokens go through them
  uint32_t* skips;  // of these
  uint16_t* expert_of;
  uint16_t* ends;  // [padded experts] behind the last place of each expert that has any

  static constexpr size_t each() {
    return sizeof(Kind) + (kNear ? sizeof(Share) + sizeof(uint32_t) + sizeof(uint16_t) : 0);
  }
  // Of all but the places.
  __host__ __device__ static size_t bytes(int experts) {
    return sizeof(uint4) + Shared::padded(experts) * (sizeof(int32_t) + (kNear ? sizeof(uint16_t) : 0));
  }
  __device__ Places(char* memory, int experts, uint32_t room)
      : num_used(reinterpret_cast<uint32_t*>(memory)),
        heads(reinterpret_cast<int32_t*>(memory + sizeof(uint4))),
        places(reinterpret_cast<Kind*>(memory + bytes(experts))),
        room(room),
        near(reinterpret_cast<Share*>(places + room)),
        skips(reinterpret_cast<uint32_t*>(near + room)),
        expert_of(reinterpret_cast<uint16_t*>(skips + room)),
        ends(reinterpret_cast<uint16_t*>(heads + Shared::padded(experts))) {}
  __device__ uint32_t used() const { return min(*num_used, room); }

  // Where kNear, those of an expert are stored by one thread.
  __device__ void store(int e, const Share* shares, int count) const {
    if (count <= 1) {
      heads[e] = shares[0].slot;
      return;
    }
    const uint32_t first = atomicAdd(num_used, static_cast<uint32_t>(count));
    const int32_t head = head_of(first, count, room);
    heads[e] = head;
    ends[e] = static_cast<uint16_t>(first + count);
    // Without room for all they are computed anew, and what is here counts for nothing.
    for (int i = 0; i < count && first + i < room; ++i) {
      store(first + i, e, shares[i].slot, head != kNotKept ? shares[i].quota : 0);
    }
  }
  __device__ void store(uint32_t place, int e, int32_t slot, uint32_t quota) const {
    places[place] = {slot, quota, 0, 0};
    expert_of[place] = static_cast<uint16_t>(e);
  }
};

// Waits for the launch before this one, where this kernel was launched ahead of its end.
template <bool kAhead>
__device__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kAhead) cudaGridDependencySynchronize();
#endif
}

// ---- Shares ---------------------------------------------------------------------------------------------------------

// A thread writes the shares of an expert with up to kNarrowRow replicas, and returns how many they are.
__device__ int store_shares(const AssignShape& shape, const AssignOperands& in, int64_t batch, int e, Share* shares) {
  const int replicas = shape.max_replicas;
  const int64_t expert = batch * shape.count.num_experts + e;
  const int32_t load = in.load[expert];
  Replica row[kNarrowRow] = {};
  const auto read = [&](int r) { return row[r]; };
  if (replicas == 2) {
    // The most frequent kind: all operands at once.
    const float2 parts = reinterpret_cast<const float2*>(in.split)[expert];
    const int2 slots = reinterpret_cast<const int2*>(in.log2phy)[expert];
    row[0] = {parts.x, slots.x}, row[1] = {parts.y, slots.y};
    return write_shares<2>(read, 2, shape.num_physical, load, shares);
  }
  if (replicas == kNarrowRow) {
    const float4 parts = reinterpret_cast<const float4*>(in.split)[expert];
    const int4 slots = reinterpret_cast<const int4*>(in.log2phy)[expert];
    row[0] = {parts.x, slots.x}, row[1] = {parts.y, slots.y};
    row[2] = {parts.z, slots.z}, row[3] = {parts.w, slots.w};
  } else {
#pragma unroll
    for (int r = 0; r < kNarrowRow; ++r) {
      const int64_t entry = expert * replicas + min(r, replicas - 1);
      row[r] = {in.split[entry], in.log2phy[entry]};
    }
  }
  return write_shares<kNarrowRow>(read, replicas, shape.num_physical, load, shares);
}

// A thread's part of the shares that were made once: read before the first use of any, unless they are many.
template <bool kNear>
class MadePart {
 public:
  MadePart() = default;
  __device__ MadePart(const MadeShares& made, uint32_t room) : used_(*made.used) {
    if (threadIdx.x < room) {
      first_ = made.shares[threadIdx.x];
      if constexpr (kNear) {
        expert_ = made.expert_of[threadIdx.x];
        next_expert_ = made.expert_of[min(threadIdx.x + 1, room - 1)];
      }
    }
  }
  __device__ void store(const MadeShares& made, const Places<kNear>& all) const {
    if (threadIdx.x == 0) *all.num_used = used_;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < used_; i += blockDim.x) {
      const bool is_first = i == threadIdx.x;
      const Share share = is_first ? first_ : made.shares[i];
      if constexpr (kNear) {
        const int e = is_first ? expert_ : made.expert_of[i];
        all.store(i, e, share.slot, share.quota);
        if (i + 1 == used_ || (is_first ? next_expert_ : made.expert_of[i + 1]) != e) {
          all.ends[e] = static_cast<uint16_t>(i + 1);
        }
      } else {
        all.places[i] = share;
      }
    }
  }

 private:
  uint32_t used_;
  Share first_;
  // Where kNear:
  int32_t expert_, next_expert_;
};

// Where a thread's share is, among those of its expert.
struct Row {
  Part* parts = nullptr;
  int expert = 0, first = 0, count = 0, i = 0;

  Row() = default;
  // count 0: there was no room for those of this expert.
  __device__ Row(const Places<true>& all, int place) : expert(all.expert_of[place]) {
    const int32_t head = all.heads[expert];
    first = head == kNotKept ? 0 : static_cast<int>(place_of(head));
    count = head == kNotKept ? 0 : all.ends[expert] - first;
    i = place - first;
    parts = all.places + first;
  }
  __device__ void store(const Places<true>& all, const Nearby::Own& own) const {
    const NearShare share = own.share(count);
    all.near[first + own.place] = share, all.skips[first + own.place] = share.skip;
  }
};

// As the next one, where there are more shares than threads. What is known of a share is made anew in each step.
__device__ __noinline__ void stay_near_many(const Nearby nearby, const Places<true> all) {
  const int used = static_cast<int>(all.used());
  for (int steps = 1; steps <= 3; ++steps) {
#pragma unroll 1
    for (int place = threadIdx.x; place < used; place += blockDim.x) {
      const Row row(all, place);
      if (row.count == 0) continue;
      const auto part = [&](int j) { return row.parts[j]; };
      Nearby::Own own = nearby.on_rank(row.expert, part, row.count, row.i);
      if (steps == 1) row.parts[row.i].on_rank = own.taken;
      if (steps == 1) continue;
      nearby.on_node(part, row.count, row.i, &own);
      if (steps == 2) row.parts[row.i].on_node = own.taken;
      if (steps == 2) continue;
      nearby.anywhere(part, row.count, row.i, &own);
      row.store(all, own);
    }
    __syncthreads();
  }
}

// Makes near shares of the places' parts, which all threads have written. A thread has a place, as each step needs what
// the one before has filled of all replicas of the expert. No step writes what it reads.
__device__ void stay_near(const Nearby& nearby, const Places<true>& all, bool has_nodes) {
  const int used = static_cast<int>(all.used()), place = threadIdx.x;
  if (used > static_cast<int>(blockDim.x)) return stay_near_many(nearby, all);
  Row row;
  if (place < used) row = Row(all, place);
  const bool has_share = row.count > 0;
  const auto part = [&](int j) { return row.parts[j]; };
  Nearby::Own own;
  if (has_share) {
    own = nearby.on_rank(row.expert, part, row.count, row.i);
    row.parts[row.i].on_rank = own.taken;
  }
  __syncthreads();
  if (has_share) nearby.on_node(part, row.count, row.i, &own);
  if (has_nodes) {
    if (has_share) row.parts[row.i].on_node = own.taken;
    __syncthreads();
    if (has_share) nearby.anywhere(part, row.count, row.i, &own);
  }
  if (has_share) row.store(all, own);
}

// Calls visit(next), where next() gives the shares of an expert that did not fit, one after the other. Not inlined:
// this is rare, and large.
template <class Visit>
__device__ __noinline__ auto with_computed_shares(const Rows in, int e, Visit visit) {
  const auto read = [&](int r) { return in.replica(e, r); };
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
#pragma unroll 1
    for (int warp = 0; warp < num_warps; warp += kLeastWarps, counts += kLeastWarps * pairs) {
      uint32_t here[kLeastWarps];
#pragma unroll
      for (int w = 0; w < kLeastWarps; ++w) here[w] = counts[w * pairs];
#pragma unroll
      for (int w = 0; w < kLeastWarps; ++w) counts[w * pairs] = sum += here[w];
    }
  }
}

// Adds up the quotas of each rank's slots, in `sums`, which are zero. for_quotas(add) calls add(slot, quota) for all.
template <class ForQuotas>
__device__ void add_ranks(const AssignShape& shape, ForQuotas for_quotas, uint32_t* sums, int32_t* rank_load) {
  const unsigned slots_per_rank = shape.num_physical / shape.num_ranks;
  for_quotas(
      [=](int32_t slot, uint32_t quota) { atomicAdd(&sums[static_cast<unsigned>(slot) / slots_per_rank], quota); });
  __syncthreads();
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) rank_load[g] = static_cast<int32_t>(sums[g]);
}

// Blocks go through the chunks, the ranks' sums before them, and assign a chunk tile by tile: kIds ids a thread. Each
// block has the shares of all experts in its shared memory. Where experts have few replicas, and rows of shares fit, a
// thread makes an expert's. Else (kMade) they come from a kernel before this one, see shares.cuh. Those that do not fit
// are computed anew for each token. The split and log2phy, or the shares, come last, see assign_after_solve_cuda. Where
// tokens stay near where they are (kNear), they go through near shares, which are made of these, and all of which fit.
template <int kIds, bool kMade, bool kNear, bool kAhead>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, const AssignResults out, const uint32_t room) {
  constexpr bool kPlaced = kMade || kNear;
  extern __shared__ uint4 memory[];
  const int experts = shape.count.num_experts, padded = Shared::padded(experts), threads = blockDim.x;
  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Shared shared(memory, shape, num_warps);
  [[maybe_unused]] const Places<kNear> all(shared.end, experts, room);        // where kPlaced
  [[maybe_unused]] Share* const rows = reinterpret_cast<Share*>(shared.end);  // elsewhere
  uint16_t* counts = shared.of_warp + warp * padded;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    if constexpr (kNear && !kMade) {
      if (threadIdx.x == 0) *all.num_used = 0;
      __syncthreads();
    }
    // Read this early, as all of stay_near needs it.
    [[maybe_unused]] const int rank = kNear ? in.rank[b] : 0;
    // The slot of an expert's token.
    const auto slot_of = [&](int e, uint32_t number) {
      const auto choose = [=](auto next) { return choose_slot(next, number); };
      if constexpr (kPlaced) {
        const int32_t head = all.heads[e];
        if (is_only_slot(head)) return head;
        if (head == kNotKept) return with_computed_shares(Rows(shape, in, b), e, choose);
        uint32_t place = place_of(head);
        if constexpr (kNear) {
          return choose([&] {
            const NearShare share = {all.near[place], all.skips[place]};
            ++place;
            return share;
          });
        } else {
          return choose([&] { return all.places[place++]; });
        }
      } else {
        const Share* share = rows + e * shape.max_replicas;
        return choose([&] { return *share++; });
      }
    };
    // Calls add(slot, quota) for the replicas of all experts, over the block's threads.
    const auto for_quotas = [&](auto add) {
      const auto add_all = [=](auto next) {
        for_each_quota(next, add);
        return 0;
      };
      for (int e = threadIdx.x; e < experts; e += threads) {
        if constexpr (kPlaced) {
          const int32_t head = all.heads[e];
          if (head >= 0) add(head, static_cast<uint32_t>(max(in.load[b * experts + e], 0)));
          if (head == kNotKept) with_computed_shares(Rows(shape, in, b), e, add_all);
        } else {
          const Share* share = rows + e * shape.max_replicas;
          add_all([&] { return *share++; });
        }
      }
      if constexpr (kPlaced) {
        // A thread for each place: an expert may have many.
        const int used = static_cast<int>(all.used());
        for (int i = threadIdx.x; i < used; i += threads) add(all.places[i].slot, all.places[i].quota);
      }
    };
    // Shares are read in three steps, the second one for each expert.
    [[maybe_unused]] const MadeShares made(out.shares, b, experts, shape.num_physical);
    [[maybe_unused]] MadePart<kNear> part;
    const auto begin_shares = [&] {
      if constexpr (kMade) part = MadePart<kNear>(made, room);
    };
    const auto store = [&](int e) {
      if constexpr (kMade) {
        all.heads[e] = made.heads[e];
      } else if constexpr (kNear) {
        Share row[kNarrowRow];
        const int count = store_shares(shape, in, b, e, row);
        all.store(e, row, count);
      } else {
        store_shares(shape, in, b, e, rows + e * shape.max_replicas);
      }
    };
    const auto finish_shares = [&] {
      if constexpr (kMade) part.store(made, all);
    };
    const auto get_shares = [&] {
      wait_for_launch<kAhead>();
      begin_shares();
#pragma unroll 1
      for (int e = threadIdx.x; e < experts; e += threads) store(e);
      finish_shares();
    };
    bool has_shares = false;
    [[maybe_unused]] bool has_near = false;
    for (int item = blockIdx.x; item <= shape.count.num_chunks; item += gridDim.x) {
      if (item == 0) {
        uint32_t* sums = reinterpret_cast<uint32_t*>(memory);
        for (int g = threadIdx.x; g < shape.num_ranks; g += threads) sums[g] = 0;
        __syncthreads();
        get_shares();
        has_shares = true;
        __syncthreads();
        add_ranks(shape, for_quotas, sums, out.rank_load + b * shape.num_ranks);
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
      if (!kAhead && !has_shares) begin_shares();
      clear_counts();
      for (int e = threadIdx.x; e < experts; e += threads) {
        // All loads before the first use of any.
        const int32_t start = starts[e], before = kNear ? 0 : offset[e];
        if (!kAhead && !has_shares) store(e);
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
        const auto make_shares = [&] {
          if (!has_shares) {
            if constexpr (kAhead) {
              get_shares();
            } else {
              finish_shares();
            }
          }
          has_shares = true;
        };
        if constexpr (kNear) {
          if (!has_near) {
            const Nearby nearby(shape, in, b, rank);  // before the launch is waited for
            make_shares();
            __syncthreads();
            stay_near(nearby, all, shape.ranks_per_node < shape.num_ranks);
            has_near = true;
          }
        } else {
          make_shares();
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kIds; ++k) {
          const int i = tile + first + k * kWarp, e = ids[k];
          if (i >= num_ids) continue;
          int32_t slot = -1;
          if (e >= 0) {
            const uint32_t before = warp > 0 ? counts[e - padded] : 0;
            const uint32_t number = shared.seen[e] + before + numbers[k];
            slot = slot_of(e, number);
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
// By whether a thread takes several ids at once, kMade, kNear, and whether the launch is ahead.
template <int kIds, bool kMade, bool kNear>
constexpr std::array<Kernel, 2> kKernelsOf = {assign_kernel<kIds, kMade, kNear, false>,
                                              assign_kernel<kIds, kMade, kNear, true>};
template <int kIds>
constexpr std::array<std::array<std::array<Kernel, 2>, 2>, 2> kKernelsFor = {
    {{kKernelsOf<kIds, false, false>, kKernelsOf<kIds, false, true>},
     {kKernelsOf<kIds, true, false>, kKernelsOf<kIds, true, true>}}};
constexpr std::array kKernels = {kKernelsFor<1>, kKernelsFor<kMaxIds>};

// How a shape is assigned.
struct Launch {
  bool many, made, near;
  int warps;
  uint32_t room;  // for shares
  size_t bytes;   // of shared memory

  explicit Launch(const AssignShape& shape) {
    const int64_t chunk_size = shape.count.chunk_size;
    const int experts = shape.count.num_experts;
    many = chunk_size > kMaxWarps * kWarp;
    near = shape.ranks_per_node > 0;
    // Rows where they fit. Else shares are no more than slots, unless log2phy is not a placement's.
    const size_t in_rows = static_cast<size_t>(experts) * shape.max_replicas;
    made = shape.max_replicas > kNarrowRow ||
           (!near && Shared::bytes(shape, kLeastWarps) + in_rows * sizeof(Share) > kSharedBytes);
    const bool placed = made || near;
    const size_t wanted = placed ? shape.num_physical : in_rows;
    const size_t each = near ? Places<true>::each() : Places<false>::each();
    const size_t others = near ? Places<true>::bytes(experts) : made ? Places<false>::bytes(experts) : 0;
    // A thread for some ids, and for an expert of whom it reads what there is.
    const int64_t threads =
        std::max((chunk_size - 1) / (many ? kMaxIds : 1) + 1, static_cast<int64_t>(placed ? experts : 0));
    warps = kLeastWarps;  // leaves room for some shares
    while (warps < kMaxWarps && warps * kWarp < threads &&
           Shared::bytes(shape, 2 * warps) + others + wanted * each <= kSharedBytes) {
      warps *= 2;
    }
    const size_t before = Shared::bytes(shape, warps) + others, most = (kSharedBytes - before) / each;
    room = static_cast<uint32_t>(wanted < most ? wanted : most);
    bytes = before + room * each;
  }
};

// `follows`: the launch of the solve.
cudaError_t launch_both(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out, bool follows) {
  const cudaError_t error = shares_cuda(stream, shape, in, out, follows);
  if (error != cudaSuccess) return error;
  return assign_by_shares_cuda(stream, shape, in, out, follows || Launch(shape).made);
}

}  // namespace

cudaError_t prepare_assign_cuda() {
  const cudaError_t error = prepare_shares_cuda(kSharedBytes);
  return error != cudaSuccess ? error : allow_shared_bytes(kKernels, kSharedBytes);
}

uint32_t room_for_shares(const AssignShape& shape) {
  const Launch of(shape);
  return of.made ? of.room : 0;
}

cudaError_t shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out, bool ahead) {
  const uint32_t room = room_for_shares(shape);
  if (room == 0) return cudaSuccess;
  bool hopper;
  const cudaError_t error = runs_hopper_code(&hopper);
  return error != cudaSuccess ? error : make_shares_cuda(stream, shape, in, out.shares, room, ahead && hopper);
}

cudaError_t assign_by_shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                  const AssignResults& out, bool ahead) {
  const Launch of(shape);
  bool hopper;
  if (const cudaError_t error = runs_hopper_code(&hopper); error != cudaSuccess) return error;
  ahead = ahead && hopper;
  return launch(stream, grid_of(shape.count, shape.count.num_chunks + 1), of.warps * kWarp, of.bytes, ahead,
                kKernels[of.many][of.made][of.near][ahead], shape, in, out, of.room);
}

cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out) {
  return launch_both(stream, shape, in, out, false);
}

cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    const AssignResults& out) {
  return launch_both(stream, shape, in, out, true);
}

}  // namespace lplb
