// Multiplication by a weight matrix: y[m, n] = bias[n] + Σ_k w[n, k] · x[m, k].
//
// Each output is one chain of fused multiply-adds over ascending k, whatever the number of rows, threads
// or the instruction set: a row's result cannot depend on its batch-mates. Weights lie in panels of 16
// outputs, [panels, in, 16], so that the chains of a panel fill vector lanes. Widths of `y` are padded to
// whole panels.
#pragma once

#include <algorithm>

#include "simd.h"

namespace tandem {

enum Format : int32_t { F32 = 0, F16 = 1, INT8 = 2, CODE4 = 3, INT4 = 4 };

struct Linear {
    int32_t format;
    int32_t activation_bits;  // 32, or 8: activations quantized per row
    int32_t in, out;
    int32_t group;            // inputs that share a scale
    const void* weights;      // panels, laid out as the format says
    const float* scales;
    const float* codebook;    // 16 numbers
    const float* bias;        // [out], or null
};

constexpr int K_CHUNK = 256;       // inputs of a panel that are unpacked at once: 16 KiB
constexpr int ROW_BLOCK = 96;      // rows that share an unpacked panel
constexpr int FEW_ROWS = 12;       // up to here weights are converted in registers, row tile by row tile

// R rows against P panels; `w` is [P][k_count][16] with `panel_stride` elements from panel to panel.
template <int R, int P, class W>
inline void multiply_tile(const float* x, int ldx, const W* w, size_t panel_stride, int k_count, float* y,
                          int ldy, bool first) {
    p16 acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[r][p] = first ? zero16() : load16(y + r * ldy + p * PANEL);
    for (int k = 0; k < k_count; k++) {
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
inline void multiply_panel(const float* x, int ldx, int rows, const W* w, int k_count, float* y, int ldy,
                           bool first) {
    int r = 0;
    auto tile = [&](auto count) {
        constexpr int R = decltype(count)::value;
        multiply_tile<R, 1>(x + size_t(r) * ldx, ldx, w, 0, k_count, y + size_t(r) * ldy, ldy, first);
        r += R;
    };
    while (rows - r > 8 || rows - r == 6) tile(std::integral_constant<int, 6>());
    while (rows - r >= 7) tile(std::integral_constant<int, 4>());
    switch (rows - r) {
        case 5: tile(std::integral_constant<int, 5>()); break;
        case 4: tile(std::integral_constant<int, 4>()); break;
        case 3: tile(std::integral_constant<int, 3>()); break;
        case 2: tile(std::integral_constant<int, 2>()); break;
        case 1: tile(std::integral_constant<int, 1>()); break;
    }
}

// Few rows: memory is what it costs, so every weight is read once and several panels run side by side.
template <class W>
inline void multiply_few(const Linear& linear, const float* x, int ldx, int rows, float* y, int ldy, int first_panel,
                         int last_panel) {
    const W* weights = static_cast<const W*>(linear.weights);
    const size_t stride = size_t(linear.in) * PANEL;
    int panel = first_panel;
    for (; rows == 1 && panel + 4 <= last_panel; panel += 4)
        multiply_tile<1, 4>(x, ldx, weights + panel * stride, stride, linear.in, y + panel * PANEL, ldy, true);
    for (; rows == 2 && panel + 2 <= last_panel; panel += 2)
        multiply_tile<2, 2>(x, ldx, weights + panel * stride, stride, linear.in, y + panel * PANEL, ldy, true);
    for (; panel < last_panel; panel++)
        multiply_panel(x, ldx, rows, weights + panel * stride, linear.in, y + panel * PANEL, ldy, true);
}

// Many rows: a piece of a panel is unpacked once for a block of rows, then it is all fused multiply-adds.
template <class Unpack>
inline void multiply_many(const Linear& linear, const float* x, int ldx, int rows, float* y, int ldy, int first_panel,
                          int last_panel, Unpack unpack) {
    alignas(64) float piece[K_CHUNK * PANEL];
    for (int row = 0; row < rows; row += ROW_BLOCK)
        for (int panel = first_panel; panel < last_panel; panel++)
            for (int k = 0; k < linear.in; k += K_CHUNK) {
                int count = std::min(K_CHUNK, linear.in - k);
                unpack(panel, k, count, piece);
                multiply_panel(x + size_t(row) * ldx + k, ldx, std::min(ROW_BLOCK, rows - row), piece, count,
                               y + size_t(row) * ldy + panel * PANEL, ldy, k == 0);
            }
}

template <class W>
inline void multiply(const Linear& linear, const float* x, int ldx, int rows, float* y, int ldy, int first_panel,
                     int last_panel) {
    if (rows <= FEW_ROWS) return multiply_few<W>(linear, x, ldx, rows, y, ldy, first_panel, last_panel);
    const W* weights = static_cast<const W*>(linear.weights);
    multiply_many(linear, x, ldx, rows, y, ldy, first_panel, last_panel, [&](int panel, int k, int count, float* piece) {
        const W* from = weights + (size_t(panel) * linear.in + k) * PANEL;
        for (int i = 0; i < count; i++) store16(piece + i * PANEL, load16(from + i * PANEL));
    });
}

inline void add_bias(const Linear& linear, int rows, float* y, int ldy, int first_panel, int last_panel) {
    if (!linear.bias) return;
    int last = std::min(last_panel * PANEL, linear.out);
    for (int r = 0; r < rows; r++)
        for (int n = first_panel * PANEL; n < last; n++) y[size_t(r) * ldy + n] += linear.bias[n];
}

}  // namespace tandem
