/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear_call.h
 * A good call of the linear layer, which tests of bad input change before they make it.
 */
#ifndef SEBP_TESTS_LINEAR_CALL_H
#define SEBP_TESTS_LINEAR_CALL_H

#include <sebp/sebp.h>

#include "testing.h"

/* M = N = K, so that any two matrices may alias and shapes go wrong one at a time. */
#define SIZE   8
#define STRIDE 9
#define ACTIVE 5

/** One call of the forward or the backward; a test changes it between linear_call_reset() and the call. */
typedef struct linear_call {
    sebp_context *context;
    sebp_matrix dy_view, x_view, w_view, bias_view, dx_view, dw_view, db_view, y_view;
    sebp_matrix in_view, out_view; /**< of epilogues: Z or a residual, and f(Y) */
    const sebp_matrix *dy, *x, *w, *bias, *dx, *dw, *db, *y;
    const sebp_rows *rows;
    sebp_linear_options options;
    const sebp_linear_options *given;
} linear_call;

extern linear_call call;

/** What linear_call_reset() goes back to. */
typedef struct linear_call_world {
    sebp_context *context;
    sebp_rows *some_rows;   /**< of SIZE */
    sebp_rows *other_rows;  /**< of SIZE + 1 */
    sebp_matrix inputs[4];  /**< dy, x, w, bias */
    sebp_matrix outputs[4]; /**< dx, dw, db, y */
} linear_call_world;

extern linear_call_world linear_call_on;

void linear_call_setup(void);
void linear_call_teardown(void);

void linear_call_reset(void);

sebp_status linear_call_backward(void);
sebp_status linear_call_forward(void);

/** `function` failed with `got`; so it should, with nothing written and a message that is about it and says
 * `word`; NULL: none. `change`: what had been changed. */
void linear_call_failed(sebp_status got, sebp_status want, const char *function, const char *word,
                        const char *change);

/** Makes one change to a good call. `word`: what the message names; NULL where there is none. */
#define BACKWARD(status, word, change)                                                             \
    do {                                                                                           \
        linear_call_reset();                                                                       \
        change;                                                                                    \
        linear_call_failed(linear_call_backward(), status, "sebp_linear_backward", word, #change); \
    } while (0)

#define FORWARD(status, word, change)                                                              \
    do {                                                                                           \
        linear_call_reset();                                                                       \
        change;                                                                                    \
        linear_call_failed(linear_call_forward(), status, "sebp_linear_forward", word, #change);   \
    } while (0)

/** Everything that can be wrong with one view by itself. */
#define EACH_BAD_VIEW(CALL, view, word)                                                            \
    do {                                                                                           \
        CALL(SEBP_ERROR_NULL, word, call.view.data = NULL);                                        \
        CALL(SEBP_ERROR_SIZE, word, call.view.rows = -1);                                          \
        CALL(SEBP_ERROR_SIZE, word, call.view.rows = INT64_MIN);                                   \
        CALL(SEBP_ERROR_SIZE, word, call.view.cols = -1);                                          \
        CALL(SEBP_ERROR_DTYPE, word, call.view.dtype = (sebp_dtype)2);                             \
        CALL(SEBP_ERROR_DTYPE, word, call.view.dtype = (sebp_dtype)-1);                            \
        CALL(SEBP_ERROR_STRIDE, word, call.view.stride = SIZE - 1);                                \
        CALL(SEBP_ERROR_STRIDE, word, call.view.stride = 0);                                       \
        CALL(SEBP_ERROR_STRIDE, word, call.view.stride = -STRIDE);                                 \
        CALL(SEBP_ERROR_OVERFLOW, word, call.view.rows = INT64_MAX);                               \
        CALL(SEBP_ERROR_OVERFLOW, word, call.view.stride = INT64_MAX);                             \
        CALL(SEBP_ERROR_OVERFLOW, word,                                                            \
             call.view.rows = call.view.stride = INT64_C(1) << 32); /* wraps to 0 */               \
        CALL(SEBP_ERROR_VALUE, word, call.view.data = (char *)call.view.data + 1);                 \
        CALL(SEBP_ERROR_VALUE, word, call.view.data = (char *)call.view.data + 2);                 \
    } while (0)

/** A rule that no one may ask for; sebp_rows_find() and the backward refuse the same. */
typedef struct bad_rule {
    sebp_rule rule;
    const char *word;
} bad_rule;

enum { BAD_RULES = 18 };
extern const bad_rule bad_rules[BAD_RULES];

#endif
