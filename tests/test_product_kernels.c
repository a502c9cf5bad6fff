/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_product_kernels.c
 * Packing and tiles of products on every ISA, and of a matrix unit over emulated tiles, against the
 * definition in simd.h; the emulated tiles themselves against the manual of TDPBF16PS; and when AMX
 * is refused.
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulated_amx.h"
#include "kernel_harness.h"

#define SEBP_EMULATED_TILES 1
#include "simd/tile.h"

/* The kernels of a tier, and after the last tier those of amx over emulated tiles. */
static const sebp_kernels *product_kernels_of(int tier, const char *test)
{
    char name[64];
    if (tier < TIERS)
        return kernels_of(tier, test);
    snprintf(name, sizeof name, "%s/emulated amx", test);
    if (emulated_amx() == NULL)
        testing_skip(name, "there is no avx512bf16");
    return emulated_amx();
}

/* Units of depth that a sliver is filled up to. */
static int64_t filled(const sebp_tile_shape *shape, int64_t units)
{
    return (units + shape->step_units - 1) / shape->step_units * shape->step_units;
}

/* Where a packed sliver of A or B has unit u of lane l. */
static int64_t packed_at(const sebp_tile_shape *shape, int is_b, int64_t u, int64_t l)
{
    int64_t side = shape->step_units;
    if (is_b || side == 1) {
        return u * (is_b ? shape->cols : shape->rows) + l;
    }
    int64_t square = u / side * (shape->rows / side) + l / side;
    return (square * side + l % side) * side + u % side;
}

/* What unit u of lane l must hold, in bits. */
static uint32_t unit_of(const sebp_slab *from, int is_bf16, int pairs, int64_t lane, int64_t at,
                        int64_t depth, int64_t u)
{
    uint32_t unit = 0;
    uint16_t halves[2] = {0};
    int elements = pairs ? 2 : 1;
    for (int i = 0; i < elements && u * elements + i < depth; i++) {
        int64_t along = at + u * elements + i;
        int64_t row = from->lanes_are_rows ? lane : along;
        int64_t col = from->lanes_are_rows ? along : lane;
        int64_t element = (from->rows != NULL ? from->rows[row] : row) * from->stride + col;
        if (pairs) {
            halves[i] = ((const uint16_t *)from->data)[element];
            memcpy(&unit, halves, sizeof unit); /* as they lie in memory */
        } else if (is_bf16) {
            unit = (uint32_t)((const uint16_t *)from->data)[element] << 16;
        } else {
            memcpy(&unit, (const float *)from->data + element, sizeof unit);
        }
    }
    return unit;
}

START_TEST(pack)
{
    const sebp_kernels *kernels = product_kernels_of(_i, "pack");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1500); round > 0; round--) {
        int is_bf16 = round % 2, is_b = round / 2 % 2;
        const sebp_tile_shape *shape = is_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32;
        int pairs = shape->unit_elements == 2;
        int64_t width = is_b ? shape->cols : shape->rows;
        sebp_pack *pack = is_bf16 ? (is_b ? kernels->pack_b_bf16 : kernels->pack_a_bf16)
                                  : (is_b ? kernels->pack_b_f32 : kernels->pack_a_f32);
        int64_t lane = testing_between(0, 20), lanes = testing_between(0, 3 * width);
        int64_t at = testing_between(0, 20), depth = testing_between(0, 70);

        sebp_slab from = {.lanes_are_rows = testing_chance(0.5)};
        int64_t listed = from.lanes_are_rows ? lane + lanes : at + depth;
        int64_t cols = from.lanes_are_rows ? at + depth : lane + lanes;
        int64_t total = listed + testing_between(1, 10);
        from.stride = strided(cols);
        buffer data = make((total - 1) * from.stride + cols, bytes_of(is_bf16));
        for (int64_t i = 0; i < total; i++) {
            for (int64_t j = 0; j < cols; j++) {
                put(data.data, is_bf16, i * from.stride + j, testing_uniform());
            }
        }
        buffer list = any_rows(listed, total);
        from.data = data.data;
        from.rows = testing_chance(0.5) ? (const void *)list.data : NULL;

        int64_t units = pairs ? (depth + 1) / 2 : depth;
        int64_t slivers = (lanes + width - 1) / width;
        int64_t all_units = filled(shape, units);
        int64_t apart = all_units * width + shape->slack + testing_between(0, 20);
        buffer packed = make(slivers * apart, sizeof(float));
        uint32_t *expected = twin_of(&packed);
        pack((void *)packed.data, apart, &from, lane, lanes, at, depth);
        for (int64_t s = 0; s < slivers; s++) {
            for (int64_t u = 0; u < all_units; u++) {
                for (int64_t l = 0; l < width; l++) {
                    int64_t of = s * width + l;
                    expected[s * apart + packed_at(shape, is_b, u, l)] =
                        of < lanes ? unit_of(&from, is_bf16, pairs, lane + of, at, depth, u) : 0;
                }
            }
            /* What stands in the slack is nobody's business. */
            memcpy(expected + s * apart + all_units * width,
                   packed.data + (size_t)(s * apart + all_units * width) * sizeof(float),
                   (size_t)shape->slack * sizeof(float));
        }
        release(&packed);
        release(&data);
        release(&list);
    }
}
END_TEST

