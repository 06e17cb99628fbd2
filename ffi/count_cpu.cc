#include <algorithm>

#include "count.h"

namespace lplb {

void count_cpu(const CountShape& shape, const int32_t* expert_ids, int32_t* load, int32_t* starts) {
  const int experts = shape.num_experts;
  for (int batch = 0; batch < shape.num_batches; ++batch) {
    const int32_t* ids = expert_ids + batch * shape.num_ids;
    int32_t* count = load + static_cast<int64_t>(batch) * experts;
    std::fill_n(count, experts, 0);
    for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
      std::copy_n(count, experts, starts + (static_cast<int64_t>(batch) * shape.num_chunks + chunk) * experts);
      const int64_t end = std::min(shape.num_ids, (chunk + 1) * shape.chunk_size);
      for (int64_t i = chunk * shape.chunk_size; i < end; ++i) {
        if (ids[i] >= 0 && ids[i] < experts) ++count[ids[i]];
      }
    }
  }
}

}  // namespace lplb
