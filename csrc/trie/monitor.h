// What a build's threads share with the thread that waits for them: progress, and the wish to stop.
#pragma once

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace fastmix::trie {

struct Stopped {};  // thrown by the threads of a build that is no longer wanted

struct Monitor {
  std::atomic<bool> stop{false};
  std::atomic<double> done{0};  // 0 to 1

  void check() const {
    if (stop.load(std::memory_order_relaxed)) throw Stopped{};
  }
};

// f(t) for t = 0 … threads − 1, each in a thread of its own; throws what the first that failed threw.
template <class F>
void in_threads(int threads, F&& f) {
  std::vector<std::exception_ptr> errors(threads);
  const auto guarded = [&](int t) {
    try {
      f(t);
    } catch (...) {
      errors[t] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(guarded, t);
  guarded(0);
  for (auto& thread : others) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace fastmix::trie
