// Vectors of the ISA's native width, as plain compiler vectors: load, store and convert the element
// types, whole or only the first n lanes, and sum them in an order that depends on nothing else.
// To be included by *.isa.cpp only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

#if defined(UDL_X86)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header starts results from an undefined register and then warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(UDL_ISA_avx512) || defined(UDL_ISA_avx512_bf16)
#define UDL_AVX512 1
#define UDL_VECTOR_BYTES 64
#elif defined(UDL_ISA_avx2)
#define UDL_VECTOR_BYTES 32
#else
#define UDL_VECTOR_BYTES 16
#endif

#define UDL_INLINE inline __attribute__((always_inline))
#define UDL_LAMBDA __attribute__((always_inline))

namespace udl::UDL_ISA {

typedef float f32v __attribute__((vector_size(UDL_VECTOR_BYTES)));
typedef double f64v __attribute__((vector_size(UDL_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(UDL_VECTOR_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(UDL_VECTOR_BYTES)));
typedef int64_t i64v __attribute__((vector_size(UDL_VECTOR_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(UDL_VECTOR_BYTES / 2)));

template <class A>
struct Simd;
template <>
struct Simd<float> {
  using vec = f32v;
  using mask = i32v;
};
template <>
struct Simd<double> {
  using vec = f64v;
  using mask = i64v;
};
template <class A>
using vec_t = typename Simd<A>::vec;
template <class A>
constexpr int kLanes = UDL_VECTOR_BYTES / sizeof(A);

// Tags for whole vectors or packs and for the last n elements of a row.
struct Full {};
struct Tail {
  int n;
};

template <class To, class From>
UDL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
UDL_INLINE vec_t<A> splat(A value) {
  return vec_t<A>{} + value;
}

// Lanes below n of value, zero above.
template <class A>
UDL_INLINE vec_t<A> first_lanes(vec_t<A> value, int n) {
  typename Simd<A>::mask index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return bit_cast<vec_t<A>>(bit_cast<typename Simd<A>::mask>(value) & (index < n));
}
// 16-bit lanes to and from 32-bit ones. (GCC 12 splits __builtin_convertvector into quarters, which
// made the bfloat16 kernels three times slower.)
#if defined(UDL_AVX512)
UDL_INLINE u32v widen_lanes(u16v v) { return (u32v)_mm512_cvtepu16_epi32((__m256i)v); }
UDL_INLINE u16v narrow_lanes(u32v v) {
  __m256i narrow = _mm512_cvtepi32_epi16((__m512i)v);
  // Keeps vpmovdw in registers: its form with a memory destination takes tens of cycles on Zen.
  __asm__("" : "+v"(narrow));
  return (u16v)narrow;
}
#elif defined(UDL_ISA_avx2)
UDL_INLINE u32v widen_lanes(u16v v) { return (u32v)_mm256_cvtepu16_epi32((__m128i)v); }
UDL_INLINE u16v narrow_lanes(u32v v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (u16v)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}
#else
UDL_INLINE u32v widen_lanes(u16v v) { return __builtin_convertvector(v, u32v); }
UDL_INLINE u16v narrow_lanes(u32v v) { return __builtin_convertvector(v, u16v); }
#endif

UDL_INLINE f32v from_bits(u16v bits, bf16) { return bit_cast<f32v>(widen_lanes(bits) << 16); }

// Round to nearest even, in the upper half; a NaN keeps its sign and stays quiet.
UDL_INLINE u32v round_bits(f32v value) {
  const u32v x = bit_cast<u32v>(value);
  const u32v rounded = x + 0x7fffu + ((x >> 16) & 1u);
  return value != value ? x | 0x400000u : rounded;
}
UDL_INLINE u16v to_bits(f32v value, bf16) { return narrow_lanes(round_bits(value) >> 16); }

#if defined(UDL_AVX512)
UDL_INLINE f32v from_bits(u16v bits, f16) {
  return (f32v)_mm512_cvtph_ps((__m256i)bits);
}
UDL_INLINE u16v to_bits(f32v value, f16) {
  return (u16v)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(UDL_ISA_avx2)
UDL_INLINE f32v from_bits(u16v bits, f16) {
  return (f32v)_mm256_cvtph_ps((__m128i)bits);
}
UDL_INLINE u16v to_bits(f32v value, f16) {
  return (u16v)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Without conversion instructions: move the exponent by a product with 2^112 (exact, also for
// subnormal halves), and give Inf and NaN back their all-ones exponent.
UDL_INLINE f32v from_bits(u16v bits, f16) {
  const u32v h = widen_lanes(bits);
  const u32v magnitude = (h & 0x7fffu) << 13;
  const u32v scaled = bit_cast<u32v>(bit_cast<f32v>(magnitude) * 0x1p112f);
  const u32v special = bit_cast<u32v>(magnitude >= 0x0f800000u);
  return bit_cast<f32v>(scaled | (special & 0x7f800000u) | ((h & 0x8000u) << 16));
}
UDL_INLINE u16v to_bits(f32v value, f16) {
  const u32v x = bit_cast<u32v>(value);
  const u32v sign = (x >> 16) & 0x8000u;
  const u32v magnitude = x & 0x7fffffffu;
  // Subnormal halves: adding 0.5 lines the mantissa up, and the addition itself rounds.
  const u32v small = bit_cast<u32v>(bit_cast<f32v>(magnitude) + 0.5f) - 0x3f000000u;
  const u32v normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32v is_small = bit_cast<u32v>(magnitude < 0x38800000u);
  const u32v is_big = bit_cast<u32v>(magnitude >= 0x477ff000u);
  const u32v is_nan = bit_cast<u32v>(magnitude > 0x7f800000u);
  u32v half = (small & is_small) | (normal & ~is_small);
  half = (half & ~is_big) | (0x7c00u & is_big);
  half = half | (is_nan & 0x0200u);
  return narrow_lanes(half | sign);
}
#endif

UDL_INLINE f32v load(const float* p, Full) {
  f32v v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
UDL_INLINE f64v load(const double* p, Full) {
  f64v v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
UDL_INLINE f32v load(const T* p, Full) {
  u16v bits;
  std::memcpy(&bits, p, sizeof(bits));
  return from_bits(bits, T{});
}
UDL_INLINE void store(float* p, f32v v, Full) { std::memcpy(p, &v, sizeof(v)); }
UDL_INLINE void store(double* p, f64v v, Full) { std::memcpy(p, &v, sizeof(v)); }
template <class T>
UDL_INLINE void store(T* p, f32v v, Full) {
  const u16v bits = to_bits(v, T{});
  std::memcpy(p, &bits, sizeof(bits));
}

#if defined(UDL_AVX512)
UDL_INLINE f32v load(const float* p, Tail t) {
  return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << t.n) - 1), p);
}
UDL_INLINE f64v load(const double* p, Tail t) {
  return (f64v)_mm512_maskz_loadu_pd((__mmask8)((1u << t.n) - 1), p);
}
template <class T>
UDL_INLINE f32v load(const T* p, Tail t) {
  return from_bits((u16v)_mm256_maskz_loadu_epi16((__mmask16)((1u << t.n) - 1), p), T{});
}
UDL_INLINE void store(float* p, f32v v, Tail t) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << t.n) - 1), (__m512)v);
}
UDL_INLINE void store(double* p, f64v v, Tail t) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << t.n) - 1), (__m512d)v);
}
template <class T>
UDL_INLINE void store(T* p, f32v v, Tail t) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << t.n) - 1), (__m256i)to_bits(v, T{}));
}
#else
template <class T>
UDL_INLINE auto load(const T* p, Tail t) {
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(t.n) * sizeof(T));
  return load(static_cast<const T*>(lanes), Full{});
}
template <class T>
UDL_INLINE void store(T* p, vec_t<acc_t<T>> v, Tail t) {
  T lanes[kLanes<acc_t<T>>];
  store(static_cast<T*>(lanes), v, Full{});
  std::memcpy(p, lanes, static_cast<size_t>(t.n) * sizeof(T));
}
#endif

