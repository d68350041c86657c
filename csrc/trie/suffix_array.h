// The suffix array in linear time by induced sorting (Nong, Zhang and Chan 2009, "Linear suffix array construction by
// almost pure induced-sorting").
#pragma once

#include <vector>

#include "trie/monitor.h"

namespace fastmix::trie {

// Where the suffixes of a text of numbers 0 … largest start, in order; a suffix is below its extensions.
template <class Int>
std::vector<Int> suffix_array(const std::vector<Int>& text, Int largest, const Monitor& monitor) {
  constexpr Int kChecked = 1 << 20;  // so many steps between looks at the monitor
  const Int n = static_cast<Int>(text.size());
  if (n == 0) return {};
  if (n == 1) return {0};
  // A suffix is small if it is below the one that starts behind it. Those that are small behind a large one ("left-most
  // small", LMS) sort all others.
  std::vector<bool> small(n);
  for (Int i = n - 2; i >= 0; --i) small[i] = text[i] == text[i + 1] ? small[i + 1] : text[i] < text[i + 1];
  const auto is_lms = [&](Int i) { return i > 0 && small[i] && !small[i - 1]; };
  std::vector<Int> large_begin(largest + 2), small_begin(largest + 2);  // in the bucket of each first number
  for (const Int number : text) ++large_begin[number + 1];
  for (Int number = 0; number <= largest; ++number) large_begin[number + 1] += large_begin[number];
  for (Int i = 0; i < n; ++i) small_begin[text[i]] += !small[i];
  for (Int number = 0; number <= largest; ++number) small_begin[number] += large_begin[number];

  std::vector<Int> sorted(n), place;
  const auto induce = [&](const std::vector<Int>& lms) {
    std::fill(sorted.begin(), sorted.end(), Int{-1});
    place = small_begin;
    for (const Int i : lms) sorted[place[text[i]]++] = i;
    place = large_begin;
    sorted[place[text[n - 1]]++] = n - 1;
    for (Int k = 0; k < n; ++k) {
      if (k % kChecked == 0) monitor.check();
      const Int i = sorted[k];
      if (i > 0 && !small[i - 1]) sorted[place[text[i - 1]]++] = i - 1;
    }
    place.assign(large_begin.begin() + 1, large_begin.end());  // ends
    for (Int k = n - 1; k >= 0; --k) {
      if (k % kChecked == 0) monitor.check();
      const Int i = sorted[k];
      if (i > 0 && small[i - 1]) sorted[--place[text[i - 1]]] = i - 1;
    }
  };

  std::vector<Int> lms, number_of(n, -1);
  for (Int i = 1; i < n; ++i) {
    if (!is_lms(i)) continue;
    number_of[i] = static_cast<Int>(lms.size());
    lms.push_back(i);
  }
  induce(lms);
  if (lms.empty()) return sorted;

  // Names of the pieces of text between LMS places, in their order; then the order of the suffixes of names.
  const Int count = static_cast<Int>(lms.size());
  std::vector<Int> ordered, names(count);
  ordered.reserve(count);
  for (const Int i : sorted) {
    if (number_of[i] >= 0) ordered.push_back(i);
  }
  const auto piece_end = [&](Int i) { return number_of[i] + 1 < count ? lms[number_of[i] + 1] : n; };
  Int name = 0;
  names[number_of[ordered[0]]] = 0;
  for (Int k = 1; k < count; ++k) {
    Int a = ordered[k - 1], b = ordered[k];
    const Int end_a = piece_end(a), end_b = piece_end(b);
    bool same = end_a - a == end_b - b;
    if (same) {
      while (a < end_a && text[a] == text[b]) ++a, ++b;
      same = b < n && a < n && text[a] == text[b];
    }
    name += !same;
    names[number_of[ordered[k]]] = name;
  }
  std::vector<Int>().swap(number_of);
  const std::vector<Int> order = suffix_array(names, name, monitor);
  for (Int k = 0; k < count; ++k) ordered[k] = lms[order[k]];
  induce(ordered);
  return sorted;
}

}  // namespace fastmix::trie
