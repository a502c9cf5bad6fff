/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input: each gives the status its header promises, a line that says where, and leaves the
 * outputs as they were. One line of a test is one bad call: what is changed in a good one.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

/* M = N = K, so that any two matrices may alias and shapes go wrong one at a time. */
#define SIZE   8
#define STRIDE 9
#define ACTIVE 5

/* One call of the forward or the backward; a test changes it between reset() and the call. */
static struct call {
    sebp_context *context;
    sebp_matrix dy_view, x_view, w_view, bias_view, dx_view, dw_view, db_view, y_view;
    sebp_matrix in_view, out_view; /* of epilogues: Z or a residual, and f(Y) */
    const sebp_matrix *dy, *x, *w, *bias, *dx, *dw, *db, *y;
    const sebp_rows *rows;
    sebp_linear_options options;
    const sebp_linear_options *given;
} call;

/* What reset() goes back to. */
static sebp_context *context;
static sebp_rows *some_rows, *other_rows;
static sebp_matrix inputs[4];  /* dy, x, w, bias */
static sebp_matrix outputs[4]; /* dx, dw, db, y */

static void setup(void)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.gemm = testing_gemm(SEBP_GEMM_AUTO);
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    const int64_t indices[ACTIVE] = {0, 2, 3, 6, 7};
    ck_assert_int_eq(sebp_rows_from_indices(indices, ACTIVE, SIZE, &some_rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_from_indices(indices, ACTIVE, SIZE + 1, &other_rows), SEBP_SUCCESS);
    for (int i = 0; i < 4; i++) {
        inputs[i] = testing_matrix(i == 3 ? 1 : SIZE, SIZE, STRIDE, SEBP_F32);
        outputs[i] = testing_matrix(i == 2 ? 1 : SIZE, SIZE, STRIDE, SEBP_F32);
        testing_fill(&inputs[i], TESTING_REAL);
    }
}

static void teardown(void)
{
    sebp_context_destroy(context);
    sebp_rows_destroy(some_rows);
    sebp_rows_destroy(other_rows);
    for (int i = 0; i < 4; i++) {
        testing_release(&inputs[i]);
        testing_release(&outputs[i]);
    }
}

static void reset(void)
{
    const sebp_linear_options defaults = SEBP_LINEAR_OPTIONS_INIT;
    call = (struct call){.context = context, .rows = some_rows, .options = defaults};
    call.dy_view = inputs[0];
    call.x_view = inputs[1];
    call.w_view = inputs[2];
    call.bias_view = inputs[3];
    call.dx_view = outputs[0];
    call.dw_view = outputs[1];
    call.db_view = outputs[2];
    call.y_view = outputs[3];
    call.in_view = inputs[0];
    call.out_view = outputs[0];
    call.dy = &call.dy_view;
    call.x = &call.x_view;
    call.w = &call.w_view;
    call.bias = &call.bias_view;
    call.dx = &call.dx_view;
    call.dw = &call.dw_view;
    call.db = &call.db_view;
    call.y = &call.y_view;
    call.given = &call.options;
}

static sebp_status backward(void)
{
    return sebp_linear_backward(call.context, call.dy, call.x, call.w, call.rows, call.given,
                                call.dx, call.dw, call.db);
}

static sebp_status forward(void)
{
    return sebp_linear_forward(call.context, call.x, call.w, call.bias, call.rows, call.given,
                               call.y);
}

/* Whether the message is about `function`, and says `word` after it. */
static int message_says(const char *function, const char *word)
{
    const char *message = sebp_context_message(context);
    size_t length = strlen(function);
    return strncmp(message, function, length) == 0 && message[length] == ':' &&
           strstr(message + length, word) != NULL && strchr(message, '\n') == NULL;
}

/* `function` failed with `got`; so it should, with nothing written. */
static void check_failure(sebp_status got, sebp_status want, const char *function, const char *word,
                          const char *change)
{
    ck_assert_msg(got == want, "%s after %s: \"%s\", not \"%s\" (%s)", function, change,
                  sebp_status_string(got), sebp_status_string(want), sebp_context_message(context));
    ck_assert_msg(word == NULL || message_says(function, word), "%s after %s: message \"%s\"",
                  function, change, sebp_context_message(context));
    for (int i = 0; i < 4; i++) {
        int written = 0;
        for (int64_t at = 0; at < outputs[i].rows * SIZE; at++) {
            written |= !isnan(testing_get(&outputs[i], at / SIZE, at % SIZE));
        }
        ck_assert_msg(!written, "%s after %s: output %d was written to", function, change, i);
        testing_check_matrix(&outputs[i]);
        testing_check_matrix(&inputs[i]);
    }
}

