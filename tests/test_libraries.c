/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Libraries underneath. What LAPACK, oneDNN and hwloc come back with when they fail is told for what
 * it is, and nothing is lost: the program brings functions of theirs of its own, which the linker
 * prefers, and which fail on demand. What oneDNN keeps for itself is bounded.
 */
#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef SEBP_HAVE_HWLOC
#include <dlfcn.h>
#include <errno.h>
#include <hwloc.h>
#endif
#ifdef SEBP_HAVE_LAPACK
#include <lapacke.h>
#endif
#ifdef SEBP_HAVE_ONEDNN
#include <dnnl.h>
#endif

#include <sebp/sebp.h>

#include "testing.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

#ifdef SEBP_HAVE_LAPACK

/* What a routine does: the vectors are those of a unit matrix, the values ascend from 1 on. */
static struct {
    lapack_int info;
    float value, element; /* of the last value, of the first vector */
    int calls;
} lapack;

static lapack_int answer(lapack_int n, lapack_int count, float *values, float *vectors,
                         lapack_int stride)
{
    lapack.calls++;
    for (lapack_int i = 0; i < count; i++) {
        memset(vectors + i * stride, 0, (size_t)n * sizeof *vectors);
        vectors[i * stride + n - count + i] = 1;
        values[i] = (float)(i + 1);
    }
    values[count - 1] = lapack.value;
    vectors[n - 1] = lapack.element;
    return lapack.info;
}

lapack_int LAPACKE_ssyevd_work(int layout, char job, char triangle, lapack_int n, float *a,
                               lapack_int lda, float *w, float *work, lapack_int lwork,
                               lapack_int *iwork, lapack_int liwork)
{
    (void)layout, (void)job, (void)triangle;
    (void)work, (void)lwork, (void)iwork, (void)liwork;
    return answer(n, n, w, a, lda);
}

lapack_int LAPACKE_ssyevr_work(int layout, char job, char range, char triangle, lapack_int n,
                               float *a, lapack_int lda, float vl, float vu, lapack_int il,
                               lapack_int iu, float tolerance, lapack_int *m, float *w, float *z,
                               lapack_int ldz, lapack_int *support, float *work, lapack_int lwork,
                               lapack_int *iwork, lapack_int liwork)
{
    (void)layout, (void)job, (void)range, (void)triangle, (void)a, (void)lda, (void)vl, (void)vu;
    (void)tolerance, (void)support, (void)work, (void)lwork, (void)iwork, (void)liwork;
    *m = iu - il + 1;
    return answer(n, *m, w, z, ldz);
}

/* _i: whether all vectors are asked for, which is another routine. */
START_TEST(lapack_fails)
{
    const char *const routine = _i ? "ssyevd" : "ssyevr";
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_matrix g = testing_random_matrix(6, 6, SEBP_F32, TESTING_REAL);
    int64_t rank = _i ? 6 : 4;
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(6, 6, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);

    lapack.calls = 0;
    const float odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        lapack.info = 0;
        lapack.value = odd[i];
        lapack.element = 1;
        testing_refuse(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_NONFINITE,
                       "NaN", context);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), routine));
        lapack.value = 7;
        lapack.element = odd[i];
        testing_refuse(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_NONFINITE,
                       "NaN", context);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), routine));
    }
    lapack.element = 1;
    lapack.info = 3;
    testing_refuse(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_BACKEND,
                   "finds no eigenvectors: 3", context);
    lapack.info = -5;
    testing_refuse(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_BACKEND,
                   "refuses an argument: -5", context);
    ck_assert_ptr_null(basis);
    ck_assert_int_eq(lapack.calls, 8); /* these, and no others */
    lapack.info = 0;
    testing_succeed(sebp_basis_solve(context, sums, rank, rank, &basis), context);
    ck_assert_ptr_nonnull(basis);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

#else

