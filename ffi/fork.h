// What goes on beside the stream that XLA gives a call, from the call that begins it to a later one that waits for it.
//
// Both calls name it by the memory that it writes: XLA gives them the same address, or has moved what is not there yet.
// Each of XLA's streams has a side stream of its own, so that what is begun waits for nothing but what came before it
// on that stream. Where there is none left, or a stream is captured, it goes on in the call's own stream.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace lplb {

// Before the first fork on a device, and not while a stream is captured or a kernel waits for another device.
cudaError_t prepare_forks();
// launch(stream): launches it, into the side stream.
cudaError_t fork(cudaStream_t stream, const void* writes, const std::function<cudaError_t(cudaStream_t)>& launch);
// Lets the stream wait for it. cudaErrorInvalidValue: nothing has begun that writes there.
cudaError_t join(cudaStream_t stream, const void* writes);

}  // namespace lplb
