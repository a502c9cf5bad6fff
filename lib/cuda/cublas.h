/* SPDX-License-Identifier: Apache-2.0 */
/** @file cublas.h Large dense products by cuBLASLt, where the build has it. */
#ifndef SEBP_CUDA_CUBLAS_H
#define SEBP_CUDA_CUBLAS_H

#include "cuda.h"

SEBP_BEGIN_DECLS

/** Sets cuda->cublas; NULL in a build without it. SEBP_ERROR_MEMORY, SEBP_ERROR_BACKEND. */
sebp_status sebp_cublas_make(sebp_cuda *cuda);
void sebp_cublas_end(sebp_cuda *cuda);

SEBP_END_DECLS

#endif
