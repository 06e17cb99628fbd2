// Runs the balancer's kernels in one stream beside a chain of large matrix products in another, of equal priority.
//
//   lplb_coexist room PROBLEM CUBLAS SIZE NUM_SMS...   what they cost each other; NUM_SMS 0 is the default
//   lplb_coexist same PROBLEM CUBLAS SIZE REPETITIONS  whether every repetition gives the bits of the first
//
// PROBLEM is a file of benchmarks/kernels.py, CUBLAS a path of libcublas.so.13, SIZE the order of the bf16 matrices.
// Prints JSON: a line for each setting of `room`, one line for `same`.
#include <cuda_bf16.h>
#include <dlfcn.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>

#include "bench.h"

namespace {

using namespace lplb::bench;

// ---- The neighbour: bf16 matrix products by cuBLAS, loaded at run time, because a toolkit may come without it
// --------

__global__ void fill_kernel(__nv_bfloat16* values, size_t count, uint32_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;  // any noise: zeros would draw less power
    x ^= x >> 16, x *= 0x45d9f3bu, x ^= x >> 16;
    values[i] = __float2bfloat16(static_cast<float>(x) * 0x1p-32f - 0.5f);
  }
}

class Matmul {
 public:
  Matmul(const char* library, int size, cudaStream_t stream) : size_(size), a_(cells()), b_(cells()), c_(cells()) {
    void* handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) fail(dlerror());
    const auto find = [&](const char* name) {
      void* symbol = dlsym(handle, name);
      if (symbol == nullptr) fail(dlerror());
      return symbol;
    };
    gemm_ = reinterpret_cast<decltype(gemm_)>(find("cublasGemmEx"));
    set_sms_ = reinterpret_cast<decltype(set_sms_)>(find("cublasSetSmCountTarget"));
    require(reinterpret_cast<int (*)(void**)>(find("cublasCreate_v2"))(&handle_));
    require(reinterpret_cast<int (*)(void*, cudaStream_t)>(find("cublasSetStream_v2"))(handle_, stream));
    uint32_t seed = 0;
    for (Device<__nv_bfloat16>* matrix : {&a_, &b_}) {
      fill_kernel<<<1024, 256, 0, stream>>>(matrix->get(), matrix->size(), ++seed);
      LPLB_CHECK(cudaGetLastError());
    }
  }
  // How many multiprocessors products are planned for; 0 for all.
  void use_sms(int count) { require(set_sms_(handle_, count)); }
  void launch() {
    constexpr int kNoTranspose = 0, kFloatAccumulation = 68, kDefaultAlgorithm = -1;
    const float one = 1, zero = 0;
    require(gemm_(handle_, kNoTranspose, kNoTranspose, size_, size_, size_, &one, a_.get(), CUDA_R_16BF, size_,
                  b_.get(), CUDA_R_16BF, size_, &zero, c_.get(), CUDA_R_16BF, size_, kFloatAccumulation,
                  kDefaultAlgorithm));
  }

 private:
  size_t cells() const { return static_cast<size_t>(size_) * size_; }
  static void require(int status) {
    if (status != 0) fail(("cuBLAS: status " + std::to_string(status)).c_str());
  }
  int size_;
  Device<__nv_bfloat16> a_, b_, c_;
  void* handle_ = nullptr;
  int (*set_sms_)(void*, int);
  int (*gemm_)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, const void*, cudaDataType,
               int, const void*, void*, cudaDataType, int, int, int);
};

// ---- The balancer: count, solve and assign of one instance
// -----------------------------------------------------------

class Balancer {
 public:
  // By edge balance, or by the interior-point method.
  Balancer(const Problem& problem, int instance, int num_sms, bool along_edges)
      : solve_(problem.solve),
        edges_(along_edges ? &problem.colouring : nullptr),
        assign_(problem.assign),
        log2phy_(problem.log2phy),
        load_(slice(problem.loads, instance, problem.num_experts)),
        ids_(slice(problem.ids, instance, problem.num_ids)),
        offset_(std::vector<int32_t>(problem.num_experts, 0)),
        shares_(4 * lplb::shares_rows(problem.num_experts, problem.num_physical)),
        results_(layout(problem)) {
    assign_.count.num_sms = num_sms;
    if (along_edges) solve_.max_iterations = kMostSweeps;
  }

