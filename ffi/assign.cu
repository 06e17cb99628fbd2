#include <type_traits>

#include "assign.h"
#include "launch.cuh"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 16, kLeastWarps = 4;  // powers of two
constexpr int kMaxIds = 4;                      // of a thread at once, where there are many
constexpr int kShareWarps = 4;                  // of a block that prepares shares
constexpr size_t kSharedBytes = 98 * 1024;      // what every device has

// A block's shared memory. Experts are padded so that each warp's counts can be stored eight at a time.
struct Shared {
  uint16_t* of_warp;  // [num_warps, padded experts] tokens of the tile, then those up to and with each warp's
  uint32_t* seen;     // [padded experts] number of the tile's first token
  uint32_t* place;    // [padded experts] where shares are prepared, see fetch_shares
  Share* shares;

  __host__ __device__ static int padded(int experts) { return (experts + 7) / 8 * 8; }
  // Of the counts, which share it with the ranks' sums.
  __host__ __device__ static size_t counts(const AssignShape& shape, int num_warps) {
    const size_t bytes = padded(shape.count.num_experts) * (num_warps * sizeof(uint16_t) + sizeof(uint32_t));
    const size_t for_ranks = (shape.num_ranks + 3) / 4 * 4 * sizeof(uint32_t);
    return bytes < for_ranks ? for_ranks : bytes;
  }
  // Of all but the shares.
  __host__ __device__ static size_t bytes(const AssignShape& shape, int num_warps, bool prepared) {
    return counts(shape, num_warps) + (prepared ? padded(shape.count.num_experts) * sizeof(uint32_t) : 0);
  }
  __device__ Shared(void* memory, const AssignShape& shape, int num_warps, bool prepared)
      : of_warp(static_cast<uint16_t*>(memory)),
        seen(reinterpret_cast<uint32_t*>(of_warp + num_warps * padded(shape.count.num_experts))),
        place(reinterpret_cast<uint32_t*>(static_cast<char*>(memory) + counts(shape, num_warps))),
        shares(reinterpret_cast<Share*>(static_cast<char*>(memory) + bytes(shape, num_warps, prepared))) {}
};

// Waits for the launch before this one, where this kernel was launched ahead of its end.
template <bool kAhead>
__device__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kAhead) cudaGridDependencySynchronize();
#endif
}

// ---- Shares ---------------------------------------------------------------------------------------------------------

// Where rows are narrow: a thread writes the shares of an expert.
__device__ void store_shares(const AssignShape& shape, const AssignOperands& in, int64_t batch, int e, Share* shares) {
  const int replicas = shape.max_replicas;
  const int64_t expert = batch * shape.count.num_experts + e;
  const int32_t load = in.load[expert];
  if (replicas == 2) {
    // The most frequent kind: all operands at once.
    const float2 parts = reinterpret_cast<const float2*>(in.split)[expert];
    const int2 slots = reinterpret_cast<const int2*>(in.log2phy)[expert];
    const Replica row[] = {{parts.x, slots.x}, {parts.y, slots.y}};
    write_shares<2>([&](int r) { return row[r]; }, 2, shape.num_physical, load, shares);
  } else {
    Replica row[kNarrowRow];
#pragma unroll
    for (int r = 0; r < kNarrowRow; ++r) {
      const int64_t entry = expert * replicas + min(r, replicas - 1);
      row[r] = {in.split[entry], in.log2phy[entry]};
    }
    write_shares<kNarrowRow>([&](int r) { return row[r]; }, replicas, shape.num_physical, load, shares);
  }
}

// Adds up the lanes' parts one by one, as write_shares does, from `total` on. Returns each lane's sum.
__device__ float running_sum(float part, float& total) {
  const int lane = threadIdx.x % kWarp;
  float mine = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarp; ++i) {
    total += __shfl_sync(kFullWarp, part, i);
    if (lane == i) mine = total;
  }
  return mine;
}

// Where rows are wide: prepares the shares of all experts, a warp those of one, to the bits of write_shares.
template <bool kAhead>
__global__ void __launch_bounds__(kShareWarps* kWarp)
    share_kernel(const AssignShape shape, const AssignOperands in, const AssignResults out) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_cuda
