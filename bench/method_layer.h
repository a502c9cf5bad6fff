/* SPDX-License-Identifier: Apache-2.0 */
/* A layer, and what the methods that sebp-bench compares need for it. */
#ifndef SEBP_BENCH_METHOD_LAYER_H
#define SEBP_BENCH_METHOD_LAYER_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "machine.h"
#include "options.h"

enum { FORWARD, BACKWARD, GRADIENT, STEP, PHASES };
enum { ORDERS = SEBP_ROTATE_IN_OUT + 1 }; /* 0 is not one */

/* What is timed: a method's step by phases, or one order of products in the phase GRADIENT. */
typedef struct run {
    int phases; /* a bit each */
    int count;
    double ms[PHASES][MAX_ROUNDS], total_ms[MAX_ROUNDS];
} run;

/* The matrices of a layer. Moments come in pairs: V1 and V2 are dW's, A1 and A2 are A's. */
enum {
    X, /* M x K; here to DB for all methods */
    W, /* N x K */
    BIAS,
    Y,  /* M x N, as DY */
    DY, /* DX: M x K */
    DX,
    DB,
    DW, /* N x K, here to V2, for the full one */
    V1,
    V2,
    A, /* K x r, here to A2, for LoRA */
    DA,
    A1,
    A2,
    B, /* r x N, here to B2 */
    LORA_DB,
    B1,
    B2,
    H, /* m x r */
    DH,
    U_OUT, /* vectors in rows, r_out x N, here to R for SparseGrad */
    U_IN,  /* r_in x K */
    R,     /* r_out x r_in */
    MATRICES
};

/* A layer with what the methods need for it. */
typedef struct layer {
    const options *asked;
    const shape *sizes;
    sebp_context *context;
    sebp_dtype dtype;
    double activity;
    int64_t active; /* m */
    sebp_rows *rows;
    int64_t k;    /* elements that train */
    int64_t rank; /* of LoRA: about as many */
    double scale;
    sebp_adamw_options adamw;
    int64_t steps;
    sebp_matrix at[MATRICES]; /* data is NULL where not needed */
    sebp_basis *basis;
    sebp_sparse kept[METHODS]; /* from MASK on, and their states */
    sebp_sparse_adamw *states[METHODS];
    run *runs[METHODS], *orders[ORDERS]; /* NULL: not asked for, or not worth it */
} layer;

/* By sebp_rotation. */
extern const char *const order_names[ORDERS];

int is_asked(const layer *l, int method);

/* Exits unless a call succeeded. */
void succeed(const layer *l, sebp_status status);

/* Chooses the sizes of all matrices, and how many elements train, for the layer that is set. */
void place_inputs(layer *l);

/* Allocates and fills the matrices, and makes what holds them. 0: `reason` says why that cannot be. */
int open_layer(layer *l, const machine *m, char *reason, size_t room);
void close_layer(layer *l);

/* From now on a method keeps the elements that it has listed, which are then listed once, in the state. */
void fix_support(layer *l, int method);

#endif
