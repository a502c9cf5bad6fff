/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file parameters.h
 * What a model learns: tensors in flat arrays, with their gradients and AdamW's moments.
 */
#ifndef SEBP_MODELS_PARAMETERS_H
#define SEBP_MODELS_PARAMETERS_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "models/support.h"

/** One learned tensor, rows x cols. */
struct tensor {
    const char *name, *part; /* "qkv", "weight" */
    int64_t block;           /* 0 for what stands outside the blocks */
    int64_t rows, cols;
    float *value, *gradient, *moment1, *moment2; /* rows x cols each, on the context's device */
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

struct norm {
    struct tensor *scale, *shift; /* 1 x H each */
};

/** All tensors of a model, in the order in which they were added. */
struct parameters {
    struct tensor *tensors;
    int64_t tensor_count, room;
    int64_t count;         /* elements; each tensor is padded to cache lines */
    int64_t trained_count; /* those with gradient and moments of the model */
};

/** Room for so many tensors; none yet. */
int parameters_create(struct pool *pool, int64_t room, struct parameters *p);

/** Adds a tensor; its memory comes once all are known. fill: NaN for random values. */
struct tensor *add_tensor(struct parameters *p, const char *name, int64_t block, const char *part,
                          int64_t rows, int64_t cols, float fill);

struct linear add_linear(struct parameters *p, const char *name, int64_t block, int64_t in_features,
                         int64_t out_features);

struct norm add_norm(struct parameters *p, const char *name, int64_t block, int64_t features);

/** Gives the tensors their memory; pool->failed says that there was none. */
void parameters_lay_out(struct pool *pool, struct parameters *p);

/** Values as they are before the first step; gradients and moments of zero. */
sebp_status parameters_initialise(sebp_context *context, struct parameters *p, uint64_t seed,
                                  float deviation);

/* ---- views ---- */

sebp_matrix value_of(const struct tensor *tensor);
sebp_matrix gradient_of(const struct tensor *tensor);

/* ---- AdamW ---- */

/** The library's options with what BERT is trained with. */
sebp_adamw_options adamw_options(double rate, bool decays);

/** One AdamW step of a tensor. step: from 1. */
sebp_status tensor_step(sebp_context *context, const struct tensor *tensor, double rate,
                        int64_t step);

#endif
