/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gemm.c
 * The library's own matrix product: packs straight from gathered rows, writes straight to scattered
 * ones, so that compacting rows costs nothing beside the product.
 *
 * C is cut into a grid of chunks, one for each worker at a time. Within a chunk
 *
 *     for each block of C (all of it, or a part that is summed in scratch memory)
 *       for each block of the depth
 *         for each panel of A: pack it (it stays in L2)
 *           for each sliver of B: pack it with the first panel; run the panel's tiles
 *
 * C is summed in scratch memory if it is bf16, so that it is rounded once, or large and added to for
 * many blocks of the depth: its own rows may lie a multiple of 4 KiB apart, where they drive each
 * other out of the caches. A large C that is written just once goes past the caches.
 *
 * Every element of C is summed in an order that depends on k alone, never on the chunk or the
 * worker it falls to: the same bits for every number of threads and every bound of the workspace.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "epilogue.h"
#include "product.h"
#include "row_work.h"

enum {
    NARROW = 16,     /* columns of a narrow tile */
    A_SHARE_NUM = 3, /* of L2 for a packed panel of A */
    A_SHARE_DEN = 8,
    B_BYTES = 6 << 20, /* packed B of one worker: it streams from L3 */
    ROUNDS = 2,        /* chunks to a worker at most */
    FINISH_COLS = 256  /* columns of a panel of C that are in L2 when the epilogue comes */
};

/* How large blocks are, which depends on the tiles. */
typedef struct blocking {
    int64_t k_block; /* units of depth at most */
    int64_t k_whole; /* but this depth is one block, so that C is written once */
    int64_t c_bytes; /* f32 block of C of one worker */
    int64_t c_cols;  /* columns of it at most */
    int packing;     /* packing an element costs about as much as so many multiply-adds */
} blocking;

/* A sliver of 14 rows of A takes 28 KiB. */
static const blocking by_wide_tiles = {512, 768, 4 << 20, INT64_MAX, 24};

/* They read more of B for each multiply-add, and are faster where a sliver of B, 24 KiB, leaves room
 * in L1. */
static const blocking by_narrow_tiles = {384, 512, 4 << 20, INT64_MAX, 24};

/* A matrix unit: AMX does 2048 flop a cycle. A step of 32 x 32 x 32 takes 64 cycles, and reads 2 KiB
 * of A and as much of B. L2 gives fewer than 64 bytes a cycle, so it can feed one of them: A's panel
 * lies there, and B's sliver, 256 units or 32 KiB, stays in an L1 of 48. A deeper one would write C
 * less often (each time is 4 KiB read and written, for 16 steps), but read both factors from L2. C's
 * block shares an L2 of 2 MiB with A's panel, and is near to a square, as A is packed again for each
 * block of columns and B for each block of rows. */
static const blocking by_matrix_unit = {256, 256, 1 << 20, 512, 96};

/* A product being done. */
typedef struct native_run {
    const sebp_native_plan *plan;
    char *scratch;
} native_run;

/* Part `index` of `whole` cut into `count` even parts at multiples of `multiple`. */
static int64_t cut(int64_t whole, int64_t count, int64_t index, int64_t multiple)
{
    return sebp_min(whole, sebp_div_ceil(whole, multiple) * index / count * multiple);
}

/* Units from the start of one packed sliver of `width` lanes to the next. */
static int64_t sliver_units(const sebp_native_plan *plan, int64_t width)
{
    int64_t units = sebp_round_up(plan->units, plan->shape->step_units);
    return sebp_round_up(units * width + plan->shape->slack, 16);
}

static const blocking *blocking_of(const sebp_tile_shape *shape)
{
    if (shape->step_units > 1)
        return &by_matrix_unit;
    return shape->cols <= NARROW ? &by_narrow_tiles : &by_wide_tiles;
}

/* Chooses the grid that gives the busiest worker the smallest amount of work: computing its tiles,
 * and packing A for every column of chunks and B for every row of them. */
static void choose_grid(sebp_native_plan *plan, int64_t threads)
{
    const int packing = blocking_of(plan->shape)->packing;
    int64_t rows = sebp_div_ceil(plan->product->m, plan->shape->rows);
    int64_t cols = sebp_div_ceil(plan->product->n, plan->shape->cols);
    double best = 0;
    for (int64_t grid_m = 1; grid_m <= sebp_min(rows, ROUNDS * threads); grid_m++) {
        for (int64_t grid_n = 1; grid_n <= cols && grid_m * grid_n <= ROUNDS * threads; grid_n++) {
            double m = (double)(sebp_div_ceil(rows, grid_m) * plan->shape->rows);
            double n = (double)(sebp_div_ceil(cols, grid_n) * plan->shape->cols);
            double cost =
                (double)sebp_div_ceil(grid_m * grid_n, threads) * (m * n + packing * (m + n));
            if (best == 0 || cost < best) {
                best = cost;
                plan->grid_m = grid_m;
                plan->grid_n = grid_n;
            }
        }
    }
}

