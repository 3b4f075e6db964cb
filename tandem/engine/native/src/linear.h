// Multiplication by a weight matrix: y[m, n] = bias[n] + Σ_k w[n, k] · x[m, k].
//
// Each output is one chain of fused multiply-adds over ascending k, whatever the number of rows, threads
// or the instruction set: a row's result cannot depend on its batch-mates. Weights lie in panels of 16
// outputs, [panels, in, 16], so that the chains of a panel fill vector lanes. Widths of `y` are padded to
// whole panels. In bfloat16 inputs go by pairs, [panels, in / 2, 16, 2], and of a pair the second comes first.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "pairs.h"
#include "simd.h"
#include "unrolled.h"

namespace tandem {

enum Format : int32_t { F32 = 0, F16 = 1, INT8 = 2, CODE4 = 3, BF16 = 4, BF16_WEIGHTS = 5 };

// What a code of four bits stands for, over a factor, in eight and in sixteen bits.
struct Codebook {
    int8_t bytes[16];
    int16_t words[16];
    float byte_factor, word_factor;
};

struct Linear {
    int32_t format;
    int32_t activation_bits;  // 32, or activations are quantized per row and group: 16, 8, or 4 in bytes;
                              // 16 with weights in bfloat16: activations are, too
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

constexpr int ROW_BLOCK = 96;           // rows that go through all panels together
constexpr int INPUT_BLOCK = 512;        // inputs of so many rows that stay in the cache meanwhile
constexpr int MANY_ROWS = 48;           // for which weights are widened before they are multiplied
constexpr int LONG_ROWS = 7;            // of a tile whose products take as long as its weights do to come
constexpr int AHEAD = 16 * CACHE_LINE;  // that weights are asked for before they are needed

// The largest tile of a product: chains enough to fill the multipliers, and few enough for the registers.
#if TANDEM_AVX512
constexpr int TILE_ROWS = 8;
constexpr int tile_panels(int rows) { return rows <= 6 ? 4 : 3; }
#else
constexpr int TILE_ROWS = 6;
constexpr int tile_panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// Rows of the tiles that `rows` are cut into: all nearly the same, since few chains leave multipliers idle.
inline int tile_rows(int rows, int most) { return divide_up(rows, std::max(1, divide_up(rows, most))); }
// Panels that are best computed side by side.
inline int panels_together(int rows) { return tile_panels(tile_rows(std::min(rows, ROW_BLOCK), TILE_ROWS)); }

// Where panels lie: [panels][in][16] from `at` on, `stride` elements from panel to panel.
template <class W>
struct Panels {
    const W* at;
    size_t stride;
    const W* panel(int p) const { return at + p * stride; }
};

// A buffer with room for so many.
template <class T>
inline T* grow(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

// Rows of floats.
template <class T>
struct Rows {
    T* at;
    int stride;
    T* row(int r) const { return at + size_t(r) * stride; }
    Rows from(int r) const { return {row(r), stride}; }
};

// What weights are multiplied with.
template <class W>
using InputOf = std::conditional_t<std::is_same_v<W, Pair>, Pair, float>;
// How many of these an output has.
template <class W>
inline int inputs_of(const Linear& linear) {
    return std::is_same_v<W, Pair> ? divide_up(linear.in, 2) : linear.in;
}

// The panels that come after these. Where rows go through the same panels several times, all but the first find them
// in the cache: each time a share of the next ones is asked for, so that memory and multipliers work side by side. So
// they are where one time takes as long as memory does.
struct Next {
    const char* at = nullptr;  // null: there are none
    size_t stride = 0;         // bytes from panel to panel
    int times = 1, time = 0;
};

// y += R rows of `in` inputs times P panels. Weights are asked for ahead: with several rows the hardware's own
// prefetch falls behind.
template <int R, int P, class W>
__attribute__((noinline)) void multiply_tile(Rows<const InputOf<W>> x, Panels<W> w, int in, Rows<float> y,
                                             const Next& next) {
    constexpr int LINE = CACHE_LINE / (PANEL * sizeof(W));
    p16 acc[R][P];
    unrolled<R>([&](auto r) INLINE {
        unrolled<P>([&](auto p) INLINE { acc[r][p] = load16(y.row(r) + p * PANEL); });
    });
    const int times = next.at ? next.times : 0;
    int time = next.time;
    for (int k = 0; k < in; k++) {
        if (R > 1 && k % LINE == 0) {
            for (int p = 0; p < P; p++)
                __builtin_prefetch(reinterpret_cast<const char*>(w.panel(p) + size_t(k) * PANEL) + AHEAD);
            if (times && time-- == 0) {
                time = times - 1;
                for (int p = 0; p < P; p++)
                    __builtin_prefetch(next.at + p * next.stride + size_t(k) / LINE * CACHE_LINE, 0, 2);
            }
        }
        decltype(load16(w.at)) weights[P];
        unrolled<P>([&](auto p) INLINE { weights[p] = load16(w.panel(p) + size_t(k) * PANEL); });
        unrolled<R>([&](auto r) INLINE {
            const auto value = broadcast16(x.row(r) + k);
            unrolled<P>([&](auto p) INLINE { acc[r][p] = fma(weights[p], value, acc[r][p]); });
        });
    }
    unrolled<R>([&](auto r) INLINE {
        unrolled<P>([&](auto p) INLINE { store16(y.row(r) + p * PANEL, acc[r][p]); });
    });
}

// The tile of so many rows (at most R) and panels: as many as go with the tallest tile of a product, or one.
template <int R, class W>
inline void multiply_tile_of(int rows, int panels, Rows<const InputOf<W>> x, Panels<W> w, int in, Rows<float> y,
                             const Next& next) {
    if constexpr (R > 1)
        if (rows < R) return multiply_tile_of<R - 1>(rows, panels, x, w, in, y, next);
    constexpr int P = tile_panels(R), Q = R == TILE_ROWS ? P : tile_panels(R + 1);  // with a taller tile beside it
    if (panels == P) return multiply_tile<R, P>(x, w, in, y, next);
    if (panels == Q) return multiply_tile<R, Q>(x, w, in, y, next);
    for (; panels; panels--, w.at += w.stride, y.at += PANEL) multiply_tile<R, 1>(x, w, in, y, Next{});
}

// All rows, at most so many together, against some panels that fit a tile of these.
template <class W>
inline void multiply_panels(int rows, int most, int panels, Rows<const InputOf<W>> x, Panels<W> w, int in,
                            Rows<float> y, const W* after = nullptr) {
    Next next{reinterpret_cast<const char*>(after), w.stride * sizeof(W), divide_up(rows, most)};
    for (int row = 0; row < rows; row += most, next.time++)
        multiply_tile_of<TILE_ROWS>(std::min(most, rows - row), panels, x.from(row), w, in, y.from(row), next);
}

// The same weights as floats, until this thread's next call.
template <class W>
inline Panels<float> widened(Panels<W> w, int panels, int in) {
    static thread_local std::vector<float> wide;
    wide.resize(size_t(panels) * in * PANEL);
    float* to = wide.data();
    for (int p = 0; p < panels; p++)
        for (int k = 0; k < in; k++, to += PANEL) store16(to, load16(w.panel(p) + size_t(k) * PANEL));
    return {wide.data(), size_t(in) * PANEL};
}

// All rows against panels [first, last).
template <class W>
inline void multiply(const Linear& linear, Rows<const InputOf<W>> x, int rows, Rows<float> y, int first, int last) {
    const int in = inputs_of<W>(linear);
    const Panels<W> all{static_cast<const W*>(linear.weights), size_t(in) * PANEL};
    const int together = panels_together(rows);
    for (int row = 0; row < rows; row++)
        std::fill_n(y.row(row) + first * PANEL, size_t(last - first) * PANEL, 0.0f);
    for (int row = 0; row < rows; row += ROW_BLOCK) {
        const int count = std::min(ROW_BLOCK, rows - row), most = tile_rows(count, TILE_ROWS);
        const int block = count >= MANY_ROWS ? INPUT_BLOCK : in;
        for (int input = 0; input < in; input += block)
            for (int panel = first; panel < last; panel += together) {
                const int inputs = std::min(block, in - input), panels = std::min(together, last - panel);
                const Panels<W> some{all.panel(panel) + size_t(input) * PANEL, all.stride};
                const Rows<const InputOf<W>> from{x.row(row) + input, x.stride};
                const Rows<float> to{y.row(row) + panel * PANEL, y.stride};
                if constexpr (!std::is_same_v<W, float> && !std::is_same_v<W, Pair>)
                    if (count >= MANY_ROWS) {
                        multiply_panels(count, most, panels, from, widened(some, panels, inputs), inputs, to);
                        continue;
                    }
                const bool is_long = count > most || most >= LONG_ROWS;
                const bool has_next = is_long && block == in && panel + 2 * together <= last;
                multiply_panels(count, most, panels, from, some, inputs, to, has_next ? some.panel(together) : nullptr);
            }
    }
}

inline void add_bias(const Linear& linear, int rows, Rows<float> y, int first, int last) {
    if (!linear.bias) return;
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < std::min(last * PANEL, linear.out); n++) y.row(r)[n] += linear.bias[n];
}

}  // namespace tandem
