/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_mma.cuh
 * Attention by tensor cores, for bf16 and heads of up to 128 columns: how tiles lie in shared memory,
 * and how warps take fragments from them.
 *
 * P and dS are factors of products too, and rounded to bf16 as flash-attention has it:
 * include/sebp/attention.h has the bounds.
 */
#ifndef SEBP_CUDA_ATTENTION_MMA_CUH
#define SEBP_CUDA_ATTENTION_MMA_CUH

#include <type_traits>

#include "attention.cuh"
#include "tensor_core.cuh"

enum {
    SEBP_MMA_KEYS = 64,             /* to a tile of forward and of dQ */
    SEBP_MMA_MAX_HEAD = 128,        /* columns */
    SEBP_MMA_MAX_LENGTH = 1 << 29,  /* of a text, so that places in it are of 32 bits */
    SEBP_MMA_WIDE_BYTES = 108 << 10 /* of shared memory, at most; 96 columns need below 96 KiB */
};

/** Elements from a row of a tile to the next: eight rows' pieces of 16 bytes lie in different banks. */
template <int D> constexpr int SEBP_MMA_PITCH = D + 8;

/** Bytes of a tile. */
template <int D> constexpr int64_t sebp_mma_bytes(int64_t rows)
{
    return rows * SEBP_MMA_PITCH<D> * (int64_t)sizeof(sebp_bf16);
}

/** Whether 16 bytes at a time may be moved of all rows of a head. */
template <class T>
__device__ __forceinline__ bool sebp_mma_is_aligned(sebp_view<T> view, int head_size)
{
    return (uintptr_t)view.data % 16 == 0 && view.stride % 8 == 0 && head_size % 8 == 0;
}

/** Starts to load `rows` rows of a head, D columns each, of which `there` and `cols` are there and the
 * others zero. By all threads. */
template <int D, int rows, int threads>
__device__ __forceinline__ void sebp_mma_load(sebp_bf16 *to, sebp_view<const sebp_bf16> from,
                                              int64_t row, int there, int64_t col, int cols)
{
    constexpr int pieces = D / 8, step = threads / pieces;
    if (sebp_mma_is_aligned(from, cols)) {
        /* A thread keeps to its columns. Some have none where 8 columns do not divide the threads. */
        const int first = (int)threadIdx.x / pieces, j = (int)threadIdx.x % pieces * 8;
        if (threads % pieces != 0 && first >= step)
            return;
        const sebp_bf16 *at = from.row(row + first) + col + j;
        const int left = j < cols ? there - first : 0;
        to += first * SEBP_MMA_PITCH<D> + j;
#pragma unroll
        for (int i = 0; i < rows; i += step, at += step * from.stride) {
            if (rows % step == 0 || first + i < rows) {
                sebp_copy_async(to + i * SEBP_MMA_PITCH<D>, i < left ? at : from.data,
                                i < left ? 16 : 0);
            }
        }
        return;
    }
    for (int at = (int)threadIdx.x; at < rows * D; at += threads) {
        const int i = at / D, j = at % D;
        to[i * SEBP_MMA_PITCH<D> + j] =
            i < there && j < cols ? from.row(row + i)[col + j] : sebp_bf16{0};
    }
}

/** A: 16 rows of a tile times 16 columns from `col` on; the rows of the halves begin at `first` and
 * `second`. */
template <int D>
__device__ __forceinline__ void sebp_mma_load_a(uint32_t a[4], const sebp_bf16 *tile, int first,
                                                int second, int col)
{
    const int lane = (int)threadIdx.x % SEBP_WARP;
    const int row = (lane / 8 % 2 != 0 ? second : first) + lane % 8;
    sebp_load_matrices<false>(a, tile + row * SEBP_MMA_PITCH<D> + col + lane / 16 * 8);
}

/** B of two products: 16 columns of the tile from `col` on, by 2 x 8 rows from `row` on: b[0..1] and
 * b[2..3]. */
