/* SPDX-License-Identifier: Apache-2.0 */
/** @file rows.cu Operations on rows: zeroing, summing, widening and putting them. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "packs.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / SEBP_WARP;

__device__ __forceinline__ int lane_of_thread()
{
    return (int)threadIdx.x % SEBP_WARP;
}

__device__ __forceinline__ int warp_of_thread()
{
    return (int)threadIdx.x / SEBP_WARP;
}

/* ---- filling the other rows with zeros ---- */

constexpr int ZERO_ROWS = 32;            /* of a block, at most: a bit for each */
constexpr int ZERO_PIECE = 8 << 10;      /* bytes of a row to a warp, at least */
constexpr int ZERO_LISTED = 2 * THREADS; /* places of a list that a block reads at once */
constexpr int ZERO_BLOCKS = 4;           /* to a multiprocessor */

struct row_zeroing {
    char *data;
    int64_t total, row_bytes, stride_bytes;
    const int64_t *rows; /* `count` rows that are left as they are */
    int64_t count;
    int group; /* the rows of a block */
};

/* Where the first row of a list that is not below `row` can be. */
struct list_range {
    int64_t low, high;
};

/* Looks at 32 places at a time, as each look takes as long as any other. A few looks do for any
 * list, and none for one of few rows, or of nearly all: among the rows before this one there are at
 * most all those that are not listed. */
__device__ list_range find_in_list(const row_zeroing &zeroing, int64_t row)
{
    int64_t others = zeroing.total - zeroing.count;
    list_range range{row > others ? row - others : 0, row < zeroing.count ? row : zeroing.count};
    while (range.high - range.low > ZERO_LISTED) {
        int64_t step = (range.high - range.low + SEBP_WARP - 1) / SEBP_WARP;
        int64_t at = range.low + lane_of_thread() * step;
        bool is_below = at < range.high && zeroing.rows[at] < row;
        int below = __popc(__ballot_sync(0xFFFFFFFFU, is_below));
        int64_t high = range.low + below * step;
        range.high = high < range.high ? high : range.high;
        range.low += below > 0 ? (below - 1) * step + 1 : 0;
    }
    return range;
}

/* By a warp. The bytes are a multiple of an element's, at any address of an element. */
__device__ void zero_bytes(char *to, int64_t bytes)
{
    int64_t head = (int64_t)(-(uintptr_t)to % sizeof(uint4));
    head = head < bytes ? head : bytes;
    int64_t vectors = (bytes - head) / (int64_t)sizeof(uint4);
    char *body = to + head, *tail = body + vectors * (int64_t)sizeof(uint4);
    int at = lane_of_thread() * (int)sizeof(uint16_t);
    if (at < head)
        *(uint16_t *)(to + at) = 0;
    for (int64_t i = lane_of_thread(); i < vectors; i += SEBP_WARP)
        ((uint4 *)body)[i] = make_uint4(0, 0, 0, 0);
    if (at < to + bytes - tail)
        *(uint16_t *)(tail + at) = 0;
}

/* A block has rows of its own, notes which of them are listed, and zeroes the others. */
__global__ void __launch_bounds__(THREADS) zero_kernel(row_zeroing zeroing)
{
    const sebp_overlapping overlapping;
    __shared__ unsigned listed;
    int64_t first = (int64_t)blockIdx.x * zeroing.group, end = first + zeroing.group;
    if (end > zeroing.total)
        end = zeroing.total;
    if (threadIdx.x == 0)
        listed = 0;
    __syncthreads();
    list_range range = find_in_list(zeroing, first);
    int64_t last = range.high + zeroing.group;
    last = last < zeroing.count ? last : zeroing.count;
    for (int64_t i = range.low + threadIdx.x; i < last; i += THREADS) {
        int64_t row = zeroing.rows[i];
        if (row >= first && row < end)
            atomicOr(&listed, 1U << (row - first));
    }
    __syncthreads();
    for (int i = warp_of_thread(); first + i < end; i += WARPS) {
        if (listed >> i & 1)
            continue;
        char *row = zeroing.data + (first + i) * zeroing.stride_bytes;
        for (int64_t at = (int64_t)blockIdx.y * ZERO_PIECE; at < zeroing.row_bytes;
             at += (int64_t)gridDim.y * ZERO_PIECE) {
            int64_t rest = zeroing.row_bytes - at;
            zero_bytes(row + at, rest < ZERO_PIECE ? rest : ZERO_PIECE);
        }
    }
}

} // namespace

