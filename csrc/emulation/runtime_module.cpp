// Kernels that try the emulation itself, for Python.
#include "emulation/module.h"

#include "core/device.h"
#include "emulation/barriers.h"

namespace dynaprune::cuda::emulation {
namespace {

DYN_GLOBAL void place_kernel(int* to) {  // [z][y][x][thread]: where each thread finds itself
  const int64_t number = (int64_t(block(2)) * grid(1) + block(1)) * grid(0) + block();
  to[number * threads() + thread()] = 1000 * block(2) + 100 * block(1) + 10 * block() + lane() + warp();
}

template <class T>
DYN_GLOBAL void round_kernel(const float* from, T* rounded, float* back, int64_t size) {
  for (int64_t at = thread(); at < size; at += threads()) {
    rounded[at] = from_float<T>(from[at]);
    back[at] = to_float(rounded[at]);
  }
}

// Every way in which lanes exchange values, [5][threads]; threads from `stop` on return at once.
DYN_GLOBAL void shuffle_kernel(int stop, uint32_t* to) {
  if (thread() >= stop) return;
  const uint32_t value = 100 + uint32_t(thread());
  uint32_t results[5] = {shuffle(value, 3), shuffle_xor(value, 5), shuffle_up(value, 2), shuffle_down(value, 4), 0};
  results[4] = ballot(lane() % 3 == 0);
  for (int k = 0; k < 5; ++k) to[k * threads() + thread()] = results[k];
}

// Each thread reads its neighbour's word: by a warp barrier, which a shuffle does not replace.
DYN_GLOBAL void neighbour_kernel(uint32_t* to) {
  volatile uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
  words[thread()] = uint32_t(thread());
  shuffle_xor(0u, 1);
  sync_warp();
  to[thread()] = words[thread() ^ 1];
}

// Copies to shared memory in two groups; `pending` of them may be unfinished when thread 0 reads.
DYN_GLOBAL void copy_kernel(const float* from, float* to, int pending) {  // [2, 4] each
  float* staged = reinterpret_cast<float*>(shared_memory());
  copy_async(staged, from, 16, 16);
  commit_copies();
  copy_async(staged + 4, from + 4, 16, 8);  // the rest arrives as zeros
  commit_copies();
  wait_copies(pending);
  std::memcpy(to, staged, 32);
}

// A pipeline of one stage: warp 0 fills it, warps 1 and 2 add it up.
constexpr int kStage = 64;
DYN_GLOBAL void pipeline_kernel(const float* from, float* to, int rounds) {
  float* stage = reinterpret_cast<float*>(shared_memory());
  uint64_t* full = reinterpret_cast<uint64_t*>(stage + kStage);
  uint64_t* empty = full + 1;
  if (thread() == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 2 * kWarp);
  }
  sync_block();
  if (warp() == 0) {
    for (int round = 0; lane() == 0 && round < rounds; ++round) {
      mbarrier_wait(empty, uint32_t(round + 1) % 2);
      mbarrier_arrive_expect_tx(full, kStage * 4);
      copy_bulk(stage, kStage * 4, full, [=] { std::memcpy(stage, from + round * kStage, kStage * 4); });
    }
    return;
  }
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    mbarrier_wait(full, uint32_t(round) % 2);
    sum += stage[(thread() + round) % kStage];
    mbarrier_arrive(empty);
  }
  named_barrier_sync(1, 2 * kWarp);  // the stage is free for something else
  stage[thread() - kWarp] = sum;
  named_barrier_sync(1, 2 * kWarp);
  to[thread() - kWarp] = stage[kStage - 1 - (thread() - kWarp)];
}

// Mistakes, by name.
DYN_GLOBAL void mistake_kernel(const char* which, int size) {
  const std::string mistake = which;
  unsigned char* shared = shared_memory();
  if (mistake == "deadlock" && thread() == 3) named_barrier_sync(1, kWarp);
  if (mistake == "misaligned" && thread() == 3) load16(reinterpret_cast<float*>(shared + 4));
  if (mistake == "outside" && thread() == 3) copy_async(shared + size, shared, 16, 16);
  if (mistake == "behind" && thread() == 3) shared[size] = 1;  // for AddressSanitizer
  if (mistake == "not initialised" && thread() == 3) mbarrier_arrive(reinterpret_cast<uint64_t*>(shared));
  if (mistake == "not waited for" && thread() == 3) {
    uint64_t* mbarrier = reinterpret_cast<uint64_t*>(shared + 16);
    mbarrier_init(mbarrier, 1);
    mbarrier_arrive_expect_tx(mbarrier, 16);
    copy_bulk(shared, 16, mbarrier, [] {});
  }
  sync_block();
}

py::array place(const std::array<unsigned, 3>& grid, int threads) {
  const int64_t size = int64_t(grid[0]) * grid[1] * grid[2] * threads;
  const Buffer to(size_t(size) * 4);
  check(launch(&place_kernel, {grid[0], grid[1], grid[2]}, threads, 0, nullptr, to.data<int>()));
  return to.array(py::dtype::of<int>(), {grid[2], grid[1], grid[0], threads});
}

py::tuple round_to(const py::array& values, const std::string& dtype) {
  const Buffer from(values), rounded(size_t(values.size()) * 2), back(size_t(values.size()) * 4);
  const float* data = from.data<const float>();
  float* again = back.data<float>();
  if (dtype == "float16")
    check(launch(&round_kernel<Half>, {1}, 32, 0, nullptr, data, rounded.data<Half>(), again, values.size()));
  else
    check(launch(&round_kernel<BFloat16>, {1}, 32, 0, nullptr, data, rounded.data<BFloat16>(), again, values.size()));
  return py::make_tuple(rounded.array(py::dtype::of<uint16_t>(), {values.size()}),
                        back.array(py::dtype::of<float>(), {values.size()}));
}

py::array shuffles(int threads, int stop) {
  const Buffer to(size_t(5 * threads) * 4);
  check(launch(&shuffle_kernel, {2}, threads, 0, nullptr, stop, to.data<uint32_t>()));
  return to.array(py::dtype::of<uint32_t>(), {5, threads});
}

py::array neighbours(int threads) {
  const Buffer to(size_t(threads) * 4);
  check(launch(&neighbour_kernel, {1}, threads, size_t(threads) * 4, nullptr, to.data<uint32_t>()));
  return to.array(py::dtype::of<uint32_t>(), {threads});
}

py::array copies(const py::array& values, int pending) {
  const Buffer from(values), to(32);
  check(launch(&copy_kernel, {1}, 1, 32, nullptr, from.data<const float>(), to.data<float>(), pending));
  return to.array(py::dtype::of<float>(), {2, 4});
}

py::array pipeline(const py::array& values) {  // [rounds, kStage]
  const Buffer from(values), to(kStage * 4);
  check(launch(&pipeline_kernel, {2}, 3 * kWarp, kStage * 4 + 16, nullptr, from.data<const float>(), to.data<float>(),
               int(values.shape(0))));
  return to.array(py::dtype::of<float>(), {kStage});
}

void mistake(const std::string& which) {
  check(launch(&mistake_kernel, {2}, 64, 48, nullptr, which.c_str(), 48));
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_runtime, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("place", &place);
  module.def("round_to", &round_to);
  module.def("shuffles", &shuffles);
  module.def("neighbours", &neighbours);
  module.def("copies", &copies);
  module.def("pipeline", &pipeline);
  module.def("mistake", &mistake);
}
