// Builds a trie of all substrings of passages through their suffix array.
#pragma once

#include <utility>

#include "trie/sequences.h"
#include "trie/suffix_array.h"
#include "trie/tables.h"

namespace fastmix::trie {

template <class S, class Position>
struct Suffixes {
  using Symbol = S;
  const S* text;
  const Position* starts;
  const std::vector<uint64_t>& ends;  // of the passages
  uint64_t start(uint64_t i) const { return starts[i]; }
  uint64_t length(uint64_t i) const { return *std::lower_bound(ends.begin(), ends.end(), start(i)) - start(i); }
  uint64_t next(uint64_t i, uint64_t depth) const {
    return static_cast<S>(text[start(i) + depth] + 1);
  }  // 0: separator
};

template <class Token, class Symbol>
class SubstringBuilder {
 public:
  SubstringBuilder(const Sequences<Token>& passages, const Vocabulary& vocabulary, const Measure& measure,
                   Monitor& monitor)
      : passages_(passages),
        vocabulary_(vocabulary),
        measure_(measure),
        monitor_(monitor),
        size_(measure.symbols + passages.count) {}

  std::pair<uint8_t*, uint64_t> build() {
    Arena arena(vocabulary_);
    write_text(arena.section_of<Symbol>(size_));
    arena.append(vocabulary_.table);
    const uint64_t position = position_bytes(measure_.symbols, size_, 0);
    Entry entry;
    if (size_ + vocabulary_.used < INT32_MAX) {
      write_suffixes<int32_t>(arena, position, entry);
    } else {
      write_suffixes<int64_t>(arena, position, entry);
    }
    const auto tables = position == 4 ? tables_of<uint32_t>(arena) : tables_of<uint64_t>(arena);
    tables.write(arena, position, entry);
    arena.section(0);  // payload offsets
    arena.section(0);  // payloads
    arena.append_positions(ends_.size(), position, [&](uint64_t i) { return ends_[i]; });
    entry.num_sorted = measure_.symbols;
    entry.symbols = size_;
    entry.used = vocabulary_.table.size();
    entry.num_nodes = entry.num_keys + 1;
    entry.passages = passages_.count;
    entry.depth = measure_.longest;
    entry.set_kinds(kSuffixes, sizeof(Symbol), position, 0, false);
    entry.set_root();
    return arena.finish(entry);
  }

 private:
  static constexpr Symbol kSeparator = static_cast<Symbol>(~Symbol{0});

  void write_text(Symbol* out) {
    uint64_t place = 0;
    for (uint64_t i = 0; i < passages_.count; ++i) {
      const Token* tokens = passages_.begin(i);
      for (uint64_t j = 0, n = passages_.length(i); j < n; ++j) {
        out[place++] = static_cast<Symbol>(vocabulary_.symbol(static_cast<uint64_t>(tokens[j])));
      }
      ends_.push_back(place);
      out[place++] = kSeparator;
    }
  }

  // The text as numbers for the suffix array: separators in order, below all symbols, so that none is like another.
  template <class Int>
  std::vector<Int> numbered() const {
    std::vector<Int> numbers(size_);
    uint64_t place = 0;
    for (uint64_t i = 0; i < passages_.count; ++i) {
      const Token* tokens = passages_.begin(i);
      for (; place < ends_[i]; ++place) {
        numbers[place] = static_cast<Int>(passages_.count + vocabulary_.rank(static_cast<uint64_t>(*tokens++)));
      }
      numbers[place++] = static_cast<Int>(i);
    }
    return numbers;
  }

  template <class Int>
  void write_suffixes(Arena& arena, uint64_t position, Entry& entry) {
    const std::vector<Int> text = numbered<Int>();
    const auto largest = static_cast<Int>(passages_.count + vocabulary_.used - 1);
    const std::vector<Int> suffixes = suffix_array(text, largest, monitor_);
    monitor_.done = 0.7;
    const Int* first = suffixes.data() + passages_.count;  // behind the suffixes that begin with a separator
    arena.append_positions(measure_.symbols, position, [&](uint64_t i) { return first[i]; });
    // Distinct substrings: of each suffix, the prefixes that it does not share with the one before. From place to
    // place in the text a suffix shares at most one symbol less, so that nothing is compared twice.
    std::vector<Int> before(text.size());
    for (uint64_t i = passages_.count; i < text.size(); ++i) before[suffixes[i]] = suffixes[i - 1];
    uint64_t shared = 0, place = 0;
    for (const uint64_t end : ends_) {
      for (; place < end; ++place) {
        if (place % 65536 == 0) monitor_.check();
        const auto other = static_cast<uint64_t>(before[place]);
        while (text[place + shared] == text[other + shared]) ++shared;
        entry.num_keys += end - place - shared;
        if (shared > 0) --shared;
      }
      ++place;
      shared = 0;
    }
    monitor_.done = 0.8;
  }

  template <class Position>
  Tables<Symbol> tables_of(Arena& arena) const {
    const auto* text = reinterpret_cast<const Symbol*>(arena.body());
    const auto* starts = reinterpret_cast<const Position*>(arena.last_section());
    return make_tables(Suffixes<Symbol, Position>{text, starts, ends_}, measure_.symbols, monitor_);
  }

  const Sequences<Token>& passages_;
  const Vocabulary& vocabulary_;
  const Measure& measure_;
  Monitor& monitor_;
  const uint64_t size_;         // of the text
  std::vector<uint64_t> ends_;  // where the separators stand
};

}  // namespace fastmix::trie