template <int D>
__device__ __forceinline__ void sebp_mma_load_b_rows(uint32_t b[4], const sebp_bf16 *tile, int row,
                                                     int col)
{
    const int lane = (int)threadIdx.x % SEBP_WARP;
    sebp_load_matrices<false>(b, tile + (row + lane / 16 * 8 + lane % 8) * SEBP_MMA_PITCH<D> + col +
                                     lane / 8 % 2 * 8);
}

/** B of two products: 16 rows of the tile from `row` on, by 2 x 8 columns from `col` on. */
template <int D>
__device__ __forceinline__ void sebp_mma_load_b_cols(uint32_t b[4], const sebp_bf16 *tile, int row,
                                                     int col)
{
    const int lane = (int)threadIdx.x % SEBP_WARP;
    sebp_load_matrices<true>(b, tile + (row + lane % 16) * SEBP_MMA_PITCH<D> + col + lane / 16 * 8);
}

/** sums (products of 16 x D) += factors (of 16 x `width`), rounded, their columns from 16 `step` on,
 * times the rows of a tile. */
template <int D, int products, int width>
__device__ __forceinline__ void sebp_mma_add(float sums[products][D / 8][4],
                                             const float factors[products][width / 8][4],
                                             const sebp_bf16 *tile, int step)
{
    uint32_t a[products][4];
#pragma unroll
    for (int m = 0; m < products; m++) {
        const float *left = factors[m][2 * step], *right = factors[m][2 * step + 1];
        a[m][0] = sebp_narrow_pair(left[0], left[1]);
        a[m][1] = sebp_narrow_pair(left[2], left[3]);
        a[m][2] = sebp_narrow_pair(right[0], right[1]);
        a[m][3] = sebp_narrow_pair(right[2], right[3]);
    }
#pragma unroll
    for (int col = 0; col < D; col += 16) {
        uint32_t b[4];
        sebp_mma_load_b_cols<D>(b, tile, step * 16, col);
#pragma unroll
        for (int m = 0; m < products; m++) {
            sebp_mma_bf16(sums[m][col / 8], a[m], b);
            sebp_mma_bf16(sums[m][col / 8 + 1], a[m], b + 2);
        }
    }
}

/** Puts sums (8 or 16 rows x D), times factors of their halves, into rows of a tile as bf16. */
template <int D>
__device__ __forceinline__ void sebp_mma_put(sebp_bf16 *tile, int first, int second,
                                             const float sums[D / 8][4], float first_factor,
                                             float second_factor)
{
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *(uint32_t *)(tile + (first + g) * SEBP_MMA_PITCH<D> + n * 8 + p) =
            sebp_narrow_pair(sums[n][0] * first_factor, sums[n][1] * first_factor);
        *(uint32_t *)(tile + (second + g) * SEBP_MMA_PITCH<D> + n * 8 + p) =
            sebp_narrow_pair(sums[n][2] * second_factor, sums[n][3] * second_factor);
    }
}

/** Stores eight rows of a tile, from `first` on, those below `there`, by a warp that has put them
 * there. */
template <int D>
__device__ __forceinline__ void sebp_mma_store(sebp_view<sebp_bf16> to, int64_t row,
                                               const sebp_bf16 *tile, int first, int there,
                                               int64_t col, int cols)
{
    constexpr int pieces = D / 8;
    const int lane = (int)threadIdx.x % SEBP_WARP;
    if (sebp_mma_is_aligned(to, cols)) {
#pragma unroll
        for (int at = lane; at < 8 * pieces; at += SEBP_WARP) {
            const int i = first + at / pieces, j = at % pieces * 8;
            if (i < there && j < cols) {
                *(uint4 *)(to.row(row + i) + col + j) =
                    *(const uint4 *)(tile + i * SEBP_MMA_PITCH<D> + j);
            }
        }
        return;
    }
    for (int at = lane; at < 8 * D; at += SEBP_WARP) {
        const int i = first + at / D, j = at % D;
        if (i < there && j < cols)
            to.row(row + i)[col + j] = tile[i * SEBP_MMA_PITCH<D> + j];
    }
}

