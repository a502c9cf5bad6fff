/* SPDX-License-Identifier: Apache-2.0 */
/* What sebp-bench computes on. */
#ifndef SEBP_BENCH_INPUTS_H
#define SEBP_BENCH_INPUTS_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "options.h"

/* A random number for each (seed, index), so that any thread can draw any of them; and as one in
 * [0, 1). */
uint64_t random_bits(uint64_t seed, uint64_t index);
double random_unit(uint64_t seed, uint64_t index);

/* A matrix without gaps: either sign, magnitude in [0.5, 1.5), never zero. */
void fill_random(const sebp_matrix *a, uint64_t seed, int threads);

double element(const sebp_matrix *a, int64_t row, int64_t col);
size_t matrix_bytes(const sebp_matrix *a);

/* M rows in sequences that are padded on the right: their lengths vary around activity x sequence
 * and sum to `active`. */
sebp_status tail_rows(const shape *sizes, uint64_t seed, int64_t active, sebp_rows **rows);

#endif
