/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels of attention on every tier that this machine has, against their definitions in plain
 * loops: equal on small integers, and else within what exp and tanh may be off by.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cpu/cpu.h"
#include "simd/simd.h"
#include "testing.h"

/* A new buffer of random floats between guard bands: small integers, or in [-1, 1). */
static float *floats(int64_t count, testing_values values)
{
    float *data = testing_alloc((size_t)count * sizeof *data, 4 * (size_t)testing_between(0, 15));
    for (int64_t i = 0; i < count; i++) {
        data[i] = values == TESTING_REAL ? (float)testing_uniform() : (float)testing_between(-4, 4);
    }
    return data;
}

/* As ck_assert(), but free where it holds: Check makes a note of every assertion in a file. */
#define check(holds)                                                                               \
    do {                                                                                           \
        if (!(holds)) {                                                                            \
            ck_abort_msg("%s", #holds);                                                            \
        }                                                                                          \
    } while (0)

static const sebp_kernels *tier(int index)
{
    return sebp_cpu_tier(index);
}

START_TEST(small_product)
{
    for (int t = 0; tier(t) != NULL; t++) {
        for (int round = testing_rounds(300); round > 0; round--) {
            const sebp_kernels *kernels = tier(t);
            sebp_small_product p = {.rows = testing_between(0, 40),
                                    .cols = testing_between(0, 80),
                                    .units = testing_between(0, 50)};
            int along = testing_chance(0.5);
            p.a_row = along ? p.units + testing_between(0, 5) : 1;
            p.a_unit = along ? 1 : p.rows + 1 + testing_between(0, 5);
            p.b_unit = p.cols + testing_between(0, 5);
            p.c_row = p.cols + testing_between(0, 5);
            p.accumulate = testing_chance(0.5);
            /* What may be read too much of A and B. */
            int64_t of_a = (p.rows + 1) * p.a_row + (p.units + 1) * p.a_unit;
            float *a = floats(of_a, TESTING_INTEGER);
            float *b = floats(p.units * p.b_unit + 2 * kernels->shape_f32.cols, TESTING_INTEGER);
            float *c = floats(p.rows * p.c_row + 1, TESTING_INTEGER);
            float *want = malloc((size_t)(p.rows * p.c_row + 1) * sizeof *want);
            ck_assert_ptr_nonnull(want);
            memcpy(want, c, (size_t)(p.rows * p.c_row + 1) * sizeof *want);
            for (int64_t i = 0; i < p.rows; i++) {
                for (int64_t j = 0; j < p.cols; j++) {
                    float sum = p.accumulate ? want[i * p.c_row + j] : 0;
                    for (int64_t u = 0; u < p.units; u++)
                        sum += a[i * p.a_row + u * p.a_unit] * b[u * p.b_unit + j];
                    want[i * p.c_row + j] = sum;
                }
            }
            p.a = a;
            p.b = b;
            p.c = c;
            kernels->small_product(&p);
            for (int64_t i = 0; i < p.rows * p.c_row + 1; i++)
                check(c[i] == want[i]);
            free(want);
            testing_free(a);
            testing_free(b);
            testing_free(c);
        }
    }
}
END_TEST

START_TEST(moves)
{
    for (int t = 0; tier(t) != NULL; t++) {
        for (int round = testing_rounds(300); round > 0; round--) {
            const sebp_kernels *kernels = tier(t);
            const int64_t lanes = kernels->shape_f32.cols, cols = testing_between(1, 90);
            const int64_t rows = testing_between(0, 40);
            sebp_dtype dtype = testing_dtype();
            sebp_matrix x = testing_random_matrix(rows, cols, dtype, TESTING_REAL);
            sebp_matrix y = testing_random_matrix(rows, cols, dtype, TESTING_INTEGER);
            sebp_matrix z = testing_random_matrix(rows, cols, dtype, TESTING_INTEGER);
            float *to = floats(rows * cols, TESTING_REAL), *sums = floats(rows, TESTING_REAL);
            float factor = (float)testing_uniform();
            kernels->load_rows(to, x.data, dtype == SEBP_BF16, x.stride, rows, cols, factor);
            kernels->dot_rows(sums, y.data, y.stride, z.data, z.stride, dtype == SEBP_BF16, rows,
                              cols);
            for (int64_t i = 0; i < rows; i++) {
                double sum = 0;
                for (int64_t j = 0; j < cols; j++) {
                    check(to[i * cols + j] == (float)testing_get(&x, i, j) * factor);
                    sum += testing_get(&y, i, j) * testing_get(&z, i, j);
                }
                check(sums[i] == (float)sum);
            }
            /* Lanes become rows again. */
            int64_t count = rows < lanes ? rows : lanes, stride = lanes + testing_between(0, 20);
            float *block = floats(cols * stride, TESTING_REAL);
            float *factors = floats(lanes, TESTING_REAL);
            testing_poison(&x);
            kernels->store_lanes(x.data, dtype == SEBP_BF16, x.stride, count, cols, block, stride,
                                 factors);
            for (int64_t i = 0; i < rows; i++) {
                for (int64_t j = 0; j < cols; j++) {
                    float want = i < count ? block[j * stride + i] * factors[i] : NAN;
                    if (dtype == SEBP_BF16)
                        want = testing_from_bf16(testing_to_bf16(want));
                    double got = testing_get(&x, i, j);
                    check(i < count ? got == (double)want : isnan(got));
                }
            }
            testing_check_matrix(&x);
            float *packed = floats(cols * lanes, TESTING_REAL);
            float *before = malloc((size_t)(cols * lanes) * sizeof *before);
            ck_assert_ptr_nonnull(before);
            memcpy(before, packed, (size_t)(cols * lanes) * sizeof *before);
            kernels->scale_lanes(packed, cols, factors);
            for (int64_t i = 0; i < cols * lanes; i++)
                check(packed[i] == before[i] * factors[i % lanes]);
            free(before);
            float *all[] = {to, sums, block, factors, packed};
            for (int i = 0; i < 5; i++)
                testing_free(all[i]);
            testing_release(&x);
            testing_release(&y);
            testing_release(&z);
        }
    }
}
END_TEST

/* A block of scores, and what each becomes in double precision. */
typedef struct block {
    sebp_scores work;
    int64_t lanes, cells;
    float *scores, *bias, *dropout;
    double *want, *slope, *kept; /* -Inf: not seen */
} block;

static block make_block(int64_t lanes)
{
    block b = {.lanes = lanes};
    sebp_scores *work = &b.work;
    work->rows = testing_between(0, 60);
    work->stride = lanes + testing_between(0, 20);
    work->from = testing_chance(0.5) ? -(1 << 20) : testing_between(-50, 50);
    work->end = testing_chance(0.5) ? 1 << 20 : testing_between(-50, 50);
    work->softcap = testing_chance(0.3) ? 1.5F : 0;
    b.cells = work->rows * work->stride;
    work->scores = b.scores = floats(b.cells, TESTING_REAL);
    b.bias = floats(work->rows * lanes, TESTING_REAL);
    work->dropout_stride = 64 + testing_between(0, 3);
    b.dropout = floats(work->rows * work->dropout_stride, TESTING_REAL);
    work->bias = testing_chance(0.3) ? b.bias : NULL;
    work->dropout = testing_chance(0.3) ? b.dropout : NULL;
    b.want = calloc(3 * (size_t)b.cells + 1, sizeof *b.want);
    ck_assert_ptr_nonnull(b.want);
    b.slope = b.want + b.cells;
    b.kept = b.slope + b.cells;
    for (int64_t r = 0; r < work->rows; r++) {
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t at = r * work->stride + l;
            double value = b.scores[at] *= 4;
            b.slope[at] = 1;
            if (work->softcap > 0) {
                double bounded = tanh(value / 1.5);
                value = 1.5 * bounded;
                b.slope[at] = 1 - bounded * bounded;
            }
            if (work->bias != NULL)
                value += b.bias[r * lanes + l];
            int seen = work->from + r <= l && l < work->end + r;
            b.want[at] = seen ? value : -INFINITY;
            b.kept[at] = work->dropout != NULL ? b.dropout[r * work->dropout_stride + l] : 1;
        }
    }
    return b;
}

