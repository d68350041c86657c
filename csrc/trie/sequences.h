// The sequences that a trie is built from, as the caller's array holds them, and the first pass over them.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "trie/arena.h"
#include "trie/monitor.h"

namespace fastmix::trie {

// Rows of a matrix up to the first pad, or tokens[offsets[i] … offsets[i + 1]).
template <class Token>
struct Sequences {
  const Token* tokens;
  uint64_t count;
  const int64_t* offsets;      // or null: a matrix
  uint64_t width, row_stride;  // of the matrix, in tokens
  std::optional<int64_t> pad;  // of the matrix
  const char* name;            // of one, in errors

  const Token* begin(uint64_t i) const {
    return tokens + (offsets ? offsets[i] : static_cast<int64_t>(i * row_stride));
  }
  uint64_t room(uint64_t i) const { return offsets ? static_cast<uint64_t>(offsets[i + 1] - offsets[i]) : width; }
  bool is_pad(Token token) const { return pad && static_cast<int64_t>(token) == *pad; }
  uint64_t length(uint64_t i) const {
    const uint64_t most = room(i);
    if (!pad) return most;
    const Token* row = begin(i);
    uint64_t n = 0;
    while (n < most && !is_pad(row[n])) ++n;
    return n;
  }
  [[noreturn]] void refuse(uint64_t i, const std::string& text) const {
    throw std::invalid_argument(std::string(name) + " " + std::to_string(i) + " must " + text);
  }
};

// f(begin, end, t): the numbers 0 … count − 1 in `threads` ranges.
template <class F>
void in_ranges(uint64_t count, int threads, F&& f) {
  in_threads(threads, [&](int t) {
    f(count / threads * t + count % threads * t / threads,
      count / threads * (t + 1) + count % threads * (t + 1) / threads, t);
  });
}

struct Measure {
  uint64_t symbols = 0, shortest = UINT64_MAX, longest = 0, max_token = 0;
  uint64_t shared = kMaxDepth;  // tokens that all sequences begin with
};

// Lengths and the largest token; refuses tokens from `limit` on, long sequences, and a pad before a token. Marks the
// tokens if there is a vocabulary, whose size the limit then is.
template <class Token>
Measure measure(const Sequences<Token>& sequences, uint64_t limit, Vocabulary* vocabulary, int threads,
                const Monitor& monitor) {
  std::vector<Measure> parts(threads);
  in_ranges(sequences.count, threads, [&](uint64_t begin, uint64_t end, int t) {
    Measure part;
    if (begin < end) part.shared = sequences.length(0);
    for (uint64_t i = begin; i < end; ++i) {
      if (i % 4096 == 0) monitor.check();
      const Token* row = sequences.begin(i);
      const uint64_t n = sequences.length(i);
      for (uint64_t j = n; j < sequences.room(i); ++j) {
        if (!sequences.is_pad(row[j])) {
          sequences.refuse(i, "have pad_id " + std::to_string(*sequences.pad) + " only behind its tokens");
        }
      }
      if (n > kMaxDepth) {
        sequences.refuse(i, "have at most " + std::to_string(kMaxDepth) + " tokens, got " + std::to_string(n));
      }
      uint64_t max = 0;
      for (uint64_t j = 0; j < n; ++j) max = std::max(max, static_cast<uint64_t>(static_cast<int64_t>(row[j])));
      if (n > 0 && max >= limit) {  // a negative one is very large
        uint64_t j = 0;
        while (static_cast<uint64_t>(static_cast<int64_t>(row[j])) < limit) ++j;
        sequences.refuse(i, "have tokens from 0 to " + std::to_string(static_cast<int64_t>(limit) - 1) + ", got " +
                                std::to_string(static_cast<int64_t>(row[j])));
      }
      for (uint64_t j = 0; vocabulary && j < n; ++j) vocabulary->mark(static_cast<uint64_t>(row[j]));
      part.max_token = std::max(part.max_token, max);
      part.symbols += n;
      part.shortest = std::min(part.shortest, n);
      part.longest = std::max(part.longest, n);
      const Token* first = sequences.begin(0);
      uint64_t shared = 0;
      for (const uint64_t most = std::min(part.shared, n); shared < most && row[shared] == first[shared];) ++shared;
      part.shared = shared;
    }
    parts[t] = part;
  });
  Measure all;
  for (const Measure& part : parts) {
    all.symbols += part.symbols;
    all.shortest = std::min(all.shortest, part.shortest);
    all.longest = std::max(all.longest, part.longest);
    all.max_token = std::max(all.max_token, part.max_token);
    all.shared = std::min(all.shared, part.shared);
  }
  return all;
}

template <class Token>
void mark_tokens(const Sequences<Token>& sequences, Vocabulary& vocabulary, int threads, const Monitor& monitor) {
  in_ranges(sequences.count, threads, [&](uint64_t begin, uint64_t end, int) {
    for (uint64_t i = begin; i < end; ++i) {
      if (i % 4096 == 0) monitor.check();
      const Token* row = sequences.begin(i);
      for (uint64_t j = 0, n = sequences.length(i); j < n; ++j) vocabulary.mark(static_cast<uint64_t>(row[j]));
    }
  });
}

}  // namespace fastmix::trie
