// Builds a trie of whole sequences. Their numbers are sorted into buckets by the first symbol in which they differ;
// consecutive buckets make a chunk, which a thread sorts and writes where its keys will stand.
#pragma once

#include <atomic>
#include <utility>

#include "trie/sequences.h"
#include "trie/tables.h"

namespace fastmix::trie {

struct Payloads {
  const int64_t* values;   // or null: the number of the sequence
  const int64_t* offsets;  // or null: one for each sequence
  uint64_t count;
};

// Numbers of sequences in 4 bytes each if they fit, and with each whether its key is the one before.
class Order {
 public:
  explicit Order(uint64_t count) : wide_(count > kRepeated4) {
    wide_ ? numbers8_.resize(count) : numbers4_.resize(count);
  }
  uint64_t operator[](uint64_t i) const { return wide_ ? numbers8_[i] & ~kRepeated8 : numbers4_[i] & ~kRepeated4; }
  bool repeated(uint64_t i) const { return wide_ ? numbers8_[i] & kRepeated8 : numbers4_[i] & kRepeated4; }
  void set(uint64_t i, uint64_t number, bool repeated = false) {
    if (wide_) {
      numbers8_[i] = number | (repeated ? kRepeated8 : 0);
    } else {
      numbers4_[i] = static_cast<uint32_t>(number) | (repeated ? kRepeated4 : 0);
    }
  }

 private:
  static constexpr uint32_t kRepeated4 = uint32_t{1} << 31;
  static constexpr uint64_t kRepeated8 = uint64_t{1} << 63;
  bool wide_;
  std::vector<uint32_t> numbers4_;
  std::vector<uint64_t> numbers8_;
};

template <class S>
struct FixedKeys {
  using Symbol = S;
  const S* text;
  uint64_t size;
  uint64_t start(uint64_t i) const { return i * size; }
  uint64_t length(uint64_t) const { return size; }
  uint64_t next(uint64_t i, uint64_t depth) const { return depth < size ? uint64_t{text[start(i) + depth]} + 1 : 0; }
};

template <class S, class Position>
struct RaggedKeys {
  using Symbol = S;
  const S* text;
  const Position* starts;
  uint64_t start(uint64_t i) const { return starts[i]; }
  uint64_t length(uint64_t i) const { return starts[i + 1] - starts[i]; }
  uint64_t next(uint64_t i, uint64_t depth) const {
    return depth < length(i) ? uint64_t{text[start(i) + depth]} + 1 : 0;
  }
};

template <class Token, class Symbol>
class KeyBuilder {
 public:
  KeyBuilder(const Sequences<Token>& sequences, const Vocabulary& vocabulary, const Measure& measure, int threads,
             Monitor& monitor)
      : sequences_(sequences),
        vocabulary_(vocabulary),
        measure_(measure),
        threads_(threads),
        monitor_(monitor),
        order_(sequences.count) {}

  std::pair<uint8_t*, uint64_t> build(const Payloads& payloads) {
    fill_buckets();
    monitor_.done = 0.1;
    Arena arena(vocabulary_);
    auto* text = arena.template section_of<Symbol>(measure_.symbols);
    if (!fixed()) lengths_.resize(sequences_.count);
    in_threads(threads_, [&](int) {
      for (size_t i; (i = next_chunk_++) < chunks_.size();) sort_and_write(chunks_[i], text);
    });
    Entry entry;
    entry.num_nodes = sequences_.count > 0;
    for (const Chunk& chunk : chunks_) {
      if (entry.symbols != chunk.first_symbol) {  // there were duplicates
        std::memmove(text + entry.symbols, text + chunk.first_symbol, chunk.symbols * sizeof(Symbol));
      }
      entry.symbols += chunk.symbols;
      entry.num_sorted += chunk.keys;
      entry.num_nodes += chunk.nodes;
    }
    arena.shrink((measure_.symbols - entry.symbols) * sizeof(Symbol));
    write_rest(arena, entry, payloads);
    return arena.finish(entry);
  }

