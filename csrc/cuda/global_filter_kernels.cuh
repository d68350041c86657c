// global_filter: y = irfft2(rfft2(x)·w), both orthonormal, over dims 1, 2 of x [B, h, w, C]; weight complex [h, w/2 +
// 1, C]. Two channels are real and imaginary part of one complex image Z; with A, B their spectra, A[k] = ½(Z[k] + conj
// Z[−k]), iB[k] = ½(Z[k] − conj Z[−k]). irfft2 drops what is not Hermitian in the columns kw = 0 and w/2: there the
// weight in effect is ½(w[kh] + conj w[−kh]). The inverse DFT is the forward one with real and imaginary parts swapped
// before and after. dw[k] = Σ_b conj(X_b[k])·G_b[k]·(1 in those columns, else 2); x and dy, of sizes far apart, never
// share a complex image. A block owns an image (dw: a fixed range of images) × up to 2·16 (16) channels; images of more
// than kChipPoints points, and sides with a prime factor above 13, go line by line through a float32 workspace.
// Accumulation in float32.
#pragma once

#include "cuda/fft_block.cuh"
#include "cuda/scalar.cuh"

namespace fastmix {

struct FilterShape {
  int h, w, c;
  int columns;  // complex images of a block
  const FftView *h_plan, *w_plan;
  float scale;  // 1/(h·w)
  bool conjugate;
};

__device__ __forceinline__ int negated(int k, int n) { return k == 0 ? 0 : n - k; }

__device__ __forceinline__ bool is_edge(const FilterShape& shape, int kw) { return kw == 0 || 2 * kw == shape.w; }

__device__ __forceinline__ float2 effective_weight(const FilterShape& shape, const float2* weight, int kh, int kw,
                                                   int c) {
  const int half = shape.w / 2 + 1;
  float2 value = __ldg(weight + (static_cast<int64_t>(kh) * half + kw) * shape.c + c);
  if (is_edge(shape, kw)) {
    const float2 other = __ldg(weight + (static_cast<int64_t>(negated(kh, shape.h)) * half + kw) * shape.c + c);
    value = make_float2(0.5f * (value.x + other.x), 0.5f * (value.y - other.y));
  }
  return shape.conjugate ? conj(value) : value;
}

// Twice A[k] and twice B[k].
struct SpectrumPair {
  float2 a, b;
  __device__ SpectrumPair(float2 z, float2 mirrored) {
    a = z + conj(mirrored);
    const float2 difference = z - conj(mirrored);
    b = make_float2(difference.y, -difference.x);
  }
};

// Filters Z[k] and Z[−k] of the channels a and b in place and leaves them swapped for the inverse.
__device__ __forceinline__ void filter_pair(const FilterShape& shape, const float2* weight, int kh, int kw,
                                            int channel_a, int channel_b, float2& z, float2& mirrored) {
  const SpectrumPair pair(z, mirrored);
  const float factor = 0.5f * shape.scale;
  const float2 a = cmul(pair.a, effective_weight(shape, weight, kh, kw, channel_a));
  const float2 b = cmul(pair.b, effective_weight(shape, weight, kh, kw, channel_b));
  z = make_float2((a.y + b.x) * factor, (a.x - b.y) * factor);
  mirrored = make_float2((b.x - a.y) * factor, (a.x + b.y) * factor);
}

// conj(X[k])·G[k] of the first (part 0) or second channel of a pair, with the factors of scale and of the symmetry.
__device__ __forceinline__ float2 weight_gradient(const FilterShape& shape, int kw, int part, const SpectrumPair& x,
                                                  const SpectrumPair& dy) {
  const float factor = (is_edge(shape, kw) ? 0.25f : 0.5f) * shape.scale;
  const float2 product = part == 0 ? cmul(conj(x.a), dy.a) : cmul(conj(x.b), dy.b);
  return make_float2(product.x * factor, product.y * factor);
}

__device__ __forceinline__ void fft_image(float2* data, const FilterShape& shape, int columns) {
#pragma unroll 1
  for (int axis = 0; axis < 2; ++axis) {
    const FftView plan = axis == 0 ? *shape.h_plan : *shape.w_plan;
    fft_shared<16>(data, plan, axis == 0 ? shape.w * columns : columns, axis == 0 ? 1 : shape.h);
  }
}

template <typename T>
__global__ void __launch_bounds__(512, 2) global_filter_kernel(const FilterShape shape, const T* __restrict__ x,
                                                               const float2* __restrict__ weight, T* __restrict__ y) {
  extern __shared__ float2 shared[];
  const int first = blockIdx.x * 2 * shape.columns;
  const int columns = min(shape.columns, (shape.c - first + 1) / 2);
  const int second = first + columns;
  const int64_t image = blockIdx.y * (static_cast<int64_t>(shape.h) * shape.w * shape.c);
  const SmallDivisor by_columns(columns);
  const int points = shape.h * shape.w * columns;
#pragma unroll 4
  for (int index = threadIdx.x; index < points; index += blockDim.x) {
    const int pixel = by_columns.divide(index), c = index - pixel * columns;
    const T* channels = x + image + static_cast<int64_t>(pixel) * shape.c;
    shared[padded(index)] =
        make_float2(to_float(__ldg(channels + first + c)), to_float(__ldg(channels + min(second + c, shape.c - 1))));
  }
  __syncthreads();

  const int half = shape.w / 2 + 1;
  const SmallDivisor by_half(half);
#pragma unroll 1
  for (bool inverse = false;; inverse = true) {
    fft_image(shared, shape, columns);
    if (inverse) break;
    for (int index = threadIdx.x; index < shape.h * half * columns; index += blockDim.x) {
      const int k = by_columns.divide(index), c = index - k * columns;
      const int kh = by_half.divide(k), kw = k - kh * half;
      const int mirrored_kh = negated(kh, shape.h);
      if (is_edge(shape, kw) && mirrored_kh < kh) continue;
      float2& z = shared[padded((kh * shape.w + kw) * columns + c)];
      float2& mirrored = shared[padded((mirrored_kh * shape.w + negated(kw, shape.w)) * columns + c)];
      float2 value = z, mirrored_value = mirrored;
      filter_pair(shape, weight, kh, kw, first + c, min(second + c, shape.c - 1), value, mirrored_value);
      z = value;
      mirrored = mirrored_value;
    }
    __syncthreads();
  }

  for (int index = threadIdx.x; index < points; index += blockDim.x) {
    const int pixel = by_columns.divide(index), c = index - pixel * columns;
    T* channels = y + image + static_cast<int64_t>(pixel) * shape.c;
    const float2 value = swap(shared[padded(index)]);
    channels[first + c] = from_float<T>(value.x);
    if (second + c < shape.c) channels[second + c] = from_float<T>(value.y);
  }
}

// Partial sums [gridDim.y, h, w/2 + 1, C]; blockIdx.y owns `images` images from blockIdx.y·images on. The first half of
// a block's complex images are pairs of channels of x, the second half the same pairs of dy.
template <typename T>
__global__ void __launch_bounds__(512, 2)
    global_filter_dw_kernel(const FilterShape shape, int batch, int images, const T* __restrict__ x,
                            const T* __restrict__ dy, float2* __restrict__ partial) {
  extern __shared__ float2 shared[];
  const int first = blockIdx.x * shape.columns;
  const int channels = min(shape.columns, shape.c - first), pairs = (channels + 1) / 2, columns = 2 * pairs;
  const SmallDivisor by_columns(columns), by_channels(channels);
  const int points = shape.h * shape.w * columns;
  const int half = shape.w / 2 + 1;
  const SmallDivisor by_half(half);
  const int sums = shape.h * half * channels;
  // A sum belongs to one thread, so no barrier guards it.
  float2* accumulators = shared + padded(points) + 1;
  for (int index = threadIdx.x; index < sums; index += blockDim.x) accumulators[index] = make_float2(0.f, 0.f);

  const int begin = blockIdx.y * images, end = min(begin + images, batch);
  for (int b = begin; b < end; ++b) {
    const int64_t image = b * (static_cast<int64_t>(shape.h) * shape.w * shape.c) + first;
#pragma unroll 4
    for (int index = threadIdx.x; index < points; index += blockDim.x) {
      const int pixel = by_columns.divide(index), column = index - pixel * columns;
      const int channel = 2 * (column < pairs ? column : column - pairs);
      const T* p = (column < pairs ? x : dy) + image + static_cast<int64_t>(pixel) * shape.c + channel;
      shared[padded(index)] = make_float2(to_float(__ldg(p)), channel + 1 < channels ? to_float(__ldg(p + 1)) : 0.f);
    }
    __syncthreads();
    fft_image(shared, shape, columns);
    for (int index = threadIdx.x; index < sums; index += blockDim.x) {
      const int k = by_channels.divide(index), channel = index - k * channels;
      const int kh = by_half.divide(k), kw = k - kh * half;
      const int at = (kh * shape.w + kw) * columns + channel / 2;
      const int mirrored = (negated(kh, shape.h) * shape.w + negated(kw, shape.w)) * columns + channel / 2;
      const SpectrumPair of_x(shared[padded(at)], shared[padded(mirrored)]);
      const SpectrumPair of_dy(shared[padded(at + pairs)], shared[padded(mirrored + pairs)]);
      accumulators[index] = accumulators[index] + weight_gradient(shape, kw, channel % 2, of_x, of_dy);
    }
    __syncthreads();
  }
  float2* out = partial + blockIdx.y * (static_cast<int64_t>(shape.h) * half * shape.c);
  for (int index = threadIdx.x; index < sums; index += blockDim.x) {
    const int k = by_channels.divide(index);
    out[static_cast<int64_t>(k) * shape.c + first + index - k * channels] = accumulators[index];
  }
}

// dw = Σ partial, in the order of the parts.
__global__ void __launch_bounds__(256)
    sum_parts_kernel(const float* __restrict__ partial, int64_t size, int parts, float* __restrict__ dw) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= size) return;
  float sum = 0.f;
  for (int part = 0; part < parts; ++part) sum += __ldg(partial + part * size + index);
  dw[index] = sum;
}

