/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.h
 * The layers of a Transformer that work on each row by itself: norms, activations, dropout and
 * rotary positions, forward and backward.
 *
 * Rows are tokens. Matrices are M x N, of either dtype and any stride. Elements are computed in f32,
 * sums taken in f32, and what is stored in bf16 is rounded once.
 *
 * Each function takes a set of active rows; NULL: all. Nothing is read of inactive rows. In outputs
 * they are set to zero, or not touched, as `inactive` says.
 *
 * A row is computed by one thread, and sums over rows are taken in an order of their own: the bits
 * do not depend on the number of threads. Where a layer is said to work in place, an output may be
 * the input named: the same view, not one that overlaps it otherwise.
 *
 * NaN and Inf spread within their row as the formulas have it, and into sums over rows.
 */
#ifndef SEBP_LAYERS_H
#define SEBP_LAYERS_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/activation.h>
#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/* ---- norms ---- */

typedef enum sebp_norm {
    SEBP_LAYER_NORM = 0, /**< takes off the mean, divides by the standard deviation */
    SEBP_RMS_NORM = 1    /**< divides by the root of the mean square */
} sebp_norm;

typedef struct sebp_norm_options {
    size_t size_bytes;     /**< sizeof(sebp_norm_options), so that the struct can grow */
    sebp_norm norm;        /**< default SEBP_LAYER_NORM */
    double epsilon;        /**< added to the variance, or to the mean square; >= 0, finite as f32 */
    double gain_offset;    /**< added to gain: 1 where weights are kept less 1 (Gemma); finite */
    double dropout;        /**< probability p of dropout of x, in [0, 1); 0: none */
    uint64_t seed, offset; /**< of dropout (random.h); the backward's are the forward's */
    sebp_inactive
        inactive;        /**< inactive rows of h and y, of dh and dx; of a dh that accumulates they
                               stay */
    sebp_write dh_write; /**< backward only, as the next two */
    sebp_write dgain_write;
    sebp_write dshift_write;
} sebp_norm_options;

/** Options as they are by default, with size_bytes set: LayerNorm, epsilon 1e-5, no dropout. */
#define SEBP_NORM_OPTIONS_INIT                                                                     \
    {                                                                                              \
        sizeof(sebp_norm_options), SEBP_LAYER_NORM, 1e-5, 0, 0, 0, 0, SEBP_INACTIVE_ZERO,          \
            SEBP_OVERWRITE, SEBP_OVERWRITE, SEBP_OVERWRITE                                         \
    }

/**
 * h = residual + dropout(x), and of each row
 *
 *     y = (h - mean(h)) / sqrt(variance(h) + epsilon) * (gain + gain_offset) + shift
 *
 * The variance is the mean of (h - mean)^2. An RMSNorm takes off no mean, and has the mean of h^2 in
 * place of the variance. Where h is bf16 the norm is that of the rounded h, which the backward sees.
 *
 * Where the variance plus epsilon is over the largest f32 (of elements over about 1e19) or below 2^-90, CPUs
 * compute it in double. GPUs do not: there y is then 0, NaN or inexact. 1 over its root
 * is stored in f32, where it is Inf if the sum is below 2^-256. With epsilon 0 and equal elements y is NaN, or
 * what the rounding of their mean leaves.
 *
 * Reads x and the residual and writes h and y: 16 bytes an element in f32 with all four, 8 without
 * residual and h.
 *
 * @param x           M x N.
 * @param residual    M x N, of x's dtype; NULL: 0.
 * @param gain        1 x N, either dtype; NULL: 1, to which gain_offset is not added.
 * @param shift       1 x N, either dtype; NULL: 0.
 * @param rows        NULL: all.
 * @param options     NULL: the defaults.
 * @param h           M x N, of x's dtype: the norm's input, for the backward, and the residual of what
 *                    follows where the norm comes first. It may be x or the residual. NULL where
 *                    there is neither residual nor dropout: then x is h.
 * @param y           M x N, of x's dtype; it may be x or the residual.
 * @param statistics  M x 2, f32: mean and 1 / sqrt(variance + epsilon), for the backward. Inactive
 *                    rows of it are left. It overlaps nothing. NULL: not wanted.
 *
 * Element (i, j) has dropout's number i * (N rounded up to a multiple of 64) + j.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (x, y; h with a residual or dropout); SEBP_ERROR_SIZE; a
 *         status of sebp_matrix_check(); SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option);
 *         SEBP_ERROR_ROWS; SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_norm_forward(sebp_context *context, const sebp_matrix *x,
                                       const sebp_matrix *residual, const sebp_matrix *gain,
                                       const sebp_matrix *shift, const sebp_rows *rows,
                                       const sebp_norm_options *options, const sebp_matrix *h,
                                       const sebp_matrix *y, const sebp_matrix *statistics);

/**
 * With xh = (h - mean) / std and g = dy * (gain + gain_offset):
 *
 *     dh     (+)= (g - mean(g) - xh mean(g xh)) / std      an RMSNorm has no mean(g)
 *     dx       = dropout(dh)
 *     dgain  (+)= sum over rows of dy xh
 *     dshift (+)= sum over rows of dy
 *
 * dh is also the residual's gradient. Where it accumulates, what it held is part of dx too: that is
 * the gradient that comes along the residual of a model whose norm comes first. Sums over rows are
 * taken in blocks, on CPUs up to 64, and those added up in their order.
 *
 * Reads dy and h, twice from the cache, and writes dh and dx: 12 bytes an element in f32 without dx.
 *
 * @param dy          M x N.
 * @param h           M x N, of dy's dtype, from the forward; x where that had no h.
 * @param statistics  M x 2, f32, from the forward.
 * @param gain        as in the forward.
 * @param dh          M x N, of dy's dtype; it may be dy where it overwrites. NULL: not wanted.
 * @param dx          M x N, of dy's dtype; it may be dy. NULL: not wanted.
 * @param dgain       1 x N, either dtype. NULL: not wanted.
 * @param dshift      1 x N, either dtype. NULL: not wanted.
 *
 * @return as sebp_norm_forward(); SEBP_ERROR_NULL (dy, h, statistics).
 */
