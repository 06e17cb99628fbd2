#include <algorithm>

#include "launch.cuh"
#include "shares.cuh"

namespace lplb {
namespace {

constexpr int kMostThreads = 1024;

// A block for each batch element.
__global__ void __launch_bounds__(kMostThreads)
    shares_kernel(const AssignShape shape, const AssignOperands in, int32_t* const memory, const uint32_t room) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
  cudaGridDependencySynchronize();
#endif
  extern __shared__ uint4 places[];
  __shared__ uint32_t used;
  for (int64_t b = blockIdx.x; b < shape.count.num_batches; b += gridDim.x) {
    const Rows rows(shape, in, b);
    const MadeShares made(memory, b, shape.count.num_experts, shape.num_physical);
    ShareMaker(rows, made, room, places, &used).run(blockDim.x);
    __syncthreads();
  }
}

}  // namespace

cudaError_t prepare_shares_cuda(size_t most_bytes) { return allow_shared_bytes(shares_kernel, most_bytes); }

cudaError_t make_shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* memory,
                             uint32_t room, bool ahead) {
  const CountShape& count = shape.count;
  const int blocks = count.num_sms == 0 || count.num_batches < count.num_sms ? count.num_batches : count.num_sms;
  // A thread for each expert and each share, where a block has so many.
  const int threads = std::min((std::max(count.num_experts, static_cast<int>(room)) + 31) / 32 * 32, kMostThreads);
  return launch(stream, dim3(blocks), threads, ShareMaker::bytes(room), ahead, shares_kernel, shape, in, memory, room);
}

}  // namespace lplb
