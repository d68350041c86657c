// Threads as fibers, shared memory with guards, and the launch of a grid; each library of kernels includes it once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "common/cuda_launch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastmix {

constexpr size_t kSharedFloats2 = 232448 / sizeof(float2);
constexpr size_t kStackBytes = 64 * 1024;
alignas(16) float2 shared[kSharedFloats2 + 1024];

namespace {

int order;  // of the threads between barriers: 0 ascending, 1 descending, else the seed of a shuffle

enum class Waits { kNot, kForWarp, kForBlock, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started;
  Waits waits;
  unsigned exchanges;  // by the fiber, with the others of its warp
  std::unique_ptr<char[]> stack;
};

struct Warp {
  bool runs;               // some lane does not wait
  uint64_t values[2][32];  // of the exchange at hand, and of the one that some lanes still read
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
unsigned barriers;  // passed by the block
bool any[2];        // of __syncthreads_or, at this barrier and at the one before
jmp_buf scheduler;
ucontext_t scheduler_start;
Fiber* current;
const std::function<void()>* body;

void fiber_main() {
  (*body)();
  current->waits = Waits::kDone;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  fiber.waits = Waits::kNot;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  swapcontext(&scheduler_start, &fiber.start);
}

void wait(Waits waits) {
  Fiber* fiber = current;
  const dim3 thread = threadIdx;
  fiber->waits = waits;
  if (_setjmp(fiber->state) == 0) _longjmp(scheduler, 1);
  threadIdx = thread;
}

// Lets the first … last − 1 go on if all of them wait for each other.
bool release(int first, int last, Waits waits) {
  for (int i = first; i < last; ++i) {
    if (fibers[i].waits != waits) return false;
  }
  for (int i = first; i < last; ++i) {
    fibers[i].waits = Waits::kNot;
    warps[i / 32].runs = true;
  }
  return true;
}

// A warp runs on to the next barrier before another one starts, or they take turns at random.
int next_warp(std::mt19937& random) {
  std::vector<int> ready;
  for (size_t i = 0; i < warps.size(); ++i) {
    if (warps[i].runs) ready.push_back(i);
  }
  if (ready.empty()) return -1;
  return order == 0 ? ready.front() : order == 1 ? ready.back() : ready[random() % ready.size()];
}

// Every lane that can, up to where it waits.
void run_warp(int warp, int threads, std::mt19937& random) {
  std::vector<int> lanes;
  for (int i = 32 * warp; i < std::min(32 * warp + 32, threads); ++i) {
    if (fibers[i].waits == Waits::kNot) lanes.push_back(i);
  }
  if (order == 1) std::reverse(lanes.begin(), lanes.end());
  if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
  for (const int i : lanes) {
    threadIdx = dim3(i);
    resume(fibers[i]);
  }
  warps[warp].runs = false;
}

void run_block(int threads, const std::function<void()>& thread) {
  body = &thread;
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp{true, {}});
  any[0] = any[1] = false;
  barriers = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.started = false;
    fiber.waits = Waits::kNot;
    fiber.exchanges = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  std::mt19937 random(order);
  while (true) {
    const int warp = next_warp(random);
    if (warp >= 0) {
      run_warp(warp, threads, random);
      if (32 * warp + 32 <= threads) release(32 * warp, 32 * warp + 32, Waits::kForWarp);
    } else if (release(0, threads, Waits::kForBlock)) {
      any[++barriers % 2] = false;
    } else {
      for (int i = 0; i < threads; ++i) {
        if (fibers[i].waits != Waits::kDone)
          throw std::runtime_error("threads of one block meet at different barriers");
      }
      return;
    }
  }
}

}  // namespace

void run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& thread) {
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.y > 65535)
    throw std::runtime_error("bad launch");
  if (shared_bytes > kSharedFloats2 * sizeof(float2)) throw std::runtime_error("too much shared memory");
  gridDim = grid;
  blockDim = dim3(threads);
  unsigned char* bytes = reinterpret_cast<unsigned char*>(shared);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      ASAN_UNPOISON_MEMORY_REGION(bytes, sizeof(shared));
      // 0xFF bytes are a NaN in every floating type, and beyond the end a guard.
      std::memset(bytes, 0xFF, shared_bytes + 4096);
      ASAN_POISON_MEMORY_REGION(bytes + (shared_bytes + 7) / 8 * 8, 4096);
      run_block(threads, thread);
      ASAN_UNPOISON_MEMORY_REGION(bytes, sizeof(shared));
      for (size_t i = shared_bytes; i < shared_bytes + 4096; ++i) {
        if (bytes[i] != 0xFF) throw std::runtime_error("a write beyond shared memory");
      }
    }
  }
}

void set_order(int value) { order = value; }

uint64_t exchange(unsigned mask, uint64_t value, int from) {
  if (mask != 0xFFFFFFFFu || from < 0 || from > 31) std::abort();
  const unsigned lane = threadIdx.x % 32;
  uint64_t* values = warps[threadIdx.x / 32].values[current->exchanges++ % 2];
  values[lane] = value;
  wait(Waits::kForWarp);
  return values[from];
}

unsigned ballot(unsigned mask, bool value) {
  if (mask != 0xFFFFFFFFu) std::abort();
  const unsigned lane = threadIdx.x % 32;
  uint64_t* values = warps[threadIdx.x / 32].values[current->exchanges++ % 2];
  values[lane] = value;
  wait(Waits::kForWarp);
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= static_cast<unsigned>(values[i]) << i;
  return lanes;
}

template <typename Call>
int guarded(const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// Calls with T for dtype 0 float, 1 bf16, 2 fp16.
template <typename Call>
int with_type(int dtype, const Call& call) {
  return guarded([&] {
    if (dtype == 0) call(float{});
    if (dtype == 1) call(__nv_bfloat16{});
    if (dtype == 2) call(__half{});
  });
}

}  // namespace fastmix

void __syncthreads() { fastmix::wait(fastmix::Waits::kForBlock); }

int __syncthreads_or(int value) {
  using namespace fastmix;
  any[barriers % 2] |= value != 0;
  wait(Waits::kForBlock);
  return any[(barriers - 1) % 2];
}
