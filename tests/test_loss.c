/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax cross-entropy of logits against double precision. */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "layers.h"
#include "losses.h"

static const double EPS = FLT_EPSILON;

START_TEST(cross_entropy)
{
    int64_t nonzeros = 0, elements = 0;
    sebp_context *one = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_context *three = testing_context(SEBP_GEMM_NATIVE, 3, 0);
    for (int round = 0; testing_goes_on(round, 300, elements, 200); round++) {
        int64_t m = testing_between(0, 12);
        int64_t classes = testing_between(1, testing_chance(0.05) ? 40000 : 200);
        sebp_cross_entropy_options options = losses_options();
        sebp_matrix logits = testing_random_matrix(m, classes, testing_dtype(), TESTING_REAL);
        int64_t *labels = losses_labels(m, classes, testing_chance(0.1) ? 0 : 0.8);
        int64_t count = losses_count(labels, m);
        double spread = testing_chance(0.3) ? 100 : 8;
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < classes; j++) {
                double value = spread * testing_get(&logits, i, j);
                value = testing_chance(0.02) && j != labels[i] && options.smoothing == 0 ? -INFINITY
                                                                                         : value;
                testing_set(&logits, i, j, labels[i] == LOSSES_IGNORED ? NAN : value);
            }
        }
        sebp_matrix dlogits = layer_output(m, classes, logits.dtype);
        sebp_matrix in_place = testing_copy(&logits);
        double loss = NAN, loss_alone = NAN, loss_again = NAN;
        testing_succeed(sebp_cross_entropy(one, &logits, labels, &options, &loss, &dlogits), one);
        testing_succeed(sebp_cross_entropy(one, &logits, labels, &options, &loss_alone, NULL), one);
        testing_succeed(
            sebp_cross_entropy(three, &in_place, labels, &options, &loss_again, &in_place), three);
        ck_assert(loss == loss_alone && loss == loss_again);
        double scale = options.scale != 0 ? options.scale : count > 0 ? 1 / (double)count : 0;
        double want = 0, bound = 0;
        double *row = malloc((size_t)(2 * classes) * sizeof *row), *gradient = row + classes;
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < classes; j++) {
                row[j] = testing_get(&logits, i, j);
            }
            if (labels[i] != LOSSES_IGNORED) {
                double of_row = losses_row(row, classes, labels[i], options.smoothing, gradient);
                want += scale * of_row;
                bound += fabs(scale) * EPS * (8 + spread * options.smoothing * 40);
            }
            for (int64_t j = 0; j < classes; j++) {
                double value = labels[i] != LOSSES_IGNORED ? scale * gradient[j] : 0;
                /* x - max is rounded too, which is an error of the exponent. */
                double near =
                    (12 + 2 * spread) * EPS * (fabs(value) + fabs(scale) * options.smoothing);
                near += labels[i] == j ? 4 * EPS * fabs(scale) : 0;
                /* Of p < 2^-126 the exponential of f32 says 0. */
                layer_near(&dlogits, i, j, value, near + fabs(scale) * 2e-38, "dlogits");
                ck_assert(testing_get(&dlogits, i, j) == testing_get(&in_place, i, j));
                nonzeros += testing_get(&dlogits, i, j) != 0;
                elements += labels[i] != LOSSES_IGNORED;
            }
        }
        ck_assert_msg(fabs(loss - want) <= bound, "loss %.17g, not %.17g", loss, want);
        free(row);
        free(labels);
        testing_release(&logits);
        testing_release(&dlogits);
        testing_release(&in_place);
    }
    layer_not_vacuous(nonzeros, elements);
    sebp_context_destroy(one);
    sebp_context_destroy(three);
}
END_TEST

