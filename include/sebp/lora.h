/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file lora.h
 * LoRA on the active rows: forward, backward and merge of a linear layer with a frozen weight, to
 * which the product of two thin matrices is added (Hu et al., ICLR 2022).
 *
 * With R the active rows, m of M (rows.h), and scale = alpha / r:
 *
 *     H     = scale X[R] A                         m x r
 *     Y[R]  = X[R] W^T + b + H B                   2 m N K + 2 m r (N + K) flop
 *
 *     dB    = H^T dY[R]                            r x N
 *     dH    = scale dY[R] B^T                      m x r
 *     dA    = X[R]^T dH                            K x r
 *     dX[R] = dY[R] W + dH A^T    dX elsewhere 0   2 m N K + 4 m r (N + K) flop in all
 *
 *     merge: W <- W + scale (A B)^T
 *
 * X: M x K, W: N x K, b: 1 x N, A: K x r, B: r x N, Y and dY: M x N. Usually A starts random and B
 * zero, so that the layer starts as it was. The bias is frozen too. If it is to train, its gradient
 * is that of sebp_linear_backward() with db alone.
 *
 * X, W, A, B, dY, H and dH share one dtype. Sums are taken in f32. In bf16, H and dH are rounded
 * twice: after their sum and when they are scaled. The second rounding changes nothing where the
 * scale is a power of two. A bf16 Y or dX is rounded after each of its two products.
 *
 * r may be any number from 0 on. With SEBP_VERBOSE=1 forward and backward write a line as in
 * linear.h.
 */
#ifndef SEBP_LORA_H
#define SEBP_LORA_H

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * Y[R] = X[R] W^T + b + H B, and H for the backward.
 *
 * @param x        M x K; m x K with x_is_compact.
 * @param w        N x K.
 * @param bias     1 x N, either dtype. NULL: none.
 * @param a        K x r.
 * @param b        r x N.
 * @param scale    alpha / r; finite.
 * @param rows     R, made for M rows. NULL: all rows.
 * @param options  NULL: the defaults. Of the options x_is_compact, inactive, precision
 *                 and packed_weight, of the frozen W, are used, and epilogues (linear.h) are refused.
 * @param h        m x r. Its i-th row belongs to the i-th active row.
 * @param y        M x N, either dtype. Other rows: zeroed or left, as options->inactive says.
 *
 * y and h overlap nothing.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option, scale); SEBP_ERROR_ROWS (made for another
 *         M; x_is_compact without rows); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY;
 *         SEBP_ERROR_BACKEND. Only SEBP_ERROR_BACKEND may leave outputs half written.
 */
SEBP_API sebp_status sebp_lora_forward(sebp_context *context, const sebp_matrix *x,
                                       const sebp_matrix *w, const sebp_matrix *bias,
                                       const sebp_matrix *a, const sebp_matrix *b, double scale,
                                       const sebp_rows *rows, const sebp_linear_options *options,
                                       const sebp_matrix *h, const sebp_matrix *y);

/**
 * dA, dB and dX from dY, on the active rows alone. W gets no gradient.
 *
 * @param dy       M x N.
 * @param x        M x K, or m x K with x_is_compact.
 * @param w        N x K. Needed for dX only, else NULL.
 * @param a, b     as in the forward.
 * @param h        m x r, as the forward left it.
 * @param scale    as in the forward.
 * @param rows     R, as in the forward. NULL: all rows. No rule is used, as the rows are those of
 *                 H.
 * @param options  NULL: the defaults. Of the options x_is_compact, inactive, dx_write,
 *                 precision and packed_weight are used, and dw_write for dA and dB; epilogues are refused.
 * @param dh       m x r, overwritten: the gradient of H before its scale.
 * @param dx       M x K, either dtype, or NULL.
 * @param da       K x r, either dtype.
 * @param db       r x N, either dtype.
 *
 * Outputs overlap neither inputs nor each other. If no row is active, dA and dB are zeroed under
 * SEBP_OVERWRITE and stay as they were under SEBP_ACCUMULATE.
 *
 * @return as sebp_lora_forward(); SEBP_ERROR_NULL also where dx comes without w.
 */
SEBP_API sebp_status sebp_lora_backward(sebp_context *context, const sebp_matrix *dy,
                                        const sebp_matrix *x, const sebp_matrix *w,
                                        const sebp_matrix *a, const sebp_matrix *b,
                                        const sebp_matrix *h, double scale, const sebp_rows *rows,
                                        const sebp_linear_options *options, const sebp_matrix *dh,
                                        const sebp_matrix *dx, const sebp_matrix *da,
                                        const sebp_matrix *db);

/**
 * W <- W + scale (A B)^T: afterwards the layer is an ordinary one. The same call with the negative
 * scale undoes it, up to rounding.
 *
 * Works on copies of A and B in f32: 4 r (K + N) bytes. A bf16 W is rounded once.
 *
 * @param a      K x r, either dtype.
 * @param b      r x N, either dtype.
 * @param scale  alpha / r; finite.
 * @param w      N x K, either dtype; overlaps neither a nor b.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_VALUE (scale);
 *         SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND.
 */
SEBP_API sebp_status sebp_lora_merge(sebp_context *context, const sebp_matrix *a,
                                     const sebp_matrix *b, double scale, const sebp_matrix *w);

SEBP_END_DECLS

#endif
