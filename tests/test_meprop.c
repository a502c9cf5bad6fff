/* SPDX-License-Identifier: Apache-2.0 */
/*
 * MeProp's gradient: exactly the k largest elements of dW, on small integers, where ties are many;
 * the same as choosing from the whole dW; and bad input.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

/* A layer's gradient and input, and the rows to compute. */
typedef struct problem {
    int64_t M, N, K;
    reference_rows active;
    sebp_rows *rows; /* NULL: found */
    sebp_matrix dy, x;
    sebp_linear_options options;
} problem;

static problem make_problem(int64_t M, int64_t N, int64_t K, testing_values values)
{
    problem p = {.M = M, .N = N, .K = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    sebp_dtype dtype = testing_dtype();
    p.dy = testing_random_matrix(M, N, dtype, values);
    testing_zero_rows(&p.dy, testing_chance(0.1) ? 0 : 0.5);
    const sebp_rule rule = sebp_rule_nonzero();
    p.active = reference_rows_find(&p.dy, &rule);
    if (testing_chance(0.7)) {
        ck_assert_int_eq(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows),
                         SEBP_SUCCESS);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    return p;
}

static void free_problem(problem *p)
{
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->dy);
    testing_release(&p->x);
}

/* Whether the elements kept are the first of all by rank, with their values. */
static void check_top(const sebp_sparse *got, const double *all)
{
    int64_t total = got->rows * got->cols;
    int64_t *order = malloc((size_t)total * sizeof *order);
    ck_assert_ptr_nonnull(order);
    reference_rank(all, total, order);
    qsort(order, (size_t)got->count, sizeof *order, reference_by_index);
    for (int64_t i = 0; i < got->count; i++) {
        if (got->indices[i] != order[i] || (double)got->values[i] != all[order[i]]) {
            ck_abort_msg(
                "element %" PRId64 " of %" PRId64 " is %" PRId64 ": %g, not %" PRId64 ": %g", i,
                got->count, got->indices[i], (double)got->values[i], order[i], all[order[i]]);
        }
    }
    free(order);
    testing_check(got->indices);
    testing_check(got->values);
}

static int64_t random_k(int64_t total)
{
    return testing_chance(0.1) ? 1 : testing_chance(0.1) ? total : testing_between(1, total);
}

