// Weights of four and eight bits, with activations as they are or quantized to eight bits per group.
//
//   INT8    one scale per output (LLM.int8, Dettmers et al. 2022)
//   CODE4   codes into a codebook of 16, one scale per output and group of inputs (NF4 and FP4: QLoRA,
//           Dettmers et al. 2023; int4 is the codebook -7 … 7)
//
// Activations of 8 bits are symmetric, with one scale per row and group. Products of integers are exact, and
// groups are added in ascending order, so a row's bits depend on the row alone here too.
// Activations of 4 bits are emulated: fifteen values, multiplied as bytes.
//
// A panel holds 16 outputs. Four-bit codes lie in pieces of 32 bytes for four inputs: of output
// o = 8 · (lane) + 4 · (nibble) + i, input j, the byte 16 · lane + 4 · i + j. One set of codes serves both
// widths of activations.
#pragma once

#include <cmath>
#include <cstdlib>
#include <vector>

#include "clock.h"
#include "linear.h"

namespace tandem {

constexpr int PIECE_INPUTS = 4;
constexpr int PIECE_BYTES = 32;
constexpr int MAX_GROUP = 128;
// Where a codebook's 16 numbers lie in other widths, and what those of eight bits were divided by.
constexpr int BYTES_AT = 16, HALVES_AT = 20, FACTOR_AT = 28;
constexpr float INT8_MAX_F = 127.0f, INT4_MAX_F = 7.0f;

inline int group_of(const Linear& l) { return l.format == INT8 ? l.in : l.group; }
inline int groups_of(const Linear& l) { return (l.in + group_of(l) - 1) / group_of(l); }

// --- rows quantized to eight bits ---

struct Int8Rows {
    std::vector<int8_t> values;  // [rows, stride]
    std::vector<float> scales;   // [rows, groups]
    int stride, groups;

    void fill(const Linear& l, const float* x, int ldx, int rows) {
        const int group = group_of(l);
        const float factor = l.format == CODE4 ? l.codebook[FACTOR_AT] : 1.0f;
        const float top = l.activation_bits == 4 ? INT4_MAX_F : INT8_MAX_F;
        groups = groups_of(l), stride = round_up(l.in, PIECE_BYTES);
        values.assign(size_t(rows) * stride, 0);
        scales.resize(size_t(rows) * groups);
        for (int r = 0; r < rows; r++)
            for (int g = 0; g < groups; g++) {
                const float* from = x + size_t(r) * ldx + g * group;
                const int count = std::min(group, l.in - g * group);
                float most = 0.0f;
                for (int i = 0; i < count; i++) most = std::max(most, std::fabs(from[i]));
                const float scale = most / top, inverse = most > 0 ? top / most : 0.0f;
                scales[size_t(r) * groups + g] = scale * factor;
                int8_t* to = &values[size_t(r) * stride + g * group];
                for (int i = 0; i < count; i++) to[i] = int8_t(std::nearbyint(from[i] * inverse));
            }
    }
};

// --- pieces of a panel: 16 outputs, four inputs ---

#if TANDEM_AVX2

struct Piece { __m256i low, high; };  // signed bytes of outputs 0-3 and 8-11, and of 4-7 and 12-15
struct Sums { __m256i low, high; };   // int32, likewise
inline Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

inline Piece load_int8(const int8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + PIECE_BYTES))};
}

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

// sums += weights · activations. |w| · (sign of w) a: two products of 7 bits fit 16 bits, so nothing saturates.
inline __m256i dot4(__m256i weights, __m256i activations, __m256i sums) {
    const __m256i size = _mm256_abs_epi8(weights), turned = _mm256_sign_epi8(activations, weights);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, size, turned);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1)));
#endif
}
inline Sums add_products(const Piece& piece, const int8_t* four, Sums sums) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    const __m256i activations = _mm256_set1_epi32(bytes);
    return {dot4(piece.low, activations, sums.low), dot4(piece.high, activations, sums.high)};
}
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    first = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x20))};
    second = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x31))};
}

