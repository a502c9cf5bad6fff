/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packs.cuh
 * Packs: neighbours in a row that a thread reads or writes by one access where they lie at a
 * multiple of their size, and one by one elsewhere, as at the end of a row.
 */
#ifndef SEBP_CUDA_PACKS_CUH
#define SEBP_CUDA_PACKS_CUH

#include "vocabulary.cuh"

template <class T, int N> struct alignas(N * sizeof(T)) sebp_pack {
    T at[N];
};

/** Neighbours in 16 bytes, the most that one access can move. */
template <class T> constexpr int SEBP_PACKED = 16 / (int)sizeof(T);

/** Whether all rows of a matrix begin at a multiple of a pack's size. */
template <class T, int N = SEBP_PACKED<T>> bool sebp_is_packed(const sebp_matrix *matrix)
{
    return (uintptr_t)matrix->data % sizeof(sebp_pack<T, N>) == 0 &&
           (matrix->rows <= 1 || matrix->stride % N == 0);
}

/** The pack at element `at`, a multiple of N, of a row that ends before `end`; zeros behind it. */
template <int N, class T>
__device__ __forceinline__ sebp_pack<T, N> sebp_load_pack(const T *row, int64_t at, int64_t end,
                                                          bool is_packed)
{
    if (is_packed && at + N <= end)
        return *reinterpret_cast<const sebp_pack<T, N> *>(row + at);
    sebp_pack<T, N> made;
    for (int i = 0; i < N; i++)
        made.at[i] = at + i < end ? row[at + i] : T();
    return made;
}

/** Writes what sebp_load_pack() would read. */
template <int N, class T>
__device__ __forceinline__ void sebp_store_pack(T *row, int64_t at, int64_t end, bool is_packed,
                                                const sebp_pack<T, N> &pack)
{
    if (is_packed && at + N <= end) {
        *reinterpret_cast<sebp_pack<T, N> *>(row + at) = pack;
        return;
    }
    for (int i = 0; i < N; i++) {
        if (at + i < end)
            row[at + i] = pack.at[i];
    }
}

#endif
