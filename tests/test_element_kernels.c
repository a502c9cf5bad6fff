/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_element_kernels.c
 * The kernels of elements on every ISA, as test_kernels.c has those of rows: the largest magnitudes,
 * AdamW, dropout's random numbers.
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_harness.h"
#include "lib/philox.h"

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

START_TEST(transpose_rows)
{
    const sebp_kernels *kernels = kernels_of(_i, "transpose_rows");
    if (kernels == NULL) {
        return;
    }
    int64_t moved = 0;
    for (int round = testing_rounds(1000); round > 0; round--) {
        int64_t count = testing_between(0, 70), cols = testing_between(0, 70);
        int64_t total = testing_between(1, 90), stride = strided(cols), to_stride = strided(count);
        int is_bf16 = round % 2, is_listed = testing_chance(0.7);
        total = is_listed || total > count ? total : count;
        buffer rows = any_rows(is_listed ? count : 0, total);
        const int64_t *listed = is_listed ? (const int64_t *)(void *)rows.data : NULL;
        buffer from = make(total > 0 ? (total - 1) * stride + cols : 0, bytes_of(is_bf16));
        buffer to = make(cols > 0 ? (cols - 1) * to_stride + count : 0, sizeof(float));
        for (int64_t i = 0; i < total * cols; i++) {
            put(from.data, is_bf16, i / cols * stride + i % cols, testing_uniform());
        }
        float *twin = twin_of(&to);
        for (int64_t i = 0; i < count * cols; i++) {
            int64_t at = i / cols, col = i % cols, row = is_listed ? listed[at] : at;
            put(twin, 0, col * to_stride + at, get(from.data, is_bf16, row * stride + col));
        }
        kernels->transpose_rows((void *)to.data, to_stride, from.data, is_bf16, stride, listed,
                                count, cols);
        moved += count * cols;
        release(&rows);
        release(&from);
        release(&to);
    }
    ck_assert_int_gt(moved, 1000);
}
END_TEST

START_TEST(dots)
{
    enum { VECTORS = 9, MAX_PAIRS = 70 };
    const sebp_kernels *kernels = kernels_of(_i, "dots");
    if (kernels == NULL) {
        return;
    }
    for (int round = testing_rounds(500); round > 0; round--) {
        int64_t n = length(), pairs = testing_between(0, MAX_PAIRS);
        int integers = testing_chance(0.5);
        buffer vectors[VECTORS], sums = make(pairs, sizeof(float));
        for (int v = 0; v < VECTORS; v++) {
            vectors[v] = make(n, sizeof(float));
            for (int64_t i = 0; i < n; i++) {
                put(vectors[v].data, 0, i, value_of(integers));
            }
        }
        const float *a[MAX_PAIRS], *b[MAX_PAIRS];
        float *got = (void *)sums.data, *twin = twin_of(&sums);
        for (int64_t i = 0; i < pairs; i++) {
            a[i] = (const float *)(void *)vectors[testing_between(0, VECTORS - 1)].data;
            b[i] = (const float *)(void *)vectors[testing_between(0, VECTORS - 1)].data;
        }
        kernels->dots(got, a, b, pairs, n);
        for (int64_t i = 0; i < pairs; i++) {
            double want = 0, size = 0;
            for (int64_t u = 0; u < n; u++) {
                want += (double)a[i][u] * (double)b[i][u];
                size += fabs((double)a[i][u] * (double)b[i][u]);
            }
            double bound = integers ? 0 : (double)n * (double)FLT_EPSILON * size;
            check(fabs((double)got[i] - want) <= bound,
                  "pair %" PRId64 " of %" PRId64 " is %a, not %a", i, pairs, (double)got[i], want);
            float alone;
            kernels->dots(&alone, a + i, b + i, 1, n);
            check(memcmp(&alone, &got[i], sizeof alone) == 0, "%a alone, else %a", (double)alone,
                  (double)got[i]);
        }
        memcpy(twin, got, (size_t)pairs * sizeof *got); /* all beside the sums is as it was */
        release(&sums);
        for (int v = 0; v < VECTORS; v++) {
            release(&vectors[v]);
        }
    }
}
END_TEST

/* Against the definition, number by number: NaN, Inf and the largest floats among them. */
START_TEST(add_stochastic)
{
    const sebp_kernels *kernels = kernels_of(_i, "add_stochastic");
    if (kernels == NULL) {
        return;
    }
    int64_t up = 0, down = 0;
    for (int round = testing_rounds(1000); round > 0; round--) {
        int64_t n = length();
        uint64_t group = testing_between(0, 1000);
        sebp_dropout source = {.seed = random_bits(), .offset = random_bits()};
        const float keep = testing_chance(0.5) ? 1 : (float)testing_uniform();
        const bool has_d = testing_chance(0.8);
        buffer w = make(n, 2);
        float *d = malloc((size_t)(n > 0 ? n : 1) * sizeof *d);
        for (int64_t i = 0; i < n; i++) {
            const double odd[] = {INFINITY, -INFINITY, NAN, 0x1.FEp127, -0x1.FEp127, 0, -0.0};
            put(w.data, true, i,
                testing_chance(0.1) ? odd[testing_between(0, 6)] : testing_uniform());
            d[i] = testing_chance(0.1) ? 0x1p118F : (float)testing_uniform() * 0x1p-9F;
        }
        uint16_t *expected = twin_of(&w);
        for (int64_t i = 0; i < n; i++) {
            float sum = keep * (float)get(w.data, true, i);
            if (has_d)
                sum += d[i];
            uint32_t bits;
            memcpy(&bits, &sum, sizeof bits);
            const float u = sebp_random_uniform(source.seed, source.offset,
                                                group * SEBP_RANDOM_GROUP + (uint64_t)i);
            if (isfinite(sum)) {
                const uint32_t high = bits >> 16, moved = (bits + (uint32_t)(u * 65536)) >> 16;
                up += moved > high;
                down += moved == high && (bits & 0xFFFF) != 0;
                expected[i] = (uint16_t)moved;
            } else {
                put(expected, true, i, (double)sum);
            }
        }
        kernels->add_stochastic((void *)w.data, has_d ? d : NULL, n, keep, &source, group);
        free(d);
        release(&w);
    }
    ck_assert(up > 0 && down > 0);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("element kernels");
    TCase *all = tcase_create("element kernels");
    tcase_add_loop_test(all, at_least, 0, TIERS);
    tcase_add_loop_test(all, adamw, 0, TIERS);
    tcase_add_loop_test(all, scale, 0, TIERS);
    tcase_add_test(all, philox);
    tcase_add_loop_test(all, dropout_scales, 0, TIERS);
    tcase_add_loop_test(all, transpose_rows, 0, TIERS);
    tcase_add_loop_test(all, dots, 0, TIERS);
    tcase_add_loop_test(all, add_stochastic, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
