// log Σ_k w_k − log K of B samples, log w_k = l_k + ½ Σ_d (logvar_d + e² − z²), e = (z − μ)/σ, in one pass over the
// latents z [B, K, D]; and its backward, which computes the weights again, in another. A thread has a piece of a
// sample's K latents, kLanes at a time. Sums over d are float32 lanes, what pieces add up to is float64.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <tuple>

#include "cpu/lanes.h"
#include "cpu/log_sum_exp.h"
#include "cpu/scratch.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kPieceElements = 32 * 1024, kMaxRows = 1024, kMinRows = 32;  // of a piece

// e^x in float64, rounded once: an error of 1/σ is that of all squares e², so it does not cancel in a long sum.
Vec exponential(Vec x) {
  using Double = double __attribute__((vector_size(2 * sizeof(Vec))));
  using Integer = int64_t __attribute__((vector_size(2 * sizeof(Vec))));
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;
  const Double exact = __builtin_convertvector(x, Double);
  constexpr double kShift = 6755399441055744.0;  // 1.5 · 2^52 rounds to an integer
  const Double shifted = exact * 1.4426950408889634 + kShift, rest = exact - (shifted - kShift) * 0.6931471805599453;
  Double p = rest * 0.1 + 1;
  for (int i = 9; i > 0; --i) p = p * (rest * (1.0 / i)) + 1;
  const Integer exponent = reinterpret_cast<Integer>(shifted) << 52;
  return __builtin_convertvector(reinterpret_cast<Double>(reinterpret_cast<Integer>(p) + exponent), Vec);
}

struct Inputs {
  Tensor log_px_z, z, mu, logvar;
  int64_t b, k, d, padded, rows, pieces;

  Inputs(const Tensor& log_px_z_in, const Tensor& z_in, const Tensor& mu_in, const Tensor& logvar_in)
      : log_px_z(log_px_z_in), z(z_in), mu(mu_in), logvar(logvar_in) {
    FASTMIX_CHECK(z.dim() == 3, "z must be [B, K, D]");
    b = z.size(0), k = z.size(1), d = z.size(2);
    check("log_px_z", log_px_z, b, k);
    check("mu", mu, b, d);
    check("logvar", logvar, b, d);
    const auto beside = [](const Tensor& x) {
      const int64_t last = x.dim() - 1;
      return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
    };
    z = beside(z), mu = beside(mu), logvar = beside(logvar);
    padded = round_up(d, kLanes);
    rows = std::min(kMaxRows, std::max(kMinRows, kPieceElements / std::max<int64_t>(d, 1)));
    pieces = (k + rows - 1) / rows;
  }

  static void check(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    FASTMIX_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
                  name, " must be float32 [", rows, ", ", columns, "]");
  }

  // run(sample, piece, first, count) for the pieces of all samples.
  template <typename Run>
  void for_pieces(const Run& run) const {
    const int64_t grain = 1 + kGrainElements / std::max<int64_t>(1, std::min(rows, k) * d);
    torch::stable::parallel_for(0, b * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % pieces * rows;
        run(i / pieces, i % pieces, first, std::min(rows, k - first));
      }
    });
  }
};

// The encoder's Gaussian of one sample, in the memory of a thread; 0 beyond d.
struct Gaussian {
  float *mean, *inverse_std;
  float half_logvar = 0;  // ½ Σ logvar

  Gaussian(const Inputs& in, int64_t sample, float* memory) : mean(memory), inverse_std(memory + in.padded) {
    const auto* const mu = static_cast<const float*>(in.mu.data_ptr()) + sample * in.mu.stride(0);
    const auto* const logvar = static_cast<const float*>(in.logvar.data_ptr()) + sample * in.logvar.stride(0);
    Vec sum = {};
    for (int64_t j = 0; j < in.d; j += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, in.d - j);
      const Vec values = load_lanes(logvar + j, lanes);
      sum += values;
      store(mean + j, load_lanes(mu + j, lanes));
      store(inverse_std + j, Vec{});
      store_lanes(inverse_std + j, exponential(values * -0.5f), lanes);
    }
    half_logvar = 0.5f * horizontal_sum(sum);
  }
};

