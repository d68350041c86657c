// The best of a stream of 64-bit keys, found by one block: keys are collected in memory for more of them than are asked
// for; when it is nearly full, the rank-th largest is found by its digits (most significant first) and the smaller ones
// are dropped. What is kept does not depend on the order in which threads come. A key is a float and 32 bits that break
// ties; 0 is no key.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fastmix {

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// Unsigned integers in the order of the floats (no NaN); −0 and +0 are the same.
__device__ __forceinline__ uint32_t ordered(float value) {
  value += 0.f;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float unordered(uint32_t order) {
  const uint32_t bits = order ^ (order >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Larger for a larger value, then for a smaller place.
__device__ __forceinline__ uint64_t make_key(float value, uint32_t place) {
  return static_cast<uint64_t>(ordered(value)) << 32 | static_cast<uint32_t>(~place);
}
__device__ __forceinline__ float key_value(uint64_t key) { return unordered(static_cast<uint32_t>(key >> 32)); }
__device__ __forceinline__ uint32_t key_place(uint64_t key) { return ~static_cast<uint32_t>(key); }

constexpr int kDigits = 256;
constexpr int kFewKeys = 128;  // so few are ranked by comparing all with all

struct SelectState {
  uint64_t few[kFewKeys];
  uint64_t found;
  unsigned bins[kDigits];  // all 0 between two selections
  unsigned digit, rank, inside;
  int count, num_few;
};

// The bin of the rank-th key counted from the last bin, by one warp; clears the bins.
__device__ inline void pick_digit(SelectState& state, unsigned rank) {
  constexpr int kPerLane = kDigits / 32;
  const int last = kDigits - 1 - kPerLane * lane_index();
  unsigned counts[kPerLane], own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    counts[i] = state.bins[last - i];
    state.bins[last - i] = 0;
    own += counts[i];
  }
  unsigned above = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned other = __shfl_up_sync(kWholeWarp, above, distance);
    if (lane_index() >= distance) above += other;
  }
  above -= own;
  if (above >= rank || above + own < rank) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (above < rank && above + counts[i] >= rank) {
      state.digit = last - i;
      state.rank = rank - above;
      state.inside = counts[i];
    }
    above += counts[i];
  }
}

// The rank-th largest of n ≥ rank keys, by all threads.
__device__ __noinline__ uint64_t find_key(SelectState& state, const uint64_t* keys, int n, unsigned rank) {
  unsigned inside;
  uint64_t prefix = 0;
  int shift = 64;
  do {
    shift -= 8;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint64_t digits = keys[i] >> shift;
      if (digits >> 8 == prefix) atomicAdd(&state.bins[digits & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (warp_index() == 0) pick_digit(state, rank);
    __syncthreads();
    prefix = prefix << 8 | state.digit;
    rank = state.rank;
    inside = state.inside;
  } while (inside > kFewKeys && shift > 0);
  if (inside > kFewKeys) return prefix;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (keys[i] >> shift == prefix) state.few[atomicAdd(&state.num_few, 1)] = keys[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) state.num_few = 0;
  if (threadIdx.x < inside) {
    const uint64_t key = state.few[threadIdx.x];
    unsigned before = 0;
    for (unsigned i = 0; i < inside; ++i) {
      before += state.few[i] > key || (state.few[i] == key && i < threadIdx.x);
    }
    if (before + 1 == rank) state.found = key;
  }
  __syncthreads();
  return state.found;
}

class BestKeys {
 public:
  // Every thread has one. `reserve`: how many keys may be pushed between two calls of settle(); capacity ≥ rank +
  // reserve. The threads meet at a barrier before they push.
  __device__ BestKeys(SelectState& state, uint64_t* keys, uint32_t* refs, int capacity, int rank, int reserve)
      : state_(state), keys_(keys), refs_(refs), full_from_(capacity - reserve), rank_(rank) {
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) state_.bins[i] = 0;
    if (threadIdx.x == 0) state_.count = state_.num_few = 0;
  }

  // By all lanes of a warp.
  __device__ void push(uint64_t key, uint32_t ref) {
    const int place = append(key > threshold_, key, ref);
    full_ = full_ || place >= full_from_;
  }

  // By all threads; makes room if need be.
  __device__ void settle() {
    if (__syncthreads_or(full_)) drop_rest();
  }

  // By all threads, after settle(): the best are then keys 0 … count − 1, in any order. Before the next push they meet.
  __device__ void keep_best() {
    drop_rest();
    count_ = state_.count;
  }

  __device__ int count() const { return count_; }
  __device__ uint64_t key(int i) const { return keys_[i]; }
  __device__ uint32_t ref(int i) const { return refs_[i]; }
  // The rank-th best, if anything was dropped: no smaller key is among the best. Else 0.
  __device__ uint64_t threshold() const { return threshold_; }

 private:
  // Returns the place of a wanted key, else −1.
  __device__ int append(bool wanted, uint64_t key, uint32_t ref) {
    const unsigned lanes = __ballot_sync(kWholeWarp, wanted);
    if (lanes == 0) return -1;
    const int leader = __ffs(lanes) - 1;
    int first = 0;
    if (lane_index() == leader) first = atomicAdd(&state_.count, __popc(lanes));
    first = __shfl_sync(kWholeWarp, first, leader);
    if (!wanted) return -1;
    const int place = first + __popc(lanes & ((1u << lane_index()) - 1));
    keys_[place] = key;
    refs_[place] = ref;
    return place;
  }

  __device__ void drop_rest() {
    const int n = state_.count;
    full_ = false;
    if (n <= rank_) return;
    threshold_ = find_key(state_, keys_, n, rank_);
    if (threadIdx.x == 0) state_.count = 0;
    for (int base = 0; base < n; base += blockDim.x) {
      const int i = base + static_cast<int>(threadIdx.x);
      const uint64_t key = i < n ? keys_[i] : 0;
      const uint32_t ref = i < n ? refs_[i] : 0;
      // Nothing is written beyond what has been read.
      __syncthreads();
      append(key >= threshold_, key, ref);
    }
    __syncthreads();
    // Equal keys, which damaged bytes may make, can be more.
    if (threadIdx.x == 0) state_.count = rank_;
    __syncthreads();
  }

  SelectState& state_;
  uint64_t* keys_;
  uint32_t* refs_;
  int full_from_, rank_, count_ = 0;
  bool full_ = false;
  uint64_t threshold_ = 0;
};

}  // namespace fastmix