SEBP_API sebp_status sebp_norm_backward(sebp_context *context, const sebp_matrix *dy,
                                        const sebp_matrix *h, const sebp_matrix *statistics,
                                        const sebp_matrix *gain, const sebp_rows *rows,
                                        const sebp_norm_options *options, const sebp_matrix *dh,
                                        const sebp_matrix *dx, const sebp_matrix *dgain,
                                        const sebp_matrix *dshift);

/* ---- activations ---- */

typedef struct sebp_activation_options {
    size_t size_bytes;      /**< sizeof(sebp_activation_options), so that the struct can grow */
    sebp_inactive inactive; /**< inactive rows of y, of dx and dup */
} sebp_activation_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_ACTIVATION_OPTIONS_INIT                                                               \
    {                                                                                              \
        sizeof(sebp_activation_options), SEBP_INACTIVE_ZERO                                        \
    }

/**
 * y = f(x), or gated y = f(x) up, x then being the gate: two matrices, or columns of one.
 *
 * Reads x and up, writes y: 8 bytes an element in f32, 12 gated.
 *
 * @param x        M x N.
 * @param up       M x N, of x's dtype; NULL: not gated.
 * @param rows     NULL: all.
 * @param options  NULL: the defaults.
 * @param y        M x N, of x's dtype; it may be x or up.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (the activation, an option); SEBP_ERROR_ROWS;
 *         SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS.
 */
SEBP_API sebp_status sebp_activation_forward(sebp_context *context, sebp_activation activation,
                                             const sebp_matrix *x, const sebp_matrix *up,
                                             const sebp_rows *rows,
                                             const sebp_activation_options *options,
                                             const sebp_matrix *y);

/**
 * dx = dy f'(x), or gated dx = dy f'(x) up and dup = dy f(x): from the forward's inputs, nothing
 * else is kept.
 *
 * Reads dy, x and up, writes dx and dup: 12 bytes an element in f32, 20 gated.
 *
 * @param dx   M x N; it may be dy, x or up. NULL, with up alone: not wanted.
 * @param dup  M x N; it may be dy, x or up. NULL: not wanted. Without up: NULL.
 *
 * @return as sebp_activation_forward(); SEBP_ERROR_NULL (dup without up too).
 */
SEBP_API sebp_status sebp_activation_backward(sebp_context *context, sebp_activation activation,
                                              const sebp_matrix *dy, const sebp_matrix *x,
                                              const sebp_matrix *up, const sebp_rows *rows,
                                              const sebp_activation_options *options,
                                              const sebp_matrix *dx, const sebp_matrix *dup);

/* ---- dropout ---- */

typedef struct sebp_dropout_options {
    size_t size_bytes;      /**< sizeof(sebp_dropout_options), so that the struct can grow */
    double probability;     /**< in [0, 1) */
    uint64_t seed, offset;  /**< random.h; the backward's are the forward's */
    sebp_inactive inactive; /**< inactive rows of y */
} sebp_dropout_options;

