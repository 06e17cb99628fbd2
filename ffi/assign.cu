#include <type_traits>

#include "assign.h"
#include "launch.cuh"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 16, kLeastWarps = 4;  // powers of two
constexpr int kMaxIds = 4;                      // of a thread at once, where there are many
constexpr int kNarrowRow = 4;                   // replicas of an expert whose shares a thread writes
constexpr int kWideLanes = 8;                   // that write those of an expert with more
constexpr size_t kSharedBytes = 98 * 1024;      // what every device has

// How many shares are kept in shared memory.
struct Room {
  int experts;      // the first so many have a row of shares each
  uint32_t beyond;  // shares of those of them that need more than a row

  __host__ __device__ static int row(const AssignShape& shape) {
    return shape.max_replicas < kNarrowRow ? shape.max_replicas : kNarrowRow;
  }
  __host__ __device__ size_t bytes(const AssignShape& shape) const {
    return (static_cast<size_t>(experts) * row(shape) + beyond) * sizeof(Share);
  }
};

// A block's shared memory. Experts are padded so that each warp's counts can be stored eight at a time.
struct Shared {
  uint16_t* of_warp;  // [num_warps, padded experts] tokens of the tile, then those up to and with each warp's
  uint32_t* seen;     // [padded experts] number of the tile's first token
  uint16_t* wide;     // [padded experts] those with more shares than fit into a row
  Share* rows;
  Share* beyond;

  __host__ __device__ static int padded(int experts) { return (experts + 7) / 8 * 8; }
  // Of the counts, which share it with the ranks' sums.
  __host__ __device__ static size_t counts(const AssignShape& shape, int num_warps) {
    const size_t bytes = padded(shape.count.num_experts) * (num_warps * sizeof(uint16_t) + sizeof(uint32_t));
    const size_t for_ranks = (shape.num_ranks + 3) / 4 * 4 * sizeof(uint32_t);
    return bytes < for_ranks ? for_ranks : bytes;
  }
  // Of all but the shares.
  __host__ __device__ static size_t bytes(const AssignShape& shape, int num_warps) {
    const bool wide = shape.max_replicas > kNarrowRow;
    return counts(shape, num_warps) + (wide ? padded(shape.count.num_experts) * sizeof(uint16_t) : 0);
  }
  __device__ Shared(void* memory, const AssignShape& shape, int num_warps, const Room& room)
      : of_warp(static_cast<uint16_t*>(memory)),
        seen(reinterpret_cast<uint32_t*>(of_warp + num_warps * padded(shape.count.num_experts))),
        wide(reinterpret_cast<uint16_t*>(static_cast<char*>(memory) + counts(shape, num_warps))),
        rows(reinterpret_cast<Share*>(static_cast<char*>(memory) + bytes(shape, num_warps))),
        beyond(rows + room.experts * Room::row(shape)) {}
};

// Waits for the launch before this one, where this kernel was launched ahead of its end.
template <bool kAhead>
__device__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kAhead) cudaGridDependencySynchronize();
#endif
}

// ---- Shares ---------------------------------------------------------------------------------------------------------

// Stands for an expert's shares that are elsewhere: `quota` is their place among those beyond rows, if they are kept.
constexpr int32_t kElsewhere = -2;
constexpr uint32_t kNotKept = ~0u;

