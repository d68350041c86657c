// The launches of global_filter. Whether an image stays on chip, and how a batch is split for dw, depend on the shape
// alone, so that results do not depend on the device.
#pragma once

#include "cuda/fft_tables.h"
#include "cuda/global_filter_kernels.cuh"

namespace fastmix {

constexpr int64_t kChipPoints = 4096;

inline bool filter_on_chip(int64_t h, int64_t w) {
  const auto smooth = [](int64_t n) { return n == 1 || !fft_radices(n).empty(); };
  return h * w <= kChipPoints && smooth(h) && smooth(w);
}

// Parts of the batch whose dw are summed apart: enough blocks to fill a device when the channels alone do not.
// A block that sums dw transforms at least two complex images, of 11 values a thread where 11 is a factor.
inline bool dw_on_chip(int64_t h, int64_t w) { return filter_on_chip(h, w) && 2 * h * w <= kMaxThreads * 11; }

inline int64_t filter_parts(int64_t b, int64_t c) {
  const int64_t channel_blocks = (c + kMaxColumns - 1) / kMaxColumns;
  return std::min(b, std::max<int64_t>(1, 512 / channel_blocks));
}

// Floats of the workspace, with as many images at a time as the caller likes (they matter off chip only).
inline int64_t filter_workspace(int64_t h, int64_t w, int64_t c, int64_t images) {
  return filter_on_chip(h, w) ? 0 : images * h * w * ((c + 1) / 2) * 2;
}

inline int64_t filter_bwd_workspace(int64_t b, int64_t h, int64_t w, int64_t c, int64_t images) {
  if (dw_on_chip(h, w)) return filter_parts(b, c) * h * (w / 2 + 1) * c * 2;
  return images * h * w * ((c + 1) / 2) * 4;
}

struct FilterLaunch {
  int64_t b, h, w, c;
  const float2* weight;
  bool conjugate;
  float* work;
  int64_t work_floats;
  SharedLimits limits;
  cudaStream_t stream;
};

inline FilterShape filter_shape(const FilterLaunch& op) {
  FilterShape shape{};
  shape.h = static_cast<int>(op.h);
  shape.w = static_cast<int>(op.w);
  shape.c = static_cast<int>(op.c);
  shape.h_plan = device_plan(op.h, op.stream).view;
  shape.w_plan = device_plan(op.w, op.stream).view;
  shape.scale = static_cast<float>(1. / (static_cast<double>(op.h) * op.w));
  shape.conjugate = op.conjugate;
  return shape;
}

// The two transforms of an image as one, for the shape of the blocks.
inline DevicePlan image_plan(const FilterLaunch& op) {
  DevicePlan plan = device_plan(op.h, op.stream);
  plan.narrow_points = std::min(plan.narrow_points, device_plan(op.w, op.stream).narrow_points);
  plan.m = static_cast<int>(op.h * op.w);
  return plan;
}

template <class Load, class Store>
void launch_fft_lines(const FilterLaunch& op, int64_t length, int64_t outer, int64_t inner, const Load& load,
                      const Store& store) {
  const DevicePlan plan = device_plan(length, op.stream);
  const BlockShape blocks = block_shape(plan, static_cast<int>(2 * inner), op.limits, BlockKind::kWide);
  const LinesShape shape{static_cast<int>(length), static_cast<int>(inner), blocks.columns, plan.view};
  launch(fft_lines_kernel<Load, Store>, dim3(blocks.blocks, static_cast<unsigned>(outer)), blocks.threads,
         blocks.shared_bytes, op.stream, shape, load, store);
}

inline dim3 blocks_of_256(int64_t items) { return dim3(static_cast<unsigned>((items + 255) / 256)); }

// Images of a group: what the workspace holds, within gridDim.y.
inline int64_t filter_group(const FilterLaunch& op, int64_t image_floats) {
  return std::min({op.b, op.work_floats / image_floats, 65535 / op.h});
}

template <typename T>
void launch_global_filter(const FilterLaunch& op, const T* x, T* y) {
  FilterShape shape = filter_shape(op);
  const int64_t image = op.h * op.w * op.c;
  if (filter_on_chip(op.h, op.w)) {
    const BlockShape blocks = block_shape(image_plan(op), shape.c, op.limits, BlockKind::kNarrow);
    shape.columns = blocks.columns;
    for (int64_t start = 0; start < op.b; start += 65535) {
      const unsigned images = static_cast<unsigned>(std::min<int64_t>(op.b - start, 65535));
      launch(global_filter_kernel<T>, dim3(blocks.blocks, images), blocks.threads, blocks.shared_bytes, op.stream,
             shape, x + start * image, op.weight, y + start * image);
    }
    return;
  }
  const int64_t pairs = (op.c + 1) / 2;
  const int64_t group = filter_group(op, filter_workspace(op.h, op.w, op.c, 1));
  float2* work = reinterpret_cast<float2*>(op.work);
  const WorkspaceRows by_pixel{work, static_cast<int>(pairs)}, by_row{work, static_cast<int>(op.w * pairs)};
  for (int64_t start = 0; start < op.b; start += group) {
    const int64_t images = std::min(group, op.b - start);
    launch_fft_lines(op, op.w, images * op.h, pairs, ChannelPairs{x + start * image, element_of(x), shape.c}, by_pixel);
    launch_fft_lines(op, op.h, images, op.w * pairs, by_row, by_row);
    launch(filter_spectrum_kernel, blocks_of_256(images * op.h * (op.w / 2 + 1) * pairs), 256, 0, op.stream, shape,
           static_cast<int>(images), op.weight, work);
    launch_fft_lines(op, op.h, images, op.w * pairs, by_row, by_row);
    launch_fft_lines(op, op.w, images * op.h, pairs, by_pixel,
                     StoreChannels{y + start * image, element_of(y), shape.c});
  }
}

// dx is the filter with the conjugate weight; op.conjugate must be set.
template <typename T>
void launch_global_filter_bwd(const FilterLaunch& op, const T* dy, const T* x, T* dx, float2* dw) {
  launch_global_filter<T>(op, dy, dx);
  FilterShape shape = filter_shape(op);
  const int64_t spectrum = op.h * (op.w / 2 + 1) * op.c;
  float2* work = reinterpret_cast<float2*>(op.work);
  if (dw_on_chip(op.h, op.w)) {
    BlockShape blocks = block_shape(image_plan(op), 2 * ((op.c + 1) / 2 * 2), op.limits, BlockKind::kNarrow);
    shape.columns = blocks.columns;
    const int64_t parts = filter_parts(op.b, op.c), images = (op.b + parts - 1) / parts;
    blocks.shared_bytes += sizeof(float2) * (op.h * (op.w / 2 + 1) * blocks.columns);
    launch(global_filter_dw_kernel<T>, dim3(blocks.blocks, static_cast<unsigned>(parts)), blocks.threads,
           blocks.shared_bytes, op.stream, shape, static_cast<int>(op.b), static_cast<int>(images), x, dy, work);
    launch(sum_parts_kernel, blocks_of_256(2 * spectrum), 256, 0, op.stream, op.work, 2 * spectrum,
           static_cast<int>(parts), reinterpret_cast<float*>(dw));
    return;
  }
  const int64_t image = op.h * op.w * op.c, pairs = (op.c + 1) / 2;
  const int64_t group = filter_group(op, filter_bwd_workspace(op.b, op.h, op.w, op.c, 1));
  const WorkspaceRows by_pixel{work, static_cast<int>(2 * pairs)}, by_row{work, static_cast<int>(op.w * 2 * pairs)};
  for (int64_t start = 0; start < op.b; start += group) {
    const int64_t images = std::min(group, op.b - start);
    const GradientPairs load{{x + start * image, element_of(x), shape.c},
                             {dy + start * image, element_of(x), shape.c},
                             static_cast<int>(pairs)};
    launch_fft_lines(op, op.w, images * op.h, 2 * pairs, load, by_pixel);
    launch_fft_lines(op, op.h, images, op.w * 2 * pairs, by_row, by_row);
    launch(weight_gradient_kernel, blocks_of_256(spectrum), 256, 0, op.stream, shape, static_cast<int>(images),
           start == 0, work, dw);
  }
}

}  // namespace fastmix
