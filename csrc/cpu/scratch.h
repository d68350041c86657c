// Working memory of CPU kernels.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.h"

namespace fastmix {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised, on a cache line, and none (to be checked by the caller) if there is no memory.
template <typename T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

// A thread's own buffer, kept between calls, because fresh pages cost more than a small transform. `which` tells apart
// buffers that are in use at the same time.
template <typename T, int which = 0>
T* thread_scratch(int64_t count) {
  thread_local std::unique_ptr<T[], Free> buffer;
  thread_local int64_t size = 0;
  if (!buffer || size < count) {
    buffer = allocate<T>(count);
    size = buffer ? count : 0;
  }
  return buffer.get();
}

// What the threads of a call share: the calling thread's own buffer, or a new one if that would be large to keep.
class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    if (floats > kKept) own_ = allocate<float>(floats);
    data_ = floats > kKept ? own_.get() : thread_scratch<float, 1>(floats);
  }
  float* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 1 << 20;
  std::unique_ptr<float[], Free> own_;
  float* data_;
};

}  // namespace fastmix
