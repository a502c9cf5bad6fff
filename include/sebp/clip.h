/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file clip.h
 * Clipping of gradients by their global norm, in two calls:
 *
 *     sebp_gradient_norm(context, gradients, count, &norm);
 *     if (isfinite(norm) && norm > max_norm) {
 *         sebp_scale(context, gradients, count, max_norm / norm);
 *     }
 *
 * Where the norm is Inf a gradient holds a NaN or Inf, and the step is better left out. PyTorch adds
 * 1e-6 to the norm that it divides by.
 */
#ifndef SEBP_CLIP_H
#define SEBP_CLIP_H

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * norm = the root of the sum of squares of all elements of `count` matrices, in double precision; Inf
 * where one is NaN or Inf. The same bits for every number of threads. Reads each once: 4 bytes an
 * element in f32.
 *
 * @param gradients  of any shapes, either dtype, any stride. NULL only where count is 0.
 * @param norm       the result; 0 where there are no elements.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE (count negative); a status of
 *         sebp_matrix_check().
 */
SEBP_API sebp_status sebp_gradient_norm(sebp_context *context, const sebp_matrix *gradients,
                                        int64_t count, double *norm);

/**
 * Multiplies all elements of `count` matrices by a factor, which is rounded to f32, as is the
 * product; for a bf16 element that is rounded again. Reads and writes each once: 8 bytes an element
 * in f32. What lies in two of the matrices, or in one that is listed twice, is multiplied twice.
 *
 * @param matrices  of any shapes, either dtype, any stride. NULL only where count is 0.
 * @param factor  finite as f32.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE (count negative); a status of
 *         sebp_matrix_check(); SEBP_ERROR_VALUE (factor).
 */
SEBP_API sebp_status sebp_scale(sebp_context *context, const sebp_matrix *matrices, int64_t count,
                                double factor);

SEBP_END_DECLS

#endif
