// Q4_0, Q8_0, Q4_K, Q5_K and Q6_K on a GPU: the results of ggml_quantize_chunk, bit for bit.
//
// ggml adds up the weighted error of each candidate scale one weight after another. Here each thread does that for a sub-block (Q4_K and
// Q5_K: 32 weights, Q6_K: 16) or a block of its own (Q4_0 and Q8_0: 32), with ggml's operations in ggml's order; a second kernel packs whole
// blocks. That order is what makes the bits equal: compile with -fmad=false on a GPU, with -ffp-contract=off on a CPU.
//
// What is degenerate (a sub-block without any spread, a scale that is rounded to zero or is infinite) is marked in `left` and not written:
// ggml's own function does those rows. `gpu_encoder.py` compiles this file for a GPU and compares it with ggml before it is used. As C++ for a
// CPU each kernel is a loop, which tests compare with ggml where there is no GPU.

#include "blocks.h"
#include "scales.h"

#ifdef __CUDACC__
#define EACH(index, count)                                               \
    const int64_t index = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; \
    if (index < (count))
#define KERNEL extern "C" __global__ void
#else
#define EACH(index, count) for (int64_t index = 0; index < (count); ++index)
#define KERNEL extern "C" void
#endif

// The buffers of one call. All but `x` and `importance` are written.
struct encoder_job {
    const float *x;           // [rows, columns]
    const float *importance;  // [columns]: the weight of each column's error; null: none
    float *scales;            // of each sub-block
    float *lows;              // of each sub-block of Q4_K and Q5_K: its offset, negated
    float *weights;           // of each sub-block of Q4_K and Q5_K: the sum of its weights
    float *squares;           // [rows]: the mean square of a row
    uint8_t *out;             // blocks
    uint8_t *left;            // of each block: 1 if ggml has to do it
    int64_t rows, columns;
    int64_t top;              // 15 for Q4_K, 31 for Q5_K
};

namespace {

constexpr float LARGE = 1e30f;           // a larger weight's quotient could be infinite
constexpr float SMALLEST_STEP = 1e-37f;  // the inverse of a smaller one could be infinite

// Conversions to and from half precision, to the nearest even.
struct halves_by_bits {
    uint16_t to_half(float value) const {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
        if (size >= 0x477ff000) return sign | 0x7c00;
        if (size >= 0x38800000) return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        if (size < 0x33000000) return sign;
        const uint32_t digits = (size & 0x7fffff) | 0x800000, shift = 126 - (size >> 23);
        const uint32_t kept = digits >> shift, rest = digits & ((1u << shift) - 1), tie = 1u << (shift - 1);
        return sign | (kept + (rest > tie || (rest == tie && (kept & 1))));
    }
    float from_half(uint16_t half) const {
        const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
        if (!(half & 0x7c00)) return (sign ? -1.f : 1.f) * (half & 0x3ff) * 0x1p-24f;
        const uint32_t bits = sign | (((uint32_t)(half & 0x7fff) << 13) + 0x38000000);
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
};
constexpr halves_by_bits HALVES{};

inline bool is_infinite(uint16_t half) { return (half & 0x7c00) == 0x7c00; }

inline float nan_value() {
    const uint32_t bits = 0x7fffffff;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

template <int COUNT>
inline void load(const float *from, float x[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = from[i];
}

// A block, of an even number of bytes at an even address.
template <int COUNT>
inline void store(const uint8_t bytes[COUNT], uint8_t *out) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) *(uint16_t *)(out + i) = bytes[i] | bytes[i + 1] << 8;
}

inline float rounded(float value) { return (value + ROUNDER) - ROUNDER; }

inline float clamped(float value, float bottom, float top) {
    value = value < top ? value : top;
    return value > bottom ? value : bottom;
}

// Scale and offset of 32 weights, x ~ scale * q + low with q in 0..top, by weighted least squares from a starting scale and from
// `steps` + 1 others around it. False where there is too little spread for the search.
inline bool fit(const float x[32], const float weight[32], float top, float first, float step, int steps, float &scale, float &low, float &sum_w) {
    float high = x[0], sum_x = weight[0] * x[0];
    low = x[0];
    sum_w = weight[0];
#pragma unroll
    for (int i = 1; i < 32; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    const float extent = fmaxf(fabsf(low), fabsf(high));
    low = low < 0 ? low : 0;
    if (high - low < 1e-30f || extent > LARGE) return false;
    float inverse = top / (high - low), error_sum = 0;
    scale = 1 / inverse;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const float near = clamped(rounded(inverse * (x[i] - low)), 0, top);
        const float error = scale * near + low - x[i];
        error_sum += weight[i] * (error * error);
    }
#pragma unroll 1
    for (int attempt = 0; attempt <= steps; ++attempt) {
        const float range = high - low;  // of the best so far, as ggml has it
        if (fabsf(range) < (extent + fabsf(low)) * 1e-5f) return false;
        inverse = (first + step * attempt + top) / range;
        float q[32], sum_q = 0, sum_qq = 0, sum_qx = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            q[i] = clamped(rounded(inverse * (x[i] - low)), 0, top);
            const float weighted = weight[i] * q[i];
            sum_q += weighted;
            sum_qq += weighted * q[i];
            sum_qx += weighted * x[i];
        }
        const float determinant = sum_w * sum_qq - sum_q * sum_q;
        if (!(determinant > 0)) continue;
        float new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
        float new_low = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
        if (new_low > 0) {
            new_low = 0;
            new_scale = sum_qx / sum_qq;
        }
        float total = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const float error = new_scale * q[i] + new_low - x[i];
            total += weight[i] * (error * error);
        }
        if (total < error_sum) {
            error_sum = total;
            scale = new_scale;
            low = new_low;
        }
    }
    return true;
}

