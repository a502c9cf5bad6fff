/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tensor_product.cu
 * Products by tensor cores: of bf16, and of f32 as TF32 where the precision allows it.
 *
 * A block has a tile of C, each of its warps a part of it. Slices of A and B, a few ahead of those
 * that are multiplied, are copied to shared memory as they lie. What has to be transposed is so on its way
 * to the registers, bf16 by ldmatrix.
 */
#include "product.cuh"
#include "tensor_core.cuh"

namespace {

constexpr int STAGES = 4;
constexpr int WARPS_DOWN = 2, WARPS_ACROSS = 4, THREADS = WARPS_DOWN * WARPS_ACROSS * SEBP_WARP;

/* Of elements T, sebp_bf16 or float. */
template <class T> constexpr int CHUNK = 16 / sizeof(T);          /* in 16 bytes */
template <class T> constexpr int STEP = 64 / sizeof(T);           /* of the depth, in a stage */
template <class T> constexpr int FRAGMENT_DEPTH = 32 / sizeof(T); /* of a tensor core's product */

/** A factor, seen as lanes x depth: lanes are rows of A or columns of B. */
template <class T> struct factor {
    const T *data;
    int64_t stride;
    const int64_t *rows;
    int64_t lanes, depth;
};

template <class T> factor<T> factor_of(const sebp_operand &operand, int64_t lanes, int64_t depth)
{
    return {(const T *)operand.data, operand.stride, operand.rows, lanes, depth};
}

/**
 * How `width` lanes of a factor lie in shared memory.
 * @tparam lanes_are_rows  a memory row is a lane, and goes along the depth.
 */
template <class T, int width, bool lanes_are_rows> struct slice {
    static constexpr int chunk_elements = CHUNK<T>;
    static constexpr int rows = lanes_are_rows ? width : STEP<T>;
    static constexpr int cols = lanes_are_rows ? STEP<T> : width;
    /* So that what a warp reads at once is in other banks: 8 rows of 16 bytes, or 4 rows of 8 floats. */
    static constexpr int pad = sizeof(T) == 4 && !lanes_are_rows ? 8 : chunk_elements;
    static constexpr int pitch = cols + pad;
    static constexpr int elements = rows * pitch;
    static constexpr int chunks = rows * cols / chunk_elements;
    static_assert(chunks % THREADS == 0);

    /** Starts to copy lanes from `lane` on and depths from `at` on; zero from `end` on. */
    static __device__ __forceinline__ void copy(T *to, const factor<T> &from, int64_t lane,
                                                int64_t at, int64_t end)
    {
        const int64_t first_row = lanes_are_rows ? lane : at;
        const int64_t first_col = lanes_are_rows ? at : lane;
        const int64_t end_row = lanes_are_rows ? from.lanes : end;
        const int64_t end_col = lanes_are_rows ? end : from.lanes;
#pragma unroll
        for (int i = 0; i < chunks / THREADS; i++) {
            const int chunk = (int)threadIdx.x + i * THREADS;
            const int row = chunk / (cols / chunk_elements);
            const int col = chunk % (cols / chunk_elements) * chunk_elements;
            const int64_t left = end_col - first_col - col;
            int bytes = left >= chunk_elements ? 16 : left > 0 ? (int)sizeof(T) * (int)left : 0;
            const T *source = from.data;
            if (first_row + row < end_row && bytes > 0)
                source += sebp_row_at(from.rows, first_row + row) * from.stride + first_col + col;
            else
                bytes = 0;
            sebp_copy_async(to + row * pitch + col, source, bytes);
        }
    }

    /**
     * Fragments of 16 lanes from `lane` on and FRAGMENT_DEPTH depths from `at` on: one of A, or two of B,
     * one behind the other. Each is of pieces of 8 lanes and a chunk of the depth.
     */
    template <bool is_b>
    static __device__ __forceinline__ void load(uint32_t got[4], const T *from, int lane, int at)
    {
        const int thread = (int)threadIdx.x % SEBP_WARP, low = thread % 8;
        auto lane_of = [](int piece) { return (is_b ? piece / 2 : piece % 2) * 8; };
        auto depth_of = [](int piece) { return (is_b ? piece % 2 : piece / 2) * chunk_elements; };
        if constexpr (lanes_are_rows) {
            const T *row = from + (lane + lane_of(thread / 8) + low) * pitch;
            sebp_load_matrices<false>(got, (const sebp_bf16 *)(row + at + depth_of(thread / 8)));
        } else if constexpr (sizeof(T) == 2) {
            const T *row = from + (at + depth_of(thread / 8) + low) * pitch;
            sebp_load_matrices<true>(got, row + lane + lane_of(thread / 8));
        } else {
            const T *mine = from + (at + thread % 4) * pitch + lane + thread / 4;
#pragma unroll
            for (int i = 0; i < 4; i++)
                got[i] = __float_as_uint(mine[depth_of(i) * pitch + lane_of(i)]);
        }
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                got[i] = sebp_to_tf32(got[i]);
        }
    }
};

