#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "count.h"

namespace lplb {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kQuads = 4;                              // loads of four ids that a thread has in flight
constexpr int kIdsOfBlock = kMaxThreads * kQuads * 4;  // where more would take longer than a second kernel
constexpr int kMaxCluster = 8;                         // what every device with clusters has
constexpr size_t kSharedBytes = 48 * 1024;

// Whether every batch element and chunk of the ids begins and ends where loads of four may.
__device__ bool is_aligned(const CountShape& shape, const int32_t* expert_ids) {
  return shape.num_ids % 4 == 0 && reinterpret_cast<uintptr_t>(expert_ids) % sizeof(int4) == 0;
}

// The ids i to i + 3, then those as far apart as a block loads at once. What is not before `count` is padding.
__device__ void load_ids(const int32_t* ids, unsigned i, unsigned count, bool aligned, int4 (&quads)[kQuads]) {
#pragma unroll
  for (int k = 0; k < kQuads; ++k, i += 4 * blockDim.x) {
    quads[k] = make_int4(-1, -1, -1, -1);
    if (aligned) {
      if (i < count) quads[k] = *reinterpret_cast<const int4*>(ids + i);
    } else {
      if (i < count) quads[k].x = ids[i];
      if (i + 1 < count) quads[k].y = ids[i + 1];
      if (i + 2 < count) quads[k].z = ids[i + 2];
      if (i + 3 < count) quads[k].w = ids[i + 3];
    }
  }
}

// Counts four ids; padding goes to a counter of its own, which costs less than going around it.
__device__ void add_ids(int4 ids, unsigned experts, int32_t* counts, int32_t* padding) {
  const auto add = [&](int32_t e) { atomicAdd(static_cast<unsigned>(e) < experts ? &counts[e] : padding, 1); };
  add(ids.x);
  add(ids.y);
  add(ids.z);
  add(ids.w);
}

// One cluster counts a batch element, each block a run of chunks and each thread then an expert. A block without a
// cluster does so alone.
__global__ void __launch_bounds__(kMaxThreads) count_kernel(const CountShape shape, int chunks_of_block,
                                                            const int32_t* expert_ids, int32_t* load, int32_t* starts) {
  extern __shared__ int4 shared[];
  int32_t* counts = reinterpret_cast<int32_t*>(shared);           // [chunks_of_block, experts]
  int32_t* total = counts + chunks_of_block * shape.num_experts;  // [experts] of all chunks here
  const int experts = shape.num_experts, threads = blockDim.x, e = threadIdx.x;
  const int block = blockIdx.x, first_chunk = block * chunks_of_block;
  const int num_chunks = min(chunks_of_block, shape.num_chunks - first_chunk);  // not positive where none is left
  const unsigned chunk_size = static_cast<unsigned>(shape.chunk_size);
  const int64_t begin = static_cast<int64_t>(first_chunk) * chunk_size;
  const unsigned num_ids = static_cast<unsigned>(
      max(static_cast<int64_t>(0), min(shape.num_ids - begin, static_cast<int64_t>(chunks_of_block) * chunk_size)));
  const bool aligned = is_aligned(shape, expert_ids);
  for (int64_t batch = blockIdx.y; batch < shape.num_batches; batch += gridDim.y) {
    int4 quads[kQuads];
    load_ids(expert_ids + batch * shape.num_ids + begin, 4 * threadIdx.x, num_ids, aligned, quads);
#pragma unroll 1
    for (int i = threadIdx.x; i < (chunks_of_block * experts + 3) / 4; i += threads) shared[i] = make_int4(0, 0, 0, 0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const unsigned chunk = 4 * (k * threads + threadIdx.x) / chunk_size;
      add_ids(quads[k], experts, counts + chunk * experts, total);
    }
    __syncthreads();
    int32_t here = 0, before = 0;
    if (e < experts) {
#pragma unroll 4
      for (int chunk = 0; chunk < num_chunks; ++chunk) here += counts[chunk * experts + e];
      total[e] = here;
    }
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    if (e < experts) {
      int32_t others[kMaxCluster - 1];
#pragma unroll
      for (int k = 0; k < kMaxCluster - 1; ++k) others[k] = k < block ? cluster.map_shared_rank(total, k)[e] : 0;
#pragma unroll
      for (int k = 0; k < kMaxCluster - 1; ++k) before += others[k];
    }
    // The totals have been read where their sum is known; with that the other blocks may go on, whatever else this
    // one has in flight.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" : "+r"(before) : : "memory");
#endif
    if (e < experts) {
      if (block == gridDim.x - 1) load[batch * experts + e] = before + here;
      int32_t* column = starts + (batch * shape.num_chunks + first_chunk) * experts + e;
#pragma unroll 4
      for (int chunk = 0; chunk < num_chunks; ++chunk, column += experts) {
        const int32_t count = counts[chunk * experts + e];
        *column = before;
        before += count;
      }
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" : : : "memory");
#endif
    if (batch + gridDim.y < shape.num_batches) __syncthreads();  // the counts have been read
  }
}

// A histogram of each chunk: starts[batch, chunk] = ids of the chunk equal to each expert.
__global__ void __launch_bounds__(kMaxThreads)
    histogram_kernel(const CountShape shape, const int32_t* expert_ids, int32_t* starts) {
  extern __shared__ int32_t counts[];  // [experts], and one for padding
  const int experts = shape.num_experts, threads = blockDim.x;
  const bool aligned = is_aligned(shape, expert_ids);
  for (int64_t batch = blockIdx.y; batch < shape.num_batches; batch += gridDim.y) {
    for (int64_t chunk = blockIdx.x; chunk < shape.num_chunks; chunk += gridDim.x) {
      for (int e = threadIdx.x; e < experts; e += threads) counts[e] = 0;
      __syncthreads();
      const int64_t begin = chunk * shape.chunk_size;
      const unsigned num_ids = static_cast<unsigned>(min(shape.num_ids - begin, shape.chunk_size));
      const int32_t* ids = expert_ids + batch * shape.num_ids + begin;
      for (unsigned i = 4 * threadIdx.x; i < num_ids; i += 4 * kQuads * threads) {
        int4 quads[kQuads];
        load_ids(ids, i, num_ids, aligned, quads);
#pragma unroll
        for (int k = 0; k < kQuads; ++k) add_ids(quads[k], experts, counts, &counts[experts]);
      }
      __syncthreads();
      int32_t* row = starts + (batch * shape.num_chunks + chunk) * experts;
      for (int e = threadIdx.x; e < experts; e += threads) row[e] = counts[e];
      __syncthreads();
    }
  }
}

constexpr int kScanExperts = 32, kScanRows = 32;

// Turns the histograms into counts of the chunks before, and adds up the total. A column of kScanRows threads
// owns an expert; each thread a run of chunks.
__global__ void __launch_bounds__(kScanExperts* kScanRows)
    scan_kernel(const CountShape shape, int32_t* load, int32_t* starts) {
  __shared__ int32_t sums[kScanRows][kScanExperts];
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // launched ahead of time, see count_cuda
#endif
  const int64_t experts = shape.num_experts;
  const int each = (shape.num_chunks + kScanRows - 1) / kScanRows;
  const int begin = threadIdx.y * each, end = min(shape.num_chunks, begin + each);
  for (int64_t batch = blockIdx.y; batch < shape.num_batches; batch += gridDim.y) {
    for (int64_t first = blockIdx.x * kScanExperts; first < experts; first += gridDim.x * kScanExperts) {
      const int64_t e = first + threadIdx.x;
      int32_t* column = starts + batch * shape.num_chunks * experts + e;
      int32_t sum = 0;
      if (e < experts) {
#pragma unroll 8
        for (int chunk = begin; chunk < end; ++chunk) sum += column[chunk * experts];
      }
      sums[threadIdx.y][threadIdx.x] = sum;
      __syncthreads();
      int32_t before = 0;
#pragma unroll
      for (int row = 0; row < kScanRows; ++row) {
        if (row < threadIdx.y) before += sums[row][threadIdx.x];
      }
      __syncthreads();
      if (e >= experts) continue;
      if (threadIdx.y == kScanRows - 1) load[batch * experts + e] = before + sum;
#pragma unroll 8
      for (int chunk = begin; chunk < end; ++chunk) {
        const int32_t here = column[chunk * experts];
        column[chunk * experts] = before;
        before += here;
      }
    }
  }
}

}  // namespace

cudaError_t runs_hopper_code(bool* result) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> versions[kMaxDevices];  // of the code, 0 where not known yet
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  int version = device < kMaxDevices ? versions[device].load() : 0;
  if (version == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, count_kernel);
    if (error != cudaSuccess) return error;
    version = attributes.ptxVersion;
    if (device < kMaxDevices) versions[device].store(version);
  }
  *result = version >= 90;
  return cudaSuccess;
}