struct LinesShape {
  int length, inner, columns;
  const FftView* plan;
};

// Complex value q of a pixel: channels 2q and 2q + 1 of x.
struct ChannelPairs {
  const void* x;
  Element type;
  int c;
  __device__ float2 operator()(int64_t pixel, int q) const {
    const int64_t channel = pixel * c + 2 * q;
    return make_float2(load_element(x, type, channel), 2 * q + 1 < c ? load_element(x, type, channel + 1) : 0.f);
  }
};

// Complex value q of a pixel: the channel pairs of x, then those of dy.
struct GradientPairs {
  ChannelPairs x, dy;
  int pairs;
  __device__ float2 operator()(int64_t pixel, int q) const { return q < pairs ? x(pixel, q) : dy(pixel, q - pairs); }
};

struct WorkspaceRows {
  float2* work;
  int inner;
  __device__ float2 operator()(int64_t row, int q) const { return work[row * inner + q]; }
  __device__ void operator()(int64_t row, int q, float2 value) const { work[row * inner + q] = value; }
};

// The inverse of ChannelPairs, from swapped values.
struct StoreChannels {
  void* y;
  Element type;
  int c;
  __device__ void operator()(int64_t pixel, int q, float2 value) const {
    const int64_t channel = pixel * c + 2 * q;
    store_element(y, type, channel, value.y);
    if (2 * q + 1 < c) store_element(y, type, channel + 1, value.x);
  }
};

