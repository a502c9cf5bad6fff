/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_copy.cuh
 * The part of matrix_unit_kernel.cuh that copies rows of both factors into the ring of stages.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_COPY_CUH
#define SEBP_CUDA_MATRIX_UNIT_COPY_CUH

#include "matrix_unit_work.cuh"

namespace matrix_unit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- copies of one operand's tiles ---- */

template <int ROWS, bool ACROSS> struct copier;

/** Along: a thread has a chunk of each 16th row. */
template <int ROWS> struct copier<ROWS, false> {
    enum { COPIES = ROWS / 16 };
    const char *from[COPIES]; /* at depth 0 */
    uint32_t there;           /* which of these rows there are, a bit each */

    __device__ __forceinline__ void begin(const operand &x, int thread, int first, int, int)
    {
        there = 0;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int row = first + thread / 8 + 16 * i;
            bool inside = row < x.size;
            from[i] = x.data;
            if (inside)
                from[i] += sebp_row_at(x.rows, row) * x.stride_bytes;
            there |= (uint32_t)inside << i;
        }
    }

    __device__ __forceinline__ void copy(const operand &x, int thread, int first_depth, int depth,
                                         uint32_t to)
    {
        int chunk = thread % 8, line = thread / 8;
        int at = first_depth + chunk * CHUNK;
        bool inside = at < depth;
        int64_t bytes = inside ? (int64_t)at * 2 : 0;
        to += (uint32_t)(line * LINE_BYTES + ((chunk ^ line % 8) << 4));
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            hopper::copy_16(to + (uint32_t)(i * 16 * LINE_BYTES), from[i] + bytes,
                            inside && (there >> i & 1) != 0);
        }
    }
};

/** Across: a thread has a chunk of each 1024 / ROWS-th depth. A lane looks up two of the 64 depths,
 * for the step that comes next. */
template <int ROWS> struct copier<ROWS, true> {
    enum { CHUNKS = ROWS / CHUNK, STEP = COPIERS / CHUNKS, COPIES = TILE_DEPTH / STEP };
    const char *from; /* at memory row 0 */
    bool there;
    int64_t next[2]; /* offsets of memory rows; -1: there is none */

    __device__ __forceinline__ void look_up(const operand &x, int first_depth, int depth)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = first_depth + (int)threadIdx.x % SEBP_WARP + SEBP_WARP * i;
            next[i] = at < depth ? sebp_row_at(x.rows, at) * x.stride_bytes : -1;
        }
    }

    __device__ __forceinline__ void begin(const operand &x, int thread, int first, int first_depth,
                                          int depth)
    {
        int column = first + thread % CHUNKS * CHUNK;
        there = column < x.size;
        from = there ? x.data + (int64_t)column * 2 : x.data;
        look_up(x, first_depth, depth);
    }

    __device__ __forceinline__ void copy(const operand &x, int thread, int first_depth, int depth,
                                         uint32_t to)
    {
        int chunk = thread % CHUNKS, line = thread / CHUNKS;
        to += (uint32_t)(chunk / 8 * PANEL_BYTES + line * LINE_BYTES);
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            /* line < STEP, and STEP divides a warp's 32 lanes. */
            int later = STEP * i;
            int64_t offset =
                __shfl_sync(0xFFFFFFFFU, next[later / SEBP_WARP], (later + line) % SEBP_WARP);
            uint32_t swizzled = (uint32_t)((chunk ^ (later + line)) % 8) << 4;
            bool inside = there && offset >= 0;
            hopper::copy_16(to + (uint32_t)(later * LINE_BYTES) + swizzled,
                            inside ? from + offset : x.data, inside);
        }
        look_up(x, first_depth + TILE_DEPTH, depth);
    }
};

/* ---- the ring ---- */

/** Tells when the copies into a stage are done. */
template <int N, fence FENCE> struct teller {
    enum { LATER = stages<N> - 2 }; /* stages that are being copied when one is told of */
    place<stages<N>> told;
    int untold = 0;

    __device__ __forceinline__ void copied(uint32_t full, int stage)
    {
        if (FENCE == fence::BY_READERS) {
            hopper::barrier_arrive_after_copies(full + 8 * stage);
            return;
        }
        hopper::copies_commit();
        hopper::copies_wait<LATER>();
        hopper::fence_for_matrix_unit();
        if (untold == LATER)
            tell(full);
        else
            untold++;
    }

    __device__ __forceinline__ void finish(uint32_t full)
    {
        if (FENCE == fence::BY_READERS)
            return;
        hopper::copies_wait<0>();
        hopper::fence_for_matrix_unit();
        for (; untold > 0; untold--)
            tell(full);
    }

    __device__ __forceinline__ void tell(uint32_t full)
    {
        hopper::barrier_arrive_if(full + 8 * told.stage, true);
        told.advance();
    }
};

template <int N, bool A_ACROSS, bool B_ACROSS, fence FENCE>
__device__ __forceinline__ void copy_all(const work &w, uint32_t shared, uint32_t full,
                                         uint32_t empty)
{
    place<stages<N>> at;
    teller<N, FENCE> tells;
    int thread = (int)threadIdx.x - MULTIPLIERS;
    copier<TILE_M, A_ACROSS> a;
    copier<N, B_ACROSS> b;
    int64_t tiles = w.m_tiles * w.n_tiles, clusters = gridDim.x / (unsigned)w.splits;
    for (int64_t index = blockIdx.x / (unsigned)w.splits; index < tiles; index += clusters) {
        tile t = tile_at<N>(w, index);
        a.begin(w.a, thread, t.m, t.first_step * TILE_DEPTH, w.depth);
        b.begin(w.b, thread, t.n, t.first_step * TILE_DEPTH, w.depth);
        for (int step = t.first_step; step < t.first_step + t.steps; step++) {
            uint32_t stage = shared + (uint32_t)(at.stage * stage_bytes<N>);
            hopper::barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
            a.copy(w.a, thread, step * TILE_DEPTH, w.depth, stage);
            b.copy(w.b, thread, step * TILE_DEPTH, w.depth, stage + TILE_M * LINE_BYTES);
            tells.copied(full, at.stage);
            at.advance();
        }
    }
    tells.finish(full);
    if (w.splits > 1) {
        hopper::cluster_barrier(); /* both of store_together() */
        hopper::cluster_barrier();
    }
}

#endif

} // namespace matrix_unit

#endif
