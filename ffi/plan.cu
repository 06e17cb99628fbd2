#include <cooperative_groups.h>

#include "count.h"
#include "launch.cuh"
#include "plan.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kSharedBytes = 98 * 1024;  // what every device has, less a little

constexpr int kMaxCluster = 8;  // what every device with clusters has
constexpr int kHelpers = 2;     // warps of a block that do not plan: they read and write, and clear the tables

// A block's shared memory, but for that of experts and copies.
struct BlockShared {
  uint32_t sums[kMaxCandidates + kHelpers];  // of each warp
  uint32_t home[kMaxGroupRanks];
  Largest largest[kMaxGroupRanks];
  Giver busiest[kMaxGroupRanks];
  int fewest_copies;  // of the candidates that are even enough, in all blocks
  PlanScore scores[kMaxCandidates];
};

// Blocks that share the candidates of a group: a cluster, or one block alone.
__device__ int num_blocks() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}
__device__ int block_number() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}
__device__ void sync_blocks() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// Between these two all blocks begin: from then on their shared memory is there, and what a thread that `writes` has
// written there. Others need not wait for their writes.
__device__ void begin_blocks(bool writes) {
#if __CUDA_ARCH__ >= 900
  if (writes) {
    asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
  }
#endif
}
__device__ void await_blocks() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#else
  __syncthreads();
#endif
}
__device__ BlockShared* shared_of(int block, BlockShared* mine) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#else
  return mine;
#endif
}

// A value of each rank lies in kWords registers of the lanes; so do the tokens of a rank's experts, an expert a lane,
// unless ranks have more (kManyExperts).
template <int kWords, bool kManyExperts>
struct CudaWarp {
  struct Word {
    uint32_t of[kWords];
  };
  int lane, num_ranks;
  BlockShared* shared;
  uint32_t fewest_copies;  // its address

