// Inner products of all samples' gradients of a linear layer, [B, B]: by the Gram form over all pairs of positions, or
// by blocks of dW, of which every sample's is made, and multiplied with every other's while it is in the cache.
#pragma once

#include "cpu/grad_norm_gram.h"
#include "cpu/jobs.h"

namespace fastmix {

template <typename T>
struct SampleGram {
  static constexpr int64_t kBlock = 1 << 16;     // floats of the samples' blocks of dW
  static constexpr int64_t kPartials = 1 << 21;  // doubles of all parts' sums

  LinearSizes sizes;
  Positions<const T> a, g;
  bool bias;
  float* gram;  // [B, B]
  std::atomic<bool>& no_memory;

  void run() const {
    if (!by_positions() || !run_positions()) run_blocks();
  }

 private:
  int64_t rows() const { return sizes.batch * sizes.positions; }

  bool by_positions() const {
    const double r = static_cast<double>(rows()), b = static_cast<double>(sizes.batch);
    const double i = static_cast<double>(sizes.in), o = static_cast<double>(sizes.out);
    return r * r * (i + o) < 2 * r * i * o + b * b * i * o;
  }

  void set(int64_t b, int64_t c, double value) const {
    gram[b * sizes.batch + c] = gram[c * sizes.batch + b] = static_cast<float>(value);
  }

  // False, and nothing useful in gram, if a sample's own sum cancelled.
  bool run_positions() const {
    const int64_t t = sizes.positions;
    const auto pointers = allocate<const float*>(2 * rows());
    const auto converted = allocate<float>(converted_size<T>(rows(), sizes.in + sizes.out));
    if (!pointers || !converted) {
      no_memory = true;
      return true;
    }
    float_rows(a, 0, rows(), sizes.in, converted.get(), pointers.get());
    float_rows(g, 0, rows(), sizes.out, converted.get() + converted_size<T>(rows(), sizes.in), pointers.get() + rows());
    const RowPairs pairs{sizes.in, sizes.out, pointers.get(), pointers.get() + rows(), bias};
    const int64_t each = std::clamp<int64_t>(pairs.block() / t, 1, sizes.batch);  // samples of a block
    const int64_t blocks = (sizes.batch + each - 1) / each, tasks = blocks * (blocks + 1) / 2;
    const double flops = 2.0 * static_cast<double>(each * t * each * t * (sizes.in + sizes.out));
    std::atomic<bool> cancelled{false};
    torch::stable::parallel_for(0, tasks, static_cast<int64_t>(kGrainFlops / flops) + 1,
                                [&](int64_t begin, int64_t end) {
                                  double* const sums = thread_scratch<double>(each * (each + 1));
                                  if (!sums) no_memory = true;
                                  int64_t block = 0, other = begin;  // other <= block
                                  while (other > block) other -= ++block;
                                  for (int64_t task = begin; task < end && sums; ++task) {
                                    if (multiply_blocks(pairs, block * each, other * each, each, sums))
                                      cancelled = true;
                                    if (++other > block) other = 0, ++block;
                                  }
                                });
    return !cancelled;
  }

  // gram of samples [b, b + each) and [c, c + each), c <= b; true if a sample's own sum cancelled.
  bool multiply_blocks(const RowPairs& pairs, int64_t b, int64_t c, int64_t each, double* sums) const {
    const int64_t t = sizes.positions, end_b = std::min(b + each, sizes.batch), end_c = std::min(c + each, sizes.batch);
    double* const diagonal = sums + each * each;
    std::fill(sums, diagonal + each, 0.0);
    pairs.for_products(b * t, end_b * t, c * t, end_c * t, b == c,
                       [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* products) {
                         for (int64_t i = 0; i < rows; ++i) {
                           const int64_t r = row + i, sample = r / t;
                           for (int64_t j = 0; j < columns; ++j) {
                             const int64_t s = column + j, other = s / t;
                             if (s > r) break;
                             const double product = products[i * kDotColumns + j];
                             sums[(sample - b) * each + other - c] += sample == other && s < r ? 2 * product : product;
                             if (s == r) diagonal[sample - b] += product;
                           }
                         }
                       });
    bool cancelled = false;
    for (int64_t i = b; i < end_b; ++i) {
      for (int64_t j = c; j < std::min(end_c, i + 1); ++j) set(i, j, sums[(i - b) * each + j - c]);
      const double own = sums[(i - b) * each + i - c];
      cancelled |= b == c && t > 1 && own < kCancelled * diagonal[i - b];
    }
    return cancelled;
  }