sebp_status sebp_cuda_zero_other_rows(void *device, const sebp_matrix *to, const int64_t *rows,
                                      int64_t count)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    int64_t element = (int64_t)sebp_dtype_bytes(to->dtype), row_bytes = to->cols * element;
    if (to->rows == count || row_bytes == 0)
        return SEBP_SUCCESS;
    int64_t pieces = sebp_min(sebp_div_ceil(row_bytes, ZERO_PIECE), 65535);
    int64_t group = to->rows * pieces / (ZERO_BLOCKS * cuda->multiprocessors);
    group = sebp_min(sebp_max(group, WARPS), ZERO_ROWS);
    row_zeroing zeroing{(char *)to->data, to->rows, row_bytes, to->stride * element, rows, count,
                        (int)group};
    dim3 grid((unsigned)sebp_div_ceil(to->rows, group), (unsigned)pieces);
    return sebp_launch_overlapping(cuda, zero_kernel, grid, THREADS, 0, zeroing);
}

/* ---- sums of columns ---- */

namespace {

constexpr int SUM_AT_ONCE = 4;   /* rows that a thread reads together */
constexpr int SUM_ROUNDS = 4;    /* of those to a thread before a second pass is worth it */
constexpr int MIN_SUM_PACKS = 2; /* 32 bytes: memory moves no less */

/* How blocks share a sum: each has `packs` packs of a row beside each other, and `part_rows` of the
 * rows below each other. */
struct column_sum {
    const int64_t *rows;
    int64_t count, cols, part_rows;
    int packs;
    bool is_packed, accumulate;
};

/* to: a row for each part. Threads of a warp stand beside each other for the packs, and then below
 * each other for the rows. Every sum is made in the same order. */
template <class T, class To>
__global__ void __launch_bounds__(THREADS)
    sum_kernel(sebp_view<const T> from, column_sum sum, sebp_view<To> to)
{
    constexpr int N = SEBP_PACKED<T>;
    const sebp_overlapping overlapping;
    __shared__ float room[WARPS * SEBP_WARP * N];
    int64_t at = ((int64_t)blockIdx.x * sum.packs + (int)threadIdx.x % sum.packs) * N;
    int64_t first = blockIdx.y * sum.part_rows, end = first + sum.part_rows;
    int row_step = THREADS / sum.packs;
    if (end > sum.count)
        end = sum.count;
    float total[N] = {};
    for (int64_t i = first + (int)threadIdx.x / sum.packs; i < end; i += SUM_AT_ONCE * row_step) {
        int64_t row[SUM_AT_ONCE];
        sebp_pack<T, N> packs[SUM_AT_ONCE];
        for (int r = 0; r < SUM_AT_ONCE; r++)
            row[r] = i + r * row_step < end ? sebp_row_at(sum.rows, i + r * row_step) : -1;
        for (int r = 0; r < SUM_AT_ONCE; r++) {
            packs[r] = sebp_pack<T, N>();
            if (row[r] >= 0)
                packs[r] = sebp_load_pack<N>(from.row(row[r]), at, sum.cols, sum.is_packed);
        }
        for (int r = 0; r < SUM_AT_ONCE; r++) {
            for (int j = 0; j < N; j++)
                total[j] += sebp_widen(packs[r].at[j]);
        }
    }
    for (int step = SEBP_WARP / 2; step >= sum.packs; step /= 2) {
        for (int j = 0; j < N; j++)
            total[j] += __shfl_xor_sync(0xFFFFFFFFU, total[j], step);
    }
    int width = sum.packs * N;
    if (lane_of_thread() < sum.packs) {
        for (int j = 0; j < N; j++)
            room[warp_of_thread() * width + lane_of_thread() * N + j] = total[j];
    }
    __syncthreads();
    int64_t col = (int64_t)blockIdx.x * width + threadIdx.x;
    if ((int)threadIdx.x >= width || col >= sum.cols)
        return;
    float all = 0;
    for (int warp = 0; warp < WARPS; warp++)
        all += room[warp * width + (int)threadIdx.x];
    To *result = to.row(blockIdx.y) + col;
    *result = sebp_narrow<To>(sum.accumulate ? all + sebp_widen(*result) : all);
}

/* How a sum is spread over blocks. */
struct sum_plan {
    int packs;
    int64_t tiles, parts, part_rows;
};

/* Narrow tiles of all rows first, as one pass does for them. Where there are many rows and yet few
 * tiles the rows are cut into parts, whose sums a second pass adds. */
sum_plan plan_sum(const sebp_cuda *cuda, int64_t packs, int64_t count)
{
    sum_plan plan{SEBP_WARP, 0, 1, count};
    while (plan.packs > MIN_SUM_PACKS && sebp_div_ceil(packs, plan.packs) < cuda->multiprocessors) {
        plan.packs /= 2;
    }
    plan.tiles = sebp_div_ceil(packs, plan.packs);
    int64_t worth = THREADS / plan.packs * SUM_AT_ONCE * SUM_ROUNDS;
    int64_t wanted = sebp_div_ceil(2 * cuda->multiprocessors, plan.tiles);
    plan.part_rows = sebp_max(sebp_div_ceil(count, wanted), worth);
    plan.parts = sebp_max(sebp_div_ceil(count, plan.part_rows), 1);
    return plan;
}

/* is_alone: there is no other pass, which reads or makes partial sums. */
template <class T, class To>
sebp_status launch_sum(sebp_cuda *cuda, const sum_plan &plan, bool is_alone,
                       const sebp_matrix *from, const int64_t *rows, int64_t count,
                       const sebp_matrix *to, bool accumulate)
{
    column_sum sum{rows,      count, to->cols, plan.part_rows, plan.packs, sebp_is_packed<T>(from),
                   accumulate};
    const dim3 grid((unsigned)plan.tiles, (unsigned)plan.parts);
    if (is_alone) {
        return sebp_launch_overlapping(cuda, sum_kernel<T, To>, grid, THREADS, 0,
                                       sebp_view_of<const T>(from), sum, sebp_view_of<To>(to));
    }
    return sebp_launch(cuda, sum_kernel<T, To>, grid, THREADS, 0, sebp_view_of<const T>(from), sum,
                       sebp_view_of<To>(to));
}

template <class T, class To>
sebp_status sum_rows(sebp_cuda *cuda, const sebp_matrix *from, const int64_t *rows, int64_t count,
                     const sebp_matrix *to, bool accumulate)
{
    sum_plan plan = plan_sum(cuda, sebp_div_ceil(to->cols, SEBP_PACKED<T>), count);
    if (plan.parts == 1)
        return launch_sum<T, To>(cuda, plan, true, from, rows, count, to, accumulate);
    sebp_status status;
    float *room =
        (float *)sebp_cuda_scratch(cuda, plan.parts * to->cols * (int64_t)sizeof(float), &status);
    if (status == SEBP_ERROR_MEMORY) {
        /* One pass needs none. The products of a backward have been written by now. */
        plan.parts = 1;
        plan.part_rows = count;
        return launch_sum<T, To>(cuda, plan, true, from, rows, count, to, accumulate);
    }
    if (status != SEBP_SUCCESS)
        return status;
    sebp_matrix parts = sebp_matrix_f32(room, plan.parts, to->cols);
    status = launch_sum<T, float>(cuda, plan, false, from, rows, count, &parts, false);
    if (status != SEBP_SUCCESS)
        return status;
    plan = plan_sum(cuda, sebp_div_ceil(to->cols, SEBP_PACKED<float>), parts.rows);
    plan.parts = 1;
    plan.part_rows = parts.rows;
    return launch_sum<float, To>(cuda, plan, false, &parts, nullptr, parts.rows, to, accumulate);
}

} // namespace

