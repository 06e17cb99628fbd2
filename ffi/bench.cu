// Checks and times the CUDA kernels alone, without Python or JAX: for profilers, and for compute-sanitizer.
//
//   lplb_bench PROBLEM FRACTIONS REPEATS
//
// PROBLEM, written by benchmarks/kernels.py, holds one placement and many instances of loads and ids. Every kernel's
// results are compared with the CPU handlers' first. Then, with REPEATS > 0, each kernel is timed on each instance as
// CUDA graphs of that many launches. Prints one JSON object; writes the fractions of the last solves to FRACTIONS.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "bench.h"
#ifdef LPLB_MATHDX
#include "solve_mathdx.h"
#endif

namespace {

using namespace lplb::bench;

[[noreturn]] void fail(const char* what, int instance) {
  std::fprintf(stderr, "instance %d: %s\n", instance, what);
  std::exit(1);
}

__global__ void empty_kernel() {}

// Microseconds of one launch: the median over replays of a graph of `repeats` launches.
double time_us(cudaStream_t stream, int repeats, const std::function<cudaError_t(cudaStream_t)>& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  LPLB_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < repeats; ++i) LPLB_CHECK(launch(stream));
  LPLB_CHECK(cudaStreamEndCapture(stream, &graph));
  LPLB_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  LPLB_CHECK(cudaEventCreate(&begin));
  LPLB_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int replay = 0; replay < 8; ++replay) {
    LPLB_CHECK(cudaEventRecord(begin, stream));
    LPLB_CHECK(cudaGraphLaunch(executable, stream));
    LPLB_CHECK(cudaEventRecord(end, stream));
    LPLB_CHECK(cudaEventSynchronize(end));
    float milliseconds;
    LPLB_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (replay > 0) times.push_back(milliseconds);  // the first one warms up
  }
  LPLB_CHECK(cudaEventDestroy(begin));
  LPLB_CHECK(cudaEventDestroy(end));
  LPLB_CHECK(cudaGraphExecDestroy(executable));
  LPLB_CHECK(cudaGraphDestroy(graph));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e3 / repeats;
}

struct Solver {
  const char* name;
  lplb::SolveShape shape;
  const lplb::EdgeColouring* edges;
  bool plain = false;  // without cuSolverDx, where it is built in
  std::vector<double> plan_us = {}, solve_us = {}, all_us = {}, all_local_us = {}, gaps = {}, imbalances = {};
  std::vector<int> iterations = {}, statuses = {}, copies = {};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: lplb_bench PROBLEM FRACTIONS REPEATS\n");
    return 2;
  }
  const int repeats = std::atoi(argv[3]);
  const Problem problem(argv[1]);
  const lplb::CountShape& count_shape = problem.count;
  const lplb::AssignShape& assign_shape = problem.assign;
  const int num_ids = problem.num_ids;
  const size_t experts = problem.num_experts, replicas = problem.max_replicas, ranks = problem.num_ranks;
  const size_t groups = problem.num_groups, cells = experts * replicas, chunk_cells = count_shape.num_chunks * experts;
  const bool planned = problem.plan.num_candidates > 0;
  std::vector<int32_t> log2phy = problem.log2phy, phy2log(problem.num_physical);
  std::FILE* fractions = std::fopen(argv[2], "wb");
  if (fractions == nullptr) fail("cannot write FRACTIONS", 0);

  LPLB_CHECK(lplb::prepare_plan_cuda());
  LPLB_CHECK(lplb::prepare_solve_cuda());
  LPLB_CHECK(lplb::prepare_assign_cuda());
  cudaStream_t stream;
  LPLB_CHECK(cudaStreamCreate(&stream));
  Device<int32_t> d_log2phy(log2phy), d_phy2log(phy2log);
  const std::vector<int32_t> offset(experts, 0), least(1, 0);
  Device<int32_t> d_least(least);
  Device<int32_t> d_offset(offset);
  std::vector<double> empty_us, count_us, shares_us, assign_us, shares_local_us, assign_local_us;
  // With locality, as if each rank had as many tokens of each expert, on nodes of up to 4 ranks.
  const bool has_local = problem.num_physical <= lplb::kMaxNearSlots;
  lplb::AssignShape local_shape = assign_shape;
  local_shape.ranks_per_node = std::gcd(4, problem.num_ranks);
  const std::vector<int32_t> rank(1, problem.num_ranks / 2);
  Device<int32_t> d_rank(rank);
  std::vector<Solver> solvers = {{planned ? "plan" : "ipm", problem.solve, nullptr, true}};
