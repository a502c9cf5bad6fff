/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file cublas.c
 * Products of whole matrices by cuBLASLt.
 *
 * cuBLASLt has columns where the library has rows: it is asked for C^T = B^T A^T, whose matrices are
 * those that lie in memory.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* It declares a function without parameters as "()". */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes"
#include <cublasLt.h>
#pragma GCC diagnostic pop

#include "cublas.h"
#include "product.h"

enum { REMEMBERED = 256 };

static const int64_t MAX_SCRATCH = INT64_C(32) << 20; /* what cuBLAS itself takes on Hopper */

/* What the choice of an algorithm depends on. */
typedef struct kind {
    int64_t m, n, k, a_stride, b_stride, c_stride;
    uint32_t dtypes;  /* of A and B, and of C */
    uint32_t compute; /* in f32, or TF32 */
    uint32_t layout;  /* transpositions; how A, B and C are aligned */
    int64_t scratch_bytes;
} kind;

typedef struct choice {
    kind kind;
    cublasLtMatmulAlgo_t algorithm;
    int64_t scratch_bytes; /* of the algorithm; negative: there is none */
    bool is_made;
} choice;

struct sebp_cublas {
    cublasLtHandle_t handle;
    choice choices[REMEMBERED]; /* by a hash of their kind; a search takes longer than a product */
};

_Static_assert(sizeof(cublasLtMatmulAlgo_t) <= SEBP_CUBLAS_PLAN_BYTES,
               "an algorithm does not fit in a plan");

static sebp_status check(sebp_cuda *cuda, cublasStatus_t status)
{
    if (status == CUBLAS_STATUS_SUCCESS)
        return SEBP_SUCCESS;
    snprintf(cuda->why, sizeof cuda->why, "cuBLASLt: status %d", (int)status);
    return status == CUBLAS_STATUS_ALLOC_FAILED ? SEBP_ERROR_MEMORY : SEBP_ERROR_BACKEND;
}

sebp_status sebp_cublas_make(sebp_cuda *cuda)
{
    cuda->cublas = calloc(1, sizeof *cuda->cublas);
    if (cuda->cublas == NULL)
        return SEBP_ERROR_MEMORY;
    return check(cuda, cublasLtCreate(&cuda->cublas->handle));
}

void sebp_cublas_end(sebp_cuda *cuda)
{
    if (cuda->cublas != NULL && cuda->cublas->handle != NULL)
        cublasLtDestroy(cuda->cublas->handle);
    free(cuda->cublas);
    cuda->cublas = NULL;
}

bool sebp_cublas_takes(const sebp_cuda *cuda, const sebp_product *product)
{
    return cuda->cublas != NULL && product->a.rows == NULL && product->b.rows == NULL &&
           product->c_rows == NULL && product->a.dtype == product->b.dtype &&
           (product->c_dtype == SEBP_F32 || product->c_dtype == product->a.dtype) &&
           product->bias == NULL && product->residual == NULL && product->activated == NULL &&
           product->before == NULL && product->m > 0 && product->n > 0 && product->k > 0;
}

/* ---- what cuBLASLt is asked for ---- */

typedef struct request {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c; /* as cuBLASLt sees them: a is B */
    cublasLtMatmulPreference_t preference;
} request;

static cublasComputeType_t compute_of(const sebp_product *product)
{
    return sebp_cuda_takes_tf32(product) ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

static cudaDataType_t type_of(sebp_dtype dtype)
{
    return dtype == SEBP_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* A matrix of `rows` x `cols` in memory, whose columns cuBLASLt takes for rows. */
static cublasStatus_t describe(cublasLtMatrixLayout_t *made, sebp_dtype dtype, int64_t rows,
                               int64_t cols, int64_t stride)
{
    return cublasLtMatrixLayoutCreate(made, type_of(dtype), (uint64_t)cols, (uint64_t)rows, stride);
}

static cublasStatus_t describe_operand(cublasLtMatrixLayout_t *made, const sebp_operand *operand,
                                       int64_t rows, int64_t cols)
{
    return operand->transposed ? describe(made, operand->dtype, cols, rows, operand->stride)
                               : describe(made, operand->dtype, rows, cols, operand->stride);
}

/* The largest power of two, up to 256, that a matrix begins at a multiple of. */
static uint32_t alignment_of(const void *data)
{
    uint32_t at = 256;
    while ((uintptr_t)data % at != 0)
        at /= 2;
    return at;
}

static void end_request(request *made)
{
    if (made->preference != NULL)
        cublasLtMatmulPreferenceDestroy(made->preference);
    if (made->c != NULL)
        cublasLtMatrixLayoutDestroy(made->c);
    if (made->b != NULL)
        cublasLtMatrixLayoutDestroy(made->b);
    if (made->a != NULL)
        cublasLtMatrixLayoutDestroy(made->a);
    if (made->product != NULL)
        cublasLtMatmulDescDestroy(made->product);
}

static cublasStatus_t make_request(const sebp_product *product, int64_t scratch_bytes,
                                   request *made)
{
    const cublasOperation_t kept = CUBLAS_OP_N, turned = CUBLAS_OP_T;
    const uint64_t scratch = (uint64_t)scratch_bytes;
    /* Parts of a sum are added in f32, where C is bf16, too. */
    const uint32_t reductions = product->c_dtype == SEBP_F32
                                    ? CUBLASLT_REDUCTION_SCHEME_MASK
                                    : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t aligned[4] = {alignment_of(product->b.data), alignment_of(product->a.data),
                                 alignment_of(product->c), alignment_of(product->c)};
    *made = (request){NULL, NULL, NULL, NULL, NULL};
    cublasStatus_t status =
        cublasLtMatmulDescCreate(&made->product, compute_of(product), CUDA_R_32F);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status =
            cublasLtMatmulDescSetAttribute(made->product, CUBLASLT_MATMUL_DESC_TRANSA,
                                           product->b.transposed ? &turned : &kept, sizeof kept);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status =
            cublasLtMatmulDescSetAttribute(made->product, CUBLASLT_MATMUL_DESC_TRANSB,
                                           product->a.transposed ? &turned : &kept, sizeof kept);
    }
    if (status == CUBLAS_STATUS_SUCCESS)
        status = describe_operand(&made->a, &product->b, product->k, product->n);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = describe_operand(&made->b, &product->a, product->m, product->k);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = describe(&made->c, product->c_dtype, product->m, product->n, product->c_stride);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulPreferenceCreate(&made->preference);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmulPreferenceSetAttribute(
            made->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &scratch, sizeof scratch);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmulPreferenceSetAttribute(made->preference,
                                                      CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reductions, sizeof reductions);
    }
    /* C is read and written. */
    static const cublasLtMatmulPreferenceAttributes_t alignments[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4 && status == CUBLAS_STATUS_SUCCESS; i++) {
        status = cublasLtMatmulPreferenceSetAttribute(made->preference, alignments[i], &aligned[i],
                                                      sizeof aligned[i]);
    }
    return status;
}

