/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AdamW's dense step against double precision and exactly where a step is a round number, weight decay, and
 * their bad input.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <sebp/sebp.h>

#include "optim.h"
#include "testing.h"

/* What a step is made on. */
typedef struct problem {
    sebp_matrix gradient, w, moment1, moment2;
} problem;

static problem random_problem(int64_t rows, int64_t cols)
{
    problem p = {testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL),
                 testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL),
                 testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL),
                 testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL)};
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            testing_set(&p.moment2, i, j, fabs(testing_uniform()));
        }
    }
    return p;
}

static problem copy_problem(const problem *p)
{
    return (problem){testing_copy(&p->gradient), testing_copy(&p->w), testing_copy(&p->moment1),
                     testing_copy(&p->moment2)};
}

static int same_problem(const problem *a, const problem *b)
{
    return testing_same_bits(&a->gradient, &b->gradient) && testing_same_bits(&a->w, &b->w) &&
           testing_same_bits(&a->moment1, &b->moment1) &&
           testing_same_bits(&a->moment2, &b->moment2);
}

static void free_problem(problem *p)
{
    testing_release(&p->gradient);
    testing_release(&p->w);
    testing_release(&p->moment1);
    testing_release(&p->moment2);
}

/* One element of the formula in optim.h. What rounding may take a result away by: each of the few
 * operations behind it rounds once, and so did each factor. */
static void check_element(const problem *was, const problem *is, int64_t i, int64_t j, double t,
                          const sebp_adamw_options *by)
{
    const double eps = FLT_EPSILON, tiny = FLT_MIN;
    double g = testing_get(&was->gradient, i, j);
    double from1 = by->beta1 * testing_get(&was->moment1, i, j), gain1 = (1 - by->beta1) * g;
    double from2 = by->beta2 * testing_get(&was->moment2, i, j), gain2 = (1 - by->beta2) * g * g;
    double m = from1 + gain1, m_bound = 2 * eps * (fabs(from1) + fabs(gain1)) + tiny;
    double v = from2 + gain2, v_bound = 3 * eps * v + tiny;
    double root = sqrt(v) / sqrt(1 - pow(by->beta2, t)) + by->epsilon;
    double rate = by->learning_rate / (1 - pow(by->beta1, t));
    double s = -rate * m / root, s_bound = 8 * eps * fabs(s) + rate * m_bound / root;
    double kept = (1 - by->learning_rate * by->weight_decay) * testing_get(&was->w, i, j);
    double w = kept + s, w_bound = 2 * eps * (fabs(kept) + fabs(s)) + s_bound + tiny;
    w_bound += is->w.dtype == SEBP_BF16 ? 0x1p-8 * (fabs(w) + w_bound) : 0;
    double got[3] = {testing_get(&is->moment1, i, j), testing_get(&is->moment2, i, j),
                     testing_get(&is->w, i, j)};
    if (!(fabs(got[0] - m) <= m_bound) || !(fabs(got[1] - v) <= v_bound) ||
        !(fabs(got[2] - w) <= w_bound)) {
        ck_abort_msg("(%" PRId64 ", %" PRId64 "): %g %g %g, not %g %g %g", i, j, got[0], got[1],
                     got[2], m, v, w);
    }
}

START_TEST(dense_step_is_within_the_error_bound)
{
    for (int round = 0; round < testing_rounds(300); round++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), 0);
        problem p = random_problem(optim_size(), optim_size());
        problem was = copy_problem(&p);
        sebp_adamw_options options = optim_options();
        int64_t t = testing_chance(0.5) ? testing_between(1, 4) : testing_between(1, 100000);
        testing_succeed(
            sebp_adamw_step(context, &p.gradient, t, &options, &p.w, &p.moment1, &p.moment2),
            context);
        ck_assert(testing_same_bits(&p.gradient, &was.gradient));
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                check_element(&was, &p, i, j, (double)t, &options);
            }
        }
        free_problem(&p);
        free_problem(&was);
        sebp_context_destroy(context);
    }
}
END_TEST

/* The first step is lr against the sign of the gradient, whatever its size. With powers of two for
 * factors and an epsilon that vanishes beside it, every operation is exact. */