/* The gradient against differences of the reference's loss. */
START_TEST(differences)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    for (int round = testing_rounds(50); round > 0; round--) {
        int64_t classes = testing_between(1, 40);
        sebp_cross_entropy_options options = losses_options();
        options.scale = 1;
        sebp_matrix logits = testing_random_matrix(1, classes, SEBP_F32, TESTING_REAL);
        sebp_matrix dlogits = layer_output(1, classes, SEBP_F32);
        int64_t label = testing_between(0, classes - 1);
        double loss, row[40];
        testing_succeed(sebp_cross_entropy(context, &logits, &label, &options, &loss, &dlogits),
                        context);
        for (int64_t j = 0; j < classes; j++) {
            row[j] = testing_get(&logits, 0, j);
        }
        for (int64_t j = 0; j < classes; j++) {
            const double step = 1e-5, before = row[j];
            row[j] = before + step;
            double up = losses_row(row, classes, label, options.smoothing, NULL);
            row[j] = before - step;
            double down = losses_row(row, classes, label, options.smoothing, NULL);
            row[j] = before;
            layer_near(&dlogits, 0, j, (up - down) / (2 * step), 1e-6, "dlogits");
        }
        testing_release(&logits);
        testing_release(&dlogits);
    }
    sebp_context_destroy(context);
}
END_TEST

/* NaN and Inf in one of three rows. */
START_TEST(not_finite)
{
    const struct {
        double bad; /* where the label is not */
        double at_label;
        double loss;
    } cases[] = {{NAN, 1, NAN},
                 {INFINITY, 1, NAN},
                 {1, INFINITY, NAN},
                 {1, -INFINITY, INFINITY},
                 {1, NAN, NAN}};
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    for (int c = 0; c < 5; c++) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            sebp_dtype dtype = bf16 ? SEBP_BF16 : SEBP_F32;
            sebp_matrix logits = testing_random_matrix(3, 70, dtype, TESTING_REAL);
            sebp_matrix dlogits = layer_output(3, 70, dtype);
            const int64_t labels[3] = {4, 5, 6};
            double loss = 7;
            testing_set(&logits, 1, testing_between(10, 69), cases[c].bad);
            testing_set(&logits, 1, 5, cases[c].at_label);
            testing_succeed(sebp_cross_entropy(context, &logits, labels, NULL, &loss, &dlogits),
                            context);
            ck_assert(isnan(cases[c].loss) ? isnan(loss) : loss == cases[c].loss);
            for (int64_t j = 0; j < 70; j++) {
                ck_assert(isfinite(testing_get(&dlogits, 0, j)));
                ck_assert(isnan(testing_get(&dlogits, 1, j)) || !isnan(cases[c].loss));
            }
            testing_release(&logits);
            testing_release(&dlogits);
        }
    }
    /* Only -Inf. */
    sebp_matrix lowest = testing_random_matrix(1, 20, SEBP_F32, TESTING_REAL);
    const int64_t label = 3;
    double loss = 7;
    for (int64_t j = 0; j < 20; j++) {
        testing_set(&lowest, 0, j, -INFINITY);
    }
    testing_succeed(sebp_cross_entropy(context, &lowest, &label, NULL, &loss, &lowest), context);
    ck_assert(isnan(loss) && isnan(testing_get(&lowest, 0, 0)));
    testing_release(&lowest);
    sebp_context_destroy(context);
}
END_TEST

/* Smoothing takes the mean of all logits: far from 0 it keeps their differences, and large ones do not
 * overflow. */
START_TEST(smoothing_of_large_logits)
{
    enum { CLASSES = 1000 };
    static const double far[] = {0, 1e4, -1e5, 3e38};
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_cross_entropy_options options = SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    options.smoothing = 0.1;
    const int64_t label = 3;
    double logits_of[CLASSES];
    for (int i = 0; i < 4; i++) {
        sebp_matrix logits = testing_random_matrix(1, CLASSES, SEBP_F32, TESTING_REAL);
        for (int64_t j = 0; j < CLASSES; j++) {
            testing_set(&logits, 0, j, testing_get(&logits, 0, j) + far[i]);
            logits_of[j] = testing_get(&logits, 0, j);
        }
        double loss, want = losses_row(logits_of, CLASSES, label, options.smoothing, NULL);
        testing_succeed(sebp_cross_entropy(context, &logits, &label, &options, &loss, NULL),
                        context);
        ck_assert_msg(fabs(loss - want) <= 1e-6 * fabs(want), "%g, not %g", loss, want);
        testing_release(&logits);
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("loss");
    TCase *all = tcase_create("loss");
    tcase_add_test(all, cross_entropy);
    tcase_add_test(all, differences);
    tcase_add_test(all, not_finite);
    tcase_add_test(all, smoothing_of_large_logits);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
