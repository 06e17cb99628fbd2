#include <cuda_runtime.h>

#include "float16.cuh"
#include "fork.h"
#include "handover.h"
#include "peer.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kMostBlocks = 2048;
constexpr int kMostInPlace = 528;  // of blocks, 4 for each of 132 multiprocessors: most rows stay, and starts take time
// Beside other kernels, for a batch element: 3 blocks for each, which leave room for theirs; or bytes in flight, all
// over links, of which more only hold up what others load.
constexpr int kMostBeside = 396, kMostBytes = 1 << 20;

// Loads of 16 bytes that a thread has in flight: for sums, which take more registers, fewer.
constexpr int kLoads = 4, kLoadsOfSum = 2;

int divide_up(int64_t value, int64_t by) { return static_cast<int>((value + by - 1) / by); }
unsigned at_most(int64_t blocks, int most) { return static_cast<unsigned>(blocks < most ? blocks : most); }

// For so many chunks of each row.
dim3 grid_of(const AddRows& add, int64_t chunks, int loads) {
  int most = add.in_place ? kMostInPlace : kMostBlocks;
  if (add.is_beside && add.in_place) most = kMostBytes / (kThreads * loads * 16);
  // Sums keep the memory busy in any case; rows that are brought wait for what comes from the host meanwhile.
  if (add.is_beside && !add.in_place && add.max_replicas == 1) most = kMostBeside;
  return dim3(at_most(add.num_sums * chunks, most), add.buffer.num_batches);
}

// visit(row, chunk) of each chunk of the rows of a batch element, which all blocks share out. Neighbours in time are
// chunks of different rows: those over links and others go on together.
template <class Visit>
__device__ void visit_chunks(const AddRows& add, int batch, int64_t chunks, Visit visit) {
  if (!add.in_place) {
    for (int64_t unit = blockIdx.x; unit < add.num_sums * chunks; unit += gridDim.x) {
      visit(static_cast<int>(unit % add.num_sums), unit / add.num_sums);
    }
    return;
  }
  // Of rows that stay nothing is to be done, and they are most: a block first lists the others.
  __shared__ int changed[kThreads], of_warps[kThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int first = 0; first < add.num_sums; first += kThreads) {
    const int row = first + static_cast<int>(threadIdx.x);
    const bool is_changed = row < add.num_sums && !add.stays(batch, row);
    const unsigned of_warp = __ballot_sync(0xffffffffu, is_changed);
    if (lane == 0) of_warps[warp] = __popc(of_warp);
    __syncthreads();
    int place = __popc(of_warp & ((1u << lane) - 1)), number = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) {
      if (i < warp) place += of_warps[i];
      number += of_warps[i];
    }
    if (is_changed) changed[place] = row;
    __syncthreads();
    for (int64_t unit = blockIdx.x; unit < number * chunks; unit += gridDim.x) {
      visit(changed[unit % number], unit / number);
    }
    __syncthreads();
  }
}

__global__ void expose_kernel(const __grid_constant__ Told told, uint64_t* addresses) {
  const int i = threadIdx.x;
  for (int batch = blockIdx.x; batch < told.num_batches; batch += gridDim.x) {
    if (i >= told.number) return;
    addresses[static_cast<int64_t>(batch) * told.num_buffers + told.first + i] =
        reinterpret_cast<uint64_t>(told.own[i] + batch * told.batch_bytes[i]);
  }
}

