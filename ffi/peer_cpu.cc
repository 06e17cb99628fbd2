#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "float16.h"
#include "peer.h"

namespace lplb {
namespace {

template <class From, class To>
void add_row(const AddRows& add, int batch, int row, To* sum) {
  const int32_t* replicas = add.replicas + (static_cast<int64_t>(batch) * add.num_sums + row) * add.max_replicas;
  if (add.stays(batch, row)) return;
  constexpr int64_t kBlock = 512;
  for (int64_t first = 0; first < add.row_elements; first += kBlock) {
    const int64_t size = std::min(kBlock, add.row_elements - first);
    float total[kBlock];
    const bool is_empty = add.max_replicas == 0 || add.buffer.find_row(batch, replicas[0]) == nullptr;
    std::fill_n(total, size, is_empty ? 0.0f : -0.0f);  // -0 + x is x, and 0 + -0 were 0
    for (int i = 0; i < add.max_replicas; ++i) {
      const auto* of_replica = reinterpret_cast<const From*>(add.buffer.find_row(batch, replicas[i]));
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
      if (add.stays(batch, i)) continue;
      const unsigned char* from = add.buffer.find_row(batch, add.replicas[batch * add.num_sums + i]);
      if (from != nullptr) {
        std::memcpy(to, from, add.buffer.row_bytes);
      } else {
        std::memset(to, 0, add.buffer.row_bytes);
      }
    }
  }
}

std::mutex begun_mutex;

// Never destroyed: executables may outlive static objects.
std::unordered_set<uint64_t>& begun() {
  static auto& names = *new std::unordered_set<uint64_t>;
  return names;
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

void begin_rows_cpu(const BeginRows& begin) {
  for (int i = 0; i < begin.number; ++i) add_rows_cpu(begin.adds[i], nullptr);
  std::lock_guard lock(begun_mutex);
  begun().insert(begin.name);
}

bool finish_rows_cpu(uint64_t name) {
  std::lock_guard lock(begun_mutex);
  return begun().erase(name) == 1;
}

}  // namespace lplb
