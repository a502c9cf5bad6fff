/* SPDX-License-Identifier: Apache-2.0 */
/** @file plain_kernel.cuh The kernel of plain_product.cu, for tiles of any shape. */
#ifndef SEBP_CUDA_PLAIN_KERNEL_CUH
#define SEBP_CUDA_PLAIN_KERNEL_CUH

#include "product.cuh"
#include "tensor_core.cuh"

namespace {
namespace plain {

constexpr int PAD = 4; /* so that elements that are copied together do not meet in one bank */

/**
 * What a block does.
 * @tparam tile_rows, tile_cols      of C.
 * @tparam per_thread_rows, _cols    of C, in a thread's registers: multiples of 4.
 * @tparam slice_depth               of a slice of A and B: a multiple of 8.
 * @tparam stage_count               slices in shared memory at once.
 * @tparam blocks                    that shall fit in a multiprocessor.
 * @tparam takes_any                 alignment; else factors of which rows are copied as they lie are
 *                                   f32 and aligned.
 */
template <int tile_rows, int tile_cols, int per_thread_rows, int per_thread_cols, int slice_depth,
          int stage_count, int blocks, bool takes_any>
struct shape {
    static constexpr bool any_alignment = takes_any;
    static constexpr int rows = tile_rows, cols = tile_cols, step = slice_depth;
    static constexpr int thread_rows = per_thread_rows, thread_cols = per_thread_cols;
    static constexpr int stages = stage_count, resident = blocks;
    static constexpr int across = cols / thread_cols;
    static constexpr int threads = rows / thread_rows * across;
    static_assert(across % 8 == 0 && rows / thread_rows % 4 == 0 && threads % (4 * step) == 0);
};

/** A factor, seen as lanes x depth: lanes are rows of A or columns of B. */
struct factor {
    const char *data;
    int64_t stride;
    const int64_t *rows;
    int64_t lanes, depth;
    bool lanes_are_rows; /* memory rows are lanes, and elements of one go along the depth */
    bool is_bf16;
    bool is_aligned; /* groups of 4 elements, at multiples of 4, can be read at once */
};

inline factor factor_of(const sebp_operand &operand, bool is_b, int64_t lanes, int64_t depth)
{
    size_t group = 4 * sebp_dtype_bytes(operand.dtype);
    factor made;
    made.data = (const char *)operand.data;
    made.stride = operand.stride;
    made.rows = operand.rows;
    made.lanes = lanes;
    made.depth = depth;
    made.lanes_are_rows = operand.transposed == is_b;
    made.is_bf16 = operand.dtype == SEBP_BF16;
    made.is_aligned = (uintptr_t)operand.data % group == 0 && operand.stride % 4 == 0;
    return made;
}

/** Starts to copy an element to shared memory; zero where it is not there. bf16 is there at once. */
template <bool is_bf16>
__device__ __forceinline__ void copy_element(float *to, const char *from, bool is_there)
{
    if (is_bf16)
        *to = is_there ? sebp_widen(*(const sebp_bf16 *)from) : 0.0F;
    else
        sebp_copy_four_async(to, from, is_there ? 4 : 0);
}

/**
 * Slices of a factor, one after another: step x width of f32, a row of shared memory for each step of
 * the depth.
 *
 * Where memory rows are lanes a warp copies 8 elements of 4 rows, one by one, as they turn to lie across.
 * Where these rows begin is in a table. Else rows are copied as they lie; a list of them is copied, too,
 * ahead of them, to a ring that has room for the slices under way and as many more.
 */
template <class S, int width, bool lanes_are_rows, bool is_bf16> struct slices {
    static constexpr int pitch = width + PAD, elements = S::step * pitch;
    static constexpr int groups = width * S::step / 4 / S::threads, row_groups = width / 4;
    static constexpr int lanes_at_once = S::threads / S::step;
    static constexpr int ring = 8, ahead = S::stages - 1; /* slices */
    static constexpr int table_bytes = 8 * (lanes_are_rows ? width : ring * S::step);
    static_assert(ring >= 2 * S::stages && S::step <= S::threads);
    static constexpr int element_bytes = is_bf16 ? 2 : 4;
    static_assert(groups > 0 && width % lanes_at_once == 0 && S::threads % row_groups == 0);

    union {
        const char **lane_rows;
        int64_t *depth_rows; /* ring x step */
    };
    const char *first; /* a thread's first element of memory row 0 */
    int there;         /* of its groups of 4 */

    /** Begins with lanes from `lane` on and depths from `at` on. All threads call it, and wait for each
     * other then. */
    __device__ __forceinline__ void begin(const factor &from, int64_t lane, int64_t at)
    {
        if constexpr (lanes_are_rows) {
            for (int i = (int)threadIdx.x; i < width; i += S::threads) {
                /* What is behind the last lane is not stored, so it may be any that is there. */
                const int64_t row = lane + i < from.lanes ? lane + i : from.lanes - 1;
                lane_rows[i] =
                    from.data + sebp_row_at(from.rows, row) * from.stride * element_bytes;
            }
        } else {
            const int64_t col = lane + (int)threadIdx.x % row_groups * 4;
            const int64_t left = from.lanes - col;
            there = left >= 4 ? 4 : left > 0 ? (int)left : 0;
            first = from.data + (there > 0 ? col : 0) * element_bytes;
            for (int i = (int)threadIdx.x; i < 2 * ahead * S::step; i += S::threads) {
                if (from.rows != nullptr && at + i < from.depth)
                    depth_rows[i] = from.rows[at + i];
            }
        }
    }

    /** Starts to copy slice i, of which depth `at` is the first of `left`. */
    __device__ __forceinline__ void copy(float *to, const factor &from, int i, int64_t at,
                                         int left) const
    {
        const int thread = (int)threadIdx.x;
        if constexpr (lanes_are_rows) {
            constexpr int eights = S::step / 8; /* along the depth */
            const int warp = thread / SEBP_WARP;
            const int depth = thread % 8 + warp % eights * 8;
            const int first_lane = thread / 8 % 4 + warp / eights * 4;
            const bool is_there = depth < left;
            const int64_t offset = is_there ? (at + depth) * element_bytes : 0;
#pragma unroll
            for (int i = 0; i < width / lanes_at_once; i++) {
                const int lane = first_lane + i * lanes_at_once;
                copy_element<is_bf16>(to + depth * pitch + lane, lane_rows[lane] + offset,
                                      is_there);
            }
        } else {
            const int row = thread / row_groups;
            const int64_t *listed = depth_rows + i % ring * S::step + row;
            float *place = to + row * pitch + thread % row_groups * 4;
#pragma unroll
            for (int j = 0; j < groups; j++) {
                constexpr int apart = S::threads / row_groups;
                const int count = row + j * apart < left ? there : 0;
                int64_t memory_row =
                    from.rows != nullptr ? listed[j * apart] : at + row + j * apart;
                if (count == 0)
                    memory_row = 0;
                copy_group(place + j * apart * pitch,
                           first + memory_row * (from.stride * element_bytes), count,
                           from.is_aligned);
            }
        }
    }

    /** Starts to copy the part of the list for slice i, of which depth `at` is the first of `left`. */
    __device__ __forceinline__ void copy_list(const factor &from, int i, int64_t at, int left) const
    {
        if constexpr (!lanes_are_rows) {
            if (from.rows != nullptr && (int)threadIdx.x < left && (int)threadIdx.x < S::step)
                sebp_copy_eight_async(depth_rows + i % ring * S::step + threadIdx.x,
                                      from.rows + at + threadIdx.x);
        }
    }

    static __device__ __forceinline__ void copy_group(float *to, const char *from, int count,
                                                      bool is_aligned)
    {
        if (!is_bf16 && (!S::any_alignment || is_aligned)) {
            sebp_copy_async(to, from, 4 * count);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                copy_element<is_bf16>(to + j, from + (j < count ? j * element_bytes : 0),
                                      j < count);
        }
    }
};

/** A thread's lanes of a row of a slice: groups of four, far apart, so that neighbours read
 * neighbouring banks. */
template <int width, int count>
__device__ __forceinline__ void read_lanes(const float *from, float (&got)[count])
{
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        float4 four = *(const float4 *)(from + i * (width / count));
        got[i] = four.x;
        got[i + 1] = four.y;
        got[i + 2] = four.z;
        got[i + 3] = four.w;
    }
}

/** Which lane of the tile a thread's i-th is, if its first one is `first`. */
template <int width, int count> __device__ __forceinline__ constexpr int lane_of(int first, int i)
{
    return first + i % 4 + i / 4 * (width / count * 4);
}

/** A block's slices of one tile. */
struct segment {
    int tile, down, across;
    int first, count; /* slices */
};

/** The first slice of a block, of those of all tiles. */
__device__ __forceinline__ int64_t begin_of(const sebp_plain_cut &cut, int64_t block)
{
    return block * (cut.tiles_down * cut.tiles_across * cut.steps) / cut.blocks;
}

__device__ __forceinline__ segment segment_at(const sebp_plain_cut &cut, int64_t at, int64_t end)
{
    segment made;
    made.count = 0;
    if (at >= end)
        return made;
    made.tile = (int)(at / cut.steps);
    made.down = made.tile % (int)cut.tiles_down;
    made.across = made.tile / (int)cut.tiles_down;
    made.first = (int)(at % cut.steps);
    const int64_t left = cut.steps - made.first;
    made.count = (int)(left < end - at ? left : end - at);
    return made;
}

/**
 * Adds the parts of a tile that blocks have summed. Whether this block has the whole sums now: the last
 * one to come has. All threads call it.
 *
 * `partial`: 2 tiles for each block. Its first one is for the end of a tile, its second one for a
 * beginning.
 */
template <class S>
__device__ __forceinline__ bool add_parts(const sebp_plain_cut &cut, const segment &at,
                                          float (&sums)[S::thread_rows * S::thread_cols],
                                          unsigned *counters, float *partial)
{
    if (at.count == cut.steps)
        return true;
    constexpr int fours = S::thread_rows * S::thread_cols / 4;
    auto part_of = [&](int64_t block, bool is_beginning) {
        return (float4 *)partial + (2 * block + is_beginning) * fours * S::threads + threadIdx.x;
    };
    const int64_t tile_first = (int64_t)at.tile * cut.steps, tile_last = tile_first + cut.steps - 1;
    const int64_t total = cut.tiles_down * cut.tiles_across * cut.steps;
    const int64_t first_block = ((tile_first + 1) * cut.blocks - 1) / total;
    const int64_t last_block = ((tile_last + 1) * cut.blocks - 1) / total;
    float4 *mine = part_of(blockIdx.x, at.first == 0);
#pragma unroll
    for (int i = 0; i < fours; i++)
        mine[i * S::threads] =
            make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    __threadfence(); /* the sums, before the counter that says that they are there */
    __shared__ unsigned arrived;
    __syncthreads();
    if (threadIdx.x == 0)
        arrived = atomicAdd(&counters[at.tile], 1U);
    __syncthreads();
    if (arrived != (unsigned)(last_block - first_block))
        return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < 4 * fours; i++)
        sums[i] = 0;
    for (int64_t block = first_block; block <= last_block; block++) {
        const float4 *theirs = part_of(block, begin_of(cut, block) <= tile_first);
#pragma unroll
        for (int i = 0; i < fours; i++) {
            const float4 four = __ldcg(&theirs[i * S::threads]);
            sums[4 * i] += four.x;
            sums[4 * i + 1] += four.y;
            sums[4 * i + 2] += four.z;
            sums[4 * i + 3] += four.w;
        }
    }
    return true;
}

