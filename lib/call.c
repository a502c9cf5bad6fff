/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file call.c
 * A call on a layer's rows, from its arguments to its products.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "call.h"

sebp_call sebp_call_begin(sebp_context *context, const char *function)
{
    return (sebp_call){.context = context,
                       .function = function,
                       .options = SEBP_LINEAR_OPTIONS_INIT,
                       .start = context->verbose ? sebp_milliseconds() : 0};
}

sebp_status sebp_missing(const sebp_call *call, const char *name)
{
    return sebp_fail(call->context, SEBP_ERROR_NULL, "%s: %s is NULL", call->function, name);
}

sebp_status sebp_take_any_options(const sebp_call *call, const void *given, size_t first_bytes,
                                  void *taken, size_t bytes)
{
    char why[SEBP_WHY_BYTES];
    sebp_status status =
        given ? sebp_take_struct(given, first_bytes, taken, bytes, why) : SEBP_SUCCESS;
    if (status != SEBP_SUCCESS)
        sebp_fail(call->context, status, "%s: options->%s", call->function, why);
    return status;
}

sebp_status sebp_take_options(sebp_call *call, const sebp_linear_options *options)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_linear_options, db_write) };
    return sebp_take_any_options(call, options, BYTES_0_1_0, &call->options, sizeof *options);
}

sebp_status sebp_check_views(const sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 0; i < count; i++) {
        if (!arguments[i].view)
            continue;
        sebp_status status =
            sebp_check_view(call->context, call->function, arguments[i].name, arguments[i].view);
        if (status != SEBP_SUCCESS)
            return status;
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_check_same_dtype(const sebp_call *call, const sebp_argument *one,
                                  const sebp_argument *other)
{
    if (!one->view || !other->view || one->view->dtype == other->view->dtype)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_DTYPE, "%s: %s is %s but %s is %s", call->function,
                     one->name, sebp_dtype_name(one->view->dtype), other->name,
                     sebp_dtype_name(other->view->dtype));
}

sebp_status sebp_check_write(const sebp_call *call, const char *name, sebp_write write)
{
    if (write == SEBP_OVERWRITE || write == SEBP_ACCUMULATE)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->%s is %d", call->function, name,
                     (int)write);
}

sebp_status sebp_check_inactive(const sebp_call *call)
{
    if (call->options.inactive == SEBP_INACTIVE_ZERO ||
        call->options.inactive == SEBP_INACTIVE_LEAVE)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->inactive is %d", call->function,
                     (int)call->options.inactive);
}

sebp_status sebp_check_rows(const sebp_call *call, const sebp_rows *rows, const char *of,
                            int64_t total)
{
    if (!rows && call->options.x_is_compact)
        return sebp_fail(call->context, SEBP_ERROR_ROWS, "%s: x_is_compact needs a row set",
                         call->function);
    if (rows && rows->total != total)
        return sebp_fail(call->context, SEBP_ERROR_ROWS,
                         "%s: the row set is for %" PRId64 " rows but %s has %" PRId64,
                         call->function, rows->total, of, total);
    return SEBP_SUCCESS;
}

sebp_status sebp_check_shape(const sebp_call *call, const sebp_argument *argument, int64_t rows,
                             int64_t cols)
{
    const sebp_matrix *view = argument->view;
    if (!view || (view->rows == rows && view->cols == cols))
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_SHAPE,
                     "%s: %s is %" PRId64 "x%" PRId64 " but should be %" PRId64 "x%" PRId64,
                     call->function, argument->name, view->rows, view->cols, rows, cols);
}

sebp_status sebp_check_aliases(const sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            const sebp_argument *output = &arguments[i], *other = &arguments[j];
            if (i == j || !output->is_output || !output->view || !other->view)
                continue;
            if (sebp_views_overlap(output->view, other->view))
                return sebp_fail(call->context, SEBP_ERROR_ALIAS, "%s: %s overlaps %s",
                                 call->function, output->name, other->name);
        }
    }
    return SEBP_SUCCESS;
}

static const void *element(const sebp_matrix *view, int64_t row)
{
    if (row == 0 || !view->data)
        return view->data;
    return (const char *)view->data + row * view->stride * (int64_t)sebp_dtype_bytes(view->dtype);
}