/** Which of a warp's 16 rows are which queries of its tile: where the rows of half `half` of product
 * `m` begin. A thread's rows are 16 apart: elements of one counter of dropout. `products`: of 16 rows,
 * to a warp. */
template <int products> __device__ __forceinline__ int sebp_mma_query(int m, int half)
{
    const int warp = (int)threadIdx.x / SEBP_WARP;
    if (products == 2)
        return warp / 2 * 64 + (2 * m + half) * 16 + warp % 2 * 8;
    return warp / 2 * 32 + half * 16 + warp % 2 * 8;
}

/** The finished score of query i and key j of a tile from what the product left; -Inf where it is not
 * seen. `query` and `key`: the tile's corner. */
__device__ __forceinline__ float sebp_mma_score(const sebp_attention_job<sebp_bf16> &job,
                                                const sebp_seen &seen, int64_t head, int64_t query,
                                                int64_t key, int i, int j, float score,
                                                float *slope)
{
    score = sebp_cap(job, score * job.scale, slope);
    if (!seen.at(i, j))
        return -INFINITY;
    if (job.bias.data != nullptr && query + i < job.max_queries)
        score += job.bias.row(head * job.bias_rows + query + i)[key + j];
    return score;
}

/** What dropout keeps of a thread's scores of a tile of `keys` keys, where rows are queries. It is
 * found before them, while registers are free. */
template <int products, int keys> struct sebp_mma_kept {
    static constexpr int columns = keys / 4; /* of a thread: column 2 n + e is key 8 n + p + e */
    uint64_t block, step;                    /* of the first key, and from a key to the next */
    uint32_t bits[products];                 /* bit 16 half + column */

    __device__ __forceinline__ void begin(const sebp_attention_job<sebp_bf16> &job,
                                          const sebp_attention_text &text, int64_t head,
                                          int64_t query, int64_t key)
    {
        const int lane = (int)threadIdx.x % SEBP_WARP;
        const int64_t first = query + sebp_mma_query<products>(0, 0) + lane / 4;
        block = sebp_drop_group(job, text, head, first, key + lane % 4 * 2) * SEBP_RANDOM_LANES +
                (uint64_t)(first % SEBP_RANDOM_LANES);
        step = (uint64_t)job.line_groups * SEBP_RANDOM_LANES;
#pragma unroll
        for (int m = 0; m < products; m++)
            bits[m] = 0;
    }

    __device__ __forceinline__ void find(const sebp_drops &drops, int column)
    {
        const uint64_t key = (uint64_t)(column / 2 * 8 + column % 2);
        const uint4 words = sebp_random_block(drops, block + key * step);
        /* A thread's queries are 16 apart: all of a group, or its first or last two. */
        const int first = products == 2 ? 0 : (int)threadIdx.x / SEBP_WARP / 2 % 2 * 2;
#pragma unroll
        for (int at = 0; at < 2 * products; at++) {
            if (sebp_random_word(words, first + at) >= drops.limit)
                bits[at / 2] |= 1U << (at % 2 * 16 + column);
        }
    }

    /** Those of the keys that are there. */
    __device__ __forceinline__ void find_all(const sebp_drops &drops, int there)
    {
#pragma unroll
        for (int column = 0; column < columns; column++) {
            if (column / 2 * 8 < there)
                find(drops, column);
        }
    }

    __device__ __forceinline__ bool at(int m, int half, int column) const
    {
        return (bits[m] & 1U << (half * 16 + column)) != 0;
    }
};

/** Whether the tensor cores take it. The widest heads need more shared memory than some GPUs have. */
inline bool sebp_mma_takes(const sebp_cuda *cuda, const sebp_attention *attention)
{
    const int64_t max = cuda->shared_bytes >= SEBP_MMA_WIDE_BYTES ? SEBP_MMA_MAX_HEAD : 96;
    return attention->q->dtype == SEBP_BF16 && attention->head_size <= max &&
           attention->heads <= INT32_MAX / SEBP_MMA_MAX_HEAD &&
           attention->q_sequences->max_length <= SEBP_MMA_MAX_LENGTH &&
           attention->k_sequences->max_length <= SEBP_MMA_MAX_LENGTH;
}

