/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gemm.c
 * The library's own matrix product: packs straight from gathered rows, writes straight to scattered
 * ones, so that compacting rows costs nothing beside the product.
 *
 * C is cut into a grid of chunks, a few to a worker, which takes the next one when it is done with one.
 * Within a chunk
 *
 *     for each block of C (all of it, or a part that is summed in scratch memory)
 *       for each block of the depth
 *         for each panel of A: pack it (it stays in L2)
 *           for each sliver of B: with the first panel pack it, or the group that it begins, unless a
 *             copy of B is kept; run the panel's tiles
 *
 * C is summed in scratch memory if it is bf16, so that it is rounded once, or large and added to for
 * many blocks of the depth: its own rows may lie a multiple of 4 KiB apart, where they drive each
 * other out of the caches. A large C that is written just once goes past the caches.
 *
 * Every element of C is summed in an order that depends on k alone, never on the chunk or the
 * worker it falls to: the same bits for every number of threads and every bound of the workspace. In
 * products of parts there is one exception: beside a row that holds NaN or Inf, the other rows of its
 * sliver are summed in f32, too.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdatomic.h>
#include <string.h>

#include "epilogue.h"
#include "product.h"
#include "row_work.h"

enum { FINISH_COLS = 256 /* columns of a panel of C that are in L2 when the epilogue comes */ };

/* A product being done. */
typedef struct native_run {
    const sebp_native_plan *plan;
    char *scratch;
    _Atomic int64_t next_chunk; /* of those that no worker has begun */
    bool b_is_packed;           /* the whole of B */
} native_run;

/* Part `index` of `whole` cut into `count` even parts at multiples of `multiple`. */
static int64_t cut(int64_t whole, int64_t count, int64_t index, int64_t multiple)
{
    return sebp_min(whole, sebp_div_ceil(whole, multiple) * index / count * multiple);
}

/* A block of C being summed: rows [m0, m1) and columns [n0, n1) of the product. */
typedef struct c_block {
    int64_t m0, m1, n0, n1;
    bool b_is_packed;
    sebp_native_room room; /* of the worker */
    const float *bias;     /* for columns n0 on; or NULL */
} c_block;

static void list_c_rows(const sebp_native_plan *plan, const c_block *block, int64_t i0, int64_t i1)
{
    const sebp_product *product = plan->product;
    for (int64_t i = i0; i < i1; i++) {
        if (block->room.c != NULL) {
            block->room.c_rows[i - i0] =
                block->room.c + (i - block->m0) * sebp_native_block_stride(plan);
        } else {
            block->room.c_rows[i - i0] =
                sebp_product_row(product, product->c, product->c_stride, i, 0);
            if (product->residual != NULL) {
                block->room.residual_rows[i - i0] =
                    sebp_product_row(product, product->residual, product->residual_stride, i, 0);
            }
        }
    }
}

/* Whether tiles read the memory rows of B, and pack them on the way. */
static bool reads_b_rows(const sebp_native_plan *plan)
{
    bool reads_bf16 = plan->b.dtype == SEBP_BF16;
    return !plan->b.slab.lanes_are_rows && sebp_packs_straight(&plan->b) &&
           reads_bf16 == plan->by_bf16;
}

/* Whether the first tile of a sliver packs it on the way, of `rows` rows of A. That tile is computed whole,
 * so it does not pay where the rows fill less than half of it. Nor does it for pairs of bf16, of which two
 * memory rows are woven into one, unless a matrix unit multiplies meanwhile. */
static bool packs_in_tile(const sebp_native_plan *plan, int64_t rows)
{
    const sebp_tile_shape *shape = plan->shape;
    bool weaves = shape->unit_elements > 1 && shape->step_units == 1;
    return reads_b_rows(plan) && 2 * rows > shape->rows && !weaves;
}

/* Whether no other tile reads a sliver, so that it need not be packed: the block has rows for one tile, and
 * no copy is made. */
static bool needs_no_packing(const sebp_native_plan *plan, const c_block *block)
{
    return reads_b_rows(plan) && plan->shape->unit_elements == 1 && plan->copy == NULL &&
           block->m1 - block->m0 <= plan->shape->rows;
}

/* The sum of the terms: the first as `work` says, the others added to it. */
static void run_terms(const sebp_native_plan *plan, const sebp_tile_work *work)
{
    plan->tile(work);
    if (plan->term_count == 1)
        return;
    sebp_tile_work more = *work;
    more.accumulate = true;
    more.pack_b = false;
    more.ahead = NULL;
    more.from = (const float *const *)work->c;
    more.bias = NULL;
    for (int i = 1; i < plan->term_count; i++) {
        more.a = work->a + plan->terms[i].a * plan->a.part_units;
        more.b = work->b + plan->terms[i].b * plan->b.part_units;
        plan->tile(&more);
    }
}