/** Where nothing is done to f32 sums but that they are stored or added, four at once. */
template <class S>
__device__ __forceinline__ void store_fours(const sebp_cuda_epilogue &to, int64_t row, int64_t col,
                                            int64_t rows, int64_t cols,
                                            float (&sums)[S::thread_rows * S::thread_cols])
{
    constexpr int groups = S::thread_cols / 4;
    float4 *first[S::thread_rows];
#pragma unroll
    for (int i = 0; i < S::thread_rows; i++) {
        const int64_t at = row + lane_of<S::rows, S::thread_rows>(0, i);
        first[i] = nullptr;
        if (at < rows)
            first[i] = (float4 *)((float *)to.c + sebp_row_at(to.c_rows, at) * to.c_stride + col);
    }
#pragma unroll
    for (int i = 0; i < S::thread_rows * groups; i++) {
        constexpr int apart = lane_of<S::cols, S::thread_cols>(0, 4);
        const int64_t at = i % groups * apart;
        float *four = &sums[4 * i];
        if (first[i / groups] == nullptr || col + at >= cols)
            continue;
        float4 *place = first[i / groups] + at / 4;
        if (to.accumulate) {
            float4 old = *place;
            four[0] += old.x;
            four[1] += old.y;
            four[2] += old.z;
            four[3] += old.w;
        }
        *place = make_float4(four[0], four[1], four[2], four[3]);
    }
}

