#include <cuda_runtime.h>

#include "float16.cuh"
#include "handover.h"
#include "peer.h"

namespace lplb {
namespace {

constexpr int kReadThreads = 512, kSumThreads = 256;
constexpr int kLoads = 4;            // of 16 bytes, that a thread has in flight
constexpr int kMostReadBlocks = 64;  // as many as NVLink needs: other multiprocessors stay free
constexpr int kMostSumBlocks = 2048;

int divide_up(int64_t value, int64_t by) { return static_cast<int>((value + by - 1) / by); }
unsigned at_most(int64_t blocks, int most) { return static_cast<unsigned>(blocks < most ? blocks : most); }

// Where row `number` of the batch element is; nullptr: there is no such row, or it is not among the first `end`.
__device__ const unsigned char* find_row(const PeerBuffer& buffer, int batch, int64_t number, int64_t end) {
  if (number < 0 || number >= buffer.num_ranks * buffer.num_rows) return nullptr;
  const int rank = static_cast<int>(number / buffer.num_rows);
  const int64_t row = number - rank * buffer.num_rows;
  if (row >= end) return nullptr;
  const uint64_t* of_batch = buffer.table + static_cast<int64_t>(batch) * buffer.num_ranks * buffer.num_buffers;
  return reinterpret_cast<const unsigned char*>(of_batch[rank * buffer.num_buffers + buffer.buffer]) +
         row * buffer.row_bytes;
}

__global__ void expose_kernel(PeerBuffer buffer, uint64_t* addresses) {
  const int batch = blockIdx.x * blockDim.x + threadIdx.x;
  if (batch >= buffer.num_batches) return;
  addresses[static_cast<int64_t>(batch) * buffer.num_buffers + buffer.buffer] =
      reinterpret_cast<uint64_t>(buffer.own + batch * buffer.num_rows * buffer.row_bytes);
}

__global__ void in_place_kernel(PeerBuffer buffer) {
  for (int rank = 0; rank < buffer.num_ranks; ++rank) {
    if (buffer.table[rank * buffer.num_buffers + buffer.buffer] == reinterpret_cast<uint64_t>(buffer.own)) return;
  }
  __trap();  // others have read from memory that is no longer this buffer
}

// The host may have written `regions` since the last launch.
__global__ void translate_kernel(const volatile uint64_t* regions, const uint64_t* words, int64_t count,
                                 uint64_t* addresses) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint64_t begin = regions[words[i] >> kOffsetBits];
  if (begin == 0) __trap();  // each process hands a region over before it tells of a buffer there
  addresses[i] = begin + (words[i] & ((uint64_t{1} << kOffsetBits) - 1));
}

// The rows of a batch element, in words that divide them, a chunk of them at a time: rows side by side, so that all
// sources send at once.
template <class Word>
__global__ void __launch_bounds__(kReadThreads) read_rows_kernel(ReadRows read, int32_t* done) {
  extern __shared__ int found[];  // the rows that are read
  __shared__ int num_found;
  const PeerBuffer& buffer = read.buffer;
  const int batch = blockIdx.y, lane = threadIdx.x;
  const int64_t before = buffer.num_rows - read.num_reads;
  const int32_t* source = read.source + static_cast<int64_t>(batch) * read.num_reads;
  if (lane < 32) {
    int count = 0;
    for (int first = 0; first < read.num_reads; first += 32) {
      const int row = first + lane;
      const bool is_read = row < read.num_reads && find_row(buffer, batch, source[row], before) != nullptr;
      const unsigned reads = __ballot_sync(~0u, is_read);
      if (is_read) found[count + __popc(reads & ((1u << lane) - 1))] = row;
      count += __popc(reads);
    }
    if (lane == 0) num_found = count;
    if (lane == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  }
  __syncthreads();
  const int64_t words = buffer.row_bytes / sizeof(Word);
  const int64_t chunks = (words + kReadThreads * kLoads - 1) / (kReadThreads * kLoads);
  unsigned char* own = buffer.own + (batch * buffer.num_rows + before) * buffer.row_bytes;
  for (int64_t unit = blockIdx.x; unit < num_found * chunks; unit += gridDim.x) {
    const int row = found[unit % num_found];
    const int64_t begin = unit / num_found * (kReadThreads * kLoads) + threadIdx.x;
    const Word* from = reinterpret_cast<const Word*>(find_row(buffer, batch, source[row], before));
    Word* to = reinterpret_cast<Word*>(own + row * buffer.row_bytes);
    Word values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i * kReadThreads < words) values[i] = from[begin + i * kReadThreads];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i * kReadThreads < words) to[begin + i * kReadThreads] = values[i];
    }
  }
}

