/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file kernel_list.h
 * Every kernel once: its result, its name and its arguments.
 *
 * simd.h makes the table's fields of it, kernels.h the declarations of one ISA, and table.c the
 * table of one ISA. Each defines KERNEL() before it includes this file, which is why the file has
 * no guard.
 */

/* scan.c: one row of n elements */

/* Whether any is not +-0; NaN counts. */
KERNEL(bool, any_nonzero_f32, (const float *row, int64_t n))
KERNEL(bool, any_nonzero_bf16, (const uint16_t *row, int64_t n))
/* Whether any has |v| > limit, is NaN or Inf. */
KERNEL(bool, any_above_f32, (const float *row, int64_t n, float limit))
KERNEL(bool, any_above_bf16, (const uint16_t *row, int64_t n, float limit))
/* In double; NaN or Inf as they come. */
KERNEL(double, square_sum_f32, (const float *row, int64_t n))
KERNEL(double, square_sum_bf16, (const uint16_t *row, int64_t n))

/* Magnitudes by their bits, so that NaN and Inf are above all others: adds to *count how many have
 * bits of at least `min` < 2^31, to *above how many have more. */
KERNEL(void, count_at_least,
       (const float *row, int64_t n, uint32_t min, int64_t *count, int64_t *above))
/* Lists (first + i, row[i]) of each that has at least `min` <= 2^31, in order; returns how many.
 * Nothing is written behind them. */
KERNEL(int64_t, list_at_least,
       (const float *row, int64_t n, uint32_t min, int64_t first, int64_t *indices, float *values))

/* move.c: rows of row_bytes bytes each; strides in bytes */

/* Gather, scatter or both; no overlap. */
KERNEL(void, move_rows,
       (char *to, int64_t to_stride, const int64_t *to_rows, const char *from, int64_t from_stride,
        const int64_t *from_rows, int64_t count, int64_t row_bytes))
/* In place: row i goes to rows[i] >= i, last first. */
KERNEL(void, expand_rows,
       (char *data, int64_t stride, const int64_t *rows, int64_t count, int64_t row_bytes))
/* stream: past the caches. */
KERNEL(void, zero, (void *data, int64_t bytes, bool stream))
/* After the last stream, before other threads read. */
KERNEL(void, stream_fence, (void))

/* convert.c */

KERNEL(void, f32_from_bf16, (float *to, const uint16_t *from, int64_t n))
/* To nearest, ties to even; a NaN becomes a quiet one. */
KERNEL(void, bf16_from_f32, (uint16_t * to, const float *from, int64_t n))
/* Parts of n elements each whose sum is `from`: the first is `from` in bf16, to nearest, each next one
 * what is left, likewise. 1 to 3 parts; of 3 the sum is exact but for what lies below 2^-133. Returns
 * whether all parts are finite; where one is not, all of its element are whatever they are. */
KERNEL(bool, split_f32, (uint16_t *const *parts, int count, const float *from, int64_t n))

/* sum.c */

/* sum[j] += from[rows[0]][j] + from[rows[1]][j] + ..., in this order for each j. */
KERNEL(void, add_rows_f32,
       (float *sum, const float *from, int64_t stride, const int64_t *rows, int64_t count,
        int64_t cols))
KERNEL(void, add_rows_bf16,
       (float *sum, const uint16_t *from, int64_t stride, const int64_t *rows, int64_t count,
        int64_t cols))
/* sum[j] = scale[0] * from[rows[0]][j] + scale[1] * from[rows[1]][j] + ... */
KERNEL(void, sum_scaled_rows,
       (float *sum, const float *from, int64_t stride, const int64_t *rows, const float *scale,
        int64_t count, int64_t cols))

/* dots.c */

/* to[j * to_stride + i] = row rows[i] of `from`, element j, as f32: the transpose of count x cols. */
KERNEL(void, transpose_rows,
       (float *to, int64_t to_stride, const void *from, bool is_bf16, int64_t stride,
        const int64_t *rows, int64_t count, int64_t cols))
/* sums[i] = the sum of a[i][u] * b[i][u] over u < n, in f32, in an order of the ISA's, which is the same
 * for every i */
KERNEL(void, dots,
       (float *sums, const float *const *a, const float *const *b, int64_t pairs, int64_t n))

/* step.c */

KERNEL(void, adamw, (const sebp_adamw_work *work))
/* data *= factor */
KERNEL(void, scale_f32, (float *data, int64_t n, float factor))
KERNEL(void, scale_bf16, (uint16_t * data, int64_t n, float factor))

/* random.c */

/* What dropout multiplies by, 0 or scale: of the SEBP_RANDOM_GROUP elements of each group. */
KERNEL(void, dropout_scales,
       (float *scales, int64_t groups, const sebp_dropout *dropout, uint64_t group))