START_TEST(first_dense_step_is_exact)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.25;
    options.beta1 = 0.5;
    options.beta2 = 0.75;
    options.epsilon = 1e-30;
    options.weight_decay = 0.5;
    for (int round = 0; round < testing_rounds(40); round++) {
        problem p = random_problem(testing_between(1, 40), testing_between(1, 40));
        testing_fill(&p.gradient, TESTING_INTEGER);
        testing_fill(&p.w, TESTING_INTEGER);
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                testing_set(&p.moment1, i, j, 0);
                testing_set(&p.moment2, i, j, 0);
            }
        }
        problem was = copy_problem(&p);
        testing_succeed(
            sebp_adamw_step(context, &p.gradient, 1, &options, &p.w, &p.moment1, &p.moment2),
            context);
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                double g = testing_get(&was.gradient, i, j);
                double w = 0.875 * testing_get(&was.w, i, j) - (g > 0 ? 0.25 : -0.25);
                if (testing_get(&p.w, i, j) != w || testing_get(&p.moment1, i, j) != 0.5 * g ||
                    testing_get(&p.moment2, i, j) != 0.25 * g * g) {
                    ck_abort_msg("w is %a, not %a", testing_get(&p.w, i, j), w);
                }
            }
        }
        free_problem(&p);
        free_problem(&was);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(dense_step_and_decay_do_not_depend_on_threads)
{
    testing_host host = {0};
    for (int round = 0; round < testing_rounds(6); round++) {
        /* Large enough to be split, with gaps between rows and without. */
        problem start = random_problem(testing_between(5, 7), testing_between(30000, 60000));
        problem first = {0};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context =
                testing_hosted_context(SEBP_GEMM_AUTO, threads, 0, threads == 5 ? &host : NULL);
            problem p = copy_problem(&start);
            for (int64_t t = 1; t <= 2; t++) {
                testing_succeed(
                    sebp_adamw_step(context, &p.gradient, t, NULL, &p.w, &p.moment1, &p.moment2),
                    context);
            }
            testing_succeed(sebp_weight_decay(context, NULL, &p.w), context);
            sebp_context_destroy(context);
            if (threads == 1) {
                ck_assert(!testing_same_bits(&p.w, &start.w));
                first = p;
            } else {
                ck_assert_msg(same_problem(&p, &first), "%d threads", threads);
                free_problem(&p);
            }
        }
        free_problem(&first);
        free_problem(&start);
    }
    ck_assert_int_ge(host.most_tasks, 5);
}
END_TEST

START_TEST(decay_scales)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.5;
    options.weight_decay = 1.0 / 3;
    for (int round = 0; round < testing_rounds(60); round++) {
        sebp_matrix w =
            testing_random_matrix(optim_size(), optim_size(), testing_dtype(), TESTING_REAL);
        sebp_matrix was = testing_copy(&w);
        testing_succeed(sebp_weight_decay(context, &options, &w), context);
        for (int64_t i = 0; i < w.rows; i++) {
            for (int64_t j = 0; j < w.cols; j++) {
                float want = (float)(1 - options.learning_rate * options.weight_decay) *
                             (float)testing_get(&was, i, j);
                testing_set(&was, i, j, (double)want);
            }
        }
        ck_assert(testing_same_bits(&w, &was));
        testing_release(&w);
        testing_release(&was);
    }
    /* No decay: not even a NaN is touched. */
    sebp_matrix poison = testing_matrix(3, 5, 7, SEBP_F32);
    sebp_matrix was = testing_copy(&poison);
    options.weight_decay = 0;
    testing_succeed(sebp_weight_decay(context, &options, &poison), context);
    ck_assert(testing_same_bits(&poison, &was));
    testing_release(&poison);
    testing_release(&was);
    sebp_context_destroy(context);
}
END_TEST

