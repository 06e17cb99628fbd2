// Peers' memory: rows that are read from the buffers of other devices, or written there. Raw pointers, no framework.
//
// Each rank tells the others where its buffers are: those that all only read, those that others write to, each byte of
// them one rank, and those that a rank changes itself, of which others read what stays. Of each buffer, `num_rows` rows
// on every rank, row r of rank g has the number g * num_rows + r; what is out of range is no row.
#pragma once

#include <cstdint>

#include "device.h"

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

constexpr int kMostTold = 16;  // of a launch

enum class Float { kFloat32, kBfloat16, kFloat16 };

// visit(a zero of the type that `type` stands for), of those that a platform has.
template <class Bfloat16, class Float16, class Visit>
auto visit_float(Float type, Visit visit) {
  switch (type) {
    case Float::kBfloat16:
      return visit(Bfloat16{});
    case Float::kFloat16:
      return visit(Float16{});
    case Float::kFloat32:
      break;
  }
  return visit(float{});
}

// One buffer of each rank, with a batch of [num_rows] rows, and its column in the table of addresses.
struct PeerBuffer {
  int num_batches;
  int num_ranks;
  int num_buffers;        // those that the table tells of
  int buffer;             // this one's number among them
  const uint64_t* table;  // [batch, num_ranks, num_buffers]
  unsigned char* own;     // [batch, num_rows, row_bytes], this rank's
  int64_t num_rows;
  int64_t row_bytes;

  // Where it is on a rank, for one batch element.
  LPLB_INLINE uint64_t address(int64_t batch, int64_t rank) const {
    return table[(batch * num_ranks + rank) * num_buffers + buffer];
  }
  // Where row `number` of the batch element is; nullptr: there is no such row.
  LPLB_INLINE const unsigned char* find_row(int batch, int64_t number) const {
    if (number < 0 || number >= num_ranks * num_rows) return nullptr;
    const int rank = static_cast<int>(number / num_rows);
    const int64_t row = number - rank * num_rows;
    return reinterpret_cast<const unsigned char*>(address(batch, rank)) + row * row_bytes;
  }
};

// Buffers of this rank, number `first` and following of those that the table tells of.
struct Told {
  int num_batches;
  int num_ranks;
  int num_buffers;
  int first;
  int number;
  const uint64_t* table;  // [batch, num_ranks, num_buffers]
  const unsigned char* own[kMostTold];
  int64_t batch_bytes[kMostTold];  // of a batch element
};

// Sums of rows in float32, each in the order in which `replicas` names its rows; zeros where there is none. Single rows
// of the type of the sums are copied, whatever they hold. In place, sums are in the memory of the rows themselves, and
// those that name no row, or just their own, stay as they are.
struct AddRows {
  PeerBuffer buffer;
  bool is_beside;  // other kernels need room at the same time
  bool in_place;
  bool is_copy;
  Float from, to;  // what rows hold, and sums
  int64_t row_elements;
  int num_sums;
  int max_replicas;
  const int32_t* replicas;  // [batch, num_sums, max_replicas], up to the first that is none
  void* sums;               // [batch, num_sums, row_elements]

  // Whether a row is its own sum already: in place, where it names no row, or just itself.
  LPLB_INLINE bool stays(int batch, int row) const {
    if (!in_place) return false;
    const int64_t number = static_cast<int64_t>(batch) * num_sums + row;
    const int32_t* named = replicas + number * max_replicas;
    const unsigned char* first = buffer.find_row(batch, named[0]);
    const bool is_single = max_replicas == 1 || buffer.find_row(batch, named[1]) == nullptr;
    return first == nullptr || (first == buffer.own + number * buffer.row_bytes && is_single);
  }
};

constexpr int kMostBegun = 16;

// Sums that a call begins, and a later one waits for.
struct BeginRows {
  uint64_t name;  // by which these two calls know each other
  int number;
  AddRows adds[kMostBegun];
};

// addresses [batch, num_buffers]: where each batch element of these buffers is.
void expose_cpu(const Told& told, uint64_t* addresses);
// Whether this rank's buffers are where the table says that they are: XLA has not moved them since.
bool in_place_cpu(const Told& told);
// done [batch], where there is one: zeros.
void add_rows_cpu(const AddRows& add, int32_t* done);
// Does it all, and remembers the name.
void begin_rows_cpu(const BeginRows& begin);
// Whether something of that name has begun, and nothing has waited for it yet.
bool finish_rows_cpu(uint64_t name);

#ifdef LPLB_CUDA
cudaError_t expose_cuda(cudaStream_t stream, const Told& told, uint64_t* addresses);
// Stops the program (a trap in the kernel) where a buffer is elsewhere.
cudaError_t in_place_cuda(cudaStream_t stream, const Told& told);
cudaError_t add_rows_cuda(cudaStream_t stream, const AddRows& add, int32_t* done);
// Beside the stream, which is to `join` it by its name.
cudaError_t begin_rows_cuda(cudaStream_t stream, const BeginRows& begin);
// addresses [count]: of what `share` made words, by where this process has each region. See handover.h.
cudaError_t translate_cuda(cudaStream_t stream, const uint64_t* regions, const uint64_t* words, int64_t count,
                           uint64_t* addresses);
// Whether each GPU that this process sees may access the memory of every other.
cudaError_t peers_reachable_cuda(bool* result);
#endif

}  // namespace lplb
