#include <atomic>

#include "interior_point.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A thread block of kNumThreads that owns up to kVariablesEach variables a thread, for groups of up to kMostRanks
// ranks.
template <int kNumThreads, int kVariablesEach, int kMostRanks, bool kAllPairs>
struct CudaBlock {
  static constexpr int kThreads = kNumThreads;
  static constexpr int kVariables = kVariablesEach;
  static constexpr int kRanks = 1;
  static constexpr bool kPairs = kAllPairs;
  static_assert(kThreads >= kMostRanks, "a thread owns one rank at most");
  static_assert(!kPairs || kVariables == 1, "pairs are neighbouring threads");

  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kMostReduced = 5;
  static constexpr int kOrder = kMostRanks + 1;

  // The inverse lies in registers, in tiles over a grid of threads whose rows lie within a warp. kBatch columns pass
  // through shared memory at a time.
  static constexpr int kGridColumns = kMostRanks <= 8 ? 4 : kMostRanks <= 16 ? 8 : 16;
  static constexpr int kGridRows = kThreads / kGridColumns;
  static constexpr int kColumnsEach = (kOrder + kGridColumns - 1) / kGridColumns;
  static constexpr int kRowsEach = (kOrder + kGridRows - 1) / kGridRows;
  static constexpr int kBatch = kMostRanks <= 32 ? kColumnsEach : 1;  // more would not fit the registers
  static constexpr int kPassed =
      kRowsEach * kGridRows > kColumnsEach* kGridColumns ? kRowsEach * kGridRows : kColumnsEach * kGridColumns;
  static_assert(kColumnsEach % kBatch == 0, "a tile's columns pass in whole batches");

  struct Scratch {
    float reduced[2][kWarps][kMostReduced];
    double column[2][kBatch][kPassed];
    int counts[kWarps];
  };
  Scratch* scratch;
  int turn = 0;                             // which half of Scratch::reduced comes next
  double inverse[kRowsEach][kColumnsEach];  // negated

  __device__ int thread() const { return threadIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ float sibling(float value) const { return __shfl_xor_sync(kFullWarp, value, 1); }
  // Good to two units in the last place, which Newton steps do not need.
  __device__ float divide(float a, float b) const { return __fdividef(a, b); }
  template <class T>
  __device__ void add(T* target, T value) const {
    atomicAdd(target, value);  // integers only: the order does not show
  }

  // Sums, and minima or maxima of nonnegative values, known to all threads. One barrier: the two halves of the scratch
  // take turns.
  template <bool kLargest, int kSums, int kExtremes>
  __device__ void reduce(float (&sums)[kSums], float (&extremes)[kExtremes]) {
    static_assert(kSums + kExtremes <= kMostReduced, "scratch too small");
    float (*partial)[kMostReduced] = scratch->reduced[turn];
    turn ^= 1;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], step);
    }
#pragma unroll
    for (int i = 0; i < kExtremes; ++i) extremes[i] = warp_extreme<kLargest>(extremes[i]);
    if (threadIdx.x % kWarp == 0) {
      float* mine = partial[threadIdx.x / kWarp];
#pragma unroll
      for (int i = 0; i < kSums; ++i) mine[i] = sums[i];
#pragma unroll
      for (int i = 0; i < kExtremes; ++i) mine[kSums + i] = extremes[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = partial[0][i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sums[i] += partial[warp][i];
    }
#pragma unroll
    for (int i = 0; i < kExtremes; ++i) {
      extremes[i] = partial[0][kSums + i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        const float other = partial[warp][kSums + i];
        extremes[i] = kLargest ? fmaxf(extremes[i], other) : fminf(extremes[i], other);
      }
    }
  }
  // The bits of nonnegative floats order as the floats do.
  template <bool kLargest>
  __device__ static float warp_extreme(float value) {
    const unsigned bits = __float_as_uint(value);
    return __uint_as_float(kLargest ? __reduce_max_sync(kFullWarp, bits) : __reduce_min_sync(kFullWarp, bits));
  }

  // Exclusive scan over threads, and the total.
  __device__ int scan(int mine, int* total) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane == kWarp - 1) scratch->counts[warp] = upto;
    __syncthreads();
    int before = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += scratch->counts[w];
      sum += scratch->counts[w];
    }
    *total = sum;
    return before + upto - mine;
  }

  // Moves the entries of each row that are not `none` to its front, a warp a row, and says where they went.
  template <class Moved>
  __device__ void collect(uint16_t* rows, int num_rows, int row_size, uint16_t none, int32_t* counts,
                          Moved moved) const {
    const int lane = threadIdx.x % kWarp;
    for (int g = threadIdx.x / kWarp; g < num_rows; g += kWarps) {
      uint16_t* row = rows + g * row_size;
      int n = 0;
      for (int i = 0; i < row_size; i += kWarp) {
        const uint16_t entry = i + lane < row_size ? row[i + lane] : none;
        const unsigned kept = __ballot_sync(kFullWarp, entry != none);
        __syncwarp();  // all have read before any writes
        if (entry != none) {
          const int place = n + __popc(kept & ((1u << lane) - 1));
          row[place] = entry;
          moved(entry, g * row_size + place);
        }
        n += __popc(kept);
        __syncwarp();
      }
      if (lane == 0) counts[g] = n;
    }
  }

  // The negated inverse of [[K, 1], [1^T, 0]], by symmetric sweeps (Gauss-Jordan on the diagonal): safe without
  // pivoting, because K is positive definite. K is `matrix` off the diagonal, of which the lower triangle counts, and
  // has rows that sum to `excess`.
  //
  // A sweep of k turns A_ij into A_ij - A_ik A_jk / A_kk, row and column k into A_ik / A_kk, and A_kk into -1 / A_kk.
  // Columns pass through shared memory a batch at a time, for one barrier; every thread brings its copies of the
  // batch's later columns up to date by itself.
  __device__ void factorise(const float* matrix, int stride, const float* excess, int n) {
    const int row = threadIdx.x / kGridColumns, column = threadIdx.x % kGridColumns;
#pragma unroll
    for (int p = 0; p < kRowsEach; ++p) {
      const int i = row * kRowsEach + p;
      double sum = 0.0;
#pragma unroll
      for (int q = 0; q < kColumnsEach; ++q) {
        const int j = column * kColumnsEach + q;
        const bool inside = i < n && j < n, border = (i == n && j < n) || (i < n && j == n);
        inverse[p][q] = border ? 1.0 : inside && i != j ? matrix[max(i, j) * stride + min(i, j)] : 0.0f;
        if (inside) sum += inverse[p][q];
      }
      sum = row_sum(sum);
#pragma unroll
      for (int q = 0; q < kColumnsEach; ++q) {
        if (i < n && column * kColumnsEach + q == i) inverse[p][q] = excess[i] - sum;
      }
    }
    int half = 0;
    for (int owner = 0; owner * kColumnsEach <= n; ++owner) {
#pragma unroll
      for (int first = 0; first < kColumnsEach; first += kBatch) {
        double (*passed)[kPassed] = scratch->column[half];
        half ^= 1;
        if (column == owner) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int p = 0; p < kRowsEach; ++p) passed[b][row * kRowsEach + p] = inverse[p][first + b];
          }
        }
        __syncthreads();
        double down[kBatch][kRowsEach], across[kBatch][kColumnsEach], pivot[kBatch][kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int p = 0; p < kRowsEach; ++p) down[b][p] = passed[b][row * kRowsEach + p];
