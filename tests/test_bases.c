/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bases: those that were planted in gradients are found, and those of a user's vectors hold them.
 */
#include "config.h"

#include <math.h>
#include <stdlib.h>

#include <sebp/sebp.h>

#include "testing.h"

#ifdef SEBP_HAVE_LAPACK

/* size orthonormal rows: the product of reflections I - 2 h h^T. */
static double *random_rotation(int64_t size)
{
    double *u = testing_zeros(size * size, sizeof(double)),
           *h = testing_zeros(size, sizeof(double));
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
    double *a = random_rotation(N), *b = random_rotation(K),
           *c = testing_zeros(N * K, sizeof(double));
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    sebp_matrix g = testing_matrix(N, K, K, SEBP_F32);
    for (int t = 0; t <= 40; t++) {
        double *left = testing_zeros(N * K, sizeof(double)); /* C B */
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
    double *a = random_rotation(N), *b = random_rotation(K),
           *c = testing_zeros(N * K, sizeof(double));
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_sums_create(N, K, &sums), context);
    sebp_matrix dy = testing_matrix(K, N, N, SEBP_F32), x = testing_matrix(K, K, K, SEBP_F32);
    sebp_matrix g = testing_matrix(N, K, K, SEBP_F32), r = testing_matrix(N, K, K, SEBP_F32);
    for (int t = 0; t <= 3; t++) {
        double *left = testing_zeros(N * K, sizeof(double)); /* A^T C */
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

#endif

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

static Suite *make_suite(void)
{
    Suite *suite = suite_create("bases");
    TCase *tests = tcase_create("bases");
#ifdef SEBP_HAVE_LAPACK
    tcase_add_test(tests, planted_bases_are_found);
    tcase_add_test(tests, top_1_percent_holds_what_was_planted);
#endif
    tcase_add_test(tests, from_vectors);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
