/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention.c
 * The softmax of attention on a block of scores, and its gradient, over the vector vocabulary.
 *
 * Scores lie transposed: a row is a key, its lanes are TILE_COLS queries. So a query's maximum and
 * sum are vertical, and what the softmax leaves is a packed sliver of B for the product with V.
 */
#include <math.h>

#include "kernels.h"
#include "vec_math.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_COLS = TILE_VECS * VEC_LANES };

/* tanh(x), off by no more than 2^-22. */
INLINE vec tanh_of(vec x)
{
    vec size = vec_max(x, vec_sub(vec_zero(), x));
    vec e = vec_exp_negative(vec_mul(size, vec_set1(-2)));
    vec result = vec_div(vec_sub(vec_set1(1), e), vec_add(vec_set1(1), e));
    return vec_select(vec_less(x, vec_zero()), vec_sub(vec_zero(), result), result);
}

/* Which scores of a block need what. What is known when compiled leaves the loops short. */
typedef struct kind {
    bool is_plain;  /* neither softcap nor bias nor dropout */
    bool is_masked; /* some lanes do not see some rows */
} kind;

/* What some lanes do not see is -Inf. */
INLINE vec mask_score(const sebp_scores *work, vec score, int64_t row, int j)
{
    vec lane = veci_to_f32(veci_add(veci_lane_index(), veci_set1((uint32_t)j * VEC_LANES)));
    vec hidden = vec_set1(-INFINITY);
    score = vec_select(vec_less(lane, vec_set1((float)(work->from + row))), hidden, score);
    return vec_select(vec_less(lane, vec_set1((float)(work->end + row))), score, hidden);
}

/* The score of a row's vec j from what the product has left; *slope: the derivative of the cap. */
INLINE vec finish_score(const sebp_scores *work, kind of, int64_t row, int j, vec *slope)
{
    vec score = vec_load(work->scores + row * work->stride + (int64_t)j * VEC_LANES);
    *slope = vec_set1(1);
    if (!of.is_plain && work->softcap > 0) {
        vec bounded = tanh_of(vec_div(score, vec_set1(work->softcap)));
        score = vec_mul(bounded, vec_set1(work->softcap));
        *slope = vec_fma(vec_sub(vec_zero(), bounded), bounded, vec_set1(1));
    }
    if (!of.is_plain && work->bias != NULL) {
        score = vec_add(score, vec_load(work->bias + row * TILE_COLS + (int64_t)j * VEC_LANES));
    }
    return of.is_masked ? mask_score(work, score, row, j) : score;
}

INLINE vec dropout_scale(const sebp_scores *work, int64_t row, int j)
{
    return vec_load(work->dropout + row * work->dropout_stride + (int64_t)j * VEC_LANES);
}

/* Finished scores of rows [row, end), and their maxima. */
INLINE void find_max(const sebp_scores *work, kind of, int64_t row, int64_t end, vec *max)
{
    enum { ROUND = 4 }; /* maxima side by side, as one would wait for the one before */
    vec held[ROUND][TILE_VECS], slope;
    for (int i = 0; i < ROUND; i++) {
        for (int j = 0; j < TILE_VECS; j++)
            held[i][j] = max[j];
    }
    for (; row + ROUND <= end; row += ROUND) {
#pragma GCC unroll 4
        for (int i = 0; i < ROUND; i++) {
            for (int j = 0; j < TILE_VECS; j++) {
                vec score = finish_score(work, of, row + i, j, &slope);
                if (!of.is_plain || of.is_masked) {
                    vec_store(work->scores + (row + i) * work->stride + (int64_t)j * VEC_LANES,
                              score);
                }
                held[i][j] = vec_max(score, held[i][j]);
            }
        }
    }
    for (; row < end; row++) {
        for (int j = 0; j < TILE_VECS; j++) {
            vec score = finish_score(work, of, row, j, &slope);
            if (!of.is_plain || of.is_masked) {
                vec_store(work->scores + row * work->stride + (int64_t)j * VEC_LANES, score);
            }
            held[0][j] = vec_max(score, held[0][j]);
        }
    }
    for (int j = 0; j < TILE_VECS; j++)
        max[j] = vec_max(vec_max(held[0][j], held[1][j]), vec_max(held[2][j], held[3][j]));
}

