// dW = Σ_b s_b dW_b and ‖dW_b‖² in one pass: the tiles of dW are gone through sample by sample; at a sample's end the
// tile of dW_b, still in the cache, is squared and added to the total. No dW_b is ever whole.
//
// The columns of a are packed in chunks that the threads share; a thread packs kBlockOut columns of g for itself.
#pragma once

#include "cpu/jobs.h"
#include "cpu/linear_grad.h"

namespace fastmix {

inline constexpr int64_t kSegment = 512;  // rows multiplied at a time where norms are not had with dW

// How dW and the rows are cut, by the sizes alone, so that sums do not depend on the number of threads.
struct WeightGradCut {
  static constexpr int64_t kChunk = 1 << 19;   // floats of packed a
  static constexpr int64_t kChunkRows = 2048;  // whose columns of g a thread packs
  static constexpr int64_t kTasks = 8;         // at least, if there are as many groups of columns

  int64_t rows;           // of a segment: those of a sample, or, without norms, of any samples
  int64_t segments;       // in all
  int64_t columns;        // of a chunk, in whole groups
  int64_t together;       // segments of a chunk
  int64_t blocks, parts;  // tasks of a chunk: blocks of kBlockOut rows of dW, each in parts of columns

  WeightGradCut(const LinearSizes& sizes, int64_t segment_rows) : rows(segment_rows) {
    segments = (sizes.batch * sizes.positions + rows - 1) / rows;
    const int64_t groups = (sizes.in + kTileColumns - 1) / kTileColumns;
    const int64_t chunk_groups = std::clamp<int64_t>(kChunk / (rows * kTileColumns), 1, groups);
    columns = chunk_groups * kTileColumns;
    together = std::clamp<int64_t>(std::min(kChunk / columns, kChunkRows) / rows, 1, segments);
    blocks = (sizes.out + kBlockOut - 1) / kBlockOut;
    parts = std::min(chunk_groups, (kTasks + blocks - 1) / blocks);
  }
  int64_t tasks() const { return blocks * parts; }
};

// total (+)= weight·tile for whole vectors of columns; the sums of the tile's squares, by lanes.
template <int vectors, bool add>
detail::TileVec add_vectors(const float* tile, int64_t rows, float weight, float* total, int64_t stride) {
  using detail::TileVec;
  TileVec squares[vectors] = {};
  for (int64_t i = 0; i < rows; ++i, tile += kTileColumns, total += stride) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      TileVec value, sum{};
      std::memcpy(&value, tile + j * kTileLanes, sizeof(value));
      if constexpr (add) std::memcpy(&sum, total + j * kTileLanes, sizeof(sum));
      squares[j] += value * value;
      sum += value * weight;
      std::memcpy(total + j * kTileLanes, &sum, sizeof(sum));
    }
  }
  for (int j = 1; j < vectors; ++j) squares[0] += squares[j];
  return squares[0];
}

// total (+)= weight·tile; the sum of the tile's squares.
template <bool add>
float add_tile(const float* tile, int64_t rows, int64_t columns, float weight, float* total, int64_t stride) {
  const auto wide = [&]() -> detail::TileVec {
    switch (columns / kTileLanes) {
      case 0:
        return detail::TileVec{};
      case 1:
        return add_vectors<1, add>(tile, rows, weight, total, stride);
      case 2:
        return add_vectors<2, add>(tile, rows, weight, total, stride);
      case 3:
        return add_vectors<3, add>(tile, rows, weight, total, stride);
      default:
        return add_vectors<kTileVectors, add>(tile, rows, weight, total, stride);
    }
  }();
  Vec squares{};
  float lanes[kTileLanes];
  std::memcpy(lanes, &wide, sizeof(lanes));
  for (int64_t j = 0; j < kTileLanes; j += kLanes) squares += load(lanes + j);
  for (int64_t j = columns / kTileLanes * kTileLanes; j < columns; j += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      float* const to = total + i * stride + j;
      const Vec value = load(tile + i * kTileColumns + j);
      squares += value * value;
      store_lanes(to, (add ? load_lanes(to, count) : Vec{}) + value * weight, count);
    }
  }
  return horizontal_sum(squares);
}

template <typename T>
struct WeightGrad {
  LinearSizes sizes;
  Positions<const T> a, g;
  const float* sample_weight;  // [B] or null
  float* dw;                   // [O, I]
  std::atomic<bool>& no_memory;

  float weight(int64_t sample) const { return sample_weight ? sample_weight[sample] : 1.0f; }

  // The samples' own squared norms too, if norm_sq [B] is given: then segments are samples.
  void run(const WeightGradCut& cut, float* norm_sq) const {
    const Workspace chunk(groups_size(cut.columns, cut.together * cut.rows));
    const auto partial = allocate<double>(norm_sq ? cut.tasks() * sizes.batch : 0);
    if (!chunk.data() || !partial) {
      no_memory = true;
      return;
    }
    if (norm_sq) std::fill(partial.get(), partial.get() + cut.tasks() * sizes.batch, 0.0);
    for (int64_t column = 0; column < sizes.in; column += cut.columns) {
      const int64_t columns = std::min(cut.columns, sizes.in - column);
      for (int64_t first = 0; first < cut.segments; first += cut.together) {
        const int64_t segments = std::min(cut.together, cut.segments - first);
        pack_chunk(cut, first, segments, column, columns, chunk.data());
        const double flops = 2.0 * static_cast<double>(segments * cut.rows * columns * sizes.out);
        for_tasks(cut, flops, [&](int64_t task, float* scratch) {
          double* const sums = norm_sq ? partial.get() + task * sizes.batch + first : nullptr;
          add_segments(cut, task, first, segments, column, columns, chunk.data(), sums, scratch);
        });
      }
    }
    for (int64_t sample = 0; norm_sq && sample < sizes.batch; ++sample) {
      double sum = 0;
      for (int64_t task = 0; task < cut.tasks(); ++task) sum += partial[task * sizes.batch + sample];
      norm_sq[sample] = static_cast<float>(sum);
    }
  }