// A thread writes the shares of an expert, or returns false where there may be more than fit into a row.
template <bool kWide>
__device__ bool store_shares(const AssignShape& shape, const AssignOperands& in, int64_t batch, int e, Share* shares) {
  const int replicas = shape.max_replicas;
  const int64_t expert = batch * shape.count.num_experts + e;
  const int32_t load = in.load[expert];
  if (replicas == 2) {
    // The most frequent kind: all operands at once.
    const float2 parts = reinterpret_cast<const float2*>(in.split)[expert];
    const int2 slots = reinterpret_cast<const int2*>(in.log2phy)[expert];
    const Replica row[] = {{parts.x, slots.x}, {parts.y, slots.y}};
    write_shares<2>([&](int r) { return row[r]; }, 2, shape.num_physical, load, shares);
    return true;
  }
  Replica row[kNarrowRow];
  if (replicas % kNarrowRow == 0) {
    const int64_t begin = expert * (replicas / kNarrowRow);
    const float4 parts = reinterpret_cast<const float4*>(in.split)[begin];
    const int4 slots = reinterpret_cast<const int4*>(in.log2phy)[begin];
    row[0] = {parts.x, slots.x}, row[1] = {parts.y, slots.y};
    row[2] = {parts.z, slots.z}, row[3] = {parts.w, slots.w};
  } else {
#pragma unroll
    for (int r = 0; r < kNarrowRow; ++r) {
      const int64_t entry = expert * replicas + min(r, replicas - 1);
      row[r] = {in.split[entry], in.log2phy[entry]};
    }
  }
  if constexpr (kWide) {
    bool all = replicas > kNarrowRow;
#pragma unroll
    for (int r = 0; r < kNarrowRow; ++r) all = all && row[r].is_slot(shape.num_physical);
    if (all) return false;
  }
  write_shares<kNarrowRow>([&](int r) { return row[r]; }, min(replicas, kNarrowRow), shape.num_physical, load, shares);
  return true;
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

// Writes the shares of experts with many replicas, kWideLanes lanes those of one, to the bits of Shares. They are kept
// next to each other, experts in any order: it does not show. For all threads, with `used` zero.
__device__ void store_wide_shares(const AssignShape& shape, const AssignOperands& in, int64_t batch, int num_wide,
                                  const Shared& shared, const Room& room, uint32_t* used) {
  constexpr int kAtOnce = 4, kRow = kAtOnce * kWideLanes;  // replicas of an expert that are read together
  const int lane = threadIdx.x % kWideLanes, last = kWideLanes - 1, of_warp = threadIdx.x % kWarp / kWideLanes;
  for (int first = threadIdx.x / kWarp * (kWarp / kWideLanes); first < num_wide; first += blockDim.x / kWideLanes) {
    // Lanes without an expert go along, with no replicas.
    const bool some = first + of_warp < num_wide;
    const int e = some ? shared.wide[first + of_warp] : 0, replicas = some ? shape.max_replicas : 0;
    const int64_t expert = batch * shape.count.num_experts + e, row = expert * shape.max_replicas;
    const uint32_t tokens = static_cast<uint32_t>(max(in.load[expert], 0));
    Replica read[kAtOnce];
    const auto read_row = [&](int begin, int count) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int r = begin + k * kWideLanes + lane;
        read[k] = {0.0f, -1};
        if (r < count) read[k] = {in.split[row + r], in.log2phy[row + r]};
      }
    };
    int count = 0;
    float largest = 0.0f;
    for (int begin = 0; __any_sync(kFullWarp, begin == count && begin < replicas); begin += kRow) {
      read_row(begin, begin == count ? replicas : 0);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        // How many of these are replicas: those before the first that is none, if all were so far.
        const unsigned slots = __ballot_sync(kFullWarp, read[k].is_slot(shape.num_physical)) >> of_warp * kWideLanes;
        const int leading = begin + k * kWideLanes == count ? __ffs(~slots | 1u << kWideLanes) - 1 : 0;
        if (lane < leading) largest = fmaxf(largest, read[k].positive());
        count += leading;
      }
    }
#pragma unroll
    for (int step = 1; step < kWideLanes; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
    const Weigher weigher(largest, shape.max_replicas);
    bool even = false;
    const auto weight_at = [&](int k, int begin) {
      const uint32_t mine = even ? 1 : weigher.weight(read[k]);
      return begin + k * kWideLanes + lane < count ? mine : 0;
    };
    const bool in_registers = __all_sync(kFullWarp, count < kRow);  // at kRow the next have been read
    uint32_t total = 0;
    for (int begin = 0; __any_sync(kFullWarp, begin < count); begin += kRow) {
      if (!in_registers) read_row(begin, count);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) total += weight_at(k, begin);
    }
    total = __shfl_sync(kFullWarp, sum_upto(total), last, kWideLanes);
    even = total == 0;
    if (even) total = static_cast<uint32_t>(count);

    uint32_t place = 0;
    if (some && lane == 0) place = atomicAdd(used, static_cast<uint32_t>(count));
    place = __shfl_sync(kFullWarp, place, 0, kWideLanes);
    const bool kept = place + count <= room.beyond;
    if (some && lane == 0) shared.rows[e * Room::row(shape)] = {kElsewhere, kept ? place : kNotKept, 0, 0};
    uint32_t sum = 0;  // of the weights of the replicas before these
    for (int begin = 0; __any_sync(kFullWarp, begin < count); begin += kRow) {
      if (!in_registers) read_row(begin, count);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int r = begin + k * kWideLanes + lane;
        const uint32_t with = sum + sum_upto(weight_at(k, begin));
        if (r < count && kept) shared.beyond[place + r] = prepared_share(read[k].slot, with, total, tokens, r == 0);
        sum = __shfl_sync(kFullWarp, with, last, kWideLanes);
      }
    }
  }
  __syncthreads();
  // All threads finish them, the last first, as each needs the one before it.
  const int num_shares = static_cast<int>(min(*used, room.beyond)), threads = blockDim.x;
  for (int first = (num_shares + threads - 1) / threads * threads - threads; first >= 0; first -= threads) {
    const int i = first + threadIdx.x;
    Share share;
    if (i < num_shares) share = finished_share(shared.beyond[i], shared.beyond[max(i - 1, 0)]);
    __syncthreads();
    if (i < num_shares) shared.beyond[i] = share;
  }
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
    with_shares(e, [&](auto next) {
      for_each_quota(next, [&](int32_t slot, uint32_t quota) {
        atomicAdd(&sums[static_cast<unsigned>(slot) / slots_per_rank], quota);
      });
      return 0;
    });
  }
  __syncthreads();
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) rank_load[g] = static_cast<int32_t>(sums[g]);
}

