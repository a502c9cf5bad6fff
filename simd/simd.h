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
 * or a pair of bf16 that lie next to each other along the depth, where the kernel keeps pairs. The
 * last sliver's missing lanes and an odd depth's missing half are zero. Slivers are `sliver_units`
 * units apart, at least `slack` more than they hold: that far each may be written past its end.
 */
typedef void sebp_pack(float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane,
                       int64_t lanes, int64_t at, int64_t depth);

/**
 * One tile of C: rows <= tile_rows, cols <= tile_cols, C[i][j] (+)= sum over u of a[u][i] b[u][j].
 *
 * Packing B costs least in the tile that uses it first: with `pack_b` the tile reads B's memory
 * rows itself and leaves them packed in b, full columns only.
 *
 * `ahead` is what will be wanted soon: memory rows of a later tile's B, from byte ahead_at on. The
 * lines of cache that they take there are counted row by row, and `ahead_lines` of them from
 * `ahead_line` on are fetched, spread evenly over the units, as many at once would hold up the
 * tile's own loads. NULL: none.
 */
typedef struct sebp_tile_work {
    int64_t units;
    const float *a; /* a packed sliver of A */
    float *b;       /* a packed sliver of B, or room for it */
    bool pack_b;
    const char *const *b_rows; /* a memory row for each element of depth; NULL past an odd depth */
    int64_t b_at;              /* bytes from the start of those rows to the tile's first column */
    const char *const *ahead;
    int64_t ahead_at, ahead_line, ahead_lines;
    float *const *c; /* a pointer for each row */
    int64_t c_at;    /* elements from there to the tile's first column */
    int64_t rows, cols;
    bool accumulate;   /* the sum is added to C, else C is overwritten */
    bool stream;       /* C, 64-byte aligned, is overwritten past the caches; no bias */
    const float *bias; /* cols numbers, added to each row; NULL: none */
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

/** The kernels of one ISA. */
typedef struct sebp_kernels {
    const char *isa;

    /* scan.c: one row of n elements */
    bool (*any_nonzero_f32)(const float *row, int64_t n); /* any but +-0; NaN counts */
    bool (*any_nonzero_bf16)(const uint16_t *row, int64_t n);
    bool (*any_above_f32)(const float *row, int64_t n, float limit); /* |v| > limit, NaN or Inf */
    bool (*any_above_bf16)(const uint16_t *row, int64_t n, float limit);
    double (*square_sum_f32)(const float *row, int64_t n); /* in double; NaN or Inf as they come */
    double (*square_sum_bf16)(const uint16_t *row, int64_t n);

    /* Magnitudes by their bits, so that NaN and Inf are above all others: adds to *count how many
     * have bits of at least `least` < 2^31, to *above how many have more. */
    void (*count_at_least)(const float *row, int64_t n, uint32_t least, int64_t *count,
                           int64_t *above);
    /* Lists (first + i, row[i]) of each that has at least `least` <= 2^31, in order; returns how
     * many. Nothing is written behind them. */
    int64_t (*list_at_least)(const float *row, int64_t n, uint32_t least, int64_t first,
                             int64_t *indices, float *values);

    /* move.c: rows of row_bytes bytes each; strides in bytes */
    void (*move_rows)(char *to, int64_t to_stride, const int64_t *to_rows, const char *from,
                      int64_t from_stride, const int64_t *from_rows, int64_t count,
                      int64_t row_bytes); /* gather, scatter or both; no overlap */
    void (*expand_rows)(char *data, int64_t stride, const int64_t *rows, int64_t count,
                        int64_t row_bytes); /* in place: row i to rows[i] >= i, last first */
    void (*zero)(void *data, int64_t bytes, bool stream); /* stream: past the caches */
    void (*stream_fence)(void); /* after the last stream, before other threads read */

    /* convert.c */
    void (*f32_from_bf16)(float *to, const uint16_t *from, int64_t n);
    void (*bf16_from_f32)(uint16_t *to, const float *from, int64_t n); /* nearest even; NaN quiet */

    /* sum.c: sum[j] += from[rows[0]][j] + from[rows[1]][j] + ..., in this order for each j */
    void (*add_rows_f32)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                         int64_t count, int64_t cols);
    void (*add_rows_bf16)(float *sum, const uint16_t *from, int64_t stride, const int64_t *rows,
                          int64_t count, int64_t cols);

    /* step.c */
    void (*adamw)(const sebp_adamw_work *work);
    void (*scale_f32)(float *data, int64_t n, float factor); /* data *= factor */
    void (*scale_bf16)(uint16_t *data, int64_t n, float factor);

    /* sum.c: sum[j] = scale[0] * from[rows[0]][j] + scale[1] * from[rows[1]][j] + ... */
    void (*sum_scaled_rows)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                            const float *scale, int64_t count, int64_t cols);

    /* gemm.c */
    int tile_rows;
    int tile_cols;
    int slack;      /* units that a packed sliver may write past its end */
    bool bf16_dots; /* bf16 stays in pairs; else it is widened to f32 as it is packed */
    sebp_pack *pack_a_f32, *pack_a_bf16, *pack_b_f32, *pack_b_bf16;
    sebp_tile *tile_f32, *tile_bf16;
} sebp_kernels;

/* One of each in a build that has the tier; sebp_kernels_scalar always. */
extern const sebp_kernels sebp_kernels_scalar, sebp_kernels_avx2, sebp_kernels_avx512,
    sebp_kernels_avx512bf16, sebp_kernels_neon;

#endif
