// Multiplication by a weight matrix: y[m, n] = bias[n] + Σ_k w[n, k] · x[m, k].
//
// Each output is one chain of fused multiply-adds over ascending k, whatever the number of rows, threads
// or the instruction set: a row's result cannot depend on its batch-mates. Weights lie in panels of 16
// outputs, [panels, in, 16], so that the chains of a panel fill vector lanes. Widths of `y` are padded to
// whole panels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace tandem {

enum Format : int32_t { F32 = 0, F16 = 1, INT8 = 2, CODE4 = 3 };

// What a code of four bits stands for, over a factor, in eight and in sixteen bits.
struct Codebook {
    int8_t bytes[16];
    int16_t words[16];
    float byte_factor, word_factor;
};

struct Linear {
    int32_t format;
    int32_t activation_bits;  // 32, or activations are quantized per row and group: 16, 8, or 4 in bytes
    int32_t in, out;
    int32_t group;            // inputs that share a scale
    const void* weights;      // panels, laid out as the format says
    const float* scales;
    const Codebook* codebook;
    const float* bias;        // [out], or null
    int32_t is_rotated;       // groups of inputs are multiplied with a Hadamard matrix first
    int32_t num_outliers;     // inputs that are kept apart, and their weights
    const int32_t* outlier_inputs;
    const Linear* outliers;
};

template <int N>
using number = std::integral_constant<int, N>;

constexpr int ROW_BLOCK = 96;   // rows that go through all panels together
constexpr int CACHE_LINE = 64;  // bytes
constexpr int AHEAD = 16 * CACHE_LINE;  // that weights are asked for before they are needed

// R rows against P panels; `w` is [P][in][16] with `panel_stride` elements from panel to panel. Weights are asked
// for ahead: with several rows the hardware's own prefetch falls behind.
template <int R, int P, class W>
inline void multiply_tile(const float* x, int ldx, const W* w, size_t panel_stride, int in, float* y,
                          int ldy) {
    constexpr int LINE = CACHE_LINE / (PANEL * sizeof(W));
    p16 acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[r][p] = zero16();
    for (int k = 0; k < in; k++) {
        if (R > 1 && k % LINE == 0)
            for (int p = 0; p < P; p++)
                __builtin_prefetch(reinterpret_cast<const char*>(w + p * panel_stride + size_t(k) * PANEL) + AHEAD);
        p16 weights[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) weights[p] = load16(w + p * panel_stride + size_t(k) * PANEL);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            b16 value = broadcast16(x + size_t(r) * ldx + k);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) acc[r][p] = fma(weights[p], value, acc[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store16(y + r * ldy + p * PANEL, acc[r][p]);
}

// The rows of one panel in tiles of at most six.
template <class W>
inline void multiply_panel(const float* x, int ldx, int rows, const W* w, int in, float* y, int ldy) {
    int r = 0;
    auto tile = [&](auto count) {
        constexpr int R = count();
        multiply_tile<R, 1>(x + size_t(r) * ldx, ldx, w, 0, in, y + size_t(r) * ldy, ldy);
        r += R;
    };
    while (rows - r > 8 || rows - r == 6) tile(number<6>());
    while (rows - r >= 7) tile(number<4>());
    switch (rows - r) {
        case 5: tile(number<5>()); break;
        case 4: tile(number<4>()); break;
        case 3: tile(number<3>()); break;
        case 2: tile(number<2>()); break;
        case 1: tile(number<1>()); break;
    }
}

// All rows against panels [first_panel, last_panel). Rows go in blocks that stay in the cache; few enough of
// them run several panels side by side, so that there are chains enough to fill the multipliers.
template <class W>
inline void multiply(const Linear& linear, const float* x, int ldx, int rows, float* y, int ldy, int first_panel,
                     int last_panel) {
    const W* weights = static_cast<const W*>(linear.weights);
    const size_t stride = size_t(linear.in) * PANEL;
    for (int row = 0; row < rows; row += ROW_BLOCK) {
        const int count = std::min(ROW_BLOCK, rows - row);
        const float* from = x + size_t(row) * ldx;
        float* to = y + size_t(row) * ldy;
        int panel = first_panel;
        for (; count == 1 && panel + 4 <= last_panel; panel += 4)
            multiply_tile<1, 4>(from, ldx, weights + panel * stride, stride, linear.in, to + panel * PANEL, ldy);
        for (; count == 1 && panel + 2 <= last_panel; panel += 2)
            multiply_tile<1, 2>(from, ldx, weights + panel * stride, stride, linear.in, to + panel * PANEL, ldy);
        for (; count == 2 && panel + 2 <= last_panel; panel += 2)
            multiply_tile<2, 2>(from, ldx, weights + panel * stride, stride, linear.in, to + panel * PANEL, ldy);
        for (; panel < last_panel; panel++)
            multiply_panel(from, ldx, count, weights + panel * stride, linear.in, to + panel * PANEL, ldy);
    }
}

// Panels that are best computed side by side.
inline int panels_together(int rows) { return rows <= 2 ? 2 : 1; }

inline void add_bias(const Linear& linear, int rows, float* y, int ldy, int first_panel, int last_panel) {
    if (!linear.bias) return;
    int last = std::min(last_panel * PANEL, linear.out);
    for (int r = 0; r < rows; r++)
        for (int n = first_panel * PANEL; n < last; n++) y[size_t(r) * ldy + n] += linear.bias[n];
}

}  // namespace tandem
