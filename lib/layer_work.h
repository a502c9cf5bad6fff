/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layer_work.h
 * What the row-wise layers ask of a device: see include/sebp/layers.h, loss.h and embedding.h for
 * what each computes. Matrices that may be absent are NULL.
 *
 * `rows` lists the `count` rows that are worked on; NULL: the first ones. The other rows of outputs are
 * left.
 *
 * Indices, labels, positions, lists of groups and the state of a softmax lie in the device's memory, as
 * matrices do. A method that must know what they are brings copies to the host, or from it
 * (sebp_list_to_host() and sebp_list_to_device() in call.h).
 */
#ifndef SEBP_LAYER_WORK_H
#define SEBP_LAYER_WORK_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/embedding.h>
#include <sebp/layers.h>
#include <sebp/matrix.h>

/** Which rows. */
typedef struct sebp_row_list {
    const int64_t *rows;
    int64_t count;
} sebp_row_list;

typedef struct sebp_norm_work {
    sebp_row_list list;
    const sebp_norm_options *options;
    const sebp_matrix *x, *residual, *gain, *shift;
    const sebp_matrix *h, *y, *statistics;
} sebp_norm_work;

typedef struct sebp_norm_back_work {
    sebp_row_list list;
    const sebp_norm_options *options;
    const sebp_matrix *dy, *h, *statistics, *gain;
    const sebp_matrix *dh, *dx, *dgain, *dshift;
} sebp_norm_back_work;

/** Forward where dy is NULL. */
typedef struct sebp_activation_work {
    sebp_row_list list;
    sebp_activation activation;
    const sebp_matrix *x, *up, *y;
    const sebp_matrix *dy, *dx, *dup;
} sebp_activation_work;

typedef struct sebp_dropout_work {
    sebp_row_list list;
    double probability;
    uint64_t seed, offset;
    const sebp_matrix *x, *y;
} sebp_dropout_work;

typedef struct sebp_rotary_work {
    sebp_row_list list;
    int64_t head_size;
    bool interleaved, inverse;
    const int64_t *positions; /* of each row of x; NULL: the row's own number */
    const sebp_matrix *table, *x, *y;
} sebp_rotary_work;

/** What is known of a row's logits so far, in the memory of the device, which alone reads it. */
typedef struct sebp_softmax_state {
    double max, exp_sum; /* of exp(x - max) */
    double label;        /* the label's logit, once its class was met */
    double sum;          /* of x - from over the logits x, where it is wanted */
    float from;          /* the first logit, or 0 where that is not finite */
} sebp_softmax_state;

/**
 * A chunk of classes, `first_class` on, of the logits of `count` rows: looked at for the loss, or made
 * the gradient, or both. Row i of `logits` has the label labels[list.rows[i]] or labels[i]; a row with
 * ignore_label is not read, and its gradient is 0.
 */
typedef struct sebp_cross_entropy_work {
    sebp_row_list list; /* where labels are found; the logits lie one after the other */
    const int64_t *labels;
    int64_t ignore_label;
    double smoothing, scale;
    int64_t classes;           /* V */
    sebp_softmax_state *state; /* count of them, from the first chunk to the last */
    const sebp_matrix *logits;
    int64_t first_class;
    bool look; /* at the chunk, for the state; the first chunk begins it */
    const sebp_matrix
        *dlogits; /* the gradient; NULL: not made. Needs a state that knows all chunks */
} sebp_cross_entropy_work;

typedef struct sebp_gather_work {
    sebp_row_list list;
    int tables;
    const sebp_matrix *from[SEBP_MAX_TABLES];
    const int64_t *indices[SEBP_MAX_TABLES]; /* of each row of `to` */
    const sebp_matrix *to;
} sebp_gather_work;

/** to[target[g]] (+)= the sum of from[rows[i]] for i from start[g] to start[g + 1] - 1, in an order that
 * depends on the group's size alone. */
typedef struct sebp_group_sums {
    const sebp_matrix *from, *to;
    const int64_t *rows, *start, *target;
    int64_t groups;
    bool accumulate;
} sebp_group_sums;

#endif