 private:
  int64_t rows_of(const WeightGradCut& cut, int64_t segment) const {
    return std::min(cut.rows, sizes.batch * sizes.positions - segment * cut.rows);
  }

  void pack_chunk(const WeightGradCut& cut, int64_t first, int64_t segments, int64_t column, int64_t columns,
                  float* chunk) const {
    const int64_t groups = (columns + kTileColumns - 1) / kTileColumns;
    const int64_t grain = kGrainElements / (cut.rows * kTileColumns) + 1;
    torch::stable::parallel_for(0, segments * groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t segment = i / groups, at = i % groups * kTileColumns, rows = rows_of(cut, first + segment);
        pack_positions(a, (first + segment) * cut.rows, rows, column + at,
                       std::min<int64_t>(kTileColumns, columns - at),
                       chunk + segment * cut.rows * cut.columns + at * rows);
      }
    });
  }

  template <typename Task>
  void for_tasks(const WeightGradCut& cut, double flops, const Task& task) const {
    const int64_t grain = static_cast<int64_t>(kGrainFlops * static_cast<double>(cut.tasks()) / flops) + 1;
    torch::stable::parallel_for(0, cut.tasks(), grain, [&](int64_t begin, int64_t end) {
      float* const scratch = thread_scratch<float>(cut.together * groups_size(kBlockOut, cut.rows) + kStripSize);
      if (!scratch) no_memory = true;
      for (int64_t i = begin; i < end && scratch; ++i) task(i, scratch);
    });
  }

  // A task: what the chunk's segments have of a part of dW; sums: the segments' sums of squares, or null.
  void add_segments(const WeightGradCut& cut, int64_t task, int64_t first, int64_t segments, int64_t column,
                    int64_t columns, const float* chunk, double* sums, float* scratch) const {
    const int64_t groups = (columns + kTileColumns - 1) / kTileColumns, part = task % cut.parts;
    const int64_t begin = part * groups / cut.parts * kTileColumns;
    const int64_t end = std::min((part + 1) * groups / cut.parts * kTileColumns, columns);
    const int64_t row = task / cut.parts * kBlockOut, out = std::min(kBlockOut, sizes.out - row);
    const int64_t g_size = groups_size(kBlockOut, cut.rows);
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t start = (first + i) * cut.rows, rows = rows_of(cut, first + i);
      pack_positions(g, start, rows, row, out, scratch + i * g_size);
      if (!sums && sample_weight) weigh(start, rows, out, scratch + i * g_size);
    }
    // A group of columns of this part of dW stays in the cache for all segments.
    for (int64_t at = begin; at < end; at += kTileColumns) {
      for (int64_t i = 0; i < segments; ++i) {
        const float* const packed = chunk + i * cut.rows * cut.columns + at * rows_of(cut, first + i);
        add_segment(cut, first + i, out, std::min<int64_t>(kTileColumns, end - at), scratch + i * g_size, packed,
                    sums ? sums + i : nullptr, scratch + segments * g_size, dw + row * sizes.in + column + at);
      }
    }
  }

  // The part of dW [out, columns] of one segment, added to the total; the sum of its squares added to `sum`.
  void add_segment(const WeightGradCut& cut, int64_t segment, int64_t out, int64_t columns, const float* of_g,
                   const float* of_a, double* sum, float* tile, float* total) const {
    const int64_t rows = rows_of(cut, segment);
    const float factor = sum ? weight(segment) : 1.0f;
    for_strips(rows, out, columns, of_g, of_a,
               [&](int64_t row, int64_t count, int64_t, int64_t, const Left& left, const Right& right) {
                 float* const to = total + row * sizes.in;
                 if (!sum && columns % kTileLanes == 0) {
                   return multiply_tile(count, columns, rows, left, right, to, sizes.in, segment > 0);
                 }
                 multiply_tile(count, columns, rows, left, right, tile, kTileColumns);
                 const float squares = segment > 0 ? add_tile<true>(tile, count, columns, factor, to, sizes.in)
                                                   : add_tile<false>(tile, count, columns, factor, to, sizes.in);
                 if (sum) *sum += squares;
               });
  }

  // The packed rows [first, first + rows) of g times their samples' weights.
  void weigh(int64_t first, int64_t rows, int64_t out, float* groups) const {
    for (int64_t column = 0; column < out; column += kTileColumns, groups += rows * kTileColumns) {
      const int64_t width = std::min<int64_t>(kTileColumns, out - column);
      for (int64_t i = 0; i < rows; ++i) {
        const float factor = weight((first + i) / sizes.positions);
        for (int64_t j = 0; j < width; j += kLanes) {
          float* const to = groups + i * kTileColumns + j;
          store(to, load(to) * factor);
        }
      }
    }
  }
};

}  // namespace fastmix