static void free_block(block *b)
{
    testing_free(b->scores);
    testing_free(b->bias);
    testing_free(b->dropout);
    free(b->want);
}

static const double CLOSE = 4e-6; /* tanh's 2^-22 of 1.5, and a few ulp of exp */

START_TEST(softmax)
{
    for (int t = 0; tier(t) != NULL; t++) {
        int64_t hidden = 0, seen = 0;
        for (int round = 0; testing_goes_on(round, 300, hidden < seen ? hidden : seen, 0);
             round++) {
            const sebp_kernels *kernels = tier(t);
            const int64_t lanes = kernels->shape_f32.cols;
            block b = make_block(lanes);
            float *max = floats(lanes, TESTING_REAL), *sum = floats(lanes, TESTING_REAL);
            float *factor = floats(lanes, TESTING_REAL);
            double old_max[64], old_sum[64];
            ck_assert_int_le(lanes, 64);
            for (int64_t l = 0; l < lanes; l++) {
                int fresh = testing_chance(0.5);
                max[l] = fresh ? -FLT_MAX : max[l];
                sum[l] = fresh ? 0 : fabsf(sum[l]);
                old_max[l] = max[l];
                old_sum[l] = sum[l];
            }
            kernels->scores_softmax(&b.work, max, sum, factor);
            for (int64_t l = 0; l < lanes; l++) {
                double new_max = old_max[l], total = 0;
                for (int64_t r = 0; r < b.work.rows; r++)
                    new_max = fmax(new_max, b.want[r * b.work.stride + l]);
                check(fabs(max[l] - new_max) <= CLOSE * fmax(1, fabs(new_max)));
                for (int64_t r = 0; r < b.work.rows; r++) {
                    const int64_t at = r * b.work.stride + l;
                    double p = exp(b.want[at] - new_max);
                    total += p;
                    check(fabs(b.scores[at] - p * b.kept[at]) <= CLOSE);
                    check(p > 0 || b.scores[at] == 0);
                    hidden += p == 0;
                    seen += p > 0;
                }
                double shrunk = exp(old_max[l] - new_max);
                check(fabs(factor[l] - shrunk) <= CLOSE);
                total += old_sum[l] * shrunk;
                check(fabs(sum[l] - total) <= CLOSE * fmax(1, total));
            }
            testing_free(max);
            testing_free(sum);
            testing_free(factor);
            free_block(&b);
        }
        check(hidden > 0 && seen > 0);
    }
}
END_TEST

