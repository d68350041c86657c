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

// Hartley transforms of the columns in z = DFT(a + ib), transposed: emit(part, k, count, rows) gets, for the columns
// of a (part 0) and b (part 1), rows[lane][i] = dht[k + i] · factor for i < count.
template <typename Emit>
void emit_hartley(const Complex* z, int64_t n, float factor, int64_t columns, const Emit& emit) {
  factor *= 0.5f;
  for (int64_t k0 = 0; k0 < n; k0 += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n - k0);
    Vec a[kLanes] = {}, b[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Complex plus = z[k0 + i], minus = z[mirrored(k0 + i, n)];
      a[i] = (plus.re + minus.re - plus.im + minus.im) * factor;
      b[i] = (plus.im + minus.im + plus.re - minus.re) * factor;
    }
    transpose(a);
    emit(0, k0, count, a);
    if (columns > kLanes) {
      transpose(b);
      emit(1, k0, count, b);
    }
  }
}

struct Sample {
  int64_t s, h, stride;  // tokens, channels, row stride of T [h / 2 + 1, stride]
};

// T[h0 : h0 + columns] from x.
template <typename T>
void transform_columns(const T* x, float* half, Sample size, const FftPlan& plan, int64_t h0, int64_t columns,
                       Complex* p) {
  const auto [s, h, stride] = size;
  const int64_t first = lanes_of(columns, 0), second = lanes_of(columns, 1);
  for (int64_t i = 0; i < s; ++i) {
    const T* row = x + i * h + h0;
    const T* opposite = x + mirrored(i, s) * h;
    p[i].re = (load_lanes(row, first) + load_mirrored(opposite, h0, h, first)) * 0.5f;
    p[i].im = second == 0 ? Vec{}
                          : (load_lanes(row + kLanes, second) + load_mirrored(opposite, h0 + kLanes, h, second)) * 0.5f;
  }
  const Complex* z = fft(plan, 1, p, p + plan.m);
  emit_hartley(z, s, 1.0f, columns, [&](int part, int64_t k, int64_t count, const Vec* rows) {
    for (int64_t lane = 0; lane < lanes_of(columns, part); ++lane) {
      store_lanes(half + (h0 + part * kLanes + lane) * stride + k, rows[lane], count);
    }
  });
}

// Rows s0 : s0 + columns of y and their mirror images, from T.
template <typename T>
void transform_rows(const float* half, T* y, Sample size, const FftPlan& plan, float scale, int64_t s0,
                    int64_t columns, Complex* p) {
  const auto [s, h, stride] = size;
  for (int64_t j = 0; j <= h / 2; ++j) {
    const float* column = half + j * stride;
    Complex direct = {Vec{}, Vec{}}, reflected = {Vec{}, Vec{}};
    direct.re = load_lanes(column + s0, lanes_of(columns, 0));
    reflected.re = load_mirrored(column, s0, s, lanes_of(columns, 0));
    if (columns > kLanes) {
      direct.im = load_lanes(column + s0 + kLanes, lanes_of(columns, 1));
      reflected.im = load_mirrored(column, s0 + kLanes, s, lanes_of(columns, 1));
    }
    p[mirrored(j, h)] = direct;
    p[j] = reflected;  // the same where j is its own mirror image
  }
  const Complex* z = fft(plan, 1, p, p + plan.m);
  emit_hartley(z, h, scale, columns, [&](int part, int64_t k, int64_t count, const Vec* rows) {
    for (int64_t lane = 0; lane < lanes_of(columns, part); ++lane) {
      const int64_t row = s0 + part * kLanes + lane;
      store_lanes(y + row * h + k, rows[lane], count);
      if (mirrored(row, s) != row) store_mirrored(y + mirrored(row, s) * h, rows[lane], k, h, count);
    }
  });
}

// block(sample, first column, columns) for all columns of all samples, in parallel; `length` is the transform's.
template <typename Block>
void for_blocks(int64_t samples, int64_t columns, int64_t length, const Block& block) {
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 8192 / (length * kColumns));
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

  for (int64_t begin = 0; begin < batch; begin += group) {
    const int64_t samples = std::min(group, batch - begin);
    const auto length_of = [&](int64_t sample) { return lengths ? lengths[begin + sample] : s; };
    for_blocks(samples, h / 2 + 1, s, [&](int64_t sample, int64_t first, int64_t columns) {
      const int64_t length = length_of(sample);
      if (length == 0) return;
      const FftPlan& plan = fft_plan(length);
      Complex* buffer = thread_scratch<Complex>(2 * plan.m);
      if (!buffer) {
        no_memory = true;
        return;
      }
      transform_columns(x + (begin + sample) * s * h, half.get() + sample * half_size, {length, h, stride}, plan, first,
                        columns, buffer);
    });
    for_blocks(samples, s / 2 + 1, h, [&](int64_t sample, int64_t first, int64_t columns) {
      const int64_t length = length_of(sample);
      T* out = y + (begin + sample) * s * h;
      if (first == 0) std::fill(out + length * h, out + s * h, T(0));
      columns = std::min(columns, length / 2 + 1 - first);
      if (length == 0 || columns <= 0) return;
      const FftPlan& plan = fft_plan(h);
      Complex* buffer = thread_scratch<Complex>(2 * plan.m);
      if (!buffer) {
        no_memory = true;
        return;
      }
      const auto scale = static_cast<float>(std::pow(static_cast<double>(length) * h, -exponent));
      transform_rows(half.get() + sample * half_size, out, {length, h, stride}, plan, scale, first, columns, buffer);
    });
  }
  FASTMIX_CHECK(!no_memory, "fourier_mixing: no memory for transforms of ", s, " x ", h);
}

}  // namespace fastmix
