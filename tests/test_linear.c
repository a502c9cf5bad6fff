/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The linear layer against the double-precision reference, on random shapes, strides, dtypes, row
 * sets and options, and exactly on small integers; compacted against dense; with little memory and on any
 * threads.
 */
#include <sebp/sebp.h>

#include "linear_problem.h"

/* A context at random: threads, host, workspace. */
static sebp_context *random_context(int gemm)
{
    static testing_host host;
    int64_t workspace = testing_chance(0.3) ? TESTING_MIN_SCRATCH : 0;
    return testing_hosted_context((sebp_gemm)gemm, (int)testing_between(1, 4), workspace,
                                  testing_chance(0.3) ? &host : NULL);
}

static void check_random(int gemm, testing_values values, int forward)
{
    sebp_context *context = NULL;
    for (int round = 0; round < testing_rounds(300); round++) {
        if (round % 8 == 0) {
            sebp_context_destroy(context);
            context = random_context(gemm);
        }
        linear_problem p = linear_problem_random(values);
        if (!forward) {
            linear_check_backward(context, &p);
        } else if (p.rows != NULL) {
            linear_check_forward(context, &p);
        }
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}

START_TEST(backward_is_within_the_error_bound)
{
    if (testing_has_gemm((sebp_gemm)_i, "backward_is_within_the_error_bound")) {
        check_random(_i, TESTING_REAL, 0);
    }
}
END_TEST

START_TEST(backward_is_exact_on_integers)
{
    if (testing_has_gemm((sebp_gemm)_i, "backward_is_exact_on_integers")) {
        check_random(_i, TESTING_INTEGER, 0);
    }
}
END_TEST

START_TEST(forward_is_within_the_error_bound)
{
    if (testing_has_gemm((sebp_gemm)_i, "forward_is_within_the_error_bound")) {
        check_random(_i, TESTING_REAL, 1);
    }
}
END_TEST

START_TEST(forward_is_exact_on_integers)
{
    if (testing_has_gemm((sebp_gemm)_i, "forward_is_exact_on_integers")) {
        check_random(_i, TESTING_INTEGER, 1);
    }
}
END_TEST

/* The claim itself: on zero rows, skipping them and computing them come to the same bits. */
START_TEST(compacted_equals_dense_bit_for_bit)
{
    if (!testing_has_gemm((sebp_gemm)_i, "compacted_equals_dense_bit_for_bit")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    for (int round = 0; round < testing_rounds(150); round++) {
        int64_t M = testing_between(8, 120), N = testing_between(8, 60);
        int64_t K = testing_between(8, 60);
        sebp_dtype dtype = testing_dtype(), out = testing_dtype();
        sebp_matrix dy = testing_random_matrix(M, N, dtype, TESTING_INTEGER);
        sebp_matrix x = testing_random_matrix(M, K, dtype, TESTING_INTEGER);
        sebp_matrix w = testing_random_matrix(N, K, dtype, TESTING_INTEGER);
        testing_zero_rows(&dy, 0.3);
        testing_set(&dy, 0, 0, 1);
        sebp_rows *all = NULL;
        testing_succeed(sebp_rows_all(M, &all), NULL);
        sebp_matrix dx[2], dw[2], db[2];
        for (int compact = 0; compact < 2; compact++) {
            dx[compact] = testing_matrix(M, K, testing_stride(K), out);
            dw[compact] = testing_matrix(N, K, testing_stride(K), out);
            db[compact] = testing_matrix(1, N, N, out);
            testing_succeed(sebp_linear_backward(context, &dy, &x, &w, compact ? NULL : all, NULL,
                                                 &dx[compact], &dw[compact], &db[compact]),
                            context);
        }
        /* Dense sums of zeros may come out as -0, which equals 0 but not bit for bit. */
        int64_t different = 0;
        for (int64_t i = 0; i < M * K; i++) {
            different += testing_get(&dx[0], i / K, i % K) != testing_get(&dx[1], i / K, i % K);
        }
        ck_assert_int_eq(different, 0);
        ck_assert(testing_same_bits(&dw[0], &dw[1]));
        ck_assert(testing_same_bits(&db[0], &db[1]));
        ck_assert_int_gt(testing_nonzeros(&dx[1]), 0);
        ck_assert_int_gt(testing_nonzeros(&dw[1]), 0);
        ck_assert_int_gt(testing_nonzeros(&db[1]), 0);
        for (int compact = 0; compact < 2; compact++) {
            testing_release(&dx[compact]);
            testing_release(&dw[compact]);
            testing_release(&db[compact]);
        }
        sebp_rows_destroy(all);
        testing_release(&dy);
        testing_release(&x);
        testing_release(&w);
    }
    sebp_context_destroy(context);
}
END_TEST

/* The library's own GEMM gives the same bits for every number of threads and every pool. */
START_TEST(native_gemm_does_not_depend_on_threads)
{
    testing_host host = {0};
    for (int round = 0; round < testing_rounds(20); round++) {
        int64_t M = testing_between(1, 300), N = testing_between(1, 130);
        int64_t K = testing_between(1, 130);
        linear_problem p = linear_problem_make(M, N, K, testing_dtype(), TESTING_REAL,
                                               round % 2 ? ROWS_SCATTERED : ROWS_FOUND);
        p.options.inactive = SEBP_INACTIVE_ZERO;
        sebp_dtype out = testing_dtype();
        sebp_matrix first[4] = {{0}};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context = testing_hosted_context(
                SEBP_GEMM_NATIVE, threads < 5 ? threads : 3, 0, threads == 5 ? &host : NULL);
            sebp_matrix now[4] = {testing_matrix(M, K, K, out), testing_matrix(N, K, K, out),
                                  testing_matrix(1, N, N, out), testing_matrix(M, N, N, out)};
            testing_succeed(sebp_linear_backward(context, &p.dy, &p.x, &p.w, p.rows, &p.options,
                                                 &now[0], &now[1], &now[2]),
                            context);
            if (p.rows != NULL) {
                testing_succeed(
                    sebp_linear_forward(context, &p.x, &p.w, &p.bias, p.rows, &p.options, &now[3]),
                    context);
            }
            for (int i = 0; i < 4; i++) {
                if (threads > 1) {
                    ck_assert_msg(testing_same_bits(&first[i], &now[i]), "output %d, %d threads", i,
                                  threads);
                    testing_release(&now[i]);
                } else {
                    first[i] = now[i];
                }
            }
            sebp_context_destroy(context);
        }
        for (int i = 0; i < 4; i++) {
            testing_release(&first[i]);
        }
        linear_problem_free(&p);
    }
    ck_assert_int_gt(host.calls, 0);
}
END_TEST

/* dX, dW and Y of a layer, by a context whose GEMM is the library's choice. */
static void run_by_auto(sebp_context *context, linear_problem *p, sebp_matrix out[3])
{
    out[0] = testing_matrix(p->M, p->K, p->K, SEBP_F32);
    out[1] = testing_matrix(p->N, p->K, p->K, SEBP_F32);
    out[2] = testing_matrix(p->M, p->N, p->N, SEBP_F32);
    testing_succeed(sebp_linear_backward(context, &p->dy, &p->x, &p->w, p->rows, &p->options,
                                         &out[0], &out[1], NULL),
                    context);
    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, NULL, p->rows, &p->options, &out[2]),
                    context);
}