__global__ void in_place_kernel(const __grid_constant__ Told told) {
  const int i = threadIdx.x;
  if (i >= told.number) return;
  for (int rank = 0; rank < told.num_ranks; ++rank) {
    if (told.table[rank * told.num_buffers + told.first + i] == reinterpret_cast<uint64_t>(told.own[i])) return;
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

// to[i] = convert(a value of from[i]) for each of the rows, which are of `words` values; zeros where there is no row.
template <class From, class To, class Convert>
__device__ void bring_rows(const AddRows& add, int32_t* done, int64_t words, Convert convert) {
  const int batch = blockIdx.y;
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t chunks = (words + kThreads * kLoads - 1) / (kThreads * kLoads);
  visit_chunks(add, batch, chunks, [&](int of_batch, int64_t chunk) {
    const int64_t row = static_cast<int64_t>(batch) * add.num_sums + of_batch;
    const int64_t begin = chunk * (kThreads * kLoads) + threadIdx.x;
    const auto* from = reinterpret_cast<const From*>(add.buffer.find_row(batch, add.replicas[row]));
    To* to = static_cast<To*>(add.sums) + row * words;
    From values[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (from != nullptr && begin + i * kThreads < words) values[i] = from[begin + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i * kThreads < words) to[begin + i * kThreads] = convert(values[i]);
    }
  });
}

template <class Word>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const AddRows add, int32_t* done) {
  bring_rows<Word, Word>(add, done, add.buffer.row_bytes / sizeof(Word), [](const Word& word) { return word; });
}

template <class From, class To, int kElements>
__global__ void __launch_bounds__(kThreads) cast_rows_kernel(const AddRows add, int32_t* done) {
  using Casted = Pack<To, kElements>;
  using Given = Pack<From, kElements>;
  bring_rows<Given, Casted>(add, done, add.row_elements / kElements, [](const Given& given) {
    Casted casted;
#pragma unroll
    for (int i = 0; i < kElements; ++i) store(to_float(given.values[i]), &casted.values[i]);
    return casted;
  });
}

template <class From, class To, int kElements>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(AddRows add, int32_t* done) {
  const int batch = blockIdx.y;
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t packs = add.row_elements / kElements;
  const int64_t chunks = (packs + kThreads * kLoadsOfSum - 1) / (kThreads * kLoadsOfSum);
  visit_chunks(add, batch, chunks, [&](int of_batch, int64_t chunk) {
    const int64_t row = static_cast<int64_t>(batch) * add.num_sums + of_batch;
    const int64_t begin = chunk * (kThreads * kLoadsOfSum) + threadIdx.x;
    const int32_t* replicas = add.replicas + row * add.max_replicas;
    auto* to = static_cast<Pack<To, kElements>*>(add.sums) + row * packs;
    const float first = add.buffer.find_row(batch, replicas[0]) == nullptr ? 0.0f : -0.0f;
    float total[kLoadsOfSum][kElements];
#pragma unroll
    for (int i = 0; i < kLoadsOfSum; ++i) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) total[i][j] = first;  // -0 + x is x, and 0 + -0 were 0
    }
    for (int replica = 0; replica < add.max_replicas; ++replica) {
      const auto* from = reinterpret_cast<const Pack<From, kElements>*>(add.buffer.find_row(batch, replicas[replica]));
      if (from == nullptr) break;
      Pack<From, kElements> values[kLoadsOfSum] = {};
#pragma unroll
      for (int i = 0; i < kLoadsOfSum; ++i) {
        if (begin + i * kThreads < packs) values[i] = from[begin + i * kThreads];
      }
#pragma unroll
      for (int i = 0; i < kLoadsOfSum; ++i) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) total[i][j] += to_float(values[i].values[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadsOfSum; ++i) {
      if (begin + i * kThreads >= packs) continue;
      Pack<To, kElements> sums;
#pragma unroll
      for (int j = 0; j < kElements; ++j) store(total[i][j], &sums.values[j]);
      to[begin + i * kThreads] = sums;
    }
  });
}

template <class Word>
cudaError_t copy_rows(cudaStream_t stream, const AddRows& add, int32_t* done) {
  const int64_t chunks = divide_up(add.buffer.row_bytes, sizeof(Word) * kThreads * kLoads);
  copy_rows_kernel<Word><<<grid_of(add, chunks, kLoads), kThreads, 0, stream>>>(add, done);
  return cudaGetLastError();
}

template <class From, class To, int kElements>
cudaError_t add_rows(cudaStream_t stream, const AddRows& add, int32_t* done) {
  const int loads = add.max_replicas == 1 ? kLoads : kLoadsOfSum;
  const int64_t chunks = divide_up(add.row_elements, static_cast<int64_t>(kElements) * kThreads * loads);
  const auto kernel =
      add.max_replicas == 1 ? cast_rows_kernel<From, To, kElements> : add_rows_kernel<From, To, kElements>;
  kernel<<<grid_of(add, chunks, loads), kThreads, 0, stream>>>(add, done);
  return cudaGetLastError();
}

template <class From, class To>
cudaError_t add_packs(cudaStream_t stream, const AddRows& add, int32_t* done) {
  constexpr int kElements = 16 / sizeof(From);
  if (add.row_elements % kElements == 0) return add_rows<From, To, kElements>(stream, add, done);
  return add_rows<From, To, 1>(stream, add, done);
}

}  // namespace

cudaError_t expose_cuda(cudaStream_t stream, const Told& told, uint64_t* addresses) {
  expose_kernel<<<at_most(told.num_batches, kMostBlocks), kMostTold, 0, stream>>>(told, addresses);
  return cudaGetLastError();
}

cudaError_t in_place_cuda(cudaStream_t stream, const Told& told) {
  in_place_kernel<<<1, kMostTold, 0, stream>>>(told);
  return cudaGetLastError();
}

cudaError_t add_rows_cuda(cudaStream_t stream, const AddRows& add, int32_t* done) {
  if (add.is_copy) {
    if (add.buffer.row_bytes % 16 == 0) return copy_rows<uint4>(stream, add, done);
    if (add.buffer.row_bytes % 4 == 0) return copy_rows<uint32_t>(stream, add, done);
    return copy_rows<unsigned char>(stream, add, done);
  }
  return visit_float(add.from, [&](auto from) {
    return visit_float(add.to, [&](auto to) { return add_packs<decltype(from), decltype(to)>(stream, add, done); });
  });
}

cudaError_t begin_rows_cuda(cudaStream_t stream, const BeginRows& begin) {
  return fork(stream, begin.name, [&](cudaStream_t side) {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < begin.number && error == cudaSuccess; ++i) error = add_rows_cuda(side, begin.adds[i], nullptr);
    return error;
  });
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
