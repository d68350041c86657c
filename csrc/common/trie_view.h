// Reads one trie out of an arena's bytes (docs/trie-format.md), on a CPU or in a CUDA kernel;
// fastmix/reference/_trie.py is the same in Python. Nothing is read outside of the arena, whatever the bytes and the
// node say: `open` checks that the sections fit, every index is checked against its section. A value that is no node
// has no place.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FASTMIX_CUDA_EMULATOR)
#define FASTMIX_HD __host__ __device__
#else
#define FASTMIX_HD
#endif

namespace fastmix {

inline constexpr uint64_t kTrieHeaderBytes = 64, kTrieEntryBytes = 128;
inline constexpr uint64_t kIntervalKeys = 64;  // a node with more keys has a record
inline constexpr uint64_t kNarrowKeys = 65536;
inline constexpr uint64_t kMaxDepth = (1 << 20) - 1;
inline constexpr int64_t kNoNode = -1;

struct TrieRecord {
  uint64_t lo, hi, first_child, first_record;
  uint32_t branch_depth, num_children;
};

// Where a node stands: the sorted keys lo … hi − 1 share its first `depth` symbols. Its children are found in slots: a
// record's slot is a child; an interval's slot is a key, and a child begins there or not.
struct TriePlace {
  uint64_t lo, hi, depth;
  int64_t number;     // of the record, or −1
  TrieRecord record;  // if there is one
  uint32_t slots;
  bool ends;  // a key ends here
  FASTMIX_HD bool has_table() const { return number >= 0 && depth == record.branch_depth; }
};

struct TrieView {
  const uint8_t *text, *starts, *narrow_symbols, *wide_symbols, *wide_begins, *passage_ends;
  const uint32_t* table;
  const TrieRecord* records;
  const uint16_t* narrow_begins;
  uint64_t num_keys, key_length, num_symbols, num_used, num_records, num_narrow, num_wide, num_passages;
  uint8_t kind, symbol_bytes, position_bytes;

  enum Kind : uint8_t { kFixed, kRagged, kSuffixes };

  // False if `arena` (aligned to 8 bytes) has no trie of that index, or one whose sections do not fit.
  FASTMIX_HD bool open(const uint8_t* arena, uint64_t size, uint64_t index) {
    if (size < kTrieHeaderBytes + kTrieEntryBytes) return false;
    if (index >= reinterpret_cast<const uint32_t*>(arena)[9]) return false;
    if (index >= (size - kTrieHeaderBytes) / kTrieEntryBytes) return false;
    const auto* entry = reinterpret_cast<const uint64_t*>(arena + kTrieHeaderBytes + kTrieEntryBytes * index);
    uint64_t bits = 0;
    for (int i = 1; i < 16; ++i) bits |= i == 11 ? 0 : entry[i];
    if (bits >> 44 != 0) return false;  // so that no product below overflows
    kind = entry[0] & 255, symbol_bytes = entry[0] >> 8 & 255, position_bytes = entry[0] >> 16 & 255;
    num_keys = entry[1], key_length = entry[2], num_symbols = entry[3], num_used = entry[4], num_records = entry[5];
    num_narrow = entry[6], num_wide = entry[7], num_passages = entry[14];
    if (kind > kSuffixes || (symbol_bytes != 2 && symbol_bytes != 4)) return false;
    if (position_bytes != 4 && position_bytes != 8) return false;
    if (kind == kFixed && (key_length > kMaxDepth || num_keys * key_length != num_symbols)) return false;
    if (entry[12] % 8 != 0 || entry[12] > size || entry[13] > size - entry[12]) return false;
    const uint8_t* block = arena + entry[12];
    uint64_t end = 0;
    const auto section = [&](uint64_t count, uint64_t bytes) {
      const uint64_t start = (end + 7) / 8 * 8;
      end = start + count * bytes;
      return block + start;
    };
    text = section(num_symbols, symbol_bytes);
    table = reinterpret_cast<const uint32_t*>(section(num_used, 4));
    starts = section(kind == kRagged ? num_keys + 1 : kind == kSuffixes ? num_keys : 0, position_bytes);
    records = reinterpret_cast<const TrieRecord*>(section(num_records, sizeof(TrieRecord)));
    narrow_symbols = section(num_narrow, symbol_bytes);
    narrow_begins = reinterpret_cast<const uint16_t*>(section(num_narrow, 2));
    wide_symbols = section(num_wide, symbol_bytes);
    wide_begins = section(num_wide, position_bytes);
    section((entry[0] >> 32 & 255) ? num_keys + 1 : 0, position_bytes);
    section((entry[0] >> 24 & 255) ? entry[8] : 0, entry[0] >> 24 & 255);
    passage_ends = section(num_passages, position_bytes);
    return end <= entry[13];
  }

