/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file reference.h
 * The layer and the row rules in double precision, by plain loops, and comparison with them.
 */
#ifndef SEBP_TESTS_REFERENCE_H
#define SEBP_TESTS_REFERENCE_H

#include <stdint.h>

#include <sebp/sebp.h>

/** What an output should hold, and how far rounding may take it away. */
typedef struct reference {
    int64_t rows;
    int64_t cols;
    int64_t terms;     /**< products in the longest sum; 0: nothing is computed */
    double *value;     /**< rows x cols */
    double *magnitude; /**< rows x cols: the sum of |a||b| behind each value; 0: exact */
} reference;

/** A row set as plain loops see it: `count` ascending indices among `total` rows. */
typedef struct reference_rows {
    int64_t total;
    int64_t count;
    int64_t *indices;
} reference_rows;

/** All of `total` rows. */
reference_rows reference_rows_all(int64_t total);

/** The rows a rule finds in dy: M x N. */
reference_rows reference_rows_find(const sebp_matrix *dy, const sebp_rule *rule);

/** What a set drops of dy: M x N. */
sebp_dropped reference_dropped(const sebp_matrix *dy, const reference_rows *rows);

/** Whether row i is in the set. */
int reference_rows_have(const reference_rows *rows, int64_t i);

/** Whether a set of the library holds the same rows. */
int reference_rows_equal(const reference_rows *want, const sebp_rows *got);

/** Fails the test where a set of the library is not the same through every accessor; frees both. */
void reference_rows_check(reference_rows *want, sebp_rows *got);

/** None of `total` rows, with room for all of them in order. */
reference_rows reference_rows_none(int64_t total);

void reference_rows_free(reference_rows *rows);

/*
 * In the functions below `before` is what an accumulated output held, else NULL, and x_is_compact
 * is as in the options. Inactive rows of Y and dX are 0, or as before.
 */

/** Y: M x N from x: M x K, w: N x K, bias: 1 x N or NULL. */
reference reference_y(const sebp_matrix *x, const sebp_matrix *w, const sebp_matrix *bias,
                      const reference_rows *rows, int x_is_compact);

/** dX: M x K from dy: M x N, w: N x K. */
reference reference_dx(const sebp_matrix *dy, const sebp_matrix *w, const reference_rows *rows,
                       const sebp_matrix *before);

/** dW: N x K from dy: M x N, x: M x K. */
reference reference_dw(const sebp_matrix *dy, const sebp_matrix *x, const reference_rows *rows,
                       int x_is_compact, const sebp_matrix *before);

/** db: 1 x N from dy: M x N. */
reference reference_db(const sebp_matrix *dy, const reference_rows *rows,
                       const sebp_matrix *before);

/*
 * In a rotated space: u_out: r_out x N, u_in: r_in x K, rows of vectors. `before` is never NULL for
 * W, which is always added to.
 */

/** R: r_out x r_in from dy: M x N, x: M x K. */
reference reference_r(const sebp_matrix *u_out, const sebp_matrix *u_in, const sebp_matrix *dy,
                      const sebp_matrix *x, const reference_rows *rows, int x_is_compact,
                      const sebp_matrix *before);

/** W + u_out S u_in^T: N x K, S being r_out x r_in. */
reference reference_stepped(const sebp_matrix *u_out, const sebp_matrix *u_in, const sebp_sparse *s,
                            const sebp_matrix *before);

void reference_free(reference *want);

/** All elements, row by row; free() frees them. */
double *reference_elements(const sebp_matrix *matrix);

/** The indices of elements, larger magnitudes first, of equal ones lower indices first: the first k
 * are those that a top k keeps. */
void reference_rank(const double *elements, int64_t count, int64_t *order);

/** For qsort() and bsearch(): int64_t, ascending. */
int reference_by_index(const void *left, const void *right);

/** How a matrix is compared. */
typedef enum reference_mode {
    REFERENCE_BOUND, /**< |got - want| <= terms * eps * magnitude, and one rounding to bf16 */
    REFERENCE_EXACT  /**< equal once rounded to the dtype */
} reference_mode;

/**
 * Fails the test where `got` is not `want`, naming the element and `what`; NaN must meet NaN and
 * Inf the same Inf. Fails it too where sums were computed and most should be zero: such a pass
 * would prove nothing. Checks gaps and guard bands of `got`.
 */
void reference_check(const reference *want, const sebp_matrix *got, reference_mode mode,
                     const char *what);

#endif
