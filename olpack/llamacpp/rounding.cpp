// The scales and offsets of ggml's blocks that minimize the weighted squared error, for 16 blocks or sub-blocks at a time.
//
// ggml tries up to some twenty scales for a block, and takes the smallest and the largest weight as the ends of the scale where it has
// no importance. Here a grid of scales (and of offsets) is tried, each with the least-squares solution for the codes that it gives, and the
// best goes through alternating steps: codes for the scale, scale for the codes. In a K-quant the small integers that scale its sub-blocks
// are then tried next to their nearest value, with the codes of each, in turns with a least-squares solution for the block's two halves.
//
// A block is written only if its error is smaller than that of what is there, which ggml made. Both are measured in double precision, on
// the weights that ggml's own dequantizer gives. Compile with -ffp-contract=off and without -ffast-math: the same bytes on every machine.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "lanes.h"

struct rounding_functions {
    uint16_t (*to_half)(float value);
    float (*from_half)(uint16_t bits);
    void (*to_float)(const void *blocks, float *out, int64_t count);
};

namespace {

lanes within(lanes value, lanes bottom, lanes top) { return greatest(least(value, top), bottom); }
lanes inverse_of(lanes value) { return select(value == lanes(0), lanes(0), lanes(1) / value); }

constexpr float LARGEST = 3e38f;

// N weights of 16 blocks, and the weights of their errors.
template <int N> struct Weights {
    lanes x[N], w[N], sum_w;
};

// The levels bottom .. top, all whole numbers.
struct Whole {
    float bottom, top;
    lanes operator()(lanes value) const { return within(rounded(value), bottom, top); }
    uint8_t code(float level) const { return (uint8_t)(int)(level - bottom); }
};

constexpr int8_t TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The sixteen levels of IQ4_NL.
struct Uneven {
    static constexpr float bottom = -127, top = 113;
    lanes operator()(lanes value) const {
        lanes level = TABLE[0];
        for (int k = 1; k < 16; ++k) level = select(value > lanes(0.5f * (TABLE[k - 1] + TABLE[k])), lanes(TABLE[k]), level);
        return level;
    }
    uint8_t code(float level) const {
        int k = 0;
        while (TABLE[k] < level) ++k;
        return k;
    }
};

struct ScaleSums {
    lanes error = 0, eq = 0, qq = 0;  // of w e e, w e q and w q q, where e = x - scale q
};

template <int N, class Levels> ScaleSums scale_sums(const Weights<N> &part, const Levels &levels, lanes scale) {
    ScaleSums sums;
    const lanes inverse = inverse_of(scale);
    for (int i = 0; i < N; ++i) {
        const lanes q = levels(part.x[i] * inverse), e = part.x[i] - scale * q, we = part.w[i] * e;
        sums.error += we * e;
        sums.eq += we * q;
        sums.qq += part.w[i] * q * q;
    }
    return sums;
}

// `steps` scales of which each is `factor` times the one before. The first is `first` times that which gives the largest weight the last
// level: a larger scale leaves levels at the end unused, and a smaller one cuts weights.
struct ScaleGrid {
    int steps;
    float first, factor;
};

constexpr int TURNS = 3;  // alternating steps after the grid

// The scale of each lane, x ~ scale * q with q one of the levels.
template <int N, class Levels> lanes fit_scale(const Weights<N> &part, const Levels &levels, const ScaleGrid &grid) {
    lanes extreme = 0, best = 0, best_error = LARGEST;
    for (int i = 0; i < N; ++i) extreme = select(magnitude(part.x[i]) > magnitude(extreme), part.x[i], extreme);
    const auto attempt = [&](lanes scale) {
        const ScaleSums sums = scale_sums(part, levels, scale);
        const lanes step = sums.eq * inverse_of(sums.qq), error = sums.error - step * sums.eq;
        const flags better = error < best_error;
        best = select(better, scale + step, best);
        best_error = select(better, error, best_error);
    };
    // As many levels on both sides: a scale of the other sign is the same.
    for (int sign = 0; sign < (levels.bottom == -levels.top ? 1 : 2); ++sign) {
        lanes scale = extreme * lanes(grid.first / (sign == 0 ? levels.top : levels.bottom));
        for (int k = 0; k < grid.steps; ++k, scale = scale * lanes(grid.factor)) attempt(scale);
    }
    for (int turn = 0; turn < TURNS; ++turn) attempt(best);
    return best;
}

struct AffineSums {
    lanes error = 0, e = 0, eq = 0, q = 0, qq = 0;  // of w e e, w e, w e q, w q and w q q, where e = x - (scale q + low)
};

template <int N> AffineSums affine_sums(const Weights<N> &part, float top, lanes scale, lanes low) {
    AffineSums sums;
    const lanes inverse = inverse_of(scale);
    for (int i = 0; i < N; ++i) {
        const lanes q = within(rounded((part.x[i] - low) * inverse), 0, top), e = part.x[i] - (scale * q + low);
        const lanes we = part.w[i] * e, wq = part.w[i] * q;
        sums.error += we * e;
        sums.e += we;
        sums.eq += we * q;
        sums.q += wq;
        sums.qq += wq * q;
    }
    return sums;
}

template <int N> lanes affine_error(const Weights<N> &part, float top, lanes scale, lanes low) {
    lanes error = 0;
    const lanes inverse = inverse_of(scale);
    for (int i = 0; i < N; ++i) {
        const lanes q = within(rounded((part.x[i] - low) * inverse), 0, top), e = part.x[i] - (scale * q + low);
        error += part.w[i] * e * e;
    }
    return error;
}

// One least-squares step for the codes of `sums`: scale and low move there; the error that they then have with the same codes.
template <int N> lanes affine_step(const Weights<N> &part, const AffineSums &sums, bool below_zero, lanes &scale, lanes &low) {
    const lanes determinant = part.sum_w * sums.qq - sums.q * sums.q;
    const flags regular = determinant > lanes(1e-5f) * part.sum_w * sums.qq;
    const lanes by = inverse_of(determinant), zero = 0;
    lanes by_scale = select(regular, (part.sum_w * sums.eq - sums.q * sums.e) * by, zero);
    lanes by_low = select(regular, (sums.qq * sums.e - sums.q * sums.eq) * by, sums.e * inverse_of(part.sum_w));
    if (below_zero) {
        // Where the offset would have the wrong sign it is zero, and the scale the best for that.
        const flags above = (low + by_low) > zero;
        by_low = select(above, zero - low, by_low);
        by_scale = select(above, (sums.eq - by_low * sums.q) * inverse_of(sums.qq), by_scale);
    }
    scale = scale + by_scale;
    low = low + by_low;
    // error(d) = error - 2 (ds eq + dl e) + ds ds qq + 2 ds dl q + dl dl w
    const lanes change = by_scale * (by_scale * sums.qq + lanes(2) * (by_low * sums.q - sums.eq)) + by_low * (by_low * part.sum_w - lanes(2) * sums.e);
    return sums.error + change;
}

// `steps` distances by which each end of the scale is moved inwards from the smallest and the largest weight, `first` and so on in `step`s,
// which count the distance of two levels.
struct AffineGrid {
    int steps;
    float first, step;
};

// Scale and offset of each lane, x ~ scale * q + low with q in 0 .. top.
template <int N> void fit_affine(const Weights<N> &part, float top, const AffineGrid &grid, bool below_zero, lanes &scale, lanes &low) {
    lanes bottom = part.x[0], high = part.x[0], best_error = LARGEST;
    for (int i = 1; i < N; ++i) {
        bottom = least(part.x[i], bottom);
        high = greatest(part.x[i], high);
    }
    if (below_zero) {
        bottom = least(bottom, 0);
        high = greatest(high, 0);
    }
    scale = 0, low = bottom;
    const auto attempt = [&](lanes tried_scale, lanes tried_low) {
        const AffineSums sums = affine_sums(part, top, tried_scale, tried_low);
        const lanes error = affine_step(part, sums, below_zero, tried_scale, tried_low);
        const flags better = error < best_error;
        scale = select(better, tried_scale, scale);
        low = select(better, tried_low, low);
        best_error = select(better, error, best_error);
    };
    const lanes range = high - bottom;
    for (int a = 0; a < grid.steps; ++a)
        for (int b = 0; b < grid.steps; ++b) {
            const float below = (grid.first + a * grid.step) / top, above = (grid.first + b * grid.step) / top;
            attempt(range * lanes((1 - below - above) / top), bottom + range * lanes(below));
        }
    for (int turn = 0; turn < TURNS; ++turn) attempt(scale, low);
}

double sum_of(lanes values, int first, int count) {
    double sum = 0;
    for (int k = first; k < first + count; ++k) sum += values[k];
    return sum;
}

float largest_of(lanes values, int first, int count) {
    float largest = 0;
    for (int k = first; k < first + count; ++k) largest = fabsf(values[k]) > fabsf(largest) ? values[k] : largest;
    return largest;
}

void fill(lanes &values, int first, int count, float value) {
    for (int k = first; k < first + count; ++k) values.set(k, value);
}

float half_of(float value, const rounding_functions &ggml) { return ggml.from_half(ggml.to_half(value)); }

// How many units of a K-quant are tried by what their rounding of the scales costs, and how many turns improve the best.
constexpr int UNITS = 40, ROUNDS = 4;

// Scales (whole numbers of `smallest` .. `largest`) of 16 sub-blocks, and the unit that they count, of a K-quant without offsets.
template <int N> void fit_scaled(const Weights<N> &part, Whole levels, float smallest, float largest, const ScaleGrid &grid, lanes &scales, float &unit,
                                 const rounding_functions &ggml) {
    lanes target = fit_scale(part, levels, grid);
    ScaleSums sums = scale_sums(part, levels, target);
    const float widest = largest_of(target, 0, LANES);
    double least_model = INFINITY;
    float tried = 0;
    for (int sign = 0; sign < 2; ++sign)
        for (int k = 0; k < UNITS; ++k) {
            const float reach = sign ? largest : smallest, d = widest / (reach * (1.01f - 0.35f * k / UNITS));
            const lanes off = lanes(d) * within(rounded(target * lanes(1 / d)), smallest, largest) - target;
            const double model = sum_of(off * off * sums.qq, 0, LANES);
            if (model < least_model) least_model = model, tried = d;
        }
    double least_error = INFINITY;
    for (int round = 0; round < ROUNDS; ++round) {
        tried = half_of(tried, ggml);
        if (tried == 0) return;
        const lanes nearest = rounded(target * lanes(1 / tried));
        lanes found = 0, found_error = LARGEST;
        for (int aside = -1; aside <= 1; ++aside) {
            const lanes number = within(nearest + lanes(aside), smallest, largest);
            const lanes error = scale_sums(part, levels, lanes(tried) * number).error;
            const flags better = error < found_error;
            found = select(better, number, found);
            found_error = select(better, error, found_error);
        }
        const double error = sum_of(found_error, 0, LANES);
        if (!(error < least_error)) break;
        least_error = error, scales = found, unit = tried;
        const lanes used = lanes(tried) * found;
        sums = scale_sums(part, levels, used);
        target = used + sums.eq * inverse_of(sums.qq);
        const double qq = sum_of(found * found * sums.qq, 0, LANES);
        if (!(qq > 0)) break;
        tried += sum_of(found * sums.eq, 0, LANES) / qq;
    }
}

// Scales and offsets (0 .. `most`) of the sub-blocks of LANES / PER blocks of a K-quant, and the two units of each block.
template <int N, int PER> void fit_affine_scaled(const Weights<N> &part, float top, float most, const AffineGrid &grid, lanes &scales, lanes &offsets,
                                                 lanes &unit, lanes &offset_unit, const rounding_functions &ggml) {
    constexpr int GROUPS = LANES / PER;
    lanes scale, low, d = 0, dm = 0;
    fit_affine(part, top, grid, true, scale, low);
    AffineSums sums = affine_sums(part, top, scale, low);
    const lanes by_w = inverse_of(part.sum_w);
    for (int g = 0; g < GROUPS; ++g) {
        const float widest = largest_of(scale, g * PER, PER);
        double least_model = INFINITY;
        float tried = 0;
        for (int k = 0; k < UNITS; ++k) {
            const float one = widest / (most * (1.01f - 0.4f * k / UNITS));
            const lanes off = lanes(one) * within(rounded(scale * inverse_of(one)), 0, most) - scale;
            const double model = sum_of(off * off * (sums.qq - sums.q * sums.q * by_w), g * PER, PER);
            if (model < least_model) least_model = model, tried = one;
        }
        tried = half_of(tried, ggml);
        fill(d, g * PER, PER, tried);
        const lanes off = lanes(tried) * within(rounded(scale * inverse_of(tried)), 0, most) - scale;
        const lanes wanted = least(low - off * sums.q * by_w, 0);
        const float deepest = -largest_of(wanted, g * PER, PER);
        least_model = INFINITY, tried = 0;
        for (int k = 0; k < UNITS; ++k) {
            const float one = deepest / (most * (1.01f - 0.4f * k / UNITS));
            const lanes rest = lanes(one) * within(rounded(wanted * lanes(-1) * inverse_of(one)), 0, most) + wanted;
            const double model = sum_of(rest * rest * part.sum_w, g * PER, PER);
            if (model < least_model) least_model = model, tried = one;
        }
        fill(dm, g * PER, PER, half_of(tried, ggml));
    }
    double least_error[GROUPS];
    for (double &one : least_error) one = INFINITY;
    for (int round = 0; round < ROUNDS; ++round) {
        const lanes by_d = inverse_of(d), by_dm = inverse_of(dm), nearest = rounded(scale * by_d);
        lanes found = 0, found_offset = 0, found_error = LARGEST;
        for (int aside = -1; aside <= 1; ++aside) {
            const lanes number = within(nearest + lanes(aside), 0, most), tried = d * number;
            const lanes wanted = low - (tried - scale) * sums.q * by_w, middle = rounded(lanes(-1) * wanted * by_dm);
            for (int below = -1; below <= 1; ++below) {
                const lanes offset = within(middle + lanes(below), 0, most);
                const lanes error = affine_error(part, top, tried, lanes(-1) * dm * offset);
                const flags better = error < found_error;
                found = select(better, number, found);
                found_offset = select(better, offset, found_offset);
                found_error = select(better, error, found_error);
            }
        }
        bool improved = false;
        const lanes used = d * found, used_low = lanes(-1) * dm * found_offset;
        sums = affine_sums(part, top, used, used_low);
        scale = used, low = used_low;
        affine_step(part, sums, true, scale, low);
        for (int g = 0; g < GROUPS; ++g) {
            const int first = g * PER;
            const double error = sum_of(found_error, first, PER);
            if (error < least_error[g]) {
                improved = true;
                least_error[g] = error;
                for (int k = first; k < first + PER; ++k) {
                    scales.set(k, found[k]);
                    offsets.set(k, found_offset[k]);
                    unit.set(k, d[k]);
                    offset_unit.set(k, dm[k]);
                }
            }
            const double a = sum_of(found * found * sums.qq, first, PER), b = sum_of(found * found_offset * sums.q, first, PER);
            const double c = sum_of(found_offset * found_offset * part.sum_w, first, PER);
            const double right = sum_of(found * sums.eq, first, PER), right_offset = -sum_of(found_offset * sums.e, first, PER);
            const double determinant = a * c - b * b;
            double by_unit = a > 0 ? right / a : 0, by_offset = 0;
            if (determinant > 1e-9 * a * c) {
                by_unit = (right * c + right_offset * b) / determinant;
                by_offset = (right_offset * a + right * b) / determinant;
            }
            fill(d, first, PER, half_of(d[first] + by_unit, ggml));
            fill(dm, first, PER, half_of(dm[first] + by_offset > 0 ? dm[first] + by_offset : 0, ggml));
        }
        if (!improved) break;
    }
}

// LANES parts of N weights, one after the other in blocks of PER parts. The search sees the weights of a block relative to their mean, and none
// that is zero, for which every code would be as good; the final comparison has them as they are.
template <int N, int PER> Weights<N> load(const float *const values[LANES / PER], const float *const weights[LANES / PER]) {
    const float *x[LANES], *w[LANES];
    float relative[LANES / PER][N * PER];
    for (int g = 0; g < LANES / PER; ++g) {
        double mean = 0;
        for (int i = 0; i < N * PER; ++i) mean += weights[g][i];
        mean /= N * PER;
        for (int i = 0; i < N * PER; ++i) relative[g][i] = mean > 0 ? (float)(weights[g][i] / mean) + 1e-6f : 1;
    }
    for (int k = 0; k < LANES; ++k) {
        x[k] = values[k / PER] + N * (k % PER);
        w[k] = relative[k / PER] + N * (k % PER);
    }
    Weights<N> part;
    transpose<N>(x, part.x);
    transpose<N>(w, part.w);
    part.sum_w = 0;
    for (int i = 0; i < N; ++i) part.sum_w += part.w[i];
    return part;
}

// 16 blocks of 32 weights of a type with one scale.
template <class Levels> void flat_scale(const Weights<32> &part, const Levels &levels, const ScaleGrid &grid, uint16_t halves[LANES][2],
                                        uint8_t q[LANES][32], const rounding_functions &ggml) {
    const lanes scale = fit_scale(part, levels, grid);
    lanes used;
    for (int k = 0; k < LANES; ++k) {
        halves[k][0] = ggml.to_half(scale[k]);
        used.set(k, ggml.from_half(halves[k][0]));
    }
    const lanes inverse = inverse_of(used);
    for (int i = 0; i < 32; ++i) {
        const lanes level = levels(part.x[i] * inverse);
        for (int k = 0; k < LANES; ++k) q[k][i] = levels.code(level[k]);
    }
}

void flat_affine(const Weights<32> &part, float top, const AffineGrid &grid, uint16_t halves[LANES][2], uint8_t q[LANES][32],
                 const rounding_functions &ggml) {
    lanes scale, low;
    fit_affine(part, top, grid, false, scale, low);
    for (int k = 0; k < LANES; ++k) {
        halves[k][0] = ggml.to_half(scale[k]);
        halves[k][1] = ggml.to_half(low[k]);
        scale.set(k, ggml.from_half(halves[k][0]));
        low.set(k, ggml.from_half(halves[k][1]));
    }
    const lanes inverse = inverse_of(scale);
    for (int i = 0; i < 32; ++i) {
        const lanes level = within(rounded((part.x[i] - low) * inverse), 0, top);
        for (int k = 0; k < LANES; ++k) q[k][i] = (uint8_t)level[k];
    }
}

enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20 };

