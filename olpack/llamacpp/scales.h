// From the scales of sub-blocks to whole blocks of Q4_K, Q5_K and Q6_K: what the CPU's and the GPU's encoder have in common.
//
// The operations and their order are ggml's: compile with -ffp-contract=off, on a GPU without fused multiplications and additions.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "blocks.h"

constexpr int TOP = 63;             // of the 6-bit scales of Q4_K and Q5_K
constexpr float SMALLEST = 1e-15f;  // ggml treats sub-blocks of Q6_K below it as zero

// The nearest integer, and for what is out of its range the same nonsense as ggml's.
inline int32_t nearest(float value) {
    float moved = value + ROUNDER;
    int32_t bits;
    memcpy(&bits, &moved, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

// 8 values >= 0 as q * scale with q in 0..TOP, by weighted least squares; returns the scale.
inline float fit_scales(const float x[8], const float weight[8], uint8_t q[8]) {
    float largest = 0;
    for (int i = 0; i < 8; ++i) largest = largest > x[i] ? largest : x[i];
    if (largest < SMALLEST) {
        memset(q, 0, 8);
        return 0;
    }
    float inverse = TOP / largest, least = 0;
    {
        const float scale = 1 / inverse;
        for (int i = 0; i < 8; ++i) {
            const float error = x[i] - scale * (uint8_t)nearest(inverse * x[i]);
            least += weight[i] * error * error;
        }
    }
    for (int attempt = -4; attempt <= 4; ++attempt) {
        if (attempt == 0) continue;
        const float tried = (0.1f * attempt + TOP) / largest, scale = 1 / tried;
        float total = 0;
        for (int i = 0; i < 8; ++i) {
            const int32_t near = nearest(tried * x[i]);
            const float error = x[i] - scale * (near < TOP ? near : TOP);
            total += weight[i] * error * error;
        }
        if (total < least) {
            least = total;
            inverse = tried;
        }
    }
    float sum_qx = 0, sum_qq = 0;
    for (int i = 0; i < 8; ++i) {
        const int32_t near = nearest(inverse * x[i]);
        q[i] = near < TOP ? near : TOP;
        sum_qx += weight[i] * x[i] * q[i];
        sum_qq += weight[i] * q[i] * q[i];
    }
    for (int round = 0; round < 5; ++round) {
        bool changed = false;
        for (int i = 0; i < 8; ++i) {
            float others_qx = sum_qx - weight[i] * x[i] * q[i], others_qq = sum_qq - weight[i] * q[i] * q[i];
            if (!(others_qx > 0 && others_qq > 0)) continue;
            int32_t near = nearest(x[i] * others_qq / others_qx);
            near = near < TOP ? near : TOP;
            if (near == q[i]) continue;
            others_qx += weight[i] * x[i] * near;
            others_qq += weight[i] * near * near;
            if (others_qx * others_qx * sum_qq > sum_qx * sum_qx * others_qq) {
                q[i] = near;
                sum_qx = others_qx;
                sum_qq = others_qq;
                changed = true;
            }
        }
        if (!changed) break;
    }
    return sum_qq > 0 ? sum_qx / sum_qq : 0;
}

// One block of Q4_K (top 15) or Q5_K (31). False if ggml has to do it.
//
// scales, offsets: of its sub-blocks. weights: of each, where the columns have an importance; else null. halves: `to_half` and `from_half`.
template <class Halves>
bool pack_affine(const float *x, const float scales[8], const float offsets[8], const float *weights, int top, uint8_t *out, const Halves &halves) {
    uint8_t scale_q[8], offset_q[8];
    float scale, offset;
    if (weights) {
        scale = fit_scales(scales, weights, scale_q);
        offset = fit_scales(offsets, weights, offset_q);
    } else {
        float largest = 0, largest_offset = 0;
        for (int k = 0; k < 8; ++k) {
            largest = scales[k] > largest ? scales[k] : largest;
            largest_offset = offsets[k] > largest_offset ? offsets[k] : largest_offset;
        }
        const float inverse = largest > 0 ? TOP / largest : 0, inverse_offset = largest_offset > 0 ? TOP / largest_offset : 0;
        for (int k = 0; k < 8; ++k) {
            const uint8_t near = nearest(inverse * scales[k]), near_offset = nearest(inverse_offset * offsets[k]);
            scale_q[k] = near < TOP ? near : TOP;
            offset_q[k] = near_offset < TOP ? near_offset : TOP;
        }
        scale = largest / TOP;
        offset = largest_offset / TOP;
    }
    const uint16_t rounded[2] = {halves.to_half(scale), halves.to_half(offset)};
    const float unit = halves.from_half(rounded[0]), offset_unit = halves.from_half(rounded[1]);
    uint8_t q[BLOCK];
    for (int j = 0; j < 8; ++j) {
        // What does not fit into 6 bits is cut as ggml cuts it, when it packs a scale and takes it out again.
        const float d = unit * (scale_q[j] & TOP);
        if (!d) return false;
        const float below = offset_unit * (offset_q[j] & TOP);
        for (int i = 0; i < 32; ++i) {
            int32_t near = nearest((x[32 * j + i] + below) / d);
            near = near < 0 ? 0 : near;
            q[32 * j + i] = near < top ? near : top;
        }
    }
    write_q45_k(q, scale_q, offset_q, rounded, top, out);
    return true;
}

// One block of Q6_K, from the scales of its sub-blocks. False if ggml has to do it.
template <class Halves>
bool pack_symmetric(const float *x, const float scales[16], uint8_t *out, const Halves &halves) {
    float widest = 0, widest_size = 0;
    for (int k = 0; k < 16; ++k)
        if (fabsf(scales[k]) > widest_size) {
            widest_size = fabsf(scales[k]);
            widest = scales[k];
        }
    if (!(widest_size >= SMALLEST)) return false;
    const float inverse = -128.f / widest;
    const uint16_t half = halves.to_half(1 / inverse);
    const float unit = halves.from_half(half);
    int8_t scale_q[16];
    uint8_t q[BLOCK];
    for (int k = 0; k < 16; ++k) {
        const int32_t near = nearest(inverse * scales[k]);
        scale_q[k] = near < 127 ? near : 127;
        const float d = unit * scale_q[k];
        if (!d) return false;
        for (int i = 0; i < 16; ++i) {
            int32_t value = nearest(x[16 * k + i] / d);
            value = value < -32 ? -32 : value;
            q[16 * k + i] = (value < 31 ? value : 31) + 32;
        }
    }
    write_q6_k(q, scale_q, half, out);
    return true;
}