// Blocks go through the chunks, the ranks' sums before them, and assign a chunk tile by tile: kIds ids a thread. Each
// block writes the shares of all experts to its shared memory; where some do not fit (kWide), they are computed anew
// for each token. The split and log2phy come last, see assign_after_solve_cuda.
template <int kIds, bool kWide, bool kAhead>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, const AssignResults out, const Room room) {
  extern __shared__ uint4 memory[];
  const int experts = shape.count.num_experts, padded = Shared::padded(experts), threads = blockDim.x;
  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Shared shared(memory, shape, num_warps, room);
  [[maybe_unused]] __shared__ uint32_t used;
  [[maybe_unused]] __shared__ int num_wide;
  uint16_t* counts = shared.of_warp + warp * padded;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    // Calls visit(next), where next() gives an expert's shares one after the other, and returns what it does.
    const auto with_shares = [&](int e, auto visit) {
      const Share* share = shared.rows + e * Room::row(shape);
      if constexpr (kWide) {
        const bool elsewhere = e >= room.experts || share->slot == kElsewhere;
        if (elsewhere && (e >= room.experts || share->quota == kNotKept)) {
          const int64_t expert = b * experts + e, row = expert * shape.max_replicas;
          const auto read = [&](int r) { return Replica{in.split[row + r], in.log2phy[row + r]}; };
          Shares<decltype(read)> shares(read, shape.max_replicas, shape.num_physical, in.load[expert]);
          int r = 0;
          return visit([&] { return shares.next(r++); });
        }
        if (elsewhere) share = shared.beyond + share->quota;
      }
      return visit([&] { return *share++; });
    };
    const auto store = [&](int e) { return store_shares<kWide>(shape, in, b, e, shared.rows + e * Room::row(shape)); };
    const auto get_shares = [&] {
      wait_for_launch<kAhead>();
      for (int e = threadIdx.x; e < room.experts; e += threads) {
        if (!store(e)) shared.wide[atomicAdd(&num_wide, 1)] = static_cast<uint16_t>(e);
      }
      if constexpr (kWide) {
        __syncthreads();
        store_wide_shares(shape, in, b, num_wide, shared, room, &used);
      }
    };
    if (kWide && threadIdx.x == 0) used = num_wide = 0;
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
            slot = with_shares(e, [&](auto next) { return choose_slot(next, number); });
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

using Kernel = void (*)(AssignShape, AssignOperands, AssignResults, Room);
// By whether a thread takes several ids at once, experts may have more shares than a row, and the launch is ahead.
constexpr Kernel kKernels[2][2][2] = {{{assign_kernel<1, false, false>, assign_kernel<1, false, true>},
                                       {assign_kernel<1, true, false>, assign_kernel<1, true, true>}},
                                      {{assign_kernel<kMaxIds, false, false>, assign_kernel<kMaxIds, false, true>},
                                       {assign_kernel<kMaxIds, true, false>, assign_kernel<kMaxIds, true, true>}}};

cudaError_t launch_assign(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                          const AssignResults& out, bool ahead) {
  const int64_t chunk_size = shape.count.chunk_size;
  const int experts = shape.count.num_experts;
  const bool many = chunk_size > kMaxWarps * kWarp;
  // Shares are as many as slots, unless log2phy is not a placement's.
  const bool wide = shape.max_replicas > kNarrowRow;
  const Room wanted = {experts, wide ? static_cast<uint32_t>(shape.num_physical) : 0};
  int warps = kLeastWarps;  // leaves room for some shares
  while (warps < kMaxWarps && warps * kWarp * (many ? kMaxIds : 1) < chunk_size &&
         Shared::bytes(shape, 2 * warps) + wanted.bytes(shape) <= kSharedBytes) {
    warps *= 2;
  }
  const int most = static_cast<int>((kSharedBytes - Shared::bytes(shape, warps)) / sizeof(Share)),
            row = Room::row(shape);
  Room room = wanted;
  if (room.experts * row > most) room.experts = most / row;
  if (room.beyond > static_cast<uint32_t>(most - room.experts * row)) room.beyond = most - room.experts * row;
  return launch(stream, grid_of(shape.count, shape.count.num_chunks + 1), warps * kWarp,
                Shared::bytes(shape, warps) + room.bytes(shape), ahead,
                kKernels[many][wide || room.experts < experts][ahead], shape, in, out, room);
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