  cudaError_t launch(cudaStream_t stream) {
    int32_t* count = part<int32_t>(kCount);
    int32_t* starts = part<int32_t>(kStarts);
    float* fraction = part<float>(kFraction);
    if (const cudaError_t error = lplb::count_cuda(stream, assign_.count, ids_.get(), count, starts);
        error != cudaSuccess) {
      return error;
    }
    return lplb::solve_assign_cuda(
        stream, solve_, edges_, {load_.get(), log2phy_.get()},
        {fraction, part<float>(kRankLoad), part<float>(kGap), part<int32_t>(kIterations), part<int32_t>(kStatus)},
        assign_, {ids_.get(), starts, fraction, load_.get(), offset_.get(), log2phy_.get()},
        {part<int32_t>(kPhysicalIds), part<int32_t>(kAssigned), shares_.get()});
  }

  // All results, one after the other.
  Device<uint32_t>& results() { return results_; }

 private:
  enum Part { kCount, kStarts, kFraction, kRankLoad, kGap, kIterations, kStatus, kPhysicalIds, kAssigned, kParts };

  size_t layout(const Problem& p) {
    const size_t experts = p.num_experts, groups = p.num_groups, ranks = p.num_ranks;
    const size_t sizes[kParts] = {experts,
                                  p.count.num_chunks * experts,
                                  experts * p.max_replicas,
                                  ranks,
                                  groups,
                                  groups,
                                  groups,
                                  size_t(p.num_ids),
                                  ranks};
    size_t words = 0;
    for (int i = 0; i < kParts; ++i) {
      begin_[i] = words;
      words += (sizes[i] + 63) / 64 * 64;  // as aligned as an allocation of its own
    }
    return words;
  }
  template <class T>
  T* part(Part which) {
    return reinterpret_cast<T*>(results_.get() + begin_[which]);
  }
  size_t begin_[kParts];
  lplb::SolveShape solve_;
  const lplb::EdgeColouring* edges_;  // of the problem
  lplb::AssignShape assign_;
  Device<int32_t> log2phy_, load_, ids_, offset_, shares_;
  Device<uint32_t> results_;
};

// ---- Streams and times
// -----------------------------------------------------------------------------------------------

class Event {
 public:
  explicit Event(cudaStream_t stream) {
    LPLB_CHECK(cudaEventCreate(&event_));
    LPLB_CHECK(cudaEventRecord(event_, stream));
  }
  Event(Event&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }
  bool reached() const {
    const cudaError_t state = cudaEventQuery(event_);
    if (state != cudaErrorNotReady) LPLB_CHECK(state);
    return state == cudaSuccess;
  }
  void wait() const { LPLB_CHECK(cudaEventSynchronize(event_)); }
  double us_since(const Event& begin) const {
    float milliseconds;
    LPLB_CHECK(cudaEventElapsedTime(&milliseconds, begin.event_, event_));
    return milliseconds * 1e3;
  }

 private:
  cudaEvent_t event_;
};

struct Streams {
  Streams() {
    // Not blocking: the default stream, which nothing uses meanwhile, would order them.
    LPLB_CHECK(cudaStreamCreateWithFlags(&matmul, cudaStreamNonBlocking));
    LPLB_CHECK(cudaStreamCreateWithFlags(&balance, cudaStreamNonBlocking));
  }
  cudaStream_t matmul, balance;
};

cudaGraphExec_t graph_of(Balancer& balancer, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  LPLB_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  LPLB_CHECK(balancer.launch(stream));
  LPLB_CHECK(cudaStreamEndCapture(stream, &graph));
  LPLB_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  LPLB_CHECK(cudaGraphDestroy(graph));
  return executable;
}

void append_differences(const std::vector<Event>& events, size_t begin, size_t end, std::vector<double>& us) {
  for (size_t i = begin + 1; i < end; ++i) us.push_back(events[i].us_since(events[i - 1]));
}

// ---- Room for others
// -------------------------------------------------------------------------------------------------

constexpr int kRounds = 5, kMatmuls = 40, kCalls = 200;
constexpr size_t kInFlight = 8;  // calls queued ahead, so that the balancer's stream is never empty

