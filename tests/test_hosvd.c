/* SPDX-License-Identifier: Apache-2.0 */
/*
 * HOSVD: eigenvectors of the sums of gradients against double precision, on any threads and in forked
 * children, of sums without full rank, and bad ranks. Without LAPACK: that it is said.
 */
#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "bases.h"
#include "testing.h"

#ifdef SEBP_HAVE_LAPACK

static int by_value(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Whether what is beside the diagonal is nothing but rounding. */
static int is_diagonal(const double *a, int64_t n)
{
    double on = 0, off = 0;
    for (int64_t i = 0; i < n * n; i++) {
        *(i / n == i % n ? &on : &off) += a[i] * a[i];
    }
    return off <= 1e-28 * on;
}

/* The eigenvalues of a symmetric matrix, ascending, by Jacobi's rotations; a is destroyed. */
static void eigenvalues(double *a, int64_t n, double *values)
{
    for (int sweep = 0; sweep < 30 && !is_diagonal(a, n); sweep++) {
        for (int64_t p = 0; p < n; p++) {
            for (int64_t q = p + 1; q < n; q++) {
                if (a[p * n + q] == 0) {
                    continue;
                }
                double angle = 0.5 * atan2(2 * a[p * n + q], a[q * n + q] - a[p * n + p]);
                double c = cos(angle), s = sin(angle);
                for (int64_t k = 0; k < n; k++) {
                    double one = a[p * n + k], other = a[q * n + k];
                    a[p * n + k] = c * one - s * other;
                    a[q * n + k] = s * one + c * other;
                }
                for (int64_t k = 0; k < n; k++) {
                    double one = a[k * n + p], other = a[k * n + q];
                    a[k * n + p] = c * one - s * other;
                    a[k * n + q] = s * one + c * other;
                }
            }
        }
    }
    for (int64_t i = 0; i < n; i++) {
        values[i] = a[i * n + i];
    }
    qsort(values, (size_t)n, sizeof *values, by_value);
}

/* That rows are the leading eigenvectors of `sum`, size x size: orthonormal, with small residuals,
 * their eigenvalues the largest, in descending order, of the share told; and of the right sign. */
static void check_vectors(const sebp_matrix *vectors, const double *sum, double share)
{
    int64_t rank = vectors->rows, size = vectors->cols;
    double *copy = testing_zeros(size * size, sizeof(double)),
           *values = testing_zeros(size, sizeof(double)), trace = 0, kept = 0, last = INFINITY;
    memcpy(copy, sum, (size_t)(size * size) * sizeof *copy);
    eigenvalues(copy, size, values);
    for (int64_t i = 0; i < size; i++) {
        trace += sum[i * size + i];
    }
    /* f32 sums and an f32 solution. */
    double bound = 2e-6 * sqrt((double)size) * values[size - 1];
    for (int64_t i = 0; i < rank; i++) {
        double value = 0, largest = 0, residual = 0;
        for (int64_t j = 0; j <= i; j++) {
            double dot = 0;
            for (int64_t k = 0; k < size; k++) {
                dot += testing_get(vectors, i, k) * testing_get(vectors, j, k);
            }
            ck_assert_msg(fabs(dot - (i == j)) < 2e-6 * sqrt((double)size),
                          "vectors %" PRId64 " and %" PRId64 " of %" PRId64 ": %g", i, j, size,
                          dot);
        }
        double *product = testing_zeros(size, sizeof(double));
        for (int64_t j = 0; j < size; j++) {
            for (int64_t k = 0; k < size; k++) {
                product[j] += sum[j * size + k] * testing_get(vectors, i, k);
            }
            value += product[j] * testing_get(vectors, i, j);
            double element = testing_get(vectors, i, j);
            largest = fabs(element) > fabs(largest) ? element : largest;
        }
        for (int64_t j = 0; j < size; j++) {
            residual = fmax(residual, fabs(product[j] - value * testing_get(vectors, i, j)));
        }
        free(product);
        ck_assert_msg(residual < bound, "vector %" PRId64 " of %" PRId64 ": residual %g", i, size,
                      residual);
        ck_assert_msg(fabs(value - values[size - 1 - i]) < bound,
                      "eigenvalue %" PRId64 " is %g, not %g", i, value, values[size - 1 - i]);
        ck_assert_msg(value < last + bound && largest > 0, "order or sign of %" PRId64, i);
        last = value;
        kept += values[size - 1 - i];
    }
    ck_assert_msg(fabs(share - kept / trace) < 1e-5, "share %g, not %g", share, kept / trace);
    free(copy);
    free(values);
}

START_TEST(eigenvectors)
{
    for (int round = 0; round < testing_rounds(40); round++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), 0);
        int64_t N = testing_between(1, 50), K = testing_between(1, 50);
        int64_t min = N < K ? N : K, max = N < K ? K : N;
        int64_t count = testing_between(1, 4) + (max - 1) / min;
        double *out = testing_zeros(N * N, sizeof(double)),
               *in = testing_zeros(K * K, sizeof(double));
        sebp_basis_sums *sums = NULL;
        testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
        for (int64_t t = 0; t < count; t++) {
            sebp_matrix g = testing_random_matrix(N, K, testing_dtype(), TESTING_REAL);
            for (int64_t i = 0; i < N * K; i++) { /* some spectrum, not all alike */
                double scale = 1.0 / (double)(1 + i / K + i % K);
                testing_set(&g, i / K, i % K, scale * testing_get(&g, i / K, i % K));
            }
            testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
            ck_assert_int_eq(sebp_basis_sums_count(sums), t + 1);
            bases_add_squares(&g, out, in);
            testing_release(&g);
        }
        sebp_basis *basis = NULL;
        int64_t p = testing_chance(0.4) ? N : testing_between(1, N);
        int64_t q = testing_chance(0.4) ? K : testing_between(1, K);
        testing_succeed(sebp_basis_solve(context, sums, p, q, &basis), context);
        sebp_matrix u_out = sebp_basis_out(basis), u_in = sebp_basis_in(basis);
        ck_assert(u_out.rows == p && u_out.cols == N && u_in.rows == q && u_in.cols == K);
        check_vectors(&u_out, out, sebp_basis_share_out(basis));
        check_vectors(&u_in, in, sebp_basis_share_in(basis));

        /* The sums are as they were. */
        sebp_basis *again = NULL;
        testing_succeed(sebp_basis_solve(context, sums, p, q, &again), context);
        bases_same(basis, again);
        sebp_basis_destroy(again);
        sebp_basis_destroy(basis);
        sebp_basis_sums_destroy(sums);
        sebp_context_destroy(context);
        free(out);
        free(in);
    }
}
END_TEST

