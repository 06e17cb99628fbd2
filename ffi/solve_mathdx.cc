#include "solve_mathdx.h"

#include <atomic>
#include <mutex>

#include "interior_point.h"
#include "solve_mathdx_sizes.h"

// Machine code of solve_mathdx.cu for each architecture.
asm(".pushsection .rodata\n"
    ".balign 16\n"
    ".hidden lplb_mathdx_image\n"
    ".global lplb_mathdx_image\n"
    "lplb_mathdx_image:\n"
    ".incbin \"" LPLB_MATHDX_IMAGE
    "\"\n"
    ".popsection\n");
extern "C" const char lplb_mathdx_image[];

namespace lplb {
namespace {

struct Size {
  int ranks;
  int threads[2];  // that solve, of the kernel for pairs and of the general one
  const char* names[2];
  size_t bytes;
};
#define LPLB_SIZE(size, threads, general) \
  {size, {threads, general}, {"lplb_solve_pairs_" #size, "lplb_solve_" #size}, kMathDxBytes<size>},
constexpr Size kSizes[] = {LPLB_MATHDX_SIZES(LPLB_SIZE)};  // ascending
#undef LPLB_SIZE
constexpr int kNumSizes = sizeof(kSizes) / sizeof(kSizes[0]);
constexpr int kMaxDevices = 64;

std::mutex mutex;
cudaKernel_t kernels[kNumSizes][2];        // as in Size
std::atomic<int> most_bytes[kMaxDevices];  // of dynamic shared memory; 0 on a device without machine code

size_t dynamic_bytes(const SolveShape& shape, int which) {
  return kSizes[which].bytes + carve_shared(nullptr, shape, nullptr);
}

// Index of the smallest size that the group fills by more than half, or -1.
int find_size(int group_size) {
  for (int i = 0; i < kNumSizes; ++i) {
    if (group_size <= kSizes[i].ranks) return 2 * group_size > kSizes[i].ranks ? i : -1;
  }
  return -1;
}

// Which of a size's kernels takes the shape: 0 for pairs, 1 the general one, or -1.
int find_kernel(const SolveShape& shape, const Size& size) {
  if (shape.max_replicas == 2 && shape.max_variables <= size.threads[0]) return 0;
  return shape.max_variables <= size.threads[1] * kMathDxVariables ? 1 : -1;
}

cudaError_t load() {
  cudaLibrary_t library;
  cudaError_t error = cudaLibraryLoadData(&library, lplb_mathdx_image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  for (int i = 0; i < kNumSizes && error == cudaSuccess; ++i) {
    error = cudaLibraryGetKernel(&kernels[i][0], library, kSizes[i].names[0]);
    if (error == cudaSuccess) error = cudaLibraryGetKernel(&kernels[i][1], library, kSizes[i].names[1]);
  }
  return error;
}

}  // namespace

std::vector<int> mathdx_sizes() {
  std::vector<int> sizes;
  for (const Size& size : kSizes) sizes.push_back(size.ranks);
  return sizes;
}

bool has_mathdx(const SolveShape& shape) {
  if (shape.by_speed) return false;
  int device = 0;
  const int which = find_size(shape.group_size);
  return which >= 0 && find_kernel(shape, kSizes[which]) >= 0 && cudaGetDevice(&device) == cudaSuccess &&
         device < kMaxDevices && dynamic_bytes(shape, which) <= static_cast<size_t>(most_bytes[device].load());
}

// A device of another architecture than those built for keeps to the other kernels.
cudaError_t prepare_solve_mathdx_cuda(int device) {
  if (device >= kMaxDevices) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  static const cudaError_t loaded = load();
  if (loaded == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();
    return cudaSuccess;
  }
  if (loaded != cudaSuccess) return loaded;
  int shared_bytes = 0, least = 0;
  cudaError_t error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  least = shared_bytes;
  for (const auto& pair : kernels) {
    for (const cudaKernel_t kernel : pair) {
      cudaFuncAttributes attributes;
      error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
      if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();
        return cudaSuccess;
      }
      if (error != cudaSuccess) return error;
      const int bytes = shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
      error = cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes, device);
      if (error != cudaSuccess) return error;
      if (bytes < least) least = bytes;
    }
  }
  most_bytes[device].store(least);
  return cudaSuccess;
}

cudaError_t solve_mathdx_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                              const SolveResults& out) {
  if (!has_mathdx(shape)) return cudaErrorInvalidValue;
  const int which = find_size(shape.group_size);
  const int kernel = find_kernel(shape, kSizes[which]);
  const dim3 grid(shape.num_groups, shape.num_batches), block(mathdx_setup_threads(kSizes[which].threads[kernel]));
  SolveShape shape_copy = shape;
  SolveOperands in_copy = in;
  SolveResults out_copy = out;
  void* arguments[] = {&shape_copy, &in_copy, &out_copy};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernels[which][kernel]), grid, block, arguments,
                          dynamic_bytes(shape, which), stream);
}

}  // namespace lplb
