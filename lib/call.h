/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file call.h
 * What the methods share: a call in progress, checks of its arguments in the order that sebp.h
 * promises, its active rows, and products whose operands carry them.
 *
 * A call keeps its first failure, for which a line is left in the context. What comes after a failure
 * does nothing, so that a method reads as a list of what it checks, reserves and computes.
 */
#ifndef SEBP_CALL_H
#define SEBP_CALL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "internal.h"

typedef struct sebp_call {
    sebp_context *context;
    const sebp_backend *backend; /* the context's */
    void *device;
    const char *function; /* its name in messages */
    sebp_status status;   /* the first failure */
    sebp_linear_options options;
    const sebp_rows *rows; /* NULL: all of them */
    const int64_t *list;   /* `rows` where the device reads them; NULL: all rows, or none */
    const float *weights;  /* of `rows`, where the device reads them; NULL: all 1 */
    sebp_rows *found;      /* rows found by the call itself; else NULL */
    sebp_rows *sampled;    /* a weighted sample found by the call itself; else NULL */
    int64_t m;             /* active rows, of M */
    int64_t *on_host;      /* a copy of what the device has, for the call to read; else NULL */
    void *on_device;       /* a copy of what the call has made, for the device; else NULL */
    double start;          /* milliseconds */
} sebp_call;

/** An argument: its name in messages, and how it may be used. */
typedef struct sebp_argument {
    const char *name;
    const sebp_matrix *view; /* NULL: absent */
    bool is_output;
} sebp_argument;

/** context: not NULL. */
sebp_call sebp_call_begin(sebp_context *context, const char *function);

/** Frees what the call has found and copied, and returns its status. */
sebp_status sebp_call_end(sebp_call *call);

/** Whether nothing has failed yet. */
bool sebp_call_goes_on(const sebp_call *call);

/** Keeps a failure and leaves the line "function: text", unless there was one before. */
void sebp_call_fail(sebp_call *call, sebp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** Keeps the status of an operation, where it failed; `what` says what was being done. */
void sebp_call_keep(sebp_call *call, sebp_status status, const char *what);

/* Checks. Absent arguments pass. */

/** That an argument, which may be of any type, is not NULL; whether nothing has failed yet. */
bool sebp_require(sebp_call *call, const char *name, const void *argument);
/** The same of views. */
bool sebp_require_views(sebp_call *call, const sebp_argument *arguments, int count);
/** Puts a caller's options over the defaults in `taken`, as sebp_take_struct(); NULL leaves them. */
void sebp_take_any_options(sebp_call *call, const void *given, size_t first_bytes, void *taken,
                           size_t bytes);
/** NULL leaves the defaults. */
void sebp_take_options(sebp_call *call, const sebp_linear_options *options);
void sebp_check_precision(sebp_call *call);
/** That what the options name, for which the call has no use, is NULL. */
void sebp_check_unused(sebp_call *call, const char *name, const void *option);
/** The same of all matrices of the options. */
void sebp_check_no_epilogue(sebp_call *call);
/** That a packed weight of the options is of this context and of `w`, where that is not NULL
 * (packed_weight.c). */
void sebp_check_packed_weight(sebp_call *call, const sebp_matrix *w);
void sebp_check_views(sebp_call *call, const sebp_argument *arguments, int count);
void sebp_check_same_dtype(sebp_call *call, const sebp_argument *one, const sebp_argument *other);
void sebp_check_f32(sebp_call *call, const sebp_argument *argument);
void sebp_check_write(sebp_call *call, const char *name, sebp_write write);
void sebp_check_inactive(sebp_call *call);
/** `total`: the rows of the matrix `of`. A set with weights is refused. */
void sebp_check_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total);
/** The same for what multiplies by the weights. */
void sebp_check_weighted_rows(sebp_call *call, const sebp_rows *rows, const char *of,
                              int64_t total);
