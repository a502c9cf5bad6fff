/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_work.cuh
 * What the kernel of matrix_unit_kernel.cuh is told, and what its parts share: sizes, the tile of a
 * block, the ring of stages.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_WORK_CUH
#define SEBP_CUDA_MATRIX_UNIT_WORK_CUH

#include "hopper.cuh"
#include "product.cuh"

namespace matrix_unit {

enum {
    TILE_M = 128,
    TILE_DEPTH = 64,
    COPIERS = 128,     /* threads that copy, the last of the block */
    MULTIPLIERS = 256, /* threads that multiply, the first */
    THREADS = COPIERS + MULTIPLIERS,
    COPIER_REGISTERS = 88,
    MULTIPLIER_REGISTERS = 208,
    CHUNK = 8,          /* elements of 16 bytes */
    LINE_BYTES = 128,   /* TILE_DEPTH elements, or 64 of a row */
    GROUP_BYTES = 1024, /* eight lines: what the swizzle repeats after */
    PANEL_BYTES = 8192, /* 64 lines */
    ALIGNMENT = 1024,   /* of a stage */
    MAX_SPLITS = 8,     /* blocks in a cluster */
    STAGE_BYTES_IN_ALL = 196608,
    LIST_STEPS = 8, /* steps of the depth whose listed rows are looked up at once */
    LIST_LENGTH = LIST_STEPS * TILE_DEPTH,
    LIST_BYTES = LIST_LENGTH * 4,
    SHARED_BYTES = STAGE_BYTES_IN_ALL + 4 * LIST_BYTES + ALIGNMENT
};

/** A memory row is a row of the operand's tile (along) or a depth (across). */
struct operand {
    const char *data;
    int64_t stride_bytes; /* 32 bits hold it */
    const int64_t *rows;  /* NULL: as they lie */
    int size;             /* of the dimension that is not the depth: m or n */
};

/** What becomes of the sums. The first three work on whole vectors of 16 bytes of C. */
enum class finish { STORE, ACCUMULATE, ADD_BIAS, ANY };

struct work {
    operand a, b;
    sebp_cuda_epilogue to;
    finish how;
    int m, n, depth;
    int64_t m_tiles, n_tiles;
    int64_t first_tile, end_tile; /* of this launch */
    bool m_first;                 /* tiles are taken down the columns of C */
    int splits;                   /* blocks to a tile */
};

template <int N> constexpr int stage_bytes = (TILE_M + N) * LINE_BYTES;
template <int N> constexpr int stages = STAGE_BYTES_IN_ALL / stage_bytes<N>;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/** The stage that comes next, and the parity of its barriers' phase. */
template <int STAGES> struct place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance()
    {
        stage++;
        if (stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct tile {
    int m, n; /* its first row and column */
};

template <int N> __device__ __forceinline__ tile tile_at(const work &w, int64_t index)
{
    int64_t m = w.m_first ? index % w.m_tiles : index / w.n_tiles;
    int64_t n = w.m_first ? index / w.m_tiles : index % w.n_tiles;
    return {(int)(m * TILE_M), (int)(n * N)};
}

/** A block's part of the depth, the same in all of its tiles, in TILE_DEPTHs. */
struct share {
    int first, steps;
};

__device__ __forceinline__ share share_of(const work &w)
{
    int steps = (w.depth - 1) / TILE_DEPTH + 1, part = (int)blockIdx.x % w.splits;
    int first = (int)((int64_t)steps * part / w.splits);
    int end = (int)((int64_t)steps * (part + 1) / w.splits);
    return {first, end - first};
}

/** Calls body(tile) for each tile of the block. */
template <int N, class Body> __device__ __forceinline__ void for_tiles(const work &w, Body body)
{
    const unsigned clusters = gridDim.x / (unsigned)w.splits;
    for (int64_t index = w.first_tile + blockIdx.x / (unsigned)w.splits; index < w.end_tile;
         index += clusters)
        body(tile_at<N>(w, index));
}

#endif

} // namespace matrix_unit

#endif