// LANES blocks of 32 weights, to `out`.
void flat_blocks(int type, const float *const values[LANES], const float *const weights[LANES], uint8_t *const out[LANES],
                 const rounding_functions &ggml) {
    const Weights<32> part = load<32, 1>(values, weights);
    uint16_t halves[LANES][2];
    uint8_t q[LANES][32];
    if (type == Q4_0) flat_scale(part, Whole{-8, 7}, {32, 1.2f, 0.968f}, halves, q, ggml);
    if (type == Q5_0) flat_scale(part, Whole{-16, 15}, {32, 1.3f, 0.97f}, halves, q, ggml);
    if (type == Q8_0) flat_scale(part, Whole{-127, 127}, {32, 1.15f, 0.993f}, halves, q, ggml);
    if (type == IQ4_NL) flat_scale(part, Uneven{}, {32, 1.2f, 0.968f}, halves, q, ggml);
    if (type == Q4_1) flat_affine(part, 15, {10, -2, 0.4f}, halves, q, ggml);
    if (type == Q5_1) flat_affine(part, 31, {10, -3, 0.5f}, halves, q, ggml);
    const int head = type == Q4_1 || type == Q5_1 ? 4 : 2;
    for (int k = 0; k < LANES; ++k) {
        uint8_t *place = out[k];
        memcpy(place, halves[k], head);
        place += head;
        if (type == Q8_0) {
            for (int i = 0; i < 32; ++i) place[i] = q[k][i] - 127;
            continue;
        }
        if (type == Q5_0 || type == Q5_1) {
            write_fifth_bits(q[k], place);
            place += 4;
        }
        write_nibbles(q[k], place);
    }
}

