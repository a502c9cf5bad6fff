/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.h
 * Forward and backward of a linear layer on its active rows alone.
 *
 * With R the active rows, m of M (SEBP: Topchii, Panchenko, Chekalina, EACL SRW 2026, exact where
 * every other row of dY is zero):
 *
 *     Y[R]  = X[R] W^T + b                        2 m N K flop
 *     dX[R] = dY[R] W       dX elsewhere 0        2 m N K flop
 *     dW    = dY[R]^T X[R]                        2 m N K flop
 *     db    = sum of the rows of dY[R]
 *
 * X: M x K, W: N x K, b: 1 x N, Y and dY: M x N, each of a dtype of its own: f32 weights go with bf16
 * activations, and nothing is converted beforehand. Sums are taken in f32 whatever the dtypes; a bf16
 * output is rounded once, after the whole sum and what is added to it. Where bf16 is multiplied as such
 * (the tiers avx512bf16, amx and scalar, which emulates amx, and oneDNN on CPUs that can) denormal
 * factors and denormal sums are taken for zero.
 *
 * With SEBP_VERBOSE=1 each call that succeeds writes one line to standard error:
 *
 *     sebp,<function>,<M>,<K>,<N>,<m>,<dtype>,<gemm of each product>,<rows>,<milliseconds>
 *
 * A product is written as "native:auto" or "onednn:asked": which GEMM computed it, and why.
 * "native:medium", "native:high" and "native:split" are products of bf16 that the precision allowed.
 * "native:packed" and "-packed" at the end say that the product read a copy of W that a packed weight keeps,
 * or made one. On a GPU it is "cuda:wgmma", "cuda:tensor", "cuda:tf32" and "cuda:plain" for the library's
 * own kernels (the matrix units of Hopper, tensor cores, these with f32 as TF32, f32 multiply-adds), or
 * "cuda:cublaslt", "cuda:gathered" where it has rows that were gathered first. The two products of a backward
 * are joined by "+", dW's first. The rows are "all rows", "one run",
 * "scattered rows" or "no rows", followed by " found" where the call found them.
 */
#ifndef SEBP_LINEAR_H
#define SEBP_LINEAR_H

#include <stddef.h>

#include <sebp/activation.h>
#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/packed_weight.h>
#include <sebp/rows.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/** What happens to the value that an output held before the call. */
typedef enum sebp_write {
    SEBP_OVERWRITE = 0, /**< the old value is never read */
    SEBP_ACCUMULATE = 1 /**< the result is added to it */
} sebp_write;

/** What happens to the inactive rows of Y or dX under SEBP_OVERWRITE. */
typedef enum sebp_inactive {
    SEBP_INACTIVE_ZERO = 0, /**< they are set to zero */
    SEBP_INACTIVE_LEAVE =
        1 /**< they are not written: the caller has zeroed them, or never reads them */
} sebp_inactive;

/** Zero-initialised but for size_bytes, these are the defaults. */
typedef struct sebp_linear_options {
    size_t size_bytes; /**< sizeof(sebp_linear_options), so that the struct can grow */
    sebp_rule rule;    /**< backward with rows = NULL: the rule by which they are found */
    int x_is_compact;  /**< nonzero: X is m x K, its i-th row the i-th active row; needs rows */
    sebp_inactive inactive; /**< inactive rows of Y (forward) or dX (backward) */
    sebp_write dx_write;    /**< this and the next two: backward only */
    sebp_write dw_write;
    sebp_write db_write;
    const sebp_matrix
        *residual; /**< forward: added to Y[R]; M x N, of Y's dtype; it may be Y. NULL: 0 */
    sebp_activation activation; /**< f of the next two (activation.h) */
    const sebp_matrix
        *activated;            /**< forward, an output: f(Y[R]); M x N, of Y's dtype; it may be Y or
                                     the residual. NULL: not wanted */
    const sebp_matrix *before; /**< backward: Z, of which X = f(Z) is the activation: dX[R] becomes
                                     Z's gradient; M x K, of dX's dtype. NULL: dX is X's gradient */
    sebp_precision precision;  /**< of products with f32 (context.h); default the context's */
    /** Of w, whose elements are what they were (packed_weight.h). NULL: none. */
    sebp_packed_weight *packed_weight;
} sebp_linear_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_LINEAR_OPTIONS_INIT                                                                   \
    {                                                                                              \
        sizeof(sebp_linear_options), {SEBP_RULE_NONZERO, {0.0}, 0, {0.0}}, 0, SEBP_INACTIVE_ZERO,  \
            SEBP_OVERWRITE, SEBP_OVERWRITE, SEBP_OVERWRITE, 0, SEBP_GELU, 0, 0,                    \
            SEBP_PRECISION_DEFAULT, 0                                                              \
    }

