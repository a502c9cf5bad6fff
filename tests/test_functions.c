/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_functions.c
 * Elementary functions of every ISA over all of f32 against double precision, in units in the last
 * place of the result, as simd/vec_math.h and include/sebp/layers.h promise them.
 *
 *     SEBP_TEST_LARGE=1   every f32; else each 1999th, from a random one on
 */
#include "config.h"

#include "kernel_harness.h"

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double normal(double x)
{
    return erfc(-x / sqrt(2)) / 2;
}

static double curve(double x)
{
    return 2 * sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x);
}

static double gelu(double x)
{
    return x * normal(x);
}

static double gelu_slope(double x)
{
    return normal(x) + x * exp(-x * x / 2) / sqrt(2 * acos(-1));
}

static double gelu_tanh(double x)
{
    return x * sigmoid(curve(x));
}

static double gelu_tanh_slope(double x)
{
    double w = curve(x), slope = 2 * sqrt(2 / acos(-1)) * (1 + 3 * 0.044715 * x * x);
    double bend = sigmoid(w) * sigmoid(-w);
    return sigmoid(w) + (bend > 0 ? x * bend * slope : 0);
}

static double silu(double x)
{
    return x * sigmoid(x);
}

static double silu_slope(double x)
{
    double bend = sigmoid(x) * sigmoid(-x);
    return sigmoid(x) + (bend > 0 ? x * bend : 0);
}

/* Within `low` to `high`: so many ulp, or less than `absolute`. */
typedef struct promise {
    const char *name;
    int function;
    double (*exact)(double x);
    double low, high, ulp, absolute;
    double at_inf, at_minus_inf; /* NAN: not promised */
} promise;

/* Of a result that will be bf16. */
#define SHORT(function) (ELEMENTARY_##function + ELEMENTARY_SHORT)

static const promise promises[] = {
    {"exp", ELEMENTARY_EXP, exp, -INFINITY, INFINITY, 2, 0, INFINITY, 0},
    {"exp_negative", ELEMENTARY_EXP_NEGATIVE, exp, -87, 0, 2, 0, NAN, 0},
    {"sigmoid", ELEMENTARY_SIGMOID, sigmoid, -INFINITY, INFINITY, 4, 0, 1, 0},
    {"tanh", ELEMENTARY_TANH, tanh, -INFINITY, INFINITY, 3, 0, 1, -1},
    {"gelu", ELEMENTARY_GELU, gelu, -INFINITY, INFINITY, 6, 0x1p-28, INFINITY, 0},
    {"gelu", ELEMENTARY_GELU, gelu, -5, INFINITY, 6, 0x1p-124, INFINITY, 0},
    {"gelu, slope", ELEMENTARY_GELU_SLOPE, gelu_slope, -INFINITY, INFINITY, 6, 0x1p-22, 1, 0},
    {"gelu, slope", ELEMENTARY_GELU_SLOPE, gelu_slope, -INFINITY, -2, 8, 0x1p-27, 1, 0},
    {"gelu_tanh", ELEMENTARY_GELU_TANH, gelu_tanh, -INFINITY, -1, 250, 0x1p-28, INFINITY, 0},
    {"gelu_tanh", ELEMENTARY_GELU_TANH, gelu_tanh, -1, INFINITY, 4, 0, INFINITY, 0},
    {"gelu_tanh, slope", ELEMENTARY_GELU_TANH_SLOPE, gelu_tanh_slope, -INFINITY, INFINITY, 4,
     0x1p-22, 1, 0},
    {"gelu_tanh, slope", ELEMENTARY_GELU_TANH_SLOPE, gelu_tanh_slope, -INFINITY, -2, 250, 0x1p-27,
     1, 0},
    {"silu", ELEMENTARY_SILU, silu, -INFINITY, INFINITY, 4, 0, INFINITY, 0},
    {"silu, slope", ELEMENTARY_SILU_SLOPE, silu_slope, -INFINITY, INFINITY, 4, 0x1p-22, 1, 0},
    {"silu, slope", ELEMENTARY_SILU_SLOPE, silu_slope, -INFINITY, -2, 16, 0x1p-27, 1, 0},
    /* 2^9 ulp are at most 2^-14 of the result. */
    {"gelu, short", SHORT(GELU), gelu, -INFINITY, INFINITY, 0x1p9, 0x1p-22, INFINITY, 0},
    {"gelu_tanh, short", SHORT(GELU_TANH), gelu_tanh, -INFINITY, INFINITY, 0x1p9, 0x1p-22, INFINITY,
     0},
    {"silu, short", SHORT(SILU), silu, -INFINITY, INFINITY, 0x1p9, 0x1p-22, INFINITY, 0},
    {"gelu, slope, short", SHORT(GELU_SLOPE), gelu_slope, -INFINITY, INFINITY, 0, 0x1p-14, 1, 0},
    {"gelu_tanh, slope, short", SHORT(GELU_TANH_SLOPE), gelu_tanh_slope, -INFINITY, INFINITY, 0,
     0x1p-14, 1, 0},
    {"silu, slope, short", SHORT(SILU_SLOPE), silu_slope, -INFINITY, INFINITY, 0, 0x1p-14, 1, 0},
};

