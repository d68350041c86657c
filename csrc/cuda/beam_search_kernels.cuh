// trie_beam_step: score(k, v) = total[k] + (logit[k, v] − lse[k]) + bias[k, v] in float32 for the children v of node k,
// and for the EOS tokens where a key ends; the best N of a sample by (score, beam, token, end of key before child).
// 1. A block owns a split of a row: a part of its logits for the log-sum-exp, a part of its children, of which it lists
// the best N + 1 by logit, which is nearly the order by score. 2. A block owns a sample: it selects from the lists.
// What a list left out is looked at again where rounding could have changed the order. Sums in float32, relative to
// maxima.
#pragma once

#include "common/trie_view.h"
#include "cuda/beam_search_select.cuh"
#include "cuda/beam_search_sum.cuh"

namespace fastmix {

enum Normalize : int64_t { kNone, kVocabulary, kAllowed };

constexpr int kSplitThreads = 256, kMergeThreads = 512;
// Looked at between two calls of BestKeys::settle.
constexpr int kSlotsPerThread = 4, kListedPerThread = 8;
constexpr int kMaxEos = 16;
constexpr uint32_t kEndOfKey = 0x7FFFFFFF;  // in place of a slot
constexpr uint32_t kListed = 0x80000000;    // with the index of a listed candidate, in place of a slot
constexpr uint64_t kNothingListed = ~uint64_t{0};

// What a split of a row leaves besides its candidates.
struct SplitSummary {
  uint64_t bound;  // no key below it was listed; 0: all were
  LogSum sum;
  uint32_t count;
};

struct ListedCandidate {
  float logit;
  uint32_t place;  // as in a key
  int64_t node;
};

struct BeamStep {
  const void* logits;
  Element type;
  int64_t strides[2];
  const float* totals;
  const int64_t* nodes;
  const uint8_t* arena;
  uint64_t arena_bytes;
  const float* bias;  // or null
  int64_t bias_strides[3];
  uint32_t beams, width;
  int normalize, num_candidates, num_eos;
  int32_t eos[kMaxEos];

  uint32_t splits, listed;  // listed candidates of a split
  SplitSummary* summaries;
  ListedCandidate* candidates;
  float* log_sums;       // of the rows
  unsigned char* large;  // room for the keys of a sample's block, if they do not fit into shared memory
  int large_capacity;

  float* scores;
  int64_t *beam_index, *token, *node;
};

// One row: a beam of a sample.
struct BeamRow {
  const BeamStep& step;
  uint32_t sample, beam;

  __device__ BeamRow(const BeamStep& step, uint32_t row)
      : step(step), sample(row / step.beams), beam(row - sample * step.beams) {}
  __device__ int64_t offset() const { return sample * step.strides[0] + beam * step.strides[1]; }
  __device__ float bias(int64_t token) const {
    return step.bias[sample * step.bias_strides[0] + beam * step.bias_strides[1] + token * step.bias_strides[2]];
  }
};

// Where a row's node stands, in shared memory. What is no node has no candidates.
struct NodePlace {
  TrieView trie;
  TriePlace place;

  __device__ void find(const BeamStep& step, uint32_t row) {
    const bool shared_by_all = reinterpret_cast<const uint32_t*>(step.arena)[9] == 1;
    const bool exists = trie.open(step.arena, step.arena_bytes, shared_by_all ? 0 : row / step.beams) &&
                        trie.place(step.nodes[row], place);
    if (exists) return;
    place.slots = 0;
    place.ends = false;
  }
};

__device__ __noinline__ int64_t unlisted_node(const BeamStep& step, uint32_t row, uint32_t slot) {
  NodePlace at;
  at.find(step, row);
  return slot < at.place.slots ? at.trie.slot_node(at.place, slot) : kNoNode;
}

// A candidate's place in the order of a row: by token, the end of a key before the child.
__device__ __forceinline__ uint32_t place_in_row(uint32_t token, bool is_child) { return token * 2 + is_child; }

// Pushes key(token, is_child, logit(token)) of the candidates of a row that belong to a split, with their slots; by all
// threads, which have met since at.find(). No two splits share a candidate.
template <typename Logit, typename Key>
__device__ void push_candidates(const NodePlace& at, const BeamStep& step, uint32_t split, BestKeys& best,
                                const Logit& logit, const Key& key) {
  const TrieView trie = at.trie;
  const TriePlace place = at.place;
  if (split == 0 && place.ends && warp_index() == 0) {
    const int i = lane_index();
    const uint32_t token = i < step.num_eos ? step.eos[i] : 0;
    best.push(i < step.num_eos ? key(token, false, logit(token)) : 0, kEndOfKey);
  }
  const Part part(min(place.slots, kEndOfKey), split, step.splits);
  for (uint32_t tile = part.begin; tile < part.end; tile += kSlotsPerThread * blockDim.x) {
    // Loads of one kind together, of what is beyond the end as well.
    uint32_t symbols[kSlotsPerThread], tokens[kSlotsPerThread];
    float logits[kSlotsPerThread];
    bool begins[kSlotsPerThread];
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      const uint32_t slot = tile + i * blockDim.x + threadIdx.x;
      begins[i] = trie.slot(place, min(slot, part.end - 1), symbols[i]) && slot < part.end;
    }
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) tokens[i] = begins[i] ? trie.token(symbols[i]) : UINT32_MAX;
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      logits[i] = tokens[i] < step.width ? logit(tokens[i]) : -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      best.push(key(tokens[i], true, logits[i]), tile + i * blockDim.x + threadIdx.x);
    }
    best.settle();
  }
  best.settle();
}

