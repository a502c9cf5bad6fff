/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_kernels.c
 * Every kernel of every ISA against the definition in simd.h, written down here a second time in
 * the plainest loops. Where the contract leaves no choice the result must be equal to the last bit.
 * Those of elements, of random numbers and of products
 * have programs of their own.
 *
 * All data lies in buffers between two forbidden pages, and the whole of the pages between them is
 * compared, so that a byte read or written too many shows.
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_harness.h"

static bool any_nonzero(const sebp_kernels *kernels, int is_bf16, const void *row, int64_t n)
{
    return is_bf16 ? kernels->any_nonzero_bf16(row, n) : kernels->any_nonzero_f32(row, n);
}

START_TEST(nonzero)
{
    const sebp_kernels *kernels = kernels_of(_i, "nonzero");
    if (kernels == NULL) {
        return;
    }
    const double odd_values[] = {NAN, -NAN,     INFINITY,  -INFINITY, 1,
                                 -1,  0x1p-149, -0x1p-149, 1e-39,     FLT_MAX};
    int active = 0, inactive = 0;
    for (int round = testing_rounds(3000); round > 0; round--) {
        int is_bf16 = round % 2;
        int64_t n = length();
        buffer row = make(n, bytes_of(is_bf16));
        for (int64_t i = 0; i < n; i++) {
            put(row.data, is_bf16, i, testing_chance(0.5) ? 0.0 : -0.0);
        }
        bool expected = n > 0 && testing_chance(0.7);
        if (expected) {
            double value = odd_values[testing_between(0, 9)];
            value = is_bf16 && fabs(value) == 0x1p-149 ? copysign(0x1p-133, value) : value;
            put(row.data, is_bf16, testing_between(0, n - 1), value);
        }
        flush_denormals(testing_chance(0.5));
        bool found = any_nonzero(kernels, is_bf16, row.data, n);
        flush_denormals(0);
        check(found == expected, "%d of %" PRId64 " elements", found, n);
        active += expected;
        inactive += !expected;
        release(&row);
    }
    ck_assert(active > 0 && inactive > 0);
}
END_TEST

static bool any_above(const sebp_kernels *kernels, int is_bf16, const void *row, int64_t n,
                      float limit)
{
    return is_bf16 ? kernels->any_above_bf16(row, n, limit) : kernels->any_above_f32(row, n, limit);
}

START_TEST(above)
{
    const sebp_kernels *kernels = kernels_of(_i, "above");
    if (kernels == NULL) {
        return;
    }
    int active = 0, inactive = 0;
    for (int round = testing_rounds(3000); round > 0; round--) {
        int is_bf16 = round % 2;
        int64_t n = length();
        /* A limit that bf16 can hold, so that elements may be equal to it. */
        const double limits[] = {0,          -0.0,    0x1p-133, 1.0, fabs(testing_uniform()),
                                 0x1.FEp127, INFINITY};
        uint16_t near = testing_to_bf16((float)limits[testing_between(0, 6)]);
        float limit = testing_from_bf16(near);
        buffer row = make(n, bytes_of(is_bf16));
        for (int64_t i = 0; i < n; i++) {
            double max = isinf(limit) ? FLT_MAX / 2 : limit;
            double value = testing_chance(0.2) ? max : max * testing_uniform();
            put(row.data, is_bf16, i, testing_chance(0.5) ? value : -value);
        }
        if (n > 0 && testing_chance(0.6)) {
            float next = is_bf16 ? testing_from_bf16((uint16_t)(near + (near != 0x7F80)))
                                 : nextafterf(limit, INFINITY);
            const double values[] = {next, -next, NAN, -NAN, INFINITY, -INFINITY};
            put(row.data, is_bf16, testing_between(0, n - 1), values[testing_between(0, 5)]);
        }
        bool expected = false;
        for (int64_t i = 0; i < n; i++) {
            double value = get(row.data, is_bf16, i);
            expected = expected || !isfinite(value) || fabs(value) > fabsf(limit);
        }
        flush_denormals(testing_chance(0.5));
        bool found = any_above(kernels, is_bf16, row.data, n, limit);
        flush_denormals(0);
        check(found == expected, "%d for %a of %" PRId64 " elements", found, (double)limit, n);
        active += expected;
        inactive += !expected;
        release(&row);
    }
    ck_assert(active > 0 && inactive > 0);
}
END_TEST