#ifdef LPLB_MATHDX
  if (!planned && lplb::has_mathdx(problem.solve)) solvers.push_back({"ipm (cuSolverDx)", problem.solve, nullptr});
#endif
  if (problem.has_edges) {
    solvers.push_back({"edge_balance", problem.solve, &problem.colouring});
    solvers.back().shape.max_iterations = lplb::bench::kMostSweeps;
  }

  for (int instance = 0; instance < problem.instances; ++instance) {
    const std::vector<int32_t> load = slice(problem.loads, instance, experts);
    const std::vector<int32_t> mine = slice(problem.ids, instance, num_ids);
    Device<int32_t> d_load(load), d_ids(mine), d_count(experts), d_starts(chunk_cells), d_iterations(groups),
        d_status(groups), d_physical(num_ids), d_assigned(ranks),
        d_shares(4 * lplb::shares_rows(problem.num_experts, problem.num_physical));
    Device<float> d_fraction(cells), d_rank_load(ranks), d_gap(groups);
    const lplb::SolveOperands solve_in = {d_load.get(), d_log2phy.get()};
    const lplb::SolveResults solve_out = {d_fraction.get(), d_rank_load.get(), d_gap.get(), d_iterations.get(),
                                          d_status.get()};
    const lplb::AssignOperands assign_in = {d_ids.get(),  d_starts.get(), d_fraction.get(),
                                            d_load.get(), d_offset.get(), d_log2phy.get()};
    const lplb::AssignResults assign_out = {d_physical.get(), d_assigned.get(), d_shares.get()};
    const auto count = [&](cudaStream_t s) {
      return lplb::count_cuda(s, count_shape, d_ids.get(), d_count.get(), d_starts.get());
    };
    const auto assign = [&](cudaStream_t s) { return lplb::assign_cuda(s, assign_shape, assign_in, assign_out); };
    std::vector<int32_t> counted(experts), starts(chunk_cells), physical(num_ids), assigned(ranks);
    lplb::count_cpu(count_shape, mine.data(), counted.data(), starts.data());
    std::vector<int32_t> loads, before, total;
    for (size_t g = 0; g < ranks; ++g) loads.insert(loads.end(), counted.begin(), counted.end());
    for (const int32_t tokens : counted) {
      before.push_back(rank[0] * tokens);
      total.push_back(problem.num_ranks * tokens);
    }
    Device<int32_t> d_loads(loads), d_before(before), d_total(total);
    const lplb::AssignOperands local_in = {d_ids.get(),    d_starts.get(),  d_fraction.get(), d_total.get(),
                                           d_before.get(), d_log2phy.get(), d_loads.get(),    d_rank.get()};
    const auto assign_local = [&](cudaStream_t s) { return lplb::assign_cuda(s, local_shape, local_in, assign_out); };

    for (Solver& solver : solvers) {
      const lplb::SolveShape& shape = solver.shape;
      const lplb::PlanOperands plan_in = {d_load.get(), d_least.get()};
      const lplb::PlanResults plan_out = {d_phy2log.get(), d_log2phy.get(), solve_out};
      const auto plan = [&](cudaStream_t s) { return lplb::plan_cuda(s, problem.plan, plan_in, plan_out); };
      const auto solve_with = [&](cudaStream_t s, const lplb::SolveShares& shares) {
        if (planned) return lplb::plan_solve_cuda(s, problem.plan, plan_in, plan_out, shares);
        return solver.plain ? lplb::solve_plain_cuda(s, shape, solve_in, solve_out, shares)
                            : lplb::solve_cuda(s, shape, solver.edges, solve_in, solve_out, shares);
      };
      const auto solve = [&](cudaStream_t s) { return solve_with(s, {}); };
      const auto all_with = [&](cudaStream_t s, const lplb::AssignShape& of_assign, const lplb::AssignOperands& in) {
        if (const cudaError_t error = count(s); error != cudaSuccess) return error;
        const bool makes_shares =
            solver.edges == nullptr && lplb::makes_shares(planned ? lplb::after_plan(problem.plan) : shape);
        return lplb::assign_after_cuda([&](const lplb::SolveShares& shares) { return solve_with(s, shares); },
                                       makes_shares, s, of_assign, in, assign_out);
      };
      const auto all = [&](cudaStream_t s) { return all_with(s, assign_shape, assign_in); };
      const auto all_local = [&](cudaStream_t s) { return all_with(s, local_shape, local_in); };
      LPLB_CHECK(cudaMemsetAsync(d_fraction.get(), 0x7f, cells * sizeof(float), stream));
      LPLB_CHECK(all(stream));
      LPLB_CHECK(cudaStreamSynchronize(stream));

      // The same work on the CPU. Counting, edge balance and assigning agree to the bit; the interior-point method's
      // splits need not be unique, but the largest rank loads agree within both gaps.
      if (counted != d_count.host()) fail("count: load differs from the CPU's", instance);
      if (starts != d_starts.host()) fail("count: starts differ from the CPU's", instance);
      std::vector<float> fraction(cells), rank_load(ranks), gap(groups);
      std::vector<int32_t> iteration(groups), status(groups);
      const lplb::SolveResults on_cpu = {fraction.data(), rank_load.data(), gap.data(), iteration.data(),
                                         status.data()};
      if (planned) {
        lplb::plan_solve_cpu(problem.plan, {load.data(), least.data()}, {phy2log.data(), log2phy.data(), on_cpu});
        if (phy2log != d_phy2log.host() || log2phy != d_log2phy.host()) fail("plan: differs from the CPU's", instance);
      } else {
        lplb::solve_cpu(shape, solver.edges, {load.data(), log2phy.data()}, on_cpu);
      }
      const std::vector<float> cuda_fraction = d_fraction.host(), cuda_rank_load = d_rank_load.host();
      const std::vector<float> cuda_gap = d_gap.host();
      const std::vector<int32_t> cuda_iteration = d_iterations.host(), cuda_status = d_status.host();
      if (solver.edges != nullptr && (fraction != cuda_fraction || rank_load != cuda_rank_load || gap != cuda_gap ||
                                      iteration != cuda_iteration || status != cuda_status)) {
        fail("edge balance: results differ from the CPU's", instance);
      }
      for (size_t group = 0; group < groups; ++group) {
        const auto largest = [&](const std::vector<float>& loads_of_ranks) {
          const auto first = loads_of_ranks.begin() + group * (ranks / groups);
          return *std::max_element(first, first + ranks / groups);
        };
        const float cpu = largest(rank_load), cuda = largest(cuda_rank_load);
        const float allowed = std::max(cpu, cuda) * (std::max(gap[group], cuda_gap[group]) + 1e-6f);
        if (!(std::fabs(cpu - cuda) <= allowed)) fail("solve: largest rank load differs from the CPU's", instance);
        const auto begin = cuda_rank_load.begin() + group * (ranks / groups);
        const double total = std::accumulate(begin, begin + ranks / groups, 0.0);
        solver.imbalances.push_back(total > 0 ? cuda * (ranks / groups) / total : 1.0);
        solver.gaps.push_back(cuda_gap[group]);
        solver.iterations.push_back(cuda_iteration[group]);
        solver.statuses.push_back(cuda_status[group]);
      }
      for (size_t e = 0; e < experts; ++e) {
        double sum = 0;
        for (size_t r = 0; r < replicas; ++r) {
          const float part = cuda_fraction[e * replicas + r];
          if (!(part >= 0)) fail("solve: a fraction is negative or NaN", instance);
          sum += part;
        }
        if (load[e] > 0 && std::fabs(sum - 1) > 1e-5) fail("solve: fractions do not sum to 1", instance);
      }
      std::fwrite(cuda_fraction.data(), sizeof(float), cells, fractions);
      lplb::assign_cpu(assign_shape,
                       {mine.data(), starts.data(), cuda_fraction.data(), load.data(), offset.data(), log2phy.data()},
                       {physical.data(), assigned.data()});
      for (int alone = 0; alone < 2; ++alone) {
        if (physical != d_physical.host()) fail("assign: physical_ids differ from the CPU's", instance);
        if (assigned != d_assigned.host()) fail("assign: rank_load differs from the CPU's", instance);
        for (Device<int32_t>* result : {&d_physical, &d_assigned}) {
          LPLB_CHECK(cudaMemsetAsync(result->get(), 0x7f, result->size() * sizeof(int32_t), stream));
        }
        LPLB_CHECK(assign(stream));
        LPLB_CHECK(cudaStreamSynchronize(stream));
      }
      lplb::assign_cpu(local_shape,
                       {mine.data(), starts.data(), cuda_fraction.data(), total.data(), before.data(), log2phy.data(),
                        loads.data(), rank.data()},
                       {physical.data(), assigned.data()});
      for (int alone = 0; has_local && alone < 2; ++alone) {
        LPLB_CHECK(alone ? assign_local(stream) : all_local(stream));
        LPLB_CHECK(cudaStreamSynchronize(stream));
        if (physical != d_physical.host()) fail("assign with locality: physical_ids differ from the CPU's", instance);
        if (assigned != d_assigned.host()) fail("assign with locality: rank_load differs from the CPU's", instance);
        for (Device<int32_t>* result : {&d_physical, &d_assigned}) {
          LPLB_CHECK(cudaMemsetAsync(result->get(), 0x7f, result->size() * sizeof(int32_t), stream));
        }
      }
      solver.copies.push_back(problem.num_physical - static_cast<int>(std::count(phy2log.begin(), phy2log.end(), -1)) -
                              static_cast<int>(experts));
      if (repeats > 0) {
        if (planned) solver.plan_us.push_back(time_us(stream, repeats, plan));
        solver.solve_us.push_back(time_us(stream, repeats, solve));
        solver.all_us.push_back(time_us(stream, repeats, all));
        if (has_local) solver.all_local_us.push_back(time_us(stream, repeats, all_local));
      }
    }
    if (repeats > 0) {
      empty_us.push_back(time_us(stream, repeats, [](cudaStream_t s) {
        empty_kernel<<<1, 32, 0, s>>>();
        return cudaGetLastError();
      }));
      count_us.push_back(time_us(stream, repeats, count));
      // Shares alone, which are nothing where experts have few replicas and may go anywhere, and assigning, given
      // these.
      const auto time_assign = [&](const lplb::AssignShape& shape, const lplb::AssignOperands& in,
                                   std::vector<double>& of_shares, std::vector<double>& of_assign) {
        of_shares.push_back(time_us(
            stream, repeats, [&](cudaStream_t s) { return lplb::shares_cuda(s, shape, in, assign_out, false); }));
        of_assign.push_back(time_us(stream, repeats, [&](cudaStream_t s) {
          return lplb::assign_by_shares_cuda(s, shape, in, assign_out, false);
        }));
      };
      time_assign(assign_shape, assign_in, shares_us, assign_us);
      if (has_local) time_assign(local_shape, local_in, shares_local_us, assign_local_us);
    }
  }
  std::fclose(fractions);
  LPLB_CHECK(cudaStreamDestroy(stream));
  std::printf("{");
  print("empty_us", empty_us, "%.3f", ", ");
  print("count_us", count_us, "%.3f", ", ");
  print("shares_us", shares_us, "%.3f", ", ");
  print("assign_us", assign_us, "%.3f", ", ");
  print("shares_local_us", shares_local_us, "%.3f", ", ");
  print("assign_local_us", assign_local_us, "%.3f", ", \"solvers\": {");
  for (const Solver& solver : solvers) {
    std::printf("%s\"%s\": {", &solver == solvers.data() ? "" : ", ", solver.name);
    print("plan_us", solver.plan_us, "%.3f", ", ");
    print("imbalance", solver.imbalances, "%.6f", ", ");
    print("copies", solver.copies, "%d", ", ");
    print("solve_us", solver.solve_us, "%.3f", ", ");
    print("all_us", solver.all_us, "%.3f", ", ");
    print("all_local_us", solver.all_local_us, "%.3f", ", ");
    print("gap", solver.gaps, "%.3e", ", ");
    print("iterations", solver.iterations, "%d", ", ");
    print("status", solver.statuses, "%d", "}");
  }
  std::printf("}}\n");
  return 0;
}
