// Memory of other processes of the host: each hands its regions of GPU memory over to all others, which map them.
//
// XLA's buffers lie in few regions of memory, of which the driver gives file descriptors; jax_lplb/_handover.py carries
// those. A process tells where a buffer is by a word that means the same to all: the process, the number of the region
// there, and the offset in it. Before a word is told, all have mapped the region. So the table of what is mapped, which
// lies in host memory that GPUs read, has an entry for each word that a kernel will ever meet, and nothing waits.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lplb {

constexpr int kOffsetBits = 40;     // of a word: a region has at most 2^40 bytes
constexpr int kMostRegions = 1024;  // of a process, at a time

// Hands a region over to all other processes: its number, its size and a file descriptor. What went wrong, or "".
using HandOver = std::function<std::string(int number, uint64_t bytes, int fd)>;

// These throw std::runtime_error, with a text for the user.

// Begins: as which of the processes, on which GPUs. What was mapped before, for other processes, is forgotten.
void join_processes(int process, int num_processes, std::vector<int> devices, HandOver hand_over);
// The word for a place in this process's memory, after its region is handed over where it was not yet.
uint64_t share(const void* buffer, uint64_t bytes);
// The same for memory of a GPU that may not be the current one.
uint64_t share_on(int device, const void* buffer, uint64_t bytes);
// Maps a region that another process has handed over, in place of what had that number. `fd` stays the caller's.
void map_region(int process, int number, uint64_t bytes, int fd);

// Where regions begin in this process's address space, [num_processes, kMostRegions]; for kernels.
const uint64_t* mapped_regions();

}  // namespace lplb