enum { PROMISES = sizeof promises / sizeof promises[0], BATCH = 4096 };

/* The error of y in ulp of the exact result, as an f32 of its size has them; 0 where it overflows to
 * Inf as it should. */
static double ulps(double exact, float y)
{
    if (fabs(exact) >= 0x1.FFFFFFp127) {
        return isinf(y) && (y > 0) == (exact > 0) ? 0 : INFINITY;
    }
    int exponent;
    frexp(exact, &exponent);
    double ulp = ldexp(1, exponent - 24 < -149 ? -149 : exponent - 24);
    return fabs((double)y - exact) / ulp;
}

static void check_batch(const sebp_kernels *kernels, const promise *of, const float *x, int64_t n,
                        double *worst, float *worst_at)
{
    float y[BATCH];
    kernels->elementary(y, x, n, of->function);
    for (int64_t i = 0; i < n; i++) {
        double exact = of->exact((double)x[i]), off = ulps(exact, y[i]);
        if (!(off <= of->ulp) && !(fabs((double)y[i] - exact) < of->absolute)) {
            ck_abort_msg("%s: %s(%.9g) is %.9g, not %.9g: %.2f ulp", kernels->isa, of->name,
                         (double)x[i], (double)y[i], exact, off);
        }
        if (off > *worst && off <= of->ulp) {
            *worst = off;
            *worst_at = x[i];
        }
    }
}

START_TEST(functions)
{
    const sebp_kernels *kernels = kernels_of(_i, "functions");
    if (kernels == NULL) {
        return;
    }
    const int tries = testing_rounds(2200000); /* numbers at equal distances among all of f32 */
    uint64_t step = (UINT64_C(1) << 32) / (uint64_t)tries | 1; /* odd, so that all bits vary */
    if (testing_environment("SEBP_TEST_LARGE")) {
        step = 1;
    }
    for (int p = 0; p < PROMISES; p++) {
        const promise *of = &promises[p];
        float x[BATCH], worst_at = 0;
        double worst = 0;
        int64_t n = 0, tried = 0;
        for (uint64_t bits = testing_random() % step; bits < UINT64_C(1) << 32; bits += step) {
            x[n] = float_of((uint32_t)bits);
            n += x[n] >= of->low && x[n] <= of->high && isfinite(x[n]);
            if (n == BATCH) {
                check_batch(kernels, of, x, n, &worst, &worst_at);
                tried += n;
                n = 0;
            }
        }
        check_batch(kernels, of, x, n, &worst, &worst_at);
        ck_assert_int_gt(tried + n, tries / 9);
        printf("%s: %s within %.2f ulp, at %.9g\n", kernels->isa, of->name, worst,
               (double)worst_at);
    }
}
END_TEST

START_TEST(limits)
{
    const sebp_kernels *kernels = kernels_of(_i, "limits");
    if (kernels == NULL) {
        return;
    }
    for (int p = 0; p < PROMISES; p++) {
        const promise *of = &promises[p];
        const float x[4] = {NAN, INFINITY, -INFINITY, -0.0F};
        float y[4];
        kernels->elementary(y, x, 4, of->function);
        ck_assert_msg(isnan(y[0]), "%s: %s(NaN) is %g", kernels->isa, of->name, (double)y[0]);
        ck_assert(isnan(of->at_inf) || (double)y[1] == of->at_inf);
        ck_assert(isnan(of->at_minus_inf) || (double)y[2] == of->at_minus_inf);
        ck_assert((double)y[3] == of->exact(0) ||
                  (of->ulp == 0 && (double)y[3] - of->exact(0) < of->absolute));
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("functions");
    TCase *all = tcase_create("functions");
    tcase_set_timeout(all, testing_environment("SEBP_TEST_LARGE") ? 36000 : 120);
    tcase_add_loop_test(all, functions, 0, TIERS);
    tcase_add_loop_test(all, limits, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