/**
 * Y[R] = X[R] W^T + b. The other rows of Y are zeroed or left, as options->inactive says.
 *
 * With options->residual its rows R are added to Y[R]. With options->activated the rows R of that matrix
 * become f(Y[R]), and its other rows are treated as Y's. Either saves a pass over memory that a call of
 * its own would take. The bits are those that sebp_activation_forward() gives of Y. The backward of f needs
 * Y; where `activated` is Y itself, f(Y) takes its place.
 *
 * @param x        M x K; m x K with x_is_compact.
 * @param w        N x K, either dtype.
 * @param bias     1 x N, either dtype. NULL: none.
 * @param rows     R, made for M rows. NULL: all rows.
 * @param options  NULL: the defaults. The rule and the three writes are ignored; `before` is refused.
 * @param y        M x N, either dtype; overlaps nothing but what the options say.
 *
 * Any stride is allowed, and any size may be 0. With K = 0 the active rows become what is added.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; SEBP_ERROR_STRIDE; SEBP_ERROR_OVERFLOW;
 *         SEBP_ERROR_DTYPE (an unknown one; the residual or `activated` not of Y's, `before` not of
 *         dX's); SEBP_ERROR_VALUE (an option; a packed weight of another matrix than w, or of another
 *         context); SEBP_ERROR_ROWS (made for another M; x_is_compact
 *         without rows; weights where there may be none); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS;
 *         SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND. Only SEBP_ERROR_BACKEND may leave outputs half written.
 */
SEBP_API sebp_status sebp_linear_forward(sebp_context *context, const sebp_matrix *x,
                                         const sebp_matrix *w, const sebp_matrix *bias,
                                         const sebp_rows *rows, const sebp_linear_options *options,
                                         const sebp_matrix *y);

/**
 * dX, dW and db from dY, on the active rows alone. Each output is optional.
 *
 * Where X is itself an activation, X = f(Z), options->before may be Z. Then dX[R] becomes the gradient of
 * Z[R], which is (dY[R] W) f'(Z[R]) element by element. That saves a pass over memory. The bits are those
 * that sebp_activation_backward() gives of dY[R] W.
 *
 * @param dy       M x N.
 * @param x        M x K, or m x K with x_is_compact; either dtype. Needed for dW only, else NULL.
 * @param w        N x K, either dtype. Needed for dX only, else NULL.
 * @param rows     R, made for M rows. NULL: found in dY by options->rule. With weights (rows.h): those of
 *                 dW and db, without dX.
 * @param options  NULL: the defaults. The residual and `activated` are refused, and `before` without dX
 *                 or where dX accumulates.
 * @param dx       M x K, either dtype, or NULL. SEBP_ACCUMULATE does not touch inactive rows.
 * @param dw       N x K, either dtype, or NULL.
 * @param db       1 x N, either dtype, or NULL.
 *
 * Outputs overlap neither inputs nor each other; inputs may overlap each other. If no row is
 * active, x and w are not read; dX, dW and db are zeroed under SEBP_OVERWRITE and stay as they were
 * under SEBP_ACCUMULATE. Rows outside R count as zero, whatever dY holds there.
 *
 * Under SEBP_RULE_SAMPLED dX is that of all rows that are not zero, and exact. dW and db are those of a
 * weighted sample, unbiased; it is sebp_rows_sample()'s, with X where dW is computed, of which all rows are
 * then read. Weighted rows of dY are copied to scratch memory in f32, as many columns at a time as fit in
 * half of it, and multiplied there.
 *
 * Scratch memory stays within the context's bound, whatever M is. Where the call itself finds the
 * rows, it takes 8 bytes for each row of dY more, as sebp_rows_find() does; a sample takes what
 * sebp_rows_sample() does, and 8 bytes for each row more where dX is wanted.
 *
 * @return as sebp_linear_forward(); SEBP_ERROR_NULL also where dw comes without x or dx without w;
 *         SEBP_ERROR_MEMORY also where one column of weighted rows is over half of the scratch memory.
 */
SEBP_API sebp_status sebp_linear_backward(sebp_context *context, const sebp_matrix *dy,
                                          const sebp_matrix *x, const sebp_matrix *w,
                                          const sebp_rows *rows, const sebp_linear_options *options,
                                          const sebp_matrix *dx, const sebp_matrix *dw,
                                          const sebp_matrix *db);

SEBP_END_DECLS

#endif
