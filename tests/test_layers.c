/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations, dropout and rotary positions against double precision, on random shapes,
 * strides, dtypes and rows, in place and not; gradients also against finite differences.
 */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

static const double EPS = FLT_EPSILON;

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
    layer_open_contexts();
    for (int round = 0; testing_goes_on(round, 200, elements, 200); round++) {
        int64_t m = testing_between(0, 12), n = layer_any_cols();
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
            testing_succeed(sebp_activation_forward(layer_contexts[c], which, &x,
                                                    gated ? &up : NULL, rows.rows, &options,
                                                    to_y[y_place]),
                            layer_contexts[c]);
            got[c][0] = layer_output(m, n, dtype);
            testing_succeed(sebp_matrix_convert(to_y[y_place], &got[c][0]), layer_contexts[c]);
            testing_check_matrix(&both_c);
            testing_release(&both_c);
            both_c = testing_copy(&both);
            x.data = both_c.data;
            up.data = (char *)x.data + (size_t)n * sebp_dtype_bytes(dtype);
            sebp_matrix *to_dx[4] = {&dx, &dy_c, &x, &up}, *to_dup[4] = {&dup, &dy_c, &x, &up};
            testing_succeed(sebp_activation_backward(
                                layer_contexts[c], which, &dy_c, &x, gated ? &up : NULL, rows.rows,
                                &options, to_dx[dx_place], gated ? to_dup[dup_place] : NULL),
                            layer_contexts[c]);
            got[c][1] = layer_output(m, n, dtype);
            got[c][2] = layer_output(m, n, dtype);
            testing_succeed(sebp_matrix_convert(to_dx[dx_place], &got[c][1]), layer_contexts[c]);
            testing_succeed(sebp_matrix_convert(to_dup[dup_place], &got[c][2]), layer_contexts[c]);
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
    layer_close_contexts();
}
END_TEST

/* ---- dropout ---- */

START_TEST(dropout)
{
    int64_t nonzeros = 0, elements = 0;
    layer_open_contexts();
    for (int round = 0; testing_goes_on(round, 200, elements, 200); round++) {
        int64_t m = testing_between(0, 12), n = layer_any_cols();
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
        testing_succeed(sebp_dropout_apply(layer_contexts[0], &x, rows.rows, &options, &y),
                        layer_contexts[0]);
        testing_succeed(
            sebp_dropout_apply(layer_contexts[1], &in_place, rows.rows, &options, &in_place),
            layer_contexts[1]);
        layer_inactive(&y, &rows, options.inactive, &before, "y");
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n && layer_rows_have(&rows, i); j++) {
                double scale =
                    layer_kept(options.probability, options.seed, options.offset, i, j, n);
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
    layer_close_contexts();
}
END_TEST

/* ---- rotary positions ---- */

START_TEST(rotary)
{
    int64_t nonzeros = 0, elements = 0;
    layer_open_contexts();
    for (int round = 0; testing_goes_on(round, 200, elements, 200); round++) {
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
        testing_succeed(sebp_rotary_table(layer_contexts[0], &options, &table), layer_contexts[0]);
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
        testing_succeed(sebp_rotary_forward(layer_contexts[0], &x, given ? position : NULL, &table,
                                            rows.rows, &options, &y),
                        layer_contexts[0]);
        testing_succeed(sebp_rotary_forward(layer_contexts[1], &in_place, given ? position : NULL,
                                            &table, rows.rows, &options, &in_place),
                        layer_contexts[1]);
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
            testing_succeed(sebp_rotary_backward(layer_contexts[1], &y, given ? position : NULL,
                                                 &table, rows.rows, &options, &in_place),
                            layer_contexts[1]);
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
    layer_close_contexts();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("layers");
    TCase *all = tcase_create("layers");
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
