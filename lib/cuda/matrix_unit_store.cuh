/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_store.cuh
 * The part of matrix_unit_kernel.cuh that stores a tile of C, summed over a cluster or not.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_STORE_CUH
#define SEBP_CUDA_MATRIX_UNIT_STORE_CUH

#include "matrix_unit_work.cuh"

namespace matrix_unit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class T> struct four;

template <> struct four<float> {
    float4 x;

    __device__ __forceinline__ float get(int i) const
    {
        return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
    }

    static __device__ __forceinline__ four of(const float (&v)[4])
    {
        return {{v[0], v[1], v[2], v[3]}};
    }
};

template <> struct four<sebp_bf16> {
    uint2 x;

    __device__ __forceinline__ float get(int i) const
    {
        uint32_t pair = i < 2 ? x.x : x.y;
        return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U);
    }

    static __device__ __forceinline__ four of(const float (&v)[4])
    {
        return {{hopper::narrow_two(v[0], v[1]), hopper::narrow_two(v[2], v[3])}};
    }
};

/** Where a thread's sums go: two rows of C, 8 apart. */
template <class T> struct store_rows {
    T *row[2]; /* NULL: past the end */
    int first; /* column of the tile */

    __device__ __forceinline__ store_rows(const work &w, int m, int n) : first(n)
    {
        int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = m + 16 * warp + lane / 4 + 8 * h;
            row[h] = i < w.m ? (T *)w.c + sebp_row_at(w.c_rows, i) * w.c_stride : nullptr;
        }
    }
};

/** A thread's place in 16 columns of the tile: four that follow each other, once lanes have swapped. */
__device__ __forceinline__ int column_in_unit()
{
    int l = (int)threadIdx.x % 4;
    return l % 2 == 0 ? 2 * l : 8 + 2 * (l - 1);
}

template <class T>
__device__ __forceinline__ void load_four(const work &w, const T *row, int column, float (&v)[4])
{
    if (row != nullptr && w.c_in_fours && column + 4 <= w.n) {
        four<T> old = *(const four<T> *)(row + column);
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = old.get(i);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = row != nullptr && column + i < w.n ? sebp_widen(row[column + i]) : 0.0F;
    }
}

template <class T>
__device__ __forceinline__ void store_four(const work &w, T *row, int column, const float (&v)[4])
{
    if (row == nullptr)
        return;
    if (w.c_in_fours && column + 4 <= w.n) {
        *(four<T> *)(row + column) = four<T>::of(v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < w.n)
                row[column + i] = sebp_narrow<T>(v[i]);
    }
}

/**
 * Stores COUNT units, each 16 columns: 8 of a thread's sums. Two neighbouring lanes swap halves, so
 * that each has four columns in a row. All old values are asked for before the first is needed.
 */
template <class T, bool ACCUMULATE, int COUNT>
__device__ __forceinline__ void store_units(const work &w, const store_rows<T> &to, int unit,
                                            const float *sums)
{
    float old[COUNT][2][4];
    int column = to.first + 16 * unit + column_in_unit();
    if (ACCUMULATE) {
#pragma unroll
        for (int u = 0; u < COUNT; u++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                load_four(w, to.row[h], column + 16 * u, old[u][h]);
    }
    bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *low = sums + 8 * u + 2 * h, *high = low + 4;
            float other[2], made[4];
#pragma unroll
            for (int e = 0; e < 2; e++)
                other[e] = __shfl_xor_sync(0xFFFFFFFFU, odd ? low[e] : high[e], 1);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                made[e] = odd ? other[e] : low[e];
                made[e + 2] = odd ? high[e] : other[e];
            }
            if (ACCUMULATE) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    made[e] += old[u][h][e];
            }
            store_four(w, to.row[h], column + 16 * u, made);
        }
    }
}

template <class T, bool ACCUMULATE, int N>
__device__ __forceinline__ void store_tile(const work &w, int m, int n, const float (&sums)[N / 2])
{
    store_rows<T> to(w, m, n);
#pragma unroll
    for (int unit = 0; unit < N / 16; unit += 2)
        store_units<T, ACCUMULATE, 2>(w, to, unit, sums + 8 * unit);
}

/** The cluster's sums of every splits-th unit, from this block's rank on. */
template <class T, bool ACCUMULATE, int N>
__device__ __forceinline__ void store_shared_tile(const work &w, int m, int n, uint32_t shared)
{
    store_rows<T> to(w, m, n);
    uint32_t mine = shared + threadIdx.x * (uint32_t)sizeof(float4);
    for (int unit = (int)blockIdx.x % w.splits; unit < N / 16; unit += w.splits) {
        float sums[8] = {};
        uint32_t at = mine + (uint32_t)(2 * unit * MULTIPLIERS * (int)sizeof(float4));
#pragma unroll 4
        for (int block = 0; block < w.splits; block++) {
            uint32_t there = hopper::address_in_block(at, block);
            float4 x = hopper::load_from_block(there);
            float4 y = hopper::load_from_block(there + MULTIPLIERS * (uint32_t)sizeof(float4));
            sums[0] += x.x, sums[1] += x.y, sums[2] += x.z, sums[3] += x.w;
            sums[4] += y.x, sums[5] += y.y, sums[6] += y.z, sums[7] += y.w;
        }
        store_units<T, ACCUMULATE, 1>(w, to, unit, sums);
    }
}

/** Calls `body` with an element of C's type, and whether to accumulate. */
template <class Body> __device__ __forceinline__ void with_store(const work &w, Body body)
{
    struct yes {
        enum { VALUE = true };
    };
    struct no {
        enum { VALUE = false };
    };
    if (w.c_is_bf16 && w.accumulate)
        body(sebp_bf16(), yes());
    else if (w.c_is_bf16)
        body(sebp_bf16(), no());
    else if (w.accumulate)
        body(float(), yes());
    else
        body(float(), no());
}

/** Sums of a cluster's blocks: each puts its own where the others read them, and stores a part. */
template <int N>
__device__ __forceinline__ void store_together(const work &w, const tile &t, uint32_t shared,
                                               const float (&sums)[N / 2])
{
    hopper::barrier_of_some<1, MULTIPLIERS>(); /* both warpgroups are done with the stages */
    float4 *mine = (float4 *)__cvta_shared_to_generic(shared) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        mine[i * MULTIPLIERS] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    hopper::cluster_barrier();
    with_store(w, [&](auto element, auto accumulate) {
        using T = decltype(element);
        store_shared_tile<T, decltype(accumulate)::VALUE, N>(w, t.m, t.n, shared);
    });
    hopper::cluster_barrier(); /* others may still read what this block has */
}

#endif

} // namespace matrix_unit

#endif
