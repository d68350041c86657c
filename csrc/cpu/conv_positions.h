// The gradient of a convolution's weight with positions in the lanes, for few channels. A box of x is copied, once for
// each tap along a row and each phase of the stride across, as planes whose rows are as long as those of g; g itself is
// read in place where it is contiguous. Then dW[o, k] is the inner product of two runs of memory. Sums of up to kChain
// terms a lane are float32.
#pragma once

#include "cpu/conv_grad_norm.h"

namespace fastmix {

// Tiles of dW: kTileRows channels of g by kTaps columns of dW, in a slot of memory of their own.
#if defined(__AVX512F__)
inline constexpr int kTaps = 6;
#else
inline constexpr int kTaps = 3;
#endif
inline constexpr int kSlot = (kTileRows * kTaps + kTileLanes - 1) / kTileLanes * kTileLanes;

namespace detail {

// In groups of `group` elements, blocks of `block`: the even (odd: the odd) blocks of a, then those of b.
template <int block, int group, int odd, int... i>
inline TileVec half_blocks(TileVec a, TileVec b, std::integer_sequence<int, i...>) {
  const auto source = [](int lane) constexpr {
    const int first = lane / group * group, at = lane % group, half = group / 2, of_b = at / half;
    return of_b * kTileLanes + first + (2 * (at % half / block) + odd) * block + at % block;
  };
  return __builtin_shufflevector(a, b, source(i)...);
}

template <int block, int group>
inline TileVec add_blocks(TileVec a, TileVec b) {
  constexpr std::make_integer_sequence<int, kTileLanes> lanes{};
  return half_blocks<block, group, 0>(a, b, lanes) + half_blocks<block, group, 1>(a, b, lanes);
}

// Lane i ← the sum of the lanes of vectors[i]; pairs within 128 bits, which is what instructions are quick at, first.
template <int lanes>
TileVec sums_of(TileVec (&vectors)[lanes]) {
  int count = lanes;
  const auto halve = [&](auto block, auto group) {
    count /= 2;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      vectors[i] = add_blocks<decltype(block)::value, decltype(group)::value>(vectors[2 * i], vectors[2 * i + 1]);
    }
  };
  using std::integral_constant;
  halve(integral_constant<int, 1>{}, integral_constant<int, 4>{});
  halve(integral_constant<int, 1>{}, integral_constant<int, 4>{});
  if constexpr (lanes >= 8) halve(integral_constant<int, 4>{}, integral_constant<int, lanes>{});
  if constexpr (lanes >= 16) halve(integral_constant<int, 4>{}, integral_constant<int, lanes>{});
  return vectors[0];
}

// A row of g: data from row·step on, and the last, incomplete vector at last[row·kTileLanes].
struct Runs {
  const float* data;
  int64_t step, vectors;  // complete ones
  const float* last;      // or null
};

// slot[row·taps + tap] (+)= Σ_i g[row, i]·x[offsets[tap] + i]
template <int rows, int taps>
void correlate(const Runs& g, const float* x, const int64_t* offsets, float* slot, bool add) {
  TileVec sums[rows][taps] = {};
  const float* from[taps];
  for (int tap = 0; tap < taps; ++tap) from[tap] = x + offsets[tap];
  const auto add_vectors = [&](const float* left, int64_t step, int64_t at) __attribute__((always_inline)) {
    TileVec right[taps];
#pragma GCC unroll 8
    for (int tap = 0; tap < taps; ++tap) std::memcpy(&right[tap], from[tap] + at, sizeof(TileVec));
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      TileVec value;
      std::memcpy(&value, left + row * step, sizeof(value));
#pragma GCC unroll 8
      for (int tap = 0; tap < taps; ++tap) sums[row][tap] += value * right[tap];
    }
  };
  for (int64_t i = 0; i < g.vectors; ++i) add_vectors(g.data + i * kTileLanes, g.step, i * kTileLanes);
  if (g.last) add_vectors(g.last, kTileLanes, g.vectors * kTileLanes);
#pragma GCC unroll 8
  for (int first = 0; first < rows * taps; first += kTileLanes) {
    TileVec vectors[kTileLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kTileLanes; ++i) {
      if (first + i < rows * taps) vectors[i] = sums[(first + i) / taps][(first + i) % taps];
    }
    TileVec result = sums_of(vectors), before;
    if (add) {
      std::memcpy(&before, slot + first, sizeof(before));
      result += before;
    }
    std::memcpy(slot + first, &result, sizeof(result));
  }
  constexpr int kUsed = (rows * taps + kTileLanes - 1) / kTileLanes * kTileLanes;
  std::fill(slot + kUsed, slot + kSlot, 0.0f);
}

}  // namespace detail

