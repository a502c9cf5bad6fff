/* SPDX-License-Identifier: Apache-2.0 */
/** @file sum.c Sums of rows: for db, and of a sparse matrix times a dense one. */
#include "kernels.h"

/* Rows that are added together: the sum is loaded and stored once for all of them. */
#define ROWS_AT_ONCE 8

/* Only the rows' order matters for each column, so every tier gives the same bits. */
static inline void add_group(float *sum, const void *const *row, int rows, bool is_bf16,
                             int64_t cols)
{
    int64_t at = 0;
    for (; at + VEC_LANES <= cols; at += VEC_LANES) {
        vec total = vec_load(sum + at);
        for (int i = 0; i < rows; i++) {
            total = vec_add(total, vec_load_at(row[i], is_bf16, at));
        }
        vec_store(sum + at, total);
    }
    vec total = vec_load_first(sum + at, cols - at);
    for (int i = 0; i < rows; i++) {
        total = vec_add(total, vec_load_at_first(row[i], is_bf16, at, cols - at));
    }
    vec_store_first(sum + at, total, cols - at);
}

static inline void add_rows(float *sum, const char *from, int64_t stride, const int64_t *rows,
                            int64_t count, bool is_bf16, int64_t cols)
{
    int64_t row_bytes = stride * (is_bf16 ? (int64_t)sizeof(uint16_t) : (int64_t)sizeof(float));
    for (int64_t done = 0; done < count;) {
        const void *group[ROWS_AT_ONCE];
        int taken = 0;
        for (; taken < ROWS_AT_ONCE && done + taken < count; taken++) {
            int64_t i = done + taken;
            group[taken] = from + (rows != NULL ? rows[i] : i) * row_bytes;
        }
        if (taken == ROWS_AT_ONCE) {
            add_group(sum, group, ROWS_AT_ONCE, is_bf16, cols); /* unrolled */
        } else {
            add_group(sum, group, taken, is_bf16, cols);
        }
        done += taken;
    }
}

void SEBP_NAME(add_rows_f32)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                             int64_t count, int64_t cols)
{
    add_rows(sum, (const char *)from, stride, rows, count, false, cols);
}

void SEBP_NAME(add_rows_bf16)(float *sum, const uint16_t *from, int64_t stride, const int64_t *rows,
                              int64_t count, int64_t cols)
{
    add_rows(sum, (const char *)from, stride, rows, count, true, cols);
}

/* Vecs of columns whose sums are held in registers. */
#define SCALED_VECS 8

void SEBP_NAME(sum_scaled_rows)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                                const float *scale, int64_t count, int64_t cols)
{
    int64_t at = 0;
    for (; at + SCALED_VECS * VEC_LANES <= cols; at += SCALED_VECS * VEC_LANES) {
        vec total[SCALED_VECS];
        for (int v = 0; v < SCALED_VECS; v++) {
            total[v] = vec_zero();
        }
        for (int64_t i = 0; i < count; i++) {
            const float *row = from + rows[i] * stride + at;
            vec factor = vec_set1(scale[i]);
            for (int v = 0; v < SCALED_VECS; v++) {
                total[v] = vec_fma(factor, vec_load(row + v * VEC_LANES), total[v]);
            }
        }
        for (int v = 0; v < SCALED_VECS; v++) {
            vec_store(sum + at + v * VEC_LANES, total[v]);
        }
    }
    for (; at < cols; at += VEC_LANES) {
        int64_t lanes = cols - at < VEC_LANES ? cols - at : VEC_LANES;
        vec total = vec_zero();
        for (int64_t i = 0; i < count; i++) {
            vec row = vec_load_first(from + rows[i] * stride + at, lanes);
            total = vec_fma(vec_set1(scale[i]), row, total);
        }
        vec_store_first(sum + at, total, lanes);
    }
}

static inline void sum_vectors(void *to, const void *const *from, int count, bool is_bf16,
                               int64_t n)
{
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec total = vec_load_at(from[0], is_bf16, at);
        for (int i = 1; i < count; i++) {
            total = vec_add(total, vec_load_at(from[i], is_bf16, at));
        }
        vec_store_at(to, is_bf16, at, total);
    }
    vec total = vec_load_at_first(from[0], is_bf16, at, n - at);
    for (int i = 1; i < count; i++) {
        total = vec_add(total, vec_load_at_first(from[i], is_bf16, at, n - at));
    }
    vec_store_at_first(to, is_bf16, at, total, n - at);
}

void SEBP_NAME(sum_vectors)(void *to, const void *const *from, int count, bool is_bf16, int64_t n)
{
    if (is_bf16) {
        sum_vectors(to, from, count, true, n);
    } else {
        sum_vectors(to, from, count, false, n);
    }
}