/* Rows [row, end): exp(score - max), and their sums. */
INLINE void find_exp(const sebp_scores *work, bool drops, const vec *max, vec *sum)
{
    for (int64_t row = 0; row < work->rows; row++) {
        for (int j = 0; j < TILE_VECS; j++) {
            float *at = work->scores + row * work->stride + (int64_t)j * VEC_LANES;
            vec p = vec_exp_negative(vec_sub(vec_load(at), max[j]));
            sum[j] = vec_add(sum[j], p);
            vec_store(at, drops ? vec_mul(p, dropout_scale(work, row, j)) : p);
        }
    }
}

/* Rows [*first, *end) are seen by every lane. */
INLINE void find_seen(const sebp_scores *work, int64_t *first, int64_t *end)
{
    int64_t low = TILE_COLS - work->end, high = 1 - work->from;
    low = low < 0 ? 0 : low > work->rows ? work->rows : low;
    high = high < low ? low : high > work->rows ? work->rows : high;
    *first = low;
    *end = high;
}

INLINE void softmax(const sebp_scores *work, bool is_plain, float *max, float *sum, float *factor)
{
    int64_t first, end;
    find_seen(work, &first, &end);
    vec held_max[TILE_VECS], held_sum[TILE_VECS];
    for (int j = 0; j < TILE_VECS; j++)
        held_max[j] = vec_load(max + j * VEC_LANES);
    find_max(work, (kind){is_plain, true}, 0, first, held_max);
    find_max(work, (kind){is_plain, false}, first, end, held_max);
    find_max(work, (kind){is_plain, true}, end, work->rows, held_max);
    for (int j = 0; j < TILE_VECS; j++) {
        vec shrunk = vec_exp_negative(vec_sub(vec_load(max + j * VEC_LANES), held_max[j]));
        held_sum[j] = vec_mul(vec_load(sum + j * VEC_LANES), shrunk);
        vec_store(max + j * VEC_LANES, held_max[j]);
        vec_store(factor + j * VEC_LANES, shrunk);
    }
    if (!is_plain && work->dropout != NULL) {
        find_exp(work, true, held_max, held_sum);
    } else {
        find_exp(work, false, held_max, held_sum);
    }
    for (int j = 0; j < TILE_VECS; j++)
        vec_store(sum + j * VEC_LANES, held_sum[j]);
}

static bool plain(const sebp_scores *work)
{
    return work->softcap == 0 && work->bias == NULL && work->dropout == NULL;
}

void SEBP_NAME(scores_softmax)(const sebp_scores *work, float *max, float *sum, float *factor)
{
    if (plain(work)) {
        softmax(work, true, max, sum, factor);
    } else {
        softmax(work, false, max, sum, factor);
    }
}

/* Rows [row, end): P from S, and dS from dP. */
INLINE void gradient_of(const sebp_scores *work, kind of, int64_t row, int64_t end, float *gradient,
                        const float *lse, const float *delta, bool of_bias)
{
    vec held_lse[TILE_VECS], held_delta[TILE_VECS];
    for (int j = 0; j < TILE_VECS; j++) {
        held_lse[j] = vec_load(lse + j * VEC_LANES);
        held_delta[j] = vec_load(delta + j * VEC_LANES);
    }
    for (; row < end; row++) {
        for (int j = 0; j < TILE_VECS; j++) {
            const int64_t at = row * work->stride + (int64_t)j * VEC_LANES;
            vec slope, score = finish_score(work, of, row, j, &slope);
            vec p = vec_exp_negative(vec_sub(score, held_lse[j]));
            vec dp = vec_load(gradient + at), kept = p;
            if (!of.is_plain && work->dropout != NULL) {
                vec scale = dropout_scale(work, row, j);
                kept = vec_mul(p, scale);
                dp = vec_mul(dp, scale);
            }
            vec ds = vec_mul(p, vec_sub(dp, held_delta[j]));
            if (!of.is_plain && !of_bias) {
                ds = vec_mul(ds, slope);
            }
            vec_store(work->scores + at, kept);
            vec_store(gradient + at, ds);
        }
    }
}

