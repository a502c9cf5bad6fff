/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file norm_backward.cu
 * LayerNorm and RMSNorm, backward. Blocks walk along the rows and keep the sums of dgain and dshift of
 * those that they meet; a second kernel adds up the blocks' sums in their order.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "norm.cuh"
#include "operations.h"
#include "row_tiles.cuh"

namespace {

constexpr int BLOCKS = 2; /* to a multiprocessor, where there are sums */

/* M x N each, statistics M x 2; those without data are absent. */
template <class T> struct backward_views {
    sebp_view<const T> dy, h;
    sebp_view<const float> statistics;
    sebp_view<T> dh, dx;
    sebp_row_vector gain;
    float *dgain, *dshift; /* blocks x N; NULL: not wanted */
    int64_t cols;
    bool is_rms, accumulate, is_packed, sums_packed;
    sebp_drops drops;
};

/* A row's g = dy gain and xh = (h - mean) / std, and what has been summed of them. */
struct held_row {
    float dy[SEBP_HELD], xh[SEBP_HELD];
    float mean, inverse;
};

/* Reads a piece; zeros behind the row. */
template <class T, bool DROPS>
__device__ __forceinline__ void read_piece(held_row &held, const backward_views<T> &at, int64_t row,
                                           int64_t piece)
{
    constexpr int N = SEBP_PACKED<T>;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
        sebp_load_floats<N>(held.dy + k * N, at.dy.row(row), first, at.cols, at.is_packed);
        sebp_load_floats<N>(held.xh + k * N, at.h.row(row), first, at.cols, at.is_packed);
    }
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float &xh = held.xh[k * N + j];
            xh = first + j < at.cols ? (xh - held.mean) * held.inverse : 0.0F;
        }
    }
}

/* dy becomes g. */
template <class T, bool DROPS>
__device__ __forceinline__ void apply_gain(held_row &held, const backward_views<T> &at,
                                           int64_t piece)
{
    constexpr int N = SEBP_PACKED<T>;
    if (at.gain.data == nullptr)
        return;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        float gain[N];
        sebp_load_vector<N>(gain, at.gain, sebp_column<N, DROPS>(piece, k), at.cols);
#pragma unroll
        for (int j = 0; j < N; j++)
            held.dy[k * N + j] *= gain[j];
    }
}

/* dh (+)= (g - mean(g) - xh mean(g xh)) / std, dx = dropout(dh). */
template <class T, bool DROPS>
__device__ __forceinline__ void write_piece(held_row &held, const backward_views<T> &at,
                                            int64_t row, int64_t piece, float g_mean, float along)
{
    constexpr int N = SEBP_PACKED<T>;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
        float *dh = held.dy + k * N;
#pragma unroll
        for (int j = 0; j < N; j++)
            dh[j] = (dh[j] - g_mean - held.xh[k * N + j] * along) * held.inverse;
        if (at.dh.data == nullptr)
            continue;
        if (at.accumulate) {
            float before[N];
            sebp_load_floats<N>(before, at.dh.row(row), first, at.cols, at.is_packed);
#pragma unroll
            for (int j = 0; j < N; j++)
                dh[j] += before[j];
        }
        sebp_store_floats<N>(at.dh.row(row), first, at.cols, at.is_packed, dh);
    }
    if (at.dx.data == nullptr)
        return;
    if (DROPS)
        sebp_drop_held<N>(held.dy, at.drops, sebp_row_group(row, at.cols), piece);
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        sebp_store_floats<N>(at.dx.row(row), sebp_column<N, DROPS>(piece, k), at.cols, at.is_packed,
                             held.dy + k * N);
    }
}

/* What a thread sums of a piece's columns over the rows of its team. */
struct column_sums {
    float dgain[SEBP_HELD], dshift[SEBP_HELD];
};

/* The block's row of partial sums; NULL for NULL. */
__device__ __forceinline__ float *sums_of_block(float *sums, int64_t cols)
{
    return sums != nullptr ? sums + blockIdx.x * cols : nullptr;
}

template <int N, bool DROPS>
__device__ __forceinline__ void store_sums(float *to, const float (&sums)[SEBP_HELD], int64_t piece,
                                           int64_t cols, bool is_packed)
{
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++)
        sebp_store_floats<N>(to, sebp_column<N, DROPS>(piece, k), cols, is_packed, sums + k * N);
}

/* Of rows that are not kept: sums stay in memory, where a thread alone has its columns. */
template <int N, bool DROPS>
__device__ __forceinline__ void add_to_sums(float *to, const float (&by)[SEBP_HELD], int64_t piece,
                                            int64_t cols, bool is_packed, bool is_first)
{
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
        float sums[N] = {};
        if (!is_first)
            sebp_load_floats<N>(sums, to, first, cols, is_packed);
#pragma unroll
        for (int j = 0; j < N; j++)
            sums[j] += by[k * N + j];
        sebp_store_floats<N>(to, first, cols, is_packed, sums);
    }
}

