// Philox4x32-10 (Salmon et al., 2011): the counter-based generator behind dropout, the same bits as
// udlkernels/_philox.py and Triton's tl.philox.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace udl {

// Dropout of row elements: element col of a row uses word col % 4 of counter (col / 4, row).
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // an element is dropped where its word is below p * 2^32
  double scale = 1.0;      // 1 / (1 - p); 0 for p = 1
  bool active = false;
};

// keep[i] = scale or 0 for elements [4 * first, 4 * (first + kGroups)) of a row.
template <int kGroups, class A>
UDL_ALWAYS_INLINE void dropout_factors(const Dropout& dropout, int64_t row, int64_t first, A* keep) {
  uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  uint32_t k0 = static_cast<uint32_t>(dropout.seed);
  uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int i = 0; i < kGroups; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kGroups; ++i) {
      const uint64_t a = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t b = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      const uint32_t hi_a = static_cast<uint32_t>(a >> 32), lo_a = static_cast<uint32_t>(a);
      const uint32_t hi_b = static_cast<uint32_t>(b >> 32), lo_b = static_cast<uint32_t>(b);
      c0[i] = hi_b ^ c1[i] ^ k0;
      c1[i] = lo_b;
      c2[i] = hi_a ^ c3[i] ^ k1;
      c3[i] = lo_a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const A scale = static_cast<A>(dropout.scale);
  for (int i = 0; i < kGroups; ++i) {
    keep[4 * i] = c0[i] < dropout.threshold ? A(0) : scale;
    keep[4 * i + 1] = c1[i] < dropout.threshold ? A(0) : scale;
    keep[4 * i + 2] = c2[i] < dropout.threshold ? A(0) : scale;
    keep[4 * i + 3] = c3[i] < dropout.threshold ? A(0) : scale;
  }
}

}  // namespace udl
