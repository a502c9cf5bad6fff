/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Norms, activations, dropout and rotary positions against double precision, on random shapes,
 * strides, dtypes and rows, in place and not; gradients also against finite differences.
 */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

static const double EPS = FLT_EPSILON;

static int64_t any_cols(void)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.3) ? 400 : 70);
}

/* Two contexts whose results must be the same bits. */
static sebp_context *contexts[2];

static void open_contexts(void)
{
    contexts[0] = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    contexts[1] = testing_context(SEBP_GEMM_NATIVE, 3, 0);
}

static void close_contexts(void)
{
    sebp_context_destroy(contexts[0]);
    sebp_context_destroy(contexts[1]);
}

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

static double kept(double probability, uint64_t seed, uint64_t offset, int64_t row, int64_t col,
                   int64_t cols)
{
    uint64_t element = (uint64_t)(row * ((cols + 63) / 64 * 64) + col);
    float u = sebp_random_uniform(seed, offset, element);
    return u < (float)probability ? 0 : (double)(float)(1 / (1 - probability));
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
    open_contexts();
    for (int round = testing_rounds(400); round > 0; round--) {
        int64_t m = testing_between(0, 12), n = any_cols();
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
            testing_succeed(sebp_norm_forward(contexts[c], &x_c, has_residual ? &residual_c : NULL,
                                              present(&gain), present(&shift), rows.rows, &options,
                                              has_h ? to[h_place] : NULL, to_y[y_place],
                                              &statistics),
                            contexts[c]);
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
                            ? kept(options.dropout, options.seed, options.offset, i, j, n)
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
    close_contexts();
}
END_TEST

/* One row of a backward: dh by the formula, and some of it by differences. */
static void norm_dh(const double *h, const double *dy, int64_t n, const sebp_matrix *gain,
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
    open_contexts();
    for (int round = testing_rounds(400); round > 0; round--) {
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
        testing_succeed(sebp_norm_forward(contexts[0], &h, NULL, present(&gain), NULL, NULL, &plain,
                                          NULL, &y, &statistics),
                        contexts[0]);
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
            testing_succeed(sebp_norm_backward(contexts[c], &dy_c, &h, &statistics, present(&gain),
                                               rows.rows, &options, wants[0] ? to[0] : NULL,
                                               wants[1] ? to[1] : NULL, wants[2] ? to[2] : NULL,
                                               wants[3] ? to[3] : NULL),
                            contexts[c]);
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
                double scale = options.dropout > 0
                                   ? kept(options.dropout, options.seed, options.offset, i, j, n)
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
    close_contexts();
}
END_TEST

/* Rows of +1 and -1 have mean 0 and standard deviation 1, so that all is exact. */
START_TEST(norm_exact)
{
    open_contexts();
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
    testing_succeed(sebp_norm_forward(contexts[1], &x, NULL, &gain, &shift, NULL, &options, NULL,
                                      &y, &statistics),
                    contexts[1]);
    testing_succeed(sebp_norm_backward(contexts[1], &y, &x, &statistics, &gain, NULL, &options,
                                       NULL, NULL, &dgain, &dshift),
                    contexts[1]);
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
    close_contexts();
}
END_TEST

/* ---- activations ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double activated(sebp_activation activation, double x)
{
    if (isinf(x)) {
        return x > 0 ? x : 0;
    }
    switch (activation) {
    case SEBP_GELU:
        return x * erfc(-x / sqrt(2)) / 2;
    case SEBP_GELU_TANH:
        return x * sigmoid(2 * sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x));
    case SEBP_SILU:
        return x * sigmoid(x);
    case SEBP_RELU:
        break;
    }
    return x > 0 ? x : x <= 0 ? 0 : NAN;
}

static double slope(sebp_activation activation, double x)
{
    if (isinf(x) || isnan(x)) {
        return isnan(x) ? NAN : x > 0;
    }
    if (activation == SEBP_RELU) {
        return x > 0;
    }
    const double step = 1e-6;
    return (activated(activation, x + step) - activated(activation, x - step)) / (2 * step);
}

static double any_input(void)
{
    const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 200, -200, 1e-30, -14};
    return testing_chance(0.1) ? odd[testing_between(0, 8)] : 6 * testing_uniform();
}

/* How far layers.h lets f(x) be from `value`, before it is multiplied or rounded to bf16. */
static double value_bound(sebp_activation activation, sebp_dtype dtype, double value)
{
    if (activation == SEBP_RELU) {
        return 0;
    }
    if (dtype == SEBP_BF16) {
        return fmax(fabs(value) * 0x1p-14, 0x1p-22);
    }
    return fmax(fabs(value) * (activation == SEBP_GELU_TANH ? 250 : 6) * EPS, 0x1p-28);
}

START_TEST(activation)
{
    const sebp_activation which = (sebp_activation)_i;
    int64_t nonzeros = 0, elements = 0;
    open_contexts();
    for (int round = testing_rounds(200); round > 0; round--) {
        int64_t m = testing_between(0, 12), n = any_cols();
        sebp_dtype dtype = testing_dtype();
        sebp_activation_options options = SEBP_ACTIVATION_OPTIONS_INIT;
        options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
        layer_rows rows = layer_rows_make(m);
        int gated = testing_chance(0.5);
        /* The gate and up may be columns of one matrix, as one product makes them. */
        sebp_matrix both = testing_random_matrix(m, 2 * n, dtype, TESTING_REAL);
        sebp_matrix dy = testing_random_matrix(m, n, dtype, TESTING_REAL);
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n; j++) {
                testing_set(&both, i, j, any_input());
            }
        }
        layer_hide(&both, &rows);
        layer_hide(&dy, &rows);
        int y_place = (int)testing_between(0, 1 + gated),
            dx_place = (int)testing_between(0, 2 + gated);
        int dup_place = (int)testing_between(0, 3);
        dup_place = dup_place == dx_place ? 0 : dup_place;
        sebp_matrix got[2][3];
        for (int c = 0; c < 2; c++) {
            sebp_matrix both_c = testing_copy(&both), dy_c = testing_copy(&dy);
            sebp_matrix x = both_c, up, y = layer_output(m, n, dtype);
            sebp_matrix dx = layer_output(m, n, dtype), dup = layer_output(m, n, dtype);
            x.cols = n;
            up = x;
            up.data = (char *)x.data + (size_t)n * sebp_dtype_bytes(dtype);
            sebp_matrix *to_y[3] = {&y, &x, &up};
            testing_succeed(sebp_activation_forward(contexts[c], which, &x, gated ? &up : NULL,
                                                    rows.rows, &options, to_y[y_place]),
                            contexts[c]);
            got[c][0] = layer_output(m, n, dtype);
            testing_succeed(sebp_matrix_convert(to_y[y_place], &got[c][0]), contexts[c]);
            testing_check_matrix(&both_c);
            testing_release(&both_c);
            both_c = testing_copy(&both);
            x.data = both_c.data;
            up.data = (char *)x.data + (size_t)n * sebp_dtype_bytes(dtype);
            sebp_matrix *to_dx[4] = {&dx, &dy_c, &x, &up}, *to_dup[4] = {&dup, &dy_c, &x, &up};
            testing_succeed(sebp_activation_backward(
                                contexts[c], which, &dy_c, &x, gated ? &up : NULL, rows.rows,
                                &options, to_dx[dx_place], gated ? to_dup[dup_place] : NULL),
                            contexts[c]);
            got[c][1] = layer_output(m, n, dtype);
            got[c][2] = layer_output(m, n, dtype);
            testing_succeed(sebp_matrix_convert(to_dx[dx_place], &got[c][1]), contexts[c]);
            testing_succeed(sebp_matrix_convert(to_dup[dup_place], &got[c][2]), contexts[c]);
            testing_release(&both_c);
            testing_release(&dy_c);
            testing_release(&y);
            testing_release(&dx);
            testing_release(&dup);
        }
        for (int i = 0; i < 3; i++) {
            ck_assert((i == 2 && !gated) || testing_same_bits(&got[0][i], &got[1][i]));
        }
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n; j++) {
                if (!layer_rows_have(&rows, i)) {
                    if (options.inactive == SEBP_INACTIVE_ZERO) {
                        ck_assert(testing_get(&got[0][0], i, j) == 0);
                        ck_assert(testing_get(&got[0][1], i, j) == 0);
                        ck_assert(!gated || testing_get(&got[0][2], i, j) == 0);
                    }
                    continue;
                }
                double x = testing_get(&both, i, j), g = testing_get(&dy, i, j);
                double u = gated ? testing_get(&both, i, n + j) : 1;
                double value = activated(which, x);
                const double bound = value_bound(which, dtype, value);
                const double slope_bound = dtype == SEBP_BF16 ? 0x1p-14 : 0x1p-22;
                const double want[3] = {value * u, g * slope(which, x) * u, g * value};
                layer_near(&got[0][0], i, j, want[0], bound * fabs(u) + fabs(want[0]) * EPS, "y");
                layer_near(&got[0][1], i, j, want[1],
                           slope_bound * fabs(g * u) + 3 * fabs(want[1]) * EPS, "dx");
                if (gated) {
                    layer_near(&got[0][2], i, j, want[2], bound * fabs(g) + fabs(want[2]) * EPS,
                               "dup");
                }
                nonzeros += testing_get(&got[0][1], i, j) != 0;
                elements++;
            }
        }
        for (int i = 0; i < 6; i++) {
            testing_release(&got[i / 3][i % 3]);
        }
        testing_release(&both);
        testing_release(&dy);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    close_contexts();
}
END_TEST