/* The same where a part is NaN or Inf, of which products of parts would make NaN alone: as f32 has it.
 * The tile is that of row i and column j of the product, and `depth` elements from `at` on. */
static void run_in_f32(const sebp_native_plan *plan, const sebp_tile_work *work, int64_t i,
                       int64_t j, int64_t at, int64_t depth)
{
    enum { STEPS = 64 };
    float sums[SEBP_MAX_TILE][SEBP_MAX_TILE];
    float a[SEBP_MAX_TILE][STEPS], b[STEPS][SEBP_MAX_TILE];
    for (int64_t r = 0; r < work->rows; r++) {
        for (int64_t col = 0; col < work->cols; col++) {
            sums[r][col] = work->accumulate ? work->from[r][work->c_at + col] : 0;
            if (work->bias != NULL)
                sums[r][col] += work->bias[col];
        }
    }
    for (int64_t first = at; first < at + depth; first += STEPS) {
        const int64_t steps = sebp_min(STEPS, at + depth - first);
        for (int64_t k = 0; k < steps; k++) {
            for (int64_t r = 0; r < work->rows; r++)
                a[r][k] = sebp_packing_element(&plan->a, i + r, first + k);
            for (int64_t col = 0; col < work->cols; col++)
                b[k][col] = sebp_packing_element(&plan->b, j + col, first + k);
        }
        for (int64_t r = 0; r < work->rows; r++) {
            for (int64_t k = 0; k < steps; k++) {
                for (int64_t col = 0; col < work->cols; col++)
                    sums[r][col] += a[r][k] * b[k][col];
            }
        }
    }
    for (int64_t r = 0; r < work->rows; r++)
        memcpy(work->c[r] + work->c_at, sums[r], (size_t)work->cols * sizeof(float));
}

/* Whether the sliver of column j0 is finite: where that is noted as it is packed. NULL: nowhere. */
static bool *finite_flag(const sebp_native_plan *plan, const c_block *block, int64_t j0, int64_t at)
{
    if (plan->copy != NULL)
        return sebp_cpu_copy_finite(plan, at, j0);
    return block->room.b_is_finite != NULL
               ? block->room.b_is_finite + (j0 - block->n0) / plan->shape->cols
               : NULL;
}

/* Packs B from column j0 on, where that begins a group of slivers. */
static void pack_group(const sebp_native_plan *plan, const c_block *block, int64_t j0,
                       float *sliver, int64_t at, int64_t depth)
{
    if ((j0 - block->n0) / plan->shape->cols % plan->b_group != 0)
        return;
    const int64_t cols = sebp_min(plan->b_group * plan->shape->cols, block->n1 - j0);
    sebp_pack_lanes(plan->kernels, &plan->b, sliver, j0, cols, at, depth,
                    finite_flag(plan, block, j0, at), block->room.converted);
}

/* Runs the tiles of one packed panel of A, rows [i0, i1), against the sliver of B that begins at
 * column j0. The first panel also packs the sliver, unless that has been done, and prefetches the rows
 * of the next one. */
static void run_panel(const sebp_native_plan *plan, const c_block *block, int64_t i0, int64_t i1,
                      int64_t j0, float *sliver, int64_t at, int64_t depth)
{
    const sebp_tile_shape *shape = plan->shape;
    const sebp_product *product = plan->product;
    int64_t bytes = (int64_t)sebp_dtype_bytes(product->b.dtype);
    int64_t cols = sebp_min(shape->cols, block->n1 - j0);
    bool packs = i0 == block->m0 && !block->b_is_packed, reads_rows = reads_b_rows(plan);
    bool adds_residual = product->residual != NULL && at == 0;
    bool *b_is_finite = finite_flag(plan, block, j0, at);
    const bool is_whole = cols == shape->cols;
    sebp_tile_work work = {
        .units = sebp_div_ceil(depth, plan->shape->unit_elements),
        .a = block->room.packed_a,
        .b = is_whole && needs_no_packing(plan, block) ? NULL : sliver,
        .b_rows = block->room.b_rows,
        .b_at = j0 * bytes,
        .c = block->room.c_rows,
        .c_at = block->room.c != NULL ? j0 - block->n0 : j0,
        .cols = cols,
        .accumulate = at > 0 || product->accumulate || adds_residual,
        .from = adds_residual && block->room.c == NULL ? block->room.residual_rows
                                                       : (const float *const *)block->room.c_rows,
        .stream = plan->stream,
        .bias = at == 0 && block->bias != NULL ? block->bias + (j0 - block->n0) : NULL,
    };
    work.pack_b = packs && is_whole && (work.b == NULL || packs_in_tile(plan, i1 - i0)) &&
                  (block->room.a_is_finite == NULL || block->room.a_is_finite[0]);
    if (packs && !work.pack_b)
        pack_group(plan, block, j0, sliver, at, depth);
    int64_t tile = 0, tiles = sebp_div_ceil(i1 - i0, shape->rows), lines = 0;
    if (packs && reads_rows && j0 + 2 * shape->cols <= block->n1) {
        work.ahead = block->room.b_rows;
        work.ahead_at = work.b_at + shape->cols * bytes;
        lines = depth * sebp_div_ceil(shape->cols * bytes, 64);
    }
    for (int64_t i = i0; i < i1; i += shape->rows, tile++) {
        work.rows = sebp_min(shape->rows, i1 - i);
        work.ahead_line = lines * tile / tiles;
        work.ahead_lines = lines * (tile + 1) / tiles - work.ahead_line;
        bool is_finite = (b_is_finite == NULL || *b_is_finite) &&
                         (block->room.a_is_finite == NULL || block->room.a_is_finite[tile]);
        if (!is_finite)
            run_in_f32(plan, &work, i, j0, at, depth);
        else
            run_terms(plan, &work);
        work.a += plan->a.sliver_units;
        work.c += shape->rows;
        work.from += shape->rows;
        work.pack_b = false;
    }
}