template <typename T>
struct Latents {
  const T* z;
  const float* log_px_z;
  int64_t z_row, log_row, d;
  float base;  // log-weights are relative to one of the sample's log p(x|z): small numbers have small errors

  Latents(const Inputs& in, int64_t sample, int64_t first)
      : z(static_cast<const T*>(in.z.data_ptr()) + sample * in.z.stride(0) + first * in.z.stride(1)),
        log_px_z(static_cast<const float*>(in.log_px_z.data_ptr()) + sample * in.log_px_z.stride(0) +
                 first * in.log_px_z.stride(1)),
        z_row(in.z.stride(1)),
        log_row(in.log_px_z.stride(1)),
        d(in.d),
        base(log_px_z[-first * log_row]) {
    if (!std::isfinite(base)) base = 0;
  }

  // to[i] ← log w of latent row + i, i < rows, less `base` and ½ Σ logvar, which all have
  template <int rows>
  void log_weights(int64_t row, const Gaussian& q, float* to) const {
    const T* const from = z + row * z_row;
    Vec sums[rows] = {};
    const auto add = [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vec mean = load(q.mean + j), inverse_std = load(q.inverse_std + j);
      for (int i = 0; i < rows; ++i) {
        const Vec value = load_lanes(from + i * z_row + j, lanes), e = (value - mean) * inverse_std;
        sums[i] += (e - value) * (e + value);
      }
    };
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) add(j, kLanes);
    if (j < d) add(j, d - j);
    if constexpr (rows == kLanes) {
      transpose(sums);
      for (int i = 1; i < rows; ++i) sums[0] += sums[i];
    } else {
      for (int i = 0; i < rows; ++i) sums[0][i] = horizontal_sum(sums[i]);
    }
    for (int i = 0; i < rows; ++i) to[i] = (log_px_z[(row + i) * log_row] - base) + 0.5f * sums[0][i];
  }
};

// run(row, std::integral_constant<int, rows>{}) over count rows.
template <typename Run>
void for_row_blocks(int64_t count, const Run& run) {
  int64_t row = 0;
  for (; row + kLanes <= count; row += kLanes) run(row, std::integral_constant<int, kLanes>{});
  for (; row < count; ++row) run(row, std::integral_constant<int, 1>{});
}

struct Part {
  float max;
  double sum;  // of the weights, relative to e^max; of infinite ones 1
  double base;
};

template <typename T>
Part part_of(const Inputs& in, int64_t sample, int64_t first, int64_t count, float* scratch) {
  const Gaussian q(in, sample, scratch);
  const Latents<T> latents(in, sample, first);
  float* const logs = scratch + 2 * in.padded;
  for_row_blocks(count, [&](int64_t row, auto rows) { latents.template log_weights<rows>(row, q, logs + row); });
  LogSumExp sum;
  sum.add(logs, count, nullptr);
  const double base = static_cast<double>(latents.base) + q.half_logvar;
  if (sum.max < kInfinity) return {sum.max, sum.sum, base};
  const bool is_nan = std::any_of(logs, logs + count, [](float value) { return value != value; });
  return {kInfinity, is_nan ? std::nan("") : 1.0, base};
}