/** Options as they are by default, with size_bytes set: probability 0.1. */
#define SEBP_DROPOUT_OPTIONS_INIT                                                                  \
    {                                                                                              \
        sizeof(sebp_dropout_options), 0.1, 0, 0, SEBP_INACTIVE_ZERO                                \
    }

/**
 * y = x, each element dropped with the probability p and else multiplied by 1 / (1 - p). The backward
 * is the same function of dy.
 *
 * A dropped Inf or NaN is NaN. Reads x and writes y: 8 bytes an element in f32.
 *
 * Element (i, j) has the number i * (N rounded up to a multiple of 64) + j.
 *
 * @param y  M x N, of x's dtype; it may be x.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option); SEBP_ERROR_ROWS; SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_ALIAS.
 */
SEBP_API sebp_status sebp_dropout_apply(sebp_context *context, const sebp_matrix *x,
                                        const sebp_rows *rows, const sebp_dropout_options *options,
                                        const sebp_matrix *y);

/* ---- rotary positions ---- */

/**
 * Rotary positions (Su et al., "RoFormer", 2021): of each head of a row at position p, pair j of the
 * first `dims` elements is turned by the angle p f_j, f_j = base^(-2 j / dims).
 *
 * Llama 3's scaling turns long waves more slowly, with w_j = 2 pi / f_j and L = original_length:
 * w_j > L / low_factor divides f_j by `factor`, w_j < L / high_factor leaves it, and in between
 * f_j (s + (1 - s) / factor) with s = (L / w_j - low_factor) / (high_factor - low_factor).
 */
typedef struct sebp_rotary_options {
    size_t size_bytes; /**< sizeof(sebp_rotary_options), so that the struct can grow */
    int64_t head_size; /**< elements of a head; 0: a row is one head */
    int interleaved;   /**< 0: a pair is j and j + dims / 2 (LLaMA); else 2 j and 2 j + 1 (GPT-J) */
    sebp_inactive inactive; /**< inactive rows of y */
    double base;            /**< > 0, finite */
    double factor;          /**< 1: no scaling; else > 0, finite */
    double low_factor;      /**< with scaling: > 0 and below high_factor, finite */
    double high_factor;
    double original_length; /**< with scaling: > 0, finite */
} sebp_rotary_options;

/** Options as they are by default, with size_bytes set: base 10000, halves, no scaling. */
#define SEBP_ROTARY_OPTIONS_INIT                                                                   \
    {                                                                                              \
        sizeof(sebp_rotary_options), 0, 0, SEBP_INACTIVE_ZERO, 10000, 1, 1, 4, 8192                \
    }

/**
 * Fills a table with the cosines and sines of positions 0 to P - 1, once for all layers: computed in
 * double precision, rounded once.
 *
 * @param options  NULL: the defaults. head_size and interleaved do not matter here.
 * @param table    P x dims, f32, dims even: of row p the first half are cosines, the second sines.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (the table is not f32); SEBP_ERROR_VALUE (an option); SEBP_ERROR_SHAPE (dims
 *         is odd).
 */
SEBP_API sebp_status sebp_rotary_table(sebp_context *context, const sebp_rotary_options *options,
                                       const sebp_matrix *table);

/**
 * y = x, turned. Elements of a head past the first dims = table->cols are as in x. Reads x and writes
 * y: 8 bytes an element in f32, and the table's rows.
 *
 * @param x          M x N, N a multiple of head_size.
 * @param positions  M of them in the device's memory, each in [0, P), used of active rows alone;
 *                   NULL: row i has position i.
 * @param table      P x dims, from sebp_rotary_table(); dims at most head_size.
 * @param rows       NULL: all.
 * @param options    NULL: the defaults. base and scaling do not matter here.
 * @param y          M x N, of x's dtype; it may be x.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option, a position); SEBP_ERROR_ROWS;
 *         SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS.
 */
SEBP_API sebp_status sebp_rotary_forward(sebp_context *context, const sebp_matrix *x,
                                         const int64_t *positions, const sebp_matrix *table,
                                         const sebp_rows *rows, const sebp_rotary_options *options,
                                         const sebp_matrix *y);

/** dx from dy: turned back by the same angles. All else is as in the forward. */
SEBP_API sebp_status sebp_rotary_backward(sebp_context *context, const sebp_matrix *dy,
                                          const int64_t *positions, const sebp_matrix *table,
                                          const sebp_rows *rows, const sebp_rotary_options *options,
                                          const sebp_matrix *dx);

SEBP_END_DECLS

#endif
