/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file vec_math.h
 * Elementary functions over the vocabulary of vec.h. Errors are in units in the last place (ulp) of
 * the exact result, over all f32, and hold on every ISA; tests/test_functions.c measures them.
 */
#ifndef SEBP_VEC_MATH_H
#define SEBP_VEC_MATH_H

#include "pieces.h"
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
#if VEC_HAS_LDEXP
    return vec_ldexp(v, n);
#else
    vec half = vec_round(vec_mul(n, vec_set1(0.5f)));
    return vec_mul(vec_mul(v, vec_pow2(half)), vec_pow2(vec_sub(n, half)));
#endif
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

static inline vec vec_magnitude(vec x)
{
    return veci_to_bits(veci_and(veci_from_bits(x), veci_set1(0x7FFFFFFF)));
}

/** x with its magnitude at most `limit`; NaN for NaN. */
static inline vec vec_clamp(vec x, float limit)
{
    /* The constants come first, so that NaN passes through. */
    return vec_min(vec_set1(limit), vec_max(vec_set1(-limit), x));
}

/** x < 0 ? negative : positive, NaN being positive. */
static inline vec vec_by_sign(vec x, vec negative, vec positive)
{
    return vec_select(vec_less(x, vec_zero()), negative, positive);
}

/** 1 / (1 + exp(-x)), within 4 ulp. */
static inline vec vec_sigmoid(vec x)
{
    vec e = vec_exp(vec_sub(vec_zero(), vec_magnitude(x)));
    return vec_div(vec_by_sign(x, e, vec_set1(1)), vec_add(vec_set1(1), e));
}

/** tanh(x), within 3 ulp. */
static inline vec vec_tanh(vec x)
{
    /* Near 0 by a polynomial, x + x^3 p(x^2), else 1 - 2 / (exp(2|x|) + 1) with the sign of x. */
    vec square = vec_mul(x, x);
    vec p = vec_set1(-5.7170391083e-3f);
    p = vec_fma(p, square, vec_set1(2.0650582388e-2f));
    p = vec_fma(p, square, vec_set1(-5.3743496537e-2f));
    p = vec_fma(p, square, vec_set1(1.3331490755e-1f));
    p = vec_fma(p, square, vec_set1(-3.3333283663e-1f));
    vec near = vec_fma(vec_mul(p, square), x, x);
    vec u = vec_magnitude(x);
    vec e = vec_exp(vec_add(u, u));
    vec far = vec_sub(vec_set1(1), vec_div(vec_set1(2), vec_add(e, vec_set1(1))));
    far = vec_by_sign(x, vec_sub(vec_zero(), far), far);
    return vec_select(vec_less(u, vec_set1(0.625f)), near, far);
}

/* What follows is x S(x) for an S that rises from 0 to 1 and has S(-x) = 1 - S(x). With u = |x| all
 * is computed of S(-u), which is small where x is large, and no digits are lost on either side:
 *
 *     x S(x)      = x < 0 ? x S(-u) : x - x S(-u)
 *     (x S(x))'   = x < 0 ? g : 1 - g,   g = S(-u) - u S'(u)
 *
 * S(-u) is v 2^n, as a power of two that f32 does not have would be lost before it meets x. The
 * slope passes through 0 between -1.3 and -0.7; near there its error is one of 2^-24, not of ulp. */

/** S(-u) = share 2^n, and u S'(u) = share bend 2^n. */
typedef struct vec_tail {
    vec share, bend, n;
} vec_tail;

static inline vec vec_product_of_tail(vec x, vec clamped, vec_tail tail)
{
    vec p = vec_scale_pow2(vec_mul(clamped, tail.share), tail.n);
    return vec_by_sign(x, p, vec_sub(x, p));
}

static inline vec vec_slope_of_tail(vec x, vec_tail tail)
{
    vec g = vec_mul(tail.share, vec_sub(vec_set1(1), tail.bend));
    g = vec_scale_pow2(g, tail.n);
    return vec_by_sign(x, g, vec_sub(vec_set1(1), g));
}

/* Beyond these both functions are 0 or x, and their slopes 0 or 1, in f32. */
#define VEC_NORMAL_LIMIT  14.7f
#define VEC_SIGMOID_LIMIT 112.0f