  __device__ __forceinline__ CudaWarp(int num_ranks, BlockShared* shared)
      : lane(threadIdx.x % kWarp), num_ranks(num_ranks), shared(shared) {
    fewest_copies = keep(static_cast<int>(__cvta_generic_to_shared(&shared->fewest_copies)));
  }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  template <class F>
  __device__ __forceinline__ void each_of(int count, F visit) const {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarp) visit(i);
  }
  template <class F>
  __device__ __forceinline__ void each_rank(F visit) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) visit(k, k * kWarp + lane, k * kWarp + lane < num_ranks);
  }
  __device__ __forceinline__ uint32_t get(const Word& word, int rank) const {
    uint32_t value = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const uint32_t other = __shfl_sync(kFullWarp, word.of[k], rank % kWarp);
      value = k == 0 || rank / kWarp == k ? other : value;
    }
    return value;
  }
  __device__ __forceinline__ bool any(bool holds) const { return __any_sync(kFullWarp, holds) != 0; }
  template <class F>
  __device__ __forceinline__ int count(F holds) const {
    int count = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) count += __popc(__ballot_sync(kFullWarp, holds(k, k * kWarp + lane)));
    return count;
  }
  // The words of ranks that differ from lane to lane.
  __device__ __forceinline__ Word gather(const Word& word, const Word& ranks) const {
    Word gathered;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
#pragma unroll
      for (int from = 0; from < kWords; ++from) {
        const uint32_t value = __shfl_sync(kFullWarp, word.of[from], ranks.of[k] % kWarp);
        if (from == 0 || ranks.of[k] / kWarp == from) gathered.of[k] = value;
      }
    }
    return gathered;
  }
  template <class F>
  __device__ __forceinline__ uint32_t largest(F key) const {
    uint32_t mine = key(0, lane);
#pragma unroll
    for (int k = 1; k < kWords; ++k) mine = max(mine, key(k, k * kWarp + lane));
    return __reduce_max_sync(kFullWarp, mine);
  }
  __device__ __forceinline__ uint32_t most(const Word& word) const {
    return largest([&](int k, int) { return word.of[k]; });
  }
  // Of a rank's experts those of the lane.
  __device__ __forceinline__ Largest own_largest(const uint32_t* tokens, int first, int count) const {
    Largest own = {lane < count ? tokens[first + lane] : 0, first + lane};
    if constexpr (kManyExperts) {
#pragma unroll 1
      for (int i = lane + kWarp; i < count; i += kWarp) own.take(tokens[first + i], first + i);
    }
    return own;
  }
  // The lane whose largest it is gets another number of tokens for it.
  __device__ __forceinline__ void replace(uint32_t* tokens, int first, int count, const Largest& by,
                                          Largest& own) const {
    const bool mine = own.expert == by.expert;
    if (mine) own.tokens = by.tokens;
    if constexpr (kManyExperts) {
      if (!mine) return;
      tokens[by.expert] = by.tokens;
      own = own_largest(tokens, first, count);
    }
  }
  // Of all lanes' the largest, the first of those.
  __device__ __forceinline__ Largest largest(const Largest& own) const {
    const uint32_t tokens = __reduce_max_sync(kFullWarp, own.tokens);
    return {tokens, __reduce_min_sync(kFullWarp, own.tokens == tokens ? own.expert : INT32_MAX)};
  }
  // In a register: read anew from the parameters, as the compiler likes to, it would cost more.
  __device__ __forceinline__ int keep(int value) const { return __shfl_sync(kFullWarp, value, 0); }
  __device__ __forceinline__ void add(uint32_t* target, uint32_t value) const { atomicAdd(target, value); }
  // Where `replace` may write: a copy if it does. Aligned to 16 bytes, and with room up to a multiple of that.
  __device__ __forceinline__ uint32_t* writable(uint32_t* tokens, int count, uint32_t* copy) const {
    if constexpr (kManyExperts) {
#pragma unroll 1
      for (int i = lane; i * 4 < count; i += kWarp) {
        reinterpret_cast<uint4*>(copy)[i] = reinterpret_cast<const uint4*>(tokens)[i];
      }
      return copy;
    }
    return tokens;
  }
  __device__ __forceinline__ void announce(int num_copies) const {
    if (lane < num_blocks()) atomicMin(&shared_of(lane, shared)->fewest_copies, num_copies);
  }
  // Others may announce at any time: lanes may read different numbers.
  __device__ __forceinline__ int fewest() const {
    int fewest;
    asm volatile("ld.volatile.shared.s32 %0, [%1];" : "=r"(fewest) : "r"(fewest_copies));
    return fewest;
  }
};

struct CudaBlock {
  uint32_t* sums;    // [warps] to work in
  int first_helper;  // thread

  __device__ __forceinline__ bool first() const { return threadIdx.x == 0; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <class F>
  __device__ __forceinline__ void each_of(int count, F visit) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) visit(i);
  }
  // Integers: the order does not show.
  __device__ __forceinline__ void add(uint32_t* target, uint32_t value) const { atomicAdd(target, value); }
  // Of all threads' values, known to all; what they have written is then known, too.
  __device__ __forceinline__ uint32_t sum(uint32_t mine) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    mine = __reduce_add_sync(kFullWarp, mine);
    if (lane == 0) sums[warp] = mine;
    __syncthreads();
    return __reduce_add_sync(kFullWarp, lane < blockDim.x / kWarp ? sums[lane] : 0);
  }
  // By those that plan: several values at once, as each takes long to come.
  template <class F>
  __device__ __forceinline__ void read(const int32_t* values, int count, F visit) const {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = threadIdx.x; first < count && threadIdx.x < first_helper; first += kAtOnce * first_helper) {
      int32_t read[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) read[k] = values[min(first + k * first_helper, count - 1)];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = first + k * first_helper;
        if (i < count) visit(i, read[k]);
      }
    }
  }
  // Two arrays, by the helpers of all blocks together.
  __device__ void fill(int count, int32_t* values, int32_t value, int32_t* others, int32_t other) const {
    constexpr int kOfBlock = kHelpers * kWarp;
    const int first = block_number() * kOfBlock + threadIdx.x - first_helper, threads = num_blocks() * kOfBlock;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(values) | reinterpret_cast<uintptr_t>(others)) % sizeof(int4) == 0;
    const int fours = aligned ? count / 4 : 0;
