// Fibers, shared memory with guards, and the entry points that tests/test_cuda_emulated.py calls.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <vector>

#include "cuda/fourier_mixing_launch.h"
#include "cuda/global_filter_launch.h"

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

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started, waiting, done;
  std::unique_ptr<char[]> stack;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
ucontext_t scheduler_start;
Fiber* current;
const std::function<void()>* body;

void fiber_main() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  fiber.waiting = false;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  swapcontext(&scheduler_start, &fiber.start);
}

void run_block(int threads, const std::function<void()>& thread) {
  body = &thread;
  while (fibers.size() < static_cast<size_t>(threads)) {
    fibers.emplace_back();
    fibers.back().stack.reset(new char[kStackBytes]);
  }
  std::vector<unsigned> indices(threads);
  for (int i = 0; i < threads; ++i) indices[i] = order == 1 ? threads - 1 - i : i;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.waiting = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  std::mt19937 random(order);
  for (int done = 0; done < threads;) {
    if (order > 1) std::shuffle(indices.begin(), indices.end(), random);
    done = 0;
    int waiting = 0;
    for (const unsigned i : indices) {
      threadIdx = dim3(i);
      resume(fibers[i]);
      done += fibers[i].done;
      waiting += fibers[i].waiting;
    }
    if (done > 0 && waiting > 0) throw std::runtime_error("threads of one block meet at different barriers");
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

void __syncthreads() {
  fastmix::Fiber* fiber = fastmix::current;
  const dim3 thread = threadIdx;
  fiber->waiting = true;
  if (_setjmp(fiber->state) == 0) _longjmp(fastmix::scheduler, 1);
  threadIdx = thread;
}

using namespace fastmix;

extern "C" {

void set_order(int value) { order = value; }

int64_t fourier_workspace(int64_t s, int64_t h, int with_lengths) { return fourier_sample_floats(s, h, with_lengths); }

int fourier_mixing(int dtype, const void* x, const int64_t* lengths, float exponent, int64_t b, int64_t s, int64_t h,
                   float* work, int64_t work_floats, void* y, int shared_block, int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FourierLaunch op{b,      s, h, lengths, exponent, work, work_floats, {shared_block, shared_multiprocessor},
                           nullptr};
    launch_fourier_mixing<T>(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

int64_t filter_workspace_floats(int64_t h, int64_t w, int64_t c, int64_t images) {
  return filter_workspace(h, w, c, images);
}

int64_t filter_bwd_workspace_floats(int64_t b, int64_t h, int64_t w, int64_t c, int64_t images) {
  return filter_bwd_workspace(b, h, w, c, images);
}

int global_filter(int dtype, const void* x, const float* weight, int conjugate, int64_t b, int64_t h, int64_t w,
                  int64_t c, float* work, int64_t work_floats, void* y, int shared_block, int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FilterLaunch op{b,
                          h,
                          w,
                          c,
                          reinterpret_cast<const float2*>(weight),
                          conjugate != 0,
                          work,
                          work_floats,
                          {shared_block, shared_multiprocessor},
                          nullptr};
    launch_global_filter<T>(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

int global_filter_bwd(int dtype, const void* dy, const void* x, const float* weight, int64_t b, int64_t h, int64_t w,
                      int64_t c, float* work, int64_t work_floats, void* dx, float* dw, int shared_block,
                      int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FilterLaunch op{b,
                          h,
                          w,
                          c,
                          reinterpret_cast<const float2*>(weight),
                          true,
                          work,
                          work_floats,
                          {shared_block, shared_multiprocessor},
                          nullptr};
    launch_global_filter_bwd<T>(op, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
                                reinterpret_cast<float2*>(dw));
  });
}

}  // extern "C"
