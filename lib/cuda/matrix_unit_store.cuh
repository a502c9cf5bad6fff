/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_store.cuh
 * The part of matrix_unit_kernel.cuh that finishes a tile of C, summed over a cluster or not.
 *
 * A thread's sums are of two rows, 8 apart, h = 0 and 1, and of two neighbouring columns in each 8.
 * The four lanes that have a row of such eights trade what they have, so that each stores 16 bytes.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_STORE_CUH
#define SEBP_CUDA_MATRIX_UNIT_STORE_CUH

#include "matrix_unit_work.cuh"

namespace matrix_unit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- vectors of C ---- */

/**
 * A unit is COLUMNS columns of a row, a vector of 16 bytes for each of four lanes. sums: a lane's
 * SUMS of it, as the matrix unit leaves them: 8 j + 2 (lane % 4) + e is at 2 j + e.
 */
template <class T> struct unit;

template <> struct unit<float> {
    enum { COLUMNS = 16, SUMS = 4 };

    /** Where in the unit the lane's vector is. */
    static __device__ __forceinline__ int column()
    {
        int l = (int)threadIdx.x % 4;
        return l % 2 == 0 ? 2 * l : 8 + 2 * (l - 1);
    }

    /** Neighbours trade their halves; it is its own inverse. */
    static __device__ __forceinline__ void trade(float (&v)[4])
    {
        bool odd = threadIdx.x % 2 != 0;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float other = __shfl_xor_sync(0xFFFFFFFFU, odd ? v[e] : v[2 + e], 1);
            v[e] = odd ? other : v[e];
            v[2 + e] = odd ? v[2 + e] : other;
        }
    }

    static __device__ __forceinline__ uint4 pack(const float (&sums)[4])
    {
        float v[4] = {sums[0], sums[1], sums[2], sums[3]};
        trade(v);
        return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                __float_as_uint(v[3])};
    }

    static __device__ __forceinline__ void unpack(const uint4 &x, float (&sums)[4])
    {
        sums[0] = __uint_as_float(x.x), sums[1] = __uint_as_float(x.y);
        sums[2] = __uint_as_float(x.z), sums[3] = __uint_as_float(x.w);
        trade(sums);
    }
};

template <> struct unit<sebp_bf16> {
    enum { COLUMNS = 32, SUMS = 8 };

    static __device__ __forceinline__ int column()
    {
        return (int)threadIdx.x % 4 * 8;
    }

    /** Transposes the 4 x 4 words of four lanes. */
    static __device__ __forceinline__ void trade(uint32_t (&v)[4])
    {
        bool odd = threadIdx.x % 2 != 0, high = threadIdx.x % 4 >= 2;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t other = __shfl_xor_sync(0xFFFFFFFFU, odd ? v[i] : v[i + 1], 1);
            v[i] = odd ? other : v[i];
            v[i + 1] = odd ? v[i + 1] : other;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t other = __shfl_xor_sync(0xFFFFFFFFU, high ? v[i] : v[i + 2], 2);
            v[i] = high ? other : v[i];
            v[i + 2] = high ? v[i + 2] : other;
        }
    }

    static __device__ __forceinline__ uint4 pack(const float (&sums)[8])
    {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = hopper::narrow_two(sums[2 * j], sums[2 * j + 1]);
        trade(v);
        return {v[0], v[1], v[2], v[3]};
    }

    static __device__ __forceinline__ void unpack(const uint4 &x, float (&sums)[8])
    {
        uint32_t v[4] = {x.x, x.y, x.z, x.w};
        trade(v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sums[2 * j] = __uint_as_float(v[j] << 16);
            sums[2 * j + 1] = __uint_as_float(v[j] & 0xFFFF0000U);
        }
    }
};

/* ---- rows ---- */

/** A thread's two rows of C. */
struct store_rows {
    int64_t at[2]; /* memory rows */
    bool there[2];

    __device__ __forceinline__ store_rows(const work &w, int m)
    {
        int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = m + 16 * warp + lane / 4 + 8 * h;
            there[h] = i < w.m;
            at[h] = there[h] ? sebp_row_at(w.to.c_rows, i) : 0;
        }
    }
};

/* ---- units of a row, finished ---- */

/** The lane's vector of a unit. Whole vectors are in C or beyond it. */
template <class T> struct spot {
    uint4 *at;
    bool there;

    __device__ __forceinline__ spot(const work &w, int64_t row, bool row_is_there, int column)
    {
        column += unit<T>::column();
        at = (uint4 *)((T *)w.to.c + row * w.to.c_stride + column);
        there = row_is_there && column < w.n;
    }

    __device__ __forceinline__ uint4 load() const
    {
        uint4 x = {0, 0, 0, 0};
        if (there)
            x = *at;
        return x;
    }
};

