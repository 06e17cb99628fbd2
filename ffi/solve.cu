#include <atomic>

#include "interior_point.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// A thread block of kNumThreads that owns up to kVariablesEach variables a thread, for groups of up to kOrder
// ranks.
template <int kNumThreads, int kVariablesEach, int kOrder, bool kAllPairs>
struct CudaBlock {
  static constexpr int kThreads = kNumThreads;
  static constexpr int kVariables = kVariablesEach;
  static constexpr int kRanks = 1;
  static constexpr bool kPairs = kAllPairs;
  static_assert(kThreads >= kOrder, "a thread owns one rank at most");

  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kMaxReduced = 5;

  struct Scratch {
    float reduced[2][kWarps][kMaxReduced];
    float column[2][kOrder];
  };
  Scratch* scratch;
  int turn = 0;  // which half of Scratch::reduced comes next

  // A power of two of neighbouring lanes that share the work of one rank.
  struct Team {
    static constexpr int size = least(kWarp, kThreads / kOrder);
    static constexpr int count = kThreads / size;
    int index, lane;
    unsigned mask;
    __device__ void sync() const { __syncwarp(mask); }
    __device__ float sum(float value) const {
#pragma unroll
      for (int step = size / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
      return value;
    }
  };

  __device__ int thread() const { return threadIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ Team team() const {
    Team team;
    team.index = threadIdx.x / Team::size;
    team.lane = threadIdx.x % Team::size;
    const unsigned ones = Team::size == kWarp ? kFullWarp : (1u << Team::size % kWarp) - 1;
    team.mask = ones << (threadIdx.x % kWarp / Team::size * Team::size);
    return team;
  }
  __device__ float sibling(float value) const { return __shfl_xor_sync(kFullWarp, value, 1); }

  template <class T>
  __device__ void add(T* target, T value) const {
    atomicAdd(target, value);  // integers only: the order does not show
  }

  // Sums and minima over the block, known to all threads. One barrier: the two halves of the scratch take turns.
  template <int kSums, int kLeast>
  __device__ void reduce(float (&sums)[kSums], float (&minima)[kLeast]) {
    static_assert(kSums + kLeast <= kMaxReduced, "scratch too small");
    float (*partial)[kMaxReduced] = scratch->reduced[turn];
    turn ^= 1;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], step);
#pragma unroll
      for (int i = 0; i < kLeast; ++i) {
        minima[i] = fminf(minima[i], __shfl_xor_sync(kFullWarp, minima[i], step));
      }
    }
    if (threadIdx.x % kWarp == 0) {
      float* mine = partial[threadIdx.x / kWarp];
#pragma unroll
      for (int i = 0; i < kSums; ++i) mine[i] = sums[i];
#pragma unroll
      for (int i = 0; i < kLeast; ++i) mine[kSums + i] = minima[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = partial[0][i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sums[i] += partial[warp][i];
    }
#pragma unroll
    for (int i = 0; i < kLeast; ++i) {
      minima[i] = partial[0][kSums + i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) minima[i] = fminf(minima[i], partial[warp][kSums + i]);
    }
  }

  // Exclusive scan over threads; `head` is room for one count a warp.
  __device__ int scan(int mine, int32_t* head, int* total) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane == kWarp - 1) head[warp] = upto;
    __syncthreads();
    int before = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += head[w];
      sum += head[w];
    }
    *total = sum;
    return before + upto - mine;
  }

  // Every warp adds the values up for itself, in the same order.
  __device__ float total(const float* values, int n) const {
    float s = 0.0f;
    for (int i = threadIdx.x % kWarp; i < n; i += kWarp) s += values[i];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) s += __shfl_xor_sync(kFullWarp, s, step);
    return s;
  }

  // Moves the entries of each row that are not `none` to its front, a warp a row.
  __device__ void collect(uint16_t* rows, int num_rows, int row_size, uint16_t none, int32_t* counts) const {
    const int lane = threadIdx.x % kWarp;
    for (int g = threadIdx.x / kWarp; g < num_rows; g += kWarps) {
      uint16_t* row = rows + g * row_size;
      int n = 0;
      for (int i = 0; i < row_size; i += kWarp) {
        const uint16_t entry = i + lane < row_size ? row[i + lane] : none;
        const unsigned kept = __ballot_sync(kFullWarp, entry != none);  // all have read before any writes
        if (entry != none) row[n + __popc(kept & ((1u << lane) - 1))] = entry;
        n += __popc(kept);
        __syncwarp();
      }
      if (lane == 0) counts[g] = n;
    }
  }

  // Inverse of (matrix + shift) by symmetric sweeps (Gauss-Jordan on the diagonal): safe without pivoting,
  // because the matrix is symmetric positive definite. The matrix lies in registers, spread cyclically over a
  // grid of threads; each sweep passes one column through shared memory.
  __device__ void invert(float* matrix, int stride, int n, float shift) const {
    constexpr int kGridColumns = least(16, kOrder);
    constexpr int kGridRows = least(kThreads / kGridColumns, kOrder);
    constexpr int kRowsEach = kOrder / kGridRows, kColumnsEach = kOrder / kGridColumns;
    const int row = threadIdx.x / kGridColumns, column = threadIdx.x % kGridColumns;
    const bool active = row < kGridRows;
    float a[kRowsEach][kColumnsEach];
#pragma unroll
    for (int p = 0; p < kRowsEach; ++p) {
#pragma unroll
      for (int q = 0; q < kColumnsEach; ++q) {
        const int i = row + p * kGridRows, j = column + q * kGridColumns;
        a[p][q] = active && i < n && j < n ? matrix[i * stride + j] + shift : 0.0f;
      }
    }
#pragma unroll
    for (int block = 0; block < kColumnsEach; ++block) {
      for (int k = block * kGridColumns; k < least(n, (block + 1) * kGridColumns); ++k) {
        float* passed = scratch->column[k % 2];
        if (active && column == k % kGridColumns) {
#pragma unroll
          for (int p = 0; p < kRowsEach; ++p) passed[row + p * kGridRows] = a[p][block];
        }
        __syncthreads();
        if (active) {
          const float r = 1.0f / passed[k];
          float across[kColumnsEach];
#pragma unroll
          for (int q = 0; q < kColumnsEach; ++q) across[q] = passed[column + q * kGridColumns];
#pragma unroll
          for (int p = 0; p < kRowsEach; ++p) {
            const int i = row + p * kGridRows;
            const float t = passed[i] * r;
#pragma unroll
            for (int q = 0; q < kColumnsEach; ++q) {
              const int j = column + q * kGridColumns;
              const float swept = a[p][q] - t * across[q];
              a[p][q] = i == k ? (j == k ? -r : across[q] * r) : (j == k ? t : swept);
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kRowsEach; ++p) {
#pragma unroll
      for (int q = 0; q < kColumnsEach; ++q) {
        const int i = row + p * kGridRows, j = column + q * kGridColumns;
        if (active && i < n && j < n) matrix[i * stride + j] = -a[p][q];
      }
    }
    __syncthreads();
  }
};

template <class Block>
__global__ void __launch_bounds__(Block::kThreads, 1)
    solve_kernel(const SolveShape shape, const SolveOperands in, const SolveResults out) {
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Block::Scratch scratch;
  Shared shared;
  carve_shared(memory, shape, Block::kWarps, &shared);
  Block block;
  block.scratch = &scratch;
  InteriorPoint<Block> solver(block, shape, in, out, blockIdx.y, blockIdx.x, shared);
  solver.run();
}

// Calls `visit` with the block type that fits the shape.
template <class Visit>
cudaError_t with_block(int group_size, int max_variables, int max_replicas, Visit visit) {
  const auto choose = [&](auto small, auto large) {
    return max_replicas == 2 && max_variables <= decltype(small)::kThreads ? visit(small) : visit(large);
  };
  if (group_size <= 8) return choose(CudaBlock<128, 1, 8, true>(), CudaBlock<512, 4, 8, false>());
  if (group_size <= 16) return choose(CudaBlock<128, 1, 16, true>(), CudaBlock<512, 4, 16, false>());
  if (group_size <= 32) return choose(CudaBlock<256, 1, 32, true>(), CudaBlock<512, 4, 32, false>());
  if (group_size <= 64) return choose(CudaBlock<256, 1, 64, true>(), CudaBlock<512, 4, 64, false>());
  return choose(CudaBlock<512, 1, 128, true>(), CudaBlock<512, 4, 128, false>());
}

}  // namespace

cudaError_t prepare_solve_cuda() {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> prepared[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < kMaxDevices && prepared[device].load()) return cudaSuccess;
  for (const int group_size : {8, 16, 32, 64, 128}) {
    for (const int variables : {1, kMaxGroupSlots}) {
      const cudaError_t error = with_block(group_size, variables, 2, [&](auto block) {
        constexpr int kDynamic = 99 * 1024 - static_cast<int>(sizeof(typename decltype(block)::Scratch));
        return cudaFuncSetAttribute(solve_kernel<decltype(block)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kDynamic);
      });
      if (error != cudaSuccess) return error;
    }
  }
  if (device < kMaxDevices) prepared[device].store(true);
  return cudaSuccess;
}

cudaError_t solve_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
  return with_block(shape.group_size, shape.max_variables, shape.max_replicas, [&](auto block) {
    using Block = decltype(block);
    const size_t bytes = carve_shared(nullptr, shape, Block::kWarps, nullptr);
    const dim3 grid(shape.num_groups, shape.num_batches);
    solve_kernel<Block><<<grid, Block::kThreads, bytes, stream>>>(shape, in, out);
    return cudaGetLastError();
  });
}

}  // namespace lplb