// Four inputs of a panel as halves, [4, 16]: bytes of the codebook's halves looked up apart, then joined.
struct Codebook16 {
    __m256i low, high;
    explicit Codebook16(const uint16_t* halves) {
        alignas(16) uint8_t bytes[2][16];
        for (int i = 0; i < 16; i++) bytes[0][i] = halves[i] & 255, bytes[1][i] = halves[i] >> 8;
        low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
    void unpack(const uint8_t* p, uint16_t* to) const {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
        const __m256i by_input = _mm256_broadcastsi128_si256(  // four outputs by four inputs, transposed
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i turned = _mm256_shuffle_epi8(codes, by_input);
        const __m256i a = _mm256_and_si256(turned, mask), b = _mm256_and_si256(_mm256_srli_epi16(turned, 4), mask);
        const __m256i a_low = _mm256_shuffle_epi8(low, a), a_high = _mm256_shuffle_epi8(high, a);
        const __m256i b_low = _mm256_shuffle_epi8(low, b), b_high = _mm256_shuffle_epi8(high, b);
        const __m256i a01 = _mm256_unpacklo_epi8(a_low, a_high), a23 = _mm256_unpackhi_epi8(a_low, a_high);
        const __m256i b01 = _mm256_unpacklo_epi8(b_low, b_high), b23 = _mm256_unpackhi_epi8(b_low, b_high);
        __m256i* rows = reinterpret_cast<__m256i*>(to);
        _mm256_storeu_si256(rows + 0, _mm256_unpacklo_epi64(a01, b01));
        _mm256_storeu_si256(rows + 1, _mm256_unpackhi_epi64(a01, b01));
        _mm256_storeu_si256(rows + 2, _mm256_unpacklo_epi64(a23, b23));
        _mm256_storeu_si256(rows + 3, _mm256_unpackhi_epi64(a23, b23));
    }
};

#else

inline int byte_of(int output, int input) { return output / 8 * 16 + output % 4 * 4 + input; }
struct Piece { int8_t w[PANEL][PIECE_INPUTS]; };
struct Sums { int32_t v[PANEL]; };
inline Sums no_sums() { return {}; }
inline Piece load_int8(const int8_t* p) {
    Piece piece;
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = p[o / 4 % 2 * PIECE_BYTES + byte_of(o, i)];
    return piece;
}
inline int code_of(const uint8_t* p, int output, int input) {
    return p[byte_of(output, input)] >> (output / 4 % 2 * 4) & 15;
}
struct Codebook8 {
    const int8_t* table;
    explicit Codebook8(const int8_t* bytes) : table(bytes) {}
    Piece load(const uint8_t* p) const {
        Piece piece;
        for (int o = 0; o < PANEL; o++)
            for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = table[code_of(p, o, i)];
        return piece;
    }
};
inline Sums add_products(const Piece& piece, const int8_t* four, Sums sums) {
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) sums.v[o] += int32_t(piece.w[o][i]) * four[i];
    return sums;
}
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    for (int i = 0; i < LANES; i++) first.v[i] = float(sums.v[i]), second.v[i] = float(sums.v[LANES + i]);
}
struct Codebook16 {
    const uint16_t* halves;
    explicit Codebook16(const uint16_t* table) : halves(table) {}
    void unpack(const uint8_t* p, uint16_t* to) const {
        for (int i = 0; i < PIECE_INPUTS; i++)
            for (int o = 0; o < PANEL; o++) to[i * PANEL + o] = halves[code_of(p, o, i)];
    }
};

#endif

// --- eight-bit activations ---

