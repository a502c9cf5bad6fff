/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums in bf16 that are rounded stochastically: unbiased, bit by bit as documented, and their bad input.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

/* The mean over many offsets is the sum itself: within five standard errors, of a deviation that is at
 * most half of the distance between neighbours. To nearest, a step this small moves nothing. */
START_TEST(stochastic_sums_are_unbiased)
{
    enum { N = 40, DRAWS = 4000 };
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_matrix w = testing_random_matrix(1, N, SEBP_BF16, TESTING_REAL),
                d = testing_random_matrix(1, N, SEBP_F32, TESTING_REAL);
    double mean[N] = {0}, gap[N];
    int64_t moved = 0;
    for (int64_t j = 0; j < N; j++) {
        gap[j] = ldexp(1, ilogb(fmax(fabs(testing_get(&w, 0, j)), 0x1p-20)) - 7);
        testing_set(&d, 0, j, testing_get(&d, 0, j) * gap[j] / 4);
    }
    sebp_stochastic_options options = SEBP_STOCHASTIC_OPTIONS_INIT;
    options.seed = testing_random();
    for (int i = 0; i < DRAWS; i++) {
        sebp_matrix drawn = testing_copy(&w);
        options.offset = (uint64_t)i;
        testing_succeed(sebp_stochastic_add(context, &d, &options, &drawn), context);
        for (int64_t j = 0; j < N; j++) {
            mean[j] += (testing_get(&drawn, 0, j) - testing_get(&w, 0, j)) / DRAWS;
            moved += testing_get(&drawn, 0, j) != testing_get(&w, 0, j);
        }
        testing_release(&drawn);
    }
    ck_assert_int_gt(moved, DRAWS);
    for (int64_t j = 0; j < N; j++) {
        double error = fabs(mean[j] - testing_get(&d, 0, j));
        ck_assert_msg(error <= 5 * gap[j] / 2 / sqrt(DRAWS), "element %" PRId64 ": %g beside %g", j,
                      mean[j], testing_get(&d, 0, j));
    }
    testing_release(&w);
    testing_release(&d);
    sebp_context_destroy(context);
}
END_TEST

/* Bit by bit as optim.h says, with strides, with and without D and decay, on one thread and two. */
START_TEST(stochastic_sums_are_as_documented)
{
    int64_t changed = 0;
    for (int round = 0; testing_goes_on(round, 60, changed, 0); round++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 2), 0);
        const int64_t rows = testing_between(0, 300), cols = testing_between(0, 200);
        const bool has_d = testing_chance(0.8);
        sebp_matrix w = testing_random_matrix(rows, cols, SEBP_BF16, TESTING_REAL);
        sebp_matrix d = testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL),
                    was = testing_copy(&w);
        sebp_stochastic_options options = {sizeof options, testing_random(), testing_random(), 0};
        options.decay = testing_chance(0.5) ? 0.25 : 0;
        testing_succeed(sebp_stochastic_add(context, has_d ? &d : NULL, &options, &w), context);
        const int64_t groups = (cols + 63) / 64;
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < cols; j++) {
                float sum = (float)(1 - options.decay) * (float)testing_get(&was, i, j);
                if (has_d)
                    sum += (float)testing_get(&d, i, j);
                const float u = sebp_random_uniform(options.seed, options.offset,
                                                    (uint64_t)(i * groups * 64 + j));
                uint32_t bits;
                memcpy(&bits, &sum, sizeof bits);
                bits = (bits + (uint32_t)(u * 65536)) & 0xFFFF0000;
                memcpy(&sum, &bits, sizeof sum);
                ck_assert(testing_get(&w, i, j) == (double)sum);
                changed += testing_get(&w, i, j) != testing_get(&was, i, j);
            }
        }
        testing_release(&w);
        testing_release(&d);
        testing_release(&was);
        sebp_context_destroy(context);
    }
    ck_assert_int_gt(changed, 0);
}
END_TEST

START_TEST(stochastic_add_refuses_bad_input)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix w = testing_random_matrix(3, 4, SEBP_BF16, TESTING_REAL), was = testing_copy(&w);
    sebp_matrix d = testing_random_matrix(3, 4, SEBP_F32, TESTING_REAL), bad;
    sebp_stochastic_options options = SEBP_STOCHASTIC_OPTIONS_INIT;
#define REFUSED(status, options, d, w)                                                             \
    testing_expect(sebp_stochastic_add(context, d, options, w), status, context)
    ck_assert_int_eq(sebp_stochastic_add(NULL, &d, NULL, &w), SEBP_ERROR_NULL);
    REFUSED(SEBP_ERROR_NULL, NULL, &d, NULL);
    REFUSED(SEBP_ERROR_DTYPE, NULL, &was, &w); /* d is bf16 */
    REFUSED(SEBP_ERROR_DTYPE, NULL, NULL, &d); /* w is f32 */
    bad = d;
    bad.stride = 3;
    REFUSED(SEBP_ERROR_STRIDE, NULL, &bad, &w);
    bad = d;
    bad.rows = 2;
    REFUSED(SEBP_ERROR_SHAPE, NULL, &bad, &w);
    bad = w;
    bad.data = d.data; /* not the other way, as bf16 need not be aligned as f32 is */
    REFUSED(SEBP_ERROR_ALIAS, NULL, &d, &bad);
    options.size_bytes--;
    REFUSED(SEBP_ERROR_SIZE, &options, &d, &w);
    options.size_bytes++;
    const double decays[] = {-1e-9, 1.01, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        options.decay = decays[i];
        REFUSED(SEBP_ERROR_VALUE, &options, &d, &w);
    }
    testing_set(&d, 2, 3, NAN);
    REFUSED(SEBP_ERROR_NONFINITE, NULL, &d, &w);
#undef REFUSED
    ck_assert(testing_same_bits(&w, &was));
    testing_release(&w);
    testing_release(&was);
    testing_release(&d);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("stochastic_add");
    TCase *all = tcase_create("stochastic_add");
    tcase_add_test(all, stochastic_sums_are_unbiased);
    tcase_add_test(all, stochastic_sums_are_as_documented);
    tcase_add_test(all, stochastic_add_refuses_bad_input);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
