/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows found by every rule against plain loops, ties and edges included, and what a set drops.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
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

static sebp_matrix random_gradient(int64_t M, int64_t N, sebp_dtype dtype, testing_values values)
{
    int64_t stride = N + (testing_chance(0.5) ? 0 : testing_between(1, 19));
    sebp_matrix dy = testing_matrix(M, N, stride, dtype);
    testing_fill(&dy, values);
    testing_zero_rows(&dy, testing_uniform() * 0.5 + 0.5);
    return dy;
}

static void find_and_check(const sebp_matrix *dy, const sebp_rule *rule)
{
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_find(context, dy, rule, &rows), context);
    reference_rows want = reference_rows_find(dy, rule);
    ck_assert_msg(reference_rows_equal(&want, rows),
                  "rule %d on %" PRId64 " x %" PRId64 " %s: %" PRId64 " rows found, %" PRId64
                  " expected, or others",
                  (int)rule->kind, dy->rows, dy->cols, sebp_dtype_name(dy->dtype),
                  sebp_rows_count(rows), want.count);

    sebp_dropped dropped = {-1, -1}, expected = reference_dropped(dy, &want);
    testing_succeed(sebp_rows_dropped(context, dy, rows, &dropped), context);
    ck_assert_int_eq(dropped.rows, expected.rows);
    if (isnan(expected.energy)) {
        ck_assert(isnan(dropped.energy));
    } else {
        ck_assert_double_eq_tol(dropped.energy, expected.energy, 1e-12);
        ck_assert((dropped.energy == 0) == (expected.energy == 0));
    }
    if (rule->kind == SEBP_RULE_NONZERO) {
        ck_assert_int_eq(dropped.rows, 0);
    }
    if (rule->kind == SEBP_RULE_ENERGY && !isnan(dropped.energy)) {
        ck_assert_double_le(dropped.energy, rule->delta * (1 + 1e-12));
    }
    reference_rows_check(&want, rows);
}

/* A rule of each kind at random; N is the number of columns it will meet. */
static sebp_rule random_rule(sebp_rule_kind kind, testing_values values, int64_t M)
{
    switch (kind) {
    case SEBP_RULE_THRESHOLD:
        return sebp_rule_threshold(values == TESTING_INTEGER ? (double)testing_between(0, 5)
                                                             : (testing_uniform() + 1) / 2);
    case SEBP_RULE_TOP:
        return sebp_rule_top(testing_between(1, M + 3));
    case SEBP_RULE_ENERGY:
        return sebp_rule_energy((double)testing_between(0, 15) / 16);
    default:
        return sebp_rule_nonzero();
    }
}

/* _i: the kind of rule. Integers make ties and shares that are met exactly. */
START_TEST(find)
{
    for (int round = 0; round < testing_rounds(250); round++) {
        int64_t M = testing_between(0, 150), N = testing_between(0, round % 3 ? 12 : 300);
        testing_values values = testing_chance(0.5) ? TESTING_REAL : TESTING_INTEGER;
        sebp_matrix dy = random_gradient(M, N, testing_chance(0.5) ? SEBP_F32 : SEBP_BF16, values);
        sebp_rule rule = random_rule((sebp_rule_kind)_i, values, M);
        find_and_check(&dy, &rule);
        testing_release(&dy);
    }
}
END_TEST

/* A single element decides, wherever it stands in the row. */
START_TEST(find_one_element)
{
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        for (int64_t N = 1; N <= 150; N += N < 40 ? 1 : 13) {
            sebp_matrix dy = testing_matrix(N, N, N + N % 3, (sebp_dtype)dtype);
            for (int64_t i = 0; i < N; i++) {
                for (int64_t j = 0; j < N; j++) {
                    testing_set(&dy, i, j, i == j && i % 2 ? -1.0 : -0.0);
                }
            }
            sebp_rows *rows = NULL;
            testing_succeed(sebp_rows_find(context, &dy, NULL, &rows), context);
            ck_assert_int_eq(sebp_rows_count(rows), N / 2);
            for (int64_t r = 0; r < N / 2; r++) {
                ck_assert_int_eq(sebp_rows_indices(rows)[r], 2 * r + 1);
            }
            sebp_rows_destroy(rows);
            testing_release(&dy);
        }
    }
}
END_TEST