// The key by which a split lists its candidates: by logit; with a bias by an upper limit of logit + bias, above it by
// more than the score's roundings that depend on the two. What overflows is still a candidate.
__device__ inline uint64_t listing_key(const BeamRow& row, uint32_t token, bool is_child, float logit) {
  constexpr float kLargest = 3.402823466e38f;
  if (!(logit > -kInfinity)) return 0;
  if (row.step.bias) {
    const float bias = row.bias(token);
    if (!(bias > -kInfinity)) return 0;
    logit = fmaf(1e-6f, fabsf(logit) + fabsf(bias), fmaxf(logit + bias, -kLargest));
  }
  return make_key(logit, place_in_row(token, is_child));
}

__device__ inline float score_of(const BeamRow& row, float total, float log_sum, uint32_t token, float logit) {
  const float score = total + (logit - log_sum);
  return row.step.bias ? score + row.bias(token) : score;
}

__device__ inline uint64_t score_key(const BeamRow& row, float score, uint32_t place) {
  return score > -kInfinity ? make_key(score, row.beam * row.step.width * 2 + place) : 0;
}

// From a logit to the next one that its type can hold, in the order of floats; for small float16 less than that.
__device__ inline uint32_t order_step(Element type) {
  return type == Element::kFloat ? 1 : type == Element::kHalf ? 1 << 13 : 1 << 16;
}

// Whether a candidate that the split did not list could have a score of at least `least` and be among the best.
__device__ inline bool may_lack(const BeamStep& step, uint64_t bound, float total, float log_sum, float least) {
  if (bound == 0 || bound == kNothingListed) return bound != 0;
  const float last = key_value(bound);
  if (step.bias) {
    const double margin = 1e-6 * (fabs(static_cast<double>(total)) + fabs(static_cast<double>(log_sum)));
    return static_cast<float>(static_cast<double>(last) + total - log_sum + margin) >= least;
  }
  // N + 1 of this row were listed. They come before the rest, unless rounding makes equal scores of different logits,
  // for then the smaller token comes first.
  const auto score = [&](uint32_t order) { return total + (unordered(order) - log_sum); };
  const uint32_t order = ordered(last), neighbour = order_step(step.type);
  const float of_last = score(order);
  return of_last >= least && (score(order - neighbour) == of_last || score(order + neighbour) == of_last);
}

struct SplitShared {
  SelectState select;
  NodePlace at;
  LogSum sums[kSplitThreads / 32];
};

struct MergeShared {
  SelectState select;
  NodePlace at;
  unsigned lacking[kMergeThreads / 32];
};

constexpr int kSplitReserve = kSlotsPerThread * kSplitThreads + kMaxEos;
constexpr int kMergeReserve = kListedPerThread * kMergeThreads + kMaxEos;
constexpr size_t kKeyBytes = sizeof(uint64_t) + sizeof(uint32_t);

