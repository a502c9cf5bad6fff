/* SPDX-License-Identifier: Apache-2.0 */
/** @file reference_sample.h Weighted samples of rows as rows.h defines them, by plain loops, and gradients for them. */
#ifndef SEBP_TESTS_REFERENCE_SAMPLE_H
#define SEBP_TESTS_REFERENCE_SAMPLE_H

#include <sebp/sebp.h>

/** What rows.h says of n scores and a budget of k. */
typedef struct reference_sample {
    double limit; /**< rows of that score and above are kept */
    double sum;   /**< T: of the others */
    int64_t draws;
} reference_sample;

/** The scores of dy's rows: 0 for rows of zeros, Inf for rows with NaN or Inf. x NULL: of dY alone. free()
 * frees them. */
double *reference_scores(const sebp_matrix *dy, const sebp_matrix *x);

/** Tries every c. The scores: finite, those of more than k rows above 0, and no two T / (k - c) alike. */
reference_sample reference_sample_rows(const double *score, int64_t total, int64_t k);

/** The weight of each row; 0: left out. free() frees them. */
double *reference_weights(const double *score, int64_t total, const reference_sample *sample,
                          uint64_t seed);

/** Rows of norms that differ by up to 2^(2 spread), some of them zero. */
sebp_matrix reference_uneven_gradient(int64_t M, int64_t N, sebp_dtype dtype, int spread);

#endif
