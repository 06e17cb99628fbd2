#include <algorithm>
#include <memory>

#include "edge_balance.h"

namespace lplb {
namespace {

struct SerialBlock {
  static constexpr int kThreads = 1;

  int thread() const { return 0; }
  void zero(uint32_t* words, int count) const { std::fill_n(words, count, 0u); }
  void add(uint32_t* target, uint32_t value) const { *target += value; }
  void largest(uint32_t* target, uint32_t value) const { *target = std::max(*target, value); }
  void add_by_rank(uint32_t* targets, int rank, bool counts, uint32_t value) const {
    if (counts) targets[rank] += value;
  }
  void read_pair(const int32_t* pair, int32_t* first, int32_t* second) const {
    *first = pair[0];
    *second = pair[1];
  }
  void write_pair(float* pair, float first, float second) const {
    pair[0] = first;
    pair[1] = second;
  }
  float divide(float a, float b) const { return a / b; }
};

// A value of each lane.
struct Lanes {
  uint32_t lane[kMaxEdgeRanks];
};

template <class F>
Lanes each_lane(F value) {
  Lanes result;
  for (int i = 0; i < kMaxEdgeRanks; ++i) result.lane[i] = value(i);
  return result;
}
Lanes operator+(const Lanes& a, const Lanes& b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
Lanes operator-(const Lanes& a, const Lanes& b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
Lanes operator*(const Lanes& a, const Lanes& b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
Lanes operator-(uint32_t a, const Lanes& b) {
  return each_lane([&](int i) { return a - b.lane[i]; });
}
Lanes operator<<(const Lanes& a, int shift) {
  return each_lane([&](int i) { return a.lane[i] << shift; });
}
Lanes operator>>(const Lanes& a, int shift) {
  return each_lane([&](int i) { return a.lane[i] >> shift; });
}

template <bool kSpeeds>
struct SerialWarp {
  using Word = Lanes;
  static constexpr bool kBySpeed = kSpeeds;
  static constexpr int kColours = kMaxColours;

  const EdgeColouring& colouring;

  int num_colours() const { return colouring.num_colours; }
  template <class F>
  void each_rank(Lanes& words, F visit) const {
    for (int g = 0; g < kMaxEdgeRanks; ++g) visit(g, words.lane[g]);
  }
  template <class F>
  void each_edge(int colour, Lanes& words, F visit) const {
    for (int g = 0; g < kMaxEdgeRanks; ++g) visit(g, colouring.partner[colour][g], words.lane[g]);
  }
  template <class F>
  Lanes zip(const Lanes& a, const Lanes& b, F of) const {
    return each_lane([&](int i) { return of(a.lane[i], b.lane[i]); });
  }
  Lanes partner(int colour, const Lanes& words) const {
    return each_lane([&](int i) { return words.lane[colouring.partner[colour][i]]; });
  }
  Lanes sign(int colour) const {
    return each_lane([&](int i) { return i < colouring.partner[colour][i] ? 1u : ~0u; });
  }
  Lanes shift_right(const Lanes& words, int shift) const {
    return each_lane([&](int i) { return static_cast<uint32_t>(static_cast<int32_t>(words.lane[i]) >> shift); });
  }
  Lanes clamp(const Lanes& words, const Lanes& most) const {
    return each_lane([&](int i) {
      return static_cast<uint32_t>(
          std::max(std::min(static_cast<int32_t>(words.lane[i]), static_cast<int32_t>(most.lane[i])), 0));
    });
  }
  uint32_t largest(const Lanes& words) const {
    int32_t most = static_cast<int32_t>(words.lane[0]);
    for (const uint32_t word : words.lane) most = std::max(most, static_cast<int32_t>(word));
    return static_cast<uint32_t>(most);
  }
  uint32_t sum(uint32_t set, const Lanes& words) const {
    uint32_t result = 0;
    for (int i = 0; i < kMaxEdgeRanks; ++i) result += (set >> i & 1) != 0 ? words.lane[i] : 0;
    return result;
  }
  uint32_t at_least(const Lanes& words, uint32_t bound) const {
    uint32_t set = 0;
    for (int i = 0; i < kMaxEdgeRanks; ++i) {
      const bool is = static_cast<int32_t>(words.lane[i]) >= static_cast<int32_t>(bound);
      set |= static_cast<uint32_t>(is) << i;
    }
    return set;
  }
  int count(uint32_t set) const {
    int result = 0;
    for (; set != 0; set &= set - 1) ++result;
    return result;
  }
  Lanes leaving(int colour, uint32_t set, const Lanes& share) const {
    return each_lane([&](int i) { return (set >> colouring.partner[colour][i] & 1) != 0 ? 0 : share.lane[i]; });
  }
  float divide(float a, float b) const { return a / b; }
};

}  // namespace

void edge_balance_cpu(const SolveShape& shape, const EdgeColouring& colouring, const SolveOperands& in,
                      const SolveResults& out) {
  const std::unique_ptr<uint32_t[]> by_slot(new uint32_t[edge_slot_words(shape)]);
  EdgeShared shared;
  const SerialBlock block;
  for (int batch = 0; batch < shape.num_batches; ++batch) {
    for (int group = 0; group < shape.num_groups; ++group) {
      const EdgeBalance solver(shape, in, out, batch, group, shared, by_slot.get());
      solver.clear(block, [&](int g) { return colouring.neighbours[g]; });
      bool replicated = false;
      for (int e = 0; e < shape.num_experts; ++e) replicated |= solver.collect(block, solver.read(block, e));
      const auto solve = [&](const auto& warp) {
        auto outcome = solver.solve(warp, replicated);
        solver.report(warp, outcome);
      };
      if (shape.by_speed) {
        solve(SerialWarp<true>{colouring});
      } else {
        solve(SerialWarp<false>{colouring});
      }
      for (int e = 0; e < shape.num_experts; ++e) solver.write(block, e, solver.read(block, e));
    }
  }
}

}  // namespace lplb
