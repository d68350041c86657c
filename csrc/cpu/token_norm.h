// The normalisation before a product along the tokens, forward and backward, a panel of channels at a time.
//
// A panel is [S, kPanelColumns] float32: the tokens of up to kPanelColumns channels of one sample, channels in the
// lanes, which is what a product takes as its right operand. LayerNorm over the channels needs its statistics
// beforehand and ends its backward row by row; the other kinds are done within a panel.
#pragma once

#include <cmath>

#include "cpu/gemm.h"

namespace fastmix {

// 64 or 72 channels: deep enough for the weights' gradients, and a panel stays in the cache.
inline constexpr int64_t kPanelColumns = kTileColumns * ((64 + kTileColumns - 1) / kTileColumns);

enum class Norm : int64_t { kNone, kLayer, kAffine, kTokenLayer };

// Tokens by channels, channels contiguous; p is null where an optional tensor is absent.
template <typename T>
struct Tokens {
  T* p = nullptr;
  int64_t sample_stride = 0, stride = 0;
  T* row(int64_t sample, int64_t token) const { return p + sample * sample_stride + token * stride; }
};

// visit(offset, lanes) for each vector of `count` elements.
template <typename Visit>
void for_vectors(int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) visit(i, int64_t{kLanes});
  if (i < count) visit(i, count - i);
}

// A sum of many vectors, in chains (see kChain).
struct ChainedSum {
  Vec total{}, chain{};
  int64_t count = 0;

  void add(Vec value) {
    chain += value;
    if (++count % kChain == 0) total += chain, chain = Vec{};
  }
  Vec value() const { return total + chain; }
};

// Sums over rows for each of some channels, in chains: `part` [count rounded up to kLanes] is working memory, `total`
// is added to. Nothing is summed if total is null.
class ChannelSums {
 public:
  ChannelSums(float* total, float* part, int64_t count) : total_(total), part_(part), count_(count) {
    if (total) std::fill_n(part, round_up(count, kLanes), 0.0f);
  }
  ChannelSums(const ChannelSums&) = delete;
  ~ChannelSums() { flush(); }

  explicit operator bool() const { return total_ != nullptr; }
  void add(int64_t channel, Vec value) { store(part_ + channel, load(part_ + channel) + value); }
  void end_row() {
    if (++rows_ % kChain == 0) flush();
  }

 private:
  void flush() {
    if (!total_) return;
    for_vectors(count_, [&](int64_t i, int64_t lanes) {
      store_lanes(total_ + i, load_lanes(total_ + i, lanes) + load(part_ + i), lanes);
      store(part_ + i, Vec{});
    });
  }

  float *total_, *part_;
  int64_t count_, rows_ = 0;
};

template <typename T>
struct TokenNorm {
  Norm kind;
  float eps;
  int64_t s, c;
  const float *weight, *bias;  // null is 1 and 0
  Tokens<const T> x;
  float* statistics = nullptr;  // of kLayer: mean and 1/σ of each token, [B·S, 2]

  void measure_row(int64_t sample, int64_t token) const {
    const T* row = x.row(sample, token);
    Vec sum{}, squares{};
    for_vectors(c, [&](int64_t i, int64_t lanes) { sum += load_lanes(row + i, lanes); });
    const float mean = horizontal_sum(sum) / static_cast<float>(c);
    for_vectors(c, [&](int64_t i, int64_t lanes) {
      const Vec difference = load_lanes(row + i, lanes) - mean;
      squares += lanes == kLanes ? difference * difference : first_lanes(difference * difference, lanes);
    });
    float* to = statistics + 2 * (sample * s + token);
    to[0] = mean;
    to[1] = 1 / std::sqrt(horizontal_sum(squares) / static_cast<float>(c) + eps);
  }

