/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input of the linear layer: each gives the status its header promises, a line that says where, and
 * leaves the outputs as they were. One line of a test is one bad call: what is changed in a good one.
 */
#include <math.h>

#include <sebp/sebp.h>

#include "linear_call.h"

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

START_TEST(backward_rule)
{
    BACKWARD(SEBP_ERROR_VALUE, bad_rules[_i].word,
             (call.rows = NULL, call.options.rule = bad_rules[_i].rule));
}
END_TEST

START_TEST(backward_rows)
{
    BACKWARD(SEBP_ERROR_ROWS, "9", call.rows = linear_call_on.other_rows);
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
    FORWARD(SEBP_ERROR_ROWS, "9", call.rows = linear_call_on.other_rows);
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

/* A packed weight of `view`, for a call on `context`. */
static sebp_packed_weight *packed_of(sebp_context *context, sebp_matrix view)
{
    sebp_packed_weight *made = NULL;
    ck_assert_int_eq(sebp_packed_weight_create(context, &view, 0, &made), SEBP_SUCCESS);
    return made;
}

#define PACKED(word, change)                                                                       \
    do {                                                                                           \
        FORWARD(SEBP_ERROR_VALUE, "options->packed_weight" word,                                   \
                (call.options.packed_weight = packed, change));                                    \
        BACKWARD(SEBP_ERROR_VALUE, "options->packed_weight" word,                                  \
                 (call.options.packed_weight = packed, change));                                   \
    } while (0)

/* It is of one matrix, as it lies, and of one context. */
START_TEST(packed_weights)
{
    const sebp_matrix w = linear_call_on.inputs[2];
    sebp_packed_weight *packed = packed_of(linear_call_on.context, w);
    PACKED(" is of a matrix of 8x8", call.w_view.rows--);
    PACKED(" is of a matrix of 8x8", call.w_view.cols--);
    PACKED(" is of a matrix of 8x8", call.w_view.stride--);
    PACKED(" is of a matrix of 8x8, stride 9, f32, but w is 8x8, stride 9, bf16",
           call.w_view.dtype = SEBP_BF16);
    PACKED(" is of a matrix that lies elsewhere", call.w_view.data = (float *)call.w_view.data + 1);
    sebp_context *other = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_packed_weight *of_other = packed_of(other, w);
    PACKED(" was made for another context", call.options.packed_weight = of_other);
    /* Without dX there is no W to compare. */
    BACKWARD(SEBP_ERROR_VALUE, "options->packed_weight was made for another context",
             (call.options.packed_weight = of_other, call.w = call.dx = NULL));
    sebp_packed_weight_destroy(of_other);
    sebp_context_destroy(other);
    linear_call_reset();
    call.options.packed_weight = packed;
    call.w = call.dx = NULL;
    ck_assert_int_eq(linear_call_backward(), SEBP_SUCCESS);

    /* Making one. */
    sebp_context *context = linear_call_on.context;
    sebp_packed_weight *made = packed;
    sebp_matrix view = w;
    ck_assert_int_eq(sebp_packed_weight_create(NULL, &w, 0, &made), SEBP_ERROR_NULL);
    testing_refuse(sebp_packed_weight_create(context, NULL, 0, &made), SEBP_ERROR_NULL, "w is NULL",
                   context);
    testing_refuse(sebp_packed_weight_create(context, &w, 0, NULL), SEBP_ERROR_NULL,
                   "packed_weight is NULL", context);
    testing_refuse(sebp_packed_weight_create(context, &w, -1, &made), SEBP_ERROR_VALUE, "-1",
                   context);
    view.data = NULL;
    testing_refuse(sebp_packed_weight_create(context, &view, 0, &made), SEBP_ERROR_NULL, "w is",
                   context);
    view = w;
    view.stride = 1;
    testing_refuse(sebp_packed_weight_create(context, &view, 0, &made), SEBP_ERROR_STRIDE, "w has",
                   context);
    view = w;
    view.dtype = (sebp_dtype)2;
    testing_refuse(sebp_packed_weight_create(context, &view, 0, &made), SEBP_ERROR_DTYPE, "w has",
                   context);
    ck_assert_ptr_eq(made, packed);
    sebp_packed_weight_destroy(packed);
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
             (call.options.inactive = (sebp_inactive)2, call.rows = linear_call_on.other_rows));
    BACKWARD(SEBP_ERROR_ROWS, "9", (call.rows = linear_call_on.other_rows, call.w_view.cols--));
    BACKWARD(SEBP_ERROR_SHAPE, "w", (call.w_view.cols--, call.dx_view.data = call.dy_view.data));
    FORWARD(SEBP_ERROR_NULL, "y", (call.y = NULL, call.options.size_bytes = 0));
    FORWARD(SEBP_ERROR_SIZE, "size_bytes", (call.options.size_bytes = 0, call.x_view.stride = 1));
    FORWARD(SEBP_ERROR_STRIDE, "y",
            (call.y_view.stride = 1, call.rows = linear_call_on.other_rows));
    FORWARD(SEBP_ERROR_ROWS, "9", (call.rows = linear_call_on.other_rows, call.y_view.cols--));
    FORWARD(SEBP_ERROR_SHAPE, "w", (call.y_view.cols--, call.y_view.data = call.x_view.data));
}
END_TEST

