/* SPDX-License-Identifier: Apache-2.0 */
/** @file layers.c What the row-wise layers share. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "layers.h"

static bool is_same_view(const sebp_matrix *one, const sebp_matrix *other)
{
    return one->data == other->data && one->rows == other->rows && one->cols == other->cols &&
           one->stride == other->stride && one->dtype == other->dtype;
}

sebp_status sebp_check_in_place(const sebp_call *call, const sebp_argument *arguments, int count,
                                const unsigned *may_be)
{
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            const sebp_argument *output = &arguments[i], *other = &arguments[j];
            if (i == j || !output->is_output || output->view == NULL || other->view == NULL ||
                !sebp_views_overlap(output->view, other->view)) {
                continue;
            }
            /* Of two outputs only one is the first of the pair that may be the other. */
            bool allowed = (may_be[i] >> j & 1) != 0 || (may_be[j] >> i & 1) != 0;
            if (!allowed || !is_same_view(output->view, other->view)) {
                return sebp_fail(call->context, SEBP_ERROR_ALIAS, "%s: %s overlaps %s",
                                 call->function, output->name, other->name);
            }
        }
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_take_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total,
                           sebp_inactive inactive)
{
    call->options.inactive = inactive;
    call->rows = rows;
    call->m = rows != NULL ? rows->count : total;
    sebp_status status = sebp_check_inactive(call);
    return status == SEBP_SUCCESS ? sebp_check_rows(call, rows, of, total) : status;
}

sebp_row_list sebp_list_of(const sebp_call *call)
{
    return (sebp_row_list){call->rows != NULL ? call->rows->indices : NULL, call->m};
}

sebp_status sebp_check_option(const sebp_call *call, const char *name, double value, double low,
                              double high)
{
    if (value >= low && value < high && isfinite((float)value)) {
        return SEBP_SUCCESS;
    }
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->%s is %g, not in [%g, %g)",
                     call->function, name, value, low, high);
}

sebp_status sebp_check_done(const sebp_call *call, sebp_status status)
{
    if (status == SEBP_SUCCESS) {
        return SEBP_SUCCESS;
    }
    return sebp_fail(call->context, status, "%s: %s", call->function, sebp_status_string(status));
}

void sebp_report_rows(const sebp_call *call, const sebp_matrix *matrix)
{
    const char *none = NULL;
    sebp_report(call, matrix->rows, matrix->cols, matrix->cols, matrix->dtype, &none);
}

sebp_status sebp_check_indices(const sebp_call *call, const char *name, const int64_t *indices,
                               int64_t end)
{
    for (int64_t i = 0; i < call->m; i++) {
        int64_t row = call->rows != NULL ? call->rows->indices[i] : i;
        if (indices[row] < 0 || indices[row] >= end) {
            return sebp_fail(call->context, SEBP_ERROR_VALUE,
                             "%s: %s[%" PRId64 "] is %" PRId64 ", not in [0, %" PRId64 ")",
                             call->function, name, row, indices[row], end);
        }
    }
    return SEBP_SUCCESS;
}
