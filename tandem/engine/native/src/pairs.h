// Numbers in bfloat16, two by two. Products of two of them are exact in single precision, and the odd one is added
// first: vdpbf16ps does both in one instruction, with the bits that two fused multiply-adds have.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace tandem {

struct Pair { uint32_t bits; };  // the one with the even index in the lower half
constexpr uint32_t ODD = 0xffff0000u;

// The nearest bfloat16 (to even), a float's upper half. What is too small for a normal float becomes zero, which is what
// the instruction takes it for.
inline uint32_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t size = bits & 0x7fffffff, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t number = size < 0x00800000 ? 0 : rounded;
    return size > 0x7f800000 ? bits >> 16 | 0x40 : number;
}

#if TANDEM_AVX512

struct pairs16 { __m512i v; };  // of 16 outputs
inline pairs16 load16(const Pair* p) { return {_mm512_loadu_si512(p)}; }

#if defined(__AVX512BF16__)
struct pair_b16 { __m512i v; };  // one pair in every lane
inline pair_b16 broadcast16(const Pair* p) { return {_mm512_set1_epi32(int(p->bits))}; }
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
    return acc;
}
#else
inline __m512 evens(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odds(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(ODD))));
}
struct pair_b16 { __m512 even, odd; };
inline pair_b16 broadcast16(const Pair* p) {
    const __m512i bits = _mm512_set1_epi32(int(p->bits));
    return {evens(bits), odds(bits)};
}
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) {
    return {_mm512_fmadd_ps(evens(w.v), x.even, _mm512_fmadd_ps(odds(w.v), x.odd, acc.v))};
}
#endif

#else

#if TANDEM_AVX2
inline __m256i load_bits(const Pair* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline f8 evens(const Pair* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p), 16))}; }
inline f8 odds(const Pair* p) {
    return {_mm256_castsi256_ps(_mm256_and_si256(load_bits(p), _mm256_set1_epi32(int(ODD))))};
}
#else
inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline f8 evens(const Pair* p) {
    f8 r;
    for (int i = 0; i < LANES; i++) r.v[i] = of_bits(p[i].bits << 16);
    return r;
}
inline f8 odds(const Pair* p) {
    f8 r;
    for (int i = 0; i < LANES; i++) r.v[i] = of_bits(p[i].bits & ODD);
    return r;
}
#endif

struct pairs16 { p16 even, odd; };
struct pair_b16 { b16 even, odd; };
inline pairs16 load16(const Pair* p) { return {{evens(p), evens(p + LANES)}, {odds(p), odds(p + LANES)}}; }
inline pair_b16 broadcast16(const Pair* p) {
    const uint32_t bits[] = {p->bits << 16, p->bits & ODD};
    float numbers[2];
    std::memcpy(numbers, bits, sizeof numbers);
    return {broadcast16(numbers), broadcast16(numbers + 1)};
}
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) { return fma(w.even, x.even, fma(w.odd, x.odd, acc)); }

#endif

}  // namespace tandem