START_TEST(square_sum)
{
    const sebp_kernels *kernels = kernels_of(_i, "square_sum");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(2000); round > 0; round--) {
        int is_bf16 = round % 2;
        int integers = round / 2 % 2;
        int64_t n = length();
        buffer row = make(n, bytes_of(is_bf16));
        double scale = integers ? 1 : testing_chance(0.5) ? 1e38 : 1e-30;
        double expected = 0;
        for (int64_t i = 0; i < n; i++) {
            put(row.data, is_bf16, i, scale * value_of(integers));
            expected += get(row.data, is_bf16, i) * get(row.data, is_bf16, i);
        }
        double odd = testing_chance(0.5) ? NAN : -INFINITY;
        int is_odd = n > 0 && testing_chance(0.1);
        if (is_odd) {
            put(row.data, is_bf16, testing_between(0, n - 1), odd);
        }
        double found = is_bf16 ? kernels->square_sum_bf16((const void *)row.data, n)
                               : kernels->square_sum_f32((const void *)row.data, n);
        if (is_odd) {
            check(isnan(odd) ? isnan(found) : found == INFINITY, "%a", found);
        } else if (integers) {
            check(found == expected, "%a, not %a", found, expected);
        } else {
            check(fabs(found - expected) <= (double)n * DBL_EPSILON * expected, "%a, not %a", found,
                  expected);
        }
        release(&row);
    }
}
END_TEST

START_TEST(move)
{
    const sebp_kernels *kernels = kernels_of(_i, "move");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1000); round > 0; round--) {
        size_t element = bytes_of(round % 2);
        int64_t count = testing_between(0, 20), total = count + testing_between(1, 20);
        int64_t cols = testing_between(0, 100);
        int64_t row_bytes = cols * (int64_t)element;
        int64_t to_stride = strided(cols), from_stride = strided(cols);
        buffer to = make((total - 1) * to_stride + cols, element);
        buffer from = make((total - 1) * from_stride + cols, element);
        for (int64_t i = 0; i < ((total - 1) * from_stride + cols) * (int64_t)element; i++) {
            from.data[i] = (unsigned char)testing_random();
        }
        to_stride *= (int64_t)element;
        from_stride *= (int64_t)element;
        buffer to_list = ascending_rows(count, total), from_list = any_rows(count, total);
        const int64_t *to_rows = testing_chance(0.7) ? (const void *)to_list.data : NULL;
        const int64_t *from_rows = testing_chance(0.7) ? (const void *)from_list.data : NULL;
        unsigned char *expected = twin_of(&to);
        for (int64_t i = 0; i < count; i++) {
            for (int64_t j = 0; j < row_bytes; j++) {
                expected[(to_rows != NULL ? to_rows[i] : i) * to_stride + j] =
                    from.data[(from_rows != NULL ? from_rows[i] : i) * from_stride + j];
            }
        }
        kernels->move_rows((char *)to.data, to_stride, to_rows, (const char *)from.data,
                           from_stride, from_rows, count, row_bytes);
        release(&to);
        release(&from);
        release(&to_list);
        release(&from_list);
    }
}
END_TEST

START_TEST(expand)
{
    const sebp_kernels *kernels = kernels_of(_i, "expand");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1000); round > 0; round--) {
        size_t element = bytes_of(round % 2);
        int64_t total = testing_between(1, 40);
        int64_t count = testing_chance(0.1) ? total : testing_between(0, total);
        int64_t cols = testing_between(0, 100);
        int64_t stride = strided(cols) * (int64_t)element, row_bytes = cols * (int64_t)element;
        buffer data = make((total - 1) * stride + row_bytes, 1);
        for (int64_t i = 0; i < count; i++) {
            for (int64_t j = 0; j < row_bytes; j++) {
                data.data[i * stride + j] = (unsigned char)testing_random();
            }
        }
        buffer list = ascending_rows(count, total);
        const int64_t *rows = (const void *)list.data;
        unsigned char *expected = twin_of(&data);
        for (int64_t i = 0; i < count; i++) {
            for (int64_t j = 0; j < row_bytes; j++) {
                expected[rows[i] * stride + j] = data.data[i * stride + j];
            }
        }
        kernels->expand_rows((char *)data.data, stride, rows, count, row_bytes);
        release(&data);
        release(&list);
    }
}
END_TEST

