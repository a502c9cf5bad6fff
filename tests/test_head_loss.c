/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Softmax cross-entropy of hidden states and a head's weight against double precision, in one chunk of
 * classes and in several.
 */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "layers.h"
#include "losses.h"

static const double EPS = FLT_EPSILON;

/* A head: its inputs, its outputs and what those held. */
enum { DHIDDEN, DWEIGHT, DBIAS, OUTPUTS };

/* Element (i, j) of an output before the call, where it is added to. */
static double before_at(const sebp_matrix *before, sebp_write write, int64_t i, int64_t j)
{
    return write == SEBP_ACCUMULATE ? testing_get(before, i, j) : 0;
}

/* `workspace` decides how many chunks there are. */
static void check_head(int64_t m, int64_t k, int64_t classes, int64_t workspace, double lowest)
{
    sebp_cross_entropy_options options = losses_options();
    const sebp_dtype dtype = testing_dtype();
    if (lowest > 0) {
        options.smoothing = 0;
    }
    sebp_context *one = testing_context(SEBP_GEMM_NATIVE, 1, workspace);
    sebp_context *three = testing_context(SEBP_GEMM_NATIVE, 3, workspace);
    sebp_matrix hidden = testing_random_matrix(m, k, dtype, TESTING_REAL);
    sebp_matrix weight = testing_random_matrix(classes, k, testing_dtype(), TESTING_REAL);
    sebp_matrix bias = testing_random_matrix(1, classes, testing_dtype(), TESTING_REAL);
    int has_bias = lowest > 0 || testing_chance(0.5);
    int64_t *labels = losses_labels(m, classes, testing_chance(0.1) ? 0 : 0.6);
    int64_t count = losses_count(labels, m);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < k && labels[i] == LOSSES_IGNORED; j++) {
            testing_set(&hidden, i, j, NAN);
        }
        if (labels[i] != LOSSES_IGNORED && lowest > 0) {
            labels[i] = classes - 1 - labels[i] % (classes / 4);
        }
    }
    /* Classes that cannot be: whole chunks of them, at the front. */
    for (int64_t j = 0; (double)j < lowest * (double)classes; j++) {
        testing_set(&bias, 0, j, -INFINITY);
    }
    sebp_matrix before[OUTPUTS] = {layer_output(m, k, testing_dtype()),
                                   layer_output(classes, k, testing_dtype()),
                                   layer_output(1, classes, testing_dtype())};
    const sebp_write writes[OUTPUTS] = {options.dhidden_write, options.dweight_write,
                                        options.dbias_write};
    int wants[OUTPUTS];
    sebp_matrix got[2][OUTPUTS];
    for (int i = 0; i < OUTPUTS; i++) {
        if (writes[i] == SEBP_ACCUMULATE) {
            testing_fill(&before[i], TESTING_REAL);
        }
        wants[i] = testing_chance(0.8);
    }
    double losses[2];
    for (int c = 0; c < 2; c++) {
        sebp_context *context = c == 0 ? one : three;
        for (int i = 0; i < OUTPUTS; i++) {
            got[c][i] = testing_copy(&before[i]);
        }
        testing_succeed(
            sebp_linear_cross_entropy(context, &hidden, &weight, has_bias ? &bias : NULL, labels,
                                      &options, &losses[c], wants[0] ? &got[c][0] : NULL,
                                      wants[1] ? &got[c][1] : NULL, wants[2] ? &got[c][2] : NULL),
            context);
    }
    ck_assert(losses[0] == losses[1]);
    double scale = options.scale != 0 ? options.scale : count > 0 ? 1 / (double)count : 0;
    double want_loss = 0;
    size_t cells = (size_t)(m * classes + 1);
    double *logits = calloc(cells, sizeof *logits), *gradient = calloc(cells, sizeof *gradient);
    for (int64_t i = 0; i < m; i++) {
        double *row = logits + i * classes;
        for (int64_t j = 0; j < classes && labels[i] != LOSSES_IGNORED; j++) {
            row[j] = has_bias ? testing_get(&bias, 0, j) : 0;
            for (int64_t t = 0; t < k; t++) {
                row[j] += testing_get(&hidden, i, t) * testing_get(&weight, j, t);
            }
        }
        if (labels[i] != LOSSES_IGNORED) {
            want_loss += scale * losses_row(row, classes, labels[i], options.smoothing,
                                            gradient + i * classes);
        }
    }
    double loss_bound = EPS * fabs(scale) * (double)(m + 1) * (20 + 4 * (double)k);
    ck_assert_msg(fabs(losses[0] - want_loss) <= loss_bound, "loss %.17g, not %.17g", losses[0],
                  want_loss);
    /* A gradient of bf16 is rounded before it is multiplied. */
    double unit = (dtype == SEBP_BF16 ? 0x1p-8 : 0) + 4 * EPS * (double)(k + 4);
    int64_t nonzeros = 0, chunks = 1 + m * classes * 6 / (workspace / 2);
    for (int64_t i = 0; i < m && wants[DHIDDEN]; i++) {
        for (int64_t t = 0; t < k; t++) {
            double total = 0, size = 0;
            for (int64_t j = 0; j < classes && labels[i] != LOSSES_IGNORED; j++) {
                double term = gradient[i * classes + j] * testing_get(&weight, j, t) * scale;
                total += term;
                size += fabs(term) + fabs(scale * testing_get(&weight, j, t)) * options.smoothing *
                                         (double)(j == labels[i] ? 1 : 0);
            }
            if (labels[i] == LOSSES_IGNORED && writes[DHIDDEN] == SEBP_OVERWRITE) {
                double value = testing_get(&got[0][DHIDDEN], i, t);
                ck_assert(options.inactive == SEBP_INACTIVE_ZERO ? value == 0 : isnan(value));
                continue;
            }
            total += before_at(&before[DHIDDEN], writes[DHIDDEN], i, t);
            double bound = unit * (size + fabs(scale)) + EPS * 8 * fabs(total);
            if (got[0][DHIDDEN].dtype == SEBP_BF16) {
                bound += (double)chunks * 0x1p-8 * (size + fabs(total));
            }
            layer_near(&got[0][DHIDDEN], i, t, total, bound, "dhidden");
            nonzeros += testing_get(&got[0][DHIDDEN], i, t) != 0;
        }
    }
    for (int64_t j = 0; j < classes; j++) {
        for (int64_t t = 0; t < k && wants[DWEIGHT]; t++) {
            double total = before_at(&before[DWEIGHT], writes[DWEIGHT], j, t), size = fabs(total);
            for (int64_t i = 0; i < m; i++) {
                if (labels[i] != LOSSES_IGNORED) {
                    double term = gradient[i * classes + j] * testing_get(&hidden, i, t) * scale;
                    total += term;
                    size += fabs(term) + fabs(scale) * (options.smoothing + 1) / (double)classes;
                }
            }
            layer_near(&got[0][DWEIGHT], j, t, total, unit * size * 2 + EPS * size * (double)m,
                       "dweight");
            nonzeros += testing_get(&got[0][DWEIGHT], j, t) != 0;
        }
        double total = before_at(&before[DBIAS], writes[DBIAS], 0, j), size = fabs(total);
        for (int64_t i = 0; i < m; i++) {
            total += gradient[i * classes + j] * scale;
            size += fabs(gradient[i * classes + j] * scale) +
                    fabs(scale) * (options.smoothing + 1) / (double)classes;
        }
        if (wants[DBIAS]) {
            layer_near(&got[0][DBIAS], 0, j, total, unit * size * 2 + EPS * size * (double)m,
                       "dbias");
        }
    }
    if (count > 0 && k > 0 && classes > 1 && (wants[DHIDDEN] || wants[DWEIGHT])) {
        ck_assert_int_gt(nonzeros, 0);
    }
    for (int i = 0; i < OUTPUTS; i++) {
        ck_assert(testing_same_bits(&got[0][i], &got[1][i]));
        testing_release(&got[0][i]);
        testing_release(&got[1][i]);
        testing_release(&before[i]);
    }
    free(logits);
    free(gradient);
    free(labels);
    testing_release(&hidden);
    testing_release(&weight);
    testing_release(&bias);
    sebp_context_destroy(one);
    sebp_context_destroy(three);
}