  // panel ← norm(x) of channels first … first + count − 1, without weight and bias; the columns beyond are 0.
  // column_scale (of kTokenLayer): 1/σ of each channel, kPanelColumns of them.
  void standardise(int64_t sample, int64_t first, int64_t count, float* panel, float* column_scale) const {
    for (int64_t token = 0; token < s; ++token) {
      const T* row = x.row(sample, token) + first;
      float* to = panel + token * kPanelColumns;
      const float* of_token = kind == Norm::kLayer ? statistics + 2 * (sample * s + token) : nullptr;
      for (int64_t i = 0; i < kPanelColumns; i += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, count - i);
        Vec value = lanes > 0 ? load_lanes(row + i, lanes) : Vec{};
        if (of_token) value = (value - of_token[0]) * of_token[1];
        store(to + i, value);
      }
    }
    if (kind == Norm::kTokenLayer) standardise_columns(panel, column_scale);
  }

  // panel ← weight ⊙ panel + bias
  void scale_and_shift(int64_t first, int64_t count, float* panel) const {
    if (!weight && !bias) return;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, count - i);
      const bool per_token = kind == Norm::kTokenLayer;
      Vec factor = weight && !per_token ? load_lanes(weight + first + i, lanes) : splat(1);
      Vec shift = bias && !per_token ? load_lanes(bias + first + i, lanes) : Vec{};
      for (int64_t token = 0; token < s; ++token) {
        if (per_token && weight) factor = splat(weight[token]);
        if (per_token && bias) shift = splat(bias[token]);
        float* to = panel + token * kPanelColumns + i;
        store(to, load(to) * factor + shift);
      }
    }
  }

  void load_panel(int64_t sample, int64_t first, int64_t count, float* panel, float* column_scale) const {
    standardise(sample, first, count, panel, column_scale);
    scale_and_shift(first, count, panel);
  }

 private:
  static Vec first_lanes(Vec v, int64_t lanes) {
    for (int64_t i = lanes; i < kLanes; ++i) v[i] = 0;
    return v;
  }

  void standardise_columns(float* panel, float* column_scale) const {
    for (int64_t i = 0; i < kPanelColumns; i += kLanes) {
      ChainedSum sum, squares;
      for (int64_t token = 0; token < s; ++token) sum.add(load(panel + token * kPanelColumns + i));
      const Vec mean = sum.value() / static_cast<float>(s);
      for (int64_t token = 0; token < s; ++token) {
        const Vec difference = load(panel + token * kPanelColumns + i) - mean;
        squares.add(difference * difference);
      }
      const Vec variance = squares.value() / static_cast<float>(s);
      Vec scale;
      for (int lane = 0; lane < kLanes; ++lane) scale[lane] = 1 / std::sqrt(variance[lane] + eps);
      for (int64_t token = 0; token < s; ++token) {
        float* to = panel + token * kPanelColumns + i;
        store(to, (load(to) - mean) * scale);
      }
      store(column_scale + i, scale);
    }
  }
};

// The backward of a TokenNorm: du, the gradient of its result, becomes dx, dweight and dbias.
template <typename T>
struct TokenNormBackward {
  TokenNorm<T> norm;
  T* dx = nullptr;        // [B, S, C]
  const T* dy = nullptr;  // [B, S, C], added to dx, or null
  float* du = nullptr;    // of kLayer: [samples, S, C], where panels leave du for `finish_row`

