/* SPDX-License-Identifier: Apache-2.0 */
/** @file cublas.h Large dense products by cuBLASLt, where the build has it. */
#ifndef SEBP_CUDA_CUBLAS_H
#define SEBP_CUDA_CUBLAS_H

#include "cuda.h"

SEBP_BEGIN_DECLS

#ifdef SEBP_HAVE_CUBLAS

/** Sets cuda->cublas. SEBP_ERROR_MEMORY, SEBP_ERROR_BACKEND. */
sebp_status sebp_cublas_make(sebp_cuda *cuda);
void sebp_cublas_end(sebp_cuda *cuda);

#else

static inline sebp_status sebp_cublas_make(sebp_cuda *cuda)
{
    cuda->cublas = NULL;
    return SEBP_SUCCESS;
}

static inline void sebp_cublas_end(sebp_cuda *cuda)
{
    (void)cuda;
}

#endif

SEBP_END_DECLS

#endif
