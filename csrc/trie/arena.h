// The bytes of an arena with one trie (docs/trie-format.md), written section by section. No checksums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <utility>
#include <vector>

namespace fastmix::trie {

inline constexpr uint64_t kMaxDepth = (1 << 20) - 1;
inline constexpr uint64_t kIntervalKeys = 64;
inline constexpr uint64_t kNarrowKeys = 65536;
inline constexpr uint64_t kMaxSymbols2 = 65535;  // 0xFFFF is a separator
inline constexpr uint64_t kMaxVocab = UINT32_MAX;

enum Kind : uint64_t { kFixed, kRagged, kSuffixes };

struct Header {
  char magic[8] = {'F', 'M', 'I', 'X', 'T', 'R', 'I', 'E'};
  uint32_t version = 1, checksum = 0;
  uint64_t size = 0, body = 0;
  uint32_t body_checksum = 0, num_tries = 1;
  uint64_t vocab_size = 0, zero = 0, zero_too = 0;
};
static_assert(sizeof(Header) == 64);

struct Entry {
  uint64_t kinds = 0, num_sorted = 0, key_length = 0, symbols = 0, used = 0, records = 0, narrow = 0, wide = 0;
  uint64_t payloads = 0, num_keys = 0, num_nodes = 0;
  int64_t root = -1;
  uint64_t offset = 0, size = 0, passages = 0, depth = 0;

  void set_kinds(Kind kind, uint64_t symbol, uint64_t position, uint64_t payload, bool has_offsets) {
    kinds = kind | symbol << 8 | position << 16 | payload << 24 | uint64_t{has_offsets} << 32;
  }
  void set_root() {
    root = num_sorted == 0               ? -1
           : num_sorted <= kIntervalKeys ? static_cast<int64_t>((num_sorted - 1) << 20)
                                         : int64_t{1} << 62;
  }
};
static_assert(sizeof(Entry) == 128);

struct Record {
  uint64_t lo, hi, first_child, first_record;
  uint32_t depth, num_children;
};
static_assert(sizeof(Record) == 40);

// Tokens that occur, and their symbols.
struct Vocabulary {
  uint64_t size = 0;
  std::vector<uint64_t> bitmap;
  std::vector<uint32_t> ranks;  // of tokens that occur: how many are below each word of the bitmap
  std::vector<uint32_t> table;  // the symbol table, if there is one
  uint64_t used = 0;

  explicit Vocabulary(uint64_t vocab_size) : size(vocab_size), bitmap((vocab_size + 63) / 64) {}

  // Several threads may mark tokens, most of which are marked already.
  void mark(uint64_t token) {
    uint64_t& word = bitmap[token / 64];
    const uint64_t bit = uint64_t{1} << token % 64;
    if (!(__atomic_load_n(&word, __ATOMIC_RELAXED) & bit)) __atomic_fetch_or(&word, bit, __ATOMIC_RELAXED);
  }

  void finish() {
    ranks.reserve(bitmap.size());
    for (const uint64_t word : bitmap) {
      ranks.push_back(static_cast<uint32_t>(used));
      used += __builtin_popcountll(word);
    }
    if (size <= kMaxSymbols2 || used > kMaxSymbols2) return;
    for (uint64_t i = 0; i < bitmap.size(); ++i) {
      for (uint64_t word = bitmap[i]; word; word &= word - 1) {
        table.push_back(static_cast<uint32_t>(i * 64 + __builtin_ctzll(word)));
      }
    }
  }

  bool by_table() const { return size > kMaxSymbols2 && used <= kMaxSymbols2; }
  uint64_t symbol_bytes() const { return size <= kMaxSymbols2 || by_table() ? 2 : 4; }
  uint64_t rank(uint64_t token) const {
    return ranks[token / 64] + __builtin_popcountll(bitmap[token / 64] & ((uint64_t{1} << token % 64) - 1));
  }
  uint64_t symbol(uint64_t token) const { return by_table() ? rank(token) : token; }
};

// One growing block. Its address changes as it grows, the offsets do not.
class Arena {
 public:
  explicit Arena(const Vocabulary& vocabulary) {
    header_.vocab_size = vocabulary.size;
    const uint64_t bits = vocabulary.bitmap.size() * 8;
    header_.body = (sizeof(Header) + sizeof(Entry) + bits + 63) / 64 * 64;
    resize(header_.body);
    std::memset(data_, 0, header_.body);
    if (bits) std::memcpy(data_ + sizeof(Header) + sizeof(Entry), vocabulary.bitmap.data(), bits);
    end_ = header_.body;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }

  // The next section, of so many bytes; valid until the next call.
  uint8_t* section(uint64_t bytes) {
    const uint64_t start = (end_ + 7) / 8 * 8;
    resize(start + bytes);
    std::memset(data_ + end_, 0, start - end_);
    last_ = start;
    end_ = start + bytes;
    return data_ + start;
  }
  template <class T>
  T* section_of(uint64_t count) {
    return reinterpret_cast<T*>(section(count * sizeof(T)));
  }
  template <class T>
  void append(const std::vector<T>& values) {
    uint8_t* start = section(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(start, values.data(), values.size() * sizeof(T));
  }
  // Numbers in 4 or 8 bytes each.
  template <class F>
  void append_positions(uint64_t count, uint64_t bytes, F&& next) {
    if (bytes == 4) {
      auto* out = section_of<uint32_t>(count);
      for (uint64_t i = 0; i < count; ++i) out[i] = static_cast<uint32_t>(next(i));
    } else {
      auto* out = section_of<uint64_t>(count);
      for (uint64_t i = 0; i < count; ++i) out[i] = static_cast<uint64_t>(next(i));
    }
  }
  // Makes the last section shorter.
  void shrink(uint64_t bytes) { end_ -= bytes; }

  uint8_t* body() { return data_ + header_.body; }
  uint8_t* last_section() { return data_ + last_; }

  // Writes header and directory, and hands over the block, which is to be freed by std::free.
  std::pair<uint8_t*, uint64_t> finish(Entry entry) {
    resize(end_);
    header_.size = end_;
    entry.offset = header_.body;
    entry.size = end_ - header_.body;
    std::memcpy(data_, &header_, sizeof(Header));
    std::memcpy(data_ + sizeof(Header), &entry, sizeof(Entry));
    return {std::exchange(data_, nullptr), end_};
  }

 private:
  // A large block moves by its page table alone, and pages that were never written take no memory.
  void resize(uint64_t bytes) {
    auto* moved = static_cast<uint8_t*>(std::realloc(data_, bytes));
    if (!moved) throw std::bad_alloc();
    data_ = moved;
  }

  Header header_;
  uint8_t* data_ = nullptr;
  uint64_t last_ = 0, end_ = 0;
};

inline uint64_t position_bytes(uint64_t keys, uint64_t symbols, uint64_t payloads) {
  return std::max({keys, symbols, payloads}) < UINT32_MAX ? 4 : 8;
}

}  // namespace fastmix::trie
