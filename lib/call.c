/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file call.c
 * A call, from its arguments to its products.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "call.h"
#include "integers.h"

sebp_call sebp_call_begin(sebp_context *context, const char *function)
{
    return (sebp_call){.context = context,
                       .backend = context->device->backend,
                       .device = context->device->state,
                       .function = function,
                       .options = SEBP_LINEAR_OPTIONS_INIT,
                       .start = context->verbose ? sebp_milliseconds() : 0};
}

sebp_status sebp_call_end(sebp_call *call)
{
    sebp_rows_destroy(call->found);
    sebp_rows_destroy(call->sampled);
    free(call->on_host);
    call->backend->free(call->device, call->on_device);
    return call->status;
}

bool sebp_call_goes_on(const sebp_call *call)
{
    return call->status == SEBP_SUCCESS;
}

void sebp_call_fail(sebp_call *call, sebp_status status, const char *format, ...)
{
    if (call->status != SEBP_SUCCESS)
        return;
    char text[sizeof call->context->message];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    call->status = sebp_fail(call->context, status, "%s: %s", call->function, text);
}

void sebp_call_keep(sebp_call *call, sebp_status status, const char *what)
{
    if (status == SEBP_SUCCESS)
        return;
    const char *why = status == SEBP_ERROR_BACKEND ? call->backend->why(call->device) : "";
    sebp_call_fail(call, status, "%s: %s", what, why[0] != '\0' ? why : sebp_status_string(status));
}

/* ---- checks ---- */

bool sebp_require(sebp_call *call, const char *name, const void *argument)
{
    if (argument == NULL)
        sebp_call_fail(call, SEBP_ERROR_NULL, "%s is NULL", name);
    return sebp_call_goes_on(call);
}

bool sebp_require_views(sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 0; i < count; i++)
        sebp_require(call, arguments[i].name, arguments[i].view);
    return sebp_call_goes_on(call);
}

void sebp_take_any_options(sebp_call *call, const void *given, size_t first_bytes, void *taken,
                           size_t bytes)
{
    char why[SEBP_WHY_BYTES];
    if (given == NULL || !sebp_call_goes_on(call))
        return;
    sebp_status status = sebp_take_struct(given, first_bytes, taken, bytes, why);
    if (status != SEBP_SUCCESS)
        sebp_call_fail(call, status, "options->%s", why);
}

void sebp_take_options(sebp_call *call, const sebp_linear_options *options)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_linear_options, db_write) };
    _Static_assert(offsetof(sebp_linear_options, residual) >= BYTES_0_1_0,
                   "an older program has not set what lies there");
    sebp_take_any_options(call, options, BYTES_0_1_0, &call->options, sizeof *options);
}

void sebp_check_precision(sebp_call *call)
{
    sebp_precision precision = call->options.precision;
    if (precision < SEBP_PRECISION_DEFAULT || precision > SEBP_PRECISION_MEDIUM)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->precision is %d", (int)precision);
}

void sebp_check_unused(sebp_call *call, const char *name, const void *option)
{
    if (option != NULL)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->%s is not for this function", name);
}

void sebp_check_no_epilogue(sebp_call *call)
{
    sebp_check_unused(call, "residual", call->options.residual);
    sebp_check_unused(call, "activated", call->options.activated);
    sebp_check_unused(call, "before", call->options.before);
}

static void check_view(sebp_call *call, const char *name, const sebp_matrix *view)
{
    sebp_status status = sebp_matrix_check(view);
    switch (status) {
    case SEBP_SUCCESS:
        if (view->rows > 0 && view->cols > 0 && !call->backend->owns(call->device, view->data)) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "the data of %s is not in the memory of the context's device, %s", name,
                           call->backend->name);
        }
        break;
    case SEBP_ERROR_NULL:
        sebp_call_fail(call, status, "%s is %" PRId64 "x%" PRId64 " but its data is NULL", name,
                       view->rows, view->cols);
        break;
    case SEBP_ERROR_DTYPE:
        sebp_call_fail(call, status, "%s has the unknown dtype %d", name, (int)view->dtype);
        break;
    case SEBP_ERROR_STRIDE:
        sebp_call_fail(call, status, "%s has %" PRId64 " columns but a stride of %" PRId64, name,
                       view->cols, view->stride);
        break;
    case SEBP_ERROR_OVERFLOW:
        sebp_call_fail(call, status,
                       "%s has %" PRId64 " rows a stride of %" PRId64 " apart: too large", name,
                       view->rows, view->stride);
        break;
    case SEBP_ERROR_VALUE:
        sebp_call_fail(call, status, "the data of %s is not aligned to its element", name);
        break;
    default:
        sebp_call_fail(call, status, "%s is %" PRId64 "x%" PRId64, name, view->rows, view->cols);
    }
}