__host__ __device__ inline int split_capacity(int listed) {
  return (listed > kSplitReserve ? listed : kSplitReserve) + kSplitReserve;
}

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, 4) beam_split_kernel(const __grid_constant__ BeamStep step) {
  extern __shared__ float2 shared[];
  SplitShared& block = *reinterpret_cast<SplitShared*>(shared);
  const uint32_t list = blockIdx.x, row_index = list / step.splits, split = list - row_index * step.splits;
  const BeamRow row(step, row_index);
  if (!(step.totals[row_index] > -kInfinity) || step.nodes[row_index] < 0) {
    if (threadIdx.x == 0) step.summaries[list] = {0, LogSum(), 0};
    return;
  }
  const int capacity = split_capacity(step.listed);
  uint64_t* keys = reinterpret_cast<uint64_t*>(&block + 1);
  BestKeys best(block.select, keys, reinterpret_cast<uint32_t*>(keys + capacity), capacity, step.listed, kSplitReserve);
  LogSum sum;
  // The first warp finds the node meanwhile.
  if (threadIdx.x == 0) block.at.find(step, row_index);
  const T* logits = static_cast<const T*>(step.logits) + row.offset();
  if (step.normalize == kVocabulary && warp_index() > 0) {
    sum.add_part(logits, step.width, split, step.splits, threadIdx.x - 32, kSplitThreads - 32);
  }
  __syncthreads();
  const auto logit_of = [&](uint32_t token) { return to_float(logits[token]); };
  push_candidates(block.at, step, split, best, logit_of, [&](uint32_t token, bool is_child, float logit) {
    if (step.normalize == kAllowed) sum.add(logit);
    return step.listed > 0 ? listing_key(row, token, is_child, logit) : 0;
  });
  best.keep_best();

  for (int i = threadIdx.x; i < best.count(); i += kSplitThreads) {
    const uint64_t key = best.key(i);
    const uint32_t place = key_place(key);
    const float logit = step.bias ? logit_of(place / 2) : key_value(key);
    const int64_t node = best.ref(i) == kEndOfKey ? kNoNode : block.at.trie.slot_node(block.at.place, best.ref(i));
    step.candidates[static_cast<int64_t>(list) * step.listed + i] = {logit, place, node};
  }
  sum.reduce_lanes(32);
  if (lane_index() == 0) block.sums[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kSplitThreads / 32; ++i) sum.add(block.sums[i]);
  step.summaries[list] = {step.listed > 0 ? best.threshold() : kNothingListed, sum,
                          static_cast<uint32_t>(best.count())};
}

// The log-sum-exp of every row of a sample.
__device__ inline void sum_rows(const BeamStep& step, const SplitSummary* summaries, float* log_sums) {
  uint32_t lanes = 1;  // of a row
  while (lanes < step.splits) lanes *= 2;
  const uint32_t split = threadIdx.x % lanes;
  for (uint32_t first = 0; first < step.beams; first += kMergeThreads / lanes) {
    const uint32_t k = first + threadIdx.x / lanes;
    LogSum sum;
    if (k < step.beams && split < step.splits) sum = summaries[k * step.splits + split].sum;
    sum.reduce_lanes(lanes);
    if (k < step.beams && split == 0) log_sums[k] = step.normalize == kNone ? 0.f : sum.value();
  }
}

// Pushes the listed candidates of a sample, by all threads; a warp takes 32 of a list at a time.
__device__ __forceinline__ void push_listed(const BeamStep& step, uint32_t first_row, const float* log_sums,
                                            BestKeys& best) {
  const uint32_t pieces = (step.listed + 31) / 32, num_pieces = step.beams * step.splits * pieces;
  const SplitSummary* summaries = step.summaries + first_row * step.splits;
  const ListedCandidate* candidates = step.candidates + static_cast<int64_t>(first_row * step.splits) * step.listed;
  for (uint32_t tile = 0; tile < num_pieces; tile += kListedPerThread * (kMergeThreads / 32)) {
    uint32_t indices[kListedPerThread], rows[kListedPerThread], places[kListedPerThread];
    float logits[kListedPerThread], totals[kListedPerThread], sums[kListedPerThread];
    bool exists[kListedPerThread];
    // Loads that wait for nothing, of what may not exist as well.
#pragma unroll
    for (int i = 0; i < kListedPerThread; ++i) {
      const uint32_t piece = tile + i * (kMergeThreads / 32) + warp_index();
      const uint32_t list = min(piece, num_pieces - 1) / pieces;
      const uint32_t in_list = (piece - list * pieces) * 32 + lane_index();
      rows[i] = list / step.splits;
      indices[i] = list * step.listed + min(in_list, step.listed - 1);
      logits[i] = candidates[indices[i]].logit;
      places[i] = candidates[indices[i]].place;
      totals[i] = step.totals[first_row + rows[i]];
      sums[i] = log_sums[rows[i]];
      exists[i] = piece < num_pieces && in_list < summaries[list].count;
    }
#pragma unroll
    for (int i = 0; i < kListedPerThread; ++i) {
      const BeamRow row(step, first_row + rows[i]);
      float score = totals[i] + (logits[i] - sums[i]);
      if (step.bias && exists[i]) score += row.bias(places[i] / 2);
      best.push(exists[i] ? score_key(row, score, places[i]) : 0, kListed | indices[i]);
    }
    best.settle();
  }
}

