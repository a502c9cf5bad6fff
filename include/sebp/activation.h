/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.h The activation functions f, of layers of their own (layers.h) and of linear layers
 * (linear.h). */
#ifndef SEBP_ACTIVATION_H
#define SEBP_ACTIVATION_H

/**
 * f(x). Errors are those of the function before it is multiplied by anything or rounded to bf16; they
 * hold for all f32 and on every ISA. In f32 they are within the ulp given, or below 2^-28: where GELU is
 * nearer to 0 than that, x < -6, it may be 0. In bf16 they are within 2^-14 of the result, or below
 * 2^-22.
 *
 * The derivative of all but ReLU passes through 0 between x = -1.3 and -0.7, so its error is an absolute
 * one, within 2^-22, in bf16 within 2^-14. In f32 it is where x < -2 also within 16 ulp, of the tanh form
 * within 250, or below 2^-27.
 *
 * f(-Inf) is 0, f(Inf) is Inf, their derivatives are 0 and 1; NaN gives NaN. ReLU's derivative at 0 is
 * 0.
 */
typedef enum sebp_activation {
    SEBP_GELU = 0,      /**< x / 2 (1 + erf(x / sqrt(2))), within 6 ulp */
    SEBP_GELU_TANH = 1, /**< x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), within 4 ulp where
                           x >= -1, below within 250 ulp */
    SEBP_SILU = 2,      /**< x / (1 + exp(-x)), within 4 ulp */
    SEBP_RELU = 3       /**< max(x, 0), exact */
} sebp_activation;

#endif
