/* SPDX-License-Identifier: Apache-2.0 */
/** @file eigen.c Eigenvectors, which a GPU has no part in. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdio.h>

#include "operations.h"

/* They are found once for each layer, from sums that lie in the host's memory: LAPACK's work. */
sebp_status sebp_cuda_eigenvectors(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                   float *values, char why[SEBP_WHY_BYTES])
{
    (void)device, (void)sum, (void)vectors, (void)values;
    snprintf(why, SEBP_WHY_BYTES,
             "eigenvectors are computed on CPUs alone: use a context of the CPU for bases, whose "
             "sums are in the host's memory");
    return SEBP_ERROR_UNSUPPORTED;
}
