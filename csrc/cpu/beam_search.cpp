// trie_beam_step on a CPU. score(k, v) = total[k] + (logit[k, v] − lse[k]) + bias[k, v] in float32, for the children v
// of node k, and the EOS tokens where a key ends; the best N by (score, beam, token). A thread owns some beams of a
// sample: per beam one pass over the logits for the log-sum-exp, one over the children against the N-th best score so
// far. Sums in float64 over blocks. Nothing of the size of the vocabulary is written.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/trie_view.h"
#include "cpu/allocate.h"
#include "cpu/best_candidates.h"
#include "cpu/scratch.h"

namespace fastmix {
namespace {

using torch::stable::Tensor;

enum Normalize : int64_t { kNone, kVocabulary, kAllowed };

// Logits, some 120 µs of work, for which waking a sleeping thread pays.
constexpr int64_t kGrainLogits = 262144;
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kManySlots = 8;  // of a table per part of the vocabulary, for which looking for the parts' slots pays

struct Bias {
  const float* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
};

struct Step {
  int64_t batch, beams, width, num_candidates, normalize;
  const float* totals;
  const int64_t* nodes;
  const uint8_t* arena;
  uint64_t arena_bytes;
  bool shared;  // one trie for all samples
  const std::vector<int64_t>& eos;
  Bias bias;
  int64_t logit_strides[2];
};

template <typename Symbol>
const Symbol* table_symbols(const TrieView& trie, const TriePlace& p) {
  return reinterpret_cast<const Symbol*>(trie.table_symbols(p.record)) + p.record.first_child;
}

// Values, from a row of logits or of the bias, of the tokens of a table's slots begin … end − 1.
template <typename T, typename Symbol>
void gather_table(const TrieView& trie, const TriePlace& p, const T* row, int64_t width, int64_t stride, int64_t begin,
                  int64_t end, float* out) {
  const auto* symbols = table_symbols<Symbol>(trie, p);
  const auto value = [&](uint32_t token) {
    return token < width ? static_cast<float>(row[token * stride]) : -kInfinity;
  };
  int64_t j = begin;
  for (; trie.num_used == 0 && stride == 1 && j + kLanes <= end; j += kLanes, out += kLanes) {
    const uint32_t first = symbols[j], last = symbols[j + kLanes - 1];
    if (last - first == kLanes - 1 && last < width) {  // distinct and ascending, so without gaps
      store(out, load(row + first));
    } else {
      for (int lane = 0; lane < kLanes; ++lane) out[lane] = value(symbols[j + lane]);
    }
  }
  for (; j < end; ++j) *out++ = value(trie.token(symbols[j]));
}

// The same of any node's candidates: its slots, and behind them the EOS tokens.
template <typename T>
void gather(const TrieView& trie, const TriePlace& p, const Step& step, const T* row, int64_t stride, int64_t begin,
            int64_t end, float* out) {
  const int64_t slots = std::min<int64_t>(end, p.slots);
  if (p.has_table()) {
    trie.symbol_bytes == 2 ? gather_table<T, uint16_t>(trie, p, row, step.width, stride, begin, slots, out)
                           : gather_table<T, uint32_t>(trie, p, row, step.width, stride, begin, slots, out);
    out += std::max<int64_t>(slots - begin, 0);
  } else {
    for (int64_t j = begin; j < slots; ++j) {
      uint32_t symbol = 0;
      const uint32_t token = trie.slot(p, static_cast<uint32_t>(j), symbol) ? trie.token(symbol) : UINT32_MAX;
      *out++ = token < step.width ? static_cast<float>(row[token * stride]) : -kInfinity;
    }
  }
  for (int64_t e = std::max<int64_t>(begin, p.slots); e < end; ++e) {
    *out++ = static_cast<float>(row[step.eos[e - p.slots] * stride]);
  }
}

uint32_t candidate_token(const TrieView& trie, const TriePlace& p, const Step& step, int64_t i) {
  if (i >= p.slots) return static_cast<uint32_t>(step.eos[i - p.slots]);
  uint32_t symbol = 0;
  trie.slot(p, static_cast<uint32_t>(i), symbol);
  return trie.token(symbol);
}

// The slot of a table from which on tokens are at least `token`; `from` if it is one.
template <typename Symbol>
int64_t first_slot(const TrieView& trie, const TriePlace& p, int64_t from, int64_t token) {
  const auto* symbols = table_symbols<Symbol>(trie, p);
  return std::lower_bound(symbols + from, symbols + p.slots, token,
                          [&](Symbol symbol, int64_t least) { return trie.token(symbol) < least; }) -
         symbols;
}

// One beam that is alive and has candidates.
template <typename T>
struct Beam {
  const TrieView& trie;
  const Step& step;
  const TriePlace& place;
  const T* row;
  const float* bias;  // its row, or null
  int64_t k, candidates;
  float total, log_sum;
  float *values, *biases, *maxima;  // working memory
  BestCandidates& best;