// Fetch the cache line at p for reading, or for writing.
UDL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
UDL_INLINE void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// The value as it would read back after a store as T.
UDL_INLINE f32v round_to(f32v v, float) { return v; }
UDL_INLINE f64v round_to(f64v v, double) { return v; }
template <class T>
UDL_INLINE f32v round_to(f32v v, T) {
  return from_bits(to_bits(v, T{}), T{});
}

template <class T>
UDL_INLINE acc_t<T> load_one(const T* p) {
  return load(p, Tail{1})[0];
}
template <class T>
UDL_INLINE void store_one(T* p, acc_t<T> value) {
  store(p, splat<acc_t<T>>(value), Tail{1});
}

// Sum of the lanes: halves are added, then halves of that.
UDL_INLINE float sum_lanes(f32v v) {
#if UDL_VECTOR_BYTES == 64
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif UDL_VECTOR_BYTES == 32
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
  return v[0];
}
UDL_INLINE double sum_lanes(f64v v) {
#if UDL_VECTOR_BYTES == 64
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#elif UDL_VECTOR_BYTES == 32
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
  v += __builtin_shufflevector(v, v, 1, 0
#if UDL_VECTOR_BYTES >= 32
                               ,
                               3, 2
#endif
#if UDL_VECTOR_BYTES == 64
                               ,
                               5, 4, 7, 6
#endif
  );
  return v[0];
}

