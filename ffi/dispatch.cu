#include <cuda_runtime.h>

#include "dispatch.h"
#include "float16.cuh"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kLoads = 4;                // of 16 bytes, that a lane has in flight
constexpr int kRegistersOfCombine = 88;  // of a thread, which leave some to blocks of what goes on beside it

template <class T>
__device__ T* rows_of(const PeerBuffer& buffer, int batch, int rank) {
  return reinterpret_cast<T*>(buffer.address(batch, rank));
}

// The rank whose buffer this is.
__device__ int own_rank(const PeerBuffer& buffer, int batch) {
  const unsigned char* own = buffer.own + batch * buffer.num_rows * buffer.row_bytes;
  int rank = 0;
  while (rank < buffer.num_ranks - 1 && rows_of<const unsigned char>(buffer, batch, rank) != own) ++rank;
  return rank;
}

// Some tokens of a rank, as many as have their choices in the lanes of a warp, one choice a lane.
struct Tokens {
  int rank;
  int64_t first;   // token
  int64_t choice;  // of this lane, among those of the rank's tokens; valid where `place` may be one
  int32_t place;   // of this lane; negative: none
};

// Warps go through all tokens; neighbours in time are of different ranks, so that all links are busy at once.
class Walk {
 public:
  __device__ Walk(const Places& places, int batch, int here)
      : places_(places), batch_(batch), here_(here), of_warp_(kWarp / places.num_choices) {
    const int64_t runs = (places.place.num_rows + of_warp_ - 1) / of_warp_;
    end_ = runs * places.place.num_ranks;
    unit_ = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    next_ = load();
  }
  // The next tokens, the same for all lanes but for their choices; the ones after them are loaded meanwhile.
  __device__ bool next(Tokens* tokens) {
    if (unit_ >= end_) return false;
    *tokens = next_;
    unit_ += static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    next_ = load();
    return true;
  }
  __device__ int tokens_of_warp() const { return of_warp_; }

 private:
  __device__ Tokens load() const {
    Tokens tokens = {0, 0, 0, -1};
    if (unit_ >= end_) return tokens;
    const int ranks = places_.place.num_ranks, lane = threadIdx.x % kWarp;
    tokens.rank = static_cast<int>((here_ + 1 + unit_ % ranks) % ranks);
    tokens.first = unit_ / ranks * of_warp_;
    tokens.choice = tokens.first * places_.num_choices + lane;
    if (lane < of_warp_ * places_.num_choices && tokens.choice < places_.place.num_rows * places_.num_choices) {
      tokens.place = rows_of<const int32_t>(places_.place, batch_, tokens.rank)[tokens.choice];
    }
    return tokens;
  }
  const Places& places_;
  int batch_, here_, of_warp_;
  int64_t unit_, end_;
  Tokens next_;
};

// The row of this rank that a place is of; -1: of another, or none.
__device__ int32_t row_here(const Places& places, int32_t place, int here) {
  const int64_t row = place - here * places.capacity;
  return place >= 0 && row >= 0 && row < places.capacity ? static_cast<int32_t>(row) : -1;
}

// The lanes of token number `i` of a warp's.
__device__ unsigned lanes_of(int i, int num_choices) {
  const unsigned first = num_choices == kWarp ? kFullWarp : (1u << num_choices) - 1;
  return first << (i * num_choices);
}

__device__ void clear_padding(const Dispatch& dispatch, int batch, uint4* rows) {
  int64_t used = 0;
  for (int i = 0; i < dispatch.num_groups; ++i) {
    used += dispatch.group_sizes[static_cast<int64_t>(batch) * dispatch.num_groups + i];
  }
  const int64_t words = dispatch.tokens.row_bytes / sizeof(uint4), end = dispatch.places.capacity * words;
  for (int64_t i = used * words + blockIdx.x * kThreads + threadIdx.x; i < end; i += gridDim.x * kThreads) {
    rows[i] = make_uint4(0, 0, 0, 0);
  }
}

// One warp for each chunk of ids.
__global__ void number_kernel(const Number number, int32_t* result) {
  extern __shared__ int32_t seen[];  // [num_kinds]
  const int lane = threadIdx.x;
  const int64_t batch = blockIdx.y, chunk = blockIdx.x;
  const int32_t* starts = number.starts + (batch * number.num_chunks + chunk) * number.num_kinds;
  for (int i = lane; i < number.num_kinds; i += kWarp) seen[i] = starts[i];
  __syncwarp();
  const int64_t begin = batch * number.num_ids;
  const int64_t end = min((chunk + 1) * number.chunk_size, number.num_ids);
  for (int64_t first = chunk * number.chunk_size; first < end; first += kWarp) {
    const int64_t i = first + lane;
    int32_t id = i < end ? number.ids[begin + i] : -1;
    if (id >= number.num_kinds) id = -1;
    const unsigned equal = __match_any_sync(kFullWarp, id);
    const int32_t before = id >= 0 ? seen[id] : 0;
    __syncwarp();
    if (id >= 0 && lane == __ffs(equal) - 1) seen[id] = before + __popc(equal);
    __syncwarp();
    if (i < end) result[begin + i] = id >= 0 ? before + __popc(equal & ((1u << lane) - 1)) : 0;
  }
}

