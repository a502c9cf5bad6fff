/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file activation.cuh
 * The functions of include/sebp/activation.h and their derivatives.
 *
 * All but ReLU are x S(x) for an S that rises from 0 to 1 and has S(-x) = 1 - S(x). As on CPUs
 * (simd/vec_math.h) all is computed of S(-u), u = |x|, which is small where x is large, so that no
 * digits are lost on either side:
 *
 *     x S(x)    = x < 0 ? x S(-u) : x - x S(-u)
 *     (x S(x))' = x < 0 ? g : 1 - g,   g = S(-u) - u S'(u)
 *
 * Every operation is spelled out, as a product's epilogue and a layer of its own must round alike,
 * wherever the compiler could fuse a product and a sum.
 */
#ifndef SEBP_CUDA_ACTIVATION_CUH
#define SEBP_CUDA_ACTIVATION_CUH

#include <sebp/activation.h>

#include "vocabulary.cuh"

/** S(-u), and g. */
struct sebp_tail {
    float u; /* |x|, or where S(-u) is as good as 0 */
    float share, slope;
};

/** |x|, but at most `limit`; NaN for NaN. */
__device__ __forceinline__ float sebp_limited(float x, float limit)
{
    return fabsf(x) > limit ? limit : fabsf(x);
}

/** Of the normal distribution: exp(-u^2 / 2) q(u). */
__device__ __forceinline__ sebp_tail sebp_normal_tail(float x)
{
    const float u = sebp_limited(x, 14.7F);
    /* u^2 in two parts: an error of it is one of the exponent. */
    const float square = __fmul_rn(u, u), rest = __fmaf_rn(u, u, -square);
    const float e = __fmul_rn(expf(__fmul_rn(-0.5F, square)), __fmaf_rn(-0.5F, rest, 1.0F));
    const float v = __fmul_rn(u, 0.3125F), t = __fdividef(1.0F, __fadd_rn(v, 1.0F));
    const float s = __fmul_rn(v, t);
    float p = 1.8850643188e-2F;
    p = __fmaf_rn(p, s, -7.9056285322e-2F);
    p = __fmaf_rn(p, s, 1.0321368277e-1F);
    p = __fmaf_rn(p, s, -2.0021289587e-2F);
    p = __fmaf_rn(p, s, 5.8027952909e-3F);
    p = __fmaf_rn(p, s, -1.2746341527e-1F);
    p = __fmaf_rn(p, s, -6.7791077308e-3F);
    p = __fmaf_rn(p, s, 5.0673276186e-1F);
    p = __fmaf_rn(p, s, -7.7661448717e-1F);
    p = __fmaf_rn(p, s, 0.5F);
    const float q = __fmul_rn(t, p);
    return {u, __fmul_rn(e, q), __fmul_rn(e, __fmaf_rn(-0.39894228F, u, q))};
}

/** S(-u) = 1 / (1 + exp(w)) for w >= 0; `gain` is u w'. */
__device__ __forceinline__ sebp_tail sebp_sigmoid_tail(float u, float w, float gain)
{
    const float e = expf(-w), inverse = __fdividef(1.0F, __fadd_rn(1.0F, e));
    const float share = __fmul_rn(e, inverse);
    return {u, share, __fmul_rn(share, __fmaf_rn(-gain, inverse, 1.0F))};
}

__device__ __forceinline__ sebp_tail sebp_tail_of(sebp_activation function, float x)
{
    if (function == SEBP_GELU)
        return sebp_normal_tail(x);
    if (function == SEBP_SILU) {
        const float u = sebp_limited(x, 112.0F);
        return sebp_sigmoid_tail(u, u, u);
    }
    /* w = 2 sqrt(2 / pi) (u + 0.044715 u^3) */
    const float u = sebp_limited(x, 11.0F), square = __fmul_rn(u, u);
    return sebp_sigmoid_tail(u, __fmul_rn(u, __fmaf_rn(square, 0.0713548163F, 1.59576912F)),
                             __fmul_rn(u, __fmaf_rn(square, 0.214064449F, 1.59576912F)));
}

__device__ __forceinline__ float sebp_activate(sebp_activation function, float x)
{
    if (function == SEBP_RELU)
        return x > 0 ? x : x != x ? x : 0.0F;
    const sebp_tail tail = sebp_tail_of(function, x);
    return x < 0 ? __fmul_rn(-tail.u, tail.share) : __fsub_rn(x, __fmul_rn(tail.u, tail.share));
}

__device__ __forceinline__ float sebp_activation_slope(sebp_activation function, float x)
{
    if (function == SEBP_RELU)
        return x > 0 ? 1.0F : x != x ? x : 0.0F;
    const sebp_tail tail = sebp_tail_of(function, x);
    return x < 0 ? tail.slope : __fsub_rn(1.0F, tail.slope);
}

#endif
