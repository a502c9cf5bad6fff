/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Contexts: their options, the bound on scratch memory, kernels, and what they say of themselves.
 */
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <sebp/sebp.h>

#include "contexts.h"
#include "testing.h"

#define MIB ((int64_t)1 << 20)

START_TEST(defaults)
{
    sebp_context *context = contexts_create(NULL);
    sebp_info info = contexts_info(context), before = contexts_info(NULL);
    ck_assert_int_ge(sebp_context_threads(context), 1);
    ck_assert_int_eq(info.placement, SEBP_PLACEMENT_NONE);
    ck_assert_int_eq(info.gemm, SEBP_GEMM_AUTO);
    ck_assert_ptr_null(info.placement_refused);
    ck_assert_int_eq(before.placement, SEBP_PLACEMENT_NONE);
    ck_assert_int_eq(before.gemm, SEBP_GEMM_AUTO);
    ck_assert_int_eq(before.cores, info.cores);
    ck_assert_str_eq(sebp_context_message(context), "");
    contexts_check(context);
    sebp_context_destroy(context);

    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *same = contexts_create(&options);
    ck_assert_int_eq(contexts_info(same).gemm, SEBP_GEMM_AUTO);
    sebp_context_destroy(same);
    sebp_context_destroy(NULL);
}
END_TEST

START_TEST(threads_as_asked_for)
{
    for (int threads = 1; threads <= 7; threads += 2) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = threads;
        sebp_context *context = contexts_create(&options);
        /* A build without OpenMP has one, whatever is asked. */
        int expected = contexts_info(context).openmp != 0 ? threads : 1;
        ck_assert_int_eq(sebp_context_threads(context), expected);
        contexts_check(context);
        sebp_context_destroy(context);
    }
}
END_TEST

START_TEST(gemm_as_asked_for)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = SEBP_GEMM_NATIVE;
    sebp_context *context = contexts_create(&options);
    ck_assert_int_eq(contexts_info(context).gemm, SEBP_GEMM_NATIVE);
    contexts_check(context);
    sebp_context_destroy(context);

    options.gemm = SEBP_GEMM_ONEDNN;
    context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    if (contexts_info(NULL).onednn[0] == '\0') {
        ck_assert_int_eq(status, SEBP_ERROR_UNSUPPORTED);
        ck_assert_ptr_null(context);
    } else {
        ck_assert_int_eq(status, SEBP_SUCCESS);
        ck_assert_int_eq(contexts_info(context).gemm, SEBP_GEMM_ONEDNN);
        contexts_check(context);
        sebp_context_destroy(context);
    }
}
END_TEST

/*
 * A backward and a forward that would need many times the bound if rows were not taken in panels.
 * Only the first and the last active row are given values; whether sums are right is for
 * test_linear to say.
 */
static int64_t scratch_for(int64_t workspace, sebp_gemm gemm, int64_t M, sebp_dtype dtype)
{
    const int64_t N = 8, K = 512;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.workspace_bytes = workspace;
    options.gemm = testing_gemm(gemm);
    options.threads = 2;
    sebp_context *context = contexts_create(&options);
    size_t bytes = sebp_dtype_bytes(dtype);
    sebp_matrix dy = {calloc((size_t)(M * N), bytes), M, N, N, dtype};
    sebp_matrix x = {calloc((size_t)(M * K), bytes), M, K, K, dtype};
    sebp_matrix dx = {malloc((size_t)(M * K) * bytes), M, K, K, dtype};
    sebp_matrix w = testing_matrix(N, K, K, dtype);
    sebp_matrix dw = testing_matrix(N, K, K, SEBP_BF16);
    sebp_matrix db = testing_matrix(1, N, N, SEBP_BF16);
    ck_assert(dy.data != NULL && x.data != NULL && dx.data != NULL);
    testing_fill(&w, TESTING_INTEGER);
    int64_t count = 0, *indices = malloc((size_t)M * sizeof *indices);
    for (int64_t i = 0; i < M; i++) {
        if (i % 7 != 3) {
            indices[count++] = i;
        }
    }
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_from_indices(indices, count, M, &rows), context);
    testing_set(&dy, indices[0], 0, 1);
    testing_set(&dy, indices[count - 1], 0, 2);
    testing_set(&x, indices[count - 1], 0, 3);

    testing_succeed(sebp_linear_backward(context, &dy, &x, &w, rows, NULL, &dx, &dw, &db), context);
    testing_succeed(sebp_linear_backward(context, &dy, &x, &w, NULL, NULL, NULL, NULL, &db),
                    context);
    for (int64_t j = 0; j < K; j += 37) {
        ck_assert(testing_get(&dx, indices[0], j) == testing_get(&w, 0, j));
        ck_assert(testing_get(&dx, indices[count - 1], j) == 2 * testing_get(&w, 0, j));
        ck_assert(testing_get(&dx, 3, j) == 0);
    }
    ck_assert(testing_get(&dw, 0, 0) == 6 && testing_get(&db, 0, 0) == 3);
    /* The forward takes dX for its Y: K x K weights are not at hand, so Y = dY W. */
    sebp_matrix wt = testing_matrix(K, N, N, dtype);
    testing_fill(&wt, TESTING_INTEGER);
    testing_succeed(sebp_linear_forward(context, &dy, &wt, NULL, rows, NULL, &dx), context);
    ck_assert(testing_get(&dx, indices[count - 1], 5) == 2 * testing_get(&wt, 5, 0));

    int64_t held = sebp_context_scratch_bytes(context);
    sebp_rows_destroy(rows);
    free(indices);
    free(dy.data);
    free(x.data);
    free(dx.data);
    testing_release(&w);
    testing_release(&wt);
    testing_release(&dw);
    testing_release(&db);
    sebp_context_destroy(context);
    return held;
}

