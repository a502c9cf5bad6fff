/* SPDX-License-Identifier: Apache-2.0 */
/** @file product.h The two ways to do products on a CPU: each plans a product, then runs it. */
#ifndef SEBP_CPU_PRODUCT_H
#define SEBP_CPU_PRODUCT_H

#include "packing.h"

/* gemm_plan.c and gemm.c: the library's own. */

/** A copy of B that is kept (packed.c). */
typedef struct sebp_packed_copy sebp_packed_copy;

enum { SEBP_COPIED_SLIVERS = 4 /* packed at once into a copy */ };

/** A product, and how it is cut. */
typedef struct sebp_native_plan {
    const sebp_product *product;
    const sebp_kernels *kernels;
    sebp_tile *tile;
    const sebp_tile_shape *shape;
    bool by_bf16; /* the tile's factors are bf16 */
    sebp_packing a, b;
    sebp_term terms[SEBP_MAX_TERMS];
    int term_count;
    int64_t units;          /* at most, to a block of the depth */
    sebp_packed_copy *copy; /* of B, kept; NULL: none, B is packed in scratch memory */
    bool in_blocks;         /* C is summed in f32 blocks of scratch memory */
    bool stream;            /* C is written past the caches */
    int64_t grid_m, grid_n;
    int64_t panel;   /* rows of A to a packed panel */
    int64_t block_m; /* rows to a block of C */
    int64_t block_n; /* columns to a block of B and of C */
    int64_t b_group; /* slivers of B that are packed at a time */
    int64_t workers;
    int64_t worker_bytes;
} sebp_native_plan;

/** m, n >= 1. `product` must stay where it is as long as the plan is used. What the plan needs is
 * within the bound of the workspace. */
void sebp_native_plan_product(const sebp_cpu *cpu, const sebp_product *product,
                              sebp_arithmetic arithmetic, sebp_native_plan *plan);
/** Scratch bytes. */
int64_t sebp_native_scratch(const sebp_native_plan *plan);

/** The scratch memory of one worker. */
typedef struct sebp_native_room {
    float *packed_a, *packed_b;  /* a panel of A; a block or a group of slivers of B, unless a
                                    copy of B is kept */
    float *c;                    /* an f32 block of C; NULL: C is summed in place */
    float *bias;                 /* of a block's columns, as f32 */
    const char **b_rows;         /* of the block of the depth at hand, where they are its steps */
    float **c_rows;              /* of the panel at hand: column 0 of C, or of its f32 block */
    const float **residual_rows; /* the same of the residual, where C has no f32 block */
    bool *a_is_finite, *b_is_finite; /* of each sliver; NULL where it is not checked */
    void *converted;                 /* rows that are converted as they are packed */
} sebp_native_room;

/** Lays them out in a worker's scratch memory, and returns its bytes; NULL: it only counts. */
int64_t sebp_native_lay_out(const sebp_native_plan *plan, char *scratch, sebp_native_room *room);
/** Floats from one row of a block of C to the next: an odd number of cache lines, as rows a power of
 * two apart would compete for the same few places of a cache. */
int64_t sebp_native_block_stride(const sebp_native_plan *plan);
void sebp_native_product(sebp_cpu *cpu, const sebp_native_plan *plan, void *scratch);

/* packed.c */

/** The copy of B that a product can use, or room for it; NULL: neither. Of the plan all must be settled but
 * the sizes of grid and blocks. */
sebp_packed_copy *sebp_cpu_find_copy(const sebp_native_plan *plan);
/** Fills plan->copy, unless it is filled. */
void sebp_cpu_fill_copy(sebp_cpu *cpu, const sebp_native_plan *plan, void *scratch);
bool sebp_cpu_copy_is_filled(const sebp_packed_copy *copy);
/** A product has packed all its slivers. */
void sebp_cpu_mark_copy_filled(sebp_packed_copy *copy);
/** Its sliver of column j and of the block of the depth that begins at `at`; whether that is finite, or NULL
 * where that is not checked. */
float *sebp_cpu_copy_sliver(const sebp_native_plan *plan, int64_t at, int64_t j);
bool *sebp_cpu_copy_finite(const sebp_native_plan *plan, int64_t at, int64_t j);

/* onednn.c: oneDNN's; only in a build with it. */

/** How a product is cut to fit the scratch memory. */
typedef struct sebp_onednn_plan {
    int64_t rows;      /* gathered rows to a panel */
    int64_t row_bytes; /* scratch for one of them: of A, of B and of C */
    bool panels_of_k;  /* the gathered rows are steps of the depth; else rows of A and C */
    bool expand;       /* C is made compact in its own first rows, then expanded */
    bool scatter;      /* C is made in scratch memory, then moved */
} sebp_onednn_plan;

/** NULL if oneDNN can do the product, else the path taken instead and why: "native:workspace". */
const char *sebp_onednn_plan_product(const sebp_cpu *cpu, const sebp_product *product,
                                     sebp_onednn_plan *plan);
/** Scratch bytes. */
int64_t sebp_onednn_scratch(const sebp_onednn_plan *plan);
/** On error *why says what it was. */
sebp_status sebp_onednn_product(sebp_cpu *cpu, const sebp_product *product,
                                const sebp_onednn_plan *plan, void *scratch, const char **why);

#endif
