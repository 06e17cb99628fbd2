#include <algorithm>
#include <vector>

#include "assign.h"

namespace lplb {

void assign_cpu(const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  const int experts = shape.count.num_experts, replicas = shape.max_replicas;
  const int slots_per_rank = shape.num_physical / shape.num_ranks;
  std::vector<uint32_t> next(experts);
  std::vector<size_t> first(experts);
  std::vector<Share> shares;
  for (int64_t batch = 0; batch < shape.count.num_batches; ++batch) {
    const int32_t* ids = in.expert_ids + batch * shape.count.num_ids;
    int32_t* sums = out.rank_load + batch * shape.num_ranks;
    std::fill_n(sums, shape.num_ranks, 0);
    shares.clear();
    for (int e = 0; e < experts; ++e) {
      const int64_t expert = batch * experts + e;
      next[e] = static_cast<uint32_t>(std::max(0, in.offset[expert]));
      first[e] = shares.size();
      shares.resize(first[e] + replicas);
      const auto read = [&](int r) {
        return Replica{in.split[expert * replicas + r], in.log2phy[expert * replicas + r]};
      };
      shares.resize(first[e] + write_shares(read, replicas, shape.num_physical, in.load[expert], &shares[first[e]]));
      const Share* share = &shares[first[e]];
      for_each_quota([&] { return *share++; },
                     [&](int32_t slot, uint32_t quota) {
                       int32_t& sum = sums[slot / slots_per_rank];
                       sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + quota);  // wraps, as on CUDA
                     });
    }
    // All ids in one run: the chunks' starts are what it has counted when it reaches them.
    for (int64_t i = 0; i < shape.count.num_ids; ++i) {
      const int32_t e = ids[i];
      int32_t slot = -1;
      if (e >= 0 && e < experts) {
        const Share* share = &shares[first[e]];
        slot = choose_slot([&] { return *share++; }, next[e]++);
      }
      out.physical_ids[batch * shape.count.num_ids + i] = slot;
    }
  }
}

}  // namespace lplb
