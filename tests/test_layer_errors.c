/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Row-wise layers, losses and embeddings given wrong arguments: each call makes one change to a good
 * one, and must then say what is wrong and leave every matrix as it was.
 */
#include <math.h>

#include <sebp/sebp.h>

#include "layers_call.h"

START_TEST(norms)
{
    const int outputs[] = {C, D};
    BAD_OPTIONS(norm_forward, norm);
    BAD_OPTIONS(norm_backward, norm);
    BAD_ROWS(norm_forward);
    BAD_ROWS(norm_backward);
    MISSING(norm_forward, A, "x");
    MISSING(norm_forward, D, "y");
    MISSING(norm_forward, C, "h");
    FAILS(norm_forward, SEBP_ERROR_NULL, "h",
          (call.at[B] = call.at[C] = NULL, call.norm.dropout = 0.1));
    MISSING(norm_backward, A, "dy");
    MISSING(norm_backward, B, "h");
    MISSING(norm_backward, STATISTICS, "statistics");
    BAD_VIEW(norm_forward, A, "x");
    BAD_VIEW(norm_forward, B, "residual");
    BAD_VIEW(norm_forward, VECTOR, "gain");
    BAD_VIEW(norm_forward, C, "h");
    BAD_VIEW(norm_backward, D, "dx");
    BAD_SHAPE(norm_forward, B, "residual");
    BAD_SHAPE(norm_forward, VECTOR, "gain");
    BAD_SHAPE(norm_forward, VECTOR2, "shift");
    BAD_SHAPE(norm_forward, C, "h");
    BAD_SHAPE(norm_forward, D, "y");
    BAD_SHAPE(norm_forward, STATISTICS, "statistics");
    BAD_SHAPE(norm_backward, B, "h");
    BAD_SHAPE(norm_backward, C, "dh");
    BAD_SHAPE(norm_backward, D, "dx");
    BAD_SHAPE(norm_backward, VECTOR, "gain");
    BAD_SHAPE(norm_backward, VECTOR2, "dgain");
    BAD_SHAPE(norm_backward, VECTOR3, "dshift");
    BAD_SHAPE(norm_backward, STATISTICS, "statistics");
    BAD_DTYPE(norm_forward, B, "residual");
    BAD_DTYPE(norm_forward, C, "h");
    BAD_DTYPE(norm_forward, D, "y");
    BAD_DTYPE(norm_forward, STATISTICS, "statistics");
    BAD_DTYPE(norm_backward, B, "h");
    BAD_DTYPE(norm_backward, C, "dh");
    BAD_DTYPE(norm_backward, D, "dx");
    for (int i = 0; i < 2; i++) {
        SHIFTED(norm_forward, outputs[i], A);
        SHIFTED(norm_forward, outputs[i], B);
        SHIFTED(norm_backward, outputs[i], A);
        ONTO(norm_backward, outputs[i], B);
    }
    ONTO(norm_forward, C, D);
    ONTO(norm_backward, C, D);
    ONTO(norm_backward, VECTOR2, VECTOR);
    ONTO(norm_backward, VECTOR2, VECTOR3);
    FAILS(norm_backward, SEBP_ERROR_ALIAS, "overlaps",
          (call.norm.dh_write = SEBP_ACCUMULATE, call.views[C].data = layers_call_on.made[A].data));
    FAILS(norm_forward, SEBP_ERROR_VALUE, "norm", call.norm.norm = (sebp_norm)2);
    FAILS(norm_forward, SEBP_ERROR_VALUE, "epsilon", call.norm.epsilon = -1e-9);
    FAILS(norm_forward, SEBP_ERROR_VALUE, "epsilon", call.norm.epsilon = NAN);
    FAILS(norm_forward, SEBP_ERROR_VALUE, "epsilon", call.norm.epsilon = 1e39);
    FAILS(norm_forward, SEBP_ERROR_VALUE, "gain_offset", call.norm.gain_offset = INFINITY);
    FAILS(norm_forward, SEBP_ERROR_VALUE, "dropout", call.norm.dropout = 1);
    FAILS(norm_backward, SEBP_ERROR_VALUE, "dropout", call.norm.dropout = -0.1);
    FAILS(norm_backward, SEBP_ERROR_VALUE, "dh_write", call.norm.dh_write = (sebp_write)2);
    FAILS(norm_backward, SEBP_ERROR_VALUE, "dgain_write", call.norm.dgain_write = (sebp_write)2);
    FAILS(norm_backward, SEBP_ERROR_VALUE, "dshift_write", call.norm.dshift_write = (sebp_write)2);
}
END_TEST

