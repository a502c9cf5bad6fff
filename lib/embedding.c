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
#include "layer_call.h"

static void take_options(sebp_call *call, const sebp_embedding_options *given,
                         sebp_embedding_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_embedding_options, write) };
    *taken = (sebp_embedding_options)SEBP_EMBEDDING_OPTIONS_INIT;
    sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

sebp_status sebp_embedding_forward(sebp_context *context, const sebp_embedding *tables, int count,
                                   const sebp_rows *rows, const sebp_embedding_options *given,
                                   const sebp_matrix *y)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_embedding_forward");
    sebp_embedding_options options;
    sebp_argument arguments[1 + SEBP_MAX_TABLES] = {{"y", y, true}};
    sebp_gather_work work = {.to = y, .tables = count};
    char names[SEBP_MAX_TABLES][24];

    if (!sebp_require(&call, "tables", tables) || !sebp_require(&call, "y", y))
        return call.status;
    if (count < 1 || count > SEBP_MAX_TABLES) {
        sebp_call_fail(&call, SEBP_ERROR_SIZE, "count is %d, not in [1, %d]", count,
                       (int)SEBP_MAX_TABLES);
        return call.status;
    }
    for (int t = 0; t < count; t++) {
        snprintf(names[t], sizeof names[t], "tables[%d]", t);
        arguments[1 + t] = (sebp_argument){names[t], &tables[t].table, false};
        work.from[t] = &tables[t].table;
        work.indices[t] = tables[t].indices;
        if (y->rows > 0)
            sebp_require(&call, "indices", tables[t].indices);
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, 1 + count);
    for (int t = 0; t < count; t++)
        sebp_check_same_dtype(&call, &arguments[1 + t], &arguments[0]);
    sebp_take_rows(&call, rows, "y", y->rows, options.inactive);
    for (int t = 0; t < count; t++)
        sebp_check_shape(&call, &arguments[1 + t], tables[t].table.rows, y->cols);
    sebp_check_aliases(&call, arguments, 1 + count);
    for (int t = 0; t < count; t++)
        sebp_check_indices(&call, "indices", tables[t].indices, tables[t].table.rows);
    if (!sebp_call_goes_on(&call))
        return sebp_call_end(&call);
    work.list = sebp_list_of(&call);
    sebp_call_keep(&call, call.backend->gather(call.device, &work), "gathering");
    sebp_zero_inactive(&call, y);
    sebp_report_rows(&call, y);
    return sebp_call_end(&call);
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

/* The active tokens grouped by target: their rows, where each group starts, and its target, three lists
 * with room for m + 1 each, one after the other; and the number of groups. */
typedef struct grouping {
    int64_t *lists, groups;
    void *memory; /* of all */
} grouping;

static bool group_tokens(sebp_call *call, const int64_t *indices, int64_t padding_index,
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
    grouped->lists = (int64_t *)(void *)(memory + (size_t)(m + 1) * token_bytes);
    int64_t *rows = grouped->lists, *start = rows + m + 1, *target = start + m + 1;
    int64_t count = 0, groups = 0;
    for (int64_t i = 0; i < m; i++) {
        int64_t row = call->rows != NULL ? call->rows->indices[i] : i;
        if (padding_index < 0 || indices[row] != padding_index) {
            tokens[count++] = (token){indices[row], row};
        }
    }
    tokens = sort_tokens(tokens, tokens + m + 1, count, end);
    for (int64_t i = 0; i < count; i++) {
        rows[i] = tokens[i].row;
        if (i == 0 || tokens[i].target != tokens[i - 1].target) {
            start[groups] = i;
            target[groups++] = tokens[i].target;
        }
    }
    start[groups] = count;
    grouped->groups = groups;
    return true;
}

/* What the groups add up to, and zeros in the other rows of a table that is overwritten. */
static void sum_tokens(sebp_call *call, const grouping *grouped, const sebp_matrix *dy,
                       sebp_write write, const sebp_matrix *dtable)
{
    const int64_t room = call->m + 1;
    const int64_t *lists = sebp_list_to_device(call, "groups", grouped->lists, 3 * room);
    if (lists == NULL) {
        return;
    }
    const sebp_group_sums sums = {.from = dy,
                                  .to = dtable,
                                  .rows = lists,
                                  .start = lists + room,
                                  .target = lists + 2 * room,
                                  .groups = dtable->cols > 0 ? grouped->groups : 0,
                                  .accumulate = write == SEBP_ACCUMULATE};
    sebp_call_keep(call, call->backend->sum_groups(call->device, &sums), "summing by index");
    if (sebp_call_goes_on(call) && write == SEBP_OVERWRITE) {
        sebp_status status =
            call->backend->zero_other_rows(call->device, dtable, sums.target, grouped->groups);
        sebp_call_keep(call, status, "zeroing other rows");
    }
}

sebp_status sebp_embedding_backward(sebp_context *context, const sebp_matrix *dy,
                                    const int64_t *indices, const sebp_rows *rows,
                                    const sebp_embedding_options *given, const sebp_matrix *dtable)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    enum { DY, DTABLE, COUNT };
    const sebp_argument arguments[COUNT] = {{"dy", dy, false}, {"dtable", dtable, true}};
    sebp_call call = sebp_call_begin(context, "sebp_embedding_backward");
    sebp_embedding_options options;
    grouping grouped;

    if (!sebp_require_views(&call, arguments, COUNT) ||
        (dy->rows > 0 && !sebp_require(&call, "indices", indices))) {
        return call.status;
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_write(&call, "write", options.write);
    sebp_take_rows(&call, rows, "dy", dy->rows, options.inactive);
    sebp_check_shape(&call, &arguments[DTABLE], dtable->rows, dy->cols);
    sebp_check_aliases(&call, arguments, COUNT);
    indices = sebp_check_indices(&call, "indices", indices, dtable->rows);
    if (!sebp_call_goes_on(&call))
        return sebp_call_end(&call);
    if (!group_tokens(&call, indices, options.padding_index, dtable->rows, &grouped)) {
        sebp_call_fail(&call, SEBP_ERROR_MEMORY, "no memory to sort %" PRId64 " tokens", call.m);
        return sebp_call_end(&call);
    }
    sum_tokens(&call, &grouped, dy, options.write, dtable);
    sebp_report_rows(&call, dy);
    free(grouped.memory);
    return sebp_call_end(&call);
}
