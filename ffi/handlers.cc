// XLA FFI handlers of count, solve, assign and peers' memory: they check shapes, which Python has already checked for
// its own callers, and launch. All leading dimensions of an operand but its own are batch dimensions (vmap).
//
// The CUDA handlers carry kCmdBufferCompatible: while executing they only launch kernels. Three do more, ShareCuda,
// BeginRowsCuda and FinishRowsCuda.
#include "handlers.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "assign.h"
#include "count.h"
#include "dispatch.h"
#include "handover.h"
#include "peer.h"
#include "plan_solve.h"
#include "solve.h"
#include "solve_assign.h"
#include "xla/ffi/api/ffi.h"
#ifdef LPLB_CUDA
#include "fork.h"
#include "gather.h"
#endif

namespace lplb {
namespace {

namespace ffi = xla::ffi;
using Ids = ffi::Buffer<ffi::S32>;
using Reals = ffi::Buffer<ffi::F32>;
using Words = ffi::Buffer<ffi::U32>;

// What a launcher returns: nothing on CPU, the launch's error on CUDA.
#ifdef LPLB_CUDA
ffi::Error check_launch(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(name) + ": " + cudaGetErrorString(error));
}
#endif

// Reads shapes and remembers the first thing that is wrong with them. Messages are made only then: handlers run at
// every call, and allocate nothing.
class Shapes {
 public:
  explicit Shapes(const char* call) : call_(call) {}

  // The last `rank` dimensions of an operand; those before them are the batch, the same for all operands.
  template <class Buffer>
  const int64_t* last(const char* operand, const Buffer& buffer, size_t rank) {
    static constexpr int64_t kNone[3] = {0, 0, 0};
    const auto dimensions = buffer.dimensions();
    if (dimensions.size() < rank) {
      fail(operand, "rank", static_cast<int64_t>(rank), static_cast<int64_t>(dimensions.size()));
      return kNone;
    }
    int64_t batch = 1;
    for (size_t i = 0; i + rank < dimensions.size(); ++i) batch *= dimensions[i];
    if (batch_ < 0) batch_ = batch;
    expect(operand, "batch", batch_, batch);
    const int64_t* last = dimensions.begin() + (dimensions.size() - rank);
    for (size_t i = 0; i < rank; ++i) {
      if (last[i] > std::numeric_limits<int32_t>::max()) fail(operand, "at most 2147483647", 0, last[i]);
    }
    return last;
  }
  void expect(const char* operand, const char* what, int64_t expected, int64_t got) {
    if (expected != got) fail(operand, what, expected, got);
  }
  // message() says what is wrong.
  template <class Message>
  void require(bool holds, Message message) {
    if (!holds && message_.empty()) message_ = std::string(call_) + ": " + message();
  }
  int batch() const { return static_cast<int>(batch_); }
  bool ok() {
    // The batch is a grid's y dimension on CUDA.
    require(batch_ <= 65535, [&] { return "at most 65535 batch elements, got " + std::to_string(batch_); });
    return message_.empty();
  }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  void fail(const char* operand, const char* what, int64_t expected, int64_t got) {
    require(false, [&] {
      return std::string(operand) + ": expected " + what + " " + std::to_string(expected) + ", got " +
             std::to_string(got);
    });
  }
  const char* call_;
  int64_t batch_ = -1;
  std::string message_;
};

CountShape count_shape(Shapes& shapes, const Ids& expert_ids, const Ids& starts, int64_t chunk_size, int64_t num_sms) {
  CountShape shape;
  shape.num_ids = shapes.last("expert_ids", expert_ids, 1)[0];
  const int64_t* chunks = shapes.last("starts", starts, 2);
  shape.num_chunks = static_cast<int>(chunks[0]);
  shape.num_experts = static_cast<int>(chunks[1]);
  shape.chunk_size = chunk_size;
  shape.num_batches = shapes.batch();
  shape.num_sms = static_cast<int>(std::min<int64_t>(num_sms, std::numeric_limits<int>::max()));
  shapes.require(num_sms >= 0, [&] { return "num_sms " + std::to_string(num_sms) + " is negative"; });
  shapes.require(shape.num_experts >= 1 && shape.num_experts <= kMaxExperts, [&] {
    return "at most " + std::to_string(kMaxExperts) + " experts, got " + std::to_string(chunks[1]);
  });
  shapes.require(chunk_size >= 4 && chunk_size <= kMaxChunk && chunk_size % 4 == 0, [&] {
    return "chunk_size must be a multiple of 4 up to " + std::to_string(kMaxChunk) + ", got " +
           std::to_string(chunk_size);
  });
  shapes.require(chunks[0] >= 1 && chunks[0] * chunk_size >= shape.num_ids, [&] {
    return std::to_string(chunks[0]) + " chunks of " + std::to_string(chunk_size) + " do not hold " +
           std::to_string(shape.num_ids) + " ids";
  });
  return shape;
}

template <class Launch>
ffi::Error count(Launch launch, Ids expert_ids, ffi::Result<Ids> load, ffi::Result<Ids> starts, int64_t chunk_size,
                 int64_t num_sms) {
  Shapes shapes("count");
  const CountShape shape = count_shape(shapes, expert_ids, *starts, chunk_size, num_sms);
  shapes.expect("load", "num_experts", shape.num_experts, shapes.last("load", *load, 1)[0]);
  if (!shapes.ok()) return shapes.error();
  return launch(shape, expert_ids.typed_data(), load->typed_data(), starts->typed_data());
}

// The speeds of ranks and their inverses, the first of the operands that may be absent, where `speeds` is 1; `shape` is
// told.
const float* read_speed(Shapes& shapes, const ffi::RemainingArgs& rest, size_t speeds, SolveShape& shape) {
  shape.by_speed = speeds > 0;
  if (speeds == 0) return nullptr;
  const auto values = rest.get<Reals>(0);
  shapes.require(speeds == 1 && values.has_value(), [] { return "speed: one operand of float32"; });
  if (!values.has_value()) return nullptr;
  const int64_t* table = shapes.last("speed", *values, 2);
  shapes.expect("speed", "rows", 2, table[0]);
  shapes.expect("speed", "num_ranks", shape.num_groups * shape.group_size, table[1]);
  return values->typed_data();
}

// A solve's shape, operands and results, read off its buffers.
struct Solve {
  SolveShape shape;
  bool along_edges;  // by edge balance, else by the interior-point method
  EdgeColouring colouring;
  SolveOperands in;
  SolveResults out;

