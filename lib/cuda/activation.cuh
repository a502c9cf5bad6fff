/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.cuh The functions of include/sebp/activation.h and their derivatives. */
#ifndef SEBP_CUDA_ACTIVATION_CUH
#define SEBP_CUDA_ACTIVATION_CUH

#include <sebp/activation.h>

#include "vocabulary.cuh"

/* Beyond this a function is 0 or x, and its derivative 0 or 1. Products with an infinite x would be
 * NaN there. */
#define SEBP_FAR 40.0F

/** 1 / (1 + exp(-x)). */
__device__ __forceinline__ float sebp_sigmoid(float x)
{
    return 1.0F / (1.0F + expf(-x));
}

/** The share of x that GELU lets through, from the side on which it is small. */
__device__ __forceinline__ float sebp_gelu_share(float x)
{
    return 0.5F * erfcf(-0.70710678118654752F * x);
}

/** 2 sqrt(2 / pi) (x + 0.044715 x^3): GELU by tanh lets through its sigmoid. */
__device__ __forceinline__ float sebp_gelu_argument(float x)
{
    return 1.5957691216057308F * x * fmaf(0.044715F * x, x, 1.0F);
}

__device__ __forceinline__ float sebp_activate(sebp_activation function, float x)
{
    if (function == SEBP_RELU)
        return x > 0 ? x : x != x ? x : 0.0F;
    if (fabsf(x) > SEBP_FAR) {
        /* SiLU alone has something left there: x exp(x). */
        bool is_tail = function == SEBP_SILU && x > -200.0F;
        return x > 0 ? x : is_tail ? x * expf(x) : -0.0F;
    }
    switch (function) {
    case SEBP_GELU:
        return x * sebp_gelu_share(x);
    case SEBP_GELU_TANH:
        return x * sebp_sigmoid(sebp_gelu_argument(x));
    default:
        return x * sebp_sigmoid(x);
    }
}

__device__ __forceinline__ float sebp_activation_slope(sebp_activation function, float x)
{
    if (function == SEBP_RELU)
        return x > 0 ? 1.0F : x != x ? x : 0.0F;
    if (fabsf(x) > SEBP_FAR) {
        bool is_tail = function == SEBP_SILU && x > -200.0F;
        return x > 0 ? 1.0F : is_tail ? (1 + x) * expf(x) : 0.0F;
    }
    switch (function) {
    case SEBP_GELU: /* plus x times the density of the normal distribution */
        return fmaf(x, 0.39894228040143268F * expf(-0.5F * x * x), sebp_gelu_share(x));
    case SEBP_GELU_TANH: {
        float share = sebp_sigmoid(sebp_gelu_argument(x));
        float steepness = 1.5957691216057308F * fmaf(3 * 0.044715F * x, x, 1.0F);
        return share + x * share * (1 - share) * steepness;
    }
    default: {
        float share = sebp_sigmoid(x);
        return share * fmaf(x, 1 - share, 1.0F);
    }
    }
}

#endif