// One block of Q3_K or Q6_K.
void symmetric_block(int type, const float *values, const float *weights, uint8_t *out, const rounding_functions &ggml) {
    const Weights<16> part = load<16, 16>(&values, &weights);
    const Whole levels = type == Q3_K ? Whole{-4, 3} : Whole{-32, 31};
    const float smallest = type == Q3_K ? -32 : -128, largest = type == Q3_K ? 31 : 127;
    lanes scales = 0;
    float unit = 0;
    fit_scaled(part, levels, smallest, largest, type == Q3_K ? ScaleGrid{20, 1.12f, 0.945f} : ScaleGrid{48, 1.3f, 0.988f}, scales, unit, ggml);
    const lanes inverse = inverse_of(lanes(unit) * scales);
    int8_t numbers[LANES];
    uint8_t q[BLOCK];
    for (int k = 0; k < LANES; ++k) numbers[k] = (int8_t)scales[k];
    for (int i = 0; i < 16; ++i) {
        const lanes level = levels(part.x[i] * inverse);
        for (int k = 0; k < LANES; ++k) q[16 * k + i] = levels.code(level[k]);
    }
    type == Q3_K ? write_q3_k(q, numbers, ggml.to_half(unit), out) : write_q6_k(q, numbers, ggml.to_half(unit), out);
}

