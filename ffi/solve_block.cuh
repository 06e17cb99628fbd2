// The threads of a CUDA block as interior_point.h wants them.
#pragma once

#include "interior_point.h"

namespace lplb {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A thread block whose first kNumThreads threads own up to kVariablesEach variables each, for groups of up to
// kMostRanks ranks; all of its threads help to set up. A struct that derives from it adds factorise(), apply() and
// place(), which share a MatrixScratch.
template <int kNumThreads, int kVariablesEach, int kMostRanks, bool kAllPairs, bool kSpeeds, class MatrixScratch>
struct BlockBase {
  static constexpr int kThreads = kNumThreads;
  static constexpr int kSetupThreads = kNumThreads < 256 ? 256 : kNumThreads;
  static constexpr int kVariables = kVariablesEach;
  static constexpr int kRanks = 1;
  static constexpr int kLanes = 4;
  static constexpr int kBalancingRounds = kMostRanks <= 16 ? 4 : 8;  // the more, the more an iteration costs
  static constexpr bool kPairs = kAllPairs, kBySpeed = kSpeeds;
  static_assert(kThreads >= kMostRanks, "a thread owns one rank at most");
  static_assert(!kPairs || kVariables == 1, "pairs are neighbouring threads");
  static_assert(kWarp % kLanes == 0, "the threads of a rank are of one warp");

  static constexpr int kWarps = kThreads / kWarp, kSetupWarps = kSetupThreads / kWarp;
  static constexpr int kMostReduced = 6;

  struct Scratch : MatrixScratch {
    float reduced[2][kWarps][kMostReduced];
    int counts[kSetupWarps];
    uint32_t num_shares;  // see ShareMaker
  };
  Scratch* scratch;
  int turn = 0;  // which half of Scratch::reduced comes next

  __device__ int thread() const { return threadIdx.x; }
  __device__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();  // waits for none of the threads that have left
    }
  }
  __device__ void sync_setup() const { __syncthreads(); }
  __device__ void sync_lanes() const { __syncwarp(((1u << kLanes) - 1) << (threadIdx.x % kWarp / kLanes * kLanes)); }
  struct Four {
    float v[4];
  };
  __device__ Four load4(const float* from) const {
    const float4 four = *reinterpret_cast<const float4*>(from);
    return {{four.x, four.y, four.z, four.w}};
  }
  __device__ float sibling(float value) const { return __shfl_xor_sync(kFullWarp, value, 1); }
  // Good to one unit in the last place, which is more than Newton steps need.
  __device__ float reciprocal(float value) const {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(value));
    return r;
  }
  // Integers only: the order does not show. Neighbouring threads often add to one target, and do so together.
  __device__ void add(int32_t* targets, int which, int32_t value, bool wanted) const {
    const unsigned together = __match_any_sync(kFullWarp, wanted ? which : -1);
    value = __reduce_add_sync(together, value);
    if (wanted && threadIdx.x % kWarp == __ffs(together) - 1) atomicAdd(&targets[which], value);
  }
  __device__ void add_all(uint32_t* target, uint32_t value) const {
    value = __reduce_add_sync(kFullWarp, value);
    if (threadIdx.x % kWarp == 0) atomicAdd(target, value);
  }

  // Sums, and minima or maxima of nonnegative values, known to all threads; and a barrier, just one: the two halves of
  // the scratch take turns.
  template <bool kLargest, int kSums, int kExtremes>
  __device__ void reduce(float (&sums)[kSums], float (&extremes)[kExtremes]) {
    static_assert(kSums + kExtremes <= kMostReduced, "scratch too small");
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], step);
    }
#pragma unroll
    for (int i = 0; i < kExtremes; ++i) extremes[i] = warp_extreme<kLargest>(extremes[i]);
    if constexpr (kWarps == 1) {
      __syncwarp();
      return;
    }
    float (*partial)[kMostReduced] = scratch->reduced[turn];
    turn ^= 1;
    if (threadIdx.x % kWarp == 0) {
      float* mine = partial[threadIdx.x / kWarp];
#pragma unroll
      for (int i = 0; i < kSums; ++i) mine[i] = sums[i];
#pragma unroll
      for (int i = 0; i < kExtremes; ++i) mine[kSums + i] = extremes[i];
    }
    sync();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = partial[0][i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sums[i] += partial[warp][i];
    }
