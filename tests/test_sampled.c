/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Chosen elements of dW: exact on small integers, near the result in double precision on others; the
 * same bits for every number of threads and any scratch memory; NaN and Inf; and bad input.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

/* A layer's gradient and input, the rows to compute, and the elements to keep. */
typedef struct problem {
    int64_t M, N, K;
    reference_rows active;
    sebp_rows *rows; /* NULL: found */
    sebp_matrix dy, x;
    sebp_sparse kept;
    sebp_linear_options options;
} problem;

/* `count` indices of `total`, ascending, each once; some lie together and some far apart. */
static void choose_indices(int64_t *indices, int64_t count, int64_t total)
{
    int64_t next = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t spare = total - next - (count - i); /* that may be passed by */
        int64_t step = testing_chance(0.5) ? 0 : testing_between(0, 2 * (spare / (count - i)) + 1);
        next += step < spare ? step : spare;
        indices[i] = next++;
    }
}

static problem make_problem(int64_t M, int64_t N, int64_t K, int64_t count, testing_values values)
{
    problem p = {.M = M, .N = N, .K = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    sebp_dtype dtype = testing_dtype();
    p.dy = testing_random_matrix(M, N, dtype, values);
    testing_zero_rows(&p.dy, testing_chance(0.1) ? 0 : testing_chance(0.3) ? 1 : 0.5);
    const sebp_rule rule = sebp_rule_nonzero();
    p.active = reference_rows_find(&p.dy, &rule);
    if (testing_chance(0.7)) {
        ck_assert_int_eq(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows),
                         SEBP_SUCCESS);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    for (int64_t i = 0; i < M && !p.options.x_is_compact; i++) {
        if (!reference_rows_have(&p.active, i)) /* not to be read */
            testing_set(&p.x, i, testing_between(0, K - 1), NAN);
    }
    p.kept = testing_sparse(count, N, K);
    choose_indices(p.kept.indices, count, N * K);
    return p;
}

static void free_problem(problem *p)
{
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->dy);
    testing_release(&p->x);
    testing_free_sparse(&p->kept);
}

static sebp_status run(sebp_context *context, const problem *p)
{
    return sebp_sampled_product(context, &p->dy, &p->x, p->rows, &p->options, &p->kept);
}

static int64_t random_count(int64_t total)
{
    return testing_chance(0.1) ? 1 : testing_chance(0.1) ? total : testing_between(1, total);
}

/* Computes the kept elements, and compares them with those of the whole dW in double precision: they
 * are equal where `is_exact`, else within the bound of a sum of m terms. Returns how many are not 0. */
static int64_t check_values(sebp_context *context, problem *p, int is_exact)
{
    double *before = testing_zeros(p->kept.count, sizeof *before);
    if (testing_chance(0.5)) {
        p->options.dw_write = SEBP_ACCUMULATE;
        for (int64_t i = 0; i < p->kept.count; i++) {
            p->kept.values[i] = is_exact ? (float)testing_between(-9, 9) : (float)testing_uniform();
            before[i] = (double)p->kept.values[i];
        }
    }
    reference dw = reference_dw(&p->dy, &p->x, &p->active, p->options.x_is_compact, NULL);
    testing_succeed(run(context, p), context);
    int64_t nonzeros = 0, old = -1;
    for (int64_t i = 0; i < p->kept.count; i++) {
        int64_t index = p->kept.indices[i];
        ck_assert_int_gt(index, old); /* as it was */
        old = index;
        double want = dw.value[index] + before[i], got = (double)p->kept.values[i];
        double size = dw.magnitude[index] + fabs(before[i]);
        double bound = is_exact ? 0 : (double)(dw.terms + 1) * (double)FLT_EPSILON * size;
        ck_assert_msg(fabs(got - want) <= bound, "element %" PRId64 " is %g, not %g", index, got,
                      want);
        nonzeros += want != 0;
    }
    testing_check(p->kept.indices);
    testing_check(p->kept.values);
    reference_free(&dw);
    free(before);
    return nonzeros;
}

