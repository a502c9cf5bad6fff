/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SparseGrad's gradient in a rotated space, by every order of its products, against double precision and
 * exactly on integers, whole and at kept elements; which order is the cheapest, and which fits.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "rotated.h"

static void check_gradient(sebp_context *context, problem *p, testing_values values)
{
    for (int rotation = 0; rotation < ROTATIONS; rotation++) {
        int add = testing_chance(0.5);
        p->options.dw_write = add ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        sebp_matrix r = testing_matrix(p->p, p->q, testing_stride(p->q), SEBP_F32);
        if (add) {
            testing_fill(&r, values);
        }
        reference want = reference_r(&p->u_out, &p->u_in, &p->dy, &p->x, &p->active,
                                     p->options.x_is_compact, add ? &r : NULL);
        testing_succeed(rotated_gradient(context, p, rotation, &r), context);
        reference_check(&want, &r, values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND,
                        "R");
        reference_free(&want);
        testing_release(&r);
    }
}

START_TEST(gradient)
{
    testing_values values = _i == 0 ? TESTING_REAL : TESTING_INTEGER;
    for (int round = 0; round < testing_rounds(60); round++) {
        sebp_context *context = testing_context(
            testing_chance(0.5) ? SEBP_GEMM_AUTO : SEBP_GEMM_NATIVE, (int)testing_between(1, 3), 0);
        problem p = rotated_problem(testing_between(1, 60), testing_between(1, 60),
                                    testing_between(1, 60), testing_dtype(), values);
        check_gradient(context, &p, values);
        rotated_free(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* A problem whose basis has these ranks, all of its rows active. */
static problem make_plain(int64_t M, int64_t N, int64_t K, int64_t p, int64_t q, sebp_dtype dtype)
{
    problem made = {.M = M, .N = N, .K = K, .p = p, .q = q, .options = SEBP_LINEAR_OPTIONS_INIT};
    rotated_basis(&made, TESTING_REAL);
    made.dy = testing_random_matrix(M, N, dtype, TESTING_REAL);
    made.x = testing_random_matrix(M, K, dtype, TESTING_REAL);
    const sebp_rule rule = sebp_rule_nonzero();
    made.active = reference_rows_find(&made.dy, &rule);
    return made;
}

/* Kept elements of R by every order, beside double precision; returns how many are not 0. */
static int64_t check_kept(sebp_context *context, problem *p, double share, testing_values values)
{
    int64_t nonzeros = 0;
    for (int rotation = 0; rotation < ROTATIONS; rotation++) {
        int add = testing_chance(0.5);
        p->options.dw_write = add ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        sebp_sparse kept = rotated_sparse(p->p, p->q, share, values);
        double *before = testing_zeros(kept.count, sizeof *before);
        for (int64_t i = 0; i < kept.count; i++) {
            before[i] = add ? (double)kept.values[i] : 0;
            kept.values[i] = add ? kept.values[i] : NAN;
        }
        reference want = reference_r(&p->u_out, &p->u_in, &p->dy, &p->x, &p->active,
                                     p->options.x_is_compact, NULL);
        testing_succeed(sebp_sparsegrad_kept(context, p->basis, &p->dy, &p->x, p->rows, &p->options,
                                             (sebp_rotation)rotation, &kept),
                        context);
        for (int64_t i = 0; i < kept.count; i++) {
            int64_t index = kept.indices[i];
            double should = want.value[index] + before[i];
            double size = want.magnitude[index] + fabs(before[i]);
            double bound = values == TESTING_INTEGER
                               ? 0
                               : (double)(want.terms + 1) * (double)FLT_EPSILON * size;
            ck_assert_msg(fabs((double)kept.values[i] - should) <= bound,
                          "order %d, element %" PRId64 " is %g, not %g", rotation, index,
                          (double)kept.values[i], should);
            nonzeros += should != 0;
        }
        testing_check(kept.indices);
        testing_check(kept.values);
        reference_free(&want);
        testing_free_sparse(&kept);
        free(before);
    }
    return nonzeros;
}

START_TEST(kept_elements)
{
    testing_values values = _i == 0 ? TESTING_REAL : TESTING_INTEGER;
    int64_t nonzeros = 0;
    for (int round = 0; testing_goes_on(round, 40, nonzeros, 1000); round++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), 0);
        problem p = rotated_problem(testing_between(1, 60), testing_between(1, 90),
                                    testing_between(1, 90), testing_dtype(), values);
        nonzeros += check_kept(context, &p, testing_chance(0.5) ? 0.02 : 0.5, values);
        rotated_free(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* Fails the test where the elements are not those of R. */
static void check_elements(const sebp_sparse *kept, const reference *want)
{
    for (int64_t i = 0; i < kept->count; i++) {
        double bound =
            (double)want->terms * (double)FLT_EPSILON * want->magnitude[kept->indices[i]];
        ck_assert(fabs((double)kept->values[i] - want->value[kept->indices[i]]) <= bound);
    }
}

/* Elements of an R that takes more than a quarter of the scratch memory, few as well as many: the last
 * product of FACTORS computes these alone. Other orders keep R there, and refuse. */
START_TEST(kept_elements_in_panels)
{
    static const struct {
        int64_t M, N, K, p, q;
        bool fits;
    } cases[] = {
        {40, 270, 270, 256, 256, true},   /* a quarter */
        {40, 270, 270, 256, 257, false},  /* more */
        {40, 260, 520, 256, 511, false},  /* just below a half */
        {200, 440, 320, 430, 310, false}, /* more than that, and not all rows at once */
    };
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, TESTING_MIN_SCRATCH);
    for (int c = 0; c < 4; c++) {
        if (c < 3 && c != _i)
            continue; /* the last one alone with all dtypes and shares: a large R takes long */
        problem p = make_plain(cases[c].M, cases[c].N, cases[c].K, cases[c].p, cases[c].q,
                               _i % 2 == 0 ? SEBP_F32 : SEBP_BF16);
        sebp_sparse kept = rotated_sparse(p.p, p.q, _i < 2 ? 0.01 : 0.6, TESTING_REAL);
        reference want = reference_r(&p.u_out, &p.u_in, &p.dy, &p.x, &p.active, 0, NULL);
        for (int order = 0; order < ROTATIONS; order++) {
            memset(kept.values, TESTING_POISON, (size_t)kept.count * sizeof(float));
            const sebp_status status = sebp_sparsegrad_kept(context, p.basis, &p.dy, &p.x, p.rows,
                                                            NULL, (sebp_rotation)order, &kept);
            if (order <= SEBP_ROTATE_FACTORS || cases[c].fits) {
                testing_succeed(status, context);
                check_elements(&kept, &want);
            } else {
                testing_refuse(status, SEBP_ERROR_MEMORY, "rotated factors", context);
                ck_assert(isnan(kept.values[0]) && isnan(kept.values[kept.count - 1]));
            }
        }
        ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
        reference_free(&want);
        testing_free_sparse(&kept);
        rotated_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* A good call, changed before it is made. */
#define REFUSES(want, word, change)                                                                \
    do {                                                                                           \
        sebp_sparse view = room, *kept = &view;                                                    \
        sebp_matrix x_view = p.x, *x = &x_view;                                                    \
        const sebp_basis *basis = p.basis;                                                         \
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;                                    \
        int rotation = SEBP_ROTATE_FACTORS;                                                        \
        change;                                                                                    \
        testing_refuse(sebp_sparsegrad_kept(context, basis, &p.dy, x, NULL, &options,              \
                                            (sebp_rotation)rotation, kept),                        \
                       want, word, context);                                                       \
        for (int64_t i = 0; i < room.count; i++)                                                   \
            ck_assert_msg(isnan(room.values[i]), "%s: written to", #change);                       \
    } while (0)

START_TEST(bad_kept_elements_are_refused)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    problem p = make_plain(9, 6, 5, 4, 3, SEBP_F32);
    sebp_sparse room = testing_sparse(3, 4, 3);
    for (int64_t i = 0; i < 3; i++)
        room.indices[i] = 2 * i;
    int64_t repeated[] = {1, 1, 2};
    REFUSES(SEBP_ERROR_NULL, "basis", basis = NULL);
    REFUSES(SEBP_ERROR_NULL, "kept", kept = NULL);
    REFUSES(SEBP_ERROR_NULL, "kept", kept->values = NULL);
    REFUSES(SEBP_ERROR_VALUE, "kept", kept->count = 13);
    REFUSES(SEBP_ERROR_VALUE, "rotation", rotation = 6);
    REFUSES(SEBP_ERROR_VALUE, "dw_write", options.dw_write = (sebp_write)2);
    REFUSES(SEBP_ERROR_ROWS, "kept", kept->indices = repeated);
    REFUSES(SEBP_ERROR_SHAPE, "kept is 3x4", (kept->rows = 3, kept->cols = 4));
    REFUSES(SEBP_ERROR_SHAPE, "x", x->cols = 4);
    REFUSES(SEBP_ERROR_ALIAS, "values of kept overlaps x", kept->values = x->data);
    for (int order = 1; order < ROTATIONS; order++) {
        double was = testing_get(&p.x, 3, 2);
        testing_set(&p.x, 3, 2, NAN);
        REFUSES(SEBP_ERROR_NONFINITE, "of kept is", rotation = order);
        testing_set(&p.x, 3, 2, was);
    }
    const sebp_sparse none = {NULL, NULL, 0, 4, 3};
    testing_succeed(
        sebp_sparsegrad_kept(context, p.basis, &p.dy, &p.x, NULL, NULL, SEBP_ROTATE_AUTO, &none),
        context);
    testing_zero_rows(&p.dy, 0);
    for (int order = 0; order < ROTATIONS; order++) {
        memset(room.values, TESTING_POISON, 3 * sizeof(float));
        testing_succeed(sebp_sparsegrad_kept(context, p.basis, &p.dy, &p.x, NULL, NULL,
                                             (sebp_rotation)order, &room),
                        context);
        ck_assert(room.values[0] == 0 && room.values[1] == 0 && room.values[2] == 0);
    }
    testing_free_sparse(&room);
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* Where half of the scratch memory, half a MiB, holds neither all rows nor all vectors. */
START_TEST(gradient_in_panels)
{
    sebp_dtype dtype = _i == 0 ? SEBP_F32 : SEBP_BF16;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, TESTING_MIN_SCRATCH);
    problem p = rotated_problem(900, 420, 300, dtype, TESTING_REAL);
    while (p.active.count == 0) {
        rotated_free(&p);
        p = rotated_problem(900, 420, 300, dtype, TESTING_REAL);
    }
    check_gradient(context, &p, TESTING_REAL);
    ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* Orders that keep a row of X or one like it in half of the scratch memory, 131072 floats, which it
 * is longer than: AUTO takes the cheapest of the others. */
START_TEST(cheapest_order_that_fits)
{
    static const struct {
        int64_t M, N, K, p, q;
        sebp_dtype dtype;
        sebp_rotation cheapest, fits;
    } cases[] = {
        {10, 4, 150000, 1, 2, SEBP_F32, SEBP_ROTATE_DY, SEBP_ROTATE_FACTORS},
        {10, 4, 150000, 1, 2, SEBP_BF16, SEBP_ROTATE_DY, SEBP_ROTATE_OUT_IN},
        {10, 150000, 4, 2, 1, SEBP_BF16, SEBP_ROTATE_X, SEBP_ROTATE_IN_OUT},
        {3, 150000, 150000, 1, 1, SEBP_BF16, SEBP_ROTATE_FACTORS, SEBP_ROTATE_AUTO}, /* none does */
    };
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, TESTING_MIN_SCRATCH);
    sebp_rotation fits = cases[_i].fits;
    problem p = make_plain(cases[_i].M, cases[_i].N, cases[_i].K, cases[_i].p, cases[_i].q,
                           cases[_i].dtype);
    sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32), want = testing_copy(&r);
    ck_assert_int_eq(sebp_sparsegrad_order(p.basis, p.M), cases[_i].cheapest);
    testing_expect(rotated_gradient(context, &p, (int)cases[_i].cheapest, &r), SEBP_ERROR_MEMORY,
                   context);
    ck_assert(testing_same_bits(&r, &want)); /* poison */
    if (fits == SEBP_ROTATE_AUTO) {
        testing_expect(rotated_gradient(context, &p, SEBP_ROTATE_AUTO, &r), SEBP_ERROR_MEMORY,
                       context);
        ck_assert(testing_same_bits(&r, &want));
    } else {
        testing_succeed(rotated_gradient(context, &p, (int)fits, &want), context);
        testing_succeed(rotated_gradient(context, &p, SEBP_ROTATE_AUTO, &r), context);
        ck_assert(testing_same_bits(&r, &want));
        reference exact = reference_r(&p.u_out, &p.u_in, &p.dy, &p.x, &p.active, 0, NULL);
        reference_check(&exact, &r, REFERENCE_BOUND, "R");
        reference_free(&exact);
        for (int rotation = 1; rotation < ROTATIONS; rotation++) { /* no cheaper one would do */
            if (sebp_sparsegrad_cost(p.basis, p.M, (sebp_rotation)rotation) <
                sebp_sparsegrad_cost(p.basis, p.M, fits)) {
                testing_expect(rotated_gradient(context, &p, rotation, &r), SEBP_ERROR_MEMORY,
                               context);
            }
        }
    }
    ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
    testing_release(&r);
    testing_release(&want);
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(gradient_without_active_rows)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    problem p = {.M = 9, .N = 5, .K = 4, .p = 3, .q = 2, .options = SEBP_LINEAR_OPTIONS_INIT};
    rotated_basis(&p, TESTING_REAL);
    p.dy = testing_matrix(9, 5, 5, SEBP_F32);
    memset(p.dy.data, 0, 9 * 5 * sizeof(float));
    p.x = testing_matrix(9, 4, 4, SEBP_F32); /* poison: not read */
    for (int rotation = 0; rotation < ROTATIONS; rotation++) {
        sebp_matrix r = testing_random_matrix(3, 2, SEBP_F32, TESTING_REAL),
                    before = testing_copy(&r);
        p.options.dw_write = SEBP_ACCUMULATE;
        testing_succeed(rotated_gradient(context, &p, rotation, &r), context);
        ck_assert(testing_same_bits(&r, &before));
        p.options.dw_write = SEBP_OVERWRITE;
        testing_succeed(rotated_gradient(context, &p, rotation, &r), context);
        ck_assert_int_eq(testing_nonzeros(&r), 0);
        testing_release(&before);
        testing_release(&r);
    }
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(cheapest_order)
{
    int used[ROTATIONS] = {0};
    for (int round = 0; round < testing_rounds(400); round++) {
        problem p = {.N = testing_between(1, 40), .K = testing_between(1, 40)};
        p.p = testing_between(1, p.N);
        p.q = testing_between(1, p.K);
        rotated_basis(&p, TESTING_INTEGER);
        int64_t m = testing_between(0, 60);
        double M = (double)m, N = (double)p.N, K = (double)p.K, P = (double)p.p, Q = (double)p.q;
        /* Each product by its own sizes. */
        const double costs[ROTATIONS] = {0,
                                         M * N * P + M * K * Q + P * M * Q,
                                         M * N * P + P * M * K + P * K * Q,
                                         M * K * Q + N * M * Q + P * N * Q,
                                         N * M * K + P * N * K + P * K * Q,
                                         N * M * K + N * K * Q + P * N * Q};
        int best = sebp_sparsegrad_order(p.basis, m);
        ck_assert(best >= 1 && best < ROTATIONS);
        used[best]++;
        for (int rotation = 1; rotation < ROTATIONS; rotation++) {
            double cost = sebp_sparsegrad_cost(p.basis, m, (sebp_rotation)rotation);
            ck_assert_double_eq(cost, costs[rotation]);
            ck_assert(rotation < best ? costs[best] < cost : costs[best] <= cost);
        }
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, m, SEBP_ROTATE_AUTO), costs[best]);
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, m, (sebp_rotation)9), 0);
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, -1, SEBP_ROTATE_DY), 0);
        ck_assert_int_eq(sebp_sparsegrad_order(p.basis, -1), SEBP_ROTATE_AUTO);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
    }
    for (int rotation = 1; rotation < ROTATIONS; rotation++) {
        ck_assert_msg(used[rotation] > 0 || testing_rounds(400) < 400, "order %d never came",
                      rotation);
    }
    ck_assert_double_eq(sebp_sparsegrad_cost(NULL, 1, SEBP_ROTATE_DY), 0);
    ck_assert_int_eq(sebp_sparsegrad_order(NULL, 1), SEBP_ROTATE_AUTO);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparsegrad gradient");
    TCase *tests = tcase_create("sparsegrad gradient");
    tcase_add_loop_test(tests, gradient, 0, 2);
    tcase_add_loop_test(tests, gradient_in_panels, 0, 2);
    tcase_add_loop_test(tests, kept_elements, 0, 2);
    tcase_add_loop_test(tests, kept_elements_in_panels, 0, 4);
    tcase_add_test(tests, bad_kept_elements_are_refused);
    tcase_add_loop_test(tests, cheapest_order_that_fits, 0, 4);
    tcase_add_test(tests, gradient_without_active_rows);
    tcase_add_test(tests, cheapest_order);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
