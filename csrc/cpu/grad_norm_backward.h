// The gradient of the norms: with n² = ‖Σ_t g_t a_tᵀ‖² (+ ‖Σ_t g_t‖²) and w the gradient of n²,
//   da_t = 2w Σ_u (g_t·g_u) a_u, dg_t = 2w (Σ_u (a_t·a_u) g_u + bias·G)  (Gram form: rows of both products at a time)
//   da_t = 2w g_t·M, dg_t = 2w (a_t·Mᵀ + bias·G)                         (direct form: M = Σ_t g_t a_tᵀ, G = Σ_t g_t)
// The Gram form's gradients lose as many digits as the weight's norm: where that cancels, the direct form follows.
#pragma once

#include "cpu/grad_norm_gram.h"
#include "cpu/jobs.h"

namespace fastmix {

template <typename T>
struct GradNormBackward {
  static constexpr int64_t kRows = 32;  // positions of a piece

  LinearSizes sizes;
  Positions<const T> a, g;
  Positions<T> da, dg;
  const float* grad;       // [B]
  const int32_t* lengths;  // [B] or null
  bool bias;

  void run(bool gram) const {
    if (!gram) return run_direct();
    const auto parts = allocate<GramPart>(sizes.batch * blocks());
    FASTMIX_CHECK(parts, "grad_norm: no memory for ", sizes.batch, " samples");
    run_gram(parts.get());
    for (int64_t b = 0; b < sizes.batch; ++b) {
      GramPart sum{};
      for (int64_t block = 0; block < blocks(); ++block) {
        sum.norm_sq += parts[b * blocks() + block].norm_sq;
        sum.diagonal += parts[b * blocks() + block].diagonal;
      }
      if (sizes.positions > 1 && sum.norm_sq < kCancelled * sum.diagonal) of_sample(b).run_direct();
    }
  }

 private:
  int64_t in_groups() const { return (sizes.in + kTileColumns - 1) / kTileColumns; }
  int64_t out_groups() const { return (sizes.out + kTileColumns - 1) / kTileColumns; }
  int64_t blocks() const { return (sizes.positions + kRows - 1) / kRows; }
  int64_t length(int64_t sample) const {
    return lengths ? std::clamp<int64_t>(lengths[sample], 0, sizes.positions) : sizes.positions;
  }
  GradNormBackward of_sample(int64_t sample) const {
    return {{1, sizes.positions, sizes.in, sizes.out},
            {a.at(sample), a.sample_stride, a.stride, a.count},
            {g.at(sample), g.sample_stride, g.stride, g.count},
            {da.at(sample), da.sample_stride, da.stride, da.count},
            {dg.at(sample), dg.sample_stride, dg.stride, dg.count},
            grad + sample,
            lengths ? lengths + sample : nullptr,
            bias};
  }
  float factor(int64_t sample) const { return 2.0f * grad[sample]; }

  // One group of kTileColumns columns of the sample's first positions.
  static void pack(const Positions<const T>& p, int64_t sample, int64_t positions, int64_t features, int64_t group,
                   float* groups) {
    const int64_t column = group * kTileColumns;
    pack_positions(p, sample * p.count, positions, column, std::min<int64_t>(kTileColumns, features - column),
                   groups + column * positions);
  }

