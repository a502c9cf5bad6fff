/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rows.c
 * Operations on rows: finding them, zeroing, summing and widening them.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>

#include "operations.h"
#include "row_work.h"

enum {
    LINE_BYTES = 64,
    SCAN_BLOCK_BYTES = 64 << 10, /* of dY, to one block of rows */
    SCAN_BLOCK_ROWS = 16, /* at least, so that threads do not write to the same lines of scores */
    ZERO_PIECE_BYTES = 128 << 10 /* worth a thread of its own */
};

/* ---- finding rows ---- */

typedef struct row_scan {
    const sebp_kernels *kernels;
    const sebp_matrix *dy;
    sebp_measure measure;
    float limit;
    double *score;
    int64_t block_rows, blocks, workers;
} row_scan;

static double measure_row(const row_scan *scan, int64_t i)
{
    const sebp_kernels *kernels = scan->kernels;
    int64_t at = i * scan->dy->stride, n = scan->dy->cols;
    const float *f32 = scan->dy->dtype == SEBP_F32 ? (const float *)scan->dy->data + at : NULL;
    const uint16_t *bf16 = f32 == NULL ? (const uint16_t *)scan->dy->data + at : NULL;
    switch (scan->measure) {
    case SEBP_MEASURE_NONZERO:
        return f32 != NULL ? kernels->any_nonzero_f32(f32, n) : kernels->any_nonzero_bf16(bf16, n);
    case SEBP_MEASURE_ABOVE:
        return f32 != NULL ? kernels->any_above_f32(f32, n, scan->limit)
                           : kernels->any_above_bf16(bf16, n, scan->limit);
    case SEBP_MEASURE_SQUARE_SUM:
        break;
    }
    double sum = f32 != NULL ? kernels->square_sum_f32(f32, n) : kernels->square_sum_bf16(bf16, n);
    return isfinite(sum) ? sum : INFINITY;
}

/* Workers take blocks in turn. Padding must be read to its end and lies in long runs, each of which
 * would otherwise fall to one worker. */
static void scan_blocks(void *work, int64_t worker)
{
    const row_scan *scan = work;
    for (int64_t block = worker; block < scan->blocks; block += scan->workers) {
        int64_t first = block * scan->block_rows;
        int64_t end = sebp_min(first + scan->block_rows, scan->dy->rows);
        for (int64_t i = first; i < end; i++)
            scan->score[i] = measure_row(scan, i);
    }
}

/* The largest float that is not above `limit`. For a float v, |v| > limit if and only if |v| >
 * that. */
static float float_below(double limit)
{
    float nearest = (float)limit;
    return (double)nearest > limit || isinf(nearest) ? nextafterf(nearest, 0.0f) : nearest;
}

sebp_status sebp_cpu_scan_rows(void *device, const sebp_matrix *dy, sebp_measure measure,
                               double limit, double *score)
{
    sebp_cpu *cpu = device;
    int64_t row_bytes = sebp_max(dy->cols * (int64_t)sebp_dtype_bytes(dy->dtype), 1);
    int64_t block_rows = sebp_max(SCAN_BLOCK_BYTES / row_bytes, SCAN_BLOCK_ROWS);
    int64_t blocks = sebp_div_ceil(dy->rows, block_rows);
    row_scan scan = {.kernels = cpu->kernels,
                     .dy = dy,
                     .measure = measure,
                     .limit = float_below(limit),
                     .score = score,
                     .block_rows = block_rows,
                     .blocks = blocks,
                     .workers = sebp_min(blocks, sebp_cpu_threads(cpu))};
    sebp_cpu_parallel(cpu, scan.workers, scan_blocks, &scan);
    return SEBP_SUCCESS;
}

/* ---- filling the other rows with zeros ---- */

typedef struct row_zeroing {
    const sebp_kernels *kernels;
    char *data;
    int64_t row_bytes, stride_bytes;
    const int64_t *rows; /* `count` rows that are left as they are */
    int64_t count;
    int64_t others; /* the number of rows to zero */
    int64_t pieces;
    bool stream;
} row_zeroing;

