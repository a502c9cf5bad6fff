/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file methods.h
 * Ways of training the feed-forward weights of the encoder, up (F x H) and down (H x F) of each
 * block. All else, or of all else the head alone, is trained by AdamW in each of them.
 *
 *     method              of each feed-forward weight, N x K, trains
 *     frozen              nothing: what the rest of the model does without it
 *     full                all N K elements
 *     full-then-frozen    all of them in the first steps, then nothing: what SparseGrad's basis phase
 *                         does alone
 *     lora                A (K x r) and B (r x N), with W frozen: k = r (K + N) elements
 *     mask                k elements that are drawn at random once
 *     meprop              in each step the k largest elements of its gradient
 *     sparsegrad          in each step the k largest elements of its gradient in bases that are
 *                         found in the first steps, in which it trains as in full
 *     sparsegrad-leading  as sparsegrad, with leading vectors of the bases alone
 *     sparsegrad-leading-fixed
 *                         the same, but after some steps always the same k
 *
 * After the first steps all but full and lora hold neither a gradient nor moments of N x K for each weight.
 */
#ifndef SEBP_PROGRAMS_METHODS_H
#define SEBP_PROGRAMS_METHODS_H

#include <stdbool.h>
#include <stdint.h>

#include "models/bert.h"
#include "programs/training.h"

enum method {
    FROZEN,
    FULL,
    FULL_THEN_FROZEN,
    LORA,
    MASK,
    MEPROP,
    SPARSEGRAD,
    LEADING,
    FIXED,
    METHODS
};

extern const char *const method_names[METHODS];

/** Whether a method is one of the three kinds of SparseGrad, which need LAPACK. */
bool needs_bases(enum method method);

/** Whether all elements train in the first basis_steps steps, and not all later. */
bool begins_in_full(enum method method);

struct settings {
    enum method method;
    int64_t rank;        /* r; k follows */
    int64_t basis_steps; /* steps whose gradients make the bases, in which all elements train */
    double basis_rate;   /* times the rate of the feed-forward weights in these */
    int64_t basis_rank;  /* vectors of each basis in the last two methods */
    int64_t fix_support_after; /* sparse steps before the support is fixed in the last */
    bool head_only;            /* of all else the pooler and the classifier alone train */
};

/** Elements of the feed-forward weights that a method trains in one step, all layers together. */
int64_t trained_elements(const struct settings *settings, const struct bert_shape *shape);

/** Memory for the training of the feed-forward weights, in bytes. */
struct bytes {
    int64_t gradient; /* between a backward and its step */
    int64_t state;    /* the optimizer's */
    int64_t shared;   /* bases, and one R that every layer overwrites */
};

/** What trains a model by one method. */
struct trainer {
    struct settings settings;
    struct bert *model;
    struct layer *layers; /* two of each block */
    int64_t layer_count;
    struct pool pool;            /* what is held for the feed-forward weights */
    struct pool dense;           /* their gradients and moments of N x K, while there are any */
    sebp_basis_sums *sums[2];    /* of up and of down, in the basis phase */
    sebp_basis *bases[2];        /* after it */
    float *r;                    /* R: shared by all layers */
    const struct layer *refused; /* whose gradient is not finite */
    double solve_seconds;        /* what the bases took */
};

/**
 * Makes a model, whose shape says bare_feed_forward, ready to be trained.
 *
 * @param seed  of LoRA's factors, and of the elements of a mask.
 */
int trainer_create(struct bert *m, const struct settings *settings, uint64_t seed,
                   struct trainer *trainer);

/**
 * One step, after bert_backward(). In the last one in which all elements train the bases are made, or
 * the weights frozen.
 *
 * @param step  from 1.
 */
int trainer_step(struct trainer *trainer, double rate, int64_t step);

/** Whether all elements train in the step after `step` steps, and not all later. */
bool in_basis_phase(const struct settings *settings, int64_t step);

/** A message about what failed in a forward or backward; OK if nothing did. */
int trainer_status(const struct trainer *trainer, int64_t step);

/** Exactly what is held now. */
struct bytes trainer_bytes(const struct trainer *trainer);

/** LoRA's products are added to the weights: afterwards the model is an ordinary one. */
int trainer_merge(struct trainer *trainer);

void trainer_destroy(struct trainer *trainer);

/** Whether bases can be had from this build of the library; else a message says why not. */
bool has_bases(sebp_context *context);

#endif
