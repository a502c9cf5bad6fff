/* SPDX-License-Identifier: Apache-2.0 */
/** @file rotated.h What the tests of SparseGrad share: a layer in a rotated space, and kept elements. */
#ifndef SEBP_TESTS_ROTATED_H
#define SEBP_TESTS_ROTATED_H

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

/** Values of sebp_rotation. */
#define ROTATIONS 6

/** A layer in a rotated space. */
typedef struct problem {
    int64_t M, N, K, p, q;
    sebp_matrix u_out, u_in; /**< p x N, q x K */
    sebp_basis *basis;
    sebp_matrix dy, x;
    reference_rows active;
    sebp_rows *rows; /**< NULL: found */
    sebp_linear_options options;
} problem;

/** `rank` orthonormal rows of `size`: real ones; or, for exact sums, rows of the identity in any order
 * and with any sign. */
sebp_matrix rotated_vectors(int64_t rank, int64_t size, testing_values values);

/** Vectors and basis of a problem whose N, K, p and q are set. */
void rotated_basis(problem *p, testing_values values);

/** A problem of any ranks and rows. */
problem rotated_problem(int64_t M, int64_t N, int64_t K, sebp_dtype dtype, testing_values values);

void rotated_free(problem *p);

/** R by one order of the products. */
sebp_status rotated_gradient(sebp_context *context, const problem *p, int rotation,
                             const sebp_matrix *r);

/** Some of the elements of a matrix, each with the given chance; the first is kept where none else is. */
sebp_sparse rotated_sparse(int64_t rows, int64_t cols, double chance, testing_values values);

#endif
