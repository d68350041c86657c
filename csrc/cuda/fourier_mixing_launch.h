// The launches of fourier_mixing. Samples go in groups that the workspace has room for, so that a group's T can stay in
// the L2 cache between its two passes.
#pragma once

#include <cmath>

#include "cuda/fft_plan_kernel.cuh"
#include "cuda/fft_tables.h"
#include "cuda/fourier_mixing_kernels.cuh"

namespace fastmix {

// Floats of the workspace for one sample: T, rounded up to 16 bytes, and the sample's own plan if there are lengths.
inline int64_t fourier_sample_floats(int64_t s, int64_t h, bool with_lengths) {
  const int64_t transposed = (s * (h / 2 + 1) + 3) / 4 * 4;
  return transposed + (with_lengths ? PlanSlot(static_cast<int>(s)).floats() : 0);
}

struct FourierLaunch {
  int64_t b, s, h;
  const int64_t* lengths;  // null: every sample has s rows
  float exponent;
  float* work;
  int64_t work_floats;
  SharedLimits limits;
  cudaStream_t stream;
};

template <typename T>
void launch_fourier_mixing(const FourierLaunch& op, const T* x, T* y) {
  const bool with_lengths = op.lengths != nullptr;
  const DevicePlan row_plan = device_plan(op.h, op.stream);
  const DevicePlan column_plan = with_lengths ? worst_plan(op.s) : device_plan(op.s, op.stream);
  const int columns = static_cast<int>(op.h / 2 + 1), rows = static_cast<int>(op.s / 2 + 1);
  const BlockShape column_blocks = block_shape(column_plan, columns, op.limits);
  const BlockShape row_blocks = block_shape(row_plan, rows, op.limits);

  FourierShape shape{};
  shape.s = static_cast<int>(op.s);
  shape.h = static_cast<int>(op.h);
  shape.column_block = column_blocks.columns;
  shape.row_block = row_blocks.columns;
  shape.sample_floats = fourier_sample_floats(op.s, op.h, with_lengths);
  shape.row_plan = row_plan.view;
  shape.exponent = op.exponent;
  shape.scale = static_cast<float>(std::pow(static_cast<double>(op.s) * op.h, -op.exponent));
  float* slots = op.work + fourier_sample_floats(op.s, op.h, false);
  if (with_lengths) {
    shape.column_plans = reinterpret_cast<const unsigned char*>(slots);
    shape.column_plan_bytes = shape.sample_floats * sizeof(float);
  } else {
    shape.column_plans = reinterpret_cast<const unsigned char*>(column_plan.view);
  }

  // 65535 is the limit of gridDim.y.
  const int64_t group = std::min<int64_t>({op.b, op.work_floats / shape.sample_floats, 65535});
  for (int64_t start = 0; start < op.b; start += group) {
    const unsigned samples = static_cast<unsigned>(std::min(group, op.b - start));
    const int64_t offset = start * op.s * op.h;
    if (with_lengths) {
      launch(plan_lengths_kernel, dim3(samples), kMaxThreads, kPlanSharedBytes, op.stream, op.lengths + start, shape.s,
             slots, shape.sample_floats);
    }
    launch(column_blocks.wide ? fourier_columns_kernel<T, 32> : fourier_columns_kernel<T, 16>,
           dim3(column_blocks.blocks, samples), column_blocks.threads, column_blocks.shared_bytes, op.stream, shape,
           x + offset, op.work);
    launch(row_blocks.wide ? fourier_rows_kernel<T, 32> : fourier_rows_kernel<T, 16>, dim3(row_blocks.blocks, samples),
           row_blocks.threads, row_blocks.shared_bytes, op.stream, shape, op.work, y + offset);
  }
}

}  // namespace fastmix
