/* SPDX-License-Identifier: Apache-2.0 */
/** @file time_kernels.c Not a test: prints the time of every kernel of every tier. */
#include "config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernel_harness.h"

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Prints the best time of a call, and the rate of the bytes it reads and writes. */
#define TIME(kernels, name, bytes, call)                                                           \
    do {                                                                                           \
        double best = INFINITY, end = seconds() + 0.05;                                            \
        for (int repeats = 1; seconds() < end;                                                     \
             repeats = best * repeats < 1e-4 ? 2 * repeats : repeats) {                            \
            double start = seconds();                                                              \
            for (int repeat = 0; repeat < repeats; repeat++) {                                     \
                call;                                                                              \
            }                                                                                      \
            best = fmin(best, (seconds() - start) / repeats);                                      \
        }                                                                                          \
        printf("%-11s %-20s %12.1f ns %7.1f GB/s\n", kernels->isa, name, 1e9 * best,               \
               (double)(bytes) / best * 1e-9);                                                     \
    } while (0)

enum { ROWS = 8, COLS = 3072, BYTES = 4 * COLS }; /* of what kernels are timed on */

/* A tile of a product, and how long packing its factors takes. from: ROWS x COLS. */
static void time_product(const sebp_kernels *kernels, int is_bf16, const float *from)
{
    enum { DEPTH = 256 };
    const sebp_tile_shape *shape = is_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32;
    sebp_pack *const pack_a = is_bf16 ? kernels->pack_a_bf16 : kernels->pack_a_f32;
    sebp_pack *const pack_b = is_bf16 ? kernels->pack_b_bf16 : kernels->pack_b_f32;
    sebp_tile *const tile = is_bf16 ? kernels->tile_bf16 : kernels->tile_f32;
    int64_t height = shape->rows, width = shape->cols;
    const sebp_slab slab = {from, DEPTH, NULL, true}, across = {from, width, NULL, false};
    buffer a = make((DEPTH + 1) * height + shape->slack, sizeof(float));
    buffer b = make((DEPTH + 1) * width + shape->slack, sizeof(float));
    buffer c = make(height * width, sizeof(float));
    float *packed_a = (void *)a.data, *packed_b = (void *)b.data, *c_rows[64];
    ck_assert(height <= 64 && width * DEPTH <= ROWS * COLS);
    for (int64_t i = 0; i < height; i++) {
        c_rows[i] = (float *)(void *)c.data + i * width;
    }
    int64_t apart = DEPTH * width + shape->slack;
    const sebp_tile_work work = {.units = DEPTH,
                                 .a = packed_a,
                                 .b = packed_b,
                                 .c = c_rows,
                                 .rows = height,
                                 .cols = width,
                                 .accumulate = true,
                                 .from = (const float *const *)c_rows};
    int64_t packing = (int64_t)bytes_of(is_bf16) + 4 / shape->unit_elements; /* bytes an element */
    TIME(kernels, is_bf16 ? "pack_a_bf16" : "pack_a_f32", packing * height * DEPTH,
         pack_a(packed_a, apart, &slab, 0, height, 0, DEPTH));
    TIME(kernels, is_bf16 ? "pack_b_bf16" : "pack_b_f32", packing * width * DEPTH,
         pack_b(packed_b, apart, &across, 0, width, 0, DEPTH));
    kernels->configure_tiles();
    TIME(kernels, is_bf16 ? "tile_bf16" : "tile_f32", 4 * (height + width) * DEPTH, tile(&work));
    kernels->release_tiles();
    release(&a);
    release(&b);
    release(&c);
}