/* The tail of the normal distribution, S(-u) = exp(-u^2 / 2) q(u), for |x| <= VEC_NORMAL_LIMIT. */
static inline vec_tail vec_normal_tail(vec x)
{
    /* x^2 in two parts, the first of them exact or nearly all of it: an error of it is one of the
     * exponent. */
#if VEC_FMA_IS_FUSED
    vec main = vec_mul(x, x), rest = vec_fma(x, x, vec_sub(vec_zero(), main));
#else
    vec high = veci_to_bits(veci_and(veci_from_bits(x), veci_set1(0xFFFFF000)));
    vec main = vec_mul(high, high), rest = vec_mul(vec_add(x, high), vec_sub(x, high));
#endif
    vec n = vec_round(vec_mul(vec_add(main, rest), vec_set1(-0.72134752f)));
    vec r = vec_fma(n, vec_set1(-0.693359375f), vec_mul(main, vec_set1(-0.5f)));
    r = vec_fma(rest, vec_set1(-0.5f), vec_fma(n, vec_set1(2.12194440e-4f), r));
    vec e = vec_exp_reduced(r);
    /* q(u) = t p(s), t = 1 / (1 + 0.3125 u), s = 1 - t, p of least maximal relative error, 2^-26.3:
     * near u = 0, where q falls fast, an error of s is small beside p. */
    vec u = vec_magnitude(x), v = vec_mul(u, vec_set1(0.3125f));
    vec t = vec_div(vec_set1(1), vec_add(v, vec_set1(1))), s = vec_mul(v, t);
    vec p = vec_set1(1.8850643188e-2f);
    p = vec_fma(p, s, vec_set1(-7.9056285322e-2f));
    p = vec_fma(p, s, vec_set1(1.0321368277e-1f));
    p = vec_fma(p, s, vec_set1(-2.0021289587e-2f));
    p = vec_fma(p, s, vec_set1(5.8027952909e-3f));
    p = vec_fma(p, s, vec_set1(-1.2746341527e-1f));
    p = vec_fma(p, s, vec_set1(-6.7791077308e-3f));
    p = vec_fma(p, s, vec_set1(5.0673276186e-1f));
    p = vec_fma(p, s, vec_set1(-7.7661448717e-1f));
    p = vec_fma(p, s, vec_set1(0.5f));
    vec q = vec_mul(t, p);
    /* u S'(u) / S(-u) = u / sqrt(2 pi) / q */
    vec_tail tail = {vec_mul(e, q), vec_div(vec_mul(u, vec_set1(0.39894228f)), q), n};
    return tail;
}

/* S(-u) = 1 / (1 + exp(w)) for w >= 0, and u S'(u) = u w' S(-u) S(u), where `gain` is u w'. */
static inline vec_tail vec_sigmoid_tail(vec w, vec gain)
{
    vec r, n = vec_exp_split(vec_sub(vec_zero(), w), &r);
    vec e = vec_exp_reduced(r);
    vec whole = vec_mul(e, vec_pow2(vec_max(vec_set1(-126), n)));
    vec inverse = vec_div(vec_set1(1), vec_add(vec_set1(1), whole));
    vec_tail tail = {vec_mul(e, inverse), vec_mul(gain, inverse), n};
    return tail;
}

/* For |x| <= 11, where the function has reached its limit: w = 2 sqrt(2 / pi) (u + 0.044715 u^3). */
#define VEC_GELU_TANH_LIMIT 11.0f

static inline vec_tail vec_gelu_tanh_tail(vec x)
{
    vec u = vec_magnitude(x), square = vec_mul(x, x);
    vec w = vec_mul(u, vec_fma(square, vec_set1(0.0713548163f), vec_set1(1.59576912f)));
    vec gain = vec_mul(u, vec_fma(square, vec_set1(0.214064449f), vec_set1(1.59576912f)));
    return vec_sigmoid_tail(w, gain);
}

/* Where looking up is cheap, S and (x S(x))' are polynomials, one for each of 32 pieces of the line
 * (pieces.py), of degree 7: 21 operations, where GELU's tail takes 45 and a division. Of a result that
 * will be bf16 there are 16 pieces, of degree 5 to 7. The first piece is 0: left of it are all x for
 * which x S(x) is below 2^-28, or 2^-23 if it will be bf16. */
#if VEC_HAS_LOOKUP
/* x, but within the first piece where it is left of that. */
static inline vec vec_right_of(int first, float width, vec x)
{
    return vec_max(vec_set1(((float)first + 0.25f) * width), x); /* NaN passes through */
}

