// A sample's value over its gradient's norm n: y/(n + |y| + eps), or y·n/(n² + eps), in one pass over the gradients
// [B, N]; and its backward, which scales each row by one number, in another. A row is summed in pieces, whose sums of
// up to kChain terms are float32 and sums of these float64; what is made of n is float64 as well.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSums = 4;                           // that are added to in turns
constexpr int64_t kRun = kSums * kLanes * kChain;  // elements that are summed in float32
constexpr int64_t kPiece = 16 * 1024;              // elements of a row that a thread sums or scales at a time

struct Ratio {
  double value, by_value, by_norm;  // and its derivatives
};

// 0/0 is 0, with derivatives 0.
Ratio ratio_of(double value, double norm, bool gran, double eps) {
  const double below = gran ? norm * norm + eps : norm + std::abs(value) + eps;
  if (below == 0) return {0, 0, 0};
  if (gran) return {value * norm / below, norm / below, value * (eps - norm * norm) / (below * below)};
  return {value / below, (norm + eps) / (below * below), -value / (below * below)};
}

template <typename T>
double norm_sq(const T* row, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(count, first + kRun);
    Vec sums[kSums] = {};
    int64_t j = first;
    for (; j + kSums * kLanes <= last; j += kSums * kLanes) {
      for (int i = 0; i < kSums; ++i) {
        const Vec values = load(row + j + i * kLanes);
        sums[i] += values * values;
      }
    }
    for (; j < last; j += kLanes) {
      const Vec values = load_lanes(row + j, std::min<int64_t>(kLanes, last - j));
      sums[0] += values * values;
    }
    for (const Vec& sum : sums) {
      for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    }
  }
  return total;
}

template <typename T>
void scale(const T* row, float factor, T* to, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, count - j);
    store_lanes(to + j, load_lanes(row + j, lanes) * factor, lanes);
  }
}

int64_t pieces_of(int64_t count) { return std::max<int64_t>(1, (count + kPiece - 1) / kPiece); }

// run(row, first, last) for all pieces of b rows.
template <typename Run>
void for_pieces(int64_t b, int64_t n, const Run& run) {
  const int64_t pieces = pieces_of(n);
  const int64_t grain = 1 + kGrainElements / std::max<int64_t>(1, std::min(n, kPiece));
  torch::stable::parallel_for(0, b * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      run(i / pieces, first, std::min(n, first + kPiece));
    }
  });
}

void check_vector(const char* name, const Tensor& vector, int64_t b) {
  FASTMIX_CHECK(vector.scalar_type() == ScalarType::Float && vector.dim() == 1 && vector.size(0) == b, name,
                " must be float32 [B] = [", b, "]");
}

Tensor readable(const Tensor& gradient) {
  return gradient.size(1) <= 1 || gradient.stride(1) == 1 ? gradient : torch::stable::contiguous(gradient);
}

std::tuple<Tensor, Tensor> gradient_ratio_cpu(const Tensor& value, const Tensor& gradient, bool gran, double eps) {
  FASTMIX_CHECK(gradient.dim() == 2, "gradient must be [B, N]");
  const int64_t b = gradient.size(0), n = gradient.size(1), pieces = pieces_of(n);
  check_vector("value", value, b);
  Tensor ratio = torch::stable::new_empty(value, {b}), norm = torch::stable::new_empty(value, {b});
  const Tensor rows = readable(gradient);
  const auto sums = allocate<double>(b * pieces);
  FASTMIX_CHECK(sums, "gradient_ratio: no memory for ", b * pieces, " float64");
  for_dtype("gradient", rows, [&](auto zero) {
    const auto* const data = static_cast<const decltype(zero)*>(rows.data_ptr());
    for_pieces(b, n, [&](int64_t row, int64_t first, int64_t last) {
      sums[row * pieces + first / kPiece] = norm_sq(data + row * rows.stride(0) + first, last - first);
    });
  });
  const auto* const values = static_cast<const float*>(value.data_ptr());
  auto* const ratios = static_cast<float*>(ratio.data_ptr());
  auto* const norms = static_cast<float*>(norm.data_ptr());
  for (int64_t i = 0; i < b; ++i) {
    double total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[i * pieces + piece];
    norms[i] = static_cast<float>(std::sqrt(total));
    ratios[i] = static_cast<float>(ratio_of(values[i * value.stride(0)], std::sqrt(total), gran, eps).value);
  }
  return {ratio, norm};
}

std::tuple<Tensor, Tensor> gradient_ratio_bwd_cpu(const Tensor& grad_output, const Tensor& value,
                                                  const Tensor& gradient, const Tensor& norm, bool gran, double eps) {
  FASTMIX_CHECK(gradient.dim() == 2, "gradient must be [B, N]");
  const int64_t b = gradient.size(0), n = gradient.size(1);
  check_vector("grad_output", grad_output, b);
  check_vector("value", value, b);
  check_vector("norm", norm, b);
  Tensor d_value = torch::stable::new_empty(value, {b});
  Tensor d_gradient = torch::stable::new_empty(gradient, {b, n});
  const Tensor rows = readable(gradient);
  const auto factors = allocate<float>(b);
  FASTMIX_CHECK(factors, "gradient_ratio_bwd: no memory for ", b, " float32");
  for (int64_t i = 0; i < b; ++i) {
    const float y = static_cast<const float*>(value.data_ptr())[i * value.stride(0)];
    const double length = static_cast<const float*>(norm.data_ptr())[i * norm.stride(0)];
    const double grad = static_cast<const float*>(grad_output.data_ptr())[i * grad_output.stride(0)];
    const Ratio ratio = ratio_of(y, length, gran, eps);
    static_cast<float*>(d_value.data_ptr())[i] = static_cast<float>(grad * ratio.by_value);
    factors[i] = length == 0 ? 0.0f : static_cast<float>(grad * ratio.by_norm / length);
  }
  for_dtype("gradient", rows, [&](auto zero) {
    using T = decltype(zero);
    const auto* const from = static_cast<const T*>(rows.data_ptr());
    auto* const to = static_cast<T*>(d_gradient.data_ptr());
    for_pieces(b, n, [&](int64_t row, int64_t first, int64_t last) {
      scale(from + row * rows.stride(0) + first, factors[row], to + row * n + first, last - first);
    });
  });
  return {d_value, d_gradient};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("gradient_ratio", TORCH_BOX(&fastmix::gradient_ratio_cpu));
  m.impl("gradient_ratio_bwd", TORCH_BOX(&fastmix::gradient_ratio_bwd_cpu));
}