START_TEST(top_is_exact_on_integers)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        sebp_context *context =
            testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), TESTING_MIN_SCRATCH);
        problem p = make_problem(testing_between(1, 60), testing_between(1, 60),
                                 testing_between(1, 60), TESTING_INTEGER);
        sebp_sparse got = testing_sparse(random_k(p.N * p.K), p.N, p.K);
        reference dw = reference_dw(&p.dy, &p.x, &p.active, p.options.x_is_compact, NULL);
        testing_expect(sebp_meprop_gradient(context, &p.dy, &p.x, p.rows, &p.options, &got),
                       SEBP_SUCCESS, context);
        check_top(&got, dw.value);
        reference_free(&dw);
        testing_free_sparse(&got);
        free_problem(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* dW in panels, on any number of threads, gives what the whole of it gives, bit for bit. */
START_TEST(panels_choose_as_the_whole)
{
    for (int round = 0; round < testing_rounds(6); round++) {
        /* dW of 2 to 4 MB; half a MiB is left for panels. */
        problem p = make_problem(testing_between(20, 60), testing_between(700, 900),
                                 testing_between(700, 900), TESTING_REAL);
        sebp_sparse want = testing_sparse(testing_between(1, 20000), p.N, p.K);
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
        sebp_matrix dw = testing_matrix(p.N, p.K, p.K, SEBP_F32);
        testing_expect(
            sebp_linear_backward(context, &p.dy, &p.x, NULL, p.rows, &p.options, NULL, &dw, NULL),
            SEBP_SUCCESS, context);
        testing_expect(sebp_sparse_top(context, &dw, &want), SEBP_SUCCESS, context);
        sebp_context_destroy(context);
        for (int threads = 1; threads <= 4; threads++) {
            context = testing_context(SEBP_GEMM_NATIVE, threads, TESTING_MIN_SCRATCH);
            sebp_sparse got = testing_sparse(want.count, p.N, p.K);
            testing_expect(sebp_meprop_gradient(context, &p.dy, &p.x, p.rows, &p.options, &got),
                           SEBP_SUCCESS, context);
            ck_assert_mem_eq(got.indices, want.indices, (size_t)got.count * sizeof(int64_t));
            ck_assert_mem_eq(got.values, want.values, (size_t)got.count * sizeof(float));
            ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
            testing_free_sparse(&got);
            sebp_context_destroy(context);
        }
        testing_release(&dw);
        testing_free_sparse(&want);
        free_problem(&p);
    }
}
END_TEST

/* Shapes whose last panel needs more scratch memory than a whole one: another GEMM, other chunks. */
START_TEST(the_last_panel_is_reserved_too)
{
    static const struct {
        sebp_gemm gemm;
        int64_t M, N, K;
    } cases[] = {{SEBP_GEMM_AUTO, 512, 1030, 512}, {SEBP_GEMM_NATIVE, 60, 3470, 256}};
    problem p = {.M = cases[_i].M, .N = cases[_i].N, .K = cases[_i].K};
    p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    p.dy = testing_random_matrix(p.M, p.N, SEBP_F32, TESTING_INTEGER);
    p.x = testing_random_matrix(p.M, p.K, SEBP_F32, TESTING_INTEGER);
    sebp_sparse want = testing_sparse(1000, p.N, p.K), got = testing_sparse(1000, p.N, p.K);
    for (int64_t mib = 4; mib <= 64; mib += 60) {
        sebp_context *context = testing_context(cases[_i].gemm, 1, mib << 20);
        testing_expect(
            sebp_meprop_gradient(context, &p.dy, &p.x, NULL, &p.options, mib == 4 ? &got : &want),
            SEBP_SUCCESS, context);
        sebp_context_destroy(context);
    }
    ck_assert_mem_eq(got.indices, want.indices, 1000 * sizeof(int64_t));
    ck_assert_mem_eq(got.values, want.values, 1000 * sizeof(float));
    testing_free_sparse(&got);
    testing_free_sparse(&want);
    free_problem(&p);
}
END_TEST

/*
 * Two panels of dW, each of half of the scratch memory. Of the first, k elements of 5 are kept, and
 * then what is more. The second is all 5 but for 48 elements of 100, which lie where a sample of it
 * is taken, so that they seem to be many more, and 40 of the number after 5. They are fewer than k,
 * so that the k-th magnitude of the panel is found to be 5: what is kept for certain are all that are
 * more, not some of 5. The places are those of guess_min() in lib/cpu/top.c; with others the result
 * is the same, but proves less.
 */
START_TEST(a_sample_of_the_few)
{
    enum { ROWS = 128, COLS = 1024, PANEL = ROWS * COLS, RUN = 8, STEP = 128 * RUN, K = 100 };
    const float next = nextafterf(5, 6);
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, TESTING_MIN_SCRATCH);
    /* dW = dY^T X = X. */
    sebp_matrix dy = testing_matrix(2 * ROWS, 2 * ROWS, 2 * ROWS, SEBP_F32);
    sebp_matrix x = testing_matrix(2 * ROWS, COLS, COLS, SEBP_F32);
    for (int64_t i = 0; i < dy.rows * dy.cols; i++) {
        testing_set(&dy, i / dy.cols, i % dy.cols, i / dy.cols == i % dy.cols);
    }
    for (int64_t i = 0; i < 2 * PANEL; i++) {
        int is_five = i >= PANEL || (i % 32 < 8 && i / 32 % 4 == 0);
        testing_set(&x, i / COLS, i % COLS, is_five ? 5 : (double)(i % 3));
    }
    float *second = (float *)x.data + PANEL;
    uint64_t mixed = 1;
    for (int64_t run = 0; run < 46; run++) {
        mixed = mixed * UINT64_C(6364136223846793005) + 1;
        int64_t at = run * STEP + (int64_t)((mixed >> 33) % (STEP - RUN));
        for (int64_t i = 0; i < RUN && run < 6; i++) {
            second[at + i] = 100;
        }
        if (run >= 6) {
            second[at - 1] = next; /* beside the sample */
        }
    }
    double *all = calloc(2 * PANEL, sizeof *all);
    ck_assert_ptr_nonnull(all);
    for (int64_t i = 0; i < 2 * PANEL; i++) {
        all[i] = testing_get(&x, i / COLS, i % COLS);
    }
    sebp_sparse got = testing_sparse(K, 2 * ROWS, COLS);
    testing_succeed(sebp_meprop_gradient(context, &dy, &x, NULL, NULL, &got), context);
    check_top(&got, all);
    int large = 0, above = 0;
    for (int64_t i = 0; i < K; i++) {
        large += got.values[i] == 100;
        above += got.values[i] == next;
    }
    ck_assert(large == 48 && above == 40);
    free(all);
    testing_free_sparse(&got);
    testing_release(&dy);
    testing_release(&x);
    sebp_context_destroy(context);
}
END_TEST