void sebp_check_views(sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 0; i < count && sebp_call_goes_on(call); i++) {
        if (arguments[i].view != NULL)
            check_view(call, arguments[i].name, arguments[i].view);
    }
}

void sebp_check_same_dtype(sebp_call *call, const sebp_argument *one, const sebp_argument *other)
{
    if (one->view != NULL && other->view != NULL && one->view->dtype != other->view->dtype) {
        sebp_call_fail(call, SEBP_ERROR_DTYPE, "%s is %s but %s is %s", one->name,
                       sebp_dtype_name(one->view->dtype), other->name,
                       sebp_dtype_name(other->view->dtype));
    }
}

void sebp_check_f32(sebp_call *call, const sebp_argument *argument)
{
    if (argument->view != NULL && argument->view->dtype != SEBP_F32) {
        sebp_call_fail(call, SEBP_ERROR_DTYPE, "%s is %s, not f32", argument->name,
                       sebp_dtype_name(argument->view->dtype));
    }
}

void sebp_check_write(sebp_call *call, const char *name, sebp_write write)
{
    if (write != SEBP_OVERWRITE && write != SEBP_ACCUMULATE)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->%s is %d", name, (int)write);
}

void sebp_check_inactive(sebp_call *call)
{
    sebp_inactive inactive = call->options.inactive;
    if (inactive != SEBP_INACTIVE_ZERO && inactive != SEBP_INACTIVE_LEAVE)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->inactive is %d", (int)inactive);
}

void sebp_check_weighted_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total)
{
    if (rows == NULL && call->options.x_is_compact)
        sebp_call_fail(call, SEBP_ERROR_ROWS, "x_is_compact needs a row set");
    if (rows != NULL && rows->total != total) {
        sebp_call_fail(call, SEBP_ERROR_ROWS,
                       "the row set is for %" PRId64 " rows but %s has %" PRId64, rows->total, of,
                       total);
    }
}

void sebp_check_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total)
{
    sebp_check_weighted_rows(call, rows, of, total);
    if (rows != NULL && rows->weights != NULL) {
        sebp_call_fail(call, SEBP_ERROR_ROWS,
                       "the row set has weights, which are for dW and db alone: see "
                       "sebp_rows_weights()");
    }
}

void sebp_check_shape(sebp_call *call, const sebp_argument *argument, int64_t rows, int64_t cols)
{
    const sebp_matrix *view = argument->view;
    if (view != NULL && (view->rows != rows || view->cols != cols)) {
        sebp_call_fail(call, SEBP_ERROR_SHAPE,
                       "%s is %" PRId64 "x%" PRId64 " but should be %" PRId64 "x%" PRId64,
                       argument->name, view->rows, view->cols, rows, cols);
    }
}

void sebp_check_aliases(sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 0; i < count && sebp_call_goes_on(call); i++) {
        for (int j = 0; j < count; j++) {
            const sebp_argument *output = &arguments[i], *other = &arguments[j];
            if (i == j || !output->is_output || output->view == NULL || other->view == NULL)
                continue;
            if (sebp_views_overlap(output->view, other->view))
                sebp_call_fail(call, SEBP_ERROR_ALIAS, "%s overlaps %s", output->name, other->name);
        }
    }
}

static void *row_of(const sebp_matrix *view, int64_t row)
{
    if (row == 0 || view->data == NULL)
        return view->data;
    return (char *)view->data + row * view->stride * (int64_t)sebp_dtype_bytes(view->dtype);
}

enum { SCANNED_ROWS = 2048 }; /* at a time */

