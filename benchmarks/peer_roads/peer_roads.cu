// What peer_roads.py builds and calls: custom calls that tell a buffer's address, read rows of peers, and meet peers,
// and the host's side of the roads. It is compiled against the oldest supported FFI headers; XLA's Collectives
// extension is looked up by its number at run time, the driver and NCCL by name, so that it loads without any of them.

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kMaxRanks = 8;
constexpr int64_t kPatience = 2'000'000'000;  // nanoseconds that a kernel waits for its peers

using Clock = std::chrono::steady_clock;

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

std::mutex notes_mutex;
std::string notes;

void note(const std::string& text) {
  std::lock_guard lock(notes_mutex);
  std::fprintf(stderr, "NOTE %s\n", text.c_str());  // should this process not reach its end
  if (notes.size() < 4000) notes += (notes.empty() ? "" : "; ") + text;
}

ffi::Error launched(const char* what) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(what) + ": " + cudaGetErrorString(error));
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

__device__ int64_t now() {
  int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

__global__ void address_kernel(const void* buffer, uint64_t* out) { *out = reinterpret_cast<uint64_t>(buffer); }

__global__ void spin_kernel(int64_t nanoseconds) {
  for (const int64_t start = now(); now() - start < nanoseconds;) {
  }
}

__global__ void pull_kernel(const uint64_t* table, const int* rows, int home, int64_t vectors, int num_rows,
                            uint4* out) {
  for (int r = blockIdx.y; r < num_rows; r += gridDim.y) {
    const uint4* from = reinterpret_cast<const uint4*>(table[rows[r] / home]) + int64_t(rows[r] % home) * vectors;
    uint4* to = out + int64_t(r) * vectors;
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < vectors; i += 4 * stride) {
      uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
      to[i] = a, to[i + stride] = b, to[i + 2 * stride] = c, to[i + 3 * stride] = d;
    }
    for (; i < vectors; i += stride) to[i] = from[i];
  }
}

// A meeting place in each GPU's memory. The count of meetings lives here, not in arguments, so that a recorded launch
// can be replayed. Two sets of values take turns: who writes the next one's has seen that all have left the last one.
struct Place {
  uint32_t meetings;
  uint32_t late;
  uint32_t arrived[kMaxRanks];
  uint64_t values[2][kMaxRanks];
  uint64_t mail[kMaxRanks];  // written without a meeting, for the test of one
};

struct Places {
  Place* of[kMaxRanks];
  int rank;
  int num_ranks;
};

__device__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// All ranks' values, after all ranks have arrived. Thread i deals with rank i.
__global__ void meet_kernel(Places places, const uint64_t* value, uint64_t* out) {
  Place* mine = places.of[places.rank];
  const uint32_t meeting = mine->meetings + 1;
  const int peer = threadIdx.x;
  __syncwarp();
  if (peer < places.num_ranks) {
    Place* theirs = places.of[peer];
    *const_cast<volatile uint64_t*>(&theirs->values[meeting & 1][places.rank]) = *value;
    store_release(&theirs->arrived[places.rank], meeting);
    const int64_t start = now(), patience = mine->late ? 0 : kPatience;
    bool late = false;
    while (!late && int32_t(load_acquire(&mine->arrived[peer]) - meeting) < 0) late = now() - start > patience;
    if (late) atomicAdd(&mine->late, 1);
    out[peer] = *const_cast<volatile uint64_t*>(&mine->values[meeting & 1][peer]);
  }
  __syncwarp();
  if (peer == 0) mine->meetings = meeting;
}

// Writes a value into all peers' mail after a while, plainly: only a meeting makes it safe to read.
__global__ void send_kernel(Places places, int64_t nanoseconds, const uint64_t* value) {
  for (const int64_t start = now(); now() - start < nanoseconds;) {
  }
  if (threadIdx.x < places.num_ranks) places.of[threadIdx.x]->mail[places.rank] = *value;
}

