/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file product.h
 * The kernels behind a product: one on the cores that all arithmetic has, for every dtype and
 * alignment, and one on the tensor cores, for bf16 and TF32. Both gather listed rows as they load, and
 * scatter as they store.
 *
 * Where there are fewer tiles of C than blocks that the GPU can run at once, the depth is split:
 * each share of it is summed by a block of its own, and the last one of a tile adds the shares, in
 * their order. So results do not depend on which block is the last.
 */
#ifndef SEBP_CUDA_PRODUCT_H
#define SEBP_CUDA_PRODUCT_H

#include "cublas.h"
#include "cuda.h"

SEBP_BEGIN_DECLS

/** How a product is cut: tiles of C, and shares of the depth. */
typedef struct sebp_cuda_cut {
    int64_t tiles_down, tiles_across;
    int64_t shares;      /* of the depth, >= 1 */
    int64_t share_depth; /* a multiple of the kernel's step, but for the last one */
} sebp_cuda_cut;

/** Chooses the shares: `slots` blocks run at once, and a share has at least `min_depth` of the depth. */
sebp_cuda_cut sebp_cuda_cut_product(const sebp_product *product, int64_t tile_rows,
                                    int64_t tile_cols, int64_t step, int64_t slots,
                                    int64_t min_depth);

/** Bytes of scratch memory for the partial sums of a cut, and for the counters of its tiles, which
 * come first. */
int64_t sebp_cuda_counter_bytes(const sebp_cuda_cut *cut);
int64_t sebp_cuda_cut_bytes(const sebp_cuda_cut *cut, int64_t tile_elements);

/** Before a run: no share of any tile has been summed. */
sebp_status sebp_cuda_clear_counters(sebp_cuda *cuda, const sebp_cuda_cut *cut, void *scratch);

/* plain_product.cu: sums in f32, of either dtype, anywhere in memory */

/** Tiles of C and their slices: blocks take as many of them each, tile by tile. */
typedef struct sebp_plain_cut {
    int kind; /* of tiles */
    int64_t tiles_down, tiles_across;
    int64_t steps;  /* slices of the depth, >= 1 */
    int64_t blocks; /* no more than slices of all tiles */
} sebp_plain_cut;

sebp_plain_cut sebp_cuda_cut_plain(const sebp_cuda *cuda, const sebp_product *product);
int64_t sebp_cuda_plain_bytes(const sebp_plain_cut *cut);

/** Makes a cut do without scratch memory: a block for each tile. */
void sebp_cuda_plain_whole(sebp_plain_cut *cut);
sebp_status sebp_cuda_run_plain(sebp_cuda *cuda, const sebp_product *product,
                                const sebp_plain_cut *cut, void *scratch);

/** Whether a product of f32 matrices may be one of TF32: see sebp_precision. */
static inline bool sebp_cuda_takes_tf32(const sebp_product *product)
{
    return product->a.dtype == SEBP_F32 && product->b.dtype == SEBP_F32 &&
           (product->precision == SEBP_PRECISION_HIGH ||
            product->precision == SEBP_PRECISION_MEDIUM);
}

/* tensor_product.cu: bf16, or f32 as TF32, of which rows begin at multiples of 16 bytes */

bool sebp_cuda_takes_tensor(const sebp_product *product);
sebp_cuda_cut sebp_cuda_cut_tensor(const sebp_cuda *cuda, const sebp_product *product);
int64_t sebp_cuda_tensor_bytes(const sebp_cuda_cut *cut);
sebp_status sebp_cuda_run_tensor(sebp_cuda *cuda, const sebp_product *product,
                                 const sebp_cuda_cut *cut, void *scratch);

/* gathered_product.c: f32 of listed rows, by cuBLASLt */

/** False where it takes longer than the library's own kernels, or does not fit. */
bool sebp_cuda_plan_gathered(sebp_cuda *cuda, const sebp_product *product, sebp_cublas_plan *plan,
                             int64_t *scratch_bytes);
sebp_status sebp_cuda_run_gathered(sebp_cuda *cuda, const sebp_product *product,
                                   const sebp_cublas_plan *plan, void *scratch);

SEBP_END_DECLS

#endif
