/* SPDX-License-Identifier: Apache-2.0 */
/** @file row_work.h What operations on rows share: reaching rows, spreading them over the threads,
 * widening and summing them. */
#ifndef SEBP_CPU_ROW_WORK_H
#define SEBP_CPU_ROW_WORK_H

#include "cpu.h"

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

/** What a kernel must know of dropout with the probability p. */
static inline sebp_dropout sebp_dropout_of(double p, uint64_t seed, uint64_t offset)
{
    return (sebp_dropout){
        .seed = seed, .offset = offset, .p = (float)p, .scale = (float)(1 / (1 - p))};
}

/** How many pieces `count` rows of `cols` elements are worth, at most one a thread. */
int64_t sebp_cpu_pieces(const sebp_cpu *cpu, int64_t count, int64_t cols);

/** Works on one row: row `row` of the matrices in `work`. */
typedef void sebp_row_task(const sebp_kernels *kernels, const void *work, int64_t row);

/** Calls task(kernels, work, row) for each row of a list, spread over the threads; without columns for
 * none. */
void sebp_cpu_each_row(sebp_cpu *cpu, const sebp_row_list *list, int64_t cols, sebp_row_task *task,
                       const void *work);

/** Widens or copies n elements to f32, or rounds or copies them from it. */
void sebp_cpu_widen(const sebp_kernels *kernels, float *to, const void *from, sebp_dtype dtype,
                    int64_t n);
void sebp_cpu_narrow(const sebp_kernels *kernels, void *to, const float *from, sebp_dtype dtype,
                     int64_t n);

/** to[0 .. n) (+)= the sum of `count` rows of f32 or bf16 data, in their order, in f32, rounded once.
 * rows NULL: the first ones. */
typedef struct sebp_row_sum {
    const void *from; /* the first of n columns; with no rows it may be anything */
    sebp_dtype from_dtype;
    int64_t stride;
    const int64_t *rows;
    int64_t count, n;
    void *to;
    sebp_dtype to_dtype;
    bool accumulate;
} sebp_row_sum;

void sebp_cpu_sum_listed(const sebp_kernels *kernels, const sebp_row_sum *sum);

#endif