// The scale of COUNT weights, x ~ scale * q with q in -HALF..HALF-1, by weighted least squares; `best_inverse` is what they are
// multiplied with before they are rounded to q. False where they are too small or too large for the search.
template <int COUNT, int HALF>
inline bool fit_symmetric(const float x[COUNT], const float weight[COUNT], float &scale, float &best_inverse) {
    float extreme = 0, largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (fabsf(x[i]) > largest) {
            largest = fabsf(x[i]);
            extreme = x[i];
        }
    if (largest < SMALLEST || largest > LARGE) return false;
    float best = 0;
#pragma unroll 1
    for (int attempt = -10; attempt <= 9; ++attempt) {
        const bool plain = attempt == -10;
        if (attempt == 0) continue;
        const float inverse = (plain ? -(float)HALF : -(HALF + 0.1f * attempt)) / extreme;
        float sum_qx = 0, sum_qq = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float q = clamped(rounded(inverse * x[i]), -HALF, HALF - 1);
            sum_qx += weight[i] * x[i] * q;
            sum_qq += weight[i] * q * q;
        }
        if (plain ? sum_qq != 0 : sum_qq > 0 && sum_qx * sum_qx > best * sum_qq) {
            scale = sum_qx / sum_qq;
            best = scale * sum_qx;
            best_inverse = inverse;
        } else if (plain) {
            scale = best = 0;
            best_inverse = inverse;
        }
    }
    return true;
}

void fit_affine_part(const encoder_job &job, int64_t part) {
    float x[32], weight[32], scale, low, sum_weight;
    load<32>(job.x + 32 * part, x);
    float first, step;
    int steps;
    if (job.importance) {
        const float *block = job.x + part / 8 * BLOCK, *important = job.importance + 32 * part % job.columns;
        float squares = 0;
        for (int i = 0; i < BLOCK; ++i) squares += block[i] * block[i];
        const float spread = 2 * squares / BLOCK;
#pragma unroll
        for (int i = 0; i < 32; ++i) weight[i] = important[i] * sqrtf(spread + x[i] * x[i]);
        first = -0.9f, step = 0.05f, steps = 36;
    } else {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) squares += x[i] * x[i];
        const float average = sqrtf(squares / 32);
#pragma unroll
        for (int i = 0; i < 32; ++i) weight[i] = average + fabsf(x[i]);
        first = job.top == 15 ? -1.f : -0.5f, step = 0.1f, steps = job.top == 15 ? 20 : 15;
    }
    const bool found = fit(x, weight, job.top, first, step, steps, scale, low, sum_weight);
    job.scales[part] = found ? scale : nan_value();
    job.lows[part] = low;
    job.weights[part] = sum_weight;
}

template <int BYTES>
void pack_affine_block(const encoder_job &job, int64_t block) {
    float offsets[8];
    bool found = true;
    for (int k = 0; k < 8; ++k) {
        found &= job.scales[8 * block + k] == job.scales[8 * block + k];
        offsets[k] = -job.lows[8 * block + k];
    }
    uint8_t bytes[BYTES];
    const float *weights = job.importance ? job.weights + 8 * block : nullptr;
    found = found && pack_affine(job.x + BLOCK * block, job.scales + 8 * block, offsets, weights, BYTES == 144 ? 15 : 31, bytes, HALVES) &&
            !is_infinite(bytes[0] | bytes[1] << 8) && !is_infinite(bytes[2] | bytes[3] << 8);
    job.left[block] = !found;
    if (found) store<BYTES>(bytes, job.out + BYTES * block);
}

