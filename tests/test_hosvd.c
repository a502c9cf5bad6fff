/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bases: the sums of gradients and their eigenvectors against double precision, planted bases, the
 * files, every byte of them damaged in turn, and bad input. Without LAPACK: that it is said.
 */
#include "config.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "testing.h"

static void expect_refusal(sebp_status got, sebp_status want, const char *word,
                           const sebp_context *context)
{
    ck_assert_msg(got == want && strstr(sebp_context_message(context), word) != NULL,
                  "%s, not %s with \"%s\": %s", sebp_status_string(got), sebp_status_string(want),
                  word, sebp_context_message(context));
}

static void *array(int64_t count)
{
    double *data = calloc((size_t)count + 1, sizeof *data);
    ck_assert_ptr_nonnull(data);
    return data;
}

/* Adds G G^T to out, N x N, and G^T G to in, K x K. */
static void add_squares(const sebp_matrix *gradient, double *out, double *in)
{
    int64_t N = gradient->rows, K = gradient->cols;
    double *g = array(N * K);
    for (int64_t i = 0; i < N * K; i++) {
        g[i] = testing_get(gradient, i / K, i % K);
    }
    for (int64_t i = 0; i < N; i++) {
        for (int64_t j = 0; j < N; j++) {
            for (int64_t k = 0; k < K; k++) {
                out[i * N + j] += g[i * K + k] * g[j * K + k];
            }
        }
    }
    for (int64_t n = 0; n < N; n++) {
        for (int64_t i = 0; i < K; i++) {
            for (int64_t j = 0; j < K; j++) {
                in[i * K + j] += g[n * K + i] * g[n * K + j];
            }
        }
    }
    free(g);
}

static void expect_same_basis(const sebp_basis *one, const sebp_basis *other)
{
    sebp_matrix a[] = {sebp_basis_out(one), sebp_basis_in(one)};
    sebp_matrix b[] = {sebp_basis_out(other), sebp_basis_in(other)};
    double shares[][2] = {{sebp_basis_share_out(one), sebp_basis_share_out(other)},
                          {sebp_basis_share_in(one), sebp_basis_share_in(other)}};
    for (int side = 0; side < 2; side++) {
        ck_assert(a[side].rows == b[side].rows && a[side].cols == b[side].cols);
        ck_assert(testing_same_bits(&a[side], &b[side]));
        ck_assert_mem_eq(&shares[side][0], &shares[side][1], sizeof(double));
    }
}

#ifdef SEBP_HAVE_LAPACK

/* The eigenvalues of a symmetric matrix, ascending, by Jacobi's rotations; a is destroyed. */
static int by_value(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void eigenvalues(double *a, int64_t n, double *values)
{
    for (int sweep = 0; sweep < 30; sweep++) {
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
    double *copy = array(size * size), *values = array(size), trace = 0, kept = 0, last = INFINITY;
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
        double *product = array(size);
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
        double *out = array(N * N), *in = array(K * K);
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
            add_squares(&g, out, in);
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
        expect_same_basis(basis, again);
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
    double *out = array(N * N), *in = array(K * K), first_energy = 0;
    for (int64_t t = 0; t < count; t++) {
        add_squares(&g[t], out, in);
    }
    for (int threads = 1; threads <= 3; threads++) {
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, threads, (int64_t)1 << 20);
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
    int result = -1;
    ck_assert_int_eq(waitpid(child, &result, 0), child);
    ck_assert_msg(WIFEXITED(result), "the child was ended by signal %d", WTERMSIG(result));
    ck_assert_msg(WEXITSTATUS(result) == 0, "the child exited with %d", WEXITSTATUS(result));

    /* And the parent has its threads. */
    sebp_basis *again = NULL;
    testing_succeed(sebp_basis_solve(context, sums, N, 9, &again), context);
    expect_same_basis(again, want);
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
    double *out = array(N * N), *in = array(K * K);
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
        add_squares(&g, out, in);
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

/* size orthonormal rows: the product of reflections I - 2 h h^T. */
static double *random_rotation(int64_t size)
{
    double *u = array(size * size), *h = array(size);
    for (int64_t i = 0; i < size; i++) {
        u[i * size + i] = 1;
    }
    for (int reflection = 0; reflection < 6; reflection++) {
        double square = 0;
        for (int64_t j = 0; j < size; j++) {
            h[j] = testing_uniform();
            square += h[j] * h[j];
        }
        for (int64_t i = 0; i < size; i++) {
            double dot = 0;
            for (int64_t j = 0; j < size; j++) {
                dot += u[i * size + j] * h[j];
            }
            for (int64_t j = 0; j < size; j++) {
                u[i * size + j] -= 2 * dot / square * h[j];
            }
        }
    }
    free(h);
    return u;
}

/* The share of the energy of a matrix that its top 1% holds. */
static int by_square(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a * a < b * b) - (a * a > b * b);
}

static double top_share(double *elements, int64_t count)
{
    double top = 0, all = 0;
    qsort(elements, (size_t)count, sizeof *elements, by_square);
    for (int64_t i = 0; i < count; i++) {
        all += elements[i] * elements[i];
        top += i < count / 100 ? elements[i] * elements[i] : 0;
    }
    return top / all;
}

/*
 * Gradients G = A^T C B with bases A, B and elements C_ij of a size that falls with i and j. Bases
 * found from 40 of them must make a new one as sparse as the planted ones do, nearly; and with one
 * of them applied transposed they must not, or this would prove nothing.
 */
START_TEST(planted_bases_are_found)
{
    const int64_t N = 64, K = 48;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    double *a = random_rotation(N), *b = random_rotation(K), *c = array(N * K);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    sebp_matrix g = testing_matrix(N, K, K, SEBP_F32);
    for (int t = 0; t <= 40; t++) {
        double *left = array(N * K); /* C B */
        for (int64_t i = 0; i < N; i++) {
            for (int64_t j = 0; j < K; j++) {
                c[i * K + j] = testing_uniform() * pow(0.9, (double)i) * pow(0.6, (double)j);
            }
        }
        for (int64_t i = 0; i < N * K; i++) {
            for (int64_t k = 0; k < K; k++) {
                left[i] += c[i / K * K + k] * b[k * K + i % K];
            }
        }
        for (int64_t i = 0; i < N * K; i++) {
            double sum = 0;
            for (int64_t n = 0; n < N; n++) {
                sum += a[n * N + i / K] * left[n * K + i % K];
            }
            testing_set(&g, i / K, i % K, sum);
        }
        free(left);
        if (t < 40) {
            testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
        }
    }
    double planted = top_share(c, N * K);
    testing_succeed(sebp_basis_solve(context, sums, N, K, &basis), context);

    /* G as dY^T X: dY = G^T, K x N, X = I, K x K. */
    sebp_matrix dy = testing_matrix(K, N, N, SEBP_F32), x = testing_matrix(K, K, K, SEBP_F32);
    sebp_matrix r = testing_matrix(N, K, K, SEBP_F32), u_in = sebp_basis_in(basis);
    sebp_matrix u_out = sebp_basis_out(basis), turned = testing_matrix(K, K, K, SEBP_F32);
    for (int64_t i = 0; i < K; i++) {
        for (int64_t j = 0; j < N; j++) {
            testing_set(&dy, i, j, testing_get(&g, j, i));
        }
        for (int64_t j = 0; j < K; j++) {
            testing_set(&x, i, j, i == j);
            testing_set(&turned, i, j, testing_get(&u_in, j, i));
        }
    }
    sebp_basis *wrong = NULL;
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &turned, &wrong), SEBP_SUCCESS);
    double shares[2];
    for (int i = 0; i < 2; i++) {
        testing_succeed(sebp_sparsegrad_gradient(context, i == 0 ? basis : wrong, &dy, &x, NULL,
                                                 NULL, SEBP_ROTATE_AUTO, &r),
                        context);
        for (int64_t j = 0; j < N * K; j++) {
            c[j] = testing_get(&r, j / K, j % K);
        }
        shares[i] = top_share(c, N * K);
    }
    ck_assert_msg(planted > 0.5 && shares[0] > 0.94 * planted,
                  "the top 1%% holds %g of the energy, as planted %g", shares[0], planted);
    ck_assert_msg(shares[1] < 0.9 * planted, "with a transposed basis %g", shares[1]);

    sebp_basis_destroy(wrong);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&r);
    testing_release(&turned);
    free(a);
    free(b);
    free(c);
    sebp_context_destroy(context);
}
END_TEST

