/* SPDX-License-Identifier: Apache-2.0 */
/** @file norm.cu LayerNorm and RMSNorm, forward. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <type_traits>

#include "norm.cuh"
#include "operations.h"
#include "row_tiles.cuh"

namespace {

/* M x N each, statistics M x 2; those without data are absent. */
template <class T> struct forward_views {
    sebp_view<const T> x, residual;
    sebp_view<T> h, y;
    sebp_view<float> statistics;
    sebp_row_vector gain, shift;
    int64_t cols;
    float epsilon;
    bool is_rms, is_packed;
    sebp_drops drops;
};

/* A piece of h = residual + dropout(x), as it is stored; zeros behind the row. */
template <class T, bool DROPS>
__device__ __forceinline__ void make_h(float (&h)[SEBP_HELD], const forward_views<T> &at,
                                       int64_t row, int64_t piece)
{
    constexpr int N = SEBP_PACKED<T>;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        sebp_load_floats<N>(h + k * N, at.x.row(row), sebp_column<N, DROPS>(piece, k), at.cols,
                            at.is_packed);
    }
    if (DROPS)
        sebp_drop_held<N>(h, at.drops, sebp_row_group(row, at.cols), piece);
    if (at.h.data == nullptr)
        return;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
        if (at.residual.data != nullptr) {
            float residual[N];
            sebp_load_floats<N>(residual, at.residual.row(row), first, at.cols, at.is_packed);
#pragma unroll
            for (int j = 0; j < N; j++)
                h[k * N + j] += residual[j];
        }
        sebp_store_floats<N>(at.h.row(row), first, at.cols, at.is_packed, h + k * N);
#pragma unroll
        for (int j = 0; j < N; j++)
            h[k * N + j] = sebp_widen(sebp_narrow<T>(h[k * N + j]));
    }
}

/* The same piece once more. */
template <class T, bool DROPS>
__device__ __forceinline__ void read_h(float (&h)[SEBP_HELD], const forward_views<T> &at,
                                       int64_t row, int64_t piece)
{
    constexpr int N = SEBP_PACKED<T>;
    const T *from = at.h.data != nullptr ? at.h.row(row) : at.x.row(row);
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        sebp_load_floats<N>(h + k * N, from, sebp_column<N, DROPS>(piece, k), at.cols,
                            at.is_packed);
    }
}

template <int N, bool DROPS>
__device__ __forceinline__ float squares_about(const float (&h)[SEBP_HELD], float mean,
                                               int64_t piece, int64_t cols)
{
    float sum = 0;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float apart = first + j < cols ? h[k * N + j] - mean : 0.0F;
            sum += apart * apart;
        }
    }
    return sum;
}

/* y = (h - mean) / std * gain + shift. */
template <class T, bool DROPS>
__device__ __forceinline__ void write_y(const float (&h)[SEBP_HELD], const forward_views<T> &at,
                                        int64_t row, int64_t piece, float mean, float inverse)
{
    constexpr int N = SEBP_PACKED<T>;
#pragma unroll
    for (int k = 0; k < SEBP_HELD / N; k++) {
        const int64_t first = sebp_column<N, DROPS>(piece, k);
        float y[N], by[N];
#pragma unroll
        for (int j = 0; j < N; j++)
            y[j] = (h[k * N + j] - mean) * inverse;
        if (at.gain.data != nullptr) {
            sebp_load_vector<N>(by, at.gain, first, at.cols);
#pragma unroll
            for (int j = 0; j < N; j++)
                y[j] *= by[j];
        }
        if (at.shift.data != nullptr) {
            sebp_load_vector<N>(by, at.shift, first, at.cols);
#pragma unroll
            for (int j = 0; j < N; j++)
                y[j] += by[j];
        }
        sebp_store_floats<N>(at.y.row(row), first, at.cols, at.is_packed, y);
    }
}

/* A team for each row. KEEPS: it fits into the registers. */
template <class T, bool WARP, bool KEEPS, bool DROPS>
__global__ void __launch_bounds__(SEBP_TEAM_MAX, 1)
    norm_forward(sebp_row_list list, forward_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    __shared__ float room[SEBP_WARP];
    const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= list.count)
        return;
    const int64_t row = sebp_row_at(list.rows, i), wide = (int64_t)blockDim.x * SEBP_HELD;
    const int64_t end = KEEPS ? 1 : at.cols;
    float h[SEBP_HELD];
    float sum = 0;
    for (int64_t piece = 0; piece < end; piece += wide) {
        make_h<T, DROPS>(h, at, row, piece);
#pragma unroll
        for (int j = 0; j < SEBP_HELD; j++)
            sum += h[j];
    }
    const float count = at.cols > 0 ? (float)at.cols : 1.0F;
    const float mean = at.is_rms ? 0.0F : sebp_team_sum<WARP>(sum, room) / count;
    float squares = 0;
    for (int64_t piece = 0; piece < end; piece += wide) {
        if (!KEEPS)
            read_h<T, DROPS>(h, at, row, piece);
        squares += squares_about<N, DROPS>(h, mean, piece, at.cols);
    }
    const float inverse = 1.0F / sqrtf(sebp_team_sum<WARP>(squares, room) / count + at.epsilon);
    if (at.statistics.data != nullptr && threadIdx.x == 0) {
        at.statistics.row(row)[0] = mean;
        at.statistics.row(row)[1] = inverse;
    }
    for (int64_t piece = 0; piece < end; piece += wide) {
        if (!KEEPS)
            read_h<T, DROPS>(h, at, row, piece);
        write_y<T, DROPS>(h, at, row, piece, mean, inverse);
    }
}

template <class T, bool DROPS>
sebp_status launch_forward(sebp_cuda *cuda, const sebp_row_list &list, const forward_views<T> &at)
{
    const dim3 block = sebp_team_block(at.cols);
    const dim3 grid((unsigned)sebp_div_ceil(list.count, block.y));
    auto kernel = block.y > 1                ? norm_forward<T, true, true, DROPS>
                  : sebp_team_keeps(at.cols) ? norm_forward<T, false, true, DROPS>
                                             : norm_forward<T, false, false, DROPS>;
    return sebp_launch(cuda, kernel, grid, block, 0, list, at);
}

} // namespace

extern "C" sebp_status sebp_cuda_norm_forward(void *device, const sebp_norm_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    const sebp_norm_options *options = work->options;
    return sebp_with_dtype(work->x->dtype, [&](auto element) {
        using T = decltype(element);
        const forward_views<T> at = {
            sebp_view_of<const T>(work->x),
            sebp_view_of<const T>(work->residual),
            sebp_view_of<T>(work->h),
            sebp_view_of<T>(work->y),
            sebp_view_of<float>(work->statistics),
            sebp_row_vector_of(work->gain, options->gain_offset),
            sebp_row_vector_of(work->shift, 0),
            work->x->cols,
            (float)options->epsilon,
            options->norm == SEBP_RMS_NORM,
            sebp_are_packed<T>(work->x, work->residual, work->h, work->y),
            sebp_drops_of(options->dropout, options->seed, options->offset)};
        return options->dropout > 0 ? launch_forward<T, true>(cuda, work->list, at)
                                    : launch_forward<T, false>(cuda, work->list, at);
    });
}
