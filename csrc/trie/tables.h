// Records of the intervals of many keys, and the tables of their children, breadth first.
#pragma once

#include <vector>

#include "trie/arena.h"
#include "trie/monitor.h"

namespace fastmix::trie {

template <class Symbol>
struct Tables {
  std::vector<Record> records;
  std::vector<Symbol> narrow_symbols, wide_symbols;
  std::vector<uint16_t> narrow_begins;
  std::vector<uint64_t> wide_begins;

  void write(Arena& arena, uint64_t position, Entry& entry) const {
    entry.records = records.size();
    entry.narrow = narrow_symbols.size();
    entry.wide = wide_symbols.size();
    arena.append(records);
    arena.append(narrow_symbols);
    arena.append(narrow_begins);
    arena.append(wide_symbols);
    arena.append_positions(wide_begins.size(), position, [&](uint64_t i) { return wide_begins[i]; });
  }
};

// How many of the next symbols are the same, at most n.
template <class Symbol>
uint64_t common_symbols(const Symbol* a, const Symbol* b, uint64_t n) {
  constexpr uint64_t kStep = 8 / sizeof(Symbol);
  uint64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    uint64_t first, second;
    std::memcpy(&first, a + i, 8);
    std::memcpy(&second, b + i, 8);
    if (first != second) break;
  }
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

// Of sorted keys: start(i) in the text, length(i), and next(i, depth): symbol + 1 of key i at a depth, 0 where it ends;
// in an interval that shares `depth` symbols it never falls.
template <class Keys>
auto make_tables(const Keys& keys, uint64_t num_keys, const Monitor& monitor) {
  using Symbol = typename Keys::Symbol;
  const auto next = [&](uint64_t i, uint64_t depth) { return keys.next(i, depth); };
  Tables<Symbol> tables;
  auto& records = tables.records;  // also the queue
  if (num_keys > kIntervalKeys) records.push_back({0, num_keys, 0, 0, 0, 0});
  for (uint64_t r = 0; r < records.size(); ++r) {
    monitor.check();
    auto [lo, hi, first_child, first_record, depth, num_children] = records[r];
    depth += common_symbols(keys.text + keys.start(lo) + depth, keys.text + keys.start(hi - 1) + depth,
                            std::min(keys.length(lo), keys.length(hi - 1)) - depth);
    const bool wide = hi - lo > kNarrowKeys;
    first_child = wide ? tables.wide_symbols.size() : tables.narrow_symbols.size();
    first_record = records.size();
    for (uint64_t begin = lo; begin < hi;) {
      const auto symbol = next(begin, depth);
      // Galloping: of begin + 1, + 2, + 4 … the first with another symbol, then between the last two.
      uint64_t step = 1;
      while (begin + step < hi && next(begin + step, depth) == symbol) step *= 2;
      uint64_t low = begin + step / 2, end = begin + step < hi ? begin + step : hi;
      while (low + 1 < end) {
        const uint64_t middle = low + (end - low) / 2;
        (next(middle, depth) == symbol ? low : end) = middle;
      }
      if (symbol != 0) {
        (wide ? tables.wide_symbols : tables.narrow_symbols).push_back(static_cast<Symbol>(symbol - 1));
        if (wide) {
          tables.wide_begins.push_back(begin - lo);
        } else {
          tables.narrow_begins.push_back(static_cast<uint16_t>(begin - lo));
        }
        ++num_children;
        if (end - begin > kIntervalKeys) records.push_back({begin, end, 0, 0, depth + 1, 0});
      }
      begin = end;
    }
    records[r] = {lo, hi, first_child, first_record, depth, num_children};
  }
  return tables;
}

}  // namespace fastmix::trie