__global__ void receive_kernel(Places places, uint64_t* out) {
  if (threadIdx.x < places.num_ranks) {
    out[threadIdx.x] = *const_cast<volatile uint64_t*>(&places.of[places.rank]->mail[threadIdx.x]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Custom calls on plain addresses

Places all_places[kMaxRanks];  // by device

ffi::Error address(cudaStream_t stream, ffi::AnyBuffer buffer, ffi::Result<ffi::AnyBuffer> out) {
  address_kernel<<<1, 1, 0, stream>>>(buffer.untyped_data(), static_cast<uint64_t*>(out->untyped_data()));
  return launched("address");
}

ffi::Error pull(cudaStream_t stream, ffi::AnyBuffer table, ffi::AnyBuffer rows, ffi::AnyBuffer home, ffi::AnyBuffer,
                ffi::Result<ffi::AnyBuffer> out, int64_t blocks) {
  const int home_rows = int(home.dimensions()[0]), num_rows = int(out->dimensions()[0]);
  pull_kernel<<<dim3(blocks, num_rows), 512, 0, stream>>>(
      static_cast<const uint64_t*>(table.untyped_data()), static_cast<const int*>(rows.untyped_data()), home_rows,
      int64_t(home.size_bytes()) / home_rows / 16, num_rows, static_cast<uint4*>(out->untyped_data()));
  return launched("pull");
}

ffi::Error meet(cudaStream_t stream, int32_t device, ffi::AnyBuffer value, ffi::Result<ffi::AnyBuffer> out) {
  meet_kernel<<<1, 32, 0, stream>>>(all_places[device], static_cast<const uint64_t*>(value.untyped_data()),
                                    static_cast<uint64_t*>(out->untyped_data()));
  return launched("meet");
}

ffi::Error send(cudaStream_t stream, int32_t device, ffi::AnyBuffer value, ffi::Result<ffi::AnyBuffer>,
                int64_t nanoseconds) {
  const Places& places = all_places[device];
  send_kernel<<<1, 32, 0, stream>>>(places, nanoseconds * (places.rank + 1),
                                    static_cast<const uint64_t*>(value.untyped_data()));
  return launched("send");
}

ffi::Error receive(cudaStream_t stream, int32_t device, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  receive_kernel<<<1, 32, 0, stream>>>(all_places[device], static_cast<uint64_t*>(out->untyped_data()));
  return launched("receive");
}

// ---------------------------------------------------------------------------------------------------------------------
// XLA's Collectives extension, as jaxlib 0.11.2's collectives_c_api.h and c_api.h lay it out

struct Extension {
  size_t struct_size;
  int64_t type;
  int32_t major, minor;
  const void* next;
};

struct Group {
  const int64_t* ids;
  size_t size;
};

struct CommunicatorArgs {  // of both calls; the last field belongs to the second
  size_t struct_size;
  void* extension_start;
  int group_mode;
  const Group* groups;
  size_t num_groups;
  int64_t communication_id;
  void* communicator;
};

struct Collectives {
  Extension base;
  void* state;
  XLA_FFI_Error* (*request_communicator)(const Collectives*, CommunicatorArgs*);
  XLA_FFI_Error* (*get_communicator)(const Collectives*, CommunicatorArgs*);
};

struct FindArgs {
  size_t struct_size;
  void* extension_start;
  void* context;
  int64_t type;
  const Extension* extension;
};

struct Raw {
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* context;
};

}  // namespace

template <>
struct xla::ffi::CtxDecoding<Raw> {
  using Type = Raw;
  static std::optional<Raw> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context, DiagnosticEngine&) {
    return Raw{api, context};
  }
};

namespace {

std::string message_of(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  struct {
    XLA_FFI_Error_GetMessage_Args args;
    int64_t room[4];  // newer releases have a further field
  } padded{};
  padded.args.struct_size = XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE;
  padded.args.error = error;
  api->XLA_FFI_Error_GetMessage(&padded.args);
  std::string message = padded.args.message ? padded.args.message : "an error without a message";
  ffi::internal::DestroyError(api, error);
  return message;
}

// The call that finds extensions follows the last one that API 0.3 knows.
ffi::Error find_collectives(Raw raw, const Collectives** found) {
  constexpr size_t kAt = offsetof(XLA_FFI_Api, XLA_FFI_DeviceOrdinal_Get) + sizeof(void*);
  if (raw.api->struct_size < kAt + sizeof(void*)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "this release cannot find extensions");
  }
  using Find = XLA_FFI_Error*(FindArgs*);
  Find* find;
  std::memcpy(&find, reinterpret_cast<const char*>(raw.api) + kAt, sizeof(find));
  FindArgs args{sizeof(FindArgs), nullptr, raw.context, 129, nullptr};
  if (XLA_FFI_Error* error = find(&args)) {
    return ffi::Error::Internal("FindExtension: " + message_of(raw.api, error));
  }
  if (args.extension == nullptr) return ffi::Error(ffi::ErrorCode::kUnimplemented, "no Collectives extension");
  *found = reinterpret_cast<const Collectives*>(args.extension);
  return ffi::Error::Success();
}

struct Asked {
  std::array<int64_t, kMaxRanks> ids;
  Group group;
  CommunicatorArgs args;
  explicit Asked(int64_t num_ranks) {
    for (int i = 0; i < kMaxRanks; ++i) ids[i] = i;
    group = {ids.data(), size_t(num_ranks)};
    constexpr int kFlattenedId = 3;
    args = {offsetof(CommunicatorArgs, communicator), nullptr, kFlattenedId, &group, 1, 0, nullptr};
  }
  Asked(const Asked&) = delete;
};

using NcclComm = void*;
using NcclWindow = void*;

void* nccl(const char* name) {
  static void* library = [] {
    std::string path;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* found) {
          if (!std::strstr(info->dlpi_name, "libnccl.so")) return 0;
          *static_cast<std::string*>(found) = info->dlpi_name;
          return 1;
        },
        &path);
    return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  }();
  return library ? dlsym(library, name) : nullptr;
}