static void zero_rows(const row_zeroing *zeroing, int64_t first, int64_t rows)
{
    char *at = zeroing->data + first * zeroing->stride_bytes;
    if (zeroing->stride_bytes == zeroing->row_bytes) {
        zeroing->kernels->zero(at, rows * zeroing->row_bytes, zeroing->stream);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        zeroing->kernels->zero(at + i * zeroing->stride_bytes, zeroing->row_bytes, zeroing->stream);
}

/* How many listed rows lie before the other row number `other`: the i-th listed row has
 * rows[i] - i other rows before it. */
static int64_t listed_before(const row_zeroing *zeroing, int64_t other)
{
    int64_t low = 0, high = zeroing->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (zeroing->rows[middle] - middle <= other)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void zero_piece(void *work, int64_t piece)
{
    const row_zeroing *zeroing = work;
    int64_t other = zeroing->others * piece / zeroing->pieces;
    int64_t end = zeroing->others * (piece + 1) / zeroing->pieces;
    for (int64_t listed = listed_before(zeroing, other); other < end; listed++) {
        /* the others from here up to the next listed row */
        int64_t until = listed < zeroing->count ? zeroing->rows[listed] - listed : zeroing->others;
        int64_t run = sebp_min(until, end) - other;
        if (run > 0)
            zero_rows(zeroing, other + listed, run);
        other += run;
    }
    if (zeroing->stream)
        zeroing->kernels->stream_fence();
}

sebp_status sebp_cpu_zero_other_rows(void *device, const sebp_matrix *to, const int64_t *rows,
                                     int64_t count)
{
    sebp_cpu *cpu = device;
    int64_t element = (int64_t)sebp_dtype_bytes(to->dtype);
    int64_t row_bytes = to->cols * element, others = to->rows - count;
    int64_t bytes = others * row_bytes;
    row_zeroing zeroing = {
        .kernels = cpu->kernels,
        .data = to->data,
        .row_bytes = row_bytes,
        .stride_bytes = to->stride * element,
        .rows = rows,
        .count = count,
        .others = others,
        .pieces = sebp_min(sebp_div_ceil(bytes, ZERO_PIECE_BYTES), sebp_cpu_threads(cpu)),
        .stream = sebp_cpu_streams(cpu, bytes)};
    sebp_cpu_parallel(cpu, zeroing.pieces, zero_piece, &zeroing);
    return SEBP_SUCCESS;
}

/* ---- sums of columns ---- */

typedef struct column_sums {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    const int64_t *rows;
    int64_t count;
    const sebp_matrix *to;
    bool accumulate;
    int64_t piece_cols;
} column_sums;

static void sum_piece(void *work, int64_t piece)
{
    const column_sums *sums = work;
    const sebp_matrix *from = sums->from, *to = sums->to;
    int64_t first = piece * sums->piece_cols;
    /* Without rows `from` may have no data, and any stride. */
    sebp_row_sum sum = {.from = sums->count > 0 ? sebp_element(from, 0, first) : NULL,
                        .from_dtype = from->dtype,
                        .stride = from->stride,
                        .rows = sums->rows,
                        .count = sums->count,
                        .n = sebp_min(sums->piece_cols, to->cols - first),
                        .to = sebp_element(to, 0, first),
                        .to_dtype = to->dtype,
                        .accumulate = sums->accumulate};
    sebp_cpu_sum_listed(sums->kernels, &sum);
}

/* Each column is summed by one thread in the order of its rows, so the bits do not depend on the
 * number of threads. */
sebp_status sebp_cpu_sum_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                              int64_t count, const sebp_matrix *to, bool accumulate)
{
    sebp_cpu *cpu = device;
    const int64_t line = LINE_BYTES / (int64_t)sizeof(float);
    int64_t cols = to->cols;
    int64_t piece_cols = sebp_div_ceil(sebp_div_ceil(cols, sebp_cpu_threads(cpu)), line) * line;
    column_sums sums = {.kernels = cpu->kernels,
                        .from = from,
                        .rows = rows,
                        .count = count,
                        .to = to,
                        .accumulate = accumulate,
                        .piece_cols = piece_cols};
    if (cols > 0)
        sebp_cpu_parallel(cpu, sebp_div_ceil(cols, piece_cols), sum_piece, &sums);
    return SEBP_SUCCESS;
}

/* ---- rows widened ---- */

typedef struct row_widening {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    const int64_t *rows;
    const float *weights;
    int64_t count;
    const sebp_matrix *to;
    int64_t pieces;
} row_widening;

static void widen_piece(void *work, int64_t piece)
{
    const row_widening *widening = work;
    const sebp_matrix *from = widening->from, *to = widening->to;
    int64_t end = widening->count * (piece + 1) / widening->pieces;
    for (int64_t i = widening->count * piece / widening->pieces; i < end; i++) {
        int64_t at = widening->rows != NULL ? widening->rows[i] : i;
        sebp_cpu_widen(widening->kernels, sebp_element(to, i, 0), sebp_element(from, at, 0),
                       from->dtype, to->cols);
        if (widening->weights != NULL)
            widening->kernels->scale_f32(sebp_element(to, i, 0), to->cols, widening->weights[i]);
    }
}

sebp_status sebp_cpu_widen_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                                const float *weights, int64_t count, const sebp_matrix *to)
{
    sebp_cpu *cpu = device;
    row_widening widening = {.kernels = cpu->kernels,
                             .from = from,
                             .rows = rows,
                             .weights = weights,
                             .count = count,
                             .to = to,
                             .pieces = sebp_min(count, sebp_cpu_threads(cpu))};
    sebp_cpu_parallel(cpu, widening.pieces, widen_piece, &widening);
    return SEBP_SUCCESS;
}