#endif
  const int experts = shape.count.num_experts, replicas = shape.max_replicas;
  const int lane = threadIdx.x % kWarp;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    const PreparedShares prepared(out.workspace, experts, replicas, b);
    for (int e = blockIdx.x * kShareWarps + threadIdx.x / kWarp; e < experts; e += gridDim.x * kShareWarps) {
      const int64_t expert = b * experts + e;
      // The lane's entry of the 32 that begin at `first`.
      const auto slot_at = [&](int first) {
        return first + lane < replicas ? in.log2phy[expert * replicas + first + lane] : -1;
      };
      const auto part_at = [&](int first) {
        const Replica replica = {first + lane < replicas ? in.split[expert * replicas + first + lane] : 0.0f, 0};
        return replica.positive();
      };
      // How many of the 32 are replicas: those before the first that is none.
      const auto leading = [&](int32_t slot) {
        const unsigned others = ~__ballot_sync(kFullWarp, Replica{0.0f, slot}.is_slot(shape.num_physical));
        return others == 0 ? kWarp : __ffs(others) - 1;
      };

      // The split and log2phy come last: they are the solve's and the plan's.
      const uint32_t tokens = static_cast<uint32_t>(max(in.load[expert], 0));
      wait_for_launch<kAhead>();
      int32_t slot = slot_at(0);
      const float part = part_at(0);
      int count = leading(slot);
      float total = 0.0f;
      float upto = running_sum(lane < count ? part : 0.0f, total);
      float sum = total;  // of the first 32, for now
      for (int first = kWarp; first == count && first < replicas; first += kWarp) {
        const int more = leading(slot_at(first));
        running_sum(lane < more ? part_at(first) : 0.0f, total);
        count += more;
      }
      const bool even = !(total > 0.0f);
      if (even) total = static_cast<float>(count);

      Share* shares = prepared.shares + static_cast<int64_t>(e) * replicas;
      uint32_t begin = 0;  // first token of the 32 replicas
      for (int first = 0; first < count; first += kWarp) {
        if (first > 0) {
          slot = slot_at(first);
          upto = running_sum(first + lane < count ? part_at(first) : 0.0f, sum);
        }
        const int r = first + lane;
        if (even) upto = static_cast<float>(r + 1);
        const uint32_t end = r + 1 < count ? tokens_upto(upto, total, tokens) : tokens;
        const uint32_t before = __shfl_up_sync(kFullWarp, end, 1);
        if (r < count) shares[r] = make_share(slot, lane > 0 ? before : begin, end, tokens);
        begin = __shfl_sync(kFullWarp, end, kWarp - 1);
      }
      if (lane == 0) {
        if (count == 0) shares[0] = make_share(-1, 0, 0, 0);
        prepared.heads[e] = {static_cast<uint32_t>(e) * replicas, static_cast<uint32_t>(max(count, 1))};
      }
    }
  }
}

// Copies prepared shares to shared memory, an expert's next to each other, experts in any order: it does not show.
// `room` shares fit; experts beyond are read where they are, and their places begin at `room`. For all threads, with
// `used` zero.
__device__ void fetch_shares(const PreparedShares& prepared, int experts, uint32_t room, const Shared& shared,
                             uint32_t* used) {
  constexpr int32_t kNothing = -1;
  const int lane = threadIdx.x % kWarp;
  for (int first = threadIdx.x - lane; first < experts; first += blockDim.x) {
    const int e = first + lane;
    ShareHead head = {0, 0};
    if (e < experts) head = prepared.heads[e];
    uint32_t end = head.count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t before = __shfl_up_sync(kFullWarp, end, step);
      if (lane >= step) end += before;
    }
    uint32_t begin = 0;
    if (lane == kWarp - 1) begin = atomicAdd(used, end);
    begin = __shfl_sync(kFullWarp, begin, kWarp - 1) + end - head.count;
    const bool fits = begin + head.count <= room;
    if (e < experts) shared.place[e] = fits ? begin : room + head.first;
    // First which share goes where: then every thread reads some at once, however many an expert has.
#pragma unroll 4
    for (uint32_t r = 0; r < head.count; ++r) {
      if (begin + r < room) shared.shares[begin + r].slot = fits ? static_cast<int32_t>(head.first + r) : kNothing;
    }
  }
  __syncthreads();
  constexpr int kAtOnce = 4;
  const uint32_t count = min(*used, room);
  for (uint32_t i = threadIdx.x; i < count; i += kAtOnce * blockDim.x) {
    int32_t sources[kAtOnce];
    Share fetched[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t to = i + k * blockDim.x;
      sources[k] = to < count ? shared.shares[to].slot : kNothing;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (sources[k] != kNothing) fetched[k] = prepared.shares[sources[k]];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (sources[k] != kNothing) shared.shares[i + k * blockDim.x] = fetched[k];
    }
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
    with_shares(e, [&](const Share* shares) {
      for_each_quota(shares, [&](int32_t slot, uint32_t quota) {
        atomicAdd(&sums[static_cast<unsigned>(slot) / slots_per_rank], quota);
      });
    });
  }
  __syncthreads();
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) rank_load[g] = static_cast<int32_t>(sums[g]);
}