template <typename F>
F* nccl(const char* name) {
  return reinterpret_cast<F*>(nccl(name));
}

struct Window {
  NcclWindow window = nullptr;
  size_t offset = 0;
};

std::mutex windows_mutex;
std::map<std::pair<NcclComm, uint64_t>, NcclWindow> windows;  // by communicator and the registered address
std::map<int, Window> current;                                // by device, for the execution
std::map<int, std::set<const void*>> seen;                    // addresses of the operand by device
std::map<int, int> initialized;

// The caller's device is put back: XLA's threads share this one.
struct OnDevice {
  int before = 0;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaFree(nullptr);
  }
  ~OnDevice() { cudaSetDevice(before); }
};

struct Region {
  uint64_t base = 0;
  uint64_t size = 0;
};

template <typename F>
F* driver(const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW);
  return library ? reinterpret_cast<F*>(dlsym(library, name)) : nullptr;
}
#define DRIVER(function, name) driver<decltype(function)>(name)

CUresult region_of(uint64_t at, Region* region) {
  auto* get = DRIVER(cuMemGetAddressRange_v2, "cuMemGetAddressRange_v2");
  if (!get) return CUDA_ERROR_NOT_FOUND;
  CUdeviceptr base = 0;
  size_t size = 0;
  CUresult result = get(&base, &size, CUdeviceptr(at));
  *region = {uint64_t(base), uint64_t(size)};
  return result;
}

ffi::Error prepare(Raw raw, ffi::RemainingArgs, ffi::RemainingRets, int64_t num_ranks, int64_t) {
  const Collectives* collectives;
  if (auto error = find_collectives(raw, &collectives); error.failure()) return error;
  Asked asked(num_ranks);
  if (XLA_FFI_Error* error = collectives->request_communicator(collectives, &asked.args)) {
    return ffi::Error::Internal("RequestCommunicator: " + message_of(raw.api, error));
  }
  static bool once = (note("extension " + std::to_string(collectives->base.major) + "." +
                           std::to_string(collectives->base.minor) + ", communicator requested"),
                      true);
  (void)once;
  return ffi::Error::Success();
}

