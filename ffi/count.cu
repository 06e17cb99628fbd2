#include "count.h"

namespace lplb {
namespace {

constexpr int kThreads = 256;

// A histogram of each chunk: starts[batch, chunk] = ids of the chunk equal to each expert.
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const CountShape shape, const int32_t* expert_ids, int32_t* starts) {
  extern __shared__ int32_t count[];
  const int experts = shape.num_experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * shape.chunk_size;
  const int64_t end = min(shape.num_ids, begin + shape.chunk_size);
  const int32_t* ids = expert_ids + blockIdx.y * shape.num_ids;
  const auto visit = [&](int32_t e) {
    if (e >= 0 && e < experts) atomicAdd(&count[e], 1);
  };
  // Four ids a load where the address allows it.
  if (reinterpret_cast<uintptr_t>(ids + begin) % sizeof(int4) == 0) {
    const int64_t quads = end > begin ? (end - begin) / 4 : 0;
    const int4* wide = reinterpret_cast<const int4*>(ids + begin);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < quads; i += kThreads) {
      const int4 four = wide[i];
      visit(four.x);
      visit(four.y);
      visit(four.z);
      visit(four.w);
    }
    for (int64_t i = begin + quads * 4 + threadIdx.x; i < end; i += kThreads) visit(ids[i]);
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) visit(ids[i]);
  }
  __syncthreads();
  int32_t* row = starts + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) row[e] = count[e];
}

constexpr int kScanExperts = 32, kScanRows = 32;

// Turns the histograms into counts of the chunks before, and adds up the total. A column of kScanRows threads
// owns an expert; each thread a run of chunks.
__global__ void __launch_bounds__(kScanExperts* kScanRows)
    scan_kernel(const CountShape shape, int32_t* load, int32_t* starts) {
  __shared__ int32_t sums[kScanRows][kScanExperts];
  const int e = blockIdx.x * kScanExperts + threadIdx.x;
  const int each = (shape.num_chunks + kScanRows - 1) / kScanRows;
  const int begin = threadIdx.y * each, end = min(shape.num_chunks, begin + each);
  int32_t* column = starts + static_cast<int64_t>(blockIdx.y) * shape.num_chunks * shape.num_experts + e;
  int32_t sum = 0;
  if (e < shape.num_experts) {
#pragma unroll 8
    for (int chunk = begin; chunk < end; ++chunk) sum += column[static_cast<int64_t>(chunk) * shape.num_experts];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (e >= shape.num_experts) return;
  int32_t before = 0;
#pragma unroll
  for (int row = 0; row < kScanRows; ++row) {
    if (row < threadIdx.y) before += sums[row][threadIdx.x];
  }
  if (threadIdx.y == kScanRows - 1) load[static_cast<int64_t>(blockIdx.y) * shape.num_experts + e] = before + sum;
#pragma unroll 8
  for (int chunk = begin; chunk < end; ++chunk) {
    int32_t* entry = &column[static_cast<int64_t>(chunk) * shape.num_experts];
    const int32_t here = *entry;
    *entry = before;
    before += here;
  }
}

}  // namespace

cudaError_t count_cuda(cudaStream_t stream, const CountShape& shape, const int32_t* expert_ids, int32_t* load,
                       int32_t* starts) {
  histogram_kernel<<<dim3(shape.num_chunks, shape.num_batches), kThreads, shape.num_experts * sizeof(int32_t),
                     stream>>>(shape, expert_ids, starts);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  const int blocks = (shape.num_experts + kScanExperts - 1) / kScanExperts;
  scan_kernel<<<dim3(blocks, shape.num_batches), dim3(kScanExperts, kScanRows), 0, stream>>>(shape, load, starts);
  return cudaGetLastError();
}

}  // namespace lplb