/* A good dense call, changed before it is made; it fails and leaves everything as it was. */
#define DENSE(want, word, change)                                                                  \
    do {                                                                                           \
        problem p = copy_problem(&good), was;                                                      \
        sebp_matrix *gradient = &p.gradient, *w = &p.w, *moment1 = &p.moment1;                     \
        sebp_matrix *moment2 = &p.moment2;                                                         \
        sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;                                      \
        int64_t t = 1;                                                                             \
        problem views = p;                                                                         \
        change;                                                                                    \
        was = copy_problem(&views);                                                                \
        sebp_status got = sebp_adamw_step(context, gradient, t, &options, w, moment1, moment2);    \
        ck_assert_msg(got == (want), "%s: %s", #change, sebp_status_string(got));                  \
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", #change,  \
                      sebp_context_message(context));                                              \
        ck_assert_msg(same_problem(&views, &was), "%s: written to", #change);                      \
        free_problem(&was);                                                                        \
        free_problem(&views);                                                                      \
        (void)gradient, (void)w, (void)moment1, (void)moment2;                                     \
    } while (0)

#define DENSE_VIEW(name)                                                                           \
    do {                                                                                           \
        DENSE(SEBP_ERROR_NULL, #name, name = NULL);                                                \
        DENSE(SEBP_ERROR_NULL, #name, name->data = NULL);                                          \
        DENSE(SEBP_ERROR_SIZE, #name, name->rows = -1);                                            \
        DENSE(SEBP_ERROR_DTYPE, #name, name->dtype = (sebp_dtype)2);                               \
        DENSE(SEBP_ERROR_STRIDE, #name, name->stride = 1);                                         \
        DENSE(SEBP_ERROR_OVERFLOW, #name, name->stride = INT64_MAX);                               \
    } while (0)

START_TEST(dense_step_refuses_bad_input)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    problem good = random_problem(9, 9);
    for (size_t i = 0; i < 2; i++) { /* either dtype of gradient and weight, in turn */
        testing_release(&good.gradient);
        testing_release(&good.w);
        good.gradient = testing_random_matrix(9, 9, (sebp_dtype)i, TESTING_REAL);
        good.w = testing_random_matrix(9, 9, (sebp_dtype)(1 - i), TESTING_REAL);
        DENSE_VIEW(gradient);
        DENSE_VIEW(w);
        DENSE_VIEW(moment1);
        DENSE_VIEW(moment2);
        DENSE(SEBP_ERROR_DTYPE, "moment1", moment1->dtype = SEBP_BF16);
        DENSE(SEBP_ERROR_DTYPE, "moment2", moment2->dtype = SEBP_BF16);
        DENSE(SEBP_ERROR_SHAPE, "w", w->rows--);
        DENSE(SEBP_ERROR_SHAPE, "moment1", moment1->cols--);
        DENSE(SEBP_ERROR_SHAPE, "moment2", moment2->rows--);
        DENSE(SEBP_ERROR_SHAPE, "w", gradient->cols--);
        DENSE(SEBP_ERROR_ALIAS, "moment", moment1->data = moment2->data);
        DENSE(SEBP_ERROR_ALIAS, "w", w->data = moment1->data);
        if (i == SEBP_F32) { /* else it may not suit w's dtype */
            DENSE(SEBP_ERROR_ALIAS, "w", w->data = gradient->data);
        }
        DENSE(SEBP_ERROR_VALUE, "step", t = 0);
        DENSE(SEBP_ERROR_VALUE, "step", t = INT64_MIN);
        DENSE(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes--);
        DENSE(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 0);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = -1e-9);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = NAN);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = INFINITY);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = 1e300);
        DENSE(SEBP_ERROR_VALUE, "beta1", options.beta1 = 1);
        DENSE(SEBP_ERROR_VALUE, "beta1", options.beta1 = -0.1);
        DENSE(SEBP_ERROR_VALUE, "beta2", options.beta2 = 1);
        DENSE(SEBP_ERROR_VALUE, "beta2", options.beta2 = NAN);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = 0);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = 1e-60);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = -1);
        DENSE(SEBP_ERROR_VALUE, "weight_decay", options.weight_decay = -1);
        DENSE(SEBP_ERROR_VALUE, "weight_decay", options.weight_decay = INFINITY);
        /* Each fits into f32, what is computed of them does not. */
        DENSE(SEBP_ERROR_VALUE, "learning_rate * weight_decay",
              (options.learning_rate = 1e20, options.weight_decay = 1e20));
        DENSE(SEBP_ERROR_VALUE, "learning_rate / (1 - beta1^t)",
              (options.learning_rate = 1e38, options.weight_decay = 0, t = 1));
        DENSE(SEBP_ERROR_VALUE, "learning_rate / (1 - beta1^t)",
              (options.learning_rate = 1e23, options.beta1 = 1 - 0x1p-53, t = 1));
        const double odd[] = {NAN, INFINITY, -INFINITY};
        for (int at = 0; at < 9; at++) {
            DENSE(SEBP_ERROR_NONFINITE, "gradient", testing_set(gradient, at, 8 - at, odd[at % 3]));
        }
    }
    ck_assert_int_eq(
        sebp_adamw_step(NULL, &good.gradient, 1, NULL, &good.w, &good.moment1, &good.moment2),
        SEBP_ERROR_NULL);
    free_problem(&good);
    sebp_context_destroy(context);
}
END_TEST

