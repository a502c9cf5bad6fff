/* SPDX-License-Identifier: Apache-2.0 */
/* f32 matrices multiplied as the sum of products of bf16: how numbers are split, on every ISA. */
#include "config.h"

#include <inttypes.h>

#include "kernel_harness.h"

enum { MAX_PARTS = 3 };

/* Any f32, and those at the edges more often than they come by chance. */
static float any_float(void)
{
    static const float edges[] = {0.0F,
                                  -0.0F,
                                  NAN,
                                  INFINITY,
                                  -INFINITY,
                                  0x1.fffffep127F,
                                  0x1.fefffep127F, /* the last that is finite in bf16 */
                                  -0x1.ffp127F,    /* the first that is not */
                                  0x1p-126F,
                                  0x1p-149F,
                                  0x1.fffffep-127F};
    if (testing_chance(0.02))
        return edges[testing_between(0, (int64_t)(sizeof edges / sizeof *edges) - 1)];
    if (testing_chance(0.5))
        return (float)testing_uniform();
    return float_of((uint32_t)testing_random());
}

static bool has_finite_parts(float x)
{
    return fabsf(x) <= 0x1.fefffep127F;
}

START_TEST(numbers_are_split)
{
    const sebp_kernels *kernels = kernels_of(_i, "numbers_are_split");
    int64_t exact = 0, unlike = 0;
    if (kernels == NULL)
        return;
    for (int round = 0; testing_goes_on(round, 2000, exact < unlike ? exact : unlike, 10);
         round++) {
        int64_t n = length();
        int count = (int)testing_between(1, MAX_PARTS);
        bool tame = testing_chance(0.5), want = true;
        buffer from = make(n, sizeof(float)), parts[MAX_PARTS];
        float *x = (void *)from.data;
        uint16_t *data[MAX_PARTS], *twin[MAX_PARTS];
        for (int64_t i = 0; i < n; i++) {
            do {
                x[i] = any_float();
            } while (tame && !has_finite_parts(x[i]));
            want = want && has_finite_parts(x[i]);
        }
        twin_of(&from);
        for (int i = 0; i < count; i++) {
            parts[i] = make(n, sizeof(uint16_t));
            data[i] = (void *)parts[i].data;
        }
        check(kernels->split_f32(data, count, x, n) == want, "%" PRId64 " elements: not %d", n,
              want);
        unlike += !want;
        for (int64_t i = 0; i < n; i++) {
            float left = x[i];
            for (int p = 0; p < count && has_finite_parts(x[i]); p++) {
                uint16_t part = testing_to_bf16(left);
                check(data[p][i] == part, "part %d of %a is %04x, not %04x", p, (double)x[i],
                      data[p][i], part);
                left -= testing_from_bf16(part);
            }
            if (count == MAX_PARTS && has_finite_parts(x[i]) && fabsf(x[i]) >= 0x1p-109F) {
                check(left == 0, "%a less its parts is %a", (double)x[i], (double)left);
                exact++;
            }
        }
        for (int i = 0; i < count; i++) { /* around them nothing is written */
            twin[i] = twin_of(&parts[i]);
            memset(parts[i].twin, TESTING_POISON, parts[i].open_bytes);
            if (n > 0)
                memcpy(twin[i], data[i], (size_t)n * sizeof *data[i]);
            release(&parts[i]);
        }
        release(&from);
    }
    check(exact > 10 && unlike > 10, "%" PRId64 " and %" PRId64, exact, unlike);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("precision");
    TCase *all = tcase_create("precision");
    tcase_set_timeout(all, 600);
    tcase_add_loop_test(all, numbers_are_split, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