template <class S>
__device__ __forceinline__ void store_any(const sebp_cuda_epilogue &to, int64_t row, int64_t col,
                                          int64_t rows, int64_t cols,
                                          const float (&sums)[S::thread_rows * S::thread_cols])
{
    /* Not in registers, so that what follows is there once and not for each sum. */
    float kept[S::thread_rows * S::thread_cols];
#pragma unroll
    for (int i = 0; i < S::thread_rows * S::thread_cols; i++)
        kept[i] = sums[i];
#pragma unroll 1
    for (int i = 0; i < S::thread_rows; i++) {
        const int64_t at = row + lane_of<S::rows, S::thread_rows>(0, i);
        if (at >= rows)
            continue;
        const int64_t c_row = sebp_row_at(to.c_rows, at);
#pragma unroll 1
        for (int j = 0; j < S::thread_cols; j++) {
            const int64_t c_col = col + lane_of<S::cols, S::thread_cols>(0, j);
            if (c_col < cols)
                sebp_finish_element(to, c_row, c_col, kept[i * S::thread_cols + j]);
        }
    }
}

template <class S, bool a_lanes_are_rows, bool b_lanes_are_rows> constexpr int64_t shared_bytes()
{
    using a_slices = slices<S, S::rows, a_lanes_are_rows, false>;
    using b_slices = slices<S, S::cols, b_lanes_are_rows, false>;
    return S::stages * (a_slices::elements + b_slices::elements) * (int64_t)sizeof(float) +
           a_slices::table_bytes + b_slices::table_bytes;
}

