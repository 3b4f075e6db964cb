// What Python hands over: a model, a cache, the rows of a batch. Mirrored by the structs of library.py.
#pragma once

#include <cstdint>

#include "choose.h"
#include "linear.h"

namespace tandem {

enum QkNorm : int32_t { NO_QK_NORM = 0, PER_HEAD = 1, ALL_HEADS = 2 };

struct Layer {
    Linear qkv, output, gate_up, down;
    const float *input_norm, *query_norm, *key_norm, *attended_norm, *ffn_norm, *ffn_out_norm;  // or null
    int32_t window;  // 0: all
};

enum Number : int32_t { FLOATS = 0, HALVES = 1, BFLOAT16S = 2 };

// f(zero), of the type of such numbers.
template <class F>
inline void as_numbers(int32_t number, const F& f) {
    if (number == BFLOAT16S) f(bfloat16{});
    else if (number == HALVES) f(uint16_t{});
    else f(float{});
}

struct Model {
    int32_t num_layers, hidden, heads, kv_heads, dim, ffn, vocab;
    int32_t plain_norm;  // LayerNorm without weights instead of RMSNorm
    int32_t qk_norm;
    int32_t embedding_number;
    float eps, clip_qkv;  // clip_qkv 0: none
    const void* embedding;  // [vocab, hidden]
    const float* norm;
    Linear head;
    const Layer* layers;
};

struct Cache {
    void* data;  // [layers, 2, kv_heads, blocks, block_size, dim]
    int32_t* layers_written;  // for other threads: so many layers have the keys and values of all rows
    int64_t num_blocks;
    int32_t block_size;  // a power of two
    int32_t number;      // what it holds
};

struct Batch {
    int32_t rows, sequences, num_logits;
    const int32_t* token_ids;      // [rows]
    const int32_t* positions;      // [rows]
    const int32_t* first_rows;     // [sequences + 1]
    const int32_t* tables;         // block tables behind each other
    const int32_t* first_blocks;   // [sequences]: where a sequence's table begins
    const int32_t* logits_rows;    // [num_logits]
    const float* angles;           // [positions, 2, dim / 2]: cosines, then sines
    float* logits;                 // [num_logits, vocab rounded up to a panel]
    int32_t* chosen;               // [num_logits] for a token after each, or null
    const Draw* draws;             // [num_logits] how it is drawn; null: the most probable
    const Drafted* drafted;        // [num_logits] what speculative sampling judges, or null
};

// A batch as Python packs it: its three counts and the length of all tables, then its arrays in their order.
inline Batch unpack(const int32_t* numbers, const float* angles, float* logits, int32_t* chosen,
                    const Draw* draws, const Drafted* drafted) {
    Batch b{numbers[0], numbers[1], numbers[2]};
    const int32_t num_tables = numbers[3];
    b.token_ids = numbers + 4;
    b.positions = b.token_ids + b.rows;
    b.first_rows = b.positions + b.rows;
    b.tables = b.first_rows + b.sequences + 1;
    b.first_blocks = b.tables + num_tables;
    b.logits_rows = b.first_blocks + b.sequences;
    b.angles = angles, b.logits = logits, b.chosen = chosen;
    b.draws = draws, b.drafted = drafted;
    return b;
}

}  // namespace tandem
