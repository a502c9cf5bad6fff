/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file fake_cublas.cc
 * cuBLASLt for the emulated GPU: products by three loops, in a kernel of one thread. Some products it
 * says it cannot do, and some need workspace, which it then fills. Where it is let, it adds up parts of a
 * sum in C's type, and wants matrices to be aligned as it was told they are. TF32 is what is left of f32
 * without its last 13 bits.
 */
#include <cublasLt.h>
#include <cuda_runtime.h>

struct fake_cublas_handle {
    int unused;
};

struct fake_cublas_product {
    bool turns_a, turns_b;
    cublasComputeType_t compute;
};

/* Columns that lie `stride` elements apart. */
struct fake_cublas_matrix {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t stride;
};

struct fake_cublas_preference {
    uint64_t workspace;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
    uint32_t aligned[4] = {256, 256, 256, 256}; /* A, B, C, D */
};

namespace {

constexpr size_t WORKSPACE = 512;
constexpr uint64_t PART = 16; /* of a sum */

/* What an algorithm's data hold; behind them how A, B, C and D are aligned. */
enum { DEPTH, ADDS_IN_OUTPUT, ALIGNED };

float round_as(cudaDataType_t type, float x)
{
    unsigned bits = __float_as_uint(x);
    if (type == CUDA_R_32F || x != x)
        return x;
    return __uint_as_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000U);
}

float as_tf32(float x)
{
    return __uint_as_float(__float_as_uint(x) & 0xFFFFE000U);
}

float element(const void *data, const fake_cublas_matrix &matrix, bool turned, uint64_t row,
              uint64_t col)
{
    int64_t at = turned ? (int64_t)row * matrix.stride + (int64_t)col
                        : (int64_t)col * matrix.stride + (int64_t)row;
    return matrix.type == CUDA_R_32F
               ? ((const float *)data)[at]
               : __uint_as_float((unsigned)((const uint16_t *)data)[at] << 16);
}

void put(void *data, const fake_cublas_matrix &matrix, uint64_t row, uint64_t col, float x)
{
    int64_t at = (int64_t)col * matrix.stride + (int64_t)row;
    unsigned bits = __float_as_uint(x);
    if (matrix.type == CUDA_R_32F)
        ((float *)data)[at] = x;
    else
        ((uint16_t *)data)[at] =
            x != x ? 0x7FFF : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void multiply(fake_cublas_product product, const void *a_data, fake_cublas_matrix a,
              const void *b_data, fake_cublas_matrix b, float beta, void *d_data,
              fake_cublas_matrix d, uint64_t depth, bool adds_in_output, char *workspace,
              size_t workspace_bytes)
{
    for (size_t i = 0; i < workspace_bytes; i++)
        workspace[i] = (char)0xFF;
    for (uint64_t col = 0; col < d.cols; col++) {
        for (uint64_t row = 0; row < d.rows; row++) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; k++) {
                float x = element(a_data, a, product.turns_a, row, k);
                float y = element(b_data, b, product.turns_b, k, col);
                sum += product.compute == CUBLAS_COMPUTE_32F ? x * y : as_tf32(x) * as_tf32(y);
                if (adds_in_output && k % PART == PART - 1)
                    sum = round_as(d.type, sum);
            }
            if (beta != 0)
                sum += beta * element(d_data, d, false, row, col);
            put(d_data, d, row, col, sum);
        }
    }
}

} // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = new fake_cublas_handle{};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *product, cublasComputeType_t compute,
                                        cudaDataType_t)
{
    *product = new fake_cublas_product{false, false, compute};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product)
{
    delete product;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void *value, size_t)
{
    bool turned = *(const cublasOperation_t *)value == CUBLAS_OP_T;
    (which == CUBLASLT_MATMUL_DESC_TRANSA ? product->turns_a : product->turns_b) = turned;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *matrix, cudaDataType_t type,
                                          uint64_t rows, uint64_t cols, int64_t stride)
{
    *matrix = new fake_cublas_matrix{type, rows, cols, stride};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matrix)
{
    delete matrix;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = new fake_cublas_preference{};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t which,
                                                    const void *value, size_t)
{
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        preference->workspace = *(const uint64_t *)value;
    else if (which == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
        preference->reductions = *(const uint32_t *)value;
    else
        preference->aligned[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] =
            *(const uint32_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int,
                                              cublasLtMatmulHeuristicResult_t *results, int *count)
{
    uint64_t depth = product->turns_a ? a->rows : a->cols;
    bool fits = depth == (product->turns_b ? b->cols : b->rows) &&
                c->rows == (product->turns_a ? a->cols : a->rows) &&
                c->cols == (product->turns_b ? b->rows : b->cols);
    *count = fits && depth % 7 != 3;
    if (*count == 0)
        return fits ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_EXECUTION_FAILED;
    const bool in_output = (preference->reductions & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE) != 0;
    results->algo = cublasLtMatmulAlgo_t{{depth, in_output}};
    for (int i = 0; i < 4; i++)
        results->algo.data[ALIGNED + i] = preference->aligned[i];
    results->workspaceSize = depth % 2 != 0 && preference->workspace >= WORKSPACE ? WORKSPACE : 0;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void *,
                              const void *a_data, cublasLtMatrixLayout_t a, const void *b_data,
                              cublasLtMatrixLayout_t b, const void *beta, const void *c_data,
                              cublasLtMatrixLayout_t, void *d_data, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                              size_t workspace_bytes, cudaStream_t)
{
    const void *const matrices[4] = {a_data, b_data, c_data, d_data};
    for (int i = 0; i < 4; i++) {
        if ((uintptr_t)matrices[i] % algorithm->data[ALIGNED + i] != 0)
            return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    cudaError_t error =
        sebp_emulate(multiply, dim3(1), dim3(1), 0, *product, a_data, *a, b_data, *b,
                     *(const float *)beta, d_data, *d, algorithm->data[DEPTH],
                     algorithm->data[ADDS_IN_OUTPUT] != 0, (char *)workspace, workspace_bytes);
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
