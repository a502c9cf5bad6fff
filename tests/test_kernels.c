/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_kernels.c
 * Every kernel of every ISA against the definition in simd.h, written down here a second time in
 * the plainest loops. Where the contract leaves no choice the result must be equal to the last bit.
 *
 * All data lies in buffers between two forbidden pages, and the whole of the pages between them is
 * compared, so that a byte read or written too many shows.
 *
 *     SEBP_TEST_TIMING=1   also prints the time of every kernel
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernel_harness.h"
#include "lib/philox.h"

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

START_TEST(at_least)
{
    const sebp_kernels *kernels = kernels_of(_i, "at_least");
    if (kernels == NULL) {
        return;
    }
    int64_t most_listed = 0, most_equal = 0;
    for (int round = testing_rounds(2000); round > 0; round--) {
        const uint32_t bits[] = {0,          1,          2,          0x00800000,
                                 0x3F000000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF};
        uint32_t min = bits[testing_between(0, 7)];
        int64_t n = length(), first = testing_between(0, 1000), wanted = 0, equal = 0;
        buffer row = make(n, sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            uint32_t near = min + (uint32_t)testing_between(min > 0 ? -1 : 0, 1);
            float as = (float)testing_uniform();
            if (testing_chance(0.5) && near <= 0x7FFFFFFF) {
                near |= testing_chance(0.5) ? 0x80000000 : 0;
                memcpy(&as, &near, sizeof as);
            }
            memcpy((float *)(void *)row.data + i, &as, sizeof as);
        }
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude;
            memcpy(&magnitude, (const float *)(void *)row.data + i, sizeof magnitude);
            wanted += (magnitude & 0x7FFFFFFF) >= min;
            equal += (magnitude & 0x7FFFFFFF) == min;
        }
        /* Room for just those that there are: the guard bands tell of more. */
        buffer indices = make(wanted, sizeof(int64_t)), values = make(wanted, sizeof(float));
        int64_t count = 5, above = 7, listed = 0, *list = (void *)indices.data;
        float *kept = (void *)values.data;
        flush_denormals(testing_chance(0.5));
        kernels->count_at_least((void *)row.data, n, min, &count, &above);
        int64_t got = kernels->list_at_least((void *)row.data, n, min, first, list, kept);
        flush_denormals(0);
        check(count == 5 + wanted && above == 7 + wanted - equal && got == wanted,
              "%" PRId64 " and %" PRId64 " are counted, %" PRId64 " listed, of %" PRId64
              " and %" PRId64,
              count - 5, above - 7, got, wanted, wanted - equal);
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude;
            memcpy(&magnitude, (const float *)(void *)row.data + i, sizeof magnitude);
            if ((magnitude & 0x7FFFFFFF) >= min) {
                check(list[listed] == first + i &&
                          memcmp(&kept[listed], (const float *)(void *)row.data + i,
                                 sizeof(float)) == 0,
                      "element %" PRId64 " is not listed", i);
                listed++;
            }
        }
        int64_t none =
            kernels->list_at_least((void *)row.data, n, (uint32_t)1 << 31, first, list, kept);
        check(none == 0, "%" PRId64 " are above all there is", none);
        most_listed = wanted > most_listed ? wanted : most_listed;
        most_equal = equal > most_equal ? equal : most_equal;
        release(&row);
        release(&indices);
        release(&values);
    }
    ck_assert(most_listed > 20 && most_equal > 5);
}
END_TEST

