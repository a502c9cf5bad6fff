/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention.h
 * Forward and backward of attention over texts of different lengths.
 *
 * With H heads of size D and G = H / kv_heads, head h of a text of n queries and m keys is
 *
 *     S = scale Q K^T                    n x m, of K's and V's head h / G (grouped query heads)
 *     S = softcap tanh(S / softcap)      where softcap > 0 (Gemma 2)
 *     S = S + bias                       where there is one
 *     P = softmax of S over the keys that a query sees
 *     out = dropout(P) V                 n x D
 *     lse = log of the sum of exp(S)     n x 1, over the same keys
 *
 * Query i stands at key position i + m - n: the ends of both are aligned, as flash-attention has
 * it. It sees the keys from window_left before that position to window_right behind it, and with
 * `causal` none behind it. A query that sees no key has lse = -Inf, and
 * where V and dout are finite out = 0 and no gradient.
 *
 * A mask is to be of -Inf. A query of which all scores are one large finite number, as -1e9, has
 * exact outputs, but lse rounds it: the backward's P is off by a factor of up to exp(|lse| 2^-24), or
 * by the number of its keys where |lse| is over 2^24.
 *
 * S and P are never in memory as a whole: blocks of them pass through the caches, and the backward
 * makes them again from lse.
 *
 * Q, out and their gradients: M x (H D), head h in the columns from h D on. K, V and their gradients:
 * M_k x (kv_heads D). Each is a view with its own stride, so the columns of a fused projection can be
 * given as they lie. They share one dtype; sums and the softmax are taken in f32. lse: M x H, f32.
 *
 * The bias is f32, (H L) x L_k or L x L_k, with L and L_k the longest texts of queries and of keys:
 * rows h L to h L + n - 1 for head h, or the same L for all heads; every text begins at its corner.
 *
 * Dropout is that of random.h. Its element of head h, query i and key j of a text is
 *
 *     ((h T + t + j) ceil(L / 64)) 64 + i
 *
 * with t the number of keys in the texts before, T in all: the same for packed and for padded texts.
 *
 * The results are the same bits for every number of threads and every bound of the workspace. NaN and
 * Inf spread within their text only, and into dbias; rows outside the texts are not read.
 *
 * On a GPU the tensor cores take dropout(P) and dS = P (dropout(dout V^T) - delta), delta the sums of
 * out dout, as bf16, as flash-attention has it: for bf16 and heads of up to 96 columns, 128 where the
 * GPU has the shared memory. Each of their elements is off by up to 2^-9 of it, so that beside the
 * rounding of the results
 *
 *     out  by up to  2^-9 dropout(P) |V|            dv  by up to  2^-9 dropout(P)^T |dout|
 *     dq   by up to  2^-9 scale |dS| |K|            dk  by up to  2^-9 scale |dS|^T |Q|
 *
 * lse, dbias and sums are as exact as elsewhere.
 *
 * tanh is off by no more than 2^-22, so that capped scores are off by softcap 2^-22.
 */
#ifndef SEBP_ATTENTION_H
#define SEBP_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/sequences.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

enum { SEBP_MAX_HEAD_SIZE = 512 };

typedef struct sebp_attention_options {
    size_t size_bytes;    /**< sizeof(sebp_attention_options), so that the struct can grow */
    int64_t heads;        /**< H >= 1 */
    int64_t kv_heads;     /**< a divisor of H; 0: H */
    double scale;         /**< finite; 0: 1 / sqrt(D) */
    double softcap;       /**< finite, >= 0; 0: none */
    int causal;           /**< nonzero: no query sees a key behind its position */
    int64_t window_left;  /**< keys seen before a query's position; negative: all of them */
    int64_t window_right; /**< keys seen behind it; negative: all of them */
    double dropout;       /**< the probability p, in [0, 1) */
    uint64_t seed; /**< of the dropout, as the next: the backward takes those of its forward */
    uint64_t offset;
    sebp_inactive inactive; /**< rows of the outputs, gradients too, outside the texts */
} sebp_attention_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_ATTENTION_OPTIONS_INIT                                                                \
    {                                                                                              \
        sizeof(sebp_attention_options), 1, 0, 0, 0, 0, -1, -1, 0, 0, 0, SEBP_INACTIVE_ZERO         \
    }

/**
 * out and lse from q, k and v.
 *
 * @param q            M x (H D), 1 <= D <= SEBP_MAX_HEAD_SIZE.
 * @param k            M_k x (kv_heads D).
 * @param v            M_k x (kv_heads D).
 * @param bias         as above; NULL: none.
 * @param q_sequences  the texts of the queries, among M rows.
 * @param k_sequences  those of the keys and values, as many, among M_k rows. NULL: q_sequences.
 * @param options      NULL: the defaults, one head.
 * @param out          M x (H D).
 * @param lse          M x H, f32. NULL: not wanted; a backward needs it.
 *
 * Outputs overlap neither inputs nor each other. Their rows outside the texts are zeroed or left, as
 * options->inactive says.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; SEBP_ERROR_STRIDE; SEBP_ERROR_OVERFLOW;
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option; a head size over the maximum);
 *         SEBP_ERROR_ROWS (sequences of another number of rows, or not as many texts of keys as of
 *         queries); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_attention_forward(
    sebp_context *context, const sebp_matrix *q, const sebp_matrix *k, const sebp_matrix *v,
    const sebp_matrix *bias, const sebp_sequences *q_sequences, const sebp_sequences *k_sequences,
    const sebp_attention_options *options, const sebp_matrix *out, const sebp_matrix *lse);

/**
 * dq, dk, dv and dbias from dout. All arguments of the forward are given as it had them, and out and
 * lse as it has left them. Each output is optional, and overwritten.
 *
 * @param dout   M x (H D).
 * @param dq     M x (H D), or NULL.
 * @param dk     M_k x (kv_heads D), or NULL; dv as well.
 * @param dbias  of bias's shape, f32, or NULL: the sum over texts, and over heads where they share
 *               a bias. Costs as much as half of the rest.
 *
 * Outputs overlap neither inputs nor each other.
 *
 * @return as sebp_attention_forward(); SEBP_ERROR_NULL also where dbias comes without bias.
 */
SEBP_API sebp_status sebp_attention_backward(
    sebp_context *context, const sebp_matrix *dout, const sebp_matrix *q, const sebp_matrix *k,
    const sebp_matrix *v, const sebp_matrix *bias, const sebp_matrix *out, const sebp_matrix *lse,
    const sebp_sequences *q_sequences, const sebp_sequences *k_sequences,
    const sebp_attention_options *options, const sebp_matrix *dq, const sebp_matrix *dk,
    const sebp_matrix *dv, const sebp_matrix *dbias);

SEBP_END_DECLS

#endif
