// Launchers of the balancing solve, by either algorithm. Raw pointers, no framework.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

constexpr int kMaxGroupRanks = 128;
constexpr int kMaxGroupSlots = 2048;
// Of edge balance, whose ranks are the lanes of a warp.
constexpr int kMaxEdgeRanks = 32;
constexpr int kMaxColours = 16;

// Mirrors jax_lplb.Status.
enum Status : int32_t { kConverged = 0, kMaxIterations = 1, kEvenSplit = 2, kSkipped = 3 };

struct SolveShape {
  int num_batches;   // independent problems: layers under vmap
  int num_experts;   // logical experts, all groups
  int num_physical;  // slots, all groups
  int max_replicas;  // columns of log2phy
  int num_groups;    // groups of ranks, each with slots of its own
  int group_size;    // ranks of a group
  int slots_per_rank;
  uint32_t rank_of_slot;  // see rank_factor
  int max_variables;      // replicas of replicated experts, at most, in a group
  float tol;              // relative gap to stop at
  int max_iterations;
  float threshold;  // load stays at home where the largest rank load is at most this times the mean; 0: never
  bool by_speed;    // whether ranks have speeds, see SolveOperands
  // Whether the results hold a split and its certificate already, a plan's (see plan.h): solved are then only groups
  // with status kMaxIterations, from that split on, which stays where no better one is found.
  bool planned;
};

// A factor that turns division by slots_per_rank into slot * factor >> kRankShift, exact for all slots of a group.
constexpr int kRankShift = 22;
static_assert(kMaxGroupSlots * kMaxGroupSlots <= 1 << kRankShift, "else it is not exact");
inline uint32_t rank_factor(int slots_per_rank) { return ((1u << kRankShift) + slots_per_rank - 1) / slots_per_rank; }

// Edges of one colour touch no common rank.
struct EdgeColouring {
  int num_colours;
  uint32_t neighbours[kMaxEdgeRanks];  // bit masks of the ranks at the other ends of a rank's edges
  uint8_t partner[kMaxColours]
                 [kMaxEdgeRanks];  // at the other end of a rank's edge of a colour; itself where it has none
};

struct SolveOperands {
  const int32_t* load;     // [batch, num_experts] tokens
  const int32_t* log2phy;  // [batch, num_experts, max_replicas], padded with -1
  // [batch, 2, num_groups * group_size] speeds of ranks, positive, and their inverses; nullptr where all are 1. What
  // becomes as small as it can is the largest load / speed. See jax_lplb/_speed.py.
  const float* speed = nullptr;
};

// Those of a group.
LPLB_DEVICE const float* speeds_of_group(const SolveShape& shape, const float* speed, int batch, int group) {
  const int64_t row = static_cast<int64_t>(batch) * 2 * shape.num_groups + group;
  return speed == nullptr ? nullptr : speed + row * shape.group_size;
}
LPLB_DEVICE const float* inverses_of_group(const SolveShape& shape, const float* speeds) {
  return speeds + static_cast<int64_t>(shape.num_groups) * shape.group_size;
}

struct SolveResults {
  float* fraction;      // [batch, num_experts, max_replicas] of the expert's load; 0 in padding
  float* rank_load;     // [batch, num_groups * group_size] tokens
  float* gap;           // [batch, num_groups] certified relative gap
  int32_t* iterations;  // [batch, num_groups]
  int32_t* status;      // [batch, num_groups] Status
};

// The shares of tokens that are assigned by the split, where the solve makes them: see AssignResults and makes_shares.
struct SolveShares {
  const int32_t* load = nullptr;  // [batch, num_experts] of these tokens
  int32_t* memory = nullptr;      // nullptr: none are wanted
  uint32_t room = 0;              // for so many
};