START_TEST(adamw)
{
    const sebp_kernels *kernels = kernels_of(_i, "adamw");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(2000); round > 0; round--) {
        int64_t n = length();
        int g_is_bf16 = round % 2, w_is_bf16 = round / 2 % 2, step_alone = testing_chance(0.5);
        int in_place = step_alone && g_is_bf16 == w_is_bf16 && testing_chance(0.5);
        buffer g = make(n, bytes_of(g_is_bf16)), other = make(n, bytes_of(w_is_bf16));
        buffer *w = in_place ? &g : &other;
        buffer m = make(n, sizeof(float)), v = make(n, sizeof(float));
        double *old_g = malloc((size_t)(n + 1) * sizeof *old_g);
        check(old_g != NULL, "no memory");
        for (int64_t i = 0; i < n; i++) {
            put(g.data, g_is_bf16, i, testing_chance(0.1) ? 0 : testing_uniform());
            put(m.data, 0, i, testing_uniform());
            put(v.data, 0, i, testing_chance(0.1) ? 0 : fabs(testing_uniform()));
            if (!step_alone) {
                put(w->data, w_is_bf16, i, testing_uniform());
            }
            old_g[i] = get(g.data, g_is_bf16, i);
        }
        sebp_adamw_work work = {.beta1 = 0.9F,
                                .gain1 = 0.1F,
                                .beta2 = 0.99F,
                                .gain2 = 0.01F,
                                .root2 = 3,
                                .epsilon = testing_chance(0.5) ? 1e-8F : 0.1F,
                                .rate = -0.25F,
                                .keep = 0.875F,
                                .g = g.data,
                                .w = w->data,
                                .g_is_bf16 = g_is_bf16,
                                .w_is_bf16 = w_is_bf16,
                                .step_alone = step_alone,
                                .moment1 = (void *)m.data,
                                .moment2 = (void *)v.data,
                                .n = n};
        float *m_twin = twin_of(&m), *v_twin = twin_of(&v);
        void *w_twin = twin_of(w);
        kernels->adamw(&work);
        for (int64_t i = 0; i < n; i++) {
            const double eps = FLT_EPSILON;
            double m_got = get(m.data, 0, i), v_got = get(v.data, 0, i);
            double w_got = get(w->data, w_is_bf16, i), w_old = get(w_twin, w_is_bf16, i);
            double gain = (double)work.gain1 * old_g[i];
            double m_want = (double)work.beta1 * (double)m_twin[i] + gain;
            double v_want =
                (double)work.beta2 * (double)v_twin[i] + (double)work.gain2 * old_g[i] * old_g[i];
            /* The step follows from the moments as they were stored. */
            double w_want = (double)work.rate * m_got /
                            (sqrt(v_got) * (double)work.root2 + (double)work.epsilon);
            double bound = 3 * eps * fabs(w_want);
            if (!step_alone) {
                w_want += (double)work.keep * w_old;
                bound += eps * (fabs(w_old) + fabs(w_want));
            }
            bound += w_is_bf16 ? 0x1p-8 * (fabs(w_want) + bound) : 0;
            check(fabs(m_got - m_want) <= eps * (fabs((double)m_twin[i]) + fabs(gain)),
                  "moment1 %a, not %a", m_got, m_want);
            check(fabs(v_got - v_want) <= 2 * eps * v_want, "moment2 %a, not %a", v_got, v_want);
            check(fabs(w_got - w_want) <= bound, "w %a, not %a", w_got, w_want);
            put(m_twin, 0, i, m_got);
            put(v_twin, 0, i, v_got);
            put(w_twin, w_is_bf16, i, w_got);
        }
        free(old_g);
        release(&g);
        release(&other);
        release(&m);
        release(&v);
    }
}
END_TEST

START_TEST(scale)
{
    const sebp_kernels *kernels = kernels_of(_i, "scale");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1000); round > 0; round--) {
        int is_bf16 = round % 2;
        int64_t n = length();
        float factor = (float)testing_uniform();
        buffer data = make(n, bytes_of(is_bf16));
        for (int64_t i = 0; i < n; i++) {
            put(data.data, is_bf16, i, testing_uniform());
        }
        void *expected = twin_of(&data);
        for (int64_t i = 0; i < n; i++) {
            put(expected, is_bf16, i, (double)(factor * (float)get(data.data, is_bf16, i)));
        }
        if (is_bf16) {
            kernels->scale_bf16((void *)data.data, n, factor);
        } else {
            kernels->scale_f32((void *)data.data, n, factor);
        }
        release(&data);
    }
}
END_TEST