/* ---- dropout ---- */

START_TEST(dropout)
{
    int64_t nonzeros = 0, elements = 0;
    open_contexts();
    for (int round = testing_rounds(200); round > 0; round--) {
        int64_t m = testing_between(0, 12), n = any_cols();
        sebp_dropout_options options = SEBP_DROPOUT_OPTIONS_INIT;
        options.probability = testing_chance(0.2) ? 0 : fabs(testing_uniform()) / 2;
        options.seed = testing_random();
        options.offset = testing_random();
        options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
        layer_rows rows = layer_rows_make(m);
        sebp_matrix x = testing_random_matrix(m, n, testing_dtype(), TESTING_REAL);
        layer_hide(&x, &rows);
        sebp_matrix y = layer_output(m, n, x.dtype), before = testing_copy(&y);
        sebp_matrix in_place = testing_copy(&x);
        testing_succeed(sebp_dropout_apply(contexts[0], &x, rows.rows, &options, &y), contexts[0]);
        testing_succeed(sebp_dropout_apply(contexts[1], &in_place, rows.rows, &options, &in_place),
                        contexts[1]);
        layer_inactive(&y, &rows, options.inactive, &before, "y");
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n && layer_rows_have(&rows, i); j++) {
                double scale = kept(options.probability, options.seed, options.offset, i, j, n);
                layer_near(&y, i, j, scale * testing_get(&x, i, j), 2 * EPS, "y");
                ck_assert(testing_get(&y, i, j) == testing_get(&in_place, i, j));
                nonzeros += testing_get(&y, i, j) != 0;
                elements++;
            }
        }
        testing_release(&x);
        testing_release(&y);
        testing_release(&before);
        testing_release(&in_place);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    close_contexts();
}
END_TEST

