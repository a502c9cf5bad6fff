/* SPDX-License-Identifier: Apache-2.0 */
/** @file cublas.h Products of whole matrices by cuBLASLt, where the build has it. */
#ifndef SEBP_CUDA_CUBLAS_H
#define SEBP_CUDA_CUBLAS_H

#include "cuda.h"

SEBP_BEGIN_DECLS

enum { SEBP_CUBLAS_PLAN_BYTES = 128 };

/** How cuBLASLt does a product. */
typedef struct sebp_cublas_plan {
    int64_t scratch_bytes;
    alignas(16) unsigned char algorithm[SEBP_CUBLAS_PLAN_BYTES];
} sebp_cublas_plan;

#ifdef SEBP_HAVE_CUBLAS

/** Sets cuda->cublas. SEBP_ERROR_MEMORY, SEBP_ERROR_BACKEND. */
sebp_status sebp_cublas_make(sebp_cuda *cuda);
void sebp_cublas_end(sebp_cuda *cuda);

/** Whether it can do the product: two matrices of one dtype that lie as they are, and C with nothing
 * added but what it holds. */
bool sebp_cublas_takes(const sebp_cuda *cuda, const sebp_product *product);

/** False where cuBLASLt knows no way. */
bool sebp_cublas_plan_product(sebp_cuda *cuda, const sebp_product *product, sebp_cublas_plan *plan);

sebp_status sebp_cublas_run_product(sebp_cuda *cuda, const sebp_product *product,
                                    const sebp_cublas_plan *plan, void *scratch);

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

static inline bool sebp_cublas_takes(const sebp_cuda *cuda, const sebp_product *product)
{
    (void)cuda;
    (void)product;
    return false;
}

static inline bool sebp_cublas_plan_product(sebp_cuda *cuda, const sebp_product *product,
                                            sebp_cublas_plan *plan)
{
    (void)cuda;
    (void)product;
    (void)plan;
    return false;
}

static inline sebp_status sebp_cublas_run_product(sebp_cuda *cuda, const sebp_product *product,
                                                  const sebp_cublas_plan *plan, void *scratch)
{
    (void)cuda;
    (void)product;
    (void)plan;
    (void)scratch;
    return SEBP_ERROR_UNSUPPORTED;
}

#endif

SEBP_END_DECLS

#endif