/* The known answers that are published with Random123 (kat_vectors: philox4x32 10). */
START_TEST(philox)
{
    static const struct {
        uint32_t counter[4], key[2], answer[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
        {{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF},
         {0xFFFFFFFF, 0xFFFFFFFF},
         {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
        {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
         {0xA4093822, 0x299F31D0},
         {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t counter[4];
        memcpy(counter, known[i].counter, sizeof counter);
        sebp_philox(counter, known[i].key[0], known[i].key[1]);
        for (int word = 0; word < 4; word++) {
            ck_assert_uint_eq(counter[word], known[i].answer[word]);
        }
    }
}
END_TEST

static uint64_t random_bits(void)
{
    return testing_chance(0.2) ? UINT64_MAX : testing_random();
}

/* Every element that is dropped at p is kept at the p that is its number, and the other way round:
 * so each bit of the numbers is looked at. */
START_TEST(dropout_scales)
{
    const sebp_kernels *kernels = kernels_of(_i, "dropout_scales");
    if (kernels == NULL) {
        return;
    }
    enum { GROUP = SEBP_RANDOM_GROUP, MAX_GROUPS = 4 };
    const float step = 0x1p-24f;
    int64_t kept = 0, dropped = 0;
    for (int round = testing_rounds(2000); round > 0; round--) {
        int64_t groups = testing_between(0, MAX_GROUPS);
        /* Also where the counter's words carry and where it ends. */
        uint64_t group = random_bits() >> (testing_chance(0.5) ? 4 : testing_between(4, 63));
        group = testing_chance(0.3) ? (UINT64_C(1) << 28) - 2 : group;
        sebp_dropout dropout = {.seed = random_bits(), .offset = random_bits()};
        float number[MAX_GROUPS * GROUP];
        for (int64_t i = 0; i < groups * GROUP; i++) {
            uint64_t block = (group + (uint64_t)i / GROUP) * 16 + (uint64_t)i % 16;
            uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32),
                                   (uint32_t)dropout.offset, (uint32_t)(dropout.offset >> 32)};
            sebp_philox(counter, (uint32_t)dropout.seed, (uint32_t)(dropout.seed >> 32));
            number[i] = (float)(counter[i % GROUP / 16] >> 8) * step;
        }
        int64_t of = groups > 0 ? testing_between(0, groups * GROUP - 1) : 0;
        dropout.p = groups == 0 ? 0.5F : number[of] + (testing_chance(0.5) ? step : 0);
        dropout.scale = (float)testing_uniform();
        buffer scales = make(groups * GROUP, sizeof(float));
        float *expected = twin_of(&scales);
        for (int64_t i = 0; i < groups * GROUP; i++) {
            expected[i] = number[i] < dropout.p ? 0 : dropout.scale;
            dropped += number[i] < dropout.p;
            kept += number[i] >= dropout.p;
            if (group < UINT64_C(1) << 57) {
                uint64_t element = group * GROUP + (uint64_t)i;
                float public = sebp_random_uniform(dropout.seed, dropout.offset, element);
                check(public == number[i], "%a, not %a", (double)public, (double)number[i]);
            }
        }
        kernels->dropout_scales((void *)scales.data, groups, &dropout, group);
        release(&scales);
    }
    ck_assert(kept > 0 && dropped > 0);
}
END_TEST

/* What unit u of lane l must hold, in bits. */
static uint32_t unit_of(const sebp_slab *from, int is_bf16, int pairs, int64_t lane, int64_t at,
                        int64_t depth, int64_t u)
{
    uint32_t unit = 0;
    int elements = pairs ? 2 : 1;
    for (int i = 0; i < elements && u * elements + i < depth; i++) {
        int64_t along = at + u * elements + i;
        int64_t row = from->lanes_are_rows ? lane : along;
        int64_t col = from->lanes_are_rows ? along : lane;
        int64_t element = (from->rows != NULL ? from->rows[row] : row) * from->stride + col;
        if (is_bf16) {
            uint32_t half = ((const uint16_t *)from->data)[element];
            unit |= half << (pairs && i == 0 ? 0 : 16);
        } else {
            memcpy(&unit, (const float *)from->data + element, sizeof unit);
        }
    }
    return unit;
}

START_TEST(pack)
{
    const sebp_kernels *kernels = kernels_of(_i, "pack");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(1500); round > 0; round--) {
        int is_bf16 = round % 2, is_b = round / 2 % 2;
        int pairs = is_bf16 && kernels->bf16_dots;
        int64_t width = is_b ? kernels->tile_cols : kernels->tile_rows;
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
        int64_t apart = units * width + kernels->slack + testing_between(0, 20);
        buffer packed = make(slivers * apart, sizeof(float));
        uint32_t *expected = twin_of(&packed);
        pack((void *)packed.data, apart, &from, lane, lanes, at, depth);
        for (int64_t s = 0; s < slivers; s++) {
            for (int64_t u = 0; u < units; u++) {
                for (int64_t l = 0; l < width; l++) {
                    int64_t of = s * width + l;
                    expected[s * apart + u * width + l] =
                        of < lanes ? unit_of(&from, is_bf16, pairs, lane + of, at, depth, u) : 0;
                }
            }
            /* What stands in the slack is nobody's business. */
            memcpy(expected + s * apart + units * width,
                   packed.data + (size_t)(s * apart + units * width) * sizeof(float),
                   (size_t)kernels->slack * sizeof(float));
        }
        release(&packed);
        release(&data);
        release(&list);
    }
}
END_TEST

/* A packed sliver. Its lanes from `lanes` on hold NaN, which must not get into C. */
static buffer sliver(int64_t units, int64_t width, int64_t lanes, int is_bf16, int pairs,
                     int integers)
{
    buffer made = make(units * width, sizeof(float));
    int64_t elements = pairs ? 2 : 1;
    for (int64_t u = 0; u < units; u++) {
        for (int64_t i = 0; i < lanes * elements; i++) {
            double value = value_of(integers);
            value = is_bf16 ? testing_from_bf16(testing_to_bf16((float)value)) : value;
            put(made.data, pairs, u * width * elements + i, value);
        }
    }
    return made;
}

START_TEST(tile)
{
    const sebp_kernels *kernels = kernels_of(_i, "tile");
    if (kernels == NULL) {
        return;
    }
    int64_t height = kernels->tile_rows, width = kernels->tile_cols;
    for (int round = testing_rounds(1500); round > 0; round--) {
        int is_bf16 = round % 2, integers = round / 2 % 2, pack_b = round / 4 % 2;
        int pairs = is_bf16 && kernels->bf16_dots;
        int64_t elements = pairs ? 2 : 1;
        int64_t units = testing_between(0, 60), depth = units * elements;
        int64_t rows = testing_between(1, height);
        int64_t cols = pack_b ? width : testing_between(1, width);
        buffer a = sliver(units, height, rows, is_bf16, pairs, integers);
        buffer b = sliver(units, width, cols, is_bf16, pairs, integers);

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
        buffer b_room = make(units * width, sizeof(float));
        void *b_expected = twin_of(&b_room);
        if (pack_b) {
            memcpy(b_expected, b.data, (size_t)(units * width) * sizeof(float));
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
            .b = (void *)(pack_b ? b_room.data : b.data),
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
        (is_bf16 ? kernels->tile_bf16 : kernels->tile_f32)(&work);

        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < cols; j++) {
                float *twin = (void *)((unsigned char *)(c_rows[i] + c_first + j) + to_twin);
                double old = adds_other ? from[i][c_first + j] : accumulate ? *twin : 0;
                double added = has_bias ? get(bias.data, 0, j) : 0;
                double sum = old + added, magnitude = fabs(old) + fabs(added);
                for (int64_t u = 0; u < units; u++) {
                    for (int64_t e = 0; e < elements; e++) {
                        double product = get(a.data, pairs, (u * height + i) * elements + e) *
                                         get(b.data, pairs, (u * width + j) * elements + e);
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

START_TEST(table)
{
    const sebp_kernels *kernels = kernels_of(_i, "table");
    if (kernels == NULL) {
        return;
    }
    ck_assert_str_eq(kernels->isa, tiers[_i].isa);
    ck_assert(kernels->tile_rows > 0 && kernels->tile_cols > 0 && kernels->slack >= 0);
}
END_TEST

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

/* Rows in the cache, and then a matrix that is in none. */
START_TEST(timing)
{
    const sebp_kernels *kernels = kernels_of(_i, "timing");
    if (kernels == NULL) {
        return;
    }
    enum { ROWS = 8, COLS = 3072, BYTES = 4 * COLS };
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

    enum { DEPTH = 256 };
    int64_t height = kernels->tile_rows, width = kernels->tile_cols;
    const sebp_slab slab = {f32, DEPTH, NULL, true}, across = {f32, width, NULL, false};
    buffer a = make((DEPTH + 1) * height + kernels->slack, sizeof(float));
    buffer b = make((DEPTH + 1) * width + kernels->slack, sizeof(float));
    buffer c = make(height * width, sizeof(float));
    float *pack_a = (void *)a.data, *pack_b = (void *)b.data, *c_rows[64];
    ck_assert(height <= 64 && width * DEPTH <= ROWS * COLS);
    for (int64_t i = 0; i < height; i++) {
        c_rows[i] = (float *)(void *)c.data + i * width;
    }
    int64_t apart = DEPTH * width + kernels->slack;
    const sebp_tile_work work = {.units = DEPTH,
                                 .a = pack_a,
                                 .b = pack_b,
                                 .c = c_rows,
                                 .rows = height,
                                 .cols = width,
                                 .accumulate = true,
                                 .from = (const float *const *)c_rows};
    TIME(kernels, "pack_a_f32", 8 * height * DEPTH,
         kernels->pack_a_f32(pack_a, apart, &slab, 0, height, 0, DEPTH));
    TIME(kernels, "pack_b_f32", 8 * width * DEPTH,
         kernels->pack_b_f32(pack_b, apart, &across, 0, width, 0, DEPTH));
    TIME(kernels, "tile_f32", 4 * (height + width) * DEPTH, kernels->tile_f32(&work));
    TIME(kernels, "pack_a_bf16", (kernels->bf16_dots ? 4 : 6) * height * DEPTH,
         kernels->pack_a_bf16(pack_a, apart, &slab, 0, height, 0, DEPTH));
    TIME(kernels, "pack_b_bf16", (kernels->bf16_dots ? 4 : 6) * width * DEPTH,
         kernels->pack_b_bf16(pack_b, apart, &across, 0, width, 0, DEPTH));
    TIME(kernels, "tile_bf16", 4 * (height + width) * DEPTH, kernels->tile_bf16(&work));
    release(&a);
    release(&b);
    release(&c);
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
    tcase_add_loop_test(all, at_least, 0, TIERS);
    tcase_add_loop_test(all, adamw, 0, TIERS);
    tcase_add_loop_test(all, scale, 0, TIERS);
    tcase_add_test(all, philox);
    tcase_add_loop_test(all, dropout_scales, 0, TIERS);
    tcase_add_loop_test(all, pack, 0, TIERS);
    tcase_add_loop_test(all, tile, 0, TIERS);
    if (testing_environment("SEBP_TEST_TIMING")) {
        tcase_add_loop_test(all, timing, 0, TIERS);
    }
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
