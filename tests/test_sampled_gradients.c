/* SPDX-License-Identifier: Apache-2.0 */
/* dW and db of weighted samples of rows: unbiased, and right for the weights that there are. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "reference_sample.h"
#include "testing.h"

static sebp_context *context;

static void make_context(void)
{
    context = testing_context(SEBP_GEMM_AUTO, 3, 0);
}

static void destroy_context(void)
{
    sebp_context_destroy(context);
    context = NULL;
}

/* dY with its rows multiplied by the weights, in f32. */
static sebp_matrix weighted_gradient(const sebp_matrix *dy, const sebp_rows *rows)
{
    sebp_matrix made = testing_matrix(dy->rows, dy->cols, dy->cols, SEBP_F32);
    for (int64_t i = 0; i < dy->rows * dy->cols; i++)
        testing_set(&made, i / dy->cols, i % dy->cols, testing_at(dy, i));
    for (int64_t r = 0; r < sebp_rows_count(rows); r++) {
        const int64_t i = sebp_rows_indices(rows)[r];
        for (int64_t j = 0; j < dy->cols; j++)
            testing_set(&made, i, j, (float)testing_get(dy, i, j) * sebp_rows_weights(rows)[r]);
    }
    return made;
}

static reference_rows indices_of(const sebp_rows *rows)
{
    reference_rows made = reference_rows_none(sebp_rows_total(rows));
    made.count = sebp_rows_count(rows);
    memcpy(made.indices, sebp_rows_indices(rows), (size_t)made.count * sizeof *made.indices);
    return made;
}

static sebp_matrix make_output(int64_t rows, int64_t cols, sebp_write write)
{
    sebp_matrix made = testing_matrix(rows, cols, testing_stride(cols), testing_dtype());
    if (write == SEBP_ACCUMULATE)
        testing_fill(&made, TESTING_REAL);
    return made;
}

static sebp_write some_write(void)
{
    return testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
}

/* One backward of a sample that is known, which finds it or is given it. */
static void check_backward(sebp_context *own, int64_t M, int64_t N, int64_t K, double share)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_matrix dy = reference_uneven_gradient(M, N, testing_dtype(), 2);
    sebp_matrix x = testing_random_matrix(M, K, testing_dtype(), TESTING_REAL);
    sebp_matrix w = testing_random_matrix(N, K, testing_dtype(), TESTING_REAL);
    options.rule = sebp_rule_sampled(share, testing_random());
    options.dx_write = some_write();
    options.dw_write = some_write();
    options.db_write = some_write();
    sebp_matrix dx = make_output(M, K, options.dx_write), dw = make_output(N, K, options.dw_write),
                db = make_output(1, N, options.db_write);
    const bool with_dx = testing_chance(0.6), with_dw = testing_chance(0.9);
    const bool with_db = testing_chance(0.7), is_given = !with_dx && testing_chance(0.6);
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_sample(own, &dy, with_dw ? &x : NULL, &options.rule, &rows), own);
    if (sebp_rows_weights(rows) != NULL) {
        reference_rows list = indices_of(rows);
        sebp_matrix weighted = weighted_gradient(&dy, rows);
        reference want_dw =
            reference_dw(&weighted, &x, &list, 0, options.dw_write == SEBP_ACCUMULATE ? &dw : NULL);
        reference want_db =
            reference_db(&weighted, &list, options.db_write == SEBP_ACCUMULATE ? &db : NULL);
        const sebp_rule nonzero = sebp_rule_nonzero();
        reference_rows all = reference_rows_find(&dy, &nonzero);
        reference want_dx =
            reference_dx(&dy, &w, &all, options.dx_write == SEBP_ACCUMULATE ? &dx : NULL);
        sebp_matrix compact = testing_matrix(list.count, K, K, x.dtype);
        for (int64_t i = 0; i < list.count * K; i++)
            testing_set(&compact, i / K, i % K, testing_get(&x, list.indices[i / K], i % K));
        options.x_is_compact = is_given && testing_chance(0.5);
        const sebp_matrix *of_x = options.x_is_compact ? &compact : &x;
        testing_succeed(sebp_linear_backward(own, &dy, with_dw ? of_x : NULL, with_dx ? &w : NULL,
                                             is_given ? rows : NULL, &options, with_dx ? &dx : NULL,
                                             with_dw ? &dw : NULL, with_db ? &db : NULL),
                        own);
        if (with_dw)
            reference_check(&want_dw, &dw, REFERENCE_BOUND, "dW of a sample");
        if (with_db)
            reference_check(&want_db, &db, REFERENCE_BOUND, "db of a sample");
        if (with_dx)
            reference_check(&want_dx, &dx, REFERENCE_BOUND, "dX of all rows");
        reference_free(&want_dx);
        reference_free(&want_dw);
        reference_free(&want_db);
        reference_rows_free(&list);
        reference_rows_free(&all);
        testing_release(&weighted);
        testing_release(&compact);
    }
    sebp_rows_destroy(rows);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&w);
    testing_release(&dx);
    testing_release(&dw);
    testing_release(&db);
}

