/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sampled.c
 * A product of which few elements are wanted: sums[e] = the sum of A[i][n] B[i][k] over m rows, for
 * each element e = (n, k) that is kept.
 *
 * B is copied so that columns lie as rows, a block of rows at a time, as many as leave the copy in the
 * L2 cache. Each sum is then a dot product of two vectors without gaps. Of A a few columns are copied
 * at a time, into the L1 cache: elements come in the order of their index, so that they need one
 * strip of A's columns after the other. The threads share B's copy and take elements of their own.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdalign.h>
#include <string.h>

#include "operations.h"
#include "row_work.h"

enum {
    STRIP_COLS = 32, /* of A that are copied at a time: two lines of cache of each row */
    LINE_FLOATS = 16,
    MAX_ROWS = 256,           /* of a block: a strip of A is 17 KiB then */
    MIN_ROWS = 128,           /* fewer, and adding up lanes takes longer than multiplying */
    BLOCK_FLOATS = 192 << 10, /* of B, in a block: 3/4 of an L2 cache of 1 MiB */
    PANEL_FLOATS = 1 << 20,   /* of B, in the blocks that are copied at once */
    PAIRS = 64                /* dot products that a kernel is handed */
};

typedef struct sampled_work {
    const sebp_kernels *kernels;
    const sebp_sampled *product;
    int64_t block_rows, stride; /* floats from one copied column to the next */
    int64_t first_row, rows;    /* that are copied */
    int64_t first_col, cols;    /* of B, which are copied */
    int64_t chunks;             /* of columns, for copying */
    int64_t pieces;             /* of elements */
    float *panel;
} sampled_work;

/* Rows that are multiplied at a time. That depends on m and on B's columns alone, and neither on the
 * threads nor on the scratch memory: so do the bits of the sums. */
static int64_t rows_of_block(int64_t m, int64_t cols)
{
    int64_t max = BLOCK_FLOATS / sebp_max(cols, 1) / LINE_FLOATS * LINE_FLOATS;
    max = sebp_min(sebp_max(max, MIN_ROWS), MAX_ROWS);
    return sebp_round_up(sebp_div_ceil(m, sebp_div_ceil(m, max)), LINE_FLOATS);
}

/* An odd number of lines of cache: columns do not meet in one set of the cache. */
static int64_t stride_of(int64_t rows)
{
    return (rows / LINE_FLOATS | 1) * LINE_FLOATS;
}

/* Copies rows and columns of a factor, so that a column lies as a row. */
static void copy_block(const sebp_kernels *kernels, const sebp_operand *from, int64_t row,
                       int64_t rows, int64_t col, int64_t cols, float *to, int64_t stride)
{
    const int64_t bytes = (int64_t)sebp_dtype_bytes(from->dtype);
    const int64_t first = from->rows != NULL ? 0 : row;
    kernels->transpose_rows(to, stride,
                            (const char *)from->data + (first * from->stride + col) * bytes,
                            from->dtype == SEBP_BF16, from->stride,
                            from->rows != NULL ? from->rows + row : NULL, rows, cols);
}

/* The rows of a block, and where its copy is. */
static int64_t block_at(const sampled_work *work, int64_t block, float **copy)
{
    *copy = work->panel + block * work->cols * work->stride;
    return sebp_min(work->block_rows, work->rows - block * work->block_rows);
}

/* Copies a chunk of columns of a block of B. */
static void copy_piece(void *data, int64_t piece)
{
    const sampled_work *work = data;
    int64_t block = piece / work->chunks, chunk = piece % work->chunks;
    int64_t chunk_cols = sebp_round_up(sebp_div_ceil(work->cols, work->chunks), LINE_FLOATS);
    int64_t col = chunk * chunk_cols;
    if (col >= work->cols)
        return;
    float *copy;
    int64_t rows = block_at(work, block, &copy);
    copy_block(work->kernels, &work->product->b, work->first_row + block * work->block_rows, rows,
               work->first_col + col, sebp_min(chunk_cols, work->cols - col),
               copy + col * work->stride, work->stride);
}

/* The elements of one strip of A's columns, from `at` on, all below `end`; `strip` holds the columns
 * from `first` on. */
static void sum_strip(const sampled_work *work, const float *strip, int64_t first,
                      const float *copy, int64_t rows, int64_t at, int64_t end)
{
    const sebp_sampled *product = work->product;
    const int64_t *indices = product->kept->indices;
    const int64_t cols = product->kept->cols;
    int64_t start = first * cols; /* the index of the row's first element */
    while (at < end) {
        const float *a[PAIRS], *b[PAIRS];
        int64_t which[PAIRS], pairs = 0;
        for (; pairs < PAIRS && at < end; at++) {
            for (; indices[at] - start >= cols; start += cols)
                strip += work->stride;
            int64_t col = indices[at] - start - work->first_col;
            if (col < 0 || col >= work->cols)
                continue; /* of another chunk of columns */
            a[pairs] = strip;
            b[pairs] = copy + col * work->stride;
            which[pairs++] = at;
        }
        float sums[PAIRS];
        work->kernels->dots(sums, a, b, pairs, rows);
        for (int64_t i = 0; i < pairs; i++)
            product->sums[which[i]] += sums[i];
    }
}