static inline vec vec_pieces(const float *table, int degree, int pieces, int first, float width,
                             vec x)
{
    const vec last = vec_set1(((float)(first + pieces) - 0.75f) * width);
    vec clamped = vec_min(last, vec_right_of(first, width, x));
    /* Added to 1.5 * 2^23, the number of the piece stands in the low bits of the sum. */
    const vec shift = vec_set1(12582912.0f);
    vec shifted = vec_fma(clamped, vec_set1(1 / width), shift);
    veci piece = veci_from_bits(shifted);
    vec r = vec_fma(vec_sub(shifted, shift), vec_set1(-width), clamped);
    vec p = vec_lookup(table + degree * pieces, pieces, piece);
    for (int power = degree - 1; power >= 0; power--) {
        p = vec_fma(p, r, vec_lookup(table + power * pieces, pieces, piece));
    }
    return p;
}

/* A table's polynomial at x; `where` names its pieces. */
#define VEC_PIECES(table, where, x)                                                                \
    vec_pieces(table, (int)(sizeof(table) / sizeof(float)) / where##_PIECES - 1, where##_PIECES,   \
               where##_FIRST, where##_WIDTH, x)
/* x times that, which is -0 left of all pieces. */
#define VEC_TIMES_PIECES(table, where, x)                                                          \
    vec_mul(vec_right_of(where##_FIRST, where##_WIDTH, x), VEC_PIECES(table, where, x))
#endif

/* Each function for results that stay f32, or will be bf16 (`is_short`). Errors are in
 * include/sebp/layers.h. -Inf gives -0, as the limit is. */

/** x / 2 (1 + erf(x / sqrt(2))). */
static inline vec vec_gelu(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    return is_short ? VEC_TIMES_PIECES(normal_share_short, NORMAL_SHORT, x)
                    : VEC_TIMES_PIECES(normal_share, NORMAL, x);
#else
    (void)is_short;
    vec clamped = vec_clamp(x, VEC_NORMAL_LIMIT);
    return vec_product_of_tail(x, clamped, vec_normal_tail(clamped));
#endif
}

static inline vec vec_gelu_slope(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    return is_short ? VEC_PIECES(normal_slope_short, NORMAL_SHORT, x)
                    : VEC_PIECES(normal_slope, NORMAL, x);
#else
    (void)is_short;
    return vec_slope_of_tail(x, vec_normal_tail(vec_clamp(x, VEC_NORMAL_LIMIT)));
#endif
}

/** x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). */
static inline vec vec_gelu_tanh(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    return is_short ? VEC_TIMES_PIECES(tanh_share_short, NORMAL_SHORT, x)
                    : VEC_TIMES_PIECES(tanh_share, NORMAL, x);
#else
    (void)is_short;
    vec clamped = vec_clamp(x, VEC_GELU_TANH_LIMIT);
    return vec_product_of_tail(x, clamped, vec_gelu_tanh_tail(clamped));
#endif
}

static inline vec vec_gelu_tanh_slope(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    return is_short ? VEC_PIECES(tanh_slope_short, NORMAL_SHORT, x)
                    : VEC_PIECES(tanh_slope, NORMAL, x);
#else
    (void)is_short;
    return vec_slope_of_tail(x, vec_gelu_tanh_tail(vec_clamp(x, VEC_GELU_TANH_LIMIT)));
#endif
}

/** x / (1 + exp(-x)). */
static inline vec vec_silu(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    if (is_short) {
        return VEC_TIMES_PIECES(sigmoid_share_short, SIGMOID_SHORT, x);
    }
#endif
    (void)is_short;
    vec clamped = vec_clamp(x, VEC_SIGMOID_LIMIT), u = vec_magnitude(clamped);
    return vec_product_of_tail(x, clamped, vec_sigmoid_tail(u, u));
}

static inline vec vec_silu_slope(vec x, bool is_short)
{
#if VEC_HAS_LOOKUP
    return is_short ? VEC_PIECES(sigmoid_slope_short, SIGMOID_SHORT, x)
                    : VEC_PIECES(sigmoid_slope, SIGMOID, x);
#else
    (void)is_short;
    vec u = vec_magnitude(vec_clamp(x, VEC_SIGMOID_LIMIT));
    return vec_slope_of_tail(x, vec_sigmoid_tail(u, u));
#endif
}

#endif