  // False for what is no node.
  FASTMIX_HD bool place(int64_t node, TriePlace& p) const {
    if (node < 0) return false;
    p.depth = node & kMaxDepth;
    p.number = -1;
    if (node >> 62) {
      p.number = (node >> 20) & ((int64_t{1} << 42) - 1);
      if (static_cast<uint64_t>(p.number) >= num_records) return false;
      p.record = records[p.number];
      p.lo = p.record.lo, p.hi = p.record.hi;
      if (p.hi > num_keys || p.lo >= p.hi || p.hi - p.lo <= kIntervalKeys || p.depth > p.record.branch_depth) {
        return false;
      }
    } else {
      p.lo = node >> 26, p.hi = p.lo + ((node >> 20) & 63) + 1;
      if (p.hi > num_keys) return false;
    }
    // Exactly the keys that share the first `depth` symbols.
    const uint64_t of_lo = length(p.lo);
    if (of_lo < p.depth || !share(p.lo, p.hi - 1, p.depth) || (p.lo > 0 && share(p.lo - 1, p.lo, p.depth)) ||
        (p.hi < num_keys && share(p.lo, p.hi, p.depth))) {
      return false;
    }
    p.ends = kind == kSuffixes ? p.depth > 0 : of_lo == p.depth;
    p.slots = p.depth == kMaxDepth ? 0
              : p.has_table()      ? table_size(p.record)
              : p.number >= 0      ? of_lo > p.depth
                                   : static_cast<uint32_t>(p.hi - p.lo);
    return true;
  }

  // The symbol of the child that begins at slot j < p.slots; false if none begins there.
  FASTMIX_HD bool slot(const TriePlace& p, uint32_t j, uint32_t& symbol) const {
    if (p.has_table()) {
      symbol = symbol_at(table_symbols(p.record), p.record.first_child + j);
      return true;
    }
    if (!symbol_of(p.lo + j, p.depth, symbol)) return false;
    uint32_t before;
    return j == 0 || !symbol_of(p.lo + j - 1, p.depth, before) || before != symbol;
  }

  // The child that begins at slot j.
  FASTMIX_HD int64_t slot_node(const TriePlace& p, uint32_t j) const {
    if (p.has_table()) return table_node(p, j);
    if (p.number >= 0) return (int64_t{1} << 62) | (p.number << 20) | static_cast<int64_t>(p.depth + 1);
    uint32_t symbol = 0, next = 0;
    if (!symbol_of(p.lo + j, p.depth, symbol)) return kNoNode;
    // Most children are one key; else few loads that wait for each other, for GPUs.
    uint64_t end = p.lo + j + 1, high = p.hi;
    if (end < high && !(symbol_of(end, p.depth, next) && next == symbol)) high = end;
    while (end < high) {
      const uint64_t middle = (end + high) / 2;
      symbol_of(middle, p.depth, next) && next == symbol ? end = middle + 1 : high = middle;
    }
    return interval_node(p.lo + j, end, p.depth + 1);
  }

  // The token that a symbol stands for; damaged bytes may give one outside of the vocabulary.
  FASTMIX_HD uint32_t token(uint32_t symbol) const {
    return num_used == 0 ? symbol : symbol < num_used ? table[symbol] : UINT32_MAX;
  }

  FASTMIX_HD const uint8_t* table_symbols(const TrieRecord& r) const {
    return r.hi - r.lo <= kNarrowKeys ? narrow_symbols : wide_symbols;
  }

