/* SPDX-License-Identifier: Apache-2.0 */
#include "linear_call.h"

#include <math.h>
#include <string.h>

linear_call call;

linear_call_world linear_call_on;

void linear_call_setup(void)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.gemm = testing_gemm(SEBP_GEMM_AUTO);
    ck_assert_int_eq(sebp_context_create(&options, &linear_call_on.context), SEBP_SUCCESS);
    const int64_t indices[ACTIVE] = {0, 2, 3, 6, 7};
    ck_assert_int_eq(sebp_rows_from_indices(indices, ACTIVE, SIZE, &linear_call_on.some_rows),
                     SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_from_indices(indices, ACTIVE, SIZE + 1, &linear_call_on.other_rows),
                     SEBP_SUCCESS);
    for (int i = 0; i < 4; i++) {
        linear_call_on.inputs[i] = testing_matrix(i == 3 ? 1 : SIZE, SIZE, STRIDE, SEBP_F32);
        linear_call_on.outputs[i] = testing_matrix(i == 2 ? 1 : SIZE, SIZE, STRIDE, SEBP_F32);
        testing_fill(&linear_call_on.inputs[i], TESTING_REAL);
    }
}

void linear_call_teardown(void)
{
    sebp_context_destroy(linear_call_on.context);
    sebp_rows_destroy(linear_call_on.some_rows);
    sebp_rows_destroy(linear_call_on.other_rows);
    for (int i = 0; i < 4; i++) {
        testing_release(&linear_call_on.inputs[i]);
        testing_release(&linear_call_on.outputs[i]);
    }
}

void linear_call_reset(void)
{
    const sebp_linear_options defaults = SEBP_LINEAR_OPTIONS_INIT;
    call = (linear_call){
        .context = linear_call_on.context, .rows = linear_call_on.some_rows, .options = defaults};
    call.dy_view = linear_call_on.inputs[0];
    call.x_view = linear_call_on.inputs[1];
    call.w_view = linear_call_on.inputs[2];
    call.bias_view = linear_call_on.inputs[3];
    call.dx_view = linear_call_on.outputs[0];
    call.dw_view = linear_call_on.outputs[1];
    call.db_view = linear_call_on.outputs[2];
    call.y_view = linear_call_on.outputs[3];
    call.in_view = linear_call_on.inputs[0];
    call.out_view = linear_call_on.outputs[0];
    call.dy = &call.dy_view;
    call.x = &call.x_view;
    call.w = &call.w_view;
    call.bias = &call.bias_view;
    call.dx = &call.dx_view;
    call.dw = &call.dw_view;
    call.db = &call.db_view;
    call.y = &call.y_view;
    call.given = &call.options;
}

sebp_status linear_call_backward(void)
{
    return sebp_linear_backward(call.context, call.dy, call.x, call.w, call.rows, call.given,
                                call.dx, call.dw, call.db);
}

sebp_status linear_call_forward(void)
{
    return sebp_linear_forward(call.context, call.x, call.w, call.bias, call.rows, call.given,
                               call.y);
}

/* Whether the message is about `function`, and says `word` after it. */
static int message_says(const char *function, const char *word)
{
    const char *message = sebp_context_message(linear_call_on.context);
    size_t length = strlen(function);
    return strncmp(message, function, length) == 0 && message[length] == ':' &&
           strstr(message + length, word) != NULL && strchr(message, '\n') == NULL;
}

void linear_call_failed(sebp_status got, sebp_status want, const char *function, const char *word,
                        const char *change)
{
    ck_assert_msg(got == want, "%s after %s: \"%s\", not \"%s\" (%s)", function, change,
                  sebp_status_string(got), sebp_status_string(want),
                  sebp_context_message(linear_call_on.context));
    ck_assert_msg(word == NULL || message_says(function, word), "%s after %s: message \"%s\"",
                  function, change, sebp_context_message(linear_call_on.context));
    for (int i = 0; i < 4; i++) {
        int written = 0;
        for (int64_t at = 0; at < linear_call_on.outputs[i].rows * SIZE; at++) {
            written |= !isnan(testing_get(&linear_call_on.outputs[i], at / SIZE, at % SIZE));
        }
        ck_assert_msg(!written, "%s after %s: output %d was written to", function, change, i);
        testing_check_matrix(&linear_call_on.outputs[i]);
        testing_check_matrix(&linear_call_on.inputs[i]);
    }
}

const bad_rule bad_rules[BAD_RULES] = {
    {{(sebp_rule_kind)5, {0}, 1, {0}}, "rule"},
    {{(sebp_rule_kind)-1, {0}, 1, {0}}, "rule"},
    {{SEBP_RULE_THRESHOLD, {NAN}, 0, {0}}, "threshold"},
    {{SEBP_RULE_THRESHOLD, {-1e-300}, 0, {0}}, "threshold"},
    {{SEBP_RULE_THRESHOLD, {-INFINITY}, 0, {0}}, "threshold"},
    {{SEBP_RULE_TOP, {0}, 0, {0}}, "count"},
    {{SEBP_RULE_TOP, {0}, -1, {0}}, "count"},
    {{SEBP_RULE_TOP, {0}, INT64_MIN, {0}}, "count"},
    {{SEBP_RULE_ENERGY, {0}, 0, {NAN}}, "delta"},
    {{SEBP_RULE_ENERGY, {0}, 0, {-1e-300}}, "delta"},
    {{SEBP_RULE_ENERGY, {0}, 0, {1}}, "delta"},
    {{SEBP_RULE_ENERGY, {0}, 0, {INFINITY}}, "delta"},
    {{SEBP_RULE_SAMPLED, {0}, -1, {0.5}}, "count"},
    {{SEBP_RULE_SAMPLED, {0}, INT64_MIN, {0.5}}, "count"},
    {{SEBP_RULE_SAMPLED, {0}, 0, {0}}, "share"},
    {{SEBP_RULE_SAMPLED, {0}, 0, {-0.5}}, "share"},
    {{SEBP_RULE_SAMPLED, {0}, 0, {1.0000001}}, "share"},
    {{SEBP_RULE_SAMPLED, {0}, 0, {NAN}}, "share"},
};
