/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file select.h
 * The k elements of largest magnitude of a matrix that comes in panels of rows: exactly k, ties by
 * the lowest index.
 */
#ifndef SEBP_SELECT_H
#define SEBP_SELECT_H

#include <stdint.h>

#include "internal.h"

typedef struct sebp_selection {
    int64_t k;
    int64_t room;       /* elements there is memory for: at least 2 k */
    sebp_sparse list;   /* the largest so far, k at most, by ascending index */
    uint32_t min;       /* the bits of a magnitude that later elements must have */
    int64_t *counts;    /* of digits, for each thread */
    sebp_block *blocks; /* of a panel */
} sebp_selection;

/** k >= 1. Takes about 24 k bytes, 16 KiB for each thread and 256 KiB; SEBP_ERROR_OVERFLOW,
 * SEBP_ERROR_MEMORY. */
sebp_status sebp_selection_begin(sebp_context *context, sebp_selection *selection, int64_t k);

/** The next rows: f32; `first` is the index of their first element, row * cols. Panels come in
 * order, each element once. */
void sebp_selection_feed(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                         int64_t first);

/** Writes the k elements, of at least k fed, into `top`: SEBP_SUCCESS; or nothing where one is NaN
 * or Inf, which rank above all others: SEBP_ERROR_NONFINITE. */
sebp_status sebp_selection_finish(sebp_context *context, const sebp_selection *selection,
                                  const sebp_sparse *top);

/** Frees. */
void sebp_selection_end(sebp_selection *selection);

#endif
