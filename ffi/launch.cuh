// What kernels may use, and how they are launched, before the launch before them has ended if that may be.
#pragma once

#include <cuda_runtime_api.h>

namespace lplb {

// Lets kernels, one or nested arrays of them, use so much dynamic shared memory.
template <class... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
template <class Kernels>
cudaError_t allow_shared_bytes(const Kernels& kernels, size_t bytes) {
  for (const auto& some : kernels) {
    if (const cudaError_t error = allow_shared_bytes(some, bytes); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// As programmatic dependent launch (`ahead`), or after the end of the launch before.
template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t shared_bytes, bool ahead,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = ahead ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lplb
