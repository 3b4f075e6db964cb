// Loops whose indexes are constants, for tiles of registers.
#pragma once

#include <type_traits>
#include <utility>

namespace tandem {

// f(0) … f(N - 1), unrolled before anything else is optimized, so that arrays they index live in registers.
#define INLINE __attribute__((always_inline))
template <class F, int... I>
inline INLINE void unrolled(std::integer_sequence<int, I...>, const F& f) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
inline INLINE void unrolled(const F& f) {
    unrolled(std::make_integer_sequence<int, N>(), f);
}

}  // namespace tandem