template <class From, class To, int kElements>
__global__ void __launch_bounds__(kSumThreads) add_rows_kernel(AddRows add, int32_t* done) {
  const int batch = blockIdx.y;
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t packs = add.row_elements / kElements;
  const int64_t chunks = (packs + kSumThreads * kLoads - 1) / (kSumThreads * kLoads);
  for (int64_t unit = blockIdx.x; unit < add.num_sums * chunks; unit += gridDim.x) {
    // Neighbours in time are chunks of different rows: sums over links and casts of rows without copies go on together.
    const int64_t row = static_cast<int64_t>(batch) * add.num_sums + unit % add.num_sums;
    const int64_t begin = unit / add.num_sums * (kSumThreads * kLoads) + threadIdx.x;
    float total[kLoads][kElements];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) total[i][j] = -0.0f;  // -0 + x is x, and 0 + -0 were 0
    }
    for (int replica = 0; replica < add.max_replicas; ++replica) {
      const int32_t number = add.replicas[row * add.max_replicas + replica];
      const auto* from =
          reinterpret_cast<const Pack<From, kElements>*>(find_row(add.buffer, batch, number, add.buffer.num_rows));
      if (from == nullptr) break;
      Pack<From, kElements> values[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (begin + i * kSumThreads < packs) values[i] = from[begin + i * kSumThreads];
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) total[i][j] += to_float(values[i].values[j]);
      }
    }
    auto* to = static_cast<Pack<To, kElements>*>(add.sums) + row * packs;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i * kSumThreads >= packs) continue;
      Pack<To, kElements> sums;
#pragma unroll
      for (int j = 0; j < kElements; ++j) store(total[i][j], &sums.values[j]);
      to[begin + i * kSumThreads] = sums;
    }
  }
}

template <class Word>
cudaError_t read_rows(cudaStream_t stream, const ReadRows& read, int32_t* done) {
  const int64_t chunks = divide_up(read.buffer.row_bytes, sizeof(Word) * kReadThreads * kLoads);
  const dim3 grid(at_most(read.num_reads * chunks, kMostReadBlocks), read.buffer.num_batches);
  read_rows_kernel<Word><<<grid, kReadThreads, read.num_reads * sizeof(int), stream>>>(read, done);
  return cudaGetLastError();
}

template <class From, class To, int kElements>
cudaError_t add_rows(cudaStream_t stream, const AddRows& add, int32_t* done) {
  const int64_t chunks = divide_up(add.row_elements, static_cast<int64_t>(kElements) * kSumThreads * kLoads);
  const dim3 grid(at_most(add.num_sums * chunks, kMostSumBlocks), add.buffer.num_batches);
  add_rows_kernel<From, To, kElements><<<grid, kSumThreads, 0, stream>>>(add, done);
  return cudaGetLastError();
}

template <class From, class To>
cudaError_t add_packs(cudaStream_t stream, const AddRows& add, int32_t* done) {
  constexpr int kElements = 16 / sizeof(From);
  if (add.row_elements % kElements == 0) return add_rows<From, To, kElements>(stream, add, done);
  return add_rows<From, To, 1>(stream, add, done);
}

template <class From>
cudaError_t add_rows_to(cudaStream_t stream, const AddRows& add, int32_t* done) {
  switch (add.to) {
    case Float::kFloat32:
      return add_packs<From, float>(stream, add, done);
    case Float::kBfloat16:
      return add_packs<From, __nv_bfloat16>(stream, add, done);
    case Float::kFloat16:
      return add_packs<From, __half>(stream, add, done);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t expose_cuda(cudaStream_t stream, const PeerBuffer& buffer, uint64_t* addresses) {
  expose_kernel<<<divide_up(buffer.num_batches, 256), 256, 0, stream>>>(buffer, addresses);
  return cudaGetLastError();
}

cudaError_t in_place_cuda(cudaStream_t stream, const PeerBuffer& buffer) {
  in_place_kernel<<<1, 1, 0, stream>>>(buffer);
  return cudaGetLastError();
}

cudaError_t read_rows_cuda(cudaStream_t stream, const ReadRows& read, int32_t* done) {
  if (read.buffer.row_bytes % 16 == 0) return read_rows<uint4>(stream, read, done);
  if (read.buffer.row_bytes % 4 == 0) return read_rows<uint32_t>(stream, read, done);
  return read_rows<unsigned char>(stream, read, done);
}

cudaError_t add_rows_cuda(cudaStream_t stream, const AddRows& add, int32_t* done) {
  switch (add.from) {
    case Float::kFloat32:
      return add_rows_to<float>(stream, add, done);
    case Float::kBfloat16:
      return add_rows_to<__nv_bfloat16>(stream, add, done);
    case Float::kFloat16:
      return add_rows_to<__half>(stream, add, done);
  }
  return cudaErrorInvalidValue;
}

cudaError_t translate_cuda(cudaStream_t stream, const uint64_t* regions, const uint64_t* words, int64_t count,
                           uint64_t* addresses) {
  translate_kernel<<<divide_up(count, 256), 256, 0, stream>>>(regions, words, count, addresses);
  return cudaGetLastError();
}

cudaError_t peers_reachable_cuda(bool* result) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  *result = true;
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return cudaSuccess;
  for (int device = 0; device < devices; ++device) {
    for (int peer = 0; peer < devices; ++peer) {
      int reachable = 1;
      if (error == cudaSuccess && peer != device) error = cudaDeviceCanAccessPeer(&reachable, device, peer);
      *result = *result && reachable != 0;
    }
  }
  return error;
}

}  // namespace lplb