/* Rows are judged by their elements, not their sum; denormals are not zero. */
START_TEST(find_what_sums_hide)
{
    sebp_matrix dy = testing_matrix(4, 2, 2, SEBP_F32);
    const float values[4][2] = {{1, -1}, {0.0f, -0.0f}, {FLT_TRUE_MIN, 0}, {-FLT_TRUE_MIN, 0}};
    memcpy(dy.data, values, sizeof values);
    const sebp_rule rules[] = {sebp_rule_nonzero(), sebp_rule_threshold(0), sebp_rule_top(4),
                               sebp_rule_energy(0), sebp_rule_threshold(1e-300)};
    for (size_t r = 0; r < sizeof rules / sizeof rules[0]; r++) {
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_find(context, &dy, &rules[r], &rows), context);
        ck_assert_msg(sebp_rows_count(rows) == 3, "rule %zu", r);
        sebp_rows_destroy(rows);
        find_and_check(&dy, &rules[r]);
    }
    testing_release(&dy);
}
END_TEST

/* The threshold is a double: rows at it are dropped, rows a hair over it are kept. */
START_TEST(find_at_the_threshold)
{
    sebp_matrix dy = testing_matrix(3, 1, 1, SEBP_F32);
    testing_set(&dy, 0, 0, 0.1f); /* over 0.1 in double */
    testing_set(&dy, 1, 0, -0.1f);
    testing_set(&dy, 2, 0, nextafterf(0.1f, 0));
    sebp_rows *rows = NULL;
    const sebp_rule below = sebp_rule_threshold(0.1), at = sebp_rule_threshold((double)0.1f);
    testing_succeed(sebp_rows_find(context, &dy, &below, &rows), context);
    ck_assert_int_eq(sebp_rows_count(rows), 2);
    sebp_rows_destroy(rows);
    testing_succeed(sebp_rows_find(context, &dy, &at, &rows), context);
    ck_assert_int_eq(sebp_rows_count(rows), 0);
    sebp_rows_destroy(rows);
    testing_set(&dy, 1, 0, FLT_MAX);
    testing_set(&dy, 2, 0, INFINITY);
    const sebp_rule huge = sebp_rule_threshold(1e300), inf = sebp_rule_threshold(INFINITY);
    find_and_check(&dy, &huge);
    find_and_check(&dy, &inf);
    testing_succeed(sebp_rows_find(context, &dy, &inf, &rows), context);
    ck_assert_int_eq(sebp_rows_count(rows), 1);
    sebp_rows_destroy(rows);
    testing_release(&dy);
}
END_TEST

/* Ties go to the lowest index, however the elements of equal rows are ordered. */
START_TEST(find_ties)
{
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t M = testing_between(2, 120), N = testing_between(2, 40);
        sebp_matrix dy = testing_matrix(M, N, N, testing_chance(0.5) ? SEBP_F32 : SEBP_BF16);
        for (int64_t i = 0; i < M; i++) {
            int64_t at = testing_between(0, N - 1);
            int64_t size = testing_between(0, 2);
            for (int64_t j = 0; j < N; j++) {
                testing_set(&dy, i, j, j == at ? (double)size : 0);
            }
        }
        sebp_rule rule = sebp_rule_top(testing_between(1, M));
        find_and_check(&dy, &rule);
        rule = sebp_rule_energy((double)testing_between(0, 31) / 32);
        find_and_check(&dy, &rule);
        testing_release(&dy);
    }
}
END_TEST