/* That each row is an eigenvector, by its residual: the whole spectrum by Jacobi would take long. */
static void check_residuals(const sebp_matrix *vectors, const double *sum)
{
    int64_t size = vectors->cols;
    for (int64_t i = 0; i < vectors->rows; i++) {
        double value = 0, square = 0, residual = 0;
        for (int64_t j = 0; j < size; j++) {
            double dot = 0, element = testing_get(vectors, i, j);
            for (int64_t k = 0; k < size; k++) {
                dot += sum[j * size + k] * testing_get(vectors, i, k);
            }
            value += dot * element;
            square += dot * dot;
        }
        residual = sqrt(fmax(0, square - value * value)) / value;
        ck_assert_msg(residual < 1e-3, "vector %" PRId64 ": residual %g of its eigenvalue", i,
                      residual);
    }
}

/*
 * Sizes of several panels, on any number of threads and with little scratch memory: the sums are the
 * same, bit for bit. The vectors, which LAPACK finds on as many threads, need only be good.
 */
START_TEST(large_sums)
{
    const int64_t N = 300, K = 270, count = 3;
    sebp_matrix g[] = {testing_random_matrix(N, K, SEBP_F32, TESTING_REAL),
                       testing_random_matrix(N, K, SEBP_BF16, TESTING_REAL),
                       testing_random_matrix(N, K, SEBP_F32, TESTING_REAL)};
    sebp_matrix first_out = testing_matrix(N, N, N, SEBP_F32),
                first_in = testing_matrix(K, K, K, SEBP_F32);
    double *out = testing_zeros(N * N, sizeof(double)), *in = testing_zeros(K * K, sizeof(double)),
           first_energy = 0;
    for (int64_t t = 0; t < count; t++) {
        bases_add_squares(&g[t], out, in);
    }
    for (int threads = 1; threads <= 3; threads++) {
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, threads, TESTING_MIN_SCRATCH);
        sebp_basis_sums *sums = NULL;
        sebp_basis *basis = NULL;
        double energy = 0;
        testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
        for (int64_t t = 0; t < count; t++) {
            testing_succeed(sebp_basis_sums_add(context, sums, &g[t]), context);
        }
        if (threads == 1) {
            ck_assert_int_eq(sebp_basis_sums_export(sums, &first_energy, &first_out, &first_in),
                             SEBP_SUCCESS);
        } else {
            sebp_matrix sum_out = testing_matrix(N, N, N, SEBP_F32),
                        sum_in = testing_matrix(K, K, K, SEBP_F32);
            ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &sum_out, &sum_in),
                             SEBP_SUCCESS);
            ck_assert(testing_same_bits(&sum_out, &first_out));
            ck_assert(testing_same_bits(&sum_in, &first_in));
            ck_assert_mem_eq(&energy, &first_energy, sizeof energy);
            testing_release(&sum_out);
            testing_release(&sum_in);
        }
        testing_succeed(sebp_basis_solve(context, sums, 5, 7, &basis), context);
        sebp_matrix u_out = sebp_basis_out(basis), u_in = sebp_basis_in(basis);
        check_residuals(&u_out, out);
        check_residuals(&u_in, in);
        sebp_basis_destroy(basis);
        sebp_basis_sums_destroy(sums);
        sebp_context_destroy(context);
    }
    for (int64_t t = 0; t < count; t++) {
        testing_release(&g[t]);
    }
    testing_release(&first_out);
    testing_release(&first_in);
    free(out);
    free(in);
}
END_TEST

