/* SPDX-License-Identifier: Apache-2.0 */
/** @file embedding.c Embeddings: rows of tables, and the sum of gradients by row. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "integers.h"
#include "layers.h"

static sebp_status take_options(const sebp_call *call, const sebp_embedding_options *given,
                                sebp_embedding_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_embedding_options, write) };
    *taken = (sebp_embedding_options)SEBP_EMBEDDING_OPTIONS_INIT;
    return sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

static sebp_status check_tables(const sebp_call *call, const sebp_embedding *tables, int count,
                                const sebp_argument *arguments, const sebp_matrix *y)
{
    sebp_status status;
    for (int t = 0; t < count; t++) {
        if ((status = sebp_check_shape(call, &arguments[1 + t], tables[t].table.rows, y->cols))) {
            return status;
        }
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_embedding_forward(sebp_context *context, const sebp_embedding *tables, int count,
                                   const sebp_rows *rows, const sebp_embedding_options *given,
                                   const sebp_matrix *y)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    sebp_call call = sebp_call_begin(context, "sebp_embedding_forward");
    sebp_embedding_options options;
    sebp_argument arguments[1 + SEBP_MAX_TABLES] = {{"y", y, true}};
    sebp_gather_work work = {.to = y, .tables = count};
    char names[SEBP_MAX_TABLES][16];
    sebp_status status;

    if (tables == NULL || y == NULL) {
        return sebp_missing(&call, tables == NULL ? "tables" : "y");
    }
    if (count < 1 || count > SEBP_MAX_TABLES) {
        return sebp_fail(context, SEBP_ERROR_SIZE, "%s: count is %d, not in [1, %d]", call.function,
                         count, (int)SEBP_MAX_TABLES);
    }
    for (int t = 0; t < count; t++) {
        snprintf(names[t], sizeof names[t], "tables[%d]", t);
        arguments[1 + t] = (sebp_argument){names[t], &tables[t].table, false};
        work.from[t] = &tables[t].table;
        work.indices[t] = tables[t].indices;
        if (tables[t].indices == NULL && y->rows > 0) {
            return sebp_missing(&call, "indices");
        }
    }
    if ((status = take_options(&call, given, &options)) ||
        (status = sebp_check_views(&call, arguments, 1 + count))) {
        return status;
    }
    for (int t = 0; t < count; t++) {
        if ((status = sebp_check_same_dtype(&call, &arguments[1 + t], &arguments[0]))) {
            return status;
        }
    }
    if ((status = sebp_take_rows(&call, rows, "y", y->rows, options.inactive)) ||
        (status = check_tables(&call, tables, count, arguments, y)) ||
        (status = sebp_check_aliases(&call, arguments, 1 + count))) {
        return status;
    }
    for (int t = 0; t < count; t++) {
        if ((status =
                 sebp_check_indices(&call, "indices", tables[t].indices, tables[t].table.rows))) {
            return status;
        }
    }
    work.list = sebp_list_of(&call);
    status = sebp_check_done(&call, context->backend->gather(context->device, &work));
    if (status != SEBP_SUCCESS) {
        return status;
    }
    sebp_zero_inactive(&call, y);
    sebp_report_rows(&call, y);
    return SEBP_SUCCESS;
}

/* A token and the row of the table that it goes to. */
typedef struct token {
    int64_t target, row;
} token;

/* Sorts by target, tokens of one target as they come: a digit at a time, the lowest first. */
static token *sort_tokens(token *tokens, token *other, int64_t count, int64_t end)
{
    enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS };
    for (int shift = 0; shift < 63 && (end - 1) >> shift > 0; shift += DIGIT_BITS) {
        int64_t start[DIGITS + 1] = {0};
        for (int64_t i = 0; i < count; i++) {
            start[(tokens[i].target >> shift & (DIGITS - 1)) + 1]++;
        }
        for (int d = 0; d < DIGITS; d++) {
            start[d + 1] += start[d];
        }
        for (int64_t i = 0; i < count; i++) {
            other[start[tokens[i].target >> shift & (DIGITS - 1)]++] = tokens[i];
        }
        token *sorted = other;
        other = tokens;
        tokens = sorted;
    }
    return tokens;
}

