/* SPDX-License-Identifier: Apache-2.0 */
/* Weighted samples of rows against plain loops, their edges included. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

static int64_t active_rows(const double *score, int64_t total)
{
    int64_t active = 0;
    for (int64_t i = 0; i < total; i++)
        active += score[i] > 0;
    return active;
}

static sebp_rows *draw(const sebp_matrix *dy, const sebp_matrix *x, const sebp_rule *rule)
{
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_sample(context, dy, x, rule, &rows), context);
    return rows;
}

static int same_sets(const sebp_rows *a, const sebp_rows *b)
{
    const int64_t count = sebp_rows_count(a);
    const float *of_a = sebp_rows_weights(a), *of_b = sebp_rows_weights(b);
    return count == sebp_rows_count(b) && (of_a == NULL) == (of_b == NULL) &&
           (count == 0 || memcmp(sebp_rows_indices(a), sebp_rows_indices(b),
                                 (size_t)count * sizeof(int64_t)) == 0) &&
           (of_a == NULL || memcmp(of_a, of_b, (size_t)count * sizeof(float)) == 0);
}

/* ---- the sample ---- */

/* Every row and its weight, as plain loops have them. */
START_TEST(samples_are_as_defined)
{
    int64_t weighted = 0;
    for (int round = 0; testing_goes_on(round, 150, weighted, 10); round++) {
        const int64_t M = testing_between(1, 120), N = testing_between(1, 30);
        const int spread = (int)testing_between(0, 1) * 12;
        sebp_matrix dy = reference_uneven_gradient(M, N, testing_dtype(), spread);
        sebp_matrix x =
            reference_uneven_gradient(M, testing_between(0, 20), testing_dtype(), spread);
        const sebp_matrix *of_x = testing_chance(0.6) ? &x : NULL;
        double *score = reference_scores(&dy, of_x);
        const int64_t active = active_rows(score, M), budget = testing_between(1, M);
        const sebp_rule rule = sebp_rule_sampled_count(budget, testing_random());
        sebp_rows *rows = draw(&dy, of_x, &rule);
        const int64_t count = sebp_rows_count(rows), *indices = sebp_rows_indices(rows);
        const float *weights = sebp_rows_weights(rows);
        ck_assert_int_eq(sebp_rows_total(rows), M);
        ck_assert_int_le(count, budget);
        if (active <= budget) {
            ck_assert_ptr_null(weights);
            ck_assert_int_eq(count, active);
            ck_assert(sebp_rows_variance(rows) == 0);
        } else {
            const reference_sample sample = reference_sample_rows(score, M, budget);
            double *want = reference_weights(score, M, &sample, rule.seed), squares = 0;
            int64_t next = 0;
            weighted++;
            for (int64_t i = 0; i < M; i++) {
                squares += score[i] * score[i];
                if (want[i] == 0)
                    continue;
                ck_assert_int_lt(next, count);
                ck_assert_int_eq(indices[next], i);
                ck_assert_double_eq_tol(weights[next] / want[i], 1, 2 * FLT_EPSILON);
                ck_assert(weights[next] >= 1 && (score[i] < sample.limit || weights[next] == 1));
                next++;
            }
            ck_assert_int_eq(next, count);
            const double variance = sample.sum * sample.sum / ((double)sample.draws * squares);
            ck_assert_double_eq_tol(sebp_rows_variance(rows) / variance, 1, 1e-12);
            free(want);
        }
        sebp_rows_destroy(rows);
        free(score);
        testing_release(&dy);
        testing_release(&x);
    }
}
END_TEST

/* Scores for which all can be said by hand: the rows of dY are (s, 0). */
START_TEST(a_cut_by_hand)
{
    static const struct {
        int count, budget, kept; /* rows, and those of them with weight 1 for sure */
        double scores[6];
    } cases[] = {
        {3, 2, 1, {1, 2, 1}},         /* T / (k - c) is 2 with c = 0 and 1: then the larger c */
        {4, 2, 0, {1, 1, 1, 1}},      /* equal rows are drawn together */
        {5, 3, 2, {64, 1, 1, 1, 32}}, /* the second after the first */
        {5, 4, 0, {4, 4, 4, 4, 4}},
        {6, 1, 0, {1024, 1, 0, 1, 1, 1}}, /* one draw: nothing is sure */
        {6, 5, 4, {16, 8, 4, 2, 1, 1}},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        sebp_matrix dy = testing_matrix(cases[c].count, 2, 2, SEBP_F32);
        for (int i = 0; i < cases[c].count; i++) {
            testing_set(&dy, i, 0, i % 2 ? -cases[c].scores[i] : cases[c].scores[i]);
            testing_set(&dy, i, 1, 0);
        }
        int always[6] = {0};
        const int seeds = 200;
        for (int seed = 0; seed < seeds; seed++) {
            const sebp_rule rule = sebp_rule_sampled_count(cases[c].budget, testing_random());
            sebp_rows *rows = NULL; /* this finds what is drawn without X */
            testing_succeed(sebp_rows_find(context, &dy, &rule, &rows), context);
            sebp_rows *same = draw(&dy, NULL, &rule);
            ck_assert(same_sets(rows, same));
            double drawn = 0, others = 0;
            for (int64_t r = 0; r < sebp_rows_count(rows); r++) {
                const int64_t i = sebp_rows_indices(rows)[r];
                const float weight = sebp_rows_weights(rows)[r];
                always[i] += weight == 1;
                drawn += weight == 1 ? 0 : weight * cases[c].scores[i];
                ck_assert(cases[c].scores[i] != 0);
            }
            /* Each draw adds T / (k - c), whatever row it is. */
            for (int i = 0; i < cases[c].count; i++)
                others += always[i] == seed + 1 ? 0 : cases[c].scores[i];
            ck_assert_double_eq_tol(drawn, others, others * 8 * FLT_EPSILON);
            sebp_rows_destroy(rows);
            sebp_rows_destroy(same);
        }
        int sure = 0;
        for (int i = 0; i < cases[c].count; i++)
            sure += always[i] == seeds;
        ck_assert_msg(sure == cases[c].kept, "case %zu: %d rows are always kept", c, sure);
        testing_release(&dy);
    }
}
END_TEST

