// The XLA FFI handlers, by platform.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace lplb {

extern "C" {
XLA_FFI_Error* CountCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveAssignCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AssignCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanAssignCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ExposeCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AddRowsCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* BeginRowsCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FinishRowsCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ReleaseCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* NumberCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DispatchCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineGradientCpu(XLA_FFI_CallFrame* call_frame);
#ifdef LPLB_CUDA
XLA_FFI_Error* CountCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* InitializeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveAssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanAssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ExposeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AddRowsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* BeginRowsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FinishRowsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ReleaseCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* NumberCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DispatchCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineGradientCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GatherCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GatherInstantiateCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GatherInitializeCuda(XLA_FFI_CallFrame* call_frame);
// The type of what the last three keep.
XLA_FFI_TypeId* GatherStateId();
const XLA_FFI_TypeInfo* GatherStateInfo();
XLA_FFI_Error* ShareCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* TranslateCuda(XLA_FFI_CallFrame* call_frame);
#endif
}

}  // namespace lplb