// Blocks of Q2_K (one), Q4_K or Q5_K (two).
template <int N, int PER> void affine_blocks(int type, const float *const values[LANES / PER], const float *const weights[LANES / PER],
                                             uint8_t *const out[LANES / PER], const rounding_functions &ggml) {
    const Weights<N> part = load<N, PER>(values, weights);
    const float top = type == Q2_K ? 3 : type == Q4_K ? 15 : 31, most = type == Q2_K ? 15 : 63;
    const AffineGrid grid = type == Q2_K ? AffineGrid{7, -0.2f, 0.2f} : type == Q4_K ? AffineGrid{10, -2, 0.4f} : AffineGrid{10, -3, 0.5f};
    lanes scales = 0, offsets = 0, unit = 0, offset_unit = 0;
    fit_affine_scaled<N, PER>(part, top, most, grid, scales, offsets, unit, offset_unit, ggml);
    const lanes low = lanes(-1) * offset_unit * offsets, inverse = inverse_of(unit * scales);
    uint8_t q[LANES / PER][BLOCK], numbers[LANES], offset_numbers[LANES];
    for (int k = 0; k < LANES; ++k) {
        numbers[k] = (uint8_t)scales[k];
        offset_numbers[k] = (uint8_t)offsets[k];
    }
    for (int i = 0; i < N; ++i) {
        const lanes level = within(rounded((part.x[i] - low) * inverse), 0, top);
        for (int k = 0; k < LANES; ++k) q[k / PER][N * (k % PER) + i] = (uint8_t)level[k];
    }
    for (int g = 0; g < LANES / PER; ++g) {
        const uint16_t halves[2] = {ggml.to_half(unit[g * PER]), ggml.to_half(offset_unit[g * PER])};
        if (type == Q2_K) write_q2_k(q[g], numbers + g * PER, offset_numbers + g * PER, halves, out[g]);
        else write_q45_k(q[g], numbers + g * PER, offset_numbers + g * PER, halves, (int)top, out[g]);
    }
}