/* Energy keeps the fewest rows: dropping one more would drop too much. */
START_TEST(energy_is_minimal)
{
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t M = testing_between(1, 120), N = testing_between(1, 60);
        sebp_matrix dy = testing_matrix(M, N, N, SEBP_F32);
        testing_fill(&dy, TESTING_REAL);
        double total = 0, *energies = calloc((size_t)M, sizeof *energies);
        for (int64_t i = 0; i < M; i++) {
            double scale = ldexp(1, (int)testing_between(-20, 20));
            for (int64_t j = 0; j < N; j++) {
                testing_set(&dy, i, j, testing_get(&dy, i, j) * scale);
                energies[i] += testing_get(&dy, i, j) * testing_get(&dy, i, j);
            }
            total += energies[i];
        }
        double delta = pow(10, -testing_between(1, 16));
        sebp_rule rule = sebp_rule_energy(delta);
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_find(context, &dy, &rule, &rows), context);
        const int64_t *kept = sebp_rows_indices(rows);
        double dropped = 0, min_kept = INFINITY, max_dropped = 0;
        int64_t next = 0;
        for (int64_t i = 0; i < M; i++) {
            if (next < sebp_rows_count(rows) && kept[next] == i) {
                min_kept = fmin(min_kept, energies[i]);
                next++;
            } else {
                dropped += energies[i];
                max_dropped = fmax(max_dropped, energies[i]);
            }
        }
        ck_assert_int_gt(next, 0);
        ck_assert_double_le(dropped, delta * total * (1 + 1e-9));
        ck_assert_double_gt(dropped + min_kept, delta * total * (1 - 1e-9));
        ck_assert_double_le(max_dropped, min_kept * (1 + 1e-9));
        sebp_rows_destroy(rows);
        free(energies);
        testing_release(&dy);
    }
}
END_TEST

/* Squared norms reach beyond the range of float, at both ends. */
START_TEST(find_extreme_magnitudes)
{
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        sebp_matrix dy = testing_matrix(6, 33, 40, (sebp_dtype)dtype);
        static const int exponents[] = {-126, 120, -120, 126, 0, 125};
        for (int64_t i = 0; i < dy.rows; i++) {
            for (int64_t j = 0; j < dy.cols; j++) {
                testing_set(&dy, i, j, ldexp(1, exponents[i]));
            }
        }
        for (int64_t count = 1; count <= 6; count++) {
            sebp_rule rule = sebp_rule_top(count);
            find_and_check(&dy, &rule);
        }
        static const double deltas[] = {0, 1e-70, 1e-60, 1e-3, 0.3, 0.999};
        for (size_t d = 0; d < sizeof deltas / sizeof deltas[0]; d++) {
            sebp_rule rule = sebp_rule_energy(deltas[d]);
            find_and_check(&dy, &rule);
        }
        testing_release(&dy);
    }
}
END_TEST

START_TEST(find_nan_and_inf)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        int64_t M = testing_between(1, 60), N = testing_between(1, 70);
        sebp_matrix dy =
            random_gradient(M, N, testing_chance(0.5) ? SEBP_F32 : SEBP_BF16, TESTING_INTEGER);
        for (int64_t spoilt = testing_between(1, 4); spoilt > 0; spoilt--) {
            static const double values[] = {NAN, INFINITY, -INFINITY};
            testing_set(&dy, testing_between(0, M - 1), testing_between(0, N - 1),
                        values[testing_between(0, 2)]);
        }
        for (int kind = SEBP_RULE_NONZERO; kind <= SEBP_RULE_ENERGY; kind++) {
            sebp_rule rule = random_rule((sebp_rule_kind)kind, TESTING_INTEGER, M);
            find_and_check(&dy, &rule);
        }
        sebp_rule highest = sebp_rule_threshold(INFINITY);
        find_and_check(&dy, &highest);
        testing_release(&dy);
    }
}
END_TEST

