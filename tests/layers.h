/* SPDX-License-Identifier: Apache-2.0 */
/** @file layers.h What the tests of row-wise layers share: listed rows, and comparison by element. */
#ifndef SEBP_TESTS_LAYERS_H
#define SEBP_TESTS_LAYERS_H

#include <sebp/sebp.h>

#include "testing.h"

/** Rows of a random call: NULL, or some of `total`. */
typedef struct layer_rows {
    sebp_rows *rows;
    int64_t total;
} layer_rows;

layer_rows layer_rows_make(int64_t total);
int layer_rows_have(const layer_rows *rows, int64_t i);
void layer_rows_free(layer_rows *rows);

/** Poisons the inactive rows of an input, which are not to be read. */
void layer_hide(const sebp_matrix *matrix, const layer_rows *rows);

/** Fails the test where got[row][col] is further than `bound` from `want`, and half an ulp of bf16 where
 * it is of that dtype; NaN meets NaN, Inf the same Inf. */
void layer_near(const sebp_matrix *got, int64_t row, int64_t col, double want, double bound,
                const char *what);

/** Fails the test where inactive rows of an output are not as they should be: zero, or as `before`. */
void layer_inactive(const sebp_matrix *got, const layer_rows *rows, sebp_inactive inactive,
                    const sebp_matrix *before, const char *what);

/** Fails the test where most of what should be computed is zero. */
void layer_not_vacuous(int64_t nonzeros, int64_t elements);

/** An output: poison, of a matrix's shape; its gaps are checked as it is released. */
sebp_matrix layer_output(int64_t rows, int64_t cols, sebp_dtype dtype);

/** Columns of a random call: now and then none. */
int64_t layer_any_cols(void);

/** Two contexts, of one thread and of three, whose results must be the same bits. */
extern sebp_context *layer_contexts[2];
void layer_open_contexts(void);
void layer_close_contexts(void);

/** What dropout multiplies element (row, col) of a matrix of n columns by. */
double layer_kept(double probability, uint64_t seed, uint64_t offset, int64_t row, int64_t col,
                  int64_t cols);

#endif
