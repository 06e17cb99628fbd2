#include <algorithm>
#include <utility>

#include "count.h"
#include "launch.cuh"
#include "shares.cuh"
#include "solve_block.cuh"
#ifdef LPLB_MATHDX
#include "solve_mathdx.h"
#endif

namespace lplb {
namespace {

template <class Block>
__global__ void __launch_bounds__(Block::kSetupThreads, 1)
    solve_kernel(const SolveShape shape, const SolveOperands in, const SolveResults out, const SolveShares shares) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
  if (shape.planned) cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Block::Scratch scratch;
  Shared shared;
  carve_shared(memory, shape, &shared);
  Block block;
  block.scratch = &scratch;
  InteriorPoint<Block> solver(block, shape, in, out, blockIdx.y, blockIdx.x, shared);
  const bool has_solved = solver.run();
  if constexpr (!Block::kPairs) {
    const int threads = has_solved ? Block::kThreads : Block::kSetupThreads;
    if (shares.memory == nullptr || threadIdx.x >= threads) return;
    const Rows rows(out.fraction, in.log2phy, shares.load, blockIdx.y, shape.num_experts, shape.max_replicas,
                    shape.num_physical);
    const MadeShares made(shares.memory, blockIdx.y, shape.num_experts, shape.num_physical);
    ShareMaker(rows, made, shares.room, memory, &scratch.num_shares).run(threads);
  }
}

// Calls `visit` with the block type that fits the shape: pairs up to two redundant experts a rank on average have a
// thread each, unless ranks have speeds; all else goes by the number of variables.
template <bool kBySpeed, class Visit>
cudaError_t with_block(int group_size, int max_variables, int max_replicas, Visit visit) {
  const auto choose = [&](auto pairs, auto any) {
    using Pairs = decltype(pairs);
    using Any = decltype(any);
    if constexpr (!kBySpeed) {
      if (max_replicas == 2 && max_variables <= Pairs::kThreads) return visit(pairs);
    }
    if (max_variables <= Any::kThreads * Any::kVariables) return visit(any);
    return visit(CudaBlock<512, 4, 64, false, kBySpeed>());
  };
  if (group_size <= 8) {
    return choose(CudaBlock<32, 1, 8, true, kBySpeed>(), CudaBlock<128, 4, 8, false, kBySpeed>());
  }
  if (group_size <= 16) {
    return choose(CudaBlock<64, 1, 16, true, kBySpeed>(), CudaBlock<128, 4, 16, false, kBySpeed>());
  }
  if (group_size <= 32) {
    return choose(CudaBlock<128, 1, 32, true, kBySpeed>(), CudaBlock<128, 4, 32, false, kBySpeed>());
  }
  if (group_size <= 64) {
    return choose(CudaBlock<256, 1, 64, true, kBySpeed>(), CudaBlock<256, 4, 64, false, kBySpeed>());
  }
  if (group_size <= 72 && max_variables <= 576) {
    return choose(CudaBlock<288, 1, 72, true, kBySpeed>(), CudaBlock<288, 2, 72, false, kBySpeed>());
  }
  return choose(CudaBlock<512, 1, 128, true, kBySpeed>(), CudaBlock<512, 4, 128, false, kBySpeed>());
}

// `ahead`: of the end of the launch before this one.
cudaError_t launch_solve(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in, const SolveResults& out,
                         const SolveShares& shares, bool ahead) {
  const auto run = [&](auto block) {
    using Block = decltype(block);
    const size_t bytes = std::max(carve_shared(nullptr, shape, nullptr), ShareMaker::bytes(shares.room));
    return launch(stream, dim3(shape.num_groups, shape.num_batches), Block::kSetupThreads, bytes, ahead,
                  solve_kernel<Block>, shape, in, out, shares);
  };
  return shape.by_speed ? with_block<true>(shape.group_size, shape.max_variables, shape.max_replicas, run)
                        : with_block<false>(shape.group_size, shape.max_variables, shape.max_replicas, run);
}

}  // namespace

cudaError_t prepare_solve_cuda() {
  for (const int group_size : {8, 16, 32, 64, 72, 128}) {
    for (const auto& [variables, replicas] : {std::pair(1, 2), std::pair(1, 3), std::pair(kMaxGroupSlots, 3)}) {
      const auto prepare = [](auto block) {
        using Block = decltype(block);
        constexpr size_t kDynamic = 99 * 1024 - sizeof(typename Block::Scratch);
        static_assert(Block::kPairs || ShareMaker::bytes(kMaxGroupSlots) <= kDynamic, "room for all shares");
        return allow_shared_bytes(&solve_kernel<Block>, kDynamic);
      };
      cudaError_t error = with_block<false>(group_size, variables, replicas, prepare);
      if (error == cudaSuccess) error = with_block<true>(group_size, variables, replicas, prepare);
      if (error != cudaSuccess) return error;
    }
  }
#ifdef LPLB_MATHDX
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : prepare_solve_mathdx_cuda(device);
#else
  return cudaSuccess;
#endif
}

bool makes_shares(const SolveShape& shape) {
#ifdef LPLB_MATHDX
  if (!shape.planned && has_mathdx(shape)) return false;
#endif
  return shape.num_groups == 1 && shape.max_replicas > 2;  // blocks for pairs do not
}

cudaError_t solve_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in, const SolveResults& out,
                       const SolveShares& shares) {
#ifdef LPLB_MATHDX
  if (has_mathdx(shape)) return solve_mathdx_cuda(stream, shape, in, out);
#endif
  return solve_plain_cuda(stream, shape, in, out, shares);
}

cudaError_t solve_plain_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                             const SolveResults& out, const SolveShares& shares) {
  return launch_solve(stream, shape, in, out, shares, false);
}

cudaError_t solve_after_plan_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                                  const SolveResults& out, const SolveShares& shares) {
  bool ahead;
  if (const cudaError_t error = runs_hopper_code(&ahead); error != cudaSuccess) return error;
  return launch_solve(stream, shape, in, out, shares, ahead);
}

}  // namespace lplb
