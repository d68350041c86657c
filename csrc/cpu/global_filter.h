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
  // Vectors in each of the two buffers of an image; Bluestein pads.
  int64_t size() const { return std::max(along_h.m * w, along_w.m * h); }

  // Two buffers that the transforms alternate between; `z` is the one with the data.
  struct Image {
    Complex *z, *other;
    void run(const FftPlan& plan, int64_t inner) {
      Complex* result = fft(plan, inner, z, other);
      if (result != z) std::swap(z, other);
    }
    void transpose(int64_t rows, int64_t columns) {  // z [rows, columns]
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) other[j * rows + i] = z[i * columns + j];
      }
      std::swap(z, other);
    }
  };

  // The spectrum [h, w] of channels first, …, first + channels − 1 of one image x [h, w, C]. Images are transformed
  // along their first dimension, with all of the second beside: they are loaded as [w, h] and transposed in between.
  template <typename T>
  void transform(const T* x, int64_t first, int64_t channels, Image& image) const {
    const int64_t in_a = lanes_of(channels, 0), in_b = lanes_of(channels, 1);
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < w; ++j) {
        const T* pixel = x + (i * w + j) * c + first;
        __builtin_prefetch(pixel + h * w * c, 0, 2);  // the same channels of the next image
        image.z[j * h + i] = {load_lanes(pixel, in_a), in_b > 0 ? load_lanes(pixel + kLanes, in_b) : Vec{}};
      }
    }
    image.run(along_w, h);
    image.transpose(w, h);
    image.run(along_h, w);
  }

  // The inverse transform of an image that holds the conjugate of its spectrum, times scale, to y [h, w, C].
  template <typename T>
  void inverse(Image& image, T* y, float scale, int64_t first, int64_t channels) const {
    image.run(along_h, w);
    for (int64_t i = 0; i < h * w; ++i) __builtin_prefetch(y + i * c + first, 1, 2);
    image.transpose(h, w);
    image.run(along_w, h);
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < w; ++j) {
        T* pixel = y + (i * w + j) * c + first;
        const Complex& value = image.z[j * h + i];
        store_lanes(pixel, value.re * scale, lanes_of(channels, 0));
        if (channels > kLanes) store_lanes(pixel + kLanes, value.im * -scale, lanes_of(channels, 1));
      }
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

// y of one image and a block of channels. buffer: 2·size vectors.
template <typename T>
void filter_block(const GlobalFilter& f, const T* x, const float* weight, T* y, int64_t first, int64_t channels,
                  Complex* buffer) {
  GlobalFilter::Image image{buffer, buffer + f.size()};
  f.transform(x, first, channels, image);
  f.for_frequencies([&](int64_t k, int64_t opposite, int64_t frequency, int64_t mirror) {
    const ComplexPair weights = f.effective_weight(weight, frequency, mirror, first, channels);
    const ComplexPair value = unpack(image.z, k, opposite);
    pack_conjugate(image.z, k, opposite, {value.a * weights.a, value.b * weights.b});
  });
  f.inverse(image, y, 0.5f / static_cast<float>(f.h * f.w), first, channels);
}

// dx and dweight of `images` images and a block of channels; dweight is summed over the images in their order.
//   dx = filter(dy, conj weight);  dweight[k] = Σ conj(X[k])·DY[k], twice where only one of k, −k is in the half plane.
// buffer: 4·size + 2·h·half vectors.
template <typename T>
void filter_block_bwd(const GlobalFilter& f, const T* dy, const T* x, const float* weight, T* dx, float* dweight,
                      int64_t images, int64_t first, int64_t channels, Complex* buffer) {
  const int64_t pixels = f.h * f.w * f.c;
  GlobalFilter::Image of_x{buffer, buffer + f.size()}, of_dy{buffer + 2 * f.size(), buffer + 3 * f.size()};
  auto* sums = reinterpret_cast<ComplexPair*>(buffer + 4 * f.size());
  std::fill_n(sums, f.h * f.half(), ComplexPair{});
  for (int64_t n = 0; n < images; ++n) {
    f.transform(x + n * pixels, first, channels, of_x);
    f.transform(dy + n * pixels, first, channels, of_dy);
    f.for_frequencies([&](int64_t k, int64_t opposite, int64_t frequency, int64_t mirror) {
      const ComplexPair weights = f.effective_weight(weight, frequency, mirror, first, channels);
      const ComplexPair value = unpack(of_x.z, k, opposite), grad = unpack(of_dy.z, k, opposite);
      sums[frequency].a = sums[frequency].a + conj(value.a) * grad.a;
      sums[frequency].b = sums[frequency].b + conj(value.b) * grad.b;
      pack_conjugate(of_dy.z, k, opposite, {grad.a * conj(weights.a), grad.b * conj(weights.b)});
    });
    f.inverse(of_dy, dx + n * pixels, 0.5f / static_cast<float>(f.h * f.w), first, channels);
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
