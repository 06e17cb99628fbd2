// Plans, solves where the plan's own split is not certified to be the best, and assigns, one after the other.
#pragma once

#include "plan.h"
#include "solve_assign.h"

namespace lplb {

// The solve's view of what the plan has left.
inline SolveShape after_plan(const PlanShape& shape) {
  SolveShape solve = shape.solve;
  solve.planned = true;
  solve.threshold = 0.0f;  // the plan has seen to it
  return solve;
}

inline void plan_solve_cpu(const PlanShape& shape, const PlanOperands& in, const PlanResults& out) {
  plan_cpu(shape, in, out);
  if (shape.solve.max_iterations > 0) solve_cpu(after_plan(shape), {in.load, out.log2phy}, out.split);
}

inline void plan_assign_cpu(const PlanShape& plan_shape, const PlanOperands& plan_in, const PlanResults& planned,
                            const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  plan_solve_cpu(plan_shape, plan_in, planned);
  assign_cpu(shape, in, out);
}

#ifdef LPLB_CUDA
inline cudaError_t plan_solve_cuda(cudaStream_t stream, const PlanShape& shape, const PlanOperands& in,
                                   const PlanResults& out, const SolveShares& shares = {}) {
  const cudaError_t error = plan_cuda(stream, shape, in, out);
  if (error != cudaSuccess || shape.solve.max_iterations == 0) return error;
  return solve_after_plan_cuda(stream, after_plan(shape), {in.load, out.log2phy}, out.split, shares);
}

inline cudaError_t plan_assign_cuda(cudaStream_t stream, const PlanShape& plan_shape, const PlanOperands& plan_in,
                                    const PlanResults& planned, const AssignShape& shape, const AssignOperands& in,
                                    const AssignResults& out) {
  const auto solve = [&](const SolveShares& shares) {
    return plan_solve_cuda(stream, plan_shape, plan_in, planned, shares);
  };
  const bool solves = plan_shape.solve.max_iterations > 0;
  return assign_after_cuda(solve, solves && makes_shares(after_plan(plan_shape)), stream, shape, in, out);
}
#endif

}  // namespace lplb
