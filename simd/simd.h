/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file simd.h
 * The leaf kernels: pointers in, pointers out; no allocation, no threads, no errors.
 *
 * Each kernel is written once over the vector vocabulary of vec.h and compiled once per ISA. The
 * scalar build is the specification: every other tier is tested against it.
 *
 * Sizes may be 0 and pointers need only be aligned to their element. Strides are in elements, or in
 * bytes where the name says so. A list `rows` maps the i-th row of a kernel's work to a row of the
 * matrix; NULL maps i to i.
 */
#ifndef SEBP_SIMD_H
#define SEBP_SIMD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layers.h"

/**
 * Where a GEMM's packing reads: lanes x depth of a matrix, the lanes being rows of A or columns of
 * B.
 *
 * With lanes_are_rows a memory row is a lane and its elements go along the depth (A as it is, B
 * transposed); otherwise a memory row is one step of the depth and its elements are lanes.
 */
typedef struct sebp_slab {
    const void *data;
    int64_t stride;      /* elements from one memory row to the next */
    const int64_t *rows; /* memory rows; NULL: as they lie */
    bool lanes_are_rows;
} sebp_slab;

/**
 * Writes `lanes` x `depth` elements, from lane `lane` and depth `at` on, as slivers.
 *
 * A sliver holds `width` lanes: unit (u, l) is packed[u * width + l], 4 bytes. A unit is one f32,
 * or a pair of bf16 that lie next to each other along the depth, where the kernel keeps pairs
 * (unit_elements of its shape). The last sliver's missing lanes and an odd depth's missing half are
 * zero. Slivers are `sliver_units` units apart, at least `slack` more than they hold: that far each
 * may be written past its end.
 *
 * Where step_units of the shape is more than 1, units of zeros fill a sliver up to a multiple of it,
 * and A's lie otherwise (tile_product.c): in squares of step_units lanes and units, first all squares
 * of a step, and within a square lane by lane.
 */
#define SEBP_PACK_ARGUMENTS                                                                        \
    (float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane, int64_t lanes,      \
     int64_t at, int64_t depth)
typedef void sebp_pack SEBP_PACK_ARGUMENTS;

/**
 * One tile of C, rows and cols at most those of the shape: C[i][j] (+)= the sum over u of
 * a[u][i] b[u][j].
 *
 * Packing B costs least in the tile that uses it first: with `pack_b` the tile reads B's memory
 * rows itself and leaves them packed in b, full columns only. Where b is NULL it leaves nothing: no other
 * tile reads these columns. Kernels whose step_units is more than 1 do not take NULL.
 *
 * `ahead` is what will be wanted soon: memory rows of a later tile's B, from byte ahead_at on. The
 * lines of cache that they take there are counted row by row, and `ahead_lines` of them from
 * `ahead_line` on are fetched, spread evenly over the units, as many at once would hold up the
 * tile's own loads. NULL: none.
 */
typedef struct sebp_tile_work {
    int64_t units;
    const float *a; /* a packed sliver of A */
    float *b;       /* a packed sliver of B, or room for it, or NULL */
    bool pack_b;
    const char *const
        *b_rows;  /* a memory row for each element of depth, and NULL past an odd end */
    int64_t b_at; /* bytes from the start of those rows to the tile's first column */
    const char *const *ahead;
    int64_t ahead_at, ahead_line, ahead_lines;
    float *const *c; /* a pointer for each row */
    int64_t c_at;    /* elements from there to the tile's first column */
    int64_t rows, cols;
    bool accumulate;          /* C becomes `from` + the sum, else the sum */
    const float *const *from; /* rows as C's, or C's own; with accumulate alone */
    bool stream;              /* C, 64-byte aligned, is overwritten past the caches; no bias */
    const float *bias;        /* cols numbers, added to each row; NULL: none */
} sebp_tile_work;

typedef void sebp_tile(const sebp_tile_work *work);

/**
 * One AdamW step of n elements, as optim.h has it: gain = 1 - beta, root2 = 1 / sqrt(1 - beta2^t),
 * rate = -lr / (1 - beta1^t), keep = 1 - lr weight_decay.
 */
typedef struct sebp_adamw_work {
    float beta1, gain1, beta2, gain2, root2, epsilon, rate, keep;
    const void *g;
    void *w; /* may be g, with step_alone and of one type */
    bool g_is_bf16, w_is_bf16;
    bool step_alone; /* w is not read: it becomes the step */
    float *moment1, *moment2;
    int64_t n;
} sebp_adamw_work;

enum { SEBP_RANDOM_GROUP = 64 }; /* elements whose random numbers are made together */

/** Dropout by the numbers of include/sebp/random.h: an element whose number is below p is dropped,
 * the others are multiplied by scale. */
typedef struct sebp_dropout {
    uint64_t seed, offset;
    float p, scale; /* in [0, 1); 1 / (1 - p) */
} sebp_dropout;

/**
 * A product of blocks in cache: C[i][j] (+)= sum over u of A[i][u] B[u][j], with A[i][u] at
 * a[i * a_row + u * a_unit], where a_row or a_unit is 1, and rows of B and C b_unit and c_row apart.
 *
 * Of A one row more may be read where their number is odd, and of B columns up to the next multiple
 * of shape_f32.cols; what is there does not matter.
 */
typedef struct sebp_small_product {
    int64_t rows, cols, units;
    const float *a, *b;
    int64_t a_row, a_unit, b_unit;
    float *c;
    int64_t c_row;
    bool accumulate; /* else C is overwritten; units may be 0 */
} sebp_small_product;

/**
 * A block of attention's scores, transposed: a row for a key, a lane for a query, shape_f32.cols
 * lanes. Rows are `stride` apart, and so are those of its gradient. Lane l sees row r where
 * from + r <= l < end + r.
 */
typedef struct sebp_scores {
    float *scores;
    int64_t stride;
    int64_t rows;
    int64_t from, end;    /* within +-2^20 */
    float softcap;        /* scores become softcap tanh(score / softcap); 0: they stay */
    const float *bias;    /* then added: rows x lanes; NULL: none */
    const float *dropout; /* what P is multiplied by: rows x dropout_stride; NULL: nothing */
    int64_t dropout_stride;
} sebp_scores;

enum { SEBP_MAX_TILE = 32 }; /* rows and columns of a tile, at most */

/** The tile of C that a kernel sums at once, and how its factors are packed. */
typedef struct sebp_tile_shape {
    int rows, cols;
    int slack;         /* units that a packed sliver may write past its end */
    int unit_elements; /* elements of the depth in a unit: 2 for pairs of bf16 */
    int step_units;    /* units that are multiplied at once: TILE_SIDE by a matrix unit, else 1 */
} sebp_tile_shape;

/** The kernels of one ISA, and what a GEMM must know of its tiles. */
typedef struct sebp_kernels {
    const char *isa;
    sebp_tile_shape shape_f32, shape_bf16;
    bool bf16_dots; /* the CPU multiplies bf16 itself */

#define KERNEL(result, name, arguments) result(*name) arguments;
#include "kernel_list.h"
#undef KERNEL
} sebp_kernels;

/* One of each in a build that has the tier; sebp_kernels_scalar always. */
extern const sebp_kernels sebp_kernels_scalar, sebp_kernels_avx2, sebp_kernels_avx512,
    sebp_kernels_avx512bf16, sebp_kernels_amx, sebp_kernels_neon;

#endif