// Pushes the candidates of a split that it did not list.
__device__ __forceinline__ void push_unlisted(NodePlace& at, const BeamRow& row, uint32_t split, uint64_t bound,
                                              float log_sum, BestKeys& best) {
  const uint32_t row_index = row.sample * row.step.beams + row.beam;
  const float total = row.step.totals[row_index];
  if (threadIdx.x == 0) at.find(row.step, row_index);
  __syncthreads();
  const auto logit_of = [&](uint32_t token) {
    return load_element(row.step.logits, row.step.type, row.offset() + token);
  };
  push_candidates(at, row.step, split, best, logit_of, [&](uint32_t token, bool is_child, float logit) {
    const uint64_t listing = listing_key(row, token, is_child, logit);
    if (listing == 0 || listing >= bound) return uint64_t{0};
    return score_key(row, score_of(row, total, log_sum, token, logit), place_in_row(token, is_child));
  });
}

// Writes a sample's best in their order, and what does not exist.
__device__ inline void write_best(const BeamStep& step, const BestKeys& best, const ListedCandidate* candidates) {
  const uint32_t first_row = blockIdx.x * step.beams;
  const int64_t first = blockIdx.x * static_cast<int64_t>(step.num_candidates);
  for (int i = threadIdx.x; i < step.num_candidates; i += kMergeThreads) {
    if (i >= best.count()) {
      step.scores[first + i] = -kInfinity;
      step.beam_index[first + i] = 0;
      step.token[first + i] = step.node[first + i] = -1;
      continue;
    }
    const uint64_t key = best.key(i);
    int64_t at = first;
    for (int j = 0; j < best.count(); ++j) at += best.key(j) > key || (best.key(j) == key && j < i);
    const uint32_t place = key_place(key), beam = place / 2 / step.width;
    step.scores[at] = key_value(key);
    step.beam_index[at] = beam;
    step.token[at] = place / 2 - beam * step.width;
    const uint32_t ref = best.ref(i);
    step.node[at] = ref >= kListed     ? candidates[ref - kListed].node
                    : ref == kEndOfKey ? kNoNode
                                       : unlisted_node(step, first_row + beam, ref);
  }
}

__global__ void __launch_bounds__(kMergeThreads, 1)
    beam_merge_kernel(const __grid_constant__ BeamStep step, int capacity) {
  extern __shared__ float2 shared[];
  MergeShared& block = *reinterpret_cast<MergeShared*>(shared);
  const uint32_t first_row = blockIdx.x * step.beams, num_lists = step.beams * step.splits;
  const SplitSummary* summaries = step.summaries + first_row * step.splits;
  const ListedCandidate* candidates = step.candidates + static_cast<int64_t>(first_row * step.splits) * step.listed;
  float* log_sums = step.log_sums + first_row;
  uint64_t* keys = step.large ? reinterpret_cast<uint64_t*>(step.large + blockIdx.x * (capacity * kKeyBytes))
                              : reinterpret_cast<uint64_t*>(&block + 1);
  BestKeys best(block.select, keys, reinterpret_cast<uint32_t*>(keys + capacity), capacity, step.num_candidates,
                kMergeReserve);
  sum_rows(step, summaries, log_sums);
  __syncthreads();

  push_listed(step, first_row, log_sums, best);
  best.keep_best();

  for (uint32_t base = 0; base < num_lists; base += kMergeThreads) {
    const uint32_t mine = base + threadIdx.x, k = mine / step.splits;
    const float least = best.threshold() == 0 ? -kInfinity : key_value(best.threshold());
    const bool lacks =
        mine < num_lists && may_lack(step, summaries[mine].bound, step.totals[first_row + k], log_sums[k], least);
    if (!__syncthreads_or(lacks)) continue;
    const unsigned lanes = __ballot_sync(kWholeWarp, lacks);
    if (lane_index() == 0) block.lacking[warp_index()] = lanes;
    __syncthreads();
    for (int warp = 0; warp < kMergeThreads / 32; ++warp) {
      for (unsigned rest = block.lacking[warp]; rest != 0; rest &= rest - 1) {
        const uint32_t list = base + warp * 32 + __ffs(rest) - 1;
        const BeamRow row(step, first_row + list / step.splits);
        push_unlisted(block.at, row, list % step.splits, summaries[list].bound, log_sums[row.beam], best);
      }
    }
    best.keep_best();
  }
  write_best(step, best, candidates);
}

}  // namespace fastmix