/*
 * Gradients whose sums are diagonal in the planted bases, G = A^T C B with C_ii = +-0.85^i alone: what
 * is found is what was planted, up to signs. Of another gradient, whose C is full and falls with i
 * and j, the top 1% then holds at least the energy that the top 1% of C does.
 */
START_TEST(top_1_percent_holds_what_was_planted)
{
    const int64_t N = 64, K = 48;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    double *a = random_rotation(N), *b = random_rotation(K), *c = array(N * K);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    sebp_matrix dy = testing_matrix(K, N, N, SEBP_F32), x = testing_matrix(K, K, K, SEBP_F32);
    sebp_matrix g = testing_matrix(N, K, K, SEBP_F32), r = testing_matrix(N, K, K, SEBP_F32);
    for (int t = 0; t <= 3; t++) {
        double *left = array(N * K); /* A^T C */
        for (int64_t i = 0; i < K; i++) {
            for (int64_t j = 0; j < K; j++) {
                double size = t < 3 ? i == j : testing_uniform() * pow(0.85, (double)j);
                c[i * K + j] = size * pow(0.85, (double)i) * (testing_chance(0.5) ? 1 : -1);
            }
        }
        for (int64_t n = 0; n < N; n++) {
            for (int64_t i = 0; i < K; i++) {
                for (int64_t j = 0; j < K; j++) {
                    left[n * K + j] += a[i * N + n] * c[i * K + j];
                }
            }
            for (int64_t k = 0; k < K; k++) {
                double sum = 0;
                for (int64_t j = 0; j < K; j++) {
                    sum += left[n * K + j] * b[j * K + k];
                }
                testing_set(&g, n, k, sum);
                testing_set(&dy, k, n, sum); /* dY^T X, of dY = G^T and X = I */
            }
        }
        free(left);
        if (t < 3) {
            testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
        }
    }
    for (int64_t i = 0; i < K * K; i++) {
        testing_set(&x, i / K, i % K, i / K == i % K);
    }
    double planted = top_share(c, N * K);
    testing_succeed(sebp_basis_solve(context, sums, N, K, &basis), context);
    testing_succeed(
        sebp_sparsegrad_gradient(context, basis, &dy, &x, NULL, NULL, SEBP_ROTATE_AUTO, &r),
        context);
    for (int64_t j = 0; j < N * K; j++) {
        c[j] = testing_get(&r, j / K, j % K);
    }
    double found = top_share(c, N * K);
    ck_assert_msg(planted > 0.5 && found > (1 - 1e-4) * planted,
                  "the top 1%% holds %g of the energy, as planted %g", found, planted);
    for (int64_t i = 0; i < N * K; i++) {
        c[i] = testing_get(&g, i / K, i % K);
    }
    double plain = top_share(c, N * K); /* or there would be nothing to find */
    ck_assert_msg(plain < 0.75 * planted, "%g without bases, %g with them", plain, planted);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&r);
    free(a);
    free(b);
    free(c);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(bad_ranks)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(20, 6, &sums), context);
    expect_refusal(sebp_basis_solve(context, sums, 1, 1, &basis), SEBP_ERROR_VALUE,
                   "0 gradients of 20x6", context);
    sebp_matrix g = testing_matrix(20, 6, 6, SEBP_F32);
    memset(g.data, 0, 20 * 6 * sizeof(float));
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    expect_refusal(sebp_basis_solve(context, sums, 1, 1, &basis), SEBP_ERROR_VALUE, "all zero",
                   context);
    testing_fill(&g, TESTING_REAL);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    const int64_t bad[][2] = {{0, 1}, {-1, 1}, {21, 1}, {1, 0}, {1, 7}, {1, INT64_MAX}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        expect_refusal(sebp_basis_solve(context, sums, bad[i][0], bad[i][1], &basis),
                       SEBP_ERROR_VALUE, "rank", context);
    }
    expect_refusal(sebp_basis_solve(context, sums, 13, 6, &basis), SEBP_ERROR_VALUE,
                   "rank_out of 13", context); /* 2 gradients of rank 6 at most */
    ck_assert_int_eq(sebp_basis_solve(NULL, sums, 1, 1, &basis), SEBP_ERROR_NULL);
    expect_refusal(sebp_basis_solve(context, NULL, 1, 1, &basis), SEBP_ERROR_NULL, "sums", context);
    expect_refusal(sebp_basis_solve(context, sums, 1, 1, NULL), SEBP_ERROR_NULL, "basis", context);
    ck_assert_ptr_null(basis);
    testing_succeed(sebp_basis_solve(context, sums, 12, 6, &basis), context);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    sebp_context_destroy(context);
}
END_TEST

