// Launchers that count tokens per expert. Raw pointers, no framework.
#pragma once

#include <cstdint>

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

// `assign` keeps counters for each expert, and for each expert and warp, in 48 KB of shared memory.
constexpr int kMaxExperts = 4096;
constexpr int64_t kMaxChunk = 1 << 30;  // kernels number a chunk's ids in 32 bits

// Ids are cut into chunks of equal size (the last may be shorter), which thread blocks work on independently.
struct CountShape {
  int num_batches;
  int64_t num_ids;  // of one batch
  int num_experts;
  int num_chunks;
  int64_t chunk_size;  // a multiple of 4: kernels load four ids at once
  int num_sms = 0;     // the most thread blocks that a kernel may have at once; 0: no limit
};

// expert_ids [batch, num_ids]; outside of 0 .. num_experts-1 is padding
// load       [batch, num_experts]              ids equal to the expert
// starts     [batch, num_chunks, num_experts]  those in the chunks before this one
void count_cpu(const CountShape& shape, const int32_t* expert_ids, int32_t* load, int32_t* starts);

#ifdef LPLB_CUDA
// Thread blocks that go through `items` pieces of work for each batch element, x the pieces and y the elements.
inline dim3 grid_of(const CountShape& shape, int items) {
  constexpr int kMostY = 65535;
  if (shape.num_sms == 0) return dim3(items, shape.num_batches < kMostY ? shape.num_batches : kMostY);
  const int x = items < shape.num_sms ? items : shape.num_sms, most_y = shape.num_sms / x;
  const int y = most_y < kMostY ? most_y : kMostY;
  return dim3(x, shape.num_batches < y ? shape.num_batches : y);
}

// Whether the current device runs code compiled for sm_90 or newer, which has clusters and programmatic dependent
// launches: it may run what was compiled for an older one. Does not synchronise.
cudaError_t runs_hopper_code(bool* result);

cudaError_t count_cuda(cudaStream_t stream, const CountShape& shape, const int32_t* expert_ids, int32_t* load,
                       int32_t* starts);
#endif

}  // namespace lplb
