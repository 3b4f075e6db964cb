// A decoder of the Llama family in one call: every layer over the packed rows of a ragged batch.
//
// All members of the team run `forward` together: norms and rope go by rows, linear layers by outputs,
// attention by (sequence, KV head, rows). No sum is ever split, so the team's size changes no bit.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention.h"
#include "attention_pairs.h"
#include "choose.h"
#include "clock.h"
#include "guess.h"
#include "linear.h"
#include "model.h"
#include "pool.h"
#include "quantized.h"
#include "transfer.h"

namespace tandem {

// What a forward works in; grows to the largest batch seen.
struct Buffers {
    std::vector<float> x, normed, qkv, attended, projected, gate_up, activated, last, logits;
    std::vector<std::vector<float>> attention;  // per member
    std::vector<Sampler> samplers;              // per member
    std::vector<PreparedRows> prepared;         // per member, and for all
};

struct Work {  // some vectors of one sequence and KV head
    int sequence, kv_head, row, rows;
};

// What a member of the team does of a product; it is whole behind the next barrier. `prepared` has room for the rows of
// each member, and of all.
void multiply_shared(const Linear& linear, Rows<const float> x, int rows, Rows<float> y, Team& team, int member,
                     PreparedRows* prepared) {
    const int panels = divide_up(linear.out, PANEL);
    auto divide = [&](const auto& multiply_some) {
        team.divide(panels, panels_together(rows), [&](int first, int last) {
            multiply_some(first, last);
            add_bias(linear, rows, y, first, last);
        });
    };
    if (linear.format == F32)
        return divide([&](int first, int last) { multiply<float>(linear, x, rows, y, first, last); });
    if (linear.format == F16)
        return divide([&](int first, int last) { multiply<uint16_t>(linear, x, rows, y, first, last); });
    if (linear.format == BF16_WEIGHTS)
        return divide([&](int first, int last) { multiply<bfloat16>(linear, x, rows, y, first, last); });
    const bool are_few = rows < team.size();  // cheaper to prepare by each member than to wait for
    PreparedRows& mine = prepared[are_few ? member : team.size()];
    if (prepares_rows(linear)) {
        const Share share = are_few ? Share(rows, 0, 1) : Share(rows, member, team.size());
        mine.fill(linear, x, share.first, share.last);
        if (!are_few) team.barrier();
    }
    divide([&](int first, int last) { multiply_prepared(linear, mine, x, rows, y, first, last); });
}

void make_room(std::vector<PreparedRows>& prepared, const Linear& linear, int rows, const Team& team) {
    if (linear.format == F32 || linear.format == F16 || linear.format == BF16_WEIGHTS) return;
    prepared.resize(team.size() + 1);
    prepared.back().make_room(linear, rows);
    for (int member = 0; member < team.size(); member++)  // the last rows of many may be few
        prepared[member].make_room(linear, std::min(rows, team.size()));
}

inline float sum_of_squares(const float* x, int n) {
    f8 total = zero();
    int i = 0;
    for (; i + LANES <= n; i += LANES) total = fma(load(x + i), load(x + i), total);
    if (i < n) {
        f8 rest = load_some(x + i, n - i);
        total = fma(rest, rest, total);
    }
    return sum(total);
}

// y = x / sqrt(mean(x²) + eps) · weight; x and y may be the same.
inline void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
    float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

inline void layer_norm(const float* x, int n, float eps, float* y) {
    float mean = 0.0f, variance = 0.0f;
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= float(n);
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / std::sqrt(variance / float(n) + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale;
}

class Forward {
   public:
    Forward(const Model& model, const Cache& cache, const Batch& batch, Team& team, Buffers& buffers)
        : m(model), cache(cache), b(batch), team(team), buffers(buffers) {
        hidden = round_up(m.hidden, PANEL);
        query = m.heads * m.dim, kv = m.kv_heads * m.dim;
        qkv_width = round_up(query + 2 * kv, PANEL), attended_width = round_up(query, PANEL);
        gate_up_width = round_up(2 * m.ffn, PANEL), ffn_width = round_up(m.ffn, PANEL);
        const size_t block = std::min(b.rows, ROW_BLOCK), rows = b.rows;
        x = grow(buffers.x, rows * hidden);
        qkv = grow(buffers.qkv, rows * qkv_width);
        attended = grow(buffers.attended, rows * attended_width);
        normed = grow(buffers.normed, block * hidden);
        projected = grow(buffers.projected, block * hidden);
        gate_up = grow(buffers.gate_up, block * gate_up_width);
        activated = grow(buffers.activated, block * ffn_width);
        last = grow(buffers.last, size_t(b.num_logits) * hidden);
        for (int i = 0; i < b.rows; i++) longest = std::max(longest, b.positions[i] + 1);
        buffers.attention.resize(team.size());
        buffers.samplers.resize(team.size());
        const bool in_pairs = cache.number == BFLOAT16S;
        most_vectors = in_pairs ? MAX_PAIR_VECTORS : MAX_VECTORS;
        for (auto& buffer : buffers.attention)
            grow(buffer, in_pairs ? PairAttention::size_for(m.dim) : Scratch::size_for(longest, m.dim));
        for (int i = 0; i < m.num_layers; i++)
            for (const Linear* l : {&m.layers[i].qkv, &m.layers[i].output, &m.layers[i].gate_up, &m.layers[i].down})
                make_room(buffers.prepared, *l, int(block), team);
        make_room(buffers.prepared, m.head, b.num_logits, team);
        plan_attention();
    }

    void run(int member) {
        embed(member);
        for (int layer = 0; layer < m.num_layers; layer++) {
            const Layer& l = m.layers[layer];
            for (int row = 0; row < b.rows; row += ROW_BLOCK) project(l, layer, row, block_rows(row), member);
            meet(member, PLACE);
            if (member == 0) __atomic_store_n(cache.layers_written, layer + 1, __ATOMIC_RELEASE);
            team.divide(int(work.size()), 1, [&](int first, int last) {
                for (int i = first; i < last; i++)
                    as_numbers(cache.number, [&](auto zero) {
                        attend_some<decltype(zero)>(l, layer, work[i], work[std::min(i + 1, last - 1)], member);
                    });
            });
            meet(member, ATTEND);
            for (int row = 0; row < b.rows; row += ROW_BLOCK) finish(l, row, block_rows(row), member);
        }
        judge(member);
        if (member == 0) laps.end();
    }

   private:
    const Model& m;
    const Cache& cache;
    const Batch& b;
    Team& team;
    Buffers& buffers;
    int hidden, query, kv, qkv_width, attended_width, gate_up_width, ffn_width;
    int longest = 0;   // context of a row
    int most_vectors;  // of queries that attend together
    float *x, *qkv, *attended, *normed, *projected, *gate_up, *activated, *last;
    std::vector<Work> work;
    Laps laps;  // of member 0

    void done(int member, Part part) {
        if (member == 0) laps.lap(part);
    }

    // Wait for all members with a part behind one.
    void meet(int member, Part part) {
        done(member, part);
        team.barrier();
        done(member, WAIT);
    }

    int block_rows(int row) const { return std::min(ROW_BLOCK, b.rows - row); }
    Share rows_of(int rows, int member) const { return Share(rows, member, team.size()); }

    void plan_attention() {
        const int rows_at_once = std::max(1, most_vectors / (m.heads / m.kv_heads));
        for (int s = 0; s < b.sequences; s++)
            for (int head = 0; head < m.kv_heads; head++)
                for (int row = b.first_rows[s]; row < b.first_rows[s + 1]; row += rows_at_once)
                    work.push_back({s, head, row, std::min(rows_at_once, b.first_rows[s + 1] - row)});
    }

    void linear(const Linear& l, const float* from, int ld_from, int rows, float* to, int ld_to, int member) {
        multiply_shared(l, {from, ld_from}, rows, {to, ld_to}, team, member, buffers.prepared.data());
    }

    void norm(const float* from, const float* weight, float* to) const {
        if (m.plain_norm) layer_norm(from, m.hidden, m.eps, to);
        else rms_norm(from, weight, m.hidden, m.eps, to);
    }

    bool has(const float* weight) const { return weight != nullptr; }

    void embed(int member) {
        Share rows = rows_of(b.rows, member);
        for (int row = rows.first; row < rows.last; row++) {
            float* to = x + size_t(row) * hidden;
            const size_t from = size_t(b.token_ids[row]) * m.hidden;
            as_numbers(m.embedding_number, [&](auto zero) {
                widen(static_cast<const decltype(zero)*>(m.embedding) + from, m.hidden, to);
            });
        }
        meet(member, EMBED);
    }

    template <class T>
    static void widen(const T* from, int count, float* to) {
        int i = 0;
        for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
        T padded[LANES] = {};
        std::copy_n(from + i, count - i, padded);
        float rest[LANES];
        store(rest, load(padded));
        std::copy_n(rest, count - i, to + i);
    }

    // Queries, keys and values of some rows; keys and values go to the cache.
    void project(const Layer& l, int layer, int row, int rows, int member) {
        const float* from = x + size_t(row) * hidden;
        Share mine = rows_of(rows, member);
        if (m.plain_norm || has(l.input_norm)) {
            for (int r = mine.first; r < mine.last; r++)
                norm(from + size_t(r) * hidden, l.input_norm, normed + size_t(r) * hidden);
            meet(member, NORM);
            from = normed;
        }
        linear(l.qkv, from, hidden, rows, qkv + size_t(row) * qkv_width, qkv_width, member);
        meet(member, LINEAR);
        for (int r = row + mine.first; r < row + mine.last; r++) place(l, layer, r);
        done(member, PLACE);
    }

    // Normalize, turn and store one row's heads.
    void place(const Layer& l, int layer, int row) {
        float *q = qkv + size_t(row) * qkv_width, *k = q + query, *v = k + kv;
        if (m.clip_qkv > 0)
            for (int i = 0; i < query + 2 * kv; i++) q[i] = std::min(std::max(q[i], -m.clip_qkv), m.clip_qkv);
        if (m.qk_norm == ALL_HEADS) {
            rms_norm(q, l.query_norm, query, m.eps, q);
            rms_norm(k, l.key_norm, kv, m.eps, k);
        }
        for (int h = 0; h < m.heads + m.kv_heads; h++) {
            float* head = q + h * m.dim;
            if (m.qk_norm == PER_HEAD) rms_norm(head, h < m.heads ? l.query_norm : l.key_norm, m.dim, m.eps, head);
            turn(head, b.positions[row]);
        }
        const float scale = 1.0f / std::sqrt(float(m.dim));
        for (int i = 0; i < query; i++) q[i] *= scale;
        as_numbers(cache.number, [&](auto zero) { keep<decltype(zero)>(k, v, layer, slot_of(row)); });
    }

    // Keys and values of all heads of one row.
    template <class T>
    void keep(const float* k, const float* v, int layer, size_t slot) const {
        for (int h = 0; h < m.kv_heads; h++) {
            put(head_data<T>(layer, 0, h) + slot * m.dim, k + h * m.dim);
            put(head_data<T>(layer, 1, h) + slot * m.dim, v + h * m.dim);
        }
    }
    template <class T>
    void put(T* to, const float* from) const {
        for (int i = 0; i < m.dim; i += LANES) store(to + i, load(from + i));
    }
    void put(bfloat16* to, const float* from) const { pair_up(from, m.dim, reinterpret_cast<Pair*>(to)); }

    void turn(float* head, int position) const {
        const int half = m.dim / 2;
        const float *cos = b.angles + size_t(position) * m.dim, *sin = cos + half;
        for (int i = 0; i < half; i++) {
            float a = head[i], c = head[i + half];
            head[i] = a * cos[i] - c * sin[i];
            head[i + half] = c * cos[i] + a * sin[i];
        }
    }

    size_t slot_of(int row) const {
        int s = std::upper_bound(b.first_rows, b.first_rows + b.sequences, row) - b.first_rows - 1;
        int position = b.positions[row];
        return size_t(b.tables[b.first_blocks[s] + position / cache.block_size]) * cache.block_size +
               position % cache.block_size;
    }

    template <class T>
    T* head_data(int layer, int which, int head) const {
        size_t index = (size_t(layer) * 2 + which) * m.kv_heads + head;
        return static_cast<T*>(cache.data) + index * cache.num_blocks * cache.block_size * m.dim;
    }

    template <class T>
    Context<T> context_of(int layer, const Work& w) const {
        return {head_data<T>(layer, 0, w.kv_head), head_data<T>(layer, 1, w.kv_head),
                b.tables + b.first_blocks[w.sequence], __builtin_ctz(cache.block_size), m.dim,
                b.positions[w.row + w.rows - 1]};
    }

    // `coming` is what the same member does next.
    template <class T>
    void attend_some(const Layer& l, int layer, const Work& w, const Work& coming, int member) {
        const int group = m.heads / m.kv_heads;
        const Context<T> context = context_of<T>(layer, w);
        for (int first = 0; first < group; first += most_vectors) {  // a group larger than a tile goes in parts
            const size_t head = size_t(w.kv_head * group + first) * m.dim;
            Queries queries{w.rows, std::min(most_vectors, group - first), b.positions[w.row], l.window,
                            qkv + size_t(w.row) * qkv_width + head, attended + size_t(w.row) * attended_width + head,
                            size_t(qkv_width), size_t(attended_width)};
            float* buffer = buffers.attention[member].data();
            if constexpr (std::is_same_v<T, bfloat16>) {
                const Context<T> after = context_of<T>(layer, coming);
                const Queries asked{coming.rows, 0, b.positions[coming.row], l.window};
                PairAttention(context, queries, {after, asked.begin_of(0), after.last + 1}, buffer).run();
            } else attend(context, queries, Scratch(buffer, longest));
        }
    }

    // Add what attention found to some rows, then the FFN's answer.
    void finish(const Layer& l, int row, int rows, int member) {
        float* to = x + size_t(row) * hidden;
        linear(l.output, attended + size_t(row) * attended_width, attended_width, rows, projected, hidden, member);
        add_projected(l.attended_norm, to, rows, member);
        const float* from = to;
        Share mine = rows_of(rows, member);
        if (m.plain_norm || has(l.ffn_norm)) {
            for (int r = mine.first; r < mine.last; r++)
                norm(to + size_t(r) * hidden, l.ffn_norm, normed + size_t(r) * hidden);
            meet(member, NORM);
            from = normed;
        }
        linear(l.gate_up, from, hidden, rows, gate_up, gate_up_width, member);
        meet(member, LINEAR);
        for (int r = mine.first; r < mine.last; r++) activate(r);
        meet(member, ACTIVATE);
        linear(l.down, activated, ffn_width, rows, projected, hidden, member);
        add_projected(l.ffn_out_norm, to, rows, member);
    }

    // x += projected, or its norm.
    void add_projected(const float* weight, float* to, int rows, int member) {
        meet(member, LINEAR);
        Share mine = rows_of(rows, member);
        for (int r = mine.first; r < mine.last; r++) {
            float *from = projected + size_t(r) * hidden, *sum = to + size_t(r) * hidden;
            if (has(weight)) rms_norm(from, weight, m.hidden, m.eps, from);
            for (int i = 0; i < m.hidden; i++) sum[i] += from[i];
        }
        meet(member, NORM);
    }

    // silu(gate) · up. A run's last lanes may reach into what follows; nobody reads what they give.
    void activate(int row) {
        const float *gate = gate_up + size_t(row) * gate_up_width, *up = gate + m.ffn;
        float* to = activated + size_t(row) * ffn_width;
        for (int i = 0; i < m.ffn; i += LANES) {
            f8 g = load(gate + i);
            f8 e = exp(sub(zero(), g));
            store(to + i, mul(div(g, add(set1(1.0f), e)), load(up + i)));
        }
    }

    int choose(const float* logits, int i, Sampler& sampler) const {
        if (!b.draws) return most_probable(logits, m.vocab);
        return b.drafted ? sampler.judge(logits, m.vocab, b.draws[i], b.drafted[i])
                         : sampler.choose(logits, m.vocab, b.draws[i], false);
    }

    void judge(int member) {
        Share mine = rows_of(b.num_logits, member);
        for (int i = mine.first; i < mine.last; i++)
            norm(x + size_t(b.logits_rows[i]) * hidden, m.norm, last + size_t(i) * hidden);
        meet(member, NORM);
        const int width = round_up(m.vocab, PANEL);
        linear(m.head, last, hidden, b.num_logits, b.logits, width, member);
        done(member, HEAD);
        if (!b.chosen) return;
        meet(member, HEAD);
        for (int i = mine.first; i < mine.last; i++)
            b.chosen[i] = choose(b.logits + size_t(i) * width, i, buffers.samplers[member]);
        done(member, CHOOSE);
    }
};

struct Engine {
    explicit Engine(int threads) : team(threads) {}
    Team team;
    Buffers buffers;

    void forward(const Model& model, const Cache& cache, const Batch& batch) {
        Forward forward(model, cache, batch, team, buffers);
        team.run([&](int member) { forward.run(member); });
    }

    // `logits` null: somewhere, until the next call.
    Batch unpack(const Model& model, const int32_t* numbers, const float* angles, float* logits = nullptr,
                 int32_t* chosen = nullptr, const Draw* draws = nullptr, const Drafted* drafted = nullptr) {
        Batch batch = tandem::unpack(numbers, angles, logits, chosen, draws, drafted);
        const size_t size = size_t(batch.num_logits) * round_up(model.vocab, PANEL);
        if (!logits) batch.logits = grow(buffers.logits, size);
        return batch;
    }
};

}  // namespace tandem

#pragma GCC visibility push(default)
extern "C" {

// Bumped with every change of a struct or function below.
int32_t tandem_abi() { return 14; }

void* tandem_engine_new(int32_t threads) { return new tandem::Engine(threads); }
void tandem_engine_delete(void* engine) { delete static_cast<tandem::Engine*>(engine); }

// One forward at a time per engine. What comes after the angles may be null. Arguments must be in range; nothing is
// checked here.
void tandem_forward(void* engine, const tandem::Model* model, const tandem::Cache* cache, const int32_t* numbers,
                    const float* angles, float* logits, int32_t* chosen, const tandem::Draw* draws,
                    const tandem::Drafted* drafted) {
    auto& e = *static_cast<tandem::Engine*>(engine);
    e.forward(*model, *cache, e.unpack(*model, numbers, angles, logits, chosen, draws, drafted));
}

// Forwards until every sequence has its guesses; the first takes a batch with one row of logits per sequence.
// `found` is [sequences, most] token ids, then how many were found for each sequence, then 1 for each that is unsure.
void tandem_guess(void* engine, const tandem::Model* model, const tandem::Cache* cache, const int32_t* numbers,
                  const float* angles, int32_t most, const int32_t* counts, const float* thresholds,
                  const float* products, const tandem::Draw* draws, int32_t* found, float* probs) {
    auto& e = *static_cast<tandem::Engine*>(engine);
    const tandem::Batch batch = e.unpack(*model, numbers, angles);
    int32_t* num_found = found + size_t(batch.sequences) * most;
    const tandem::Guesses guesses{most,  counts,    thresholds, products,
                                  draws, found,     num_found,  num_found + batch.sequences,
                                  probs};
    tandem::Sampler sampler;
    tandem::Laps laps;
    tandem::guess(batch, guesses, model->vocab, sampler, [&](const tandem::Batch& next) {
        laps.lap(tandem::CHOOSE);
        e.forward(*model, *cache, next);
        laps.skip();
    });
    laps.lap(tandem::CHOOSE);
    laps.end();
}

// A token for each row of `logits` [rows, stride]; with `masked` some may be -inf.
void tandem_choose(const float* logits, int32_t rows, int64_t stride, int32_t vocab, const tandem::Draw* draws,
                   int32_t masked, int32_t* chosen) {
    tandem::Sampler sampler;
    for (int32_t row = 0; row < rows; row++)
        chosen[row] = sampler.choose(logits + row * stride, vocab, draws[row], masked);
}

// y [rows, out rounded up to a panel] = x [rows, in] · weightsᵀ + bias.
void tandem_linear(void* engine, const tandem::Linear* linear, const float* x, int32_t rows, float* y) {
    auto& e = *static_cast<tandem::Engine*>(engine);
    const tandem::Rows<float> to{y, tandem::round_up(linear->out, tandem::PANEL)};
    tandem::make_room(e.buffers.prepared, *linear, rows, e.team);
    e.team.run([&](int member) {
        tandem::multiply_shared(*linear, {x, linear->in}, rows, to, e.team, member, e.buffers.prepared.data());
    });
}

// What blocks hold to `message`, and zeros for the last one's slots from `num_used` on; 0 if a number is not finite.
int32_t tandem_export_blocks(const tandem::Blocks* from, const int64_t* ids, int64_t count, int32_t num_used,
                             char* message) {
    return from->is_half ? tandem::export_blocks<uint16_t>(*from, ids, count, num_used, message)
                         : tandem::export_blocks<uint32_t>(*from, ids, count, num_used, message);
}

// The way back.
void tandem_import_blocks(const tandem::Blocks* to, const int64_t* ids, int64_t count, const char* message) {
    tandem::import_blocks(*to, ids, count, message);
}

// Count from now on where forwards spend their time, or stop it.
void tandem_clock_run(int32_t is_on) { tandem::is_timed.store(is_on != 0); }

// Ticks of each part of all forwards that were counted [PARTS], and how long a tick is.
double tandem_clock_read(int64_t* parts) {
    for (int part = 0; part < tandem::PARTS; part++) parts[part] = tandem::spent[part].load();
    return tandem::tick_ns();
}
}
#pragma GCC visibility pop