START_TEST(gradients_of_a_sample)
{
    for (int round = 0; round < testing_rounds(120); round++)
        check_backward(context, testing_between(2, 90), testing_between(1, 60),
                       testing_between(1, 60), 0.05 + testing_uniform() * 0.2 + 0.4);
}
END_TEST

/* More weighted rows than the scratch memory holds: they come in panels of columns. */
START_TEST(gradients_in_panels)
{
    sebp_context *small = testing_context(SEBP_GEMM_AUTO, 2, TESTING_MIN_SCRATCH);
    for (int round = 0; round < testing_rounds(8); round++)
        check_backward(small, testing_between(900, 1500), testing_between(250, 400),
                       testing_between(10, 40), 0.8);
    sebp_info info = {.size_bytes = sizeof info};
    testing_succeed(sebp_info_get(small, &info), small);
    ck_assert_int_le(sebp_context_scratch_bytes(small), TESTING_MIN_SCRATCH);
    sebp_context_destroy(small);
}
END_TEST

/* dX alone is exact, by any seed, and is what it is without the rule. */
START_TEST(dx_alone_is_exact)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_matrix dy = reference_uneven_gradient(40, 12, SEBP_F32, 3);
    sebp_matrix w = testing_random_matrix(12, 9, SEBP_F32, TESTING_REAL);
    sebp_matrix dx[2];
    for (int r = 0; r < 2; r++) {
        dx[r] = testing_matrix(40, 9, 9, SEBP_F32);
        testing_succeed(
            sebp_linear_backward(context, &dy, NULL, &w, NULL, &options, &dx[r], NULL, NULL),
            context);
        options.rule = sebp_rule_sampled(0.2, 1);
    }
    ck_assert(testing_same_bits(&dx[0], &dx[1]));
    testing_release(&dy);
    testing_release(&w);
    testing_release(&dx[0]);
    testing_release(&dx[1]);
}
END_TEST

/* A sample with matrices that have no columns, and without outputs. */
START_TEST(sample_without_columns)
{
    const sebp_rule rule = sebp_rule_sampled(0.5, testing_random());
    sebp_matrix dy = reference_uneven_gradient(40, 3, SEBP_F32, 2);
    sebp_matrix x = testing_random_matrix(40, 4, SEBP_F32, TESTING_REAL);
    sebp_matrix no_dy = sebp_matrix_f32(NULL, 40, 0), no_x = no_dy;
    sebp_matrix dw_rows = sebp_matrix_f32(NULL, 0, 4), dw_cols = sebp_matrix_f32(NULL, 3, 0);
    sebp_matrix no_db = sebp_matrix_f32(NULL, 1, 0), db = testing_matrix(1, 3, 3, SEBP_F32);
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_sample(context, &dy, NULL, &rule, &rows), context);
    ck_assert_ptr_nonnull(sebp_rows_weights(rows));
    testing_succeed(
        sebp_linear_backward(context, &no_dy, &x, NULL, rows, NULL, NULL, &dw_rows, &no_db),
        context);
    testing_succeed(sebp_linear_backward(context, &dy, NULL, NULL, rows, NULL, NULL, NULL, NULL),
                    context);
    testing_succeed(
        sebp_linear_backward(context, &dy, &no_x, NULL, rows, NULL, NULL, &dw_cols, &db), context);
    for (int64_t j = 0; j < 3; j++)
        ck_assert(isfinite(testing_get(&db, 0, j))); /* no poison is left */
    sebp_rows_destroy(rows);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&db);
}
END_TEST