sebp_status sebp_check_finite(const sebp_call *call, const char *name, const sebp_matrix *view)
{
    enum { CHUNK_ROWS = 1024 };
    sebp_context *context = call->context;
    double above[CHUNK_ROWS];
    sebp_matrix chunk = *view;
    int64_t total = view->cols > 0 ? view->rows : 0;
    for (int64_t first = 0; first < total; first += CHUNK_ROWS) {
        chunk.data = (void *)(uintptr_t)element(view, first);
        chunk.rows = total - first < CHUNK_ROWS ? total - first : CHUNK_ROWS;
        context->backend->scan_rows(context->device, &chunk, SEBP_MEASURE_ABOVE, INFINITY, above);
        for (int64_t i = 0; i < chunk.rows; i++)
            if (above[i] != 0)
                return sebp_fail(context, SEBP_ERROR_NONFINITE,
                                 "%s: row %" PRId64 " of %s holds a NaN or an Inf", call->function,
                                 first + i, name);
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_settle_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows)
{
    if (!rows) {
        sebp_status status = sebp_rows_find(call->context, dy, &call->options.rule, &call->found);
        if (status != SEBP_SUCCESS)
            return status;
        rows = call->found;
    }
    call->rows = rows;
    call->m = rows->count;
    return SEBP_SUCCESS;
}

void sebp_call_end(sebp_call *call)
{
    sebp_rows_destroy(call->found);
}

void sebp_pick_rows(const sebp_call *call, const sebp_matrix *view, const void **data,
                    const int64_t **list)
{
    const sebp_rows *rows = call->rows;
    *data = view->data;
    *list = NULL;
    if (!rows || rows->count == 0)
        return;
    if (rows->is_run)
        *data = element(view, rows->indices[0]);
    else
        *list = rows->indices;
}

sebp_operand sebp_whole_operand(const sebp_matrix *view, bool transposed)
{
    return (sebp_operand){view->data, view->stride, NULL, transposed};
}

sebp_operand sebp_active_operand(const sebp_call *call, const sebp_matrix *view, bool transposed)
{
    sebp_operand operand = {NULL, view->stride, NULL, transposed};
    sebp_pick_rows(call, view, &operand.data, &operand.rows);
    return operand;
}

sebp_operand sebp_x_operand(const sebp_call *call, const sebp_matrix *x, bool transposed)
{
    return call->options.x_is_compact ? sebp_whole_operand(x, transposed)
                                      : sebp_active_operand(call, x, transposed);
}

void sebp_to_whole(const sebp_matrix *view, sebp_product *product)
{
    product->c = view->data;
    product->c_stride = view->stride;
    product->c_dtype = view->dtype;
}

void sebp_to_active_rows(const sebp_call *call, const sebp_matrix *view, sebp_product *product)
{
    const void *data;
    sebp_pick_rows(call, view, &data, &product->c_rows);
    product->c = (void *)(uintptr_t)data;
    product->c_stride = view->stride;
    product->c_dtype = view->dtype;
    product->other_rows_are_free =
        !product->accumulate && call->options.inactive == SEBP_INACTIVE_ZERO;
}

sebp_status sebp_reserve(const sebp_call *call, const sebp_product *product)
{
    sebp_context *context = call->context;
    sebp_status status = context->backend->reserve_product(context->device, product);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status,
                         "%s: no scratch memory for a product of %" PRId64 "x%" PRId64 "x%" PRId64,
                         call->function, product->m, product->n, product->k);
    return SEBP_SUCCESS;
}

sebp_status sebp_run(const sebp_call *call, const sebp_product *product, const char **path)
{
    sebp_context *context = call->context;
    sebp_status status = context->backend->product(context->device, product, path);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: %s", call->function, *path);
    return SEBP_SUCCESS;
}

void sebp_zero_inactive(const sebp_call *call, const sebp_matrix *view)
{
    const sebp_rows *rows = call->rows;
    if (rows && rows->count < rows->total && call->options.inactive == SEBP_INACTIVE_ZERO)
        call->context->backend->zero_other_rows(call->context->device, view, rows->indices,
                                                rows->count);
}

void sebp_report(const sebp_call *call, int64_t rows, int64_t in_features, int64_t out_features,
                 sebp_dtype dtype, const char *const *paths)
{
    if (!call->context->verbose)
        return;
    char joined[160] = "none";
    for (size_t used = 0; *paths && used < sizeof joined; paths++)
        used +=
            (size_t)snprintf(joined + used, sizeof joined - used, "%s%s", used ? "+" : "", *paths);
    const char *why = !call->rows          ? "all rows"
                      : call->m == 0       ? "no rows"
                      : call->rows->is_run ? "one run"
                                           : "scattered rows";
    fprintf(stderr, "sebp,%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%s,%s%s,%.3f\n",
            call->function, rows, in_features, out_features, call->m, sebp_dtype_name(dtype),
            joined, why, call->found ? " found" : "", sebp_milliseconds() - call->start);
}
