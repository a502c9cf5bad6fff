/* SPDX-License-Identifier: Apache-2.0 */
/** @file basis.h The insides of a basis. */
#ifndef SEBP_LIB_BASIS_H
#define SEBP_LIB_BASIS_H

#include "call.h"

struct sebp_basis {
    sebp_matrix out, in; /* r_out x N, r_in x K, f32 */
    double share_out, share_in;
    sebp_copies *out_copies, *in_copies; /* on devices */
};

/** A basis whose vectors are to be filled in. SEBP_ERROR_OVERFLOW, SEBP_ERROR_MEMORY. */
sebp_status sebp_basis_make(int64_t rank_out, int64_t out_features, int64_t rank_in,
                            int64_t in_features, sebp_basis **basis);

/** Views of both sides in the memory of the call's device. */
void sebp_basis_on_device(sebp_call *call, const sebp_basis *basis, sebp_matrix *out,
                          sebp_matrix *in);

/** Whether no element of an f32 matrix is NaN or Inf. */
bool sebp_basis_all_finite(const sebp_matrix *matrix);

#endif
