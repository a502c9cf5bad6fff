/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparse_update.c
 * W += out^T S in of a sparse S, the update of SparseGrad.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>

#include "operations.h"

enum { SPARSE_COLS = 128 /* of a sparse product, at a time */ };

/* ---- S by lines ---- */

/* The elements of S, ordered by rows or by columns, without the empty ones. Line i, a row or a
 * column, has the elements start[i] to start[i + 1] - 1. */
typedef struct lines_of {
    int64_t count;   /* p' or q' */
    int64_t *lines;  /* the index of each line */
    int64_t *start;  /* the first element of each line: count + 1 */
    int64_t *places; /* the column, or row, of each element */
    float *values;
} lines_of;

static void free_lines(lines_of *lines)
{
    free(lines->lines);
    free(lines->start);
    free(lines->places);
    free(lines->values);
}

/* Makes room for `elements` in at most `max` lines. */
static sebp_status make_lines(int64_t max, int64_t elements, lines_of *lines)
{
    *lines = (lines_of){
        .lines = malloc((size_t)max * sizeof(int64_t)),
        .start = calloc((size_t)max + 1, sizeof(int64_t)),
        .places = malloc((size_t)elements * sizeof(int64_t)),
        .values = malloc((size_t)elements * sizeof(float)),
    };
    if (lines->lines != NULL && lines->start != NULL && lines->places != NULL &&
        lines->values != NULL) {
        return SEBP_SUCCESS;
    }
    free_lines(lines);
    return SEBP_ERROR_MEMORY;
}

/* S by rows, in the order of its elements. */
static sebp_status list_rows(const sebp_sparse *s, lines_of *rows)
{
    sebp_status status = make_lines(s->rows, s->count, rows);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t row = -1, end = 0; /* of the row */
    for (int64_t i = 0; i < s->count; i++) {
        if (s->indices[i] >= end) {
            row = s->indices[i] / s->cols;
            end = (row + 1) * s->cols;
            rows->start[rows->count] = i;
            rows->lines[rows->count++] = row;
        }
        rows->places[i] = s->indices[i] - row * s->cols;
        rows->values[i] = s->values[i];
    }
    rows->start[rows->count] = s->count;
    return SEBP_SUCCESS;
}

/* S by columns, by a counting sort: within a column rows ascend. */
static sebp_status list_cols(const sebp_sparse *s, const lines_of *rows, lines_of *cols)
{
    sebp_status status = make_lines(s->cols, s->count, cols);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t *start = cols->start;
    for (int64_t i = 0; i < s->count; i++)
        start[rows->places[i] + 1]++;
    for (int64_t col = 0; col < s->cols; col++)
        start[col + 1] += start[col];
    for (int64_t line = 0; line < rows->count; line++) {
        for (int64_t i = rows->start[line]; i < rows->start[line + 1]; i++) {
            int64_t at = start[rows->places[i]]++;
            cols->places[at] = rows->lines[line];
            cols->values[at] = rows->values[i];
        }
    }
    /* Each start has moved on to the end of its column. Columns without elements are left out. */
    int64_t first = 0;
    for (int64_t col = 0; col < s->cols; col++) {
        int64_t end = start[col];
        if (end > first) {
            cols->lines[cols->count] = col;
            start[cols->count++] = first;
        }
        first = end;
    }
    start[cols->count] = s->count;
    return SEBP_SUCCESS;
}

/* ---- sparse times dense ---- */

typedef struct sparse_product {
    const sebp_kernels *kernels;
    const lines_of *lines;
    const sebp_matrix *from, *to;
} sparse_product;

static void sparse_piece(void *work, int64_t piece)
{
    const sparse_product *product = work;
    const lines_of *lines = product->lines;
    int64_t first = piece * SPARSE_COLS;
    int64_t cols = sebp_min(SPARSE_COLS, product->to->cols - first);
    const float *from = (const float *)product->from->data + first;
    float *to = (float *)product->to->data + first;
    for (int64_t i = 0; i < lines->count; i++) {
        int64_t start = lines->start[i];
        product->kernels->sum_scaled_rows(to + i * product->to->stride, from, product->from->stride,
                                          lines->places + start, lines->values + start,
                                          lines->start[i + 1] - start, cols);
    }
}

