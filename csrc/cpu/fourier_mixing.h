// y = Re(F_S x F_H)·scale, as real (Hartley) transforms of half of x, dht(z)[k] = Σ_j z[j](cos + sin)(2πjk/n).
// y depends only on z[s,h] = ½(x[s,h] + x[−s,−h]), and y[−s,−h] = y[s,h]:
//   columns: T[h] = dht_S(z[:,h]) for h ≤ H/2;   rows: y[s] = dht_H(w), w[h] = T[h][−s], w[−h] = T[h][s], for s ≤ S/2.
// A block owns 2·kLanes columns (rows): kLanes as real and kLanes as imaginary parts of one complex DFT.
// float32 inside for every dtype; no complex tensor; one float32 intermediate T of half the size per sample in work.
#pragma once

#include <atomic>
#include <cmath>

#include "common/check.h"
#include "cpu/fft_lanes.h"
#include "cpu/lanes.h"
#include "cpu/scratch.h"

namespace fastmix {

inline constexpr int64_t kGroupElements = int64_t{1} << 18;  // of T a thread, which its cache keeps between the passes

// A tile of transposed results: element i of lane l is rows[i / kLanes][l][i % kLanes].
constexpr int kTile = 16;  // elements: a cache line, so that rows are written line by line
using Tile = Vec[kTile / kLanes][kLanes];

// ½·Hartley transform of the real columns a (part 0) or b (part 1) in z = DFT(a + ib), from z[k] and z[−k].
[[gnu::always_inline]] inline Vec hartley(const Complex& plus, const Complex& minus, int part) {
  return part == 0 ? (plus.re + minus.re) - (plus.im - minus.im) : (plus.im + minus.im) + (plus.re - minus.re);
}

// The Hartley transforms of the columns in z [n + 1], transposed: emit(part, k, tile) gets elements k : k + kTile of
// all lanes of a part, times factor. Elements beyond n are undefined.
template <typename Emit>
[[gnu::always_inline]] inline void emit_hartley(Complex* z, int64_t n, float factor, int64_t columns,
                                                const Emit& emit) {
  z[n] = z[0];  // so that −k is n − k for every k
  factor *= 0.5f;
  const auto emit_tile = [&](int64_t k, auto last) {
    for (int part = 0; part < 2 && part * kLanes < columns; ++part) {
      Tile tile;
#pragma GCC unroll 4
      for (int block = 0; block < kTile / kLanes; ++block) {
        const Complex *plus = z + k + block * kLanes, *minus = z + n - k - block * kLanes;
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i) {
          const int j = std::min<int>(i, last - block * kLanes);
          tile[block][i] = hartley(plus[j], minus[-j], part) * factor;
        }
        transpose(tile[block]);
      }
      emit(part, k, tile);
    }
  };
  int64_t k = 0;
  for (; k + kTile <= n; k += kTile) emit_tile(k, std::integral_constant<int, kTile - 1>{});
  if (k < n) emit_tile(k, static_cast<int>(n - 1 - k));
}

struct Sample {
  int64_t s, h, stride;  // tokens, channels, row stride of T [h / 2 + 1, stride]
};

// T[h0 : h0 + columns] from x.
template <typename T>
void transform_columns(const T* x, float* half, Sample size, const FftPlan& plan, int64_t h0, int64_t columns,
                       Complex* buffer) {
  const auto [s, h, stride] = size;
  const int64_t in_a = lanes_of(columns, 0), in_b = lanes_of(columns, 1);
  for (int64_t i = 0; i < s; ++i) {
    const T *row = x + i * h, *opposite = x + mirrored(i, s) * h;
    // The next block's columns, which no hardware prefetcher finds a row's stride away.
    __builtin_prefetch(row + h0 + kColumns, 0, 2);
    __builtin_prefetch(opposite + h - h0 - 2 * kColumns, 0, 2);
    buffer[i] = {(load_lanes(row + h0, in_a) + load_mirrored(opposite, h0, h, in_a)) * 0.5f, Vec{}};
    if (in_b > 0) {
      const int64_t h1 = h0 + kLanes;
      buffer[i].im = (load_lanes(row + h1, in_b) + load_mirrored(opposite, h1, h, in_b)) * 0.5f;
    }
  }
  Complex* z = fft(plan, 1, buffer, buffer + plan.m + 1);
  emit_hartley(z, s, 1.0f, columns, [&](int part, int64_t k, const Tile& tile) {
    for (int64_t lane = 0; lane < lanes_of(columns, part); ++lane) {
      float* row = half + (h0 + part * kLanes + lane) * stride + k;  // the stride has kTile elements to spare
      for (int i = 0; i < kTile; i += kLanes) store(row + i, tile[i / kLanes][lane]);
    }
  });
}

// out[k] ← row[k] and, mirrored, out[k] ← row[−k], k < n. row has kLanes elements to spare.
template <typename T>
void copy_row(const float* row, T* out, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(out + k, load(row + k));
  if (k < n) store_first(out + k, load(row + k), n - k);
}