template <class S, bool a_lanes_are_rows, bool a_is_bf16, bool b_lanes_are_rows, bool b_is_bf16>
__global__ void __launch_bounds__(S::threads, S::resident)
    multiply(factor a, factor b, sebp_plain_cut cut, sebp_cuda_epilogue epilogue, bool stores_fours,
             unsigned *counters, float *partial)
{
    const sebp_overlapping overlapping;
    using a_slices = slices<S, S::rows, a_lanes_are_rows, a_is_bf16>;
    using b_slices = slices<S, S::cols, b_lanes_are_rows, b_is_bf16>;
    constexpr int stage_elements = a_slices::elements + b_slices::elements;
    float *stages = sebp_shared<float>();
    a_slices from_a;
    b_slices from_b;
    from_a.lane_rows = (const char **)(stages + S::stages * stage_elements);
    from_b.lane_rows = from_a.lane_rows + a_slices::table_bytes / sizeof(char *);
    /* A warp has 4 threads down and 8 across. */
    const int warp = (int)threadIdx.x / SEBP_WARP, thread = (int)threadIdx.x % SEBP_WARP;
    const int down = (warp / (S::across / 8) * 4 + thread / 8) * 4;
    const int across = (warp % (S::across / 8) * 8 + thread % 8) * 4;
    /* Not in registers, which the sums need. */
    __shared__ int64_t block_at, block_end;
    __shared__ segment now;
    if (threadIdx.x == 0) {
        block_at = begin_of(cut, blockIdx.x);
        block_end = begin_of(cut, blockIdx.x + 1);
        now.count = 0;
    }

    for (;;) {
        __syncthreads(); /* the last tile is done with */
        if (threadIdx.x == 0) {
            block_at += now.count;
            now = segment_at(cut, block_at, block_end);
        }
        __syncthreads();
        const int count = now.count;
        if (count == 0)
            return;
        const int64_t begin = (int64_t)now.first * S::step;
        float sums[S::thread_rows * S::thread_cols] = {};
        from_a.begin(a, (int64_t)now.down * S::rows, begin);
        from_b.begin(b, (int64_t)now.across * S::cols, begin);
        __syncthreads();
        auto left_at = [&](int64_t at) {
            const int64_t left = a.depth - at;
            return left < S::step ? (int)left : S::step;
        };
        auto copy_stage = [&](int i, int stage, bool with_list) {
            if (i < count) {
                const int64_t at = begin + (int64_t)i * S::step;
                const int64_t list_at = at + (S::stages - 1) * S::step;
                float *to = stages + stage * stage_elements;
                from_a.copy(to, a, i, at, left_at(at));
                from_b.copy(to + a_slices::elements, b, i, at, left_at(at));
                if (with_list) {
                    from_a.copy_list(a, i + S::stages - 1, list_at, left_at(list_at));
                    from_b.copy_list(b, i + S::stages - 1, list_at, left_at(list_at));
                }
            }
            sebp_copies_end_group();
        };
#pragma unroll
        for (int i = 0; i < S::stages - 1; i++)
            copy_stage(i, i, false);
        int read = 0, write = S::stages - 1;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            sebp_copies_wait<S::stages - 2>();
            __syncthreads(); /* this stage is there, and the one before it is read */
            copy_stage(i + S::stages - 1, write, true);
            const float *x_from = stages + read * stage_elements + down;
            const float *y_from = stages + read * stage_elements + a_slices::elements + across;
#pragma unroll
            for (int k = 0; k < S::step; k++) {
                float x[S::thread_rows], y[S::thread_cols];
                read_lanes<S::rows>(x_from + k * a_slices::pitch, x);
                read_lanes<S::cols>(y_from + k * b_slices::pitch, y);
#pragma unroll
                for (int row = 0; row < S::thread_rows; row++) {
#pragma unroll
                    for (int col = 0; col < S::thread_cols; col++) {
                        float &sum = sums[row * S::thread_cols + col];
                        sum = fmaf(x[row], y[col], sum);
                    }
                }
            }
            write = read;
            read = read + 1 < S::stages ? read + 1 : 0;
        }
        if (!add_parts<S>(cut, now, sums, counters, partial))
            continue;
        const int64_t row = (int64_t)now.down * S::rows + down;
        const int64_t col = (int64_t)now.across * S::cols + across;
        if (stores_fours)
            store_fours<S>(epilogue, row, col, a.lanes, b.lanes, sums);
        else
            store_any<S>(epilogue, row, col, a.lanes, b.lanes, sums);
    }
}

} // namespace plain
} // namespace

#endif