// Which calls of the balancer run beside a chain of matrix products.
enum class Pace {
  kNone,
  kBackToBack,  // one after the other: the worst neighbour it can be
  kOneEach,     // one for each product, from its start: as in a model's layer
};

// Times of kMatmuls products, and of the balancer's calls meanwhile.
void run_matmuls(const Streams& streams, Matmul& matmul, cudaGraphExec_t balance, Pace pace,
                 std::vector<double>& matmul_us, std::vector<double>& balance_us) {
  std::vector<Event> products, calls;
  calls.reserve(1 << 16);
  if (pace == Pace::kBackToBack) LPLB_CHECK(cudaGraphLaunch(balance, streams.balance));
  products.emplace_back(streams.matmul);
  for (int i = 0; i < kMatmuls; ++i) {
    if (pace == Pace::kOneEach) {
      LPLB_CHECK(cudaStreamWaitEvent(streams.balance, products.back().get(), 0));
      calls.emplace_back(streams.balance);
      LPLB_CHECK(cudaGraphLaunch(balance, streams.balance));
      calls.emplace_back(streams.balance);
    }
    matmul.launch();
    products.emplace_back(streams.matmul);
  }
  if (pace == Pace::kBackToBack) {
    while (!products.back().reached()) {
      if (calls.size() >= kInFlight) calls[calls.size() - kInFlight].wait();
      LPLB_CHECK(cudaGraphLaunch(balance, streams.balance));
      calls.emplace_back(streams.balance);
    }
  }
  LPLB_CHECK(cudaStreamSynchronize(streams.matmul));
  LPLB_CHECK(cudaStreamSynchronize(streams.balance));
  append_differences(products, 0, products.size(), matmul_us);
  if (pace == Pace::kBackToBack && calls.size() > kInFlight) {
    append_differences(calls, 0, calls.size() - kInFlight, balance_us);  // the others may have run after the products
  }
  if (pace == Pace::kOneEach) {
    for (size_t i = 0; i < calls.size(); i += 2) append_differences(calls, i, i + 2, balance_us);
  }
}

void run_balance(const Streams& streams, cudaGraphExec_t balance, std::vector<double>& us) {
  std::vector<Event> calls;
  for (int i = 0; i <= kCalls; ++i) {
    LPLB_CHECK(cudaGraphLaunch(balance, streams.balance));
    calls.emplace_back(streams.balance);
  }
  LPLB_CHECK(cudaStreamSynchronize(streams.balance));
  append_differences(calls, 0, calls.size(), us);
}

void room(const Problem& problem, const char* cublas, int size, const std::vector<int>& limits) {
  Streams streams;
  Matmul matmul(cublas, size, streams.matmul);
  int sms;
  LPLB_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  std::vector<double> ignored;
  for (int i = 0; i < 10; ++i) run_matmuls(streams, matmul, nullptr, Pace::kNone, ignored, ignored);  // warms up
  for (const int num_sms : limits) {
    Balancer balancer(problem, problem.instances / 2, num_sms, problem.has_edges);
    const cudaGraphExec_t balance = graph_of(balancer, streams.balance);
    // Products planned for the whole GPU, and for what the balancer leaves.
    const std::vector<int> plans = num_sms > 0 ? std::vector<int>{sms, sms - num_sms} : std::vector<int>{sms};
    for (const int matmul_sms : plans) {
      matmul.use_sms(matmul_sms == sms ? 0 : matmul_sms);
      for (const Pace pace : {Pace::kBackToBack, Pace::kOneEach}) {
        // By turns, so that clocks and temperature drift for all alike.
        std::vector<double> alone_us, beside_us, balance_alone_us, balance_beside_us;
        for (int round = 0; round < kRounds; ++round) {
          run_matmuls(streams, matmul, nullptr, Pace::kNone, alone_us, ignored);
          run_balance(streams, balance, balance_alone_us);
          run_matmuls(streams, matmul, balance, pace, beside_us, balance_beside_us);
        }
        std::printf("{\"num_sms\": %d, \"matmul_sms\": %d, \"pace\": \"%s\", ", num_sms, matmul_sms,
                    pace == Pace::kBackToBack ? "back to back" : "one a matmul");
        print("matmul_alone_us", alone_us, "%.2f", ", ");
        print("matmul_beside_us", beside_us, "%.2f", ", ");
        print("balance_alone_us", balance_alone_us, "%.2f", ", ");
        print("balance_beside_us", balance_beside_us, "%.2f", "}\n");
        std::fflush(stdout);
      }
    }
    LPLB_CHECK(cudaGraphExecDestroy(balance));
  }
}

