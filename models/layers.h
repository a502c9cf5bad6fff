/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.h
 * The library's layers as models call them: with a model's tensors, forward and backward, on listed
 * rows among M. Rows that are not listed are neither read nor written. Tensors and lists lie in the memory
 * of the context's device.
 */
#ifndef SEBP_MODELS_LAYERS_H
#define SEBP_MODELS_LAYERS_H

#include <stdint.h>

#include <sebp/sebp.h>

#include "models/engine.h"
#include "models/parameters.h"

/* ---- linear ---- */

/**
 * Another way of training a layer's weight: what stands in for the layer's forward and backward.
 * forward computes y; backward writes or adds dx, as the options say, writes db, and keeps what it
 * wants of the weight's gradient. NULL: the layer's own, without a gradient of the weight.
 */
struct adapter {
    sebp_status (*forward)(struct adapter *adapter, sebp_context *context, const sebp_rows *rows,
                           const sebp_linear_options *options, const sebp_matrix *x,
                           const sebp_matrix *w, const sebp_matrix *b, const sebp_matrix *y);
    sebp_status (*backward)(struct adapter *adapter, sebp_context *context, const sebp_rows *rows,
                            const sebp_linear_options *options, const sebp_matrix *dy,
                            const sebp_matrix *x, const sebp_matrix *w, const sebp_matrix *dx,
                            const sebp_matrix *db);
};

/** y = x W^T + b. x: M x K, y: M x N. rows = NULL: all. */
void linear_forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                    const struct linear *linear, float *y);

/**
 * The gradients of W and b, and dx written or added to. dy: M x N, x and dx: M x K. rows: not NULL,
 * which the library would take for rows to be found.
 */
void linear_backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                     int64_t M, const struct linear *linear, float *dx, sebp_write write);

/** The same, and activated = GELU(y): M x N. */
void linear_gelu_forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                         const struct linear *linear, float *y, float *activated);

/** The same, where x is GELU(before): dx becomes the gradient of `before`, M x K, and is written. */
void linear_gelu_backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                          const float *before, int64_t M, const struct linear *linear, float *dx);

/* ---- layer norm, dropout, embedding; x, residual, y, d: M x H ---- */

/** What a layer drops, in a forward and in its backward. */
struct dropout {
    double probability;
    uint64_t seed, offset;
};

/** y = norm(sum), where sum = residual + dropout(x) takes the place of x. residual: NULL if there is
 * none. statistics: M x 2, for the backward. */
void norm_forward(struct engine *e, const sebp_rows *rows, float *x, const float *residual,
                  int64_t M, const struct norm *norm, struct dropout dropout, float *y,
                  float *statistics);

/**
 * d becomes the gradient of the sum, and of the residual, in place.
 *
 * @param dropped  M x H, room for the gradient of x where something was dropped.
 * @return the gradient of x: d, or `dropped`.
 */
const float *norm_backward(struct engine *e, const sebp_rows *rows, const float *sum,
                           const float *statistics, int64_t M, const struct norm *norm,
                           struct dropout dropout, float *d, float *dropped);

/** Dropout of x in place. Its backward is the same of dx. x: M x H. */
void drop(struct engine *e, const sebp_rows *rows, struct dropout dropout, int64_t M, int64_t H,
          float *x);

/** Row i of y becomes row indices[i] of the table. indices: M; table: T x H; y: M x H. */
void take_rows(struct engine *e, const sebp_rows *rows, const float *table, int64_t T,
               const int64_t *indices, int64_t M, int64_t H, float *y);

/** sum = token + position of each row. ids, positions: M each. */
void embedding_forward(struct engine *e, const sebp_rows *rows, const int64_t *ids,
                       const int64_t *positions, int64_t M, const struct tensor *token,
                       const struct tensor *position, float *sum);

/** Adds the rows of d to the gradient of their tokens, and makes that of the positions of them. */
void embedding_backward(struct engine *e, const sebp_rows *rows, const int64_t *ids,
                        const int64_t *positions, int64_t M, const struct tensor *token,
                        const struct tensor *position, const float *d);

/* ---- attention ---- */

/** Which rows meet which, and how. */
struct attention {
    int64_t heads;
    const sebp_sequences *queries, *keys;
    struct dropout dropout;
    sebp_inactive inactive; /* what becomes of rows of the outputs outside the texts */
};

/** context from queries, keys and values side by side. qkv: M x 3H, context: M x H. lse: M x heads,
 * for the backward. */
void attention_forward(struct engine *e, const struct attention *attention, const float *qkv,
                       int64_t M, int64_t H, float *context, float *lse);

/** dqkv, M x 3H, from dcontext, M x H. */
void attention_backward(struct engine *e, const struct attention *attention, const float *dcontext,
                        const float *qkv, const float *context, const float *lse, int64_t M,
                        int64_t H, float *dqkv);

#endif
