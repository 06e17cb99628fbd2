#include "assign.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 16, kLeastWarps = 4;  // powers of two
constexpr int kMaxIds = 4;                      // of a thread at once, where there are many
constexpr size_t kSharedBytes = 98 * 1024;      // what every device has

// A block's shared memory. Experts are padded so that each warp's counts can be stored eight at a time.
struct Shared {
  uint16_t* of_warp;  // [num_warps, padded experts] tokens of the tile, then those up to and with each warp's
  uint32_t* seen;     // [padded experts] number of the tile's first token
  uint32_t* stored;   // [experts, StoredShares::size] where there is room

  __host__ __device__ static int padded(int experts) { return (experts + 7) / 8 * 8; }
  __host__ __device__ static size_t counts(const AssignShape& shape, int num_warps) {
    const size_t bytes = padded(shape.count.num_experts) * (num_warps * sizeof(uint16_t) + sizeof(uint32_t));
    const size_t for_ranks = (shape.num_ranks + 3) / 4 * 4 * sizeof(uint32_t);
    return bytes < for_ranks ? for_ranks : bytes;
  }
  static size_t bytes(const AssignShape& shape, int num_warps, bool stored) {
    const size_t shares = static_cast<size_t>(shape.count.num_experts) * StoredShares::size(shape.max_replicas);
    return counts(shape, num_warps) + (stored ? shares * sizeof(uint32_t) : 0);
  }
  __device__ Shared(void* memory, const AssignShape& shape, int num_warps)
      : of_warp(static_cast<uint16_t*>(memory)),
        seen(reinterpret_cast<uint32_t*>(of_warp + num_warps * padded(shape.count.num_experts))),
        stored(reinterpret_cast<uint32_t*>(static_cast<char*>(memory) + counts(shape, num_warps))) {}
};

// One batch element's operands.
class Batch {
 public:
  __device__ Batch(const AssignShape& shape, const AssignOperands& in, int64_t batch)
      : replicas_(shape.max_replicas),
        num_physical_(shape.num_physical),
        load_(in.load + batch * shape.count.num_experts),
        split_(in.split + batch * shape.count.num_experts * replicas_),
        log2phy_(in.log2phy + batch * shape.count.num_experts * replicas_) {}

  __device__ Shares shares(int e) const {
    const int64_t row = static_cast<int64_t>(e) * replicas_;
    return Shares(Quotas(split_ + row, log2phy_ + row, replicas_, num_physical_, load_[e]));
  }
  __device__ void store(int e, uint32_t* stored) const {
    with_quotas(e, [&](const Quotas& quotas) { StoredShares::store(quotas, stored); });
  }

  // Calls visit(quotas of an expert).
  template <class Visit>
  __device__ void with_quotas(int e, Visit visit) const {
    if (replicas_ == 2) {
      // The most frequent kind: all operands at once, and no loop.
      const float2 split = reinterpret_cast<const float2*>(split_)[e];
      const int2 slots = reinterpret_cast<const int2*>(log2phy_)[e];
      const float parts[] = {split.x, split.y};
      const int32_t entries[] = {slots.x, slots.y};
      visit(Quotas(parts, entries, 2, num_physical_, load_[e]));
    } else {
      const int64_t row = static_cast<int64_t>(e) * replicas_;
      visit(Quotas(split_ + row, log2phy_ + row, replicas_, num_physical_, load_[e]));
    }
  }

  // Slot of a replica, -1 where there is none.
  __device__ int32_t slot(int e, int replica) const {
    const int32_t slot = log2phy_[static_cast<int64_t>(e) * replicas_ + replica];
    return Quotas::is_slot(slot, num_physical_) ? slot : -1;
  }

 private:
  int replicas_, num_physical_;
  const int32_t* load_;
  const float* split_;
  const int32_t* log2phy_;
};

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

// Adds up the quotas of each rank's slots.
__device__ void add_ranks(const AssignShape& shape, const Batch& batch, uint32_t* sums, int32_t* rank_load) {
  const unsigned slots_per_rank = shape.num_physical / shape.num_ranks;
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) sums[g] = 0;
  __syncthreads();
  for (int e = threadIdx.x; e < shape.count.num_experts; e += blockDim.x) {
    batch.with_quotas(e, [&](const Quotas& quotas) {
      quotas.each([&](int, int32_t slot, uint32_t quota) {
        atomicAdd(&sums[static_cast<unsigned>(slot) / slots_per_rank], quota);
      });
    });
  }
  __syncthreads();
  for (int g = threadIdx.x; g < shape.num_ranks; g += blockDim.x) rank_load[g] = static_cast<int32_t>(sums[g]);
}

// Waits for the solve, where this kernel was launched ahead of its end.
template <bool kAhead>
__device__ void wait_for_split() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kAhead) cudaGridDependencySynchronize();
#endif
}