/* Sums copied out and in go on as if they had never been. */
START_TEST(sums_copied)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL, *other = NULL;
    sebp_basis *want = NULL, *got = NULL;
    sebp_matrix g = testing_random_matrix(9, 7, SEBP_F32, TESTING_REAL),
                h = testing_random_matrix(9, 7, SEBP_BF16, TESTING_REAL);
    sebp_matrix out = testing_matrix(9, 9, 11, SEBP_F32), in = testing_matrix(7, 7, 7, SEBP_F32);
    double energy = 0, squares[9 * 9] = {0}, others[7 * 7] = {0}, trace = 0;
    testing_succeed(sebp_basis_sums_create(9, 7, &sums), context);
    testing_succeed(sebp_basis_sums_create(9, 7, &other), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &h), context);
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &out, &in), SEBP_SUCCESS);
    add_squares(&g, squares, others);
    add_squares(&h, squares, others);
    for (int64_t i = 0; i < 9 * 9; i++) { /* whole and symmetric */
        ck_assert(fabs(testing_get(&out, i / 9, i % 9) - squares[i]) < 1e-5);
        trace += i % 10 == 0 ? squares[i] : 0;
    }
    for (int64_t i = 0; i < 7 * 7; i++) {
        ck_assert(fabs(testing_get(&in, i / 7, i % 7) - others[i]) < 1e-5);
    }
    ck_assert(fabs(energy - trace) < 1e-9 * trace);

    testing_succeed(sebp_basis_sums_add(context, other, &h), context); /* what was there goes */
    ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_count(other), 2);

    sebp_matrix view = out;
    ck_assert_int_eq(sebp_basis_sums_export(NULL, &energy, &out, &in), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_export(sums, NULL, &out, &in), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, NULL, &in), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &in, &out), SEBP_ERROR_SHAPE);
    view.dtype = SEBP_BF16;
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &view, &in), SEBP_ERROR_DTYPE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 3, energy, &view, &in), SEBP_ERROR_DTYPE);
    view = in;
    view.data = out.data;
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &out, &view), SEBP_ERROR_ALIAS);
    view.stride = 6;
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &out, &view), SEBP_ERROR_STRIDE);
    ck_assert_int_eq(sebp_basis_sums_import(NULL, 3, energy, &out, &in), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_import(other, -1, energy, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 3, -1, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 3, NAN, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 3, INFINITY, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 3, energy, &in, &out), SEBP_ERROR_SHAPE);
    /* A sum that is not of the energy told, by one element of a diagonal, or all of them; or by
     * the energy itself. */
    ck_assert_int_eq(sebp_basis_sums_import(other, 2, 1.001 * energy, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 2, 0.999 * energy, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 2, 0, &out, &in), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_basis_sums_import(other, 0, energy, &out, &in), SEBP_ERROR_VALUE);
    for (int side = 0; side < 2; side++) {
        const sebp_matrix *sum = side == 0 ? &out : &in;
        double element = testing_get(sum, 2, 2), next = testing_get(sum, 3, 3);
        const double factors[] = {2, 0.5, 0, -1};
        for (int i = 0; i < 4; i++) {
            testing_set(sum, 2, 2, factors[i] * element);
            ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_ERROR_VALUE);
        }
        testing_set(sum, 2, 2, element + next + 1); /* the trace is right, but one is negative */
        testing_set(sum, 3, 3, -1);
        ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_ERROR_VALUE);
        testing_set(sum, 2, 2, element);
        testing_set(sum, 3, 3, next);
    }
    /* Beside a diagonal, what no dot product of these norms can be. */
    for (int side = 0; side < 2; side++) {
        const sebp_matrix *sum = side == 0 ? &out : &in;
        double element = testing_get(sum, 1, 6);
        double max = sqrt(testing_get(sum, 1, 1) * testing_get(sum, 6, 6));
        const double bad[] = {1e30, -1e30, 1.001 * max, -1.001 * max};
        for (int i = 0; i < 4; i++) {
            testing_set(sum, 1, 6, bad[i]);
            ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_ERROR_VALUE);
        }
        testing_set(sum, 1, 6, NAN);
        ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_ERROR_NONFINITE);
        testing_set(sum, 1, 6, INFINITY);
        ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_ERROR_NONFINITE);
        testing_set(sum, 1, 6, element);
    }
    ck_assert_int_eq(sebp_basis_sums_count(other), 2);

    /* Below a diagonal anything goes. */
    const double odd[] = {NAN, INFINITY, -INFINITY, 1e30};
    for (int64_t i = 0; i < 9; i++) {
        for (int64_t j = 0; j < i; j++) {
            testing_set(&out, i, j, odd[(i + j) % 4]);
            if (i < 7) {
                testing_set(&in, i, j, odd[(i + j) % 4]);
            }
        }
    }
    ck_assert_int_eq(sebp_basis_sums_import(other, 2, energy, &out, &in), SEBP_SUCCESS);

    sebp_basis_sums *both[] = {sums, other};
    sebp_basis **bases[] = {&want, &got};
    for (int i = 0; i < 2; i++) {
        testing_succeed(sebp_basis_sums_add(context, both[i], &g), context);
        testing_succeed(sebp_basis_solve(context, both[i], 9, 3, bases[i]), context);
        sebp_basis_sums_destroy(both[i]);
    }
    expect_same_basis(want, got);
    sebp_basis_destroy(want);
    sebp_basis_destroy(got);
    testing_release(&g);
    testing_release(&h);
    testing_release(&out);
    testing_release(&in);
    sebp_context_destroy(context);
}
END_TEST

