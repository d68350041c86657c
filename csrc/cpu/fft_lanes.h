// Complex DFTs of any length in the vector lanes: kLanes independent transforms side by side, forward, fp32.
// A transform lies in a buffer of `Complex` vectors; two buffers alternate between the passes (Stockham: no bit
// reversal). `inner` > 1 transforms the first dimension of a buffer [n, inner], so images need no transpose.
#pragma once

#include "common/fft_plan.h"
#include "common/simd.h"

namespace fastmix {

struct Complex {
  Vec re, im;
};

inline Complex operator+(const Complex& a, const Complex& b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(const Complex& a, const Complex& b) { return {a.re - b.re, a.im - b.im}; }
inline Complex conj(const Complex& a) { return {a.re, -a.im}; }
inline Complex times_minus_i(const Complex& a) { return {a.im, -a.re}; }
inline Complex times(const Complex& a, float re, float im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }

namespace detail {

// cos (first = 0) and sin (first = 1) of |x| ≤ π at compile time, to double precision.
constexpr double taylor(double x, int first) {
  double term = first == 0 ? 1 : x, sum = term;
  for (int i = first + 1; i < 40; i += 2) {
    term *= -x * x / (i * (i + 1));
    sum += term;
  }
  return sum;
}
constexpr double kPi = 3.14159265358979323846;
constexpr double angle(int k, int n) {
  const int r = k % n;
  return 2 * kPi * (2 * r > n ? r - n : r) / n;
}
constexpr float cosine(int k, int n) { return static_cast<float>(taylor(angle(k, n), 0)); }
constexpr float sine(int k, int n) { return static_cast<float>(taylor(angle(k, n), 1)); }

template <int n>
struct Roots {
  float cos[n] = {}, sin[n] = {};
  constexpr Roots() {
    for (int k = 0; k < n; ++k) {
      cos[k] = cosine(k, n);
      sin[k] = sine(k, n);
    }
  }
};
template <int n>
inline constexpr Roots<n> kRoots;

// v[k] ← Σ_j v[j]·exp(−2πi·jk/R). Odd R: even and odd parts, a quarter of the products.
template <int R>
[[gnu::always_inline]] inline void butterfly(Complex (&v)[R]) {
  static_assert(R % 2 == 1, "even radices have their own butterflies");
  constexpr int half = (R - 1) / 2;
  Complex sum[half], difference[half];
#pragma GCC unroll 8
  for (int j = 0; j < half; ++j) {
    sum[j] = v[j + 1] + v[R - 1 - j];
    difference[j] = v[j + 1] - v[R - 1 - j];
  }
  const Complex first = v[0];
#pragma GCC unroll 8
  for (int j = 0; j < half; ++j) v[0] = v[0] + sum[j];
#pragma GCC unroll 8
  for (int k = 1; k <= half; ++k) {
    Complex even = first, odd = {Vec{}, Vec{}};
#pragma GCC unroll 8
    for (int j = 1; j <= half; ++j) {
      const float c = kRoots<R>.cos[j * k % R], s = kRoots<R>.sin[j * k % R];
      even = {even.re + c * sum[j - 1].re, even.im + c * sum[j - 1].im};
      odd = {odd.re + s * difference[j - 1].re, odd.im + s * difference[j - 1].im};
    }
    v[k] = even + times_minus_i(odd);
    v[R - k] = even - times_minus_i(odd);
  }
}

template <>
[[gnu::always_inline]] inline void butterfly<2>(Complex (&v)[2]) {
  const Complex a = v[0];
  v[0] = a + v[1];
  v[1] = a - v[1];
}

[[gnu::always_inline]] inline void butterfly4(Complex& v0, Complex& v1, Complex& v2, Complex& v3) {
  const Complex a = v0 + v2, b = v0 - v2, c = v1 + v3, d = times_minus_i(v1 - v3);
  v0 = a + c;
  v1 = b + d;
  v2 = a - c;
  v3 = b - d;
}

template <>
[[gnu::always_inline]] inline void butterfly<4>(Complex (&v)[4]) {
  butterfly4(v[0], v[1], v[2], v[3]);
}

template <>
[[gnu::always_inline]] inline void butterfly<8>(Complex (&v)[8]) {
  constexpr float r = 0.70710678118654752f;
  butterfly4(v[0], v[2], v[4], v[6]);
  butterfly4(v[1], v[3], v[5], v[7]);
  const Complex o0 = v[1];
  const Complex o1 = {(v[3].re + v[3].im) * r, (v[3].im - v[3].re) * r};
  const Complex o2 = times_minus_i(v[5]);
  const Complex o3 = {(v[7].im - v[7].re) * r, (v[7].re + v[7].im) * -r};
  const Complex e0 = v[0], e1 = v[2], e2 = v[4], e3 = v[6];
  v[0] = e0 + o0;
  v[1] = e1 + o1;
  v[2] = e2 + o2;
  v[3] = e3 + o3;
  v[4] = e0 - o0;
  v[5] = e1 - o1;
  v[6] = e2 - o2;
  v[7] = e3 - o3;
}

template <>
[[gnu::always_inline]] inline void butterfly<16>(Complex (&v)[16]) {
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) butterfly4(v[b], v[b + 4], v[b + 8], v[b + 12]);
#pragma GCC unroll 4
  for (int b = 1; b < 4; ++b) {
#pragma GCC unroll 4
    for (int k = 1; k < 4; ++k) v[b + 4 * k] = times(v[b + 4 * k], kRoots<16>.cos[b * k], -kRoots<16>.sin[b * k]);
  }
  Complex out[16];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    butterfly4(v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[k + 4 * j] = v[4 * k + j];
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) v[k] = out[k];
}

// One Stockham pass, see common/fft_plan.h.
template <int R>
void pass(const Complex* x, Complex* y, int64_t m, int64_t s, const float* twiddles) {
  for (int64_t p = 0; p < m; ++p) {
    const float* w = twiddles + p * 2 * (R - 1);
    for (int64_t q = 0; q < s; ++q) {
      Complex v[R];
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) v[j] = x[q + s * (p + m * j)];
      butterfly<R>(v);
      if (p > 0) {
#pragma GCC unroll 16
        for (int k = 1; k < R; ++k) v[k] = times(v[k], w[2 * k - 2], w[2 * k - 1]);
      }
#pragma GCC unroll 16
      for (int k = 0; k < R; ++k) y[q + s * (R * p + k)] = v[k];
    }
  }
}

}  // namespace detail