/* A budget for all rows: they are those that are not zero, without weights, to the last bit. */
START_TEST(all_rows_are_exact)
{
    for (int round = 0; round < testing_rounds(30); round++) {
        const int64_t M = testing_between(1, 70), N = testing_between(1, 40),
                      K = testing_between(1, 40);
        sebp_matrix dy = reference_uneven_gradient(M, N, testing_dtype(), 6);
        sebp_matrix x = reference_uneven_gradient(M, K, testing_dtype(), 6);
        sebp_matrix w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
        const sebp_rule rules[] = {sebp_rule_nonzero(), sebp_rule_sampled(1, testing_random()),
                                   sebp_rule_sampled_count(M, testing_random())};
        sebp_matrix dx[3], dw[3], db[3];
        sebp_rows *rows[3];
        for (int r = 0; r < 3; r++) {
            sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
            options.rule = rules[r];
            dx[r] = testing_matrix(M, K, K, SEBP_F32);
            dw[r] = testing_matrix(N, K, K, SEBP_F32);
            db[r] = testing_matrix(1, N, N, SEBP_F32);
            testing_succeed(sebp_rows_find(context, &dy, &rules[r], &rows[r]), context);
            testing_succeed(
                sebp_linear_backward(context, &dy, &x, &w, NULL, &options, &dx[r], &dw[r], &db[r]),
                context);
            ck_assert(same_sets(rows[0], rows[r]));
            ck_assert(testing_same_bits(&dx[0], &dx[r]) && testing_same_bits(&dw[0], &dw[r]) &&
                      testing_same_bits(&db[0], &db[r]));
        }
        for (int r = 0; r < 3; r++) {
            sebp_rows_destroy(rows[r]);
            testing_release(&dx[r]);
            testing_release(&dw[r]);
            testing_release(&db[r]);
        }
        testing_release(&dy);
        testing_release(&x);
        testing_release(&w);
    }
}
END_TEST

/* A share is rounded up, of the active rows. */
START_TEST(shares)
{
    sebp_matrix dy = testing_matrix(12, 1, 1, SEBP_F32);
    for (int64_t i = 0; i < 12; i++)
        testing_set(&dy, i, 0, i < 8); /* eight equal rows */
    static const struct {
        double share;
        int64_t budget;
    } cases[] = {{1e-300, 1}, {0.125, 1}, {0.126, 2}, {0.5, 4}, {0.874, 7}, {0.875, 7}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const sebp_rule share = sebp_rule_sampled(cases[c].share, 5),
                        count = sebp_rule_sampled_count(cases[c].budget, 5);
        sebp_rows *a = draw(&dy, NULL, &share), *b = draw(&dy, NULL, &count);
        ck_assert(same_sets(a, b));
        ck_assert_double_eq_tol(sebp_rows_variance(a), 8.0 / (double)cases[c].budget, 1e-12);
        sebp_rows_destroy(a);
        sebp_rows_destroy(b);
    }
    testing_release(&dy);
}
END_TEST