  // By blocks of dW

  void run_blocks() const {
    const int64_t t = sizes.positions, batch = sizes.batch;
    const int64_t in_groups = (sizes.in + kTileColumns - 1) / kTileColumns;
    const int64_t out_groups = (sizes.out + kTileColumns - 1) / kTileColumns;
    const auto a_groups = allocate<float>(groups_size(sizes.in, rows()));
    const auto g_groups = allocate<float>(groups_size(sizes.out, rows()));
    // A block is `height` rows and one group of columns; a last one is the bias's.
    const int64_t height =
        std::clamp<int64_t>(kBlock / (batch * kTileRows * kTileColumns), 1, kTileColumns / kTileRows) * kTileRows;
    const int64_t each = (kTileColumns + height - 1) / height, blocks = in_groups * out_groups * each;
    const int64_t parts = std::clamp<int64_t>(kPartials / (batch * batch), 2, 16);
    const auto partial = allocate<double>(parts * batch * batch);
    if (!a_groups || !g_groups || !partial) {
      no_memory = true;
      return;
    }
    std::fill_n(partial.get(), parts * batch * batch, 0.0);
    torch::stable::parallel_for(0, in_groups + out_groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool is_in = i < in_groups;
        const int64_t column = (is_in ? i : i - in_groups) * kTileColumns;
        float* const groups = (is_in ? a_groups.get() : g_groups.get()) + column * rows();
        const int64_t columns = std::min<int64_t>(kTileColumns, (is_in ? sizes.in : sizes.out) - column);
        pack_positions(is_in ? a : g, 0, rows(), column, columns, groups);
      }
    });
    const int64_t size = height * kTileColumns;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      float* const grads = thread_scratch<float>(batch * size);
      const float** const pointers = thread_scratch<const float*>(batch);
      if (!grads || !pointers) {
        no_memory = true;
        return;
      }
      for (int64_t b = 0; b < batch; ++b) pointers[b] = grads + b * size;
      for (int64_t part = begin; part < end; ++part) {
        double* const sums = partial.get() + part * batch * batch;
        for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
          const int64_t column = block / each % in_groups * kTileColumns, group = block / each / in_groups;
          const int64_t row = block % each * height;
          const int64_t out = std::min(height, std::min<int64_t>(kTileColumns, sizes.out - group * kTileColumns) - row);
          if (out <= 0) continue;
          for (int64_t b = 0; b < batch; ++b) {
            const float* const of_g = g_groups.get() + (group * rows() + b * t) * kTileColumns + row;
            const float* const of_a = a_groups.get() + column * rows() + b * t * kTileColumns;
            const int64_t columns = std::min<int64_t>(kTileColumns, sizes.in - column);
            multiply_tile(out, columns, t, {of_g, 1, kTileColumns}, {of_a}, grads + b * size, kTileColumns);
            for (int64_t i = 0; i < out; ++i) {
              float* const grad = grads + b * size + i * kTileColumns;
              std::fill(grad + round_up(columns, kTileLanes), grad + kTileColumns, 0.0f);
            }
          }
          add_products(pointers, out * kTileColumns, sums);
        }
        if (part == 0 && bias) {
          for (int64_t group = 0; group < out_groups; ++group) {
            const int64_t columns = std::min<int64_t>(kTileColumns, sizes.out - group * kTileColumns);
            for (int64_t b = 0; b < batch; ++b) {
              column_sums(g_groups.get() + (group * rows() + b * t) * kTileColumns, t, columns, grads + b * size);
            }
            add_products(pointers, columns, sums);
          }
        }
      }
    });
    for (int64_t b = 0; b < batch && !no_memory; ++b) {
      for (int64_t c = 0; c <= b; ++c) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partial[(part * batch + b) * batch + c];
        set(b, c, sum);
      }
    }
  }

  // sums [B, B] += the inner products of the rows, at and below the diagonal.
  void add_products(const float* const* rows, int64_t size, double* sums) const {
    for (int64_t row = 0; row < sizes.batch; row += kDotRows) {
      const int64_t count = std::min(kDotRows, sizes.batch - row);
      for (int64_t column = 0; column < row + count; column += kDotColumns) {
        const int64_t columns = std::min(kDotColumns, sizes.batch - column);
        float dots[kDots];
        dot_tile(count, columns, size, rows + row, rows + column, dots);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            sums[(row + i) * sizes.batch + column + j] += dots[i * kDotColumns + j];
          }
        }
      }
    }
  }
};

}  // namespace fastmix