/* A packed sliver. Its lanes from `lanes` on hold NaN, which must not get into C. */
static buffer sliver(const sebp_tile_shape *shape, int is_b, int64_t units, int64_t lanes,
                     int is_bf16, int integers)
{
    const int64_t elements = shape->unit_elements, width = is_b ? shape->cols : shape->rows;
    const int pairs = elements == 2;
    buffer made = make(filled(shape, units) * width, sizeof(float));
    for (int64_t u = 0; u < filled(shape, units); u++) {
        for (int64_t i = 0; i < lanes * elements; i++) {
            double value = u < units ? value_of(integers) : 0;
            value = is_bf16 ? testing_from_bf16(testing_to_bf16((float)value)) : value;
            int64_t unit = packed_at(shape, is_b, u, i / elements);
            put(made.data, pairs, unit * elements + i % elements, value);
        }
    }
    return made;
}

START_TEST(tile)
{
    const sebp_kernels *kernels = product_kernels_of(_i, "tile");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1500); round > 0; round--) {
        int is_bf16 = round % 2, integers = round / 2 % 2, pack_b = round / 4 % 2;
        const sebp_tile_shape *shape = is_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32;
        int64_t height = shape->rows, width = shape->cols, elements = shape->unit_elements;
        int pairs = elements == 2;
        int64_t units = testing_between(0, 60), depth = units * elements;
        int64_t rows = testing_between(1, height);
        int64_t cols = pack_b ? width : testing_between(1, width);
        int leaves_b = pack_b && (shape->step_units > 1 || testing_chance(0.5));
        buffer a = sliver(shape, 0, units, rows, is_bf16, integers);
        buffer b = sliver(shape, 1, units, cols, is_bf16, integers);

        /* The rows that B was packed from; an odd depth ends in half a pair. */
        int64_t b_first = testing_between(0, 20), b_stride = strided(b_first + width);
        buffer b_matrix = make((depth + 1) * b_stride, bytes_of(is_bf16));
        buffer b_list = make(depth, sizeof(char *));
        const char **b_rows = (void *)b_list.data;
        int odd_depth = pairs && units > 0 && testing_chance(0.5);
        for (int64_t d = 0; d < depth; d++) {
            int64_t first = d * b_stride;
            int missing = odd_depth && d == depth - 1;
            b_rows[d] = missing ? NULL : (char *)b_matrix.data + (size_t)first * bytes_of(is_bf16);
            for (int64_t j = 0; j < cols; j++) {
                int64_t packed = (d / elements * width + j) * elements + d % elements;
                if (missing) {
                    put(b.data, pairs, packed, 0);
                }
                put(b_matrix.data, is_bf16, first + b_first + j, get(b.data, pairs, packed));
            }
        }
        int64_t packed_units = filled(shape, units) * width;
        buffer b_room = make(packed_units, sizeof(float));
        void *b_expected = twin_of(&b_room);
        if (leaves_b) {
            memcpy(b_expected, b.data, (size_t)packed_units * sizeof(float));
        }

        /* Where C goes past the caches its rows and columns start at multiples of 64 bytes. */
        int stream = testing_chance(0.3), align = stream ? 16 : 1;
        int accumulate = !stream && testing_chance(0.5), has_bias = !stream && testing_chance(0.5);
        buffer bias = make(cols, sizeof(float));
        int64_t c_first = testing_between(0, 20) / align * align;
        int64_t stride = (strided(c_first + cols) + align - 1) / align * align;
        buffer c = make((rows - 1) * stride + c_first + cols + align, sizeof(float));
        float *c_data = (void *)c.data;
        if (stream) {
            c_data += (64 - (uintptr_t)c.data % 64) % 64 / sizeof(float);
        }
        for (int64_t j = 0; j < cols; j++) {
            put(bias.data, 0, j, value_of(integers));
            for (int64_t i = 0; accumulate && i < rows; i++) {
                put(c_data, 0, i * stride + c_first + j, value_of(integers));
            }
        }
        /* The rows of C in any order. */
        buffer list = make(rows, sizeof(float *));
        float **c_rows = (void *)list.data;
        for (int64_t i = 0; i < rows; i++) {
            int64_t other = testing_between(0, i);
            c_rows[i] = c_rows[other];
            c_rows[other] = c_data + i * stride;
        }
        ptrdiff_t to_twin = (unsigned char *)twin_of(&c) - c.data;

        /* What the sum is added to: C, or rows of another matrix that lie as C's do. */
        int adds_other = accumulate && testing_chance(0.5);
        buffer other = make(rows * stride, sizeof(float));
        buffer from_list = make(rows, sizeof(float *));
        float **from = (void *)from_list.data;
        for (int64_t i = 0; i < rows; i++) {
            from[i] = adds_other ? (float *)(void *)other.data + (c_rows[i] - c_data) : c_rows[i];
            for (int64_t j = 0; adds_other && j < cols; j++) {
                put(from[i], 0, c_first + j, value_of(integers));
            }
        }

        sebp_tile_work work = {
            .units = units,
            .a = (void *)a.data,
            .b = (void *)(leaves_b ? b_room.data
                          : pack_b ? NULL
                                   : b.data),
            .pack_b = pack_b,
            .b_rows = pack_b ? b_rows : NULL,
            .b_at = b_first * (int64_t)bytes_of(is_bf16),
            .ahead = testing_chance(0.5) ? b_rows : NULL,
            .ahead_at = 64,
            .ahead_line = 0,
            .ahead_lines = testing_between(0, depth),
            .c = c_rows,
            .c_at = c_first,
            .rows = rows,
            .cols = cols,
            .accumulate = accumulate,
            .from = (const float *const *)from,
            .stream = stream,
            .bias = has_bias ? (void *)bias.data : NULL,
        };
        if (is_bf16) {
            kernels->configure_tiles();
            kernels->tile_bf16(&work);
            kernels->release_tiles();
        } else {
            kernels->tile_f32(&work);
        }

        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < cols; j++) {
                float *twin = (void *)((unsigned char *)(c_rows[i] + c_first + j) + to_twin);
                double old = adds_other ? from[i][c_first + j] : accumulate ? *twin : 0;
                double added = has_bias ? get(bias.data, 0, j) : 0;
                double sum = old + added, magnitude = fabs(old) + fabs(added);
                for (int64_t u = 0; u < units; u++) {
                    for (int64_t e = 0; e < elements; e++) {
                        int64_t in_a = packed_at(shape, 0, u, i), in_b = packed_at(shape, 1, u, j);
                        double product = get(a.data, pairs, in_a * elements + e) *
                                         get(b.data, pairs, in_b * elements + e);
                        sum += product;
                        magnitude += fabs(product);
                    }
                }
                /* Each product and each addition rounds once. */
                double bound = (double)(depth + 3) * (FLT_EPSILON / 2) * magnitude;
                check(fabs(c_rows[i][c_first + j] - sum) <= (integers ? 0 : bound),
                      "%" PRId64 " x %" PRId64 ", %" PRId64 " units: (%" PRId64 ", %" PRId64
                      ") is %a, not %a",
                      rows, cols, units, i, j, (double)c_rows[i][c_first + j], sum);
                *twin = c_rows[i][c_first + j];
            }
        }
        release(&a);
        release(&b);
        release(&b_matrix);
        release(&b_list);
        release(&b_room);
        release(&bias);
        release(&c);
        release(&list);
        release(&other);
        release(&from_list);
    }
}
END_TEST