// The values [B], and of each sample the largest log-weight and the sum of the weights relative to it, [B, 2].
std::tuple<Tensor, Tensor> importance_weighted_log_prob_cpu(const Tensor& log_px_z, const Tensor& z, const Tensor& mu,
                                                            const Tensor& logvar) {
  const Inputs in(log_px_z, z, mu, logvar);
  Tensor value = torch::stable::new_empty(log_px_z, {in.b}), normalizer = torch::stable::new_empty(log_px_z, {in.b, 2});
  const auto parts = allocate<Part>(in.b * in.pieces);
  std::atomic<bool> no_memory{!parts};
  for_dtype("z", in.z, [&](auto zero) {
    in.for_pieces([&](int64_t sample, int64_t piece, int64_t first, int64_t count) {
      float* const scratch = thread_scratch<float, 2>(2 * in.padded + kMaxRows);
      if (!scratch || no_memory) {
        no_memory = true;
        return;
      }
      parts[sample * in.pieces + piece] = part_of<decltype(zero)>(in, sample, first, count, scratch);
    });
  });
  FASTMIX_CHECK(!no_memory, "importance_weighted_log_prob: no memory for ", in.b * in.pieces, " sums");
  const double log_k = std::log(static_cast<double>(in.k));
  for (int64_t i = 0; i < in.b; ++i) {
    const Part *const begin = parts.get() + i * in.pieces, *const end = begin + in.pieces;
    float max = -kInfinity;
    for (const Part* part = begin; part < end; ++part) max = std::max(max, part->max);
    double sum = 0;
    for (const Part* part = begin; part < end; ++part) {
      sum += part->max == max ? part->sum : part->sum * std::exp(static_cast<double>(part->max) - max);
    }
    static_cast<float*>(value.data_ptr())[i] =
        sum == 0 ? -kInfinity : static_cast<float>(begin->base + max + std::log(sum) - log_k);
    static_cast<float*>(normalizer.data_ptr())[2 * i] = max;
    static_cast<float*>(normalizer.data_ptr())[2 * i + 1] = static_cast<float>(sum);
  }
  return {value, normalizer};
}

// What the gradients of mu and logvar are made of: Σ_k s, Σ_k s·e, Σ_k s·e², with s_k the gradient of log w_k.
struct Sums {
  float *weights, *first, *second;

  static int64_t floats(int64_t padded) { return 2 * padded + kLanes; }

  Sums(float* memory, int64_t padded) : weights(memory), first(memory + kLanes), second(memory + kLanes + padded) {}
};

template <typename T>
struct Backward {
  const Inputs& in;
  const Tensor &grad_output, &normalizer;
  T* d_z;
  float *d_log_px_z, *d_mu, *d_logvar;

  void piece(int64_t sample, int64_t first, int64_t count, float* scratch, const Sums& sums) const {
    const Gaussian q(in, sample, scratch);
    const Latents<T> latents(in, sample, first);
    const auto* const saved = static_cast<const float*>(normalizer.data_ptr()) + sample * normalizer.stride(0);
    const float max = saved[0], sum = saved[normalizer.stride(1)];
    const float grad = static_cast<const float*>(grad_output.data_ptr())[sample * grad_output.stride(0)];
    const float scale = sum == 0 ? 0.0f : grad / sum, base = sum == 0 ? 0.0f : max;
    std::fill_n(sums.weights, Sums::floats(in.padded), 0.0f);
    for_row_blocks(count, [&](int64_t row, auto rows) {
      float weights[kLanes] = {};
      latents.template log_weights<rows>(row, q, weights);
      const Vec relative = (load(weights) - base) * kLog2e;
      store(weights, exp2_nonpositive(relative) * scale);
      const int64_t at = sample * in.k + first + row;
      for (int i = 0; i < rows; ++i) *sums.weights += d_log_px_z[at + i] = weights[i];
      scaled<rows>(latents.z + row * latents.z_row, latents.z_row, weights, q, d_z + at * in.d, sums);
    });
  }

  template <int rows>
  void scaled(const T* from, int64_t from_row, const float* weights, const Gaussian& q, T* to, const Sums& sums) const {
    const auto add = [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vec mean = load(q.mean + j), inverse_std = load(q.inverse_std + j);
      Vec first = load(sums.first + j), second = load(sums.second + j);
      for (int i = 0; i < rows; ++i) {
        const Vec value = load_lanes(from + i * from_row + j, lanes), e = (value - mean) * inverse_std;
        const Vec scaled = e * weights[i];
        first += scaled;
        second += scaled * e;
        store_lanes(to + i * in.d + j, scaled * inverse_std - value * weights[i], lanes);
      }
      store(sums.first + j, first);
      store(sums.second + j, second);
    };
    int64_t j = 0;
    for (; j + kLanes <= in.d; j += kLanes) add(j, kLanes);
    if (j < in.d) add(j, in.d - j);
  }