  const EdgeColouring* edges() const { return along_edges ? &colouring : nullptr; }
};

// Appends to `shapes` what is wrong with them.
Solve read_solve(Shapes& shapes, const Ids& load, const Ids& log2phy, ffi::Result<Reals>& fraction,
                 ffi::Result<Reals>& rank_load, ffi::Result<Reals>& gap, ffi::Result<Ids>& iterations,
                 ffi::Result<Ids>& status, int64_t num_physical, float tol, float threshold, int64_t max_iterations,
                 ffi::Span<const int32_t> partners) {
  Solve solve = {};
  SolveShape& shape = solve.shape;
  const int64_t* table = shapes.last("log2phy", log2phy, 2);
  shape.num_experts = static_cast<int>(table[0]);
  shape.max_replicas = static_cast<int>(table[1]);
  shape.num_physical = static_cast<int>(num_physical);
  const int64_t ranks = shapes.last("rank_load", *rank_load, 1)[0];
  const int64_t groups = shapes.last("gap", *gap, 1)[0];
  shapes.expect("load", "num_experts", shape.num_experts, shapes.last("load", load, 1)[0]);
  const int64_t* split = shapes.last("fraction", *fraction, 2);
  shapes.expect("fraction", "num_experts", shape.num_experts, split[0]);
  shapes.expect("fraction", "max_replicas", shape.max_replicas, split[1]);
  shapes.expect("iterations", "num_groups", groups, shapes.last("iterations", *iterations, 1)[0]);
  shapes.expect("status", "num_groups", groups, shapes.last("status", *status, 1)[0]);
  shapes.require(groups >= 1 && ranks >= 1 && ranks % groups == 0 && shape.num_physical % ranks == 0,
                 [] { return "num_groups must divide the ranks, and the ranks num_physical"; });
  if (!shapes.ok()) return solve;
  shape.num_batches = shapes.batch();
  shape.num_groups = static_cast<int>(groups);
  shape.group_size = static_cast<int>(ranks / groups);
  shape.slots_per_rank = static_cast<int>(shape.num_physical / ranks);
  shape.rank_of_slot = rank_factor(shape.slots_per_rank);
  shape.max_variables = max_variables(shape.num_experts, shape.num_physical, shape.num_groups);
  shape.tol = tol;
  shape.max_iterations = static_cast<int>(max_iterations);
  shape.threshold = threshold;
  const char* wrong =
      partners.size() == 0 ? check(shape) : check_edges(shape, partners.begin(), partners.size(), &solve.colouring);
  shapes.require(wrong == nullptr, [&] { return wrong; });
  solve.along_edges = partners.size() > 0;
  solve.in = {load.typed_data(), log2phy.typed_data()};
  solve.out = {fraction->typed_data(), rank_load->typed_data(), gap->typed_data(), iterations->typed_data(),
               status->typed_data()};
  return solve;
}

template <class Launch>
ffi::Error solve(Launch launch, Ids load, Ids log2phy, ffi::RemainingArgs speed, ffi::Result<Reals> fraction,
                 ffi::Result<Reals> rank_load, ffi::Result<Reals> gap, ffi::Result<Ids> iterations,
                 ffi::Result<Ids> status, int64_t num_physical, float tol, float threshold, int64_t max_iterations,
                 ffi::Span<const int32_t> partners) {
  Shapes shapes("solve");
  Solve solve = read_solve(shapes, load, log2phy, fraction, rank_load, gap, iterations, status, num_physical, tol,
                           threshold, max_iterations, partners);
  solve.in.speed = read_speed(shapes, speed, speed.size(), solve.shape);
  if (!shapes.ok()) return shapes.error();
  return launch(solve.shape, solve.edges(), solve.in, solve.out);
}

// A plan's shape, operands and results, read off its buffers.
struct Plan {
  PlanShape shape;
  PlanOperands in;
  PlanResults out;
};

// Appends to `shapes` what is wrong with them. `candidates`: a limit's slack and a rule for each.
Plan read_plan(Shapes& shapes, const Ids& load, const Ids& least, ffi::Result<Ids>& phy2log, ffi::Result<Ids>& log2phy,
               ffi::Result<Reals>& fraction, ffi::Result<Reals>& rank_load, ffi::Result<Reals>& gap,
               ffi::Result<Ids>& iterations, ffi::Result<Ids>& status, float tol, float threshold,
               int64_t max_iterations, float slack, int64_t max_sends, ffi::Span<const float> slacks,
               ffi::Span<const int32_t> rules) {
  Plan plan = {};
  const int64_t num_physical = shapes.last("phy2log", *phy2log, 1)[0];
  shapes.last("least", least, 0);
  const Solve solve = read_solve(shapes, load, *log2phy, fraction, rank_load, gap, iterations, status, num_physical,
                                 tol, threshold, max_iterations, {});
  shapes.require(slacks.size() == rules.size() && slacks.size() <= kMaxCandidates,
                 [] { return "a rule for each of 16 slacks"; });
  if (!shapes.ok()) return plan;
  plan.shape.solve = solve.shape;
  plan.shape.experts_per_rank = solve.shape.num_experts / (solve.shape.num_groups * solve.shape.group_size);
  plan.shape.rank_of_expert = rank_factor(std::max(plan.shape.experts_per_rank, 1));
  plan.shape.max_sends = static_cast<int>(std::min<int64_t>(max_sends, std::numeric_limits<int>::max()));
  plan.shape.slack = slack;
  plan.shape.num_candidates = static_cast<int>(slacks.size());
  for (size_t i = 0; i < slacks.size(); ++i) {
    plan.shape.candidates[i] = Candidate::make(slacks.begin()[i], rules.begin()[i]);
  }
  const char* wrong = check(plan.shape);
  shapes.require(wrong == nullptr, [&] { return wrong; });
  plan.in = {load.typed_data(), least.typed_data()};
  plan.out = {phy2log->typed_data(), log2phy->typed_data(), solve.out};
  return plan;
}

template <class Launch>
ffi::Error plan(Launch launch, Ids load, Ids least, ffi::RemainingArgs speed, ffi::Result<Ids> phy2log,
                ffi::Result<Ids> log2phy, ffi::Result<Reals> fraction, ffi::Result<Reals> rank_load,
                ffi::Result<Reals> gap, ffi::Result<Ids> iterations, ffi::Result<Ids> status, float tol,
                float threshold, int64_t max_iterations, float slack, int64_t max_sends, ffi::Span<const float> slacks,
                ffi::Span<const int32_t> rules) {
  Shapes shapes("plan");
  Plan plan = read_plan(shapes, load, least, phy2log, log2phy, fraction, rank_load, gap, iterations, status, tol,
                        threshold, max_iterations, slack, max_sends, slacks, rules);
  plan.in.speed = read_speed(shapes, speed, speed.size(), plan.shape.solve);
  if (!shapes.ok()) return shapes.error();
  return launch(plan.shape, plan.in, plan.out);
}

// An assignment's shape, operands and results, read off its buffers.
struct Assignment {
  AssignShape shape;
  AssignOperands in;
  AssignResults out;
};

Assignment read_assign(Shapes& shapes, const Ids& expert_ids, const Ids& starts, const Reals& split, const Ids& load,
                       const Ids& offset, const Ids& log2phy, ffi::Result<Ids>& physical_ids,
                       ffi::Result<Ids>& rank_load, ffi::Result<Ids>& memory, int64_t num_physical, int64_t chunk_size,
                       int64_t num_sms) {
  Assignment assignment;
  AssignShape& shape = assignment.shape;
  shape.count = count_shape(shapes, expert_ids, starts, chunk_size, num_sms);
  const int experts = shape.count.num_experts;
  const int64_t *table = shapes.last("log2phy", log2phy, 2), *parts = shapes.last("split", split, 2);
  shapes.expect("log2phy", "num_experts", experts, table[0]);
  shape.max_replicas = static_cast<int>(table[1]);
  shapes.require(shape.max_replicas >= 1, [] { return "log2phy: max_replicas is 0"; });
  shapes.expect("split", "num_experts", experts, parts[0]);
  shapes.expect("split", "max_replicas", shape.max_replicas, parts[1]);
  shapes.expect("load", "num_experts", experts, shapes.last("load", load, 1)[0]);
  shapes.expect("offset", "num_experts", experts, shapes.last("offset", offset, 1)[0]);
  shapes.expect("physical_ids", "size", shape.count.num_ids, shapes.last("physical_ids", *physical_ids, 1)[0]);
  const int64_t ranks = shapes.last("rank_load", *rank_load, 1)[0];
  shapes.require(ranks >= 1 && ranks <= kMaxExperts && num_physical % ranks == 0, [&] {
    return "rank_load: 1 to " + std::to_string(kMaxExperts) + " ranks that divide num_physical " +
           std::to_string(num_physical) + ", got " + std::to_string(ranks);
  });
  shape.num_ranks = static_cast<int>(ranks);
  shape.num_physical = static_cast<int>(num_physical);
  const int64_t* shares = shapes.last("shares", *memory, 2);
  shapes.expect("shares", "rows", shares_rows(experts, shape.num_physical), shares[0]);
  shapes.expect("shares", "words", 4, shares[1]);
  assignment.in = {expert_ids.typed_data(), starts.typed_data(), split.typed_data(),
                   load.typed_data(),       offset.typed_data(), log2phy.typed_data()};
  assignment.out = {physical_ids->typed_data(), rank_load->typed_data(), memory->typed_data()};
  return assignment;
}

// Adds what lets tokens stay near where they are, if it is there: loads of all ranks, and the tokens' rank.
void read_nearby(Shapes& shapes, const ffi::RemainingArgs& rest, size_t first, int64_t ranks_per_node,
                 Assignment* assignment) {
  if (rest.size() == first) return;
  AssignShape& shape = assignment->shape;
  const ffi::ErrorOr<Ids> loads = rest.get<Ids>(first), rank = rest.get<Ids>(first + 1);
  shapes.require(rest.size() == first + 2 && loads.has_value() && rank.has_value(),
                 [] { return "expected loads of all ranks and a rank, of int32, after the other operands"; });
  shapes.require(ranks_per_node >= 1 && ranks_per_node <= shape.num_ranks && shape.num_ranks % ranks_per_node == 0,
                 [&] {
                   return "ranks_per_node must divide " + std::to_string(shape.num_ranks) + ", got " +
                          std::to_string(ranks_per_node);
                 });
  shapes.require(shape.num_physical <= kMaxNearSlots, [&] {
    return "at most " + std::to_string(kMaxNearSlots) + " slots whose tokens stay near, got " +
           std::to_string(shape.num_physical);
  });
  if (!shapes.ok()) return;
  const int64_t* of_ranks = shapes.last("loads", *loads, 2);
  shapes.expect("loads", "num_ranks", shape.num_ranks, of_ranks[0]);
  shapes.expect("loads", "num_experts", shape.count.num_experts, of_ranks[1]);
  shapes.last("rank", *rank, 0);
  shape.ranks_per_node = static_cast<int>(ranks_per_node);
  assignment->in.loads = loads->typed_data();
  assignment->in.rank = rank->typed_data();
}

template <class Launch>
ffi::Error assign(Launch launch, Ids expert_ids, Ids starts, Reals split, Ids load, Ids offset, Ids log2phy,
                  ffi::Result<Ids> physical_ids, ffi::Result<Ids> rank_load, ffi::Result<Ids> shares,
                  int64_t num_physical, int64_t chunk_size, int64_t num_sms) {
  Shapes shapes("assign");
  const Assignment assignment = read_assign(shapes, expert_ids, starts, split, load, offset, log2phy, physical_ids,
                                            rank_load, shares, num_physical, chunk_size, num_sms);
  if (!shapes.ok()) return shapes.error();
  return launch(assignment.shape, assignment.in, assignment.out);
}

// The split of `predicted`, and by it the assignment of tokens that `load` counts.
template <class Launch>
ffi::Error solve_assign(Launch launch, Ids expert_ids, Ids starts, Ids predicted, Ids load, Ids offset, Ids log2phy,
                        ffi::RemainingArgs rest, ffi::Result<Ids> physical_ids, ffi::Result<Ids> rank_load,
                        ffi::Result<Ids> shares, ffi::Result<Reals> fraction, ffi::Result<Reals> solved_rank_load,
                        ffi::Result<Reals> gap, ffi::Result<Ids> iterations, ffi::Result<Ids> status,
                        int64_t num_physical, float tol, float threshold, int64_t max_iterations,
                        ffi::Span<const int32_t> partners, int64_t chunk_size, int64_t num_sms,
                        int64_t ranks_per_node) {
  Shapes shapes("solve_assign");
  Solve solve = read_solve(shapes, predicted, log2phy, fraction, solved_rank_load, gap, iterations, status,
                           num_physical, tol, threshold, max_iterations, partners);
  const size_t speeds = rest.size() % 2;
  solve.in.speed = read_speed(shapes, rest, speeds, solve.shape);
  Assignment assignment = read_assign(shapes, expert_ids, starts, *fraction, load, offset, log2phy, physical_ids,
                                      rank_load, shares, num_physical, chunk_size, num_sms);
  read_nearby(shapes, rest, speeds, ranks_per_node, &assignment);
  if (!shapes.ok()) return shapes.error();
  return launch(solve.shape, solve.edges(), solve.in, solve.out, assignment.shape, assignment.in, assignment.out);
}

// The plan for `predicted`, and by its split the assignment of tokens that `load` counts.
template <class Launch>
ffi::Error plan_assign(Launch launch, Ids expert_ids, Ids starts, Ids load, Ids offset, Ids predicted, Ids least,
                       ffi::RemainingArgs nearby, ffi::Result<Ids> physical_ids, ffi::Result<Ids> assigned_rank_load,
                       ffi::Result<Ids> shares, ffi::Result<Ids> phy2log, ffi::Result<Ids> log2phy,
                       ffi::Result<Reals> fraction, ffi::Result<Reals> rank_load, ffi::Result<Reals> gap,
                       ffi::Result<Ids> iterations, ffi::Result<Ids> status, float tol, float threshold,
                       int64_t max_iterations, float slack, int64_t max_sends, ffi::Span<const float> slacks,
                       ffi::Span<const int32_t> rules, int64_t chunk_size, int64_t num_sms, int64_t ranks_per_node) {
  Shapes shapes("plan_assign");
  const Plan plan = read_plan(shapes, predicted, least, phy2log, log2phy, fraction, rank_load, gap, iterations, status,
                              tol, threshold, max_iterations, slack, max_sends, slacks, rules);
  Assignment assignment =
      read_assign(shapes, expert_ids, starts, *fraction, load, offset, *log2phy, physical_ids, assigned_rank_load,
                  shares, shapes.last("phy2log", *phy2log, 1)[0], chunk_size, num_sms);
  read_nearby(shapes, nearby, 0, ranks_per_node, &assignment);
  if (!shapes.ok()) return shapes.error();
  return launch(plan.shape, plan.in, plan.out, assignment.shape, assignment.in, assignment.out);
}

// ---- Peers' memory --------------------------------------------------------------------------------------------------

// A buffer of rows, whatever they hold, behind as many dimensions of the batch.
PeerBuffer read_buffer(Shapes& shapes, const char* operand, const ffi::AnyBuffer& rows, size_t batch_dimensions) {
  PeerBuffer buffer = {};
  shapes.require(rows.dimensions().size() > batch_dimensions, [&] { return std::string(operand) + ": no rows"; });
  if (!shapes.ok()) return buffer;
  buffer.num_rows = shapes.last(operand, rows, rows.dimensions().size() - batch_dimensions)[0];
  buffer.num_batches = shapes.batch();
  const int64_t num_rows = buffer.num_rows * buffer.num_batches;
  shapes.require(num_rows > 0 && rows.size_bytes() > 0, [&] { return std::string(operand) + " is empty"; });
  if (!shapes.ok()) return buffer;
  buffer.row_bytes = static_cast<int64_t>(rows.size_bytes()) / num_rows;
  buffer.own = static_cast<unsigned char*>(rows.untyped_data());
  return buffer;
}

// Buffer number `i` of those that the table [batch, num_ranks, num_buffers, 2 words of an address] tells of.
PeerBuffer read_told(Shapes& shapes, const ffi::AnyBuffer& rows, const Words& table, int i) {
  const int64_t* told = shapes.last("table", table, 3);
  shapes.expect("table", "words", 2, told[2]);
  shapes.require(i < told[1], [&] { return "table: no addresses of buffer " + std::to_string(i); });
  if (!shapes.ok()) return {};
  PeerBuffer buffer = read_buffer(shapes, "buffer", rows, table.dimensions().size() - 3);
  buffer.num_ranks = static_cast<int>(told[0]);
  buffer.num_buffers = static_cast<int>(told[1]);
  buffer.buffer = i;
  buffer.table = reinterpret_cast<const uint64_t*>(table.typed_data());
  return buffer;
}

// A result that takes the place of an operand: in its memory, where what the call does not write stays.
void expect_in_place(Shapes& shapes, const ffi::AnyBuffer& operand, const ffi::AnyBuffer& result) {
  shapes.require(operand.untyped_data() == result.untyped_data(),
                 [] { return "XLA has put a result elsewhere than the operand whose place it takes"; });
}

// visit(i, rows) of each of the first `number` buffers, up to the first error.
template <class Visit>
ffi::Error for_each_buffer(const ffi::RemainingArgs& buffers, size_t number, Visit visit) {
  for (size_t i = 0; i < number; ++i) {
    const auto rows = buffers.get<ffi::AnyBuffer>(i);
    if (!rows) return rows.error();
    const ffi::Error error = visit(static_cast<int>(i), *rows);
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// Puts buffer number `i` of `number` among those of the next launch, and launches once they are as many as it takes.
template <class Launch>
ffi::Error tell(Told& told, int i, int number, const PeerBuffer& buffer, Launch launch) {
  if (told.number == 0) told.first = i;
  told.num_batches = buffer.num_batches;
  told.own[told.number] = buffer.own;
  told.batch_bytes[told.number] = buffer.num_rows * buffer.row_bytes;
  if (++told.number < kMostTold && i + 1 < number) return ffi::Error::Success();
  const ffi::Error error = launch(told);
  told.number = 0;
  return error;
}

// Tells where the first `num_shown` buffers are, and then each result, be it in the place of an operand or new. Nothing
// reads the first operand: under vmap the others are mapped with it, and so have addresses of their own.
template <class Launch>
ffi::Error expose(Launch launch, ffi::AnyBuffer, ffi::RemainingArgs buffers, ffi::Result<Words> addresses,
                  ffi::RemainingRets results, int64_t num_shown) {
  const auto shown = static_cast<size_t>(num_shown), number = shown + results.size();
  Told told = {};
  told.num_buffers = static_cast<int>(number);
  for (size_t i = 0; i < number; ++i) {
    Shapes shapes("expose");
    ffi::ErrorOr<ffi::AnyBuffer> rows = buffers.get<ffi::AnyBuffer>(i);
    if (i >= shown) {
      auto result = results.get<ffi::AnyBuffer>(i - shown);
      if (!result) return result.error();
      if (rows) expect_in_place(shapes, *rows, **result);
      rows = **result;
    }
    if (!rows) return rows.error();
    const int64_t* words = shapes.last("addresses", *addresses, 2);
    shapes.expect("addresses", "buffers", static_cast<int64_t>(number), words[0]);
    shapes.expect("addresses", "words", 2, words[1]);
    if (!shapes.ok()) return shapes.error();
    const PeerBuffer buffer = read_buffer(shapes, "buffer", *rows, addresses->dimensions().size() - 2);
    if (!shapes.ok()) return shapes.error();
    const ffi::Error error = tell(told, static_cast<int>(i), told.num_buffers, buffer, [&](const Told& some) {
      return launch(some, reinterpret_cast<uint64_t*>(addresses->typed_data()));
    });
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// False: no floating-point type that rows are added up in.
bool read_float(ffi::DataType type, Float* result) {
  if (type == ffi::F32) *result = Float::kFloat32;
  if (type == ffi::BF16) *result = Float::kBfloat16;
  if (type == ffi::F16) *result = Float::kFloat16;
  return type == ffi::F32 || type == ffi::BF16 || type == ffi::F16;
}

// Sums of the rows of a buffer, column number `i` of the table.
AddRows read_add(Shapes& shapes, const Words& table, int i, const Ids& replicas, const ffi::AnyBuffer& rows,
                 const ffi::AnyBuffer& sums, bool in_place) {
  AddRows add = {};
  if (in_place) expect_in_place(shapes, rows, sums);
  add.buffer = read_told(shapes, rows, table, i);
  const PeerBuffer sum = read_buffer(shapes, "sums", sums, table.dimensions().size() - 3);
  const int64_t* listed = shapes.last("replicas", replicas, 2);
  shapes.expect("sums", "rows", listed[0], sum.num_rows);
  if (in_place) shapes.expect("sums", "rows of the buffer", add.buffer.num_rows, sum.num_rows);
  add.in_place = in_place;
  add.is_copy = listed[1] == 1 && rows.element_type() == sums.element_type();
  shapes.require(listed[1] >= 1, [] { return "replicas: room for at least one of each sum"; });
  shapes.require(
      add.is_copy || (read_float(rows.element_type(), &add.from) && read_float(sums.element_type(), &add.to)),
      [] { return "sums of float32, bfloat16 or float16, or single rows of another type"; });
  if (!shapes.ok()) return add;
  add.row_elements = add.buffer.row_bytes / static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  shapes.expect("sums", "elements of a row", add.row_elements,
                sum.row_bytes / static_cast<int64_t>(ffi::ByteWidth(sums.element_type())));
  add.num_sums = static_cast<int>(listed[0]);
  add.max_replicas = static_cast<int>(listed[1]);
  add.replicas = replicas.typed_data();
  add.sums = sums.untyped_data();
  return add;
}

// visit(shapes, i, sums of the rows of buffer i) of each of the buffers, up to the first error.
template <class Visit>
ffi::Error for_each_add(const char* call, const Words& table, const Ids& replicas, const ffi::RemainingArgs& buffers,
                        ffi::RemainingRets& sums, bool in_place, Visit visit) {
  return for_each_buffer(buffers, buffers.size(), [&](int i, const ffi::AnyBuffer& rows) {
    auto of_rows = sums.get<ffi::AnyBuffer>(i);
    if (!of_rows) return of_rows.error();
    Shapes shapes(call);
    const AddRows add = read_add(shapes, table, i, replicas, rows, **of_rows, in_place);
    return visit(shapes, i, add);
  });
}

template <class Launch>
ffi::Error add_rows(Launch launch, Words table, Ids replicas, ffi::RemainingArgs buffers, ffi::Result<Ids> done,
                    ffi::RemainingRets sums, bool in_place) {
  const auto launch_one = [&](Shapes& shapes, int i, const AddRows& add) {
    shapes.last("done", *done, 0);
    if (!shapes.ok()) return shapes.error();
    return launch(add, i == 0 ? done->typed_data() : nullptr);
  };
  return for_each_add("add_rows", table, replicas, buffers, sums, in_place, launch_one);
}

// A number for all these addresses, in their order, after those that `name` is of.
uint64_t name_of(uint64_t name, const void* address) {
  return (name ^ reinterpret_cast<uint64_t>(address)) * 0x9e3779b97f4a7c15 + 1;
}

// Begins what `finish_rows` waits for: until then results are not there, whatever XLA thinks.
template <class Launch>
ffi::Error begin_rows(Launch launch, Words table, Ids replicas, ffi::RemainingArgs buffers, ffi::RemainingRets sums,
                      bool in_place) {
  BeginRows begin = {};
  begin.name = name_of(name_of(0, table.untyped_data()), replicas.untyped_data());
  const auto take = [&](Shapes& shapes, int i, const AddRows& add) {
    shapes.require(i < kMostBegun, [] { return "at most " + std::to_string(kMostBegun) + " buffers"; });
    if (!shapes.ok()) return shapes.error();
    begin.adds[begin.number] = add;
    begin.adds[begin.number++].is_beside = true;
    if (!in_place) begin.name = name_of(begin.name, add.buffer.own);
    return ffi::Error::Success();
  };
  const ffi::Error error = for_each_add("begin_rows", table, replicas, buffers, sums, in_place, take);
  if (error.failure()) return error;
  for (int i = 0; i < begin.number; ++i) begin.name = name_of(begin.name, begin.adds[i].sums);
  return launch(begin);
}

// Results in the places of the last operands.
ffi::Error expect_last_in_place(const char* call, const ffi::RemainingArgs& operands, ffi::RemainingRets& results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const auto operand = operands.get<ffi::AnyBuffer>(operands.size() - results.size() + i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!operand) return operand.error();
    if (!result) return result.error();
    Shapes shapes(call);
    expect_in_place(shapes, *operand, **result);
    if (!shapes.ok()) return shapes.error();
  }
  return ffi::Error::Success();
}

ffi::Error moved_too_early() {
  return ffi::Error::Internal("finish_rows: XLA has moved what is still being read or written");
}

// Waits for what `begin_rows` has begun, whose operands, but for those that became results, and results these are.
template <class Launch>
ffi::Error finish_rows(Launch launch, ffi::AnyBuffer before, ffi::RemainingArgs operands,
                       ffi::Result<ffi::AnyBuffer> done, ffi::RemainingRets rows) {
  Shapes shapes("finish_rows");
  expect_in_place(shapes, before, *done);
  if (!shapes.ok()) return shapes.error();
  ffi::Error error = expect_last_in_place("finish_rows", operands, rows);
  if (error.failure()) return error;
  uint64_t name = 0;
  error = for_each_buffer(operands, operands.size(), [&](int, const ffi::AnyBuffer& operand) {
    name = name_of(name, operand.untyped_data());
    return ffi::Error::Success();
  });
  if (error.failure()) return error;
  return launch(name);
}

// Does nothing: it is there so that the buffers are until all have read, which `done` says. But the first `num_told`
// must be where the table says that they are, and results in the places of the last buffers.
template <class Launch>
ffi::Error release(Launch launch, Words table, Ids, ffi::RemainingArgs buffers, ffi::RemainingRets results,
                   int64_t num_told) {
  const ffi::Error error = expect_last_in_place("release", buffers, results);
  if (error.failure()) return error;
  Told told = {};
  return for_each_buffer(buffers, static_cast<size_t>(num_told), [&](int i, const ffi::AnyBuffer& rows) {
    Shapes shapes("release");
    const PeerBuffer buffer = read_told(shapes, rows, table, i);
    if (!shapes.ok()) return shapes.error();
    told.num_ranks = buffer.num_ranks;
    told.num_buffers = buffer.num_buffers;
    told.table = buffer.table;
    return tell(told, i, static_cast<int>(num_told), buffer, launch);
  });
}

// Both [..., 2 words].
template <class Launch>
ffi::Error translate(Launch launch, Words words, ffi::Result<Words> addresses) {
  Shapes shapes("translate");
  shapes.require(words.dimensions() == addresses->dimensions() && words.element_count() % 2 == 0,
                 [] { return "as many addresses as words, of 64 bits"; });
  if (!shapes.ok()) return shapes.error();
  return launch(reinterpret_cast<const uint64_t*>(words.typed_data()), static_cast<int64_t>(words.element_count() / 2),
                reinterpret_cast<uint64_t*>(addresses->typed_data()));
}

// ---- Tokens ---------------------------------------------------------------------------------------------------------

template <class Launch>
ffi::Error number(Launch launch, Ids ids, Ids starts, ffi::Result<Ids> result, int64_t chunk_size) {
  Shapes shapes("number");
  const CountShape shape = count_shape(shapes, ids, starts, chunk_size, 0);
  shapes.expect("number", "ids", shape.num_ids, shapes.last("number", *result, 1)[0]);
  if (!shapes.ok()) return shapes.error();
  const Number of = {shape.num_batches, shape.num_ids,    shape.num_experts,  shape.num_chunks,
                     shape.chunk_size,  ids.typed_data(), starts.typed_data()};
  return launch(of, result->typed_data());
}

// The places, column number `i` of the table.
Places read_places(Shapes& shapes, const ffi::AnyBuffer& place, const Words& table, int i, int64_t capacity) {
  Places places = {};
  places.place = read_told(shapes, place, table, i);
  places.num_choices = static_cast<int>(places.place.row_bytes / static_cast<int64_t>(sizeof(int32_t)));
  places.capacity = capacity;
  shapes.require(place.element_type() == ffi::S32, [] { return "places of int32"; });
  shapes.require(places.num_choices >= 1 && places.num_choices <= kMostChoices, [&] {
    return "1 to " + std::to_string(kMostChoices) + " choices of a token, got " + std::to_string(places.num_choices);
  });
  return places;
}

// A column of the table whose rows are like those of the places: one number for each choice.
PeerBuffer read_choices(Shapes& shapes, const char* operand, const ffi::AnyBuffer& rows, const Words& table, int i,
                        const Places& places) {
  const PeerBuffer buffer = read_told(shapes, rows, table, i);
  shapes.expect(operand, "tokens", places.place.num_rows, buffer.num_rows);
  shapes.expect(operand, "bytes of a token's choices", places.place.row_bytes, buffer.row_bytes);
  shapes.require(rows.element_type() == ffi::F32, [&] { return std::string(operand) + " of float32"; });
  return buffer;
}

// Of a kernel that moves rows of so many bytes.
int read_blocks(Shapes& shapes, int64_t num_blocks, int64_t row_bytes) {
  shapes.require(row_bytes % 16 == 0, [] { return "rows of whole 16-byte words"; });
  shapes.require(num_blocks >= 1 && num_blocks <= 65535, [] { return "num_blocks from 1 to 65535"; });
  return static_cast<int>(num_blocks);
}

Dispatch read_dispatch(Shapes& shapes, const Words& table, const ffi::AnyBuffer& tokens, const ffi::AnyBuffer& place,
                       const Ids& group_sizes, const ffi::AnyBuffer& rows, const Ids& done, int64_t num_blocks) {
  Dispatch dispatch = {};
  dispatch.tokens = read_told(shapes, tokens, table, 0);
  if (!shapes.ok()) return dispatch;
  const PeerBuffer result = read_buffer(shapes, "rows", rows, table.dimensions().size() - 3);
  dispatch.places = read_places(shapes, place, table, 1, result.num_rows);
  dispatch.num_groups = static_cast<int>(shapes.last("group_sizes", group_sizes, 1)[0]);
  dispatch.group_sizes = group_sizes.typed_data();
  dispatch.rows = result.own;
  dispatch.num_blocks = read_blocks(shapes, num_blocks, result.row_bytes);
  shapes.last("done", done, 0);
  shapes.expect("place", "tokens", dispatch.tokens.num_rows, dispatch.places.place.num_rows);
  shapes.expect("rows", "bytes of a row", dispatch.tokens.row_bytes, result.row_bytes);
  return dispatch;
}

template <class Launch>
ffi::Error dispatch(Launch launch, Words table, ffi::AnyBuffer tokens, ffi::AnyBuffer place, Ids group_sizes,
                    ffi::Result<Ids> done, ffi::Result<ffi::AnyBuffer> rows, int64_t num_blocks) {
  Shapes shapes("dispatch");
  const Dispatch of = read_dispatch(shapes, table, tokens, place, group_sizes, *rows, *done, num_blocks);
  if (!shapes.ok()) return shapes.error();
  return launch(of, done->typed_data());
}

// `given`: gates, or nothing. They are the second column of the table.
template <class Launch>
ffi::Error combine(Launch launch, Words table, ffi::AnyBuffer place, ffi::AnyBuffer rows, ffi::AnyBuffer parts,
                   ffi::RemainingArgs given, ffi::Result<Ids> done, ffi::Result<ffi::AnyBuffer> written,
                   int64_t num_blocks) {
  Shapes shapes("combine");
  expect_in_place(shapes, parts, *written);
  Combine of = {};
  of.has_gates = given.size() > 0;
  of.parts = read_told(shapes, parts, table, of.has_gates ? 2 : 1);
  if (!shapes.ok()) return shapes.error();
  const size_t batch_dimensions = table.dimensions().size() - 3;
  const PeerBuffer own = read_buffer(shapes, "rows", rows, batch_dimensions);
  of.places = read_places(shapes, place, table, 0, own.num_rows);
  of.num_parts = static_cast<int>(shapes.last("parts", parts, 3)[1]);
  of.rows = own.own;
  shapes.last("done", *done, 0);
  if (of.has_gates) {
    const auto gates = given.get<ffi::AnyBuffer>(0);
    if (!gates) return gates.error();
    of.gates = read_choices(shapes, "gates", *gates, table, 1, of.places);
  }
  shapes.expect("parts", "tokens", of.places.place.num_rows, of.parts.num_rows);
  shapes.expect("parts", "bytes of a token", own.row_bytes * of.num_parts, of.parts.row_bytes);
  shapes.require(read_float(rows.element_type(), &of.type) && rows.element_type() == parts.element_type(),
                 [] { return "rows and parts of float32, bfloat16 or float16"; });
  shapes.require(of.num_parts >= std::min(of.places.num_choices, of.parts.num_ranks), [&] {
    return "a part for each rank that a token may have rows on, got " + std::to_string(of.num_parts);
  });
  of.num_blocks = read_blocks(shapes, num_blocks, own.row_bytes);
  if (!shapes.ok()) return shapes.error();
  of.row_elements = own.row_bytes / static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  return launch(of, done->typed_data());
}

template <class Launch>
ffi::Error combine_gradient(Launch launch, Words table, ffi::AnyBuffer of_sums, ffi::AnyBuffer place,
                            ffi::AnyBuffer gates, Ids group_sizes, ffi::AnyBuffer rows, ffi::AnyBuffer of_gates,
                            ffi::Result<Ids> done, ffi::Result<ffi::AnyBuffer> of_rows,
                            ffi::Result<ffi::AnyBuffer> written, int64_t num_blocks) {
  Shapes shapes("combine_gradient");
  expect_in_place(shapes, of_gates, *written);
  CombineGradient of = {};
  of.dispatch = read_dispatch(shapes, table, of_sums, place, group_sizes, *of_rows, *done, num_blocks);
  if (!shapes.ok()) return shapes.error();
  const PeerBuffer own = read_buffer(shapes, "rows", rows, table.dimensions().size() - 3);
  of.gates = read_choices(shapes, "gates", gates, table, 2, of.dispatch.places);
  of.of_gates = read_choices(shapes, "of_gates", of_gates, table, 3, of.dispatch.places);
  of.rows = own.own;
  shapes.expect("rows", "number", of.dispatch.places.capacity, own.num_rows);
  shapes.expect("rows", "bytes of a row", of.dispatch.tokens.row_bytes, own.row_bytes);
  const auto type = rows.element_type();
  shapes.require(read_float(type, &of.type) && type == of_sums.element_type() && type == of_rows->element_type(),
                 [] { return "rows, and gradients of rows and sums, of float32, bfloat16 or float16"; });
  if (!shapes.ok()) return shapes.error();
  of.row_elements = own.row_bytes / static_cast<int64_t>(ffi::ByteWidth(type));
  return launch(of, done->typed_data());
}

// ---- Words of all ranks ---------------------------------------------------------------------------------------------

#ifdef LPLB_CUDA

// What XLA keeps for a call site of an executable, for all devices that run it.
struct GatherState {
  static ffi::TypeId id;
  Mailboxes mailboxes;
};
ffi::TypeId GatherState::id = XLA_FFI_UNKNOWN_TYPE_ID;

// use(mailboxes, gather), with the mailboxes made.
template <class Use>
ffi::Error gather(Use use, GatherState* state, ffi::AnyBuffer words, Ids place, ffi::Result<ffi::AnyBuffer> result,
                  ffi::Span<const int32_t> devices, int64_t num_groups) {
  Shapes shapes("gather");
  shapes.last("place", place, 0);
  const auto num_words = static_cast<int64_t>(words.element_count());
  shapes.require(ffi::ByteWidth(words.element_type()) == 4, [] { return "elements of 32 bits"; });
  shapes.require(num_words >= 1 && num_words <= kMostWords, [&] {
    return "1 to " + std::to_string(kMostWords) + " elements of a rank, got " + std::to_string(num_words);
  });
  if (!shapes.ok()) return shapes.error();
  const int64_t ranks = static_cast<int64_t>(result->element_count()) / num_words;
  shapes.expect("result", "elements", num_words * ranks, static_cast<int64_t>(result->element_count()));
  shapes.require(devices.size() <= kMostMailboxes && ranks * num_groups <= static_cast<int64_t>(devices.size()), [&] {
    return std::to_string(ranks * num_groups) + " of " + std::to_string(devices.size()) + " GPUs, of which " +
           std::to_string(kMostMailboxes) + " at most may be in use";
  });
  if (!shapes.ok()) return shapes.error();
  Gather gather = {};
  gather.num_ranks = static_cast<int>(ranks);
  gather.num_groups = static_cast<int>(num_groups);
  gather.num_batches = shapes.batch();
  gather.num_words = static_cast<int>(num_words / shapes.batch());
  gather.place = place.typed_data();
  gather.words = static_cast<const uint32_t*>(words.untyped_data());
  gather.words_of_ranks = static_cast<uint32_t*>(result->untyped_data());
  cudaError_t error = state->mailboxes.make(devices.begin(), devices.size(), gather);
  if (error == cudaSuccess) error = use(state->mailboxes, gather);
  return check_launch("gather", error);
}

#endif  // LPLB_CUDA

// Appends the operands, results and attributes of each call, in the order of the functions above.
template <class Binding>
auto bind_chunks(Binding&& binding) {
  return std::move(binding).template Attr<int64_t>("chunk_size").template Attr<int64_t>("num_sms");
}
template <class Binding>
auto bind_nearby(Binding&& binding) {
  return bind_chunks(std::move(binding)).template Attr<int64_t>("ranks_per_node");
}
template <class Binding>
auto bind_count(Binding binding) {
  return bind_chunks(std::move(binding).template Arg<Ids>().template Ret<Ids>().template Ret<Ids>());
}
// A split: fraction, rank_load, gap, iterations and status.
template <class Binding>
auto bind_split(Binding&& binding) {
  return std::move(binding)
      .template Ret<Reals>()
      .template Ret<Reals>()
      .template Ret<Reals>()
      .template Ret<Ids>()
      .template Ret<Ids>();
}
// When to stop.
template <class Binding>
auto bind_limits(Binding&& binding) {
  return std::move(binding)
      .template Attr<float>("tol")
      .template Attr<float>("threshold")
      .template Attr<int64_t>("max_iterations");
}
template <class Binding>
auto bind_solve_results(Binding&& binding) {
  return bind_limits(bind_split(std::move(binding)).template Attr<int64_t>("num_physical"))
      .template Attr<ffi::Span<const int32_t>>("partners");
}
template <class Binding>
auto bind_solve(Binding binding) {
  return bind_solve_results(std::move(binding).template Arg<Ids>().template Arg<Ids>().RemainingArgs());
}
template <class Binding>
auto bind_six_ids(Binding&& binding) {
  return std::move(binding)
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>();
}
template <class Binding>
auto bind_assigned(Binding&& binding) {
  return std::move(binding).template Ret<Ids>().template Ret<Ids>().template Ret<Ids>();
}
template <class Binding>
auto bind_solve_assign(Binding binding) {
  return bind_nearby(bind_solve_results(bind_assigned(bind_six_ids(std::move(binding)).RemainingArgs())));
}
template <class Binding>
auto bind_plan_results(Binding&& binding) {
  return bind_limits(bind_split(std::move(binding).template Ret<Ids>().template Ret<Ids>()))
      .template Attr<float>("slack")
      .template Attr<int64_t>("max_sends")
      .template Attr<ffi::Span<const float>>("slacks")
      .template Attr<ffi::Span<const int32_t>>("rules");
}
template <class Binding>
auto bind_plan(Binding binding) {
  return bind_plan_results(std::move(binding).template Arg<Ids>().template Arg<Ids>().RemainingArgs());
}
template <class Binding>
auto bind_plan_assign(Binding binding) {
  return bind_nearby(bind_plan_results(bind_assigned(bind_six_ids(std::move(binding)).RemainingArgs())));
}
template <class Binding>
auto bind_assign(Binding binding) {
  return bind_chunks(bind_assigned(std::move(binding)
                                       .template Arg<Ids>()
                                       .template Arg<Ids>()
                                       .template Arg<Reals>()
                                       .template Arg<Ids>()
                                       .template Arg<Ids>()
                                       .template Arg<Ids>())
                         .template Attr<int64_t>("num_physical"));
}

template <class Binding>
auto bind_expose(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<Words>()
      .RemainingRets()
      .template Attr<int64_t>("num_shown");
}
template <class Binding>
auto bind_add_rows(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<Ids>()
      .RemainingArgs()
      .template Ret<Ids>()
      .RemainingRets()
      .template Attr<bool>("in_place");
}
template <class Binding>
auto bind_begin_rows(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<Ids>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<bool>("in_place");
}
template <class Binding>
auto bind_finish_rows(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .RemainingRets();
}
template <class Binding>
auto bind_release(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<Ids>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<int64_t>("num_told");
}

template <class Binding>
auto bind_number(Binding binding) {
  return std::move(binding).template Arg<Ids>().template Arg<Ids>().template Ret<Ids>().template Attr<int64_t>(
      "chunk_size");
}
template <class Binding>
auto bind_dispatch(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Ids>()
      .template Ret<Ids>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("num_blocks");
}
template <class Binding>
auto bind_combine(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<Ids>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("num_blocks");
}
template <class Binding>
auto bind_combine_gradient(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Ids>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<Ids>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("num_blocks");
}
#ifdef LPLB_CUDA
template <class Binding>
auto bind_gather(Binding&& binding) {
  return std::move(binding)
      .template Ctx<ffi::State<GatherState>>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Ids>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<ffi::Span<const int32_t>>("devices")
      .template Attr<int64_t>("num_groups");
}
#endif

}  // namespace

#define LPLB_CPU_HANDLER(Handler, call, launcher) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                  \
      Handler,                                    \
      [](auto... operands) {                      \
        return call(                              \
            [](const auto&... arguments) {        \
              launcher(arguments...);             \
              return ffi::Error::Success();       \
            },                                    \
            operands...);                         \
      },                                          \
      bind_##call(ffi::Ffi::Bind()))

LPLB_CPU_HANDLER(CountCpu, count, count_cpu);
LPLB_CPU_HANDLER(SolveCpu, solve, solve_cpu);
LPLB_CPU_HANDLER(AssignCpu, assign, assign_cpu);
LPLB_CPU_HANDLER(SolveAssignCpu, solve_assign, solve_assign_cpu);
LPLB_CPU_HANDLER(PlanCpu, plan, plan_solve_cpu);
LPLB_CPU_HANDLER(PlanAssignCpu, plan_assign, plan_assign_cpu);
LPLB_CPU_HANDLER(ExposeCpu, expose, expose_cpu);
LPLB_CPU_HANDLER(AddRowsCpu, add_rows, add_rows_cpu);
LPLB_CPU_HANDLER(BeginRowsCpu, begin_rows, begin_rows_cpu);
LPLB_CPU_HANDLER(NumberCpu, number, number_cpu);
LPLB_CPU_HANDLER(DispatchCpu, dispatch, dispatch_cpu);
LPLB_CPU_HANDLER(CombineCpu, combine, combine_cpu);
LPLB_CPU_HANDLER(CombineGradientCpu, combine_gradient, combine_gradient_cpu);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FinishRowsCpu,
    [](auto... operands) {
      return finish_rows(
          [](uint64_t name) { return finish_rows_cpu(name) ? ffi::Error::Success() : moved_too_early(); }, operands...);
    },
    bind_finish_rows(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ReleaseCpu,
    [](auto... operands) {
      return release(
          [](const Told& told) {
            return in_place_cpu(told) ? ffi::Error::Success()
                                      : ffi::Error::Internal("release: XLA has moved a buffer that others read from");
          },
          operands...);
    },
    bind_release(ffi::Ffi::Bind()));

#ifdef LPLB_CUDA

#define LPLB_CUDA_HANDLER(Handler, call, launcher)                                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                                \
      Handler,                                                                                                  \
      [](cudaStream_t stream, auto... operands) {                                                               \
        return call(                                                                                            \
            [stream](const auto&... arguments) { return check_launch(#call, launcher(stream, arguments...)); }, \
            operands...);                                                                                       \
      },                                                                                                        \
      bind_##call(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()), {ffi::Traits::kCmdBufferCompatible})

LPLB_CUDA_HANDLER(CountCuda, count, count_cuda);
LPLB_CUDA_HANDLER(SolveCuda, solve, solve_cuda);
LPLB_CUDA_HANDLER(AssignCuda, assign, assign_cuda);
LPLB_CUDA_HANDLER(SolveAssignCuda, solve_assign, solve_assign_cuda);
LPLB_CUDA_HANDLER(PlanCuda, plan, plan_solve_cuda);
LPLB_CUDA_HANDLER(PlanAssignCuda, plan_assign, plan_assign_cuda);
LPLB_CUDA_HANDLER(ExposeCuda, expose, expose_cuda);
LPLB_CUDA_HANDLER(AddRowsCuda, add_rows, add_rows_cuda);
LPLB_CUDA_HANDLER(NumberCuda, number, number_cuda);
LPLB_CUDA_HANDLER(DispatchCuda, dispatch, dispatch_cuda);
LPLB_CUDA_HANDLER(CombineCuda, combine, combine_cuda);
LPLB_CUDA_HANDLER(CombineGradientCuda, combine_gradient, combine_gradient_cuda);
LPLB_CUDA_HANDLER(ReleaseCuda, release, in_place_cuda);

// These two have no kCmdBufferCompatible: what one begins the other ends, outside of any capture.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BeginRowsCuda,
    [](cudaStream_t stream, auto... operands) {
      return begin_rows(
          [stream](const BeginRows& begin) { return check_launch("begin_rows", begin_rows_cuda(stream, begin)); },
          operands...);
    },
    bind_begin_rows(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FinishRowsCuda,
    [](cudaStream_t stream, auto... operands) {
      return finish_rows(
          [stream](uint64_t name) {
            const cudaError_t error = join(stream, name);
            return error == cudaErrorInvalidValue ? moved_too_early() : check_launch("finish_rows", error);
          },
          operands...);
    },
    bind_finish_rows(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()));

// What goes wrong between processes is an error of the call.
template <class Call>
ffi::Error catch_error(Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("peers' memory in other processes: ") + error.what());
  }
}

// `expose` to other processes: what it tells are words, which mean the same to all. It has no kCmdBufferCompatible, for
// the host must see each buffer before others read from it: where XLA frees and allocates regions, an address may be
// that of another region than in the execution before.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ShareCuda,
    [](cudaStream_t stream, auto... operands) {
      return expose(
          [stream](Told told, uint64_t* words) {
            return catch_error([&] {
              for (int i = 0; i < told.number; ++i) {
                const uint64_t word = share(told.own[i], told.num_batches * told.batch_bytes[i]);
                told.own[i] = reinterpret_cast<unsigned char*>(word);  // further batch elements count on from it
              }
              return check_launch("share", expose_cuda(stream, told, words));
            });
          },
          operands...);
    },
    bind_expose(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(TranslateCuda,
                              [](cudaStream_t stream, auto... operands) {
                                return translate(
                                    [stream](auto... arguments) {
                                      return catch_error([&] {
                                        return check_launch("translate",
                                                            translate_cuda(stream, mapped_regions(), arguments...));
                                      });
                                    },
                                    operands...);
                              },
                              ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Arg<Words>().Ret<Words>(),
                              {ffi::Traits::kCmdBufferCompatible});

// Function attributes may not be set while a stream is captured; XLA initialises before it captures. It does so before
// every execution, at each call site, so that only the first may cost something.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    InitializeCuda,
    []() {
      constexpr int kMaxDevices = 64;
      static std::atomic<bool> prepared[kMaxDevices];
      int device = 0;
      cudaError_t error = cudaGetDevice(&device);
      if (error == cudaSuccess && device < kMaxDevices && prepared[device].load()) return ffi::Error::Success();
      for (const auto prepare : {prepare_plan_cuda, prepare_solve_cuda, prepare_assign_cuda, prepare_forks}) {
        if (error == cudaSuccess) error = prepare();
      }
      if (error == cudaSuccess && device < kMaxDevices) prepared[device].store(true);
      return check_launch("initialize", error);
    },
    ffi::Ffi::BindInitialize());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherCuda,
                              [](cudaStream_t stream, auto... operands) {
                                return gather(
                                    [stream](const Mailboxes& mailboxes, const Gather& gather) {
                                      return mailboxes.gather(stream, gather);
                                    },
                                    operands...);
                              },
                              bind_gather(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GatherInstantiateCuda, []() { return ffi::ErrorOr<std::unique_ptr<GatherState>>(std::make_unique<GatherState>()); },
    ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GatherInitializeCuda,
    [](auto... operands) { return gather([](const Mailboxes&, const Gather&) { return cudaSuccess; }, operands...); },
    bind_gather(ffi::Ffi::BindInitialize()));

XLA_FFI_TypeId* GatherStateId() { return &GatherState::id; }

const XLA_FFI_TypeInfo* GatherStateInfo() {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<GatherState>();
  return &info;
}

#endif  // LPLB_CUDA

}  // namespace lplb