// DFT of length plan.m along the first dimension of x [m, inner]; the result is in the buffer returned, x or y.
inline Complex* fft_passes(const FftPlan& plan, int64_t inner, Complex* x, Complex* y) {
  int64_t n = plan.m, s = inner;
  for (size_t i = 0; i < plan.radices.size(); ++i) {
    const int radix = plan.radices[i];
    const int64_t m = n / radix;
    const float* twiddles = plan.twiddles[i].data();
    switch (radix) {
      case 2:
        detail::pass<2>(x, y, m, s, twiddles);
        break;
      case 3:
        detail::pass<3>(x, y, m, s, twiddles);
        break;
      case 4:
        detail::pass<4>(x, y, m, s, twiddles);
        break;
      case 5:
        detail::pass<5>(x, y, m, s, twiddles);
        break;
      case 7:
        detail::pass<7>(x, y, m, s, twiddles);
        break;
      case 8:
        detail::pass<8>(x, y, m, s, twiddles);
        break;
      case 11:
        detail::pass<11>(x, y, m, s, twiddles);
        break;
      case 13:
        detail::pass<13>(x, y, m, s, twiddles);
        break;
      case 16:
        detail::pass<16>(x, y, m, s, twiddles);
        break;
    }
    std::swap(x, y);
    n = m;
    s *= radix;
  }
  return x;
}

// DFT of length plan.n along the first dimension of x [n, inner]. Both buffers hold plan.m · inner values.
inline Complex* fft(const FftPlan& plan, int64_t inner, Complex* x, Complex* y) {
  if (plan.m == plan.n) return fft_passes(plan, inner, x, y);
  const float* chirp = plan.chirp.data();
  for (int64_t j = 0; j < plan.n; ++j) {
    for (int64_t q = 0; q < inner; ++q) x[j * inner + q] = times(x[j * inner + q], chirp[2 * j], chirp[2 * j + 1]);
  }
  for (int64_t i = plan.n * inner; i < plan.m * inner; ++i) x[i] = {Vec{}, Vec{}};
  Complex* z = fft_passes(plan, inner, x, y);
  const float* spectrum = plan.spectrum.data();
  for (int64_t k = 0; k < plan.m; ++k) {
    for (int64_t q = 0; q < inner; ++q) {
      Complex& value = z[k * inner + q];
      value = conj(times(value, spectrum[2 * k], spectrum[2 * k + 1]));
    }
  }
  // The inverse transform is the conjugate of the transform of the conjugate.
  z = fft_passes(plan, inner, z, z == x ? y : x);
  for (int64_t k = 0; k < plan.n; ++k) {
    for (int64_t q = 0; q < inner; ++q) {
      z[k * inner + q] = times(conj(z[k * inner + q]), chirp[2 * k], chirp[2 * k + 1]);
    }
  }
  return z;
}

}  // namespace fastmix