// Two vectors, the unit the kernels work in. A pack of bfloat16 holds the even elements in `a` and
// the odd ones in `b`: apart they convert with a shift or a mask, which halves the time of a pass
// over a cached row against widening them in order. Packs of the other types are in order.
template <class A>
struct Pack {
  vec_t<A> a, b;
};
template <class T>
constexpr int kPack = 2 * kLanes<acc_t<T>>;
template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, bf16>;

#define UDL_PACK_OPERATOR(op)                                            \
  template <class A>                                                     \
  UDL_INLINE Pack<A> operator op(Pack<A> x, Pack<A> y) {                 \
    return {x.a op y.a, x.b op y.b};                                     \
  }                                                                      \
  template <class A>                                                     \
  UDL_INLINE Pack<A> operator op(Pack<A> x, A y) {                       \
    return {x.a op y, x.b op y};                                         \
  }                                                                      \
  template <class A>                                                     \
  UDL_INLINE Pack<A> operator op(A x, Pack<A> y) {                       \
    return {x op y.a, x op y.b};                                         \
  }
UDL_PACK_OPERATOR(+)
UDL_PACK_OPERATOR(-)
UDL_PACK_OPERATOR(*)
UDL_PACK_OPERATOR(/)
#undef UDL_PACK_OPERATOR

// The pack as a rounded result: keeps the compiler from fusing the product that made it into a
// following sum.
template <class A>
UDL_INLINE Pack<A> rounded(Pack<A> p) {
#if defined(UDL_AVX512)
  __asm__("" : "+v"(p.a), "+v"(p.b));
#elif defined(UDL_X86)
  __asm__("" : "+x"(p.a), "+x"(p.b));
#elif defined(__aarch64__)
  __asm__("" : "+w"(p.a), "+w"(p.b));
#endif
  return p;
}

// How many of the first n elements of a pack of T lie in `a` and in `b`.
template <class T>
UDL_INLINE int in_a(int n) {
  constexpr int L = kLanes<acc_t<T>>;
  return kEvenOdd<T> ? (n + 1) / 2 : n < L ? n : L;
}
template <class T>
UDL_INLINE int in_b(int n) {
  return n - in_a<T>(n);
}

// The pack with zeros beyond a tail.
template <class T>
UDL_INLINE Pack<acc_t<T>> keep(Pack<acc_t<T>> p, Full) {
  return p;
}
template <class T>
UDL_INLINE Pack<acc_t<T>> keep(Pack<acc_t<T>> p, Tail t) {
  using A = acc_t<T>;
  return {first_lanes<A>(p.a, in_a<T>(t.n)), first_lanes<A>(p.b, in_b<T>(t.n))};
}