static int64_t packed_a_bytes(const sebp_native_plan *plan)
{
    return sebp_div_ceil(plan->panel, plan->shape->rows) * sliver_units(plan, plan->shape->rows) *
           plan->a.parts * 4;
}

static int64_t packed_b_bytes(const sebp_native_plan *plan)
{
    return sebp_div_ceil(plan->block_n, plan->shape->cols) * sliver_units(plan, plan->shape->cols) *
           plan->b.parts * 4;
}

/* Room for rows that are converted as they are packed. */
static int64_t room_bytes(const sebp_native_plan *plan)
{
    int64_t depth = plan->units * plan->shape->unit_elements;
    int64_t of_a = sebp_packing_room(&plan->a, plan->panel, depth);
    return sebp_round_up(sebp_max(of_a, sebp_packing_room(&plan->b, plan->shape->cols, depth)), 64);
}

/* Whether the slivers of a panel of A, or of a block of B, have finite parts. */
static int64_t tame_bytes(const sebp_packing *how, int64_t lanes)
{
    return how->is_checked ? sebp_round_up(sebp_div_ceil(lanes, how->width), 64) : 0;
}

/* Floats from one row of a block of C to the next: an odd number of cache lines, as rows a power of
 * two apart would compete for the same few places of a cache. */
static int64_t block_stride(const sebp_native_plan *plan)
{
    return sebp_round_up(plan->block_n, 32) + 16;
}

static int64_t block_c_bytes(const sebp_native_plan *plan)
{
    return plan->in_blocks ? sebp_round_up(plan->block_m * block_stride(plan) * 4, 64) : 0;
}

/* Room for the bias of a block's columns as f32. */
static int64_t bias_bytes(const sebp_native_plan *plan)
{
    return sebp_round_up(plan->block_n * 4, 64);
}

/* Pointers to the memory rows of B in a block of the depth, and one past an odd end. */
static int64_t b_rows_bytes(const sebp_native_plan *plan)
{
    return sebp_round_up((plan->units * plan->shape->unit_elements + 1) * (int64_t)sizeof(char *),
                         64);
}

/* Pointers to the rows of C that a panel adds to. */
static int64_t c_rows_bytes(const sebp_native_plan *plan)
{
    return sebp_round_up(plan->panel * (int64_t)sizeof(float *), 64);
}

static int64_t worker_bytes(const sebp_native_plan *plan)
{
    return packed_a_bytes(plan) + packed_b_bytes(plan) + block_c_bytes(plan) + bias_bytes(plan) +
           b_rows_bytes(plan) + 2 * c_rows_bytes(plan) + room_bytes(plan) +
           tame_bytes(&plan->a, plan->panel) + tame_bytes(&plan->b, plan->block_n);
}

/* Whether an f32 C that is written once can be written past the caches: it is large, its vectors
 * are aligned, and nothing of it is read. In any other case a tile would have to fetch what it
 * overwrites. */
static bool can_stream(const sebp_cpu *cpu, const sebp_product *product)
{
    return product->c_dtype == SEBP_F32 && !product->accumulate && product->bias == NULL &&
           product->residual == NULL && !sebp_has_epilogue(product) &&
           (uintptr_t)product->c % 64 == 0 && product->c_stride % 16 == 0 &&
           sebp_cpu_streams(cpu, product->m * product->n * 4);
}

