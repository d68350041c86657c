// global_filter: y = irfft2(rfft2(x)·weight) on images [h, w, C], channels in the vector lanes.
// A block owns one image × 2·kLanes channels: kLanes as real, kLanes as imaginary parts of one complex image, so that
//   Z = DFT(a + ib):  A[k] = (Z[k] + conj Z[−k])/2,  B[k] = (Z[k] − conj Z[−k])/2i.
// irfft2 ignores the imaginary parts of the columns kw = 0 and w/2 after its transform along h: there the weight acts
// as (weight[kh] + conj weight[−kh])/2. float32 inside for every dtype; an image stays in the thread's cache.
#pragma once

#include "cpu/fft_lanes.h"
#include "cpu/lanes.h"

namespace fastmix {

// kLanes complex numbers for either half of a block's channels.
struct ComplexPair {
  Complex a, b;
};

inline Complex operator*(const Complex& a, const Complex& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
inline Complex times_i(const Complex& a) { return {-a.im, a.re}; }

struct GlobalFilter {
  int64_t h, w, c;
  const FftPlan& along_h = fft_plan(h);
  const FftPlan& along_w = fft_plan(w);

  int64_t half() const { return w / 2 + 1; }
  // Vectors in an image buffer and in the scratch row pair behind it; Bluestein pads.
  int64_t image_size() const { return along_h.m * w; }
  int64_t scratch_size() const { return image_size() + 2 * along_w.m; }

  // DFT of an image whose row i is written to a buffer by load_row(i, buffer). Returns image or the scratch.
  template <typename LoadRow>
  Complex* transform(const LoadRow& load_row, Complex* image, Complex* scratch) const {
    Complex* row = scratch + image_size();
    for (int64_t i = 0; i < h; ++i) {
      load_row(i, row);
      std::copy_n(fft(along_w, 1, row, row + along_w.m), w, image + i * w);
    }
    return fft(along_h, w, image, scratch);
  }

  // DFT of channels first, …, first + channels − 1 of one image x [h, w, C].
  template <typename T>
  Complex* transform_channels(const T* x, int64_t first, int64_t channels, Complex* image, Complex* scratch) const {
    const int64_t in_a = lanes_of(channels, 0), in_b = lanes_of(channels, 1);
    const auto load_row = [&](int64_t i, Complex* row) {
      for (int64_t j = 0; j < w; ++j) {
        const T* pixel = x + (i * w + j) * c + first;
        __builtin_prefetch(pixel + h * w * c, 0, 2);  // the same channels of the next image
        row[j] = {load_lanes(pixel, in_a), in_b > 0 ? load_lanes(pixel + kLanes, in_b) : Vec{}};
      }
    };
    return transform(load_row, image, scratch);
  }

  // The inverse transform of z, which holds the conjugate of the spectrum, times scale, to y [h, w, C].
  template <typename T>
  void inverse_channels(const Complex* z, T* y, float scale, int64_t first, int64_t channels, Complex* image,
                        Complex* scratch) const {
    const auto load_row = [&](int64_t i, Complex* row) {
      for (int64_t j = 0; j < w; ++j) {
        row[j] = z[i * w + j];
        __builtin_prefetch(y + (i * w + j) * c + first, 1, 2);  // written after the next transform
      }
    };
    const Complex* result = transform(load_row, image, scratch);
    for (int64_t i = 0; i < h * w; ++i) {
      T* pixel = y + i * c + first;
      store_lanes(pixel, result[i].re * scale, lanes_of(channels, 0));
      if (channels > kLanes) store_lanes(pixel + kLanes, result[i].im * -scale, lanes_of(channels, 1));
    }
  }

  // visit(k, −k, frequency in the half plane, its mirror image there or −1) for every pair of opposite frequencies.
  template <typename Visit>
  void for_frequencies(const Visit& visit) const {
    for (int64_t i = 0; i < h; ++i) {
      const int64_t opposite = mirrored(i, h);
      for (int64_t j = 0; j < half(); ++j) {
        const bool edge = j == 0 || 2 * j == w;
        if (edge && i > opposite) continue;
        visit(i * w + j, opposite * w + mirrored(j, w), i * half() + j, edge ? opposite * half() + j : -1);
      }
    }
  }

  ComplexPair load_weight(const float* weight, int64_t frequency, int64_t first, int64_t channels) const {
    const float* p = weight + 2 * (frequency * c + first);
    float padded[2 * kColumns] = {};
    if (channels < kColumns) p = std::copy_n(p, 2 * channels, padded) - 2 * channels;
    ComplexPair pair;
    load_pairs(p, pair.a.re, pair.a.im);
    load_pairs(p + kColumns, pair.b.re, pair.b.im);
    return pair;
  }

  void store_weight(float* weight, int64_t frequency, int64_t first, int64_t channels, const ComplexPair& pair) const {
    float* p = weight + 2 * (frequency * c + first);
    float padded[2 * kColumns];
    float* target = channels < kColumns ? padded : p;
    store_pairs(target, pair.a.re, pair.a.im);
    store_pairs(target + kColumns, pair.b.re, pair.b.im);
    if (channels < kColumns) std::copy_n(padded, 2 * channels, p);
  }

  // What multiplies a frequency (see above).
  ComplexPair effective_weight(const float* weight, int64_t frequency, int64_t mirror, int64_t first,
                               int64_t channels) const {
    const ComplexPair direct = load_weight(weight, frequency, first, channels);
    if (mirror < 0) return direct;
    const ComplexPair opposite = load_weight(weight, mirror, first, channels);
    return {times(direct.a + conj(opposite.a), 0.5f, 0), times(direct.b + conj(opposite.b), 0.5f, 0)};
  }
};

// Twice the spectra of both halves of the channels at frequency k.
inline ComplexPair unpack(const Complex* z, int64_t k, int64_t opposite) {
  const Complex mirror = conj(z[opposite]);
  return {z[k] + mirror, times_minus_i(z[k] - mirror)};
}

// Writes the conjugate of a spectrum, as the inverse transform wants it.
inline void pack_conjugate(Complex* z, int64_t k, int64_t opposite, const ComplexPair& value) {
  z[k] = conj(value.a + times_i(value.b));
  z[opposite] = conj(conj(value.a) + times_i(conj(value.b)));
}

// y of one image and a block of channels. buffer: image_size + scratch_size vectors.
template <typename T>
void filter_block(const GlobalFilter& f, const T* x, const float* weight, T* y, int64_t first, int64_t channels,
                  Complex* buffer) {
  Complex* scratch = buffer + f.image_size();
  Complex* z = f.transform_channels(x, first, channels, buffer, scratch);
  f.for_frequencies([&](int64_t k, int64_t opposite, int64_t frequency, int64_t mirror) {
    const ComplexPair weights = f.effective_weight(weight, frequency, mirror, first, channels);
    const ComplexPair value = unpack(z, k, opposite);
    pack_conjugate(z, k, opposite, {value.a * weights.a, value.b * weights.b});
  });
  f.inverse_channels(z, y, 0.5f / static_cast<float>(f.h * f.w), first, channels, buffer, scratch);
}

// dx and dweight of `images` images and a block of channels; dweight is summed over the images in their order.
//   dx = filter(dy, conj weight);  dweight[k] = Σ conj(X[k])·DY[k], twice where only one of k, −k is in the half plane.
// buffer: 2·(image_size + scratch_size) + 2·h·half vectors.
template <typename T>
void filter_block_bwd(const GlobalFilter& f, const T* dy, const T* x, const float* weight, T* dx, float* dweight,
                      int64_t images, int64_t first, int64_t channels, Complex* buffer) {
  const int64_t size = f.image_size() + f.scratch_size(), image = f.h * f.w * f.c;
  Complex *scratch = buffer + f.image_size(), *dy_buffer = buffer + size, *dy_scratch = dy_buffer + f.image_size();
  auto* sums = reinterpret_cast<ComplexPair*>(dy_buffer + size);
  std::fill_n(sums, f.h * f.half(), ComplexPair{});
  for (int64_t n = 0; n < images; ++n) {
    const Complex* z = f.transform_channels(x + n * image, first, channels, buffer, scratch);
    Complex* dz = f.transform_channels(dy + n * image, first, channels, dy_buffer, dy_scratch);
    f.for_frequencies([&](int64_t k, int64_t opposite, int64_t frequency, int64_t mirror) {
      const ComplexPair weights = f.effective_weight(weight, frequency, mirror, first, channels);
      const ComplexPair value = unpack(z, k, opposite), grad = unpack(dz, k, opposite);
      sums[frequency].a = sums[frequency].a + conj(value.a) * grad.a;
      sums[frequency].b = sums[frequency].b + conj(value.b) * grad.b;
      pack_conjugate(dz, k, opposite, {grad.a * conj(weights.a), grad.b * conj(weights.b)});
    });
    f.inverse_channels(dz, dx + n * image, 0.5f / static_cast<float>(f.h * f.w), first, channels, dy_buffer,
                       dy_scratch);
  }
  const float scale = 0.25f / static_cast<float>(f.h * f.w);  // both spectra are doubled
  f.for_frequencies([&](int64_t, int64_t, int64_t frequency, int64_t mirror) {
    const float factor = mirror < 0 ? 2 * scale : scale;
    const ComplexPair sum = {times(sums[frequency].a, factor, 0), times(sums[frequency].b, factor, 0)};
    f.store_weight(dweight, frequency, first, channels, sum);
    if (mirror >= 0 && mirror != frequency) {
      f.store_weight(dweight, mirror, first, channels, {conj(sum.a), conj(sum.b)});
    }
  });
}

}  // namespace fastmix
