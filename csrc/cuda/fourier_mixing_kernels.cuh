// fourier_mixing: Y = Re(F_n X F_H)·scale of the first n rows of each sample, as real (Hartley) transforms of half of
// X. Y depends only on z[s,h] = x[s,h] + x[−s,−h] (twice the even part) and Y[−s,−h] = Y[s,h]; with dht(z)[k] = Σ_j
// z[j](cos + sin)(2πjk/n):  columns: T[h] = dht_n(z[:,h]), h ≤ H/2; rows: Y[s] = ½ dht_H(w), w[h] = T[h][−s], w[−h] =
// T[h][s], s ≤ n/2. A block owns up to 2·columns columns (rows) of a sample: half of them real, half imaginary parts of
// complex DFTs. T is float32 [H/2 + 1, S] in the workspace; everything accumulates in float32. Limits: S, H ≤ 8192.
#pragma once

#include "cuda/fft_block.cuh"
#include "cuda/scalar.cuh"

namespace fastmix {

struct FourierShape {
  int s, h;
  int column_block, row_block;        // complex columns of a block in the two passes
  int64_t sample_floats;              // of the workspace, a sample
  const unsigned char* column_plans;  // FftView of the samples, or one for all: column_plan_bytes = 0
  int64_t column_plan_bytes;
  const FftView* row_plan;
  float exponent;
  float scale;  // for n = S
};

__device__ inline FftView column_plan(const FourierShape& shape, int sample) {
  return *reinterpret_cast<const FftView*>(shape.column_plans + sample * shape.column_plan_bytes);
}

// dht(a)[k], dht(a)[−k], dht(b)[k], dht(b)[−k], all twice, from Z = DFT(a + ib) at k and −k.
struct HartleyPair {
  float a, a_mirrored, b, b_mirrored;
  __device__ HartleyPair(float2 z, float2 mirrored) {
    const float2 sum = z + mirrored, difference = z - mirrored;
    a = sum.x - difference.y;
    a_mirrored = sum.x + difference.y;
    b = sum.y + difference.x;
    b_mirrored = sum.y - difference.x;
  }
};

template <typename T>
struct FoldedColumns {
  const T* x;
  int n, h;
  int first, second, last;  // columns of the real parts, of the imaginary parts, the last there is
  __device__ __forceinline__ float fold(const T* row, const T* mirrored_row, int column) const {
    return to_float(__ldg(row + column)) + to_float(__ldg(mirrored_row + (column == 0 ? 0 : h - column)));
  }
  __device__ __forceinline__ float2 operator()(int i, int c) const {
    const T* row = x + static_cast<int64_t>(i) * h;
    const T* mirrored_row = x + static_cast<int64_t>(i == 0 ? 0 : n - i) * h;
    return make_float2(fold(row, mirrored_row, first + c), fold(row, mirrored_row, min(second + c, last)));
  }
};

template <typename T, int kElements>
__global__ void __launch_bounds__(512, kElements == 16 ? 2 : 1)
    fourier_columns_kernel(const FourierShape shape, const T* __restrict__ x, float* __restrict__ work) {
  extern __shared__ float2 shared[];
  const int sample = blockIdx.y;
  const FftView plan = column_plan(shape, sample);
  const int n = plan.n;
  if (n == 0) return;
  const int last = shape.h / 2;
  const int first = blockIdx.x * 2 * shape.column_block;
  const int columns = min(shape.column_block, (last - first) / 2 + 1);
  const int second = first + columns;
  fft_loaded<kElements, true>(
      shared, plan, columns,
      FoldedColumns<T>{x + sample * (static_cast<int64_t>(shape.s) * shape.h), n, shape.h, first, second, last});

  float* transposed = work + sample * shape.sample_floats;
  const int half = n / 2 + 1;
  const SmallDivisor by_half(half);
  for (int index = threadIdx.x; index < half * columns; index += blockDim.x) {
    const int c = by_half.divide(index);
    const int k = index - c * half;
    const int mirrored = k == 0 ? 0 : n - k;
    const HartleyPair pair(fft_result(shared, plan, columns, k, c), fft_result(shared, plan, columns, mirrored, c));
    float* column = transposed + static_cast<int64_t>(first + c) * shape.s;
    column[k] = pair.a;
    column[mirrored] = pair.a_mirrored;
    if (second + c <= last) {
      column += static_cast<int64_t>(columns) * shape.s;
      column[k] = pair.b;
      column[mirrored] = pair.b_mirrored;
    }
  }
}

struct UnfoldedRows {
  const float* transposed;
  int n, s, h;
  int first, second, last;
  __device__ __forceinline__ float2 operator()(int i, int c) const {
    const bool stored = i <= h / 2;
    const float* column = transposed + static_cast<int64_t>(stored ? i : h - i) * s;
    const int a = first + c, b = min(second + c, last);
    return make_float2(__ldg(column + (stored && a > 0 ? n - a : a)), __ldg(column + (stored && b > 0 ? n - b : b)));
  }
};

// Rows first + c, second + c and their mirrors from the DFTs in data. Every element of theirs is written once.
template <int kCount, typename T>
__device__ __forceinline__ void store_rows(const float2* data, const FftView& plan, int columns,
                                           const UnfoldedRows& rows, float factor, T* y) {
  const int h = plan.n, chunks = h / kCount;
  const SmallDivisor by_chunks(chunks);
  for (int index = threadIdx.x; index < chunks * columns; index += blockDim.x) {
    const int c = by_chunks.divide(index);
    const int k = (index - c * chunks) * kCount;
    Packed<T, kCount> a, a_mirrored, b, b_mirrored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int mirrored = k + i == 0 ? 0 : h - k - i;
      const HartleyPair pair(fft_result(data, plan, columns, k + i, c), fft_result(data, plan, columns, mirrored, c));
      a.values[i] = from_float<T>(pair.a * factor);
      a_mirrored.values[i] = from_float<T>(pair.a_mirrored * factor);
      b.values[i] = from_float<T>(pair.b * factor);
      b_mirrored.values[i] = from_float<T>(pair.b_mirrored * factor);
    }
    const auto store = [&](int row, const Packed<T, kCount>& values) {
      *reinterpret_cast<Packed<T, kCount>*>(y + static_cast<int64_t>(row) * h + k) = values;
    };
    const int row_a = rows.first + c, row_b = rows.second + c;
    store(row_a, a);
    if (row_a > 0 && 2 * row_a < rows.n) store(rows.n - row_a, a_mirrored);
    if (row_b > rows.last) continue;
    store(row_b, b);
    if (2 * row_b < rows.n) store(rows.n - row_b, b_mirrored);
  }
}