/* Makes one change to a good call. `word`: what the message names; NULL where there is none. */
#define BACKWARD(status, word, change)                                                             \
    do {                                                                                           \
        reset();                                                                                   \
        change;                                                                                    \
        check_failure(backward(), status, "sebp_linear_backward", word, #change);                  \
    } while (0)

#define FORWARD(status, word, change)                                                              \
    do {                                                                                           \
        reset();                                                                                   \
        change;                                                                                    \
        check_failure(forward(), status, "sebp_linear_forward", word, #change);                    \
    } while (0)

/* Everything that can be wrong with one view by itself. */
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

START_TEST(backward_views)
{
    EACH_BAD_VIEW(BACKWARD, dy_view, "dy");
    EACH_BAD_VIEW(BACKWARD, x_view, "x");
    EACH_BAD_VIEW(BACKWARD, w_view, "w");
    EACH_BAD_VIEW(BACKWARD, dx_view, "dx");
    EACH_BAD_VIEW(BACKWARD, dw_view, "dw");
    EACH_BAD_VIEW(BACKWARD, db_view, "db");
}
END_TEST

START_TEST(backward_null)
{
    BACKWARD(SEBP_ERROR_NULL, NULL, call.context = NULL);
    BACKWARD(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    BACKWARD(SEBP_ERROR_NULL, "x", call.x = NULL);
    BACKWARD(SEBP_ERROR_NULL, "w", call.w = NULL);
}
END_TEST

START_TEST(backward_options)
{
    BACKWARD(SEBP_ERROR_SIZE, "size_bytes", call.options.size_bytes = 0);
    BACKWARD(SEBP_ERROR_SIZE, "size_bytes",
             call.options.size_bytes = offsetof(sebp_linear_options, db_write));
    BACKWARD(SEBP_ERROR_SIZE, "size_bytes", call.options.size_bytes = 4097);
    BACKWARD(SEBP_ERROR_VALUE, "inactive", call.options.inactive = (sebp_inactive)2);
    BACKWARD(SEBP_ERROR_VALUE, "dx_write", call.options.dx_write = (sebp_write)2);
    BACKWARD(SEBP_ERROR_VALUE, "dw_write", call.options.dw_write = (sebp_write)2);
    BACKWARD(SEBP_ERROR_VALUE, "db_write", call.options.db_write = (sebp_write)-1);
    BACKWARD(SEBP_ERROR_VALUE, "precision", call.options.precision = (sebp_precision)5);
    BACKWARD(SEBP_ERROR_VALUE, "precision", call.options.precision = (sebp_precision)-1);
    FORWARD(SEBP_ERROR_VALUE, "precision", call.options.precision = (sebp_precision)5);
}
END_TEST

/* The rules that no one may ask for; sebp_rows_find() and the backward refuse the same. */
static const struct bad_rule {
    sebp_rule rule;
    const char *word;
} bad_rules[] = {
    {{(sebp_rule_kind)4, 0, 1, 0}, "rule"},
    {{(sebp_rule_kind)-1, 0, 1, 0}, "rule"},
    {{SEBP_RULE_THRESHOLD, NAN, 0, 0}, "threshold"},
    {{SEBP_RULE_THRESHOLD, -1e-300, 0, 0}, "threshold"},
    {{SEBP_RULE_THRESHOLD, -INFINITY, 0, 0}, "threshold"},
    {{SEBP_RULE_TOP, 0, 0, 0}, "count"},
    {{SEBP_RULE_TOP, 0, -1, 0}, "count"},
    {{SEBP_RULE_TOP, 0, INT64_MIN, 0}, "count"},
    {{SEBP_RULE_ENERGY, 0, 0, NAN}, "delta"},
    {{SEBP_RULE_ENERGY, 0, 0, -1e-300}, "delta"},
    {{SEBP_RULE_ENERGY, 0, 0, 1}, "delta"},
    {{SEBP_RULE_ENERGY, 0, 0, INFINITY}, "delta"},
};
#define BAD_RULES ((int)(sizeof bad_rules / sizeof bad_rules[0]))

START_TEST(backward_rule)
{
    BACKWARD(SEBP_ERROR_VALUE, bad_rules[_i].word,
             (call.rows = NULL, call.options.rule = bad_rules[_i].rule));
}
END_TEST

START_TEST(backward_rows)
{
    BACKWARD(SEBP_ERROR_ROWS, "9", call.rows = other_rows);
    BACKWARD(SEBP_ERROR_ROWS, "x_is_compact", (call.rows = NULL, call.options.x_is_compact = 1));
}
END_TEST

START_TEST(backward_shapes)
{
    BACKWARD(SEBP_ERROR_SHAPE, "w", call.dy_view.cols--); /* its N is 7 then, and W's 8 */
    BACKWARD(SEBP_ERROR_SHAPE, "x", call.x_view.rows--);
    BACKWARD(SEBP_ERROR_SHAPE, "x", call.x_view.cols--);
    BACKWARD(SEBP_ERROR_SHAPE, "x", call.options.x_is_compact = 1);
    BACKWARD(SEBP_ERROR_SHAPE, "x", (call.options.x_is_compact = 1, call.x_view.rows = ACTIVE - 1));
    BACKWARD(SEBP_ERROR_SHAPE, "w", call.w_view.rows--);
    BACKWARD(SEBP_ERROR_SHAPE, "w", call.w_view.cols--);
    BACKWARD(SEBP_ERROR_SHAPE, "dx", call.dx_view.rows--);
    BACKWARD(SEBP_ERROR_SHAPE, "dx", call.dx_view.cols--);
    BACKWARD(SEBP_ERROR_SHAPE, "dw", call.dw_view.rows--);
    BACKWARD(SEBP_ERROR_SHAPE, "dw", call.dw_view.cols--);
    BACKWARD(SEBP_ERROR_SHAPE, "db", call.db_view.rows = 2);
    BACKWARD(SEBP_ERROR_SHAPE, "db", call.db_view.rows = 0);
    BACKWARD(SEBP_ERROR_SHAPE, "db", call.db_view.cols--);
}
END_TEST

/* The last element of one matrix, in rows * stride of another. */
static void *last_element(const sebp_matrix *view)
{
    return (float *)view->data + (view->rows - 1) * view->stride + view->cols - 1;
}

START_TEST(backward_aliases)
{
    BACKWARD(SEBP_ERROR_ALIAS, "dx", call.dx_view.data = call.dy_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dx", call.dx_view.data = call.x_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dx", call.dx_view.data = call.w_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dw", call.dw_view.data = call.dy_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dw", call.dw_view.data = call.x_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dw", call.dw_view.data = call.w_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = call.dy_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = call.x_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = call.w_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "dw", call.dw_view.data = call.dx_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = call.dx_view.data);
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = call.dw_view.data);
    /* One element in common is enough, at either end. */
    BACKWARD(SEBP_ERROR_ALIAS, "db", call.db_view.data = last_element(&call.dx_view));
    BACKWARD(SEBP_ERROR_ALIAS, "dx", call.dy_view.data = last_element(&call.dx_view));
    BACKWARD(SEBP_ERROR_ALIAS, "dw", call.dw_view.data = last_element(&call.x_view));
}
END_TEST

/* Columns of one matrix, side by side, do not overlap, as in a fused layer's q, k and v. */
START_TEST(columns_side_by_side)
{
    float buffer[4][8];
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 8; j++) {
            buffer[i][j] = (float)(8 * i + j);
        }
    }
    sebp_matrix left = sebp_matrix_f32(&buffer[0][0], 4, 4);
    sebp_matrix right = sebp_matrix_f32(&buffer[0][4], 4, 4);
    left.stride = right.stride = 8;
    ck_assert_int_eq(sebp_matrix_convert(&right, &left), SEBP_SUCCESS);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            ck_assert(buffer[i][j] == (float)(8 * i + j + 4));
            ck_assert(buffer[i][j + 4] == (float)(8 * i + j + 4));
        }
    }
    left.cols = 5; /* two columns in common */
    sebp_matrix one_more = sebp_matrix_f32(&buffer[0][3], 4, 5);
    one_more.stride = 8;
    ck_assert_int_eq(sebp_matrix_convert(&one_more, &left), SEBP_ERROR_ALIAS);
    /* A row further down, the columns wrap into those of the next row. */
    sebp_matrix wrapped = sebp_matrix_f32(&buffer[0][6], 3, 4);
    wrapped.stride = 8;
    left.cols = 4;
    left.rows = 3;
    ck_assert_int_eq(sebp_matrix_convert(&wrapped, &left), SEBP_ERROR_ALIAS);
}
END_TEST

