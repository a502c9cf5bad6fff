/* SPDX-License-Identifier: Apache-2.0 */
/** @file losses.h What the tests of cross-entropy share: labels, options and a row in double precision. */
#ifndef SEBP_TESTS_LOSSES_H
#define SEBP_TESTS_LOSSES_H

#include <sebp/sebp.h>

#include "testing.h"

/** The label of rows that are left out. */
enum { LOSSES_IGNORED = -100 };

/** A label for each of m rows, which `labelled` of them have; free() frees them. */
int64_t *losses_labels(int64_t m, int64_t classes, double labelled);

/** How many rows have one. */
int64_t losses_count(const int64_t *labels, int64_t m);

/** The loss of a row, before it is scaled, and its gradient where that is not NULL. */
double losses_row(const double *logits, int64_t classes, int64_t label, double smoothing,
                  double *gradient);

sebp_cross_entropy_options losses_options(void);

#endif
