/* SPDX-License-Identifier: Apache-2.0 */
/** @file row_set.h The insides of a row set. */
#ifndef SEBP_LIB_ROW_SET_H
#define SEBP_LIB_ROW_SET_H

#include <stdbool.h>
#include <stdint.h>

#include <sebp/rows.h>

#include "copies.h"

struct sebp_rows {
    int64_t total;
    int64_t count;
    bool is_run;         /* the rows follow each other, so that they can be used in place */
    int64_t *indices;    /* count of them */
    sebp_copies *copies; /* of the indices, on devices */
    float *weights;      /* count of them; NULL: all 1 */
    sebp_copies *weight_copies;
    double variance; /* of what is computed with the weights (rows.h) */
};

/** An empty set of `total` rows with room for `room` indices. SEBP_ERROR_OVERFLOW,
 * SEBP_ERROR_MEMORY. */
sebp_status sebp_rows_make(int64_t total, int64_t room, sebp_rows **made);

/** Room for `room` weights in a set that has none. SEBP_ERROR_MEMORY. */
sebp_status sebp_rows_make_weights(sebp_rows *rows, int64_t room);

/** Hands over a set that holds `count` indices. */
sebp_status sebp_rows_finish(sebp_rows *rows, int64_t count, sebp_rows **made);

#endif