/* ---- choosing an algorithm ---- */

static kind kind_of(const sebp_product *product, int64_t scratch_bytes)
{
    kind made;
    memset(&made, 0, sizeof made); /* it is compared whole */
    made.m = product->m;
    made.n = product->n;
    made.k = product->k;
    made.a_stride = product->a.stride;
    made.b_stride = product->b.stride;
    made.c_stride = product->c_stride;
    made.dtypes = (uint32_t)product->a.dtype * 2 + (uint32_t)product->c_dtype;
    made.compute = (uint32_t)compute_of(product);
    made.layout = product->a.transposed + 2U * product->b.transposed +
                  4U * alignment_of(product->a.data) + 4096U * alignment_of(product->b.data) +
                  4194304U * alignment_of(product->c);
    made.scratch_bytes = scratch_bytes;
    return made;
}

/* Where a kind is remembered (FNV-1a). */
static choice *place_of(struct sebp_cublas *cublas, const kind *wanted)
{
    const unsigned char *bytes = (const unsigned char *)wanted;
    uint64_t hash = UINT64_C(14695981039346656037);
    for (size_t i = 0; i < sizeof *wanted; i++)
        hash = (hash ^ bytes[i]) * UINT64_C(1099511628211);
    return &cublas->choices[(hash >> 32) % REMEMBERED];
}

static void search(struct sebp_cublas *cublas, const sebp_product *product, choice *found)
{
    request asked;
    cublasLtMatmulHeuristicResult_t result;
    int count = 0;
    found->scratch_bytes = -1;
    if (make_request(product, found->kind.scratch_bytes, &asked) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoGetHeuristic(cublas->handle, asked.product, asked.a, asked.b, asked.c,
                                       asked.c, asked.preference, 1, &result,
                                       &count) == CUBLAS_STATUS_SUCCESS &&
        count > 0) {
        found->algorithm = result.algo;
        found->scratch_bytes = (int64_t)result.workspaceSize;
    }
    end_request(&asked);
}

bool sebp_cublas_plan_product(sebp_cuda *cuda, const sebp_product *product, sebp_cublas_plan *plan)
{
    const int64_t room = sebp_min(MAX_SCRATCH, sebp_cuda_workspace(cuda));
    const kind wanted = kind_of(product, room);
    choice *found = place_of(cuda->cublas, &wanted);
    if (!found->is_made || memcmp(&found->kind, &wanted, sizeof wanted) != 0) {
        found->kind = wanted;
        found->is_made = true;
        search(cuda->cublas, product, found);
    }
    if (found->scratch_bytes < 0)
        return false;
    plan->scratch_bytes = found->scratch_bytes;
    memcpy(plan->algorithm, &found->algorithm, sizeof found->algorithm);
    return true;
}

sebp_status sebp_cublas_run_product(sebp_cuda *cuda, const sebp_product *product,
                                    const sebp_cublas_plan *plan, void *scratch)
{
    const float one = 1, kept = product->accumulate ? 1 : 0;
    cublasLtMatmulAlgo_t algorithm;
    request asked;
    memcpy(&algorithm, plan->algorithm, sizeof algorithm);
    cublasStatus_t status = make_request(product, 0, &asked);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status =
            cublasLtMatmul(cuda->cublas->handle, asked.product, &one, product->b.data, asked.a,
                           product->a.data, asked.b, &kept, product->c, asked.c, product->c,
                           asked.c, &algorithm, scratch, (size_t)plan->scratch_bytes, cuda->stream);
    }
    end_request(&asked);
    /* Products before this one may have been written, which SEBP_ERROR_MEMORY denies. */
    return check(cuda, status) == SEBP_SUCCESS ? SEBP_SUCCESS : SEBP_ERROR_BACKEND;
}