template <typename T>
void copy_mirrored(const float* row, T* out, int64_t n) {
  int64_t k = 1;
  out[0] = T(row[0]);
  for (; k + kLanes <= n; k += kLanes) store(out + k, reverse(load(row + n - k - kLanes + 1)));
  if (k < n) store_mirrored(out, load(row), 0, n, n - k + 1);
}

// Rows s0 : s0 + columns of y and their mirror images, from T. The rows are gathered first, then written one by one.
template <typename T>
void transform_rows(const float* half, T* y, Sample size, const FftPlan& plan, float scale, int64_t s0, int64_t columns,
                    Complex* buffer) {
  const auto [s, h, stride] = size;
  const int64_t in_a = lanes_of(columns, 0), in_b = lanes_of(columns, 1);
  for (int64_t j = 0; j <= h / 2; ++j) {
    const float* column = half + j * stride;
    Complex direct = {load_lanes(column + s0, in_a), Vec{}};
    Complex reflected = {load_mirrored(column, s0, s, in_a), Vec{}};
    if (in_b > 0) {
      direct.im = load_lanes(column + s0 + kLanes, in_b);
      reflected.im = load_mirrored(column, s0 + kLanes, s, in_b);
    }
    buffer[mirrored(j, h)] = direct;
    buffer[j] = reflected;  // the same where j is its own mirror image
  }
  Complex* z = fft(plan, 1, buffer, buffer + plan.m + 1);
  const int64_t row_size = (h + kTile - 1) / kTile * kTile + kLanes;
  float* rows = reinterpret_cast<float*>(buffer + 2 * (plan.m + 1));
  emit_hartley(z, h, scale, columns, [&](int part, int64_t k, const Tile& tile) {
    for (int lane = 0; lane < kLanes; ++lane) {
      float* row = rows + (part * kLanes + lane) * row_size + k;
      for (int i = 0; i < kTile; i += kLanes) store(row + i, tile[i / kLanes][lane]);
    }
  });
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t opposite = mirrored(s0 + i, s);
    copy_row(rows + i * row_size, y + (s0 + i) * h, h);
    if (opposite != s0 + i) copy_mirrored(rows + i * row_size, y + opposite * h, h);
  }
}

// block(sample, first column, columns) for all columns of all samples, in parallel; `length` is the transform's.
template <typename Block>
void for_blocks(int64_t samples, int64_t columns, int64_t length, const Block& block) {
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (length * kColumns));
  torch::stable::parallel_for(0, samples * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kColumns;
      block(i / blocks, first, std::min<int64_t>(kColumns, columns - first));
    }
  });
}

template <typename T>
void fourier_mixing(const T* x, T* y, const int64_t* lengths, int64_t batch, int64_t s, int64_t h, double exponent) {
  const int64_t stride = (s + 15) / 16 * 16 + 16;  // not a power of two: rows of T must not share cache sets
  const int64_t half_size = (h / 2 + 1) * stride;
  const int64_t samples_a_thread = std::max<int64_t>(1, kGroupElements / half_size);
  const int64_t group = std::min<int64_t>(batch, samples_a_thread * torch::stable::get_num_threads());
  const auto half = allocate<float>(group * half_size);
  FASTMIX_CHECK(half, "fourier_mixing: no memory for an intermediate of ", group, " x ", half_size, " float32");
  std::atomic<bool> no_memory{false};

  // Two transforms of one more than their length, and the rows of a block.
  const auto buffer_for = [&](const FftPlan& plan) {
    Complex* buffer = thread_scratch<Complex>(2 * (plan.m + 1) + h + 2 * kTile);
    if (!buffer) no_memory = true;
    return buffer;
  };

  for (int64_t begin = 0; begin < batch; begin += group) {
    const int64_t samples = std::min(group, batch - begin);
    const auto length_of = [&](int64_t sample) { return lengths ? lengths[begin + sample] : s; };
    for_blocks(samples, h / 2 + 1, s, [&](int64_t sample, int64_t first, int64_t columns) {
      const int64_t length = length_of(sample);
      if (length == 0) return;
      const FftPlan& plan = fft_plan(length);
      if (Complex* buffer = buffer_for(plan)) {
        transform_columns(x + (begin + sample) * s * h, half.get() + sample * half_size, {length, h, stride}, plan,
                          first, columns, buffer);
      }
    });
    for_blocks(samples, s / 2 + 1, h, [&](int64_t sample, int64_t first, int64_t columns) {
      const int64_t length = length_of(sample);
      T* out = y + (begin + sample) * s * h;
      if (first == 0) std::fill(out + length * h, out + s * h, T(0));
      columns = std::min(columns, length / 2 + 1 - first);
      if (length == 0 || columns <= 0) return;
      const FftPlan& plan = fft_plan(h);
      const auto scale = static_cast<float>(std::pow(static_cast<double>(length) * h, -exponent));
      if (Complex* buffer = buffer_for(plan)) {
        transform_rows(half.get() + sample * half_size, out, {length, h, stride}, plan, scale, first, columns, buffer);
      }
    });
  }
  FASTMIX_CHECK(!no_memory, "fourier_mixing: no memory for transforms of ", s, " x ", h);
}

}  // namespace fastmix
