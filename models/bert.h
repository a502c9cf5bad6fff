/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert.h
 * A BERT-shaped text classifier: parameters, batches, forward, backward.
 *
 * Shapes: B texts of up to L tokens lie in M rows; H hidden, A heads of D = H / A, F feed-forward,
 * C classes, V vocabulary. Matrices are row-major. As in BERT: post-layer-norm blocks, exact GELU,
 * [CLS] pooled through a dense layer and tanh. Left out: segment embeddings, as each example is one
 * sentence.
 *
 * The modes compute the same loss and gradients, up to rounding, on other rows:
 *
 *     mode            rows of a batch       forward       backward
 *     dense           B L, padded           all           all
 *     skip backward   B L, padded           all           those that can carry a gradient
 *     skip            B L, padded           the same      the same
 *     packed          the tokens alone      the same      the same
 *
 * Those rows are the tokens that are not padding; in the last block, after its attention, only
 * those of [CLS]. Packed, the texts lie end to end, and there is no padding anywhere. Attention is
 * over the tokens of a text in every mode; dense, the rows of the padding are zero after it.
 *
 * Dropout, of one probability, is where BERT has it: after the embedding, of attention's weights,
 * of what each block adds to its input, twice, and of the pooled rows. What is dropped follows from
 * the seed, the batch and the place in the model, and is made again in the backward. An element's
 * number comes from the row that it lies in. So dense, skip backward and skip drop the same
 * elements and have the same losses, as long as no text of a batch is longer than 64 tokens; packed
 * drops others. With longer texts skip drops other weights of the last block's attention, which has
 * queries of [CLS] alone.
 */
#ifndef SEBP_MODELS_BERT_H
#define SEBP_MODELS_BERT_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "models/engine.h"
#include "models/layers.h"
#include "models/parameters.h"
#include "models/support.h"

enum bert_mode { BERT_DENSE, BERT_SKIP_BACKWARD, BERT_SKIP, BERT_PACKED, BERT_MODES };

struct bert_shape {
    int64_t layers, hidden, heads, feed_forward, length, batch, vocabulary, classes;
    int32_t pad;            /* the id that fills padded rows */
    double dropout;         /* probability, in [0, 1); 0: none */
    bool bare_feed_forward; /* the weights up and down have no gradients and moments of the model */
};

struct bert_block {
    struct linear qkv;      /* H -> 3H: queries, keys, values */
    struct linear out;      /* H -> H */
    struct norm after_out;  /* on out + the block's input */
    struct linear up;       /* H -> F */
    struct linear down;     /* F -> H */
    struct norm after_down; /* on down + what came after the first norm */

    /* What the forward keeps for the backward. */
    float *input;                            /* M x H: the previous block's output */
    float *qkv_values;                       /* M x 3H */
    float *lse;                              /* M x A: see sebp_attention_forward() */
    float *context;                          /* M x H */
    float *out_sum, *middle;                 /* M x H: before and after the first norm */
    float *up_values, *activated;            /* M x F: before and after GELU */
    float *down_sum, *output;                /* M x H: before and after the second norm */
    float *out_statistics, *down_statistics; /* M x 2 */
};

/** B texts in M rows. */
struct bert_batch {
    int64_t count;      /* B, or less in the last one of a data set */
    int64_t rows;       /* M */
    int64_t *ids;       /* M */
    int64_t *positions; /* M: places in their texts */
    int64_t *starts;    /* B + 1: the first row of each, that of [CLS] */
    int64_t *lengths;   /* B: tokens that are not padding */
    int64_t *labels;    /* B */
    int64_t *texts_of;  /* M: the text that a row is of */
    uint8_t *words;     /* V: whether it is in the batch */

    /* The same in the memory of the context's device. */
    struct {
        int64_t *ids, *positions, *starts, *labels, *texts_of;
    } on_device;

    sebp_rows *all;         /* every row */
    sebp_rows *tokens;      /* those that are not padding */
    sebp_rows *classifying; /* [CLS] alone, whose rows alone carry a gradient where nothing mixes
                               tokens any more: in the last block after its attention */
    sebp_rows *texts;       /* all B rows, for the two layers on top */

    sebp_sequences *sequences;            /* the tokens of each text */
    sebp_sequences *classifying_queries;  /* [CLS] of each text, */
    sebp_sequences *classifying_keys;     /* and what it looks at; NULL: sequences */
    int64_t *query_lengths, *key_lengths; /* 2 B each: of the last two */
};