class PositionLanes {
 public:
  explicit PositionLanes(Conv conv) : conv_(std::move(conv)) {
    constexpr int64_t kLongest = std::min<int64_t>(1280, kChain * kTileLanes), kFloats = 1 << 18;
    const ConvAxis &d = conv_.axes[0], &h = conv_.axes[1], &w = conv_.axes[2];
    for (int i = 0; i < 2; ++i) {
      for (int64_t tap = 0; tap < conv_.axes[i].kernel; ++tap) {
        if (phase(i, tap) == count(i)) phases_[i].push_back(tap * conv_.axes[i].dilation % conv_.axes[i].stride);
      }
    }
    const int64_t planes = count(0) * count(1) * w.kernel;
    int64_t longest = std::clamp<int64_t>(kFloats / (conv_.channels * planes + kTileRows), kLongest / 4, kLongest);
    for (int i = 2; i >= 0; --i) {
      conv_.axes[i].cut(std::max<int64_t>(1, longest));
      plane_[i] = conv_.axes[i].extent + (i < 2 ? shift(i, conv_.axes[i].kernel - 1) : 0);
      longest /= plane_[i];
    }
    plane_size_ = plane_[0] * plane_[1] * plane_[2] + kTileLanes;
    channel_size_ = planes * plane_size_;
    row_size_ = round_up(((d.extent - 1) * plane_[1] + h.extent) * plane_[2], kTileLanes);
    offsets_.reserve(conv_.columns());
    for (int64_t channel = 0; channel < conv_.channels; ++channel) {
      for (int64_t i = 0; i < d.kernel; ++i) {
        for (int64_t j = 0; j < h.kernel; ++j) {
          for (int64_t k = 0; k < w.kernel; ++k) {
            const int64_t plane = (phase(0, i) * count(1) + phase(1, j)) * w.kernel + k;
            const int64_t shifted = (shift(0, i) * plane_[1] + shift(1, j)) * plane_[2];
            offsets_.push_back(channel * channel_size_ + plane * plane_size_ + shifted);
          }
        }
      }
    }
  }

  const Conv& conv() const { return conv_; }
  int64_t block_size() const { return tiles() * kSlot; }  // of the sums of a block of rows
  int64_t blocks_at_once(int64_t blocks) const { return conv_.boxes() > 1 ? blocks : 1; }
  int64_t scratch_size() const { return planes_size() + conv_.rows * (row_size_ + kTileLanes); }

  // Copies what the task needs of x and g into scratch.
  template <typename T>
  ConvRows copy(const ConvTask& task, const Volume<T>& x, const Volume<T>& g, float* scratch) const {
    const int64_t group = task.first / conv_.group_blocks();
    for (int64_t channel = 0; channel < conv_.channels; ++channel) {
      copy_planes(x, x.channel(task.sample, group * conv_.channels + channel), task.box,
                  scratch + channel * channel_size_);
    }
    const ConvAxis &d = conv_.axes[0], &h = conv_.axes[1];
    const bool in_place = g.strides[4] == 1 && d.extent == 1 && (h.extent == 1 || g.strides[3] == plane_[2]);
    const ConvRows rows =
        rows_in_float32(conv_, g, task, in_place, plane_[1], plane_[2], row_size_, scratch + planes_size());
    // The last vectors of the rows, whose memory may end there.
    const int64_t length = run_length(task.box), complete = length / kTileLanes * kTileLanes;
    float* last = scratch + planes_size() + conv_.rows * row_size_;
    for (int64_t row = 0; row < conv_.task_rows(task); ++row, last += kTileLanes) {
      std::fill(last, last + kTileLanes, 0.0f);
      const float* const from = rows.data + row * rows.steps[0];
      std::copy(from + complete, from + length, last);
    }
    return rows;
  }