/* Adds the sums of the block's teams, which have the same columns, in the teams' order; the last team
 * has the result. */
__device__ __forceinline__ void sum_teams(float (&sums)[SEBP_HELD],
                                          float (*room)[SEBP_HELD][SEBP_WARP])
{
    for (int team = 0; team < (int)blockDim.y; team++) {
        if ((int)threadIdx.y == team) {
#pragma unroll
            for (int j = 0; j < SEBP_HELD; j++) {
                if (team > 0)
                    sums[j] += (*room)[j][threadIdx.x];
                (*room)[j][threadIdx.x] = sums[j];
            }
        }
        __syncthreads();
    }
}

template <class T, bool WARP, bool KEEPS, bool DROPS, bool SUMS>
__global__ void __launch_bounds__(SEBP_TEAM_MAX)
    norm_backward(sebp_row_list list, backward_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    __shared__ float room[SEBP_WARP];
    const int64_t wide = (int64_t)blockDim.x * SEBP_HELD, end = KEEPS ? 1 : at.cols;
    const bool wants_rows = at.dh.data != nullptr || at.dx.data != nullptr;
    float *dgain = sums_of_block(at.dgain, at.cols), *dshift = sums_of_block(at.dshift, at.cols);
    column_sums sums = {};
    held_row held;
    const int64_t first_row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    for (int64_t i = first_row; i < list.count; i += (int64_t)gridDim.x * blockDim.y) {
        const int64_t row = sebp_row_at(list.rows, i);
        held.mean = at.statistics.row(row)[0];
        held.inverse = at.statistics.row(row)[1];
        float g_sum = 0, along_sum = 0;
        for (int64_t piece = 0; piece < end; piece += wide) {
            read_piece<T, DROPS>(held, at, row, piece);
            if (SUMS && KEEPS) {
#pragma unroll
                for (int j = 0; j < SEBP_HELD; j++) {
                    sums.dgain[j] += held.dy[j] * held.xh[j];
                    sums.dshift[j] += held.dy[j];
                }
            } else if (SUMS) {
                if (dshift != nullptr) {
                    add_to_sums<N, DROPS>(dshift, held.dy, piece, at.cols, at.sums_packed,
                                          i == first_row);
                }
#pragma unroll
                for (int j = 0; j < SEBP_HELD; j++)
                    sums.dgain[j] = held.dy[j] * held.xh[j];
                if (dgain != nullptr) {
                    add_to_sums<N, DROPS>(dgain, sums.dgain, piece, at.cols, at.sums_packed,
                                          i == first_row);
                }
            }
            apply_gain<T, DROPS>(held, at, piece);
#pragma unroll
            for (int j = 0; j < SEBP_HELD; j++) {
                g_sum += held.dy[j];
                along_sum += held.dy[j] * held.xh[j];
            }
        }
        if (!wants_rows)
            continue;
        const float count = (float)at.cols;
        const float g_mean = at.is_rms ? 0.0F : sebp_team_sum<WARP>(g_sum, room) / count;
        const float along = sebp_team_sum<WARP>(along_sum, room) / count;
        for (int64_t piece = 0; piece < end; piece += wide) {
            if (!KEEPS) {
                read_piece<T, DROPS>(held, at, row, piece);
                apply_gain<T, DROPS>(held, at, piece);
            }
            write_piece<T, DROPS>(held, at, row, piece, g_mean, along);
        }
    }
    if (!SUMS || !KEEPS)
        return;
    if (WARP) {
        __shared__ float teams[1][SEBP_HELD][SEBP_WARP];
        sum_teams(sums.dgain, teams);
        sum_teams(sums.dshift, teams);
        if (threadIdx.y + 1 < blockDim.y)
            return;
    }
    if (dgain != nullptr)
        store_sums<N, DROPS>(dgain, sums.dgain, 0, at.cols, at.sums_packed);
    if (dshift != nullptr)
        store_sums<N, DROPS>(dshift, sums.dshift, 0, at.cols, at.sums_packed);
}

/* ---- the second kernel ---- */

constexpr int SUM_ROWS = 16; /* of threads in a block */

struct sums_to {
    const float *from; /* blocks x N */
    void *to;          /* NULL: not wanted */
    bool is_bf16, accumulate;
};

__global__ void __launch_bounds__(SEBP_WARP *SUM_ROWS)
    sum_blocks(sums_to dgain, sums_to dshift, int64_t blocks, int64_t cols)
{
    __shared__ float room[SUM_ROWS][SEBP_WARP];
    const sums_to sums = blockIdx.y == 0 ? dgain : dshift;
    const int64_t col = (int64_t)blockIdx.x * SEBP_WARP + threadIdx.x;
    if (sums.to == nullptr)
        return;
    float sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < blocks; i += SUM_ROWS)
        sum += col < cols ? sums.from[i * cols + col] : 0.0F;
    room[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || col >= cols)
        return;
    for (int i = 1; i < SUM_ROWS; i++)
        sum += room[i][threadIdx.x];
    if (sums.is_bf16) {
        sebp_bf16 *to = (sebp_bf16 *)sums.to + col;
        *to = sebp_narrow<sebp_bf16>(sums.accumulate ? sum + sebp_widen(*to) : sum);
    } else {
        float *to = (float *)sums.to + col;
        *to = sums.accumulate ? sum + *to : sum;
    }
}