/* a * b + c rounded once. A result is zero where it would be a denormal: rounded as if there were
 * smaller exponents, it is below FLT_MIN. */
static float flushed_fma(float a, float b, float c, int *flushes)
{
    float result = fmaf(a, b, c);
    if (fabsf(result) <= FLT_MIN) {
        float smaller = fabsf(a) < fabsf(b) ? a : b, larger = fabsf(a) < fabsf(b) ? b : a;
        float scaled = fmaf(ldexpf(smaller, 60), larger, ldexpf(c, 60));
        if (fabsf(scaled) < ldexpf(FLT_MIN, 60)) {
            *flushes += scaled != 0;
            return copysignf(0, scaled);
        }
    }
    return result;
}

static float without_denormals(float value)
{
    return fabsf(value) < FLT_MIN ? copysignf(0, value) : value;
}

/* A bf16 of any kind, mostly near `exponent`, a power of two. */
static uint16_t some_bf16(int exponent, int with_odd)
{
    static const double odd_values[] = {0,   -0.0,     INFINITY,  -INFINITY,
                                        NAN, 0x1p-130, -0x1p-133, FLT_MAX};
    double value = ldexp(testing_uniform(), exponent + (int)testing_between(0, 8));
    if (with_odd && testing_chance(0.002))
        value = odd_values[testing_between(0, 7)];
    return testing_to_bf16((float)value);
}