  // du_panel [S, kTileColumns] of channels first …; x_panel: standardised x, needed by kAffine and kTokenLayer.
  // slot: the sample's place in `du`. dweight and dbias (or null) are added to.
  void finish_panel(int64_t sample, int64_t slot, int64_t first, int64_t count, const float* du_panel,
                    const float* x_panel, const float* column_scale, float* dweight, float* dbias) const {
    const int64_t s = norm.s, c = norm.c;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, count - i);
      const auto at = [&](const float* panel, int64_t token) { return load(panel + token * kPanelColumns + i); };
      const auto write = [&](int64_t token, Vec value) {
        const int64_t to = (sample * s + token) * c + first + i;
        store_lanes(dx + to, dy ? value + load_lanes(dy + to, lanes) : value, lanes);
      };
      if (norm.kind == Norm::kNone) {
        for (int64_t token = 0; token < s; ++token) write(token, at(du_panel, token));
      } else if (norm.kind == Norm::kLayer) {
        for (int64_t token = 0; token < s; ++token) {
          store_lanes(du + (slot * s + token) * c + first + i, at(du_panel, token), lanes);
        }
      } else if (norm.kind == Norm::kAffine) {
        const Vec factor = norm.weight ? load_lanes(norm.weight + first + i, lanes) : splat(1);
        ChainedSum products, sum;
        for (int64_t token = 0; token < s; ++token) {
          const Vec value = at(du_panel, token);
          if (dx) write(token, value * factor);
          products.add(value * at(x_panel, token));
          sum.add(value);
        }
        add_lanes(dweight, first + i, products.value(), lanes);
        add_lanes(dbias, first + i, sum.value(), lanes);
      } else {
        finish_columns(i, lanes, du_panel, x_panel, column_scale, dweight, dbias, write);
      }
    }
  }

  // kLayer: the end of one token, all channels.
  void finish_row(int64_t sample, int64_t slot, int64_t token, ChannelSums& dweight, ChannelSums& dbias) const {
    const int64_t s = norm.s, c = norm.c;
    const T* row = norm.x.row(sample, token);
    const float* from = du + (slot * s + token) * c;
    const float* of_token = norm.statistics + 2 * (sample * s + token);
    const float mean = of_token[0], scale = of_token[1];
    Vec sum{}, products{};
    for_vectors(c, [&](int64_t i, int64_t lanes) {
      const Vec standard = (load_lanes(row + i, lanes) - mean) * scale, value = load_lanes(from + i, lanes);
      const Vec weighted = norm.weight ? value * load_lanes(norm.weight + i, lanes) : value;
      sum += weighted;
      products += weighted * standard;
      if (dweight) dweight.add(i, value * standard);
      if (dbias) dbias.add(i, value);
    });
    dweight.end_row();
    dbias.end_row();
    if (!dx) return;
    const float mean_sum = horizontal_sum(sum) / static_cast<float>(c);
    const float mean_product = horizontal_sum(products) / static_cast<float>(c);
    const int64_t to = (sample * s + token) * c;
    for_vectors(c, [&](int64_t i, int64_t lanes) {
      const Vec standard = (load_lanes(row + i, lanes) - mean) * scale, value = load_lanes(from + i, lanes);
      const Vec weighted = norm.weight ? value * load_lanes(norm.weight + i, lanes) : value;
      const Vec result = (weighted - mean_sum - standard * mean_product) * scale;
      store_lanes(dx + to + i, dy ? result + load_lanes(dy + to + i, lanes) : result, lanes);
    });
  }

 private:
  static void add_lanes(float* to, int64_t i, Vec value, int64_t lanes) {
    if (to) store_lanes(to + i, load_lanes(to + i, lanes) + value, lanes);
  }

  template <typename Write>
  void finish_columns(int64_t i, int64_t lanes, const float* du_panel, const float* x_panel, const float* column_scale,
                      float* dweight, float* dbias, const Write& write) const {
    const int64_t s = norm.s;
    ChainedSum sum, products;
    for (int64_t token = 0; token < s; ++token) {
      const int64_t at = token * kPanelColumns + i;
      const Vec value = load(du_panel + at), standard = load(x_panel + at);
      const Vec weighted = norm.weight ? value * norm.weight[token] : value;
      sum.add(weighted);
      products.add(weighted * standard);
      // Columns beyond `lanes` hold zeros.
      if (dweight) dweight[token] += horizontal_sum(value * standard);
      if (dbias) dbias[token] += horizontal_sum(value);
    }
    if (!dx) return;
    const Vec mean_sum = sum.value() / static_cast<float>(s), mean_product = products.value() / static_cast<float>(s);
    const Vec scale = load(column_scale + i);
    for (int64_t token = 0; token < s; ++token) {
      const int64_t at = token * kPanelColumns + i;
      const Vec value = load(du_panel + at);
      const Vec weighted = norm.weight ? value * norm.weight[token] : value;
      write(token, (weighted - mean_sum - load(x_panel + at) * mean_product) * scale);
    }
  }
};

}  // namespace fastmix