/* Lines differ in length but columns do not, so each thread takes columns of its own: so few at a
 * time that those of all rows stay in its caches. */
static void multiply_sparse(sebp_cpu *cpu, const lines_of *lines, const sebp_matrix *from,
                            const sebp_matrix *to)
{
    sparse_product product = {.kernels = cpu->kernels, .lines = lines, .from = from, .to = to};
    if (to->cols > 0)
        sebp_cpu_parallel(cpu, sebp_div_ceil(to->cols, SPARSE_COLS), sparse_piece, &product);
}

/* ---- the update ---- */

/*
 * With S by rows: T = S in, p' x K, then W += out[I]^T T, in panels of W's columns. With S by
 * columns: T = S^T out, q' x N, then W += T^T in[J], in panels of W's rows. Each element of W is
 * added to once. The first pass reserves memory for the products, the second runs them.
 */
static sebp_status add_lines(sebp_cpu *cpu, const lines_of *lines, bool by_cols,
                             const sebp_matrix *out, const sebp_matrix *in, const sebp_matrix *w)
{
    const sebp_matrix *near = by_cols ? out : in; /* T is the product of S and it */
    const sebp_matrix *far = by_cols ? in : out;
    int64_t width = near->cols, count = lines->count;
    int64_t room = sebp_cpu_max_scratch(cpu) / (int64_t)sizeof(float);
    int64_t panels = sebp_div_ceil(width, sebp_max(room / count, 1));
    int64_t panel = sebp_div_ceil(width, panels);
    int64_t step = (by_cols ? w->stride : 1) * (int64_t)sebp_dtype_bytes(w->dtype);
    /* If the lines follow each other, as all of them do, they are a matrix that any GEMM can read
     * in place. */
    int64_t first = lines->lines[0];
    bool is_run = lines->lines[count - 1] - first == count - 1;
    const float *far_data = (const float *)far->data + (is_run ? first * far->stride : 0);

    sebp_status status = sebp_cpu_reserve_scratch(cpu, count * panel * (int64_t)sizeof(float));
    for (int runs = 0; runs < 2 && status == SEBP_SUCCESS; runs++) {
        float *t = sebp_cpu_method_scratch(cpu);
        for (int64_t j = 0; j < width && status == SEBP_SUCCESS; j += panel) {
            int64_t some = sebp_min(panel, width - j);
            sebp_operand of_t = {t, some, NULL, by_cols, SEBP_F32};
            sebp_operand of_far = {far_data, far->stride, is_run ? NULL : lines->lines, !by_cols,
                                   SEBP_F32};
            sebp_plan plan = {.product = {.m = by_cols ? some : w->rows,
                                          .n = by_cols ? w->cols : some,
                                          .k = count,
                                          .a = by_cols ? of_t : of_far,
                                          .b = by_cols ? of_far : of_t,
                                          .c = (char *)w->data + j * step,
                                          .c_stride = w->stride,
                                          .c_dtype = w->dtype,
                                          .accumulate = true}};
            status = sebp_cpu_plan_product(cpu, &plan);
            if (runs == 0 || status != SEBP_SUCCESS)
                continue;
            sebp_matrix from = {(float *)near->data + j, near->rows, some, near->stride, SEBP_F32};
            sebp_matrix to = sebp_matrix_f32(t, count, some);
            multiply_sparse(cpu, lines, &from, &to);
            status = sebp_cpu_run_product(cpu, &plan);
        }
    }
    sebp_cpu_reserve_scratch(cpu, 0);
    return status;
}

sebp_status sebp_cpu_sparse_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                   const sebp_matrix *in, const sebp_matrix *w)
{
    lines_of rows, cols;
    sebp_status status = list_rows(s, &rows);
    if (status != SEBP_SUCCESS)
        return status;
    status = list_cols(s, &rows, &cols);
    if (status != SEBP_SUCCESS) {
        free_lines(&rows);
        return status;
    }
    double n = (double)w->rows, k = (double)w->cols, kept = (double)s->count;
    bool by_cols = n * k * (double)cols.count + kept * n < n * k * (double)rows.count + kept * k;
    status = add_lines(device, by_cols ? &cols : &rows, by_cols, out, in, w);
    free_lines(&rows);
    free_lines(&cols);
    return status;
}