/* Against fmaf(), pair by pair, as the manual of TDPBF16PS writes it down. */
START_TEST(emulated_dots_are_the_manuals)
{
    int flushes = 0;
    int64_t finite = 0, others = 0;
    for (int round = testing_rounds(300); round > 0; round--) {
        /* Products near the smallest normal number, near 1, or near the largest. */
        int exponent = round % 3 == 0 ? -67 : round % 3 == 1 ? -4 : 57;
        uint16_t a[TILE_SIDE][2 * TILE_SIDE], b[TILE_SIDE][2 * TILE_SIDE];
        float c[TILE_SIDE][TILE_SIDE], got[TILE_SIDE][TILE_SIDE];
        for (int i = 0; i < TILE_SIDE; i++) {
            for (int j = 0; j < 2 * TILE_SIDE; j++) {
                a[i][j] = some_bf16(exponent, round % 2);
                b[i][j] = some_bf16(exponent, round % 2);
                c[i][j / 2] = (float)ldexp(testing_uniform(), 2 * exponent + 8);
            }
        }
        tile_set tiles;
        tile_load(&tiles, 1, a, sizeof a[0]);
        tile_load(&tiles, 2, b, sizeof b[0]);
        tile_load(&tiles, 7, c, sizeof c[0]);
        tile_dot(&tiles, 7, 1, 2);
        tile_store(&tiles, 7, got, sizeof got[0]);
        for (int i = 0; i < TILE_SIDE; i++) {
            for (int j = 0; j < TILE_SIDE; j++) {
                float sums[2] = {0};
                for (int u = 0; u < 2 * TILE_SIDE; u++) {
                    float x = without_denormals(testing_from_bf16(a[i][u]));
                    float y = without_denormals(testing_from_bf16(b[u / 2][2 * j + u % 2]));
                    sums[u % 2] = flushed_fma(x, y, sums[u % 2], &flushes);
                }
                float sum = flushed_fma(sums[0], 1, sums[1], &flushes);
                float want = flushed_fma(without_denormals(c[i][j]), 1, sum, &flushes);
                check(isnan(want) ? isnan(got[i][j]) : memcmp(&want, &got[i][j], sizeof want) == 0,
                      "(%d, %d) is %a, not %a", i, j, (double)got[i][j], (double)want);
                finite += isfinite(want) && want != 0;
                others += !isfinite(want);
            }
        }
    }
    ck_assert(finite > 0 && others > 0 && flushes > 0);
}
END_TEST

