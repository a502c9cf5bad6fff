/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tensor_product.cu
 * Products of bf16 by tensor cores.
 *
 * A block has a tile of C, each of its warps a part of it. Slices of A and B, a few ahead of those
 * that are multiplied, are copied to shared memory as they lie: ldmatrix transposes what has to be.
 */
#include "product.cuh"
#include "tensor_core.cuh"

namespace {

constexpr int STEP = 32, STAGES = 4;
constexpr int WARPS_DOWN = 2, WARPS_ACROSS = 4, THREADS = WARPS_DOWN * WARPS_ACROSS * SEBP_WARP;
constexpr int CHUNK = 8;   /* elements in 16 bytes */
constexpr int PAD = CHUNK; /* so that 8 rows of a matrix do not meet in the same banks */

/** A factor, seen as lanes x depth: lanes are rows of A or columns of B. */
struct factor {
    const sebp_bf16 *data;
    int64_t stride;
    const int64_t *rows;
    int64_t lanes, depth;
};

factor factor_of(const sebp_operand &operand, int64_t lanes, int64_t depth)
{
    return {(const sebp_bf16 *)operand.data, operand.stride, operand.rows, lanes, depth};
}

/**
 * How `width` lanes of a factor lie in shared memory.
 * @tparam lanes_are_rows  a memory row is a lane, and goes along the depth.
 */
template <int width, bool lanes_are_rows> struct slice {
    static constexpr int rows = lanes_are_rows ? width : STEP;
    static constexpr int cols = lanes_are_rows ? STEP : width;
    static constexpr int pitch = cols + PAD;
    static constexpr int elements = rows * pitch;
    static constexpr int chunks = rows * cols / CHUNK;
    static_assert(chunks % THREADS == 0);

    /** Starts to copy lanes from `lane` on and depths from `at` on; zero from `end` on. */
    static __device__ __forceinline__ void copy(sebp_bf16 *to, const factor &from, int64_t lane,
                                                int64_t at, int64_t end)
    {
        const int64_t first_row = lanes_are_rows ? lane : at;
        const int64_t first_col = lanes_are_rows ? at : lane;
        const int64_t end_row = lanes_are_rows ? from.lanes : end;
        const int64_t end_col = lanes_are_rows ? end : from.lanes;
#pragma unroll
        for (int i = 0; i < chunks / THREADS; i++) {
            const int chunk = (int)threadIdx.x + i * THREADS;
            const int row = chunk / (cols / CHUNK), col = chunk % (cols / CHUNK) * CHUNK;
            const int64_t left = end_col - first_col - col;
            int bytes = left >= CHUNK ? 16 : left > 0 ? 2 * (int)left : 0;
            const sebp_bf16 *source = from.data;
            if (first_row + row < end_row && bytes > 0)
                source += sebp_row_at(from.rows, first_row + row) * from.stride + first_col + col;
            else
                bytes = 0;
            sebp_copy_async(to + row * pitch + col, source, bytes);
        }
    }

    /** A's fragment of 16 lanes from `lane` on and 16 depths from `at` on. */
    static __device__ __forceinline__ void load_a(uint32_t got[4], const sebp_bf16 *from, int lane,
                                                  int at)
    {
        const int thread = (int)threadIdx.x % SEBP_WARP;
        const int low = thread % 8, second = thread / 8 % 2 * 8, third = thread / 16 * 8;
        if constexpr (lanes_are_rows)
            sebp_load_matrices<false>(got, from + (lane + second + low) * pitch + at + third);
        else
            sebp_load_matrices<true>(got, from + (at + third + low) * pitch + lane + second);
    }

    /** B's two fragments of 8 lanes each, from `lane` on. */
    static __device__ __forceinline__ void load_b(uint32_t got[4], const sebp_bf16 *from, int lane,
                                                  int at)
    {
        const int thread = (int)threadIdx.x % SEBP_WARP;
        const int low = thread % 8, second = thread / 8 % 2 * 8, third = thread / 16 * 8;
        if constexpr (lanes_are_rows)
            sebp_load_matrices<false>(got, from + (lane + third + low) * pitch + at + second);
        else
            sebp_load_matrices<true>(got, from + (at + second + low) * pitch + lane + third);
    }
};

template <int TILE_ROWS, int TILE_COLS, bool a_lanes_are_rows, bool b_lanes_are_rows>
__global__ void __launch_bounds__(THREADS, 2)
    multiply(factor a, factor b, sebp_cuda_cut cut, sebp_cuda_epilogue epilogue, unsigned *counters,
             float *partial)
{
    const sebp_overlapping overlapping;
    using a_slice = slice<TILE_ROWS, a_lanes_are_rows>;
    using b_slice = slice<TILE_COLS, b_lanes_are_rows>;
    constexpr int down = TILE_ROWS / WARPS_DOWN / 16, across = TILE_COLS / WARPS_ACROSS / 8;
    constexpr int stage_elements = a_slice::elements + b_slice::elements;
    sebp_bf16 *stages = sebp_shared<sebp_bf16>();
    const sebp_cuda_share share = sebp_cuda_share_of(cut, a.depth, TILE_ROWS, TILE_COLS);
    const int warp = (int)threadIdx.x / SEBP_WARP, thread = (int)threadIdx.x % SEBP_WARP;
    const int warp_row = warp / WARPS_ACROSS * (TILE_ROWS / WARPS_DOWN);
    const int warp_col = warp % WARPS_ACROSS * (TILE_COLS / WARPS_ACROSS);
    float sums[down * across * 4] = {};

    auto copy_stage = [&](int64_t at) {
        if (at < share.end) {
            sebp_bf16 *to = stages + (at - share.begin) / STEP % STAGES * stage_elements;
            a_slice::copy(to, a, share.row, at, share.end);
            b_slice::copy(to + a_slice::elements, b, share.col, at, share.end);
        }
        sebp_copies_end_group();
    };
    for (int i = 0; i < STAGES - 1; i++)
        copy_stage(share.begin + i * STEP);
    for (int64_t at = share.begin; at < share.end; at += STEP) {
        sebp_copies_wait<STAGES - 2>();
        __syncthreads(); /* this stage is there, and the one before it is read */
        copy_stage(at + (STAGES - 1) * STEP);
        const sebp_bf16 *from = stages + (at - share.begin) / STEP % STAGES * stage_elements;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t x[down][4], y[across / 2][4];
#pragma unroll
            for (int i = 0; i < down; i++)
                a_slice::load_a(x[i], from, warp_row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < across / 2; j++)
                b_slice::load_b(y[j], from + a_slice::elements, warp_col + 16 * j, k);
#pragma unroll
            for (int i = 0; i < down; i++) {
#pragma unroll
                for (int j = 0; j < across; j++)
                    sebp_mma_bf16(&sums[(i * across + j) * 4], x[i], &y[j / 2][j % 2 * 2]);
            }
        }
    }
    sebp_copies_wait<0>();
    if (!sebp_cuda_add_shares(cut, share, sums, counters, partial))
        return;
#pragma unroll
    for (int i = 0; i < 2 * down; i++) {
        const int64_t row = share.row + warp_row + 8 * i + thread / 4;
        if (row >= a.lanes)
            continue;
        const int64_t to = sebp_row_at(epilogue.c_rows, row);
#pragma unroll
        for (int j = 0; j < 2 * across; j++) {
            const int64_t col = share.col + warp_col + j / 2 * 8 + thread % 4 * 2 + j % 2;
            if (col < b.lanes) {
                sebp_finish_element(epilogue, to, col,
                                    sums[(i / 2 * across + j / 2) * 4 + i % 2 * 2 + j % 2]);
            }
        }
    }
}