ffi::Error initialize(Raw raw, int32_t device, ffi::RemainingArgs args, ffi::RemainingRets, int64_t num_ranks,
                      int64_t whole) {
  OnDevice on(device);
  const Collectives* collectives;
  if (auto error = find_collectives(raw, &collectives); error.failure()) return error;
  Asked asked(num_ranks);
  asked.args.struct_size = sizeof(CommunicatorArgs);
  if (XLA_FFI_Error* error = collectives->get_communicator(collectives, &asked.args)) {
    return ffi::Error::Internal("GetCommunicator: " + message_of(raw.api, error));
  }
  NcclComm comm = asked.args.communicator;
  auto buffer = args.get<ffi::AnyBuffer>(0);
  if (!buffer.has_value() || buffer->untyped_data() == nullptr) return ffi::Error::Internal("no address to initialize");
  const auto at = reinterpret_cast<uint64_t>(buffer->untyped_data());
  Region region;
  if (CUresult result = region_of(at, &region); result != CUDA_SUCCESS) {
    return ffi::Error::Internal("cuMemGetAddressRange: " + std::to_string(result));
  }
  if (!whole) {  // NCCL asks for bases aligned to 4 KiB
    const uint64_t base = at & ~uint64_t(4095);
    region = {base, at + buffer->size_bytes() - base};
  }
  NcclWindow window = nullptr;
  {
    std::lock_guard lock(windows_mutex);
    ++initialized[device];
    seen[device].insert(buffer->untyped_data());
    auto known = windows.find({comm, region.base});
    if (known != windows.end()) window = known->second;
  }
  if (window == nullptr) {
    auto* register_window = nccl<int(NcclComm, void*, size_t, NcclWindow*, int)>("ncclCommWindowRegister");
    auto* async_error = nccl<int(NcclComm, int*)>("ncclCommGetAsyncError");
    auto* version_of = nccl<int(int*)>("ncclGetVersion");
    auto* last_error = nccl<const char*(NcclComm)>("ncclGetLastError");
    if (!register_window || !async_error || !version_of) return ffi::Error::Internal("no ncclCommWindowRegister");
    int version = 0;
    version_of(&version);
    const auto start = Clock::now();
    constexpr int kCollSymmetric = 1, kInProgress = 7;
    int result = register_window(comm, reinterpret_cast<void*>(region.base), region.size, &window, kCollSymmetric);
    while (result == kInProgress && microseconds_since(start) < 20e6) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      if (int error = async_error(comm, &result)) result = error;
    }
    char text[300];
    std::snprintf(text, sizeof text, "NCCL %d device %d: register %.0f MB at %llx: result %d, window %p, %.0f us",
                  version, device, region.size / 1e6, static_cast<unsigned long long>(region.base), result, window,
                  microseconds_since(start));
    note(text);
    if (result != 0 || window == nullptr) {
      return ffi::Error::Internal(std::string(text) + ": " + (last_error ? last_error(comm) : ""));
    }
    if (auto* pointer = nccl<int(NcclWindow, size_t, int, void**)>("ncclGetPeerDevicePointer")) {
      void* peer = nullptr;
      int error = pointer(window, at - region.base, 0, &peer);
      std::snprintf(text, sizeof text, "ncclGetPeerDevicePointer(0) on device %d: result %d, %p for %llx", device,
                    error, peer, static_cast<unsigned long long>(at));
      note(text);
    } else {
      note("no ncclGetPeerDevicePointer");
    }
  }
  std::lock_guard lock(windows_mutex);
  windows[{comm, region.base}] = window;
  current[device] = {window, at - region.base};
  return ffi::Error::Success();
}

// The first fields of NCCL's window in device memory, as its device headers have had them since 2.28.
struct DeviceWindow {
  void* host;
  char* base;
  int lsa_rank, world_rank;
  uint32_t stride_4g;
};

