/* SPDX-License-Identifier: Apache-2.0 */
/** @file layer_call.c What the row-wise layers share. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "layer_call.h"

static bool is_same_view(const sebp_matrix *one, const sebp_matrix *other)
{
    return one->data == other->data && one->rows == other->rows && one->cols == other->cols &&
           one->stride == other->stride && one->dtype == other->dtype;
}

void sebp_check_in_place(sebp_call *call, const sebp_argument *arguments, int count,
                         const unsigned *may_be)
{
    for (int i = 0; i < count && sebp_call_goes_on(call); i++) {
        for (int j = 0; j < count; j++) {
            const sebp_argument *output = &arguments[i], *other = &arguments[j];
            if (i == j || !output->is_output || output->view == NULL || other->view == NULL ||
                !sebp_views_overlap(output->view, other->view)) {
                continue;
            }
            /* Of two outputs only one is the first of the pair that may be the other. */
            bool allowed = (may_be[i] >> j & 1) != 0 || (may_be[j] >> i & 1) != 0;
            if (!allowed || !is_same_view(output->view, other->view))
                sebp_call_fail(call, SEBP_ERROR_ALIAS, "%s overlaps %s", output->name, other->name);
        }
    }
}

void sebp_take_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total,
                    sebp_inactive inactive)
{
    call->options.inactive = inactive;
    sebp_check_inactive(call);
    sebp_check_rows(call, rows, of, total);
    sebp_use_rows(call, rows, total);
}

sebp_row_list sebp_list_of(const sebp_call *call)
{
    return (sebp_row_list){call->list, call->m};
}

void sebp_check_option(sebp_call *call, const char *name, double value, double low, double high)
{
    /* What is below the end, and not as f32, counts as the end. */
    if (!(value >= low && (float)value < (float)high && isfinite((float)value))) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->%s is %g, not in [%g, %g)", name, value,
                       low, high);
    }
}

void sebp_check_activation(sebp_call *call, sebp_activation activation)
{
    switch (activation) {
    case SEBP_GELU:
    case SEBP_GELU_TANH:
    case SEBP_SILU:
    case SEBP_RELU:
        return;
    }
    sebp_call_fail(call, SEBP_ERROR_VALUE, "the activation %d is unknown", (int)activation);
}

void sebp_report_rows(const sebp_call *call, const sebp_matrix *matrix)
{
    const char *none = NULL;
    sebp_report(call, matrix->rows, matrix->cols, matrix->cols, matrix->dtype, &none);
}

const int64_t *sebp_check_indices(sebp_call *call, const char *name, const int64_t *indices,
                                  int64_t end)
{
    const int64_t m = call->m;
    const int64_t count = call->rows == NULL || m == 0 ? m : call->rows->indices[m - 1] + 1;
    const int64_t *read = sebp_list_to_host(call, name, indices, count);
    for (int64_t i = 0; i < m && sebp_call_goes_on(call); i++) {
        int64_t row = call->rows != NULL ? call->rows->indices[i] : i;
        if (read[row] < 0 || read[row] >= end) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "%s[%" PRId64 "] is %" PRId64 ", not in [0, %" PRId64 ")", name, row,
                           read[row], end);
        }
    }
    return read;
}
