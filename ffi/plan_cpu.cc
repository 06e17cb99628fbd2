#include <algorithm>
#include <memory>

#include "plan.h"

namespace lplb {
namespace {

struct SerialBlock {
  bool first() const { return true; }
  void sync() const {}
  template <class F>
  void each_of(int count, F visit) const {
    for (int i = 0; i < count; ++i) visit(i);
  }
  void add(uint32_t* target, uint32_t value) const { *target += value; }
  uint32_t sum(uint32_t mine) const { return mine; }
  template <class F>
  void read(const int32_t* values, int count, F visit) const {
    for (int i = 0; i < count; ++i) visit(i, values[i]);
  }
  void fill(int count, int32_t* values, int32_t value, int32_t* others, int32_t other) const {
    std::fill_n(values, count, value);
    std::fill_n(others, count, other);
  }
  template <class F>
  void each_rank(int num_ranks, int per_rank, F load, uint32_t* home, Largest* largest) const {
    for (int g = 0; g < num_ranks; ++g) {
      home[g] = 0;
      largest[g] = {0, g * per_rank};
      for (int e = g * per_rank; e < (g + 1) * per_rank; ++e) {
        const uint32_t tokens = load(e);
        home[g] += tokens;
        largest[g].take(tokens, e);
      }
    }
  }
  template <class Holds, class F>
  void count_ranks(int num_ranks, Holds holds, F visit) const {
    for (int g = 0; g < num_ranks; ++g) {
      int count = 0;
      for (int h = 0; h < num_ranks; ++h) count += holds(g, h);
      visit(g, count);
    }
  }
};

// All lanes at once.
struct SerialWarp : SerialBlock {
  struct Word {
    uint32_t of[kMaxGroupRanks];
  };
  int num_ranks;
  int fewest_copies = kMaxGroupSlots;

  explicit SerialWarp(int num_ranks) : num_ranks(num_ranks) {}
  void announce(int num_copies) { fewest_copies = std::min(fewest_copies, num_copies); }
  int fewest() const { return fewest_copies; }
  uint32_t* writable(const uint32_t* tokens, int count, uint32_t* copy) const {
    std::copy_n(tokens, count, copy);
    return copy;
  }
  template <class F>
  void each_rank(F visit) const {
    for (int g = 0; g < num_ranks; ++g) visit(g, g, true);
  }
  int keep(int value) const { return value; }
  bool any(bool holds) const { return holds; }
  template <class F>
  int count(F holds) const {
    int count = 0;
    for (int g = 0; g < num_ranks; ++g) count += holds(g, g);
    return count;
  }
  uint32_t get(const Word& word, int rank) const { return word.of[rank]; }
  Word gather(const Word& word, const Word& ranks) const {
    Word gathered;
    for (int g = 0; g < num_ranks; ++g) gathered.of[g] = word.of[ranks.of[g]];
    return gathered;
  }
  template <class F>
  uint32_t largest(F key) const {
    uint32_t largest = 0;
    for (int g = 0; g < num_ranks; ++g) largest = std::max<uint32_t>(largest, key(g, g));
    return largest;
  }
  uint32_t most(const Word& word) const {
    return largest([&](int k, int) { return word.of[k]; });
  }
  Largest own_largest(const uint32_t* tokens, int first, int count) const {
    Largest largest = {0, first};
    for (int e = first; e < first + count; ++e) largest.take(tokens[e], e);
    return largest;
  }
  void replace(uint32_t* tokens, int first, int count, const Largest& by, Largest& own) const {
    tokens[by.expert] = by.tokens;
    own = own_largest(tokens, first, count);
  }
  Largest largest(const Largest& own) const { return own; }
};

template <bool kBySpeed>
void plan_groups(const PlanShape& shape, const PlanOperands& in, const PlanResults& out) {
  const std::unique_ptr<char[]> memory(new char[PlanMemory::bytes(shape)]);
  const std::unique_ptr<uint32_t[]> of_experts(new uint32_t[2 * shape.num_experts()]);
  const std::unique_ptr<uint32_t[]> of_ranks(new uint32_t[shape.solve.group_size]);
  const std::unique_ptr<Largest[]> largest(new Largest[shape.solve.group_size]);
  const std::unique_ptr<Giver[]> busiest(new Giver[shape.solve.group_size]);
  for (int batch = 0; batch < shape.solve.num_batches; ++batch) {
    for (int group = 0; group < shape.solve.num_groups; ++group) {
      const PlanLoads loads = {
          of_experts.get(), of_experts.get() + shape.num_experts(), of_ranks.get(), largest.get(), busiest.get(), 0, 1};
      PlanGroup<SerialBlock, kBySpeed> of_group(SerialBlock(), shape, in, out, batch, group, loads);
      of_group.read();
      of_group.clear();
      Planner<SerialWarp, kBySpeed> planner(SerialWarp(shape.solve.group_size), shape, of_group.loads(),
                                            PlanMemory(memory.get(), shape));
      if (!of_group.stays_at_home()) {
        for (int c = 0; c < shape.num_candidates; ++c) planner.attempt(c);
      }
      of_group.write(planner.best(), planner.copies_of_best());
    }
  }
}

}  // namespace

void plan_cpu(const PlanShape& shape, const PlanOperands& in, const PlanResults& out) {
  return shape.solve.by_speed ? plan_groups<true>(shape, in, out) : plan_groups<false>(shape, in, out);
}

}  // namespace lplb