static const sebp_gemm gemms[] = {SEBP_GEMM_AUTO, SEBP_GEMM_NATIVE, SEBP_GEMM_ONEDNN};

/* _i: the GEMM. Scratch memory neither passes the bound nor grows with M once it is near. */
START_TEST(scratch_is_bounded)
{
    if (gemms[_i] == SEBP_GEMM_ONEDNN && contexts_info(NULL).onednn[0] == '\0') {
        testing_skip("scratch_is_bounded with onednn", "built without it");
        return;
    }
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        int64_t held = scratch_for(MIB, gemms[_i], 100 + testing_rounds(4000), (sebp_dtype)dtype);
        ck_assert_int_le(held, MIB);
        ck_assert_int_gt(held, 0);
        ck_assert_int_le(
            scratch_for(3 * MIB + 1, gemms[_i], 100 + testing_rounds(8000), (sebp_dtype)dtype),
            3 * MIB + 1);
    }
}
END_TEST

/* 64 MiB by default, where the rows of X and dX alone are more. */
START_TEST(default_bound)
{
    int64_t held = scratch_for(0, gemms[_i], 100 + testing_rounds(40000), SEBP_F32);
    ck_assert_int_le(held, 64 * MIB);
}
END_TEST

START_TEST(isa_tiers)
{
    int count = sebp_isa_count();
    ck_assert_int_ge(count, 1);
    ck_assert_str_eq(sebp_isa_name(0), "scalar");
    ck_assert_ptr_null(sebp_isa_name(count));
    ck_assert_ptr_null(sebp_isa_name(-1));
    for (int i = 1; i < count; i++) {
        ck_assert_str_ne(sebp_isa_name(i), sebp_isa_name(i - 1));
    }
    if (!testing_environment("SEBP_MAX_ISA")) {
        ck_assert_str_eq(sebp_isa(), sebp_isa_name(count - 1));
        setenv("SEBP_MAX_ISA", "scalar", 1);
        sebp_context *context = contexts_create(NULL);
        /* Tests may share a process: the table may have been filled before. */
        const char *fork = getenv("CK_FORK");
        if (fork == NULL || strcmp(fork, "no") != 0) {
            ck_assert_str_eq(sebp_isa(), "scalar");
        }
        contexts_check(context);
        sebp_context_destroy(context);
        unsetenv("SEBP_MAX_ISA");
    } else {
        sebp_context *context = contexts_create(NULL);
        ck_assert_ptr_nonnull(sebp_isa());
        sebp_context_destroy(context);
    }
}
END_TEST

START_TEST(info)
{
    char version[40];
    snprintf(version, sizeof version, "%d.%d.%d", SEBP_VERSION_MAJOR, SEBP_VERSION_MINOR,
             SEBP_VERSION_PATCH);
    ck_assert_str_eq(sebp_version(), SEBP_VERSION_STRING);
    ck_assert_str_eq(sebp_version(), version);

    sebp_info info = contexts_info(NULL);
    ck_assert_int_ge(info.cores, 1);
    ck_assert_int_ge(info.logical_cpus, info.cores);
    ck_assert_int_ge(info.numa_nodes, 1);
    ck_assert_int_ge(info.core_kinds, 1);
    ck_assert(info.cpu_quota >= 0);
    ck_assert_uint_ge(info.l2_bytes, 1024);
#ifdef __linux__
    cpu_set_t mask;
    ck_assert_int_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
    ck_assert_int_le(info.logical_cpus, CPU_COUNT(&mask));
#endif
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("context");
    TCase *tests = tcase_create("context");
    tcase_add_test(tests, defaults);
    tcase_add_test(tests, threads_as_asked_for);
    tcase_add_test(tests, gemm_as_asked_for);
    tcase_add_loop_test(tests, scratch_is_bounded, 0, 3);
    tcase_add_loop_test(tests, default_bound, 0, 2);
    tcase_add_test(tests, isa_tiers);
    tcase_add_test(tests, info);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