START_TEST(forward_views)
{
    EACH_BAD_VIEW(FORWARD, x_view, "x");
    EACH_BAD_VIEW(FORWARD, w_view, "w");
    EACH_BAD_VIEW(FORWARD, bias_view, "bias");
    EACH_BAD_VIEW(FORWARD, y_view, "y");
}
END_TEST

START_TEST(forward_rest)
{
    FORWARD(SEBP_ERROR_NULL, NULL, call.context = NULL);
    FORWARD(SEBP_ERROR_NULL, "x", call.x = NULL);
    FORWARD(SEBP_ERROR_NULL, "w", call.w = NULL);
    FORWARD(SEBP_ERROR_NULL, "y", call.y = NULL);
    FORWARD(SEBP_ERROR_SIZE, "size_bytes", call.options.size_bytes = 0);
    FORWARD(SEBP_ERROR_SIZE, "size_bytes", call.options.size_bytes = 4097);
    FORWARD(SEBP_ERROR_VALUE, "inactive", call.options.inactive = (sebp_inactive)2);
    FORWARD(SEBP_ERROR_ROWS, "9", call.rows = other_rows);
    FORWARD(SEBP_ERROR_ROWS, "x_is_compact", (call.rows = NULL, call.options.x_is_compact = 1));
    FORWARD(SEBP_ERROR_SHAPE, "x", call.x_view.cols--);
    FORWARD(SEBP_ERROR_SHAPE, "x", call.options.x_is_compact = 1);
    FORWARD(SEBP_ERROR_SHAPE, "w", call.w_view.cols--);
    FORWARD(SEBP_ERROR_SHAPE, "w", call.w_view.rows--);
    FORWARD(SEBP_ERROR_SHAPE, "bias", call.bias_view.cols--);
    FORWARD(SEBP_ERROR_SHAPE, "bias", call.bias_view.rows = 0);
    FORWARD(SEBP_ERROR_SHAPE, "w", call.y_view.cols--);
    FORWARD(SEBP_ERROR_ALIAS, "y", call.y_view.data = call.x_view.data);
    FORWARD(SEBP_ERROR_ALIAS, "y", call.y_view.data = call.w_view.data);
    FORWARD(SEBP_ERROR_ALIAS, "y", call.bias_view.data = call.y_view.data);
    FORWARD(SEBP_ERROR_ALIAS, "y", call.bias_view.data = last_element(&call.y_view));
}
END_TEST

