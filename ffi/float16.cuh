// Floats of 16 bits in kernels, and elements that are loaded or stored together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "peer.h"

namespace lplb {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline void store(float value, float* to) { *to = value; }
__device__ inline void store(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }
__device__ inline void store(float value, __half* to) { *to = __float2half_rn(value); }

template <class T, int kElements>
struct alignas(sizeof(T) * kElements) Pack {
  T values[kElements];
};

template <class Visit>
auto visit_float(Float type, Visit visit) {
  return visit_float<__nv_bfloat16, __half>(type, visit);
}

}  // namespace lplb
