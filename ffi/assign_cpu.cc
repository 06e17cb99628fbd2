#include <algorithm>
#include <type_traits>
#include <vector>

#include "assign.h"

namespace lplb {
namespace {

// What a rank's tokens go through of an expert's shares, of which there are several.
void append_near(const Nearby& nearby, int expert, const std::vector<Share>& row, int count,
                 std::vector<NearShare>* shares) {
  std::vector<Part> parts(count);
  std::vector<Nearby::Own> own(count);
  const auto part = [&](int i) { return parts[i]; };
  for (int i = 0; i < count; ++i) parts[i] = {row[i].slot, row[i].quota, 0, 0};
  for (int i = 0; i < count; ++i) own[i] = nearby.on_rank(expert, part, count, i);
  for (int i = 0; i < count; ++i) parts[i].on_rank = own[i].taken;
  for (int i = 0; i < count; ++i) nearby.on_node(part, count, i, &own[i]);
  for (int i = 0; i < count; ++i) parts[i].on_node = own[i].taken;
  const size_t first = shares->size();
  shares->resize(first + count);
  for (int i = 0; i < count; ++i) {
    nearby.anywhere(part, count, i, &own[i]);
    (*shares)[first + own[i].place] = own[i].share(count);
  }
}

// By shares that are Share, or NearShare.
template <class Kind>
void assign_by(const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  constexpr bool kNear = std::is_same_v<Kind, NearShare>;
  const int experts = shape.count.num_experts, replicas = shape.max_replicas;
  const int slots_per_rank = shape.num_physical / shape.num_ranks;
  std::vector<uint32_t> next(experts);
  std::vector<size_t> first(experts);
  std::vector<Share> row(replicas);
  std::vector<Kind> shares;
  for (int64_t batch = 0; batch < shape.count.num_batches; ++batch) {
    const int32_t* ids = in.expert_ids + batch * shape.count.num_ids;
    int32_t* sums = out.rank_load + batch * shape.num_ranks;
    std::fill_n(sums, shape.num_ranks, 0);
    shares.clear();
    for (int e = 0; e < experts; ++e) {
      const int64_t expert = batch * experts + e;
      next[e] = kNear ? 0 : static_cast<uint32_t>(std::max(0, in.offset[expert]));
      first[e] = shares.size();
      const auto read = [&](int r) {
        return Replica{in.split[expert * replicas + r], in.log2phy[expert * replicas + r]};
      };
      const int count = write_shares(read, replicas, shape.num_physical, in.load[expert], row.data());
      const Share* share = row.data();
      for_each_quota([&] { return *share++; },
                     [&](int32_t slot, uint32_t quota) {
                       int32_t& sum = sums[slot / slots_per_rank];
                       sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + quota);  // wraps, as on CUDA
                     });
      if constexpr (kNear) {
        if (count > 1) {
          append_near(Nearby(shape, in, batch, in.rank[batch]), e, row, count, &shares);
        } else {
          shares.push_back({row[0], 0});
        }
      } else {
        shares.insert(shares.end(), row.begin(), row.begin() + count);
      }
    }
    // All ids in one run: the chunks' starts are what it has counted when it reaches them.
    for (int64_t i = 0; i < shape.count.num_ids; ++i) {
      const int32_t e = ids[i];
      int32_t slot = -1;
      if (e >= 0 && e < experts) {
        const Kind* share = &shares[first[e]];
        slot = choose_slot([&] { return *share++; }, next[e]++);
      }
      out.physical_ids[batch * shape.count.num_ids + i] = slot;
    }
  }
}

}  // namespace

void assign_cpu(const AssignShape& shape, const AssignOperands& in, const AssignResults& out) {
  if (shape.ranks_per_node > 0) {
    assign_by<NearShare>(shape, in, out);
  } else {
    assign_by<Share>(shape, in, out);
  }
}

}  // namespace lplb