// ---- The same bits every time
// ----------------------------------------------------------------------------------------

__global__ void compare_kernel(const uint32_t* a, const uint32_t* b, size_t count, unsigned long long* different) {
  const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  if (i < count && a[i] != b[i]) atomicAdd(different, 1ull);
}

void same(const Problem& problem, const char* cublas, int size, int repetitions) {
  Streams streams;
  Matmul matmul(cublas, size, streams.matmul);
  Device<unsigned long long> different(std::vector<unsigned long long>{0});
  std::vector<std::unique_ptr<Balancer>> balancers;
  std::vector<std::unique_ptr<Device<uint32_t>>> firsts;
  std::deque<Event> pending;  // products that may still run
  long long matmuls = 0;
  const auto poison = [&](Balancer& balancer) {
    Device<uint32_t>& results = balancer.results();
    LPLB_CHECK(cudaMemsetAsync(results.get(), 0x7f, results.size() * sizeof(uint32_t), streams.balance));
  };
  // The first repetition: on an idle GPU.
  for (int solve = 0; solve < problem.instances * (problem.has_edges ? 2 : 1); ++solve) {
    const bool along_edges = solve >= problem.instances;
    balancers.push_back(std::make_unique<Balancer>(problem, solve % problem.instances, 0, along_edges));
    poison(*balancers.back());
    LPLB_CHECK(balancers.back()->launch(streams.balance));
    LPLB_CHECK(cudaStreamSynchronize(streams.balance));
    firsts.push_back(std::make_unique<Device<uint32_t>>(balancers.back()->results().host()));
  }
  for (int repetition = 1; repetition < repetitions; ++repetition) {
    for (size_t solve = 0; solve < balancers.size(); ++solve) {
      while (!pending.empty() && pending.front().reached()) pending.pop_front();
      while (pending.size() < 4) {
        matmul.launch();
        pending.emplace_back(streams.matmul);
        ++matmuls;
      }
      Balancer& balancer = *balancers[solve];
      poison(balancer);
      LPLB_CHECK(balancer.launch(streams.balance));
      const size_t words = balancer.results().size();
      compare_kernel<<<static_cast<unsigned>((words + 255) / 256), 256, 0, streams.balance>>>(
          balancer.results().get(), firsts[solve]->get(), words, different.get());
      LPLB_CHECK(cudaGetLastError());
      LPLB_CHECK(cudaStreamSynchronize(streams.balance));
    }
  }
  LPLB_CHECK(cudaDeviceSynchronize());
  std::printf("{\"solves\": %zu, \"repetitions\": %d, \"different_words\": %llu, \"matmuls\": %lld}\n",
              balancers.size(), repetitions, different.host()[0], matmuls);
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_room = argc >= 6 && std::strcmp(argv[1], "room") == 0;
  const bool is_same = argc == 6 && std::strcmp(argv[1], "same") == 0;
  if (!is_room && !is_same) {
    std::fprintf(stderr,
                 "usage: lplb_coexist room PROBLEM CUBLAS SIZE NUM_SMS...\n"
                 "       lplb_coexist same PROBLEM CUBLAS SIZE REPETITIONS\n");
    return 2;
  }
  const Problem problem(argv[2]);
  LPLB_CHECK(lplb::prepare_solve_cuda());
  LPLB_CHECK(lplb::prepare_assign_cuda());
  if (is_same) {
    same(problem, argv[3], std::atoi(argv[4]), std::atoi(argv[5]));
  } else {
    std::vector<int> limits;
    for (int i = 5; i < argc; ++i) limits.push_back(std::atoi(argv[i]));
    room(problem, argv[3], std::atoi(argv[4]), limits);
  }
  return 0;
}
