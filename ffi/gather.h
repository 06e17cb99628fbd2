// A few words of each rank for all ranks of its group, through mailboxes in the memory of a process's GPUs.
//
// Each call site of an executable has a mailbox on every device, with two slots for each place of the mesh. Devices
// count the executions of the call, each for itself: its epoch. In each, a device writes its words into the slot
// `epoch % 2` of its place, in all mailboxes, and waits until those of its group are in its own. So no device has to
// know which others have which place.
//
// - A word travels with its epoch, in one store of 64 bits: where the epoch is there, the word is. No flag follows.
// - Two slots suffice. A device writes into a slot again two epochs later, once it has what its whole group sent in the
//   epoch between. A device sends that after its kernel of the epoch before has ended, which read the slot.
// - Other groups of the mesh may be ahead or behind by any number of epochs. They write into the slots of their own
//   places, which nobody of this group reads.
// - A device that has everyone's words goes on after they have sent them, and sees what they wrote before: a barrier.
// - Nothing waits in a circle. A kernel waits for the same execution of the same call on the devices of its group, and
//   they all have the same calls in the same order: the first call that is not over on all devices has nothing before
//   it. It takes a single block, so that there is room for it beside whatever runs on other streams.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lplb {

constexpr int kMostMailboxes = 64;
constexpr int64_t kMostWords = 1 << 20;  // of a rank, in all batch elements

struct Gather {
  int num_ranks;   // of a group
  int num_groups;  // of the mesh: rank r of group g has the place r * num_groups + g
  int num_batches;
  int num_words;             // of a rank, in each batch element
  const int32_t* place;      // of this device
  const uint32_t* words;     // [batch, num_words]
  uint32_t* words_of_ranks;  // [batch, num_ranks, num_words]
};

// The mailboxes of a call site. They are zero at first, and go back for others to use when the executable does.
class Mailboxes {
 public:
  Mailboxes() = default;
  Mailboxes(const Mailboxes&) = delete;
  ~Mailboxes();

  // Makes one on each of these devices, for gathers of one size; later calls find them made. A kernel that waits may
  // hold up what allocates, so this comes before the first launch; it may come while a stream is captured.
  cudaError_t make(const int32_t* devices, size_t num_devices, const Gather& gather);
  cudaError_t gather(cudaStream_t stream, const Gather& gather) const;

 private:
  struct Mailbox {
    int device;
    uint64_t* words;
  };
  std::vector<Mailbox> mailboxes_;
  size_t bytes_ = 0;  // of each
  std::atomic<bool> made_{false};
};

}  // namespace lplb
