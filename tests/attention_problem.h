/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_problem.h
 * Random attention and what it should give, in double precision by plain loops, with a bound for the
 * rounding of each element.
 */
#ifndef SEBP_TESTS_ATTENTION_PROBLEM_H
#define SEBP_TESTS_ATTENTION_PROBLEM_H

#include <sebp/sebp.h>

#include "testing.h"

enum { ATTENTION_MAX_TEXTS = 6 };

/** Where texts lie. */
typedef struct attention_layout {
    int64_t count, rows, max, active;
    int64_t first[ATTENTION_MAX_TEXTS], length[ATTENTION_MAX_TEXTS];
    sebp_sequences *made;
} attention_layout;

/** An output: what it should be, and how far rounding may take it away. */
typedef struct attention_expected {
    int64_t rows, cols;
    double *value, *bound;
} attention_expected;

typedef struct attention_problem {
    int64_t H, kv, D, G;
    attention_layout queries, keys;
    sebp_attention_options options;
    int fused; /* q, k and v are columns of one matrix */
    sebp_matrix whole, q, k, v, bias, out, lse, dout, dq, dk, dv, dbias;
    int has_bias;
    /* All elements again. */
    double *at_q, *at_k, *at_v, *at_bias, *at_dout;
    attention_expected want_out, want_lse, want_dq, want_dk, want_dv, want_dbias;
} attention_problem;

/** A random one: texts of up to max_length rows, heads of up to max_size columns. */
attention_problem attention_problem_make(int64_t max_length, int64_t max_size);
void attention_problem_free(attention_problem *p);
/** Fills in want_out and want_lse. */
void attention_reference_forward(attention_problem *p);
/** Fills in the gradients that are wanted. */
void attention_reference_backward(attention_problem *p);
/** Whether a row belongs to a text. */
int attention_is_active(const attention_layout *l, int64_t row);
/** Poison, with or without gaps. */
sebp_matrix attention_empty_matrix(int64_t rows, int64_t cols, sebp_dtype dtype);

#endif