// R rows against one panel; `load(piece)` brings weights. y = Σ_groups (weight scale · row scale) · integer.
template <int R, class Load>
inline void multiply_int8_tile(const Linear& l, const Int8Rows& x, int row, int panel, float* y, int ldy, Load load) {
    const int group = group_of(l), groups = groups_of(l);
    const float* scales = l.scales + size_t(panel) * groups * PANEL;
    f8 first[R], second[R];
    for (int r = 0; r < R; r++) first[r] = second[r] = zero();
    for (int g = 0; g < groups; g++) {
        Sums sums[R];
        for (int r = 0; r < R; r++) sums[r] = no_sums();
        const int begin = g * group, end = std::min(l.in, begin + group);
        for (int k = begin; k < end; k += PIECE_INPUTS) {
            const Piece piece = load(k / PIECE_INPUTS);
            for (int r = 0; r < R; r++)
                sums[r] = add_products(piece, &x.values[size_t(row + r) * x.stride + k], sums[r]);
        }
        const f8 a = tandem::load(scales + g * PANEL), b = tandem::load(scales + g * PANEL + LANES);
        for (int r = 0; r < R; r++) {
            const f8 scale = set1(x.scales[size_t(row + r) * groups + g]);
            f8 low, high;
            to_floats(sums[r], low, high);
            first[r] = fma(mul(a, scale), low, first[r]);
            second[r] = fma(mul(b, scale), high, second[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        float* to = y + size_t(row + r) * ldy + panel * PANEL;
        store(to, first[r]), store(to + LANES, second[r]);
    }
}

template <class Load>
inline void multiply_int8_rows(const Linear& l, const Int8Rows& x, int rows, int panel, float* y, int ldy, Load load) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) multiply_int8_tile<4>(l, x, r, panel, y, ldy, load);
    for (; r + 2 <= rows; r += 2) multiply_int8_tile<2>(l, x, r, panel, y, ldy, load);
    for (; r < rows; r++) multiply_int8_tile<1>(l, x, r, panel, y, ldy, load);
}

inline void multiply_int8(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first, int last) {
    static thread_local Int8Rows quantized;
    Stopwatch quantizing(QUANTIZE);
    quantizing.start();
    quantized.fill(l, x, ldx, rows);
    quantizing.stop();
    const size_t pieces = (l.in + PIECE_INPUTS - 1) / PIECE_INPUTS;
    if (l.format == INT8) {
        for (int panel = first; panel < last; panel++) {
            const int8_t* weights = static_cast<const int8_t*>(l.weights) + panel * pieces * 2 * PIECE_BYTES;
            multiply_int8_rows(l, quantized, rows, panel, y, ldy,
                               [=](size_t piece) { return load_int8(weights + piece * 2 * PIECE_BYTES); });
        }
        return;
    }
    const Codebook8 codebook(reinterpret_cast<const int8_t*>(l.codebook + BYTES_AT));
    for (int panel = first; panel < last; panel++) {
        const uint8_t* codes = static_cast<const uint8_t*>(l.weights) + panel * pieces * PIECE_BYTES;
        multiply_int8_rows(l, quantized, rows, panel, y, ldy,
                           [=](size_t piece) { return codebook.load(codes + piece * PIECE_BYTES); });
    }
}

// --- activations as they are ---

// R rows (`rows`, if P is one) against P panels of codes: a group is unpacked to halves in the nearest cache, then
// multiplied.
template <int R, int P>
inline void multiply_codes(const Linear& l, const Codebook16& codebook, const float* x, int ldx, int rows, float* y,
                           int ldy, int panel) {
    alignas(64) uint16_t halves[P][MAX_GROUP * PANEL];
    alignas(64) float partial[ROW_BLOCK * P * PANEL];
    const int groups = groups_of(l);
    const size_t pieces = l.in / PIECE_INPUTS;
    Stopwatch unpacking(UNPACK);
    for (int g = 0; g < groups; g++) {
        const int begin = g * l.group, count = std::min(l.group, l.in - begin);
        unpacking.start();
        for (int p = 0; p < P; p++) {
            const uint8_t* codes =
                static_cast<const uint8_t*>(l.weights) + ((panel + p) * pieces + begin / PIECE_INPUTS) * PIECE_BYTES;
            for (int i = 0; i < count; i += PIECE_INPUTS)
                codebook.unpack(codes + i / PIECE_INPUTS * PIECE_BYTES, halves[p] + i * PANEL);
        }
        unpacking.stop();
        const size_t stride = size_t(MAX_GROUP) * PANEL;
        const float* from = x + begin;
        if constexpr (P > 1) multiply_tile<R, P>(from, ldx, halves[0], stride, count, partial, P * PANEL);
        else multiply_panel(from, ldx, rows, halves[0], count, partial, P * PANEL);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < P; p++) {
                const float* scales = l.scales + (size_t(panel + p) * groups + g) * PANEL;
                float* to = y + size_t(r) * ldy + (panel + p) * PANEL;
                for (int n = 0; n < PANEL; n += LANES) {
                    const f8 sum = load(partial + (r * P + p) * PANEL + n);
                    store(to + n, fma(load(scales + n), sum, g ? load(to + n) : zero()));
                }
            }
    }
}