constexpr int LARGE = 128, SMALL = 64; /* sides of tiles */

/* Whether large tiles alone would keep most of the GPU busy. */
bool takes_large(const sebp_cuda *cuda, const sebp_product *product)
{
    return sebp_div_ceil(product->m, LARGE) * sebp_div_ceil(product->n, LARGE) >=
           cuda->multiprocessors;
}

} // namespace

bool sebp_cuda_takes_tensor(const sebp_product *product)
{
    const sebp_operand *operands[] = {&product->a, &product->b};
    for (const sebp_operand *operand : operands) {
        if (operand->dtype != SEBP_BF16 || (uintptr_t)operand->data % 16 != 0 ||
            operand->stride % CHUNK != 0)
            return false;
    }
    return true;
}

sebp_cuda_cut sebp_cuda_cut_tensor(const sebp_cuda *cuda, const sebp_product *product)
{
    const int side = takes_large(cuda, product) ? LARGE : SMALL;
    return sebp_cuda_cut_product(product, side, side, STEP, 2 * cuda->multiprocessors, 256);
}

int64_t sebp_cuda_tensor_bytes(const sebp_cuda_cut *cut)
{
    return sebp_cuda_cut_bytes(cut, LARGE * LARGE);
}

template <int side, bool a_rows, bool b_rows>
static sebp_status launch(sebp_cuda *cuda, const sebp_product *product, const sebp_cuda_cut *cut,
                          unsigned *counters, float *partial)
{
    const int64_t elements = slice<side, a_rows>::elements + slice<side, b_rows>::elements;
    const dim3 grid((unsigned)(cut->tiles_down * cut->tiles_across * cut->shares));
    return sebp_launch_overlapping(cuda, multiply<side, side, a_rows, b_rows>, grid, dim3(THREADS),
                                   STAGES * elements * (int64_t)sizeof(sebp_bf16),
                                   factor_of(product->a, product->m, product->k),
                                   factor_of(product->b, product->n, product->k), *cut,
                                   sebp_cuda_epilogue_of(product), counters, partial);
}

sebp_status sebp_cuda_run_tensor(sebp_cuda *cuda, const sebp_product *product,
                                 const sebp_cuda_cut *cut, void *scratch)
{
    unsigned *counters = (unsigned *)scratch;
    float *partial = (float *)((char *)scratch + sebp_cuda_counter_bytes(cut));
    sebp_status status = sebp_cuda_clear_counters(cuda, cut, scratch);
    if (status != SEBP_SUCCESS)
        return status;
    return sebp_with_bool(takes_large(cuda, product), [&](auto large) {
        return sebp_with_bool(!product->a.transposed, [&](auto a_rows) {
            return sebp_with_bool(product->b.transposed, [&](auto b_rows) {
                constexpr int side = large ? LARGE : SMALL;
                return launch<side, a_rows, b_rows>(cuda, product, cut, counters, partial);
            });
        });
    });
}