START_TEST(head_of_one_chunk)
{
    for (int round = testing_rounds(100); round > 0; round--) {
        int64_t k = testing_between(0, 40);
        check_head(testing_between(0, 20), k, testing_between(1, 60), INT64_C(1) << 20, 0);
    }
}
END_TEST

START_TEST(head_of_chunks)
{
    for (int round = testing_rounds(12); round > 0; round--) {
        check_head(testing_between(150, 400), testing_between(1, 12), testing_between(900, 1500),
                   INT64_C(1) << 20, round % 2 == 0 ? 0.7 : 0);
    }
}
END_TEST

/* A chunk in the middle adds to dhidden, and may take more memory than the first and the last: of these
 * sizes oneDNN has the first, and our own product those that must round dhidden once. */
START_TEST(middle_chunks_have_memory)
{
    enum { ROWS = 1000, FEATURES = 512, CLASSES = 1921 };
    const int64_t workspace = INT64_C(8) << 20;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *contexts[2] = {testing_context(SEBP_GEMM_NATIVE, 1, workspace), NULL};
    options.gemm = SEBP_GEMM_ONEDNN;
    options.threads = 1;
    options.workspace_bytes = workspace;
    if (sebp_context_create(&options, &contexts[1]) != SEBP_SUCCESS) {
        testing_skip("middle_chunks_have_memory", "the library has no oneDNN");
        sebp_context_destroy(contexts[0]);
        return;
    }
    sebp_matrix hidden = testing_random_matrix(ROWS, FEATURES, SEBP_BF16, TESTING_REAL);
    sebp_matrix weight = testing_random_matrix(CLASSES, FEATURES, SEBP_BF16, TESTING_REAL);
    int64_t *labels = losses_labels(ROWS, CLASSES, 0.9);
    double loss[2];
    sebp_matrix dhidden[2];
    for (int i = 0; i < 2; i++) {
        dhidden[i] = layer_output(ROWS, FEATURES, SEBP_BF16);
        testing_succeed(sebp_linear_cross_entropy(contexts[i], &hidden, &weight, NULL, labels, NULL,
                                                  &loss[i], &dhidden[i], NULL, NULL),
                        contexts[i]);
        sebp_context_destroy(contexts[i]);
    }
    ck_assert_msg(fabs(loss[0] - loss[1]) <= 1e-4 * fabs(loss[0]), "%g and %g", loss[0], loss[1]);
    ck_assert_int_gt(testing_nonzeros(&dhidden[0]), 0);
    double largest = 0, apart = 0;
    for (int64_t i = 0; i < ROWS * FEATURES; i++) {
        double a = testing_get(&dhidden[0], i / FEATURES, i % FEATURES);
        double b = testing_get(&dhidden[1], i / FEATURES, i % FEATURES);
        largest = fmax(largest, fabs(a));
        apart = fabs(a - b) <= apart ? apart : fabs(a - b);
    }
    ck_assert_msg(apart <= largest / 32, "%g apart, of %g", apart, largest);
    testing_release(&hidden);
    testing_release(&weight);
    testing_release(&dhidden[0]);
    testing_release(&dhidden[1]);
    free(labels);
}
END_TEST