// Blocks go through the chunks, the ranks' sums before them, and assign a chunk tile by tile: kIds ids a thread. The
// shares of all experts are kept in shared memory, or computed anew for each token. The split comes last, see
// assign_after_solve_cuda.
template <int kIds, bool kStored, bool kAhead>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, int32_t* physical_ids, int32_t* rank_load) {
  extern __shared__ uint4 memory[];
  const int experts = shape.count.num_experts, padded = Shared::padded(experts), threads = blockDim.x;
  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Shared shared(memory, shape, num_warps);
  uint16_t* counts = shared.of_warp + warp * padded;
  for (int64_t b = blockIdx.y; b < shape.count.num_batches; b += gridDim.y) {
    const Batch batch(shape, in, b);
    const auto shares_of = [&](int e) {
      if constexpr (kStored) {
        return StoredShares(shared.stored + e * StoredShares::size(shape.max_replicas), shape.max_replicas);
      } else {
        return batch.shares(e);
      }
    };
    const auto store = [&](int e) {
      if constexpr (kStored) batch.store(e, shared.stored + e * StoredShares::size(shape.max_replicas));
    };
    bool has_shares = false;
    for (int item = blockIdx.x; item <= shape.count.num_chunks; item += gridDim.x) {
      if (item == 0) {
        wait_for_split<kAhead>();
        add_ranks(shape, batch, reinterpret_cast<uint32_t*>(memory), rank_load + b * shape.num_ranks);
        __syncthreads();
        continue;
      }
      const int64_t chunk = item - 1, begin = chunk * shape.count.chunk_size;
      const int num_ids = static_cast<int>(min(shape.count.num_ids - begin, shape.count.chunk_size));
      const int32_t* expert_ids = in.expert_ids + b * shape.count.num_ids + begin;
      int32_t* results = physical_ids + b * shape.count.num_ids + begin;
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
        if (kAhead && !has_shares) {
          wait_for_split<kAhead>();
          for (int e = threadIdx.x; e < experts; e += threads) store(e);
        }
        has_shares = true;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kIds; ++k) {
          const int i = tile + first + k * kWarp, e = ids[k];
          if (i >= num_ids) continue;
          int32_t slot = -1;
          if (e >= 0) {
            const uint32_t before = warp > 0 ? counts[e - padded] : 0;
            slot = batch.slot(e, choose_replica(shares_of(e), shared.seen[e] + before + numbers[k]));
          }
          results[i] = slot;
        }
        const bool last =
            tile + kIds * threads >= num_ids && item + static_cast<int>(gridDim.x) > shape.count.num_chunks;
        if (!last || b + gridDim.y < shape.count.num_batches) __syncthreads();
      }
    }
  }
  wait_for_split<kAhead>();  // a block without ids, too: what comes after this kernel relies on the solve's end
}

using Kernel = void (*)(AssignShape, AssignOperands, int32_t*, int32_t*);
// By whether a thread takes several ids at once, shares are stored, and the launch is ahead of the solve's end.
constexpr Kernel kKernels[2][2][2] = {{{assign_kernel<1, false, false>, assign_kernel<1, false, true>},
                                       {assign_kernel<1, true, false>, assign_kernel<1, true, true>}},
                                      {{assign_kernel<kMaxIds, false, false>, assign_kernel<kMaxIds, false, true>},
                                       {assign_kernel<kMaxIds, true, false>, assign_kernel<kMaxIds, true, true>}}};

cudaError_t launch(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids,
                   int32_t* rank_load, bool ahead) {
  const int64_t chunk_size = shape.count.chunk_size;
  const bool many = chunk_size > kMaxWarps * kWarp;
  int most_warps = kLeastWarps;
  while (most_warps < kMaxWarps && most_warps * kWarp * (many ? kMaxIds : 1) < chunk_size) most_warps *= 2;
  int warps = most_warps;
  while (warps > kLeastWarps && Shared::bytes(shape, warps, true) > kSharedBytes) warps /= 2;
  const bool stored = Shared::bytes(shape, warps, true) <= kSharedBytes;
  if (!stored) {
    warps = most_warps;  // the least always fit
    while (Shared::bytes(shape, warps, false) > kSharedBytes) warps /= 2;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid_of(shape.count, shape.count.num_chunks + 1);
  config.blockDim = warps * kWarp;
  config.dynamicSmemBytes = Shared::bytes(shape, warps, stored);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = ahead ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernels[many][stored][ahead], shape, in, physical_ids, rank_load);
}

}  // namespace

cudaError_t prepare_assign_cuda() {
  for (const auto& of_many : kKernels) {
    for (const auto& of_stored : of_many) {
      for (const Kernel kernel : of_stored) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids,
                        int32_t* rank_load) {
  return launch(stream, shape, in, physical_ids, rank_load, false);
}

cudaError_t assign_after_solve_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in,
                                    int32_t* physical_ids, int32_t* rank_load) {
  bool ahead;
  if (const cudaError_t error = runs_hopper_code(&ahead); error != cudaSuccess) return error;
  return launch(stream, shape, in, physical_ids, rank_load, ahead);
}

}  // namespace lplb
