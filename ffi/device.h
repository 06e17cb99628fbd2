// What a text for both platforms needs to name: device functions, and loops to unroll.
#pragma once

#ifdef __CUDACC__
#define LPLB_DEVICE __device__ __forceinline__
#define LPLB_INLINE __host__ __device__ inline
#else
#define LPLB_DEVICE inline
#define LPLB_INLINE inline
#endif

#ifdef __CUDA_ARCH__
#define LPLB_UNROLL _Pragma("unroll")
#define LPLB_UNROLL_BY(n) _Pragma(LPLB_STRING(unroll n))
#define LPLB_STRING(text) #text
#else
#define LPLB_UNROLL
#define LPLB_UNROLL_BY(n)
#endif
