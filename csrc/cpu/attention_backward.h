// Attention backward. A job is a sequence's key head and the query heads that share it. Weights are made again from the
// log-sum-exp; a piece owns some blocks of keys, whose dk and dv it sums over all queries, and a part of dq.
//   P = exp(scores − lse), dP = do·vᵀ, dS = P∘(dP − Σ do∘o + dlse), dv = Pᵀ·do, dk = dSᵀ·q, dq = dS·k
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/jobs.h"

namespace fastmix {

struct AttentionGradients {
  Heads output, grad_output, dq, dk, dv;
  const float *lse, *lse_rest, *grad_lse;  // [B, H, T]; grad_lse may be null
  Mask mask;                               // float32 of the mask's shape, zeroed, or none
  double* table;                           // AttentionBackward::table_size(), zeroed, or null
  float* query_scale;                      // [B, H, T], zeroed, or null
};

class AttentionBackward {
 public:
  AttentionBackward(const Attention& a, const AttentionGradients& g) : a_(a), g_(g) {
    blocks_ = (a.max_s + kKeyBlock - 1) / kKeyBlock;
    row_blocks_ = (a.max_t + kRowBlock - 1) / kRowBlock;
    // Threads share a job where there are few. The parts of dq depend on the shape alone, and so does the sum.
    const int64_t jobs = a.jobs();
    parts_ = std::clamp<int64_t>(shares_mask() ? 8 : (7 + jobs) / std::max<int64_t>(jobs, 1), 1,
                                 std::max<int64_t>(blocks_, 1));
    if (g.mask && g.mask.column == 0) parts_ = 1;  // all blocks of keys add to the same elements
  }

  // For each head and part the sums of every sequence's diagonals: packed sequences are no longer than all rows and
  // columns together.
  int64_t table_size() const { return a_.h * parts_ * diagonals_of_head(); }

