/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sampled.cu
 * A product of which few elements are wanted.
 *
 * A block has a few neighbouring elements, and a warp of it every WARPS-th row: a lane's loads of A and B
 * lie near its neighbours', as indices ascend. All blocks go through the rows from the first on, so that
 * a row that one of them has read is in the cache for the others.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "vocabulary.cuh"

namespace {

constexpr int WARPS = 8, AHEAD = 4; /* rows whose loads are under way together */

template <class T> struct sampled_factor {
    const T *data;
    int64_t stride;
    const int64_t *rows;

    __device__ __forceinline__ float at(int64_t i, int64_t col) const
    {
        return sebp_widen(data[sebp_row_at(rows, i) * stride + col]);
    }
};

template <class T> sampled_factor<T> factor_of(const sebp_operand &operand)
{
    return {(const T *)operand.data, operand.stride, operand.rows};
}

template <class T>
__global__ void __launch_bounds__(WARPS *SEBP_WARP)
    sampled_kernel(sampled_factor<T> a, sampled_factor<T> b, int64_t m, const int64_t *indices,
                   int64_t count, int64_t cols, float *sums, bool accumulate)
{
    __shared__ float parts[WARPS][SEBP_WARP];
    const int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
    const int64_t i = (int64_t)blockIdx.x * SEBP_WARP + lane;
    const int64_t index = indices[i < count ? i : count - 1];
    const int64_t row = index / cols, col = index - row * cols;
    float sum[AHEAD] = {};
    int64_t r = warp;
    for (; r + (AHEAD - 1) * WARPS < m; r += AHEAD * WARPS) {
        for (int j = 0; j < AHEAD; j++)
            sum[j] += a.at(r + j * WARPS, row) * b.at(r + j * WARPS, col);
    }
    for (; r < m; r += WARPS)
        sum[0] += a.at(r, row) * b.at(r, col);
    parts[warp][lane] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    __syncthreads();
    if (warp > 0 || i >= count)
        return;
    float total = accumulate ? sums[i] : 0;
    for (int w = 0; w < WARPS; w++)
        total += parts[w][lane];
    sums[i] = total;
}

} // namespace

sebp_status sebp_cuda_sampled_product(void *device, const sebp_sampled *product)
{
    const sebp_sparse *kept = product->kept;
    if (product->sums == nullptr)
        return SEBP_SUCCESS; /* no memory is needed */
    return sebp_with_dtype(product->a.dtype, [&](auto element) {
        using T = decltype(element);
        return sebp_launch(
            (sebp_cuda *)device, sampled_kernel<T>, (unsigned)sebp_div_ceil(kept->count, SEBP_WARP),
            WARPS * SEBP_WARP, 0, factor_of<T>(product->a), factor_of<T>(product->b), product->m,
            kept->indices, kept->count, kept->cols, product->sums, product->accumulate);
    });
}

/* By the memory that is read: a term reads two sectors of 32 bytes where the whole product, whose tiles
 * are read from shared memory, has less than a byte of each of its terms. */
bool sebp_cuda_sampled_is_cheaper(const void *device, const sebp_sampled *product)
{
    (void)device;
    const sebp_sparse *kept = product->kept;
    return (double)kept->count * 64 < (double)kept->rows * (double)kept->cols;
}
