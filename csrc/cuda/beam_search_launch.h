// The two launches of trie_beam_step, and the workspace between them.
#pragma once

#include <algorithm>

#include "common/cuda_launch.h"
#include "cuda/beam_search_kernels.cuh"

namespace fastmix {

constexpr int64_t kMaxListed = 2048;  // for more candidates nothing is listed, and one block looks at all of a sample

// fastmix/ops/beam_search.py computes the workspace's size with these numbers.
static_assert(sizeof(SplitSummary) == 24 && sizeof(ListedCandidate) == 16 && kMergeReserve == 4112 && kKeyBytes == 12);

// How the work is shared out, and where things lie in the workspace, in bytes.
struct BeamPlan {
  int64_t batch, beams, width;
  int64_t splits, listed, lists;  // of a row, of a split, in all
  int64_t candidates, log_sums, large, bytes;
  int64_t merge_capacity;

  BeamPlan(int64_t b, int64_t k, int64_t v, int64_t element_bytes, int64_t num_candidates)
      : batch(b), beams(k), width(v) {
    const int64_t rows = b * k;
    // 2048 blocks are some four waves on a large GPU; less than 16 KB of a row are not worth a block of their own.
    splits = std::min<int64_t>({2048 / std::max<int64_t>(rows, 1), v * element_bytes / 16384, 32});
    splits = std::max<int64_t>(splits, 1);
    const bool listing = num_candidates <= kMaxListed;
    listed = listing ? num_candidates + 1 : 0;
    lists = rows * splits;
    candidates = lists * sizeof(SplitSummary);
    log_sums = candidates + lists * listed * sizeof(ListedCandidate);
    large = log_sums + (rows + 1) / 2 * 8;
    merge_capacity = kMergeReserve + (listing ? kMaxListed : 2 * num_candidates);
    bytes = large + (listing ? 0 : b * merge_capacity * static_cast<int64_t>(kKeyBytes));
  }

  // Beams and tokens, and the listed candidates of a sample, are counted in 32 bits.
  bool fits() const {
    constexpr int64_t kMost = INT32_MAX;
    return batch <= kMost && beams * width <= kMost && lists <= kMost && beams * splits * listed <= kMost;
  }
};

template <typename T>
void launch_beam_step(BeamStep step, const BeamPlan& plan, unsigned char* workspace, cudaStream_t stream) {
  if (plan.batch == 0) return;
  step.type = element_of(static_cast<const T*>(nullptr));
  step.splits = static_cast<uint32_t>(plan.splits);
  step.listed = static_cast<uint32_t>(plan.listed);
  step.summaries = reinterpret_cast<SplitSummary*>(workspace);
  step.candidates = reinterpret_cast<ListedCandidate*>(workspace + plan.candidates);
  step.log_sums = reinterpret_cast<float*>(workspace + plan.log_sums);
  step.large = plan.listed == 0 ? workspace + plan.large : nullptr;
  if (plan.lists > 0) {
    const size_t bytes = sizeof(SplitShared) + split_capacity(step.listed) * kKeyBytes;
    launch(beam_split_kernel<T>, dim3(static_cast<unsigned>(plan.lists)), kSplitThreads, bytes, stream, step);
  }
  const size_t bytes = sizeof(MergeShared) + (step.large ? 0 : plan.merge_capacity * kKeyBytes);
  launch(beam_merge_kernel, dim3(static_cast<unsigned>(plan.batch)), kMergeThreads, bytes, stream, step,
         static_cast<int>(plan.merge_capacity));
}

}  // namespace fastmix