#pragma unroll 1
    for (int i = first; i < fours; i += threads) {
      reinterpret_cast<int4*>(values)[i] = make_int4(value, value, value, value);
      reinterpret_cast<int4*>(others)[i] = make_int4(other, other, other, other);
    }
#pragma unroll 1
    for (int i = 4 * fours + first; i < count; i += threads) values[i] = value, others[i] = other;
  }
  // Calls visit(g, lane, lanes) for all ranks, and more: by some neighbouring threads for each, all threads of a warp
  // alike. These are a power of two: the threads' next lower one by the ranks' next higher one.
  template <class F>
  __device__ __forceinline__ static void with_lanes(int num_ranks, F visit) {
    const int bits = max(0, min(5, __clz(num_ranks - 1) - 1 - __clz(blockDim.x))), lanes = 1 << bits;
#pragma unroll 1
    for (int first = 0; first < num_ranks; first += blockDim.x >> bits) {
      visit(first + static_cast<int>(threadIdx.x >> bits), static_cast<int>(threadIdx.x & (lanes - 1)), lanes);
    }
  }
  template <class F>
  __device__ __forceinline__ void each_rank(int num_ranks, int per_rank, F load, uint32_t* home,
                                            Largest* largest) const {
    with_lanes(num_ranks, [&](int g, int lane, int lanes) {
      const int begin = g * per_rank, end = g < num_ranks ? begin + per_rank : begin;
      uint32_t sum = 0;
      Largest mine = {0, begin};
#pragma unroll 1
      for (int e = begin + lane; e < end; e += lanes) {
        const uint32_t tokens = load(e);
        sum += tokens;
        mine.take(tokens, e);
      }
#pragma unroll 1
      for (int step = lanes / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, step);
        const Largest other = {__shfl_xor_sync(kFullWarp, mine.tokens, step),
                               __shfl_xor_sync(kFullWarp, mine.expert, step)};
        if (other.tokens > mine.tokens || (other.tokens == mine.tokens && other.expert < mine.expert)) mine = other;
      }
      if (lane == 0 && g < num_ranks) {
        home[g] = sum;
        largest[g] = mine;
      }
    });
  }
  // Calls visit(g, count) for each rank, with the number of ranks h for which holds(g, h).
  template <class Holds, class F>
  __device__ __forceinline__ void count_ranks(int num_ranks, Holds holds, F visit) const {
    with_lanes(num_ranks, [&](int g, int lane, int lanes) {
      int count = 0;
#pragma unroll 4
      for (int h = lane; h < num_ranks; h += lanes) count += holds(min(g, num_ranks - 1), h);
#pragma unroll 1
      for (int step = lanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(kFullWarp, count, step);
      if (lane == 0 && g < num_ranks) visit(g, count);
    });
  }
};

// Which is the first of the best, known to all lanes.
__device__ int best_of(const PlanScore* scores, int count) {
  const int lane = threadIdx.x % kWarp;
  const PlanScore mine = lane < count ? scores[lane] : PlanScore();
  unsigned left = lane < count;
  for (const uint32_t criterion : {mine.rated, mine.copies, mine.largest, static_cast<uint32_t>(mine.candidate)}) {
    const uint32_t best = __reduce_min_sync(kFullWarp, left ? criterion : ~0u);  // by all lanes
    left = left && criterion == best;
  }
  return __ffs(__ballot_sync(kFullWarp, left)) - 1;
}

