#include <cooperative_groups.h>

#include "count.h"
#include "plan.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kSharedBytes = 98 * 1024;  // what every device has, less a little

constexpr int kMaxCluster = 8;  // what every device with clusters has

// A block's shared memory, but for that of experts and copies.
struct BlockShared {
  PlanLoads loads;
  uint32_t home[kMaxGroupRanks];
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
__device__ BlockShared* shared_of(int block, BlockShared* mine) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#else
  return mine;
#endif
}

// A value of each rank lies in kWords registers of the lanes.
template <int kWords>
struct CudaWarp {
  struct Word {
    uint32_t of[kWords];
  };
  struct Found {
    uint32_t value;
    int index;
  };
  int lane, num_ranks;
  BlockShared* shared;

  __device__ CudaWarp(int num_ranks, BlockShared* shared)
      : lane(threadIdx.x % kWarp), num_ranks(num_ranks), shared(shared) {}
  __device__ bool first() const { return lane == 0; }
  __device__ void sync() const { __syncwarp(); }
  template <class F>
  __device__ void each_of(int count, F visit) const {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarp) visit(i);
  }
  template <class F>
  __device__ void each_rank(F visit) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) visit(k, k * kWarp + lane, k * kWarp + lane < num_ranks);
  }
  __device__ uint32_t get(const Word& word, int rank) const {
    uint32_t value = __shfl_sync(kFullWarp, word.of[0], rank % kWarp);
#pragma unroll
    for (int k = 1; k < kWords; ++k) {
      const uint32_t other = __shfl_sync(kFullWarp, word.of[k], rank % kWarp);
      if (rank / kWarp == k) value = other;
    }
    return value;
  }
  // The first of the largest.
  __device__ Found largest(const Word& word) const {
    uint32_t mine = word.of[0];
#pragma unroll
    for (int k = 1; k < kWords; ++k) mine = max(mine, word.of[k]);
    const uint32_t value = __reduce_max_sync(kFullWarp, mine);
    int index = 0;
#pragma unroll
    for (int k = kWords - 1; k >= 0; --k) {
      const unsigned lanes = __ballot_sync(kFullWarp, word.of[k] == value);
      if (lanes != 0) index = k * kWarp + __ffs(lanes) - 1;
    }
    return {value, index};
  }
  template <class F>
  __device__ Found largest_of(int count, F value) const {
    const auto of_32 = [&](int begin) {
      const int i = begin + lane;
      const uint32_t mine = i < count ? value(i) : 0, here = __reduce_max_sync(kFullWarp, mine);
      return Found{here, begin + __ffs(__ballot_sync(kFullWarp, mine == here)) - 1};
    };
    Found found = of_32(0);
#pragma unroll 1
    for (int begin = kWarp; begin < count; begin += kWarp) {
      if (const Found other = of_32(begin); other.value > found.value) found = other;
    }
    return found;
  }
  __device__ void announce(int num_copies) const {
    if (lane < num_blocks()) atomicMin(&shared_of(lane, shared)->fewest_copies, num_copies);
  }
  // As one lane reads it: others may announce at any time.
  __device__ int fewest() const {
    return __shfl_sync(kFullWarp, *static_cast<volatile int*>(&shared->fewest_copies), 0);
  }
};

struct CudaBlock {
  __device__ bool first() const { return threadIdx.x == 0; }
  __device__ void sync() const { __syncthreads(); }
  template <class F>
  __device__ void each_of(int count, F visit) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) visit(i);
  }
  // Integers: the order does not show.
  __device__ void add(uint32_t* target, uint32_t value) const { atomicAdd(target, value); }
  __device__ void add_all(uint32_t* target, uint32_t value) const {
    value = __reduce_add_sync(kFullWarp, value);
    if (threadIdx.x % kWarp == 0) atomicAdd(target, value);
  }
  // By all blocks together.
  __device__ void fill(int32_t* values, int count, int32_t value) const {
    const int first = block_number() * blockDim.x + threadIdx.x, threads = num_blocks() * blockDim.x;
    if (count % 4 != 0 || reinterpret_cast<uintptr_t>(values) % sizeof(int4) != 0) {
      for (int i = first; i < count; i += threads) values[i] = value;
      return;
    }
    int4* const fours = reinterpret_cast<int4*>(values);
    for (int i = first; i < count / 4; i += threads) fours[i] = make_int4(value, value, value, value);
  }
  __device__ int leading_zeros(uint32_t value) const { return __clz(static_cast<int>(value)); }
  __device__ float power_of_two(int exponent) const { return __int_as_float((127 + exponent) << 23); }
};