template <class T>
UDL_INLINE Pack<acc_t<T>> load_pack(const T* p, Full) {
  if constexpr (kEvenOdd<T>) {
    u32v bits;
    std::memcpy(&bits, p, sizeof(bits));
    return {bit_cast<f32v>(bits << 16), bit_cast<f32v>(bits & 0xffff0000u)};
  } else {
    return {load(p, Full{}), load(p + kLanes<acc_t<T>>, Full{})};
  }
}
// A pack of bfloat16 back in memory's order.
UDL_INLINE u32v pack_bits(Pack<float> v) {
#if defined(UDL_ISA_avx512_bf16)
  // Rounds as to_bits does, except that results below 2^-126 become zero.
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
      19, 3, 18, 2, 17, 1, 16, 0);
  return (u32v)_mm512_permutexvar_epi16(order, packed);
#else
  return (round_bits(v.a) >> 16) | (round_bits(v.b) & 0xffff0000u);
#endif
}

template <class T>
UDL_INLINE void store_pack(T* p, Pack<acc_t<T>> v, Full) {
  if constexpr (kEvenOdd<T>) {
    const u32v bits = pack_bits(v);
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    store(p, v.a, Full{});
    store(p + kLanes<acc_t<T>>, v.b, Full{});
  }
}
template <class T>
UDL_INLINE Pack<acc_t<T>> load_pack(const T* p, Tail t) {
  if constexpr (kEvenOdd<T>) {
#if defined(UDL_AVX512)
    const u32v bits = (u32v)_mm512_maskz_loadu_epi16((1u << t.n) - 1, p);
    return {bit_cast<f32v>(bits << 16), bit_cast<f32v>(bits & 0xffff0000u)};
#else
    T part[kPack<T>] = {};
    std::memcpy(part, p, static_cast<size_t>(t.n) * sizeof(T));
    return load_pack(static_cast<const T*>(part), Full{});
#endif
  } else {
    return {load(p, Tail{in_a<T>(t.n)}), load(p + kLanes<acc_t<T>>, Tail{in_b<T>(t.n)})};
  }
}
template <class T>
UDL_INLINE void store_pack(T* p, Pack<acc_t<T>> v, Tail t) {
  if constexpr (kEvenOdd<T>) {
#if defined(UDL_AVX512)
    _mm512_mask_storeu_epi16(p, (1u << t.n) - 1, (__m512i)pack_bits(v));
#else
    T part[kPack<T>];
    store_pack(static_cast<T*>(part), v, Full{});
    std::memcpy(p, part, static_cast<size_t>(t.n) * sizeof(T));
#endif
  } else {
    store(p, v.a, Tail{in_a<T>(t.n)});
    store(p + kLanes<acc_t<T>>, v.b, Tail{in_b<T>(t.n)});
  }
}

// The value as it would read back after a store as T.
template <class T>
UDL_INLINE Pack<acc_t<T>> round_pack(Pack<acc_t<T>> v) {
  return {round_to(v.a, T{}), round_to(v.b, T{})};
}

template <class T>
UDL_INLINE void prefetch_pack(const T* p) {
  prefetch(p);
  if (sizeof(T) * kPack<T> > 64) prefetch(p + kPack<T> / 2);
}
template <class T>
UDL_INLINE void prefetch_pack_write(const T* p) {
  prefetch_write(p);
  if (sizeof(T) * kPack<T> > 64) prefetch_write(p + kPack<T> / 2);
}

// body(i, Full) over whole packs of a row of n elements, then body(i, Tail) once for the rest.
template <class T, class Body>
UDL_INLINE void for_packs(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kPack<T> <= n; i += kPack<T>) body(i, Full{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// The sum over a row of term(i, tag), whose elements beyond a tail must be zero. Four running sums
// hide the latency of the addition; the order depends on n alone.
template <class T, class Term>
UDL_INLINE acc_t<T> sum_packs(int64_t n, Term term) {
  using A = acc_t<T>;
  constexpr int64_t P = kPack<T>;
  Pack<A> s{}, t{};
  int64_t i = 0;
  for (; i + 2 * P <= n; i += 2 * P) {
    s = s + term(i, Full{});
    t = t + term(i + P, Full{});
  }
  if (i + P <= n) {
    s = s + term(i, Full{});
    i += P;
  }
  if (i < n) t = t + term(i, Tail{static_cast<int>(n - i)});
  return sum_lanes((s.a + s.b) + (t.a + t.b));
}

}  // namespace udl::UDL_ISA

#include "pack_order.isa.h"