/* A logit may be off by 2^-6.9 of the sum of its |a||b|, and the loss by twice the largest such. */
START_TEST(medium_is_near)
{
    enum { ROWS = 300, FEATURES = 64, CLASSES = 200 };
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_matrix hidden = testing_random_matrix(ROWS, FEATURES, SEBP_F32, TESTING_REAL);
    sebp_matrix weight = testing_random_matrix(CLASSES, FEATURES, SEBP_F32, TESTING_REAL);
    int64_t *labels = losses_labels(ROWS, CLASSES, 1);
    double loss[2], largest = 0;
    sebp_matrix dhidden = layer_output(ROWS, FEATURES, SEBP_F32);
    sebp_cross_entropy_options options = SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    for (int i = 0; i < 2; i++) {
        options.precision = i == 0 ? SEBP_PRECISION_HIGHEST : SEBP_PRECISION_MEDIUM;
        testing_succeed(sebp_linear_cross_entropy(context, &hidden, &weight, NULL, labels, &options,
                                                  &loss[i], &dhidden, NULL, NULL),
                        context);
    }
    for (int64_t i = 0; i < ROWS; i++) {
        for (int64_t j = 0; j < CLASSES; j++) {
            double size = 0;
            for (int64_t t = 0; t < FEATURES; t++) {
                size += fabs(testing_get(&hidden, i, t) * testing_get(&weight, j, t));
            }
            largest = fmax(largest, size);
        }
    }
    ck_assert(loss[0] > 0);
    ck_assert_msg(fabs(loss[0] - loss[1]) <= 0x1p-5 * largest, "%g and %g", loss[0], loss[1]);
    ck_assert_int_gt(testing_nonzeros(&dhidden), 0);
    testing_release(&hidden);
    testing_release(&weight);
    testing_release(&dhidden);
    free(labels);
    sebp_context_destroy(context);
}
END_TEST

/* So many rows that 16 of their logits are too much. */
START_TEST(too_many_rows)
{
    enum { ROWS = 20000 };
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, INT64_C(1) << 20);
    sebp_matrix hidden = testing_random_matrix(ROWS, 1, SEBP_F32, TESTING_REAL);
    sebp_matrix weight = testing_random_matrix(40, 1, SEBP_F32, TESTING_REAL);
    sebp_matrix dweight = layer_output(40, 1, SEBP_F32), before = testing_copy(&dweight);
    int64_t *labels = losses_labels(ROWS, 40, 1);
    double loss = 7;
    testing_expect(sebp_linear_cross_entropy(context, &hidden, &weight, NULL, labels, NULL, &loss,
                                             NULL, &dweight, NULL),
                   SEBP_ERROR_MEMORY, context);
    ck_assert(loss == 7 && testing_same_bits(&dweight, &before));
    /* The context works on. */
    hidden.rows = 10;
    testing_succeed(sebp_linear_cross_entropy(context, &hidden, &weight, NULL, labels, NULL, &loss,
                                              NULL, &dweight, NULL),
                    context);
    hidden.rows = ROWS;
    free(labels);
    testing_release(&hidden);
    testing_release(&weight);
    testing_release(&dweight);
    testing_release(&before);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("head loss");
    TCase *all = tcase_create("head loss");
    tcase_add_test(all, head_of_one_chunk);
    tcase_add_test(all, head_of_chunks);
    tcase_add_test(all, middle_chunks_have_memory);
    tcase_add_test(all, medium_is_near);
    tcase_add_test(all, too_many_rows);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
