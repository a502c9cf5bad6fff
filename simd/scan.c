/* SPDX-License-Identifier: Apache-2.0 */
/** @file scan.c What one row of dY tells: whether it is active, and how long it is. */
#include "kernels.h"

/* Vecs read between two tests: a zero row is read at the speed of memory, an active one is usually
 * recognised in its first block. */
#define BLOCK_VECS 8

static inline bool any_nonzero(const void *row, bool is_bf16, int64_t n)
{
    int64_t at = 0;
    for (; at + BLOCK_VECS * VEC_LANES <= n; at += BLOCK_VECS * VEC_LANES) {
        vec all = vec_load_at(row, is_bf16, at);
        for (int64_t i = 1; i < BLOCK_VECS; i++) {
            all = vec_or(all, vec_load_at(row, is_bf16, at + i * VEC_LANES));
        }
        if (vec_any_nonzero(all)) {
            return true;
        }
    }
    vec all = vec_zero();
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        all = vec_or(all, vec_load_at(row, is_bf16, at));
    }
    return vec_any_nonzero(vec_or(all, vec_load_at_first(row, is_bf16, at, n - at)));
}

static inline bool any_above(const void *row, bool is_bf16, int64_t n, float limit)
{
    vec limits = vec_set1(limit);
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        if (vec_any_above(vec_load_at(row, is_bf16, at), limits)) {
            return true;
        }
    }
    return vec_any_above(vec_load_at_first(row, is_bf16, at, n - at), limits);
}

/* Several sums, so that one addition need not wait for the one before. */
static inline double square_sum(const void *row, bool is_bf16, int64_t n)
{
    vecd sum0 = vecd_zero(), sum1 = vecd_zero(), sum2 = vecd_zero(), sum3 = vecd_zero();
    int64_t at = 0;
    for (; at + 4 * VEC_LANES <= n; at += 4 * VEC_LANES) {
        sum0 = vecd_add_squares(sum0, vec_load_at(row, is_bf16, at));
        sum1 = vecd_add_squares(sum1, vec_load_at(row, is_bf16, at + VEC_LANES));
        sum2 = vecd_add_squares(sum2, vec_load_at(row, is_bf16, at + 2 * VEC_LANES));
        sum3 = vecd_add_squares(sum3, vec_load_at(row, is_bf16, at + 3 * VEC_LANES));
    }
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        sum0 = vecd_add_squares(sum0, vec_load_at(row, is_bf16, at));
    }
    sum1 = vecd_add_squares(sum1, vec_load_at_first(row, is_bf16, at, n - at));
    return vecd_sum(vecd_add(vecd_add(sum0, sum1), vecd_add(sum2, sum3)));
}

bool SEBP_NAME(any_nonzero_f32)(const float *row, int64_t n)
{
    return any_nonzero(row, false, n);
}

bool SEBP_NAME(any_nonzero_bf16)(const uint16_t *row, int64_t n)
{
    return any_nonzero(row, true, n);
}

bool SEBP_NAME(any_above_f32)(const float *row, int64_t n, float limit)
{
    return any_above(row, false, n, limit);
}

bool SEBP_NAME(any_above_bf16)(const uint16_t *row, int64_t n, float limit)
{
    return any_above(row, true, n, limit);
}

double SEBP_NAME(square_sum_f32)(const float *row, int64_t n)
{
    return square_sum(row, false, n);
}

double SEBP_NAME(square_sum_bf16)(const uint16_t *row, int64_t n)
{
    return square_sum(row, true, n);
}

/* The bits of the first n lanes. */
static inline uint32_t lanes_at_least(vec v, uint32_t min, int64_t n)
{
    return vec_at_least(v, min) & (uint32_t)((UINT64_C(1) << n) - 1);
}

void SEBP_NAME(count_at_least)(const float *row, int64_t n, uint32_t min, int64_t *count,
                               int64_t *above)
{
    int64_t at = 0, found = 0, larger = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec v = vec_load(row + at);
        found += __builtin_popcount(vec_at_least(v, min));
        larger += __builtin_popcount(vec_at_least(v, min + 1));
    }
    vec rest = vec_load_first(row + at, n - at);
    *count += found + __builtin_popcount(lanes_at_least(rest, min, n - at));
    *above += larger + __builtin_popcount(lanes_at_least(rest, min + 1, n - at));
}

static inline int64_t list_lanes(const float *row, uint32_t lanes, int64_t first, int64_t *indices,
                                 float *values, int64_t listed)
{
    for (; lanes != 0; lanes &= lanes - 1) {
        int lane = __builtin_ctz(lanes);
        indices[listed] = first + lane;
        values[listed++] = row[lane];
    }
    return listed;
}

/* Few elements are listed, so most vecs are passed by. */
int64_t SEBP_NAME(list_at_least)(const float *row, int64_t n, uint32_t min, int64_t first,
                                 int64_t *indices, float *values)
{
    int64_t at = 0, listed = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        uint32_t lanes = vec_at_least(vec_load(row + at), min);
        if (lanes != 0) {
            listed = list_lanes(row + at, lanes, first + at, indices, values, listed);
        }
    }
    uint32_t lanes = lanes_at_least(vec_load_first(row + at, n - at), min, n - at);
    return list_lanes(row + at, lanes, first + at, indices, values, listed);
}
