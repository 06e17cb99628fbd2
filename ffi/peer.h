// Peers' memory: rows that are read from the buffers of other devices of the process. Raw pointers, no framework.
//
// Each rank tells the others where its buffers are. Of each buffer, `num_rows` rows on every rank, row r of rank g has
// the number g * num_rows + r; what is out of range is no row.
#pragma once

#include <cstdint>

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

constexpr int kMostRowsRead = 8192;  // their numbers are put in order in shared memory

enum class Float { kFloat32, kBfloat16, kFloat16 };

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
};

// Rows for the last `num_reads` rows of this rank's buffer. Only what comes before those may be read from it meanwhile.
struct ReadRows {
  PeerBuffer buffer;
  int num_reads;
  const int32_t* source;  // [batch, num_reads], the rows to read; none: the row stays as it is
};

// Sums of rows in float32, each in the order in which `replicas` names its rows.
struct AddRows {
  PeerBuffer buffer;
  Float from, to;  // what rows hold, and sums
  int64_t row_elements;
  int num_sums;
  int max_replicas;
  const int32_t* replicas;  // [batch, num_sums, max_replicas], up to the first that is none
  void* sums;               // [batch, num_sums, row_elements]
};

// addresses [batch, num_buffers]: where each batch element of this buffer is.
void expose_cpu(const PeerBuffer& buffer, uint64_t* addresses);
// Whether this rank's buffer is where the table says that it is: XLA has not moved it since.
bool in_place_cpu(const PeerBuffer& buffer);
// done [batch], where there is one: zeros.
void read_rows_cpu(const ReadRows& read, int32_t* done);
void add_rows_cpu(const AddRows& add, int32_t* done);

#ifdef LPLB_CUDA
cudaError_t expose_cuda(cudaStream_t stream, const PeerBuffer& buffer, uint64_t* addresses);
// Stops the program (a trap in the kernel) where the buffer is elsewhere.
cudaError_t in_place_cuda(cudaStream_t stream, const PeerBuffer& buffer);
cudaError_t read_rows_cuda(cudaStream_t stream, const ReadRows& read, int32_t* done);
cudaError_t add_rows_cuda(cudaStream_t stream, const AddRows& add, int32_t* done);
// Addresses for words of handover.h, by where its regions begin. A trap where a region is not mapped.
cudaError_t translate_cuda(cudaStream_t stream, const uint64_t* regions, const uint64_t* words, int64_t count,
                           uint64_t* addresses);
// Whether each GPU that this process sees may access the memory of every other.
cudaError_t peers_reachable_cuda(bool* result);
#endif

}  // namespace lplb