static void expect_success(sebp_status status, const char *what)
{
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s (%s)", what, sebp_status_string(status),
                  sebp_context_message(linear_call_on.context));
}

/* What is not an error, after some that were. */
START_TEST(legal_calls)
{
    BACKWARD(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    linear_call_reset();
    call.dx = call.dw = call.db = NULL;
    call.x = call.w = NULL;
    expect_success(linear_call_backward(), "no outputs");
    linear_call_reset();
    call.x = NULL;
    call.dw = NULL;
    expect_success(linear_call_backward(), "no dw, no x");
    linear_call_reset();
    call.w = NULL;
    call.dx = NULL;
    expect_success(linear_call_backward(), "no dx, no w");
    linear_call_reset();
    call.given = NULL;
    expect_success(linear_call_backward(), "no options");
    linear_call_reset();
    call.options.rule.kind = SEBP_RULE_THRESHOLD;
    call.options.rule.count = -1;
    call.options.rule.delta = NAN;
    call.rows = NULL;
    expect_success(linear_call_backward(), "fields of other rules");
    linear_call_reset();
    call.options.rule.kind = (sebp_rule_kind)9;
    call.options.dx_write = (sebp_write)9;
    call.bias = NULL;
    expect_success(linear_call_forward(), "the forward does not look at rule and writes");
    linear_call_reset();
    call.options.x_is_compact = 1;
    call.x_view.rows = ACTIVE;
    expect_success(linear_call_forward(), "compact x");
    expect_success(linear_call_backward(), "compact x");

    /* Views without elements need no data and overlap nothing. */
    sebp_matrix none = {NULL, SIZE, 0, 0, SEBP_F32};
    linear_call_reset();
    call.x_view = call.w_view = call.dx_view = call.dw_view = none;
    expect_success(linear_call_backward(), "K = 0");
    linear_call_reset();
    call.x_view = call.w_view = none;
    expect_success(linear_call_forward(), "K = 0");
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("linear errors");
    TCase *tests = tcase_create("linear errors");
    tcase_add_checked_fixture(tests, linear_call_setup, linear_call_teardown);
    tcase_add_test(tests, backward_views);
    tcase_add_test(tests, backward_null);
    tcase_add_test(tests, backward_options);
    tcase_add_loop_test(tests, backward_rule, 0, BAD_RULES);
    tcase_add_test(tests, backward_rows);
    tcase_add_test(tests, backward_shapes);
    tcase_add_test(tests, backward_aliases);
    tcase_add_test(tests, forward_views);
    tcase_add_test(tests, forward_rest);
    tcase_add_test(tests, epilogues);
    tcase_add_test(tests, packed_weights);
    tcase_add_test(tests, order_of_checks);
    tcase_add_test(tests, legal_calls);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