static void sum_piece(void *data, int64_t piece)
{
    const sampled_work *work = data;
    const sebp_sampled *product = work->product;
    const sebp_sparse *kept = product->kept;
    alignas(64) float strip[STRIP_COLS * (MAX_ROWS + LINE_FLOATS)];
    const int64_t end = kept->count * (piece + 1) / work->pieces;
    for (int64_t block = 0; block * work->block_rows < work->rows; block++) {
        float *copy;
        int64_t rows = block_at(work, block, &copy);
        for (int64_t next, at = kept->count * piece / work->pieces; at < end; at = next) {
            int64_t first = kept->indices[at] / kept->cols / STRIP_COLS * STRIP_COLS;
            int64_t some = sebp_min(STRIP_COLS, kept->rows - first);
            int64_t above = (first + some) * kept->cols;
            for (next = at; next < end && kept->indices[next] < above; next++) {
            }
            copy_block(work->kernels, &product->a, work->first_row + block * work->block_rows, rows,
                       first, some, strip, work->stride);
            sum_strip(work, strip, first, copy, rows, at, next);
        }
    }
}

/* All elements on the blocks of one panel: B is copied, then read. */
static void sum_panel(sebp_cpu *cpu, sampled_work *work)
{
    int64_t blocks = sebp_div_ceil(work->rows, work->block_rows);
    work->chunks = sebp_div_ceil(sebp_cpu_pieces(cpu, work->rows, work->cols), blocks);
    sebp_cpu_parallel(cpu, blocks * work->chunks, copy_piece, work);
    sebp_cpu_parallel(cpu, work->pieces, sum_piece, work);
}

sebp_status sebp_cpu_sampled_product(void *device, const sebp_sampled *product)
{
    sebp_cpu *cpu = device;
    const sebp_sparse *kept = product->kept;
    sampled_work work = {.kernels = cpu->kernels, .product = product};
    if (kept->count == 0)
        return SEBP_SUCCESS;
    if (product->m > 0) {
        work.block_rows = rows_of_block(product->m, kept->cols);
        work.stride = stride_of(work.block_rows);
        int64_t room = sebp_cpu_workspace(cpu) / (int64_t)sizeof(float);
        work.cols = sebp_min(kept->cols, room / work.stride);
        int64_t block_floats = work.cols * work.stride;
        if (block_floats == 0)
            return SEBP_ERROR_MEMORY;
        int64_t blocks = sebp_max(sebp_min(room, PANEL_FLOATS) / block_floats, 1);
        blocks = sebp_min(blocks, sebp_div_ceil(product->m, work.block_rows));
        work.rows = blocks * work.block_rows;
        work.panel = sebp_cpu_scratch(cpu, blocks * block_floats * (int64_t)sizeof(float));
        if (work.panel == NULL)
            return SEBP_ERROR_MEMORY;
    }
    if (product->sums == NULL)
        return SEBP_SUCCESS;

    if (!product->accumulate)
        memset(product->sums, 0, (size_t)kept->count * sizeof *product->sums);
    work.pieces = sebp_cpu_pieces(cpu, kept->count, product->m);
    const int64_t panel_rows = work.rows, panel_cols = work.cols;
    for (; work.first_row < product->m; work.first_row += panel_rows) {
        work.rows = sebp_min(panel_rows, product->m - work.first_row);
        for (work.first_col = 0; work.first_col < kept->cols; work.first_col += panel_cols) {
            work.cols = sebp_min(panel_cols, kept->cols - work.first_col);
            sum_panel(cpu, &work);
        }
    }
    return SEBP_SUCCESS;
}

/*
 * In multiply-adds of a product of f32, for k of N x K elements, whose sums are taken in blocks of rows:
 *
 *     sampled    2.7 m k        terms, whose columns come out of the L2 cache
 *                280 k blocks   lists of pairs, and adding up lanes
 *                24 m (N + K)   copies
 *     whole      rate m N K     the product; rate: 1, and 1/2 or 1/8 where the CPU multiplies bf16
 *                5 N K          writing it
 *                260 k          reading the elements
 *
 * The factors are fitted to times of all m from 16 to 4096 with AVX-512 (doc/performance.md, Chosen
 * elements of dW).
 */
bool sebp_cpu_sampled_is_cheaper(const void *device, const sebp_sampled *product)
{
    const sebp_kernels *kernels = ((const sebp_cpu *)device)->kernels;
    const sebp_sparse *kept = product->kept;
    if (product->m == 0)
        return true;
    const double m = (double)product->m, k = (double)kept->count;
    const double rows = (double)kept->rows, cols = (double)kept->cols;
    const double blocks = (double)sebp_div_ceil(product->m, rows_of_block(product->m, kept->cols));
    double rate = 1;
    if (product->a.dtype == SEBP_BF16 && kernels->bf16_dots)
        rate = kernels->shape_bf16.step_units > 1 ? 1.0 / 8 : 1.0 / 2;
    const double sampled = 2.7 * m * k + 280 * k * blocks + 24 * m * (rows + cols);
    return sampled < rate * m * rows * cols + 5 * rows * cols + 260 * k;
}