  // parts: those of the sample's pieces, one behind the other.
  void finish(int64_t sample, float* parts, float* scratch) const {
    const Gaussian q(in, sample, scratch);
    const int64_t step = Sums::floats(in.padded);
    for (int64_t j = 0; j < in.d; ++j) {
      double weights = 0, first = 0, second = 0;
      for (int64_t piece = 0; piece < in.pieces; ++piece) {
        const Sums sums(parts + piece * step, in.padded);
        weights += *sums.weights, first += sums.first[j], second += sums.second[j];
      }
      d_mu[sample * in.d + j] = static_cast<float>(-first * q.inverse_std[j]);
      d_logvar[sample * in.d + j] = static_cast<float>(0.5 * (weights - second));
    }
  }

  // True unless there is no memory.
  bool run() const {
    const int64_t step = Sums::floats(in.padded), own = 2 * in.padded;
    const auto parts = in.pieces > 1 ? allocate<float>(in.b * in.pieces * step) : nullptr;
    std::atomic<bool> no_memory{in.pieces > 1 && !parts};
    in.for_pieces([&](int64_t sample, int64_t index, int64_t first, int64_t count) {
      float* const scratch = thread_scratch<float, 2>(own + step);
      if (!scratch || no_memory) {
        no_memory = true;
        return;
      }
      float* const sums = parts ? parts.get() + (sample * in.pieces + index) * step : scratch + own;
      piece(sample, first, count, scratch, Sums(sums, in.padded));
      if (!parts) finish(sample, sums, scratch);
    });
    if (in.pieces == 1 || no_memory) return !no_memory;
    torch::stable::parallel_for(0, in.b, 1 + kGrainElements / (in.pieces * step), [&](int64_t begin, int64_t end) {
      float* const scratch = thread_scratch<float, 2>(own);
      for (int64_t i = begin; scratch && i < end; ++i) finish(i, parts.get() + i * in.pieces * step, scratch);
      if (!scratch) no_memory = true;
    });
    return !no_memory;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> importance_weighted_log_prob_bwd_cpu(const Tensor& grad_output,
                                                                                const Tensor& log_px_z, const Tensor& z,
                                                                                const Tensor& mu, const Tensor& logvar,
                                                                                const Tensor& normalizer) {
  const Inputs in(log_px_z, z, mu, logvar);
  FASTMIX_CHECK(grad_output.scalar_type() == ScalarType::Float && grad_output.dim() == 1 && grad_output.size(0) == in.b,
                "grad_output must be float32 [", in.b, "]");
  Inputs::check("normalizer", normalizer, in.b, 2);
  Tensor d_log_px_z = torch::stable::new_empty(log_px_z, {in.b, in.k}),
         d_mu = torch::stable::new_empty(mu, {in.b, in.d});
  Tensor d_z = torch::stable::new_empty(z, {in.b, in.k, in.d}), d_logvar = torch::stable::new_empty(mu, {in.b, in.d});
  for_dtype("z", in.z, [&](auto zero) {
    using T = decltype(zero);
    const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
    const Backward<T> backward{
        in,           grad_output,     normalizer, static_cast<T*>(d_z.data_ptr()), floats(d_log_px_z),
        floats(d_mu), floats(d_logvar)};
    FASTMIX_CHECK(backward.run(), "importance_weighted_log_prob_bwd: no memory for ", in.b * in.pieces, " sums");
  });
  return {d_log_px_z, d_z, d_mu, d_logvar};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("importance_weighted_log_prob", TORCH_BOX(&fastmix::importance_weighted_log_prob_cpu));
  m.impl("importance_weighted_log_prob_bwd", TORCH_BOX(&fastmix::importance_weighted_log_prob_bwd_cpu));
}