/* Counts that are no number of gradients: whose products overflow, or what they would allow for. */
START_TEST(counts_that_overflow)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    const int64_t many = (INT64_C(1) << 30) / 9; /* of 9 x 7 that sums take */
    sebp_basis_sums *sums = NULL, *one = NULL;
    sebp_matrix g = testing_random_matrix(9, 7, SEBP_F32, TESTING_REAL);
    sebp_matrix out = testing_matrix(9, 9, 9, SEBP_F32), in = testing_matrix(7, 7, 7, SEBP_F32);
    double energy = 0;
    testing_succeed(sebp_basis_sums_create(9, 7, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &out, &in), SEBP_SUCCESS);
    const int64_t bad[] = {INT64_MAX, INT64_MAX - 1,    INT64_MAX / 7,    INT64_MAX / 9 + 1,
                           1LL << 62, INT64_MAX / 1000, INT64_C(1) << 40, many + 1};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ck_assert_int_eq(sebp_basis_sums_import(sums, bad[i], energy, &out, &in),
                         SEBP_ERROR_OVERFLOW);
    }
    ck_assert_int_eq(sebp_basis_sums_count(sums), 1);
    ck_assert_int_eq(sebp_basis_sums_import(sums, many, energy, &out, &in), SEBP_SUCCESS);
    expect_refusal(sebp_basis_sums_add(context, sums, &g), SEBP_ERROR_OVERFLOW, "full", context);
    ck_assert_int_eq(sebp_basis_sums_count(sums), many);

    /* Zeros count, too. */
    sebp_matrix nothing = testing_matrix(1, 1, 1, SEBP_F32);
    testing_set(&nothing, 0, 0, 0);
    testing_succeed(sebp_basis_sums_create(1, 1, &one), context);
    ck_assert_int_eq(sebp_basis_sums_import(one, INT64_MAX, 0, &nothing, &nothing), SEBP_SUCCESS);
    expect_refusal(sebp_basis_sums_add(context, one, &nothing), SEBP_ERROR_OVERFLOW, "full",
                   context);
    ck_assert_int_eq(sebp_basis_sums_count(one), INT64_MAX);
    sebp_basis_sums_destroy(sums);
    sebp_basis_sums_destroy(one);
    testing_release(&nothing);
    testing_release(&g);
    testing_release(&out);
    testing_release(&in);
    sebp_context_destroy(context);
}
END_TEST

/* What was exported is never taken for damaged: of sizes where rounding adds up, of gradients whose
 * squares f32 cannot hold, and of rows that all point one way, whose dot products are as large as any
 * can be. */
START_TEST(sums_come_back)
{
    for (int round = 0; round < testing_rounds(40); round++) {
        sebp_context *context =
            testing_context(testing_chance(0.5) ? SEBP_GEMM_AUTO : SEBP_GEMM_NATIVE, 1, 0);
        int64_t N = testing_between(1, 40), K = testing_chance(0.2) ? 2000 : testing_between(1, 40);
        const double scales[] = {1, 1e-17, 1e-19, 1e-22, 1e-30, 1e15, 0};
        double scale = scales[testing_between(0, 6)], energy = 0;
        sebp_basis_sums *sums = NULL, *other = NULL;
        testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
        testing_succeed(sebp_basis_sums_create(N, K, &other), context);
        int64_t count = testing_between(0, 5);
        int one_way = testing_chance(0.5);
        sebp_matrix way = testing_random_matrix(1, K, SEBP_BF16, TESTING_REAL);
        for (int64_t t = 0; t < count; t++) {
            sebp_matrix g = testing_random_matrix(N, K, testing_dtype(), TESTING_REAL);
            for (int64_t i = 0; i < N * K; i++) {
                double value = testing_get(&g, i / K, i % K);
                if (one_way) {
                    value = testing_get(&way, 0, i % K);
                }
                testing_set(&g, i / K, i % K, scale * value);
            }
            testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
            testing_release(&g);
        }
        sebp_matrix out = testing_matrix(N, N, N, SEBP_F32), in = testing_matrix(K, K, K, SEBP_F32);
        ck_assert_int_eq(sebp_basis_sums_export(sums, &energy, &out, &in), SEBP_SUCCESS);
        sebp_status status = sebp_basis_sums_import(other, count, energy, &out, &in);
        ck_assert_msg(status == SEBP_SUCCESS,
                      "%" PRId64 " gradients of %" PRId64 "x%" PRId64 " times %g: %s", count, N, K,
                      scale, sebp_status_string(status));
        if (energy == 0) { /* any number of zero gradients */
            ck_assert_int_eq(sebp_basis_sums_import(other, INT64_C(1) << 50, 0, &out, &in),
                             SEBP_SUCCESS);
        }
        sebp_basis_sums_destroy(sums);
        sebp_basis_sums_destroy(other);
        testing_release(&way);
        testing_release(&out);
        testing_release(&in);
        sebp_context_destroy(context);
    }
}
END_TEST