/* What is chosen depends on the call alone: it gives the same bits whatever was called before, and by
 * another context. */
START_TEST(the_choice_is_the_same_again)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    sebp_context *context = NULL;
    testing_succeed(sebp_context_create(&options, &context), NULL);
    for (int round = testing_rounds(30); round > 0; round--) {
        linear_problem p = linear_problem_make(testing_between(1, 40), testing_between(1, 600),
                                               testing_between(1, 600), SEBP_F32, TESTING_REAL,
                                               (rows_kind)testing_between(ROWS_ALL, ROWS_PADDED));
        p.options.inactive = SEBP_INACTIVE_ZERO;
        sebp_context *other = NULL;
        testing_succeed(sebp_context_create(&options, &other), NULL);
        sebp_matrix first[3], again[3], by_other[3], between[3];
        run_by_auto(context, &p, first);
        linear_problem next =
            linear_problem_make(testing_between(1, 40), testing_between(1, 200),
                                testing_between(1, 200), SEBP_F32, TESTING_REAL, ROWS_ALL);
        run_by_auto(context, &next, between);
        run_by_auto(context, &p, again);
        run_by_auto(other, &p, by_other);
        for (int i = 0; i < 3; i++) {
            ck_assert_msg(testing_same_bits(&first[i], &again[i]), "output %d, again", i);
            ck_assert_msg(testing_same_bits(&first[i], &by_other[i]), "output %d, by another", i);
            testing_release(&first[i]);
            testing_release(&again[i]);
            testing_release(&by_other[i]);
            testing_release(&between[i]);
        }
        sebp_context_destroy(other);
        linear_problem_free(&next);
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* A large dW is written past the caches where its rows start at multiples of 64 bytes, and not
 * elsewhere: the same numbers. */
START_TEST(large_dw_is_the_same_past_the_caches)
{
    enum { ROWS = 5, IN = 1040, MOST = 64 << 20 };
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 3, 0);
    sebp_info info = {.size_bytes = sizeof info};
    testing_succeed(sebp_info_get(context, &info), context);
    if (info.l3_bytes > MOST) {
        testing_skip("large_dw_is_the_same_past_the_caches",
                     "half of the L3 cache is more than 32 MiB, and so would dW be");
        sebp_context_destroy(context);
        return;
    }
    int64_t large = info.l3_bytes > 0 ? (int64_t)info.l3_bytes : MOST;
    int64_t out = large / 2 / (IN * (int64_t)sizeof(float)) + testing_between(1, 40);
    linear_problem p = linear_problem_make(ROWS, out, IN, SEBP_F32, TESTING_REAL, ROWS_ALL);
    sebp_matrix dw[2];
    for (int i = 0; i < 2; i++) {
        size_t bytes = (size_t)(out * IN) * sizeof(float);
        dw[i] = (sebp_matrix){
            .data = testing_alloc(bytes, i * sizeof(float)), .rows = out, .cols = IN, .stride = IN};
        testing_succeed(sebp_linear_backward(context, &p.dy, &p.x, &p.w, p.rows, &p.options, NULL,
                                             &dw[i], NULL),
                        context);
        testing_check(dw[i].data);
    }
    ck_assert(testing_same_bits(&dw[0], &dw[1]));
    ck_assert_int_gt(testing_nonzeros(&dw[0]), out * IN / 2);
    testing_free(dw[0].data);
    testing_free(dw[1].data);
    linear_problem_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* Shapes that need many panels, or several blocks of dW, in 1 MiB. _i: the GEMM. */
START_TEST(small_workspace_takes_panels)
{
    if (!testing_has_gemm((sebp_gemm)_i, "small_workspace_takes_panels")) {
        return;
    }
    static const int64_t shapes[][3] = {{1100, 20, 1000}, {1100, 1000, 20}, {120, 260, 1030},
                                        {40, 7000, 30},   {40, 30, 7000},   {7000, 30, 40}};
    int64_t first = testing_between(0, 11); /* each shape in each dtype, but for short runs */
    for (int64_t round = first; round < first + testing_rounds(12); round++) {
        const int64_t *shape = shapes[round % 6];
        sebp_dtype dtype = round / 6 % 2 ? SEBP_BF16 : SEBP_F32;
        sebp_context *context =
            testing_context((sebp_gemm)_i, (int)testing_between(1, 3), TESTING_MIN_SCRATCH);
        linear_problem p =
            linear_problem_make(shape[0], shape[1], shape[2], dtype,
                                testing_chance(0.5) ? TESTING_REAL : TESTING_INTEGER,
                                (rows_kind)testing_between(ROWS_SCATTERED, ROWS_FOUND));
        linear_check_backward(context, &p);
        if (p.rows != NULL) {
            linear_check_forward(context, &p);
        }
        linear_problem_free(&p);
        ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
        sebp_context_destroy(context);
    }
}
END_TEST

/* One run of rows anywhere in M, whatever it is next to. */
START_TEST(runs_are_used_in_place)
{
    if (!testing_has_gemm((sebp_gemm)_i, "runs_are_used_in_place")) {
        return;
    }
    sebp_context *context = testing_context((sebp_gemm)_i, 2, 0);
    for (int round = 0; round < testing_rounds(120); round++) {
        linear_problem p =
            linear_problem_make(testing_between(1, 90), testing_between(1, 50),
                                testing_between(1, 50), testing_dtype(), TESTING_REAL, ROWS_RUN);
        linear_check_backward(context, &p);
        linear_check_forward(context, &p);
        linear_problem_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("linear");
    TCase *random = tcase_create("linear");
    tcase_add_loop_test(random, backward_is_within_the_error_bound, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, backward_is_exact_on_integers, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, forward_is_within_the_error_bound, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, forward_is_exact_on_integers, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, compacted_equals_dense_bit_for_bit, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, small_workspace_takes_panels, 0, TESTING_GEMMS);
    tcase_add_loop_test(random, runs_are_used_in_place, 0, TESTING_GEMMS);
    tcase_add_test(random, native_gemm_does_not_depend_on_threads);
    tcase_add_test(random, the_choice_is_the_same_again);
    tcase_add_test(random, large_dw_is_the_same_past_the_caches);
    suite_add_tcase(suite, random);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