 private:
  struct Chunk {
    uint64_t begin, end, first_symbol;  // places in the order, and in the text
    uint64_t first_bucket, end_bucket = 0;
    uint64_t keys = 0, symbols = 0, nodes = 0;
  };
  struct Item {
    uint64_t word, number;  // the next symbols + 1, 0 behind the end
    bool operator<(const Item& other) const { return word != other.word ? word < other.word : number < other.number; }
  };
  static constexpr uint64_t kPerWord = 8 / sizeof(Symbol), kBits = 8 * sizeof(Symbol);
  static constexpr uint64_t kChunk = 1 << 14, kFew = 8;

  bool fixed() const { return measure_.shortest == measure_.longest; }

  uint64_t symbol(Token token) const { return vocabulary_.symbol(static_cast<uint64_t>(token)); }

  // Symbol + 1 of a sequence at a depth, 0 at its end.
  uint64_t symbol_at(uint64_t number, uint64_t depth) const {
    const Token* token = sequences_.begin(number) + depth;
    return depth < sequences_.room(number) && !sequences_.is_pad(*token) ? symbol(*token) + 1 : 0;
  }

  // Orders the numbers by their first symbol of difference, stably, and cuts them into chunks.
  void fill_buckets() {
    const uint64_t symbols = vocabulary_.by_table() ? vocabulary_.used : vocabulary_.size;
    uint64_t shift = 0;
    while (symbols >> shift >= kMaxSymbols2) ++shift;
    const uint64_t buckets = (symbols >> shift) + 2;
    std::vector<uint32_t> bucket_of(sequences_.count);
    struct Count {
      uint64_t keys = 0, symbols = 0;
    };
    std::vector<std::vector<Count>> counts(threads_, std::vector<Count>(buckets));
    in_ranges(sequences_.count, threads_, [&](uint64_t begin, uint64_t end, int t) {
      for (uint64_t i = begin; i < end; ++i) {
        if (i % 4096 == 0) monitor_.check();
        const uint64_t symbol = symbol_at(i, measure_.shared);
        bucket_of[i] = symbol == 0 ? 0 : static_cast<uint32_t>((symbol - 1) >> shift) + 1;
        Count& count = counts[t][bucket_of[i]];
        ++count.keys;
        count.symbols += fixed() ? measure_.longest : sequences_.length(i);
      }
    });
    Chunk chunk{0, 0, 0, 0};
    uint64_t place = 0, text = 0;
    for (uint64_t bucket = 0; bucket < buckets; ++bucket) {
      for (auto& count : counts) {
        const uint64_t keys = std::exchange(count[bucket].keys, place);
        place += keys;
        text += count[bucket].symbols;
      }
      bucket_ends_.push_back(place);
      chunk.end = place;
      chunk.end_bucket = bucket + 1;
      if (chunk.end - chunk.begin >= kChunk || (bucket + 1 == buckets && chunk.end > chunk.begin)) {
        chunks_.push_back(chunk);
        chunk = {place, place, text, bucket + 1};
      }
    }
    in_ranges(sequences_.count, threads_, [&](uint64_t begin, uint64_t end, int t) {
      for (uint64_t i = begin; i < end; ++i) {
        if (i % 4096 == 0) monitor_.check();
        order_.set(counts[t][bucket_of[i]].keys++, i);
      }
    });
  }

  void sort_and_write(Chunk& chunk, Symbol* text) {
    std::vector<Item> items(chunk.end - chunk.begin);
    for (uint64_t i = 0; i < items.size(); ++i) items[i].number = order_[chunk.begin + i];
    sort(items, chunk);
    Symbol* out = text + chunk.first_symbol;
    const Symbol* last = nullptr;
    uint64_t last_length = 0, shared = chunk.begin == 0 ? 0 : measure_.shared;
    for (uint64_t i = 0; i < items.size(); ++i) {
      const uint64_t number = items[i].number;
      if (i + kAhead < items.size()) __builtin_prefetch(sequences_.begin(items[i + kAhead].number));
      if (i % 4096 == 0) monitor_.check();
      const uint64_t length = sequences_.length(number);
      const Token* tokens = sequences_.begin(number);
      for (uint64_t j = 0; j < length; ++j) out[j] = static_cast<Symbol>(symbol(tokens[j]));
      if (last) shared = common_symbols(out, last, std::min(length, last_length));
      const bool repeated = last && shared == length && length == last_length;
      order_.set(chunk.begin + i, number, repeated);
      if (repeated) continue;
      if (!fixed()) lengths_[chunk.begin + i] = static_cast<uint32_t>(length);
      ++chunk.keys;
      chunk.symbols += length;
      chunk.nodes += length - shared;
      last = out, last_length = length;
      out += length;
    }
    sorted_ += items.size();
    monitor_.done = 0.1 + 0.7 * static_cast<double>(sorted_) / static_cast<double>(sequences_.count);
  }

