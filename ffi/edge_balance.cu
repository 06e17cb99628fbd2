#include <cstring>
#include <type_traits>

#include "edge_balance.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kMaxEdgeRanks == kWarp, "a rank is a lane");

template <int kNumThreads>
struct CudaBlock {
  static constexpr int kThreads = kNumThreads;

  __device__ int thread() const { return threadIdx.x; }
  // Aligned to 16 bytes.
  __device__ void zero(uint32_t* words, int count) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count / 4; i += kThreads) reinterpret_cast<uint4*>(words)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < count % 4) words[count - 1 - threadIdx.x] = 0;
  }
  // Integers: the order does not show.
  __device__ void add(uint32_t* target, uint32_t value) const { atomicAdd(target, value); }
  __device__ void largest(uint32_t* target, uint32_t value) const { atomicMax(target, value); }
  // Neighbouring experts mostly have one home, where atomics would queue.
  __device__ void add_by_rank(uint32_t* targets, int rank, bool counts, uint32_t value) const {
    const int first = __shfl_sync(kFullWarp, rank, 0);
    if (__all_sync(kFullWarp, rank == first)) {
      const uint32_t sum = __reduce_add_sync(kFullWarp, counts ? value : 0);
      if (first >= 0 && threadIdx.x % kWarp == 0) atomicAdd(&targets[first], sum);
    } else if (counts) {
      atomicAdd(&targets[rank], value);
    }
  }
  __device__ void read_pair(const int32_t* pair, int32_t* first, int32_t* second) const {
    const int2 both = *reinterpret_cast<const int2*>(pair);
    *first = both.x;
    *second = both.y;
  }
  __device__ void write_pair(float* pair, float first, float second) const {
    *reinterpret_cast<float2*>(pair) = make_float2(first, second);
  }
  __device__ float divide(float a, float b) const { return __fdiv_rn(a, b); }
};

// The part of an EdgeColouring that is in use: parameters cost time, too.
template <int kColours>
struct Partners {
  uint8_t of[kColours][kWarp];
};

// The calling warp; edges of kNumColours colours lie in its registers.
template <int kNumColours, bool kSpeeds>
struct CudaWarp {
  using Word = uint32_t;
  static constexpr bool kBySpeed = kSpeeds;
  static constexpr int kColours = kNumColours;

  int lane;
  int other[kColours];
  uint32_t sign_of[kColours];

  __device__ explicit CudaWarp(const Partners<kColours>& partners) : lane(threadIdx.x % kWarp) {
    if (threadIdx.x >= kWarp) return;  // lanes read different constants, one after the other
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      other[c] = partners.of[c][lane];
      sign_of[c] = lane < other[c] ? 1u : ~0u;
    }
  }
  __device__ constexpr int num_colours() const { return kColours; }
  __device__ uint32_t neighbours() const {
    uint32_t mask = 0;
#pragma unroll
    for (int c = 0; c < kColours; ++c) mask |= 1u << other[c];
    return mask & ~(1u << lane);
  }
  template <class F>
  __device__ void each_rank(uint32_t& word, F visit) const {
    visit(lane, word);
  }
  template <class F>
  __device__ void each_edge(int colour, uint32_t& word, F visit) const {
    visit(lane, other[colour], word);
  }
  template <class F>
  __device__ uint32_t zip(uint32_t a, uint32_t b, F of) const {
    return of(a, b);
  }
  __device__ uint32_t partner(int colour, uint32_t word) const { return __shfl_sync(kFullWarp, word, other[colour]); }
  __device__ uint32_t sign(int colour) const { return sign_of[colour]; }
  __device__ uint32_t shift_right(uint32_t word, int shift) const { return static_cast<int32_t>(word) >> shift; }
  __device__ uint32_t clamp(uint32_t word, uint32_t most) const {
    return max(min(static_cast<int32_t>(word), static_cast<int32_t>(most)), 0);
  }
  __device__ uint32_t largest(uint32_t word) const { return __reduce_max_sync(kFullWarp, static_cast<int32_t>(word)); }
  __device__ uint32_t sum(uint32_t set, uint32_t word) const {
    return __reduce_add_sync(kFullWarp, (set >> lane & 1) != 0 ? word : 0);
  }
  __device__ uint32_t at_least(uint32_t word, uint32_t bound) const {
    return __ballot_sync(kFullWarp, static_cast<int32_t>(word) >= static_cast<int32_t>(bound));
  }
  __device__ int count(uint32_t set) const { return __popc(set); }
  __device__ uint32_t leaving(int colour, uint32_t set, uint32_t share) const {
    return (set >> other[colour] & 1) != 0 ? 0 : share;
  }
  __device__ float divide(float a, float b) const { return __fdiv_rn(a, b); }
};

