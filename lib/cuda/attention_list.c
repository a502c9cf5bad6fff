/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention_list.c What attention's blocks of threads have to do. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>

#include "../text_list.h"
#include "attention_list.h"
#include "operations.h"

enum { ZEROED_ROWS = 64 };

/* A list that grows; items NULL: it is only counted. */
typedef struct growing {
    sebp_attention_item *items;
    int64_t count;
} growing;

/* Adds items for rows [first, first + count). */
static void add(growing *to, int64_t text, int64_t first, int64_t count, int64_t rows)
{
    const int64_t blocks = sebp_div_ceil(count, rows);
    for (int64_t i = 0; i < blocks && to->items != NULL; i++) {
        /* The last first: a text's last queries see the most keys where attention is causal. */
        const int64_t row = (blocks - 1 - i) * rows;
        to->items[to->count + i] =
            (sebp_attention_item){first + row, (int32_t)text, (int32_t)sebp_min(rows, count - row)};
    }
    to->count += blocks;
}

static int64_t length(const sebp_sequences *sequences, int64_t text)
{
    return sequences->offsets[text + 1] - sequences->offsets[text];
}

static void add_texts(growing *to, const sebp_sequences *sequences, int64_t rows)
{
    for (int64_t text = 0; text < sequences->count; text++)
        add(to, text, 0, length(sequences, text), rows);
}

/* The rows before, between and behind the texts. */
static void add_outside(growing *to, const sebp_sequences *sequences, int64_t which)
{
    int64_t end = 0;
    for (int64_t text = 0; text < sequences->count; text++) {
        add(to, which, end, sequences->firsts[text] - end, ZEROED_ROWS);
        end = sequences->firsts[text] + length(sequences, text);
    }
    add(to, which, end, sequences->total - end, ZEROED_ROWS);
}

static void add_whole(growing *to, const sebp_attention *attention, int64_t key_rows)
{
    const sebp_sequences *of_k = attention->k_sequences;
    for (int64_t text = 0; text < of_k->count; text++) {
        if (length(of_k, text) > 0) {
            add(to, text, 0, length(of_k, text), key_rows);
        } else if (length(attention->q_sequences, text) > 0) {
            /* Its queries have gradients, of zero. */
            if (to->items != NULL)
                to->items[to->count] = (sebp_attention_item){0, (int32_t)text, 0};
            to->count++;
        }
    }
    if (attention->zero_other_rows) {
        add_outside(to, of_k, SEBP_OUTSIDE);
        add_outside(to, attention->q_sequences, SEBP_OUTSIDE_OF_QUERIES);
    }
}

static void add_side(growing *to, const sebp_attention *attention, const sebp_sequences *sequences,
                     int64_t rows)
{
    if (rows == 0)
        return;
    add_texts(to, sequences, rows);
    if (attention->zero_other_rows)
        add_outside(to, sequences, SEBP_OUTSIDE);
}

static void put_texts(sebp_attention_text *texts, const sebp_attention *attention)
{
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    for (int64_t i = 0; i < of_q->count; i++) {
        texts[i] = (sebp_attention_text){.q_first = of_q->firsts[i],
                                         .q_before = of_q->offsets[i],
                                         .queries = length(of_q, i),
                                         .k_first = of_k->firsts[i],
                                         .k_before = of_k->offsets[i],
                                         .keys = length(of_k, i)};
    }
}

/* Makes room for a list whose items have been counted, and puts the texts there. */
static sebp_status make(const sebp_attention *attention, int64_t query_items, int64_t key_items,
                        sebp_attention_list *list, sebp_attention_item **items)
{
    const int64_t texts = attention->q_sequences->count;
    *list =
        (sebp_attention_list){.texts = texts, .query_items = query_items, .key_items = key_items};
    /* A text's number is of 32 bits. */
    if (texts > INT32_MAX)
        return SEBP_ERROR_MEMORY;
    list->bytes = texts * (int64_t)sizeof(sebp_attention_text) +
                  (query_items + key_items) * (int64_t)sizeof(sebp_attention_item);
    list->memory = malloc((size_t)sebp_max(list->bytes, 1));
    if (list->memory == NULL)
        return SEBP_ERROR_MEMORY;
    put_texts(list->memory, attention);
    *items = (sebp_attention_item *)(void *)((sebp_attention_text *)list->memory + texts);
    return SEBP_SUCCESS;
}

sebp_status sebp_attention_list_make(const sebp_attention *attention, int64_t query_rows,
                                     int64_t key_rows, sebp_attention_list *list)
{
    growing of_queries = {0}, of_keys = {0};
    add_side(&of_queries, attention, attention->q_sequences, query_rows);
    add_side(&of_keys, attention, attention->k_sequences, key_rows);
    growing made = {0};
    sebp_status status = make(attention, of_queries.count, of_keys.count, list, &made.items);
    if (status == SEBP_SUCCESS) {
        add_side(&made, attention, attention->q_sequences, query_rows);
        add_side(&made, attention, attention->k_sequences, key_rows);
    }
    return status;
}

sebp_status sebp_attention_list_make_whole(const sebp_attention *attention, int64_t key_rows,
                                           sebp_attention_list *list)
{
    growing counted = {0}, made = {0};
    add_whole(&counted, attention, key_rows);
    sebp_status status = make(attention, 0, counted.count, list, &made.items);
    if (status == SEBP_SUCCESS)
        add_whole(&made, attention, key_rows);
    return status;
}

sebp_status sebp_attention_list_put(sebp_cuda *cuda, const sebp_attention_list *list,
                                    int64_t scratch_bytes, const sebp_attention_text **texts,
                                    void **scratch)
{
    const bool stays = list->bytes > 0 && list->bytes <= SEBP_CUDA_ARRAY_BYTES;
    const int64_t own_bytes = stays ? 0 : list->bytes; /* a multiple of 16 */
    sebp_status status;
    char *memory = sebp_cuda_scratch(cuda, own_bytes + scratch_bytes, &status);
    if (status != SEBP_SUCCESS)
        return status;
    *scratch = memory + own_bytes;
    *texts = (const sebp_attention_text *)(const void *)memory;
    if (stays)
        *texts = sebp_cuda_copy_array(cuda, list->memory, list->bytes, &status);
    else
        status = sebp_cuda_upload(cuda, memory, list->memory, list->bytes);
    return status;
}

void sebp_attention_list_free(sebp_attention_list *list)
{
    free(list->memory);
    list->memory = NULL;
}
