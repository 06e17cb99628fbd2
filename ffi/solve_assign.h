// Solves by either algorithm, and the solve and the assignment one after the other.
#pragma once

#include "assign.h"
#include "solve.h"

namespace lplb {

// By edge balance where there are edges, else by the interior-point method.
inline void solve_cpu(const SolveShape& shape, const EdgeColouring* edges, const SolveOperands& in,
                      const SolveResults& out) {
  if (edges != nullptr) {
    edge_balance_cpu(shape, *edges, in, out);
  } else {
    solve_cpu(shape, in, out);
  }
}

// The assignment's split is the solve's fraction.
inline void solve_assign_cpu(const SolveShape& solve_shape, const EdgeColouring* edges, const SolveOperands& solve_in,
                             const SolveResults& solved, const AssignShape& shape, const AssignOperands& in,
                             const AssignResults& out) {
  solve_cpu(solve_shape, edges, solve_in, solved);
  assign_cpu(shape, in, out);
}

#ifdef LPLB_CUDA
inline cudaError_t solve_cuda(cudaStream_t stream, const SolveShape& shape, const EdgeColouring* edges,
                              const SolveOperands& in, const SolveResults& out) {
  return edges != nullptr ? edge_balance_cuda(stream, shape, *edges, in, out) : solve_cuda(stream, shape, in, out);
}

inline cudaError_t solve_assign_cuda(cudaStream_t stream, const SolveShape& solve_shape, const EdgeColouring* edges,
                                     const SolveOperands& solve_in, const SolveResults& solved,
                                     const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  const cudaError_t error = solve_cuda(stream, solve_shape, edges, solve_in, solved);
  return error != cudaSuccess ? error : assign_after_solve_cuda(stream, shape, in, out);
}
#endif

}  // namespace lplb
