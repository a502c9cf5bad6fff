/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file dots.c
 * Columns laid out as rows, and dot products of many pairs of vectors: for products of which few
 * elements are wanted.
 */
#include "kernels.h"

static inline void transpose_rows(float *to, int64_t to_stride, const char *from, bool is_bf16,
                                  int64_t stride, const int64_t *rows, int64_t count, int64_t cols)
{
    const int64_t row_bytes = stride * (int64_t)(is_bf16 ? sizeof(uint16_t) : sizeof(float));
    for (int64_t first = 0; first < count; first += VEC_LANES) {
        const int64_t taken = count - first < VEC_LANES ? count - first : VEC_LANES;
        const char *row[VEC_LANES];
        for (int64_t i = 0; i < taken; i++) {
            row[i] = from + (rows != NULL ? rows[first + i] : first + i) * row_bytes;
        }
        for (int64_t col = 0; col < cols; col += VEC_LANES) {
            const int64_t some = cols - col < VEC_LANES ? cols - col : VEC_LANES;
            vec block[VEC_LANES];
            for (int64_t i = 0; i < VEC_LANES; i++) {
                if (taken == VEC_LANES && some == VEC_LANES) {
                    block[i] = vec_load_at(row[i], is_bf16, col);
                } else {
                    block[i] =
                        i < taken ? vec_load_at_first(row[i], is_bf16, col, some) : vec_zero();
                }
            }
            vec_transpose(block);
            for (int64_t j = 0; j < some; j++) {
                float *place = to + (col + j) * to_stride + first;
                if (taken == VEC_LANES) {
                    vec_store(place, block[j]);
                } else {
                    vec_store_first(place, block[j], taken);
                }
            }
        }
    }
}

void SEBP_NAME(transpose_rows)(float *to, int64_t to_stride, const void *from, bool is_bf16,
                               int64_t stride, const int64_t *rows, int64_t count, int64_t cols)
{
    if (is_bf16) {
        transpose_rows(to, to_stride, from, true, stride, rows, count, cols);
    } else {
        transpose_rows(to, to_stride, from, false, stride, rows, count, cols);
    }
}

/* Vecs of a pair that are summed apart, so that no multiply-add waits for the one before. */
#define DOT_VECS 4

/* The sums of every VEC_LANES-th term. */
static inline vec lane_sums(const float *a, const float *b, int64_t n)
{
    vec sum[DOT_VECS];
    for (int v = 0; v < DOT_VECS; v++) {
        sum[v] = vec_zero();
    }
    int64_t at = 0;
    for (; at + DOT_VECS * VEC_LANES <= n; at += DOT_VECS * VEC_LANES) {
        for (int v = 0; v < DOT_VECS; v++) {
            const int64_t u = at + v * VEC_LANES;
            sum[v] = vec_fma(vec_load(a + u), vec_load(b + u), sum[v]);
        }
    }
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        sum[0] = vec_fma(vec_load(a + at), vec_load(b + at), sum[0]);
    }
    if (at < n) {
        sum[1] = vec_fma(vec_load_first(a + at, n - at), vec_load_first(b + at, n - at), sum[1]);
    }
    return vec_add(vec_add(sum[0], sum[1]), vec_add(sum[2], sum[3]));
}

/* The lanes of as many pairs as there are lanes are added up together, by a transposition. */
void SEBP_NAME(dots)(float *sums, const float *const *a, const float *const *b, int64_t pairs,
                     int64_t n)
{
    for (int64_t first = 0; first < pairs; first += VEC_LANES) {
        const int64_t taken = pairs - first < VEC_LANES ? pairs - first : VEC_LANES;
        vec lanes[VEC_LANES];
        for (int64_t i = 0; i < taken; i++) {
            lanes[i] = lane_sums(a[first + i], b[first + i], n);
        }
        for (int64_t i = taken; i < VEC_LANES; i++) {
            lanes[i] = vec_zero();
        }
        vec_transpose(lanes);
        vec total = lanes[0];
        for (int i = 1; i < VEC_LANES; i++) {
            total = vec_add(total, lanes[i]);
        }
        vec_store_first(sums + first, total, taken);
    }
}
