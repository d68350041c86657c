// A convolution's sizes, the boxes of output positions and the blocks of rows in which dW is computed, and its tensors.
#pragma once

#include <array>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"

namespace fastmix {

// body(std::integral_constant<int, count>{}), 1 ≤ count ≤ most.
template <int most, typename Body>
void with_count(int64_t count, const Body& body) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, body);
  }
  body(std::integral_constant<int, most>{});
}

// One spatial dimension, its output cut into boxes.
struct ConvAxis {
  int64_t input, output, kernel, stride, padding, dilation;
  int64_t boxes = 1, extent = 0;  // how many, and how long each but the last

  int64_t span() const { return (kernel - 1) * dilation; }
  int64_t count(int64_t first) const { return std::min(extent, output - first); }
  void cut(int64_t longest) {
    boxes = (output + longest - 1) / longest;
    extent = (output + boxes - 1) / boxes;
    boxes = (output + extent - 1) / extent;
  }

  // The indices i, begin ≤ i < end, of count for which start + i·step lies inside of the input.
  struct Inside {
    int64_t begin, end, start, step;
    int64_t at(int64_t i) const { return start + i * step; }
  };
  Inside inside(int64_t start, int64_t step, int64_t count) const {
    const auto below = [&](int64_t bound) {  // how many i have start + i·step < bound
      return start >= bound ? 0 : std::min(count, (bound - start + step - 1) / step);
    };
    return {below(0), below(input), start, step};
  }
};

// What a thread does at a time: the rows of dW of the blocks from first to last, all of one group, for a box of a
// sample.
struct ConvTask {
  int64_t sample, box, first, last;
};

struct Conv {
  ConvAxis axes[3];
  int64_t batch, groups, channels, rows;  // channels of x and of g in a group

  int64_t taps() const { return axes[0].kernel * axes[1].kernel * axes[2].kernel; }
  int64_t columns() const { return channels * taps(); }
  int64_t positions() const { return axes[0].output * axes[1].output * axes[2].output; }
  int64_t weights() const { return groups * rows * columns(); }
  double flops() const { return 2.0 * static_cast<double>(batch * positions()) * static_cast<double>(weights()); }

  // Blocks of up to kTileRows rows, none in two groups
  int64_t group_blocks() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t blocks() const { return groups * group_blocks(); }
  int64_t block_rows(int64_t block) const {
    return std::min<int64_t>(kTileRows, rows - block % group_blocks() * kTileRows);
  }
  int64_t first_row(int64_t block) const { return block / group_blocks() * rows + block % group_blocks() * kTileRows; }

  int64_t task_rows(const ConvTask& task) const {
    return first_row(task.last - 1) + block_rows(task.last - 1) - first_row(task.first);
  }

  int64_t boxes() const { return axes[0].boxes * axes[1].boxes * axes[2].boxes; }
  int64_t first(int64_t box, int axis) const {
    for (int i = 2; i > axis; --i) box /= axes[i].boxes;
    return box % axes[axis].boxes * axes[axis].extent;
  }
  struct Box {
    std::array<int64_t, 3> first, count;
  };
  Box positions_of(int64_t box) const {
    Box result;
    for (int i = 0; i < 3; ++i) {
      result.first[i] = first(box, i);
      result.count[i] = axes[i].count(result.first[i]);
    }
    return result;
  }
};

// A tensor [B, C, D, H, W] of any strides.
template <typename T>
struct Volume {
  const T *data, *end;  // end: behind the last element
  int64_t strides[5];
  const T* channel(int64_t sample, int64_t index) const { return data + sample * strides[0] + index * strides[1]; }
  const T* at(const T* channel, int64_t d, int64_t h, int64_t w) const {
    return channel + d * strides[2] + h * strides[3] + w * strides[4];
  }
};

template <typename T>
void copy_run(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(from[i * stride]);
}

// g at data[row·steps[0] + d·steps[1] + h·steps[2] + w·steps[3]] from a task's first row and position on.
struct ConvRows {
  const float* data;
  int64_t steps[4];
};

// The task's rows of g, where they lie if that will do (in_place), else copied: positions d, h, w at
// (d·height + h)·width + w of a row of `size`, and 0 between them.
template <typename T>
ConvRows rows_in_float32(const Conv& conv, const Volume<T>& g, const ConvTask& task, bool in_place, int64_t height,
                         int64_t width, int64_t size, float* to) {
  const auto [first, count] = conv.positions_of(task.box);
  const auto row = [&](int64_t i) {
    return g.at(g.channel(task.sample, conv.first_row(task.first) + i), first[0], first[1], first[2]);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (in_place) return {row(0), {g.strides[1], g.strides[2], g.strides[3], g.strides[4]}};
  }
  const ConvRows rows{to, {size, height * width, width, 1}};
  for (int64_t i = 0; i < conv.task_rows(task); ++i, to += size) {
    std::fill(to, to + size, 0.0f);
    for (int64_t d = 0; d < count[0]; ++d) {
      for (int64_t h = 0; h < count[1]; ++h) {
        copy_run(g.at(row(i), d, h, 0), g.strides[4], count[2], to + (d * height + h) * width);
      }
    }
  }
  return rows;
}

}  // namespace fastmix