  // Each bucket by one word of symbols, then those with the same by the next, and so on.
  void sort(std::vector<Item>& items, const Chunk& chunk) const {
    struct Group {
      uint64_t begin, end, depth;
    };
    std::vector<Group> groups;  // the next one is the last
    uint64_t bucket_end = items.size();
    for (uint64_t bucket = chunk.end_bucket; bucket-- > chunk.first_bucket;) {
      const uint64_t begin = bucket == chunk.first_bucket ? 0 : bucket_ends_[bucket - 1] - chunk.begin;
      if (bucket_end - begin > 1) groups.push_back({begin, bucket_end, measure_.shared});
      bucket_end = begin;
    }
    while (!groups.empty()) {
      const auto [begin, end, depth] = groups.back();
      groups.pop_back();
      if (end - begin <= kFew) {
        sort_few(items.data() + begin, items.data() + end, depth);
        continue;
      }
      monitor_.check();
      bool same = true;
      for (uint64_t i = begin; i < end; ++i) {
        if (i + kAhead < items.size()) __builtin_prefetch(sequences_.begin(items[i + kAhead].number) + depth);
        items[i].word = word_at(items[i].number, depth);
        same = same && items[i].word == items[begin].word;
      }
      if (!same) std::sort(items.begin() + begin, items.begin() + end);
      for (uint64_t first = begin, next; first < end; first = next) {
        next = first + 1;
        while (next < end && items[next].word == items[first].word) ++next;
        const bool ended = (items[first].word & (~uint64_t{0} >> (64 - kBits))) == 0;
        if (next - first > 1 && !ended) groups.push_back({first, next, depth + kPerWord});
      }
    }
  }

  // By insertion; the same keys stay in the order of their numbers.
  void sort_few(Item* begin, Item* end, uint64_t depth) const {
    for (Item* i = begin + 1; i < end; ++i) {
      const Item item = *i;
      Item* place = i;
      for (; place > begin && less(item.number, place[-1].number, depth); --place) *place = place[-1];
      *place = item;
    }
  }

  bool less(uint64_t a, uint64_t b, uint64_t depth) const {
    const Token *first = sequences_.begin(a), *second = sequences_.begin(b);
    const uint64_t length_a = sequences_.length(a), length_b = sequences_.length(b);
    while (depth < length_a && depth < length_b && first[depth] == second[depth]) ++depth;
    if (depth == length_a || depth == length_b) return length_a < length_b;
    return first[depth] < second[depth];
  }

  uint64_t word_at(uint64_t number, uint64_t depth) const {
    const Token* tokens = sequences_.begin(number) + depth;
    const uint64_t room = sequences_.room(number), left = room > depth ? room - depth : 0;
    uint64_t word = 0, j = 0;
    for (; j < kPerWord && j < left && !sequences_.is_pad(tokens[j]); ++j)
      word = word << kBits | (symbol(tokens[j]) + 1);
    return j == 0 ? 0 : word << kBits * (kPerWord - j);
  }

