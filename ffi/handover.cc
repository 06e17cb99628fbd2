#include "handover.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace lplb {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

void check(const char* name, cudaError_t error) {
  if (error != cudaSuccess) fail(std::string(name) + ": " + cudaGetErrorString(error));
}

// ---- The driver's functions, found by name: the library loads where there is no driver ------------------------------

template <class Function>
class Driver {
 public:
  constexpr explicit Driver(const char* name) : name_(name) {}

  // Whether the call succeeds.
  template <class... Arguments>
  bool holds(Arguments... arguments) {
    return find()(arguments...) == CUDA_SUCCESS;
  }

  template <class... Arguments>
  void operator()(Arguments... arguments) {
    const CUresult result = find()(arguments...);
    if (result == CUDA_SUCCESS) return;
    const char* text = "unknown error";
    Driver<decltype(::cuGetErrorString)>("cuGetErrorString").holds(result, &text);
    fail(std::string(name_) + ": " + text);
  }

 private:
  Function* find() {
    void* function = function_.load();
    if (function == nullptr) {
      constexpr unsigned kInterface = 12000;  // has all of them, as this file's header declares them
      cudaDriverEntryPointQueryResult found;
      check(name_, cudaGetDriverEntryPointByVersion(name_, &function, kInterface, cudaEnableDefault, &found));
      if (found != cudaDriverEntryPointSuccess) fail(std::string("the CUDA driver has no ") + name_);
      function_.store(function);
    }
    return reinterpret_cast<Function*>(function);
  }

  const char* name_;
  std::atomic<void*> function_{nullptr};
};

#define LPLB_DRIVER(function) Driver<decltype(::function)> function(#function)
LPLB_DRIVER(cuPointerGetAttribute);
LPLB_DRIVER(cuMemGetAddressRange);
LPLB_DRIVER(cuMemRetainAllocationHandle);
LPLB_DRIVER(cuMemExportToShareableHandle);
LPLB_DRIVER(cuMemImportFromShareableHandle);
LPLB_DRIVER(cuMemAddressReserve);
LPLB_DRIVER(cuMemAddressFree);
LPLB_DRIVER(cuMemMap);
LPLB_DRIVER(cuMemUnmap);
LPLB_DRIVER(cuMemSetAccess);
LPLB_DRIVER(cuMemRelease);
#undef LPLB_DRIVER

constexpr auto kFile = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

// Differs between allocations that had the same address one after the other; 0: there is none.
unsigned long long identity_of(CUdeviceptr base) {
  unsigned long long identity = 0;
  return cuPointerGetAttribute.holds(&identity, CU_POINTER_ATTRIBUTE_BUFFER_ID, base) ? identity : 0;
}

struct Region {
  CUdeviceptr base;
  size_t bytes;
  unsigned long long identity;
};

Region region_of(CUdeviceptr buffer, uint64_t bytes) {
  Region region = {};
  cuMemGetAddressRange(&region.base, &region.bytes, buffer);
  region.identity = identity_of(region.base);
  if (buffer + bytes > region.base + region.bytes) fail("a buffer of XLA lies in several regions of memory");
  if (region.bytes > uint64_t{1} << kOffsetBits) fail("XLA's memory is one region of more than 2^40 bytes");
  if (region.identity == 0) fail("the CUDA driver does not tell regions of memory apart that have one address");
  return region;
}

// Physical memory, kept while this or a mapping is there.
struct Memory {
  CUmemGenericAllocationHandle handle = 0;
  ~Memory() {
    if (handle != 0) cuMemRelease.holds(handle);
  }
};

int file_of(const Region& region) {
  CUmemoryPool pool = nullptr;
  if (cuPointerGetAttribute.holds(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, region.base) && pool != nullptr) {
    fail("XLA's memory comes from a pool of CUDA (cuda_async), which cannot be handed over region by region");
  }
  Memory memory;
  cuMemRetainAllocationHandle(&memory.handle, reinterpret_cast<void*>(region.base));
  int file = -1;
  cuMemExportToShareableHandle(&file, memory.handle, kFile, 0ull);
  return file;
}

// ---- What is handed over --------------------------------------------------------------------------------------------

struct Mapped {
  CUdeviceptr base = 0;
  size_t bytes = 0;
};

struct Processes {
  int own;
  std::vector<int> devices;
  HandOver hand_over;
  volatile uint64_t* bases;  // [num_processes, kMostRegions], 0: nothing is mapped
  std::mutex regions_mutex;
  std::vector<Region> regions;  // of this process
  std::mutex mapped_mutex;
  std::vector<Mapped> mapped;  // [num_processes, kMostRegions], of others
};