START_TEST(softmax_gradient)
{
    for (int t = 0; tier(t) != NULL; t++) {
        int64_t nonzero = 0;
        for (int round = 0; testing_goes_on(round, 300, nonzero, 1000); round++) {
            const sebp_kernels *kernels = tier(t);
            const int64_t lanes = kernels->shape_f32.cols;
            block b = make_block(lanes);
            float *lse = floats(lanes, TESTING_REAL), *delta = floats(lanes, TESTING_REAL);
            float *gradient = floats(b.cells, TESTING_REAL);
            float *dp = malloc((size_t)(b.cells + 1) * sizeof *dp);
            ck_assert_ptr_nonnull(dp);
            memcpy(dp, gradient, (size_t)b.cells * sizeof *dp);
            for (int64_t l = 0; l < lanes; l++)
                lse[l] = testing_chance(0.1) ? INFINITY : 4 + lse[l];
            bool of_bias = testing_chance(0.3);
            kernels->scores_gradient(&b.work, gradient, lse, delta, of_bias);
            for (int64_t r = 0; r < b.work.rows; r++) {
                for (int64_t l = 0; l < lanes; l++) {
                    const int64_t at = r * b.work.stride + l;
                    double p = isinf(lse[l]) ? 0 : exp(b.want[at] - lse[l]);
                    double ds = p * (dp[at] * b.kept[at] - delta[l]);
                    ds *= of_bias ? 1 : b.slope[at];
                    check(fabs(b.scores[at] - p * b.kept[at]) <= 2 * CLOSE * p);
                    check(fabs(gradient[at] - ds) <= 4 * CLOSE * p);
                    nonzero += ds != 0;
                }
            }
            free(dp);
            testing_free(lse);
            testing_free(delta);
            testing_free(gradient);
            free_block(&b);
        }
        check(nonzero > 1000);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("attention kernels");
    TCase *all = tcase_create("attention kernels");
    tcase_add_test(all, small_product);
    tcase_add_test(all, moves);
    tcase_add_test(all, softmax);
    tcase_add_test(all, softmax_gradient);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