START_TEST(lapack_fails)
{
    testing_skip(_i ? "lapack_fails, all vectors" : "lapack_fails", "built without LAPACK");
}
END_TEST

#endif

#ifdef SEBP_HAVE_ONEDNN

static dnnl_status_t gemm_status;
static float gemm_result;
static int gemm_calls;

dnnl_status_t dnnl_sgemm(char transa, char transb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k,
                         float alpha, const float *a, dnnl_dim_t lda, const float *b,
                         dnnl_dim_t ldb, float beta, float *c, dnnl_dim_t ldc)
{
    (void)transa, (void)transb, (void)k, (void)alpha, (void)a, (void)lda, (void)b, (void)ldb;
    gemm_calls++;
    for (dnnl_dim_t i = 0; i < m * n; i++) {
        float *at = &c[i / n * ldc + i % n];
        *at = beta * *at + gemm_result;
    }
    return gemm_status;
}

START_TEST(onednn_fails)
{
    sebp_context *context = testing_context(SEBP_GEMM_ONEDNN, 1, 0);
    sebp_matrix x = testing_random_matrix(5, 6, SEBP_F32, TESTING_REAL);
    sebp_matrix w = testing_random_matrix(7, 6, SEBP_F32, TESTING_REAL);
    sebp_matrix y = testing_matrix(5, 7, 7, SEBP_F32);
    gemm_status = dnnl_out_of_memory;
    testing_refuse(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), SEBP_ERROR_BACKEND,
                   "sebp_linear_forward: oneDNN has no memory", context);
    gemm_status = dnnl_runtime_error;
    testing_refuse(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), SEBP_ERROR_BACKEND,
                   "sebp_linear_forward: oneDNN failed", context);
    gemm_status = dnnl_success;
    testing_succeed(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), context);
    testing_release(&x);
    testing_release(&w);
    testing_release(&y);
    sebp_context_destroy(context);
}
END_TEST

/* How many products of a layer of M rows oneDNN does. */
static int calls_of(sebp_context *context, int64_t M, int64_t N, int64_t K)
{
    sebp_matrix x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
    sebp_matrix w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
    sebp_matrix y = testing_matrix(M, N, N, SEBP_F32), dx = testing_matrix(M, K, K, SEBP_F32);
    sebp_matrix dw = testing_matrix(N, K, K, SEBP_F32);
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_all(M, &rows), NULL);
    gemm_calls = 0;
    testing_succeed(sebp_linear_forward(context, &x, &w, NULL, rows, NULL, &y), context);
    testing_succeed(sebp_linear_backward(context, &y, &x, &w, rows, NULL, &dx, &dw, NULL), context);
    sebp_rows_destroy(rows);
    sebp_matrix *all[] = {&x, &w, &y, &dx, &dw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        testing_release(all[i]);
    return gemm_calls;
}

/* Whom a product goes to depends on the context's choice and on the product, and on nothing that was done
 * before: in rounds of one call after another each goes the same way again. */
START_TEST(who_multiplies)
{
    static const struct {
        int64_t M;
        int by_auto;
    } cases[] = {{1, 3}, {15, 3}, {16, 1}, {17, 0}, {200, 0}};
    enum { CASES = sizeof cases / sizeof *cases };
    gemm_status = dnnl_success;
    sebp_context *contexts[3];
    for (int gemm = 0; gemm < 3; gemm++) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.gemm = (sebp_gemm)gemm;
        options.threads = 1 + gemm % 2;
        testing_succeed(sebp_context_create(&options, &contexts[gemm]), NULL);
    }
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < CASES; i++) {
            int at = (i * (round + 1) + round) % CASES;
            int64_t M = cases[at].M, N = 40 + round, K = 30;
            ck_assert_int_eq(calls_of(contexts[SEBP_GEMM_NATIVE], M, N, K), 0);
            ck_assert_int_eq(calls_of(contexts[SEBP_GEMM_ONEDNN], M, N, K), 3);
            ck_assert_int_eq(calls_of(contexts[SEBP_GEMM_AUTO], M, N, K), cases[at].by_auto);
        }
    }
    for (int gemm = 0; gemm < 3; gemm++)
        sebp_context_destroy(contexts[gemm]);
}
END_TEST