  // Everything behind the text.
  void write_rest(Arena& arena, Entry& entry, const Payloads& payloads) {
    const uint64_t count = sequences_.count, n = entry.num_sorted;
    entry.payloads = payloads.offsets ? payloads.count : count;
    const uint64_t position = position_bytes(n, entry.symbols, entry.payloads);
    arena.append(vocabulary_.table);
    uint64_t i = 0, start = 0;
    arena.append_positions(fixed() ? 0 : n + 1, position, [&](uint64_t) {
      const uint64_t here = start;
      while (i < count && order_.repeated(i)) ++i;
      if (i < count) start += lengths_[i++];
      return here;
    });
    lengths_ = {};
    const auto tables = position == 4 ? tables_of<uint32_t>(arena, n) : tables_of<uint64_t>(arena, n);
    tables.write(arena, position, entry);
    monitor_.done = 0.9;
    const bool has_offsets = write_payload_offsets(arena, n, position, payloads);
    const bool small = small_payloads(payloads);
    if (small) {
      write_payloads(arena.section_of<uint32_t>(entry.payloads), payloads);
    } else {
      write_payloads(arena.section_of<int64_t>(entry.payloads), payloads);
    }
    arena.section(0);  // passage ends
    entry.key_length = fixed() ? measure_.longest : 0;
    entry.used = vocabulary_.table.size();
    entry.num_keys = n;
    entry.depth = measure_.longest;
    entry.set_kinds(fixed() ? kFixed : kRagged, sizeof(Symbol), position, small ? 4 : 8, has_offsets);
    entry.set_root();
  }

  template <class Position>
  Tables<Symbol> tables_of(Arena& arena, uint64_t n) const {
    const auto* text = reinterpret_cast<const Symbol*>(arena.body());
    if (fixed()) return make_tables(FixedKeys<Symbol>{text, measure_.longest}, n, monitor_);
    const auto* starts = reinterpret_cast<const Position*>(arena.last_section());
    return make_tables(RaggedKeys<Symbol, Position>{text, starts}, n, monitor_);
  }

  // f(number, first): every sequence in the order of its key, and whether it is the key's first.
  template <class F>
  void for_sorted(F&& f) const {
    for (uint64_t i = 0; i < sequences_.count; ++i) {
      if (i % 65536 == 0) monitor_.check();
      f(order_[i], !order_.repeated(i));
    }
  }

  bool write_payload_offsets(Arena& arena, uint64_t n, uint64_t position, const Payloads& payloads) const {
    if (!payloads.offsets && n == sequences_.count) {
      arena.section(0);
      return false;
    }
    std::vector<uint64_t> ends;  // of the payloads of each key
    ends.reserve(n);
    uint64_t end = 0;
    for_sorted([&](uint64_t number, bool first) {
      if (first) ends.push_back(end);
      end += payloads.offsets ? static_cast<uint64_t>(payloads.offsets[number + 1] - payloads.offsets[number]) : 1;
      ends.back() = end;
    });
    bool one_each = true;
    for (uint64_t i = 0; i < n && one_each; ++i) one_each = ends[i] == i + 1;
    arena.append_positions(one_each ? 0 : n + 1, position, [&](uint64_t i) { return i == 0 ? 0 : ends[i - 1]; });
    return !one_each;
  }

  template <class Value>
  void write_payloads(Value* out, const Payloads& payloads) const {
    for_sorted([&](uint64_t number, bool) {
      if (payloads.offsets) {
        for (int64_t i = payloads.offsets[number]; i < payloads.offsets[number + 1]; ++i) {
          *out++ = static_cast<Value>(payloads.values[i]);
        }
      } else {
        *out++ = static_cast<Value>(payloads.values ? payloads.values[number] : static_cast<int64_t>(number));
      }
    });
  }

  bool small_payloads(const Payloads& payloads) const {
    if (!payloads.values) return sequences_.count <= uint64_t{1} << 32;
    return std::all_of(payloads.values, payloads.values + payloads.count,
                       [](int64_t value) { return 0 <= value && value <= int64_t{UINT32_MAX}; });
  }

  static constexpr uint64_t kAhead = 16;  // sequences to fetch ahead

  const Sequences<Token>& sequences_;
  const Vocabulary& vocabulary_;
  const Measure& measure_;
  const int threads_;
  Monitor& monitor_;
  Order order_;
  std::vector<uint32_t> lengths_;      // in the order, if they differ
  std::vector<uint64_t> bucket_ends_;  // in the order
  std::vector<Chunk> chunks_;
  std::atomic<size_t> next_chunk_{0};
  std::atomic<uint64_t> sorted_{0};
};

}  // namespace fastmix::trie
