/* SPDX-License-Identifier: Apache-2.0 */
/** @file rotary.c Rotary positions: the table of angles, and turning by it. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "integers.h"
#include "layer_call.h"

static const double PI = 3.14159265358979323846;

static void take_options(sebp_call *call, const sebp_rotary_options *given,
                         sebp_rotary_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_rotary_options, original_length) };
    *taken = (sebp_rotary_options)SEBP_ROTARY_OPTIONS_INIT;
    sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

static void check_positive(sebp_call *call, const char *name, double value)
{
    if (!(value > 0 && isfinite(value)))
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->%s is %g, not over 0", name, value);
}

static void check_angles(sebp_call *call, const sebp_rotary_options *options)
{
    check_positive(call, "base", options->base);
    check_positive(call, "factor", options->factor);
    if (options->factor == 1)
        return;
    check_positive(call, "low_factor", options->low_factor);
    check_positive(call, "high_factor", options->high_factor);
    check_positive(call, "original_length", options->original_length);
    if (options->low_factor >= options->high_factor) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "options->low_factor is %g, not below high_factor, %g", options->low_factor,
                       options->high_factor);
    }
}

/* Radians from one position to the next. */
static double frequency(const sebp_rotary_options *options, int64_t pair, int64_t dims)
{
    double f = pow(options->base, -2.0 * (double)pair / (double)dims);
    if (options->factor == 1) {
        return f;
    }
    double waves = options->original_length * f / (2 * PI);
    if (waves < options->low_factor) {
        return f / options->factor;
    }
    if (waves > options->high_factor) {
        return f;
    }
    double share = (waves - options->low_factor) / (options->high_factor - options->low_factor);
    return f * (share + (1 - share) / options->factor);
}

/* Of a table in the host's memory. */
static void fill_table(const sebp_rotary_options *options, const sebp_matrix *table)
{
    const int64_t pairs = table->rows > 0 ? table->cols / 2 : 0;
    for (int64_t j = 0; j < pairs; j++) {
        double f = frequency(options, j, table->cols);
        float *at = (float *)table->data + j;
        for (int64_t p = 0; p < table->rows; p++, at += table->stride) {
            at[0] = (float)cos((double)p * f);
            at[pairs] = (float)sin((double)p * f);
        }
    }
}

/* Makes it on the host. A table without gaps goes to the device as a whole. */
static void upload_table(sebp_call *call, const sebp_rotary_options *options,
                         const sebp_matrix *table)
{
    const int64_t size = (int64_t)sizeof(float), bytes = table->rows * table->cols * size;
    const bool has_gaps = table->stride != table->cols;
    const int64_t pieces = bytes == 0 ? 0 : has_gaps ? table->rows : 1;
    char *room = malloc((size_t)sebp_max(bytes, 1));
    if (room == NULL) {
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no memory for %" PRId64 " positions", table->rows);
        return;
    }
    fill_table(options, &(sebp_matrix){room, table->rows, table->cols, table->cols, table->dtype});
    for (int64_t i = 0; i < pieces && sebp_call_goes_on(call); i++) {
        char *to = (char *)table->data + i * table->stride * size;
        sebp_status status =
            call->backend->upload(call->device, to, room + i * (bytes / pieces), bytes / pieces);
        sebp_call_keep(call, status, "the table");
    }
    free(room);
}

sebp_status sebp_rotary_table(sebp_context *context, const sebp_rotary_options *given,
                              const sebp_matrix *table)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    const sebp_argument argument = {"table", table, true};
    sebp_call call = sebp_call_begin(context, "sebp_rotary_table");
    sebp_rotary_options options;
    if (!sebp_require(&call, "table", table))
        return call.status;
    take_options(&call, given, &options);
    sebp_check_views(&call, &argument, 1);
    sebp_check_f32(&call, &argument);
    check_angles(&call, &options);
    if (table->cols % 2 != 0) {
        sebp_call_fail(&call, SEBP_ERROR_SHAPE, "table has %" PRId64 " columns, not even",
                       table->cols);
    }
    if (!sebp_call_goes_on(&call))
        return call.status;
    if (call.backend->uses_host_memory)
        fill_table(&options, table);
    else
        upload_table(&call, &options, table);
    return sebp_call_end(&call);
}