#pragma unroll
    for (int i = 0; i < kExtremes; ++i) {
      extremes[i] = partial[0][kSums + i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        const float other = partial[warp][kSums + i];
        extremes[i] = kLargest ? fmaxf(extremes[i], other) : fminf(extremes[i], other);
      }
    }
  }
  // The bits of nonnegative floats order as the floats do.
  template <bool kLargest>
  __device__ static float warp_extreme(float value) {
    const unsigned bits = __float_as_uint(value);
    return __uint_as_float(kLargest ? __reduce_max_sync(kFullWarp, bits) : __reduce_min_sync(kFullWarp, bits));
  }

  // Exclusive scan over all threads, and the total.
  __device__ int scan(int mine, int* total) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane == kWarp - 1) scratch->counts[warp] = upto;
    __syncthreads();
    int before = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kSetupWarps; ++w) {
      if (w < warp) before += scratch->counts[w];
      sum += scratch->counts[w];
    }
    *total = sum;
    return before + upto - mine;
  }

  // Numbers the variables of each rank, and counts them. Variables come in chunks of a warp, whose counts are added up,
  // in kChunks * kMostRanks bytes of shared memory.
  static constexpr int kChunks = kVariables * kWarps;
  __device__ void number(const int (&rank)[kVariables], int num_variables, int num_ranks, int (&place)[kVariables],
                         int32_t* counts, void* memory) const {
    uint8_t* of_chunk = static_cast<uint8_t*>(memory);  // [chunks, ranks]
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if constexpr (kChunks > 1) {
      for (int c = threadIdx.x; c < kChunks * num_ranks; c += kThreads) of_chunk[c] = 0;
      sync();
    }
#pragma unroll
    for (int i = 0; i < kVariables; ++i) {
      if (i > 0 && i * kThreads >= num_variables) break;
      const bool active = i * kThreads + threadIdx.x < num_variables;
      const unsigned together = __match_any_sync(kFullWarp, active ? rank[i] : -1);
      place[i] = __popc(together & ((1u << lane) - 1));
      if (active && place[i] == 0) {
        const int count = __popc(together);
        atomicAdd(&counts[rank[i]], count);
        if constexpr (kChunks > 1) of_chunk[(i * kWarps + warp) * num_ranks + rank[i]] = count;
      }
    }
    if constexpr (kChunks > 1) {
      sync();
#pragma unroll
      for (int i = 0; i < kVariables; ++i) {
        if (i * kThreads + threadIdx.x >= num_variables) break;
        for (int c = 0; c < i * kWarps + warp; ++c) place[i] += of_chunk[c * num_ranks + rank[i]];
      }
    }
  }
};

constexpr int kTile = 8;

template <int kMostRanks>
struct TileScratch {
  double2 column[2][kMostRanks / kTile][kWarp];  // a column of tiles, turn by turn
  double2 pivot[2][kWarp];                       // minus the inverse of a diagonal tile
  double border[kMostRanks];                     // K^-1 s
};

// Inverts K by a routine of our own.
template <int kNumThreads, int kVariablesEach, int kMostRanks, bool kAllPairs, bool kSpeeds>
struct CudaBlock : BlockBase<kNumThreads, kVariablesEach, kMostRanks, kAllPairs, kSpeeds, TileScratch<kMostRanks>> {
  using Base = BlockBase<kNumThreads, kVariablesEach, kMostRanks, kAllPairs, kSpeeds, TileScratch<kMostRanks>>;
  using Base::reciprocal;
  using Base::scratch;
  using Base::sync;
  static constexpr int kTiles = kMostRanks / kTile;
  static_assert(kMostRanks % kTile == 0 && kTiles <= Base::kWarps, "a warp owns a row of tiles");

  double inverse[kTiles][2];     // of the bordered matrix; this warp's row of tiles
  double sum_of_border_inverse;  // 1 / (s^T K^-1 s)

  __device__ void place(const int (&rank)[kVariablesEach], int num_variables, int num_ranks,
                        int (&place)[kVariablesEach], int32_t* counts) const {
    static_assert(Base::kChunks * kMostRanks <= sizeof(scratch->column), "scratch too small");
    this->number(rank, num_variables, num_ranks, place, counts, scratch->column);
  }

