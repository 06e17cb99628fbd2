// What goes on beside the stream that XLA gives a call, from the call that begins it to a later one that waits for it.
//
// Both calls name it by the addresses of all that it reads and writes: XLA gives them the same ones, or has moved what
// is not there yet. Each of XLA's streams has a side stream of its own, so that what is begun waits for nothing but
// what came before it on that stream. Where there is none left, or a stream is captured, it goes on in the call's own
// stream.
//
// A program that fails between the two calls leaves what it began to itself; what is begun next on its stream waits for
// that first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

namespace lplb {

// Before the first fork on a device, and not while a stream is captured or a kernel waits for another device.
cudaError_t prepare_forks();
// launch(stream): launches it, into the side stream.
cudaError_t fork(cudaStream_t stream, uint64_t name, const std::function<cudaError_t(cudaStream_t)>& launch);
// Lets the stream wait for it. cudaErrorInvalidValue: nothing of that name has begun.
cudaError_t join(cudaStream_t stream, uint64_t name);

}  // namespace lplb