sebp_status sebp_cuda_sum_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                               int64_t count, const sebp_matrix *to, bool accumulate)
{
    if (to->cols == 0)
        return SEBP_SUCCESS;
    return sebp_with_dtype(from->dtype, [&](auto element) {
        return sebp_with_dtype(to->dtype, [&](auto sum) {
            return sum_rows<decltype(element), decltype(sum)>((sebp_cuda *)device, from, rows,
                                                              count, to, accumulate);
        });
    });
}

/* ---- rows widened ---- */

namespace {

/* Whether any rows that a list picks out of a matrix begin at packs. One row alone says nothing of the
 * stride, and a list of one row may pick any. */
template <class T> bool listed_is_packed(sebp_matrix matrix, const int64_t *rows)
{
    if (rows != nullptr)
        matrix.rows = sebp_max(matrix.rows, 2);
    return sebp_is_packed<T>(&matrix);
}

constexpr int WIDEN_PACKS = 4; /* that a thread reads together */

/* A warp to a row, or to pieces of it. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    widen_kernel(sebp_view<const T> from, bool from_is_packed, const int64_t *rows,
                 const float *weights, int64_t count, int64_t cols, sebp_view<float> to,
                 bool to_is_packed)
{
    constexpr int N = SEBP_PACKED<T>, OUT = SEBP_PACKED<float>;
    int64_t i = (int64_t)blockIdx.x * WARPS + warp_of_thread();
    if (i >= count)
        return;
    const T *row = from.row(sebp_row_at(rows, i));
    const float weight = weights != nullptr ? weights[i] : 1;
    const int64_t piece = WIDEN_PACKS * SEBP_WARP * N;
    for (int64_t at = blockIdx.y * piece; at < cols; at += gridDim.y * piece) {
        sebp_pack<T, N> packs[WIDEN_PACKS];
        int64_t mine = at + lane_of_thread() * N;
        for (int p = 0; p < WIDEN_PACKS; p++) {
            packs[p] = sebp_load_pack<N>(row, mine + p * SEBP_WARP * N, cols, from_is_packed);
        }
        for (int p = 0; p < WIDEN_PACKS; p++) {
            for (int j = 0; j < N; j += OUT) {
                sebp_pack<float, OUT> wide;
                for (int k = 0; k < OUT; k++)
                    wide.at[k] = sebp_widen(packs[p].at[j + k]) * weight;
                sebp_store_pack<OUT>(to.row(i), mine + p * SEBP_WARP * N + j, cols, to_is_packed,
                                     wide);
            }
        }
    }
}

template <class T>
sebp_status widen_rows(sebp_cuda *cuda, const sebp_matrix *from, const int64_t *rows,
                       const float *weights, int64_t count, const sebp_matrix *to)
{
    int64_t pieces = sebp_div_ceil(to->cols, WIDEN_PACKS * SEBP_WARP * SEBP_PACKED<T>);
    dim3 grid((unsigned)sebp_div_ceil(count, WARPS), (unsigned)sebp_min(pieces, 65535));
    return sebp_launch(cuda, widen_kernel<T>, grid, THREADS, 0, sebp_view_of<const T>(from),
                       listed_is_packed<T>(*from, rows), rows, weights, count, to->cols,
                       sebp_view_of<float>(to), sebp_is_packed<float>(to));
}

} // namespace

sebp_status sebp_cuda_widen_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                                 const float *weights, int64_t count, const sebp_matrix *to)
{
    return sebp_with_dtype(from->dtype, [&](auto element) {
        return widen_rows<decltype(element)>((sebp_cuda *)device, from, rows, weights, count, to);
    });
}

/* ---- rows put where they are listed ---- */

namespace {

/* A warp to a row, or to pieces of it. */
__global__ void __launch_bounds__(THREADS)
    put_kernel(sebp_view<const float> from, sebp_view<float> to, bool is_packed,
               const int64_t *rows, int64_t count, int64_t cols, bool accumulate)
{
    constexpr int N = SEBP_PACKED<float>;
    int64_t i = (int64_t)blockIdx.x * WARPS + warp_of_thread();
    if (i >= count)
        return;
    const float *own = from.row(i);
    float *row = to.row(rows[i]);
    for (int64_t at = (blockIdx.y * SEBP_WARP + lane_of_thread()) * N; at < cols;
         at += (int64_t)gridDim.y * SEBP_WARP * N) {
        sebp_pack<float, N> pack = sebp_load_pack<N>(own, at, cols, is_packed);
        if (accumulate) {
            sebp_pack<float, N> had = sebp_load_pack<N>((const float *)row, at, cols, is_packed);
            for (int j = 0; j < N; j++)
                pack.at[j] += had.at[j];
        }
        sebp_store_pack<N>(row, at, cols, is_packed, pack);
    }
}

} // namespace

sebp_status sebp_cuda_put_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                               const sebp_matrix *to, bool accumulate)
{
    constexpr int64_t pieces = 4 * SEBP_WARP * SEBP_PACKED<float>; /* of a row, to a warp */
    dim3 grid((unsigned)sebp_div_ceil(from->rows, WARPS),
              (unsigned)sebp_min(sebp_div_ceil(from->cols, pieces), 65535));
    return sebp_launch((sebp_cuda *)device, put_kernel, grid, THREADS, 0,
                       sebp_view_of<const float>(from), sebp_view_of<float>(to),
                       sebp_is_packed<float>(from) && listed_is_packed<float>(*to, rows), rows,
                       from->rows, from->cols, accumulate);
}