inline void multiply_codes(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first, int last) {
    uint16_t halves[16];
    std::memcpy(halves, l.codebook + HALVES_AT, sizeof halves);
    const Codebook16 codebook(halves);
    for (int row = 0; row < rows; row += ROW_BLOCK) {
        const int count = std::min(ROW_BLOCK, rows - row);
        const float* from = x + size_t(row) * ldx;
        float* to = y + size_t(row) * ldy;
        int panel = first;
        auto next = [&](auto r, auto p) {
            multiply_codes<r(), p()>(l, codebook, from, ldx, count, to, ldy, panel);
            panel += p();
        };
        while (count == 1 && panel + 4 <= last) next(number<1>(), number<4>());
        while (count == 1 && panel + 2 <= last) next(number<1>(), number<2>());
        while (count == 2 && panel + 2 <= last) next(number<2>(), number<2>());
        while (panel < last) next(number<0>(), number<1>());
    }
}

inline void scale_outputs(const Linear& l, int rows, float* y, int ldy, int first, int last) {
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < last * PANEL; n += LANES) {
            float* to = y + size_t(r) * ldy + n;
            store(to, mul(load(l.scales + n), load(to)));
        }
}

inline void multiply_stored(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first, int last) {
    if (l.activation_bits <= 8) return multiply_int8(l, x, ldx, rows, y, ldy, first, last);
    if (l.format == CODE4) return multiply_codes(l, x, ldx, rows, y, ldy, first, last);
    multiply<int8_t>(l, x, ldx, rows, y, ldy, first, last);  // panels of bytes, [in, 16]
    scale_outputs(l, rows, y, ldy, first, last);
}

// --- inputs that are turned or kept apart first ---

// x times the orthonormal Hadamard matrix of a group's size, group by group.
inline void rotate(float* x, int in, int group) {
    const float scale = 1.0f / std::sqrt(float(group));
    for (float* at = x; at < x + in; at += group) {
        for (int width = 1; width < group; width *= 2)
            for (int begin = 0; begin < group; begin += 2 * width)
                for (int i = begin; i < begin + width; i++) {
                    const float a = at[i], b = at[i + width];
                    at[i] = a + b, at[i + width] = a - b;
                }
        for (int i = 0; i < group; i++) at[i] *= scale;
    }
}

// Whether rows are turned, taken apart or quantized before they are multiplied; a caller does that for all its panels.
inline bool prepares_rows(const Linear& l) { return l.activation_bits <= 8 || l.is_rotated || l.num_outliers; }

inline void multiply_quantized(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first,
                               int last) {
    if (!l.is_rotated && !l.num_outliers) return multiply_stored(l, x, ldx, rows, y, ldy, first, last);
    static thread_local std::vector<float> kept, apart, added;
    kept.resize(size_t(rows) * l.in), apart.resize(size_t(rows) * l.num_outliers);
    for (int r = 0; r < rows; r++) {
        float* to = &kept[size_t(r) * l.in];
        std::copy_n(x + size_t(r) * ldx, l.in, to);
        for (int i = 0; i < l.num_outliers; i++) {
            apart[size_t(r) * l.num_outliers + i] = to[l.outlier_inputs[i]];
            to[l.outlier_inputs[i]] = 0.0f;
        }
        if (l.is_rotated) rotate(to, l.in, l.group);
    }
    multiply_stored(l, kept.data(), l.in, rows, y, ldy, first, last);
    if (!l.num_outliers) return;
    added.resize(size_t(rows) * ldy);
    multiply_stored(*l.outliers, apart.data(), l.num_outliers, rows, added.data(), ldy, first, last);
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < last * PANEL; n++) y[size_t(r) * ldy + n] += added[size_t(r) * ldy + n];
}

}  // namespace tandem