#define RESIDUAL(status, word, change)                                                             \
    FORWARD(status, "options->residual" word, (call.options.residual = &call.in_view, change))

#define ACTIVATED(status, word, change)                                                            \
    FORWARD(status, "options->activated" word, (call.options.activated = &call.out_view, change))

#define BEFORE(status, word, change)                                                               \
    BACKWARD(status, "options->before" word, (call.options.before = &call.in_view, change))

START_TEST(epilogues)
{
    EACH_BAD_VIEW(RESIDUAL, in_view, "");
    EACH_BAD_VIEW(ACTIVATED, out_view, "");
    EACH_BAD_VIEW(BEFORE, in_view, "");
    RESIDUAL(SEBP_ERROR_DTYPE, "", call.in_view.dtype = SEBP_BF16);
    RESIDUAL(SEBP_ERROR_SHAPE, "", call.in_view.cols--);
    RESIDUAL(SEBP_ERROR_SHAPE, "", call.in_view.rows--);
    ACTIVATED(SEBP_ERROR_DTYPE, "", call.out_view.dtype = SEBP_BF16);
    ACTIVATED(SEBP_ERROR_SHAPE, "", call.out_view.cols--);
    BEFORE(SEBP_ERROR_DTYPE, "", call.in_view.dtype = SEBP_BF16);
    BEFORE(SEBP_ERROR_SHAPE, "", call.in_view.rows--);
    BEFORE(SEBP_ERROR_VALUE, " needs", call.dx = NULL);
    BEFORE(SEBP_ERROR_VALUE, " needs", call.options.dx_write = SEBP_ACCUMULATE);
    FORWARD(SEBP_ERROR_VALUE, "activation",
            (call.options.activated = &call.out_view, call.options.activation = 4));
    BACKWARD(SEBP_ERROR_VALUE, "activation",
             (call.options.before = &call.in_view, call.options.activation = 4));
    /* Of the other direction. */
    FORWARD(SEBP_ERROR_VALUE, "before", call.options.before = &call.in_view);
    BACKWARD(SEBP_ERROR_VALUE, "residual", call.options.residual = &call.in_view);
    BACKWARD(SEBP_ERROR_VALUE, "activated", call.options.activated = &call.in_view);
    /* A residual may be Y, and f(Y) may be either, but not a part of it, nor another's. */
    FORWARD(SEBP_ERROR_ALIAS, "y",
            (call.options.residual = &call.in_view, call.in_view = call.y_view,
             call.in_view.data = (float *)call.in_view.data + 1));
    FORWARD(SEBP_ERROR_ALIAS, "options->activated",
            (call.options.activated = &call.out_view, call.out_view.data = call.x_view.data));
    FORWARD(SEBP_ERROR_ALIAS, "options->activated",
            (call.options.activated = &call.out_view, call.out_view = call.y_view,
             call.out_view.data = (float *)call.out_view.data + 1));
    BACKWARD(SEBP_ERROR_ALIAS, "dx",
             (call.options.before = &call.in_view, call.in_view = call.dx_view));
}
END_TEST

