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
XLA_FFI_Error* ReadRowsCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AddRowsCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ReleaseCpu(XLA_FFI_CallFrame* call_frame);
#ifdef LPLB_CUDA
XLA_FFI_Error* CountCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* InitializeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SolveAssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanAssignCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ExposeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ReadRowsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AddRowsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ReleaseCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ShareCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* TranslateCuda(XLA_FFI_CallFrame* call_frame);
#endif
}

}  // namespace lplb
