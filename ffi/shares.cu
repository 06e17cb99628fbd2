#include "launch.cuh"
#include "shares.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 1024;

// A block for each batch element.
__global__ void __launch_bounds__(kThreads)
    shares_kernel(const AssignShape shape, const AssignOperands in, int32_t* const memory, const uint32_t room) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // see assign_after_solve_cuda
  cudaGridDependencySynchronize();
#endif
  __shared__ uint32_t used;
  for (int64_t b = blockIdx.x; b < shape.count.num_batches; b += gridDim.x) {
    const Rows rows(shape, in, b);
    const MadeShares made(memory, b, shape.count.num_experts, shape.num_physical);
    ShareMaker(rows, made, room, &used).run(kThreads);
    __syncthreads();
  }
}

}  // namespace

cudaError_t make_shares_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* memory,
                             uint32_t room, bool ahead) {
  const CountShape& count = shape.count;
  const int blocks = count.num_sms == 0 || count.num_batches < count.num_sms ? count.num_batches : count.num_sms;
  return launch(stream, dim3(blocks), kThreads, 0, ahead, shares_kernel, shape, in, memory, room);
}

}  // namespace lplb
