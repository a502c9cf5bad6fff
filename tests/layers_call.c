/* SPDX-License-Identifier: Apache-2.0 */
#include "layers_call.h"

#include <stdio.h>
#include <string.h>

layers_call_world layers_call_on;

layers_call call;

void layers_call_setup(void)
{
    const int64_t indices[] = {0, 2, 3, 5};
    layers_call_on.context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    ck_assert_int_eq(sebp_rows_from_indices(indices, 4, ROWS, &layers_call_on.some_rows),
                     SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_from_indices(indices, 4, ROWS + 1, &layers_call_on.other_rows),
                     SEBP_SUCCESS);
    for (int i = 0; i < VIEWS; i++) {
        int64_t rows = i >= VECTOR && i <= VECTOR4 ? 1 : ROWS;
        int64_t cols = i == STATISTICS ? 2 : i == TABLE ? 4 : COLS;
        layers_call_on.made[i] = testing_matrix(rows, cols, STRIDE, SEBP_F32);
        testing_fill(&layers_call_on.made[i], TESTING_REAL);
        layers_call_on.before[i] = testing_copy(&layers_call_on.made[i]);
    }
}

void layers_call_teardown(void)
{
    sebp_context_destroy(layers_call_on.context);
    sebp_rows_destroy(layers_call_on.some_rows);
    sebp_rows_destroy(layers_call_on.other_rows);
    for (int i = 0; i < VIEWS; i++) {
        testing_release(&layers_call_on.made[i]);
        testing_release(&layers_call_on.before[i]);
    }
}

void layers_call_reset(void)
{
    memset(&call, 0, sizeof call);
    call.context = layers_call_on.context;
    call.rows = layers_call_on.some_rows;
    call.norm = (sebp_norm_options)SEBP_NORM_OPTIONS_INIT;
    call.activation = (sebp_activation_options)SEBP_ACTIVATION_OPTIONS_INIT;
    call.dropout = (sebp_dropout_options)SEBP_DROPOUT_OPTIONS_INIT;
    call.rotary = (sebp_rotary_options)SEBP_ROTARY_OPTIONS_INIT;
    call.entropy = (sebp_cross_entropy_options)SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    call.embedding = (sebp_embedding_options)SEBP_EMBEDDING_OPTIONS_INIT;
    call.list = call.numbers;
    for (int i = 0; i < VIEWS; i++) {
        call.views[i] = layers_call_on.made[i];
        call.at[i] = &call.views[i];
    }
    for (int t = 0; t < 2; t++) {
        call.tables[t] = (sebp_embedding){layers_call_on.made[t == 0 ? A : B], call.numbers};
    }
    call.given_tables = call.tables;
    call.count = 2;
    call.loss = 7;
    call.to_loss = &call.loss;
    call.factor = 2;
}

sebp_status layers_call_norm_forward(void)
{
    return sebp_norm_forward(call.context, call.at[A], call.at[B], call.at[VECTOR],
                             call.at[VECTOR2], call.rows, &call.norm, call.at[C], call.at[D],
                             call.at[STATISTICS]);
}

sebp_status layers_call_norm_backward(void)
{
    return sebp_norm_backward(call.context, call.at[A], call.at[B], call.at[STATISTICS],
                              call.at[VECTOR], call.rows, &call.norm, call.at[C], call.at[D],
                              call.at[VECTOR2], call.at[VECTOR3]);
}

sebp_status layers_call_activation_forward(void)
{
    return sebp_activation_forward(call.context, call.kind, call.at[A], call.at[B], call.rows,
                                   &call.activation, call.at[C]);
}

sebp_status layers_call_activation_backward(void)
{
    return sebp_activation_backward(call.context, call.kind, call.at[A], call.at[B], call.at[E],
                                    call.rows, &call.activation, call.at[C], call.at[D]);
}

sebp_status layers_call_dropout_apply(void)
{
    return sebp_dropout_apply(call.context, call.at[A], call.rows, &call.dropout, call.at[C]);
}

sebp_status layers_call_rotary_table(void)
{
    return sebp_rotary_table(call.context, &call.rotary, call.at[TABLE]);
}

sebp_status layers_call_rotary_forward(void)
{
    return sebp_rotary_forward(call.context, call.at[A], call.list, call.at[TABLE], call.rows,
                               &call.rotary, call.at[C]);
}

sebp_status layers_call_rotary_backward(void)
{
    return sebp_rotary_backward(call.context, call.at[A], call.list, call.at[TABLE], call.rows,
                                &call.rotary, call.at[C]);
}

sebp_status layers_call_cross_entropy(void)
{
    return sebp_cross_entropy(call.context, call.at[A], call.list, &call.entropy, call.to_loss,
                              call.at[C]);
}

sebp_status layers_call_linear_cross_entropy(void)
{
    return sebp_linear_cross_entropy(call.context, call.at[A], call.at[B], call.at[STATISTICS],
                                     call.list, &call.entropy, call.to_loss, call.at[C], call.at[D],
                                     call.at[TABLE]);
}

sebp_status layers_call_embedding_forward(void)
{
    return sebp_embedding_forward(call.context, call.given_tables, (int)call.count, call.rows,
                                  &call.embedding, call.at[C]);
}

sebp_status layers_call_embedding_backward(void)
{
    return sebp_embedding_backward(call.context, call.at[A], call.list, call.rows, &call.embedding,
                                   call.at[C]);
}

sebp_status layers_call_gradient_norm(void)
{
    return sebp_gradient_norm(call.context, call.at[A], call.count - 1, call.to_loss);
}

sebp_status layers_call_scale(void)
{
    return sebp_scale(call.context, call.at[A], call.count - 1, call.factor);
}

void layers_call_failed(sebp_status got, sebp_status want, const char *function, const char *word,
                        const char *change)
{
    char start[64];
    snprintf(start, sizeof start, "sebp_%s: ", function);
    const char *message = sebp_context_message(layers_call_on.context);
    ck_assert_msg(got == want, "%s after %s: \"%s\", not \"%s\" (%s)", function, change,
                  sebp_status_string(got), sebp_status_string(want), message);
    ck_assert_msg(word == NULL || (strncmp(message, start, strlen(start)) == 0 &&
                                   strstr(message, word) != NULL),
                  "%s after %s: message \"%s\"", function, change, message);
    for (int i = 0; i < VIEWS; i++) {
        ck_assert_msg(testing_same_bits(&layers_call_on.made[i], &layers_call_on.before[i]),
                      "%s after %s: matrix %d written", function, change, i);
        testing_check_matrix(&layers_call_on.made[i]);
    }
    ck_assert_msg(call.loss == 7, "%s after %s: loss written", function, change);
}