 private:
  FASTMIX_HD uint32_t symbol_at(const uint8_t* base, uint64_t i) const {
    return symbol_bytes == 2 ? reinterpret_cast<const uint16_t*>(base)[i] : reinterpret_cast<const uint32_t*>(base)[i];
  }

  FASTMIX_HD uint64_t position_at(const uint8_t* base, uint64_t i) const {
    return position_bytes == 4 ? reinterpret_cast<const uint32_t*>(base)[i]
                               : reinterpret_cast<const uint64_t*>(base)[i];
  }

  FASTMIX_HD uint32_t table_size(const TrieRecord& r) const {
    const uint64_t size = r.hi - r.lo <= kNarrowKeys ? num_narrow : num_wide;
    const uint64_t left = r.first_child < size ? size - r.first_child : 0;
    return r.num_children < left ? r.num_children : static_cast<uint32_t>(left);
  }

  FASTMIX_HD uint64_t start(uint64_t i) const { return kind == kFixed ? i * key_length : position_at(starts, i); }

  // Of key i < num_keys; start + length never passes the text.
  FASTMIX_HD uint64_t length(uint64_t i) const {
    if (kind == kFixed) return key_length;
    const uint64_t from = position_at(starts, i);
    uint64_t to = kind == kRagged ? position_at(starts, i + 1) : passage_end(from);
    if (to > num_symbols) to = num_symbols;
    return to > from ? to - from : 0;
  }

  FASTMIX_HD uint64_t passage_end(uint64_t position) const {
    uint64_t low = 0, high = num_passages;
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      position_at(passage_ends, middle) <= position ? low = middle + 1 : high = middle;
    }
    return low < num_passages ? position_at(passage_ends, low) : position;
  }

  FASTMIX_HD bool symbol_of(uint64_t key, uint64_t depth, uint32_t& symbol) const {
    if (length(key) <= depth) return false;
    symbol = symbol_at(text, start(key) + depth);
    return true;
  }

  // Whether keys i and j have at least `depth` symbols, and the first ones in common.
  FASTMIX_HD bool share(uint64_t i, uint64_t j, uint64_t depth) const {
    if (i == j) return true;
    if (length(i) < depth || length(j) < depth) return false;
    const uint64_t a = start(i), b = start(j);
    // Neighbours in the order differ late.
    for (uint64_t k = depth; k-- > 0;) {
      if (symbol_at(text, a + k) != symbol_at(text, b + k)) return false;
    }
    return true;
  }

  FASTMIX_HD int64_t interval_node(uint64_t begin, uint64_t end, uint64_t depth) const {
    if (begin >= end || end - begin > kIntervalKeys) return kNoNode;
    return static_cast<int64_t>(begin << 26 | (end - begin - 1) << 20 | depth);
  }

  FASTMIX_HD int64_t table_node(const TriePlace& p, uint32_t j) const {
    const TrieRecord& r = p.record;
    const bool narrow = r.hi - r.lo <= kNarrowKeys;
    const auto begin_of = [&](uint64_t i) {
      return r.lo + (narrow ? narrow_begins[r.first_child + i] : position_at(wide_begins, r.first_child + i));
    };
    const uint64_t begin = begin_of(j), end = j + 1 < p.slots ? begin_of(j + 1) : r.hi;
    if (end - begin <= kIntervalKeys || end < begin) return interval_node(begin, end, r.branch_depth + 1);
    // The records of the children lie together, in order; child j's is at most the j-th.
    uint64_t low = r.first_record, high = num_records;
    if (p.number + 1 < static_cast<int64_t>(num_records) && records[p.number + 1].first_record < high) {
      high = records[p.number + 1].first_record;
    }
    if (low + j < high) {
      high = low + j;
      if (records[high].lo == begin) low = high;
    }
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      records[middle].lo < begin ? low = middle + 1 : high = middle;
    }
    return static_cast<int64_t>(uint64_t{1} << 62 | low << 20 | (r.branch_depth + 1));
  }
};

}  // namespace fastmix
