// Where the time of forwards goes, counted while somebody asks for it. Otherwise a test of a flag is all it costs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace tandem {

// Mirrored by PARTS of clock.py. QUANTIZE is a part of LINEAR.
enum Part : int32_t { EMBED, NORM, LINEAR, PLACE, ATTEND, ACTIVATE, HEAD, CHOOSE, WAIT, QUANTIZE, PARTS };

inline int64_t nanoseconds() {
    return std::chrono::steady_clock::now().time_since_epoch().count();
}

// Cheaper than a clock of the system, in a unit of its own.
inline int64_t ticks() {
#if defined(__x86_64__)
    return int64_t(__rdtsc());
#else
    return nanoseconds();
#endif
}

// When the library was loaded, by both clocks.
inline const int64_t first_tick = ticks(), first_ns = nanoseconds();

// How long a tick is: the better known the longer ago that was.
inline double tick_ns() {
    return double(nanoseconds() - first_ns) / double(std::max<int64_t>(ticks() - first_tick, 1));
}

inline std::atomic<bool> is_timed{false};
inline std::atomic<int64_t> spent[PARTS];  // ticks of the threads that call
inline thread_local int64_t spent_here[PARTS];  // since this thread's last `add_up`

inline void add_up() {
    for (int part = 0; part < PARTS; part++) {
        spent[part].fetch_add(spent_here[part], std::memory_order_relaxed);
        spent_here[part] = 0;
    }
}

// Parts that follow each other: what passed since the last lap is the part's.
class Laps {
   public:
    Laps() : is_on_(is_timed.load(std::memory_order_relaxed)), last_(is_on_ ? ticks() : 0) {}

    void lap(Part part) {
        if (!is_on_) return;
        const int64_t now = ticks();
        spent_here[part] += now - last_;
        last_ = now;
    }

    void skip() {
        if (is_on_) last_ = ticks();
    }

    void end() const {
        if (is_on_) add_up();
    }

   private:
    bool is_on_;
    int64_t last_;
};

// A part within another, as long as this lives.
class Stopwatch {
   public:
    explicit Stopwatch(Part part)
        : part_(part), is_on_(is_timed.load(std::memory_order_relaxed)), began_(is_on_ ? ticks() : 0) {}
    ~Stopwatch() {
        if (is_on_) spent_here[part_] += ticks() - began_;
    }

   private:
    Part part_;
    bool is_on_;
    int64_t began_;
};

}  // namespace tandem