START_TEST(elements)
{
    BAD_OPTIONS(activation_forward, activation);
    BAD_OPTIONS(activation_backward, activation);
    BAD_OPTIONS(dropout_apply, dropout);
    BAD_ROWS(activation_forward);
    BAD_ROWS(activation_backward);
    BAD_ROWS(dropout_apply);
    FAILS(activation_forward, SEBP_ERROR_VALUE, "activation", call.kind = (sebp_activation)4);
    FAILS(activation_backward, SEBP_ERROR_VALUE, "activation", call.kind = (sebp_activation)-1);
    MISSING(activation_forward, A, "x");
    MISSING(activation_forward, C, "y");
    MISSING(activation_backward, A, "dy");
    MISSING(activation_backward, B, "x");
    MISSING(activation_backward, E, "up");
    FAILS(activation_backward, SEBP_ERROR_NULL, "dx", call.at[E] = call.at[C] = call.at[D] = NULL);
    MISSING(dropout_apply, A, "x");
    MISSING(dropout_apply, C, "y");
    BAD_VIEW(activation_forward, B, "up");
    BAD_VIEW(activation_backward, D, "dup");
    BAD_VIEW(dropout_apply, C, "y");
    BAD_SHAPE(activation_forward, B, "up");
    BAD_SHAPE(activation_forward, C, "y");
    BAD_SHAPE(activation_backward, B, "x");
    BAD_SHAPE(activation_backward, E, "up");
    BAD_SHAPE(activation_backward, C, "dx");
    BAD_SHAPE(activation_backward, D, "dup");
    BAD_SHAPE(dropout_apply, C, "y");
    BAD_DTYPE(activation_forward, C, "y");
    BAD_DTYPE(activation_backward, D, "dup");
    BAD_DTYPE(dropout_apply, C, "y");
    SHIFTED(activation_forward, C, A);
    SHIFTED(activation_forward, C, B);
    SHIFTED(activation_backward, C, E);
    ONTO(activation_backward, C, D);
    SHIFTED(dropout_apply, C, A);
    FAILS(dropout_apply, SEBP_ERROR_VALUE, "probability", call.dropout.probability = 1);
    FAILS(dropout_apply, SEBP_ERROR_VALUE, "probability", call.dropout.probability = NAN);
}
END_TEST

START_TEST(rotary)
{
    BAD_OPTIONS(rotary_forward, rotary);
    BAD_OPTIONS(rotary_backward, rotary);
    BAD_ROWS(rotary_forward);
    MISSING(rotary_table, TABLE, "table");
    MISSING(rotary_forward, A, "x");
    MISSING(rotary_forward, TABLE, "table");
    MISSING(rotary_forward, C, "y");
    MISSING(rotary_backward, A, "dy");
    MISSING(rotary_backward, C, "dx");
    BAD_VIEW(rotary_table, TABLE, "table");
    BAD_VIEW(rotary_forward, TABLE, "table");
    BAD_SHAPE(rotary_forward, C, "y");
    BAD_DTYPE(rotary_table, TABLE, "table");
    BAD_DTYPE(rotary_forward, TABLE, "table");
    BAD_DTYPE(rotary_forward, C, "y");
    SHIFTED(rotary_forward, C, A);
    ONTO(rotary_forward, C, TABLE);
    FAILS(rotary_table, SEBP_ERROR_SHAPE, "even", call.views[TABLE].cols = 3);
    FAILS(rotary_table, SEBP_ERROR_VALUE, "base", call.rotary.base = 0);
    FAILS(rotary_table, SEBP_ERROR_VALUE, "factor", call.rotary.factor = NAN);
    FAILS(rotary_table, SEBP_ERROR_VALUE, "low_factor",
          (call.rotary.factor = 8, call.rotary.low_factor = 4));
    FAILS(rotary_table, SEBP_ERROR_VALUE, "original_length",
          (call.rotary.factor = 8, call.rotary.original_length = -1));
    FAILS(rotary_forward, SEBP_ERROR_SHAPE, "heads", call.rotary.head_size = 3);
    FAILS(rotary_forward, SEBP_ERROR_SHAPE, "turned", call.rotary.head_size = 2);
    FAILS(rotary_forward, SEBP_ERROR_SHAPE, "turned", call.views[TABLE].cols = 3);
    FAILS(rotary_forward, SEBP_ERROR_VALUE, "head_size", call.rotary.head_size = -5);
    FAILS(rotary_forward, SEBP_ERROR_VALUE, "positions[2]", call.numbers[2] = ROWS);
    FAILS(rotary_backward, SEBP_ERROR_VALUE, "positions[5]", call.numbers[5] = -1);
    FAILS(rotary_forward, SEBP_ERROR_VALUE, "row 5",
          (call.list = NULL, call.views[TABLE].rows = 5));
}
END_TEST