// Blocks go through the chunks, the ranks' sums before them, and assign a chunk tile by tile: kIds ids a thread. The
// shares of all experts, written or prepared, are kept in shared memory, which has room for so many. The split and the
// prepared shares come last, see assign_after_solve_cuda.
template <int kIds, bool kPrepared, bool kAhead>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, const AssignResults out, uint32_t room) {
  extern __shared__ uint4 memory[];
  const int experts = shape.count.num_experts, padded = Shared::padded(experts), threads = blockDim.x;
  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Shared shared(memory, shape, num_warps, kPrepared);
  [[maybe_unused]] __shared__ uint32_t used;
  uint16_t* counts = shared.of_warp + warp * padded;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    const PreparedShares prepared(out.workspace, experts, shape.max_replicas, b);
    // Calls visit(shares of an expert), and returns what it does.
    const auto with_shares = [&](int e, auto visit) {
      if constexpr (kPrepared) {
        const uint32_t place = shared.place[e];
        return place < room ? visit(shared.shares + place) : visit(prepared.shares + (place - room));
      } else {
        return visit(shared.shares + e * shape.max_replicas);
      }
    };
    const auto store = [&](int e) { store_shares(shape, in, b, e, shared.shares + e * shape.max_replicas); };
    const auto get_shares = [&] {
      wait_for_launch<kAhead>();
      if constexpr (kPrepared) {
        fetch_shares(prepared, experts, room, shared, &used);
      } else {
        for (int e = threadIdx.x; e < experts; e += threads) store(e);
      }
    };
    if (kPrepared && threadIdx.x == 0) used = 0;
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
        if (!kPrepared && !kAhead && !has_shares) store(e);
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
        if ((kPrepared || kAhead) && !has_shares) get_shares();
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
            slot = with_shares(e, [&](const Share* shares) { return choose_slot(shares, number); });
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
// By whether a thread takes several ids at once, shares are prepared, and the launch is ahead.
constexpr Kernel kKernels[2][2][2] = {{{assign_kernel<1, false, false>, assign_kernel<1, false, true>},
                                       {assign_kernel<1, true, false>, assign_kernel<1, true, true>}},
                                      {{assign_kernel<kMaxIds, false, false>, assign_kernel<kMaxIds, false, true>},
                                       {assign_kernel<kMaxIds, true, false>, assign_kernel<kMaxIds, true, true>}}};

cudaError_t launch_assign(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                          const AssignResults& out, bool prepared, bool ahead) {
  const int64_t chunk_size = shape.count.chunk_size;
  const bool many = chunk_size > kMaxWarps * kWarp;
  // Of prepared shares there are as many as slots, unless log2phy is not a placement's.
  const int64_t cells = static_cast<int64_t>(shape.count.num_experts) * shape.max_replicas;
  const size_t wanted = prepared && shape.num_physical < cells ? shape.num_physical : cells;
  const auto room = [&](int warps) { return (kSharedBytes - Shared::bytes(shape, warps, prepared)) / sizeof(Share); };
  int warps = kLeastWarps;  // leaves room for some shares, and for all where rows are narrow
  while (warps < kMaxWarps && warps * kWarp * (many ? kMaxIds : 1) < chunk_size &&
         Shared::bytes(shape, 2 * warps, prepared) + wanted * sizeof(Share) <= kSharedBytes) {
    warps *= 2;
  }
  const size_t shares = room(warps) < wanted ? room(warps) : wanted;
  return launch(stream, grid_of(shape.count, shape.count.num_chunks + 1), warps * kWarp,
                Shared::bytes(shape, warps, prepared) + shares * sizeof(Share), ahead, kKernels[many][prepared][ahead],
                shape, in, out, static_cast<uint32_t>(shares));
}

cudaError_t launch_both(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                        const AssignResults& out, bool share_ahead, bool hopper) {
  const dim3 grid = grid_of(shape.count, (shape.count.num_experts + kShareWarps - 1) / kShareWarps);
  const cudaError_t error = launch(stream, grid, kShareWarps * kWarp, 0, share_ahead,
                                   share_ahead ? share_kernel<true> : share_kernel<false>, shape, in, out);
  // A limit of thread blocks holds for both kernels together.
  const bool ahead = hopper && shape.count.num_sms == 0;
  return error != cudaSuccess ? error : launch_assign(stream, shape, in, out, true, ahead);
}

bool is_narrow(const AssignShape& shape) { return rows_are_narrow(shape.count.num_experts, shape.max_replicas); }

}  // namespace

cudaError_t prepare_assign_cuda() {
  for (const auto& of_many : kKernels) {
    for (const auto& of_prepared : of_many) {
      for (const Kernel kernel : of_prepared) {
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
  if (is_narrow(shape)) return launch_assign(stream, shape, in, out, false, false);
  bool hopper;
  if (const cudaError_t error = runs_hopper_code(&hopper); error != cudaSuccess) return error;
  return launch_both(stream, shape, in, out, false, hopper);
}

cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    const AssignResults& out) {
  bool hopper;
  if (const cudaError_t error = runs_hopper_code(&hopper); error != cudaSuccess) return error;
  return is_narrow(shape) ? launch_assign(stream, shape, in, out, false, hopper)
                          : launch_both(stream, shape, in, out, hopper, hopper);
}

}  // namespace lplb
