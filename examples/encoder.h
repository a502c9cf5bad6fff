/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file encoder.h
 * A BERT-shaped text classifier: parameters, activations, forward, backward, AdamW.
 *
 * Shapes: B sequences of L tokens make M = B * L rows; H hidden, A heads of D = H / A, F = 4 H,
 * C classes, V vocabulary. Matrices are row-major. As in BERT: post-layer-norm blocks, exact GELU,
 * [CLS] pooled through a dense layer and tanh. Left out: dropout, which would need equal masks in
 * every mode, and segment embeddings, as each example is one sentence.
 *
 * Which rows are computed is said by regions, for the forward and the backward each.
 */
#ifndef SEBP_EXAMPLES_ENCODER_H
#define SEBP_EXAMPLES_ENCODER_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "arithmetic.h"
#include "text.h"
#include "tools.h"

/** One learned tensor: a slice of the four flat arrays of the model. */
struct tensor {
    const char *name, *part; /* "qkv", "weight" */
    int64_t block;           /* 0 for what stands outside the blocks */
    int64_t rows, cols;
    float *value, *gradient, *moment1, *moment2; /* rows x cols each */
    float fill;                                  /* initial value; NaN: random */
    bool decays;                                 /* biases and norms do not */
    bool bare;                                   /* gradient and moments are not the model's */
};

/** y = x W^T + b. */
struct linear {
    struct tensor *weight;   /* N x K */
    struct tensor *bias;     /* 1 x N */
    struct adapter *adapter; /* NULL: the weight is trained as all tensors are */
};

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

struct norm {
    struct tensor *scale, *shift; /* 1 x H each */
};

struct block {
    struct linear qkv;      /* H -> 3H: queries, keys, values */
    struct linear out;      /* H -> H */
    struct norm after_out;  /* on out + the block's input */
    struct linear up;       /* H -> F */
    struct linear down;     /* F -> H */
    struct norm after_down; /* on down + what came after the first norm */

    /* What the forward keeps for the backward. */
    float *input;                               /* M x H: the previous block's output */
    float *qkv_values;                          /* M x 3H */
    float *weights;                             /* B x A x L x L: after softmax */
    float *context;                             /* M x H */
    float *out_sum, *middle;                    /* M x H: before and after the first norm */
    float *up_values, *bent;                    /* M x F: before and after GELU */
    float *down_sum, *output;                   /* M x H: before and after the second norm */
    struct moments *out_moments, *down_moments; /* M */
};

/**
 * The rows to compute with: the first lengths[s] of each sequence s. Three are made for a batch:
 * all of them, the tokens, and only the [CLS] tokens, whose rows alone carry a gradient where
 * nothing mixes tokens any more: in the last block after its attention.
 */
struct region {
    sebp_rows *rows;  /* among M */
    int64_t *lengths; /* B */
};

struct shape {
    int64_t layers, hidden, heads, length, batch, vocabulary, classes;
    bool bare_feed_forward; /* the weights up and down have no gradients and moments of the model */
};

struct batch {
    int64_t sequences; /* B, or less in the last one of a data set */
    int32_t *ids;      /* B x L */
    int64_t *lengths;  /* B: tokens that are not padding */
    int *labels;       /* B */
};

struct model {
    struct shape shape;
    sebp_context *context;
    sebp_status status; /* of the first library call that failed; nothing runs after it */
    int threads;

    struct tensor *tensors;
    int64_t tensor_count, parameter_count; /* parameters: each tensor is padded to cache lines */
    int64_t trained_count;                 /* those with gradient and moments of the model */
    struct tensor *token, *position;       /* V x H, L x H */
    struct norm after_embedding;
    struct block *blocks;
    struct linear pooler, classifier; /* H -> H, H -> C */

    float *embedding_sum; /* M x H: before the norm; after it: the first block's input */
    struct moments *embedding_moments;
    float *pooled;   /* B x H: after tanh */
    float *logits;   /* B x C */
    float *dlogits;  /* B x C */
    float *dpooled;  /* B x H */
    float *d;        /* M x H: the gradient on its way down through the blocks */
    float *dcontext; /* M x H */
    float *dqkv;     /* M x 3H */
    float *dbent;    /* M x F */
    float *scratch;  /* for each thread: scratch_each */
    int64_t scratch_each;

    struct batch batch;
    struct region everything, tokens, classifying;
    sebp_rows *sequences; /* all B rows, for the two layers on top */
    bool skip_forward, skip_backward;
    double backward_flops; /* of the linear layers, summed over the steps */
};

/**
 * Makes a model with room for batches of the shape. What each step writes before it reads comes
 * from a pool of its own, which may be the same.
 */
int model_create(struct pool *pool, struct pool *activations, sebp_context *context,
                 const struct shape *shape, struct model *m);

/** The parameters as they are before the first step. */
void model_initialise(struct model *m, uint64_t seed, float deviation);

/** Frees the row sets: the one thing a model has that lies in no pool. */
void regions_destroy(struct model *m);

/** Keeps the first failure. */
void keep_status(struct model *m, sebp_status status);

/** A message about a failure that was kept; OK if there was none. */
int model_status(const struct model *m);

/** Fills the batch with `count` examples from `order`, or in their own order. */
void batch_fill(struct model *m, const struct dataset *data, const int64_t *order, int64_t from,
                int64_t count, int32_t pad);

/** The loss: mean cross-entropy of the batch. Leaves dlogits behind; NaN after a failure. */
double forward(struct model *m);

/** Every gradient of the batch's loss, from the dlogits that forward() left. */
void backward(struct model *m);

/** Zeroes the token gradients of the batch, so that the next one can add to them. */
void embedding_clear(struct model *m);

/** One step with decoupled decay: a single pass over parameters, gradients and moments. */
void optimize(struct model *m, double rate, int64_t step);

/** Linear warm-up over the first tenth of the steps, then linear decay to zero. step: from 1. */
double rate_at(double peak, int64_t step, int64_t steps);

/** How well a model labels a data set. */
struct score {
    double accuracy;
    double matthews; /* correlation with the labels, in [-1, 1]; 0 if all are judged alike */
    double loss;     /* mean */
};

struct score judge(struct model *m, const struct dataset *data, int32_t pad);

#endif