  // The inverse of [[K, s], [s^T, 0]], s the speeds, or ones. K has the packed lower triangle `matrix` off its
  // diagonal, and rows that sum to `excess`.
  //
  // K is padded with the identity, cut into 8x8 tiles, a row of them to a warp, and inverted by symmetric sweeps
  // (Gauss-Jordan on diagonal tiles; safe without pivoting, because K is positive definite). With P the inverse of tile
  // kk, a sweep turns tile ij into A_ij - A_ik P A_jk^T, row and column k into P A_kj and A_ik P, and tile kk into -P.
  // Products are done by tensor cores, in float64. While the other warps do so, the next diagonal tile's owner inverts
  // it: one barrier a sweep.
  //
  // A tile lies in a warp as tensor cores leave a sum: lane l holds entries 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
  // Such a tile serves as their left factor as it is, and transposed as their right factor, when the four terms of one
  // product are those of even columns, and of the next one those of odd columns.
  __device__ void factorise(const float* matrix, const float* excess, int n, const float* speed) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool owns = warp < kTiles;
    const int i = warp * kTile + lane / 4, first = 2 * (lane % 4);
    if (owns) {
      double sum = 0.0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = tile * kTile + first + c;
          const bool inside = i < n && j < n && i != j;
          inverse[tile][c] = inside ? static_cast<double>(matrix[packed(max(i, j), min(i, j))]) : 0.0;
          sum += inverse[tile][c];
        }
      }
      sum = quad_sum(sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (tile * kTile + first + c == i) inverse[tile][c] = i < n ? excess[i] - sum : 1.0;
        }
      }
      if (kTiles > 1) scratch->column[0][warp][lane] = make_double2(inverse[0][0], inverse[0][1]);
    }
    if (warp == 0) {
      double pivot[2] = {inverse[0][0], inverse[0][1]};
      invert_tile(pivot);
      if constexpr (kTiles == 1) {
        inverse[0][0] = pivot[0];
        inverse[0][1] = pivot[1];
      } else {
        scratch->pivot[0][lane] = make_double2(pivot[0], pivot[1]);
      }
    }
    // The row of tiles turns by one each sweep, so that the tile of column k comes first and registers have fixed
    // names.