template <typename T, int kElements>
__global__ void __launch_bounds__(512, kElements == 16 ? 2 : 1)
    fourier_rows_kernel(const FourierShape shape, const float* __restrict__ work, T* __restrict__ y) {
  extern __shared__ float2 shared[];
  // Last sample first: its T is the one that the cache still holds.
  const int sample = gridDim.y - 1 - blockIdx.y;
  const int n = column_plan(shape, sample).n;
  T* out = y + sample * (static_cast<int64_t>(shape.s) * shape.h);
  const int64_t elements = static_cast<int64_t>(shape.s) * shape.h;
  for (int64_t i = static_cast<int64_t>(n) * shape.h + blockIdx.x * blockDim.x + threadIdx.x; i < elements;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[i] = from_float<T>(0.f);
  }
  const int last = n / 2;
  const int first = blockIdx.x * 2 * shape.row_block;
  if (n == 0 || first > last) return;
  const int columns = min(shape.row_block, (last - first) / 2 + 1);
  const FftView plan = *shape.row_plan;
  const UnfoldedRows rows{work + sample * shape.sample_floats, n, shape.s, shape.h, first, first + columns, last};
  fft_loaded<kElements, true>(shared, plan, columns, rows);

  float scale = shape.scale;
  if (n != shape.s && shape.exponent > 0.f) {
    const double area = static_cast<double>(n) * shape.h;
    scale = static_cast<float>(shape.exponent == 1.f ? 1. / area : 1. / sqrt(area));
  }
  // z is twice the even part, and both passes leave twice their Hartley transform.
  const float factor = 0.125f * scale;
  if (shape.h % 2 == 0 && reinterpret_cast<uintptr_t>(y) % (2 * sizeof(T)) == 0) {
    store_rows<2>(shared, plan, columns, rows, factor, out);
  } else {
    store_rows<1>(shared, plan, columns, rows, factor, out);
  }
}

}  // namespace fastmix