static void list_b_rows(const sebp_native_plan *plan, const c_block *block, int64_t at,
                        int64_t depth)
{
    const sebp_slab *slab = &plan->b.slab;
    if (block->b_is_packed || !reads_b_rows(plan))
        return;
    int64_t row_bytes = slab->stride * (int64_t)sebp_dtype_bytes(plan->b.dtype);
    for (int64_t k = 0; k < depth; k++) {
        int64_t row = slab->rows != NULL ? slab->rows[at + k] : at + k;
        block->room.b_rows[k] = (const char *)slab->data + row * row_bytes;
    }
    block->room.b_rows[depth] = NULL;
}

/* Where the sliver of column j0 is, or will be: in the copy, or in scratch memory. There, with one panel,
 * the next group of slivers takes the place of this one, which stays in cache. */
static float *sliver_of(const sebp_native_plan *plan, const c_block *block, int64_t j0, int64_t at)
{
    int64_t index = (j0 - block->n0) / plan->shape->cols;
    if (plan->copy != NULL)
        return sebp_cpu_copy_sliver(plan, at, j0);
    if (block->m1 - block->m0 <= plan->panel)
        index %= plan->b_group;
    return block->room.packed_b + index * plan->b.sliver_units;
}

/* Sums a block over the whole depth. */
static void sum_block(const sebp_native_plan *plan, const c_block *block)
{
    const sebp_tile_shape *shape = plan->shape;
    int64_t k = plan->product->k, k_block = plan->units * plan->shape->unit_elements;
    for (int64_t at = 0; at < k; at += k_block) {
        int64_t depth = sebp_min(k_block, k - at);
        list_b_rows(plan, block, at, depth);
        for (int64_t i0 = block->m0; i0 < block->m1; i0 += plan->panel) {
            int64_t i1 = sebp_min(i0 + plan->panel, block->m1);
            list_c_rows(plan, block, i0, i1);
            sebp_pack_lanes(plan->kernels, &plan->a, block->room.packed_a, i0, i1 - i0, at, depth,
                            block->room.a_is_finite, block->room.converted);
            int64_t finished = at + depth < k || block->room.c != NULL ? block->n1 : block->n0;
            for (int64_t j0 = block->n0; j0 < block->n1; j0 += shape->cols) {
                float *sliver = sliver_of(plan, block, j0, at);
                run_panel(plan, block, i0, i1, j0, sliver, at, depth);
                int64_t j1 = sebp_min(j0 + shape->cols, block->n1);
                if (j1 - finished >= FINISH_COLS || (j1 == block->n1 && finished < j1)) {
                    sebp_cpu_finish(plan->kernels, plan->product, i0, i1, finished, j1);
                    finished = j1;
                }
            }
        }
    }
}

/* Loads C, or the residual, into C's f32 block. */
static void load_block(const sebp_native_plan *plan, const c_block *block)
{
    const sebp_product *product = plan->product;
    bool adds_residual = product->residual != NULL;
    const void *data = adds_residual ? product->residual : product->c;
    int64_t stride = adds_residual ? product->residual_stride : product->c_stride;
    for (int64_t i = block->m0; i < block->m1; i++) {
        sebp_cpu_widen(plan->kernels,
                       block->room.c + (i - block->m0) * sebp_native_block_stride(plan),
                       sebp_product_row(product, data, stride, i, block->n0), product->c_dtype,
                       block->n1 - block->n0);
    }
}