#pragma unroll 1
    for (int k = 0; kTiles > 1 && k < kTiles; ++k) {
      sync();
      if (!owns) continue;
      const double2(*column)[kWarp] = scratch->column[k % 2];
      const double2 negated = scratch->pivot[k % 2][lane];
      const bool is_pivot = warp == k;
      double factor[2] = {0.0, 0.0};  // -A_ik P
      multiply_add(factor, inverse[0], negated);
      if (is_pivot) {
        factor[0] = -negated.x;
        factor[1] = -negated.y;
      }
#pragma unroll
      for (int turned = 1; turned < kTiles; ++turned) {
        const int j = k + turned < kTiles ? k + turned : k + turned - kTiles;
#pragma unroll
        for (int c = 0; c < 2; ++c) inverse[turned - 1][c] = is_pivot ? 0.0 : inverse[turned][c];
        multiply_add(inverse[turned - 1], factor, column[j][lane]);
        if (turned == 1 && k + 1 < kTiles) {
          scratch->column[(k + 1) % 2][warp][lane] = make_double2(inverse[0][0], inverse[0][1]);
          if (warp == k + 1) {
            double pivot[2] = {inverse[0][0], inverse[0][1]};
            invert_tile(pivot);
            scratch->pivot[(k + 1) % 2][lane] = make_double2(pivot[0], pivot[1]);
          }
        }
      }
      inverse[kTiles - 1][0] = -factor[0];
      inverse[kTiles - 1][1] = -factor[1];
    }
    // The border: with u = K^-1 s, the inverse is [[K^-1 - u u^T / s^T u, u / s^T u], [.., ..]].
    const auto by_speed = [&](double value, int j) {
      if constexpr (kSpeeds) return j < n ? value * speed[j] : 0.0;
      return value;
    };
    double own = 0.0;
    if (owns) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          inverse[tile][c] = -inverse[tile][c];
          const int j = tile * kTile + first + c;
          if (j < n) own += by_speed(inverse[tile][c], j);
        }
      }
      own = quad_sum(i < n ? own : 0.0);
      if (lane % 4 == 0) scratch->border[i] = own;
    }
    sync();
    if (owns) {
      double sum = 0.0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int j = tile * kTile + first;
        const double2 border = *reinterpret_cast<const double2*>(&scratch->border[j]);
        sum += by_speed(border.x, j) + by_speed(border.y, j + 1);
      }
      sum_of_border_inverse = reciprocal(quad_sum(sum));
      own *= sum_of_border_inverse;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const double2 border = *reinterpret_cast<const double2*>(&scratch->border[tile * kTile + first]);
        inverse[tile][0] -= own * border.x;
        inverse[tile][1] -= own * border.y;
      }
    }
  }

  // result [n + 1] = the inverse times [right_side, 0].
  __device__ void apply(const float* right_side, int n, float* result) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (warp >= kTiles) return;
    const int i = warp * kTile + lane / 4, first = 2 * (lane % 4);
    double sum[2] = {0.0, 0.0}, top[2] = {0.0, 0.0};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = tile * kTile + first + c;
        const double value = j < n ? right_side[j] : 0.0f;
        sum[c] += inverse[tile][c] * value;
        if (warp == kTiles - 1) top[c] += scratch->border[j] * value;
      }
    }
    const double step = quad_sum(sum[0] + sum[1]);
    if (lane % 4 == 0 && i < n) result[i] = static_cast<float>(step);
    if (warp == kTiles - 1) {
      const double step_top = quad_sum(top[0] + top[1]) * sum_of_border_inverse;
      if (lane == 0) result[n] = static_cast<float>(step_top);
    }
  }

  // tile <- minus its inverse, by symmetric sweeps of two columns at once.
  __device__ static void invert_tile(double (&tile)[2]) {
    const int lane = threadIdx.x % kWarp, row = lane / 4, pair = lane % 4;
#pragma unroll
    for (int k = 0; k < kTile; k += 2) {
      const int from_row = 4 * row + k / 2;
      const double left0 = shuffle(tile[0], from_row), left1 = shuffle(tile[1], from_row);  // A_rk, A_r,k+1
      const double p00 = shuffle(tile[0], 4 * k + k / 2), p01 = shuffle(tile[1], 4 * k + k / 2);
      const double p11 = shuffle(tile[1], 4 * k + 4 + k / 2);
      const double up0[2] = {shuffle(tile[0], 4 * k + pair), shuffle(tile[1], 4 * k + pair)};
      const double up1[2] = {shuffle(tile[0], 4 * k + 4 + pair), shuffle(tile[1], 4 * k + 4 + pair)};
      const double r = reciprocal(p00 * p11 - p01 * p01);
      const bool is0 = row == k, is1 = row == k + 1, at = is0 || is1;
      // The row of A_rk P, times the determinant; -P itself in the pivot's own rows.
      double t0 = left0 * p11 - left1 * p01, t1 = left1 * p00 - left0 * p01;
      t0 = (is0 ? -p11 : is1 ? p01 : t0) * r;
      t1 = (is0 ? p01 : is1 ? -p00 : t1) * r;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const double swept = (at ? 0.0 : tile[c]) - t0 * up0[c] - t1 * up1[c];
        tile[c] = pair == k / 2 ? (c == 0 ? t0 : t1) : swept;
      }
    }
  }

  // sum += left right^T, of tiles.
  __device__ static void multiply_add(double (&sum)[2], const double (&left)[2], const double2& right) {
    const double terms[2] = {right.x, right.y};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+d"(sum[0]), "+d"(sum[1])
          : "d"(left[half]), "d"(terms[half]));
    }
  }
  // Sum over four neighbouring lanes.
  __device__ static double quad_sum(double value) {
    value += __shfl_xor_sync(kFullWarp, value, 1);
    return value + __shfl_xor_sync(kFullWarp, value, 2);
  }
  __device__ static double shuffle(double value, int lane) { return __shfl_sync(kFullWarp, value, lane); }
  // From the hardware's 20 bits, one step of third order.
  __device__ static double reciprocal(double value) {
    double r;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(value));
    const double error = fma(-value, r, 1.0);
    return fma(r, fma(error, error, error), r);
  }
};

}  // namespace
}  // namespace lplb
