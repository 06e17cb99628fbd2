#include "assign.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr size_t kSharedBytes = 48 * 1024;

// A block's shared memory: for each expert the tokens seen so far (uint32), and for each warp and the tile as a
// whole the tokens of the current tile (uint16).
constexpr size_t shared_bytes(int num_experts, int num_warps) {
  return num_experts * (sizeof(uint32_t) + (num_warps + 1) * sizeof(uint16_t));
}

// One block numbers and assigns the ids of a chunk, a tile of one id a thread at a time; the blocks behind the
// last chunk add up the ranks' quotas.
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    assign_kernel(const AssignShape shape, const AssignOperands in, int32_t* physical_ids, int32_t* rank_load) {
  extern __shared__ uint32_t shared[];
  const int experts = shape.count.num_experts, replicas = shape.max_replicas;
  const int64_t batch = blockIdx.y;
  const int32_t* load = in.load + batch * experts;
  const float* split = in.split + batch * experts * replicas;
  const int32_t* log2phy = in.log2phy + batch * experts * replicas;
  const auto quotas_of = [&](int e) {
    return Quotas(split + static_cast<int64_t>(e) * replicas, log2phy + static_cast<int64_t>(e) * replicas, replicas,
                  shape.num_physical, load[e]);
  };
  const int threads = blockDim.x;

  if (blockIdx.x == shape.count.num_chunks) {
    uint32_t* sums = shared;
    for (int g = threadIdx.x; g < shape.num_ranks; g += threads) sums[g] = 0;
    __syncthreads();
    const int slots_per_rank = shape.num_physical / shape.num_ranks;
    for (int e = threadIdx.x; e < experts; e += threads) {
      Quotas quotas = quotas_of(e);
      for (int r = 0; r < quotas.num_replicas(); ++r) {
        atomicAdd(&sums[log2phy[static_cast<int64_t>(e) * replicas + r] / slots_per_rank], quotas.next());
      }
    }
    __syncthreads();
    for (int g = threadIdx.x; g < shape.num_ranks; g += threads) {
      rank_load[batch * shape.num_ranks + g] = static_cast<int32_t>(sums[g]);
    }
    return;
  }

  const int num_warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t* seen = shared;                                          // [experts] numbers given out before this tile
  uint16_t* of_warp = reinterpret_cast<uint16_t*>(seen + experts);  // [num_warps, experts]
  uint16_t* of_tile = of_warp + num_warps * experts;                // [experts]
  const int32_t* starts = in.starts + (batch * shape.count.num_chunks + blockIdx.x) * experts;
  const int32_t* offset = in.offset + batch * experts;
  for (int e = threadIdx.x; e < experts; e += threads) {
    seen[e] = static_cast<uint32_t>(starts[e]) + static_cast<uint32_t>(max(0, offset[e]));
    of_tile[e] = 0;
  }

  const int64_t begin = blockIdx.x * shape.count.chunk_size;
  const int64_t end = min(shape.count.num_ids, begin + shape.count.chunk_size);
  for (int64_t tile = begin; tile < end; tile += threads) {
    const int64_t i = tile + threadIdx.x;
    int32_t e = i < end ? in.expert_ids[batch * shape.count.num_ids + i] : -1;
    if (e >= experts) e = -1;
    for (int w = threadIdx.x; w < num_warps * experts; w += threads) of_warp[w] = 0;
    __syncthreads();
    // Tokens of the same expert in this warp; the first of them counts for all.
    const unsigned same = __match_any_sync(kFullWarp, e);
    const int rank_in_warp = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank_in_warp == 0) of_warp[warp * experts + e] = static_cast<uint16_t>(__popc(same));
    __syncthreads();
    // Over the warps: counts become numbers within the tile.
    for (int x = threadIdx.x; x < experts; x += threads) {
      seen[x] += of_tile[x];
      unsigned before = 0;
#pragma unroll 8
      for (int w = 0; w < num_warps; ++w) {
        const unsigned here = of_warp[w * experts + x];
        of_warp[w * experts + x] = static_cast<uint16_t>(before);
        before += here;
      }
      of_tile[x] = static_cast<uint16_t>(before);
    }
    __syncthreads();
    if (i < end) {
      int32_t slot = -1;
      if (e >= 0) {
        const uint32_t index = seen[e] + of_warp[warp * experts + e] + rank_in_warp;
        slot = choose_slot(quotas_of(e), log2phy + static_cast<int64_t>(e) * replicas, index);
      }
      physical_ids[batch * shape.count.num_ids + i] = slot;
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t assign_cuda(cudaStream_t stream, const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids,
                        int32_t* rank_load) {
  int warps = kMaxWarps;
  while (warps > 1 && shared_bytes(shape.count.num_experts, warps) > kSharedBytes) warps /= 2;
  size_t bytes = shared_bytes(shape.count.num_experts, warps);
  const size_t for_ranks = shape.num_ranks * sizeof(int32_t);
  if (bytes < for_ranks) bytes = for_ranks;
  assign_kernel<<<dim3(shape.count.num_chunks + 1, shape.count.num_batches), warps * kWarp, bytes, stream>>>(
      shape, in, physical_ids, rank_load);
  return cudaGetLastError();
}

}  // namespace lplb
