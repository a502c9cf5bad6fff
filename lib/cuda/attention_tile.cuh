/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_tile.cuh
 * Attention by multiply-adds of f32, for either dtype and every head size: tiles of 64 x 64 by 256
 * threads, 16 x 16 of them, each with 4 x 4 elements.
 *
 * Factors of a product lie in shared memory transposed, row k having what the products of step k
 * need. The queries of thread y are y, y + 16, y + 32 and y + 48, the elements of one counter of
 * dropout; in shared memory they lie side by side. Its keys are 4 x to 4 x + 3.
 */
#ifndef SEBP_CUDA_ATTENTION_TILE_CUH
#define SEBP_CUDA_ATTENTION_TILE_CUH

#include "attention.cuh"

enum {
    SEBP_TILE = 64,
    SEBP_TILE_SIDE = 16, /* threads */
    SEBP_TILE_OWN = 4,   /* rows, and columns, of a thread */
    SEBP_TILE_THREADS = SEBP_TILE_SIDE * SEBP_TILE_SIDE,
    SEBP_TILE_PITCH = SEBP_TILE + 4, /* floats from a row in shared memory to the next */
    SEBP_TILE_DEPTH = 16,            /* columns of heads at a time, of up to four matrices */
    SEBP_TILE_CHUNKS = 2             /* of 64 columns of outputs that a block has at most */
};

/** Shared memory of a block. */
struct sebp_tiles {
    union {
        float columns[4][SEBP_TILE_DEPTH * SEBP_TILE_PITCH];
        float rows[SEBP_TILE * SEBP_TILE_PITCH];
    } loaded;
    float scores[SEBP_TILE * SEBP_TILE_PITCH]; /* P, or dS */
};

/** The rows of a text that a product takes: `rows` from memory row `row` on. */
struct sebp_tile_rows {
    int64_t row;
    int rows;
};

__device__ __forceinline__ int sebp_tile_x()
{
    return (int)threadIdx.x % SEBP_TILE_SIDE;
}

__device__ __forceinline__ int sebp_tile_y()
{
    return (int)threadIdx.x / SEBP_TILE_SIDE;
}

/** The query of thread y's i-th row. */
__device__ __forceinline__ int sebp_tile_query(int i)
{
    return sebp_tile_y() + SEBP_TILE_SIDE * i;
}

/** Columns [col, col + SEBP_TILE_DEPTH) of 64 rows, as rows of shared memory; what is not there is
 * zero. are_queries: lying side by side as threads have them. */
template <class T>
__device__ __forceinline__ void sebp_load_columns(float *to, sebp_view<const T> from,
                                                  sebp_tile_rows at, int64_t col, int cols,
                                                  bool are_queries)
{
    constexpr int side = SEBP_TILE_SIDE;
    static_assert((int)SEBP_TILE_DEPTH == side, "each thread has one column");
    const int i = sebp_tile_y(), j = sebp_tile_x();
    const T *at_row = from.row(at.row + i) + col + j;
    to += j * SEBP_TILE_PITCH + (are_queries ? i * SEBP_TILE_OWN : i);
#pragma unroll
    for (int step = 0; step < SEBP_TILE / side; step++, at_row += side * from.stride) {
        const bool is_there = i + step * side < at.rows && j < cols;
        to[are_queries ? step : step * side] = is_there ? sebp_widen(*at_row) : 0.0F;
    }
}

/** Columns [col, col + 64) of 64 rows, as they lie. */
template <class T>
__device__ __forceinline__ void sebp_load_rows(float *to, sebp_view<const T> from,
                                               sebp_tile_rows at, int64_t col, int cols)
{
    constexpr int height = SEBP_TILE_THREADS / SEBP_TILE;
    const int i = (int)threadIdx.x / SEBP_TILE, j = (int)threadIdx.x % SEBP_TILE;
    const T *at_row = from.row(at.row + i) + col + j;
    to += i * SEBP_TILE_PITCH + j;
#pragma unroll 4
    for (int step = 0; step < SEBP_TILE / height; step++, at_row += height * from.stride) {
        const bool is_there = i + step * height < at.rows && j < cols;
        to[step * height * SEBP_TILE_PITCH] = is_there ? sebp_widen(*at_row) : 0.0F;
    }
}

/** sums += A B of the `depth` rows of shared memory that hold A^T and B. */
__device__ __forceinline__ void sebp_tile_product(float sums[4][4], const float *a, const float *b,
                                                  int depth)
{
    a += sebp_tile_y() * SEBP_TILE_OWN;
    b += sebp_tile_x() * SEBP_TILE_OWN;
#pragma unroll 4
    for (int k = 0; k < depth; k++) {
        const float4 left = *(const float4 *)(a + k * SEBP_TILE_PITCH);
        const float4 right = *(const float4 *)(b + k * SEBP_TILE_PITCH);
        const float of_a[4] = {left.x, left.y, left.z, left.w};
        const float of_b[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums[i][j] = fmaf(of_a[i], of_b[j], sums[i][j]);
        }
    }
}

/** What a product leaves: S, and dP where dout is there. Begins and ends without a barrier; the
 * loaded tiles are used up after it. */
