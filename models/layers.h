/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.h
 * The layers that models are put together from, forward and backward, each on listed rows among M.
 * The other rows are neither read nor written.
 *
 * Linear layers are the library's. The others are plain loops over the listed rows.
 */
#ifndef SEBP_MODELS_LAYERS_H
#define SEBP_MODELS_LAYERS_H

#include <stdint.h>

#include <sebp/sebp.h>

#include "models/arithmetic.h"
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

/* ---- layer norm, GELU, embedding; sum, residual, y, d: M x H ---- */

/** sum += residual; y = norm(sum). Keeps the moments of each row. */
void norm_forward(struct engine *e, const sebp_rows *rows, float *sum, const float *residual,
                  const struct norm *norm, float *y, struct moments *moments);

/** d becomes the gradient of the norm's input, in place. */
void norm_backward(struct engine *e, const sebp_rows *rows, const float *sum,
                   const struct moments *moments, const struct norm *norm, float *d);

/** y = GELU(x). x, y: M x F. */
void gelu_forward(struct engine *e, const sebp_rows *rows, const float *x, float *y, int64_t F);

/** d becomes the gradient of x, in place. */
void gelu_backward(struct engine *e, const sebp_rows *rows, const float *x, float *d, int64_t F);

/** y = norm(sum), with sum = token + position of each row. ids, positions: M each. */
void embedding_forward(struct engine *e, const sebp_rows *rows, const int32_t *ids,
                       const int32_t *positions, const struct tensor *token,
                       const struct tensor *position, const struct norm *norm, float *sum, float *y,
                       struct moments *moments);

/** Adds the rows of d to the gradient of their tokens, and makes that of the positions of them. */
void embedding_backward(struct engine *e, const sebp_rows *rows, const int32_t *ids,
                        const int32_t *positions, const struct tensor *token,
                        const struct tensor *position, const float *d);

/* ---- attention ---- */

/**
 * Texts among M rows: text s has the rows from starts[s] to starts[s + 1] - 1, its room, of which
 * the first tokens[s] are its tokens and the others padding.
 */
struct texts {
    int64_t count;
    const int64_t *starts;  /* count + 1 */
    const int64_t *tokens;  /* count */
    const int64_t *squares; /* count: the sum of room^2 of the texts before */
};

/** Of each text the first lengths[s] rows. */
struct region {
    sebp_rows *rows;
    int64_t *lengths;
};

/**
 * For each text and head, with Q, K, V: slices of D = H / heads columns of qkv:
 *
 *     weights = softmax(Q K^T / sqrt D), padded keys masked        context = weights V
 *
 * for the queries of one region over the keys of another. Where the keys are all the rows of a
 * text, every query meets its padding too, as an implementation does that knows of it only through
 * its mask.
 *
 * @param qkv      M x 3H.
 * @param weights  for each text, head and row of the text's room, a row of as many weights.
 * @param context  M x H.
 */
void attention_forward(struct engine *e, const struct texts *texts, const struct region *queries,
                       const struct region *keys, int64_t heads, int64_t H, const float *qkv,
                       float *weights, float *context);

/**
 * dqkv of the keys' region from dcontext of the queries' region; the queries outside it get zero.
 * dcontext: M x H, dqkv: M x 3H.
 */
void attention_backward(struct engine *e, const struct texts *texts, const struct region *queries,
                        const struct region *keys, int64_t heads, int64_t H, const float *qkv,
                        const float *weights, const float *dcontext, float *dqkv);

/** Elements of scratch memory that a thread needs for texts of up to L rows. */
int64_t layer_scratch(int64_t heads, int64_t H, int64_t L);

/* ---- loss ---- */

/** The mean cross-entropy of B rows, and its gradient. logits, dlogits: B x C. */
double cross_entropy(const float *logits, const int *labels, int64_t B, int64_t C, float *dlogits);

#endif
