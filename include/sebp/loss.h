/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file loss.h
 * Softmax cross-entropy and its gradient in one call: of logits, or of hidden states and the head
 * that makes logits of them.
 *
 * With p = softmax(logits) of a row, t its label, V classes and s the smoothing:
 *
 *     loss    = scale * sum over labelled rows of
 *               -(1 - s) log p_t - s / V * sum over j of log p_j
 *     dlogits = scale * (p - (1 - s) [j = t] - s / V)      of labelled rows, else 0
 *
 * A row whose label is ignore_label counts for nothing, and its logits are not read. Exponentials of
 * x - max are computed in f32, within 2 ulp and the rounding of the difference, 0 below exp(-87), and
 * added up in blocks in f32 and double; all that is done once a row is done in double. The loss is
 * the same bits for every number of threads.
 *
 * A labelled row that holds NaN or +Inf, or only -Inf, makes the loss NaN and that row's gradient
 * NaN. A logit of -Inf has p = 0; as a row's label, or with smoothing, it makes the loss Inf.
 */
#ifndef SEBP_LOSS_H
#define SEBP_LOSS_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_cross_entropy_options {
    size_t size_bytes;    /**< sizeof(sebp_cross_entropy_options), so that the struct can grow */
    int64_t ignore_label; /**< of rows that do not count; default -100 */
    double smoothing;     /**< s, in [0, 1] */
    double scale;         /**< finite as f32; 0: one over the number of labelled rows, the mean */
    sebp_inactive
        inactive; /**< rows of dhidden that are not labelled; of one that accumulates they stay */
    sebp_write dhidden_write; /**< sebp_linear_cross_entropy() only, as the next two */
    sebp_write dweight_write;
    sebp_write dbias_write;
    sebp_precision precision; /**< of products with f32 (context.h); default the context's */
} sebp_cross_entropy_options;

/** Options as they are by default, with size_bytes set: the mean, without smoothing. */
#define SEBP_CROSS_ENTROPY_OPTIONS_INIT                                                            \
    {                                                                                              \
        sizeof(sebp_cross_entropy_options), -100, 0, 0, SEBP_INACTIVE_ZERO, SEBP_OVERWRITE,        \
            SEBP_OVERWRITE, SEBP_OVERWRITE, SEBP_PRECISION_DEFAULT                                 \
    }

/**
 * The loss of logits, and its gradient.
 *
 * Reads the logits of labelled rows, of a row twice more from the cache, and writes the gradient: 8
 * bytes an element in f32. Scratch memory: 40 bytes a row.
 *
 * @param logits   M x V, V >= 1 where a row is labelled.
 * @param labels   M of them in the device's memory: each in [0, V) or ignore_label. NULL only where M
 *                 is 0.
 * @param options  NULL: the defaults.
 * @param loss     the result; 0 where no row is labelled.
 * @param dlogits  M x V, of the logits' dtype; it may be the logits. NULL: not wanted.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (a label, an option); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_cross_entropy(sebp_context *context, const sebp_matrix *logits,
                                        const int64_t *labels,
                                        const sebp_cross_entropy_options *options, double *loss,
                                        const sebp_matrix *dlogits);

/**
 * The loss of logits = hidden weight^T + bias, and its gradients, of labelled rows alone and without
 * all of their logits at once.
 *
 * The vocabulary is walked along in chunks of which the logits of the m labelled rows fit in half of
 * the context's scratch memory. One product of 2 m V K flop finds the loss. Each of dhidden and
 * dweight takes one more. Where there are several chunks, any gradient takes one more: logits are
 * then computed twice, once for the loss and once for the gradient.
 *
 * The gradient of the logits is of hidden's dtype, and so rounded where that is bf16.
 *
 * dweight and dbias are written once. dhidden is a sum over chunks: in bf16 it is rounded once a
 * chunk, so have it f32 where that matters.
 *
 * @param hidden   M x K.
 * @param weight   V x K, either dtype.
 * @param bias     1 x V, either dtype; NULL: 0.
 * @param labels   as above.
 * @param options  NULL: the defaults.
 * @param loss     the result; 0 where no row is labelled.
 * @param dhidden  M x K, either dtype. NULL: not wanted, as the next two.
 * @param dweight  V x K, either dtype.
 * @param dbias    1 x V, either dtype.
 *
 * Outputs overlap nothing.
 *
 * @return as above; SEBP_ERROR_MEMORY (also where the logits of 16 classes do not fit);
 *         SEBP_ERROR_BACKEND.
 */
SEBP_API sebp_status sebp_linear_cross_entropy(
    sebp_context *context, const sebp_matrix *hidden, const sebp_matrix *weight,
    const sebp_matrix *bias, const int64_t *labels, const sebp_cross_entropy_options *options,
    double *loss, const sebp_matrix *dhidden, const sebp_matrix *dweight, const sebp_matrix *dbias);

SEBP_END_DECLS

#endif