// The blocks of a cluster plan for one group: each warp tries its candidates, and the block that has the best writes.
template <int kWords, bool kManyExperts, bool kBySpeed>
__global__ void __launch_bounds__((kMaxCandidates + kHelpers) * kWarp, 1)
    plan_kernel(const __grid_constant__ PlanShape shape, const PlanOperands in, const PlanResults out, int planners) {
  extern __shared__ __align__(16) char memory[];
  __shared__ BlockShared shared;
  const int lane = threadIdx.x % kWarp, num_planners = num_blocks() * planners;
  const bool plans = threadIdx.x / kWarp < planners;
  const int warp = block_number() * planners + threadIdx.x / kWarp;  // of those that plan
  const size_t experts = PlanMemory::experts(shape);
  if (threadIdx.x == planners * kWarp) shared.fewest_copies = kMaxGroupSlots;
  begin_blocks(!plans);
#if __CUDA_ARCH__ >= 900
  // Launched ahead of the end of what comes before, as those that follow are: these rely on that end, too.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
#endif
  uint32_t* const of_expert = reinterpret_cast<uint32_t*>(memory);
  uint32_t* const left = of_expert + experts;
  char* const of_warp = reinterpret_cast<char*>(left + experts) + threadIdx.x / kWarp * PlanMemory::bytes(shape);
  const PlanLoads loads = {of_expert, left, shared.home, shared.largest, shared.busiest, 0, 1};
  PlanGroup<CudaBlock, kBySpeed> group(CudaBlock{shared.sums, planners * kWarp}, shape, in, out, blockIdx.y, blockIdx.z,
                                       loads);
  group.read();
  await_blocks();
  using Warp = CudaWarp<kWords, kManyExperts>;
  Planner<Warp, kBySpeed> planner(Warp(shape.solve.group_size, &shared), shape, group.loads(),
                                  PlanMemory(of_warp, shape));
  if (!plans) {
    group.clear();
  } else if (!group.stays_at_home()) {
    for (int c = warp; c < shape.num_candidates; c += num_planners) planner.attempt(c);
  }
  if (plans && lane < num_blocks()) shared_of(lane, &shared)->scores[warp] = planner.best();
  sync_blocks();
  const int best = best_of(shared.scores, num_planners), of_block = best - block_number() * planners;
  if (of_block < 0 || of_block >= planners) return;
  __shared__ ptrdiff_t copies;  // where they are: so that it shows that this is shared memory
  if (plans && warp == best && lane == 0) copies = reinterpret_cast<const char*>(planner.copies_of_best()) - memory;
  __syncthreads();
  group.write(shared.scores[best], reinterpret_cast<const Copy*>(memory + copies));
}

using Kernel = void (*)(PlanShape, PlanOperands, PlanResults, int);
// By speed, words, and whether ranks have many experts.
constexpr Kernel kKernels[][3][2] = {{{plan_kernel<1, false, false>, plan_kernel<1, true, false>},
                                      {plan_kernel<2, false, false>, plan_kernel<2, true, false>},
                                      {plan_kernel<4, false, false>, plan_kernel<4, true, false>}},
                                     {{plan_kernel<1, false, true>, plan_kernel<1, true, true>},
                                      {plan_kernel<2, false, true>, plan_kernel<2, true, true>},
                                      {plan_kernel<4, false, true>, plan_kernel<4, true, true>}}};

size_t shared_bytes(const PlanShape& shape, int planners) {
  return 2 * sizeof(uint32_t) * PlanMemory::experts(shape) + planners * PlanMemory::bytes(shape);
}

}  // namespace

cudaError_t prepare_plan_cuda() { return allow_shared_bytes(kKernels, kSharedBytes); }

cudaError_t plan_cuda(cudaStream_t stream, const PlanShape& shape, const PlanOperands& in, const PlanResults& out) {
  bool clusters;
  if (const cudaError_t error = runs_hopper_code(&clusters); error != cudaSuccess) return error;
  const int blocks = clusters ? kMaxCluster : 1;
  int planners = kMaxCandidates / blocks;
  while (planners > 1 && shared_bytes(shape, planners) > kSharedBytes) planners /= 2;
  const int ranks = shape.solve.group_size;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = blocks;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, shape.solve.num_batches, shape.solve.num_groups);
  config.blockDim = (planners + kHelpers) * kWarp;
  config.dynamicSmemBytes = shared_bytes(shape, planners);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = clusters ? 2 : 0;
  const auto& kernels = kKernels[shape.solve.by_speed];
  const Kernel kernel = kernels[ranks <= kWarp ? 0 : ranks <= 2 * kWarp ? 1 : 2][shape.experts_per_rank > kWarp];
  return cudaLaunchKernelEx(&config, kernel, shape, in, out, planners);
}

}  // namespace lplb
