// Blocks of a cache on their way out and in: [blocks, layers, 2, block_size, kv_heads, dim], one pass over the bytes.
#pragma once

#include <cstdint>
#include <cstring>

namespace tandem {

struct Blocks {
    char* cache;  // [layers, 2, kv_heads, num_blocks, block_size] vectors
    int64_t num_blocks;
    int32_t block_size, kv_heads;
    int32_t vector_bytes;        // of one token and head
    int32_t first_layer, layers;  // that travel
    int32_t exponent;             // those bits of a number; all of them are set in what is not finite
    int32_t is_half;              // two bytes each
};

// f(vectors of a head in a block, the same in the message), in the message's order but for the heads.
template <class F>
inline void each_head(const Blocks& b, const int64_t* ids, int64_t count, char* message, const F& f) {
    const size_t size = size_t(b.block_size) * b.vector_bytes, head = size_t(b.num_blocks) * size;
    for (int64_t i = 0; i < count; i++)
        for (int part = 2 * b.first_layer; part < 2 * (b.first_layer + b.layers); part++) {
            char* first = b.cache + part * b.kv_heads * head + ids[i] * size;
            for (int h = 0; h < b.kv_heads; h++) f(i, first + h * head, message + size_t(h) * b.vector_bytes);
            message += b.kv_heads * size;
        }
}

template <class T>
inline bool all_finite(const char* from, size_t num_bytes, T exponent) {
    const T* numbers = reinterpret_cast<const T*>(from);
    T bad = 0;
    for (size_t i = 0; i < num_bytes / sizeof(T); i++) bad |= (numbers[i] & exponent) == exponent;
    return !bad;
}

// `num_used` slots of the last block travel, and zeros for the rest. False if a number that does is not finite.
template <class T>
inline bool export_blocks(const Blocks& b, const int64_t* ids, int64_t count, int num_used, char* message) {
    const size_t size = b.vector_bytes, stride = b.kv_heads * size;
    bool is_finite = true;
    each_head(b, ids, count, message, [&](int64_t i, const char* from, char* to) {
        const int used = i + 1 < count ? b.block_size : num_used;
        is_finite &= all_finite(from, used * size, T(b.exponent));  // and brings it near
        int slot = 0;
        for (; slot < used; slot++) std::memcpy(to + slot * stride, from + slot * size, size);
        for (; slot < b.block_size; slot++) std::memset(to + slot * stride, 0, size);
    });
    return is_finite;
}

inline void import_blocks(const Blocks& b, const int64_t* ids, int64_t count, const char* message) {
    const size_t stride = size_t(b.kv_heads) * b.vector_bytes;
    each_head(b, ids, count, const_cast<char*>(message), [&](int64_t, char* to, const char* from) {
        for (int slot = 0; slot < b.block_size; slot++, to += b.vector_bytes, from += stride)
            std::memcpy(to, from, b.vector_bytes);
    });
}

}  // namespace tandem