/* Where no row of dY is active, X may not even be readable. */
START_TEST(x_of_no_active_row_is_not_read)
{
    const int64_t M = 3, K = 7;
    void *page =
        mmap(NULL, (size_t)(M * K) * sizeof(float), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert(page != MAP_FAILED);
    sebp_matrix dy = testing_matrix(M, 2, 2, SEBP_F32), x = sebp_matrix_f32(page, M, K);
    testing_zero_rows(&dy, 0);
    const sebp_rule rule = sebp_rule_sampled(0.5, 1);
    sebp_rows *rows = draw(&dy, &x, &rule);
    ck_assert_int_eq(sebp_rows_count(rows), 0);
    sebp_rows_destroy(rows);
    testing_release(&dy);
    munmap(page, (size_t)(M * K) * sizeof(float));
}
END_TEST

START_TEST(nan_and_inf_are_kept)
{
    static const double spoils[] = {NAN, INFINITY, -INFINITY};
    for (int round = 0; round < testing_rounds(100); round++) {
        const int64_t M = testing_between(4, 60), N = testing_between(1, 20);
        sebp_matrix dy = reference_uneven_gradient(M, N, testing_dtype(), 3);
        sebp_matrix x = reference_uneven_gradient(M, 5, testing_dtype(), 3);
        for (int64_t spoilt = testing_between(1, 6); spoilt > 0; spoilt--) {
            sebp_matrix *of = testing_chance(0.5) ? &dy : &x;
            testing_set(of, testing_between(0, M - 1), testing_between(0, of->cols - 1),
                        spoils[testing_between(0, 2)]);
        }
        double *score = reference_scores(&dy, &x);
        const int64_t active = active_rows(score, M), budget = testing_between(1, M);
        const sebp_rule rule = sebp_rule_sampled_count(budget, testing_random());
        sebp_rows *rows = draw(&dy, &x, &rule);
        int64_t infinite = 0, kept_infinite = 0;
        for (int64_t i = 0; i < M; i++)
            infinite += isinf(score[i]);
        const int64_t count = sebp_rows_count(rows);
        for (int64_t r = 0; r < count; r++) {
            const int64_t i = sebp_rows_indices(rows)[r];
            ck_assert(score[i] > 0);
            kept_infinite += isinf(score[i]);
            ck_assert(!isinf(score[i]) || sebp_rows_weights(rows) == NULL ||
                      sebp_rows_weights(rows)[r] == 1);
        }
        ck_assert_int_eq(kept_infinite, infinite);
        ck_assert(count > infinite || active == infinite);
        ck_assert_int_le(count, budget > infinite ? budget : infinite + 1);
        ck_assert(sebp_rows_weights(rows) == NULL || infinite == 0 ||
                  isnan(sebp_rows_variance(rows)));
        sebp_rows_destroy(rows);
        free(score);
        testing_release(&dy);
        testing_release(&x);
    }
}
END_TEST

/* Of rows with scores from 2^-126 to 2^126: weights stay finite, and a row of zeros stays out. */
START_TEST(extreme_scores)
{
    sebp_matrix dy = testing_matrix(60, 1, 1, SEBP_F32);
    for (int64_t i = 0; i < 60; i++)
        testing_set(&dy, i, 0, i % 7 == 0 ? 0 : ldexp(1, (int)(i * 4 - 120)));
    for (int64_t budget = 1; budget < 60; budget++) {
        const sebp_rule rule = sebp_rule_sampled_count(budget, testing_random());
        sebp_rows *rows = draw(&dy, NULL, &rule);
        ck_assert_int_ge(sebp_rows_count(rows), 1);
        ck_assert_int_le(sebp_rows_count(rows), budget);
        for (int64_t r = 0; r < sebp_rows_count(rows); r++) {
            ck_assert(sebp_rows_indices(rows)[r] % 7 != 0);
            ck_assert(sebp_rows_weights(rows) == NULL ||
                      (sebp_rows_weights(rows)[r] >= 1 && sebp_rows_weights(rows)[r] <= FLT_MAX));
        }
        sebp_rows_destroy(rows);
    }
    testing_release(&dy);
}
END_TEST

/* The seed, dY and X decide, not the threads; another seed is another sample. */
START_TEST(samples_are_repeatable)
{
    int others = 0;
    for (int round = 0; round < testing_rounds(20); round++) {
        sebp_matrix dy = reference_uneven_gradient(testing_between(200, 6000),
                                                   testing_between(1, 9), testing_dtype(), 2);
        sebp_matrix x =
            reference_uneven_gradient(dy.rows, testing_between(1, 9), testing_dtype(), 2);
        const uint64_t seed = testing_random();
        sebp_rule rule = sebp_rule_sampled(0.3, seed);
        sebp_rows *first = draw(&dy, &x, &rule);
        for (int threads = 1; threads <= 4; threads++) {
            sebp_context *other = testing_context(SEBP_GEMM_AUTO, threads, 0);
            sebp_rows *rows = NULL;
            testing_succeed(sebp_rows_sample(other, &dy, &x, &rule, &rows), other);
            ck_assert(same_sets(first, rows));
            sebp_rows_destroy(rows);
            sebp_context_destroy(other);
        }
        rule.seed++;
        sebp_rows *second = draw(&dy, &x, &rule);
        others += !same_sets(first, second);
        sebp_rows_destroy(first);
        sebp_rows_destroy(second);
        testing_release(&dy);
        testing_release(&x);
    }
    ck_assert_int_eq(others, testing_rounds(20));
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("rows sample");
    TCase *tests = tcase_create("rows sample");
    tcase_add_checked_fixture(tests, make_context, destroy_context);
    tcase_add_test(tests, samples_are_as_defined);
    tcase_add_test(tests, a_cut_by_hand);
    tcase_add_test(tests, all_rows_are_exact);
    tcase_add_test(tests, shares);
    tcase_add_test(tests, x_of_no_active_row_is_not_read);
    tcase_add_test(tests, nan_and_inf_are_kept);
    tcase_add_test(tests, extreme_scores);
    tcase_add_test(tests, samples_are_repeatable);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