  // The sums [blocks, block_size] of blocks first to last, of the task that was copied, (+)= its part.
  void add(const ConvTask& task, const ConvRows& rows, const float* scratch, int64_t first, int64_t last, float* sums,
           bool add) const {
    const int64_t length = run_length(task.box);
    for (int64_t block = first; block < last; ++block, sums += block_size()) {
      const int64_t row = conv_.first_row(block) - conv_.first_row(task.first);
      const float* const lasts = scratch + planes_size() + conv_.rows * row_size_ + row * kTileLanes;
      const detail::Runs left{rows.data + row * rows.steps[0], rows.steps[0], length / kTileLanes,
                              length % kTileLanes > 0 ? lasts : nullptr};
      for (int64_t tile = 0; tile < tiles(); ++tile) {
        with_count<kTileRows>(conv_.block_rows(block), [&](auto rows_of_tile) {
          with_count<kTaps>(tile_columns(tile), [&](auto taps) {
            detail::correlate<rows_of_tile, taps>(left, scratch, offsets_.data() + tile * kTaps, sums + tile * kSlot,
                                                  add);
          });
        });
      }
    }
  }

  // The rows of dW that are the sums of a block.
  void place(int64_t block, const float* sums, float* dw) const {
    for (int64_t tile = 0; tile < tiles(); ++tile, sums += kSlot) {
      const int64_t columns = tile_columns(tile);
      for (int64_t row = 0; row < conv_.block_rows(block); ++row) {
        float* const to = dw + (conv_.first_row(block) + row) * conv_.columns() + tile * kTaps;
        std::copy(sums + row * columns, sums + (row + 1) * columns, to);
      }
    }
  }

 private:
  Conv conv_;
  std::vector<int64_t> phases_[2];     // of the stride that some tap has, across depth and height
  int64_t plane_[3];                   // sizes of a plane
  int64_t plane_size_, channel_size_;  // floats of a plane, with what is read beyond it, and of a channel's planes
  int64_t row_size_;                   // of a copied channel of g
  std::vector<int64_t> offsets_;       // of the columns of dW into a group's planes

  int64_t count(int axis) const { return phases_[axis].size(); }
  int64_t shift(int axis, int64_t tap) const { return tap * conv_.axes[axis].dilation / conv_.axes[axis].stride; }
  int64_t phase(int axis, int64_t tap) const {
    const auto found = std::find(phases_[axis].begin(), phases_[axis].end(),
                                 tap * conv_.axes[axis].dilation % conv_.axes[axis].stride);
    return found - phases_[axis].begin();
  }
  int64_t planes_size() const { return round_up(conv_.channels * channel_size_, kTileLanes); }
  int64_t tiles() const { return (conv_.columns() + kTaps - 1) / kTaps; }
  int64_t tile_columns(int64_t tile) const { return std::min<int64_t>(kTaps, conv_.columns() - tile * kTaps); }

  // From a box's first to its last position.
  int64_t run_length(int64_t box) const {
    const auto [first, count] = conv_.positions_of(box);
    return ((count[0] - 1) * plane_[1] + count[1] - 1) * plane_[2] + count[2];
  }

  // One plane for each phase and tap along a row: x at (first + i)·stride + phase − padding, 0 outside of x.
  template <typename T>
  void copy_planes(const Volume<T>& x, const T* channel, int64_t box, float* to) const {
    std::fill(to, to + channel_size_, 0.0f);
    const auto inside = [&](int i, int64_t phase) {
      const ConvAxis& axis = conv_.axes[i];
      return axis.inside(conv_.first(box, i) * axis.stride + phase - axis.padding, axis.stride, plane_[i]);
    };
    for (const int64_t phase_d : phases_[0]) {
      for (const int64_t phase_h : phases_[1]) {
        const auto d = inside(0, phase_d), h = inside(1, phase_h);
        for (int64_t tap = 0; tap < conv_.axes[2].kernel; ++tap, to += plane_size_) {
          const auto w = inside(2, tap * conv_.axes[2].dilation);
          for (int64_t i = d.begin; i < d.end && w.begin < w.end; ++i) {
            for (int64_t j = h.begin; j < h.end; ++j) {
              copy_run(x.at(channel, d.at(i), h.at(j), w.at(w.begin)), w.step * x.strides[4], w.end - w.begin,
                       to + (i * plane_[1] + j) * plane_[2] + w.begin);
            }
          }
        }
      }
    }
  }
};

}  // namespace fastmix
