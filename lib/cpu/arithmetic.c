/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file arithmetic.c
 * How a product is computed: by multiply-adds of f32, or by products of bf16, of as many parts as the
 * precision asks for. The choice is that of a small model: what a multiply-add takes in a tile, and an
 * element in packing, either way. Both are measured when the first context is made, as no table of
 * processors could tell: the bf16 dot of AVX-512 is twice as fast as f32's multiply-add on some, and
 * half as fast on others.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "packing.h"

enum {
    DEPTH = 256, /* elements: packed factors of one tile stay in the nearest cache */
    TRIES = 5,   /* the shortest counts */
    ROUNDS = 8,  /* in one try */
    ALIGNMENT = 64,
    NEAR_ONE = 0x3F /* bytes like this are 0.75 in f32 and in bf16 */
};

int sebp_terms_of(const sebp_packing *a, const sebp_packing *b, int parts, sebp_term *terms)
{
    /* The largest first. What is left out is below the last of them. */
    static const sebp_term all[SEBP_MAX_TERMS] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}, {0, 2}, {2, 0}};
    const int allowed = parts == 1 ? 1 : parts == 2 ? 3 : SEBP_MAX_TERMS;
    int count = 0;
    for (int i = 0; i < allowed; i++) {
        if (all[i].a < a->parts && all[i].b < b->parts)
            terms[count++] = all[i];
    }
    return count;
}

/* ---- rates ---- */

/* What is measured: on factors of one tile, that lie in memory and packed. */
typedef struct trial {
    const sebp_kernels *kernels;
    float *f32, *packed_a, *packed_b, *sums;
    uint16_t *bf16[SEBP_MAX_PARTS];
    float *rows[SEBP_MAX_TILE]; /* of the sums */
} trial;

static void run_tile(const trial *of, const sebp_tile_shape *shape, sebp_tile *tile)
{
    const sebp_tile_work work = {.units = DEPTH / shape->unit_elements,
                                 .a = of->packed_a,
                                 .b = of->packed_b,
                                 .c = of->rows,
                                 .rows = shape->rows,
                                 .cols = shape->cols};
    tile(&work);
}

static void tile_f32(const trial *of)
{
    run_tile(of, &of->kernels->shape_f32, of->kernels->tile_f32);
}

static void tile_bf16(const trial *of)
{
    run_tile(of, &of->kernels->shape_bf16, of->kernels->tile_bf16);
}

static void pack_f32(const trial *of)
{
    const sebp_slab slab = {of->f32, of->kernels->shape_f32.cols, NULL, false};
    of->kernels->pack_b_f32(of->packed_b, 0, &slab, 0, of->kernels->shape_f32.cols, 0, DEPTH);
}

static void pack_bf16(const trial *of)
{
    const sebp_slab slab = {of->bf16[0], of->kernels->shape_bf16.cols, NULL, false};
    of->kernels->pack_b_bf16(of->packed_b, 0, &slab, 0, of->kernels->shape_bf16.cols, 0, DEPTH);
}

static void split(const trial *of)
{
    const int64_t cols = of->kernels->shape_bf16.cols;
    for (int64_t i = 0; i < DEPTH; i++) {
        uint16_t *parts[SEBP_MAX_PARTS];
        for (int p = 0; p < SEBP_MAX_PARTS; p++)
            parts[p] = of->bf16[p] + i * cols;
        of->kernels->split_f32(parts, SEBP_MAX_PARTS, of->f32 + i * cols, cols);
    }
}

static void widen(const trial *of)
{
    const int64_t cols = of->kernels->shape_f32.cols;
    for (int64_t i = 0; i < DEPTH; i++)
        of->kernels->f32_from_bf16(of->f32 + i * cols, of->bf16[0] + i * cols, cols);
}

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Nanoseconds that `work` takes for one of the `count` things that it does. */
static double measure(void (*work)(const trial *of), const trial *of, int64_t count)
{
    double best = 0;
    for (int i = 0; i < TRIES; i++) {
        double start = nanoseconds();
        for (int j = 0; j < ROUNDS; j++)
            work(of);
        double took = nanoseconds() - start;
        best = i == 0 || took < best ? took : best;
    }
    return best / (ROUNDS * (double)count);
}

