/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The linear layer at its edges: NaN, Inf, -0 and denormals, slopes by finite differences, inputs that
 * overlap, and defaults.
 */
#include <inttypes.h>
#include <math.h>

#include <sebp/sebp.h>

#include "linear_problem.h"

/* A row of dY with NaN or Inf is active under every rule, and only what it touches is spoilt. */
START_TEST(nan_and_inf_in_dy_spread_as_in_dense)
{
    if (!testing_has_gemm((sebp_gemm)_i, "nan_and_inf_in_dy_spread_as_in_dense")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    for (int round = 0; round < testing_rounds(120); round++) {
        linear_problem p = linear_problem_make(
            testing_between(3, 60), testing_between(2, 40), testing_between(2, 40), testing_dtype(),
            TESTING_REAL, (rows_kind)testing_between(ROWS_FOUND, ROWS_KINDS - 1));
        testing_fill(&p.x, TESTING_REAL);
        p.options.rule.count = p.M;
        p.options.rule.delta = 0.5;
        testing_set(&p.dy, testing_between(0, p.M - 1), testing_between(0, p.N - 1), NAN);
        testing_set(&p.dy, testing_between(0, p.M - 1), testing_between(0, p.N - 1), -INFINITY);
        reference_rows_free(&p.active);
        p.active = reference_rows_find(&p.dy, &p.options.rule);
        linear_check_backward(context, &p);
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(negative_zero_is_zero)
{
    if (!testing_has_gemm((sebp_gemm)_i, "negative_zero_is_zero")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        linear_problem p =
            linear_problem_make(9, 7, 5, (sebp_dtype)dtype, TESTING_INTEGER, ROWS_FOUND);
        testing_fill(&p.x, TESTING_INTEGER);
        testing_fill(&p.dy, TESTING_INTEGER);
        for (int64_t j = 0; j < p.N; j++) {
            testing_set(&p.dy, 4, j, -0.0);
        }
        linear_poison_row(&p.x, 4);
        reference_rows_free(&p.active);
        p.active = reference_rows_find(&p.dy, &p.options.rule);
        ck_assert_int_eq(p.active.count, 8);
        linear_check_backward(context, &p);
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* A row of denormals is active, and large weights lift it back into sight. */
START_TEST(denormals_count)
{
    if (!testing_has_gemm((sebp_gemm)_i, "denormals_count")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    linear_problem p = linear_problem_make(33, 21, 27, SEBP_F32, TESTING_REAL, ROWS_FOUND);
    testing_fill(&p.x, TESTING_REAL);
    for (int64_t i = 0; i < p.M; i++) {
        for (int64_t j = 0; j < p.N; j++) {
            testing_set(&p.dy, i, j, i % 3 ? 0.0 : ldexp(testing_uniform(), -130));
        }
    }
    for (int64_t i = 0; i < p.N; i++) {
        for (int64_t j = 0; j < p.K; j++) {
            testing_set(&p.w, i, j, ldexp(testing_uniform(), 120));
        }
    }
    reference_rows_free(&p.active);
    p.active = reference_rows_find(&p.dy, &p.options.rule);
    ck_assert_int_eq(p.active.count, 11);
    sebp_matrix dx = testing_matrix(p.M, p.K, p.K, SEBP_F32);
    testing_succeed(
        sebp_linear_backward(context, &p.dy, NULL, &p.w, NULL, &p.options, &dx, NULL, NULL),
        context);
    reference want = reference_dx(&p.dy, &p.w, &p.active, NULL);
    if (p.options.inactive == SEBP_INACTIVE_ZERO) {
        reference_check(&want, &dx, REFERENCE_BOUND, "dX");
    }
    for (int64_t r = 0; r < p.active.count; r++) {
        ck_assert(testing_get(&dx, p.active.indices[r], 0) != 0);
    }
    reference_free(&want);
    testing_release(&dx);
    linear_problem_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* loss(X, W, b) = sum of squares of Y[R] / 2, so dY = Y on R. */
static double loss(sebp_context *context, const linear_problem *p, const sebp_matrix *y)
{
    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, &p->bias, p->rows, &p->options, y),
                    context);
    double sum = 0;
    for (int64_t r = 0; r < p->active.count; r++) {
        for (int64_t j = 0; j < p->N; j++) {
            double value = testing_get(y, p->active.indices[r], j);
            sum += value * value / 2;
        }
    }
    return sum;
}

static void check_slope(sebp_context *context, const linear_problem *p, const sebp_matrix *y,
                        const sebp_matrix *input, const sebp_matrix *gradient, const char *what)
{
    const double step = 0.25; /* central differences of a square are exact, so not small */
    for (int64_t at = 0; at < input->rows * input->cols; at++) {
        int64_t i = at / input->cols, j = at % input->cols;
        double value = testing_get(input, i, j);
        testing_set(input, i, j, value + step);
        double above = loss(context, p, y);
        testing_set(input, i, j, value - step);
        double below = loss(context, p, y);
        testing_set(input, i, j, value);
        double slope = (above - below) / (2 * step);
        double got = testing_get(gradient, i, j);
        ck_assert_msg(fabs(slope - got) <= 1e-4 * (1 + fabs(above)),
                      "d%s(%" PRId64 ", %" PRId64 ") is %g but the slope is %g", what, i, j, got,
                      slope);
    }
}

START_TEST(gradients_match_finite_differences)
{
    if (!testing_has_gemm((sebp_gemm)_i, "gradients_match_finite_differences")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 1, 0);
    for (int round = 0; round < testing_rounds(3); round++) {
        linear_problem p = linear_problem_make(12, 5, 6, SEBP_F32, TESTING_REAL, ROWS_PADDED);
        p.options.x_is_compact = 0;
        p.options.inactive = SEBP_INACTIVE_ZERO;
        testing_release(&p.x);
        p.x = testing_random_matrix(p.M, p.K, SEBP_F32, TESTING_REAL);
        testing_release(&p.bias);
        p.bias = testing_random_matrix(1, p.N, SEBP_F32, TESTING_REAL);
        sebp_matrix y = testing_matrix(p.M, p.N, p.N, SEBP_F32);
        sebp_matrix dx = testing_matrix(p.M, p.K, p.K, SEBP_F32);
        sebp_matrix dw = testing_matrix(p.N, p.K, p.K, SEBP_F32);
        sebp_matrix db = testing_matrix(1, p.N, p.N, SEBP_F32);
        loss(context, &p, &y);
        sebp_matrix dy = testing_copy(&y);
        testing_succeed(
            sebp_linear_backward(context, &dy, &p.x, &p.w, p.rows, &p.options, &dx, &dw, &db),
            context);
        check_slope(context, &p, &y, &p.x, &dx, "X");
        check_slope(context, &p, &y, &p.w, &dw, "W");
        check_slope(context, &p, &y, &p.bias, &db, "b");
        ck_assert(testing_nonzeros(&dx) == p.active.count * p.K);
        ck_assert(testing_nonzeros(&dw) == p.N * p.K && testing_nonzeros(&db) == p.N);
        testing_release(&y);
        testing_release(&dy);
        testing_release(&dx);
        testing_release(&dw);
        testing_release(&db);
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* Inputs may be one and the same matrix: dY, X and W all M x M. */
START_TEST(inputs_may_overlap)
{
    if (!testing_has_gemm((sebp_gemm)_i, "inputs_may_overlap")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    const int64_t M = 23;
    sebp_matrix a = testing_random_matrix(M, M, SEBP_F32, TESTING_INTEGER);
    sebp_matrix dx = testing_matrix(M, M, M, SEBP_F32), dw = testing_matrix(M, M, M, SEBP_F32);
    testing_succeed(sebp_linear_backward(context, &a, &a, &a, NULL, NULL, &dx, &dw, NULL), context);
    reference_rows all = reference_rows_all(M);
    reference want_dx = reference_dx(&a, &a, &all, NULL);
    reference want_dw = reference_dw(&a, &a, &all, 0, NULL);
    reference_check(&want_dx, &dx, REFERENCE_EXACT, "dX");
    reference_check(&want_dw, &dw, REFERENCE_EXACT, "dW");
    reference_free(&want_dx);
    reference_free(&want_dw);
    reference_rows_free(&all);
    testing_release(&a);
    testing_release(&dx);
    testing_release(&dw);
    sebp_context_destroy(context);
}
END_TEST

/* rows = NULL in the forward is all rows, and options = NULL the defaults. */
START_TEST(forward_defaults_to_all_rows)
{
    if (!testing_has_gemm((sebp_gemm)_i, "forward_defaults_to_all_rows")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    linear_problem p = linear_problem_make(40, 17, 29, SEBP_F32, TESTING_INTEGER, ROWS_ALL);
    sebp_matrix y = testing_matrix(p.M, p.N, p.N + 3, SEBP_F32);
    testing_succeed(sebp_linear_forward(context, &p.x, &p.w, NULL, NULL, NULL, &y), context);
    reference want = reference_y(&p.x, &p.w, NULL, &p.active, 0);
    reference_check(&want, &y, REFERENCE_EXACT, "Y");
    reference_free(&want);
    testing_release(&y);
    linear_problem_free(&p);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("linear edges");
    TCase *edges = tcase_create("linear edges");
    tcase_add_loop_test(edges, nan_and_inf_in_dy_spread_as_in_dense, 0, TESTING_GEMMS);
    tcase_add_loop_test(edges, negative_zero_is_zero, 0, TESTING_GEMMS);
    tcase_add_loop_test(edges, denormals_count, 0, TESTING_GEMMS);
    tcase_add_loop_test(edges, gradients_match_finite_differences, 0, TESTING_GEMMS);
    tcase_add_loop_test(edges, inputs_may_overlap, 0, TESTING_GEMMS);
    tcase_add_loop_test(edges, forward_defaults_to_all_rows, 0, TESTING_GEMMS);
    suite_add_tcase(suite, edges);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
