#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cuda/atomic>
#include <map>
#include <mutex>

#include "gather.h"

namespace lplb {
namespace {

constexpr int kThreads = 512;
constexpr int kHeader = 16;                             // words of a mailbox before its slots; the first is the epoch
constexpr uint64_t kPatience = 600ull * 1'000'000'000;  // nanoseconds
constexpr size_t kChunk = 2 << 20;

// ---- The kernel -----------------------------------------------------------------------------------------------------

struct Boxes {
  int num;
  uint64_t* own;
  uint64_t* all[kMostMailboxes];
};

using Mail = cuda::atomic_ref<uint64_t, cuda::thread_scope_system>;

__device__ uint64_t now() {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// The word, once it is there.
__device__ uint32_t receive(uint64_t* from, uint32_t epoch, int place, int of_place) {
  const Mail mail(*from);
  uint64_t word = mail.load(cuda::memory_order_acquire);
  if (word >> 32 == epoch) return static_cast<uint32_t>(word);
  const uint64_t start = now();
  while (word >> 32 != epoch) {
    if (now() - start > kPatience) {
      printf("jax_lplb: place %d of the mesh has waited %d s for place %d, which may have failed\n", place,
             static_cast<int>(kPatience / 1'000'000'000), of_place);
      __trap();
    }
    word = mail.load(cuda::memory_order_acquire);
  }
  return static_cast<uint32_t>(word);
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Gather gather, const __grid_constant__ Boxes boxes) {
  const uint32_t epoch = static_cast<uint32_t>(boxes.own[0]) + 1;
  const int own = *gather.place, group = own % gather.num_groups, num_words = gather.num_batches * gather.num_words;
  const int64_t slots = kHeader + static_cast<int64_t>(epoch % 2) * gather.num_ranks * gather.num_groups * num_words;
  // What kernels before this one wrote on this device is there for who receives a word.
  cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_system);
  for (int word = threadIdx.x; word < num_words; word += kThreads) {
    const uint64_t mail = static_cast<uint64_t>(epoch) << 32 | gather.words[word];
    const int64_t to = slots + static_cast<int64_t>(own) * num_words + word;
    for (int box = 0; box < boxes.num; ++box) Mail(boxes.all[box][to]).store(mail, cuda::memory_order_relaxed);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < gather.num_ranks * num_words; i += kThreads) {
    const int rank = i / num_words, word = i % num_words, place = rank * gather.num_groups + group;
    const int row = word / gather.num_words * gather.num_ranks + rank;
    gather.words_of_ranks[static_cast<int64_t>(row) * gather.num_words + word % gather.num_words] =
        receive(boxes.own + slots + static_cast<int64_t>(place) * num_words + word, epoch, own, place);
  }
  __syncthreads();  // all have read the epoch
  if (threadIdx.x == 0) boxes.own[0] = epoch;
}

// ---- Mailboxes ------------------------------------------------------------------------------------------------------

// The memory of all mailboxes on a device. None of it goes back to CUDA, which would wait for the device.
struct Arena {
  std::map<size_t, std::vector<uint64_t*>> unused;  // by their bytes
  unsigned char* next = nullptr;
  size_t left = 0;
  cudaStream_t stream = nullptr;  // not the default one, which waits for others
};

std::mutex mutex;

// Never destroyed: executables may outlive static objects.
std::map<int, Arena>& arenas() {
  static auto& of_devices = *new std::map<int, Arena>;
  return of_devices;
}

// Bytes that are zero, on the current device.
cudaError_t take(Arena& arena, size_t bytes, uint64_t** words) {
  cudaError_t error = cudaSuccess;
  if (arena.stream == nullptr) error = cudaStreamCreateWithFlags(&arena.stream, cudaStreamNonBlocking);
  std::vector<uint64_t*>& unused = arena.unused[bytes];
  if (error == cudaSuccess && unused.empty()) {
    if (arena.left < bytes) {
      const size_t size = std::max(bytes, kChunk);
      error = cudaMalloc(&arena.next, size);
      arena.left = error == cudaSuccess ? size : 0;
    }
    if (error == cudaSuccess) {
      unused.push_back(reinterpret_cast<uint64_t*>(arena.next));
      arena.next += bytes;
      arena.left -= bytes;
    }
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(unused.back(), 0, bytes, arena.stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(arena.stream);
  if (error == cudaSuccess) {
    *words = unused.back();
    unused.pop_back();
  }
  return error;
}

// Lets the current device write into the memory of another; XLA mostly has already.
cudaError_t let_write(int device) {
  const cudaError_t error = cudaDeviceEnablePeerAccess(device, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) return error;
  cudaGetLastError();
  return cudaSuccess;
}

size_t power_of_two_from(size_t bytes) {
  size_t power = 1024;
  while (power < bytes) power *= 2;
  return power;
}

}  // namespace

Mailboxes::~Mailboxes() {
  std::lock_guard lock(mutex);
  for (const Mailbox& mailbox : mailboxes_) arenas()[mailbox.device].unused[bytes_].push_back(mailbox.words);
}

cudaError_t Mailboxes::make(const int32_t* devices, size_t num_devices, const Gather& gather) {
  if (made_.load(std::memory_order_acquire)) return cudaSuccess;
  std::lock_guard lock(mutex);
  if (made_.load(std::memory_order_relaxed)) return cudaSuccess;
  const size_t words =
      kHeader + size_t{2} * gather.num_ranks * gather.num_groups * gather.num_batches * gather.num_words;
  bytes_ = power_of_two_from(words * sizeof(uint64_t));
  int current = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return error;
  error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  for (size_t i = mailboxes_.size(); i < num_devices && error == cudaSuccess; ++i) {
    Mailbox mailbox = {devices[i], nullptr};
    error = cudaSetDevice(mailbox.device);
    for (size_t peer = 0; peer < num_devices && error == cudaSuccess; ++peer) {
      if (peer != i) error = let_write(devices[peer]);
    }
    // A kernel is loaded when it is first asked for, which may wait for what runs.
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, gather_kernel);
    if (error == cudaSuccess) error = take(arenas()[mailbox.device], bytes_, &mailbox.words);
    if (error == cudaSuccess) mailboxes_.push_back(mailbox);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t restored = cudaSetDevice(current);
  if (error == cudaSuccess) error = restored;
  made_.store(error == cudaSuccess, std::memory_order_release);
  return error;
}

cudaError_t Mailboxes::gather(cudaStream_t stream, const Gather& gather) const {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  Boxes boxes = {};
  for (const Mailbox& mailbox : mailboxes_) {
    if (mailbox.device == device) boxes.own = mailbox.words;
    boxes.all[boxes.num++] = mailbox.words;
  }
  if (boxes.own == nullptr) return cudaErrorInvalidDevice;
  gather_kernel<<<1, kThreads, 0, stream>>>(gather, boxes);
  return cudaGetLastError();
}

}  // namespace lplb
