/* SPDX-License-Identifier: Apache-2.0 */
/** @file layers.h Row-wise layers on CPUs, for the table, and what their files share. */
#ifndef SEBP_CPU_LAYERS_H
#define SEBP_CPU_LAYERS_H

#include "cpu.h"

/* norm.c */
sebp_status sebp_cpu_norm_forward(void *device, const sebp_norm_work *work);
sebp_status sebp_cpu_norm_backward(void *device, const sebp_norm_back_work *work);

/* activation.c */
sebp_status sebp_cpu_activation(void *device, const sebp_activation_work *work);
sebp_status sebp_cpu_dropout(void *device, const sebp_dropout_work *work);
sebp_status sebp_cpu_rotary(void *device, const sebp_rotary_work *work);

/* cross_entropy.c */
sebp_status sebp_cpu_cross_entropy(void *device, const sebp_cross_entropy_work *work);

/* embedding.c */
sebp_status sebp_cpu_gather(void *device, const sebp_gather_work *work);
sebp_status sebp_cpu_sum_groups(void *device, const sebp_group_sums *sums);

/** Element (row, col) of a matrix; NULL for a matrix that is NULL. */
static inline void *sebp_element(const sebp_matrix *matrix, int64_t row, int64_t col)
{
    if (matrix == NULL) {
        return NULL;
    }
    return (char *)matrix->data +
           (row * matrix->stride + col) * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

/** Has a row that is soon wanted brought to the caches, while the one before it is computed; row -1 and a
 * matrix that is NULL: nothing. */
static inline void sebp_fetch_row(const sebp_matrix *matrix, int64_t row)
{
    enum { LINE = 64 };
    if (matrix == NULL || row < 0) {
        return;
    }
    const char *at = sebp_element(matrix, row, 0);
    const char *end = at + matrix->cols * (int64_t)sebp_dtype_bytes(matrix->dtype);
    for (; at < end; at += LINE) {
        __builtin_prefetch(at, 0, 2);
    }
}

/** The row that is worked on as the i-th. */
static inline int64_t sebp_listed_row(const sebp_row_list *list, int64_t i)
{
    return list->rows != NULL ? list->rows[i] : i;
}

/** The row after it; -1: there is none before `end`. */
static inline int64_t sebp_next_row(const sebp_row_list *list, int64_t i, int64_t end)
{
    return i + 1 < end ? sebp_listed_row(list, i + 1) : -1;
}

/* layers.c */

/** How many pieces `count` rows of `cols` elements are worth, at most one a thread. */
int64_t sebp_cpu_pieces(const sebp_cpu *cpu, int64_t count, int64_t cols);

/** Widens or copies n elements, or rounds or copies them. */
void sebp_cpu_widen(const sebp_cpu *cpu, float *to, const void *from, sebp_dtype dtype, int64_t n);
void sebp_cpu_narrow(const sebp_cpu *cpu, void *to, const float *from, sebp_dtype dtype, int64_t n);

/**
 * to[0 .. n) (+)= the sum of `count` rows of f32 or bf16 data, in their order, in f32, rounded once.
 * rows NULL: the first ones.
 */
typedef struct sebp_row_sum {
    const void *from; /* the first of n columns */
    sebp_dtype from_dtype;
    int64_t stride;
    const int64_t *rows;
    int64_t count, n;
    void *to;
    sebp_dtype to_dtype;
    bool accumulate;
} sebp_row_sum;

void sebp_cpu_sum_listed(const sebp_cpu *cpu, const sebp_row_sum *sum);

#endif
