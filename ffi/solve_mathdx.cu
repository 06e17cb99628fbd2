// The solve with cuSolverDx's Cholesky factorisation. cmake/mathdx.py compiles this file, and links it with the
// cuSolverDx functions declared here; solve_mathdx.cc loads and launches the kernels.
#include "solve_block.cuh"
#include "solve_mathdx.h"
#include "solve_mathdx_sizes.h"

namespace lplb {
namespace {

template <int kSize, int kThreads>
struct Cholesky;

}  // namespace
}  // namespace lplb

// Called by all threads of a block of that size; the matrix is column-major. The solve takes two right sides.
#define LPLB_DECLARE(size, threads)                                                                              \
  extern "C" __device__ void lplb_potrf_##size##_##threads(double* matrix, int* info);                           \
  extern "C" __device__ void lplb_potrs_##size##_##threads(double* factor, double* side);                        \
  template <>                                                                                                    \
  struct lplb::Cholesky<size, threads> {                                                                         \
    __device__ static void factorise(double* matrix, int* info) { lplb_potrf_##size##_##threads(matrix, info); } \
    __device__ __noinline__ static void solve(double* factor, double* sides) {                                   \
      lplb_potrs_##size##_##threads(factor, sides);                                                              \
    }                                                                                                            \
  };
LPLB_MATHDX_FUNCTIONS(LPLB_DECLARE)
#undef LPLB_DECLARE

namespace lplb {
namespace {

struct MathDxScratch {
  int info;  // of the factorisation: 0 where K is positive definite
};

// Solves with cuSolverDx's Cholesky factorisation, in groups of up to kSize ranks.
template <int kSize, int kNumThreads, int kVariablesEach, bool kAllPairs>
struct MathDxBlock : BlockBase<kNumThreads, kVariablesEach, kSize, kAllPairs, false, MathDxScratch> {
  using Base = BlockBase<kNumThreads, kVariablesEach, kSize, kAllPairs, false, MathDxScratch>;
  using Base::scratch;
  using Base::sync;
  using Functions = Cholesky<kSize, kNumThreads>;
  static constexpr int kStride = kSize + 1;
  static_assert(Base::kSetupThreads == mathdx_setup_threads(kNumThreads), "solve_mathdx.cc launches as many");

  double* lower;  // [kSize, kStride] K by columns, then its factor
  double* sides;  // [2, kSize] ones and the right side, then both times the inverse of K

  __device__ void place(const int (&rank)[kVariablesEach], int num_variables, int num_ranks,
                        int (&place)[kVariablesEach], int32_t* counts) const {
    static_assert(Base::kChunks * kSize <= kSize * kStride * sizeof(double), "scratch too small");
    this->number(rank, num_variables, num_ranks, place, counts, lower);
  }

  // Factorises K, filled up with ones on the diagonal. A few threads share a row.
  __device__ void factorise(const float* matrix, const float* excess, int n, const float*) {
    constexpr int kEach = kNumThreads / kSize, kShare = kEach >= 8 ? 8 : kEach >= 4 ? 4 : kEach >= 2 ? 2 : 1;
    const int i = threadIdx.x / kShare, lane = threadIdx.x % kShare;
    double sum = 0.0;
#pragma unroll 8
    for (int j = lane; j < kSize; j += kShare) {
      const double entry = i < n && j < n && i != j ? matrix[packed(max(i, j), min(i, j))] : 0.0f;
      if (i < kSize && j < i) lower[j * kStride + i] = entry;
      sum += entry;
    }
    sum = sum_over<kShare>(sum);
    if (i < kSize && lane == 0) lower[i * kStride + i] = i < n ? excess[i] - sum : 1.0;
    sync();
    Functions::factorise(lower, &scratch->info);
    sync();
  }

  // With a and u the inverse of K times the right side and ones: dT = sum(a) / sum(u), dlambda = a - dT u. To solve
  // for u anew costs no time: the right sides go side by side.
  __device__ void apply(const float* right_side, int n, float* result) const {
    const int g = threadIdx.x;
    if (g < kSize) {
      sides[g] = g < n ? 1.0 : 0.0;
      sides[kSize + g] = g < n ? right_side[g] : 0.0f;
    }
    sync();
    Functions::solve(lower, sides);
    sync();
    double u = 0.0, a = 0.0;
    for (int i = threadIdx.x % kWarp; i < kSize; i += kWarp) {
      u += sides[i];
      a += sides[kSize + i];
    }
    const double top = sum_over<kWarp>(a) / sum_over<kWarp>(u);
    // Not a number ends the iteration, and the best iterate stands.
    if (g < n) result[g] = scratch->info == 0 ? static_cast<float>(sides[kSize + g] - top * sides[g]) : NAN;
    if (g == 0) result[n] = static_cast<float>(top);
  }

  template <int kWidth>
  __device__ static double sum_over(double value) {
#pragma unroll
    for (int step = kWidth / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    return value;
  }
};

template <int kSize, int kThreads, int kVariables, bool kPairs>
__device__ __forceinline__ void solve(const SolveShape& shape, const SolveOperands& in, const SolveResults& out) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
#endif
  using Block = MathDxBlock<kSize, kThreads, kVariables, kPairs>;
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Block::Scratch scratch;
  Block block;
  block.scratch = &scratch;
  block.lower = reinterpret_cast<double*>(memory);
  block.sides = block.lower + kSize * Block::kStride;
  Shared shared;
  carve_shared(memory + kMathDxBytes<kSize>, shape, &shared);
  InteriorPoint<Block> solver(block, shape, in, out, blockIdx.y, blockIdx.x, shared);
  solver.run();
}

}  // namespace
}  // namespace lplb

#define LPLB_KERNELS(size, threads, general)                                                                        \
  extern "C" __global__ void __launch_bounds__(lplb::mathdx_setup_threads(threads), 1) lplb_solve_pairs_##size(     \
      const lplb::SolveShape shape, const lplb::SolveOperands in, const lplb::SolveResults out) {                   \
    lplb::solve<size, threads, 1, true>(shape, in, out);                                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(lplb::mathdx_setup_threads(general), 1)                              \
      lplb_solve_##size(const lplb::SolveShape shape, const lplb::SolveOperands in, const lplb::SolveResults out) { \
    lplb::solve<size, general, lplb::kMathDxVariables, false>(shape, in, out);                                      \
  }
LPLB_MATHDX_SIZES(LPLB_KERNELS)
