#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "float16.h"

namespace lplb {
namespace {

template <class T>
T* rows_of(const PeerBuffer& buffer, int batch, int rank) {
  return reinterpret_cast<T*>(buffer.address(batch, rank));
}

// visit(this rank, rank, token, places of the token's choices) of each token of all ranks.
template <class Visit>
void for_each_token(const Places& places, int batch, Visit visit) {
  const PeerBuffer& place = places.place;
  const auto* own = place.own + static_cast<int64_t>(batch) * place.num_rows * place.row_bytes;
  int here = 0;  // where the table does not tell of these places, `release` says so
  while (here < place.num_ranks - 1 && rows_of<const unsigned char>(place, batch, here) != own) ++here;
  for (int rank = 0; rank < place.num_ranks; ++rank) {
    const int32_t* of_rank = rows_of<const int32_t>(place, batch, rank);
    for (int64_t token = 0; token < place.num_rows; ++token) {
      visit(here, rank, token, of_rank + token * places.num_choices);
    }
  }
}

int rank_of(const Places& places, int32_t place) { return place < 0 ? -1 : static_cast<int>(place / places.capacity); }

// Zeros beyond the rows of the groups.
void clear_padding(const Dispatch& dispatch, int batch, unsigned char* rows) {
  int64_t used = 0;
  for (int i = 0; i < dispatch.num_groups; ++i) {
    used += dispatch.group_sizes[static_cast<int64_t>(batch) * dispatch.num_groups + i];
  }
  const int64_t row_bytes = dispatch.tokens.row_bytes;
  if (used < dispatch.places.capacity) {
    std::memset(rows + used * row_bytes, 0, (dispatch.places.capacity - used) * row_bytes);
  }
}

template <class T>
void combine(const Combine& combine) {
  const Places& places = combine.places;
  std::vector<float> total(combine.row_elements);
  for (int batch = 0; batch < places.place.num_batches; ++batch) {
    const T* rows = static_cast<const T*>(combine.rows) + batch * places.capacity * combine.row_elements;
    for_each_token(places, batch, [&](int here, int rank, int64_t token, const int32_t* place) {
      int part = 0, first = 0;
      for (; first < places.num_choices && rank_of(places, place[first]) != here; ++first) {
        const int other = rank_of(places, place[first]);
        const bool is_new = std::none_of(place, place + first, [&](int32_t p) { return rank_of(places, p) == other; });
        part += other >= 0 && is_new;
      }
      if (first == places.num_choices) return;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int j = first; j < places.num_choices; ++j) {
        if (rank_of(places, place[j]) != here) continue;
        const int64_t choice = token * places.num_choices + j;
        const float gate = combine.has_gates ? rows_of<const float>(combine.gates, batch, rank)[choice] : 1.0f;
        const T* row = rows + place[j] % places.capacity * combine.row_elements;
        for (int64_t i = 0; i < combine.row_elements; ++i) total[i] += gate * to_float(row[i]);
      }
      T* to = rows_of<T>(combine.parts, batch, rank) + (token * combine.num_parts + part) * combine.row_elements;
      for (int64_t i = 0; i < combine.row_elements; ++i) store(total[i], to + i);
    });
  }
}

template <class T>
void combine_gradient(const CombineGradient& gradient) {
  const Dispatch& dispatch = gradient.dispatch;
  const Places& places = dispatch.places;
  for (int batch = 0; batch < places.place.num_batches; ++batch) {
    const int64_t first = batch * places.capacity * gradient.row_elements;
    const T* rows = static_cast<const T*>(gradient.rows) + first;
    T* of_rows = reinterpret_cast<T*>(dispatch.rows) + first;
    for_each_token(places, batch, [&](int here, int rank, int64_t token, const int32_t* place) {
      const T* of_sum = rows_of<const T>(dispatch.tokens, batch, rank) + token * gradient.row_elements;
      for (int j = 0; j < places.num_choices; ++j) {
        if (rank_of(places, place[j]) != here) continue;
        const int64_t choice = token * places.num_choices + j;
        const int64_t row = place[j] % places.capacity * gradient.row_elements;
        const float gate = rows_of<const float>(gradient.gates, batch, rank)[choice];
        float of_gate = 0;
        for (int64_t i = 0; i < gradient.row_elements; ++i) {
          of_gate += to_float(of_sum[i]) * to_float(rows[row + i]);
          store(gate * to_float(of_sum[i]), of_rows + row + i);
        }
        rows_of<float>(gradient.of_gates, batch, rank)[choice] = of_gate;
      }
    });
    clear_padding(dispatch, batch, reinterpret_cast<unsigned char*>(of_rows));
  }
}

void report(const PeerBuffer& buffer, int32_t* done) {
  if (done != nullptr) std::fill_n(done, buffer.num_batches, 0);
}

}  // namespace

void number_cpu(const Number& number, int32_t* result) {
  std::vector<int32_t> seen(number.num_kinds);
  for (int batch = 0; batch < number.num_batches; ++batch) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t i = batch * number.num_ids; i < (batch + 1) * number.num_ids; ++i) {
      const int32_t id = number.ids[i];
      result[i] = id >= 0 && id < number.num_kinds ? seen[id]++ : 0;
    }
  }
}

void dispatch_cpu(const Dispatch& dispatch, int32_t* done) {
  const Places& places = dispatch.places;
  const int64_t row_bytes = dispatch.tokens.row_bytes;
  for (int batch = 0; batch < places.place.num_batches; ++batch) {
    unsigned char* rows = dispatch.rows + batch * places.capacity * row_bytes;
    for_each_token(places, batch, [&](int here, int rank, int64_t token, const int32_t* place) {
      const unsigned char* from = rows_of<const unsigned char>(dispatch.tokens, batch, rank) + token * row_bytes;
      for (int j = 0; j < places.num_choices; ++j) {
        if (rank_of(places, place[j]) != here) continue;
        std::memcpy(rows + place[j] % places.capacity * row_bytes, from, row_bytes);
      }
    });
    clear_padding(dispatch, batch, rows);
  }
  report(places.place, done);
}

void combine_cpu(const Combine& of, int32_t* done) {
  visit_float(of.type, [&](auto zero) { combine<decltype(zero)>(of); });
  report(of.places.place, done);
}

void combine_gradient_cpu(const CombineGradient& of, int32_t* done) {
  visit_float(of.type, [&](auto zero) { combine_gradient<decltype(zero)>(of); });
  report(of.dispatch.places.place, done);
}

}  // namespace lplb