/* w = keep * w + d, rounded once to f32 after the product and once after the sum, then to bf16 by
 * chance (optim.h), by the numbers of `group` on, of the source's seed and offset. d NULL: 0. */
KERNEL(void, add_stochastic,
       (uint16_t * w, const float *d, int64_t n, float keep, const sebp_dropout *source,
        uint64_t group))

/* attention.c: `max`, `sum`, `factor`, `lse`, `delta` have a number for each of `lanes`, which are
 * shape_f32.cols. */

/* Scores become exp(score - the new max), then dropped out. max and sum (before dropout) grow by the
 * block; factor is what sums over exp(score - the old max) are to be multiplied by. max starts at
 * -FLT_MAX, so that a lane that sees nothing has a sum of 0. */
KERNEL(void, scores_softmax, (const sebp_scores *work, float *max, float *sum, float *factor))
/* Scores become P = exp(score - lse), then dropped out; gradient, dP as V dO^T leaves it, becomes
 * dS = P (dropout(dP) - delta), times the softcap's derivative unless of_bias. */
KERNEL(void, scores_gradient,
       (const sebp_scores *work, float *gradient, const float *lse, const float *delta,
        bool of_bias))
/* block (rows x lanes) *= factors, lane by lane */
KERNEL(void, scale_lanes, (float *block, int64_t rows, const float *factors))
/* to (rows x cols, rows <= lanes) = the transpose of block (cols x lanes), lane i, which is row i,
 * multiplied by factors[i]; of these as many are read as there are lanes. */
KERNEL(void, store_lanes,
       (void *to, bool is_bf16, int64_t stride, int64_t rows, int64_t cols, const float *block,
        int64_t block_stride, const float *factors))
/* to (rows x cols, without gaps) = from * factor */
KERNEL(void, load_rows,
       (float *to, const void *from, bool is_bf16, int64_t stride, int64_t rows, int64_t cols,
        float factor))
/* sums[i] = the sum of a[i][j] * b[i][j] over j, in f32, in an order of the ISA's */
KERNEL(void, dot_rows,
       (float *sums, const void *a, int64_t a_stride, const void *b, int64_t b_stride, bool is_bf16,
        int64_t rows, int64_t cols))

/* small_product.c */

KERNEL(void, small_product, (const sebp_small_product *work))

/* gemm.c */

KERNEL(void, pack_a_f32, SEBP_PACK_ARGUMENTS)
KERNEL(void, pack_a_bf16, SEBP_PACK_ARGUMENTS)
KERNEL(void, pack_b_f32, SEBP_PACK_ARGUMENTS)
KERNEL(void, pack_b_bf16, SEBP_PACK_ARGUMENTS)
KERNEL(void, tile_f32, (const sebp_tile_work *work))
KERNEL(void, tile_bf16, (const sebp_tile_work *work))

/* tile_product.c */

/* Before a thread's first tile_bf16. */
KERNEL(void, configure_tiles, (void))
/* After its last: it has nothing in a matrix unit any more. */
KERNEL(void, release_tiles, (void))

/* norm.c, activation.c, softmax.c, rotary.c: rows of layers (layers.h) */

KERNEL(void, norm_forward, (const sebp_norm_row *row))
KERNEL(void, norm_backward, (const sebp_norm_back_row *row))
KERNEL(void, activation_forward, (const sebp_activation_row *row))
KERNEL(void, activation_backward, (const sebp_activation_back_row *row))
/* y = x times what dropout multiplies by, from `group` on. y may be x. */
KERNEL(void, dropout,
       (void *y, const void *x, bool is_bf16, int64_t n, const sebp_dropout *how, uint64_t group))
/* y = a function of layers.h, for tests. */
KERNEL(void, elementary, (float *y, const float *x, int64_t n, int function))
/* The max of n >= 1 elements and the sum of exp(x - max), which `exps` keeps unless it is NULL; exps may
 * be x of f32. Where an element is NaN or +Inf, or all are -Inf, the sum is NaN. */
KERNEL(void, softmax_sum,
       (const void *x, bool is_bf16, int64_t n, float *max, double *sum, float *exps))
/* The sum of x - from, in double. */
KERNEL(double, row_sum, (const void *x, bool is_bf16, int64_t n, float from))
KERNEL(void, softmax, (const sebp_softmax_row *row))
KERNEL(void, rotary, (const sebp_rotary_row *row))
/* to = the sum of `count` >= 1 rows of n elements, in their order, in f32. to may be any of them. */
KERNEL(void, sum_vectors, (void *to, const void *const *from, int count, bool is_bf16, int64_t n))