// What has joined lives on, for kernels and threads that use it.
std::atomic<Processes*> joined{nullptr};

Processes& processes() {
  Processes* result = joined.load();
  if (result == nullptr) fail("this process runs a program that it has not traced, and so has not met the others");
  return *result;
}

// A number for the region, of one that XLA has freed where there is one. XLA frees nothing that the device still uses,
// and a rank's buffers are in use until all have read: so nobody reads a region that is gone.
size_t number_for(const Processes& processes) {
  const auto& regions = processes.regions;
  const auto gone = std::find_if(regions.begin(), regions.end(),
                                 [](const Region& region) { return identity_of(region.base) != region.identity; });
  if (gone == regions.end() && regions.size() == kMostRegions) {
    fail("buffers lie in more than " + std::to_string(kMostRegions) + " regions of memory");
  }
  return gone - regions.begin();
}

void unmap(const Mapped& mapped) {
  if (mapped.base == 0) return;
  cuMemUnmap.holds(mapped.base, mapped.bytes);
  cuMemAddressFree.holds(mapped.base, mapped.bytes);
}

}  // namespace

void join_processes(int process, int num_processes, std::vector<int> devices, HandOver hand_over) {
  check("cudaSetDevice", cudaSetDevice(devices.at(0)));
  auto* result = new Processes;
  result->own = process;
  result->devices = std::move(devices);
  result->hand_over = std::move(hand_over);
  result->mapped.resize(size_t{kMostRegions} * num_processes);
  const size_t bytes = result->mapped.size() * sizeof(uint64_t);
  void* bases = nullptr;
  check("cudaHostAlloc", cudaHostAlloc(&bases, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
  result->bases = static_cast<volatile uint64_t*>(bases);
  std::fill_n(result->bases, result->mapped.size(), 0);
  joined.store(result);
}

uint64_t share(const void* buffer, uint64_t bytes) {
  Processes& all = processes();
  const auto address = reinterpret_cast<CUdeviceptr>(buffer);
  const Region region = region_of(address, bytes);
  std::lock_guard lock(all.regions_mutex);
  const auto known = std::find_if(all.regions.begin(), all.regions.end(), [&](const Region& other) {
    return other.base == region.base && other.identity == region.identity;
  });
  size_t number = known - all.regions.begin();
  if (known == all.regions.end()) {
    number = number_for(all);
    const int file = file_of(region);
    const std::string error = all.hand_over(static_cast<int>(number), region.bytes, file);
    close(file);
    if (!error.empty()) fail(error);
    if (number == all.regions.size()) all.regions.emplace_back();
    all.regions[number] = region;
    all.bases[all.own * kMostRegions + number] = region.base;
  }
  return (static_cast<uint64_t>(all.own * kMostRegions + number) << kOffsetBits) + (address - region.base);
}

uint64_t share_on(int device, const void* buffer, uint64_t bytes) {
  check("cudaSetDevice", cudaSetDevice(device));
  return share(buffer, bytes);
}

void map_region(int process, int number, uint64_t bytes, int file) {
  Processes& all = processes();
  const size_t i = static_cast<size_t>(process) * kMostRegions + number;
  if (number < 0 || number >= kMostRegions || i >= all.mapped.size() || process == all.own) fail("no such region");
  check("cudaSetDevice", cudaSetDevice(all.devices[0]));
  std::vector<CUmemAccessDesc> access;
  for (const int device : all.devices) {
    access.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  }
  std::lock_guard lock(all.mapped_mutex);
  all.bases[i] = 0;
  unmap(std::exchange(all.mapped[i], {}));
  Memory memory;
  cuMemImportFromShareableHandle(&memory.handle, reinterpret_cast<void*>(static_cast<uintptr_t>(file)), kFile);
  Mapped mapped = {0, bytes};
  try {
    cuMemAddressReserve(&mapped.base, bytes, size_t{0}, CUdeviceptr{0}, 0ull);
    cuMemMap(mapped.base, bytes, size_t{0}, memory.handle, 0ull);
    cuMemSetAccess(mapped.base, bytes, access.data(), access.size());
  } catch (...) {
    unmap(mapped);
    throw;
  }
  all.mapped[i] = mapped;
  all.bases[i] = mapped.base;
}

const uint64_t* mapped_regions() { return const_cast<const uint64_t*>(processes().bases); }

}  // namespace lplb
