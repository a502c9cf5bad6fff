/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packs.cuh
 * Packs: neighbours in a row that a thread reads or writes by one access where they lie at a
 * multiple of their size, and one by one elsewhere, as at the end of a row.
 */
#ifndef SEBP_CUDA_PACKS_CUH
#define SEBP_CUDA_PACKS_CUH

#include <type_traits>

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

/** What a pack of so many bytes is stored as. */
template <int BYTES>
using sebp_stored = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2,
                       std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

/** Writes what sebp_load_pack() would read. By an intrinsic: the compiler makes the stores of both ways
 * one by one, where they have elements in common. */
template <int N, class T>
__device__ __forceinline__ void sebp_store_pack(T *row, int64_t at, int64_t end, bool is_packed,
                                                const sebp_pack<T, N> &pack)
{
    if (is_packed && at + N <= end) {
        using stored = sebp_stored<(int)sizeof pack>;
        static_assert(sizeof(stored) == sizeof pack);
        stored words;
        memcpy(&words, &pack, sizeof words);
        __stwb(reinterpret_cast<stored *>(row + at), words);
        return;
    }
    for (int i = 0; i < N; i++) {
        if (at + i < end)
            row[at + i] = pack.at[i];
    }
}

/** A pack's size where N elements are read or written by packs of at most 16 bytes. */
template <class T, int N> constexpr int SEBP_PACKED_OF = SEBP_PACKED<T> < N ? SEBP_PACKED<T> : N;

/** N neighbours as f32, by packs of SEBP_PACKED_OF; zeros behind the end. */
template <int N, class T>
__device__ __forceinline__ void sebp_load_floats(float *to, const T *row, int64_t at, int64_t end,
                                                 bool is_packed)
{
    constexpr int M = SEBP_PACKED_OF<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        const sebp_pack<T, M> pack = sebp_load_pack<M>(row, at + i, end, is_packed);
#pragma unroll
        for (int j = 0; j < M; j++)
            to[i + j] = sebp_widen(pack.at[j]);
    }
}

/** Rounds and writes what sebp_load_floats() would read. */
template <int N, class T>
__device__ __forceinline__ void sebp_store_floats(T *row, int64_t at, int64_t end, bool is_packed,
                                                  const float *from)
{
    constexpr int M = SEBP_PACKED_OF<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        sebp_pack<T, M> pack;
#pragma unroll
        for (int j = 0; j < M; j++)
            pack.at[j] = sebp_narrow<T>(from[i + j]);
        sebp_store_pack<M>(row, at + i, end, is_packed, pack);
    }
}

#endif
