// Sixteen float32 numbers, one for each of sixteen blocks: a search that runs in each lane for another block.
//
// Each lane does the operations of scalar code in the order of scalar code, so that results do not depend on the processor's vectors.

#pragma once

#include <cstdint>

#include "blocks.h"

constexpr int LANES = 16;
typedef float eight __attribute__((vector_size(32)));
typedef int32_t eight_flags __attribute__((vector_size(32)));  // -1 where a comparison holds, else 0

// Two vectors, because compilers do poorly with those that are wider than the processor's, and because two sums can run at once.
struct lanes {
    eight a, b;
    lanes() = default;
    lanes(eight a, eight b) : a(a), b(b) {}
    lanes(float value) : a(eight{} + value), b(eight{} + value) {}
    float operator[](int k) const { return k < 8 ? a[k] : b[k - 8]; }
    void set(int k, float value) { k < 8 ? a[k] = value : b[k - 8] = value; }
    void operator+=(lanes other) { a += other.a, b += other.b; }
};
struct flags {
    eight_flags a, b;
};
inline lanes operator+(lanes x, lanes y) { return {x.a + y.a, x.b + y.b}; }
inline lanes operator-(lanes x, lanes y) { return {x.a - y.a, x.b - y.b}; }
inline lanes operator*(lanes x, lanes y) { return {x.a * y.a, x.b * y.b}; }
inline lanes operator/(lanes x, lanes y) { return {x.a / y.a, x.b / y.b}; }
inline flags operator<(lanes x, lanes y) { return {x.a < y.a, x.b < y.b}; }
inline flags operator>(lanes x, lanes y) { return {x.a > y.a, x.b > y.b}; }
inline flags operator==(lanes x, lanes y) { return {x.a == y.a, x.b == y.b}; }
inline flags operator&(flags x, flags y) { return {x.a & y.a, x.b & y.b}; }
inline lanes select(flags where, lanes x, lanes y) { return {where.a ? x.a : y.a, where.b ? x.b : y.b}; }
inline lanes least(lanes x, lanes y) { return select(x < y, x, y); }
inline lanes greatest(lanes x, lanes y) { return select(x > y, x, y); }

inline lanes rounded(lanes value) { return (value + ROUNDER) - ROUNDER; }

inline lanes magnitude(lanes value) { return {(eight)((eight_flags)value.a & 0x7fffffff), (eight)((eight_flags)value.b & 0x7fffffff)}; }

template <int N> void transpose(const float *const source[LANES], lanes out[N]) {
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < LANES; ++k) out[i].set(k, source[k][i]);
}
