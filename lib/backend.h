/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file backend.h
 * The table of operations a device offers. The methods (rows.c, linear.c) are written over it
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
#include <sebp/rows.h>
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

typedef struct sebp_backend {
    /** score: dy->rows results. */
    void (*scan_rows)(void *device, const sebp_matrix *dy, sebp_measure measure, double limit,
                      double *score);

    /** Has the memory that product() will need, so that it cannot fail for want of it. */
    sebp_status (*reserve_product)(void *device, const sebp_product *product);

    /**
     * m, n, k >= 0; k = 0 gives bias, or zero. Says in *path how it went and why:
     * "native:gathers". May only fail with SEBP_ERROR_BACKEND.
     */
    sebp_status (*product)(void *device, const sebp_product *product, const char **path);

    /** Zeroes the rows of `to` that are not among the `count` rows listed. */
    void (*zero_other_rows)(void *device, const sebp_matrix *to, const int64_t *rows,
                            int64_t count);

    /** to (1 x n) (+)= the sum of the `count` rows of `from` listed; rows NULL: the first ones. */
    void (*sum_rows)(void *device, const sebp_matrix *from, const int64_t *rows, int64_t count,
                     const sebp_matrix *to, bool accumulate);

    int64_t (*scratch_bytes)(const void *device); /* the most held so far */
    int (*threads)(const void *device);
    void (*info)(const void *device, sebp_info *info); /* placement, gemm, refusal */
    void (*destroy)(void *device);
} sebp_backend;

#endif
