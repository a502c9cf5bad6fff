/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_work.cuh
 * What the kernel of matrix_unit_kernel.cuh is told, and what its parts share: sizes, the tile of a
 * block, the ring of stages.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_WORK_CUH
#define SEBP_CUDA_MATRIX_UNIT_WORK_CUH

#include "hopper.cuh"

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
    STAGE_BYTES_IN_ALL = 196608
};

/** A memory row is a row of the operand's tile (along) or a depth (across). */
struct operand {
    const char *data;
    int64_t stride_bytes;
    const int64_t *rows; /* NULL: as they lie */
    int size;            /* of the dimension that is not the depth: m or n */
};

struct work {
    operand a, b;
    char *c;
    int64_t c_stride;
    const int64_t *c_rows;
    int m, n, depth;
    int64_t m_tiles, n_tiles;
    bool m_first; /* tiles are taken down the columns of C */
    int splits;   /* blocks to a tile */
    bool c_is_bf16, accumulate;
    bool c_in_fours; /* four elements of C may be loaded and stored at once */
};

template <int N> constexpr int stage_bytes = (TILE_M + N) * LINE_BYTES;
template <int N> constexpr int stages = STAGE_BYTES_IN_ALL / stage_bytes<N>;

enum { SHARED_BYTES = STAGE_BYTES_IN_ALL + ALIGNMENT };

/**
 * Copies are written to shared memory as threads write, and the matrix unit reads it another way; a
 * fence must come between. Either the threads that multiply make it, once the barrier has told them
 * that the copies are done; or those that copied, who then wait for their copies and tell themselves.
 */
enum class fence { BY_READERS, BY_WRITERS };

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
    int m, n;              /* its first row and column */
    int first_step, steps; /* this block's part of the depth, in TILE_DEPTHs */
};

template <int N> __device__ __forceinline__ tile tile_at(const work &w, int64_t index)
{
    int64_t m = w.m_first ? index % w.m_tiles : index / w.n_tiles;
    int64_t n = w.m_first ? index / w.m_tiles : index % w.n_tiles;
    int steps = (w.depth - 1) / TILE_DEPTH + 1, part = (int)blockIdx.x % w.splits;
    int first = (int)((int64_t)steps * part / w.splits);
    int end = (int)((int64_t)steps * (part + 1) / w.splits);
    return {(int)(m * TILE_M), (int)(n * N), first, end - first};
}

#endif

} // namespace matrix_unit

#endif
