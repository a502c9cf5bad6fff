/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file backend.h
 * The table of operations a device offers. The methods are written over it
 * alone; a new device is a new table and changes no method.
 *
 * Arguments are valid when they get here: views checked, shapes fitting, nothing overlapping.
 */
#ifndef SEBP_BACKEND_H
#define SEBP_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/info.h>
#include <sebp/matrix.h>
#include <sebp/optim.h>
#include <sebp/rows.h>
#include <sebp/sequences.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

/** One factor of a product: memory rows picked out of a matrix, possibly transposed. */
typedef struct sebp_operand {
    const void *data;
    int64_t stride;
    const int64_t *rows; /* memory rows; NULL: as they lie */
    bool transposed;     /* the factor is the transpose of what lies in memory */
} sebp_operand;

/**
 * C (+)= A B + bias, with A: m x k, B: k x n, C: m x n, sums in f32.
 *
 * A and B share one dtype. `c_rows` scatters: row i of the product goes to row c_rows[i] of C.
 */
typedef struct sebp_product {
    int64_t m, n, k;
    sebp_dtype dtype; /* of A and B */
    sebp_operand a, b;
    void *c;
    int64_t c_stride;
    const int64_t *c_rows; /* NULL: as they lie */
    sebp_dtype c_dtype;
    bool accumulate;
    bool other_rows_are_free; /* rows of C not in c_rows hold nothing: the product may use them */
    const void *bias;         /* n elements or NULL; never with accumulate */
    sebp_dtype bias_dtype;
} sebp_product;

/** What a scan tells of each row. */
typedef enum sebp_measure {
    SEBP_MEASURE_NONZERO,   /* 1 if any element is not +-0, else 0 */
    SEBP_MEASURE_ABOVE,     /* 1 if any magnitude is above the limit, NaN or Inf, else 0 */
    SEBP_MEASURE_SQUARE_SUM /* the sum of squares, in double; Inf for a row with NaN or Inf */
} sebp_measure;

/** A sparse matrix line by line: line i has elements start[i] to start[i + 1] - 1, element e being
 * values[e] in place places[e] of its line. */
typedef struct sebp_sparse_lines {
    int64_t count;
    const int64_t *start; /* count + 1 */
    const int64_t *places;
    const float *values;
} sebp_sparse_lines;

enum { SEBP_DIGIT_BITS = 11, SEBP_DIGITS = 1 << SEBP_DIGIT_BITS };

/** A block of elements whose magnitudes are looked at: how many are at least some minimum, how many
 * above it; and where in a list the latter go, with how many of the ties. */
typedef struct sebp_block {
    int64_t at_least, above;
    int64_t ties, at;
} sebp_block;

/** An attention, as attention.h has it, its options settled. */
typedef struct sebp_attention {
    int64_t heads, kv_heads, head_size;
    double scale, softcap;             /* softcap 0: none */
    int64_t window_left, window_right; /* >= 0; SEBP_UNLIMITED: all keys */
    double dropout;
    uint64_t seed, offset;
    bool zero_other_rows; /* of the outputs, outside the texts */
    const sebp_sequences *q_sequences, *k_sequences;
    const sebp_matrix *q, *k, *v, *out;
    const sebp_matrix *bias, *lse;           /* or NULL: none, not wanted */
    const sebp_matrix *dout;                 /* of the backward, as the next */
    const sebp_matrix *dq, *dk, *dv, *dbias; /* NULL: not wanted */
} sebp_attention;

static const int64_t SEBP_UNLIMITED = INT64_MAX / 8;

