// Launchers that count tokens per expert. Raw pointers, no framework.
#pragma once

#include <cstdint>

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

// `assign` keeps counters for each expert, and for each expert and warp, in 48 KB of shared memory.
constexpr int kMaxExperts = 4096;

// Ids are cut into chunks of equal size (the last may be shorter), which thread blocks work on independently.
struct CountShape {
  int num_batches;
  int64_t num_ids;  // of one batch
  int num_experts;
  int num_chunks;
  int64_t chunk_size;
};

// expert_ids [batch, num_ids]; outside of 0 .. num_experts-1 is padding
// load       [batch, num_experts]              ids equal to the expert
// starts     [batch, num_chunks, num_experts]  those in the chunks before this one
void count_cpu(const CountShape& shape, const int32_t* expert_ids, int32_t* load, int32_t* starts);

#ifdef LPLB_CUDA
cudaError_t count_cuda(cudaStream_t stream, const CountShape& shape, const int32_t* expert_ids, int32_t* load,
                       int32_t* starts);
#endif

}  // namespace lplb
