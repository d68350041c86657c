// The best N of a stream of candidates, in the order of trie_beam_step.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/log_sum_exp.h"

namespace fastmix {

struct Candidate {
  float score;
  uint32_t beam, token;
  int32_t slot;  // of the beam's node, where the child begins; −1 is the end of a key

  // Score descending, then beam, token, and the end of a key before a child.
  bool before(const Candidate& other) const {
    if (score != other.score) return score > other.score;
    if (beam != other.beam) return beam < other.beam;
    return token != other.token ? token < other.token : slot < other.slot;
  }
};

// Collects into memory for 2N candidates; full, it keeps the best N, whose last one becomes the threshold.
class BestCandidates {
 public:
  static int64_t room(int64_t n) { return 2 * n; }

  BestCandidates(Candidate* memory, int64_t n) : items_(memory), n_(n) {}

  // No score below it is among the best N.
  float threshold() const { return threshold_; }

  void add(const Candidate& candidate) {
    items_[count_++] = candidate;
    if (count_ == room(n_)) keep_best();
  }

  // Sorts them; returns how many there are, at most N.
  int64_t finish() {
    if (count_ > n_) keep_best();
    std::sort(items_, items_ + count_, [](const Candidate& a, const Candidate& b) { return a.before(b); });
    return count_;
  }

 private:
  void keep_best() {
    std::nth_element(items_, items_ + (n_ - 1), items_ + count_,
                     [](const Candidate& a, const Candidate& b) { return a.before(b); });
    count_ = n_;
    threshold_ = items_[n_ - 1].score;
  }

  Candidate* items_;
  int64_t n_, count_ = 0;
  float threshold_ = std::numeric_limits<float>::lowest();  // −inf is no candidate
};

}  // namespace fastmix
