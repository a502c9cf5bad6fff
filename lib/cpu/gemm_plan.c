/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gemm_plan.c
 * How the library's own matrix product (gemm.c) is cut into chunks, blocks and panels: by the caches,
 * the threads and the bound of scratch memory.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "epilogue.h"
#include "product.h"

enum {
    LINE = 64,       /* bytes of cache */
    NARROW = 16,     /* columns of a narrow tile */
    A_SHARE_NUM = 3, /* of L2 for a packed panel of A */
    A_SHARE_DEN = 8,
    B_BYTES = 6 << 20, /* packed B of one worker: it streams from L3 */
    ROUNDS = 4         /* chunks to a worker at most */
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

/* A matrix unit: AMX does 1024 flop a cycle. A step of 32 x 32 x 32 takes 64 cycles, and reads 2 KiB of
 * A and as much of B. A's panel lies in L2. So does most of B's sliver, 384 units or 48 KiB: a shorter
 * one would stay in L1, but C would be read and written more often, each time 8 KiB for a tile of it. A
 * block of C is larger than what the panel leaves of an L2 of 2 MiB. Smaller ones measured slower, as A
 * is packed again for each block of columns, and B for each block of rows. */
static const blocking by_matrix_unit = {384, 384, 2 << 20, 1024, 40};

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

/* What a grid of `count` chunks takes, each of which takes `chunk`: the mean of two estimates. Threads
 * may be alike; then they end together, after whole rounds. Or some are slower, as another program runs
 * beside them or they are cores of another kind; then all end within a chunk of each other. */
static double grid_cost(int64_t count, double chunk, int64_t threads)
{
    double alike = (double)sebp_div_ceil(count, threads) * chunk;
    if (threads == 1)
        return alike;
    double unlike = ((double)count / (double)threads + 1) * chunk;
    return (alike + unlike) / 2;
}

/* Chooses the fastest grid: a chunk computes its tiles, and packs its rows of A and its columns of B. */
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
            double cost = grid_cost(grid_m * grid_n, m * n + packing * (m + n), threads);
            if (best == 0 || cost < best) {
                best = cost;
                plan->grid_m = grid_m;
                plan->grid_n = grid_n;
            }
        }
    }
}

int64_t sebp_native_block_stride(const sebp_native_plan *plan)
{
    return sebp_round_up(plan->block_n, 32) + 16;
}

/* Takes `bytes` of scratch memory, whole lines of cache; with *at NULL it only counts. */
static void *take(char **at, int64_t bytes, int64_t *total)
{
    void *taken = *at;
    int64_t whole = sebp_round_up(bytes, LINE);
    *total += whole;
    if (*at != NULL)
        *at += whole;
    return taken;
}

int64_t sebp_native_lay_out(const sebp_native_plan *plan, char *scratch, sebp_native_room *room)
{
    const sebp_tile_shape *shape = plan->shape;
    const int64_t depth = plan->units * shape->unit_elements;
    const int64_t a_slivers = sebp_div_ceil(plan->panel, shape->rows);
    const int64_t b_slivers = plan->copy == NULL ? sebp_div_ceil(plan->block_n, shape->cols) : 0;
    const int64_t b_lanes = plan->copy == NULL
                                ? plan->block_n
                                : sebp_max(plan->block_n, SEBP_COPIED_SLIVERS * shape->cols);
    const int64_t converted = sebp_max(sebp_packing_room(&plan->a, plan->panel, depth),
                                       sebp_packing_room(&plan->b, b_lanes, depth));
    int64_t total = 0;
    char *at = scratch;
    room->packed_a =
        take(&at, a_slivers * sliver_units(plan, shape->rows) * plan->a.parts * 4, &total);
    room->packed_b =
        take(&at, b_slivers * sliver_units(plan, shape->cols) * plan->b.parts * 4, &total);
    room->c = NULL;
    if (plan->in_blocks)
        room->c = take(&at, plan->block_m * sebp_native_block_stride(plan) * 4, &total);
    room->bias = take(&at, plan->block_n * 4, &total);
    room->b_rows = take(&at, (depth + 1) * (int64_t)sizeof(char *), &total);
    room->c_rows = take(&at, plan->panel * (int64_t)sizeof(float *), &total);
    room->residual_rows = take(&at, plan->panel * (int64_t)sizeof(float *), &total);
    room->a_is_finite = plan->a.is_checked ? take(&at, a_slivers, &total) : NULL;
    room->b_is_finite = plan->b.is_checked ? take(&at, b_slivers, &total) : NULL;
    room->converted = take(&at, converted, &total);
    return total;
}

/* Scratch memory of one worker. */
static int64_t worker_bytes(const sebp_native_plan *plan)
{
    sebp_native_room room;
    return sebp_native_lay_out(plan, NULL, &room);
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
    const int64_t parts = sebp_max(plan->a.parts, plan->b.parts); /* they share the caches */
    plan->units = units;
    if (units > of_shape->k_whole / parts) { /* in blocks of one size */
        int64_t blocks = sebp_div_ceil(units, of_shape->k_block / parts);
        plan->units = sebp_round_up(sebp_div_ceil(units, blocks), shape->step_units);
    }
    plan->b.part_units = sliver_units(plan, shape->cols); /* the parts of a sliver lie together */
    plan->b.sliver_units = plan->b.part_units * plan->b.parts;
    plan->copy = sebp_cpu_find_copy(plan);
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
    while (plan->workers > 0 && plan->workers * worker_bytes(plan) > bound) {
        if (plan->block_n > shape->cols)
            plan->block_n = sebp_round_up(plan->block_n / 2, shape->cols);
        else if (plan->panel > shape->rows)
            plan->panel = sebp_round_up(plan->panel / 2, shape->rows);
        else if (plan->in_blocks && plan->block_m > shape->rows)
            plan->block_m = sebp_round_up(plan->block_m / 2, shape->rows);
        else
            plan->workers--; /* one tile needs far less than half of the smallest bound */
    }
    plan->b_group = 1;
    if (!sebp_packs_straight(&plan->b))
        plan->b_group = sebp_min(plan->block_n, sebp_packing_lanes(&plan->b)) / shape->cols;
    plan->workers = sebp_max(1, plan->workers); /* were it more, there would be no memory for it */
    plan->worker_bytes = worker_bytes(plan);
    plan->a.sliver_units = sliver_units(plan, shape->rows);
    plan->a.part_units = sebp_div_ceil(plan->panel, shape->rows) * plan->a.sliver_units;
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