sums_to sums_for(const sebp_matrix *to, const float *from, sebp_write write)
{
    if (to == nullptr)
        return {};
    return {from, to->data, to->dtype == SEBP_BF16, write == SEBP_ACCUMULATE};
}

/* ---- launches ---- */

template <class T, bool DROPS, bool SUMS>
sebp_status launch_rows(sebp_cuda *cuda, int64_t blocks, const sebp_row_list &list,
                        const backward_views<T> &at)
{
    const dim3 block = sebp_team_block(at.cols), grid((unsigned)blocks);
    auto kernel = block.y > 1                ? norm_backward<T, true, true, DROPS, SUMS>
                  : sebp_team_keeps(at.cols) ? norm_backward<T, false, true, DROPS, SUMS>
                                             : norm_backward<T, false, false, DROPS, SUMS>;
    return sebp_launch(cuda, kernel, grid, block, 0, list, at);
}

template <class T>
sebp_status run_rows(sebp_cuda *cuda, const sebp_norm_back_work *work, int64_t blocks, float *dgain,
                     float *dshift)
{
    const sebp_norm_options *options = work->options;
    const int64_t cols = work->dy->cols;
    const backward_views<T> at = {sebp_view_of<const T>(work->dy),
                                  sebp_view_of<const T>(work->h),
                                  sebp_view_of<const float>(work->statistics),
                                  sebp_view_of<T>(work->dh),
                                  sebp_view_of<T>(work->dx),
                                  sebp_row_vector_of(work->gain, options->gain_offset),
                                  dgain,
                                  dshift,
                                  cols,
                                  options->norm == SEBP_RMS_NORM,
                                  options->dh_write == SEBP_ACCUMULATE,
                                  sebp_are_packed<T>(work->dy, work->h, work->dh, work->dx),
                                  cols % SEBP_PACKED<float> == 0,
                                  sebp_drops_of(options->dropout, options->seed, options->offset)};
    const bool sums = dgain != nullptr || dshift != nullptr;
    if (options->dropout > 0 && work->dx != nullptr) {
        return sums ? launch_rows<T, true, true>(cuda, blocks, work->list, at)
                    : launch_rows<T, true, false>(cuda, blocks, work->list, at);
    }
    return sums ? launch_rows<T, false, true>(cuda, blocks, work->list, at)
                : launch_rows<T, false, false>(cuda, blocks, work->list, at);
}

} // namespace

extern "C" sebp_status sebp_cuda_norm_backward(void *device, const sebp_norm_back_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    const sebp_norm_options *options = work->options;
    const int64_t cols = work->dy->cols;
    const int wanted = (work->dgain != nullptr) + (work->dshift != nullptr);
    int64_t blocks = sebp_div_ceil(work->list.count, sebp_team_block(cols).y);
    float *dgain = nullptr, *dshift = nullptr;
    if (cols == 0 || (wanted == 0 && work->dh == nullptr && work->dx == nullptr))
        return SEBP_SUCCESS;
    if (wanted > 0 && blocks > 0) {
        const int64_t room = sebp_cuda_workspace(cuda) / (int64_t)sizeof(float) / wanted / cols;
        blocks = sebp_min(sebp_min(blocks, (int64_t)BLOCKS * cuda->multiprocessors), room);
        if (blocks == 0)
            return SEBP_ERROR_MEMORY;
        sebp_status found;
        float *sums = (float *)sebp_cuda_scratch(
            cuda, wanted * blocks * cols * (int64_t)sizeof *sums, &found);
        if (found != SEBP_SUCCESS)
            return found;
        dgain = work->dgain != nullptr ? sums : nullptr;
        dshift = work->dshift != nullptr ? sums + (wanted - 1) * blocks * cols : nullptr;
    }
    sebp_status status = sebp_with_dtype(work->dy->dtype, [&](auto element) {
        return run_rows<decltype(element)>(cuda, work, blocks, dgain, dshift);
    });
    if (status != SEBP_SUCCESS || wanted == 0)
        return status;
    const dim3 grid((unsigned)sebp_div_ceil(cols, SEBP_WARP), 2);
    return sebp_launch(cuda, sum_blocks, grid, dim3(SEBP_WARP, SUM_ROWS), 0,
                       sums_for(work->dgain, dgain, options->dgain_write),
                       sums_for(work->dshift, dshift, options->dshift_write), blocks, cols);
}