/* ---- rotary positions ---- */

START_TEST(rotary)
{
    int64_t nonzeros = 0, elements = 0;
    open_contexts();
    for (int round = testing_rounds(200); round > 0; round--) {
        int64_t m = testing_between(0, 12), heads = testing_between(1, 4);
        int64_t size = testing_between(1, testing_chance(0.2) ? 300 : 40);
        int64_t dims = testing_between(0, size / 2) * 2, positions = testing_between(12, 5000);
        sebp_rotary_options options = SEBP_ROTARY_OPTIONS_INIT;
        options.head_size = heads == 1 && testing_chance(0.5) ? 0 : size;
        options.interleaved = testing_chance(0.5);
        options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
        options.base = testing_chance(0.5) ? 10000 : 500000;
        options.factor = testing_chance(0.5) ? 1 : 8;
        sebp_matrix table = layer_output(positions, dims, SEBP_F32);
        testing_succeed(sebp_rotary_table(contexts[0], &options, &table), contexts[0]);
        layer_rows rows = layer_rows_make(m);
        sebp_matrix x = testing_random_matrix(m, heads * size, testing_dtype(), TESTING_REAL);
        layer_hide(&x, &rows);
        int64_t position[12];
        int given = testing_chance(0.7);
        for (int64_t i = 0; i < m; i++) {
            position[i] = !layer_rows_have(&rows, i) ? -1
                          : given                    ? testing_between(0, positions - 1)
                                                     : i;
        }
        sebp_matrix y = layer_output(m, heads * size, x.dtype), before = testing_copy(&y);
        sebp_matrix in_place = testing_copy(&x);
        testing_succeed(sebp_rotary_forward(contexts[0], &x, given ? position : NULL, &table,
                                            rows.rows, &options, &y),
                        contexts[0]);
        testing_succeed(sebp_rotary_forward(contexts[1], &in_place, given ? position : NULL, &table,
                                            rows.rows, &options, &in_place),
                        contexts[1]);
        layer_inactive(&y, &rows, options.inactive, &before, "y");
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < heads * size && layer_rows_have(&rows, i); j++) {
                int64_t within = j % size;
                double want = testing_get(&x, i, j);
                if (within < dims) {
                    int first = options.interleaved ? within % 2 == 0 : within < dims / 2;
                    int64_t pair = options.interleaved ? within / 2 : within % (dims / 2);
                    int64_t away = options.interleaved ? 1 : dims / 2;
                    double f = pow(options.base, -2 * (double)pair / (double)dims);
                    double wave = 2 * acos(-1) / f;
                    if (options.factor != 1 && wave > 8192.0 / 1) {
                        f /= options.factor;
                    } else if (options.factor != 1 && wave >= 8192.0 / 4) {
                        double s = (8192 / wave - 1) / (4 - 1);
                        f = (1 - s) * f / options.factor + s * f;
                    }
                    double angle = (double)position[i] * f;
                    double other = testing_get(&x, i, first ? j + away : j - away);
                    want = want * cos(angle) + (first ? -other : other) * sin(angle);
                }
                layer_near(&y, i, j, want, within < dims ? 4 * EPS : 0, "y");
                ck_assert(testing_get(&y, i, j) == testing_get(&in_place, i, j));
                nonzeros += testing_get(&y, i, j) != 0;
                elements++;
            }
        }
        /* The backward turns back. */
        if (x.dtype == SEBP_F32) {
            testing_succeed(sebp_rotary_backward(contexts[1], &y, given ? position : NULL, &table,
                                                 rows.rows, &options, &in_place),
                            contexts[1]);
            for (int64_t i = 0; i < m; i++) {
                for (int64_t j = 0; j < heads * size && layer_rows_have(&rows, i); j++) {
                    layer_near(&in_place, i, j, testing_get(&x, i, j), 8 * EPS, "dx");
                }
            }
        }
        testing_release(&x);
        testing_release(&y);
        testing_release(&before);
        testing_release(&in_place);
        testing_release(&table);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    close_contexts();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("layers");
    TCase *all = tcase_create("layers");
    tcase_add_test(all, norm_forward);
    tcase_add_test(all, norm_backward);
    tcase_add_test(all, norm_exact);
    tcase_add_loop_test(all, activation, SEBP_GELU, SEBP_RELU + 1);
    tcase_add_test(all, dropout);
    tcase_add_test(all, rotary);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
