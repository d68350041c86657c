// Attention of few queries to many keys, as in decoding: bound by reading keys and values once, so float32 ones are
// read where they lie. A job is a sequence's key head; its pieces are ranges of keys, whose softmaxes are then joined.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/jobs.h"

namespace fastmix {

class AttentionDecode {
 public:
  // Below, packing keys for a product costs more than the product.
  static constexpr int64_t kMaxRows = 8;
  static bool serves(const Attention& a) { return a.max_t * a.group() <= kMaxRows && a.dropout_p == 0; }

  AttentionDecode(const Attention& a, const Heads& output, float* lse, float* lse_rest)
      : a_(a), output_(output), lse_(lse), lse_rest_(lse_rest) {}

  void run() const {
    // Reading an element of float32 takes as long as some 40 operations.
    const double flops = static_cast<double>(std::max<int64_t>(2 * rows(), 40)) * a_.max_s * (a_.key.size + dv());
    const int64_t scratch = rows() * (d() + kScoreStride) + kKeyBlock * (d() + dv());
    const Jobs jobs{"scaled_attention", a_.jobs(), splits() * split_size(), scratch, flops};
    run_jobs(jobs,
             Step{splits(), [&](int64_t job, int64_t split, float* memory,
                                float* scratch) { attend(job, split, memory + split * split_size(), scratch); }},
             Step{1, [&](int64_t job, int64_t, float* memory, float*) { join(job, memory); }});
  }

 private:
  static constexpr int64_t kSplit = 4 * kKeyBlock;

  int64_t rows() const { return a_.max_t * a_.group(); }
  int64_t d() const { return a_.query.width(); }
  int64_t dv() const { return a_.value.width(); }
  int64_t splits() const { return std::max<int64_t>((a_.max_s + kSplit - 1) / kSplit, 1); }
  // Sums of weights times values, the largest scores, the sums of weights.
  int64_t split_size() const { return rows() * dv() + 2 * round_up(rows(), 16); }
  float* maxima(float* split) const { return split + rows() * dv(); }
  float* sums(float* split) const { return maxima(split) + round_up(rows(), 16); }