  void add() {
    LogSumExp sum;
    const bool by_vocabulary = step.normalize == kVocabulary;
    if (by_vocabulary) sum.add(row, step.width, maxima);
    if (step.normalize == kAllowed) {
      gather(trie, place, step, row, 1, 0, candidates, values);
      sum.add(values, candidates, nullptr);
    }
    log_sum = step.normalize == kNone ? 0.0f : sum.value();
    const bool bounded = by_vocabulary && !bias;  // by the largest logits
    if (bounded && !reaches(sum.max)) return;
    if (bounded && place.has_table() && place.slots >= kManySlots * parts()) {
      trie.symbol_bytes == 2 ? add_parts<uint16_t>() : add_parts<uint32_t>();
      add_range(place.slots, candidates);
    } else {
      add_range(0, candidates);
    }
  }

  int64_t parts() const { return (step.width + LogSumExp::kPart - 1) / LogSumExp::kPart; }

  // Whether a token of that logit could be among the best.
  bool reaches(float logit) const { return !(total + (logit - log_sum) < best.threshold()); }

  // Slots of those parts of the vocabulary whose largest logit reaches the threshold.
  template <typename Symbol>
  void add_parts() {
    int64_t slot = 0;
    for (int64_t part = 0; part < parts();) {
      if (!reaches(maxima[part])) {
        ++part;
        continue;
      }
      int64_t end = part + 1;
      while (end < parts() && reaches(maxima[end])) ++end;
      const int64_t begin = first_slot<Symbol>(trie, place, slot, part * LogSumExp::kPart);
      slot = first_slot<Symbol>(trie, place, begin, end * LogSumExp::kPart);
      add_range(begin, slot);
      part = end;
    }
  }

