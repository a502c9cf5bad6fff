/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file arithmetic.c
 * What is not a linear layer is a plain loop over one row, for the compiler to vectorise.
 */
#include <math.h>
#include <string.h>

#include "models/arithmetic.h"

#ifdef _OPENMP
#define DO_PRAGMA(text) _Pragma(#text)
#define SIMD            DO_PRAGMA(omp simd)
#define SIMD_SUM(...)   DO_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define SIMD
#define SIMD_SUM(...)
#endif

/* The compiler makes one copy of a WIDE function for each generation of x86-64 and picks one when
 * the program starts. (Not under AddressSanitizer, which is not up yet when that happens.) */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) &&       \
    !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

/**
 * e^x for x <= 88: 2^n * e^r with |r| <= ln(2)/2, the second by its Taylor polynomial.
 * Largest relative error 2e-7; below -87 it is 0, so that masked keys have weight exactly 0.
 */
static inline float fast_exp(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float clamped = x < -87.0f ? -87.0f : x;
    union {
        float real;
        int32_t bits;
    } n = {clamped * 1.44269504f + round}, power;
    power.bits = (int32_t)((uint32_t)n.bits << 23) + 0x3f800000;
    float whole = n.real - round;
    float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return x < -87.0f ? 0.0f : p * power.real;
}

/**
 * The normal distribution's share below x, and its density at x, from one exponential.
 * The share is (1 + erf(x / sqrt 2)) / 2 by Abramowitz and Stegun 7.1.26; largest error 1.5e-7.
 */
static inline float normal_share(float x, float *density)
{
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float bell = fast_exp(-z * z);
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * bell; /* beyond |x| */
    *density = 0.39894228f * bell;
    return x < 0 ? tail : 1.0f - tail;
}

WIDE void gelu_row(const float *x, float *y, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float density;
        y[j] = x[j] * normal_share(x[j], &density);
    }
}

WIDE void gelu_backward_row(const float *x, float *dy, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float density;
        float share = normal_share(x[j], &density);
        dy[j] *= share + x[j] * density;
    }
}

WIDE void norm_row(float *x, const float *residual, const float *scale, const float *shift,
                   float *y, struct moments *moments, int64_t n)
{
    const float epsilon = 1e-12f; /* BERT's */
    float sum = 0.0f, squares = 0.0f;
    SIMD_SUM(sum)
    for (int64_t j = 0; j < n; j++) {
        x[j] += residual[j];
        sum += x[j];
    }
    float mean = sum / (float)n;
    SIMD_SUM(squares)
    for (int64_t j = 0; j < n; j++) {
        squares += (x[j] - mean) * (x[j] - mean);
    }
    float rstd = 1.0f / sqrtf(squares / (float)n + epsilon);
    SIMD for (int64_t j = 0; j < n; j++)
    {
        y[j] = (x[j] - mean) * rstd * scale[j] + shift[j];
    }
    *moments = (struct moments){mean, rstd};
}

WIDE void norm_backward_row(const float *x, struct moments moments, const float *scale, float *dy,
                            float *dscale, float *dshift, int64_t n)
{
    float mean = moments.mean, rstd = moments.rstd;
    float sum = 0.0f, along = 0.0f;
    SIMD_SUM(sum, along)
    for (int64_t j = 0; j < n; j++) {
        float normal = (x[j] - mean) * rstd;
        sum += dy[j] * scale[j];
        along += dy[j] * scale[j] * normal;
    }
    sum /= (float)n;
    along /= (float)n;
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float normal = (x[j] - mean) * rstd;
        dscale[j] += dy[j] * normal;
        dshift[j] += dy[j];
        dy[j] = (dy[j] * scale[j] - sum - normal * along) * rstd;
    }
}

WIDE void row_times_matrix(const float *a, int64_t step, const float *b, int64_t stride, int64_t k,
                           float *restrict c, int64_t n)
{
    memset(c, 0, (size_t)n * sizeof *c);
    int64_t i = 0;
    for (; i + 4 <= k; i += 4, b += 4 * stride) {
        float a0 = a[i * step], a1 = a[(i + 1) * step];
        float a2 = a[(i + 2) * step], a3 = a[(i + 3) * step];
        SIMD for (int64_t j = 0; j < n; j++)
        {
            c[j] +=
                a0 * b[j] + a1 * b[j + stride] + (a2 * b[j + 2 * stride] + a3 * b[j + 3 * stride]);
        }
    }
    for (; i < k; i++, b += stride) {
        float a0 = a[i * step];
        SIMD for (int64_t j = 0; j < n; j++)
        {
            c[j] += a0 * b[j];
        }
    }
}

WIDE void softmax_row(float *scores, float scale, int64_t real, int64_t n)
{
    float max = scores[0];
    for (int64_t j = 1; j < real; j++) {
        max = scores[j] > max ? scores[j] : max;
    }
    for (int64_t j = real; j < n; j++) {
        scores[j] = -INFINITY;
    }
    float sum = 0.0f;
    SIMD_SUM(sum)
    for (int64_t j = 0; j < n; j++) {
        scores[j] = fast_exp((scores[j] - max) * scale);
        sum += scores[j];
    }
    float share = 1.0f / sum;
    SIMD for (int64_t j = 0; j < n; j++)
    {
        scores[j] *= share;
    }
}

WIDE void softmax_backward_row(const float *p, float *dp, float scale, int64_t n)
{
    float along = 0.0f;
    SIMD_SUM(along)
    for (int64_t j = 0; j < n; j++) {
        along += p[j] * dp[j];
    }
    SIMD for (int64_t j = 0; j < n; j++)
    {
        dp[j] = p[j] * (dp[j] - along) * scale;
    }
}

WIDE void add_row(float *to, const float *from, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        to[j] += from[j];
    }
}