__global__ void __launch_bounds__(kThreads) dispatch_kernel(const Dispatch dispatch, int32_t* done) {
  const Places& places = dispatch.places;
  const int batch = blockIdx.y, lane = threadIdx.x % kWarp, here = own_rank(places.place, batch);
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t words = dispatch.tokens.row_bytes / sizeof(uint4);
  uint4* rows = reinterpret_cast<uint4*>(dispatch.rows) + batch * places.capacity * words;
  Walk walk(places, batch, here);
  for (Tokens tokens; walk.next(&tokens);) {
    const int32_t row = row_here(places, tokens.place, here);
    const unsigned rows_here = __ballot_sync(kFullWarp, row >= 0);
    for (int i = 0; i < walk.tokens_of_warp(); ++i) {
      const unsigned of_token = rows_here & lanes_of(i, places.num_choices);
      if (of_token == 0) continue;
      const uint4* from = rows_of<const uint4>(dispatch.tokens, batch, tokens.rank) + (tokens.first + i) * words;
      for (int64_t begin = lane; begin - lane < words; begin += kWarp * kLoads) {
        uint4 values[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          if (begin + k * kWarp < words) values[k] = from[begin + k * kWarp];
        }
        for (unsigned left = of_token; left != 0; left &= left - 1) {
          uint4* to = rows + __shfl_sync(kFullWarp, row, __ffs(left) - 1) * words;
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            if (begin + k * kWarp < words) to[begin + k * kWarp] = values[k];
          }
        }
      }
    }
  }
  clear_padding(dispatch, batch, rows);
}

