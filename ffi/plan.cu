#include <atomic>

#include "plan.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kSharedBytes = 98 * 1024;  // what every device has, less a little

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

  __device__ explicit CudaWarp(int num_ranks) : lane(threadIdx.x % kWarp), num_ranks(num_ranks) {}
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
    Found found = {0, 0};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kWarp) {
      const int i = begin + lane;
      const uint32_t mine = i < count ? value(i) : 0;
      const uint32_t here = __reduce_max_sync(kFullWarp, mine);
      const unsigned lanes = __ballot_sync(kFullWarp, mine == here);
      if (here > found.value) found = {here, begin + __ffs(lanes) - 1};
    }
    return found;
  }
  template <class F>
  __device__ uint32_t count_of(int count, F holds) const {
    uint32_t number = 0;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kWarp) {
      const int i = begin + lane;
      number += __popc(__ballot_sync(kFullWarp, i < count && holds(i)));
    }
    return number;
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
  __device__ void fill(int32_t* values, int64_t count, int32_t value) const {
    if (count % 4 != 0 || reinterpret_cast<uintptr_t>(values) % sizeof(int4) != 0) {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) values[i] = value;
      return;
    }
    int4* const fours = reinterpret_cast<int4*>(values);
    for (int64_t i = threadIdx.x; i < count / 4; i += blockDim.x) fours[i] = make_int4(value, value, value, value);
  }
  __device__ int leading_zeros(uint32_t value) const { return __clz(static_cast<int>(value)); }
  __device__ float power_of_two(int exponent) const { return __int_as_float((127 + exponent) << 23); }
};

template <int kWords>
__global__ void __launch_bounds__(kMaxCandidates* kWarp, 1)
    plan_kernel(const __grid_constant__ PlanShape shape, const PlanOperands in, const PlanResults out) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
#endif
  extern __shared__ __align__(16) char memory[];
  __shared__ PlanLoads loads;
  __shared__ uint32_t home[kMaxGroupRanks];
  __shared__ PlanScore scores[kMaxCandidates];
  __shared__ const Copy* copies[kMaxCandidates];
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const size_t experts = PlanMemory::experts(shape);
  if (threadIdx.x == 0) {
    loads.expert = reinterpret_cast<uint32_t*>(memory);
    loads.home = home;
  }
  __syncthreads();
  uint32_t* const left = loads.expert + experts;
  char* const of_warps = reinterpret_cast<char*>(left + experts);
  PlanGroup<CudaBlock> group(CudaBlock(), shape, in, out, blockIdx.y, blockIdx.x, &loads);
  group.read();
  if (!group.stays_at_home()) {
    Planner<CudaWarp<kWords>> planner(CudaWarp<kWords>(shape.solve.group_size), shape, loads,
                                      PlanMemory(of_warps + warp * PlanMemory::bytes(shape), shape));
    for (int c = warp; c < shape.num_candidates; c += num_warps) planner.attempt(c);
    if (threadIdx.x % kWarp == 0) {
      scores[warp] = planner.best();
      copies[warp] = planner.copies_of_best();
    }
  } else if (threadIdx.x % kWarp == 0) {
    scores[warp] = PlanScore();
  }
  __syncthreads();
  int best = 0;
  for (int w = 1; w < num_warps; ++w) {
    if (scores[w].better_than(scores[best])) best = w;
  }
  group.write(scores[best], copies[best], left);
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
  int num_warps = kMaxCandidates;
  while (num_warps > 1 && (num_warps / 2 >= shape.num_candidates || shared_bytes(shape, num_warps) > kSharedBytes)) {
    num_warps /= 2;
  }
  const int ranks = shape.solve.group_size;
  const Kernel kernel = kKernels[ranks <= kWarp ? 0 : ranks <= 2 * kWarp ? 1 : 2];
  const dim3 grid(shape.solve.num_groups, shape.solve.num_batches);
  kernel<<<grid, num_warps * kWarp, shared_bytes(shape, num_warps), stream>>>(shape, in, out);
  return cudaGetLastError();
}

}  // namespace lplb