START_TEST(exact_on_integers)
{
    int64_t nonzeros = 0;
    for (int round = 0; testing_goes_on(round, 200, nonzeros, 1000); round++) {
        sebp_context *context =
            testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), TESTING_MIN_SCRATCH);
        /* Of a small dW all is computed, of a large one the elements alone. */
        int is_large = testing_chance(0.3);
        int64_t N = is_large ? testing_between(150, 250) : testing_between(1, 70);
        int64_t K = is_large ? testing_between(150, 250) : testing_between(1, 70);
        problem p = make_problem(testing_between(1, testing_chance(0.1) ? 300 : 60), N, K,
                                 is_large ? testing_between(1, N * K / 20) : random_count(N * K),
                                 TESTING_INTEGER);
        nonzeros += check_values(context, &p, 1);
        free_problem(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* Rows of several blocks, and more elements than a thread is given alone. */
START_TEST(close_to_double_precision)
{
    int64_t nonzeros = 0;
    for (int round = 0; testing_goes_on(round, 12, nonzeros, 1000); round++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), 0);
        int64_t N = testing_between(100, 300), K = testing_between(100, 300);
        problem p = make_problem(testing_between(300, 1200), N, K, testing_between(1, N * K / 10),
                                 TESTING_REAL);
        nonzeros += check_values(context, &p, 0);
        free_problem(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* So many columns that only some fit in the least scratch memory at a time. */
START_TEST(threads_and_scratch_memory_leave_the_bits)
{
    for (int round = 0; round < testing_rounds(4); round++) {
        int64_t N = testing_between(20, 60), K = testing_between(4000, 6000);
        problem p =
            make_problem(testing_between(150, 400), N, K, testing_between(1, 20000), TESTING_REAL);
        float *want = NULL;
        for (int threads = 1; threads <= 4; threads++) {
            testing_host host = {0};
            int64_t scratch = threads == 1 ? 0 : TESTING_MIN_SCRATCH;
            sebp_context *context = testing_hosted_context(SEBP_GEMM_NATIVE, threads, scratch,
                                                           threads == 4 ? &host : NULL);
            size_t bytes = (size_t)p.kept.count * sizeof(float);
            memset(p.kept.values, TESTING_POISON, bytes);
            testing_succeed(run(context, &p), context);
            ck_assert(scratch == 0 || sebp_context_scratch_bytes(context) <= scratch);
            if (want == NULL) {
                want = malloc(bytes);
                ck_assert_ptr_nonnull(want);
                memcpy(want, p.kept.values, bytes);
            }
            ck_assert_mem_eq(p.kept.values, want, bytes);
            sebp_context_destroy(context);
        }
        free(want);
        free_problem(&p);
    }
}
END_TEST

/* Each element has the bits that it has alone: they do not depend on the others that are kept. */
START_TEST(an_element_does_not_depend_on_the_others)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    problem p = make_problem(150, 400, 500, 300, TESTING_REAL);
    testing_succeed(run(context, &p), context);
    for (int round = 0; round < testing_rounds(30); round++) {
        int64_t i = testing_between(0, p.kept.count - 1);
        float value = NAN;
        sebp_sparse one = {&p.kept.indices[i], &value, 1, 400, 500};
        testing_succeed(sebp_sampled_product(context, &p.dy, &p.x, p.rows, &p.options, &one),
                        context);
        ck_assert_mem_eq(&value, &p.kept.values[i], sizeof value);
    }
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(indices_of_more_than_32_bits)
{
    enum { SIZE = 70000, COUNT = 3 };
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, TESTING_MIN_SCRATCH);
    sebp_matrix dy = testing_random_matrix(2, SIZE, SEBP_F32, TESTING_INTEGER);
    sebp_matrix x = testing_random_matrix(2, SIZE, SEBP_F32, TESTING_INTEGER);
    sebp_sparse kept = testing_sparse(COUNT, SIZE, SIZE);
    const int64_t rows[COUNT] = {3, 45678, SIZE - 1}, cols[COUNT] = {SIZE - 1, 5, SIZE - 1};
    for (int i = 0; i < COUNT; i++)
        kept.indices[i] = rows[i] * SIZE + cols[i];
    testing_succeed(sebp_sampled_product(context, &dy, &x, NULL, NULL, &kept), context);
    for (int i = 0; i < COUNT; i++) {
        double want = testing_get(&dy, 0, rows[i]) * testing_get(&x, 0, cols[i]) +
                      testing_get(&dy, 1, rows[i]) * testing_get(&x, 1, cols[i]);
        ck_assert_double_eq((double)kept.values[i], want);
    }
    testing_free_sparse(&kept);
    testing_release(&dy);
    testing_release(&x);
    sebp_context_destroy(context);
}
END_TEST

/* With no active row X is not read; with no element kept nothing is. */
START_TEST(no_rows_and_no_elements)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix dy = testing_matrix(7, 5, 5, SEBP_F32), x = testing_matrix(7, 6, 6, SEBP_F32);
    memset(dy.data, 0, 7 * 5 * sizeof(float)); /* X is poison */
    sebp_sparse kept = testing_sparse(4, 5, 6);
    choose_indices(kept.indices, 4, 30);
    testing_succeed(sebp_sampled_product(context, &dy, &x, NULL, NULL, &kept), context);
    for (int64_t i = 0; i < 4; i++) {
        ck_assert(kept.values[i] == 0);
        kept.values[i] = (float)(i + 1);
    }
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.dw_write = SEBP_ACCUMULATE;
    testing_succeed(sebp_sampled_product(context, &dy, &x, NULL, &options, &kept), context);
    for (int64_t i = 0; i < 4; i++)
        ck_assert(kept.values[i] == (float)(i + 1));
    const sebp_sparse none = {NULL, NULL, 0, 5, 6};
    testing_poison(&dy);
    testing_succeed(sebp_sampled_product(context, &dy, &x, NULL, NULL, &none), context);
    testing_free_sparse(&kept);
    testing_release(&dy);
    testing_release(&x);
    sebp_context_destroy(context);
}
END_TEST