template <class T, bool with_dp>
__device__ __forceinline__ void
sebp_tile_scores(const sebp_attention_job<T> &job, sebp_tiles *tiles, sebp_tile_rows queries,
                 sebp_tile_rows keys, int64_t head, float scores[4][4], float dp[4][4])
{
    const int64_t q_col = head * job.head_size, k_col = head / job.group * job.head_size;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            scores[i][j] = dp[i][j] = 0;
    }
    for (int col = 0; col < job.head_size; col += SEBP_TILE_DEPTH) {
        const int cols =
            job.head_size - col < SEBP_TILE_DEPTH ? job.head_size - col : (int)SEBP_TILE_DEPTH;
        __syncthreads(); /* the tiles before may still be read */
        sebp_load_columns(tiles->loaded.columns[0], job.q, queries, q_col + col, cols, true);
        sebp_load_columns(tiles->loaded.columns[1], job.k, keys, k_col + col, cols, false);
        if (with_dp) {
            sebp_load_columns(tiles->loaded.columns[2], job.dout, queries, q_col + col, cols, true);
            sebp_load_columns(tiles->loaded.columns[3], job.v, keys, k_col + col, cols, false);
        }
        __syncthreads();
        sebp_tile_product(scores, tiles->loaded.columns[0], tiles->loaded.columns[1], cols);
        if (with_dp)
            sebp_tile_product(dp, tiles->loaded.columns[2], tiles->loaded.columns[3], cols);
    }
}

/** The score of the tile's query i and key j from what the product left; -Inf where it is not seen. */
template <class T>
__device__ __forceinline__ float
sebp_tile_score(const sebp_attention_job<T> &job, const sebp_seen &seen, int64_t head,
                int64_t query, int64_t key, int i, int j, float score, float *slope)
{
    score = sebp_cap(job, score * job.scale, slope);
    if (!seen.at(i, j))
        return -INFINITY;
    if (job.bias.data != nullptr && query + i < job.max_queries)
        score += job.bias.row(head * job.bias_rows + query + i)[key + j];
    return score;
}

/** What dropout multiplies a key's column of a thread by. */
template <class T>
__device__ __forceinline__ void sebp_tile_drops(const sebp_attention_job<T> &job,
                                                const sebp_attention_text &text, int64_t head,
                                                int64_t query, int64_t key, float scales[4])
{
    const uint4 words = sebp_random_words(job.drops, sebp_drop_group(job, text, head, query, key),
                                          (unsigned)sebp_tile_y());
    scales[0] = sebp_drop_scale(job.drops, words.x);
    scales[1] = sebp_drop_scale(job.drops, words.y);
    scales[2] = sebp_drop_scale(job.drops, words.z);
    scales[3] = sebp_drop_scale(job.drops, words.w);
}

/** A thread's scores (queries x keys) as rows of shared memory for its keys. */
__device__ __forceinline__ void sebp_tile_store_by_key(float *to, const float scores[4][4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        *(float4 *)(to + (sebp_tile_x() * SEBP_TILE_OWN + j) * SEBP_TILE_PITCH +
                    sebp_tile_y() * SEBP_TILE_OWN) =
            make_float4(scores[0][j], scores[1][j], scores[2][j], scores[3][j]);
    }
}

/** The same for its queries. */
__device__ __forceinline__ void sebp_tile_store_by_query(float *to, const float scores[4][4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        *(float4 *)(to + sebp_tile_query(i) * SEBP_TILE_PITCH + sebp_tile_x() * SEBP_TILE_OWN) =
            make_float4(scores[i][0], scores[i][1], scores[i][2], scores[i][3]);
    }
}

/** sums += scores B, for each chunk of 64 columns of a matrix from `col` on, of which `cols` are
 * left; the scores have been stored, without a barrier since. */
template <class T, int chunks>
__device__ __forceinline__ void sebp_tile_add(float sums[chunks][4][4], sebp_tiles *tiles,
                                              sebp_view<const T> from, sebp_tile_rows at,
                                              int64_t col, int cols)
{
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk++) {
        __syncthreads();
        sebp_load_rows(tiles->loaded.rows, from, at, col + chunk * SEBP_TILE,
                       cols - chunk * SEBP_TILE);
        __syncthreads();
        sebp_tile_product(sums[chunk], tiles->scores, tiles->loaded.rows,
                          at.rows < SEBP_TILE ? at.rows : (int)SEBP_TILE);
    }
}

/** Stores a thread's row of sums, times `factor`, as columns of a row of memory. */
template <class T, int chunks>
__device__ __forceinline__ void sebp_tile_store(T *to, const float sums[chunks][4][4], int i,
                                                float factor, int cols)
{
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int col = chunk * SEBP_TILE + sebp_tile_x() * SEBP_TILE_OWN + j;
            if (col < cols)
                to[col] = sebp_narrow<T>(sums[chunk][i][j] * factor);
        }
    }
}

/** What a block of a pass works on: its number is that of its slice of columns, head and item. */
struct sebp_tile_place {
    sebp_attention_item item;
    int64_t head;
    int col, cols; /* of the head */
};

template <class T, int chunks>
__device__ __forceinline__ sebp_tile_place sebp_tile_place_of(const sebp_attention_job<T> &job,
                                                              int64_t heads, int64_t block)
{
    const int width = chunks * SEBP_TILE, slices = (job.head_size + width - 1) / width;
    const int col = (int)(block % slices) * width;
    block /= slices;
    return {job.items[block / heads], block % heads, col,
            job.head_size - col < width ? job.head_size - col : width};
}

/** How many blocks a pass of the list has. */
template <class T, int chunks>
int64_t sebp_tile_blocks(const sebp_attention_job<T> &job, int64_t heads, int64_t items)
{
    return items * heads * sebp_div_ceil(job.head_size, chunks * SEBP_TILE);
}

#endif
