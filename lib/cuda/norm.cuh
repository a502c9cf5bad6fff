/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file norm.cuh
 * What the norms' forward and backward share: a row that a team of threads keeps in its registers.
 *
 * A team is a warp, several of them to a block, or a block. A thread has SEBP_HELD elements of the
 * row, in packs of N. Longer rows are worked on a piece of the team at a time, and read once more for
 * each pass.
 */
#ifndef SEBP_CUDA_NORM_CUH
#define SEBP_CUDA_NORM_CUH

#include "packs.cuh"
#include "random.cuh"

enum {
    SEBP_HELD = 32,      /* elements of a thread */
    SEBP_TEAMS = 4,      /* of a warp each, to a block */
    SEBP_TEAM_MAX = 256, /* threads */
    SEBP_WARP_COLS = SEBP_WARP * SEBP_HELD
};

/** A block of teams for rows of `cols` elements. */
inline dim3 sebp_team_block(int64_t cols)
{
    if (cols <= SEBP_WARP_COLS)
        return dim3(SEBP_WARP, SEBP_TEAMS);
    const int64_t threads = sebp_round_up(sebp_div_ceil(cols, SEBP_HELD), SEBP_WARP);
    return dim3((unsigned)sebp_min(threads, SEBP_TEAM_MAX));
}

/** Whether a row fits into the registers of such a block's teams. */
inline bool sebp_team_keeps(int64_t cols)
{
    return cols <= (int64_t)SEBP_TEAM_MAX * SEBP_HELD;
}

/**
 * The column of the thread's k-th pack of N, in the piece that begins at `piece`. With dropout a thread has
 * the packs whose numbers the same counters make, a quarter of a group apart; else neighbours of the
 * team lie beside each other.
 */
template <int N, bool DROPS> __device__ __forceinline__ int64_t sebp_column(int64_t piece, int k)
{
    if (!DROPS)
        return piece + ((int64_t)k * blockDim.x + threadIdx.x) * N;
    constexpr int QUADS = SEBP_RANDOM_LANES / N;
    const int64_t unit = (int64_t)(k / 4) * blockDim.x + threadIdx.x;
    return piece + unit / QUADS * SEBP_RANDOM_GROUP + k % 4 * SEBP_RANDOM_LANES + unit % QUADS * N;
}

/** Multiplies what a thread has of a piece by dropout's scales. `group`: the row's first. */
template <int N>
__device__ __forceinline__ void sebp_drop_held(float (&held)[SEBP_HELD], const sebp_drops &drops,
                                               uint64_t group, int64_t piece)
{
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k += 4) {
        const uint64_t at = (uint64_t)sebp_column<N, true>(piece, k);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const uint4 words = sebp_random_words(drops, group + at / SEBP_RANDOM_GROUP,
                                                  (unsigned)(at % SEBP_RANDOM_GROUP) + j);
            const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &to = held[(k + i) * N + j];
                to = __fmul_rn(to, sebp_drop_scale(drops, each[i]));
            }
        }
    }
}

/** A gain or a shift, of either dtype. */
struct sebp_row_vector {
    const void *data; /* NULL: none */
    bool is_bf16, is_packed;
    float offset; /* added to each element */
};

inline sebp_row_vector sebp_row_vector_of(const sebp_matrix *vector, double offset)
{
    if (vector == nullptr)
        return {nullptr, false, false, 0};
    const bool is_packed = (uintptr_t)vector->data % 16 == 0;
    return {vector->data, vector->dtype == SEBP_BF16, is_packed, (float)offset};
}

/** N of its elements. */
template <int N>
__device__ __forceinline__ void sebp_load_vector(float (&to)[N], const sebp_row_vector &vector,
                                                 int64_t at, int64_t end)
{
    if (vector.is_bf16)
        sebp_load_floats<N>(to, (const sebp_bf16 *)vector.data, at, end, vector.is_packed);
    else
        sebp_load_floats<N>(to, (const float *)vector.data, at, end, vector.is_packed);
#pragma unroll
    for (int j = 0; j < N; j++)
        to[j] += vector.offset;
}

/** The sum over a team; room: as sebp_block_sum(). */
template <bool WARP> __device__ __forceinline__ float sebp_team_sum(float x, float *room)
{
    return WARP ? sebp_warp_sum(x) : sebp_block_sum(x, room);
}

#endif
