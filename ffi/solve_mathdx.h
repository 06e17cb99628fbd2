// Launchers of the solve that factorises with NVIDIA cuSolverDx; only in builds with LPLB_MATHDX.
#pragma once

#include <vector>

#include "solve.h"

namespace lplb {

// Group sizes built in. Each serves groups that fill it by more than half.
std::vector<int> mathdx_sizes();
// Whether the shape has a kernel, and the current device, which must have been prepared, runs it.
bool has_mathdx(const SolveShape& shape);

cudaError_t prepare_solve_mathdx_cuda(int device);
cudaError_t solve_mathdx_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                              const SolveResults& out);

// Variables that a thread owns, where experts have more than two replicas.
constexpr int kMathDxVariables = 4;
// Threads of a block of which `threads` solve, see BlockBase.
constexpr int mathdx_setup_threads(int threads) { return threads < 256 ? 256 : threads; }
// Bytes of a block's matrix, its columns one further apart than they are long, and two right sides; a multiple of 16.
template <int kSize>
constexpr size_t kMathDxBytes = (kSize * (kSize + 1) + 2 * kSize + 1) / 2 * 2 * sizeof(double);

}  // namespace lplb
