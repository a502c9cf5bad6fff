/* SPDX-License-Identifier: Apache-2.0 */
/*
 * More than 2^31 elements, where an int would not do. Wants about 9 GiB of memory, so only where
 * SEBP_TEST_LARGE is set.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

static int wanted(const char *test)
{
    if (!testing_environment("SEBP_TEST_LARGE")) {
        testing_skip(test, "needs 9 GiB; set SEBP_TEST_LARGE=1");
        return 0;
    }
    return 1;
}

static sebp_context *make_context(sebp_gemm gemm)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = testing_gemm(gemm);
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    return context;
}

/* Memory of zeros that the system gives page by page, as it is first written. */
static sebp_matrix zeros(int64_t rows, int64_t cols, int64_t stride)
{
    sebp_matrix matrix = {calloc((size_t)(rows * stride), sizeof(uint16_t)), rows, cols, stride,
                          SEBP_BF16};
    ck_assert_msg(matrix.data != NULL, "no memory for %" PRId64 " x %" PRId64, rows, stride);
    return matrix;
}

static const sebp_gemm gemms[] = {SEBP_GEMM_NATIVE, SEBP_GEMM_AUTO};

/* dY and dX of 2^31 + elements each; three active rows, one at either end. */
START_TEST(many_rows)
{
    if (!wanted(_i ? "many_rows with auto" : "many_rows with native")) {
        return;
    }
    const int64_t N = 8, K = 8, M = ((int64_t)1 << 31) / N + 1000;
    sebp_context *context = make_context(gemms[_i]);
    sebp_matrix dy = zeros(M, N, N), dx = zeros(M, K, K);
    sebp_matrix x = testing_matrix(3, K, K, SEBP_BF16), w = testing_matrix(N, K, K, SEBP_BF16);
    sebp_matrix dw = testing_matrix(N, K, K, SEBP_F32), db = testing_matrix(1, N, N, SEBP_F32);
    testing_fill(&x, TESTING_INTEGER);
    testing_fill(&w, TESTING_INTEGER);
    memset(dx.data, TESTING_POISON, (size_t)(M * K) * sizeof(uint16_t));
    const int64_t active[3] = {0, M / 2, M - 1};
    for (int r = 0; r < 3; r++) {
        testing_set(&dy, active[r], r, r + 1);
    }
    sebp_rows *rows = NULL;
    ck_assert_int_eq(sebp_rows_find(context, &dy, NULL, &rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_count(rows), 3);
    ck_assert_mem_eq(sebp_rows_indices(rows), active, sizeof active);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.x_is_compact = 1;
    ck_assert_int_eq(sebp_linear_backward(context, &dy, &x, &w, rows, &options, &dx, &dw, &db),
                     SEBP_SUCCESS);
    for (int r = 0; r < 3; r++) {
        ck_assert(testing_get(&db, 0, r) == r + 1);
        for (int64_t j = 0; j < K; j++) {
            ck_assert(testing_get(&dx, active[r], j) == (r + 1) * testing_get(&w, r, j));
            ck_assert(testing_get(&dw, r, j) == (r + 1) * testing_get(&x, r, j));
        }
    }
    const uint16_t *elements = dx.data;
    int64_t nonzeros = 0;
    for (int64_t at = 0; at < M * K; at++) {
        nonzeros += elements[at] != 0;
    }
    ck_assert_int_eq(nonzeros, 3 * K);
    ck_assert_int_le(sebp_context_scratch_bytes(context), (int64_t)64 << 20);

    /* The forward over the same M. */
    ck_assert_int_eq(sebp_linear_forward(context, &x, &w, NULL, rows, &options, &dy), SEBP_SUCCESS);
    double sum = 0;
    for (int64_t j = 0; j < K; j++) {
        sum += testing_get(&x, 2, j) * testing_get(&w, 5, j);
    }
    ck_assert(testing_get(&dy, M - 1, 5) == testing_from_bf16(testing_to_bf16((float)sum)));
    ck_assert(testing_get(&dy, M - 2, 5) == 0);
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);
    free(dy.data);
    free(dx.data);
    testing_release(&x);
    testing_release(&w);
    testing_release(&dw);
    testing_release(&db);
}
END_TEST

/* Few rows, so far apart that offsets pass 2^31 elements and 2^32 bytes. */
START_TEST(huge_stride)
{
    if (!wanted(_i ? "huge_stride with auto" : "huge_stride with native")) {
        return;
    }
    const int64_t M = 5, N = 12, K = 9, stride = ((int64_t)1 << 30) + 7;
    sebp_context *context = make_context(gemms[_i]);
    sebp_matrix dy = zeros(M, N, stride), dx = zeros(M, K, stride), w = zeros(N, K, K);
    testing_fill(&w, TESTING_INTEGER);
    testing_set(&dy, 1, 2, 1);
    testing_set(&dy, 4, 11, 3);
    testing_set(&dx, 3, 8, NAN);
    ck_assert_int_eq(sebp_linear_backward(context, &dy, NULL, &w, NULL, NULL, &dx, NULL, NULL),
                     SEBP_SUCCESS);
    for (int64_t j = 0; j < K; j++) {
        ck_assert(testing_get(&dx, 1, j) == testing_get(&w, 2, j));
        ck_assert(testing_get(&dx, 4, j) == 3 * testing_get(&w, 11, j));
        ck_assert(testing_get(&dx, 3, j) == 0);
    }
    sebp_context_destroy(context);
    free(dy.data);
    free(dx.data);
    free(w.data);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("large");
    TCase *tests = tcase_create("large");
    tcase_set_timeout(tests, 1200);
    tcase_add_loop_test(tests, many_rows, 0, 2);
    tcase_add_loop_test(tests, huge_stride, 0, 2);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