INLINE void softmax_gradient(const sebp_scores *work, bool is_plain, float *gradient,
                             const float *lse, const float *delta, bool of_bias)
{
    int64_t first, end;
    find_seen(work, &first, &end);
    gradient_of(work, (kind){is_plain, true}, 0, first, gradient, lse, delta, of_bias);
    gradient_of(work, (kind){is_plain, false}, first, end, gradient, lse, delta, of_bias);
    gradient_of(work, (kind){is_plain, true}, end, work->rows, gradient, lse, delta, of_bias);
}

void SEBP_NAME(scores_gradient)(const sebp_scores *work, float *gradient, const float *lse,
                                const float *delta, bool of_bias)
{
    if (plain(work)) {
        softmax_gradient(work, true, gradient, lse, delta, of_bias);
    } else {
        softmax_gradient(work, false, gradient, lse, delta, of_bias);
    }
}

void SEBP_NAME(scale_lanes)(float *block, int64_t rows, const float *factors)
{
    vec held[TILE_VECS];
    for (int j = 0; j < TILE_VECS; j++)
        held[j] = vec_load(factors + j * VEC_LANES);
    for (int64_t row = 0; row < rows; row++, block += TILE_COLS) {
        for (int j = 0; j < TILE_VECS; j++) {
            float *at = block + j * VEC_LANES;
            vec_store(at, vec_mul(vec_load(at), held[j]));
        }
    }
}

void SEBP_NAME(store_lanes)(void *to, bool is_bf16, int64_t stride, int64_t rows, int64_t cols,
                            const float *block, int64_t block_stride, const float *factors)
{
    for (int64_t first = 0; first < rows; first += VEC_LANES) {
        const vec factor = vec_load(factors + first);
        const int64_t lanes = rows - first < VEC_LANES ? rows - first : VEC_LANES;
        for (int64_t col = 0; col < cols; col += VEC_LANES) {
            const int64_t n = cols - col < VEC_LANES ? cols - col : VEC_LANES;
            vec held[VEC_LANES];
            for (int i = 0; i < VEC_LANES; i++) {
                held[i] = i < n
                              ? vec_mul(vec_load(block + (col + i) * block_stride + first), factor)
                              : vec_zero();
            }
            vec_transpose(held);
            for (int64_t i = 0; i < lanes; i++)
                vec_store_at_first(to, is_bf16, (first + i) * stride + col, held[i], n);
        }
    }
}

void SEBP_NAME(load_rows)(float *to, const void *from, bool is_bf16, int64_t stride, int64_t rows,
                          int64_t cols, float factor)
{
    enum { LINE = 64 };
    const vec held = vec_set1(factor);
    const int64_t element = is_bf16 ? 2 : 4;
    for (int64_t i = 0; i < rows; i++, to += cols) {
        const int64_t row = i * stride, end = row + cols;
        /* The next head's columns, which lie behind these, are read soon. */
        for (int64_t at = end * element; at < (end + cols) * element; at += LINE)
            __builtin_prefetch((const char *)from + at, 0, 3);
        int64_t at = 0;
        for (; at + VEC_LANES <= cols; at += VEC_LANES)
            vec_store(to + at, vec_mul(vec_load_at(from, is_bf16, row + at), held));
        if (at < cols) {
            vec last = vec_load_at_first(from, is_bf16, row + at, cols - at);
            vec_store_first(to + at, vec_mul(last, held), cols - at);
        }
    }
}

void SEBP_NAME(dot_rows)(float *sums, const void *a, int64_t a_stride, const void *b,
                         int64_t b_stride, bool is_bf16, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++) {
        vec sum = vec_zero();
        int64_t at = 0;
        for (; at + VEC_LANES <= cols; at += VEC_LANES) {
            sum = vec_fma(vec_load_at(a, is_bf16, i * a_stride + at),
                          vec_load_at(b, is_bf16, i * b_stride + at), sum);
        }
        sum = vec_fma(vec_load_at_first(a, is_bf16, i * a_stride + at, cols - at),
                      vec_load_at_first(b, is_bf16, i * b_stride + at, cols - at), sum);
        sums[i] = vec_sum(sum);
    }
}
