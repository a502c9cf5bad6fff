/* SPDX-License-Identifier: Apache-2.0 */
/** @file rotate.h SparseGrad's gradient by one order of its products. */
#ifndef SEBP_LIB_ROTATE_H
#define SEBP_LIB_ROTATE_H

#include "call.h"

/** What is wanted of R: all of it, or kept elements. */
typedef struct sebp_rotated_target {
    const sebp_matrix *r;    /* NULL: elements */
    const sebp_sparse *kept; /* NULL: all */
    float *sums;             /* of the elements, in the device's memory */
} sebp_rotated_target;

/** R, or the sums of its elements, on the call's active rows, by an order that is not AUTO.
 * SEBP_ERROR_MEMORY where its smallest panel is too large; R is as it was then. */
void sebp_rotate(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                 const sebp_matrix *x, sebp_rotation order, const sebp_rotated_target *target);

/** Whether the last product of FACTORS computes the elements kept alone: where that takes less time, or
 * R does not fit in the scratch memory. */
bool sebp_rotate_samples(const sebp_call *call, const sebp_rotated_target *target);

#endif
