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
                              const SolveOperands& in, const SolveResults& out, const SolveShares& shares = {}) {
  return edges != nullptr ? edge_balance_cuda(stream, shape, *edges, in, out)
                          : solve_cuda(stream, shape, in, out, shares);
}

// Assigns after solve(shares), which makes these where it can.
template <class Solve>
cudaError_t assign_after_cuda(Solve solve, bool makes_shares, cudaStream_t stream, const AssignShape& shape,
                              const AssignOperands& in, const AssignResults& out) {
  const uint32_t room = makes_shares ? room_for_shares(shape) : 0;
  const cudaError_t error = solve(room > 0 ? SolveShares{in.load, out.shares, room} : SolveShares());
  if (error != cudaSuccess) return error;
  return room > 0 ? assign_by_shares_cuda(stream, shape, in, out, true)
                  : assign_after_solve_cuda(stream, shape, in, out);
}

inline cudaError_t solve_assign_cuda(cudaStream_t stream, const SolveShape& solve_shape, const EdgeColouring* edges,
                                     const SolveOperands& solve_in, const SolveResults& solved,
                                     const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  const auto solve = [&](const SolveShares& shares) {
    return solve_cuda(stream, solve_shape, edges, solve_in, solved, shares);
  };
  return assign_after_cuda(solve, edges == nullptr && makes_shares(solve_shape), stream, shape, in, out);
}
#endif

}  // namespace lplb