template <class Load, class Store>
__global__ void __launch_bounds__(512) fft_lines_kernel(const LinesShape shape, const Load load, const Store store) {
  extern __shared__ float2 shared[];
  const FftView plan = *shape.plan;
  const int first = blockIdx.x * shape.columns;
  const int columns = min(shape.columns, shape.inner - first);
  const int64_t row = blockIdx.y * static_cast<int64_t>(shape.length);
  fft_loaded<32, false>(shared, plan, columns, [&](int i, int c) { return load(row + i, first + c); });
  const SmallDivisor by_columns(columns);
  for (int index = threadIdx.x; index < shape.length * columns; index += blockDim.x) {
    const int i = by_columns.divide(index), c = index - i * columns;
    store(row + i, first + c, fft_result(shared, plan, columns, i, c));
  }
}

// One thread a pair Z[k], Z[−k] of one complex image of the group [images, h, w, pairs].
__global__ void __launch_bounds__(256)
    filter_spectrum_kernel(const FilterShape shape, int images, const float2* __restrict__ weight, float2* work) {
  const int half = shape.w / 2 + 1, pairs = (shape.c + 1) / 2;
  int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= static_cast<int64_t>(images) * shape.h * half * pairs) return;
  const int q = index % pairs, kw = index / pairs % half;
  index = index / pairs / half;
  const int kh = index % shape.h, mirrored_kh = negated(kh, shape.h);
  if (is_edge(shape, kw) && mirrored_kh < kh) return;
  float2* image = work + index / shape.h * (static_cast<int64_t>(shape.h) * shape.w * pairs);
  float2& z = image[(static_cast<int64_t>(kh) * shape.w + kw) * pairs + q];
  float2& mirrored = image[(static_cast<int64_t>(mirrored_kh) * shape.w + negated(kw, shape.w)) * pairs + q];
  float2 value = z, mirrored_value = mirrored;
  filter_pair(shape, weight, kh, kw, 2 * q, min(2 * q + 1, shape.c - 1), value, mirrored_value);
  z = value;
  mirrored = mirrored_value;
}

// One thread an element of dw, over the images [images, h, w, 2·pairs] of a group; adds to what the groups before left.
__global__ void __launch_bounds__(256)
    weight_gradient_kernel(const FilterShape shape, int images, bool first_group, const float2* __restrict__ work,
                           float2* __restrict__ dw) {
  const int half = shape.w / 2 + 1, pairs = (shape.c + 1) / 2;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= static_cast<int64_t>(shape.h) * half * shape.c) return;
  const int c = index % shape.c, kw = index / shape.c % half, kh = index / shape.c / half;
  const int64_t pixel = static_cast<int64_t>(kh) * shape.w + kw;
  const int64_t opposite = static_cast<int64_t>(negated(kh, shape.h)) * shape.w + negated(kw, shape.w);
  float2 sum = first_group ? make_float2(0.f, 0.f) : dw[index];
  for (int b = 0; b < images; ++b) {
    const float2* image = work + b * (static_cast<int64_t>(shape.h) * shape.w * 2 * pairs) + c / 2;
    const float2 *z = image + pixel * 2 * pairs, *mirrored = image + opposite * 2 * pairs;
    const SpectrumPair of_x(__ldg(z), __ldg(mirrored)), of_dy(__ldg(z + pairs), __ldg(mirrored + pairs));
    sum = sum + weight_gradient(shape, kw, c % 2, of_x, of_dy);
  }
  dw[index] = sum;
}

}  // namespace fastmix
