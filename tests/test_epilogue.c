/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Epilogues of the linear layer: a residual against the double-precision reference, activations and
 * their derivatives bit by bit against the layers of their own.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

static const sebp_activation activations[] = {SEBP_GELU, SEBP_GELU_TANH, SEBP_SILU, SEBP_RELU};

/* A context of a GEMM, with any number of threads and any workspace. */
static sebp_context *make_context(int gemm)
{
    return testing_context((sebp_gemm)gemm, (int)testing_between(1, 4),
                           testing_chance(0.5) ? TESTING_MIN_SCRATCH : 0);
}

/* A layer of M rows, those that are active, and what the epilogues take. */
typedef struct problem {
    int64_t M, N, K;
    testing_values values;
    reference_rows active;
    sebp_rows *rows; /* NULL: all */
    sebp_matrix x, w, bias, residual, dy, before;
    sebp_dtype y_dtype, dx_dtype;
    sebp_activation activation;
} problem;

static int64_t any_size(void)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.2) ? 700 : 60);
}

static void hide_inactive(const problem *p, const sebp_matrix *matrix)
{
    for (int64_t i = 0; i < p->M; i++) {
        for (int64_t j = 0; j < matrix->cols && !reference_rows_have(&p->active, i); j++)
            testing_set(matrix, i, j, NAN);
    }
}

/* Of the GEMM `which`: oneDNN may round the same product otherwise the next time, unless it is exact. */
static problem make_problem(int which)
{
    problem p = {.M = any_size(), .N = any_size(), .K = any_size()};
    p.values = which == SEBP_GEMM_NATIVE && testing_chance(0.7) ? TESTING_REAL : TESTING_INTEGER;
    p.y_dtype = testing_dtype();
    p.dx_dtype = testing_dtype();
    p.activation = activations[testing_between(0, 3)];
    p.active = reference_rows_all(p.M);
    if (testing_chance(0.7)) {
        double keep = testing_chance(0.1) ? 0 : 0.5;
        p.active.count = 0;
        for (int64_t i = 0; i < p.M; i++) {
            if (testing_chance(keep))
                p.active.indices[p.active.count++] = i;
        }
        testing_succeed(sebp_rows_from_indices(p.active.indices, p.active.count, p.M, &p.rows),
                        NULL);
    }
    sebp_dtype dtype = testing_dtype();
    p.x = testing_random_matrix(p.M, p.K, dtype, p.values);
    p.w = testing_random_matrix(p.N, p.K, dtype, p.values);
    p.bias = testing_random_matrix(1, p.N, testing_dtype(), p.values);
    p.residual = testing_random_matrix(p.M, p.N, p.y_dtype, p.values);
    p.dy = testing_random_matrix(p.M, p.N, dtype, p.values);
    p.before = testing_random_matrix(p.M, p.K, p.dx_dtype, p.values);
    hide_inactive(&p, &p.x);
    hide_inactive(&p, &p.residual);
    hide_inactive(&p, &p.dy);
    hide_inactive(&p, &p.before);
    return p;
}

static void free_problem(problem *p)
{
    sebp_matrix *all[] = {&p->x, &p->w, &p->bias, &p->residual, &p->dy, &p->before};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        testing_release(all[i]);
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
}

/* X W^T + b + the residual, in double. */
static reference want_y(const problem *p, const sebp_matrix *bias, bool adds_residual)
{
    reference want = reference_y(&p->x, &p->w, bias, &p->active, 0);
    for (int64_t a = 0; a < p->active.count && adds_residual; a++) {
        for (int64_t j = 0; j < p->N; j++) {
            int64_t i = p->active.indices[a];
            double added = testing_get(&p->residual, i, j);
            want.value[i * p->N + j] += added;
            want.magnitude[i * p->N + j] += fabs(added);
        }
    }
    want.terms += adds_residual && p->active.count > 0 && p->N > 0;
    return want;
}

static sebp_matrix fresh(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    return testing_matrix(rows, cols, testing_stride(cols), dtype);
}

/* That an input holds what it held. */
static void check_kept(const sebp_matrix *now, const sebp_matrix *before, const char *what)
{
    ck_assert_msg(testing_same_bits(now, before), "%s: other bits", what);
}

