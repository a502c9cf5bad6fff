/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packed_weight.h
 * A weight that is kept the way products read it, for calls between which its values stay the same.
 *
 * Each product with W first copies W into an order that its kernels read, rounded or split where the
 * precision asks for that. Of few rows this copy is most of the work. A packed weight keeps such copies:
 * one for Y = X W^T, one for dX = dY W, and others where calls differ in dtype or precision. A copy pays
 * where it is used at least twice: in the batches of a step that accumulates gradients, in steps of
 * several forwards, and most of all for a frozen weight, as LoRA has it, of which it is made once. Where W
 * changes after each forward and backward, nothing is gained.
 *
 *     sebp_packed_weight_create(context, &w, 0, &packed);
 *     options.packed_weight = packed;
 *     for (each step) {
 *         for (each batch) {
 *             options.dw_write = options.db_write = is_first_batch ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
 *             sebp_linear_forward(context, &x, &w, &bias, rows, &options, &y);
 *             sebp_linear_backward(context, &dy, &x, &w, rows, &options, &dx, &dw, &db);
 *         }
 *         sebp_adamw_step(context, &dw, step, NULL, &w, &moment1, &moment2);
 *         sebp_packed_weight_changed(packed);
 *     }
 *
 * **The caller promises that the elements of W are what they were**, from the first call that is given the
 * packed weight to the last, but for changes that are told by sebp_packed_weight_changed(). The library
 * does not look: after a change that is not told, results are those of the old W, or of a mixture of both.
 * Functions of the library that write W (AdamW, weight decay, LoRA's merge, SparseGrad's update) do not
 * tell it.
 * Each call checks that w has the address, the shape, the stride and the dtype that W had when the packed
 * weight was made. W itself is still read, so it must stay where it is.
 *
 * Results have the same bits as without it, with one exception: an f32 forward of 4 to 15 rows that
 * SEBP_GEMM_AUTO would give to oneDNN is done by the library's own GEMM, which is then faster. oneDNN does
 * not use copies, and none are made for it.
 *
 * A packed weight belongs to the context that it is made for, and like that is used by one thread at a
 * time. Calls on any other context refuse it. The context may be destroyed before it.
 */
#ifndef SEBP_PACKED_WEIGHT_H
#define SEBP_PACKED_WEIGHT_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_packed_weight sebp_packed_weight;

/**
 * Makes a packed weight for W. Nothing is copied yet: each copy is made, by all threads, in the first call
 * that has a use for it.
 *
 * A copy takes about 4 bytes for each element of W where f32 is multiplied, and where bf16 is 2 for each
 * of its parts (context.h): 2 of a bf16 W and at SEBP_PRECISION_MEDIUM, 4 at HIGH, 6 at SPLIT. Sides are
 * rounded up to tiles, of at most 64 columns.
 *
 * @param w              N x K, either dtype; any size may be 0.
 * @param max_bytes      at most so many bytes for its copies. What does not fit is not kept, and calls
 *                       pack as they do without. 0: 24 bytes for each element of W and 1 MiB, which is
 *                       enough for Y and dX at any precision, but for very narrow weights.
 * @param packed_weight  where it is put; untouched on error.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; as sebp_linear_forward() for the view w; SEBP_ERROR_VALUE
 *         (max_bytes negative); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_packed_weight_create(sebp_context *context, const sebp_matrix *w,
                                               int64_t max_bytes,
                                               sebp_packed_weight **packed_weight);

/** Says that elements of W have changed, or may have: copies are made anew when they are next needed. Those
 * that have not been needed since make room for others. NULL: nothing. */
SEBP_API void sebp_packed_weight_changed(sebp_packed_weight *packed_weight);

/** The bytes that its copies take now, at most max_bytes; 0 for NULL, and on a device that keeps none.
 * They are no part of sebp_context_scratch_bytes(). */
SEBP_API int64_t sebp_packed_weight_bytes(const sebp_packed_weight *packed_weight);

/** Frees it. W is the caller's and stays. NULL: nothing. */
SEBP_API void sebp_packed_weight_destroy(sebp_packed_weight *packed_weight);

SEBP_END_DECLS

#endif