/** The biases of a lane's sums of a unit. Columns come in pairs: the bias is of an even number. */
template <class T>
__device__ __forceinline__ void load_bias(const work &w, int column, float (&bias)[unit<T>::SUMS])
{
    column += (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < unit<T>::SUMS / 2; j++) {
        bool there = column + 8 * j < w.n;
        int at = there ? column + 8 * j : 0;
        if (w.to.bias_is_bf16) {
            uint32_t two = *(const uint32_t *)((const sebp_bf16 *)w.to.bias + at);
            bias[2 * j] = __uint_as_float(two << 16);
            bias[2 * j + 1] = __uint_as_float(two & 0xFFFF0000U);
        } else {
            float2 two = *(const float2 *)((const float *)w.to.bias + at);
            bias[2 * j] = two.x;
            bias[2 * j + 1] = two.y;
        }
    }
}

template <class T>
__device__ __forceinline__ void add_and_store(const spot<T> &to, const float (&sums)[unit<T>::SUMS],
                                              const float (&added)[unit<T>::SUMS])
{
    float made[unit<T>::SUMS];
#pragma unroll
    for (int i = 0; i < unit<T>::SUMS; i++)
        made[i] = sums[i] + added[i];
    uint4 x = unit<T>::pack(made);
    if (to.there)
        *to.at = x;
}

/** A unit, from `column` on, anyhow finished: element by element. */
template <class T>
__device__ __forceinline__ void finish_anyhow(const work &w, int64_t row, bool row_is_there,
                                              int column, const float (&sums)[unit<T>::SUMS])
{
    column += (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < unit<T>::SUMS; i++) {
        int j = column + i / 2 * 8 + i % 2;
        if (row_is_there && j < w.n)
            sebp_finish_element(w.to, row, j, sums[i]);
    }
}

/* ---- a tile that one block has summed ---- */

/** Where the sums of unit u and row h begin, j by j four apart. */
template <class T> __device__ __forceinline__ constexpr int first_sum(int u, int h)
{
    return 2 * unit<T>::SUMS * u + 2 * h;
}

template <class T, int COUNT>
__device__ __forceinline__ void take(const float (&sums)[COUNT], int first,
                                     float (&taken)[unit<T>::SUMS])
{
#pragma unroll
    for (int i = 0; i < unit<T>::SUMS; i++)
        taken[i] = sums[first + i / 2 * 4 + i % 2];
}

template <class T, finish HOW, int N>
__device__ __forceinline__ void store_tile(const work &w, const tile &t, const float (&sums)[N / 2])
{
    using units = unit<T>;
    enum { UNITS = N / units::COLUMNS, AT_ONCE = HOW == finish::ACCUMULATE ? 4 : 1 };
    static_assert(UNITS % AT_ONCE == 0 || AT_ONCE == 4, "");
    store_rows rows(w, t.m);
#pragma unroll
    for (int begin = 0; begin < UNITS; begin += AT_ONCE) {
        uint4 old[AT_ONCE][2]; /* all asked for before the first is needed */
        if (HOW == finish::ACCUMULATE) {
#pragma unroll
            for (int u = begin; u < begin + AT_ONCE && u < UNITS; u++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    old[u - begin][h] =
                        spot<T>(w, rows.at[h], rows.there[h], t.n + u * units::COLUMNS).load();
        }
#pragma unroll
        for (int u = begin; u < begin + AT_ONCE && u < UNITS; u++) {
            int column = t.n + u * units::COLUMNS;
            float added[units::SUMS] = {}, mine[units::SUMS];
            if (HOW == finish::ADD_BIAS)
                load_bias<T>(w, column, added);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                spot<T> to(w, rows.at[h], rows.there[h], column);
                if (HOW == finish::ACCUMULATE)
                    units::unpack(old[u - begin][h], added);
                take<T>(sums, first_sum<T>(u, h), mine);
                if (HOW == finish::STORE) {
                    uint4 x = units::pack(mine);
                    if (to.there)
                        *to.at = x;
                } else {
                    add_and_store<T>(to, mine, added);
                }
            }
        }
    }
}

/** The same anyhow, in a loop, as it is long. */
template <int N>
__device__ __forceinline__ void finish_tile(const work &w, const tile &t,
                                            const float (&sums)[N / 2])
{
    using units = unit<float>;
    store_rows rows(w, t.m);
#pragma unroll 1
    for (int i = 0; i < 2 * N / units::COLUMNS; i++) {
        float mine[units::SUMS];
#pragma unroll
        for (int j = 0; j < 2 * N / units::COLUMNS; j++)
            if (i == j)
                take<float>(sums, first_sum<float>(j / 2, j % 2), mine);
        bool second = i % 2 != 0;
        finish_anyhow<float>(w, second ? rows.at[1] : rows.at[0],
                             second ? rows.there[1] : rows.there[0], t.n + i / 2 * units::COLUMNS,
                             mine);
    }
}

