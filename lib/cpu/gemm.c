/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gemm.c
 * The library's own matrix product: packs straight from gathered rows, writes straight to scattered
 * ones, so that compacting rows costs nothing beside the product.
 *
 * C is cut into a grid of chunks, one for each worker at a time. Within a chunk
 *
 *     for each block of C (all of it, or a part that is summed in scratch memory)
 *       for each block of the depth, K_BLOCK units
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
    K_BLOCK = 512, /* units of depth at most: a sliver of 14 rows of A takes 28 KiB */
    K_WHOLE = 768, /* but this depth is one block, so that C is written once */
    NARROW = 16,   /* columns of a narrow tile: it reads more of B for each multiply-add, and */
    K_BLOCK_NARROW = 384, /* is faster where a sliver of B, 24 KiB, leaves room in L1 */
    K_WHOLE_NARROW = 512,
    A_SHARE_NUM = 3, /* of L2 for a packed panel of A */
    A_SHARE_DEN = 8,
    B_BYTES = 6 << 20, /* packed B of one worker: it streams from L3 */
    C_BYTES = 4 << 20, /* f32 block of C of one worker */
    ROUNDS = 2,        /* chunks to a worker at most */
    FINISH_COLS = 256  /* columns of a panel of C that are in L2 when the epilogue comes */
};

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
    return sebp_round_up(plan->units * width + plan->kernels->slack, 16);
}

/* Chooses the grid that gives the busiest worker the smallest amount of work: computing its tiles,
 * and packing A for every column of chunks and B for every row of them. Packing an element costs
 * about as much as PACKING multiply-adds of a tile. */
