#include <algorithm>
#include <vector>

#include "assign.h"

namespace lplb {

void assign_cpu(const AssignShape& shape, const AssignOperands& in, int32_t* physical_ids, int32_t* rank_load) {
  const int experts = shape.count.num_experts, replicas = shape.max_replicas;
  const int slots_per_rank = shape.num_physical / shape.num_ranks;
  const size_t row = StoredShares::size(replicas);
  std::vector<uint32_t> next(experts), stored(experts * row);
  for (int64_t batch = 0; batch < shape.count.num_batches; ++batch) {
    const int32_t* ids = in.expert_ids + batch * shape.count.num_ids;
    const int32_t* load = in.load + batch * experts;
    const float* split = in.split + batch * experts * replicas;
    const int32_t* log2phy = in.log2phy + batch * experts * replicas;
    const auto slot_of = [&](int e, int replica) {
      const int32_t slot = log2phy[e * replicas + replica];
      return Quotas::is_slot(slot, shape.num_physical) ? slot : -1;
    };

    int32_t* sums = rank_load + batch * shape.num_ranks;
    std::fill_n(sums, shape.num_ranks, 0);
    for (int e = 0; e < experts; ++e) {
      next[e] = static_cast<uint32_t>(std::max(0, in.offset[batch * experts + e]));
      const Quotas quotas(split + e * replicas, log2phy + e * replicas, replicas, shape.num_physical, load[e]);
      StoredShares::store(quotas, &stored[e * row]);
      quotas.each([&](int, int32_t slot, uint32_t quota) {
        int32_t& sum = sums[slot / slots_per_rank];
        sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + quota);  // wraps, as on CUDA
      });
    }
    // All ids in one run: the chunks' starts are what it has counted when it reaches them.
    for (int64_t i = 0; i < shape.count.num_ids; ++i) {
      const int32_t e = ids[i];
      physical_ids[batch * shape.count.num_ids + i] =
          e >= 0 && e < experts ? slot_of(e, choose_replica(StoredShares(&stored[e * row], replicas), next[e]++)) : -1;
    }
  }
}

}  // namespace lplb
