/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_kernel.cuh
 * The product of two bf16 matrices on Hopper's matrix units, with lists of rows: C[rows] (+)= A B.
 *
 * A block makes tiles of 128 x N elements of C, N 128, 192 or 256, 64 of the depth at a time. Four warps
 * copy what comes next into a ring of stages in shared memory; they gather rows, which Hopper's own
 * engine for copies cannot. Two warpgroups multiply, 64 rows each, and hold the sums in registers.
 *
 * An operand's depth lies either along its memory rows, or across them: then a memory row has one
 * depth and the list picks depths. The matrix unit takes both. In shared memory there are lines of
 * 128 bytes, 64 elements, whose 16-byte chunks are swizzled: chunk c of line l is at c XOR l % 8.
 * Along: line i is row i of the tile. Across: line 64 p + d is depth d of the p-th 64 rows of the
 * tile.
 *
 * Where there are few tiles, the blocks of a cluster share a tile, each with a part of the depth.
 * Each then reads all blocks' sums for its part of the tile out of their shared memory, adds them in
 * the blocks' order, and stores the result.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_KERNEL_CUH
#define SEBP_CUDA_MATRIX_UNIT_KERNEL_CUH

#include "matrix_unit_copy.cuh"
#include "matrix_unit_store.cuh"

namespace matrix_unit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/** Where the descriptor of a factor begins, and what it advances by for 16 more of the depth. */
template <bool ACROSS> __device__ __forceinline__ uint64_t factor_place(uint32_t address)
{
    /* Along, there is no second panel of 64 depths, and the leading offset is not read. */
    return hopper::matrix_place(address, ACROSS ? PANEL_BYTES : 16, GROUP_BYTES);
}

template <bool ACROSS> constexpr uint64_t factor_advance = (ACROSS ? 16 * LINE_BYTES : 16 * 2) >> 4;

template <int N, bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void multiply_tile(int steps, place<stages<N>> &at, int warpgroup,
                                              uint32_t shared, uint32_t full, uint32_t empty,
                                              float (&sums)[N / 2])
{
    bool speaks = threadIdx.x % SEBP_WARP == 0;
    uint32_t half = (uint32_t)(warpgroup * PANEL_BYTES); /* of A's tile */
    uint32_t before = 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        hopper::pin(sums[i] = 0);
    for (int step = 0; step < steps; step++) {
        uint32_t stage = shared + (uint32_t)(at.stage * stage_bytes<N>);
        uint64_t a = factor_place<A_ACROSS>(stage + half);
        uint64_t b = factor_place<B_ACROSS>(stage + TILE_M * LINE_BYTES);
        hopper::barrier_wait(full + 8 * at.stage, at.parity);
        /* Threads have written what the matrix unit reads another way. */
        hopper::fence_for_matrix_unit();
        hopper::products_begin();
#pragma unroll
        for (int i = 0; i < TILE_DEPTH / 16; i++) {
            hopper::product<A_ACROSS, B_ACROSS>(sums, a + i * factor_advance<A_ACROSS>,
                                                b + i * factor_advance<B_ACROSS>);
        }
        hopper::products_commit();
        /* The step before is done, and its stage free; this one goes on. */
        hopper::products_wait<1>();
        hopper::barrier_arrive_if(before, step > 0 && speaks);
        before = empty + 8 * at.stage;
        at.advance();
    }
    hopper::products_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        hopper::pin(sums[i]);
    hopper::barrier_arrive_if(before, speaks);
}

template <int N, bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void multiply_all(const work &w, int warpgroup, uint32_t shared,
                                             uint32_t full, uint32_t empty)
{
    place<stages<N>> at;
    float sums[N / 2];
    const int steps = share_of(w).steps;
    for_tiles<N>(w, [&](const tile &t) {
        multiply_tile<N, A_ACROSS, B_ACROSS>(steps, at, warpgroup, shared, full, empty, sums);
        finish_sums<N>(w, t, shared, sums);
    });
}

#endif

namespace {

template <int N, bool A_ACROSS, bool B_ACROSS>
__global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ work w)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const sebp_overlapping overlapping;
    __shared__ uint64_t barriers[2][stages<N>];
    uint32_t full = sebp_shared_address(barriers[0]), empty = sebp_shared_address(barriers[1]);
    uint32_t shared = sebp_shared_address(sebp_shared<char>());
    shared = (shared + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages<N>; i++) {
            hopper::barrier_make(full + 8 * i, COPIERS);
            hopper::barrier_make(empty + 8 * i, MULTIPLIERS / SEBP_WARP);
        }
    }
    __syncthreads();
    /* Told so, the compiler knows that a warp's threads are of one role. */
    int warpgroup = __shfl_sync(0xFFFFFFFFU, (int)threadIdx.x / 128, 0);
    if (warpgroup == MULTIPLIERS / 128) {
        hopper::registers_fewer<COPIER_REGISTERS>();
        copy_all<N, A_ACROSS, B_ACROSS>(w, shared, full, empty);
    } else {
        hopper::registers_more<MULTIPLIER_REGISTERS>();
        multiply_all<N, A_ACROSS, B_ACROSS>(w, warpgroup, shared, full, empty);
    }
#else
    __trap();
#endif
}

} // namespace

} // namespace matrix_unit

#endif
