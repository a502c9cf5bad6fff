/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file row_tiles.cuh
 * How a grid is laid over rows whose elements need nothing but themselves: a row is cut into units,
 * as packs, of which a thread does a few; a block does several short rows, or a part of a long one.
 */
#ifndef SEBP_CUDA_ROW_TILES_CUH
#define SEBP_CUDA_ROW_TILES_CUH

#include "packs.cuh"

struct sebp_tiles {
    dim3 grid, block;
};

/** For `rows` rows of `units` units, of which a thread does `each` at a time. */
inline sebp_tiles sebp_tile_rows(int64_t rows, int64_t units, int each)
{
    constexpr int64_t THREADS = 256, MOST = 65535;
    if (rows == 0 || units == 0)
        return {dim3(0), dim3(1)};
    const int64_t parts = sebp_min(sebp_div_ceil(units, THREADS * each), MOST);
    const int64_t wide = sebp_min(sebp_div_ceil(units, parts * each), THREADS);
    const int64_t high = sebp_min(THREADS / wide, rows);
    return {dim3((unsigned)sebp_div_ceil(rows, high), (unsigned)parts),
            dim3((unsigned)wide, (unsigned)high)};
}

/** The list's row that the thread works on; -1: none. */
__device__ __forceinline__ int64_t sebp_tile_row(const sebp_row_list &list)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    return i < list.count ? sebp_row_at(list.rows, i) : -1;
}

/** The thread's first unit of a row, and how far it is to the next ones: within the `each` that it
 * does at a time blockDim.x, to the next such ones this. */
template <int EACH> __device__ __forceinline__ int64_t sebp_first_unit()
{
    return (int64_t)blockIdx.y * EACH * blockDim.x + threadIdx.x;
}

template <int EACH> __device__ __forceinline__ int64_t sebp_unit_step()
{
    return (int64_t)gridDim.y * EACH * blockDim.x;
}

/** Whether all of the matrices are packed; one that is NULL is. */
template <class T, class... Matrices> bool sebp_are_packed(const Matrices *...matrices)
{
    return ((matrices == nullptr || sebp_is_packed<T>(matrices)) && ...);
}

#endif