constexpr int kThreads = 256;
constexpr int kExpertsEach = 2;  // held in registers from the first pass over experts to the last, if they are all

template <int kColours, bool kBySpeed>
__global__ void __launch_bounds__(kThreads, 1)
    edge_balance_kernel(const SolveShape shape, const __grid_constant__ Partners<kColours> partners,
                        const SolveOperands in, const SolveResults out) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
#endif
  extern __shared__ uint4 memory[];
  uint32_t* by_slot = reinterpret_cast<uint32_t*>(memory);
  __shared__ EdgeShared shared;
  const CudaBlock<kThreads> block;
  const EdgeBalance solver(shape, in, out, blockIdx.y, blockIdx.x, shared, by_slot);
  EdgeExpert experts[kExpertsEach];
  int first = threadIdx.x;  // the first of the thread's experts in this pass
  const auto read = [&] {
#pragma unroll
    for (int i = 0; i < kExpertsEach; ++i) experts[i] = solver.read(block, first + i * kThreads);
  };
  constexpr int kPass = kExpertsEach * kThreads;
  const int last = threadIdx.x + (shape.num_experts - 1) / kPass * kPass;

  read();
  const CudaWarp<kColours, kBySpeed> warp(partners);
  solver.clear(block, [&](int) { return warp.neighbours(); });  // the first warp's, of its lanes
  __syncthreads();
  bool replicated = false;
  while (true) {
#pragma unroll
    for (int i = 0; i < kExpertsEach; ++i) {
      if (first - block.thread() + i * kThreads < shape.num_experts) replicated |= solver.collect(block, experts[i]);
    }
    if (first == last) break;
    first += kPass;
    read();
  }
  replicated = __syncthreads_or(replicated) != 0;
  typename EdgeBalance::Outcome<uint32_t> outcome;
  if (threadIdx.x < kWarp) outcome = solver.solve(warp, replicated);
  __syncthreads();
  if (threadIdx.x < kWarp) solver.report(warp, outcome);
  while (true) {
#pragma unroll
    for (int i = 0; i < kExpertsEach; ++i) solver.write(block, first + i * kThreads, experts[i]);
    if (first < kPass) break;
    first -= kPass;
    read();
  }
}

}  // namespace

cudaError_t edge_balance_cuda(cudaStream_t stream, const SolveShape& shape, const EdgeColouring& colouring,
                              const SolveOperands& in, const SolveResults& out) {
  const dim3 grid(shape.num_groups, shape.num_batches);
  const size_t bytes = edge_slot_words(shape) * sizeof(uint32_t);
  const auto launch = [&](auto colours) {
    constexpr int kColours = decltype(colours)::value;
    Partners<kColours> partners;
    std::memcpy(partners.of, colouring.partner, sizeof(partners.of));
    const auto kernel = shape.by_speed ? edge_balance_kernel<kColours, true> : edge_balance_kernel<kColours, false>;
    kernel<<<grid, kThreads, bytes, stream>>>(shape, partners, in, out);
    return cudaGetLastError();
  };
  if (colouring.num_colours <= 2) return launch(std::integral_constant<int, 2>());
  if (colouring.num_colours <= 3) return launch(std::integral_constant<int, 3>());
  if (colouring.num_colours <= 4) return launch(std::integral_constant<int, 4>());
  if (colouring.num_colours <= 6) return launch(std::integral_constant<int, 6>());
  if (colouring.num_colours <= 8) return launch(std::integral_constant<int, 8>());
  return launch(std::integral_constant<int, 16>());
}

}  // namespace lplb