typedef struct sebp_backend {
    /** score: dy->rows results. */
    void (*scan_rows)(void *device, const sebp_matrix *dy, sebp_measure measure, double limit,
                      double *score);

    /** Has the memory that product() will need, so that it cannot fail for want of it. */
    sebp_status (*reserve_product)(void *device, const sebp_product *product);

    /**
     * m, n, k >= 0; k = 0 gives bias, or zero. Says in *path how it went and why:
     * "native:gathers". May only fail with SEBP_ERROR_BACKEND; then *path says why:
     * "oneDNN has no memory".
     */
    sebp_status (*product)(void *device, const sebp_product *product, const char **path);

    /** Zeroes the rows of `to` that are not among the `count` rows listed. */
    void (*zero_other_rows)(void *device, const sebp_matrix *to, const int64_t *rows,
                            int64_t count);

    /** to (1 x n) (+)= the sum of the `count` rows of `from` listed; rows NULL: the first ones. */
    void (*sum_rows)(void *device, const sebp_matrix *from, const int64_t *rows, int64_t count,
                     const sebp_matrix *to, bool accumulate);

    /**
     * One AdamW step of all elements (optim.h); with step_alone `w` is not read, becomes the step,
     * and may be `gradient` itself. All four are of one shape, the moments f32.
     */
    void (*adamw)(void *device, const sebp_adamw_options *options, int64_t step,
                  const sebp_matrix *gradient, const sebp_matrix *w, const sebp_matrix *moment1,
                  const sebp_matrix *moment2, bool step_alone);

    /** matrix *= factor, rounded once. */
    void (*scale)(void *device, const sebp_matrix *matrix, double factor);

    /**
     * Keeps products off the first `bytes` of scratch memory, for what a method has between them; 0
     * gives them back. SEBP_ERROR_MEMORY over set_aside_max(). Its address, aside(), is settled, and what it holds
     * is kept, once every product that will run is reserved.
     */
    sebp_status (*set_aside)(void *device, int64_t bytes);
    int64_t (*set_aside_max)(const void *device);
    void *(*aside)(const void *device);

    /** to: f32, count x to->cols, = the rows of `from`, either dtype, that are listed; rows NULL: the
     * first ones. */
    void (*widen_rows)(void *device, const sebp_matrix *from, const int64_t *rows, int64_t count,
                       const sebp_matrix *to);

    /** to (f32, lines->count x n) = lines times from (f32, n columns). */
    void (*sparse_product)(void *device, const sebp_sparse_lines *lines, const sebp_matrix *from,
                           const sebp_matrix *to);

    /*
     * Magnitudes of `from` (f32) by their bits, without the sign, so that NaN and Inf are above all
     * others. min < 2^31.
     */

    /** counts[d] = how many of those whose bits under `mask` are `found` have the digit d of
     * SEBP_DIGIT_BITS bits from bit `shift` on. counts: SEBP_DIGITS for each of threads(), the result
     * being in the first. */
    void (*count_digits)(void *device, const sebp_matrix *from, uint32_t mask, uint32_t found,
                         int shift, int64_t *counts);

    /** Counts in each block, of `size` elements as they follow each other, those with bits of at
     * least `min` and of more. */
    void (*count_at_least)(void *device, const sebp_matrix *from, uint32_t min, int64_t size,
                           sebp_block *blocks);

    /** Lists, in order, from list[blocks[i].at] on, the elements of each block with bits above
     * `min`, and of those that have just these the first blocks[i].ties. An element's index is
     * `first` more than its place in `from`. */
    void (*list_at_least)(void *device, const sebp_matrix *from, uint32_t min, int64_t first,
                          int64_t size, const sebp_block *blocks, const sebp_sparse *list);

    /** The values of kept elements from f32; false, and nothing written, where one is NaN or Inf. */
    bool (*take_elements)(void *device, const sebp_matrix *from, const sebp_sparse *kept);

    /** to += s, each element rounded once. */
    void (*add_elements)(void *device, const sebp_sparse *s, const sebp_matrix *to);

    /* Attention. Fails, with SEBP_ERROR_MEMORY, only before anything is written. */
    sebp_status (*attention_forward)(void *device, const sebp_attention *attention);
    sebp_status (*attention_backward)(void *device, const sebp_attention *attention);

    int64_t (*scratch_bytes)(const void *device); /* the most held so far */
    int (*threads)(const void *device);
    /** The most of OpenMP's threads that a library called by a method may use: one where the device
     * uses none of them itself, be it that a fork has left them behind. */
    int (*openmp_threads)(const void *device);
    void (*info)(const void *device, sebp_info *info); /* placement, gemm, refusal */
    void (*destroy)(void *device);
} sebp_backend;

#endif
