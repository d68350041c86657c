// What a length-n complex DFT needs besides its data: radices, twiddles, and, for a length with a
// large prime factor, Bluestein's chirps. Host code, computed once a length in double, kept in float.
//
// Stockham passes (decimation in frequency): with l transforms left of length n = r·m each,
//   y[q + s(r·p + k)] = w_n^{p·k} Σ_j x[q + s(p + m·j)] w_r^{j·k},  q < s, p < m, k < r;
// then n ← m, s ← s·r. The twiddles w_n^{p·k} of a pass lie p-major, k = 1..r−1, as (re, im) pairs.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace fastmix {

// The passes that the kernels have, in the order in which they are tried.
inline constexpr std::array<int, 9> kRadices = {16, 8, 4, 2, 3, 5, 7, 11, 13};

// exp(−2πi·k/n); k·k-like products are reduced by the caller, so no accuracy is lost in k/n.
inline std::complex<double> unit_root(int64_t k, int64_t n) {
  const double angle = -2.0 * 3.14159265358979323846 * static_cast<double>(k % n) / static_cast<double>(n);
  return {std::cos(angle), std::sin(angle)};
}

// Radices whose product is n, or none if n has a prime factor above 13.
inline std::vector<int> fft_radices(int64_t n) {
  std::vector<int> radices;
  for (const int radix : kRadices) {
    for (; n % radix == 0; n /= radix) radices.push_back(radix);
  }
  return n == 1 ? radices : std::vector<int>{};
}

struct FftPlan {
  int64_t n = 0;                             // the length asked for
  int64_t m = 0;                             // the length transformed: n, or Bluestein's, at least 2n − 1
  std::vector<int> radices;                  // product m
  std::vector<std::vector<float>> twiddles;  // one table a pass
  // Bluestein: X[k] = chirp[k] · IDFT_m(DFT_m(x·chirp) · spectrum)[k], chirp[j] = exp(−πi·j²/n).
  std::vector<float> chirp;     // n pairs, empty when m = n
  std::vector<float> spectrum;  // m pairs, 1/m included
};

namespace detail {

inline void plan_passes(FftPlan& plan) {
  plan.radices = fft_radices(plan.m);
  int64_t n = plan.m;
  for (const int radix : plan.radices) {
    const int64_t m = n / radix;
    std::vector<float> table;
    table.reserve(2 * m * (radix - 1));
    for (int64_t p = 0; p < m; ++p) {
      for (int64_t k = 1; k < radix; ++k) {
        const auto w = unit_root(p * k, n);
        table.push_back(static_cast<float>(w.real()));
        table.push_back(static_cast<float>(w.imag()));
      }
    }
    plan.twiddles.push_back(std::move(table));
    n = m;
  }
}

inline void plan_bluestein(FftPlan& plan) {
  const int64_t n = plan.n;
  plan.m = 2 * n - 1;
  while (fft_radices(plan.m).empty()) ++plan.m;
  const int64_t m = plan.m;
  // j² mod 2n, kept exact in integers.
  const auto chirp = [n](int64_t j) { return unit_root(j * j % (2 * n), 2 * n); };
  std::vector<std::complex<double>> kernel(m);
  for (int64_t j = 0; j < n; ++j) {
    plan.chirp.push_back(static_cast<float>(chirp(j).real()));
    plan.chirp.push_back(static_cast<float>(chirp(j).imag()));
    kernel[j] = std::conj(chirp(j));
    if (j > 0) kernel[m - j] = kernel[j];
  }
  // The spectrum in double by plain Stockham passes of the same radices: O(m·Σr), once a length.
  std::vector<std::complex<double>> next(m);
  int64_t length = m, stride = 1;
  for (const int radix : fft_radices(m)) {
    const int64_t rest = length / radix;
    for (int64_t p = 0; p < rest; ++p) {
      for (int64_t k = 0; k < radix; ++k) {
        const auto twiddle = unit_root(p * k, length);
        for (int64_t q = 0; q < stride; ++q) {
          std::complex<double> sum = 0;
          for (int64_t j = 0; j < radix; ++j) sum += kernel[q + stride * (p + rest * j)] * unit_root(j * k, radix);
          next[q + stride * (radix * p + k)] = sum * twiddle;
        }
      }
    }
    kernel.swap(next);
    length = rest;
    stride *= radix;
  }
  for (const auto& value : kernel) {
    plan.spectrum.push_back(static_cast<float>(value.real() / static_cast<double>(m)));
    plan.spectrum.push_back(static_cast<float>(value.imag() / static_cast<double>(m)));
  }
}

}  // namespace detail

// The plan of a length ≥ 1, made once and kept.
inline const FftPlan& fft_plan(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<FftPlan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[n];
  if (!plan) {
    plan = std::make_unique<FftPlan>();
    plan->n = plan->m = n;
    if (n > 1 && fft_radices(n).empty()) detail::plan_bluestein(*plan);
    detail::plan_passes(*plan);
  }
  return *plan;
}

}  // namespace fastmix