/* The first row of a chunk of at most SCANNED_ROWS that holds a NaN or an Inf; its number of rows: none. */
static int64_t find_nonfinite(sebp_call *call, const sebp_matrix *chunk)
{
    double above[SCANNED_ROWS];
    if (!sebp_call_goes_on(call))
        return chunk->rows;
    sebp_status status =
        call->backend->scan_rows(call->device, chunk, SEBP_MEASURE_ABOVE, INFINITY, above);
    sebp_call_keep(call, status, "looking for NaN and Inf");
    int64_t row = 0;
    while (row < chunk->rows && (!sebp_call_goes_on(call) || above[row] == 0))
        row++;
    return row;
}

/* The rows of a matrix without gaps, `count` of them seen as one: as many as that makes whole. */
static sebp_matrix join_rows(const sebp_matrix *view, int64_t count)
{
    sebp_matrix joined = *view;
    joined.rows = view->rows / count;
    joined.cols = joined.stride = view->cols * count;
    return joined;
}

void sebp_check_finite(sebp_call *call, const char *name, const sebp_matrix *view)
{
    int64_t total = view->cols > 0 ? view->rows : 0, first = 0;
    /* A device may have to be waited for after each scan. So where rows can be joined one scan has nearly
     * all, and the loop below begins at what it has found, or at the rows that are left. */
    if (view->stride == view->cols && total > SCANNED_ROWS) {
        int64_t count = sebp_div_ceil(total, SCANNED_ROWS);
        sebp_matrix joined = join_rows(view, count);
        first = find_nonfinite(call, &joined) * count;
    }
    sebp_matrix chunk = *view;
    for (; first < total && sebp_call_goes_on(call); first += SCANNED_ROWS) {
        chunk.data = row_of(view, first);
        chunk.rows = sebp_min(SCANNED_ROWS, total - first);
        int64_t found = find_nonfinite(call, &chunk);
        if (found < chunk.rows) {
            sebp_call_fail(call, SEBP_ERROR_NONFINITE,
                           "row %" PRId64 " of %s holds a NaN or an Inf", first + found, name);
        }
    }
}

void sebp_check_host_memory(sebp_call *call)
{
    if (!call->backend->uses_host_memory) {
        sebp_call_fail(
            call, SEBP_ERROR_UNSUPPORTED,
            "needs its arguments in host memory, but the context's device, %s, has its own",
            call->backend->name);
    }
}

/* ---- lists ---- */

const int64_t *sebp_list_to_host(sebp_call *call, const char *name, const int64_t *list,
                                 int64_t count)
{
    if (!sebp_call_goes_on(call))
        return NULL;
    if (count > 0 && !call->backend->owns(call->device, list)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "%s are not in the memory of the device, %s", name,
                       call->backend->name);
        return NULL;
    }
    if (call->backend->uses_host_memory || count == 0)
        return list;
    free(call->on_host);
    call->on_host = count <= SEBP_MAX_IN_ARRAY ? malloc((size_t)count * sizeof *list) : NULL;
    if (call->on_host == NULL) {
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no memory to read %" PRId64 " %s", count, name);
        return NULL;
    }
    sebp_status status =
        call->backend->download(call->device, call->on_host, list, count * (int64_t)sizeof *list);
    sebp_call_keep(call, status, name);
    return sebp_call_goes_on(call) ? call->on_host : NULL;
}

const int64_t *sebp_list_to_device(sebp_call *call, const char *name, const int64_t *list,
                                   int64_t count)
{
    const int64_t bytes = count * (int64_t)sizeof *list;
    if (!sebp_call_goes_on(call))
        return NULL;
    if (call->backend->uses_host_memory)
        return list;
    sebp_status status = call->backend->alloc(call->device, bytes, &call->on_device);
    if (status == SEBP_SUCCESS)
        status = call->backend->upload(call->device, call->on_device, list, bytes);
    sebp_call_keep(call, status, name);
    return sebp_call_goes_on(call) ? call->on_device : NULL;
}

/* ---- active rows ---- */

void sebp_use_rows(sebp_call *call, const sebp_rows *rows, int64_t total)
{
    call->rows = rows;
    call->weights = NULL;
    call->m = rows != NULL ? rows->count : total;
    if (rows == NULL || !sebp_call_goes_on(call))
        return;
    const void *list = NULL;
    sebp_status status = sebp_copies_get(rows->copies, call->context->device, rows->indices,
                                         rows->count * (int64_t)sizeof *rows->indices, &list);
    call->list = list;
    if (status == SEBP_SUCCESS && rows->weights != NULL) {
        status = sebp_copies_get(rows->weight_copies, call->context->device, rows->weights,
                                 rows->count * (int64_t)sizeof *rows->weights, &list);
        call->weights = list;
    }
    sebp_call_keep(call, status, "copying the row set to the device");
}