  void add_range(int64_t begin, int64_t end) {
    const int64_t count = end - begin, padded = (count + kLanes - 1) / kLanes * kLanes;
    gather(trie, place, step, row, 1, begin, end, values);
    std::fill(values + count, values + padded, -kInfinity);
    if (bias) {
      gather(trie, place, step, bias, step.bias.strides[2], begin, end, biases);
      std::fill(biases + count, biases + padded, 0.0f);
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec scores = (load(values + i) - log_sum) + total;
      if (bias) scores += load(biases + i);
      for (uint32_t lanes = lanes_where(scores >= best.threshold()); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const int64_t slot = begin + i + lane;
        if (scores[lane] < best.threshold()) continue;  // which may have risen since
        const uint32_t token = candidate_token(trie, place, step, slot);
        if (token >= step.width) continue;  // damaged bytes
        best.add({scores[lane], static_cast<uint32_t>(k), token, slot < place.slots ? static_cast<int32_t>(slot) : -1});
      }
    }
  }
};

// Adds the candidates of beam k; false if there is no memory.
template <typename T>
bool add_beam(const TrieView& trie, const Step& step, const T* logits, int64_t b, int64_t k, BestCandidates& best) {
  const float total = step.totals[b * step.beams + k];
  TriePlace place;
  if (!(total > -kInfinity) || !trie.place(step.nodes[b * step.beams + k], place)) return true;
  const int64_t candidates = place.slots + (place.ends ? static_cast<int64_t>(step.eos.size()) : 0);
  if (candidates == 0) return true;
  const int64_t padded = (candidates + kLanes - 1) / kLanes * kLanes;
  float* memory = thread_scratch<float>(2 * padded + step.width / LogSumExp::kPart + 1);
  if (!memory) return false;
  const T* row = logits + b * step.logit_strides[0] + k * step.logit_strides[1];
  const Bias& bias = step.bias;
  const float* bias_row = bias.data ? bias.data + b * bias.strides[0] + k * bias.strides[1] : nullptr;
  Beam<T>{trie, step, place, row, bias_row, k, candidates, total, 0.0f, memory, memory + padded, memory + 2 * padded,
          best}
      .add();
  return true;
}

struct Output {
  float* scores;
  int64_t *beam_index, *token, *node;
};

void write_sample(const TrieView& trie, const Step& step, const Output& out, int64_t b, const Candidate* best,
                  int64_t count) {
  for (int64_t i = 0; i < step.num_candidates; ++i) {
    const int64_t at = b * step.num_candidates + i;
    const bool exists = i < count;
    out.scores[at] = exists ? best[i].score : -kInfinity;
    out.beam_index[at] = exists ? best[i].beam : 0;
    out.token[at] = exists ? int64_t{best[i].token} : -1;
    out.node[at] = kNoNode;
    TriePlace p;
    if (exists && best[i].slot >= 0 && trie.place(step.nodes[b * step.beams + best[i].beam], p)) {
      out.node[at] = trie.slot_node(p, static_cast<uint32_t>(best[i].slot));
    }
  }
}

template <typename T>
void beam_step(const Step& step, const T* logits, const Output& out) {
  const int64_t n = step.num_candidates, row_work = step.width;
  const int64_t threads = torch::stable::get_num_threads();
  // With several threads, a sample's beams are parted if one would have to wait.
  int64_t parts = threads == 1 ? 1 : (kPartsPerThread * threads + step.batch - 1) / step.batch;
  parts = std::max<int64_t>(1, std::min({parts, step.beams, step.beams * row_work / kGrainLogits + 1}));
  const int64_t beams_per_part = (step.beams + parts - 1) / parts, room = BestCandidates::room(n);
  const int64_t part_work = std::max<int64_t>(1, beams_per_part * row_work);
  const int64_t grain = (kGrainLogits + part_work - 1) / part_work;
  const auto memory = allocate<Candidate>(step.batch * parts * room);
  const auto counts = allocate<int64_t>(step.batch * parts);
  FASTMIX_CHECK(memory && counts, "trie_beam_step: no memory for ", step.batch * parts * room, " candidates");
  std::atomic<bool> no_memory{false}, damaged{false};
  torch::stable::parallel_for(0, step.batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / parts, first = unit % parts * beams_per_part;
      TrieView trie;
      BestCandidates best(memory.get() + unit * room, n);
      if (trie.open(step.arena, step.arena_bytes, step.shared ? 0 : b)) {
        for (int64_t k = first; k < std::min(first + beams_per_part, step.beams); ++k) {
          if (!add_beam(trie, step, logits, b, k, best)) no_memory = true;
        }
      } else {
        damaged = true;
      }
      counts[unit] = best.finish();
    }
  });
  FASTMIX_CHECK(!damaged, "trie: its bytes are damaged");
  FASTMIX_CHECK(!no_memory, "trie_beam_step: no memory for the children of a node");
  for (int64_t b = 0; b < step.batch; ++b) {
    Candidate* best = memory.get() + b * parts * room;
    int64_t count = counts[b * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Candidate* more = best + part * room;
      // At most N + N fit into the room of the first part.
      std::copy(more, more + counts[b * parts + part], best + count);
      const int64_t together = count + counts[b * parts + part];
      std::inplace_merge(best, best + count, best + together,
                         [](const Candidate& a, const Candidate& c) { return a.before(c); });
      count = std::min(together, n);
    }
    TrieView trie;
    if (trie.open(step.arena, step.arena_bytes, step.shared ? 0 : b)) write_sample(trie, step, out, b, best, count);
  }
}