/* ---- a tile that the blocks of a cluster have summed ---- */

enum { PART_BYTES = MULTIPLIERS * (int)sizeof(float4) };

/** Puts a block's sums where the others read them: the four of each 16 columns and h together. */
template <int N>
__device__ __forceinline__ void put_sums(uint32_t shared, const float (&sums)[N / 2])
{
    uint32_t to = shared + threadIdx.x * (uint32_t)sizeof(float4);
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        const float *s = sums + first_sum<float>(i / 2, i % 2);
        hopper::store_shared(to + i * PART_BYTES, float4{s[0], s[1], s[4], s[5]});
    }
}

/** The cluster's sums of a unit. */
template <class T>
__device__ __forceinline__ void add_up(const work &w, uint32_t shared, int u, int h,
                                       float (&sums)[unit<T>::SUMS])
{
    enum { PARTS = unit<T>::SUMS / 4 };
#pragma unroll
    for (int i = 0; i < unit<T>::SUMS; i++)
        sums[i] = 0;
    uint32_t at = shared + threadIdx.x * (uint32_t)sizeof(float4) +
                  (uint32_t)((2 * PARTS * u + h) * PART_BYTES);
#pragma unroll 4
    for (int block = 0; block < w.splits; block++) {
        uint32_t there = hopper::address_in_block(at, block);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float4 x = hopper::load_from_block(there + 2 * part * PART_BYTES);
            sums[4 * part] += x.x, sums[4 * part + 1] += x.y;
            sums[4 * part + 2] += x.z, sums[4 * part + 3] += x.w;
        }
    }
}

/** A block finishes every splits-th half of a unit, from its rank on. */
template <class T, finish HOW, int N>
__device__ __forceinline__ void store_shared_tile(const work &w, const tile &t, uint32_t shared)
{
    using units = unit<T>;
    store_rows rows(w, t.m);
    for (int i = (int)blockIdx.x % w.splits; i < 2 * N / units::COLUMNS; i += w.splits) {
        int u = i / 2, h = i % 2, column = t.n + u * units::COLUMNS;
        int64_t row = h == 0 ? rows.at[0] : rows.at[1];
        bool row_is_there = h == 0 ? rows.there[0] : rows.there[1];
        spot<T> to(w, row, row_is_there, column);
        uint4 old;
        float added[units::SUMS] = {}, sums[units::SUMS];
        if (HOW == finish::ACCUMULATE)
            old = to.load();
        if (HOW == finish::ADD_BIAS)
            load_bias<T>(w, column, added);
        add_up<T>(w, shared, u, h, sums);
        if (HOW == finish::ACCUMULATE)
            units::unpack(old, added);
        if (HOW == finish::ANY)
            finish_anyhow<T>(w, row, row_is_there, column, sums);
        else
            add_and_store<T>(to, sums, added);
    }
}

/* ---- either ---- */

/** Calls `body` with an element of C's type, and the way that is known when it is compiled. */
template <class Body> __device__ __forceinline__ void with_finish(const work &w, Body body)
{
    auto with_element = [&](auto element) {
        if (w.how == finish::STORE)
            body(element, std::integral_constant<finish, finish::STORE>());
        else if (w.how == finish::ACCUMULATE)
            body(element, std::integral_constant<finish, finish::ACCUMULATE>());
        else
            body(element, std::integral_constant<finish, finish::ADD_BIAS>());
    };
    if (w.how == finish::ANY)
        body(float(), std::integral_constant<finish, finish::ANY>());
    else if (w.to.c_is_bf16)
        with_element(sebp_bf16());
    else
        with_element(float());
}

template <int N>
__device__ __forceinline__ void finish_sums(const work &w, const tile &t, uint32_t shared,
                                            const float (&sums)[N / 2])
{
    if (w.splits > 1) {
        hopper::barrier_of_some<1, MULTIPLIERS>(); /* both warpgroups are done with the stages */
        put_sums<N>(shared, sums);
        hopper::cluster_barrier();
    }
    with_finish(w, [&](auto element, auto how) {
        using T = decltype(element);
        constexpr finish HOW = decltype(how)::value;
        if (w.splits > 1)
            store_shared_tile<T, HOW, N>(w, t, shared);
        else if constexpr (HOW == finish::ANY)
            finish_tile<N>(w, t, sums);
        else
            store_tile<T, HOW, N>(w, t, sums);
    });
    if (w.splits > 1)
        hopper::cluster_barrier(); /* others may still read what this block has */
}

#endif

} // namespace matrix_unit

#endif