void sebp_pick_rows(const sebp_call *call, const sebp_matrix *view, void **data,
                    const int64_t **list)
{
    const sebp_rows *rows = call->rows;
    *data = view->data;
    *list = NULL;
    if (rows == NULL || rows->count == 0)
        return;
    if (rows->is_run)
        *data = row_of(view, rows->indices[0]);
    else
        *list = call->list;
}

void sebp_zero_inactive(sebp_call *call, const sebp_matrix *view)
{
    const sebp_rows *rows = call->rows;
    if (rows == NULL || rows->count == rows->total ||
        call->options.inactive != SEBP_INACTIVE_ZERO || !sebp_call_goes_on(call))
        return;
    sebp_status status =
        call->backend->zero_other_rows(call->device, view, call->list, rows->count);
    sebp_call_keep(call, status, "zeroing inactive rows");
}

/* ---- products ---- */

sebp_operand sebp_whole_operand(const sebp_matrix *view, bool transposed)
{
    return (sebp_operand){view->data, view->stride, NULL, transposed, view->dtype};
}

sebp_operand sebp_active_operand(const sebp_call *call, const sebp_matrix *view, bool transposed)
{
    void *data;
    sebp_operand operand = {NULL, view->stride, NULL, transposed, view->dtype};
    sebp_pick_rows(call, view, &data, &operand.rows);
    operand.data = data;
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
    sebp_pick_rows(call, view, &product->c, &product->c_rows);
    product->c_stride = view->stride;
    product->c_dtype = view->dtype;
    product->other_rows_are_free =
        !product->accumulate && call->options.inactive == SEBP_INACTIVE_ZERO;
}

void sebp_plan_product(sebp_call *call, sebp_plan *plan)
{
    if (!sebp_call_goes_on(call))
        return;
    plan->product.precision = call->options.precision != SEBP_PRECISION_DEFAULT
                                  ? call->options.precision
                                  : call->context->precision;
    sebp_status status = call->backend->plan_product(call->device, plan);
    if (status == SEBP_ERROR_MEMORY) {
        sebp_call_fail(call, status,
                       "no scratch memory for a product of %" PRId64 "x%" PRId64 "x%" PRId64,
                       plan->product.m, plan->product.n, plan->product.k);
    } else if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "%s", plan->path);
    }
}

void sebp_run_product(sebp_call *call, sebp_plan *plan)
{
    if (!sebp_call_goes_on(call))
        return;
    sebp_status status = call->backend->run_product(call->device, plan);
    if (status != SEBP_SUCCESS)
        sebp_call_fail(call, status, "%s", plan->path);
}

void sebp_reserve_scratch(sebp_call *call, int64_t bytes, const char *what)
{
    if (bytes > 0 && !sebp_call_goes_on(call))
        return;
    sebp_status status = call->backend->reserve_scratch(call->device, bytes);
    if (status == SEBP_ERROR_MEMORY)
        sebp_call_fail(call, status, "no scratch memory for %s", what);
    sebp_call_keep(call, status, what);
}

void sebp_report(const sebp_call *call, int64_t rows, int64_t in_features, int64_t out_features,
                 sebp_dtype dtype, const char *const *paths)
{
    if (!call->context->verbose || !sebp_call_goes_on(call))
        return;
    char joined[160] = "none";
    for (size_t used = 0; *paths != NULL && used < sizeof joined; paths++)
        used +=
            (size_t)snprintf(joined + used, sizeof joined - used, "%s%s", used ? "+" : "", *paths);
    const char *why = call->rows == NULL   ? "all rows"
                      : call->m == 0       ? "no rows"
                      : call->rows->is_run ? "one run"
                                           : "scattered rows";
    fprintf(stderr, "sebp,%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%s,%s%s,%.3f\n",
            call->function, rows, in_features, out_features, call->m, sebp_dtype_name(dtype),
            joined, why, call->found != NULL || call->sampled != NULL ? " found" : "",
            sebp_milliseconds() - call->start);
}