/* Sizes the blocks: first by the caches, then down to the workspace's bound. */
static void size_blocks(sebp_native_plan *plan, const sebp_cpu *cpu)
{
    const sebp_product *product = plan->product;
    const sebp_tile_shape *shape = plan->shape;
    int64_t units = sebp_div_ceil(product->k, plan->shape->unit_elements);
    const blocking *of_shape = blocking_of(shape);
    plan->units = units;
    if (units > of_shape->k_whole) { /* in blocks of one size */
        plan->units = sebp_round_up(sebp_div_ceil(units, sebp_div_ceil(units, of_shape->k_block)),
                                    shape->step_units);
    }
    int64_t threads = sebp_cpu_threads(cpu);
    choose_grid(plan, threads);
    int64_t chunk_m = sebp_round_up(sebp_div_ceil(product->m, plan->grid_m), shape->rows);
    int64_t chunk_n = sebp_round_up(sebp_div_ceil(product->n, plan->grid_n), shape->cols);

    int64_t a_bytes = (int64_t)cpu->topology.l2_bytes * A_SHARE_NUM / A_SHARE_DEN;
    int64_t slivers = sebp_max(1, a_bytes / (sliver_units(plan, shape->rows) * 4));
    int64_t chunk_slivers = chunk_m / shape->rows;
    slivers = sebp_div_ceil(chunk_slivers,
                            sebp_div_ceil(chunk_slivers, slivers)); /* panels of one size */
    plan->panel = slivers * shape->rows;
    plan->in_blocks =
        product->c_dtype != SEBP_F32 ||
        (units > plan->units && chunk_m * chunk_n * 4 > (int64_t)cpu->topology.l2_bytes);
    int64_t b_bytes = sliver_units(plan, shape->cols) * 4;
    int64_t b_slivers = sebp_max(1, B_BYTES / b_bytes);
    if (plan->in_blocks)
        b_slivers = sebp_min(b_slivers, sebp_max(1, of_shape->c_cols / shape->cols));
    int64_t chunk_columns = chunk_n / shape->cols;
    plan->block_n =
        sebp_div_ceil(chunk_columns, sebp_div_ceil(chunk_columns, b_slivers)) * shape->cols;
    plan->block_m = chunk_m;
    plan->stream = units <= plan->units && plan->term_count == 1 && can_stream(cpu, product);
    if (plan->in_blocks) {
        plan->block_m = sebp_round_up(
            sebp_min(chunk_m, sebp_max(1, of_shape->c_bytes / (plan->block_n * 4))), shape->rows);
    }

    plan->workers = sebp_min(threads, plan->grid_m * plan->grid_n);
    int64_t bound = sebp_cpu_workspace(cpu);
    while (plan->workers * worker_bytes(plan) > bound) {
        if (plan->block_n > shape->cols)
            plan->block_n = sebp_round_up(plan->block_n / 2, shape->cols);
        else if (plan->panel > shape->rows)
            plan->panel = sebp_round_up(plan->panel / 2, shape->rows);
        else if (block_c_bytes(plan) > 0 && plan->block_m > shape->rows)
            plan->block_m = sebp_round_up(plan->block_m / 2, shape->rows);
        else
            plan->workers--; /* one tile needs far less than half of the smallest bound */
    }
    plan->worker_bytes = worker_bytes(plan);
    plan->a.sliver_units = sliver_units(plan, shape->rows);
    plan->a.part_units = sebp_div_ceil(plan->panel, shape->rows) * plan->a.sliver_units;
    plan->b.sliver_units = plan->b.part_units = sliver_units(plan, shape->cols);
}

/* A block of C being summed: rows [m0, m1) and columns [n0, n1) of the product. */
typedef struct c_block {
    int64_t m0, m1, n0, n1;
    float *packed_a, *packed_b;
    const char **b_rows;         /* of the block of the depth at hand, where they are its steps */
    float **c_rows;              /* of the panel at hand: column 0 of C, or of its f32 block */
    const float **residual_rows; /* the same of the residual, where C has no f32 block */
    float *c;                    /* f32 block of a bf16 C; else NULL */
    const float *bias;           /* for columns n0 on; or NULL */
    bool *a_tame, *b_tame;       /* of each sliver; NULL where it is not checked */
    void *room;                  /* for rows that are converted */
} c_block;