static void store_block(const sebp_native_plan *plan, const c_block *block)
{
    const sebp_product *product = plan->product;
    for (int64_t i = block->m0; i < block->m1; i++) {
        sebp_cpu_narrow(plan->kernels,
                        sebp_product_row(product, product->c, product->c_stride, i, block->n0),
                        block->room.c + (i - block->m0) * sebp_native_block_stride(plan),
                        product->c_dtype, block->n1 - block->n0);
        sebp_cpu_finish(plan->kernels, product, i, i + 1, block->n0, block->n1);
    }
}

static void run_chunk(const native_run *run, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                      char *scratch)
{
    const sebp_native_plan *plan = run->plan;
    const sebp_product *product = plan->product;
    c_block block;
    sebp_native_lay_out(plan, scratch, &block.room);
    for (int64_t m = m0; m < m1; m += plan->block_m) {
        for (int64_t n = n0; n < n1; n += plan->block_n) {
            block.m0 = m;
            block.m1 = sebp_min(m + plan->block_m, m1);
            block.n0 = n;
            block.n1 = sebp_min(n + plan->block_n, n1);
            block.b_is_packed = run->b_is_packed || (plan->copy != NULL && m > m0);
            block.bias = product->bias != NULL ? (const float *)product->bias + n : NULL;
            if (product->bias != NULL && product->bias_dtype == SEBP_BF16) {
                plan->kernels->f32_from_bf16(block.room.bias, (const uint16_t *)product->bias + n,
                                             block.n1 - n);
                block.bias = block.room.bias;
            }
            if (block.room.c != NULL && (product->accumulate || product->residual != NULL))
                load_block(plan, &block);
            sum_block(plan, &block);
            if (block.room.c != NULL)
                store_block(plan, &block);
        }
    }
}

/* A worker begins with a chunk of its own, the same in each call of the kind, so that its caches may
 * still hold some of it. Then it takes whichever is next: threads differ in speed. */
static void run_worker(void *work, int64_t worker)
{
    native_run *run = work;
    const sebp_native_plan *plan = run->plan;
    const sebp_product *product = plan->product;
    const int64_t chunks = plan->grid_m * plan->grid_n;
    if (plan->by_bf16)
        plan->kernels->configure_tiles();
    for (int64_t chunk = worker; chunk < chunks; chunk = atomic_fetch_add(&run->next_chunk, 1)) {
        int64_t i = chunk / plan->grid_n, j = chunk % plan->grid_n;
        run_chunk(run, cut(product->m, plan->grid_m, i, plan->shape->rows),
                  cut(product->m, plan->grid_m, i + 1, plan->shape->rows),
                  cut(product->n, plan->grid_n, j, plan->shape->cols),
                  cut(product->n, plan->grid_n, j + 1, plan->shape->cols),
                  run->scratch + worker * plan->worker_bytes);
    }
    if (plan->by_bf16)
        plan->kernels->release_tiles();
    if (plan->stream)
        plan->kernels->stream_fence();
}

/* k = 0: a product that adds nothing. Each row becomes the bias, the residual, their sum or zero, or
 * stays. */
static void fill_rows(const sebp_kernels *kernels, const sebp_product *product)
{
    enum { COLS = 256 };
    const int64_t bias_bytes = (int64_t)sebp_dtype_bytes(product->bias_dtype);
    float sum[COLS], added[COLS];
    for (int64_t i = 0; i < product->m && !product->accumulate; i++) {
        for (int64_t j = 0; j < product->n; j += COLS) {
            int64_t n = sebp_min(COLS, product->n - j);
            memset(sum, 0, sizeof sum);
            if (product->residual != NULL) {
                const void *from =
                    sebp_product_row(product, product->residual, product->residual_stride, i, j);
                sebp_cpu_widen(kernels, sum, from, product->c_dtype, n);
            }
            if (product->bias != NULL) {
                sebp_cpu_widen(kernels, added, (const char *)product->bias + j * bias_bytes,
                               product->bias_dtype, n);
                kernels->add_rows_f32(sum, added, n, NULL, 1, n);
            }
            sebp_cpu_narrow(kernels, sebp_product_row(product, product->c, product->c_stride, i, j),
                            sum, product->c_dtype, n);
            sebp_cpu_finish(kernels, product, i, i + 1, j, j + n);
        }
    }
}

void sebp_native_product(sebp_cpu *cpu, const sebp_native_plan *plan, void *scratch)
{
    native_run run = {plan, scratch, plan->workers, false};
    if (plan->product->k == 0) {
        fill_rows(cpu->kernels, plan->product);
        return;
    }
    if (plan->copy != NULL && plan->grid_m > 1) /* else each chunk makes its part */
        sebp_cpu_fill_copy(cpu, plan, scratch);
    run.b_is_packed = plan->copy != NULL && sebp_cpu_copy_is_filled(plan->copy);
    sebp_cpu_parallel(cpu, plan->workers, run_worker, &run);
    if (plan->copy != NULL)
        sebp_cpu_mark_copy_filled(plan->copy);
}