/* The active tokens grouped by target: rows, where each group starts, its target, and the number of
 * groups. All of it in one block of memory; NULL: there is none. */
typedef struct grouping {
    int64_t *rows, *start, *target, groups;
    void *memory;
} grouping;

static bool group_tokens(const sebp_call *call, const int64_t *indices, int64_t padding_index,
                         int64_t end, grouping *grouped)
{
    const int64_t m = call->m;
    const size_t token_bytes = 2 * sizeof(token), list_bytes = 3 * sizeof(int64_t);
    if (m > SEBP_MAX_IN_ARRAY / 8) {
        return false;
    }
    char *memory = malloc((size_t)(m + 1) * (token_bytes + list_bytes));
    if (memory == NULL) {
        return false;
    }
    token *tokens = (token *)(void *)memory;
    grouped->memory = memory;
    grouped->rows = (int64_t *)(void *)(memory + (size_t)(m + 1) * token_bytes);
    grouped->start = grouped->rows + m + 1;
    grouped->target = grouped->start + m + 1;
    grouped->groups = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < m; i++) {
        int64_t row = call->rows != NULL ? call->rows->indices[i] : i;
        if (padding_index < 0 || indices[row] != padding_index) {
            tokens[count++] = (token){indices[row], row};
        }
    }
    tokens = sort_tokens(tokens, tokens + m + 1, count, end);
    for (int64_t i = 0; i < count; i++) {
        grouped->rows[i] = tokens[i].row;
        if (i == 0 || tokens[i].target != tokens[i - 1].target) {
            grouped->start[grouped->groups] = i;
            grouped->target[grouped->groups++] = tokens[i].target;
        }
    }
    grouped->start[grouped->groups] = count;
    return true;
}

sebp_status sebp_embedding_backward(sebp_context *context, const sebp_matrix *dy,
                                    const int64_t *indices, const sebp_rows *rows,
                                    const sebp_embedding_options *given, const sebp_matrix *dtable)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { DY, DTABLE, COUNT };
    const sebp_argument arguments[COUNT] = {{"dy", dy, false}, {"dtable", dtable, true}};
    sebp_call call = sebp_call_begin(context, "sebp_embedding_backward");
    const sebp_backend *backend = context->backend;
    sebp_embedding_options options;
    grouping grouped;
    sebp_status status;

    if (dy == NULL || dtable == NULL || (indices == NULL && dy->rows > 0)) {
        return sebp_missing(&call, dy == NULL ? "dy" : dtable == NULL ? "dtable" : "indices");
    }
    if ((status = take_options(&call, given, &options)) ||
        (status = sebp_check_views(&call, arguments, COUNT)) ||
        (status = sebp_check_write(&call, "write", options.write)) ||
        (status = sebp_take_rows(&call, rows, "dy", dy->rows, options.inactive)) ||
        (status = sebp_check_shape(&call, &arguments[DTABLE], dtable->rows, dy->cols)) ||
        (status = sebp_check_aliases(&call, arguments, COUNT)) ||
        (status = sebp_check_indices(&call, "indices", indices, dtable->rows))) {
        return status;
    }
    if (!group_tokens(&call, indices, options.padding_index, dtable->rows, &grouped)) {
        return sebp_fail(context, SEBP_ERROR_MEMORY, "%s: no memory to sort %" PRId64 " tokens",
                         call.function, call.m);
    }
    const sebp_group_sums sums = {.from = dy,
                                  .to = dtable,
                                  .rows = grouped.rows,
                                  .start = grouped.start,
                                  .target = grouped.target,
                                  .groups = dtable->cols > 0 ? grouped.groups : 0,
                                  .accumulate = options.write == SEBP_ACCUMULATE};
    status = sebp_check_done(&call, backend->sum_groups(context->device, &sums));
    if (status == SEBP_SUCCESS) {
        if (options.write == SEBP_OVERWRITE) {
            backend->zero_other_rows(context->device, dtable, grouped.target, grouped.groups);
        }
        sebp_report_rows(&call, dy);
    }
    free(grouped.memory);
    return status;
}