/* An addition that failed half way may leave anything: that is not handed to LAPACK, which may not
 * come to an end with it. */
START_TEST(sums_of_nan)
{
    sebp_context *context = testing_context(SEBP_GEMM_ONEDNN, 1, 0);
    sebp_matrix g = testing_random_matrix(4, 4, SEBP_F32, TESTING_REAL);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(4, 4, &sums), context);
    gemm_status = dnnl_success;
    gemm_result = 1;
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    gemm_status = dnnl_runtime_error;
    gemm_result = NAN;
    testing_refuse(sebp_basis_sums_add(context, sums, &g), SEBP_ERROR_BACKEND, "oneDNN failed",
                   context);
#ifdef SEBP_HAVE_LAPACK
    lapack.calls = 0;
    testing_refuse(sebp_basis_solve(context, sums, 4, 2, &basis), SEBP_ERROR_NONFINITE,
                   "the sums hold a NaN", context);
    ck_assert_int_eq(lapack.calls, 0);
#endif
    ck_assert_ptr_null(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

/* Of this process, in bytes; 0: not known. */
static double resident_bytes(void)
{
    int64_t all = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file != NULL && fscanf(file, "%" SCNd64 " %" SCNd64, &all, &resident) != 2) {
        resident = 0;
    }
    if (file != NULL) {
        fclose(file);
    }
    return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

/* A forward and a backward in bf16, on the first `count` rows and the last. */
static void call_on_rows(sebp_context *context, const sebp_matrix *all, int64_t count)
{
    int64_t *indices = calloc((size_t)count + 1, sizeof *indices);
    ck_assert_ptr_nonnull(indices);
    for (int64_t i = 0; i < count; i++) {
        indices[i] = i;
    }
    indices[count] = all[0].rows - 1;
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_from_indices(indices, count + 1, all[0].rows, &rows), context);
    free(indices);
    testing_succeed(sebp_linear_forward(context, &all[1], &all[2], NULL, rows, NULL, &all[3]),
                    context);
    testing_succeed(sebp_linear_backward(context, &all[0], &all[1], &all[2], rows, NULL, &all[4],
                                         &all[5], NULL),
                    context);
    sebp_rows_destroy(rows);
}

/* Once oneDNN's cache is full, which holds the last 1024 products (context.h), products of new shapes take
 * the place of old ones. How much memory that is cannot be told so exactly: freed pieces lie between those
 * that are kept. _i: the dtype of dW. */
START_TEST(onednn_keeps_little)
{
    const char *const name = _i ? "onednn_keeps_little of dW in bf16" : "onednn_keeps_little";
    enum { N = 64, K = 96, FEWER = 80, MANY = 1020, MAX = 32 << 20 };
    sebp_context *context = testing_context(SEBP_GEMM_ONEDNN, 1, 0);
    bool has_bf16 = strcmp(sebp_isa(), "avx512bf16") == 0 || strcmp(sebp_isa(), "amx") == 0;
    if (SANITIZED || !has_bf16 || resident_bytes() <= 0) {
        testing_skip(name, "a sanitizer keeps what is freed, or this machine has no products of "
                           "bf16, or it does not tell of memory");
        sebp_context_destroy(context);
        return;
    }
    sebp_matrix all[] = {testing_random_matrix(MANY + 2, N, SEBP_BF16, TESTING_REAL),
                         testing_random_matrix(MANY + 2, K, SEBP_BF16, TESTING_REAL),
                         testing_random_matrix(N, K, SEBP_BF16, TESTING_REAL),
                         testing_random_matrix(MANY + 2, N, SEBP_BF16, TESTING_REAL),
                         testing_random_matrix(MANY + 2, K, SEBP_BF16, TESTING_REAL),
                         testing_random_matrix(N, K, (sebp_dtype)_i, TESTING_REAL)};
    sebp_matrix others[6]; /* of fewer in_features */
    memcpy(others, all, sizeof others);
    others[1].cols = others[2].cols = others[4].cols = others[5].cols = FEWER;
    for (int64_t count = 1; count <= MANY; count++) {
        call_on_rows(context, all, count);
    }
    double before = resident_bytes();
    for (int64_t count = 1; count <= MANY; count++) {
        call_on_rows(context, others, count);
    }
    double kept = resident_bytes() - before;
    ck_assert_msg(kept < MAX, "%.1f MB more", 1e-6 * kept);
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        testing_release(&all[i]);
    }
    sebp_context_destroy(context);
}
END_TEST