/** What kernels are made for: scores only scaled, by a positive number; the same with dropout; any. */
enum sebp_mma_kind { SEBP_MMA_PLAIN, SEBP_MMA_DROPS, SEBP_MMA_ANY };

/** Calls body(kind), a constant, of a job's. */
template <class Body> auto sebp_mma_with_kind(const sebp_attention_job<sebp_bf16> &job, Body body)
{
    if (job.softcap != 0 || job.bias.data != nullptr || !(job.scale > 0))
        return body(std::integral_constant<sebp_mma_kind, SEBP_MMA_ANY>());
    if (job.has_dropout)
        return body(std::integral_constant<sebp_mma_kind, SEBP_MMA_DROPS>());
    return body(std::integral_constant<sebp_mma_kind, SEBP_MMA_PLAIN>());
}

/** Calls body(padded head size), a constant, of one that is at most SEBP_MMA_MAX_HEAD. */
template <class Body> auto sebp_mma_with_head(int head_size, Body body)
{
    if (head_size <= 32)
        return body(std::integral_constant<int, 32>());
    if (head_size <= 64)
        return body(std::integral_constant<int, 64>());
    if (head_size <= 96)
        return body(std::integral_constant<int, 96>());
    return body(std::integral_constant<int, 128>());
}

/** delta of query i of a tile whose dout is in shared memory, by the four threads that have its row.
 * row: the tile's first in memory; what is not there is 0. */
template <int D>
__device__ __forceinline__ float sebp_mma_delta(const sebp_attention_job<sebp_bf16> &job,
                                                const sebp_bf16 *dout, int64_t row, int i,
                                                int there, int64_t col)
{
    const int lane = (int)threadIdx.x % SEBP_WARP;
    float sum = 0;
#pragma unroll
    for (int j = lane % 4 * 8; j < D; j += 32) {
        if (i >= there || j >= job.head_size)
            continue;
        const sebp_bf16 *of_out = (const sebp_bf16 *)job.out.row(row + i) + col + j;
        const sebp_bf16 *of_dout = dout + i * SEBP_MMA_PITCH<D> + j;
        if (sebp_mma_is_aligned(job.out, job.head_size)) {
            const uint4 a = *(const uint4 *)of_out, b = *(const uint4 *)of_dout;
            const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum = fmaf(sebp_first_of(left[e]), sebp_first_of(right[e]), sum);
                sum = fmaf(sebp_second_of(left[e]), sebp_second_of(right[e]), sum);
            }
        } else {
            for (int e = 0; e < 8 && j + e < job.head_size; e++)
                sum = fmaf(sebp_widen(of_out[e]), sebp_widen(of_dout[e]), sum);
        }
    }
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
    return sum + __shfl_xor_sync(0xFFFFFFFFU, sum, 2);
}

/* Each in its file: passes over a job whose list is on the GPU. */

/** Rows of an item of queries of the forward. */
int64_t sebp_mma_forward_rows(const sebp_attention *attention);
sebp_status sebp_mma_forward(sebp_cuda *cuda, const sebp_attention_job<sebp_bf16> &job,
                             int64_t items);

enum {
    SEBP_MMA_DKV_ROWS = 128,  /* of keys */
    SEBP_MMA_WHOLE_ROWS = 64, /* of keys of a whole text */
    SEBP_MMA_WHOLE_HEAD = 64  /* columns that there are registers for */
};

/** Rows of an item of queries of the backward. */
int64_t sebp_mma_dq_rows(const sebp_attention *attention);
/** delta, and dq where it is wanted. */
sebp_status sebp_mma_dq(sebp_cuda *cuda, const sebp_attention_job<sebp_bf16> &job, int64_t items);
/** dk and dv where they are wanted, from delta. */
sebp_status sebp_mma_dkv(sebp_cuda *cuda, const sebp_attention_job<sebp_bf16> &job, int64_t items);
/** All of them, of whole texts. */
sebp_status sebp_mma_whole(sebp_cuda *cuda, const sebp_attention_job<sebp_bf16> &job,
                           int64_t items);

#endif