  // to [H, T + S - 1] ← the sums over parts and sequences.
  void sum_table(float* to) const {
    std::vector<double> sums(a_.table_size());
    for (int64_t h = 0; h < a_.h; ++h) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t n = 0; n < a_.sequences; ++n) {
        const Sequence at = a_.sequence(n);
        const int64_t first = a_.table_zero() - at.offset - (at.rows - 1);  // of the distance of the first diagonal
        for (int64_t part = 0; part < parts_; ++part) {
          const double* from = diagonals(at, h, part);
          for (int64_t k = 0; k < at.rows + at.columns - 1; ++k) sums[first + k] += from[k];
        }
      }
      std::copy(sums.begin(), sums.end(), to + h * a_.table_size());
    }
  }

  void run() const {
    const double flops = 2.0 * a_.max_t * a_.max_s * a_.group() * (3 * a_.query.size + 2 * a_.value.size);
    const Jobs jobs{
        "scaled_attention", a_.jobs(), round_up(floats(), 16), scratch_size(), a_.causal ? flops / 2 : flops,
        shares_mask()};
    const int64_t heads = a_.group() * row_blocks_;
    run_jobs(jobs,
             Step{blocks_ + heads,
                  [&](int64_t job, int64_t piece, float* memory, float* scratch) {
                    if (piece < blocks_) return pack_keys(job, piece, memory, scratch);
                    pack_queries(job, (piece - blocks_) / row_blocks_, (piece - blocks_) % row_blocks_, memory,
                                 scratch);
                  }},
             Step{parts_,
                  [&](int64_t job, int64_t part, float* memory, float* scratch) {
                    std::fill_n(dq(memory, part, 0), a_.group() * a_.max_t * d(), 0.0f);
                    for (int64_t block = part; block < blocks_; block += parts_)
                      keys(job, part, block, memory, scratch);
                  }},
             Step{heads, [&](int64_t job, int64_t piece, float* memory, float* scratch) {
                    queries(job, piece / row_blocks_, piece % row_blocks_, memory, scratch);
                  }});
  }

 private:
  // A mask of fewer samples or heads than the scores: its gradient sums over jobs.
  bool shares_mask() const {
    return g_.mask && ((g_.mask.batch == 0 && a_.sequences > 1) || (g_.mask.head == 0 && a_.hkv > 1));
  }
  int64_t d() const { return a_.query.width(); }
  int64_t dv() const { return a_.value.width(); }

  // A job's memory: for each block keys by columns and by rows, values by columns; for each query head q, do, and of
  // each row lse, what float32 rounds off it, and Σ do∘o − dlse; dq of each part.
  int64_t block_size() const { return kKeyBlock * (2 * d() + dv()); }
  int64_t row_size() const { return d() + dv() + 3; }
  int64_t floats() const { return blocks_ * (block_size() + 16) + a_.group() * a_.max_t * (row_size() + parts_ * d()); }
  float* key_columns(float* memory, int64_t block) const { return memory + block * block_size(); }
  float* key_rows(float* memory, int64_t block) const { return key_columns(memory, block) + kKeyBlock * d(); }
  float* value_columns(float* memory, int64_t block) const { return key_rows(memory, block) + kKeyBlock * d(); }
  float& finite(float* memory, int64_t block) const { return memory[blocks_ * block_size() + block * 16]; }
  float* head(float* memory, int64_t g) const {
    return memory + blocks_ * (block_size() + 16) + g * a_.max_t * row_size();
  }
  float* q(float* memory, int64_t g) const { return head(memory, g); }
  float* grad(float* memory, int64_t g) const { return head(memory, g) + a_.max_t * d(); }
  float* lse(float* memory, int64_t g) const { return head(memory, g) + a_.max_t * (d() + dv()); }
  float* lse_rest(float* memory, int64_t g) const { return lse(memory, g) + a_.max_t; }
  float* delta(float* memory, int64_t g) const { return lse_rest(memory, g) + a_.max_t; }
  float* dq(float* memory, int64_t part, int64_t g) const {
    return head(memory, a_.group()) + (part * a_.group() + g) * a_.max_t * d();
  }

  // A thread's own: two tiles, dk and dv of a block of keys, and the sums of a tile's diagonals.
  static constexpr int64_t kDiagonals = kRowBlock + kKeyBlock;
  int64_t scratch_size() const { return 2 * kRowBlock * kScoreStride + kKeyBlock * (d() + dv()) + kDiagonals; }

  void pack_keys(int64_t job, int64_t block, float* memory, float* scratch) const {
    const Sequence at = a_.sequence_of(job);
    const Blocks seen = blocks_of(a_, at, 0, at.rows);
    if (block < seen.first || block >= seen.last) return;
    const int64_t h = a_.key_head(job), c0 = block * kKeyBlock;
    a_.read_keys(at, h, c0, key_rows(memory, block));
    pack_columns(key_rows(memory, block), d(), a_.key.size, kKeyBlock, key_columns(memory, block));
    finite(memory, block) = all_finite(key_rows(memory, block), kKeyBlock * d());
    a_.read_values(at, h, c0, scratch);
    pack_columns(scratch, dv(), a_.value.size, kKeyBlock, value_columns(memory, block));
  }

  void pack_queries(int64_t job, int64_t g, int64_t row_block, float* memory, float* scratch) const {
    const Sequence at = a_.sequence_of(job);
    const int64_t h = a_.key_head(job) * a_.group() + g;
    const int64_t last = std::min(at.rows, (row_block + 1) * kRowBlock);
    for (int64_t r0 = row_block * kRowBlock; r0 < last; r0 += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, last - r0);
      float *const to_q = q(memory, g) + r0 * d(), *const to_grad = grad(memory, g) + r0 * dv();
      const int64_t first = (at.b * a_.h + h) * a_.t + at.row0 + r0;
      for (int64_t i = 0; i < rows; ++i) {
        a_.read_query(at, h, r0 + i, to_q + i * d());
        g_.grad_output.read(at.b, h, at.row0 + r0 + i, to_grad + i * dv());
        g_.output.read(at.b, h, at.row0 + r0 + i, scratch + i * dv());
      }
      const Vec sums = dot_rows(rows, a_.value.size, to_grad, scratch, dv());
      for (int64_t i = 0; i < rows; ++i) {
        lse(memory, g)[r0 + i] = g_.lse[first + i];
        lse_rest(memory, g)[r0 + i] = g_.lse_rest[first + i];
        delta(memory, g)[r0 + i] = sums[i] - (g_.grad_lse ? g_.grad_lse[first + i] : 0.0f);
        if (g_.lse[first + i] != -kInfinity) continue;
        // A row that attends to nothing has no gradient, whatever it holds.
        lse(memory, g)[r0 + i] = kInfinity;
        lse_rest(memory, g)[r0 + i] = 0;
        delta(memory, g)[r0 + i] = 0;
        std::fill_n(to_q + i * d(), d(), 0.0f);
        std::fill_n(to_grad + i * dv(), dv(), 0.0f);
      }
    }
  }

  // a[i]·b[i] of up to kLanes rows. Added in the order of a product's tile: where a row attends to one key alone, dP −
  // Σ is then exactly 0.
  static Vec dot_rows(int64_t rows, int64_t size, const float* a, const float* b, int64_t stride) {
    const int64_t chains = (size + kChain - 1) / kChain, chain = (size + chains - 1) / chains;
    Vec total{}, sum{}, left[kLanes] = {}, right[kLanes] = {};
    for (int64_t j = 0; j < size; j += kLanes) {
      for (int64_t i = 0; i < rows; ++i) {
        left[i] = load(a + i * stride + j);
        right[i] = load(b + i * stride + j);
      }
      transpose(left);
      transpose(right);
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, size - j); ++k) {
        if (j + k > 0 && (j + k) % chain == 0) {
          total += sum;
          sum = Vec{};
        }
        sum += left[k] * right[k];
      }
    }
    return total + sum;
  }

  // dk and dv of a block of keys, and what it adds to dq and to the gradients of the biases.
  void keys(int64_t job, int64_t part, int64_t block, float* memory, float* scratch) const {
    const Sequence at = a_.sequence_of(job);
    float* const weights = scratch;
    float* const ds = weights + kRowBlock * kScoreStride;
    float* const dk = ds + kRowBlock * kScoreStride;
    float* const dvalue = dk + kKeyBlock * d();
    std::fill_n(dk, kKeyBlock * (d() + dv()), 0.0f);
    const int64_t c0 = block * kKeyBlock, count = std::min(kKeyBlock, at.columns - c0);
    for (int64_t g = 0; g < a_.group() && count > 0; ++g) {
      for (int64_t r0 = 0; r0 < at.rows; r0 += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, at.rows - r0),
                      columns = std::min(count, a_.end(at, r0 + rows - 1) - c0);
        if (columns <= 0 || a_.first(at, r0) >= c0 + columns) continue;
        const Tile tile{a_, at, a_.key_head(job) * a_.group() + g, r0, rows, c0, columns};
        const float *const queries = q(memory, g) + r0 * d(), *const grads = grad(memory, g) + r0 * dv();
        for (int64_t c = 0; c < columns; c += kTileColumns) {
          const int64_t n = std::min<int64_t>(kTileColumns, columns - c);
          multiply_tile(rows, n, a_.key.size, {queries, d(), 1}, {key_columns(memory, block) + c * a_.key.size},
                        weights + c, kScoreStride);
          multiply_tile(rows, n, a_.value.size, {grads, dv(), 1}, {value_columns(memory, block) + c * a_.value.size},
                        ds + c, kScoreStride);
        }
        tile.finish_scores(weights);
        gradient_of_scores(tile, g, memory, weights, ds);
        multiply(columns, dv(), rows, {weights, 1, kScoreStride}, {grads, dv()}, dvalue, dv(), true);
        multiply(columns, d(), rows, {ds, 1, kScoreStride}, {queries, d()}, dk, d(), true);
        float* const to = dq(memory, part, g) + r0 * d();
        const Right k{key_rows(memory, block), d()};
        if (finite(memory, block)) {
          multiply(rows, d(), columns, {ds, kScoreStride, 1}, k, to, d(), true);
        } else {
          multiply_skipping_zeros(rows, d(), columns, {ds, kScoreStride, 1}, k, to, d());
        }
        if (g_.table) add_to_table(tile, part, ds, dvalue + kKeyBlock * dv());
        if (g_.mask) add_to_mask(tile, ds);
      }
    }
    for (int64_t j = 0; j < kKeyBlock && c0 + j < length(at); ++j) {
      float* const row = dk + j * d();
      a_.rotate_key(at, c0 + j, row, -1);
      g_.dk.write(at.b, a_.key_head(job), at.column0 + c0 + j, row);
      g_.dv.write(at.b, a_.key_head(job), at.column0 + c0 + j, dvalue + j * dv());
    }
  }

  // Keys of a sequence, padding behind them included: their gradients are written, too.
  int64_t length(const Sequence& at) const { return a_.cu_k ? at.columns : a_.s; }

  // weights: scores → weights as they were multiplied with v. ds: dP → dS.
  void gradient_of_scores(const Tile& tile, int64_t g, float* memory, float* weights, float* ds) const {
    alignas(64) float kept[kKeyBlock];
    for (int64_t i = 0; i < tile.rows; ++i) {
      float *const p = weights + i * kScoreStride, *const dp = ds + i * kScoreStride;
      if (a_.dropout_p > 0) tile.dropout(i, kept);
      const int64_t row = tile.r0 + i;
      const TileVec base = TileVec{} + lse(memory, g)[row], rest = TileVec{} + lse_rest(memory, g)[row];
      const TileVec sum = TileVec{} + delta(memory, g)[row];
      for (int64_t j = 0; j < tile.width(); j += kTileLanes) {
        const TileVec weight = exp2_nonpositive((load_tile(p + j) - base - rest) * kLog2e);
        TileVec gradient = load_tile(dp + j);
        if (a_.dropout_p > 0) gradient *= load_tile(kept + j);
        store_tile(p + j, a_.dropout_p > 0 ? weight * load_tile(kept + j) : weight);
        // What is masked may hold NaN.
        store_tile(dp + j, weight == 0 ? TileVec{} : weight * (gradient - sum));
      }
    }
  }

  // dq of a block of rows: the parts' sum, through scale and rotary embedding.
  void queries(int64_t job, int64_t g, int64_t row_block, float* memory, float* scratch) const {
    const Sequence at = a_.sequence_of(job);
    const int64_t h = a_.key_head(job) * a_.group() + g;
    for (int64_t i = row_block * kRowBlock; i < std::min(at.rows, (row_block + 1) * kRowBlock); ++i) {
      float* const sum = dq(memory, 0, g) + i * d();
      for (int64_t part = 1; part < parts_; ++part) {
        const float* from = dq(memory, part, g) + i * d();
        for (int64_t j = 0; j < d(); j += kLanes) store(sum + j, load(sum + j) + load(from + j));
      }
      if (g_.query_scale) {
        a_.query.read(at.b, h, at.row0 + i, scratch);
        a_.rotate_query(at, i, scratch);
        Vec product{};
        for (int64_t j = 0; j < d(); j += kLanes) product += load(sum + j) * load(scratch + j);
        g_.query_scale[(at.b * a_.h + h) * a_.t + at.row0 + i] = horizontal_sum(product) * a_.scale;
      }
      const Vec factor = splat(a_.scale_of(at, i));
      for (int64_t j = 0; j < d(); j += kLanes) store(sum + j, load(sum + j) * factor);
      a_.rotate_query(at, i, sum, -1);
      g_.dq.write(at.b, h, at.row0 + i, sum);
    }
  }

  int64_t diagonals_of_head() const { return (a_.cu_q ? 1 : a_.sequences) * (a_.t + a_.s); }
  double* diagonals(const Sequence& at, int64_t h, int64_t part) const {
    const int64_t before = a_.cu_q ? at.row0 + at.column0 : at.number * (a_.t + a_.s);
    return g_.table + (h * parts_ + part) * diagonals_of_head() + before;
  }

  // Sums within the tile come first: a chain of float32 additions stays short.
  void add_to_table(const Tile& tile, int64_t part, const float* ds, float* sums) const {
    std::fill_n(sums, kDiagonals, 0.0f);
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* const to = sums + kRowBlock - 1 - i;
      for (int64_t j = 0; j < tile.columns; ++j) to[j] += ds[i * kScoreStride + j];
    }
    const int64_t first = tile.c0 - tile.r0 - kRowBlock + tile.at.rows, count = tile.at.rows + tile.at.columns - 1;
    double* const to = diagonals(tile.at, tile.h, part);
    for (int64_t k = std::max<int64_t>(0, -first); k < std::min(kDiagonals, count - first); ++k)
      to[first + k] += sums[k];
  }

  void add_to_mask(const Tile& tile, const float* ds) const {
    const Mask& mask = g_.mask;
    float* const to = reinterpret_cast<float*>(mask.data) +
                      mask.offset(tile.at.b, tile.h, tile.at.row0 + tile.r0, tile.at.column0 + tile.c0);
    if (mask.row != 0) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const float* row = ds + i * kScoreStride;
        if (mask.column != 0) {
          for (int64_t j = 0; j < tile.columns; ++j) to[i * mask.row + j * mask.column] += row[j];
        } else {
          float sum = 0;
          for (int64_t j = 0; j < tile.columns; ++j) sum += row[j];
          to[i * mask.row] += sum;
        }
      }
      return;
    }
    float total = 0;
    for (int64_t j = 0; j < tile.columns; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < tile.rows; ++i) sum += ds[i * kScoreStride + j];
      if (mask.column != 0) to[j * mask.column] += sum;
      total += sum;
    }
    if (mask.column == 0) *to += total;
  }

  const Attention& a_;
  const AttentionGradients& g_;
  int64_t blocks_, row_blocks_, parts_;
};

}  // namespace fastmix