START_TEST(zero)
{
    const sebp_kernels *kernels = kernels_of(_i, "zero");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1000); round > 0; round--) {
        int64_t count = length();
        buffer data = make(count, sizeof(uint16_t));
        memset(twin_of(&data), 0, (size_t)count * sizeof(uint16_t));
        kernels->zero(data.data, count * (int64_t)sizeof(uint16_t), round % 2);
        kernels->stream_fence();
        release(&data);
    }
}
END_TEST

START_TEST(f32_from_bf16)
{
    const sebp_kernels *kernels = kernels_of(_i, "f32_from_bf16");
    if (kernels == NULL) {
        return;
    }
    /* Every bf16 there is, in runs of every length. */
    uint16_t next = 0;
    for (int64_t met = 0; met < 65536;) {
        int64_t n = length();
        buffer from = make(n, sizeof(uint16_t)), to = make(n, sizeof(float));
        uint16_t *elements = (void *)from.data;
        uint32_t *expected = twin_of(&to);
        for (int64_t i = 0; i < n; i++, next++) {
            elements[i] = next;
            expected[i] = (uint32_t)next << 16;
        }
        flush_denormals(testing_chance(0.5));
        kernels->f32_from_bf16((void *)to.data, elements, n);
        flush_denormals(0);
        met += n;
        release(&from);
        release(&to);
    }
}
END_TEST

START_TEST(bf16_from_f32)
{
    const sebp_kernels *kernels = kernels_of(_i, "bf16_from_f32");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(2000); round > 0; round--) {
        int64_t n = length();
        buffer from = make(n, sizeof(float)), to = make(n, sizeof(uint16_t));
        float *elements = (void *)from.data;
        uint16_t *expected = twin_of(&to);
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)testing_random();
            /* Ties and their neighbours; exponents of all ones (Inf, NaN) or zeros (denormals). */
            const uint32_t low[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
            bits = testing_chance(0.5) ? (bits & 0xFFFF0000) | low[testing_between(0, 5)] : bits;
            bits = testing_chance(0.1) ? bits | 0x7F800000 : bits;
            bits = testing_chance(0.1) ? bits & 0x807FFFFF : bits;
            bits = testing_chance(0.05) ? bits & 0xFF80FFFF : bits;
            elements[i] = float_of(bits);
            expected[i] = testing_to_bf16(elements[i]);
        }
        flush_denormals(testing_chance(0.5));
        kernels->bf16_from_f32((void *)to.data, elements, n);
        flush_denormals(0);
        release(&from);
        release(&to);
    }
}
END_TEST

START_TEST(add_rows)
{
    const sebp_kernels *kernels = kernels_of(_i, "add_rows");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(800); round > 0; round--) {
        int is_bf16 = round % 2;
        int64_t count = testing_between(0, 40), total = count + testing_between(1, 10);
        int64_t cols = testing_between(0, 150), stride = strided(cols);
        buffer from = make((total - 1) * stride + cols, bytes_of(is_bf16));
        buffer sum = make(cols, sizeof(float));
        for (int64_t i = 0; i < total; i++) {
            for (int64_t j = 0; j < cols; j++) {
                put(from.data, is_bf16, i * stride + j, testing_uniform());
            }
        }
        for (int64_t j = 0; j < cols; j++) {
            put(sum.data, 0, j, testing_uniform());
        }
        buffer list = any_rows(count, total);
        const int64_t *rows = testing_chance(0.7) ? (const void *)list.data : NULL;
        /* The order of the rows is fixed, so there is only one right answer. */
        float *expected = twin_of(&sum);
        for (int64_t j = 0; j < cols; j++) {
            for (int64_t i = 0; i < count; i++) {
                int64_t row = rows != NULL ? rows[i] : i;
                expected[j] += (float)get(from.data, is_bf16, row * stride + j);
            }
        }
        if (is_bf16) {
            kernels->add_rows_bf16((void *)sum.data, (void *)from.data, stride, rows, count, cols);
        } else {
            kernels->add_rows_f32((void *)sum.data, (void *)from.data, stride, rows, count, cols);
        }
        release(&from);
        release(&sum);
        release(&list);
    }
}
END_TEST