/* Rows in the cache, and then a matrix that is in none. */
START_TEST(timing)
{
    const sebp_kernels *kernels = kernels_of(_i, "timing");
    if (kernels == NULL) {
        return;
    }
    buffer one = make(ROWS * COLS, sizeof(float)), two = make(ROWS * COLS, sizeof(float));
    float *f32 = (void *)one.data;
    uint16_t *bf16 = (void *)two.data;
    memset(f32, 0, ROWS * BYTES);
    memset(bf16, 0, ROWS * BYTES);
    volatile bool any;
    volatile double sum;
    TIME(kernels, "any_nonzero_f32", BYTES, any = kernels->any_nonzero_f32(f32, COLS));
    TIME(kernels, "any_nonzero_bf16", BYTES / 2, any = kernels->any_nonzero_bf16(bf16, COLS));
    TIME(kernels, "any_above_f32", BYTES, any = kernels->any_above_f32(f32, COLS, 1));
    TIME(kernels, "any_above_bf16", BYTES / 2, any = kernels->any_above_bf16(bf16, COLS, 1));
    TIME(kernels, "square_sum_f32", BYTES, sum = kernels->square_sum_f32(f32, COLS));
    TIME(kernels, "square_sum_bf16", BYTES / 2, sum = kernels->square_sum_bf16(bf16, COLS));
    (void)any;
    (void)sum;
    TIME(kernels, "move_rows", 2 * ROWS * BYTES,
         kernels->move_rows((char *)f32, BYTES, NULL, (char *)bf16, BYTES, NULL, ROWS, BYTES));
    TIME(kernels, "zero", ROWS * BYTES, kernels->zero(f32, ROWS * BYTES, false));
    TIME(kernels, "f32_from_bf16", 3 * BYTES / 2, kernels->f32_from_bf16(f32, bf16, COLS));
    TIME(kernels, "bf16_from_f32", 3 * BYTES / 2, kernels->bf16_from_f32(bf16, f32, COLS));
    TIME(kernels, "add_rows_f32", (ROWS + 1) * BYTES,
         kernels->add_rows_f32(f32, (float *)(void *)two.data, COLS, NULL, ROWS, COLS));
    TIME(kernels, "add_rows_bf16", (ROWS + 2) * BYTES / 2,
         kernels->add_rows_bf16(f32, bf16, COLS, NULL, ROWS, COLS));
    buffer moments = make(2 * COLS, sizeof(float));
    memset(moments.data, 0, 2 * BYTES);
    const sebp_adamw_work step = {.beta1 = 0.5F,
                                  .beta2 = 0.5F,
                                  .epsilon = 1,
                                  .g = two.data,
                                  .w = f32,
                                  .moment1 = (void *)moments.data,
                                  .moment2 = (float *)(void *)moments.data + COLS,
                                  .n = COLS};
    TIME(kernels, "adamw", 7 * BYTES, kernels->adamw(&step));
    TIME(kernels, "scale_f32", 2 * BYTES, kernels->scale_f32(f32, COLS, 1));
    release(&moments);

    for (int is_bf16 = 0; is_bf16 <= 1; is_bf16++)
        time_product(kernels, is_bf16, f32);
    release(&one);
    release(&two);

    int64_t large = INT64_C(64) << 20;
    buffer to = make(large, 1), from = make(large, 1);
    memset(from.data, 0, (size_t)large);
    TIME(kernels, "memory: any_nonzero", large,
         any = kernels->any_nonzero_f32((const void *)from.data, large / 4));
    TIME(kernels, "memory: any_above", large,
         any = kernels->any_above_f32((const void *)from.data, large / 4, 1));
    TIME(kernels, "memory: square_sum", large,
         sum = kernels->square_sum_f32((const void *)from.data, large / 4));
    TIME(kernels, "memory: move_rows", 2 * large,
         kernels->move_rows((char *)to.data, BYTES, NULL, (const char *)from.data, BYTES, NULL,
                            large / BYTES, BYTES));
    TIME(kernels, "memory: zero", large, kernels->zero(to.data, large, false));
    TIME(kernels, "memory: zero, stream", large, kernels->zero(to.data, large, true));
    release(&to);
    release(&from);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("time");
    TCase *all = tcase_create("time");
    tcase_add_loop_test(all, timing, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