void sebp_check_shape(sebp_call *call, const sebp_argument *argument, int64_t rows, int64_t cols);
/** No output overlaps anything. */
void sebp_check_aliases(sebp_call *call, const sebp_argument *arguments, int count);
/** No element is NaN or Inf: reads all of them. */
void sebp_check_finite(sebp_call *call, const char *name, const sebp_matrix *view);
/** That the device works on the host's memory, as a method does that keeps its state there. */
void sebp_check_host_memory(sebp_call *call);

/** A view of kept elements by itself; its shape; that its values are finite (sparse.c). */
void sebp_check_sparse(sebp_call *call, const char *name, const sebp_sparse *view);
/** Room for the k elements to be chosen: k from 1 on. */
void sebp_check_sparse_room(sebp_call *call, const char *name, const sebp_sparse *view);
void sebp_check_sparse_shape(sebp_call *call, const char *name, const sebp_sparse *view,
                             int64_t rows, int64_t cols);
void sebp_check_sparse_finite(sebp_call *call, const char *name, const sebp_sparse *view);

/** The arrays of a valid view as matrices, for sebp_check_aliases(). */
void sebp_kept_arrays(const sebp_sparse *kept, sebp_matrix *values, sebp_matrix *indices);
/** Room for the sums of kept elements, in the device's memory, whose free() takes it; NULL after a
 * failure. */
float *sebp_make_sums(sebp_call *call, const sebp_sparse *kept);
/** The values of kept elements become sums, in the device's memory, or grow by them, as dw_write says:
 * where all that comes out is finite. The sums are written to. */
void sebp_write_sums(sebp_call *call, float *sums, const sebp_sparse *kept);

/* Lists: indices, labels, positions, which lie in the device's memory, and what is made of them. */

/** A list of the device's where the call reads it: itself, or a copy, until the call ends or asks for
 * another. NULL after a failure. */
const int64_t *sebp_list_to_host(sebp_call *call, const char *name, const int64_t *list,
                                 int64_t count);
/** A list of the host's where the device reads it: itself, or a copy, until the call ends; one a
 * call. */
const int64_t *sebp_list_to_device(sebp_call *call, const char *name, const int64_t *list,
                                   int64_t count);

/* Active rows. */

/** Settles the call's rows, NULL being all `total` of them, and their weights. */
void sebp_use_rows(sebp_call *call, const sebp_rows *rows, int64_t total);
/** The active rows of a matrix of M rows: in place if they follow each other, else by their list. */
void sebp_pick_rows(const sebp_call *call, const sebp_matrix *view, void **data,
                    const int64_t **list);
/** Zeroes the inactive rows of an output, unless the options leave them. */
void sebp_zero_inactive(sebp_call *call, const sebp_matrix *view);

/* Products. */

/** A whole matrix. */
sebp_operand sebp_whole_operand(const sebp_matrix *view, bool transposed);
/** The active rows of a matrix of M rows. */
sebp_operand sebp_active_operand(const sebp_call *call, const sebp_matrix *view, bool transposed);
/** X[R], whether X is whole or compact. */
sebp_operand sebp_x_operand(const sebp_call *call, const sebp_matrix *x, bool transposed);
/** The copies of W that the options name, for a product whose B is W (packed_weight.c). */
sebp_packed *sebp_packed_w(const sebp_call *call);
/** Sends a product to a whole matrix, or to the active rows of one. */
void sebp_to_whole(const sebp_matrix *view, sebp_product *product);
void sebp_to_active_rows(const sebp_call *call, const sebp_matrix *view, sebp_product *product);

/** Of plan->product: all that can fail for want of memory. Then run. */
void sebp_plan_product(sebp_call *call, sebp_plan *plan);
void sebp_run_product(sebp_call *call, sebp_plan *plan);

/** Scratch memory for what a method has between its products, as the table's; 0 gives it back. */
void sebp_reserve_scratch(sebp_call *call, int64_t bytes, const char *what);

/** The line of SEBP_VERBOSE: `paths`, NULL at the end, are those of the call's products. */
void sebp_report(const sebp_call *call, int64_t rows, int64_t in_features, int64_t out_features,
                 sebp_dtype dtype, const char *const *paths);

#endif
