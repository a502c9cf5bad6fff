/* SPDX-License-Identifier: Apache-2.0 */
/** @file prefix.cuh Sums over the threads of a block before each: where what they list goes. */
#ifndef SEBP_CUDA_PREFIX_CUH
#define SEBP_CUDA_PREFIX_CUH

#include "vocabulary.cuh"

/** The sum of x over the threads before this one, of a block of 32 to 1024 threads, all of which
 * call it; `room`: 32 elements of shared memory that nothing else uses. */
template <class T> __device__ T sebp_block_before(T x, T *room)
{
    int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
    T sum = x;
    for (int step = 1; step < SEBP_WARP; step *= 2) {
        T before = __shfl_up_sync(0xFFFFFFFFU, sum, step);
        if (lane >= step)
            sum += before;
    }
    __syncthreads(); /* the room may still be read */
    if (lane == SEBP_WARP - 1)
        room[warp] = sum;
    __syncthreads();
    sum -= x;
    for (int i = 0; i < warp; i++)
        sum += room[i];
    return sum;
}

#endif