/* Two things wrong at once: the one that sebp.h puts first is told. */
START_TEST(order_of_checks)
{
    BACKWARD(SEBP_ERROR_NULL, "dy", (call.dy = NULL, call.options.size_bytes = 0));
    BACKWARD(SEBP_ERROR_NULL, "w", (call.w = NULL, call.dy_view.rows = -1));
    BACKWARD(SEBP_ERROR_SIZE, "size_bytes",
             (call.options.size_bytes = 0, call.dy_view.dtype = (sebp_dtype)2));
    BACKWARD(SEBP_ERROR_SIZE, "dy", (call.dy_view.rows = -1, call.dy_view.dtype = (sebp_dtype)2));
    BACKWARD(SEBP_ERROR_DTYPE, "dy", (call.dy_view.dtype = (sebp_dtype)2, call.dy_view.stride = 1));
    BACKWARD(SEBP_ERROR_STRIDE, "db",
             (call.db_view.stride = 1, call.options.inactive = (sebp_inactive)2));
    BACKWARD(SEBP_ERROR_OVERFLOW, "dw",
             (call.dw_view.rows = INT64_MAX, call.options.inactive = (sebp_inactive)2));
    BACKWARD(SEBP_ERROR_VALUE, "inactive",
             (call.options.inactive = (sebp_inactive)2, call.rows = other_rows));
    BACKWARD(SEBP_ERROR_ROWS, "9", (call.rows = other_rows, call.w_view.cols--));
    BACKWARD(SEBP_ERROR_SHAPE, "w", (call.w_view.cols--, call.dx_view.data = call.dy_view.data));
    FORWARD(SEBP_ERROR_NULL, "y", (call.y = NULL, call.options.size_bytes = 0));
    FORWARD(SEBP_ERROR_SIZE, "size_bytes", (call.options.size_bytes = 0, call.x_view.stride = 1));
    FORWARD(SEBP_ERROR_STRIDE, "y", (call.y_view.stride = 1, call.rows = other_rows));
    FORWARD(SEBP_ERROR_ROWS, "9", (call.rows = other_rows, call.y_view.cols--));
    FORWARD(SEBP_ERROR_SHAPE, "w", (call.y_view.cols--, call.y_view.data = call.x_view.data));
}
END_TEST

static void expect_success(sebp_status status, const char *what)
{
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s (%s)", what, sebp_status_string(status),
                  sebp_context_message(context));
}

