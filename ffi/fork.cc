#include "fork.h"

#include <algorithm>
#include <cstdint>
#include <mutex>

namespace lplb {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kMostSides = 4;   // of a device: XLA has one stream for all programs, but for some that users ask for
constexpr int kMostForks = 32;  // that have begun, and that nothing has waited for yet

struct Side {
  cudaStream_t of, stream;
};

struct Begun {
  uint64_t name;
  cudaEvent_t end;
  uint64_t number;  // begun since the process began
  bool is_open;     // begun, and nothing has waited for it yet
  bool is_aside;    // in a side stream
};

struct Forks {
  std::mutex mutex;
  uint64_t number = 0;
  int num_sides = 0;  // that belong to a stream
  Side sides[kMostSides] = {};
  Begun begun[kMostForks] = {};
};

// Of the current device. Never destroyed: executables may outlive static objects.
cudaError_t own_forks(Forks** forks) {
  static auto* const of_devices = new Forks[kMaxDevices];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device >= kMaxDevices) return cudaErrorInvalidDevice;
  *forks = of_devices + device;
  return error;
}

// The side stream of a stream; nullptr: it has none.
cudaStream_t side_of(Forks& forks, cudaStream_t stream) {
  for (int i = 0; i < forks.num_sides; ++i) {
    if (forks.sides[i].of == stream) return forks.sides[i].stream;
  }
  if (forks.num_sides == kMostSides) return nullptr;
  forks.sides[forks.num_sides].of = stream;
  return forks.sides[forks.num_sides++].stream;
}

// What nothing has waited for; nullptr: there is none of that name.
Begun* find(Forks& forks, uint64_t name) {
  for (Begun& one : forks.begun) {
    if (one.is_open && one.name == name) return &one;
  }
  return nullptr;
}

// One that is not open, or the oldest: where programs fail between the two calls, nothing will wait for what they
// began.
Begun* next(Forks& forks) {
  return std::min_element(forks.begun, forks.begun + kMostForks, [](const Begun& one, const Begun& other) {
    return one.is_open != other.is_open ? other.is_open : one.number < other.number;
  });
}

}  // namespace

cudaError_t prepare_forks() {
  Forks* forks;
  if (const cudaError_t error = own_forks(&forks); error != cudaSuccess) return error;
  std::lock_guard lock(forks->mutex);
  cudaError_t error = cudaSuccess;
  for (Begun& one : forks->begun) {
    if (error == cudaSuccess && one.end == nullptr) error = cudaEventCreateWithFlags(&one.end, cudaEventDisableTiming);
  }
  for (Side& side : forks->sides) {
    if (error == cudaSuccess && side.stream == nullptr) {
      error = cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking);
    }
  }
  return error;
}

cudaError_t fork(cudaStream_t stream, uint64_t name, const std::function<cudaError_t(cudaStream_t)>& launch) {
  Forks* forks;
  cudaError_t error = own_forks(&forks);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (error == cudaSuccess) error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  std::lock_guard lock(forks->mutex);
  Begun* begun = find(*forks, name);
  if (begun == nullptr) begun = next(*forks);
  if (begun->is_open && begun->is_aside) error = cudaStreamWaitEvent(stream, begun->end, 0);
  const cudaStream_t side = capture == cudaStreamCaptureStatusNone ? side_of(*forks, stream) : nullptr;
  if (error == cudaSuccess && side != nullptr) {
    error = cudaEventRecord(begun->end, stream);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(side, begun->end, 0);
  }
  if (error == cudaSuccess) error = launch(side == nullptr ? stream : side);
  if (error == cudaSuccess && side != nullptr) error = cudaEventRecord(begun->end, side);
  begun->name = name;
  begun->number = ++forks->number;
  begun->is_open = error == cudaSuccess;
  begun->is_aside = side != nullptr;
  return error;
}

cudaError_t join(cudaStream_t stream, uint64_t name) {
  Forks* forks;
  if (const cudaError_t error = own_forks(&forks); error != cudaSuccess) return error;
  std::lock_guard lock(forks->mutex);
  Begun* begun = find(*forks, name);
  if (begun == nullptr) return cudaErrorInvalidValue;
  begun->is_open = false;
  return begun->is_aside ? cudaStreamWaitEvent(stream, begun->end, 0) : cudaSuccess;
}

}  // namespace lplb