/*
 * The average of n independent numbers within b of their mean, of variance v, is off that by more than
 * the result with a probability of at most 2 exp(-L) (Bernstein's inequality).
 */
static double bernstein(double n, double v, double b, double L)
{
    return (L * b / 3 + sqrt(L * b / 3 * (L * b / 3) + 2 * L * n * v)) / n;
}

/*
 * Over many seeds the average of dW and db is the exact one. Small integers, so the exact one is exact.
 * A draw gives g_i / q_i with probability q_i, divided by the number of draws; the fewer than 100 elements
 * fail by chance with a probability of at most 100 * 2 exp(-24), below 1e-8, at any seed of the test.
 */
START_TEST(gradients_are_unbiased)
{
    enum { M = 12, N = 5, K = 6, BUDGET = 5, SEEDS = 3000 };
    sebp_matrix dy = testing_matrix(M, N, N, SEBP_F32),
                x = testing_matrix(M, K + 1, K + 1, SEBP_F32);
    testing_fill(&dy, TESTING_INTEGER);
    testing_fill(&x, TESTING_INTEGER);
    for (int64_t i = 0; i < M; i++) {
        testing_set(&x, i, K, 1); /* the input of b */
        for (int64_t j = 0; j < N; j++)
            testing_set(&dy, i, j, i == 3 ? 0 : testing_get(&dy, i, j) * (i == 7 ? 40 : 1));
        for (int64_t j = 0; j < K && i == 5; j++)
            testing_set(&x, i, j, 0); /* it adds to db alone */
    }
    sebp_matrix of_x = sebp_matrix_f32(x.data, M, K);
    of_x.stride = x.stride;
    double *score = reference_scores(&dy, &of_x);
    const reference_sample sample = reference_sample_rows(score, M, BUDGET);
    ck_assert_int_ge(sample.draws, 2);
    ck_assert_int_lt(sample.draws, BUDGET);

    double sum[N][K + 1] = {{0}};
    const uint64_t first = testing_random();
    sebp_matrix dw = testing_matrix(N, K, K, SEBP_F32), db = testing_matrix(1, N, N, SEBP_F32);
    for (int seed = 0; seed < SEEDS; seed++) {
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
        options.rule = sebp_rule_sampled_count(BUDGET, first + (uint64_t)seed);
        testing_succeed(
            sebp_linear_backward(context, &dy, &of_x, NULL, NULL, &options, NULL, &dw, &db),
            context);
        for (int64_t n = 0; n < N; n++) {
            for (int64_t k = 0; k < K; k++)
                sum[n][k] += testing_get(&dw, n, k);
            sum[n][K] += testing_get(&db, 0, n);
        }
    }
    for (int64_t n = 0; n < N; n++) {
        for (int64_t k = 0; k <= K; k++) {
            double exact = 0, drawn = 0, square = 0, largest = 0;
            for (int64_t i = 0; i < M; i++) {
                const double g = testing_get(&dy, i, n) * testing_get(&x, i, k);
                exact += g;
                if (score[i] == 0 || score[i] >= sample.limit)
                    continue;
                const double each = g * sample.sum / score[i];
                drawn += g;
                square += each * each * score[i] / sample.sum;
                largest = fmax(largest, fabs(each));
            }
            const double rounding = (M + 2) * FLT_EPSILON * (fabs(exact) + M * largest);
            const double may_be_off =
                bernstein((double)(SEEDS * sample.draws), square - drawn * drawn, 2 * largest, 24);
            ck_assert_msg(fabs(sum[n][k] / SEEDS - exact) <= may_be_off + rounding,
                          "element %d, %d: %g on the average, not %g", (int)n, (int)k,
                          sum[n][k] / SEEDS, exact);
        }
    }
    free(score);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&dw);
    testing_release(&db);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sampled gradients");
    TCase *tests = tcase_create("sampled gradients");
    tcase_add_checked_fixture(tests, make_context, destroy_context);
    tcase_add_test(tests, gradients_of_a_sample);
    tcase_add_test(tests, gradients_in_panels);
    tcase_add_test(tests, dx_alone_is_exact);
    tcase_add_test(tests, sample_without_columns);
    tcase_add_test(tests, gradients_are_unbiased);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