/* What is not an error, after some that were. */
START_TEST(legal_calls)
{
    BACKWARD(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    reset();
    call.dx = call.dw = call.db = NULL;
    call.x = call.w = NULL;
    expect_success(backward(), "no outputs");
    reset();
    call.x = NULL;
    call.dw = NULL;
    expect_success(backward(), "no dw, no x");
    reset();
    call.w = NULL;
    call.dx = NULL;
    expect_success(backward(), "no dx, no w");
    reset();
    call.given = NULL;
    expect_success(backward(), "no options");
    reset();
    call.options.rule.kind = SEBP_RULE_THRESHOLD;
    call.options.rule.count = -1;
    call.options.rule.delta = NAN;
    call.rows = NULL;
    expect_success(backward(), "fields of other rules");
    reset();
    call.options.rule.kind = (sebp_rule_kind)9;
    call.options.dx_write = (sebp_write)9;
    call.bias = NULL;
    expect_success(forward(), "the forward does not look at rule and writes");
    reset();
    call.options.x_is_compact = 1;
    call.x_view.rows = ACTIVE;
    expect_success(forward(), "compact x");
    expect_success(backward(), "compact x");

    /* Views without elements need no data and overlap nothing. */
    sebp_matrix none = {NULL, SIZE, 0, 0, SEBP_F32};
    reset();
    call.x_view = call.w_view = call.dx_view = call.dw_view = none;
    expect_success(backward(), "K = 0");
    reset();
    call.x_view = call.w_view = none;
    expect_success(forward(), "K = 0");
}
END_TEST

START_TEST(matrix_check)
{
    float data[4] = {0};
    const sebp_matrix good = sebp_matrix_f32(data, 2, 2);
    ck_assert_int_eq(sebp_matrix_check(&good), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_matrix_check(NULL), SEBP_ERROR_NULL);
#define VIEW(want, change)                                                                         \
    do {                                                                                           \
        sebp_matrix view = good;                                                                   \
        change;                                                                                    \
        sebp_status got = sebp_matrix_check(&view);                                                \
        ck_assert_msg(got == (want), #change ": %s", sebp_status_string(got));                     \
    } while (0)
    VIEW(SEBP_ERROR_NULL, view.data = NULL);
    VIEW(SEBP_ERROR_SIZE, view.rows = -1);
    VIEW(SEBP_ERROR_SIZE, view.cols = -1);
    VIEW(SEBP_ERROR_DTYPE, view.dtype = (sebp_dtype)2);
    VIEW(SEBP_ERROR_STRIDE, view.stride = 1);
    VIEW(SEBP_ERROR_OVERFLOW, view.rows = INT64_MAX);
    /* At the edge: rows * stride elements of 4 bytes in PTRDIFF_MAX bytes. */
    VIEW(SEBP_ERROR_OVERFLOW, view.stride = INT64_MAX / 8 + 1);
    VIEW(SEBP_SUCCESS, view.stride = INT64_MAX / 8);
    VIEW(SEBP_ERROR_VALUE, view.data = (char *)data + 2);
    VIEW(SEBP_SUCCESS, (view.data = (char *)data + 2, view.dtype = SEBP_BF16));
    VIEW(SEBP_ERROR_VALUE, (view.data = (char *)data + 1, view.dtype = SEBP_BF16));
    VIEW(SEBP_SUCCESS, (view.data = NULL, view.rows = 0));
    VIEW(SEBP_SUCCESS, (view.data = NULL, view.cols = view.stride = 0));
#undef VIEW
}
END_TEST

START_TEST(matrix_convert)
{
    reset();
    const sebp_matrix *from = &call.x_view, *to = &call.y_view;
#define CONVERT(want, change)                                                                      \
    do {                                                                                           \
        reset();                                                                                   \
        change;                                                                                    \
        check_failure(sebp_matrix_convert(from, to), want, "sebp_matrix_convert", NULL, #change);  \
    } while (0)
    CONVERT(SEBP_ERROR_STRIDE, call.x_view.stride = 1);
    CONVERT(SEBP_ERROR_DTYPE, call.y_view.dtype = (sebp_dtype)5);
    CONVERT(SEBP_ERROR_SIZE, call.y_view.cols = -1);
    CONVERT(SEBP_ERROR_OVERFLOW, call.y_view.rows = INT64_MAX);
    CONVERT(SEBP_ERROR_SHAPE, call.x_view.rows--);
    CONVERT(SEBP_ERROR_SHAPE, call.y_view.cols--);
    CONVERT(SEBP_ERROR_ALIAS, call.x_view.data = call.y_view.data);
    from = NULL;
    CONVERT(SEBP_ERROR_NULL, (void)0);
    from = &call.x_view;
    to = NULL;
    CONVERT(SEBP_ERROR_NULL, (void)0);
#undef CONVERT
}
END_TEST

/* A constructor fails with `want` and leaves the pointer as it was. */
#define ROWS(want, expression)                                                                     \
    do {                                                                                           \
        sebp_rows *rows = some_rows;                                                               \
        sebp_status got = (expression);                                                            \
        ck_assert_msg(got == (want), #expression ": %s", sebp_status_string(got));                 \
        ck_assert_msg(rows == some_rows, #expression " wrote its result");                         \
    } while (0)

START_TEST(rows_constructors)
{
    ROWS(SEBP_ERROR_NULL, sebp_rows_all(3, NULL));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_all(-1, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_all(INT64_MAX, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_all(INT64_MAX / 8 + 1, &rows));

    const uint8_t mask[3] = {1, 0, 1};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(mask, 3, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(NULL, 3, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_mask(mask, -3, &rows));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(NULL, 0, NULL));

    const int64_t lengths[3] = {2, 0, 5}, negative[3] = {2, -1, 5};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_lengths(lengths, 3, 5, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_lengths(NULL, 3, 5, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_lengths(lengths, -1, 5, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_lengths(lengths, 3, -1, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_lengths(lengths, 3, INT64_MAX / 2, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_lengths(lengths, INT64_MAX / 8 + 1, 5, &rows));
    ROWS(SEBP_ERROR_VALUE, sebp_rows_from_lengths(lengths, 3, 4, &rows));
    ROWS(SEBP_ERROR_VALUE, sebp_rows_from_lengths(negative, 3, 5, &rows));

    const int64_t indices[3] = {1, 4, 6}, unsorted[3] = {1, 6, 4}, repeated[3] = {1, 4, 4};
    const int64_t below[3] = {-1, 4, 6};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_indices(indices, 3, 7, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_indices(NULL, 3, 7, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_indices(indices, -1, 7, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_indices(indices, 3, -7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(indices, 3, 6, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(unsorted, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(repeated, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(below, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(indices, 1, 0, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_indices(indices, INT64_MAX / 8 + 1, INT64_MAX, &rows));
}
END_TEST

/* As BACKWARD, for sebp_rows_find(). */
#define FIND(want, word, change)                                                                   \
    do {                                                                                           \
        sebp_rows *rows = some_rows;                                                               \
        reset();                                                                                   \
        change;                                                                                    \
        check_failure(sebp_rows_find(call.context, call.dy, &call.options.rule, &rows), want,      \
                      "sebp_rows_find", word, #change);                                            \
        ck_assert_msg(rows == some_rows, "after " #change " the result was written");              \
    } while (0)

START_TEST(rows_find)
{
    FIND(SEBP_ERROR_NULL, NULL, call.context = NULL);
    FIND(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    EACH_BAD_VIEW(FIND, dy_view, "dy");
    reset();
    check_failure(sebp_rows_find(context, call.dy, NULL, NULL), SEBP_ERROR_NULL, "sebp_rows_find",
                  "rows", "rows = NULL");
    for (int r = 0; r < BAD_RULES; r++) {
        FIND(SEBP_ERROR_VALUE, bad_rules[r].word, call.options.rule = bad_rules[r].rule);
    }
    FIND(SEBP_ERROR_SIZE, "dy", (call.dy_view.rows = -1, call.options.rule = bad_rules[0].rule));
}
END_TEST

static sebp_dropped dropped;

#define DROPPED(want, word, change)                                                                \
    do {                                                                                           \
        dropped = (sebp_dropped){-7, -7};                                                          \
        reset();                                                                                   \
        change;                                                                                    \
        check_failure(sebp_rows_dropped(call.context, call.dy, call.rows, &dropped), want,         \
                      "sebp_rows_dropped", word, #change);                                         \
        ck_assert(dropped.rows == -7 && dropped.energy == -7);                                     \
    } while (0)

START_TEST(rows_dropped)
{
    DROPPED(SEBP_ERROR_NULL, NULL, call.context = NULL);
    DROPPED(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    DROPPED(SEBP_ERROR_NULL, "rows", call.rows = NULL);
    DROPPED(SEBP_ERROR_ROWS, "9", call.rows = other_rows);
    EACH_BAD_VIEW(DROPPED, dy_view, "dy");
    reset();
    check_failure(sebp_rows_dropped(context, call.dy, some_rows, NULL), SEBP_ERROR_NULL,
                  "sebp_rows_dropped", "dropped", "dropped = NULL");
}
END_TEST

/* The creation of a context fails, and says so in the caller's buffer. */
#define CREATE(want, word, change)                                                                 \
    do {                                                                                           \
        char message[200] = "";                                                                    \
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;                                  \
        options.message = message;                                                                 \
        options.message_bytes = sizeof message;                                                    \
        change;                                                                                    \
        sebp_context *result = context;                                                            \
        sebp_status got = sebp_context_create(&options, &result);                                  \
        ck_assert_msg(got == (want), #change ": %s", sebp_status_string(got));                     \
        ck_assert_msg(result == context, #change ": the result was written");                      \
        ck_assert_msg(strncmp(message, "sebp_context_create:", 20) == 0 && strstr(message, word),  \
                      #change ": message \"%s\"", message);                                        \
    } while (0)

START_TEST(context_create)
{
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = -1);
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = 1025);
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = INT_MIN);
    CREATE(SEBP_ERROR_VALUE, "device", options.device = (sebp_device_kind)2);
    CREATE(SEBP_ERROR_VALUE, "device", options.device = (sebp_device_kind)-1);
    CREATE(SEBP_ERROR_UNSUPPORTED, "CUDA", options.device = SEBP_DEVICE_CUDA);
    CREATE(SEBP_ERROR_VALUE, "placement", options.placement = (sebp_placement)3);
    CREATE(SEBP_ERROR_VALUE, "placement", options.placement = (sebp_placement)-1);
    CREATE(SEBP_ERROR_VALUE, "gemm", options.gemm = (sebp_gemm)3);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = -1);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = 1);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = (1 << 20) - 1);

    /* A struct of unknown size has no place for a message that could be trusted. */
    const size_t sizes[] = {0, offsetof(sebp_context_options, device) - 1, 4097};
    for (int i = 0; i < 3; i++) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.size_bytes = sizes[i];
        sebp_context *result = context;
        ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_SIZE);
        ck_assert_ptr_eq(result, context);
    }
    ck_assert_int_eq(sebp_context_create(NULL, NULL), SEBP_ERROR_NULL);
}
END_TEST

/* The line is cut to fit, and no byte after it is written. */
START_TEST(context_create_cuts_its_message)
{
    for (size_t bytes = 0; bytes < 40; bytes++) {
        char *message = testing_alloc(bytes, 3);
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = -1;
        options.message = message;
        options.message_bytes = bytes;
        sebp_context *result = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_VALUE);
        ck_assert(bytes == 0 || strnlen(message, bytes) == bytes - 1 ||
                  strnlen(message, bytes) > 20);
        testing_free(message);
    }
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = -1;
    options.message_bytes = 100; /* of NULL */
    sebp_context *result = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_VALUE);
}
END_TEST

START_TEST(info_get)
{
    sebp_info info = {.size_bytes = sizeof info, .cores = -7};
    ck_assert_int_eq(sebp_info_get(context, NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_info_get(NULL, NULL), SEBP_ERROR_NULL);
    const size_t sizes[] = {0, sizeof info - 1, 4097};
    for (int i = 0; i < 3; i++) {
        info.size_bytes = sizes[i];
        ck_assert_int_eq(sebp_info_get(context, &info), SEBP_ERROR_SIZE);
        ck_assert(info.cores == -7 && info.size_bytes == sizes[i]);
    }
}
END_TEST

START_TEST(messages)
{
    ck_assert_str_eq(sebp_context_message(context), "");
    ck_assert_str_eq(sebp_context_message(NULL), "");
    ck_assert_int_eq(sebp_context_threads(NULL), 0);
    ck_assert_int_eq(sebp_context_scratch_bytes(NULL), 0);
    /* The numbers at odds are in it. */
    BACKWARD(SEBP_ERROR_SHAPE, "8", call.w_view.cols = 7);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "7"));
}
END_TEST

START_TEST(status_strings)
{
    for (int status = SEBP_SUCCESS; status <= SEBP_ERROR_FILE; status++) {
        const char *text = sebp_status_string((sebp_status)status);
        ck_assert(text != NULL && *text != '\0');
        ck_assert_str_ne(text, "unknown status");
        for (int other = SEBP_SUCCESS; other < status; other++) {
            ck_assert_str_ne(text, sebp_status_string((sebp_status)other));
        }
    }
    ck_assert_str_eq(sebp_status_string((sebp_status)(SEBP_ERROR_FILE + 1)), "unknown status");
    ck_assert_str_eq(sebp_status_string((sebp_status)-1), "unknown status");
    ck_assert_uint_eq(sebp_dtype_bytes(SEBP_F32), 4);
    ck_assert_uint_eq(sebp_dtype_bytes(SEBP_BF16), 2);
    ck_assert_uint_eq(sebp_dtype_bytes((sebp_dtype)2), 0);
    ck_assert_str_eq(sebp_dtype_name(SEBP_F32), "f32");
    ck_assert_str_eq(sebp_dtype_name(SEBP_BF16), "bf16");
    ck_assert_str_eq(sebp_dtype_name((sebp_dtype)-1), "unknown");
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("errors");
    TCase *tests = tcase_create("bad input");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, backward_views);
    tcase_add_test(tests, backward_null);
    tcase_add_test(tests, backward_options);
    tcase_add_loop_test(tests, backward_rule, 0, BAD_RULES);
    tcase_add_test(tests, backward_rows);
    tcase_add_test(tests, backward_shapes);
    tcase_add_test(tests, backward_aliases);
    tcase_add_test(tests, columns_side_by_side);
    tcase_add_test(tests, forward_views);
    tcase_add_test(tests, forward_rest);
    tcase_add_test(tests, epilogues);
    tcase_add_test(tests, order_of_checks);
    tcase_add_test(tests, legal_calls);
    tcase_add_test(tests, matrix_check);
    tcase_add_test(tests, matrix_convert);
    tcase_add_test(tests, rows_constructors);
    tcase_add_test(tests, rows_find);
    tcase_add_test(tests, rows_dropped);
    tcase_add_test(tests, context_create);
    tcase_add_test(tests, context_create_cuts_its_message);
    tcase_add_test(tests, info_get);
    tcase_add_test(tests, messages);
    tcase_add_test(tests, status_strings);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
