/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Norms against double precision, on random shapes,
 * strides, dtypes and rows, in place and not; gradients also against finite differences.
 */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

static const double EPS = FLT_EPSILON;

/* ---- norms ---- */

/* The norm of a row in double precision. */
typedef struct row_norm {
    double mean, inverse;
} row_norm;

static row_norm norm_of(const double *h, int64_t n, const sebp_norm_options *options)
{
    row_norm norm = {0, 0};
    double square = 0;
    for (int64_t j = 0; j < n && options->norm == SEBP_LAYER_NORM; j++) {
        norm.mean += h[j] / (double)n;
    }
    for (int64_t j = 0; j < n; j++) {
        square += (h[j] - norm.mean) * (h[j] - norm.mean) / (double)n;
    }
    norm.inverse = 1 / sqrt(square + options->epsilon);
    return norm;
}

static double gain_at(const sebp_matrix *gain, const sebp_norm_options *options, int64_t j)
{
    return gain->data != NULL ? testing_get(gain, 0, j) + options->gain_offset : 1;
}

/* sum of dy y, as a function of h: what the backward differentiates. */
static double weighted_norm(const double *h, const double *dy, int64_t n, const sebp_matrix *gain,
                            const sebp_norm_options *options)
{
    row_norm norm = norm_of(h, n, options);
    double sum = 0;
    for (int64_t j = 0; j < n; j++) {
        sum += dy[j] * (h[j] - norm.mean) * norm.inverse * gain_at(gain, options, j);
    }
    return sum;
}

static sebp_norm_options any_norm_options(void)
{
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.norm = testing_chance(0.5) ? SEBP_RMS_NORM : SEBP_LAYER_NORM;
    options.epsilon = testing_chance(0.5) ? 1e-5 : 0.1;
    options.gain_offset = testing_chance(0.5) ? 1 : 0;
    options.dropout = testing_chance(0.5) ? 0.3 : 0;
    options.seed = testing_random();
    options.offset = testing_random();
    options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
    return options;
}

static const sebp_matrix *present(const sebp_matrix *matrix)
{
    return matrix->data != NULL ? matrix : NULL;
}

/* A matrix of one row, or none at all. */
static sebp_matrix maybe_vector(int64_t cols)
{
    sebp_matrix none = {NULL, 1, cols, cols, SEBP_F32};
    return testing_chance(0.3) ? none
                               : testing_random_matrix(1, cols, testing_dtype(), TESTING_REAL);
}

static void maybe_release(sebp_matrix *matrix)
{
    if (matrix->data != NULL) {
        testing_release(matrix);
    }
}

