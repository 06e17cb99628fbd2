// The extension module: lists the handlers, for jax.ffi.register_ffi_target.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "assign.h"
#include "dispatch.h"
#include "handlers.h"
#include "handover.h"
#include "peer.h"
#include "plan.h"
#include "solve.h"
#ifdef LPLB_MATHDX
#include "solve_mathdx.h"
#endif

namespace nb = nanobind;

namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

// {platform: {target: {stage: handler}}}
nb::dict handlers() {
  const auto execute = [](XLA_FFI_Handler* handler) {
    nb::dict stages;
    stages["execute"] = capsule(handler);
    return stages;
  };
  nb::dict cpu;
  cpu["lplb_count"] = execute(lplb::CountCpu);
  cpu["lplb_solve"] = execute(lplb::SolveCpu);
  cpu["lplb_solve_assign"] = execute(lplb::SolveAssignCpu);
  cpu["lplb_assign"] = execute(lplb::AssignCpu);
  cpu["lplb_plan"] = execute(lplb::PlanCpu);
  cpu["lplb_plan_assign"] = execute(lplb::PlanAssignCpu);
  cpu["lplb_expose"] = execute(lplb::ExposeCpu);
  cpu["lplb_add_rows"] = execute(lplb::AddRowsCpu);
  cpu["lplb_begin_rows"] = execute(lplb::BeginRowsCpu);
  cpu["lplb_finish_rows"] = execute(lplb::FinishRowsCpu);
  cpu["lplb_release"] = execute(lplb::ReleaseCpu);
  cpu["lplb_number"] = execute(lplb::NumberCpu);
  cpu["lplb_dispatch"] = execute(lplb::DispatchCpu);
  cpu["lplb_combine"] = execute(lplb::CombineCpu);
  cpu["lplb_combine_gradient"] = execute(lplb::CombineGradientCpu);
  nb::dict platforms;
  platforms["cpu"] = cpu;
#ifdef LPLB_CUDA
  const auto initialize_and_execute = [&](XLA_FFI_Handler* handler) {
    nb::dict stages = execute(handler);
    stages["initialize"] = capsule(lplb::InitializeCuda);
    return stages;
  };
  nb::dict cuda;
  cuda["lplb_count"] = execute(lplb::CountCuda);
  cuda["lplb_solve"] = initialize_and_execute(lplb::SolveCuda);
  cuda["lplb_assign"] = initialize_and_execute(lplb::AssignCuda);
  cuda["lplb_solve_assign"] = initialize_and_execute(lplb::SolveAssignCuda);
  cuda["lplb_plan"] = initialize_and_execute(lplb::PlanCuda);
  cuda["lplb_plan_assign"] = initialize_and_execute(lplb::PlanAssignCuda);
  cuda["lplb_expose"] = execute(lplb::ExposeCuda);
  cuda["lplb_add_rows"] = execute(lplb::AddRowsCuda);
  cuda["lplb_begin_rows"] = initialize_and_execute(lplb::BeginRowsCuda);
  cuda["lplb_finish_rows"] = execute(lplb::FinishRowsCuda);
  cuda["lplb_release"] = execute(lplb::ReleaseCuda);
  cuda["lplb_number"] = execute(lplb::NumberCuda);
  cuda["lplb_dispatch"] = execute(lplb::DispatchCuda);
  cuda["lplb_combine"] = execute(lplb::CombineCuda);
  cuda["lplb_combine_gradient"] = execute(lplb::CombineGradientCuda);
  cuda["lplb_share"] = execute(lplb::ShareCuda);
  cuda["lplb_translate"] = execute(lplb::TranslateCuda);
  platforms["CUDA"] = cuda;
#endif
  return platforms;
}

// The handlers of a call that keeps a state, by stage, and the type of the state; without CUDA, none.
nb::tuple gather_cuda() {
  nb::dict stages, type;
#ifdef LPLB_CUDA
  stages["instantiate"] = capsule(lplb::GatherInstantiateCuda);
  stages["initialize"] = capsule(lplb::GatherInitializeCuda);
  stages["execute"] = capsule(lplb::GatherCuda);
  type["type_id"] = nb::capsule(lplb::GatherStateId());
  type["type_info"] = nb::capsule(lplb::GatherStateInfo());
#endif
  return nb::make_tuple(stages, type);
}

// Whether each GPU may access the memory of every other; true where there are none, or no CUDA handlers.
bool peers_reachable() {
  bool result = true;
#ifdef LPLB_CUDA
  if (lplb::peers_reachable_cuda(&result) != cudaSuccess) result = false;
#endif
  return result;
}

#ifdef LPLB_CUDA
// Handlers call `hand_over` too, in threads of XLA, as long as the process lives.
void join_processes(int process, int num_processes, std::vector<int> devices, nb::callable hand_over) {
  auto* callable = new nb::callable(std::move(hand_over));
  const auto call = [callable](int number, uint64_t bytes, int file) {
    nb::gil_scoped_acquire gil;
    try {
      return nb::cast<std::string>((*callable)(number, bytes, file));
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  };
  nb::gil_scoped_release no_gil;
  lplb::join_processes(process, num_processes, std::move(devices), call);
}

void share(int device, uintptr_t buffer, uint64_t bytes) {
  lplb::share_on(device, reinterpret_cast<const void*>(buffer), bytes);
}
#endif

// Group sizes whose solve uses cuSolverDx.
nb::tuple mathdx_sizes() {
  nb::list sizes;
#ifdef LPLB_MATHDX
  for (const int size : lplb::mathdx_sizes()) sizes.append(size);
#endif
  return nb::tuple(sizes);
}

}  // namespace

NB_MODULE(_handlers, m) {
  m.def("handlers", &handlers);
  m.def("gather_cuda", &gather_cuda);
  m.def("peers_reachable", &peers_reachable);
  m.def("shares_rows", &lplb::shares_rows);
#ifdef LPLB_CUDA
  m.def("join_processes", &join_processes);
  m.def("share", &share, nb::call_guard<nb::gil_scoped_release>());
  m.def("map_region", &lplb::map_region, nb::call_guard<nb::gil_scoped_release>());
#endif
  m.attr("max_choices") = lplb::kMostChoices;
  m.attr("max_begun") = lplb::kMostBegun;
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("mathdx_sizes") = mathdx_sizes();
  m.attr("max_experts") = lplb::kMaxExperts;
  m.attr("max_group_ranks") = lplb::kMaxGroupRanks;
  m.attr("max_group_slots") = lplb::kMaxGroupSlots;
  m.attr("max_near_slots") = lplb::kMaxNearSlots;
  m.attr("max_edge_ranks") = lplb::kMaxEdgeRanks;
  m.attr("max_colours") = lplb::kMaxColours;
  m.attr("max_candidates") = lplb::kMaxCandidates;
}
