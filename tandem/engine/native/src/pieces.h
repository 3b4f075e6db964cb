// Pieces of quantized weights, and their exact products with quantized activations.
//
// A panel holds 16 outputs. Weights lie in pieces of four inputs: of output o = 8 · (lane) + 4 · (nibble) + i, input
// j, the byte 16 · lane + 4 · i + j of 32; the nibbles of INT8 are bytes, 32 of them after the other.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace tandem {

constexpr int PIECE_INPUTS = 4;
constexpr int PIECE_BYTES = 32;

}  // namespace tandem

#if TANDEM_AVX512
#include "pieces_avx512.h"
#elif TANDEM_AVX2
#include "pieces_avx2.h"
#else
#include "pieces_plain.h"
#endif

namespace tandem {

// What products with activations of a type are summed up in.
template <class T>
using SumsOf = std::conditional_t<sizeof(T) == 1, Sums, WideSums>;

#if !TANDEM_AVX512
// The scales of a panel, and a row's totals.
struct Scales { f8 first, second; };
struct Totals { f8 first, second; };
inline Scales load_scales(const float* p) { return {load(p), load(p + LANES)}; }
inline void clear(Totals& totals) { totals.first = totals.second = zero(); }
inline void add_scaled(Totals& totals, const Scales& scales, float factor, const Sums& sums) {
    f8 first, second;
    to_floats(sums, first, second);
    totals.first = fma(mul(scales.first, set1(factor)), first, totals.first);
    totals.second = fma(mul(scales.second, set1(factor)), second, totals.second);
}
inline void store(float* p, const Totals& totals) { store(p, totals.first), store(p + LANES, totals.second); }
#endif

#if TANDEM_AVX2
// Codes through a table of 16 words, whose bytes are looked up apart.
struct Codebook16 {
    Table lower, upper;
    explicit Codebook16(const int16_t* words) : lower(bytes_of(words, 0).data()), upper(bytes_of(words, 8).data()) {}
    WidePiece load(const uint8_t* p) const { return joined(lower.load(p), upper.load(p)); }

   private:
    static std::array<int8_t, 16> bytes_of(const int16_t* words, int shift) {
        std::array<int8_t, 16> bytes;
        for (int i = 0; i < 16; i++) bytes[i] = int8_t(words[i] >> shift);
        return bytes;
    }
};
#endif

}  // namespace tandem