cudaError_t count_cuda(cudaStream_t stream, const CountShape& shape, const int32_t* expert_ids, int32_t* load,
                       int32_t* starts) {
  bool clusters;
  if (const cudaError_t error = runs_hopper_code(&clusters); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = clusters ? 1 : 0;

  int blocks = 1;
  const int most = !clusters ? 1 : shape.num_sms == 0 || shape.num_sms > kMaxCluster ? kMaxCluster : shape.num_sms;
  while (blocks * 2 <= most && blocks < shape.num_chunks) blocks *= 2;
  const int chunks = (shape.num_chunks + blocks - 1) / blocks;
  const int64_t ids = chunks * shape.chunk_size;
  const size_t bytes = (static_cast<size_t>(chunks) + 1) * shape.num_experts * sizeof(int32_t);
  if (shape.num_experts <= kMaxThreads && ids <= kIdsOfBlock && bytes <= kSharedBytes - sizeof(int4)) {
    // Few threads, so that little is done once for each of them.
    const int threads = std::max(shape.num_experts, static_cast<int>((ids + 4 * kQuads - 1) / (4 * kQuads)));
    config.gridDim = grid_of(shape, blocks);
    config.blockDim = (threads + 31) / 32 * 32;
    config.dynamicSmemBytes = bytes + sizeof(int4);  // zeros are stored four at a time
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return cudaLaunchKernelEx(&config, count_kernel, shape, chunks, expert_ids, load, starts);
  }

  const int threads = static_cast<int>(shape.chunk_size < 2048 ? 128 : shape.chunk_size < 8192 ? 256 : 512);
  histogram_kernel<<<grid_of(shape, shape.num_chunks), threads, (shape.num_experts + 1) * sizeof(int32_t), stream>>>(
      shape, expert_ids, starts);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  // Its blocks may be put in place while the histograms' last ones run, and wait for them there.
  config.gridDim = grid_of(shape, (shape.num_experts + kScanExperts - 1) / kScanExperts);
  config.blockDim = dim3(kScanExperts, kScanRows);
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return cudaLaunchKernelEx(&config, scan_kernel, shape, load, starts);
}

}  // namespace lplb