/* A gradient that is refused leaves the sums as they were. */
START_TEST(refused_gradients)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_basis_sums *sums = NULL;
    sebp_basis *before = NULL, *after = NULL;
    sebp_matrix g = testing_random_matrix(9, 7, SEBP_F32, TESTING_REAL), odd = testing_copy(&g);
    testing_succeed(sebp_basis_sums_create(9, 7, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    testing_succeed(sebp_basis_solve(context, sums, 5, 5, &before), context);
    const double values[] = {NAN, INFINITY, -INFINITY, 2e19};
    for (int i = 0; i < 4; i++) {
        testing_set(&odd, testing_between(0, 8), testing_between(0, 6), values[i]);
        expect_refusal(sebp_basis_sums_add(context, sums, &odd), SEBP_ERROR_NONFINITE,
                       "gradient 1 ", context);
        testing_release(&odd);
        odd = testing_copy(&g);
    }
    sebp_matrix view = g;
    view.stride = 6;
    expect_refusal(sebp_basis_sums_add(context, sums, &view), SEBP_ERROR_STRIDE, "gradient",
                   context);
    view = g;
    view.rows = 8;
    expect_refusal(sebp_basis_sums_add(context, sums, &view), SEBP_ERROR_SHAPE, "8x7", context);
    expect_refusal(sebp_basis_sums_add(context, sums, NULL), SEBP_ERROR_NULL, "gradient", context);
    expect_refusal(sebp_basis_sums_add(context, NULL, &g), SEBP_ERROR_NULL, "sums", context);
    ck_assert_int_eq(sebp_basis_sums_add(NULL, sums, &g), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_count(sums), 1);
    testing_succeed(sebp_basis_solve(context, sums, 5, 5, &after), context);
    expect_same_basis(before, after);
    sebp_basis_destroy(before);
    sebp_basis_destroy(after);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    testing_release(&odd);
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
    double *out = array(9 * 9), *in = array(7 * 7);
    add_squares(&g, out, in);
    testing_succeed(sebp_basis_sums_create(9, 7, &sums), context);
    testing_succeed(sebp_basis_sums_add(context, sums, &g), context);
    expect_refusal(sebp_basis_solve(context, sums, 5, 5, &basis), SEBP_ERROR_UNSUPPORTED,
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

START_TEST(sums_of_no_size)
{
    sebp_basis_sums *sums = NULL;
    ck_assert_int_eq(sebp_basis_sums_create(0, 5, &sums), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_basis_sums_create(5, -1, &sums), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_basis_sums_create((int64_t)1 << 31, 5, &sums), SEBP_ERROR_OVERFLOW);
    ck_assert_int_eq(sebp_basis_sums_create(5, INT64_MAX, &sums), SEBP_ERROR_OVERFLOW);
    ck_assert_int_eq(sebp_basis_sums_create(5, 5, NULL), SEBP_ERROR_NULL);
    ck_assert_ptr_null(sums);
    ck_assert_int_eq(sebp_basis_sums_count(NULL), 0);
    sebp_basis_sums_destroy(NULL);
}
END_TEST

START_TEST(from_vectors)
{
    sebp_matrix u_out = testing_random_matrix(3, 5, SEBP_F32, TESTING_REAL),
                u_in = testing_random_matrix(4, 4, SEBP_F32, TESTING_REAL);
    sebp_basis *basis = NULL;
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &basis), SEBP_SUCCESS);
    sebp_matrix out = sebp_basis_out(basis), in = sebp_basis_in(basis);
    ck_assert(testing_same_bits(&out, &u_out) && testing_same_bits(&in, &u_in));
    ck_assert(isnan(sebp_basis_share_out(basis)) && isnan(sebp_basis_share_in(basis)));
    sebp_basis_destroy(basis);
    basis = NULL;

    ck_assert_int_eq(sebp_basis_from_vectors(NULL, &u_in, &basis), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, NULL, &basis), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, NULL), SEBP_ERROR_NULL);
    sebp_matrix view = u_out;
    view.stride = 4;
    ck_assert_int_eq(sebp_basis_from_vectors(&view, &u_in, &basis), SEBP_ERROR_STRIDE);
    view = u_out;
    view.rows = 0;
    ck_assert_int_eq(sebp_basis_from_vectors(&view, &u_in, &basis), SEBP_ERROR_SIZE);
    view = u_in;
    view.dtype = SEBP_BF16;
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &view, &basis), SEBP_ERROR_DTYPE);
    view = u_in;
    view.cols = 3;
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &view, &basis), SEBP_ERROR_SHAPE);
    testing_set(&u_in, 2, 1, NAN);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &basis), SEBP_ERROR_NONFINITE);
    ck_assert_ptr_null(basis);
    ck_assert(sebp_basis_out(NULL).rows == 0 && sebp_basis_in(NULL).rows == 0);
    ck_assert(isnan(sebp_basis_share_out(NULL)) && isnan(sebp_basis_share_in(NULL)));
    sebp_basis_destroy(NULL);
    testing_release(&u_out);
    testing_release(&u_in);
}
END_TEST

/* ---- files ---- */

static char folder[64], path[96];
static sebp_context *context;
static sebp_basis *saved;
static unsigned char *file; /* as it was saved */
static size_t file_bytes;

static void write_file(const unsigned char *bytes, size_t count)
{
    FILE *stream = fopen(path, "wb");
    if (stream == NULL || fwrite(bytes, 1, count, stream) != count || fclose(stream) != 0) {
        ck_abort_msg("%s cannot be written", path);
    }
}

static void setup_file(void)
{
    strcpy(folder, "/tmp/test_hosvd.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/basis", folder);
    context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix u_out = testing_random_matrix(3, 7, SEBP_F32, TESTING_REAL),
                u_in = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &saved), SEBP_SUCCESS);
    testing_release(&u_out);
    testing_release(&u_in);
    testing_succeed(sebp_basis_save(context, saved, path), context);
    FILE *stream = fopen(path, "rb");
    ck_assert_ptr_nonnull(stream);
    file = malloc(4096);
    ck_assert_ptr_nonnull(file);
    file_bytes = fread(file, 1, 4096, stream);
    fclose(stream);
}

static void teardown_file(void)
{
    unlink(path);
    ck_assert_msg(rmdir(folder) == 0, "something was left in %s", folder);
    sebp_basis_destroy(saved);
    sebp_context_destroy(context);
    free(file);
}

static void refuses_file(const unsigned char *bytes, size_t count, sebp_status want,
                         const char *word, const char *what, size_t where)
{
    sebp_basis *basis = NULL;
    write_file(bytes, count);
    sebp_status got = sebp_basis_load(context, path, &basis);
    if (got != want || basis != NULL || strstr(sebp_context_message(context), word) == NULL) {
        ck_abort_msg("%s %zu: %s: %s", what, where, sebp_status_string(got),
                     sebp_context_message(context));
    }
}

/* zlib's, bit by bit. */
static uint32_t crc32_of(const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
        }
    }
    return ~crc;
}

static void seal(unsigned char *bytes)
{
    uint32_t crc = crc32_of(bytes, file_bytes - sizeof crc);
    memcpy(bytes + file_bytes - sizeof crc, &crc, sizeof crc);
}