#else

START_TEST(onednn_keeps_little)
{
    testing_skip(_i ? "onednn_keeps_little of dW in bf16" : "onednn_keeps_little",
                 "built without oneDNN");
}
END_TEST

START_TEST(onednn_fails)
{
    testing_skip("onednn_fails", "built without oneDNN");
}
END_TEST

START_TEST(who_multiplies)
{
    testing_skip("who_multiplies", "built without oneDNN");
}
END_TEST

START_TEST(sums_of_nan)
{
    testing_skip("sums_of_nan", "built without oneDNN");
}
END_TEST

#endif

#ifdef SEBP_HAVE_HWLOC

static int hwloc_fails;

int hwloc_topology_load(hwloc_topology_t topology)
{
    int (*next)(hwloc_topology_t);
    void *found = dlsym(RTLD_NEXT, "hwloc_topology_load");
    memcpy(&next, &found, sizeof found);
    if (hwloc_fails) {
        errno = ENOMEM;
        return -1;
    }
    return next(topology);
}

/* The cores are the operating system's then; where they lie is not known. */
START_TEST(hwloc_fails_to_load)
{
    char message[200] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *context = NULL;
    sebp_info info = {.size_bytes = sizeof info}, before = {.size_bytes = sizeof before};
    options.message = message;
    options.message_bytes = sizeof message;
    ck_assert_int_eq(sebp_info_get(NULL, &before), SEBP_SUCCESS);
    hwloc_fails = 1;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_info_get(context, &info), SEBP_SUCCESS);
    ck_assert_str_eq(info.hwloc, "unknown");
    ck_assert_int_eq(info.cores, before.cores);
    ck_assert_int_eq(info.logical_cpus, before.logical_cpus);
    sebp_context_destroy(context);
    context = NULL;
    options.placement = SEBP_PLACEMENT_COMPACT;
    unsetenv("OMP_PROC_BIND");
    unsetenv("OMP_PLACES");
    unsetenv("GOMP_CPU_AFFINITY");
    unsetenv("KMP_AFFINITY");
#ifdef __linux__ /* elsewhere nothing is placed */
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_ERROR_BACKEND);
    ck_assert_str_eq(message, "sebp_context_create: hwloc failed");
#endif
    ck_assert_ptr_null(context);
    hwloc_fails = 0;
}
END_TEST

#else

START_TEST(hwloc_fails_to_load)
{
    testing_skip("hwloc_fails_to_load", "built without hwloc");
}
END_TEST

#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("libraries");
    TCase *tests = tcase_create("libraries");
    tcase_add_loop_test(tests, lapack_fails, 0, 2);
    tcase_add_test(tests, onednn_fails);
    tcase_add_test(tests, who_multiplies);
    tcase_add_test(tests, sums_of_nan);
    tcase_add_test(tests, hwloc_fails_to_load);
    tcase_add_loop_test(tests, onednn_keeps_little, SEBP_F32, SEBP_BF16 + 1);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