/* A negative NaN and one with a small payload are NaN as well. */
START_TEST(find_odd_nans)
{
    static const uint32_t bits[] = {0x7F800001, 0xFF800001, 0xFFC00000, 0x7FFFFFFF};
    static const uint16_t halves[] = {0x7F81, 0xFF81, 0xFFC0, 0x7FFF};
    for (int which = 0; which < 4; which++) {
        for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
            sebp_matrix dy = testing_matrix(3, 37, 37, (sebp_dtype)dtype);
            for (int64_t at = 0; at < dy.rows * dy.cols; at++) {
                testing_set(&dy, at / dy.cols, at % dy.cols, 0.0);
            }
            int64_t at = dy.stride + testing_between(0, 36);
            if (dtype == SEBP_F32) {
                memcpy((float *)dy.data + at, &bits[which], sizeof bits[which]);
            } else {
                ((uint16_t *)dy.data)[at] = halves[which];
            }
            const sebp_rule rules[] = {sebp_rule_nonzero(), sebp_rule_threshold(INFINITY),
                                       sebp_rule_top(2), sebp_rule_energy(0.9)};
            for (int r = 0; r < 4; r++) {
                sebp_rows *rows = NULL;
                testing_succeed(sebp_rows_find(context, &dy, &rules[r], &rows), context);
                ck_assert_int_eq(sebp_rows_count(rows), 1);
                ck_assert_int_eq(sebp_rows_indices(rows)[0], 1);
                sebp_rows_destroy(rows);
            }
            testing_release(&dy);
        }
    }
}
END_TEST

/* The result does not hang on the number of threads. */
START_TEST(find_with_any_threads)
{
    for (int round = 0; round < testing_rounds(30); round++) {
        sebp_matrix dy = random_gradient(testing_between(1, 800), testing_between(1, 40), SEBP_F32,
                                         TESTING_REAL);
        sebp_rule rule = random_rule((sebp_rule_kind)(round % 4), TESTING_REAL, dy.rows);
        reference_rows want = reference_rows_find(&dy, &rule);
        for (int threads = 1; threads <= 4; threads++) {
            sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
            options.threads = threads;
            sebp_context *other = NULL;
            testing_succeed(sebp_context_create(&options, &other), context);
            sebp_rows *rows = NULL;
            testing_succeed(sebp_rows_find(other, &dy, &rule, &rows), context);
            ck_assert(reference_rows_equal(&want, rows));
            sebp_rows_destroy(rows);
            sebp_context_destroy(other);
        }
        reference_rows_free(&want);
        testing_release(&dy);
    }
}
END_TEST

/* What other sets than found ones drop. */
START_TEST(dropped_by_any_set)
{
    for (int round = 0; round < testing_rounds(100); round++) {
        int64_t M = testing_between(0, 80), N = testing_between(0, 50);
        sebp_matrix dy =
            random_gradient(M, N, testing_chance(0.5) ? SEBP_F32 : SEBP_BF16, TESTING_INTEGER);
        if (M > 0 && N > 0 && round % 5 == 0) {
            testing_set(&dy, testing_between(0, M - 1), 0, round % 2 ? NAN : INFINITY);
        }
        reference_rows some = reference_rows_none(M);
        for (int64_t i = 0; i < M; i++) {
            if (testing_chance(0.5)) {
                some.indices[some.count++] = i;
            }
        }
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_from_indices(some.indices, some.count, M, &rows), context);
        sebp_dropped want = reference_dropped(&dy, &some), got = {-1, -1};
        testing_succeed(sebp_rows_dropped(context, &dy, rows, &got), context);
        ck_assert_int_eq(got.rows, want.rows);
        ck_assert(got.energy == want.energy || (isnan(got.energy) && isnan(want.energy)) ||
                  fabs(got.energy - want.energy) < 1e-12);
        reference_rows_check(&some, rows);
        testing_release(&dy);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("rows find");
    TCase *rules = tcase_create("rows find");
    tcase_add_checked_fixture(rules, make_context, destroy_context);
    tcase_add_loop_test(rules, find, SEBP_RULE_NONZERO, SEBP_RULE_ENERGY + 1);
    tcase_add_test(rules, find_one_element);
    tcase_add_test(rules, find_what_sums_hide);
    tcase_add_test(rules, find_at_the_threshold);
    tcase_add_test(rules, find_ties);
    tcase_add_test(rules, energy_is_minimal);
    tcase_add_test(rules, find_extreme_magnitudes);
    tcase_add_test(rules, find_nan_and_inf);
    tcase_add_test(rules, find_odd_nans);
    tcase_add_test(rules, find_with_any_threads);
    tcase_add_test(rules, dropped_by_any_set);
    suite_add_tcase(suite, rules);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
