/* SPDX-License-Identifier: Apache-2.0 */
/** @file norm.c LayerNorm and RMSNorm of a row, which stays in the nearest cache between passes. */
#include <float.h>
#include <math.h>

#include "kernels.h"
#include "rows.h"

enum {
    SUMS = 4,    /* that need not wait for each other */
    BLOCK = 1024 /* elements that are sure to be in the nearest cache when they are read again */
};

/* Variances in f32 below this have lost digits where their squares are denormal. */
#define LEAST_VARIANCE 0x1p-90f

static inline float total_of(const vec sums[SUMS])
{
    return vec_sum(vec_add(vec_add(sums[0], sums[1]), vec_add(sums[2], sums[3])));
}

/* h = residual + dropout(x) */
SPECIALIZED void add_residual(const sebp_norm_row *row, bool is_bf16)
{
    if (row->dropout != NULL) {
        row_scales scales = row_scales_of(row->dropout, row->group);
        FOR_EACH_VEC(row->n, {
            vec h = vec_mul(load_lanes(row->x, is_bf16, at, lanes), next_scales(&scales, at));
            if (row->residual != NULL) {
                h = vec_add(h, load_lanes(row->residual, is_bf16, at, lanes));
            }
            store_lanes(row->h, is_bf16, at, h, lanes);
        });
    } else {
        FOR_EACH_VEC(row->n, {
            vec h = load_lanes(row->x, is_bf16, at, lanes);
            if (row->residual != NULL) {
                h = vec_add(h, load_lanes(row->residual, is_bf16, at, lanes));
            }
            store_lanes(row->h, is_bf16, at, h, lanes);
        });
    }
}

SPECIALIZED float mean_of(const void *h, bool is_bf16, int64_t n)
{
    vec sums[SUMS] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    int64_t next = 0;
    int64_t whole = n - n % (SUMS * VEC_LANES);
    for (; next < whole; next += SUMS * VEC_LANES) {
        for (int i = 0; i < SUMS; i++) {
            sums[i] = vec_add(sums[i], vec_load_at(h, is_bf16, next + i * VEC_LANES));
        }
    }
    FOR_EACH_VEC(n - whole, sums[0] = vec_add(sums[0], load_lanes(h, is_bf16, whole + at, lanes)));
    return total_of(sums) / (float)n;
}

SPECIALIZED float mean_square_of(const void *h, bool is_bf16, int64_t n, float mean)
{
    vec sums[SUMS] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()}, means = vec_set1(mean);
    int64_t next = 0;
    int64_t whole = n - n % (SUMS * VEC_LANES);
    for (; next < whole; next += SUMS * VEC_LANES) {
        for (int i = 0; i < SUMS; i++) {
            vec apart = vec_sub(vec_load_at(h, is_bf16, next + i * VEC_LANES), means);
            sums[i] = vec_fma(apart, apart, sums[i]);
        }
    }
    FOR_EACH_VEC(n - whole, {
        vec apart = vec_sub(load_lanes(h, is_bf16, whole + at, lanes), means);
        apart = first_lanes(apart, lanes);
        sums[0] = vec_fma(apart, apart, sums[0]);
    });
    return total_of(sums) / (float)n;
}

/* The mean and the mean square about it, block by block (Chan, Golub, LeVeque, 1979): the row is read
 * from afar once. */
SPECIALIZED void moments_of(const void *h, bool is_bf16, int64_t n, float *mean, float *square)
{
    double center = 0, total = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t size = n - first < BLOCK ? n - first : BLOCK;
        const void *block = (const char *)h + first * (is_bf16 ? 2 : 4);
        const float block_mean = mean_of(block, is_bf16, size);
        const float block_square = mean_square_of(block, is_bf16, size, block_mean);
        const double apart = (double)block_mean - center,
                     share = (double)size / (double)(first + size);
        center += apart * share;
        total += (double)block_square * (double)size + apart * apart * (double)first * share;
    }
    *mean = (float)center;
    *square = (float)(total / (double)n);
}

/* The mean, and 1 / sqrt(variance + epsilon), where squares leave the range of f32: in double. That is slow,
 * and rare: such elements are above 2^63, or all below 2^-45 with as small an epsilon. */
SPECIALIZED void find_in_double(const sebp_norm_row *row, const void *h, bool is_bf16)
{
    double mean = 0, squares = 0;
    float held[VEC_LANES];
    FOR_EACH_VEC(row->is_rms ? 0 : row->n, {
        vec_store(held, load_lanes(h, is_bf16, at, lanes));
        for (int64_t i = 0; i < lanes; i++) {
            mean += (double)held[i];
        }
    });
    mean /= (double)row->n; /* exact where all elements are equal: their variance is 0 */
    FOR_EACH_VEC(row->n, {
        vec_store(held, load_lanes(h, is_bf16, at, lanes));
        for (int64_t i = 0; i < lanes; i++) {
            squares += ((double)held[i] - mean) * ((double)held[i] - mean);
        }
    });
    *row->mean = (float)mean;
    *row->inverse = (float)(1 / sqrt(squares / (double)row->n + (double)row->epsilon));
}