static void choose_grid(sebp_native_plan *plan, int64_t threads)
{
    enum { PACKING = 24 };
    int64_t rows = sebp_div_ceil(plan->product->m, plan->kernels->tile_rows);
    int64_t cols = sebp_div_ceil(plan->product->n, plan->kernels->tile_cols);
    double best = 0;
    for (int64_t grid_m = 1; grid_m <= sebp_min(rows, ROUNDS * threads); grid_m++) {
        for (int64_t grid_n = 1; grid_n <= cols && grid_m * grid_n <= ROUNDS * threads; grid_n++) {
            double m = (double)(sebp_div_ceil(rows, grid_m) * plan->kernels->tile_rows);
            double n = (double)(sebp_div_ceil(cols, grid_n) * plan->kernels->tile_cols);
            double cost =
                (double)sebp_div_ceil(grid_m * grid_n, threads) * (m * n + PACKING * (m + n));
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
    return sebp_div_ceil(plan->panel, plan->kernels->tile_rows) *
           sliver_units(plan, plan->kernels->tile_rows) * 4;
}

static int64_t packed_b_bytes(const sebp_native_plan *plan)
{
    return sebp_div_ceil(plan->block_n, plan->kernels->tile_cols) *
           sliver_units(plan, plan->kernels->tile_cols) * 4;
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
    return sebp_round_up((plan->units * plan->unit_elements + 1) * (int64_t)sizeof(char *), 64);
}

/* Pointers to the rows of C that a panel adds to. */
static int64_t c_rows_bytes(const sebp_native_plan *plan)
{
    return sebp_round_up(plan->panel * (int64_t)sizeof(float *), 64);
}

static int64_t worker_bytes(const sebp_native_plan *plan)
{
    return packed_a_bytes(plan) + packed_b_bytes(plan) + block_c_bytes(plan) + bias_bytes(plan) +
           b_rows_bytes(plan) + 2 * c_rows_bytes(plan);
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
    const sebp_kernels *kernels = plan->kernels;
    int64_t units = sebp_div_ceil(product->k, plan->unit_elements);
    bool narrow = kernels->tile_cols <= NARROW;
    plan->units = units;
    if (units > (narrow ? K_WHOLE_NARROW : K_WHOLE)) /* in blocks of one size */
        plan->units = sebp_div_ceil(units, sebp_div_ceil(units, narrow ? K_BLOCK_NARROW : K_BLOCK));
    int64_t threads = sebp_cpu_threads(cpu);
    choose_grid(plan, threads);
    int64_t chunk_m = sebp_round_up(sebp_div_ceil(product->m, plan->grid_m), kernels->tile_rows);
    int64_t chunk_n = sebp_round_up(sebp_div_ceil(product->n, plan->grid_n), kernels->tile_cols);

    int64_t a_bytes = (int64_t)cpu->topology.l2_bytes * A_SHARE_NUM / A_SHARE_DEN;
    int64_t slivers = sebp_max(1, a_bytes / (sliver_units(plan, kernels->tile_rows) * 4));
    int64_t chunk_slivers = chunk_m / kernels->tile_rows;
    slivers = sebp_div_ceil(chunk_slivers,
                            sebp_div_ceil(chunk_slivers, slivers)); /* panels of one size */
    plan->panel = slivers * kernels->tile_rows;
    int64_t b_bytes = sliver_units(plan, kernels->tile_cols) * 4;
    int64_t b_slivers = sebp_max(1, B_BYTES / b_bytes);
    int64_t chunk_columns = chunk_n / kernels->tile_cols;
    plan->block_n =
        sebp_div_ceil(chunk_columns, sebp_div_ceil(chunk_columns, b_slivers)) * kernels->tile_cols;
    plan->block_m = chunk_m;
    plan->in_blocks =
        product->c_dtype != SEBP_F32 ||
        (units > plan->units && chunk_m * chunk_n * 4 > (int64_t)cpu->topology.l2_bytes);
    plan->stream = units <= plan->units && can_stream(cpu, product);
    if (plan->in_blocks) {
        plan->block_m = sebp_round_up(sebp_min(chunk_m, sebp_max(1, C_BYTES / (plan->block_n * 4))),
                                      kernels->tile_rows);
    }

    plan->workers = sebp_min(threads, plan->grid_m * plan->grid_n);
    int64_t bound = sebp_cpu_workspace(cpu);
    while (plan->workers * worker_bytes(plan) > bound) {
        if (plan->block_n > kernels->tile_cols)
            plan->block_n = sebp_round_up(plan->block_n / 2, kernels->tile_cols);
        else if (plan->panel > kernels->tile_rows)
            plan->panel = sebp_round_up(plan->panel / 2, kernels->tile_rows);
        else if (block_c_bytes(plan) > 0 && plan->block_m > kernels->tile_rows)
            plan->block_m = sebp_round_up(plan->block_m / 2, kernels->tile_rows);
        else
            plan->workers--; /* one tile needs far less than half of the smallest bound */
    }
    plan->worker_bytes = worker_bytes(plan);
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

/* Runs the tiles of one packed panel of A, rows [i0, i1), against the sliver of B that begins at
 * column j0. The first panel also packs the sliver, and prefetches the rows of the next one. */
static void run_panel(const sebp_native_plan *plan, const c_block *block, int64_t i0, int64_t i1,
                      int64_t j0, float *sliver, int64_t at, int64_t depth)
{
    const sebp_kernels *kernels = plan->kernels;
    const sebp_product *product = plan->product;
    int64_t bytes = (int64_t)sebp_dtype_bytes(product->dtype);
    int64_t cols = sebp_min(kernels->tile_cols, block->n1 - j0);
    bool is_first = i0 == block->m0, is_straight = !plan->b.lanes_are_rows;
    bool adds_residual = product->residual != NULL && at == 0;
    sebp_tile_work work = {
        .units = sebp_div_ceil(depth, plan->unit_elements),
        .a = block->packed_a,
        .b = sliver,
        .pack_b = is_first && is_straight && cols == kernels->tile_cols,
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
    if (is_first && !work.pack_b)
        plan->pack_b(sliver, sliver_units(plan, kernels->tile_cols), &plan->b, j0, cols, at, depth);
    int64_t tile = 0, tiles = sebp_div_ceil(i1 - i0, kernels->tile_rows), lines = 0;
    if (is_first && is_straight && j0 + 2 * kernels->tile_cols <= block->n1) {
        work.ahead = block->b_rows;
        work.ahead_at = work.b_at + kernels->tile_cols * bytes;
        lines = depth * sebp_div_ceil(kernels->tile_cols * bytes, 64);
    }
    for (int64_t i = i0; i < i1; i += kernels->tile_rows, tile++) {
        work.rows = sebp_min(kernels->tile_rows, i1 - i);
        work.ahead_line = lines * tile / tiles;
        work.ahead_lines = lines * (tile + 1) / tiles - work.ahead_line;
        plan->tile(&work);
        work.a += sliver_units(plan, kernels->tile_rows);
        work.c += kernels->tile_rows;
        work.from += kernels->tile_rows;
        work.pack_b = false;
    }
}

static void list_b_rows(const sebp_native_plan *plan, const c_block *block, int64_t at,
                        int64_t depth)
{
    if (plan->b.lanes_are_rows)
        return;
    int64_t row_bytes = plan->b.stride * (int64_t)sebp_dtype_bytes(plan->product->dtype);
    for (int64_t k = 0; k < depth; k++) {
        int64_t row = plan->b.rows != NULL ? plan->b.rows[at + k] : at + k;
        block->b_rows[k] = (const char *)plan->b.data + row * row_bytes;
    }
    block->b_rows[depth] = NULL;
}

/* Sums a block over the whole depth. */
static void sum_block(const sebp_native_plan *plan, const c_block *block)
{
    const sebp_kernels *kernels = plan->kernels;
    int64_t k = plan->product->k, k_block = plan->units * plan->unit_elements;
    int64_t a_units = sliver_units(plan, kernels->tile_rows);
    int64_t b_units = sliver_units(plan, kernels->tile_cols);
    bool one_panel = block->m1 - block->m0 <= plan->panel;
    for (int64_t at = 0; at < k; at += k_block) {
        int64_t depth = sebp_min(k_block, k - at);
        list_b_rows(plan, block, at, depth);
        for (int64_t i0 = block->m0; i0 < block->m1; i0 += plan->panel) {
            int64_t i1 = sebp_min(i0 + plan->panel, block->m1);
            list_c_rows(plan, block, i0, i1);
            plan->pack_a(block->packed_a, a_units, &plan->a, i0, i1 - i0, at, depth);
            float *sliver = block->packed_b;
            int64_t finished = at + depth < k || block->c != NULL ? block->n1 : block->n0;
            for (int64_t j0 = block->n0; j0 < block->n1; j0 += kernels->tile_cols) {
                run_panel(plan, block, i0, i1, j0, sliver, at, depth);
                int64_t j1 = sebp_min(j0 + kernels->tile_cols, block->n1);
                if (j1 - finished >= FINISH_COLS || (j1 == block->n1 && finished < j1)) {
                    sebp_cpu_finish(kernels, plan->product, i0, i1, finished, j1);
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
    for (int64_t chunk = worker; chunk < plan->grid_m * plan->grid_n; chunk += plan->workers) {
        int64_t i = chunk / plan->grid_n, j = chunk % plan->grid_n;
        run_chunk(plan, cut(product->m, plan->grid_m, i, plan->kernels->tile_rows),
                  cut(product->m, plan->grid_m, i + 1, plan->kernels->tile_rows),
                  cut(product->n, plan->grid_n, j, plan->kernels->tile_cols),
                  cut(product->n, plan->grid_n, j + 1, plan->kernels->tile_cols),
                  run->scratch + worker * plan->worker_bytes);
    }
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
                              sebp_native_plan *plan)
{
    const sebp_kernels *kernels = cpu->kernels;
    bool pairs = product->dtype == SEBP_BF16 && kernels->bf16_dots;
    *plan = (sebp_native_plan){
        .product = product,
        .kernels = kernels,
        .pack_a = product->dtype == SEBP_BF16 ? kernels->pack_a_bf16 : kernels->pack_a_f32,
        .pack_b = product->dtype == SEBP_BF16 ? kernels->pack_b_bf16 : kernels->pack_b_f32,
        .tile = product->dtype == SEBP_BF16 ? kernels->tile_bf16 : kernels->tile_f32,
        .a = {product->a.data, product->a.stride, product->a.rows, !product->a.transposed},
        .b = {product->b.data, product->b.stride, product->b.rows, product->b.transposed},
        .unit_elements = pairs ? 2 : 1,
    };
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