__global__ void window_kernel(const DeviceWindow* window, uint64_t offset, int num_ranks, uint64_t* out) {
  const int peer = threadIdx.x;
  if (peer < num_ranks) {
    const uint64_t place = window->lsa_rank + peer - window->world_rank;  // among those that load and store directly
    out[peer] = reinterpret_cast<uint64_t>(window->base) + (place * window->stride_4g << 32) + offset;
  }
}

ffi::Error window_table(cudaStream_t stream, int32_t device, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out,
                        int64_t num_ranks, int64_t) {
  Window window;
  {
    std::lock_guard lock(windows_mutex);
    window = current[device];
  }
  if (window.window == nullptr) return ffi::Error::Internal("no window: the stage before was not called");
  window_kernel<<<1, 32, 0, stream>>>(static_cast<const DeviceWindow*>(window.window), window.offset, int(num_ranks),
                                      static_cast<uint64_t*>(out->untyped_data()));
  return launched("window_table");
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's side

}  // namespace

#define SYMBOL extern "C" __attribute__((visibility("default")))

// What happened in the custom calls, in words.
SYMBOL const char* roads_notes() {
  static std::string copy;
  {
    std::lock_guard lock(windows_mutex);
    for (auto& [device, times] : initialized) {
      note("device " + std::to_string(device) + ": " + std::to_string(times) + " initializations, " +
           std::to_string(seen[device].size()) + " addresses");
    }
    initialized.clear();
  }
  std::lock_guard lock(notes_mutex);
  copy = std::exchange(notes, "");
  return copy.c_str();
}

SYMBOL int roads_region(int device, uint64_t at, uint64_t* base, uint64_t* size) {
  OnDevice on(device);
  Region region;
  CUresult result = region_of(at, &region);
  *base = region.base, *size = region.size;
  return result;
}

// Differs where the same address belongs to another allocation than before.
SYMBOL uint64_t roads_identity(int device, uint64_t at) {
  OnDevice on(device);
  auto* get = DRIVER(cuPointerGetAttribute, "cuPointerGetAttribute");
  unsigned long long identity = 0;
  if (get) get(&identity, CU_POINTER_ATTRIBUTE_BUFFER_ID, CUdeviceptr(at));
  return identity;
}

// A file descriptor of the physical memory behind an address; `handle_types` as it was allocated for.
SYMBOL int roads_export(int device, uint64_t base, int* fd, int* handle_types) {
  OnDevice on(device);
  auto* retain = DRIVER(cuMemRetainAllocationHandle, "cuMemRetainAllocationHandle");
  auto* properties = DRIVER(cuMemGetAllocationPropertiesFromHandle, "cuMemGetAllocationPropertiesFromHandle");
  auto* export_handle = DRIVER(cuMemExportToShareableHandle, "cuMemExportToShareableHandle");
  auto* release = DRIVER(cuMemRelease, "cuMemRelease");
  if (!retain || !properties || !export_handle || !release) return CUDA_ERROR_NOT_FOUND;
  CUmemGenericAllocationHandle handle;
  if (CUresult result = retain(&handle, reinterpret_cast<void*>(base))) return result;
  CUmemAllocationProp prop{};
  properties(&prop, handle);
  *handle_types = prop.requestedHandleTypes;
  CUresult result = export_handle(fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  release(handle);
  return result;
}

SYMBOL int roads_import(int device, int fd, uint64_t size, uint64_t* mapped) {
  OnDevice on(device);
  auto* import_handle = DRIVER(cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle");
  auto* reserve = DRIVER(cuMemAddressReserve, "cuMemAddressReserve");
  auto* map = DRIVER(cuMemMap, "cuMemMap");
  auto* access = DRIVER(cuMemSetAccess, "cuMemSetAccess");
  auto* release = DRIVER(cuMemRelease, "cuMemRelease");
  if (!import_handle || !reserve || !map || !access || !release) return CUDA_ERROR_NOT_FOUND;
  CUmemGenericAllocationHandle handle;
  if (CUresult result = import_handle(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)),
                                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)) {
    return result;
  }
  CUdeviceptr at = 0;
  CUresult result = reserve(&at, size, 2 << 20, 0, 0);
  if (result == CUDA_SUCCESS) result = map(at, size, 0, handle, 0);
  release(handle);
  CUmemAccessDesc desc{};
  desc.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  desc.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (result == CUDA_SUCCESS) result = access(at, size, &desc, 1);
  *mapped = at;
  return result;
}

