// Pieces in two registers each, multiplied by AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace tandem {

struct Piece { __m256i low, high; };  // signed bytes of outputs 0-3 and 8-11, and of 4-7 and 12-15
struct Sums { __m256i low, high; };   // int32, likewise
// Signed words of outputs 0, 1, 8 and 9; 2, 3, 10 and 11; 4, 5, 12 and 13; 6, 7, 14 and 15.
struct WidePiece { __m256i a, b, c, d; };
struct WideSums { __m256i a, b, c, d; };  // int32 of inputs 0 and 1, and of inputs 2 and 3, of these outputs
template <class T>
constexpr int int_tile_rows = sizeof(T) == 1 ? 4 : 2;
constexpr int WEIGHT_OFFSET = 0;
inline void clear(Sums& sums, int32_t) { sums.low = sums.high = _mm256_setzero_si256(); }
inline void clear(WideSums& sums, int32_t) { sums.a = sums.b = sums.c = sums.d = _mm256_setzero_si256(); }

inline Piece load_int8(const int8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + PIECE_BYTES))};
}

// Member by member: compilers copy a struct through the stack.
inline Piece copied(const Piece& p) { return {p.low, p.high}; }
inline WidePiece copied(const WidePiece& p) { return {p.a, p.b, p.c, p.d}; }

// Codes through a table of 16 bytes.
struct Codebook8 {
    __m256i table;
    explicit Codebook8(const int8_t* bytes)
        : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {}
    Piece load(const uint8_t* p) const {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
        return {_mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask))};
    }
};

using Table = Codebook8;

// sums += weights · activations. |w| · (sign of w) a: two products of 7 bits fit 16 bits, so nothing saturates.
inline __m256i dot4(__m256i weights, __m256i activations, __m256i sums) {
    const __m256i size = _mm256_abs_epi8(weights), turned = _mm256_sign_epi8(activations, weights);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1)));
}
inline void add_products(const Piece& piece, const int8_t* four, Sums& sums) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    const __m256i activations = _mm256_set1_epi32(bytes);
    sums.low = dot4(piece.low, activations, sums.low), sums.high = dot4(piece.high, activations, sums.high);
}

// sums + the products of neighbours, which are added.
inline __m256i dot2(__m256i weights, __m256i activations, __m256i sums) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(weights, activations));
    __asm__("" : "+x"(sums));  // here and now: compilers collect all products first, and run out of registers
    return sums;
}
inline void add_products(const WidePiece& piece, const int16_t* four, WideSums& sums) {
    int64_t words;
    std::memcpy(&words, four, sizeof words);
    const __m256i x = _mm256_set1_epi64x(words);
    sums = {dot2(piece.a, x, sums.a), dot2(piece.b, x, sums.b), dot2(piece.c, x, sums.c), dot2(piece.d, x, sums.d)};
}
inline const Sums& added_up(const Sums& sums) { return sums; }
inline Sums added_up(const WideSums& s) { return {_mm256_hadd_epi32(s.a, s.b), _mm256_hadd_epi32(s.c, s.d)}; }
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    first = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x20))};
    second = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x31))};
}

// Bytes of a piece, their upper halves apart.
inline WidePiece joined(const Piece& lower, const Piece& upper) {
    return {_mm256_unpacklo_epi8(lower.low, upper.low), _mm256_unpackhi_epi8(lower.low, upper.low),
            _mm256_unpacklo_epi8(lower.high, upper.high), _mm256_unpackhi_epi8(lower.high, upper.high)};
}
inline WidePiece widened(const Piece& piece) {
    const __m256i none = _mm256_setzero_si256();
    return joined(piece, {_mm256_cmpgt_epi8(none, piece.low), _mm256_cmpgt_epi8(none, piece.high)});
}

}  // namespace tandem