START_TEST(file_as_described)
{
    int64_t sizes[4];
    uint32_t numbers[2], crc;
    const unsigned char *at = file + 64;
    ck_assert_uint_eq(file_bytes, 64 + 4 * (3 * 7 + 2 * 5) + 4);
    ck_assert_mem_eq(file, "SEBPBAS\x1A", 8);
    memcpy(numbers, file + 8, sizeof numbers);
    ck_assert(numbers[0] == 0x01020304 && numbers[1] == 1);
    memcpy(sizes, file + 16, sizeof sizes);
    ck_assert(sizes[0] == 7 && sizes[1] == 5 && sizes[2] == 3 && sizes[3] == 2);
    const sebp_matrix sides[] = {sebp_basis_out(saved), sebp_basis_in(saved)};
    for (int side = 0; side < 2; side++) {
        for (int64_t i = 0; i < sides[side].rows * sides[side].cols; i++, at += 4) {
            float value;
            memcpy(&value, at, sizeof value);
            ck_assert((double)value ==
                      testing_get(&sides[side], i / sides[side].cols, i % sides[side].cols));
        }
    }
    memcpy(&crc, at, sizeof crc);
    ck_assert_uint_eq(crc, crc32_of(file, file_bytes - 4));
    ck_assert_uint_eq(crc32_of((const unsigned char *)"123456789", 9), 0xCBF43926);
}
END_TEST

START_TEST(saved_and_loaded)
{
    sebp_basis *loaded = NULL;
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    expect_same_basis(saved, loaded);
    sebp_basis_destroy(loaded);

    /* Shares, too; and over a file that is there. */
    const double shares[] = {0.75, 0.5};
    memcpy(file + 48, shares, sizeof shares);
    seal(file);
    write_file(file, file_bytes);
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    ck_assert(sebp_basis_share_out(loaded) == 0.75 && sebp_basis_share_in(loaded) == 0.5);
    testing_succeed(sebp_basis_save(context, saved, path), context);
    sebp_basis *again = NULL;
    testing_succeed(sebp_basis_load(context, path, &again), context);
    expect_same_basis(again, saved);
    sebp_basis_destroy(again);
    sebp_basis_destroy(loaded);
}
END_TEST

START_TEST(damaged_files)
{
    for (size_t i = 0; i < file_bytes; i++) {
        for (int bit = 0; bit < 8; bit++) {
            file[i] ^= (unsigned char)(1 << bit);
            refuses_file(file, file_bytes, SEBP_ERROR_FILE, path, "byte", i);
            file[i] ^= (unsigned char)(1 << bit);
        }
    }
    for (size_t i = 0; i < file_bytes; i++) {
        refuses_file(file, i, SEBP_ERROR_FILE, i < 64 ? "too short" : "length", "cut at", i);
    }
    unsigned char *longer = calloc(1, file_bytes + 8);
    ck_assert_ptr_nonnull(longer);
    memcpy(longer, file, file_bytes);
    for (size_t i = 1; i <= 8; i++) {
        refuses_file(longer, file_bytes + i, SEBP_ERROR_FILE, "length", "longer by", i);
    }
    free(longer);
}
END_TEST

/* Files whose checksum is right. */
START_TEST(foreign_files)
{
    const unsigned char swapped[] = {file[11], file[10], file[9], file[8]};
    unsigned char *other = malloc(file_bytes);
    ck_assert_ptr_nonnull(other);
    const int64_t sizes[][4] = {{7, 5, 8, 2},  {7, 5, 3, 6},  {7, 5, 0, 2},
                                {7, 5, 3, -2}, {-7, 5, 3, 2}, {0, 0, 0, 0}};
    memcpy(other, file, file_bytes);
    memcpy(other + 8, swapped, 4);
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "another byte order", "byte order", 0);
    memcpy(other, file, file_bytes);
    other[12] ^= 3;
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "another version", "version", 0);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        memcpy(other, file, file_bytes);
        memcpy(other + 16, sizes[i], sizeof sizes[i]);
        seal(other);
        refuses_file(other, file_bytes, SEBP_ERROR_FILE, "sizes", "sizes", i);
    }
    /* Sizes so large that their bytes overflow, some to the right number. */
    const int64_t large[] = {INT64_MAX, INT64_MAX, (int64_t)1 << 62, (int64_t)1 << 62};
    memcpy(other, file, file_bytes);
    memcpy(other + 16, large, sizeof large);
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "length", "large", 0);
    for (size_t i = 0; i < 3; i++) { /* one vector, or as many of one element */
        const int64_t max = INT64_MAX - (int64_t)i * 15;
        const int64_t larger[][4] = {{max, max, 1, 1}, {max, 5, max, 2}, {max, 1, 1, 1}};
        for (size_t j = 0; j < 3; j++) {
            memcpy(other + 16, larger[j], sizeof larger[j]);
            seal(other);
            refuses_file(other, file_bytes, SEBP_ERROR_FILE, "length", "larger", 3 * i + j);
        }
    }
    memcpy(other, file, file_bytes);
    memcpy(other + 64 + 8, &(float){NAN}, sizeof(float));
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_NONFINITE, "NaN", "NaN", 0);
    memset(other, 'a', file_bytes);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "not a basis", "text", 0);
    refuses_file(other, 0, SEBP_ERROR_FILE, "too short", "empty", 0);
    free(other);
}
END_TEST

START_TEST(no_file)
{
    sebp_basis *basis = NULL;
    char missing[160];
    snprintf(missing, sizeof missing, "%s/no/basis", folder);
    expect_refusal(sebp_basis_load(context, missing, &basis), SEBP_ERROR_FILE, missing, context);
    expect_refusal(sebp_basis_load(context, folder, &basis), SEBP_ERROR_FILE, folder, context);
    expect_refusal(sebp_basis_save(context, saved, missing), SEBP_ERROR_FILE, missing, context);
    expect_refusal(sebp_basis_save(context, saved, folder), SEBP_ERROR_FILE, "regular", context);
    expect_refusal(sebp_basis_load(context, NULL, &basis), SEBP_ERROR_NULL, "path", context);
    expect_refusal(sebp_basis_load(context, path, NULL), SEBP_ERROR_NULL, "basis", context);
    expect_refusal(sebp_basis_save(context, NULL, path), SEBP_ERROR_NULL, "basis", context);
    expect_refusal(sebp_basis_save(context, saved, NULL), SEBP_ERROR_NULL, "path", context);
    ck_assert_int_eq(sebp_basis_load(NULL, path, &basis), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_save(NULL, saved, path), SEBP_ERROR_NULL);
    ck_assert_ptr_null(basis);
}
END_TEST