START_TEST(losses)
{
    /* A head of 2 classes: its weight is M x N, so the labels and the bias say what does not fit. */
    FAILS(cross_entropy, SEBP_ERROR_NULL, NULL, call.context = NULL);
    FAILS(cross_entropy, SEBP_ERROR_SIZE, "options", call.entropy.size_bytes = 3);
    FAILS(cross_entropy, SEBP_ERROR_NULL, "loss", call.to_loss = NULL);
    FAILS(cross_entropy, SEBP_ERROR_NULL, "labels", call.list = NULL);
    MISSING(cross_entropy, A, "logits");
    BAD_VIEW(cross_entropy, A, "logits");
    BAD_VIEW(cross_entropy, C, "dlogits");
    BAD_SHAPE(cross_entropy, C, "dlogits");
    BAD_DTYPE(cross_entropy, C, "dlogits");
    SHIFTED(cross_entropy, C, A);
    FAILS(cross_entropy, SEBP_ERROR_VALUE, "labels[4]", call.numbers[4] = COLS);
    FAILS(cross_entropy, SEBP_ERROR_VALUE, "labels[1]", call.numbers[1] = -1);
    FAILS(cross_entropy, SEBP_ERROR_VALUE, "smoothing", call.entropy.smoothing = 1.1);
    FAILS(cross_entropy, SEBP_ERROR_VALUE, "smoothing", call.entropy.smoothing = NAN);
    FAILS(cross_entropy, SEBP_ERROR_VALUE, "scale", call.entropy.scale = INFINITY);
    FAILS(linear_cross_entropy, SEBP_ERROR_NULL, NULL, call.context = NULL);
    FAILS(linear_cross_entropy, SEBP_ERROR_NULL, "loss", call.to_loss = NULL);
    FAILS(linear_cross_entropy, SEBP_ERROR_NULL, "labels", call.list = NULL);
    FAILS(linear_cross_entropy, SEBP_ERROR_SIZE, "options", call.entropy.size_bytes = 5000);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "inactive",
          call.entropy.inactive = (sebp_inactive)2);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "dhidden_write",
          call.entropy.dhidden_write = (sebp_write)2);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "dweight_write",
          call.entropy.dweight_write = (sebp_write)2);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "dbias_write",
          call.entropy.dbias_write = (sebp_write)2);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "precision",
          call.entropy.precision = (sebp_precision)5);
    FAILS(linear_cross_entropy, SEBP_ERROR_VALUE, "labels[3]", call.numbers[3] = ROWS);
    FAILS(linear_cross_entropy, SEBP_ERROR_SHAPE, "bias", call.numbers[0] = 1);
    MISSING(linear_cross_entropy, A, "hidden");
    MISSING(linear_cross_entropy, B, "weight");
    BAD_VIEW(linear_cross_entropy, B, "weight");
    call.at[STATISTICS] = NULL;
    FAILS(linear_cross_entropy, SEBP_ERROR_SHAPE, "dbias", call.at[STATISTICS] = NULL);
    FAILS(linear_cross_entropy, SEBP_ERROR_SHAPE, "dhidden",
          (call.at[STATISTICS] = call.at[TABLE] = NULL, call.views[C].rows = 1));
    FAILS(linear_cross_entropy, SEBP_ERROR_SHAPE, "dweight",
          (call.at[STATISTICS] = call.at[TABLE] = NULL, call.views[D].rows = 1));
    FAILS(linear_cross_entropy, SEBP_ERROR_ALIAS, "dhidden",
          (call.at[STATISTICS] = call.at[TABLE] = NULL, call.views[C] = layers_call_on.made[A]));
}
END_TEST

