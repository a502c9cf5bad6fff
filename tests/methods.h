/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file methods.h
 * What tests/test_methods.c runs: every method, on matrices that are the host's or a device's.
 */
#ifndef SEBP_TESTS_METHODS_H
#define SEBP_TESTS_METHODS_H

#include <sebp/sebp.h>

#include "method_devices.h"

enum { ROWS = 48, ACTIVE = 17, OUT = 20, IN = 24, RANK = 3, RANK_OUT = 6, RANK_IN = 7, KEPT = 9 };
/* The row set's last row. */
enum { LAST_ACTIVE = 2 * (ACTIVE - 1) + 1 };
/* Attention: heads of X's columns that share their keys, and the longest text; rotary positions. */
enum { HEADS = 3, HEAD = IN / HEADS, TEXT = 12, TURNED = 6 };

/** Matrices, inputs and outputs. */
typedef enum place {
    DY,
    X,
    W,
    BIAS,
    Y,
    DX,
    DW,
    DB,
    A,
    B,
    H,
    DH,
    DA,
    DBB,
    R,
    GRADIENT,
    MOMENT1,
    MOMENT2,
    HALF_W, /* bf16, whatever the others are */
    RESIDUAL,
    NORMED,
    LAYER_OUT,
    GAIN,
    SHIFT,
    STATISTICS,
    DGAIN,
    DSHIFT,
    ANGLES,
    KEYS,
    VALUES,
    LSE,
    DKEYS,
    DVALUES,
    SCORE_BIAS,
    DSCORE_BIAS,
    ACTIVATED,
    LARGE, /* more elements than are measured as one row */
    PLACES
} place;

/** Lists of ROWS numbers. */
typedef enum list_place {
    LABELS,    /**< in [0, OUT), or ignored */
    TOKENS,    /**< in [0, OUT) */
    POSITIONS, /**< in [0, ROWS) */
    LISTS
} list_place;

/** What is given, in the host's memory. */
typedef struct method_given {
    sebp_matrix at[PLACES];
    int64_t *lists[LISTS];
    sebp_sparse in_r, in_w; /**< kept elements of R, and of W */
    sebp_rows *rows;
    sebp_basis *basis;
    sebp_sequences *texts; /**< padded, one of them empty */
} method_given;

/** All of it on the host, or on the device. */
typedef struct method_world {
    const method_device *device; /**< NULL: the host */
    sebp_context *context;
    const method_given *given;
    sebp_matrix at[PLACES];
    int64_t *lists[LISTS];
    sebp_sparse in_r, in_w;
    double numbers[4]; /**< what a method gives the host */
} method_world;

void methods_give(sebp_dtype dtype, method_given *given);
void methods_free(method_given *given);

/** Copies what is given; `device` and `context` are set. */
void world_fill(method_world *world, const method_given *given);
void world_empty(method_world *world);
/** That the device has what `want` says, within `bound` of 1 + its magnitude and, of bf16, a step; 0: bit
 * for bit. Of kept elements others may be there that are as large. */
void world_check(const method_world *on, const sebp_matrix *want, const sebp_sparse *in_r,
                 const sebp_sparse *in_w, double bound, const char *what);

/** The same of the numbers that it has given. */
void world_check_numbers(const method_world *on, const method_world *want, const char *what);

typedef struct method {
    const char *name;
    sebp_status (*run)(method_world *w);
} method;

typedef struct method_list {
    const method *methods;
    int count;
} method_list;

method_list linear_methods(void);
method_list layer_methods(void);

#endif