/* `message` is "function: path" and the reason, of a long path not all. */
static void check_line(const char *function, const char *of, const char *reason)
{
    const char *message = sebp_context_message(context);
    size_t start = strlen(function), end = strlen(message), last = strlen(reason);
    ck_assert_msg(end > start + last && strncmp(message, function, start) == 0 &&
                      strncmp(message + start, ": ", 2) == 0 &&
                      strcmp(message + end - last, reason) == 0,
                  "%s: %s", reason, message);
    ck_assert_msg(strncmp(message + start + 2, of, 20) == 0, "%s", message);
    ck_assert_msg(strncmp(message + end - last - 20, of + strlen(of) - 20, 20) == 0, "%s", message);
    ck_assert(strlen(of) < 240 || (end > 240 && strstr(message, "...") != NULL));
}

/* However long a path is, its ends and the reason are in the message. */
START_TEST(long_paths)
{
    enum { MOST = 5000 };
    sebp_basis *basis = NULL;
    char *name = malloc(MOST + 32), *reason = malloc(MOST);
    ck_assert(name != NULL && reason != NULL);
    for (int length = 100; length <= MOST; length += length < 300 ? 1 : 500) {
        int at = snprintf(name, MOST, "%s/no", folder);
        for (; at < length; at++) { /* no part of more than 255 bytes */
            name[at] = at % 100 == 0 ? '/' : (char)('a' + at % 26);
        }
        strcpy(name + at, "/the/end/of/the/path");
        const char *why = strerror(at < 4000 ? ENOENT : ENAMETOOLONG);
        snprintf(reason, MOST, ": %s", why);
        ck_assert_int_eq(sebp_basis_load(context, name, &basis), SEBP_ERROR_FILE);
        check_line("sebp_basis_load", name, reason);
        snprintf(reason, MOST, " cannot be written: %s", why);
        ck_assert_int_eq(sebp_basis_save(context, saved, name), SEBP_ERROR_FILE);
        check_line("sebp_basis_save", name, reason);
    }
    free(name);
    free(reason);
}
END_TEST

/* No character of UTF-8 is cut, and what would break a line is not in it. */
START_TEST(odd_paths)
{
    sebp_basis *basis = NULL;
    for (int skip = 0; skip < 8; skip++) {
        char name[900];
        int at = snprintf(name, sizeof name, "/no/%.*s", skip, "abcdefgh");
        for (; at < 800; at += 2) {
            memcpy(name + at, at % 200 < 2 ? "//" : "\xC3\xA9", 2);
        }
        name[at] = '\0';
        ck_assert_int_eq(sebp_basis_load(context, name, &basis), SEBP_ERROR_FILE);
        const char *message = sebp_context_message(context);
        for (size_t i = 0; message[i] != '\0'; i++) {
            int is_first = message[i] == '\xC3', is_second = message[i] == '\xA9';
            ck_assert(!is_first || message[i + 1] == '\xA9');
            ck_assert(!is_second || (i > 0 && message[i - 1] == '\xC3'));
        }
        ck_assert_ptr_nonnull(strstr(message, strerror(ENOENT)));
    }
    ck_assert_int_eq(sebp_basis_load(context, "/no/a\nb\tc\x1b[1m\x7f", &basis), SEBP_ERROR_FILE);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "/no/a?b?c?[1m?: "));
}
END_TEST

/* What the path holds is what was saved. */
static void still_there(void)
{
    sebp_basis *loaded = NULL;
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    expect_same_basis(loaded, saved);
    sebp_basis_destroy(loaded);
}

/* A file that grows over a limit, as on a disk that is full: nothing is lost, nothing is left. */
START_TEST(full_disk)
{
    struct rlimit before, limit;
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = 100;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    fflush(NULL);
    /* Check writes to files, too: nothing is asserted meanwhile. */
    int limited = setrlimit(RLIMIT_FSIZE, &limit);
    sebp_status status = sebp_basis_save(context, saved, path);
    int unlimited = setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    ck_assert(limited == 0 && unlimited == 0);
    expect_refusal(status, SEBP_ERROR_FILE, "large", context);
    still_there();
}
END_TEST

/* A folder that may be read alone. For root there is none: it becomes somebody else. */
START_TEST(unwritable_folder)
{
    const uid_t root = 0, nobody = 65534;
    ck_assert_int_eq(chmod(path, 0644), 0);
    ck_assert_int_eq(chmod(folder, 0555), 0);
    if (geteuid() == root && seteuid(nobody) != 0) {
        testing_skip("unwritable_folder", "nothing is unwritable for root");
    } else {
        sebp_status status = sebp_basis_save(context, saved, path);
        expect_refusal(status, SEBP_ERROR_FILE, "denied", context);
        still_there();
    }
    ck_assert(getuid() != root || seteuid(root) == 0);
    ck_assert_int_eq(chmod(folder, 0755), 0);
}
END_TEST

/* As what is no file, and at once: a pipe would be waited for. */
static void refuses_to_load(const char *name)
{
    sebp_basis *basis = NULL;
    alarm(20);
    sebp_status status = sebp_basis_load(context, name, &basis);
    alarm(0);
    expect_refusal(status, SEBP_ERROR_FILE, "not a regular file", context);
    ck_assert_ptr_null(basis);
}