  // Row h·T + i is query i of the group's head h.
  void attend(int64_t job, int64_t split, float* memory, float* scratch) const {
    const Sequence at = a_.sequence_of(job);
    const int64_t count = at.rows * a_.group(), first_head = a_.key_head(job) * a_.group();
    float *const q = scratch, *const scores = q + rows() * d(), *const keys = scores + rows() * kScoreStride;
    float* const values = keys + kKeyBlock * d();
    for (int64_t r = 0; r < count; ++r) a_.read_query(at, first_head + r / at.rows, r % at.rows, q + r * d());
    std::fill_n(memory, rows() * dv(), 0.0f);
    RunningSoftmax softmax;
    const int64_t last = count ? std::min((split + 1) * kSplit, a_.end(at, at.rows - 1)) : 0;
    for (int64_t c0 = split * kSplit; c0 < last; c0 += kKeyBlock) {
      const int64_t columns = std::min(kKeyBlock, last - c0), begin = std::max<int64_t>(a_.first(at, 0) - c0, 0);
      if (begin >= columns) continue;
      const Right k = rows_of(a_.key, at, a_.key_head(job), c0, begin, columns, keys, true);
      const Right v = rows_of(a_.value, at, a_.key_head(job), c0, begin, columns, values, false);
      multiply_keys(count, q, k, begin, columns, scores);
      for (int64_t h = 0; h < a_.group(); ++h) {
        const Tile tile{a_, at, first_head + h, 0, at.rows, c0, columns};
        tile.finish_scores(scores + h * at.rows * kScoreStride);
      }
      const Tile all{a_, at, first_head, 0, count, c0, columns};
      softmax.add(all, scores);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t j = 0; j < dv(); j += kLanes) {
          store(memory + r * dv() + j, load(memory + r * dv() + j) * softmax.rescale[r]);
        }
      }
      const Left weights{scores + begin, kScoreStride, 1};
      const Right from{v.data + begin * v.step, v.step};
      if (sees_all(at, c0 + begin, c0 + columns) || rows_finite(from, columns - begin)) {
        multiply(count, dv(), columns - begin, weights, from, memory, dv(), true);
      } else {
        multiply_skipping_zeros(count, dv(), columns - begin, weights, from, memory, dv());
      }
    }
    std::copy_n(softmax.max, count, maxima(memory));
    std::copy_n(softmax.sum, count, sums(memory));
  }

  void join(int64_t job, float* memory) const {
    const Sequence at = a_.sequence_of(job);
    for (int64_t r = 0; r < at.rows * a_.group(); ++r) {
      float max = -kInfinity, sum = 0;
      for (int64_t split = 0; split < splits(); ++split) {
        max = std::max(max, maxima(memory + split * split_size())[r]);
      }
      float* const row = memory + r * dv();
      for (int64_t split = 0; split < splits(); ++split) {
        float* const of_split = memory + split * split_size();
        // A split without a score has added nothing; its sum is NaN if it met one.
        const float factor = max == -kInfinity ? 1.0f : std::exp(maxima(of_split)[r] - max);
        sum += sums(of_split)[r] * factor;
        for (int64_t j = 0; j < dv(); j += kLanes) {
          const Vec added = load(of_split + r * dv() + j) * factor;
          store(row + j, split == 0 ? added : load(row + j) + added);
        }
      }
      const Vec factor = splat(sum == 0 ? 0.0f : 1 / sum);
      for (int64_t j = 0; j < dv(); j += kLanes) store(row + j, load(row + j) * factor);
      const int64_t h = a_.key_head(job) * a_.group() + r / at.rows, i = at.row0 + r % at.rows;
      output_.write(at.b, h, i, row);
      const double lse = sum == 0 ? -kInfinity : max + std::log(static_cast<double>(sum));
      const int64_t to = (at.b * a_.h + h) * a_.t + i;
      lse_[to] = static_cast<float>(lse);
      lse_rest_[to] = std::isfinite(lse) ? static_cast<float>(lse - lse_[to]) : 0;
    }
  }

  // Rows [begin, end) of the block from c0 as floats: in place, or read into `to`.
  Right rows_of(const Heads& heads, const Sequence& at, int64_t h, int64_t c0, int64_t begin, int64_t end, float* to,
                bool rotated) const {
    if (heads.type == ScalarType::Float && heads.size == heads.width() && !(rotated && a_.half)) {
      return {reinterpret_cast<const float*>(heads.at(at.b, h, at.column0 + c0)), heads.row};
    }
    for (int64_t j = begin; j < end; ++j) {
      float* const row = to + j * heads.width();
      heads.read(at.b, h, at.column0 + c0 + j, row);
      if (rotated) a_.rotate_key(at, c0 + j, row);
    }
    return {to, heads.width()};
  }

  // scores[r][j] ← q[r]·k[j] for j in [begin, end); kTileLanes rows of k at a time, their sums transposed into the
  // lanes.
  void multiply_keys(int64_t count, const float* q, const Right& k, int64_t begin, int64_t end, float* scores) const {
    constexpr auto lanes = std::make_integer_sequence<int, kTileLanes>{};
    int64_t j = begin;
    for (; j + kTileLanes <= end; j += kTileLanes) {
      for (int64_t r = 0; r < count; ++r) {
        TileVec sums[kTileLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kTileLanes; ++lane) sums[lane] = product(q + r * d(), k.data + (j + lane) * k.step);
        store_tile(scores + r * kScoreStride + j, lane_sums<kTileLanes / 2>(sums, lanes));
      }
    }
    for (; j < end; ++j) {
      for (int64_t r = 0; r < count; ++r) {
        TileVec sums[kTileLanes] = {product(q + r * d(), k.data + j * k.step)};
        scores[r * kScoreStride + j] = lane_sums<kTileLanes / 2>(sums, lanes)[0];
      }
    }
  }

  // Whose lanes add up to q·k
  [[gnu::always_inline]] TileVec product(const float* q, const float* k) const {
    TileVec sum = load_tile(q) * load_tile(k);
    for (int64_t i = kTileLanes; i < d(); i += kTileLanes) sum += load_tile(q + i) * load_tile(k + i);
    return sum;
  }

  // Lane i ← the sum of vector i's lanes.
  template <int distance, int... i>
  [[gnu::always_inline]] static TileVec lane_sums(TileVec (&v)[kTileLanes], std::integer_sequence<int, i...> lanes) {
    using Index = decltype(v[0] < v[0]);
    constexpr Index kept{((i & distance) ? kTileLanes + i : i)...};
    constexpr Index added{((i & distance) ? kTileLanes + (i ^ distance) : i ^ distance)...};
#pragma GCC unroll 16
    for (int n = 0; n < distance; ++n) {
      v[n] = __builtin_shuffle(v[n], v[n + distance], kept) + __builtin_shuffle(v[n], v[n + distance], added);
    }
    if constexpr (distance == 1) {
      return v[0];
    } else {
      return lane_sums<distance / 2>(v, lanes);
    }
  }

  bool sees_all(const Sequence& at, int64_t first, int64_t end) const {
    return !a_.mask && a_.first(at, at.rows - 1) <= first && a_.end(at, 0) >= end;
  }
  bool rows_finite(const Right& rows, int64_t count) const {
    for (int64_t j = 0; j < count; ++j) {
      if (!all_finite(rows.data + j * rows.step, dv())) return false;
    }
    return true;
  }

  const Attention& a_;
  const Heads& output_;
  float *const lse_, *const lse_rest_;
};

}  // namespace fastmix
