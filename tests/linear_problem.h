/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear_problem.h
 * What the tests of the linear layer share: a layer with rows of every kind, and its backward and forward
 * compared with the reference.
 */
#ifndef SEBP_TESTS_LINEAR_PROBLEM_H
#define SEBP_TESTS_LINEAR_PROBLEM_H

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

/** How a problem's row set comes about; from FOUND on, by a rule. */
typedef enum rows_kind {
    ROWS_ALL,
    ROWS_NONE,
    ROWS_ONE,
    ROWS_RUN,
    ROWS_SCATTERED,
    ROWS_PADDED,
    ROWS_FOUND,
    ROWS_FOUND_THRESHOLD,
    ROWS_FOUND_TOP,
    ROWS_FOUND_ENERGY,
    ROWS_KINDS
} rows_kind;

/** A layer and the rows to compute: M, N, K as in linear.h, m active rows. */
typedef struct linear_problem {
    int64_t M, N, K;
    sebp_dtype dtype;
    testing_values values;
    reference_rows active;
    sebp_rows *rows;  /**< NULL: found by options.rule */
    sebp_matrix dy;   /**< M x N */
    sebp_matrix x;    /**< M x K, or m x K if compact */
    sebp_matrix w;    /**< N x K */
    sebp_matrix bias; /**< 1 x N */
    sebp_linear_options options;
} linear_problem;

/** What must not be read is NaN or Inf, which would spread. */
linear_problem linear_problem_make(int64_t M, int64_t N, int64_t K, sebp_dtype dtype,
                                   testing_values values, rows_kind kind);

/** Of any size, 0 among them, and with any rows. */
linear_problem linear_problem_random(testing_values values);

void linear_problem_free(linear_problem *p);

/** Fills a row with NaN and Inf. */
void linear_poison_row(const sebp_matrix *matrix, int64_t row);

/** One backward of a problem, with outputs and writes at random, and the same again. */
void linear_check_backward(sebp_context *context, linear_problem *p);

/** One forward of a problem, and the same again. */
void linear_check_forward(sebp_context *context, const linear_problem *p);

#endif