/* What is no file is refused and stays, where a file moved there would have taken its place. */
START_TEST(no_regular_file)
{
    char pipe[160], link[160];
    struct stat is;
    snprintf(pipe, sizeof pipe, "%s/pipe", folder);
    ck_assert_int_eq(mkfifo(pipe, 0600), 0);
    expect_refusal(sebp_basis_save(context, saved, pipe), SEBP_ERROR_FILE, "regular", context);
    refuses_to_load(pipe);
    ck_assert(lstat(pipe, &is) == 0 && S_ISFIFO(is.st_mode));
    refuses_to_load(folder);
    refuses_to_load("/dev/null");
    refuses_to_load("/dev/zero");

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/socket", folder);
    int descriptor = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_ge(descriptor, 0);
    ck_assert_int_eq(bind(descriptor, (const struct sockaddr *)&address, sizeof address), 0);
    expect_refusal(sebp_basis_save(context, saved, address.sun_path), SEBP_ERROR_FILE, "regular",
                   context);
    refuses_to_load(address.sun_path);
    ck_assert(lstat(address.sun_path, &is) == 0 && S_ISSOCK(is.st_mode));
    close(descriptor);

    /* A link is replaced, whatever it leads to; that stays. */
    const char *const targets[] = {pipe, path, "nowhere"};
    for (int i = 0; i < 3; i++) {
        sebp_basis *loaded = NULL;
        snprintf(link, sizeof link, "%s/link", folder);
        ck_assert_int_eq(symlink(targets[i], link), 0);
        if (i == 0) {
            refuses_to_load(link);
        }
        testing_succeed(sebp_basis_save(context, saved, link), context);
        ck_assert(lstat(link, &is) == 0 && S_ISREG(is.st_mode));
        testing_succeed(sebp_basis_load(context, link, &loaded), context);
        expect_same_basis(loaded, saved);
        sebp_basis_destroy(loaded);
        ck_assert_int_eq(unlink(link), 0);
    }
    ck_assert(lstat(pipe, &is) == 0 && S_ISFIFO(is.st_mode));
    ck_assert_int_eq(unlink(pipe), 0);
    ck_assert_int_eq(unlink(address.sun_path), 0);
}
END_TEST

/* The mode of any new file. */
START_TEST(mode_of_a_file)
{
    const mode_t masks[] = {022, 027, 077, 0};
    for (int i = 0; i < 4; i++) {
        struct stat is;
        mode_t before = umask(masks[i]);
        sebp_status status = sebp_basis_save(context, saved, path);
        umask(before);
        testing_succeed(status, context);
        ck_assert_int_eq(stat(path, &is), 0);
        ck_assert_uint_eq(is.st_mode & 0777, 0666 & ~masks[i]);
    }
}
END_TEST

/* Processes that save to one path: whoever reads meanwhile finds a whole file of one of them, and
 * they leave that alone. What is left of one that was killed is in nobody's way. */
START_TEST(many_save_to_one_path)
{
    enum { SAVERS = 4, TIMES = 60 };
    sebp_basis *bases[SAVERS];
    pid_t children[SAVERS];
    char stale[160];
    for (int i = 0; i < SAVERS; i++) { /* of different sizes, so of different lengths */
        sebp_matrix u_out = testing_random_matrix(3 + i, 7 + 50 * i, SEBP_F32, TESTING_REAL);
        sebp_matrix u_in = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
        ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &bases[i]), SEBP_SUCCESS);
        testing_release(&u_out);
        testing_release(&u_in);
    }
    snprintf(stale, sizeof stale, "%s.new-%ld-0", path, (long)getpid());
    FILE *stream = fopen(stale, "wb");
    ck_assert(stream != NULL && fclose(stream) == 0);
    testing_succeed(sebp_basis_save(context, bases[0], path), context);
    fflush(NULL);
    for (int i = 0; i < SAVERS; i++) {
        children[i] = fork();
        ck_assert_int_ge(children[i], 0);
        for (int times = 0; children[i] == 0 && times < TIMES; times++) {
            if (sebp_basis_save(context, bases[i], path) != SEBP_SUCCESS) {
                _exit(1);
            }
        }
        if (children[i] == 0) {
            _exit(0);
        }
    }
    int ended = 0, good = 0;
    for (int last = 0; !last;) {
        int result;
        last = ended == SAVERS; /* once more when all are done */
        while (ended < SAVERS && waitpid(-1, &result, WNOHANG) > 0) {
            good += WIFEXITED(result) && WEXITSTATUS(result) == 0;
            ended++;
        }
        sebp_basis *loaded = NULL;
        testing_succeed(sebp_basis_load(context, path, &loaded), context);
        int64_t whose = sebp_basis_out(loaded).rows - 3;
        ck_assert(whose >= 0 && whose < SAVERS);
        expect_same_basis(loaded, bases[whose]);
        sebp_basis_destroy(loaded);
    }
    ck_assert_int_eq(good, SAVERS);
    for (int i = 0; i < SAVERS; i++) {
        sebp_basis_destroy(bases[i]);
    }
    ck_assert_int_eq(unlink(stale), 0); /* that the folder is empty is seen when it is removed */
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("hosvd");
    TCase *tests = tcase_create("bases");
#ifdef SEBP_HAVE_LAPACK
    tcase_add_test(tests, eigenvectors);
    tcase_add_test(tests, large_sums);
    tcase_add_loop_test(tests, fork_and_solve, 0, 3);
    tcase_add_test(tests, few_gradients);
    tcase_add_test(tests, planted_bases_are_found);
    tcase_add_test(tests, top_1_percent_holds_what_was_planted);
    tcase_add_test(tests, bad_ranks);
    tcase_add_test(tests, refused_gradients);
    tcase_add_test(tests, sums_copied);
    tcase_add_test(tests, sums_come_back);
    tcase_add_test(tests, counts_that_overflow);
#else
    tcase_add_test(tests, without_lapack);
#endif
    tcase_add_test(tests, sums_of_no_size);
    tcase_add_test(tests, from_vectors);
    suite_add_tcase(suite, tests);
    TCase *files = tcase_create("files");
    tcase_add_checked_fixture(files, setup_file, teardown_file);
    tcase_add_test(files, file_as_described);
    tcase_add_test(files, saved_and_loaded);
    tcase_add_test(files, damaged_files);
    tcase_add_test(files, foreign_files);
    tcase_add_test(files, no_file);
    tcase_add_test(files, long_paths);
    tcase_add_test(files, odd_paths);
    tcase_add_test(files, full_disk);
    tcase_add_test(files, unwritable_folder);
    tcase_add_test(files, no_regular_file);
    tcase_add_test(files, mode_of_a_file);
    tcase_add_test(files, many_save_to_one_path);
    suite_add_tcase(suite, files);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