// Keeps a device busy on a stream of its own, without waiting.
SYMBOL int roads_spin(int device, int milliseconds) {
  OnDevice on(device);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  spin_kernel<<<1, 1, 0, stream>>>(int64_t(milliseconds) * 1'000'000);
  return cudaGetLastError();
}

SYMBOL int roads_ipc_handle(int device, uint64_t at, char* handle) {
  OnDevice on(device);
  return cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle), reinterpret_cast<void*>(at));
}

// A meeting place on this device, of this rank; its address and handle for the peers.
SYMBOL int roads_place(int device, int rank, int num_ranks, uint64_t* at, char* handle) {
  OnDevice on(device);
  Places& places = all_places[device];
  places.rank = rank, places.num_ranks = num_ranks;
  Place* place;
  cudaError_t error = cudaMalloc(&place, sizeof(Place));
  if (error == cudaSuccess) error = cudaMemset(place, 0, sizeof(Place));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle), place);
  places.of[rank] = place;
  *at = reinterpret_cast<uint64_t>(place);
  return error;
}

// A peer's place: of this process by its address, of another by its handle.
SYMBOL int roads_peer_place(int device, int peer, int peer_device, uint64_t at, const char* handle) {
  OnDevice on(device);
  void* place = reinterpret_cast<void*>(at);
  cudaError_t error = cudaSuccess;
  if (handle) {
    cudaIpcMemHandle_t copy;
    std::memcpy(&copy, handle, sizeof copy);
    error = cudaIpcOpenMemHandle(&place, copy, cudaIpcMemLazyEnablePeerAccess);
  } else {
    error = cudaDeviceEnablePeerAccess(peer_device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess;
    cudaGetLastError();
  }
  all_places[device].of[peer] = static_cast<Place*>(place);
  return error;
}

SYMBOL int roads_late(int device) {
  OnDevice on(device);
  uint32_t late = 0;
  const Places& places = all_places[device];
  cudaMemcpy(&late, &places.of[places.rank]->late, sizeof late, cudaMemcpyDefault);
  return int(late);
}

#define CALL(Name, implementation, binding)       \
  SYMBOL XLA_FFI_Error* Name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Name, implementation, binding, {ffi::Traits::kCmdBufferCompatible})
#define STREAM ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()
#define STREAM_OF_DEVICE STREAM.Ctx<ffi::DeviceOrdinal>()

CALL(Address, address, STREAM.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
CALL(Pull, pull,
     STREAM.Arg<ffi::AnyBuffer>()
         .Arg<ffi::AnyBuffer>()
         .Arg<ffi::AnyBuffer>()
         .Arg<ffi::AnyBuffer>()
         .Ret<ffi::AnyBuffer>()
         .Attr<int64_t>("blocks"));
CALL(Meet, meet, STREAM_OF_DEVICE.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
CALL(Send, send, STREAM_OF_DEVICE.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("nanoseconds"));
CALL(Receive, receive, STREAM_OF_DEVICE.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
CALL(WindowTable, window_table,
     STREAM_OF_DEVICE.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("num_ranks").Attr<int64_t>("whole"));

#define STAGE(Name, implementation, binding)      \
  SYMBOL XLA_FFI_Error* Name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                  \
      Name, implementation,                       \
      ffi::Ffi::binding.RemainingArgs().RemainingRets().Attr<int64_t>("num_ranks").Attr<int64_t>("whole"))

STAGE(WindowPrepare, prepare, BindPrepare().Ctx<Raw>());
STAGE(WindowInitialize, initialize, BindInitialize().Ctx<Raw>().Ctx<ffi::DeviceOrdinal>());
