// Weights of four and eight bits, with activations quantized to sixteen, eight or four bits per row and group.
//
//   INT8    one scale per output (LLM.int8, Dettmers et al. 2022)
//   CODE4   codes into a codebook of 16, one scale per output and group of inputs (NF4 and FP4: QLoRA,
//           Dettmers et al. 2023; int4 is the codebook -7 … 7)
//
// Products and their sums over a group are exact integers, and groups are added in ascending order, so a row's bits
// depend on the row alone here too. Activations are symmetric: sixteen bits lose less than half precision would of
// all but the smallest of a group. Activations of 4 bits are emulated: fifteen values, multiplied as bytes.
#pragma once

#include <cmath>
#include <vector>

#include "clock.h"
#include "int_rows.h"
#include "linear.h"
#include "pieces.h"

namespace tandem {

// --- products ---

// Rows that were quantized, and the weights of a panel with the bytes of a piece.
template <class T>
struct Operands {
    const T* values;
    const float* scales;
    int stride, groups;
    const uint8_t* weights;
    int piece_bytes;
};

// R rows against one panel; `load(bytes)` brings a piece. y = Σ_groups (weight scale · row scale) · integer.
// Not inlined: within the loops around it, its own runs at three quarters of the speed.
template <int R, class S, class T, class Load>
__attribute__((noinline)) void multiply_int_tile(const Linear& l, const Operands<T>& o, int row, int panel, float* y,
                                                 int ldy, Load load) {
    const int group = group_of(l), in = l.in, stride = o.stride, step = o.piece_bytes;
    const T* x = o.values + size_t(row) * stride;
    const uint8_t* weights = o.weights;
    const float* scales = l.scales + size_t(panel) * (l.format == CODE4 ? o.groups : 1) * PANEL;
    f8 first[R], second[R];
    for (int r = 0; r < R; r++) first[r] = second[r] = zero();
    for (int g = 0; g < o.groups; g++) {
        S sums[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) clear(sums[r]);
        const T* end = x + std::min(group, in - g * group);
        for (; x < end; x += PIECE_INPUTS, weights += step) {
            __builtin_prefetch(weights + AHEAD);
            const auto piece = load(weights);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) add_products(piece, x + size_t(r) * stride, sums[r]);
        }
        const f8 a = tandem::load(scales), b = tandem::load(scales + LANES);
        if (l.format == CODE4) scales += PANEL;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const f8 scale = set1(o.scales[size_t(row + r) * o.groups + g]);
            f8 low, high;
            to_floats(added_up(sums[r]), low, high);
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
inline void multiply_in_tiles(const Linear& l, const Operands<int8_t>& o, int rows, int panel, float* y, int ldy,
                              Load load) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) multiply_int_tile<4, Sums>(l, o, r, panel, y, ldy, load);
    for (; r + 2 <= rows; r += 2) multiply_int_tile<2, Sums>(l, o, r, panel, y, ldy, load);
    for (; r < rows; r++) multiply_int_tile<1, Sums>(l, o, r, panel, y, ldy, load);
}
template <class Load>
inline void multiply_in_tiles(const Linear& l, const Operands<int16_t>& o, int rows, int panel, float* y, int ldy,
                              Load load) {
    int r = 0;
    for (; r + 2 <= rows; r += 2) multiply_int_tile<2, WideSums>(l, o, r, panel, y, ldy, load);
    for (; r < rows; r++) multiply_int_tile<1, WideSums>(l, o, r, panel, y, ldy, load);
}

// All rows against panels [first, last).
template <class T, class Load>
inline void multiply_ints(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first, int last,
                          int piece_bytes, Load load) {
    static thread_local IntRows<T> quantized;
    Stopwatch quantizing(QUANTIZE);
    quantizing.start();
    quantized.fill(l, x, ldx, rows);
    quantizing.stop();
    const size_t panel_bytes = size_t(l.in + PIECE_INPUTS - 1) / PIECE_INPUTS * piece_bytes;
    const uint8_t* weights = static_cast<const uint8_t*>(l.weights);
    for (int panel = first; panel < last; panel++) {
        const Operands<T> operands{quantized.values.data(), quantized.scales.data(),       quantized.stride,
                                   quantized.groups,        weights + panel * panel_bytes, piece_bytes};
        multiply_in_tiles(l, operands, rows, panel, y, ldy, load);
    }
}

inline void scale_outputs(const Linear& l, int rows, float* y, int ldy, int first, int last) {
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < last * PANEL; n += LANES) {
            float* to = y + size_t(r) * ldy + n;
            store(to, mul(load(l.scales + n), load(to)));
        }
}

inline void multiply_stored(const Linear& l, const float* x, int ldx, int rows, float* y, int ldy, int first,
                            int last) {
    if (l.activation_bits == 32) {
        multiply<int8_t>(l, x, ldx, rows, y, ldy, first, last);  // panels of bytes, [in, 16]
        return scale_outputs(l, rows, y, ldy, first, last);
    }
    const bool is_wide = l.activation_bits == 16;
    auto bytes = [](const uint8_t* p) { return load_int8(reinterpret_cast<const int8_t*>(p)); };
    auto words = [=](const uint8_t* p) { return widened(bytes(p)); };
    if (l.format == INT8) {
        if (is_wide) return multiply_ints<int16_t>(l, x, ldx, rows, y, ldy, first, last, 2 * PIECE_BYTES, words);
        return multiply_ints<int8_t>(l, x, ldx, rows, y, ldy, first, last, 2 * PIECE_BYTES, bytes);
    }
    if (is_wide) {
        const Codebook16 codebook(l.codebook->words);
        auto look_up = [=](const uint8_t* p) { return codebook.load(p); };
        return multiply_ints<int16_t>(l, x, ldx, rows, y, ldy, first, last, PIECE_BYTES, look_up);
    }
    const Codebook8 codebook(l.codebook->bytes);
    auto look_up = [=](const uint8_t* p) { return codebook.load(p); };
    multiply_ints<int8_t>(l, x, ldx, rows, y, ldy, first, last, PIECE_BYTES, look_up);
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
inline bool prepares_rows(const Linear& l) { return l.activation_bits < 32 || l.is_rotated || l.num_outliers; }

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
