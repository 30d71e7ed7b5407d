// The K-quants' search for scales, for 16 sub-blocks at a time: the results of ggml_quantize_chunk, bit for bit, several times faster.
//
// A K-quant cuts each 256 weights into sub-blocks (Q4_K and Q5_K: 8 of 32 weights, Q6_K: 16 of 16) and tries some twenty scales for
// each, adding up a weighted error one weight after another. ggml does so for one sub-block at a time, and every addition waits for the
// one before it. Here lane k of each vector belongs to sub-block k, so that 16 searches run side by side while each lane still does
// ggml's operations in ggml's order. That order is what makes the bits equal: compile with -ffp-contract=off and without -ffast-math.
//
// What is degenerate (a sub-block without any spread, a scale that is rounded to zero) is handed to ggml's own function.
// `kquants.py` compiles this file and compares it with ggml before it is used.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "lanes.h"
#include "scales.h"

struct ggml_functions {
    size_t (*quantize_chunk)(int type, const float *source, void *out, int64_t start, int64_t rows, int64_t columns, const float *weights);
    uint16_t (*to_half)(float value);
    float (*from_half)(uint16_t bits);
};

namespace {

bool any(flags found) {
    const eight_flags both = found.a | found.b;
    int32_t sum = 0;
    for (int k = 0; k < 8; ++k) sum |= both[k];
    return sum != 0;
}

// Scale and offset of 16 sub-blocks of 32 weights, x ~ scale * q + low with q in 0..top, by weighted least squares from a starting scale
// and from `steps` + 1 others around it. False where a sub-block has too little spread for the search.
bool fit(const lanes x[32], const lanes weight[32], int top, float first, float step, int steps, lanes &scale, lanes &low) {
    lanes high = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    low = x[0];
    for (int i = 1; i < 32; ++i) {
        low = least(x[i], low);
        high = greatest(x[i], high);
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    const lanes zero = 0, limit = top, extent = greatest(magnitude(low), magnitude(high));
    low = least(zero, low);
    // Outside of these bounds a quotient could be infinite, or too large to be rounded.
    if (any(high - low < lanes(1e-30f)) || any(extent > lanes(1e30f))) return false;

    lanes q[32], error_sum = zero, inverse = limit / (high - low);
    scale = lanes(1) / inverse;
    for (int i = 0; i < 32; ++i) {
        const lanes near = greatest(least(rounded(inverse * (x[i] - low)), limit), zero);
        const lanes error = scale * near + low - x[i];
        error_sum += weight[i] * (error * error);
    }
    for (int attempt = 0; attempt <= steps; ++attempt) {
        const lanes range = high - low;  // of the best so far, as ggml has it
        if (any(magnitude(range) < (extent + magnitude(low)) * lanes(1e-5f))) return false;
        inverse = lanes(first + step * attempt + top) / range;
        lanes sum_q = zero, sum_qq = zero, sum_qx = zero;
        for (int i = 0; i < 32; ++i) {
            const lanes near = greatest(least(rounded(inverse * (x[i] - low)), limit), zero);
            const lanes weighted = weight[i] * near;
            q[i] = near;
            sum_q += weighted;
            sum_qq += weighted * near;
            sum_qx += weighted * x[i];
        }
        const lanes determinant = sum_w * sum_qq - sum_q * sum_q;
        lanes new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
        lanes new_low = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
        const flags positive = new_low > zero;
        new_scale = select(positive, sum_qx / sum_qq, new_scale);
        new_low = select(positive, zero, new_low);
        lanes total = zero;
        for (int i = 0; i < 32; ++i) {
            const lanes error = new_scale * q[i] + new_low - x[i];
            total += weight[i] * (error * error);
        }
        const flags better = (determinant > zero) & (total < error_sum);
        scale = select(better, new_scale, scale);
        low = select(better, new_low, low);
        error_sum = select(better, total, error_sum);
    }
    return true;
}

// Two blocks of Q4_K (top 15) or Q5_K (top 31). False for a block that ggml has to do.
void affine_pair(const float *const blocks[2], const float *const importance[2], int top, uint8_t *const out[2], bool done[2],
                 const ggml_functions &ggml) {
    const float *parts[LANES], *important[LANES];
    for (int k = 0; k < LANES; ++k) {
        parts[k] = blocks[k / 8] + 32 * (k % 8);
        if (importance[0]) important[k] = importance[k / 8] + 32 * (k % 8);
    }
    lanes x[32], weight[32], scale, low, sum_weight = 0;
    transpose<32>(parts, x);
    bool found;
    if (importance[0]) {
        lanes spread;
        for (int b = 0; b < 2; ++b) {
            float squares = 0;
            for (int i = 0; i < BLOCK; ++i) squares += blocks[b][i] * blocks[b][i];
            for (int k = 0; k < 8; ++k) spread.set(8 * b + k, 2 * squares / BLOCK);
        }
        transpose<32>(important, weight);
        for (int i = 0; i < 32; ++i) {
            const lanes inside = spread + x[i] * x[i];
            lanes root;
            for (int k = 0; k < LANES; ++k) root.set(k, sqrtf(inside[k]));
            weight[i] = weight[i] * root;
            sum_weight += weight[i];
        }
        found = fit(x, weight, top, -0.9f, 0.05f, 36, scale, low);
    } else {
        lanes squares = 0, average;
        for (int i = 0; i < 32; ++i) squares += x[i] * x[i];
        for (int k = 0; k < LANES; ++k) average.set(k, sqrtf(squares[k] / 32));
        for (int i = 0; i < 32; ++i) weight[i] = average + magnitude(x[i]);
        found = top == 15 ? fit(x, weight, top, -1.f, 0.1f, 20, scale, low) : fit(x, weight, top, -0.5f, 0.1f, 15, scale, low);
    }
    for (int b = 0; b < 2; ++b) {
        float scales[8], offsets[8], weights[8];
        for (int k = 0; k < 8; ++k) {
            scales[k] = scale[8 * b + k];
            offsets[k] = -low[8 * b + k];
            weights[k] = sum_weight[8 * b + k];
        }
        done[b] = found && pack_affine(blocks[b], scales, offsets, importance[0] ? weights : nullptr, top, out[b], ggml);
    }
}

// One block of Q6_K. False if ggml has to do it.
bool symmetric_block(const float *block, const float *importance, uint8_t *out, const ggml_functions &ggml) {
    const float *parts[LANES], *important[LANES];
    for (int k = 0; k < LANES; ++k) {
        parts[k] = block + 16 * k;
        if (importance) important[k] = importance + 16 * k;
    }
    lanes x[16], weight[16], extreme = 0, largest = 0;
    transpose<16>(parts, x);
    if (importance) transpose<16>(important, weight);
    for (int i = 0; i < 16; ++i) {
        const lanes size = magnitude(x[i]);
        const flags larger = size > largest;
        largest = select(larger, size, largest);
        extreme = select(larger, x[i], extreme);
        if (!importance) weight[i] = x[i] * x[i];
    }
    if (any(largest < lanes(SMALLEST)) || any(largest > lanes(1e30f))) return false;

    const lanes zero = 0, bottom = -32, top = 31;
    lanes scale, best;
    for (int attempt = -10; attempt <= 9; ++attempt) {
        const bool plain = attempt == -10;
        if (attempt == 0) continue;
        const lanes inverse = lanes(plain ? -32.f : -(32 + 0.1f * attempt)) / extreme;
        lanes sum_qx = zero, sum_qq = zero;
        for (int i = 0; i < 16; ++i) {
            const lanes q = greatest(least(rounded(inverse * x[i]), top), bottom);
            sum_qx += weight[i] * x[i] * q;
            sum_qq += weight[i] * q * q;
        }
        const lanes fitted = sum_qx / sum_qq;
        if (plain) {
            scale = select(sum_qq == zero, zero, fitted);
            best = scale * sum_qx;
        } else {
            const flags better = (sum_qq > zero) & (sum_qx * sum_qx > best * sum_qq);
            scale = select(better, fitted, scale);
            best = select(better, fitted * sum_qx, best);
        }
    }

    float scales[LANES];
    for (int k = 0; k < LANES; ++k) scales[k] = scale[k];
    return pack_symmetric(block, scales, out, ggml);
}

}  // namespace

// Rows to Q4_K (bits 4), Q5_K (5) or Q6_K (6), whose number in ggml is `type`. `importance`: one weight for each column, or null.
extern "C" void olpack_quantize_rows(int bits, int type, const float *x, uint8_t *out, int64_t rows, int64_t columns, const float *importance,
                                     const ggml_functions *ggml) {
    const int64_t per_row = columns / BLOCK, blocks = rows * per_row, size = bits == 4 ? 144 : bits == 5 ? 176 : 210;
    const auto weights_of = [&](int64_t block) { return importance ? importance + BLOCK * (block % per_row) : nullptr; };
    const auto leave_to_ggml = [&](int64_t block) {
        ggml->quantize_chunk(type, x + BLOCK * block, out + size * block, 0, 1, BLOCK, weights_of(block));
    };
    if (bits == 6) {
        for (int64_t block = 0; block < blocks; ++block)
            if (!symmetric_block(x + BLOCK * block, weights_of(block), out + size * block, *ggml)) leave_to_ggml(block);
        return;
    }
    for (int64_t block = 0; block < blocks; block += 2) {
        const int64_t other = block + 1 < blocks ? block + 1 : block;  // an odd one out is done twice
        const float *const pair[2] = {x + BLOCK * block, x + BLOCK * other};
        const float *const weights[2] = {weights_of(block), weights_of(other)};
        uint8_t *const places[2] = {out + size * block, out + size * other};
        bool done[2];
        affine_pair(pair, weights, bits == 4 ? 15 : 31, places, done, *ggml);
        if (!done[0]) leave_to_ggml(block);
        if (!done[1] && other != block) leave_to_ggml(other);
    }
}