  // Rows [first, first + rows) of the sample's gradient, `features` wide, group by group: product(column, columns,
  // tile [kRows, kTileColumns]), times `factor`.
  template <typename Product>
  static void write_rows(const Positions<T>& p, int64_t sample, int64_t first, int64_t rows, int64_t features,
                         float factor, float* tile, const Product& product) {
    for (int64_t column = 0; column < features; column += kTileColumns) {
      const int64_t columns = std::min<int64_t>(kTileColumns, features - column);
      product(column, columns, tile);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += kLanes) {
          store_lanes(p.at(sample, first + i) + column + j, load(tile + i * kTileColumns + j) * factor,
                      std::min<int64_t>(kLanes, columns - j));
        }
      }
    }
  }

  // The positions of a block that count; the others' gradients become 0.
  int64_t rows_of(int64_t sample, int64_t first) const {
    const int64_t all = std::min(kRows, sizes.positions - first);
    const int64_t rows = std::clamp<int64_t>(length(sample) - first, 0, all);
    for (int64_t i = rows; i < all; ++i) {
      std::fill_n(da.at(sample, first + i), sizes.in, T(0.0f));
      std::fill_n(dg.at(sample, first + i), sizes.out, T(0.0f));
    }
    return rows;
  }

  // Gram form

  // What a block of positions has of the weight's norm, and of Σ_t ‖a_t‖²‖g_t‖².
  struct GramPart {
    double norm_sq, diagonal;
  };

  void run_gram(GramPart* parts) const {
    const int64_t in_size = groups_size(sizes.in, sizes.positions), t = sizes.positions;
    const int64_t packed = in_size + groups_size(sizes.out, t), converted = converted_size<T>(t, sizes.in);
    const double flops = 4.0 * static_cast<double>(t * t * (sizes.in + sizes.out));
    run_jobs(Jobs{"grad_norm", sizes.batch, packed + converted + converted_size<T>(t, sizes.out),
                  kRows * (t + kTileColumns) + kDots + pointers(), flops},
             Step{in_groups() + out_groups() + 1,
                  [&](int64_t sample, int64_t piece, float* memory, float*) {
                    const int64_t positions = length(sample), of_out = piece - in_groups();
                    if (of_out < 0) {
                      pack(a, sample, positions, sizes.in, piece, memory);
                    } else if (of_out < out_groups()) {
                      pack(g, sample, positions, sizes.out, of_out, memory + in_size);
                    } else {
                      convert(a, sample, positions, sizes.in, memory + packed);
                      convert(g, sample, positions, sizes.out, memory + packed + converted);
                    }
                  }},
             Step{blocks(), [&](int64_t sample, int64_t block, float* memory, float* scratch) {
                    const int64_t first = block * kRows, rows = rows_of(sample, first);
                    double of_a[kRows] = {}, of_g[kRows] = {}, norm_sq = 0;
                    float* const of_g_groups = memory + in_size;
                    gram_rows(a, dg, sample, first, rows, sizes.in, sizes.out, memory + packed, of_g_groups, scratch,
                              of_a, [&](int64_t column, int64_t columns, float* tile) {
                                if (bias)
                                  add_to_rows(of_g_groups + column * length(sample), length(sample), rows, columns,
                                              tile);
                              });
                    gram_rows(g, da, sample, first, rows, sizes.out, sizes.in, memory + packed + converted, memory,
                              scratch, of_g, [&](int64_t column, int64_t columns, float* tile) {
                                norm_sq += dot_rows(a, sample, first, rows, column, columns, tile);
                              });
                    GramPart& part = parts[sample * blocks() + block];
                    part = {norm_sq, 0};
                    for (int64_t i = 0; i < rows; ++i) part.diagonal += of_a[i] * of_g[i];
                  }});
  }

  // The tile's rows += the sum of the group's.
  static void add_to_rows(const float* group, int64_t positions, int64_t rows, int64_t columns, float* tile) {
    float sums[kTileColumns];
    column_sums(group, positions, columns, sums);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        float* const to = tile + i * kTileColumns + j;
        store(to, load(to) + load(sums + j));
      }
    }
  }

  // Σ of rows [first, first + rows) of p times the tile's.
  static double dot_rows(const Positions<const T>& p, int64_t sample, int64_t first, int64_t rows, int64_t column,
                         int64_t columns, const float* tile) {
    Vec sum{};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, columns - j);
        sum += load_lanes(p.at(sample, first + i) + column + j, lanes) * load(tile + i * kTileColumns + j);
      }
    }
    return horizontal_sum(sum);
  }

  static void convert(const Positions<const T>& p, int64_t sample, int64_t positions, int64_t features, float* to) {
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t t = 0; t < positions; ++t) convert_row(p.at(sample, t), features, to + t * features);
    }
  }

  int64_t pointers() const { return (sizes.positions * sizeof(float*) + sizeof(float) - 1) / sizeof(float); }

  // Rows of the gradient of `other`, whose packed rows are given: factor·p·pᵀ·other; diagonal [rows] ← that of p·pᵀ.
  // visit(column, columns, tile) before the factor.
  template <typename Visit>
  void gram_rows(const Positions<const T>& p, const Positions<T>& gradient, int64_t sample, int64_t first, int64_t rows,
                 int64_t features, int64_t other_features, const float* converted, const float* groups, float* scratch,
                 double* diagonal, const Visit& visit) const {
    const int64_t positions = length(sample), stride = sizes.positions;
    auto* const pointer = reinterpret_cast<const float**>(scratch);
    float *const dots = scratch + pointers(), *const strip = dots + kDots;
    float* const tile = strip + kRows * stride;
    for (int64_t t = 0; t < positions; ++t) {
      if constexpr (std::is_same_v<T, float>) {
        pointer[t] = p.at(sample, t);
      } else {
        pointer[t] = converted + t * features;
      }
    }
    for (int64_t column = 0; column < positions; column += kDotColumns) {
      const int64_t columns = std::min(kDotColumns, positions - column);
      for (int64_t row = 0; row < rows; row += kDotRows) {
        const int64_t count = std::min(kDotRows, rows - row);
        dot_tile(count, columns, features, pointer + first + row, pointer + column, dots);
        for (int64_t i = 0; i < count; ++i) {
          std::copy_n(dots + i * kDotColumns, columns, strip + (row + i) * stride + column);
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) diagonal[i] = strip[i * stride + first + i];
    write_rows(gradient, sample, first, rows, other_features, factor(sample), tile,
               [&](int64_t column, int64_t columns, float* to) {
                 multiply(rows, columns, positions, {strip, stride, 1}, {groups + column * positions}, to,
                          kTileColumns);
                 visit(column, columns, to);
               });
  }

  // Direct form

  void run_direct() const {
    const int64_t t = sizes.positions, stride = round_up(sizes.in, kTileColumns);
    const int64_t in_size = groups_size(sizes.in, t), m_size = sizes.out * stride;
    const int64_t mt_size = groups_size(sizes.out, sizes.in), out_blocks = (sizes.out + kBlockOut - 1) / kBlockOut;
    const int64_t converted = kRows * std::max(sizes.in, sizes.out);
    const int64_t scratch_size = std::max(groups_size(kBlockOut, t) + kStripSize, kRows * kTileColumns + converted);
    run_jobs(Jobs{"grad_norm", sizes.batch, in_size + m_size + mt_size + round_up(sizes.out, kTileColumns),
                  scratch_size, 3.0 * sizes.flops() / static_cast<double>(sizes.batch)},
             Step{in_groups(), [&](int64_t sample, int64_t group, float* memory,
                                   float*) { pack(a, sample, length(sample), sizes.in, group, memory); }},
             Step{out_blocks,
                  [&](int64_t sample, int64_t block, float* memory, float* scratch) {
                    float* const m = memory + in_size;
                    weight_grad_rows(sample, block * kBlockOut, memory, m, m + m_size + mt_size, scratch);
                  }},
             Step{out_groups(),
                  [&](int64_t, int64_t group, float* memory, float*) {
                    const int64_t first = group * kTileColumns;
                    float* const m = memory + in_size;
                    pack_columns(m + first * stride, stride, sizes.in,
                                 std::min<int64_t>(kTileColumns, sizes.out - first), m + m_size + first * sizes.in);
                  }},
             Step{blocks(), [&](int64_t sample, int64_t block, float* memory, float* scratch) {
                    const float* const m = memory + in_size;
                    direct_rows(sample, block * kRows, m, m + m_size, m + m_size + mt_size, scratch);
                  }});
  }

  // Rows [row, row + kBlockOut) of M, and those elements of G.
  void weight_grad_rows(int64_t sample, int64_t row, const float* a_groups, float* m, float* sums,
                        float* scratch) const {
    const int64_t positions = length(sample), stride = round_up(sizes.in, kTileColumns);
    const int64_t rows = std::min(kBlockOut, sizes.out - row);
    float* const tile = scratch + groups_size(kBlockOut, sizes.positions);
    pack_positions(g, sample * g.count, positions, row, rows, scratch);
    for_strips(positions, rows, sizes.in, scratch, a_groups,
               [&](int64_t i, int64_t count, int64_t column, int64_t columns, const Left& left, const Right& right) {
                 multiply_tile(count, columns, positions, left, right, m + (row + i) * stride + column, stride);
               });
    for (int64_t i = 0; i < rows; i += kTileColumns) {
      const int64_t columns = std::min<int64_t>(kTileColumns, rows - i);
      column_sums(scratch + i * positions, positions, columns, tile);
      std::copy_n(tile, columns, sums + row + i);
    }
  }

  void direct_rows(int64_t sample, int64_t first, const float* m, const float* mt_groups, const float* sums,
                   float* scratch) const {
    const int64_t rows = rows_of(sample, first), stride = round_up(sizes.in, kTileColumns);
    float *const tile = scratch, *const converted = tile + kRows * kTileColumns;
    const Left of_g = left(g, sample, first, rows, sizes.out, converted);
    write_rows(da, sample, first, rows, sizes.in, factor(sample), tile,
               [&](int64_t column, int64_t columns, float* to) {
                 multiply(rows, columns, sizes.out, of_g, {m + column, stride}, to, kTileColumns);
               });
    const Left of_a = left(a, sample, first, rows, sizes.in, converted);
    write_rows(dg, sample, first, rows, sizes.out, factor(sample), tile,
               [&](int64_t column, int64_t columns, float* to) {
                 multiply(rows, columns, sizes.in, of_a, {mt_groups + column * sizes.in}, to, kTileColumns);
                 for (int64_t i = 0; i < rows && bias; ++i) {
                   for (int64_t j = 0; j < columns; ++j) to[i * kTileColumns + j] += sums[column + j];
                 }
               });
  }

  static Left left(const Positions<const T>& p, int64_t sample, int64_t first, int64_t rows, int64_t features,
                   float* converted) {
    if constexpr (std::is_same_v<T, float>) {
      return {p.at(sample, first), p.stride, 1};
    } else {
      for (int64_t i = 0; i < rows; ++i) convert_row(p.at(sample, first + i), features, converted + i * features);
      return {converted, features, 1};
    }
  }
};

}  // namespace fastmix