/* A host's pool that has no threads left but the calling one. */
static void one_after_the_other(void *pool, int64_t tasks, sebp_task task, void *work)
{
    (void)pool;
    for (int64_t i = 0; i < tasks; i++) {
        task(work, i);
    }
}

/* _i: what a child solves with after the parent has solved on all threads: the context that it has
 * inherited, or one of its own, without a pool or with one. */
START_TEST(fork_and_solve)
{
    const int64_t N = 200, K = 150;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    if (sebp_context_threads(context) == 1) {
        testing_skip("fork_and_solve", "built without OpenMP, which LAPACK's BLAS may use");
        sebp_context_destroy(context);
        return;
    }
    sebp_basis_sums *sums = NULL;
    sebp_basis *want = NULL;
    sebp_matrix g = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_succeed(sebp_basis_solve(context, sums, N, 9, &want), context);
    fflush(NULL);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60); /* a child that hangs is ended */
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = 2;
        options.gemm = testing_gemm(SEBP_GEMM_AUTO);
        options.parallel_for = _i == 2 ? one_after_the_other : NULL;
        sebp_context *own = NULL;
        sebp_basis *got = NULL;
        sebp_status status = _i == 0 ? SEBP_SUCCESS : sebp_context_create(&options, &own);
        if (status == SEBP_SUCCESS) {
            status = sebp_basis_solve(_i == 0 ? context : own, sums, N, 9, &got);
        }
        int is_good = fabs(sebp_basis_share_out(got) - sebp_basis_share_out(want)) < 1e-5 &&
                      fabs(sebp_basis_share_in(got) - sebp_basis_share_in(want)) < 1e-5;
        sebp_basis_destroy(got);
        sebp_context_destroy(own);
        sebp_basis_destroy(want); /* valgrind looks for leaks in the child as well */
        sebp_basis_sums_destroy(sums);
        testing_release(&g);
        sebp_context_destroy(context);
        _exit(status != SEBP_SUCCESS ? 2 : is_good ? 0 : 3);
    }
    testing_good_exit(child);

    /* And the parent has its threads. */
    sebp_basis *again = NULL;
    testing_succeed(sebp_basis_solve(context, sums, N, 9, &again), context);
    bases_same(again, want);
    sebp_basis_destroy(again);
    sebp_basis_destroy(want);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

