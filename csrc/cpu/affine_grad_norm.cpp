// Per-sample gradients of a normalisation layer's scale and shift, Σ g·(x − mean)·rstd and Σ g over the positions of x
// and g [B, R, C, L], in one pass over them. Channels that lie beside each other (LayerNorm) are in the lanes, and a
// piece of the positions has sums of its own; else (GroupNorm) the positions behind a channel are in the lanes.
// Sums of up to kChain terms are float32, sums of these float64.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRows = 4;                    // positions that are added at once
constexpr int64_t kPieceRows = kRows * kChain;  // positions of a piece
constexpr int64_t kBlockColumns = 1024;         // channels whose sums stay in the nearest cache
constexpr int64_t kRun = 2 * kLanes * kChain;   // elements of a row that are summed in float32
constexpr float kZero = 0;

// mean or rstd at [b, r, c] = data[b·of[0] + r·of[1] + c·of[2]], of[2] 0 or 1.
struct Statistic {
  const float* data = &kZero;
  int64_t of[3] = {0, 0, 0};

  const float* row(int64_t b, int64_t r) const { return data + b * of[0] + r * of[1]; }
  Vec at(const float* row, int64_t channel, int64_t count) const {
    return of[2] == 0 ? splat(*row) : load_lanes(row + channel, count);
  }
  bool of_rows() const { return of[2] == 0; }
};

template <typename T>
struct AffineGrad {
  int64_t b, r, c, l;
  const T *x, *g;
  int64_t x_of[4], g_of[4];  // strides
  Statistic mean, rstd;

  int64_t positions() const { return r * l; }
  int64_t width() const { return round_up(c, kLanes); }
  int64_t pieces() const { return std::max<int64_t>(1, (positions() + kPieceRows - 1) / kPieceRows); }

  // scale, shift [width] ← the sums over a piece of a sample's positions.
  void add_piece(int64_t sample, int64_t piece, float* scale, float* shift) const {
    std::fill(scale, scale + width(), 0.0f);
    std::fill(shift, shift + width(), 0.0f);
    const int64_t end = std::min(positions(), (piece + 1) * kPieceRows);
    for (int64_t first = 0; first < c; first += kBlockColumns) {
      const int64_t last = std::min(c, first + kBlockColumns);
      const bool of_rows = mean.of_rows() && rstd.of_rows();
      int64_t position = piece * kPieceRows;
      for (; position + kRows <= end; position += kRows) {
        of_rows ? add_rows<kRows, true>(sample, position, first, last, scale, shift)
                : add_rows<kRows, false>(sample, position, first, last, scale, shift);
      }
      for (; position < end; ++position) add_rows<1, false>(sample, position, first, last, scale, shift);
    }
  }

  // scale, shift ← the sums over a channel's positions.
  void sum_channel(int64_t sample, int64_t channel, float& scale, float& shift) const {
    double scales = 0, shifts = 0;
    for (int64_t i = 0; i < r; ++i) {
      const T* const from_x = x + sample * x_of[0] + i * x_of[1] + channel * x_of[2];
      const T* const from_g = g + sample * g_of[0] + i * g_of[1] + channel * g_of[2];
      const float centre = mean.row(sample, i)[channel * mean.of[2]];
      double sum = 0;
      for (int64_t first = 0; first < l; first += kRun) {
        Vec products[2]{}, values[2]{};
        const int64_t last = std::min(l, first + kRun);
        const auto add = [&](int which, int64_t j, int64_t count) {
          const Vec value = load_lanes(from_g + j, count);
          products[which] += value * (load_lanes(from_x + j, count) - centre);
          values[which] += value;
        };
        int64_t j = first;
        for (; j + 2 * kLanes <= last; j += 2 * kLanes) {
          add(0, j, kLanes);
          add(1, j + kLanes, kLanes);
        }
        for (; j < last; j += kLanes) add(0, j, std::min<int64_t>(kLanes, last - j));
        sum += horizontal_sum(products[0] + products[1]);
        shifts += horizontal_sum(values[0] + values[1]);
      }
      scales += sum * rstd.row(sample, i)[channel * rstd.of[2]];
    }
    scale = static_cast<float>(scales);
    shift = static_cast<float>(shifts);
  }

 private:
  // of_rows: whether mean and rstd are those of a position, whatever the channel.
  template <int rows, bool of_rows>
  void add_rows(int64_t sample, int64_t position, int64_t first, int64_t last, float* scale, float* shift) const {
    const T *from_x[rows], *from_g[rows];
    const float *means[rows], *rstds[rows];
    Vec centres[rows], factors[rows];
    for (int i = 0; i < rows; ++i) {
      const int64_t row = (position + i) / l, inner = (position + i) % l;
      from_x[i] = x + sample * x_of[0] + row * x_of[1] + inner * x_of[3];
      from_g[i] = g + sample * g_of[0] + row * g_of[1] + inner * g_of[3];
      means[i] = mean.row(sample, row);
      rstds[i] = rstd.row(sample, row);
      centres[i] = splat(*means[i]);
      factors[i] = splat(*rstds[i]);
    }
    for (int64_t j = first; j < last; j += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, last - j);
      Vec scales{}, shifts{};
      for (int i = 0; i < rows; ++i) {
        const Vec value = load_lanes(from_g[i] + j, count);
        const Vec centre = of_rows ? centres[i] : mean.at(means[i], j, count);
        const Vec factor = of_rows ? factors[i] : rstd.at(rstds[i], j, count);
        scales += value * ((load_lanes(from_x[i] + j, count) - centre) * factor);
        shifts += value;
      }
      store(scale + j, load(scale + j) + scales);
      store(shift + j, load(shift + j) + shifts);
    }
  }
};