static sebp_status measure_all(const sebp_kernels *kernels, sebp_rates *rates)
{
    *rates = (sebp_rates){1, 1, 0, 0, 0, 0};
    if (!kernels->bf16_dots) /* there is one way only */
        return SEBP_SUCCESS;
    const sebp_tile_shape *f32 = &kernels->shape_f32, *bf16 = &kernels->shape_bf16;
    const int64_t rows = sebp_max(f32->rows, bf16->rows), cols = sebp_max(f32->cols, bf16->cols);
    const int64_t slack = sebp_max(f32->slack, bf16->slack);
    const int64_t of_a = sebp_round_up(DEPTH * rows + slack, 16), of_b = DEPTH * cols;
    const int64_t room = sebp_round_up(of_b + slack, 16), of_c = sebp_round_up(rows * cols, 16);
    void *memory = NULL;
    const int64_t floats = of_a + 2 * room + of_c + SEBP_MAX_PARTS * room / 2 + 16;
    if (posix_memalign(&memory, ALIGNMENT, (size_t)floats * sizeof(float)) != 0)
        return SEBP_ERROR_MEMORY;
    memset(memory, NEAR_ONE, (size_t)floats * sizeof(float));
    trial of = {.kernels = kernels, .packed_a = memory};
    of.packed_b = of.packed_a + of_a;
    of.f32 = of.packed_b + room;
    of.sums = of.f32 + room;
    for (int i = 0; i < SEBP_MAX_PARTS; i++)
        of.bf16[i] = (uint16_t *)(of.sums + of_c) + i * room;
    for (int64_t i = 0; i < rows; i++)
        of.rows[i] = of.sums + i * cols;
    kernels->configure_tiles();
    rates->tile_f32 = measure(tile_f32, &of, DEPTH * f32->rows * f32->cols);
    rates->tile_bf16 = measure(tile_bf16, &of, DEPTH * (int64_t)bf16->rows * bf16->cols);
    kernels->release_tiles();
    rates->pack_f32 = measure(pack_f32, &of, DEPTH * (int64_t)f32->cols);
    rates->pack_bf16 = measure(pack_bf16, &of, DEPTH * (int64_t)bf16->cols);
    rates->split = measure(split, &of, SEBP_MAX_PARTS * DEPTH * (int64_t)bf16->cols);
    rates->widen = measure(widen, &of, DEPTH * (int64_t)f32->cols);
    free(memory);
    return SEBP_SUCCESS;
}

/* The rates of the kernels in use: NULL until the first context is made, and the same ever after, so
 * that all contexts of a process choose alike. */
static const sebp_rates *_Atomic measured;

sebp_status sebp_cpu_measure(const sebp_kernels *kernels, sebp_rates *rates)
{
    const sebp_rates *known = atomic_load(&measured);
    if (known == NULL) {
        sebp_rates *made = malloc(sizeof *made);
        sebp_status status = made != NULL ? measure_all(kernels, made) : SEBP_ERROR_MEMORY;
        if (status != SEBP_SUCCESS) {
            free(made);
            return status;
        }
        if (atomic_compare_exchange_strong(&measured, &known, made))
            known = made;
        else
            free(made); /* another thread was first: its rates are in `known` */
    }
    *rates = *known;
    return SEBP_SUCCESS;
}

/* ---- the choice ---- */

/* What is about as fast is left as it is: bf16 in bf16, and f32 in f32. */
#define MARGIN 0.95

/* Products of parts have to be clearly faster: they pack twice or three times as much, and what that takes
 * is measured on matrices that lie in the nearest cache. */
#define MARGIN_OF_PARTS 0.75

static double packing_cost(const sebp_rates *rates, const sebp_packing *how)
{
    if (how->packs == SEBP_F32)
        return rates->pack_f32 + (how->dtype == SEBP_BF16 ? rates->widen : 0);
    return how->parts * (rates->pack_bf16 + (how->dtype == SEBP_F32 ? rates->split : 0));
}

/* What a product takes, in nanoseconds of one thread. */
static double cost_of(const sebp_cpu *cpu, const sebp_product *product, sebp_arithmetic arithmetic)
{
    const sebp_kernels *kernels = cpu->kernels;
    const sebp_tile_shape *shape = arithmetic.by_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32;
    const sebp_packing a = sebp_packing_of(kernels, &product->a, true, arithmetic);
    const sebp_packing b = sebp_packing_of(kernels, &product->b, false, arithmetic);
    sebp_term terms[SEBP_MAX_TERMS];
    const int count = sebp_terms_of(&a, &b, arithmetic.parts, terms);
    const double m = (double)sebp_round_up(product->m, shape->rows), k = (double)product->k;
    const double n = (double)sebp_round_up(product->n, shape->cols);
    const double add = arithmetic.by_bf16 ? cpu->rates.tile_bf16 : cpu->rates.tile_f32;
    return m * n * k * count * add +
           k * (m * packing_cost(&cpu->rates, &a) + n * packing_cost(&cpu->rates, &b));
}

/* Matrices of bf16 are multiplied one way, whatever their sizes: a row has the same bits alone and
 * among others. */
static sebp_arithmetic choose_for_bf16(const sebp_cpu *cpu)
{
    bool f32_is_faster = cpu->rates.tile_f32 < MARGIN * cpu->rates.tile_bf16;
    return (sebp_arithmetic){cpu->kernels->bf16_dots ? !f32_is_faster : true, 1};
}

sebp_arithmetic sebp_choose_arithmetic(const sebp_cpu *cpu, const sebp_product *product)
{
    const sebp_arithmetic by_f32 = {false, 1};
    int parts; /* at least, of those that are exact enough */
    if (product->a.dtype == SEBP_BF16 && product->b.dtype == SEBP_BF16)
        return choose_for_bf16(cpu);
    if (product->precision == SEBP_PRECISION_MEDIUM)
        parts = 1;
    else if (product->precision == SEBP_PRECISION_HIGH)
        parts = 2;
    else if (product->precision == SEBP_PRECISION_SPLIT)
        parts = 3;
    else
        return by_f32;
    const sebp_arithmetic by_bf16 = {true, parts};
    const double bf16 = cost_of(cpu, product, by_bf16), f32 = cost_of(cpu, product, by_f32);
    return bf16 < (parts > 1 ? MARGIN_OF_PARTS : MARGIN) * f32 ? by_bf16 : by_f32;
}