/* _i: amx over emulated tiles, or amx. Its sums against those of the scalar kernels: the same bits. A
 * chip that disagrees with the manual within the bound of tile/amx is reported, not failed. */
START_TEST(tiles_give_the_bits_of_scalar)
{
    int tier = TIERS;
    for (int i = 0; _i == 1 && i < TIERS; i++) {
        tier = strcmp(tiers[i].isa, "amx") == 0 ? i : tier;
    }
    const sebp_kernels *kernels = product_kernels_of(tier, "tiles_give_the_bits_of_scalar");
    if (kernels == NULL || (_i == 1 && tier == TIERS)) {
        return;
    }
    const sebp_tile_shape *shape = &kernels->shape_bf16;
    int64_t sums = 0, others = 0;
    for (int round = testing_rounds(200); round > 0; round--) {
        int64_t units = testing_between(1, 200);
        buffer factors[2]; /* packed alike on both */
        for (int is_b = 0; is_b < 2; is_b++) {
            factors[is_b] = sliver(shape, is_b, units, shape->rows, 1, 0);
            uint16_t *pairs = (void *)factors[is_b].data;
            for (int64_t i = 0; round % 2 && i < 2 * filled(shape, units) * shape->cols; i++) {
                pairs[i] = testing_to_bf16(ldexpf(testing_from_bf16(pairs[i]), -62));
            }
        }
        float c[2][TILE_BLOCK * TILE_BLOCK], *rows[2][TILE_BLOCK];
        for (int side = 0; side < 2; side++) {
            for (int64_t i = 0; i < TILE_BLOCK; i++) {
                rows[side][i] = c[side] + i * TILE_BLOCK;
            }
            const sebp_kernels *of = side == 0 ? kernels : &sebp_kernels_scalar;
            const sebp_tile_work work = {.units = units,
                                         .a = (void *)factors[0].data,
                                         .b = (void *)factors[1].data,
                                         .c = rows[side],
                                         .rows = TILE_BLOCK,
                                         .cols = TILE_BLOCK};
            of->configure_tiles();
            of->tile_bf16(&work);
            of->release_tiles();
        }
        for (int64_t i = 0; i < TILE_BLOCK * TILE_BLOCK; i++) {
            others += memcmp(&c[0][i], &c[1][i], sizeof c[0][i]) != 0;
            sums++;
        }
        release(&factors[0]);
        release(&factors[1]);
    }
    if (others > 0) {
        printf("%s: %" PRId64 " of %" PRId64 " sums have other bits than the manual's\n",
               kernels->isa, others, sums);
    }
    ck_assert(_i == 1 || others == 0);
}
END_TEST

static int asked;

static bool permits(void)
{
    asked++;
    return true;
}

static bool refuses(void)
{
    asked++;
    return false;
}

/* AMX runs where build, CPU state and kernel allow it, and the kernel is not asked in vain. */
START_TEST(amx_waits_for_the_system)
{
    ck_assert_ptr_null(sebp_cpu_amx_refusal(true, true, permits));
    ck_assert_int_eq(asked, 1);
    ck_assert_ptr_nonnull(strstr(sebp_cpu_amx_refusal(true, true, refuses), "permission"));
    ck_assert_int_eq(asked, 2);
    ck_assert_ptr_nonnull(strstr(sebp_cpu_amx_refusal(true, false, permits), "does not save"));
    ck_assert_ptr_nonnull(strstr(sebp_cpu_amx_refusal(false, true, permits), "build"));
    ck_assert_int_eq(asked, 2);
    for (int i = 0; sebp_cpu_tier(i) != NULL; i++) {
        if (strcmp(sebp_cpu_tier(i)->isa, "amx") == 0)
            ck_assert_ptr_null(sebp_cpu_amx_refused());
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("product kernels");
    TCase *all = tcase_create("product kernels");
    tcase_add_loop_test(all, pack, 0, TIERS + 1);
    tcase_add_loop_test(all, tile, 0, TIERS + 1);
    tcase_add_test(all, emulated_dots_are_the_manuals);
    tcase_add_loop_test(all, tiles_give_the_bits_of_scalar, 0, 2);
    tcase_add_test(all, amx_waits_for_the_system);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
