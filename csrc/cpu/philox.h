// Philox4x32-10, a counter-based generator: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include "common/simd.h"

namespace fastmix {

// The four words of kLanes counters (c0[lane], c1, c2, c3).
struct PhiloxWords {
  UVec word[4];
};

inline PhiloxWords philox(UVec c0, uint32_t counter1, uint32_t counter2, uint32_t counter3, uint64_t key) {
  using Wide = uint64_t __attribute__((vector_size(kLanes * sizeof(uint64_t))));
  UVec c1 = UVec{} + counter1, c2 = UVec{} + counter2, c3 = UVec{} + counter3;
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const Wide product0 = __builtin_convertvector(c0, Wide) * 0xD2511F53u;
    const Wide product1 = __builtin_convertvector(c2, Wide) * 0xCD9E8D57u;
    const UVec next0 = __builtin_convertvector(product1 >> 32, UVec) ^ c1 ^ k0;
    const UVec next2 = __builtin_convertvector(product0 >> 32, UVec) ^ c3 ^ k1;
    c1 = __builtin_convertvector(product1, UVec);
    c3 = __builtin_convertvector(product0, UVec);
    c0 = next0;
    c2 = next2;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastmix
