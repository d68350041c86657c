// The gradient of a convolution's weight with channels in the lanes. A box of x is copied with its channels beside each
// other, as far as they are not, and zeros around it; the columns of dW that taps along a row share are then one run of
// memory, which moves by one step from position to position, and dW is a sum of outer products of g's channels with it.
// Sums of up to kChain positions are float32 chains.
#pragma once

#include "cpu/conv_grad_norm.h"

namespace fastmix {

namespace detail {

// Positions (i, j) of a box: an element of g at g[i·across[0] + j·across[1]], of x at x[i·along[0] + j·along[1]].
struct Positions {
  int64_t rows, columns;
  int64_t across[2], along[2];
};

// c[row, vector] (+)= Σ over the positions of g's row · x from offsets[vector] on.
template <int rows, int vectors>
void add_outer(const Positions& positions, const float* g, int64_t row_step, const float* x, const int64_t* offsets,
               float* c, int64_t stride, bool add) {
  TileVec sums[rows][vectors] = {};
  const float* from[vectors];
  for (int j = 0; j < vectors; ++j) from[j] = x + offsets[j];
  for (int64_t i = 0; i < positions.rows; ++i) {
    const float* left = g + i * positions.across[0];
    int64_t at = i * positions.along[0];
    for (int64_t k = 0; k < positions.columns; ++k, left += positions.across[1], at += positions.along[1]) {
      TileVec right[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) std::memcpy(&right[j], from[j] + at, sizeof(TileVec));
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) {
        const float value = left[row * row_step];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sums[row][j] += value * right[j];
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* const to = c + row * stride + j * kTileLanes;
      TileVec value = sums[row][j], before;
      if (add) {
        std::memcpy(&before, to, sizeof(before));
        value += before;
      }
      std::memcpy(to, &value, sizeof(value));
    }
  }
}

}  // namespace detail

class ChannelLanes {
 public:
  explicit ChannelLanes(Conv conv) : conv_(std::move(conv)) {
    constexpr int64_t kFloats = 1 << 16;  // of a box of x
    const ConvAxis &d = conv_.axes[0], &h = conv_.axes[1], &w = conv_.axes[2];
    int64_t longest = kFloats / conv_.channels;
    for (int i = 2; i >= 0; --i) {
      ConvAxis& axis = conv_.axes[i];
      const int64_t most = std::max<int64_t>(1, (longest - axis.span()) / axis.stride);
      axis.cut(i == 2 ? std::min(most, kChain) : most);
      box_[i] = (axis.extent - 1) * axis.stride + axis.span() + 1;
      longest /= box_[i];
    }
    const int64_t runs = d.kernel * h.kernel * (merged() ? 1 : w.kernel);
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t k = merged() ? 0 : run % w.kernel, tap = merged() ? run : run / w.kernel;
      const int64_t i = tap / h.kernel * d.dilation, j = tap % h.kernel * h.dilation;
      for (int64_t lane = 0; lane < run_length(); lane += kTileLanes) {
        offsets_.push_back(((i * box_[1] + j) * box_[2] + k * w.dilation) * conv_.channels + lane);
      }
    }
  }

  const Conv& conv() const { return conv_; }
  int64_t block_size() const { return kTileRows * width(); }  // of the sums of a block of rows
  int64_t blocks_at_once(int64_t blocks) const {
    constexpr int64_t kNear = 8192;  // floats of x that blocks after each other read from the nearest cache
    return conv_.boxes() > 1 || x_size() > kNear ? blocks : std::max<int64_t>(1, kNear / 2 / block_size());
  }
  int64_t scratch_size() const { return x_size() + conv_.rows * row_size(); }

  // Copies what the task needs of x and g into scratch.
  template <typename T>
  ConvRows copy(const ConvTask& task, const Volume<T>& x, const Volume<T>& g, float* scratch) const {
    copy_box(x, x.channel(task.sample, task.first / conv_.group_blocks() * conv_.channels), task.box, scratch);
    return rows_in_float32(conv_, g, task, true, conv_.axes[1].extent, conv_.axes[2].extent, row_size(),
                           scratch + x_size());
  }

  // The sums [blocks, block_size] of blocks first to last, of the task that was copied, (+)= its part.
  void add(const ConvTask& task, const ConvRows& rows, const float* scratch, int64_t first, int64_t last, float* sums,
           bool add) const {
    const ConvAxis &d = conv_.axes[0], &h = conv_.axes[1], &w = conv_.axes[2];
    const auto count = conv_.positions_of(task.box).count;
    const int64_t step = std::max<int64_t>(1, kChain / count[2]), along = h.stride * box_[2] * conv_.channels;
    const float* const first_left = rows.data + (conv_.first_row(first) - conv_.first_row(task.first)) * rows.steps[0];
    for (int64_t i = 0; i < count[0]; ++i) {
      for (int64_t j = 0; j < count[1]; j += step) {
        const detail::Positions positions{
            std::min(step, count[1] - j), count[2], {rows.steps[2], rows.steps[3]}, {along, w.stride * conv_.channels}};
        const float* const left = first_left + i * rows.steps[1] + j * rows.steps[2];
        const float* const right = scratch + i * d.stride * box_[1] * box_[2] * conv_.channels + j * along;
        const bool again = add || i > 0 || j > 0;
        for (int64_t tile = 0; tile < tiles(); ++tile) {
          const int64_t vector = first_vector(tile), vectors = first_vector(tile + 1) - vector;
          for (int64_t block = first; block < last; ++block) {
            const float* const of_block = left + (block - first) * kTileRows * rows.steps[0];
            float* const to = sums + (block - first) * block_size() + vector * kTileLanes;
            with_count<kTileRows>(conv_.block_rows(block), [&](auto rows_of_tile) {
              with_count<kTileVectors>(vectors, [&](auto across) {
                detail::add_outer<rows_of_tile, across>(positions, of_block, rows.steps[0], right,
                                                        offsets_.data() + vector, to, width(), again);
              });
            });
          }
        }
      }
    }
    clear(first, last, sums);
  }