template <class T, int TILE_ROWS, int TILE_COLS, bool a_lanes_are_rows, bool b_lanes_are_rows>
__global__ void __launch_bounds__(THREADS, 2)
    multiply(factor<T> a, factor<T> b, sebp_cuda_cut cut, sebp_cuda_epilogue epilogue,
             unsigned *counters, float *partial)
{
    const sebp_overlapping overlapping;
    using a_slice = slice<T, TILE_ROWS, a_lanes_are_rows>;
    using b_slice = slice<T, TILE_COLS, b_lanes_are_rows>;
    constexpr int step = STEP<T>;
    constexpr int down = TILE_ROWS / WARPS_DOWN / 16, across = TILE_COLS / WARPS_ACROSS / 8;
    constexpr int stage_elements = a_slice::elements + b_slice::elements;
    T *stages = sebp_shared<T>();
    const sebp_cuda_share share = sebp_cuda_share_of(cut, a.depth, TILE_ROWS, TILE_COLS);
    const int warp = (int)threadIdx.x / SEBP_WARP, thread = (int)threadIdx.x % SEBP_WARP;
    const int warp_row = warp / WARPS_ACROSS * (TILE_ROWS / WARPS_DOWN);
    const int warp_col = warp % WARPS_ACROSS * (TILE_COLS / WARPS_ACROSS);
    float sums[down * across * 4] = {};

    auto copy_stage = [&](int64_t at) {
        if (at < share.end) {
            T *to = stages + (at - share.begin) / step % STAGES * stage_elements;
            a_slice::copy(to, a, share.row, at, share.end);
            b_slice::copy(to + a_slice::elements, b, share.col, at, share.end);
        }
        sebp_copies_end_group();
    };
    for (int i = 0; i < STAGES - 1; i++)
        copy_stage(share.begin + i * step);
    for (int64_t at = share.begin; at < share.end; at += step) {
        sebp_copies_wait<STAGES - 2>();
        __syncthreads(); /* this stage is there, and the one before it is read */
        copy_stage(at + (STAGES - 1) * step);
        const T *from = stages + (at - share.begin) / step % STAGES * stage_elements;
#pragma unroll
        for (int k = 0; k < step; k += FRAGMENT_DEPTH<T>) {
            uint32_t x[down][4], y[across / 2][4];
#pragma unroll
            for (int i = 0; i < down; i++)
                a_slice::template load<false>(x[i], from, warp_row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < across / 2; j++)
                b_slice::template load<true>(y[j], from + a_slice::elements, warp_col + 16 * j, k);
#pragma unroll
            for (int i = 0; i < down; i++) {
#pragma unroll
                for (int j = 0; j < across; j++)
                    sebp_mma<T>(&sums[(i * across + j) * 4], x[i], &y[j / 2][j % 2 * 2]);
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
    const sebp_dtype dtype = product->a.dtype;
    const sebp_operand *operands[] = {&product->a, &product->b};
    for (const sebp_operand *operand : operands) {
        if (operand->dtype != dtype || (uintptr_t)operand->data % 16 != 0 ||
            operand->stride * (int64_t)sebp_dtype_bytes(dtype) % 16 != 0)
            return false;
    }
    return dtype == SEBP_BF16 || sebp_cuda_takes_tf32(product);
}

sebp_cuda_cut sebp_cuda_cut_tensor(const sebp_cuda *cuda, const sebp_product *product)
{
    const int side = takes_large(cuda, product) ? LARGE : SMALL;
    const int step = product->a.dtype == SEBP_BF16 ? STEP<sebp_bf16> : STEP<float>;
    return sebp_cuda_cut_product(product, side, side, step, 2 * cuda->multiprocessors, 8 * step);
}

int64_t sebp_cuda_tensor_bytes(const sebp_cuda_cut *cut)
{
    return sebp_cuda_cut_bytes(cut, LARGE * LARGE);
}

template <class T, int side, bool a_rows, bool b_rows>
static sebp_status launch(sebp_cuda *cuda, const sebp_product *product, const sebp_cuda_cut *cut,
                          unsigned *counters, float *partial)
{
    const int64_t elements = slice<T, side, a_rows>::elements + slice<T, side, b_rows>::elements;
    const dim3 grid((unsigned)(cut->tiles_down * cut->tiles_across * cut->shares));
    return sebp_launch_overlapping(cuda, multiply<T, side, side, a_rows, b_rows>, grid,
                                   dim3(THREADS), STAGES * elements * (int64_t)sizeof(T),
                                   factor_of<T>(product->a, product->m, product->k),
                                   factor_of<T>(product->b, product->n, product->k), *cut,
                                   sebp_cuda_epilogue_of(product), counters, partial);
}

template <class T>
static sebp_status run(sebp_cuda *cuda, const sebp_product *product, const sebp_cuda_cut *cut,
                       unsigned *counters, float *partial)
{
    return sebp_with_bool(takes_large(cuda, product), [&](auto large) {
        return sebp_with_bool(!product->a.transposed, [&](auto a_rows) {
            return sebp_with_bool(product->b.transposed, [&](auto b_rows) {
                constexpr int side = large ? LARGE : SMALL;
                return launch<T, side, a_rows, b_rows>(cuda, product, cut, counters, partial);
            });
        });
    });
}

sebp_status sebp_cuda_run_tensor(sebp_cuda *cuda, const sebp_product *product,
                                 const sebp_cuda_cut *cut, void *scratch)
{
    unsigned *counters = (unsigned *)scratch;
    float *partial = (float *)((char *)scratch + sebp_cuda_counter_bytes(cut));
    sebp_status status = sebp_cuda_clear_counters(cuda, cut, scratch);
    if (status != SEBP_SUCCESS)
        return status;
    return product->a.dtype == SEBP_BF16 ? run<sebp_bf16>(cuda, product, cut, counters, partial)
                                         : run<float>(cuda, product, cut, counters, partial);
}
