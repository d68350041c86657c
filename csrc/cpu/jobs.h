// Jobs of two or three steps, each of several pieces, shared among threads: whole jobs, whose memory stays in a core's
// cache, or, where jobs are few, the pieces of each step. Who does what never changes a result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/scratch.h"

namespace fastmix {

inline constexpr double kGrainFlops = 12e6;  // some 120 µs of work, for which waking a sleeping thread pays

struct Jobs {
  const char* op;
  int64_t count;
  int64_t floats;        // of memory that the steps of a job share
  int64_t scratch;       // floats of a thread's own
  double flops;          // of a job
  bool ordered = false;  // one job after the other
};

// pieces is how many a step has, run(job, piece, memory, scratch) does one.
template <typename Run>
struct Step {
  int64_t pieces;
  Run run;
};
template <typename Run>
Step(int64_t, Run) -> Step<Run>;

template <typename... Runs>
void run_jobs(const Jobs& jobs, const Step<Runs>&... steps) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto grain = [](double flops) { return static_cast<int64_t>(kGrainFlops / std::max(flops, 1.0)) + 1; };
  std::atomic<bool> no_memory{false};
  if (!jobs.ordered && (threads == 1 || jobs.count % threads == 0 || jobs.count >= 4 * threads)) {
    torch::stable::parallel_for(0, jobs.count, grain(jobs.flops), [&](int64_t begin, int64_t end) {
      const Workspace memory(jobs.floats);
      float* const scratch = thread_scratch<float, 2>(jobs.scratch);
      if (!memory.data() || !scratch) {
        no_memory = true;
        return;
      }
      for (int64_t job = begin; job < end; ++job) {
        const auto all_pieces = [&](const auto& step) {
          for (int64_t piece = 0; piece < step.pieces; ++piece) step.run(job, piece, memory.data(), scratch);
        };
        (all_pieces(steps), ...);
      }
    });
  } else {
    const int64_t together = jobs.ordered ? 1 : std::min(jobs.count, threads);
    const auto memory = allocate<float>(together * jobs.floats);
    no_memory = !memory;
    for (int64_t first = 0; first < jobs.count && !no_memory; first += together) {
      const int64_t count = std::min(together, jobs.count - first);
      const auto all_pieces = [&](const auto& step) {
        const double flops = jobs.flops / static_cast<double>(std::max<int64_t>(step.pieces, 1));
        torch::stable::parallel_for(0, count * step.pieces, grain(flops), [&](int64_t begin, int64_t end) {
          float* const scratch = thread_scratch<float, 2>(jobs.scratch);
          if (!scratch) no_memory = true;
          for (int64_t i = begin; i < end && scratch; ++i) {
            const int64_t job = i / step.pieces;
            step.run(first + job, i % step.pieces, memory.get() + job * jobs.floats, scratch);
          }
        });
      };
      (all_pieces(steps), ...);
    }
  }
  FASTMIX_CHECK(!no_memory, jobs.op, ": no memory for ", jobs.floats, " float32");
}

}  // namespace fastmix
