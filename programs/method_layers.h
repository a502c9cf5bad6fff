/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file method_layers.h
 * A feed-forward layer as a method trains it: what methods.c, method_steps.c and method_layers.c
 * share.
 */
#ifndef SEBP_PROGRAMS_METHOD_LAYERS_H
#define SEBP_PROGRAMS_METHOD_LAYERS_H

#include "programs/methods.h"

/** A feed-forward weight, N x K. */
struct layer {
    struct adapter adapter; /* first, as an adapter is cast to its layer */
    struct trainer *trainer;
    struct linear *linear;
    int kind; /* 0: up, 1: down */

    struct tensor a, b; /* LoRA: K x r, r x N */
    float *h;           /* m x r, from the forward to the backward */

    sebp_sparse gradient;     /* k elements, of N x K or r_out x r_in */
    struct pool indices;      /* theirs, until the support is fixed */
    sebp_sparse_adamw *state; /* NULL: not in the sparse phase */
};

/** alpha is r, so that the scale alpha / r of the product is 1. */
static const double lora_scale = 1.0;

/** A is random, with the variance of PyTorch's linear layers; B is zero. */
void begin_lora(struct layer *layer, uint64_t *random);

/** From here on k elements of the layer's gradient train, drawn at random. */
int begin_mask(struct layer *layer, uint64_t *random);

/** From here on k elements of a gradient of rows x cols are kept. */
int begin_sparse(struct layer *layer, int64_t rows, int64_t cols);

/** From here on the layer trains as the rest of the model does. */
void begin_dense(struct layer *layer);

/** A message about what the library refused; returns FAILED. */
int complain_about(const struct trainer *trainer, sebp_status status, const char *what);

/** Frees the sums of gradients, if there are any. */
void destroy_sums(struct trainer *trainer);

#endif