void check_rows(const char* name, const Tensor& tensor, const Tensor& logits) {
  FASTMIX_CHECK(tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == logits.size(1), name,
                " must be [B, K] = [", logits.size(0), ", ", logits.size(1), "]");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trie_beam_step_cpu(const Tensor& logits, const Tensor& beam_scores,
                                                              const Tensor& nodes, const Tensor& arena,
                                                              int64_t num_candidates, std::vector<int64_t> eos,
                                                              int64_t normalize, const std::optional<Tensor>& bias) {
  using torch::headeronly::ScalarType;
  FASTMIX_CHECK(logits.dim() == 3, "logits must be [B, K, V]");
  FASTMIX_CHECK(num_candidates >= 1, "num_candidates must be positive, got ", num_candidates);
  check_rows("beam_scores", beam_scores, logits);
  check_rows("nodes", nodes, logits);
  FASTMIX_CHECK(nodes.scalar_type() == ScalarType::Long, "nodes must be int64");
  const int64_t batch = logits.size(0), beams = logits.size(1), width = logits.size(2);
  FASTMIX_CHECK(beams < INT32_MAX && width < INT32_MAX, "logits are too large: K = ", beams, ", V = ", width);
  for (const int64_t token : eos) {
    FASTMIX_CHECK(token >= 0 && token < width, "eos_token_id must be in 0..V-1 = 0..", width - 1, ", got ", token);
  }
  FASTMIX_CHECK(arena.scalar_type() == ScalarType::Byte && arena.dim() == 1 && arena.is_contiguous() &&
                    reinterpret_cast<uintptr_t>(arena.data_ptr()) % 8 == 0,
                "trie: its bytes must be uint8, contiguous, aligned to 8");
  FASTMIX_CHECK(arena.numel() >= static_cast<int64_t>(kTrieHeaderBytes), "trie: its bytes are damaged");
  const auto* bytes = static_cast<const uint8_t*>(arena.data_ptr());
  const int64_t tries = reinterpret_cast<const uint32_t*>(bytes)[9];
  FASTMIX_CHECK(tries == 1 || tries == batch, "trie must hold one trie or B = ", batch, ", got ", tries);
  FASTMIX_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 3 && bias->size(0) == batch &&
                          bias->size(1) == beams && bias->size(2) == width),
                "bias must be float32 [B, K, V]");

  const Tensor rows = logits.stride(2) == 1 || width <= 1 ? logits : torch::stable::contiguous(logits);
  // Each call into PyTorch costs a microsecond.
  const bool as_it_is = beam_scores.scalar_type() == ScalarType::Float && beam_scores.is_contiguous();
  const Tensor totals =
      as_it_is ? beam_scores : torch::stable::contiguous(torch::stable::to(beam_scores, ScalarType::Float));
  const Tensor places = nodes.is_contiguous() ? nodes : torch::stable::contiguous(nodes);
  Tensor scores = empty_strided<2>({batch, num_candidates}, {num_candidates, 1}, aoti_torch_dtype_float32());
  Tensor beam_index = empty_strided<2>({batch, num_candidates}, {num_candidates, 1}, aoti_torch_dtype_int64());
  Tensor token = empty_strided<2>({batch, num_candidates}, {num_candidates, 1}, aoti_torch_dtype_int64());
  Tensor node = empty_strided<2>({batch, num_candidates}, {num_candidates, 1}, aoti_torch_dtype_int64());
  Step step{batch,
            beams,
            width,
            num_candidates,
            normalize,
            static_cast<const float*>(totals.data_ptr()),
            static_cast<const int64_t*>(places.data_ptr()),
            bytes,
            static_cast<uint64_t>(arena.numel()),
            tries == 1,
            eos,
            {},
            {rows.stride(0), rows.stride(1)}};
  if (bias) {
    step.bias = {static_cast<const float*>(bias->data_ptr()), {bias->stride(0), bias->stride(1), bias->stride(2)}};
  }
  if (batch == 0) return {scores, beam_index, token, node};
  const Output out{static_cast<float*>(scores.data_ptr()), static_cast<int64_t*>(beam_index.data_ptr()),
                   static_cast<int64_t*>(token.data_ptr()), static_cast<int64_t*>(node.data_ptr())};
  for_dtype("logits", rows, [&](auto zero) {
    using T = decltype(zero);
    beam_step(step, static_cast<const T*>(rows.data_ptr()), out);
  });
  return {scores, beam_index, token, node};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) { m.impl("trie_beam_step", TORCH_BOX(&fastmix::trie_beam_step_cpu)); }
