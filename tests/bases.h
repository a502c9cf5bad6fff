/* SPDX-License-Identifier: Apache-2.0 */
/** @file bases.h What the tests of bases share: sums of squares in double precision, and comparison. */
#ifndef SEBP_TESTS_BASES_H
#define SEBP_TESTS_BASES_H

#include <sebp/sebp.h>

/** Adds G G^T to out: N x N, and G^T G to in: K x K, of a gradient G: N x K. */
void bases_add_squares(const sebp_matrix *gradient, double *out, double *in);

/** Fails the test where vectors or shares of two bases are not the same, bit for bit. */
void bases_same(const sebp_basis *one, const sebp_basis *other);

#endif
