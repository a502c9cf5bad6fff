/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Libraries underneath that fail: what LAPACK and oneDNN may come back with is told for what it is,
 * and nothing is lost. The program brings functions of theirs of its own, which the linker prefers,
 * and which fail on demand.
 */
#include "config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef SEBP_HAVE_LAPACK
#include <lapacke.h>
#endif
#ifdef SEBP_HAVE_ONEDNN
#include <dnnl.h>
#endif

#include <sebp/sebp.h>

#include "testing.h"

static void expect(sebp_status got, sebp_status wanted, const char *word,
                   const sebp_context *context)
{
    const char *message = sebp_context_message(context);
    ck_assert_msg(got == wanted && strstr(message, word) != NULL,
                  "\"%s\", not \"%s\" with '%s': %s", sebp_status_string(got),
                  sebp_status_string(wanted), word, message);
}

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

    const float odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        lapack.info = 0;
        lapack.value = odd[i];
        lapack.element = 1;
        expect(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_NONFINITE, "NaN",
               context);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), routine));
        lapack.value = 7;
        lapack.element = odd[i];
        expect(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_NONFINITE, "NaN",
               context);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), routine));
    }
    lapack.element = 1;
    lapack.info = 3;
    expect(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_BACKEND,
           "finds no eigenvectors: 3", context);
    lapack.info = -5;
    expect(sebp_basis_solve(context, sums, rank, rank, &basis), SEBP_ERROR_BACKEND,
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
    testing_skip("lapack_fails", "built without LAPACK");
}
END_TEST

#endif

#ifdef SEBP_HAVE_ONEDNN

static dnnl_status_t gemm_status;
static float gemm_result;

dnnl_status_t dnnl_sgemm(char transa, char transb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k,
                         float alpha, const float *a, dnnl_dim_t lda, const float *b,
                         dnnl_dim_t ldb, float beta, float *c, dnnl_dim_t ldc)
{
    (void)transa, (void)transb, (void)k, (void)alpha, (void)a, (void)lda, (void)b, (void)ldb;
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
    expect(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), SEBP_ERROR_BACKEND,
           "sebp_linear_forward: oneDNN has no memory", context);
    gemm_status = dnnl_runtime_error;
    expect(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), SEBP_ERROR_BACKEND,
           "sebp_linear_forward: oneDNN failed", context);
    gemm_status = dnnl_success;
    testing_succeed(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &y), context);
    testing_release(&x);
    testing_release(&w);
    testing_release(&y);
    sebp_context_destroy(context);
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
    expect(sebp_basis_sums_add(context, sums, &g), SEBP_ERROR_BACKEND, "oneDNN failed", context);
#ifdef SEBP_HAVE_LAPACK
    lapack.calls = 0;
    expect(sebp_basis_solve(context, sums, 4, 2, &basis), SEBP_ERROR_NONFINITE,
           "the sums hold a NaN", context);
    ck_assert_int_eq(lapack.calls, 0);
#endif
    ck_assert_ptr_null(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

#else

START_TEST(onednn_fails)
{
    testing_skip("onednn_fails", "built without oneDNN");
}
END_TEST

START_TEST(sums_of_nan)
{
    testing_skip("sums_of_nan", "built without oneDNN");
}
END_TEST

#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("libraries");
    TCase *tests = tcase_create("libraries");
    tcase_add_loop_test(tests, lapack_fails, 0, 2);
    tcase_add_test(tests, onednn_fails);
    tcase_add_test(tests, sums_of_nan);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
