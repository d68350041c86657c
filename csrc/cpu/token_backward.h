// How the backward of token_mixing_mlp and token_linear is divided between threads, and its sums.
#pragma once

#include "cpu/token_arguments.h"

namespace fastmix {

// The backward goes through the batch in waves of `samples` samples, each sample's panels of channels in `ranges`
// ranges. A range of a wave's sample is an item: it has sums of parameter gradients of its own, which are added in the
// items' order in the end, so that results do not depend on the number of threads.
struct Waves {
  int64_t samples, ranges, panels;
  int64_t items() const { return samples * ranges; }
  int64_t sample(int64_t item) const { return item / ranges; }
  int64_t begin(int64_t item) const { return item % ranges * panels / ranges; }
  int64_t end(int64_t item) const { return (item % ranges + 1) * panels / ranges; }
};

// As many items, a power of two up to 64, as their sums together take no more memory than x's `bytes`; at least 2.
inline Waves make_waves(int64_t batch, int64_t panels, int64_t bytes, int64_t sums) {
  int64_t items = 2;
  while (items < 64 && 2 * items * sums * static_cast<int64_t>(sizeof(float)) <= bytes) items *= 2;
  const int64_t samples = std::clamp<int64_t>(batch, 1, items);
  return {samples, std::min(panels, (items + samples - 1) / samples), panels};
}

// out[row·row_stride + column·column_stride] ← Σ over items of partial[item·size + row·stride + column], in their
// order.
template <typename T>
void sum_items(const float* partial, int64_t items, int64_t size, int64_t rows, int64_t columns, int64_t stride, T* out,
               int64_t row_stride, int64_t column_stride) {
  constexpr int64_t kBlock = 16;
  const int64_t across = (columns + kBlock - 1) / kBlock, blocks = (rows + kBlock - 1) / kBlock * across;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * kBlock * items));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / across * kBlock, column = block % across * kBlock;
      const int64_t height = std::min(kBlock, rows - row), width = std::min(kBlock, columns - column);
      float sums[kBlock][kBlock] = {};
      for (int64_t item = 0; item < items; ++item) {
        const float* from = partial + item * size + row * stride + column;
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < width; ++j) sums[i][j] += from[i * stride + j];
        }
      }
      T* to = out + row * row_stride + column * column_stride;
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) to[i * row_stride + j * column_stride] = static_cast<T>(sums[i][j]);
      }
    }
  });
}

// For every item of every wave panels(item, sample, slot, sums, scratch), sums = sums_in(carver) in the item's block of
// `partial`, zeroed; then, for LayerNorm over the channels, the rows of the wave's samples. slot is a sample's place in
// norm.du, which holds a wave's samples or all of them.
template <typename T, typename SumsIn, typename Panels>
void run_waves(const Waves& waves, int64_t batch, double flops, const TokenNormBackward<T>& norm, bool du_of_wave,
               float* partial, int64_t sums_size, int64_t scratch_size, std::atomic<bool>& no_memory,
               const SumsIn& sums_in, const Panels& panels) {
  const int64_t s = norm.norm.s, c = norm.norm.c, padded = round_up(c, kLanes);
  const int64_t grain = product_grain(flops / static_cast<double>(waves.ranges));
  torch::stable::parallel_for(0, waves.items(), grain, [&](int64_t begin, int64_t end) {
    std::fill(partial + begin * sums_size, partial + end * sums_size, 0.0f);
  });
  for (int64_t start = 0; start < batch; start += waves.samples) {
    const auto for_items = [&](const auto& visit) {
      torch::stable::parallel_for(0, waves.items(), grain, [&](int64_t begin, int64_t end) {
        float* scratch = thread_scratch<float>(std::max(scratch_size, 2 * padded));
        if (!scratch) no_memory = true;
        for (int64_t item = begin; item < end && scratch; ++item) {
          const int64_t slot = waves.sample(item), sample = start + slot;
          float* base = partial + item * sums_size;
          Carver carver(base);
          if (sample < batch) visit(item, sample, du_of_wave ? slot : sample, sums_in(carver), scratch);
        }
      });
    };
    for_items(panels);
    if (norm.norm.kind != Norm::kLayer || !norm.du) continue;
    for_items([&](int64_t item, int64_t sample, int64_t slot, const auto& sums, float* scratch) {
      ChannelSums dweight(sums.dnorm_weight, scratch, c), dbias(sums.dnorm_bias, scratch + padded, c);
      const int64_t range = item % waves.ranges;
      for (int64_t token = range * s / waves.ranges; token < (range + 1) * s / waves.ranges; ++token) {
        norm.finish_row(sample, slot, token, dweight, dbias);
      }
    });
  }
}

// out ← Σ over items of the vector at `first`, which is item 0's; nothing if it is null.
inline void sum_vector(const float* first, int64_t items, int64_t size, const Tensor& out) {
  if (first) sum_items(first, items, size, 1, out.numel(), 0, static_cast<float*>(out.data_ptr()), 0, 1);
}

}  // namespace fastmix