// Pieces of positions, channels in the lanes.
template <typename T>
void sum_positions(const AffineGrad<T>& shape, float* scale, float* shift) {
  const int64_t pieces = shape.pieces(), width = shape.width();
  const Workspace workspace(shape.b * pieces * 2 * width);
  FASTMIX_CHECK(workspace.data(), "affine_grad_sample: no memory for ", shape.b * pieces * 2 * width, " float32");
  const int64_t elements = std::min(shape.positions(), kPieceRows) * shape.c;
  torch::stable::parallel_for(0, shape.b * pieces, 1 + kGrainElements / elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const sums = workspace.data() + i * 2 * width;
      shape.add_piece(i / pieces, i % pieces, sums, sums + width);
    }
  });
  torch::stable::parallel_for(0, shape.b, 1 + kGrainElements / (pieces * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * shape.c; i < end * shape.c; ++i) {
      const float* sums = workspace.data() + i / shape.c * pieces * 2 * width + i % shape.c;
      double scales = 0, shifts = 0;
      for (int64_t piece = 0; piece < pieces; ++piece, sums += 2 * width) {
        scales += sums[0];
        shifts += sums[width];
      }
      scale[i] = static_cast<float>(scales);
      shift[i] = static_cast<float>(shifts);
    }
  });
}

// Whole channels, their positions in the lanes.
template <typename T>
void sum_channels(const AffineGrad<T>& shape, float* scale, float* shift) {
  const int64_t grain = 1 + kGrainElements / shape.positions();
  torch::stable::parallel_for(0, shape.b * shape.c, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) shape.sum_channel(i / shape.c, i % shape.c, scale[i], shift[i]);
  });
}

// Keeps the memory that `data` points to.
struct KeptStatistic {
  Tensor tensor;
  Statistic statistic;
};

KeptStatistic statistic_of(const char* name, const Tensor& given, const Tensor& x) {
  FASTMIX_CHECK(given.scalar_type() == ScalarType::Float && given.dim() == 3 && given.size(0) == x.size(0) &&
                    given.size(1) == x.size(1) && given.size(2) == x.size(2),
                name, " must be float32 [B, R, C]");
  const bool readable = given.size(2) <= 1 || given.stride(2) == 0 || given.stride(2) == 1;
  const Tensor tensor = readable ? given : torch::stable::contiguous(given);
  const int64_t step = given.size(2) <= 1 ? 0 : tensor.stride(2);
  return {tensor, {static_cast<const float*>(tensor.data_ptr()), {tensor.stride(0), tensor.stride(1), step}}};
}

bool adjoining(const Tensor& tensor, int64_t dim) { return tensor.size(dim) <= 1 || tensor.stride(dim) == 1; }

std::tuple<Tensor, Tensor> affine_grad_sample_cpu(const Tensor& input, const Tensor& grad_output,
                                                  const OptionalTensor& mean, const Tensor& rstd) {
  FASTMIX_CHECK(input.dim() == 4, "input must be [B, R, C, L]");
  FASTMIX_CHECK(grad_output.scalar_type() == input.scalar_type() && grad_output.dim() == 4 &&
                    std::equal(input.sizes().begin(), input.sizes().end(), grad_output.sizes().begin()),
                "grad_output must have input's shape and dtype");
  const KeptStatistic kept_rstd = statistic_of("rstd", rstd, input);
  const KeptStatistic kept_mean = mean ? statistic_of("mean", *mean, input) : KeptStatistic{rstd, {}};
  const int64_t b = input.size(0), r = input.size(1), c = input.size(2), l = input.size(3);
  Tensor scale = torch::stable::new_empty(input, {b, c}, ScalarType::Float);
  Tensor shift = torch::stable::new_empty(input, {b, c}, ScalarType::Float);
  if (input.numel() == 0) return {torch::stable::zero_(scale), torch::stable::zero_(shift)};
  const bool channels = adjoining(input, 2) && adjoining(grad_output, 2) && (c > 1 || l == 1);
  const bool readable = channels || (adjoining(input, 3) && adjoining(grad_output, 3) && l > 1);
  const Tensor x = readable ? input : torch::stable::contiguous(input);
  const Tensor g = readable ? grad_output : torch::stable::contiguous(grad_output);
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    AffineGrad<T> shape{b, r, c, l, static_cast<const T*>(x.data_ptr()), static_cast<const T*>(g.data_ptr())};
    for (int64_t i = 0; i < 4; ++i) {
      shape.x_of[i] = x.stride(i);
      shape.g_of[i] = g.stride(i);
    }
    shape.mean = kept_mean.statistic;
    shape.rstd = kept_rstd.statistic;
    auto* const scales = static_cast<float*>(scale.data_ptr());
    auto* const shifts = static_cast<float*>(shift.data_ptr());
    channels || l == 1 ? sum_positions(shape, scales, shifts) : sum_channels(shape, scales, shifts);
  });
  return {scale, shift};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("affine_grad_sample", TORCH_BOX(&fastmix::affine_grad_sample_cpu));
}