/* What is not kept may be NaN or Inf; what is kept may not, nor what it becomes by being added to. */
START_TEST(nan_and_inf)
{
    enum { COUNT = 3 };
    const int64_t N = _i == 0 ? 5 : 200, K = _i == 0 ? 6 : 300; /* all of dW, and elements alone */
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix dy = testing_random_matrix(9, N, SEBP_F32, TESTING_INTEGER);
    sebp_matrix x = testing_random_matrix(9, K, SEBP_F32, TESTING_INTEGER);
    sebp_sparse kept = testing_sparse(COUNT, N, K);
    const int64_t indices[COUNT] = {0, K + 1, 2 * K + 2}; /* (0, 0), (1, 1), (2, 2) */
    memcpy(kept.indices, indices, sizeof indices);
    testing_set(&dy, 4, 3, NAN);
    testing_set(&x, 5, 5, INFINITY);
    testing_succeed(sebp_sampled_product(context, &dy, &x, NULL, NULL, &kept), context);
    for (int i = 0; i < COUNT; i++)
        ck_assert(isfinite(kept.values[i]));

    const float old[COUNT] = {1, 2, FLT_MAX};
    memcpy(kept.values, old, sizeof old);
    const double odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        double was = testing_get(&x, 3, 1);
        testing_set(&x, 3, 1, odd[i]);
        testing_refuse(sebp_sampled_product(context, &dy, &x, NULL, NULL, &kept),
                       SEBP_ERROR_NONFINITE, "of kept is", context);
        ck_assert_mem_eq(kept.values, old, sizeof old);
        testing_set(&x, 3, 1, was);
    }
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.dw_write = SEBP_ACCUMULATE;
    for (int64_t i = 0; i < 9; i++) {
        testing_set(&dy, i, 2, 1e18);
        testing_set(&x, i, 2, 1e19);
    }
    testing_refuse(sebp_sampled_product(context, &dy, &x, NULL, &options, &kept),
                   SEBP_ERROR_NONFINITE, "element 2 of kept is", context);
    ck_assert_mem_eq(kept.values, old, sizeof old);
    testing_free_sparse(&kept);
    testing_release(&dy);
    testing_release(&x);
    sebp_context_destroy(context);
}
END_TEST