/* That each row has a position in the table: its own number, where none are given. */
static void check_positions(sebp_call *call, const int64_t *positions, int64_t length)
{
    if (positions != NULL) {
        sebp_check_indices(call, "positions", positions, length);
    } else if (call->m > 0 && sebp_call_goes_on(call)) {
        int64_t last = call->rows != NULL ? call->rows->indices[call->m - 1] : call->m - 1;
        if (last >= length) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "row %" PRId64 " has no position in a table of %" PRId64, last, length);
        }
    }
}

static sebp_status turn(sebp_call *call, const sebp_argument arguments[3], const int64_t *positions,
                        const sebp_rows *rows, const sebp_rotary_options *given, bool inverse)
{
    enum { X, TABLE, Y, COUNT };
    const sebp_matrix *x = arguments[X].view, *table = arguments[TABLE].view,
                      *y = arguments[Y].view;
    const unsigned may_be[COUNT] = {[Y] = 1U << X};
    sebp_rotary_options options;
    if (!sebp_require_views(call, arguments, COUNT))
        return call->status;
    take_options(call, given, &options);
    sebp_check_views(call, arguments, COUNT);
    sebp_check_f32(call, &arguments[TABLE]);
    sebp_check_same_dtype(call, &arguments[Y], &arguments[X]);
    const int64_t head_size = options.head_size != 0 ? options.head_size : x->cols;
    if (options.head_size < 0) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->head_size is %" PRId64, options.head_size);
    }
    sebp_take_rows(call, rows, arguments[X].name, x->rows, options.inactive);
    sebp_check_shape(call, &arguments[Y], x->rows, x->cols);
    if ((head_size > 0 && x->cols % head_size != 0) || table->cols > head_size ||
        table->cols % 2 != 0) {
        sebp_call_fail(call, SEBP_ERROR_SHAPE,
                       "%s has %" PRId64 " columns in heads of %" PRId64 ", of which %" PRId64
                       " are turned",
                       arguments[X].name, x->cols, head_size, table->cols);
    }
    sebp_check_in_place(call, arguments, COUNT, may_be);
    check_positions(call, positions, table->rows);
    if (!sebp_call_goes_on(call))
        return sebp_call_end(call);
    const sebp_rotary_work work = {.list = sebp_list_of(call),
                                   .head_size = head_size,
                                   .interleaved = options.interleaved != 0,
                                   .inverse = inverse,
                                   .positions = positions,
                                   .table = table,
                                   .x = x,
                                   .y = y};
    sebp_call_keep(call, call->backend->rotary(call->device, &work), "turning");
    sebp_zero_inactive(call, y);
    sebp_report_rows(call, x);
    return sebp_call_end(call);
}

sebp_status sebp_rotary_forward(sebp_context *context, const sebp_matrix *x,
                                const int64_t *positions, const sebp_matrix *table,
                                const sebp_rows *rows, const sebp_rotary_options *options,
                                const sebp_matrix *y)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    const sebp_argument arguments[] = {{"x", x, false}, {"table", table, false}, {"y", y, true}};
    sebp_call call = sebp_call_begin(context, "sebp_rotary_forward");
    return turn(&call, arguments, positions, rows, options, false);
}

sebp_status sebp_rotary_backward(sebp_context *context, const sebp_matrix *dy,
                                 const int64_t *positions, const sebp_matrix *table,
                                 const sebp_rows *rows, const sebp_rotary_options *options,
                                 const sebp_matrix *dx)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    const sebp_argument arguments[] = {
        {"dy", dy, false}, {"table", table, false}, {"dx", dx, true}};
    sebp_call call = sebp_call_begin(context, "sebp_rotary_backward");
    return turn(&call, arguments, positions, rows, options, true);
}
