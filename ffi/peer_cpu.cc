#include <algorithm>
#include <cstring>

#include "float16.h"
#include "peer.h"

namespace lplb {
namespace {

// Where row `number` of the batch element is; nullptr: there is no such row.
const unsigned char* find_row(const PeerBuffer& buffer, int batch, int64_t number) {
  if (number < 0 || number >= buffer.num_ranks * buffer.num_rows) return nullptr;
  const int64_t rank = number / buffer.num_rows;
  return reinterpret_cast<const unsigned char*>(buffer.address(batch, rank)) +
         number % buffer.num_rows * buffer.row_bytes;
}

// Whether a row is its own sum already: in place, where it names no row, or just itself.
bool stays(const AddRows& add, int batch, const int32_t* replicas, const void* own) {
  if (!add.in_place) return false;
  const unsigned char* first = find_row(add.buffer, batch, replicas[0]);
  const bool is_single = add.max_replicas == 1 || find_row(add.buffer, batch, replicas[1]) == nullptr;
  return first == nullptr || (first == own && is_single);
}

template <class From, class To>
void add_row(const AddRows& add, int batch, int row, To* sum) {
  const int32_t* replicas = add.replicas + (static_cast<int64_t>(batch) * add.num_sums + row) * add.max_replicas;
  if (stays(add, batch, replicas, sum)) return;
  constexpr int64_t kBlock = 512;
  for (int64_t first = 0; first < add.row_elements; first += kBlock) {
    const int64_t size = std::min(kBlock, add.row_elements - first);
    float total[kBlock];
    const bool is_empty = add.max_replicas == 0 || find_row(add.buffer, batch, replicas[0]) == nullptr;
    std::fill_n(total, size, is_empty ? 0.0f : -0.0f);  // -0 + x is x, and 0 + -0 were 0
    for (int i = 0; i < add.max_replicas; ++i) {
      const auto* of_replica = reinterpret_cast<const From*>(find_row(add.buffer, batch, replicas[i]));
      if (of_replica == nullptr) break;
      for (int64_t j = 0; j < size; ++j) total[j] += to_float(of_replica[first + j]);
    }
    for (int64_t j = 0; j < size; ++j) store(total[j], sum + first + j);
  }
}

template <class From, class To>
void add_rows(const AddRows& add) {
  To* sum = static_cast<To*>(add.sums);
  for (int batch = 0; batch < add.buffer.num_batches; ++batch) {
    for (int row = 0; row < add.num_sums; ++row, sum += add.row_elements) add_row<From, To>(add, batch, row, sum);
  }
}

void copy_rows(const AddRows& add) {
  auto* to = static_cast<unsigned char*>(add.sums);
  for (int batch = 0; batch < add.buffer.num_batches; ++batch) {
    for (int i = 0; i < add.num_sums; ++i, to += add.buffer.row_bytes) {
      const int32_t* replica = add.replicas + batch * add.num_sums + i;
      if (stays(add, batch, replica, to)) continue;
      const unsigned char* from = find_row(add.buffer, batch, *replica);
      if (from != nullptr) {
        std::memcpy(to, from, add.buffer.row_bytes);
      } else {
        std::memset(to, 0, add.buffer.row_bytes);
      }
    }
  }
}

}  // namespace

void expose_cpu(const Told& told, uint64_t* addresses) {
  for (int batch = 0; batch < told.num_batches; ++batch) {
    for (int i = 0; i < told.number; ++i) {
      addresses[batch * told.num_buffers + told.first + i] =
          reinterpret_cast<uint64_t>(told.own[i] + batch * told.batch_bytes[i]);
    }
  }
}

bool in_place_cpu(const Told& told) {
  for (int i = 0; i < told.number; ++i) {
    bool is_told = false;
    for (int rank = 0; rank < told.num_ranks; ++rank) {
      is_told |= told.table[rank * told.num_buffers + told.first + i] == reinterpret_cast<uint64_t>(told.own[i]);
    }
    if (!is_told) return false;
  }
  return true;
}

void add_rows_cpu(const AddRows& add, int32_t* done) {
  if (add.is_copy) {
    copy_rows(add);
  } else {
    visit_float(add.from,
                [&](auto from) { visit_float(add.to, [&](auto to) { add_rows<decltype(from), decltype(to)>(add); }); });
  }
  if (done != nullptr) std::fill_n(done, add.buffer.num_batches, 0);
}

}  // namespace lplb