START_TEST(sum_scaled_rows)
{
    const sebp_kernels *kernels = kernels_of(_i, "sum_scaled_rows");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(800); round > 0; round--) {
        int integers = round % 2;
        int64_t count = testing_between(0, 40), total = count + testing_between(1, 10);
        int64_t cols = testing_between(0, 300), stride = strided(cols);
        buffer from = make((total - 1) * stride + cols, sizeof(float));
        buffer sum = make(cols, sizeof(float)), scale = make(count, sizeof(float));
        for (int64_t i = 0; i < total; i++) {
            for (int64_t j = 0; j < cols; j++) {
                put(from.data, 0, i * stride + j, value_of(integers));
            }
        }
        for (int64_t i = 0; i < count; i++) {
            put(scale.data, 0, i, value_of(integers));
        }
        buffer rows = any_rows(count, total);
        kernels->sum_scaled_rows((void *)sum.data, (void *)from.data, stride, (void *)rows.data,
                                 (void *)scale.data, count, cols);
        for (int64_t j = 0; j < cols; j++) {
            double expected = 0, magnitude = 0, found = get(sum.data, 0, j);
            for (int64_t i = 0; i < count; i++) {
                int64_t row = ((const int64_t *)(void *)rows.data)[i];
                double term = get(scale.data, 0, i) * get(from.data, 0, row * stride + j);
                expected += term;
                magnitude += fabs(term);
            }
            double bound = integers ? 0 : (double)count * FLT_EPSILON * magnitude;
            check(fabs(found - expected) <= bound, "%a, not %a", found, expected);
        }
        memset(sum.data, TESTING_POISON, (size_t)cols * sizeof(float));
        for (size_t i = 0; i < sum.open_bytes; i++) {
            check(sum.open[i] == TESTING_POISON, "written beside the sums");
        }
        release(&from);
        release(&sum);
        release(&scale);
        release(&rows);
    }
}
END_TEST

START_TEST(table)
{
    const sebp_kernels *kernels = kernels_of(_i, "table");
    if (kernels == NULL) {
        return;
    }
    ck_assert_str_eq(kernels->isa, tiers[_i].isa);
    const sebp_tile_shape *f32 = &kernels->shape_f32, *bf16 = &kernels->shape_bf16;
    ck_assert(f32->rows > 0 && f32->cols > 0 && f32->slack >= 0 && f32->unit_elements == 1);
    ck_assert(bf16->rows > 0 && bf16->cols > 0 && bf16->slack >= 0);
    ck_assert(bf16->unit_elements == 1 || bf16->unit_elements == 2);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("kernels");
    TCase *all = tcase_create("kernels");
    tcase_add_loop_test(all, table, 0, TIERS);
    tcase_add_loop_test(all, nonzero, 0, TIERS);
    tcase_add_loop_test(all, above, 0, TIERS);
    tcase_add_loop_test(all, square_sum, 0, TIERS);
    tcase_add_loop_test(all, move, 0, TIERS);
    tcase_add_loop_test(all, expand, 0, TIERS);
    tcase_add_loop_test(all, zero, 0, TIERS);
    tcase_add_loop_test(all, f32_from_bf16, 0, TIERS);
    tcase_add_loop_test(all, bf16_from_f32, 0, TIERS);
    tcase_add_loop_test(all, add_rows, 0, TIERS);
    tcase_add_loop_test(all, sum_scaled_rows, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
