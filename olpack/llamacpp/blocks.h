// The bytes of ggml's blocks, from scales and codes.

#pragma once

#include <cstdint>
#include <cstring>

constexpr int BLOCK = 256;  // weights of a K-quant with one pair of half-precision scales
constexpr float ROUNDER = 12582912.f;  // 1.5 * 2^23: added to a number of at most 22 bits, it rounds that to the nearest integer

// Four bits of each of 32 codes.
inline void write_nibbles(const uint8_t q[32], uint8_t *out) {
    for (int i = 0; i < 16; ++i) out[i] = (q[i] & 15) | (q[i + 16] & 15) << 4;
}

// The fifth bit of each of 32 codes.
inline void write_fifth_bits(const uint8_t q[32], uint8_t *out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (uint32_t)(q[i] >> 4) << i;
    memcpy(out, &bits, 4);
}

// Two bits of each of 256 codes: 64 bytes.
inline void write_pairs(const uint8_t q[BLOCK], uint8_t *out) {
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 32; ++i) {
            const uint8_t *from = q + 128 * half + i;
            out[32 * half + i] = (from[0] & 3) | (from[32] & 3) << 2 | (from[64] & 3) << 4 | (from[96] & 3) << 6;
        }
}

// Q2_K: 16 bytes of 4-bit scales and offsets, 64 bytes of codes 0..3, two halves.
inline void write_q2_k(const uint8_t q[BLOCK], const uint8_t scales[16], const uint8_t offsets[16], const uint16_t halves[2], uint8_t *out) {
    for (int j = 0; j < 16; ++j) out[j] = scales[j] | offsets[j] << 4;
    write_pairs(q, out + 16);
    memcpy(out + 80, halves, 4);
}

// Q3_K: 32 bytes of third bits, 64 bytes of two bits, 12 bytes of 6-bit scales, a half. Codes 0..7 stand for -4..3, scales -32..31.
inline void write_q3_k(const uint8_t q[BLOCK], const int8_t scales[16], uint16_t half, uint8_t *out) {
    memset(out, 0, 110);
    for (int i = 0; i < BLOCK; ++i) out[i % 32] |= (q[i] >> 2) << (i / 32);
    write_pairs(q, out + 32);
    for (int j = 0; j < 16; ++j) {
        const int scale = scales[j] + 32;
        out[96 + j % 8] |= (scale & 15) << (j < 8 ? 0 : 4);
        out[104 + j % 4] |= (scale >> 4) << 2 * (j / 4);
    }
    memcpy(out + 108, &half, 2);
}

// Q4_K (top 15) or Q5_K (31): two halves, 12 bytes of 6-bit scales and offsets, for Q5_K 32 bytes of fifth bits, 128 bytes of four bits.
inline void write_q45_k(const uint8_t q[BLOCK], const uint8_t scales[8], const uint8_t offsets[8], const uint16_t halves[2], int top, uint8_t *out) {
    memcpy(out, halves, 4);
    for (int j = 0; j < 4; ++j) {
        out[4 + j] = scales[j] | (scales[j + 4] >> 4) << 6;
        out[8 + j] = offsets[j] | (offsets[j + 4] >> 4) << 6;
        out[12 + j] = (scales[j + 4] & 15) | (offsets[j + 4] & 15) << 4;
    }
    uint8_t *low_bits = out + 16;
    if (top > 15) {
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int j = 0; j < 8; ++j) high |= (q[32 * j + i] >> 4) << j;
            out[16 + i] = high;
        }
        low_bits += 32;
    }
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 32; ++i) low_bits[32 * j + i] = (q[64 * j + i] & 15) | (q[64 * j + 32 + i] & 15) << 4;
}

// Q6_K: 128 bytes of low bits, 64 of high bits, 16 scales of 8 bits, a half. Codes 0..63 stand for -32..31.
inline void write_q6_k(const uint8_t q[BLOCK], const int8_t scales[16], uint16_t half, uint8_t *out) {
    for (int half_block = 0; half_block < 2; ++half_block) {
        const uint8_t *from = q + 128 * half_block;
        for (int i = 0; i < 32; ++i) {
            out[64 * half_block + i] = (from[i] & 15) | (from[i + 64] & 15) << 4;
            out[64 * half_block + 32 + i] = (from[i + 32] & 15) | (from[i + 96] & 15) << 4;
            out[128 + 32 * half_block + i] = from[i] >> 4 | (from[i + 32] >> 4) << 2 | (from[i + 64] >> 4) << 4 | (from[i + 96] >> 4) << 6;
        }
    }
    memcpy(out + 192, scales, 16);
    memcpy(out + 208, &half, 2);
}