SPECIALIZED void norm_forward(const sebp_norm_row *row, bool is_bf16)
{
    const void *h = row->h != NULL ? row->h : row->x;
    if (row->h != NULL) {
        add_residual(row, is_bf16);
    }
    float mean = 0, square;
    if (row->is_rms) {
        square = mean_square_of(h, is_bf16, row->n, 0);
    } else {
        moments_of(h, is_bf16, row->n, &mean, &square);
    }
    square += row->epsilon;
    *row->mean = mean;
    *row->inverse = 1 / sqrtf(square);
    if (!(square >= LEAST_VARIANCE && square <= FLT_MAX)) {
        find_in_double(row, h, is_bf16);
    }
    vec means = vec_set1(*row->mean), inverses = vec_set1(*row->inverse);
    FOR_EACH_VEC(row->n, {
        vec y = vec_mul(vec_sub(load_lanes(h, is_bf16, at, lanes), means), inverses);
        if (row->gain != NULL) {
            y = vec_mul(y, load_lanes(row->gain, false, at, lanes));
        }
        fetch_lanes(row->next_x, is_bf16, at);
        fetch_lanes(row->next_residual, is_bf16, at);
        if (row->shift != NULL) {
            y = vec_add(y, load_lanes(row->shift, false, at, lanes));
        }
        put_lanes(row->y, is_bf16, row->stream, at, y, lanes);
    });
}

void SEBP_NAME(norm_forward)(const sebp_norm_row *row)
{
    if (row->is_bf16) {
        norm_forward(row, true);
    } else {
        norm_forward(row, false);
    }
}

/* The row as the backward sees it. */
typedef struct lanes_of_row {
    vec mean, inverse;
} lanes_of_row;

static inline vec normalized(const sebp_norm_back_row *row, const lanes_of_row *by, bool is_bf16,
                             int64_t at, int64_t lanes)
{
    return vec_mul(vec_sub(load_lanes(row->h, is_bf16, at, lanes), by->mean), by->inverse);
}

static inline vec times_gain(const sebp_norm_back_row *row, vec dy, int64_t at, int64_t lanes)
{
    return row->gain != NULL ? vec_mul(dy, load_lanes(row->gain, false, at, lanes)) : dy;
}

static inline void add_lanes(float *to, int64_t at, vec v, int64_t lanes)
{
    store_lanes(to, false, at, vec_add(load_lanes(to, false, at, lanes), v), lanes);
}

/*
 * With xh = (h - mean) / std and g = dy gain:
 *
 *     dgain += dy xh    dshift += dy    dh = (g - mean(g) - xh mean(g xh)) / std
 *
 * where an RMSNorm, which takes off no mean, has no mean(g).
 */
SPECIALIZED void norm_backward(const sebp_norm_back_row *row, bool is_bf16)
{
    const lanes_of_row by = {vec_set1(row->mean), vec_set1(row->inverse)};
    vec g_sum = vec_zero(), along_sum = vec_zero();
    FOR_EACH_VEC(row->n, {
        vec dy = load_lanes(row->dy, is_bf16, at, lanes);
        vec xh = normalized(row, &by, is_bf16, at, lanes);
        vec g = times_gain(row, dy, at, lanes);
        g_sum = vec_add(g_sum, g);
        along_sum = vec_fma(g, xh, along_sum);
        if (row->dgain != NULL) {
            add_lanes(row->dgain, at, vec_mul(dy, xh), lanes);
        }
        if (row->dshift != NULL) {
            add_lanes(row->dshift, at, dy, lanes);
        }
    });
    if (row->dh == NULL && row->dx == NULL) {
        return;
    }
    const vec g_mean = row->is_rms ? vec_zero() : vec_set1(vec_sum(g_sum) / (float)row->n);
    const vec along = vec_set1(vec_sum(along_sum) / (float)row->n);
    row_scales scales;
    if (row->dropout != NULL) {
        scales = row_scales_of(row->dropout, row->group);
    }
    FOR_EACH_VEC(row->n, {
        vec g = times_gain(row, load_lanes(row->dy, is_bf16, at, lanes), at, lanes);
        vec xh = normalized(row, &by, is_bf16, at, lanes);
        vec dh = vec_sub(vec_sub(g, g_mean), vec_mul(xh, along));
        dh = vec_mul(dh, by.inverse);
        fetch_lanes(row->next_dy, is_bf16, at);
        fetch_lanes(row->next_h, is_bf16, at);
        if (row->accumulate && row->dh != NULL) {
            dh = vec_add(dh, load_lanes(row->dh, is_bf16, at, lanes));
        }
        if (row->dh != NULL) {
            put_lanes(row->dh, is_bf16, row->stream && !row->accumulate, at, dh, lanes);
        }
        if (row->dx != NULL) {
            vec dx = row->dropout != NULL ? vec_mul(dh, next_scales(&scales, at)) : dh;
            store_lanes(row->dx, is_bf16, at, dx, lanes);
        }
    });
}

void SEBP_NAME(norm_backward)(const sebp_norm_back_row *row)
{
    if (row->is_bf16) {
        norm_backward(row, true);
    } else {
        norm_backward(row, false);
    }
}
