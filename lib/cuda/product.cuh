/* SPDX-License-Identifier: Apache-2.0 */
/** @file product.cuh What the kernels of products share: what becomes of a sum, and shares of the depth. */
#ifndef SEBP_CUDA_PRODUCT_CUH
#define SEBP_CUDA_PRODUCT_CUH

#include "activation.cuh"
#include "product.h"
#include "vocabulary.cuh"

/** Where C's elements go, and what is done to them before: see sebp_product. */
struct sebp_cuda_epilogue {
    void *c;
    int64_t c_stride;
    const int64_t *c_rows;
    const void *bias, *residual, *before;
    void *activated;
    int64_t residual_stride, before_stride, activated_stride;
    sebp_activation activation;
    bool c_is_bf16, bias_is_bf16, accumulate;
};

inline sebp_cuda_epilogue sebp_cuda_epilogue_of(const sebp_product *product)
{
    sebp_cuda_epilogue made{};
    made.c = product->c;
    made.c_stride = product->c_stride;
    made.c_rows = product->c_rows;
    made.bias = product->bias;
    made.residual = product->residual;
    made.before = product->before;
    made.activated = product->activated;
    made.residual_stride = product->residual_stride;
    made.before_stride = product->before_stride;
    made.activated_stride = product->activated_stride;
    made.activation = product->activation;
    made.c_is_bf16 = product->c_dtype == SEBP_BF16;
    made.bias_is_bf16 = product->bias_dtype == SEBP_BF16;
    made.accumulate = product->accumulate;
    return made;
}

/** An element of a matrix of either dtype. */
__device__ __forceinline__ float sebp_element(const void *data, bool is_bf16, int64_t at)
{
    return is_bf16 ? sebp_widen(((const sebp_bf16 *)data)[at]) : ((const float *)data)[at];
}

/** Stores it, and gives what is there then. */
__device__ __forceinline__ float sebp_put_element(void *data, bool is_bf16, int64_t at, float x)
{
    if (is_bf16) {
        sebp_bf16 rounded = sebp_narrow<sebp_bf16>(x);
        ((sebp_bf16 *)data)[at] = rounded;
        return sebp_widen(rounded);
    }
    ((float *)data)[at] = x;
    return x;
}

/** The end of sebp_finish_element() where an activation has part in it. Not inlined: it stands once in a
 * kernel, and not once for each element of a thread. */
static __device__ __noinline__ void sebp_finish_activation(const sebp_cuda_epilogue &to,
                                                           int64_t row, int64_t j, float sum)
{
    if (to.before != nullptr) {
        float stored = to.c_is_bf16 ? sebp_widen(sebp_narrow<sebp_bf16>(sum)) : sum;
        float x = sebp_element(to.before, to.c_is_bf16, row * to.before_stride + j);
        sum = stored * sebp_activation_slope(to.activation, x);
    }
    float stored = sebp_put_element(to.c, to.c_is_bf16, row * to.c_stride + j, sum);
    if (to.activated != nullptr) {
        sebp_put_element(to.activated, to.c_is_bf16, row * to.activated_stride + j,
                         sebp_activate(to.activation, stored));
    }
}

/** Finishes the sum for column j of memory row `row` of C. */
__device__ __forceinline__ void sebp_finish_element(const sebp_cuda_epilogue &to, int64_t row,
                                                    int64_t j, float sum)
{
    const int64_t at = row * to.c_stride + j;
    if (to.accumulate)
        sum += sebp_element(to.c, to.c_is_bf16, at);
    if (to.bias != nullptr)
        sum += sebp_element(to.bias, to.bias_is_bf16, j);
    if (to.residual != nullptr)
        sum += sebp_element(to.residual, to.c_is_bf16, row * to.residual_stride + j);
    if (to.before != nullptr || to.activated != nullptr)
        sebp_finish_activation(to, row, j, sum);
    else
        sebp_put_element(to.c, to.c_is_bf16, at, sum);
}

/** What a block works on. */
struct sebp_cuda_share {
    int64_t row, col;    /* of its tile's first element in C */
    int64_t begin, end;  /* of the depth */
    int64_t tile, index; /* which tile, which share of the depth */
};

/** Blocks take tiles column by column within a share, so that those that run at once read the same
 * rows of A. */
__device__ __forceinline__ sebp_cuda_share sebp_cuda_share_of(const sebp_cuda_cut &cut, int64_t k,
                                                              int tile_rows, int tile_cols)
{
    const int64_t tiles = cut.tiles_down * cut.tiles_across;
    sebp_cuda_share made;
    made.index = blockIdx.x / tiles;
    made.tile = blockIdx.x % tiles;
    made.row = made.tile % cut.tiles_down * tile_rows;
    made.col = made.tile / cut.tiles_down * tile_cols;
    made.begin = made.index * cut.share_depth;
    made.end = made.begin + cut.share_depth < k ? made.begin + cut.share_depth : k;
    return made;
}

/**
 * Adds the shares of a tile, of which each thread has `count` sums in registers. Whether this block has
 * the whole sums now: the last one to come has, and the others are done. All threads call it.
 *
 * `partial`: a thread's sums lie blockDim.x apart, so that a warp reads and writes whole lines.
 */
template <int count>
__device__ bool sebp_cuda_add_shares(const sebp_cuda_cut &cut, const sebp_cuda_share &share,
                                     float (&sums)[count], unsigned *counters, float *partial)
{
    if (cut.shares == 1)
        return true;
    const int64_t tiles = cut.tiles_down * cut.tiles_across;
    const int64_t tile_elements = (int64_t)count * blockDim.x;
    float *mine = partial + (share.index * tiles + share.tile) * tile_elements + threadIdx.x;
    for (int i = 0; i < count; i++)
        mine[(int64_t)i * blockDim.x] = sums[i];
    __threadfence(); /* the sums, before the counter that says that they are there */
    __shared__ unsigned arrived;
    __syncthreads();
    if (threadIdx.x == 0)
        arrived = atomicAdd(&counters[share.tile], 1U);
    __syncthreads();
    if (arrived != (unsigned)cut.shares - 1)
        return false;
    __threadfence();
    for (int i = 0; i < count; i++)
        sums[i] = 0;
    for (int64_t other = 0; other < cut.shares; other++) {
        const float *theirs = partial + (other * tiles + share.tile) * tile_elements + threadIdx.x;
        for (int i = 0; i < count; i++)
            sums[i] += __ldcg(&theirs[(int64_t)i * blockDim.x]);
    }
    return true;
}

#endif
