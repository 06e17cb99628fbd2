// A custom call that launches empty kernels and computes nothing: the floor that benchmarks/balance.py compares with.
// It stands in for any of the handlers, with the same operands, results and attributes, and with their trait.
#include <string>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

__global__ void empty_kernel() {}

ffi::Error noop(cudaStream_t stream, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  const auto launches = attributes.get<int64_t>("launches");
  if (launches.has_error()) return launches.error();
  for (int64_t i = 0; i < *launches; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return ffi::Error::Internal(std::string("noop: ") + cudaGetErrorString(error));
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* LplbNoop(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LplbNoop, noop, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets().Attrs(),
    {ffi::Traits::kCmdBufferCompatible});