// The smallest of the scores; the same for all lanes.
__device__ PlanScore best_of(const PlanScore* scores, int count) {
  const int lane = threadIdx.x % kMaxCandidates;
  PlanScore best = lane < count ? scores[lane] : PlanScore();
#pragma unroll
  for (int step = kMaxCandidates / 2; step > 0; step /= 2) {
    PlanScore other;
    other.first = __shfl_xor_sync(kFullWarp, best.first, step);
    other.largest = __shfl_xor_sync(kFullWarp, best.largest, step);
    other.candidate = __shfl_xor_sync(kFullWarp, best.candidate, step);
    other.bound = __shfl_xor_sync(kFullWarp, best.bound, step);
    other.num_copies = __shfl_xor_sync(kFullWarp, best.num_copies, step);
    if (other.better_than(best)) best = other;
  }
  return best;
}

// The blocks of a cluster plan for one group: each warp tries its candidates, and the block that has the best writes.
template <int kWords>
__global__ void __launch_bounds__(kMaxCandidates* kWarp, 1)
    plan_kernel(const __grid_constant__ PlanShape shape, const PlanOperands in, const PlanResults out) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
#endif
  extern __shared__ __align__(16) char memory[];
  __shared__ BlockShared shared;
  const int warps = blockDim.x / kWarp, warp = block_number() * warps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, num_warps = num_blocks() * warps;
  const size_t experts = PlanMemory::experts(shape);
  if (threadIdx.x == 0) {
    shared.loads.expert = reinterpret_cast<uint32_t*>(memory);
    shared.loads.home = shared.home;
    shared.fewest_copies = kMaxGroupSlots;
  }
  __syncthreads();
  uint32_t* const left = reinterpret_cast<uint32_t*>(memory) + experts;
  char* const of_warp = reinterpret_cast<char*>(left + experts) + threadIdx.x / kWarp * PlanMemory::bytes(shape);
  PlanGroup<CudaBlock> group(CudaBlock(), shape, in, out, blockIdx.y, blockIdx.z, &shared.loads);
  group.read();
  sync_blocks();  // all have begun: their shared memory is there
  Planner<CudaWarp<kWords>> planner(CudaWarp<kWords>(shape.solve.group_size, &shared), shape, shared.loads,
                                    PlanMemory(of_warp, shape));
  if (!group.stays_at_home()) {
    for (int c = warp; c < shape.num_candidates; c += num_warps) planner.attempt(c);
  }
  if (lane < num_blocks()) shared_of(lane, &shared)->scores[warp] = planner.best();
  sync_blocks();
  const PlanScore best = best_of(shared.scores, num_warps);
  const int best_warp = best.candidate % num_warps;
  if (best_warp / warps != block_number()) return;
  __shared__ const Copy* copies;
  if (warp == best_warp && lane == 0) copies = planner.copies_of_best();
  __syncthreads();
  group.write(best, copies, left);
}

using Kernel = void (*)(PlanShape, PlanOperands, PlanResults);
constexpr Kernel kKernels[] = {plan_kernel<1>, plan_kernel<2>, plan_kernel<4>};

size_t shared_bytes(const PlanShape& shape, int num_warps) {
  return 2 * sizeof(uint32_t) * PlanMemory::experts(shape) + num_warps * PlanMemory::bytes(shape);
}

}  // namespace

cudaError_t prepare_plan_cuda() {
  for (const Kernel kernel : kKernels) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t plan_cuda(cudaStream_t stream, const PlanShape& shape, const PlanOperands& in, const PlanResults& out) {
  bool clusters;
  if (const cudaError_t error = runs_hopper_code(&clusters); error != cudaSuccess) return error;
  const int blocks = clusters ? kMaxCluster : 1;
  int warps = kMaxCandidates / blocks;
  while (warps > 1 && shared_bytes(shape, warps) > kSharedBytes) warps /= 2;
  const int ranks = shape.solve.group_size;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, shape.solve.num_batches, shape.solve.num_groups);
  config.blockDim = warps * kWarp;
  config.dynamicSmemBytes = shared_bytes(shape, warps);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = clusters ? 1 : 0;
  const Kernel kernel = kKernels[ranks <= kWarp ? 0 : ranks <= 2 * kWarp ? 1 : 2];
  return cudaLaunchKernelEx(&config, kernel, shape, in, out);
}

}  // namespace lplb
