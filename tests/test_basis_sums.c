/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sums of gradients of which bases are made: exported and imported, with damage of every kind, counts
 * that overflow, and gradients that are refused.
 */
#include "config.h"

#include <inttypes.h>
#include <math.h>

#include <sebp/sebp.h>

#include "bases.h"
#include "testing.h"

#ifdef SEBP_HAVE_LAPACK

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
    bases_add_squares(&g, squares, others);
    bases_add_squares(&h, squares, others);
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
    bases_same(want, got);
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
    testing_refuse(sebp_basis_sums_add(context, sums, &g), SEBP_ERROR_OVERFLOW, "full", context);
    ck_assert_int_eq(sebp_basis_sums_count(sums), many);

    /* Zeros count, too. */
    sebp_matrix nothing = testing_matrix(1, 1, 1, SEBP_F32);
    testing_set(&nothing, 0, 0, 0);
    testing_succeed(sebp_basis_sums_create(1, 1, &one), context);
    ck_assert_int_eq(sebp_basis_sums_import(one, INT64_MAX, 0, &nothing, &nothing), SEBP_SUCCESS);
    testing_refuse(sebp_basis_sums_add(context, one, &nothing), SEBP_ERROR_OVERFLOW, "full",
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
        testing_refuse(sebp_basis_sums_add(context, sums, &odd), SEBP_ERROR_NONFINITE,
                       "gradient 1 ", context);
        testing_release(&odd);
        odd = testing_copy(&g);
    }
    sebp_matrix view = g;
    view.stride = 6;
    testing_refuse(sebp_basis_sums_add(context, sums, &view), SEBP_ERROR_STRIDE, "gradient",
                   context);
    view = g;
    view.rows = 8;
    testing_refuse(sebp_basis_sums_add(context, sums, &view), SEBP_ERROR_SHAPE, "8x7", context);
    testing_refuse(sebp_basis_sums_add(context, sums, NULL), SEBP_ERROR_NULL, "gradient", context);
    testing_refuse(sebp_basis_sums_add(context, NULL, &g), SEBP_ERROR_NULL, "sums", context);
    ck_assert_int_eq(sebp_basis_sums_add(NULL, sums, &g), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_sums_count(sums), 1);
    testing_succeed(sebp_basis_solve(context, sums, 5, 5, &after), context);
    bases_same(before, after);
    sebp_basis_destroy(before);
    sebp_basis_destroy(after);
    sebp_basis_sums_destroy(sums);
    testing_release(&g);
    testing_release(&odd);
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

static Suite *make_suite(void)
{
    Suite *suite = suite_create("basis sums");
    TCase *tests = tcase_create("basis sums");
#ifdef SEBP_HAVE_LAPACK
    tcase_add_test(tests, refused_gradients);
    tcase_add_test(tests, sums_copied);
    tcase_add_test(tests, sums_come_back);
    tcase_add_test(tests, counts_that_overflow);
#endif
    tcase_add_test(tests, sums_of_no_size);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