static void list_c_rows(const sebp_native_plan *plan, const c_block *block, int64_t i0, int64_t i1)
{
    const sebp_product *product = plan->product;
    for (int64_t i = i0; i < i1; i++) {
        if (block->c != NULL) {
            block->c_rows[i - i0] = block->c + (i - block->m0) * block_stride(plan);
        } else {
            block->c_rows[i - i0] = sebp_product_row(product, product->c, product->c_stride, i, 0);
            if (product->residual != NULL) {
                block->residual_rows[i - i0] =
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

/* The sum of the terms: the first as `work` says, the others added to it. */
static void run_terms(const sebp_native_plan *plan, const sebp_tile_work *work)
{
    plan->tile(work);
    if (plan->term_count == 1)
        return;
    sebp_tile_work more = *work;
    more.accumulate = true;
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
static void run_untamed(const sebp_native_plan *plan, const sebp_tile_work *work, int64_t i,
                        int64_t j, int64_t at, int64_t depth)
{
    for (int64_t r = 0; r < work->rows; r++) {
        for (int64_t col = 0; col < work->cols; col++) {
            float sum = work->accumulate ? work->from[r][work->c_at + col] : 0;
            if (work->bias != NULL)
                sum += work->bias[col];
            for (int64_t k = at; k < at + depth; k++) {
                sum += sebp_packing_element(&plan->a, i + r, k) *
                       sebp_packing_element(&plan->b, j + col, k);
            }
            work->c[r][work->c_at + col] = sum;
        }
    }
}

/* Runs the tiles of one packed panel of A, rows [i0, i1), against the sliver of B that begins at
 * column j0. The first panel also packs the sliver, and prefetches the rows of the next one. */
static void run_panel(const sebp_native_plan *plan, const c_block *block, int64_t i0, int64_t i1,
                      int64_t j0, float *sliver, int64_t at, int64_t depth)
{
    const sebp_tile_shape *shape = plan->shape;
    const sebp_product *product = plan->product;
    int64_t bytes = (int64_t)sebp_dtype_bytes(product->b.dtype);
    int64_t cols = sebp_min(shape->cols, block->n1 - j0);
    bool is_first = i0 == block->m0, reads_rows = reads_b_rows(plan);
    bool adds_residual = product->residual != NULL && at == 0;
    bool *b_tame = block->b_tame != NULL ? block->b_tame + (j0 - block->n0) / shape->cols : NULL;
    sebp_tile_work work = {
        .units = sebp_div_ceil(depth, plan->shape->unit_elements),
        .a = block->packed_a,
        .b = sliver,
        .pack_b = is_first && reads_rows && cols == shape->cols &&
                  (block->a_tame == NULL || block->a_tame[0]),
        .b_rows = block->b_rows,
        .b_at = j0 * bytes,
        .c = block->c_rows,
        .c_at = block->c != NULL ? j0 - block->n0 : j0,
        .cols = cols,
        .accumulate = at > 0 || product->accumulate || adds_residual,
        .from = adds_residual && block->c == NULL ? block->residual_rows
                                                  : (const float *const *)block->c_rows,
        .stream = plan->stream,
        .bias = at == 0 && block->bias != NULL ? block->bias + (j0 - block->n0) : NULL,
    };
    if (is_first && !work.pack_b) {
        sebp_pack_lanes(plan->kernels, &plan->b, sliver, j0, cols, at, depth, b_tame, block->room);
    }
    int64_t tile = 0, tiles = sebp_div_ceil(i1 - i0, shape->rows), lines = 0;
    if (is_first && reads_rows && j0 + 2 * shape->cols <= block->n1) {
        work.ahead = block->b_rows;
        work.ahead_at = work.b_at + shape->cols * bytes;
        lines = depth * sebp_div_ceil(shape->cols * bytes, 64);
    }
    for (int64_t i = i0; i < i1; i += shape->rows, tile++) {
        work.rows = sebp_min(shape->rows, i1 - i);
        work.ahead_line = lines * tile / tiles;
        work.ahead_lines = lines * (tile + 1) / tiles - work.ahead_line;
        bool is_tame =
            (b_tame == NULL || *b_tame) && (block->a_tame == NULL || block->a_tame[tile]);
        if (!is_tame)
            run_untamed(plan, &work, i, j0, at, depth);
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
    if (!reads_b_rows(plan))
        return;
    int64_t row_bytes = slab->stride * (int64_t)sebp_dtype_bytes(plan->b.dtype);
    for (int64_t k = 0; k < depth; k++) {
        int64_t row = slab->rows != NULL ? slab->rows[at + k] : at + k;
        block->b_rows[k] = (const char *)slab->data + row * row_bytes;
    }
    block->b_rows[depth] = NULL;
}

/* Sums a block over the whole depth. */
static void sum_block(const sebp_native_plan *plan, const c_block *block)
{
    const sebp_tile_shape *shape = plan->shape;
    int64_t k = plan->product->k, k_block = plan->units * plan->shape->unit_elements;
    int64_t b_units = plan->b.sliver_units * plan->b.parts;
    bool one_panel = block->m1 - block->m0 <= plan->panel;
    for (int64_t at = 0; at < k; at += k_block) {
        int64_t depth = sebp_min(k_block, k - at);
        list_b_rows(plan, block, at, depth);
        for (int64_t i0 = block->m0; i0 < block->m1; i0 += plan->panel) {
            int64_t i1 = sebp_min(i0 + plan->panel, block->m1);
            list_c_rows(plan, block, i0, i1);
            sebp_pack_lanes(plan->kernels, &plan->a, block->packed_a, i0, i1 - i0, at, depth,
                            block->a_tame, block->room);
            float *sliver = block->packed_b;
            int64_t finished = at + depth < k || block->c != NULL ? block->n1 : block->n0;
            for (int64_t j0 = block->n0; j0 < block->n1; j0 += shape->cols) {
                run_panel(plan, block, i0, i1, j0, sliver, at, depth);
                int64_t j1 = sebp_min(j0 + shape->cols, block->n1);
                if (j1 - finished >= FINISH_COLS || (j1 == block->n1 && finished < j1)) {
                    sebp_cpu_finish(plan->kernels, plan->product, i0, i1, finished, j1);
                    finished = j1;
                }
                if (!one_panel) /* else the next sliver takes its place, which stays in cache */
                    sliver += b_units;
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
        sebp_cpu_widen(plan->kernels, block->c + (i - block->m0) * block_stride(plan),
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
                        block->c + (i - block->m0) * block_stride(plan), product->c_dtype,
                        block->n1 - block->n0);
        sebp_cpu_finish(plan->kernels, product, i, i + 1, block->n0, block->n1);
    }
}

static void run_chunk(const sebp_native_plan *plan, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                      char *scratch)
{
    const sebp_product *product = plan->product;
    c_block block = {.packed_a = (float *)scratch};
    scratch += packed_a_bytes(plan);
    block.packed_b = (float *)scratch;
    scratch += packed_b_bytes(plan);
    if (block_c_bytes(plan) > 0)
        block.c = (float *)scratch;
    scratch += block_c_bytes(plan);
    block.b_rows = (const char **)scratch;
    scratch += b_rows_bytes(plan);
    block.c_rows = (float **)scratch;
    scratch += c_rows_bytes(plan);
    block.residual_rows = (const float **)scratch;
    scratch += c_rows_bytes(plan);
    block.a_tame = plan->a.is_checked ? (bool *)scratch : NULL;
    scratch += tame_bytes(&plan->a, plan->panel);
    block.b_tame = plan->b.is_checked ? (bool *)scratch : NULL;
    scratch += tame_bytes(&plan->b, plan->block_n);
    block.room = scratch;
    scratch += room_bytes(plan);
    float *bias = (float *)scratch;
    for (int64_t m = m0; m < m1; m += plan->block_m) {
        for (int64_t n = n0; n < n1; n += plan->block_n) {
            block.m0 = m;
            block.m1 = sebp_min(m + plan->block_m, m1);
            block.n0 = n;
            block.n1 = sebp_min(n + plan->block_n, n1);
            if (product->bias != NULL) {
                block.bias = (const float *)product->bias + n;
                if (product->bias_dtype == SEBP_BF16) {
                    plan->kernels->f32_from_bf16(bias, (const uint16_t *)product->bias + n,
                                                 block.n1 - n);
                    block.bias = bias;
                }
            }
            if (block.c != NULL && (product->accumulate || product->residual != NULL))
                load_block(plan, &block);
            sum_block(plan, &block);
            if (block.c != NULL)
                store_block(plan, &block);
        }
    }
}

static void run_worker(void *work, int64_t worker)
{
    const native_run *run = work;
    const sebp_native_plan *plan = run->plan;
    const sebp_product *product = plan->product;
    if (plan->by_bf16)
        plan->kernels->configure_tiles();
    for (int64_t chunk = worker; chunk < plan->grid_m * plan->grid_n; chunk += plan->workers) {
        int64_t i = chunk / plan->grid_n, j = chunk % plan->grid_n;
        run_chunk(plan, cut(product->m, plan->grid_m, i, plan->shape->rows),
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

void sebp_native_plan_product(const sebp_cpu *cpu, const sebp_product *product,
                              sebp_arithmetic arithmetic, sebp_native_plan *plan)
{
    const sebp_kernels *kernels = cpu->kernels;
    *plan = (sebp_native_plan){
        .product = product,
        .kernels = kernels,
        .tile = arithmetic.by_bf16 ? kernels->tile_bf16 : kernels->tile_f32,
        .shape = arithmetic.by_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32,
        .by_bf16 = arithmetic.by_bf16,
        .a = sebp_packing_of(kernels, &product->a, true, arithmetic),
        .b = sebp_packing_of(kernels, &product->b, false, arithmetic),
    };
    plan->term_count = sebp_terms_of(&plan->a, &plan->b, arithmetic.parts, plan->terms);
    if (product->k > 0)
        size_blocks(plan, cpu);
}

int64_t sebp_native_scratch(const sebp_native_plan *plan)
{
    return plan->workers * plan->worker_bytes;
}

void sebp_native_product(sebp_cpu *cpu, const sebp_native_plan *plan, void *scratch)
{
    native_run run = {plan, scratch};
    if (plan->product->k == 0)
        fill_rows(cpu->kernels, plan->product);
    else
        sebp_cpu_parallel(cpu, plan->workers, run_worker, &run);
}
