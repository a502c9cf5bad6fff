/* SPDX-License-Identifier: Apache-2.0 */
/** @file embedding.cu Rows gathered from tables, and sums of rows by their group. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "row_tiles.cuh"

namespace {

/* ---- gathering ---- */

constexpr int EACH = 2; /* packs of each table that a thread reads before it writes */

template <class T> struct gather_views {
    sebp_view<const T> from[SEBP_MAX_TABLES];
    const int64_t *indices[SEBP_MAX_TABLES];
    sebp_view<T> to;
    int64_t cols;
    bool is_packed;
};

/* to[i] = the sum over the tables of from[t][indices[t][i]], in their order. The rows of one table are
 * copied as they are. */
template <class T, int TABLES>
__global__ void __launch_bounds__(256) gather(sebp_row_list list, gather_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    const int64_t row = sebp_tile_row(list);
    if (row < 0)
        return;
    const T *from[TABLES];
#pragma unroll
    for (int t = 0; t < TABLES; t++)
        from[t] = at.from[t].row(at.indices[t][row]);
    for (int64_t unit = sebp_first_unit<EACH>(); unit * N < at.cols;
         unit += sebp_unit_step<EACH>()) {
        sebp_pack<T, N> packs[EACH][TABLES];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int t = 0; t < TABLES; t++) {
                packs[i][t] = sebp_load_pack<N>(from[t], (unit + i * (int64_t)blockDim.x) * N,
                                                at.cols, at.is_packed);
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (TABLES > 1) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float sum = sebp_widen(packs[i][0].at[j]);
#pragma unroll
                    for (int t = 1; t < TABLES; t++)
                        sum += sebp_widen(packs[i][t].at[j]);
                    packs[i][0].at[j] = sebp_narrow<T>(sum);
                }
            }
            sebp_store_pack<N>(at.to.row(row), (unit + i * (int64_t)blockDim.x) * N, at.cols,
                               at.is_packed, packs[i][0]);
        }
    }
}

/* ---- sums by group ---- */

constexpr int WARPS = 8;
constexpr int DEPTH = 8; /* rows that a warp reads at once */

template <class T, class U> struct group_views {
    sebp_view<const T> from;
    sebp_view<U> to;
    const int64_t *rows, *start, *target;
    int64_t cols;
    bool from_packed, to_packed, accumulate;
};

/*
 * A block adds up a part of a group's columns, a pack to each lane. Its warps take the group's rows in
 * turn, and what they have is added in their order: always the same bits, whatever else there is.
 */
template <class T, class U>
__global__ void __launch_bounds__(WARPS *SEBP_WARP) sum_group(group_views<T, U> at)
{
    constexpr int N = SEBP_PACKED<T>;
    __shared__ float sums[WARPS][N][SEBP_WARP];
    const int lane = (int)threadIdx.x, warp = (int)threadIdx.y;
    const int64_t first = at.start[blockIdx.x], end = at.start[blockIdx.x + 1];
    U *to = at.to.row(at.target[blockIdx.x]);
    for (int64_t part = blockIdx.y; part * SEBP_WARP * N < at.cols; part += gridDim.y) {
        const int64_t col = (part * SEBP_WARP + lane) * N;
        float sum[N] = {};
        for (int64_t i = first + warp; i < end; i += DEPTH * WARPS) {
            sebp_pack<T, N> packs[DEPTH];
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (i + d * WARPS < end) {
                    packs[d] = sebp_load_pack<N>(at.from.row(at.rows[i + d * WARPS]), col, at.cols,
                                                 at.from_packed);
                }
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (i + d * WARPS < end) {
#pragma unroll
                    for (int j = 0; j < N; j++)
                        sum[j] += sebp_widen(packs[d].at[j]);
                }
            }
        }
        const int warps = end - first < WARPS ? (int)(end - first) : WARPS;
        if (warps > 1) {
            __syncthreads(); /* the sums may still be read */
#pragma unroll
            for (int j = 0; j < N; j++)
                sums[warp][j][lane] = sum[j];
            __syncthreads();
        }
        if (warp > 0 || col >= at.cols)
            continue;
        for (int w = 1; w < warps; w++) {
#pragma unroll
            for (int j = 0; j < N; j++)
                sum[j] += sums[w][j][lane];
        }
        if (at.accumulate) {
            float before[N];
            sebp_load_floats<N>(before, to, col, at.cols, at.to_packed);
#pragma unroll
            for (int j = 0; j < N; j++)
                sum[j] += before[j];
        }
        sebp_store_floats<N>(to, col, at.cols, at.to_packed, sum);
    }
}

} // namespace

extern "C" sebp_status sebp_cuda_gather(void *device, const sebp_gather_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    return sebp_with_dtype(work->to->dtype, [&](auto element) {
        using T = decltype(element);
        gather_views<T> at = {};
        at.to = sebp_view_of<T>(work->to);
        at.cols = work->to->cols;
        at.is_packed = sebp_is_packed<T>(work->to);
        for (int t = 0; t < work->tables; t++) {
            at.from[t] = sebp_view_of<const T>(work->from[t]);
            at.indices[t] = work->indices[t];
            at.is_packed = at.is_packed && sebp_is_packed<T>(work->from[t]);
        }
        const sebp_tiles tiles =
            sebp_tile_rows(work->list.count, sebp_div_ceil(at.cols, SEBP_PACKED<T>), EACH);
        void (*const kernels[])(sebp_row_list, gather_views<T>) = {gather<T, 1>, gather<T, 2>,
                                                                   gather<T, 3>, gather<T, 4>};
        static_assert(sizeof kernels / sizeof *kernels == SEBP_MAX_TABLES);
        return sebp_launch(cuda, kernels[work->tables - 1], tiles.grid, tiles.block, 0, work->list,
                           at);
    });
}

extern "C" sebp_status sebp_cuda_sum_groups(void *device, const sebp_group_sums *sums)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    return sebp_with_dtype(sums->from->dtype, [&](auto from) {
        return sebp_with_dtype(sums->to->dtype, [&](auto to) {
            using T = decltype(from);
            using U = decltype(to);
            constexpr int N = SEBP_PACKED<T>;
            const group_views<T, U> at = {sebp_view_of<const T>(sums->from),
                                          sebp_view_of<U>(sums->to),
                                          sums->rows,
                                          sums->start,
                                          sums->target,
                                          sums->to->cols,
                                          sebp_is_packed<T>(sums->from),
                                          sebp_is_packed<U, SEBP_PACKED_OF<U, N>>(sums->to),
                                          sums->accumulate};
            const int64_t parts = sebp_div_ceil(at.cols, SEBP_WARP * N);
            const dim3 grid((unsigned)sums->groups, (unsigned)sebp_min(parts, 65535));
            return sebp_launch(cuda, sum_group<T, U>, grid, dim3(SEBP_WARP, WARPS), 0, at);
        });
    });
}
