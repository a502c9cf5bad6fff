/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file vec_math.h
 * Elementary functions over the vocabulary of vec.h. Errors are in units in the last place (ulp) of
 * the exact result, over all f32, and hold on every ISA; tests/test_kernels.c measures them.
 */
#ifndef SEBP_VEC_MATH_H
#define SEBP_VEC_MATH_H

#include "vec.h"

/** 2^n for an integral n in [-126, 127]: the bits of 1.0 with n added to the exponent. */
static inline vec vec_pow2(vec n)
{
    /* Added to 1.5 * 2^23, an integer stands in the low bits of the sum. */
    veci integer = veci_from_bits(vec_add(n, vec_set1(12582912.0f)));
    return veci_to_bits(veci_add(veci_shift_left(integer, 23), veci_set1(0x3F800000)));
}

/** v * 2^n for an integral n in [-252, 254] and |v| in [0.5, 2): rounded once, as the first of the
 * two factors leaves it normal. */
static inline vec vec_scale_pow2(vec v, vec n)
{
    vec half = vec_round(vec_mul(n, vec_set1(0.5f)));
    return vec_mul(vec_mul(v, vec_pow2(half)), vec_pow2(vec_sub(n, half)));
}

/* exp(r) for |r| <= log(2) / 2: r + r^2 p(r) + 1, p of least maximal error. */
static inline vec vec_exp_reduced(vec r)
{
    vec p = vec_set1(1.9875691500e-4f);
    p = vec_fma(p, r, vec_set1(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set1(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set1(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set1(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set1(5.0000001201e-1f));
    return vec_add(vec_fma(p, vec_mul(r, r), r), vec_set1(1));
}

/* The n of exp(x) = 2^n exp(r), and r = x - n log(2), log(2) in two parts so that n times the first
 * is exact. */
static inline vec vec_exp_split(vec x, vec *r)
{
    vec n = vec_round(vec_mul(x, vec_set1(1.44269504f)));
    *r = vec_fma(n, vec_set1(-0.693359375f), x);
    *r = vec_fma(n, vec_set1(2.12194440e-4f), *r);
    return n;
}

/** exp(x), within 2 ulp; +Inf from where f32 overflows, 0 where it underflows; NaN for NaN. */
static inline vec vec_exp(vec x)
{
    vec r;
    /* The constants come first, so that NaN passes through. */
    vec clamped = vec_min(vec_set1(90), vec_max(vec_set1(-105), x));
    vec n = vec_exp_split(clamped, &r);
    return vec_scale_pow2(vec_exp_reduced(r), n);
}

/** exp(x) for x <= 0 or NaN, as a softmax needs it: within 2 ulp down to -87, and 0 below. */
static inline vec vec_exp_negative(vec x)
{
    vec r;
    vec clamped = vec_max(vec_set1(-87), x);
    vec n = vec_exp_split(clamped, &r);
    vec result = vec_mul(vec_exp_reduced(r), vec_pow2(n));
    return vec_select(vec_less(x, vec_set1(-87)), vec_zero(), result);
}

#endif
