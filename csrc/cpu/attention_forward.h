// Attention forward. A job is a sequence's key head and the query heads that share it: keys are packed once, by
// columns for query·keyᵀ, values by rows; then blocks of queries pass over the blocks of keys that they see.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/jobs.h"

namespace fastmix {

class AttentionForward {
 public:
  AttentionForward(const Attention& a, const Heads& output, float* lse, float* lse_rest)
      : a_(a), output_(output), lse_(lse), lse_rest_(lse_rest) {}

  int64_t key_blocks() const { return (a_.max_s + kKeyBlock - 1) / kKeyBlock; }
  int64_t row_blocks() const { return (a_.max_t + kRowBlock - 1) / kRowBlock; }
  int64_t floats() const { return key_blocks() * (block_size() + 1); }

  void run() const {
    const double flops = 2.0 * a_.max_t * a_.max_s * a_.group() * (a_.query.size + a_.value.size);
    const int64_t d = a_.query.width(), dv = a_.value.width();
    const int64_t scratch = std::max(kKeyBlock * d, kRowBlock * (d + kScoreStride + dv));
    const Jobs jobs{"scaled_attention", a_.jobs(), round_up(floats(), 16), scratch, a_.causal ? flops / 2 : flops};
    // A piece has a block of rows from either end, so that pieces of causal attention are alike.
    const int64_t pairs = (row_blocks() + 1) / 2;
    run_jobs(jobs,
             Step{key_blocks(), [&](int64_t job, int64_t piece, float* memory,
                                    float* scratch) { pack(job, piece, memory, scratch); }},
             Step{a_.group() * pairs, [&](int64_t job, int64_t piece, float* memory, float* scratch) {
                    const Sequence at = a_.sequence_of(job);
                    const int64_t h = a_.key_head(job) * a_.group() + piece / pairs, block = piece % pairs;
                    const int64_t mirrored = row_blocks() - 1 - block;
                    attend(at, h, block, memory, scratch);
                    if (mirrored != block) attend(at, h, mirrored, memory, scratch);
                  }});
  }

 private:
  // Of a block: keys by columns, then values by rows. Behind all blocks, for each whether its values are finite.
  int64_t keys_size() const { return kKeyBlock * a_.key.size; }
  int64_t block_size() const { return round_up(keys_size(), 16) + kKeyBlock * a_.value.width(); }
  float* keys(float* memory, int64_t block) const { return memory + block * block_size(); }
  float* values(float* memory, int64_t block) const { return keys(memory, block) + round_up(keys_size(), 16); }
  float& finite(float* memory, int64_t block) const { return memory[key_blocks() * block_size() + block]; }

  void pack(int64_t job, int64_t block, float* memory, float* rows) const {
    const Sequence at = a_.sequence_of(job);
    const Blocks seen = blocks_of(a_, at, 0, at.rows);
    if (block < seen.first || block >= seen.last) return;
    a_.read_keys(at, a_.key_head(job), block * kKeyBlock, rows);
    pack_columns(rows, a_.key.width(), a_.key.size, kKeyBlock, keys(memory, block));
    float* const v = values(memory, block);
    a_.read_values(at, a_.key_head(job), block * kKeyBlock, v);
    finite(memory, block) = all_finite(v, kKeyBlock * a_.value.width());
  }

  void attend(const Sequence& at, int64_t h, int64_t row_block, float* memory, float* q) const {
    const int64_t r0 = row_block * kRowBlock, rows = std::min(kRowBlock, at.rows - r0);
    if (rows <= 0) return;
    const int64_t d = a_.query.width(), dv = a_.value.width();
    float* const scores = q + kRowBlock * d;
    float* const output = scores + kRowBlock * kScoreStride;
    RunningSoftmax softmax;
    for (int64_t i = 0; i < rows; ++i) a_.read_query(at, h, r0 + i, q + i * d);
    std::fill_n(output, rows * dv, 0.0f);

    const Blocks seen = blocks_of(a_, at, r0, r0 + rows);
    for (int64_t block = seen.first; block < seen.last; ++block) {
      const int64_t c0 = block * kKeyBlock, columns = std::min(kKeyBlock, a_.end(at, r0 + rows - 1) - c0);
      const Tile tile{a_, at, h, r0, rows, c0, columns};
      for (int64_t c = 0; c < columns; c += kTileColumns) {
        const Right right{keys(memory, block) + c * a_.key.size};
        multiply_tile(rows, std::min<int64_t>(kTileColumns, columns - c), a_.key.size, {q, d, 1}, right, scores + c,
                      kScoreStride);
      }
      tile.finish_scores(scores);
      softmax.add(tile, scores);
      for (int64_t i = 0; i < rows; ++i) {
        if (softmax.rescale[i] == 1) continue;
        for (int64_t j = 0; j < dv; j += kLanes) {
          store(output + i * dv + j, load(output + i * dv + j) * softmax.rescale[i]);
        }
      }
      if (a_.dropout_p > 0) drop(tile, scores);
      const Left weights{scores, kScoreStride, 1};
      const Right v{values(memory, block), dv};
      if (finite(memory, block)) {
        multiply(rows, dv, columns, weights, v, output, dv, true);
      } else {
        multiply_skipping_zeros(rows, dv, columns, weights, v, output, dv);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Vec factor = splat(softmax.sum[i] == 0 ? 0.0f : 1 / softmax.sum[i]);
      float* const row = output + i * dv;
      for (int64_t j = 0; j < dv; j += kLanes) store(row + j, load(row + j) * factor);
      output_.write(at.b, h, at.row0 + r0 + i, row);
      write_lse((at.b * a_.h + h) * a_.t + at.row0 + r0 + i, softmax.lse(i));
    }
  }

  void write_lse(int64_t row, double lse) const {
    lse_[row] = static_cast<float>(lse);
    lse_rest_[row] = std::isfinite(lse) ? static_cast<float>(lse - lse_[row]) : 0;
  }

  static void drop(const Tile& tile, float* scores) {
    alignas(64) float factors[kKeyBlock];
    for (int64_t i = 0; i < tile.rows; ++i) {
      tile.dropout(i, factors);
      float* const row = scores + i * kScoreStride;
      for (int64_t j = 0; j < tile.width(); j += kLanes) store(row + j, load(row + j) * load(factors + j));
    }
  }

  const Attention& a_;
  const Heads& output_;
  float *const lse_, *const lse_rest_;
};

}  // namespace fastmix