/* A good call, changed before it is made. */
#define REFUSES(want, word, change)                                                                \
    do {                                                                                           \
        sebp_matrix dy_view = p.dy, x_view = p.x, *dy = &dy_view, *x = &x_view;                    \
        sebp_sparse view = p.kept, *kept = &view;                                                  \
        const sebp_rows *rows = p.rows;                                                            \
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;                                    \
        int64_t indices[COUNT];                                                                    \
        memcpy(indices, p.kept.indices, sizeof indices);                                           \
        kept->indices = indices;                                                                   \
        change;                                                                                    \
        sebp_status got = sebp_sampled_product(context, dy, x, rows, &options, kept);              \
        ck_assert_msg(got == (want), "%s: %s", #change, sebp_status_string(got));                  \
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", #change,  \
                      sebp_context_message(context));                                              \
        for (int64_t i = 0; i < COUNT; i++)                                                        \
            ck_assert_msg(isnan(p.kept.values[i]), "%s: written to", #change);                     \
        ck_assert_msg(testing_same_bits(&p.dy, &dy_was), "%s: written to", #change);               \
    } while (0)

START_TEST(bad_input_is_refused)
{
    enum { COUNT = 10 };
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, TESTING_MIN_SCRATCH);
    problem p = {.dy = testing_random_matrix(8, 5, SEBP_F32, TESTING_REAL),
                 .x = testing_random_matrix(8, 6, SEBP_F32, TESTING_REAL),
                 .kept = testing_sparse(COUNT, 5, 6)};
    sebp_matrix dy_was = testing_copy(&p.dy);
    sebp_rows *other_rows = NULL, *weighted = NULL;
    const sebp_rule sample = sebp_rule_sampled(0.5, 1);
    testing_succeed(sebp_rows_sample(context, &p.dy, NULL, &sample, &weighted), context);
    ck_assert_ptr_nonnull(sebp_rows_weights(weighted));
    ck_assert_int_eq(sebp_rows_all(8, &p.rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_all(9, &other_rows), SEBP_SUCCESS);
    choose_indices(p.kept.indices, COUNT, 30);
    REFUSES(SEBP_ERROR_NULL, "dy", dy = NULL);
    REFUSES(SEBP_ERROR_NULL, "x", x = NULL);
    REFUSES(SEBP_ERROR_NULL, "kept", kept = NULL);
    REFUSES(SEBP_ERROR_NULL, "kept", kept->indices = NULL);
    REFUSES(SEBP_ERROR_NULL, "kept", kept->values = NULL);
    REFUSES(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 3);
    REFUSES(SEBP_ERROR_SIZE, "kept", kept->count = -1);
    REFUSES(SEBP_ERROR_VALUE, "kept", kept->count = 31);
    REFUSES(SEBP_ERROR_OVERFLOW, "kept", kept->rows = INT64_MAX);
    REFUSES(SEBP_ERROR_OVERFLOW, "kept",
            (kept->rows = (int64_t)1 << 61, kept->cols = 1, kept->count = ((int64_t)1 << 60) + 1));
    REFUSES(SEBP_ERROR_ROWS, "kept", indices[3] = indices[2]);
    REFUSES(SEBP_ERROR_ROWS, "kept", (indices[3] = indices[2], indices[2] = indices[3] + 1));
    REFUSES(SEBP_ERROR_ROWS, "kept", indices[0] = -1);
    REFUSES(SEBP_ERROR_ROWS, "kept", indices[COUNT - 1] = 30);
    REFUSES(SEBP_ERROR_SHAPE, "kept is 6x5", (kept->rows = 6, kept->cols = 5));
    REFUSES(SEBP_ERROR_STRIDE, "dy", dy->stride = 4);
    REFUSES(SEBP_ERROR_DTYPE, "x", x->dtype = SEBP_BF16);
    REFUSES(SEBP_ERROR_SHAPE, "x", x->rows = 7);
    REFUSES(SEBP_ERROR_ROWS, "9", rows = other_rows);
    REFUSES(SEBP_ERROR_ROWS, "x_is_compact", (rows = NULL, options.x_is_compact = 1));
    REFUSES(SEBP_ERROR_VALUE, "rule", (rows = NULL, options.rule.kind = (sebp_rule_kind)9));
    REFUSES(SEBP_ERROR_VALUE, "SEBP_RULE_SAMPLED", (rows = NULL, options.rule = sample));
    REFUSES(SEBP_ERROR_ROWS, "weights", rows = weighted);
    REFUSES(SEBP_ERROR_VALUE, "dw_write", options.dw_write = (sebp_write)2);
    REFUSES(SEBP_ERROR_VALUE, "precision", options.precision = (sebp_precision)9);
    REFUSES(SEBP_ERROR_VALUE, "residual", options.residual = &p.dy);
    REFUSES(SEBP_ERROR_ALIAS, "values of kept overlaps dy", kept->values = p.dy.data);
    REFUSES(SEBP_ERROR_ALIAS, "values of kept overlaps x", kept->values = p.x.data);
    REFUSES(SEBP_ERROR_ALIAS, "values of kept overlaps the indices",
            kept->values = (float *)(void *)indices);
    ck_assert_int_eq(sebp_sampled_product(NULL, &p.dy, &p.x, NULL, NULL, &p.kept), SEBP_ERROR_NULL);
    sebp_rows_destroy(other_rows);
    sebp_rows_destroy(weighted);
    testing_release(&dy_was);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sampled");
    TCase *tests = tcase_create("sampled");
    tcase_add_test(tests, exact_on_integers);
    tcase_add_test(tests, close_to_double_precision);
    tcase_add_test(tests, threads_and_scratch_memory_leave_the_bits);
    tcase_add_test(tests, an_element_does_not_depend_on_the_others);
    tcase_add_test(tests, indices_of_more_than_32_bits);
    tcase_add_test(tests, no_rows_and_no_elements);
    tcase_add_loop_test(tests, nan_and_inf, 0, 2);
    tcase_add_test(tests, bad_input_is_refused);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