struct bert {
    struct bert_shape shape;
    struct engine engine;
    enum bert_mode mode; /* set before a batch is begun */
    struct bert_batch batch;
    bool judging;           /* nothing is dropped */
    uint64_t seed, batches; /* of dropout, and how many batches were begun under it */

    struct parameters parameters;
    struct tensor *token, *position; /* V x H, L x H */
    struct norm after_embedding;
    struct bert_block *blocks;
    struct linear pooler, classifier; /* H -> H, H -> C */

    float *embedding_sum;        /* M x H: before the norm; after it: the first block's input */
    float *embedding_statistics; /* M x 2 */
    float *first;                /* B x H: the last block's rows of [CLS] */
    float *pooled;               /* B x H: before tanh */
    float *features;             /* B x H: after tanh and dropout */
    float *logits;               /* B x C */
    float *dlogits;              /* B x C */
    float *dpooled;              /* B x H */
    float *dfirst;               /* B x H */
    float *d;                    /* M x H: the gradient on its way down through the blocks */
    float *dropped;              /* M x H: that of a branch, where there is dropout */
    float *dcontext;             /* M x H */
    float *dqkv;                 /* M x 3H */
    float *dactivated;           /* M x F */

    float *zero_row;       /* 3H zeros, on the device, */
    int64_t *zero_indices; /* and the larger of M and V: rows of a table of that row alone */

    /* On the host. */
    float *pooled_values, *dpooled_values; /* B x H: after tanh; the gradient there */
    float *logits_values;                  /* B x C: see bert_logits() */
};

/**
 * Makes a model with room for batches of the shape. Tensors come from `memory`, which is of the context's
 * device, and what each step writes before it reads from a pool of its own, which may be the same. On
 * CPUs all three may be one.
 */
int bert_create(struct pool *pool, struct pool *memory, struct pool *activations,
                sebp_context *context, const struct bert_shape *shape, struct bert *m);

/** Parameters, gradients and moments as they are before the first step. The seed is also that of
 * dropout. */
void bert_initialise(struct bert *m, uint64_t seed, float deviation);

/** Frees the row sets and sequences: all that a model has that lies in no pool. */
void bert_destroy(struct bert *m);

/** A message about a library call that failed; OK if none did. */
int bert_status(const struct bert *m);

/** Empties the batch; it is then filled for the mode. */
void bert_batch_begin(struct bert *m);

/** Adds a text to the batch. length: 1 to L; label: below C. */
void bert_batch_add(struct bert *m, const int32_t *ids, int64_t length, int label);

/** The loss: mean cross-entropy of the batch. Leaves dlogits behind; NaN after a failure. */
double bert_forward(struct bert *m);

/** The logits that bert_forward() left, B x C on the host. */
const float *bert_logits(struct bert *m);

/** Every gradient of the batch's loss, from the dlogits that bert_forward() left. */
void bert_backward(struct bert *m);

/** One AdamW step of all tensors that have gradients, after which bert_clear() is called. */
void bert_step(struct bert *m, double rate, int64_t step);

/** Zeroes the token gradients of the batch, so that the next one can add to them. */
void bert_clear(struct bert *m);

/* ---- shared by the forward and the backward ---- */

/** The rows of one block. */
struct bert_region {
    const sebp_rows *input; /* the keys and values come from them */
    const sebp_rows *rows;  /* queries, and all that comes after attention */
    const sebp_sequences *queries, *keys;
};

struct bert_region bert_region(const struct bert *m, int64_t layer, bool skip);

/** Zeroes listed rows of y, M x H with H <= 3 hidden. rows = NULL: all. */
void bert_zero_rows(struct bert *m, const sebp_rows *rows, int64_t M, int64_t H, float *y);

/** Where a block drops. Outside the blocks, which count as one more: the embedding and the pooled
 * rows. */
enum bert_place {
    BERT_ATTENTION,
    BERT_OUT,
    BERT_DOWN,
    BERT_PLACES,
    BERT_EMBEDDING = BERT_ATTENTION,
    BERT_POOLED = BERT_OUT
};

/** What is dropped there in this batch. layer: from 0; outside the blocks their number. */
struct dropout bert_dropout(const struct bert *m, int64_t layer, enum bert_place place);

#endif