int bytes_of(int type) {
    switch (type) {
        case Q4_0: case IQ4_NL: return 18;
        case Q4_1: return 20;
        case Q5_0: return 22;
        case Q5_1: return 24;
        case Q8_0: return 34;
        case Q2_K: return 84;
        case Q3_K: return 110;
        case Q4_K: return 144;
        case Q5_K: return 176;
        default: return 210;
    }
}

void weigh_by_size(const float *x, int count, float *weights) {
    float squares = 0;
    for (int i = 0; i < count; ++i) squares += x[i] * x[i];
    squares /= count;
    for (int i = 0; i < count; ++i) weights[i] = sqrtf(squares + x[i] * x[i]);
}

double error_of(const float *x, const float *w, const uint8_t *block, int count, const rounding_functions &ggml) {
    float values[BLOCK];
    ggml.to_float(block, values, count);
    double error = 0;
    for (int i = 0; i < count; ++i) {
        const double e = (double)x[i] - values[i];
        error += w[i] * (e * e);
    }
    return error;
}

}  // namespace

// Replaces each block in `out`, where ggml made the rows' blocks of a type, by a better one, if one is found; returns how many were.
// `importance`: the weight of each column's error. Without one (null), the error of x counts sqrt(x x + mean of the block's squares): large
// weights for more, as in ggml's K-quants. That gave a lower KL divergence than equal weights (benchmarks/rounding.md).
extern "C" int64_t olpack_search_rows(int type, const float *x, uint8_t *out, int64_t rows, int64_t columns, const float *importance,
                                      const rounding_functions *ggml) {
    const bool flat = type < Q2_K || type == IQ4_NL;
    const int count = flat ? 32 : BLOCK, at_once = flat ? LANES : type == Q4_K || type == Q5_K ? 2 : 1, bytes = bytes_of(type);
    const int64_t per_row = columns / count, blocks = rows * per_row;
    float by_size[LANES][BLOCK];
    int64_t improved = 0;
    for (int64_t first = 0; first < blocks; first += at_once) {
        const float *values[LANES], *weights[LANES];
        uint8_t made[LANES][216], *places[LANES];
        for (int b = 0; b < at_once; ++b) {
            const int64_t block = first + b < blocks ? first + b : blocks - 1;  // the last one fills what is left of the lanes
            values[b] = x + block * count;
            weights[b] = importance ? importance + block % per_row * count : by_size[b];
            if (!importance) weigh_by_size(values[b], count, by_size[b]);
            places[b] = made[b];
        }
        if (flat) flat_blocks(type, values, weights, places, *ggml);
        else if (type == Q3_K || type == Q6_K) symmetric_block(type, values[0], weights[0], made[0], *ggml);
        else if (type == Q2_K) affine_blocks<16, 16>(type, values, weights, places, *ggml);
        else affine_blocks<32, 8>(type, values, weights, places, *ggml);
        for (int b = 0; b < at_once && first + b < blocks; ++b) {
            uint8_t *there = out + (first + b) * bytes;
            if (error_of(values[b], weights[b], made[b], count, *ggml) < error_of(values[b], weights[b], there, count, *ggml)) {
                memcpy(there, made[b], bytes);
                ++improved;
            }
        }
    }
    return improved;
}