// nullptr where the shape can be solved, else what is wrong with it.
inline const char* check(const SolveShape& s) {
  if (s.num_experts < 1 || s.max_replicas < 1) return "solve: log2phy has at least one row and one column";
  if (s.group_size < 1 || s.group_size > kMaxGroupRanks) return "solve: a group has 1 to 128 ranks";
  if (s.slots_per_rank < 1 || s.group_size * s.slots_per_rank > kMaxGroupSlots) {
    return "solve: a group has 1 to 2048 physical experts";
  }
  if (s.num_physical != s.num_groups * s.group_size * s.slots_per_rank) {
    return "solve: num_physical must be num_groups * group_size * slots_per_rank";
  }
  return nullptr;
}

// The most replicas of replicated experts that fit: every redundant slot, and as many homes.
inline int max_variables(int num_experts, int num_physical, int num_groups) {
  const int slots = num_physical / num_groups;
  const int redundant = (num_physical - num_experts) / num_groups;
  return redundant < 0 ? 0 : 2 * redundant < slots ? 2 * redundant : slots;
}

// nullptr where edge balance can solve the shape, with the partners [colours * group_size] as given; fills `out`.
inline const char* check_edges(const SolveShape& s, const int32_t* partners, size_t num_partners, EdgeColouring* out) {
  if (const char* wrong = check(s); wrong != nullptr) return wrong;
  if (s.group_size > kMaxEdgeRanks) return "edge_balance: a group has at most 32 ranks";
  if (s.max_replicas != 2) return "edge_balance: log2phy has two columns";
  const size_t size = s.group_size;
  if (num_partners % size != 0 || num_partners > kMaxColours * size) {
    return "edge_balance: partners must have shape [colours, group_size], of at most 16 colours";
  }
  out->num_colours = static_cast<int>(num_partners / size);
  uint32_t met[kMaxEdgeRanks] = {};
  for (int colour = 0; colour < kMaxColours; ++colour) {
    for (int rank = 0; rank < kMaxEdgeRanks; ++rank) out->partner[colour][rank] = static_cast<uint8_t>(rank);
    if (colour >= out->num_colours) continue;
    const int32_t* partner = partners + colour * size;
    for (int rank = 0; rank < s.group_size; ++rank) {
      const int32_t other = partner[rank];
      if (other < 0 || other >= s.group_size || partner[other] != rank) {
        return "edge_balance: partners of a colour must be pairs of ranks";
      }
      if (other == rank) continue;
      if (met[rank] >> other & 1) return "edge_balance: an edge must have one colour";
      met[rank] |= 1u << other;
      out->partner[colour][rank] = static_cast<uint8_t>(other);
    }
  }
  for (int rank = 0; rank < kMaxEdgeRanks; ++rank) out->neighbours[rank] = met[rank];
  return nullptr;
}

void solve_cpu(const SolveShape& shape, const SolveOperands& in, const SolveResults& out);
void edge_balance_cpu(const SolveShape& shape, const EdgeColouring& colouring, const SolveOperands& in,
                      const SolveResults& out);

#ifdef LPLB_CUDA
// Lets the kernels use more than 48 KB of shared memory; once for each device, outside of stream capture.
cudaError_t prepare_solve_cuda();
// Whether the solve's thread block can make shares: all of them, that is where there is one group.
bool makes_shares(const SolveShape& shape);
// One thread block for each group and batch.
cudaError_t solve_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in, const SolveResults& out,
                       const SolveShares& shares = {});
// As solve_cuda, of a shape that is `planned`, where the launch before this one on the stream is that of the plan.
cudaError_t solve_after_plan_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                                  const SolveResults& out, const SolveShares& shares = {});
// As solve_cuda, never with a library's factorisation.
cudaError_t solve_plain_cuda(cudaStream_t stream, const SolveShape& shape, const SolveOperands& in,
                             const SolveResults& out, const SolveShares& shares = {});
cudaError_t edge_balance_cuda(cudaStream_t stream, const SolveShape& shape, const EdgeColouring& colouring,
                              const SolveOperands& in, const SolveResults& out);
#endif

}  // namespace lplb