START_TEST(embeddings)
{
    BAD_OPTIONS(embedding_forward, embedding);
    BAD_OPTIONS(embedding_backward, embedding);
    BAD_ROWS(embedding_forward);
    BAD_ROWS(embedding_backward);
    FAILS(embedding_forward, SEBP_ERROR_NULL, "tables", call.given_tables = NULL);
    FAILS(embedding_forward, SEBP_ERROR_NULL, "indices", call.tables[1].indices = NULL);
    FAILS(embedding_forward, SEBP_ERROR_SIZE, "count", call.count = 0);
    FAILS(embedding_forward, SEBP_ERROR_SIZE, "count", call.count = SEBP_MAX_TABLES + 1);
    FAILS(embedding_forward, SEBP_ERROR_VALUE, "indices[3]", call.numbers[3] = ROWS);
    FAILS(embedding_forward, SEBP_ERROR_STRIDE, "tables[1]", call.tables[1].table.stride = 1);
    FAILS(embedding_forward, SEBP_ERROR_SHAPE, "tables[1]", call.tables[1].table.cols = 1);
    FAILS(embedding_forward, SEBP_ERROR_DTYPE, "tables[0]", call.tables[0].table.dtype = SEBP_BF16);
    FAILS(embedding_forward, SEBP_ERROR_ALIAS, "overlaps",
          call.views[C].data = layers_call_on.made[B].data);
    MISSING(embedding_forward, C, "y");
    MISSING(embedding_backward, A, "dy");
    MISSING(embedding_backward, C, "dtable");
    BAD_VIEW(embedding_backward, C, "dtable");
    FAILS(embedding_backward, SEBP_ERROR_SHAPE, "dtable", call.views[C].cols = 1);
    FAILS(embedding_backward, SEBP_ERROR_NULL, "indices", call.list = NULL);
    FAILS(embedding_backward, SEBP_ERROR_VALUE, "indices[0]", call.numbers[0] = -1);
    FAILS(embedding_backward, SEBP_ERROR_VALUE, "write", call.embedding.write = (sebp_write)2);
    ONTO(embedding_backward, C, A);
}
END_TEST

START_TEST(clipping)
{
    FAILS(gradient_norm, SEBP_ERROR_NULL, NULL, call.context = NULL);
    FAILS(gradient_norm, SEBP_ERROR_NULL, "norm", call.to_loss = NULL);
    FAILS(gradient_norm, SEBP_ERROR_SIZE, "count", call.count = 0);
    MISSING(gradient_norm, A, "gradients");
    BAD_VIEW(gradient_norm, A, "gradients[0]");
    FAILS(scale, SEBP_ERROR_NULL, NULL, call.context = NULL);
    FAILS(scale, SEBP_ERROR_SIZE, "count", call.count = 0);
    FAILS(scale, SEBP_ERROR_VALUE, "factor", call.factor = NAN);
    FAILS(scale, SEBP_ERROR_VALUE, "factor", call.factor = 1e39);
    MISSING(scale, A, "matrices");
    BAD_VIEW(scale, A, "matrices[0]");
}
END_TEST

