/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file plain_product.cu
 * Products by f32 multiply-adds, of f32 and bf16, wherever they lie.
 *
 * A block has a tile of C, a thread 8 x 8 of its elements in registers. Slices of A and B go through
 * shared memory, the next one on its way into registers while one is multiplied.
 */
#include "product.cuh"

namespace {

constexpr int TILE_ROWS = 128, TILE_COLS = 64, STEP = 16;
constexpr int THREADS = 128, PER_THREAD = 8;
constexpr int THREADS_ACROSS = TILE_COLS / PER_THREAD;
constexpr int PAD = 4; /* so that columns that are stored together do not meet in one bank */

/** A factor, seen as lanes x depth: lanes are rows of A or columns of B. */
struct factor {
    const void *data;
    int64_t stride;
    const int64_t *rows;
    int64_t lanes, depth;
    bool lanes_are_rows; /* memory rows are lanes, and elements of one go along the depth */
    bool is_bf16;
    bool is_aligned; /* each group of 4 elements can be read at once */
};

factor factor_of(const sebp_operand &operand, bool is_b, int64_t lanes, int64_t depth)
{
    int64_t group = 4 * (int64_t)sebp_dtype_bytes(operand.dtype);
    factor made;
    made.data = operand.data;
    made.stride = operand.stride;
    made.rows = operand.rows;
    made.lanes = lanes;
    made.depth = depth;
    made.lanes_are_rows = operand.transposed == is_b;
    made.is_bf16 = operand.dtype == SEBP_BF16;
    made.is_aligned = (uintptr_t)operand.data % (size_t)group == 0 && operand.stride % 4 == 0;
    return made;
}

/** Four elements of a memory row from column `at` on, of which `count` are there. */
template <bool is_bf16>
__device__ __forceinline__ void read_four(const factor &from, int64_t row, int64_t at,
                                          int64_t count, float got[4])
{
    const int64_t first = sebp_row_at(from.rows, row) * from.stride + at;
    if (from.is_aligned && count >= 4) {
        if (is_bf16) {
            uint2 pairs = *(const uint2 *)((const sebp_bf16 *)from.data + first);
            got[0] = __uint_as_float(pairs.x << 16);
            got[1] = __uint_as_float(pairs.x & 0xFFFF0000U);
            got[2] = __uint_as_float(pairs.y << 16);
            got[3] = __uint_as_float(pairs.y & 0xFFFF0000U);
        } else {
            float4 four = *(const float4 *)((const float *)from.data + first);
            got[0] = four.x;
            got[1] = four.y;
            got[2] = four.z;
            got[3] = four.w;
        }
        return;
    }
    for (int i = 0; i < 4; i++)
        got[i] = i < count ? sebp_element(from.data, is_bf16, first + i) : 0.0F;
}

/** A thread's part of a slice of `width` lanes, from lane `lane` and depth `at` on; zero from `end` on. */
template <int width, bool lanes_are_rows, bool is_bf16>
__device__ __forceinline__ void read_slice(const factor &from, int64_t lane, int64_t at,
                                           int64_t end, float (&got)[width * STEP / THREADS])
{
    constexpr int groups = width * STEP / THREADS / 4;
#pragma unroll
    for (int i = 0; i < groups; i++) {
        const int group = (int)threadIdx.x + i * THREADS;
        if (lanes_are_rows) {
            const int64_t row = lane + group / (STEP / 4), depth = at + group % (STEP / 4) * 4;
            if (row < from.lanes)
                read_four<is_bf16>(from, row, depth, end - depth, &got[4 * i]);
            else
                got[4 * i] = got[4 * i + 1] = got[4 * i + 2] = got[4 * i + 3] = 0.0F;
        } else {
            const int64_t depth = at + group / (width / 4), col = lane + group % (width / 4) * 4;
            if (depth < end)
                read_four<is_bf16>(from, depth, col, from.lanes - col, &got[4 * i]);
            else
                got[4 * i] = got[4 * i + 1] = got[4 * i + 2] = got[4 * i + 3] = 0.0F;
        }
    }
}

/** Leaves it in shared memory: STEP x (width + PAD), a row for each step of the depth. */
template <int width, bool lanes_are_rows>
__device__ __forceinline__ void keep_slice(float *slice, const float (&got)[width * STEP / THREADS])
{
    constexpr int groups = width * STEP / THREADS / 4;
#pragma unroll
    for (int i = 0; i < groups; i++) {
        const int group = (int)threadIdx.x + i * THREADS;
        if (lanes_are_rows) {
            float *to = slice + group % (STEP / 4) * 4 * (width + PAD) + group / (STEP / 4);
#pragma unroll
            for (int j = 0; j < 4; j++)
                to[j * (width + PAD)] = got[4 * i + j];
        } else {
            float *to = slice + group / (width / 4) * (width + PAD) + group % (width / 4) * 4;
            *(float4 *)to = make_float4(got[4 * i], got[4 * i + 1], got[4 * i + 2], got[4 * i + 3]);
        }
    }
}

__device__ __forceinline__ void read_eight(const float *from, int apart, float got[PER_THREAD])
{
    float4 low = *(const float4 *)from, high = *(const float4 *)(from + apart);
    got[0] = low.x;
    got[1] = low.y;
    got[2] = low.z;
    got[3] = low.w;
    got[4] = high.x;
    got[5] = high.y;
    got[6] = high.z;
    got[7] = high.w;
}

/** Which of a tile's lanes a thread's i-th is: two groups of four, half a tile apart, so that neighbours
 * read neighbouring banks. */
template <int width> __device__ __forceinline__ int lane_of(int thread, int i)
{
    return thread * 4 + i % 4 + i / 4 * (width / 2);
}

template <bool a_lanes_are_rows, bool a_is_bf16, bool b_lanes_are_rows, bool b_is_bf16>
__global__ void __launch_bounds__(THREADS, 3)
    multiply(factor a, factor b, sebp_cuda_cut cut, sebp_cuda_epilogue epilogue, unsigned *counters,
             float *partial)
{
    const sebp_overlapping overlapping;
    __shared__ __align__(16) float a_slice[2][STEP * (TILE_ROWS + PAD)];
    __shared__ __align__(16) float b_slice[2][STEP * (TILE_COLS + PAD)];
    const sebp_cuda_share share = sebp_cuda_share_of(cut, a.depth, TILE_ROWS, TILE_COLS);
    const int down = (int)threadIdx.x / THREADS_ACROSS, across = (int)threadIdx.x % THREADS_ACROSS;
    float sums[PER_THREAD * PER_THREAD] = {};
    float next_a[TILE_ROWS * STEP / THREADS], next_b[TILE_COLS * STEP / THREADS];

    read_slice<TILE_ROWS, a_lanes_are_rows, a_is_bf16>(a, share.row, share.begin, share.end,
                                                       next_a);
    read_slice<TILE_COLS, b_lanes_are_rows, b_is_bf16>(b, share.col, share.begin, share.end,
                                                       next_b);
    int half = 0;
    for (int64_t at = share.begin; at < share.end; at += STEP) {
        keep_slice<TILE_ROWS, a_lanes_are_rows>(a_slice[half], next_a);
        keep_slice<TILE_COLS, b_lanes_are_rows>(b_slice[half], next_b);
        __syncthreads();
        if (at + STEP < share.end) {
            read_slice<TILE_ROWS, a_lanes_are_rows, a_is_bf16>(a, share.row, at + STEP, share.end,
                                                               next_a);
            read_slice<TILE_COLS, b_lanes_are_rows, b_is_bf16>(b, share.col, at + STEP, share.end,
                                                               next_b);
        }
#pragma unroll
        for (int k = 0; k < STEP; k++) {
            float x[PER_THREAD], y[PER_THREAD];
            read_eight(a_slice[half] + k * (TILE_ROWS + PAD) + down * 4, TILE_ROWS / 2, x);
            read_eight(b_slice[half] + k * (TILE_COLS + PAD) + across * 4, TILE_COLS / 2, y);
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++)
                    sums[i * PER_THREAD + j] = fmaf(x[i], y[j], sums[i * PER_THREAD + j]);
            }
        }
        half = 1 - half; /* the other slices were read before the last barrier */
    }
    if (!sebp_cuda_add_shares(cut, share, sums, counters, partial))
        return;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int64_t row = share.row + lane_of<TILE_ROWS>(down, i);
        if (row >= a.lanes)
            continue;
        const int64_t to = sebp_row_at(epilogue.c_rows, row);
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            const int64_t col = share.col + lane_of<TILE_COLS>(across, j);
            if (col < b.lanes)
                sebp_finish_element(epilogue, to, col, sums[i * PER_THREAD + j]);
        }
    }
}

} // namespace