/* Many rows are looked at together where they lie without gaps. */
START_TEST(dense_step_names_the_first_row_that_is_not_finite)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    for (int round = 0; round < testing_rounds(24); round++) {
        int64_t rows = testing_between(1, 9000), cols = testing_between(1, 3);
        int64_t stride = cols + (testing_chance(0.3) ? testing_between(1, 3) : 0);
        sebp_dtype dtype = testing_dtype();
        problem p = {testing_matrix(rows, cols, stride, dtype),
                     testing_matrix(rows, cols, stride, dtype),
                     testing_matrix(rows, cols, stride, SEBP_F32),
                     testing_matrix(rows, cols, stride, SEBP_F32)};
        testing_fill(&p.gradient, TESTING_REAL);
        int64_t later = testing_between(0, rows - 1), first = testing_between(0, later);
        if (testing_chance(0.3)) /* in the rows that are over where the others are put together */
            first = later = rows - 1;
        testing_set(&p.gradient, later, testing_between(0, cols - 1), INFINITY);
        testing_set(&p.gradient, first, testing_between(0, cols - 1), NAN);
        problem was = copy_problem(&p);
        testing_expect(sebp_adamw_step(context, &p.gradient, 1, NULL, &p.w, &p.moment1, &p.moment2),
                       SEBP_ERROR_NONFINITE, context);
        char word[64];
        snprintf(word, sizeof word, "row %" PRId64 " of gradient", first);
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s, not %s",
                      sebp_context_message(context), word);
        ck_assert(same_problem(&p, &was));
        free_problem(&p);
        free_problem(&was);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(decay_refuses_bad_input)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix w = testing_random_matrix(3, 4, SEBP_F32, TESTING_REAL), was = testing_copy(&w),
                bad = w;
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    ck_assert_int_eq(sebp_weight_decay(NULL, NULL, &w), SEBP_ERROR_NULL);
    testing_expect(sebp_weight_decay(context, NULL, NULL), SEBP_ERROR_NULL, context);
    bad.stride = 3;
    testing_expect(sebp_weight_decay(context, NULL, &bad), SEBP_ERROR_STRIDE, context);
    options.size_bytes--;
    testing_expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_SIZE, context);
    options.size_bytes++;
    options.weight_decay = NAN;
    testing_expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_VALUE, context);
    options.learning_rate = options.weight_decay = 2e19;
    testing_expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_VALUE, context);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "learning_rate * weight_decay"));
    ck_assert(testing_same_bits(&w, &was));
    /* As a decay is no step, it does not divide by 1 - beta1^t. */
    options.learning_rate = 1e38;
    options.weight_decay = 1e-38;
    testing_succeed(sebp_weight_decay(context, &options, &w), context);
    for (int64_t i = 0; i < 3; i++) {
        for (int64_t j = 0; j < 4; j++) {
            ck_assert(fabs(testing_get(&w, i, j)) < 1e-6);
        }
    }
    testing_release(&w);
    testing_release(&was);
    sebp_context_destroy(context);
}
END_TEST

/* Nothing to step on is a step all the same. */
START_TEST(empty_steps_are_legal)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_matrix none = {NULL, 0, 5, 5, SEBP_F32};
    testing_succeed(sebp_adamw_step(context, &none, 1, NULL, &none, &none, &none), context);
    none = (sebp_matrix){NULL, 5, 0, 0, SEBP_F32};
    testing_succeed(sebp_adamw_step(context, &none, 1, NULL, &none, &none, &none), context);
    testing_succeed(sebp_weight_decay(context, NULL, &none), context);

    const int64_t nothing[1] = {0};
    for (int fixed = 0; fixed < 2; fixed++) {
        sebp_sparse_adamw *state = NULL;
        ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, fixed ? nothing : NULL, 0, &state),
                         SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_support(state) != NULL, fixed);
        sebp_sparse empty = {NULL, NULL, 0, 3, 5};
        testing_succeed(sebp_sparse_adamw_step(context, state, NULL, &empty), context);
        ck_assert_int_eq(sebp_sparse_adamw_steps(state), 1);
        ck_assert_int_eq(sebp_sparse_adamw_count(state), 0);
        ck_assert_int_eq(sebp_sparse_adamw_export(state, NULL, NULL, NULL), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_import(state, 9, NULL, NULL, NULL, 0), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_steps(state), 9);
        sebp_sparse_adamw_destroy(state);
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("optim");
    TCase *dense = tcase_create("dense");
    tcase_add_test(dense, dense_step_is_within_the_error_bound);
    tcase_add_test(dense, first_dense_step_is_exact);
    tcase_add_test(dense, dense_step_and_decay_do_not_depend_on_threads);
    tcase_add_test(dense, decay_scales);
    suite_add_tcase(suite, dense);
    TCase *bad = tcase_create("bad input");
    tcase_add_test(bad, dense_step_refuses_bad_input);
    tcase_add_test(bad, dense_step_names_the_first_row_that_is_not_finite);
    tcase_add_test(bad, decay_refuses_bad_input);
    tcase_add_test(bad, empty_steps_are_legal);
    suite_add_tcase(suite, bad);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