/* Norms take memory for what they must make, and no more: rows may be of any width that a view has. */
START_TEST(norms_of_wide_rows)
{
    const int64_t widths[] = {131073, INT64_C(1) << 40, INT64_C(1) << 60};
    sebp_context *small = testing_context(SEBP_GEMM_NATIVE, 1, INT64_C(1) << 20);
    float *data = testing_alloc((size_t)widths[0] * sizeof *data, 0);
    for (int64_t i = 0; i < widths[0]; i++) {
        data[i] = (float)testing_uniform();
    }
    sebp_matrix wide = sebp_matrix_f32(data, 1, widths[0]);
    testing_succeed(
        sebp_norm_forward(small, &wide, NULL, NULL, NULL, NULL, NULL, NULL, &wide, NULL), small);
    testing_free(data);
    for (int i = 1; i < 3; i++) { /* no rows: nothing to do, whatever the width */
        float unused;
        sebp_matrix none = {NULL, 0, widths[i], widths[i], SEBP_F32};
        sebp_matrix statistics = {&unused, 0, 2, 2, SEBP_F32};
        testing_succeed(
            sebp_norm_forward(small, &none, NULL, NULL, NULL, NULL, NULL, NULL, &none, NULL),
            small);
        testing_succeed(sebp_norm_backward(small, &none, &none, &statistics, NULL, NULL, NULL, NULL,
                                           &none, NULL, NULL),
                        small);
    }
    sebp_context_destroy(small);
}
END_TEST

/* Views without elements may have any number of rows, or of columns: nothing is done for each of them. */
START_TEST(views_without_elements)
{
    sebp_context *own = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    const int64_t many = INT64_C(1) << 62;
    sebp_matrix rows = {NULL, many, 0, 0, SEBP_F32}, columns = {NULL, 0, many, many, SEBP_F32};
    sebp_matrix none = {NULL, 0, 0, 0, SEBP_F32};
    testing_succeed(sebp_norm_forward(own, &rows, NULL, NULL, NULL, NULL, NULL, NULL, &rows, NULL),
                    own);
    testing_succeed(sebp_activation_forward(own, SEBP_SILU, &rows, NULL, NULL, NULL, &rows), own);
    testing_succeed(
        sebp_activation_backward(own, SEBP_SILU, &rows, &rows, NULL, NULL, NULL, &rows, NULL), own);
    testing_succeed(sebp_dropout_apply(own, &rows, NULL, NULL, &rows), own);
    testing_succeed(sebp_rotary_forward(own, &columns, NULL, &none, NULL, NULL, &columns), own);
    testing_succeed(sebp_rotary_table(own, NULL, &columns), own);
    sebp_context_destroy(own);
}
END_TEST

/* A probability that is 1 as f32 would drop everything. */
START_TEST(dropout_of_nearly_one)
{
    sebp_context *own = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    float data[4] = {1, 2, 3, 4};
    sebp_matrix x = sebp_matrix_f32(data, 2, 2);
    sebp_dropout_options options = SEBP_DROPOUT_OPTIONS_INIT;
    options.probability = 1 - 1e-12;
    testing_expect(sebp_dropout_apply(own, &x, NULL, &options, &x), SEBP_ERROR_VALUE, own);
    ck_assert(data[0] == 1 && data[3] == 4);
    sebp_context_destroy(own);
}
END_TEST

/* The calls that are made wrong above are good as they stand. */
START_TEST(good_calls)
{
    sebp_status (*const calls[])(void) = {layers_call_norm_forward,
                                          layers_call_norm_backward,
                                          layers_call_activation_forward,
                                          layers_call_activation_backward,
                                          layers_call_dropout_apply,
                                          layers_call_rotary_table,
                                          layers_call_rotary_forward,
                                          layers_call_rotary_backward,
                                          layers_call_cross_entropy,
                                          layers_call_embedding_forward,
                                          layers_call_embedding_backward,
                                          layers_call_gradient_norm,
                                          layers_call_scale};
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        layers_call_reset();
        testing_succeed(calls[i](), layers_call_on.context);
    }
    layers_call_reset();
    call.at[STATISTICS] = call.at[TABLE] = NULL;
    testing_succeed(layers_call_linear_cross_entropy(), layers_call_on.context);
    ck_assert(isfinite(call.loss) && call.loss != 7);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("layer errors");
    TCase *all = tcase_create("layer errors");
    tcase_add_checked_fixture(all, layers_call_setup, layers_call_teardown);
    tcase_add_test(all, norms);
    tcase_add_test(all, elements);
    tcase_add_test(all, rotary);
    tcase_add_test(all, losses);
    tcase_add_test(all, embeddings);
    tcase_add_test(all, clipping);
    tcase_add_test(all, norms_of_wide_rows);
    tcase_add_test(all, views_without_elements);
    tcase_add_test(all, dropout_of_nearly_one);
    tcase_add_test(all, good_calls);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