START_TEST(norm_forward)
{
    int64_t nonzeros = 0, elements = 0;
    layer_open_contexts();
    for (int round = 0; testing_goes_on(round, 400, elements, 200); round++) {
        int64_t m = testing_between(0, 12), n = layer_any_cols();
        sebp_dtype dtype = testing_dtype();
        sebp_norm_options options = any_norm_options();
        layer_rows rows = layer_rows_make(m);
        sebp_matrix x = testing_random_matrix(m, n, dtype, TESTING_REAL);
        sebp_matrix residual = testing_random_matrix(m, n, dtype, TESTING_REAL);
        sebp_matrix gain = maybe_vector(n), shift = maybe_vector(n);
        int has_residual = testing_chance(0.5);
        int has_h = has_residual || options.dropout > 0 || testing_chance(0.3);
        layer_hide(&x, &rows);
        layer_hide(&residual, &rows);
        sebp_matrix x_before = testing_copy(&x), residual_before = testing_copy(&residual);
        /* Where the results go: to matrices of their own, or in place. */
        int h_place = (int)testing_between(0, has_residual ? 2 : 1);
        int y_place = (int)testing_between(0, has_residual ? 2 : 1);
        if (has_h && h_place == y_place) {
            y_place = 0;
        }
        sebp_matrix got[2][3];
        for (int c = 0; c < 2; c++) {
            sebp_matrix x_c = testing_copy(&x), residual_c = testing_copy(&residual);
            sebp_matrix h = layer_output(m, n, dtype), y = layer_output(m, n, dtype);
            sebp_matrix statistics = layer_output(m, 2, SEBP_F32);
            sebp_matrix *to[3] = {&h, &x_c, &residual_c}, *to_y[3] = {&y, &x_c, &residual_c};
            testing_succeed(
                sebp_norm_forward(layer_contexts[c], &x_c, has_residual ? &residual_c : NULL,
                                  present(&gain), present(&shift), rows.rows, &options,
                                  has_h ? to[h_place] : NULL, to_y[y_place], &statistics),
                layer_contexts[c]);
            got[c][0] = testing_copy(has_h ? to[h_place] : &x_before);
            got[c][1] = testing_copy(to_y[y_place]);
            got[c][2] = testing_copy(&statistics);
            const sebp_matrix *before[3] = {&h, &x_before, &residual_before};
            sebp_matrix fresh = testing_copy(&h);
            testing_poison(&fresh);
            before[0] = &fresh;
            if (has_h) {
                layer_inactive(&got[c][0], &rows, options.inactive, before[h_place], "h");
            }
            layer_inactive(&got[c][1], &rows, options.inactive, before[y_place], "y");
            testing_release(&fresh);
            testing_release(&x_c);
            testing_release(&residual_c);
            testing_release(&h);
            testing_release(&y);
            testing_release(&statistics);
        }
        for (int i = 0; i < 3; i++) {
            ck_assert(testing_same_bits(&got[0][i], &got[1][i]));
        }
        double *h = malloc((size_t)(n + 1) * sizeof *h);
        for (int64_t i = 0; i < m; i++) {
            if (!layer_rows_have(&rows, i)) {
                continue;
            }
            for (int64_t j = 0; j < n; j++) {
                double want = testing_get(&x_before, i, j);
                want *= options.dropout > 0
                            ? layer_kept(options.dropout, options.seed, options.offset, i, j, n)
                            : 1;
                want += has_residual ? testing_get(&residual_before, i, j) : 0;
                layer_near(&got[0][0], i, j, want, 4 * EPS, "h");
                h[j] = testing_get(&got[0][0], i, j);
            }
            row_norm norm = norm_of(h, n, &options);
            if (n == 0) {
                norm.inverse = 1 / sqrt(options.epsilon);
            }
            layer_near(&got[0][2], i, 0, norm.mean, 8 * EPS, "mean");
            layer_near(&got[0][2], i, 1, norm.inverse, 40 * EPS * norm.inverse * (1 + norm.inverse),
                       "1/std");
            for (int64_t j = 0; j < n; j++) {
                double g = gain_at(&gain, &options, j);
                double xh = (h[j] - norm.mean) * norm.inverse;
                double want = xh * g + (shift.data != NULL ? testing_get(&shift, 0, j) : 0);
                double bound = EPS * (60 * (1 + norm.inverse) * (1 + fabs(xh)) * (1 + fabs(g)));
                layer_near(&got[0][1], i, j, want, bound, "y");
                nonzeros += testing_get(&got[0][1], i, j) != 0;
                elements++;
            }
        }
        free(h);
        for (int i = 0; i < 6; i++) {
            testing_release(&got[i / 3][i % 3]);
        }
        testing_release(&x);
        testing_release(&residual);
        testing_release(&x_before);
        testing_release(&residual_before);
        maybe_release(&gain);
        maybe_release(&shift);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    layer_close_contexts();
}
END_TEST

/* One row of a backward: dh by the formula. */
static void dh_of_row(const double *h, const double *dy, int64_t n, const sebp_matrix *gain,
                      const sebp_norm_options *options, double *dh)
{
    row_norm norm = norm_of(h, n, options);
    double g_mean = 0, along = 0;
    for (int64_t j = 0; j < n; j++) {
        double g = dy[j] * gain_at(gain, options, j);
        g_mean += options->norm == SEBP_LAYER_NORM ? g / (double)n : 0;
        along += g * (h[j] - norm.mean) * norm.inverse / (double)n;
    }
    for (int64_t j = 0; j < n; j++) {
        double g = dy[j] * gain_at(gain, options, j);
        dh[j] = (g - g_mean - (h[j] - norm.mean) * norm.inverse * along) * norm.inverse;
    }
}

/* The same, and some of it by differences. */
static void norm_dh(const double *h, const double *dy, int64_t n, const sebp_matrix *gain,
                    const sebp_norm_options *options, double *dh)
{
    row_norm norm = norm_of(h, n, options);
    dh_of_row(h, dy, n, gain, options, dh);
    double *moved = malloc((size_t)n * sizeof *moved);
    for (int k = 0; k < 3; k++) {
        int64_t j = testing_between(0, n - 1);
        const double step = 1e-5;
        memcpy(moved, h, (size_t)n * sizeof *moved);
        moved[j] = h[j] + step;
        double up = weighted_norm(moved, dy, n, gain, options);
        moved[j] = h[j] - step;
        double down = weighted_norm(moved, dy, n, gain, options);
        double scale = 1 + norm.inverse * norm.inverse * norm.inverse;
        ck_assert_double_eq_tol((up - down) / (2 * step), dh[j], 1e-6 * scale);
    }
    free(moved);
}

START_TEST(norm_backward)
{
    int64_t nonzeros = 0, elements = 0;
    layer_open_contexts();
    for (int round = 0; testing_goes_on(round, 400, elements, 200); round++) {
        int64_t m = testing_between(0, testing_chance(0.1) ? 90 : 12);
        int64_t n = testing_between(1, testing_chance(0.3) ? 200 : 60);
        sebp_dtype dtype = testing_dtype();
        sebp_norm_options options = any_norm_options();
        options.epsilon = 0.1; /* rows of one element have no other spread */
        options.dh_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        options.dgain_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        options.dshift_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        layer_rows rows = layer_rows_make(m);
        sebp_matrix dy = testing_random_matrix(m, n, dtype, TESTING_REAL);
        sebp_matrix h = testing_random_matrix(m, n, dtype, TESTING_REAL);
        sebp_matrix gain = maybe_vector(n), y = layer_output(m, n, dtype);
        sebp_matrix statistics = layer_output(m, 2, SEBP_F32);
        sebp_norm_options plain = options;
        plain.dropout = 0;
        testing_succeed(sebp_norm_forward(layer_contexts[0], &h, NULL, present(&gain), NULL, NULL,
                                          &plain, NULL, &y, &statistics),
                        layer_contexts[0]);
        layer_hide(&dy, &rows);
        layer_hide(&h, &rows);
        layer_hide(&statistics, &rows);
        int wants[4];
        for (int i = 0; i < 4; i++) {
            wants[i] = testing_chance(0.8);
        }
        int dx_in_place = testing_chance(0.3);
        int dh_in_place = !dx_in_place && options.dh_write == SEBP_OVERWRITE && testing_chance(0.5);
        sebp_matrix before[4] = {layer_output(m, n, dtype), layer_output(m, n, dtype),
                                 layer_output(1, n, testing_dtype()),
                                 layer_output(1, n, testing_dtype())};
        if (options.dh_write == SEBP_ACCUMULATE) {
            testing_fill(&before[0], TESTING_REAL);
        }
        if (options.dgain_write == SEBP_ACCUMULATE) {
            testing_fill(&before[2], TESTING_REAL);
        }
        if (options.dshift_write == SEBP_ACCUMULATE) {
            testing_fill(&before[3], TESTING_REAL);
        }
        sebp_matrix got[2][4];
        for (int c = 0; c < 2; c++) {
            sebp_matrix dy_c = testing_copy(&dy), own[4];
            for (int i = 0; i < 4; i++) {
                own[i] = testing_copy(&before[i]);
            }
            sebp_matrix *to[4] = {dh_in_place ? &dy_c : &own[0], dx_in_place ? &dy_c : &own[1],
                                  &own[2], &own[3]};
            testing_succeed(sebp_norm_backward(layer_contexts[c], &dy_c, &h, &statistics,
                                               present(&gain), rows.rows, &options,
                                               wants[0] ? to[0] : NULL, wants[1] ? to[1] : NULL,
                                               wants[2] ? to[2] : NULL, wants[3] ? to[3] : NULL),
                            layer_contexts[c]);
            for (int i = 0; i < 4; i++) {
                got[c][i] = testing_copy(to[i]);
                testing_release(&own[i]);
            }
            testing_release(&dy_c);
        }
        double *want = calloc((size_t)(4 * n), sizeof *want);
        double *h_row = want + n, *dy_row = want + 2 * n;
        double *dgain = calloc((size_t)(4 * n), sizeof *dgain), *dshift = dgain + n;
        double *dgain_size = dgain + 2 * n, *dshift_size = dgain + 3 * n;
        for (int64_t i = 0; i < m; i++) {
            if (!layer_rows_have(&rows, i)) {
                continue;
            }
            for (int64_t j = 0; j < n; j++) {
                h_row[j] = testing_get(&h, i, j);
                dy_row[j] = testing_get(&dy, i, j);
            }
            norm_dh(h_row, dy_row, n, &gain, &options, want);
            row_norm norm = norm_of(h_row, n, &options);
            for (int64_t j = 0; j < n; j++) {
                double xh = (h_row[j] - norm.mean) * norm.inverse;
                dgain[j] += dy_row[j] * xh;
                dgain_size[j] += fabs(dy_row[j] * xh) + norm.inverse;
                dshift[j] += dy_row[j];
                dshift_size[j] += fabs(dy_row[j]);
                int adds = options.dh_write == SEBP_ACCUMULATE && wants[0];
                double total = want[j] + (adds ? testing_get(&before[0], i, j) : 0);
                double bound = EPS * 60 * (1 + norm.inverse) * (1 + norm.inverse);
                if (wants[0]) {
                    layer_near(&got[0][0], i, j, total, bound, "dh");
                    nonzeros += testing_get(&got[0][0], i, j) != 0;
                    elements++;
                }
                double scale = options.dropout > 0 ? layer_kept(options.dropout, options.seed,
                                                                options.offset, i, j, n)
                                                   : 1;
                if (wants[1]) {
                    layer_near(&got[0][1], i, j, total * scale, 2 * bound, "dx");
                }
            }
        }
        for (int64_t j = 0; j < n; j++) {
            double adds_gain = options.dgain_write == SEBP_ACCUMULATE;
            double adds_shift = options.dshift_write == SEBP_ACCUMULATE;
            if (wants[2]) {
                layer_near(&got[0][2], 0, j,
                           dgain[j] + (adds_gain > 0 ? testing_get(&before[2], 0, j) : 0),
                           EPS * 40 * (1 + dgain_size[j]), "dgain");
            }
            if (wants[3]) {
                layer_near(&got[0][3], 0, j,
                           dshift[j] + (adds_shift > 0 ? testing_get(&before[3], 0, j) : 0),
                           EPS * 40 * (1 + dshift_size[j]), "dshift");
            }
        }
        if (wants[0] && options.dh_write == SEBP_OVERWRITE) {
            layer_inactive(&got[0][0], &rows, options.inactive, dh_in_place ? &dy : &before[0],
                           "dh");
        }
        if (wants[1]) {
            layer_inactive(&got[0][1], &rows, options.inactive, dx_in_place ? &dy : &before[1],
                           "dx");
        }
        for (int i = 0; i < 4; i++) {
            ck_assert(!wants[i] || testing_same_bits(&got[0][i], &got[1][i]));
            testing_release(&got[0][i]);
            testing_release(&got[1][i]);
            testing_release(&before[i]);
        }
        free(want);
        free(dgain);
        testing_release(&dy);
        testing_release(&h);
        testing_release(&y);
        testing_release(&statistics);
        maybe_release(&gain);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    layer_close_contexts();
}
END_TEST

/* Rows of +1 and -1 have mean 0 and standard deviation 1, so that all is exact. */
START_TEST(norm_exact)
{
    layer_open_contexts();
    const double values[] = {1, -1, 1, -1, -1, 1, 1, -1};
    sebp_matrix x = testing_matrix(3, 8, 8, SEBP_F32), y = testing_matrix(3, 8, 9, SEBP_F32);
    sebp_matrix statistics = testing_matrix(3, 2, 2, SEBP_F32);
    sebp_matrix gain = testing_random_matrix(1, 8, SEBP_F32, TESTING_INTEGER);
    sebp_matrix shift = testing_random_matrix(1, 8, SEBP_BF16, TESTING_INTEGER);
    sebp_matrix dshift = testing_matrix(1, 8, 8, SEBP_F32),
                dgain = testing_matrix(1, 8, 8, SEBP_F32);
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.epsilon = 0;
    options.gain_offset = 1;
    for (int64_t i = 0; i < 24; i++) {
        testing_set(&x, i / 8, i % 8, values[(i % 8 + i / 8) % 8]);
    }
    testing_succeed(sebp_norm_forward(layer_contexts[1], &x, NULL, &gain, &shift, NULL, &options,
                                      NULL, &y, &statistics),
                    layer_contexts[1]);
    testing_succeed(sebp_norm_backward(layer_contexts[1], &y, &x, &statistics, &gain, NULL,
                                       &options, NULL, NULL, &dgain, &dshift),
                    layer_contexts[1]);
    for (int64_t j = 0; j < 8; j++) {
        double sum = 0, weighted = 0;
        for (int64_t i = 0; i < 3; i++) {
            double want =
                testing_get(&x, i, j) * (testing_get(&gain, 0, j) + 1) + testing_get(&shift, 0, j);
            ck_assert(testing_get(&y, i, j) == want);
            ck_assert(testing_get(&statistics, i, 0) == 0 && testing_get(&statistics, i, 1) == 1);
            sum += want;
            weighted += want * testing_get(&x, i, j);
        }
        ck_assert(testing_get(&dshift, 0, j) == sum && testing_get(&dgain, 0, j) == weighted);
    }
    testing_release(&x);
    testing_release(&y);
    testing_release(&statistics);
    testing_release(&gain);
    testing_release(&shift);
    testing_release(&dgain);
    testing_release(&dshift);
    layer_close_contexts();
}
END_TEST

/* Rows whose squares f32 has no room for, or no digits. */
START_TEST(norm_far_from_one)
{
    layer_open_contexts();
    const double sizes[] = {0x1p63, 0x1p64, 1e30, 0x1p124, 0x1p-44, 0x1p-65, 1e-22, 1e-30};
    const int64_t n = 100;
    const sebp_matrix no_gain = {NULL, 0, 0, 0, SEBP_F32};
    double row[100], dy_row[100], want[100];
    for (int round = 0; round < 32; round++) {
        const double size = sizes[round % 8];
        const sebp_dtype dtype = round & 8 ? SEBP_BF16 : SEBP_F32;
        sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
        options.norm = round & 16 ? SEBP_RMS_NORM : SEBP_LAYER_NORM;
        options.epsilon = size > 1 ? 1e-5 : 0;
        sebp_matrix x = testing_random_matrix(1, n, dtype, TESTING_REAL);
        sebp_matrix dy = testing_random_matrix(1, n, dtype, TESTING_REAL);
        sebp_matrix y = testing_matrix(1, n, n, dtype), dh = testing_matrix(1, n, n, dtype);
        sebp_matrix statistics = testing_matrix(1, 2, 2, SEBP_F32);
        for (int64_t j = 0; j < n; j++) {
            testing_set(&x, 0, j, size * (testing_get(&x, 0, j) + 2));
            row[j] = testing_get(&x, 0, j);
            dy_row[j] = testing_get(&dy, 0, j);
        }
        testing_succeed(sebp_norm_forward(layer_contexts[0], &x, NULL, NULL, NULL, NULL, &options,
                                          NULL, &y, &statistics),
                        layer_contexts[0]);
        testing_succeed(sebp_norm_backward(layer_contexts[0], &dy, &x, &statistics, NULL, NULL,
                                           &options, &dh, NULL, NULL, NULL),
                        layer_contexts[0]);
        row_norm norm = norm_of(row, n, &options);
        dh_of_row(row, dy_row, n, &no_gain, &options, want);
        layer_near(&statistics, 0, 0, norm.mean, 8 * EPS * fabs(norm.mean), "mean");
        layer_near(&statistics, 0, 1, norm.inverse, 8 * EPS * norm.inverse, "inverse");
        for (int64_t j = 0; j < n; j++) {
            layer_near(&y, 0, j, (row[j] - norm.mean) * norm.inverse, 60 * EPS, "y");
            layer_near(&dh, 0, j, want[j], 200 * EPS * norm.inverse, "dh");
        }
        testing_release(&x);
        testing_release(&dy);
        testing_release(&y);
        testing_release(&dh);
        testing_release(&statistics);
    }
    layer_close_contexts();
}
END_TEST

/* Without epsilon the variance of equal elements is 0, not what rounding leaves of it: n (3 / n) < 3. */
START_TEST(norm_of_equal_elements)
{
    layer_open_contexts();
    sebp_matrix x = testing_matrix(1, 771, 771, SEBP_F32),
                statistics = testing_matrix(1, 2, 2, SEBP_F32);
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.epsilon = 0;
    for (int64_t j = 0; j < x.cols; j++)
        testing_set(&x, 0, j, 3);
    testing_succeed(sebp_norm_forward(layer_contexts[0], &x, NULL, NULL, NULL, NULL, &options, NULL,
                                      &x, &statistics),
                    layer_contexts[0]);
    ck_assert(isinf(testing_get(&statistics, 0, 1)));
    testing_release(&x);
    testing_release(&statistics);
    layer_close_contexts();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("norms");
    TCase *all = tcase_create("norms");
    tcase_add_test(all, norm_forward);
    tcase_add_test(all, norm_backward);
    tcase_add_test(all, norm_exact);
    tcase_add_test(all, norm_far_from_one);
    tcase_add_test(all, norm_of_equal_elements);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
