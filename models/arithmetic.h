/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file arithmetic.h
 * The row kernels of layers.c: layer norm, GELU, softmax.
 */
#ifndef SEBP_MODELS_ARITHMETIC_H
#define SEBP_MODELS_ARITHMETIC_H

#include <stdint.h>

/** y = x Phi(x), Phi being the normal distribution's share below x. */
void gelu_row(const float *x, float *y, int64_t n);

/** dy becomes dx, in place. */
void gelu_backward_row(const float *x, float *dy, int64_t n);

struct moments {
    float mean, rstd;
};

/** x += residual; y = x scaled to mean 0 and variance 1, times scale, plus shift. Keeps the two in
 * `moments`. */
void norm_row(float *x, const float *residual, const float *scale, const float *shift, float *y,
              struct moments *moments, int64_t n);

/** dy becomes dx, in place; the gradients of scale and shift are added to. */
void norm_backward_row(const float *x, struct moments moments, const float *scale, float *dy,
                       float *dscale, float *dshift, int64_t n);

/** c = a B: a has k elements `step` apart, B is k x n with rows `stride` apart. */
void row_times_matrix(const float *a, int64_t step, const float *b, int64_t stride, int64_t k,
                      float *restrict c, int64_t n);

/** Softmax over the scaled scores of one query, in place; keys from `real` on are masked. */
void softmax_row(float *scores, float scale, int64_t real, int64_t n);

/** The gradient of the weights, dp, becomes that of the unscaled scores, in place. */
void softmax_backward_row(const float *p, float *dp, float scale, int64_t n);

void add_row(float *to, const float *from, int64_t n);

#endif