sebp_cuda_cut sebp_cuda_cut_plain(const sebp_cuda *cuda, const sebp_product *product)
{
    return sebp_cuda_cut_product(product, TILE_ROWS, TILE_COLS, STEP, 3 * cuda->multiprocessors,
                                 128);
}

int64_t sebp_cuda_plain_bytes(const sebp_cuda_cut *cut)
{
    return sebp_cuda_cut_bytes(cut, TILE_ROWS * TILE_COLS);
}

sebp_status sebp_cuda_run_plain(sebp_cuda *cuda, const sebp_product *product,
                                const sebp_cuda_cut *cut, void *scratch)
{
    const factor a = factor_of(product->a, false, product->m, product->k);
    const factor b = factor_of(product->b, true, product->n, product->k);
    unsigned *counters = (unsigned *)scratch;
    float *partial = (float *)((char *)scratch + sebp_cuda_counter_bytes(cut));
    sebp_status status = sebp_cuda_clear_counters(cuda, cut, scratch);
    if (status != SEBP_SUCCESS)
        return status;
    const dim3 grid((unsigned)(cut->tiles_down * cut->tiles_across * cut->shares));
    auto launch = [&](auto a_rows, auto a_bf16, auto b_rows, auto b_bf16) {
        return sebp_launch_overlapping(cuda, multiply<a_rows, a_bf16, b_rows, b_bf16>, grid,
                                       dim3(THREADS), 0, a, b, *cut, sebp_cuda_epilogue_of(product),
                                       counters, partial);
    };
    return sebp_with_bool(a.lanes_are_rows, [&](auto a_rows) {
        return sebp_with_bool(a.is_bf16, [&](auto a_bf16) {
            return sebp_with_bool(b.lanes_are_rows, [&](auto b_rows) {
                return sebp_with_bool(
                    b.is_bf16, [&](auto b_bf16) { return launch(a_rows, a_bf16, b_rows, b_bf16); });
            });
        });
    });
}
