// Tokens to the ranks of their experts and back, by peers' memory. Raw pointers, no framework.
//
// A rank's rows are sorted by slot. `place` says for each of a token's choices which row is its: row r of rank g has
// the number g * capacity + r; what is negative is no row. A token goes over a link once for each rank, however many of
// its choices are there, and back likewise: as the sum of its rows.
#pragma once

#include <cstdint>

#include "peer.h"

#ifdef LPLB_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lplb {

constexpr int kMostChoices = 32;  // of a token: those of each are the lanes of a warp

// The number of each id among those that equal it and come before; 0 of what is no id.
struct Number {
  int num_batches;
  int64_t num_ids;
  int num_kinds;
  int num_chunks;
  int64_t chunk_size;
  const int32_t* ids;     // [batch, num_ids]; outside of 0 .. num_kinds-1 is padding
  const int32_t* starts;  // [batch, num_chunks, num_kinds], equal ones in the chunks before each
};

// Every rank's tokens and where they go.
struct Places {
  PeerBuffer place;  // int32 [num_tokens, num_choices] of each rank
  int num_choices;
  int64_t capacity;  // rows of each rank
};

// This rank's rows: the tokens whose places they are; zeros beyond those of the groups.
struct Dispatch {
  Places places;
  PeerBuffer tokens;  // [num_tokens, row_bytes] of each rank; rows of whole 16-byte words
  int num_groups;
  const int32_t* group_sizes;  // [batch, num_groups]
  unsigned char* rows;         // [batch, capacity, row_bytes]
  int num_blocks;              // that run at once for each batch element
};

// For each token of all ranks that has rows here: their sum, times gates where there are any, for its own rank.
struct Combine {
  Places places;
  bool has_gates;
  PeerBuffer gates;  // float [num_tokens, num_choices] of each rank
  PeerBuffer parts;  // [num_tokens, num_parts, row_bytes / num_parts] of each rank, what is written
  int num_parts;     // the first of them: for each rank that has rows of the token, in the order of its choices
  Float type;        // of rows and parts
  const void* rows;  // [batch, capacity, row_elements]
  int64_t row_elements;
  int num_blocks;
};

// The gradients of this rank's rows, and of all ranks' gates for them, of those of the tokens' sums.
struct CombineGradient {
  Dispatch dispatch;  // `tokens` are the gradients of the sums, `rows` those of the rows
  PeerBuffer gates;
  PeerBuffer of_gates;  // float [num_tokens, num_choices] of each rank, what is written; none where there is no row
  Float type;
  const void* rows;  // [batch, capacity, row_elements], as they were
  int64_t row_elements;
};

// done [batch], where there is one: zeros.
void number_cpu(const Number& number, int32_t* result);
void dispatch_cpu(const Dispatch& dispatch, int32_t* done);
void combine_cpu(const Combine& combine, int32_t* done);
void combine_gradient_cpu(const CombineGradient& gradient, int32_t* done);

#ifdef LPLB_CUDA
cudaError_t number_cuda(cudaStream_t stream, const Number& number, int32_t* result);
cudaError_t dispatch_cuda(cudaStream_t stream, const Dispatch& dispatch, int32_t* done);
cudaError_t combine_cuda(cudaStream_t stream, const Combine& combine, int32_t* done);
cudaError_t combine_gradient_cuda(cudaStream_t stream, const CombineGradient& gradient, int32_t* done);
#endif

}  // namespace lplb