/* With no active row all of dW is zero, and the lowest indices are kept. */
START_TEST(no_active_row_keeps_the_first_elements)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix dy = testing_matrix(7, 5, 5, SEBP_F32), x = testing_matrix(7, 6, 6, SEBP_F32);
    memset(dy.data, 0, 7 * 5 * sizeof(float)); /* X is poison: not read */
    sebp_sparse got = testing_sparse(4, 5, 6);
    testing_expect(sebp_meprop_gradient(context, &dy, &x, NULL, NULL, &got), SEBP_SUCCESS, context);
    for (int64_t i = 0; i < 4; i++) {
        ck_assert(got.indices[i] == i && got.values[i] == 0);
    }
    testing_free_sparse(&got);
    testing_release(&dy);
    testing_release(&x);
    sebp_context_destroy(context);
}
END_TEST

/* A good call, changed before it is made. */
#define REFUSES(want, word, change)                                                                \
    do {                                                                                           \
        sebp_matrix dy_view = p.dy, x_view = p.x, *dy = &dy_view, *x = &x_view;                    \
        sebp_sparse view = room, *gradient = &view;                                                \
        const sebp_rows *rows = p.rows;                                                            \
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;                                    \
        change;                                                                                    \
        sebp_status got = sebp_meprop_gradient(context, dy, x, rows, &options, gradient);          \
        ck_assert_msg(got == (want), "%s: %s", #change, sebp_status_string(got));                  \
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", #change,  \
                      sebp_context_message(context));                                              \
        for (int64_t i = 0; i < room.count; i++) {                                                 \
            ck_assert_msg(room.indices[i] == -1 && isnan(room.values[i]), "%s: written to",        \
                          #change);                                                                \
        }                                                                                          \
    } while (0)

START_TEST(bad_input_is_refused)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, TESTING_MIN_SCRATCH);
    problem p = {.dy = testing_random_matrix(8, 5, SEBP_F32, TESTING_REAL),
                 .x = testing_random_matrix(8, 6, SEBP_F32, TESTING_REAL)};
    sebp_rows *other_rows = NULL;
    ck_assert_int_eq(sebp_rows_all(8, &p.rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_all(9, &other_rows), SEBP_SUCCESS);
    sebp_sparse room = testing_sparse(10, 5, 6); /* of poison: indices of -1 */
    REFUSES(SEBP_ERROR_NULL, "dy", dy = NULL);
    REFUSES(SEBP_ERROR_NULL, "x", x = NULL);
    REFUSES(SEBP_ERROR_NULL, "gradient", gradient = NULL);
    REFUSES(SEBP_ERROR_NULL, "gradient", gradient->indices = NULL);
    REFUSES(SEBP_ERROR_NULL, "gradient", gradient->values = NULL);
    REFUSES(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 3);
    REFUSES(SEBP_ERROR_SIZE, "gradient", gradient->count = -1);
    REFUSES(SEBP_ERROR_VALUE, "k is 0", gradient->count = 0);
    REFUSES(SEBP_ERROR_VALUE, "k is 31", gradient->count = 31);
    REFUSES(SEBP_ERROR_OVERFLOW, "gradient", gradient->rows = INT64_MAX);
    REFUSES(SEBP_ERROR_SHAPE, "gradient", (gradient->rows = 6, gradient->cols = 5));
    REFUSES(SEBP_ERROR_STRIDE, "dy", dy->stride = 4);
    REFUSES(SEBP_ERROR_DTYPE, "x", x->dtype = SEBP_BF16);
    REFUSES(SEBP_ERROR_SHAPE, "x", x->rows = 7);
    REFUSES(SEBP_ERROR_ROWS, "9", rows = other_rows);
    REFUSES(SEBP_ERROR_ROWS, "x_is_compact", (rows = NULL, options.x_is_compact = 1));
    REFUSES(SEBP_ERROR_VALUE, "rule", (rows = NULL, options.rule.kind = (sebp_rule_kind)9));
    REFUSES(SEBP_ERROR_VALUE, "SEBP_RULE_SAMPLED",
            (rows = NULL, options.rule = sebp_rule_sampled(0.5, 1)));
    const double odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        double was = testing_get(&p.dy, 3, i);
        testing_set(&p.dy, 3, i, odd[i]);
        REFUSES(SEBP_ERROR_NONFINITE, "dW", (void)0);
        testing_set(&p.dy, 3, i, was);
    }
    ck_assert_int_eq(sebp_meprop_gradient(NULL, &p.dy, &p.x, NULL, NULL, &room), SEBP_ERROR_NULL);
    testing_free_sparse(&room);

    /* One row of dW is more than half of the scratch memory. */
    sebp_matrix wide = testing_random_matrix(2, 150000, SEBP_F32, TESTING_REAL);
    sebp_matrix narrow = testing_random_matrix(2, 1, SEBP_F32, TESTING_REAL);
    sebp_sparse one = testing_sparse(1, 1, 150000);
    testing_expect(sebp_meprop_gradient(context, &narrow, &wide, NULL, NULL, &one),
                   SEBP_ERROR_MEMORY, context);
    ck_assert_int_eq(one.indices[0], -1);
    /* And more bytes than can be counted, where X has no rows. */
    for (int bits = 60; bits <= 62; bits++) {
        const int64_t cols = INT64_C(1) << bits;
        sebp_matrix no_dy = {NULL, 0, 1, 1, SEBP_F32}, no_x = {NULL, 0, cols, cols, SEBP_F32};
        one.cols = cols;
        testing_expect(sebp_meprop_gradient(context, &no_dy, &no_x, NULL, NULL, &one),
                       SEBP_ERROR_MEMORY, context);
        ck_assert_int_eq(one.indices[0], -1);
    }
    testing_free_sparse(&one);
    testing_release(&wide);
    testing_release(&narrow);
    sebp_rows_destroy(other_rows);
    sebp_rows_destroy(p.rows);
    testing_release(&p.dy);
    testing_release(&p.x);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("meprop");
    TCase *tests = tcase_create("meprop");
    tcase_add_test(tests, top_is_exact_on_integers);
    tcase_add_test(tests, panels_choose_as_the_whole);
    tcase_add_loop_test(tests, the_last_panel_is_reserved_too, 0, 2);
    tcase_add_test(tests, a_sample_of_the_few);
    tcase_add_test(tests, no_active_row_keeps_the_first_elements);
    tcase_add_test(tests, bad_input_is_refused);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