template <class T>
__global__ void __maxnreg__(kRegistersOfCombine) combine_kernel(const Combine combine, int32_t* done) {
  constexpr int kElements = sizeof(uint4) / sizeof(T);
  using Word = Pack<T, kElements>;
  const Places& places = combine.places;
  const int batch = blockIdx.y, lane = threadIdx.x % kWarp, here = own_rank(places.place, batch);
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t words = combine.row_elements / kElements;
  const Word* rows = static_cast<const Word*>(combine.rows) + batch * places.capacity * words;
  Walk walk(places, batch, here);
  for (Tokens tokens; walk.next(&tokens);) {
    const int32_t row = row_here(places, tokens.place, here);
    float gate = 1;
    if (combine.has_gates && row >= 0) {
      gate = rows_of<const float>(combine.gates, batch, tokens.rank)[tokens.choice];
    }
    const unsigned rows_here = __ballot_sync(kFullWarp, row >= 0);
    if (rows_here == 0) continue;
    // Choices of a token whose rank is that of no choice before.
    const int token = lane / places.num_choices, ranks = places.place.num_ranks;
    const int rank = tokens.place < 0 ? -1 : static_cast<int>(tokens.place / places.capacity);
    const unsigned alike = __match_any_sync(kFullWarp, rank < 0 ? -1 : token * ranks + rank);
    const unsigned firsts = __ballot_sync(kFullWarp, rank >= 0 && __ffs(alike) - 1 == lane);
    for (int i = 0; i < walk.tokens_of_warp(); ++i) {
      const unsigned lanes = lanes_of(i, places.num_choices), of_token = rows_here & lanes;
      if (of_token == 0) continue;
      const int part = __popc(firsts & lanes & ((1u << (__ffs(of_token) - 1)) - 1));
      Word* to =
          rows_of<Word>(combine.parts, batch, tokens.rank) + ((tokens.first + i) * combine.num_parts + part) * words;
      for (int64_t begin = lane; begin - lane < words; begin += kWarp * kLoads) {
        float total[kLoads][kElements] = {};
        for (unsigned left = of_token; left != 0; left &= left - 1) {
          const int from_lane = __ffs(left) - 1;
          const Word* from = rows + __shfl_sync(kFullWarp, row, from_lane) * words;
          const float by = __shfl_sync(kFullWarp, gate, from_lane);
          Word values[kLoads] = {};
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            if (begin + k * kWarp < words) values[k] = from[begin + k * kWarp];
          }
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
#pragma unroll
            for (int e = 0; e < kElements; ++e) total[k][e] += by * to_float(values[k].values[e]);
          }
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          if (begin + k * kWarp >= words) continue;
          Word sum;
#pragma unroll
          for (int e = 0; e < kElements; ++e) store(total[k][e], &sum.values[e]);
          to[begin + k * kWarp] = sum;
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_gradient_kernel(const CombineGradient gradient, int32_t* done) {
  constexpr int kElements = sizeof(uint4) / sizeof(T);
  using Word = Pack<T, kElements>;
  const Dispatch& dispatch = gradient.dispatch;
  const Places& places = dispatch.places;
  const int batch = blockIdx.y, lane = threadIdx.x % kWarp, here = own_rank(places.place, batch);
  if (threadIdx.x == 0 && blockIdx.x == 0 && done != nullptr) done[batch] = 0;
  const int64_t words = gradient.row_elements / kElements;
  const Word* rows = static_cast<const Word*>(gradient.rows) + batch * places.capacity * words;
  Word* of_rows = reinterpret_cast<Word*>(dispatch.rows) + batch * places.capacity * words;
  Walk walk(places, batch, here);
  for (Tokens tokens; walk.next(&tokens);) {
    const int32_t row = row_here(places, tokens.place, here);
    const float gate = row >= 0 ? rows_of<const float>(gradient.gates, batch, tokens.rank)[tokens.choice] : 0;
    const unsigned rows_here = __ballot_sync(kFullWarp, row >= 0);
    float of_gate = 0;  // of this lane's choice
    for (int i = 0; i < walk.tokens_of_warp(); ++i) {
      const unsigned of_token = rows_here & lanes_of(i, places.num_choices);
      if (of_token == 0) continue;
      const Word* from = rows_of<const Word>(dispatch.tokens, batch, tokens.rank) + (tokens.first + i) * words;
      for (int64_t begin = lane; begin - lane < words; begin += kWarp * kLoads) {
        Word values[kLoads] = {};
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          if (begin + k * kWarp < words) values[k] = from[begin + k * kWarp];
        }
        for (unsigned left = of_token; left != 0; left &= left - 1) {
          const int of_lane = __ffs(left) - 1;
          const int64_t place = __shfl_sync(kFullWarp, row, of_lane) * words;
          const float by = __shfl_sync(kFullWarp, gate, of_lane);
          float sum = 0;
          Word were[kLoads] = {};
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            if (begin + k * kWarp < words) were[k] = rows[place + begin + k * kWarp];
          }
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            Word scaled;
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
              const float value = to_float(values[k].values[e]);
              sum += value * to_float(were[k].values[e]);
              store(by * value, &scaled.values[e]);
            }
            if (begin + k * kWarp < words) of_rows[place + begin + k * kWarp] = scaled;
          }
#pragma unroll
          for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
          if (lane == of_lane) of_gate += sum;
        }
      }
    }
    if (row >= 0) rows_of<float>(gradient.of_gates, batch, tokens.rank)[tokens.choice] = of_gate;
  }
  clear_padding(dispatch, batch, reinterpret_cast<uint4*>(of_rows));
}

dim3 grid_of(const Places& places, int num_blocks) {
  return dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(places.place.num_batches));
}

}  // namespace

cudaError_t number_cuda(cudaStream_t stream, const Number& number, int32_t* result) {
  const dim3 grid(number.num_chunks, number.num_batches);
  number_kernel<<<grid, kWarp, number.num_kinds * sizeof(int32_t), stream>>>(number, result);
  return cudaGetLastError();
}

cudaError_t dispatch_cuda(cudaStream_t stream, const Dispatch& dispatch, int32_t* done) {
  dispatch_kernel<<<grid_of(dispatch.places, dispatch.num_blocks), kThreads, 0, stream>>>(dispatch, done);
  return cudaGetLastError();
}

cudaError_t combine_cuda(cudaStream_t stream, const Combine& combine, int32_t* done) {
  return visit_float(combine.type, [&](auto zero) {
    combine_kernel<decltype(zero)><<<grid_of(combine.places, combine.num_blocks), kThreads, 0, stream>>>(combine, done);
    return cudaGetLastError();
  });
}

cudaError_t combine_gradient_cuda(cudaStream_t stream, const CombineGradient& gradient, int32_t* done) {
  const dim3 grid = grid_of(gradient.dispatch.places, gradient.dispatch.num_blocks);
  return visit_float(gradient.type, [&](auto zero) {
    combine_gradient_kernel<decltype(zero)><<<grid, kThreads, 0, stream>>>(gradient, done);
    return cudaGetLastError();
  });
}

}  // namespace lplb
