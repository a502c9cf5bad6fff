/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file call.h
 * What the methods on a layer's rows share: a call in progress, checks of its arguments in the
 * order that sebp.h promises, and products whose operands carry the active rows.
 */
#ifndef SEBP_CALL_H
#define SEBP_CALL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "internal.h"

/** What a call works with, once its arguments are checked. */
typedef struct sebp_call {
    sebp_context *context;
    const char *function; /* its name in messages */
    sebp_linear_options options;
    const sebp_rows *rows; /* NULL: all of them */
    sebp_rows *found;      /* rows found by the call itself; else NULL */
    int64_t m;             /* active rows, of M */
    double start;          /* milliseconds */
} sebp_call;

/** An argument: its name in messages, and how it may be used. */
typedef struct sebp_argument {
    const char *name;
    const sebp_matrix *view; /* NULL: absent */
    bool is_output;
} sebp_argument;

sebp_call sebp_call_begin(sebp_context *context, const char *function);

/* Checks; on error each leaves a line. Absent arguments pass. */

sebp_status sebp_missing(const sebp_call *call, const char *name);
/** Puts a caller's options over the defaults in `taken`, as sebp_take_struct(); NULL leaves them. */
sebp_status sebp_take_any_options(const sebp_call *call, const void *given, size_t first_bytes,
                                  void *taken, size_t bytes);
/** NULL leaves the defaults. */
sebp_status sebp_take_options(sebp_call *call, const sebp_linear_options *options);
sebp_status sebp_check_views(const sebp_call *call, const sebp_argument *arguments, int count);
sebp_status sebp_check_same_dtype(const sebp_call *call, const sebp_argument *one,
                                  const sebp_argument *other);
sebp_status sebp_check_write(const sebp_call *call, const char *name, sebp_write write);
sebp_status sebp_check_inactive(const sebp_call *call);
/** `total`: the rows of the matrix `of`. */
sebp_status sebp_check_rows(const sebp_call *call, const sebp_rows *rows, const char *of,
                            int64_t total);
sebp_status sebp_check_shape(const sebp_call *call, const sebp_argument *argument, int64_t rows,
                             int64_t cols);
/** No output overlaps anything. */
sebp_status sebp_check_aliases(const sebp_call *call, const sebp_argument *arguments, int count);

/** No element is NaN or Inf: reads all of them. */
sebp_status sebp_check_finite(const sebp_call *call, const char *name, const sebp_matrix *view);

/** A view of kept elements by itself; its shape; that its values are finite (sparse.c). */
sebp_status sebp_check_sparse(const sebp_call *call, const char *name, const sebp_sparse *view);
/** Room for the k elements to be chosen: k from 1 on. */
sebp_status sebp_check_sparse_room(const sebp_call *call, const char *name,
                                   const sebp_sparse *view);
sebp_status sebp_check_sparse_shape(const sebp_call *call, const char *name,
                                    const sebp_sparse *view, int64_t rows, int64_t cols);
sebp_status sebp_check_sparse_finite(const sebp_call *call, const char *name,
                                     const sebp_sparse *view);
sebp_status sebp_check_f32(const sebp_call *call, const sebp_argument *argument);

/** Settles call->rows and call->m: the rows given, or found in dy by the options' rule. */
sebp_status sebp_settle_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows);

/** Frees what the call has found. */
void sebp_call_end(sebp_call *call);

/* Parts of products. */

/** The active rows of a matrix of M rows: in place if they follow each other, else by their list.
 */
void sebp_pick_rows(const sebp_call *call, const sebp_matrix *view, const void **data,
                    const int64_t **list);
/** A whole matrix. */
sebp_operand sebp_whole_operand(const sebp_matrix *view, bool transposed);
/** The active rows of a matrix of M rows. */
sebp_operand sebp_active_operand(const sebp_call *call, const sebp_matrix *view, bool transposed);
/** X[R], whether X is whole or compact. */
sebp_operand sebp_x_operand(const sebp_call *call, const sebp_matrix *x, bool transposed);
/** Sends a product to a whole matrix, or to the active rows of one. */
void sebp_to_whole(const sebp_matrix *view, sebp_product *product);
void sebp_to_active_rows(const sebp_call *call, const sebp_matrix *view, sebp_product *product);

/** All that can fail for want of memory; then run. On error each leaves a line. */
sebp_status sebp_reserve(const sebp_call *call, const sebp_product *product);
sebp_status sebp_run(const sebp_call *call, const sebp_product *product, const char **path);

/** Zeroes the inactive rows of an output, unless the options leave them. */
void sebp_zero_inactive(const sebp_call *call, const sebp_matrix *view);

/** The line of SEBP_VERBOSE: `paths`, NULL at the end, are those of the call's products. */
void sebp_report(const sebp_call *call, int64_t rows, int64_t in_features, int64_t out_features,
                 sebp_dtype dtype, const char *const *paths);

#endif