/* A rank-deficient sum, whose zero eigenvalues are many, has orthonormal vectors all the same. */
START_TEST(few_gradients)
{
    const int64_t N = 90, K = 30;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL;
    double *out = testing_zeros(N * N, sizeof(double)), *in = testing_zeros(K * K, sizeof(double));
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    for (int t = 0; t < 3; t++) { /* of rank 2 each */
        sebp_matrix g = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL),
                    a = testing_random_matrix(2, N, SEBP_F32, TESTING_REAL);
        for (int64_t i = 0; i < N * K; i++) {
            double sum = testing_get(&a, 0, i / K) * testing_get(&g, 0, i % K) +
                         testing_get(&a, 1, i / K) * testing_get(&g, 1, i % K);
            if (i / K > 1) {
                testing_set(&g, i / K, i % K, sum);
            }
        }
        testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
        bases_add_squares(&g, out, in);
        testing_release(&g);
        testing_release(&a);
    }
    const int64_t ranks[][2] = {{N, K}, {N - 1, K - 1}, {40, 20}};
    for (int i = 0; i < 3; i++) {
        sebp_basis *basis = NULL;
        testing_succeed(sebp_basis_solve(context, sums, ranks[i][0], ranks[i][1], &basis), context);
        sebp_matrix u_out = sebp_basis_out(basis), u_in = sebp_basis_in(basis);
        check_vectors(&u_out, out, sebp_basis_share_out(basis));
        check_vectors(&u_in, in, sebp_basis_share_in(basis));
        sebp_basis_destroy(basis);
    }
    sebp_basis_sums_destroy(sums);
    sebp_context_destroy(context);
    free(out);
    free(in);
}
END_TEST

START_TEST(bad_ranks)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(20, 6, &sums), context);
    testing_refuse(sebp_basis_solve(context, sums, 1, 1, &basis), SEBP_ERROR_VALUE,
                   "0 gradients of 20x6", context);
    sebp_matrix g = testing_matrix(20, 6, 6, SEBP_F32);
    memset(g.data, 0, 20 * 6 * sizeof(float));
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_refuse(sebp_basis_solve(context, sums, 1, 1, &basis), SEBP_ERROR_VALUE, "all zero",
                   context);
    testing_fill(&g, TESTING_REAL);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    const int64_t bad[][2] = {{0, 1}, {-1, 1}, {21, 1}, {1, 0}, {1, 7}, {1, INT64_MAX}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        testing_refuse(sebp_basis_solve(context, sums, bad[i][0], bad[i][1], &basis),
                       SEBP_ERROR_VALUE, "rank", context);
    }
    testing_refuse(sebp_basis_solve(context, sums, 13, 6, &basis), SEBP_ERROR_VALUE,
                   "rank_out of 13", context); /* 2 gradients of rank 6 at most */
    ck_assert_int_eq(sebp_basis_solve(NULL, sums, 1, 1, &basis), SEBP_ERROR_NULL);
    testing_refuse(sebp_basis_solve(context, NULL, 1, 1, &basis), SEBP_ERROR_NULL, "sums", context);
    testing_refuse(sebp_basis_solve(context, sums, 1, 1, NULL), SEBP_ERROR_NULL, "basis", context);
    ck_assert_ptr_null(basis);
    testing_succeed(sebp_basis_solve(context, sums, 12, 6, &basis), context);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

#else

START_TEST(without_lapack)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    sebp_matrix g = testing_random_matrix(9, 7, SEBP_F32, TESTING_REAL);
    double *out = testing_zeros(9 * 9, sizeof(double)), *in = testing_zeros(7 * 7, sizeof(double));
    bases_add_squares(&g, out, in);
    testing_succeed(sebp_basis_sums_create(9, 7, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_refuse(sebp_basis_solve(context, sums, 5, 5, &basis), SEBP_ERROR_UNSUPPORTED,
                   "liblapacke-dev", context);
    ck_assert_ptr_null(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    free(out);
    free(in);
    sebp_context_destroy(context);
}
END_TEST

#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("hosvd");
    TCase *tests = tcase_create("hosvd");
#ifdef SEBP_HAVE_LAPACK
    tcase_add_test(tests, eigenvectors);
    tcase_add_test(tests, large_sums);
    tcase_add_loop_test(tests, fork_and_solve, 0, 3);
    tcase_add_test(tests, few_gradients);
    tcase_add_test(tests, bad_ranks);
#else
    tcase_add_test(tests, without_lapack);
#endif
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