#pragma unroll
          for (int q = 0; q < kColumnsEach; ++q) across[b][q] = passed[b][column * kColumnsEach + q];
#pragma unroll
          for (int c = 0; c < kBatch; ++c) pivot[b][c] = passed[b][owner * kColumnsEach + first + c];
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int k = owner * kColumnsEach + first + b;
          if (k > n) break;
          const double r = reciprocal(pivot[b][b]);
#pragma unroll
          for (int p = 0; p < kRowsEach; ++p) {
            const bool at = row * kRowsEach + p == k;
            const double t = at ? -r : down[b][p] * r;
#pragma unroll
            for (int q = 0; q < kColumnsEach; ++q) {
              inverse[p][q] = (at ? 0.0 : inverse[p][q]) - t * across[b][q];
            }
            if (column == owner) inverse[p][first + b] = t;
#pragma unroll
            for (int c = b + 1; c < kBatch; ++c) down[c][p] = (at ? 0.0 : down[c][p]) - t * pivot[b][c];
          }
#pragma unroll
          for (int q = 0; q < kColumnsEach; ++q) {
            const bool at = column * kColumnsEach + q == k;
            const double t = at ? -r : across[b][q] * r;
#pragma unroll
            for (int c = b + 1; c < kBatch; ++c) across[c][q] = (at ? 0.0 : across[c][q]) - t * pivot[b][c];
          }
#pragma unroll
          for (int c = b + 1; c < kBatch; ++c) {
#pragma unroll
            for (int d = b + 1; d < kBatch; ++d) pivot[c][d] -= pivot[b][d] * r * pivot[b][c];
          }
        }
      }
    }
  }

  // result [n + 1] = the inverse times [right_side, 0].
  __device__ void apply(const float* right_side, int n, float* result) const {
    const int row = threadIdx.x / kGridColumns, column = threadIdx.x % kGridColumns;
    double along[kColumnsEach];
#pragma unroll
    for (int q = 0; q < kColumnsEach; ++q) {
      const int j = column * kColumnsEach + q;
      along[q] = j < n ? right_side[j] : 0.0f;
    }
#pragma unroll
    for (int p = 0; p < kRowsEach; ++p) {
      double s = 0.0;
#pragma unroll
      for (int q = 0; q < kColumnsEach; ++q) s -= inverse[p][q] * along[q];
      s = row_sum(s);
      const int i = row * kRowsEach + p;
      if (column == 0 && i <= n) result[i] = static_cast<float>(s);
    }
  }

  // Sum over the threads of a row of the grid.
  __device__ static double row_sum(double value) {
#pragma unroll
    for (int step = kGridColumns / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    return value;
  }
  // Newton's iteration from float32's reciprocal: shorter than a division.
  __device__ static double reciprocal(double value) {
    double r = static_cast<double>(__fdividef(1.0f, static_cast<float>(value)));
    r = r * (2.0 - value * r);
    return r * (2.0 - value * r);
  }
};

template <class Block>
__global__ void __launch_bounds__(Block::kThreads, 1)
    solve_kernel(const SolveShape shape, const SolveOperands in, const SolveResults out) {
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Block::Scratch scratch;
  Shared shared;
  carve_shared(memory, shape, &shared);
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
    const size_t bytes = carve_shared(nullptr, shape, nullptr);
    const dim3 grid(shape.num_groups, shape.num_batches);
    solve_kernel<Block><<<grid, Block::kThreads, bytes, stream>>>(shape, in, out);
    return cudaGetLastError();
  });
}

}  // namespace lplb