void fit_symmetric_part(const encoder_job &job, int64_t part) {
    float x[16], weight[16], scale, inverse;
    load<16>(job.x + 16 * part, x);
    const float *important = job.importance ? job.importance + 16 * part % job.columns : nullptr;
#pragma unroll
    for (int i = 0; i < 16; ++i) weight[i] = important ? important[i] : x[i] * x[i];
    job.scales[part] = fit_symmetric<16, 32>(x, weight, scale, inverse) ? scale : nan_value();
}

void pack_symmetric_block(const encoder_job &job, int64_t block) {
    bool found = true;
    for (int k = 0; k < 16; ++k) found &= job.scales[16 * block + k] == job.scales[16 * block + k];
    uint8_t bytes[210];
    found = found && pack_symmetric(job.x + BLOCK * block, job.scales + 16 * block, bytes, HALVES) && !is_infinite(bytes[208] | bytes[209] << 8);
    job.left[block] = !found;
    if (found) store<210>(bytes, job.out + 210 * block);
}

void block_of_4_bits(const encoder_job &job, int64_t block) {
    float x[32], weight[32], d, inverse;
    load<32>(job.x + 32 * block, x);
    bool found;
    uint8_t q[32], bytes[18];
    if (job.importance) {
        const float *important = job.importance + 32 * block % job.columns, square = job.squares[32 * block / job.columns];
#pragma unroll
        for (int i = 0; i < 32; ++i) weight[i] = important[i] * sqrtf(square + x[i] * x[i]);
        found = fit_symmetric<32, 8>(x, weight, d, inverse);
        if (found)
            for (int i = 0; i < 32; ++i) q[i] = (int)clamped(rounded(inverse * x[i]), -8, 7) + 8;
    } else {
        float extreme = 0, largest = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (largest < fabsf(x[i])) {
                largest = fabsf(x[i]);
                extreme = x[i];
            }
        d = extreme / -8;
        found = fabsf(d) > SMALLEST_STEP;
        inverse = 1 / d;
        if (found)
            for (int i = 0; i < 32; ++i) {
                const int near = (int8_t)(int)(x[i] * inverse + 8.5f);
                q[i] = near < 15 ? near : 15;
            }
    }
    const uint16_t half = HALVES.to_half(d);
    found = found && d == d && !is_infinite(half);
    job.left[block] = !found;
    if (!found) return;
    memcpy(bytes, &half, 2);
    write_nibbles(q, bytes + 2);
    store<18>(bytes, job.out + 18 * block);
}

void block_of_8_bits(const encoder_job &job, int64_t block) {
    float x[32], largest = 0;
    load<32>(job.x + 32 * block, x);
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const float d = largest / 127, inverse = 1 / d;
    const uint16_t half = HALVES.to_half(d);
    const bool found = d > SMALLEST_STEP && !is_infinite(half);
    job.left[block] = !found;
    if (!found) return;
    uint8_t bytes[34];
    memcpy(bytes, &half, 2);
#pragma unroll
    for (int i = 0; i < 32; ++i) bytes[2 + i] = (int8_t)(int)roundf(x[i] * inverse);
    store<34>(bytes, job.out + 34 * block);
}

void mean_square(const encoder_job &job, int64_t row) {
    float squares = 0;
    for (int64_t i = 0; i < job.columns; ++i) squares += job.x[row * job.columns + i] * job.x[row * job.columns + i];
    job.squares[row] = squares / job.columns;
}

}  // namespace

KERNEL fit_q45_k(encoder_job job) {
    EACH(part, job.rows * job.columns / 32) fit_affine_part(job, part);
}
KERNEL pack_q4_k(encoder_job job) {
    EACH(block, job.rows * job.columns / BLOCK) pack_affine_block<144>(job, block);
}
KERNEL pack_q5_k(encoder_job job) {
    EACH(block, job.rows * job.columns / BLOCK) pack_affine_block<176>(job, block);
}
KERNEL fit_q6_k(encoder_job job) {
    EACH(part, job.rows * job.columns / 16) fit_symmetric_part(job, part);
}
KERNEL pack_q6_k(encoder_job job) {
    EACH(block, job.rows * job.columns / BLOCK) pack_symmetric_block(job, block);
}
KERNEL mean_squares(encoder_job job) {
    EACH(row, job.rows) mean_square(job, row);
}
KERNEL encode_q4_0(encoder_job job) {
    EACH(block, job.rows * job.columns / 32) block_of_4_bits(job, block);
}
KERNEL encode_q8_0(encoder_job job) {
    EACH(block, job.rows * job.columns / 32) block_of_8_bits(job, block);
}