/* _i: the GEMM. */
START_TEST(a_forwards_epilogue_is_a_pass_of_its_own)
{
    if (!testing_has_gemm((sebp_gemm)_i, "a_forwards_epilogue_is_a_pass_of_its_own"))
        return;
    sebp_context *context = make_context(_i);
    for (int round = testing_rounds(150); round > 0; round--) {
        problem p = make_problem(_i);
        const sebp_matrix *bias = testing_chance(0.5) ? &p.bias : NULL;
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
        bool adds_residual = testing_chance(0.7);
        sebp_matrix y = fresh(p.M, p.N, p.y_dtype), activated = fresh(p.M, p.N, p.y_dtype);
        sebp_matrix want_activated = fresh(p.M, p.N, p.y_dtype);
        sebp_matrix residual = testing_copy(&p.residual);
        options.residual = adds_residual ? &p.residual : NULL;
        options.activation = p.activation;
        options.activated = testing_chance(0.8) ? &activated : NULL;
        testing_succeed(sebp_linear_forward(context, &p.x, &p.w, bias, p.rows, &options, &y),
                        context);
        check_kept(&p.residual, &residual, "the residual");
        reference want = want_y(&p, bias, adds_residual);
        reference_check(&want, &y, p.values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND,
                        "Y");
        testing_succeed(
            sebp_activation_forward(context, p.activation, &y, NULL, p.rows, NULL, &want_activated),
            context);
        if (options.activated != NULL)
            check_kept(&activated, &want_activated, "f(Y)");

        /* In place, and with other threads and scratch memory: the same bits. */
        sebp_context *other = make_context(_i);
        sebp_matrix place = testing_copy(adds_residual ? &p.residual : &y);
        options.residual = adds_residual ? &place : NULL;
        options.activated = NULL;
        testing_succeed(sebp_linear_forward(other, &p.x, &p.w, bias, p.rows, &options, &place),
                        other);
        if (_i == SEBP_GEMM_NATIVE)
            check_kept(&place, &y, "Y in the place of the residual");
        else
            reference_check(&want, &place,
                            p.values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND,
                            "Y in the place of the residual");
        options.residual = adds_residual ? &p.residual : NULL;
        options.activated = testing_chance(0.5) || !adds_residual ? &y : &p.residual;
        testing_succeed(sebp_linear_forward(context, &p.x, &p.w, bias, p.rows, &options, &y),
                        context);
        check_kept(options.activated, &want_activated, "f(Y) in another's place");

        sebp_context_destroy(other);
        reference_free(&want);
        testing_release(&place);
        testing_release(&residual);
        testing_release(&y);
        testing_release(&activated);
        testing_release(&want_activated);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* _i: the GEMM. */
START_TEST(a_backwards_epilogue_is_a_pass_of_its_own)
{
    if (!testing_has_gemm((sebp_gemm)_i, "a_backwards_epilogue_is_a_pass_of_its_own"))
        return;
    sebp_context *context = make_context(_i);
    int64_t nonzeros = 0;
    for (int round = 0; testing_goes_on(round, 150, nonzeros, 1000); round++) {
        problem p = make_problem(_i);
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
        sebp_matrix dx = fresh(p.M, p.K, p.dx_dtype), want = fresh(p.M, p.K, p.dx_dtype);
        sebp_matrix before = testing_copy(&p.before), dw = fresh(p.N, p.K, SEBP_F32);
        bool has_dw = testing_chance(0.5);
        if (p.rows == NULL && p.N == 0) /* the backward itself would find none */
            testing_succeed(sebp_rows_all(p.M, &p.rows), NULL);
        testing_succeed(
            sebp_linear_backward(context, &p.dy, NULL, &p.w, p.rows, &options, &want, NULL, NULL),
            context);
        testing_succeed(sebp_activation_backward(context, p.activation, &want, &p.before, NULL,
                                                 p.rows, NULL, &want, NULL),
                        context);
        options.activation = p.activation;
        options.before = &p.before;
        testing_succeed(sebp_linear_backward(context, &p.dy, has_dw ? &p.x : NULL, &p.w, p.rows,
                                             &options, &dx, has_dw ? &dw : NULL, NULL),
                        context);
        check_kept(&dx, &want, "dX f'(Z)");
        check_kept(&p.before, &before, "Z");
        nonzeros += testing_nonzeros(&dx);
        testing_release(&dx);
        testing_release(&dw);
        testing_release(&want);
        testing_release(&before);
        free_problem(&p);
    }
    ck_assert_int_gt(nonzeros, 1000);
    sebp_context_destroy(context);
}
END_TEST

/* Inactive rows stay as they were where the options say so. */
START_TEST(inactive_rows_are_left)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    const int64_t active[] = {1, 2, 5};
    sebp_rows *rows;
    testing_succeed(sebp_rows_from_indices(active, 3, 7, &rows), context);
    sebp_matrix x = testing_random_matrix(7, 30, SEBP_F32, TESTING_REAL);
    sebp_matrix w = testing_random_matrix(40, 30, SEBP_F32, TESTING_REAL);
    sebp_matrix y = testing_random_matrix(7, 40, SEBP_F32, TESTING_REAL);
    sebp_matrix activated = testing_random_matrix(7, 40, SEBP_F32, TESTING_REAL);
    sebp_matrix y_before = testing_copy(&y), activated_before = testing_copy(&activated);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    options.activated = &activated;
    testing_succeed(sebp_linear_forward(context, &x, &w, NULL, rows, &options, &y), context);
    for (int64_t i = 0; i < 7; i++) {
        bool is_active = i == 1 || i == 2 || i == 5;
        for (int64_t j = 0; j < 40; j++) {
            ck_assert((testing_get(&y, i, j) == testing_get(&y_before, i, j)) != is_active);
            ck_assert((testing_get(&activated, i, j) == testing_get(&activated_before, i, j)) !=
                      is_active);
        }
    }
    testing_release(&x);
    testing_release(&w);
    testing_release(&y);
    testing_release(&activated);
    testing_release(&y_before);
    testing_release(&activated_before);
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("epilogue");
    TCase *all = tcase_create("epilogue");
    tcase_set_timeout(all, 600);
    tcase_add_loop_test(all, a_forwards_epilogue_is_a_pass_of_its_own, 0, TESTING_GEMMS);
    tcase_add_loop_test(all, a_backwards_epilogue_is_a_pass_of_its_own, 0, TESTING_GEMMS);
    tcase_add_test(all, inactive_rows_are_left);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