  // The rows of dW that are the sums of a block.
  void place(int64_t block, const float* sums, float* dw) const {
    const int64_t columns = conv_.columns(), runs = width() / run_width(), together = merged() ? kernel_width() : 1;
    for (int64_t row = 0; row < conv_.block_rows(block); ++row, sums += width()) {
      float* const to = dw + (conv_.first_row(block) + row) * columns;
      for (int64_t run = 0; run < runs; ++run) {
        const float* from = sums + run * run_width();
        for (int64_t k = 0; k < together; ++k) {
          for (int64_t channel = 0; channel < conv_.channels; ++channel) {
            to[channel * conv_.taps() + run * together + k] = *from++;
          }
        }
      }
    }
  }

  // Lanes in use, of all.
  double efficiency() const { return static_cast<double>(run_length()) / static_cast<double>(run_width()); }

 private:
  Conv conv_;
  int64_t box_[3];                // sizes of a box of x
  std::vector<int64_t> offsets_;  // of the vectors of columns in it

  int64_t kernel_width() const { return conv_.axes[2].kernel; }
  bool merged() const { return conv_.axes[2].dilation == 1; }  // whether the taps of a row are one run
  int64_t run_length() const { return conv_.channels * (merged() ? kernel_width() : 1); }
  int64_t run_width() const { return round_up(run_length(), kTileLanes); }
  int64_t vectors() const { return offsets_.size(); }
  int64_t width() const { return vectors() * kTileLanes; }
  int64_t tiles() const { return (vectors() + kTileVectors - 1) / kTileVectors; }
  int64_t first_vector(int64_t tile) const { return tile * vectors() / tiles(); }
  int64_t x_size() const {  // with what is read beyond it
    return round_up(box_[0] * box_[1] * box_[2] * conv_.channels + kTileLanes, kTileLanes);
  }
  int64_t row_size() const { return conv_.axes[0].extent * conv_.axes[1].extent * conv_.axes[2].extent; }

  // What is no element of dW: the lanes behind the runs hold products with what follows in x, and rows may be missing.
  void clear(int64_t first, int64_t last, float* sums) const {
    for (int64_t block = first; block < last; ++block, sums += block_size()) {
      const int64_t size = conv_.block_rows(block) * width();
      for (int64_t run = 0; run < size && run_length() < run_width(); run += run_width()) {
        std::fill(sums + run + run_length(), sums + run + run_width(), 0.0f);
      }
      std::fill(sums + size, sums + block_size(), 0.0f);
    }
  }

  // to [box, channels] ← x from the box's first position on, 0 outside of x.
  template <typename T>
  void copy_box(const Volume<T>& x, const T* group, int64_t box, float* to) const {
    const auto inside = [&](int i) {
      const ConvAxis& axis = conv_.axes[i];
      return axis.inside(conv_.first(box, i) * axis.stride - axis.padding, 1, box_[i]);
    };
    const auto d = inside(0), h = inside(1), w = inside(2);
    std::fill(to, to + x_size(), 0.0f);
    for (int64_t i = d.begin; i < d.end && w.begin < w.end; ++i) {
      for (int64_t j = h.begin; j < h.end; ++j) {
        copy_positions(x, x.at(group, d.at(i), h.at(j), w.at(w.begin)), w.end - w.begin,
                       to + ((i * box_[1] + j) * box_[2] + w.begin) * conv_.channels);
      }
    }
  }

  // to [count, channels] ← x's positions in a row from `from` on
  template <typename T>
  void copy_positions(const Volume<T>& x, const T* from, int64_t count, float* to) const {
    const int64_t channels = conv_.channels, position_step = x.strides[4], channel_step = x.strides[1];
    int64_t channel = 0;
    if (channel_step == 1) {
      for (int64_t i = 0; i < count; ++i) copy_run(from + i * position_step, 1, channels, to + i * channels);
      return;
    }
    for (; position_step == 1 && channel + kLanes <= channels; channel += kLanes) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, count - i);
        Vec block[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const T* const at = from + (channel + lane) * channel_step + i;
          block[lane] = x.end - at >= kLanes ? load(at) : load_lanes(at, width);  // all lanes where it has them
        }
        transpose(block);
        for (int64_t lane = 0; lane < width; ++lane) store(to + (i + lane) * channels + channel, block[lane]);
      }
    }
    for (; channel < channels; ++channel) {
      const T* const of_channel = from + channel * channel_step;
      for (int64_t i = 0; i < count; ++i) {
        to[i * channels + channel] = static_cast<float>(of_channel[i * position_step]);
      }
    }
  }
};

}  // namespace fastmix
