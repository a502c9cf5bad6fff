/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention_list.c What attention's blocks of threads have to do. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>

#include "../text_list.h"
#include "attention_list.h"

enum { OUTSIDE = -1, ZEROED_ROWS = 64 };

/* Adds items for rows [first, first + count); items NULL: counts them. */
static int64_t add(sebp_attention_item *items, int64_t at, int64_t text, int64_t first,
                   int64_t count, int64_t rows)
{
    const int64_t blocks = sebp_div_ceil(count, rows);
    for (int64_t i = 0; i < blocks && items != NULL; i++) {
        /* The last first: a text's last queries see the most keys where attention is causal. */
        const int64_t row = (blocks - 1 - i) * rows;
        items[at + i] = (sebp_attention_item){.first = first + row,
                                              .text = (int32_t)text,
                                              .rows = (int32_t)sebp_min(rows, count - row)};
    }
    return at + blocks;
}

/* The items of one side; items NULL: how many they are. */
static int64_t add_all(sebp_attention_item *items, const sebp_sequences *sequences, int64_t rows,
                       int64_t memory_rows, bool zero_others)
{
    int64_t at = 0, end = 0;
    for (int64_t text = 0; text < sequences->count; text++)
        at = add(items, at, text, 0, sequences->offsets[text + 1] - sequences->offsets[text], rows);
    for (int64_t text = 0; text < sequences->count && zero_others; text++) {
        at = add(items, at, OUTSIDE, end, sequences->firsts[text] - end, ZEROED_ROWS);
        end = sequences->firsts[text] + sequences->offsets[text + 1] - sequences->offsets[text];
    }
    return zero_others ? add(items, at, OUTSIDE, end, memory_rows - end, ZEROED_ROWS) : at;
}

sebp_status sebp_attention_list_make(const sebp_attention *attention, int64_t query_rows,
                                     int64_t key_rows, sebp_attention_list *list)
{
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    const int64_t q_rows = attention->q->rows, k_rows = attention->k->rows;
    const bool zero = attention->zero_other_rows;
    *list = (sebp_attention_list){.texts = of_q->count};
    if (query_rows > 0)
        list->query_items = add_all(NULL, of_q, query_rows, q_rows, zero);
    if (key_rows > 0)
        list->key_items = add_all(NULL, of_k, key_rows, k_rows, zero);
    /* A text's number is of 32 bits. */
    if (list->texts > INT32_MAX)
        return SEBP_ERROR_MEMORY;
    const int64_t items = list->query_items + list->key_items;
    list->bytes = list->texts * (int64_t)sizeof(sebp_attention_text) +
                  items * (int64_t)sizeof(sebp_attention_item);
    list->memory = malloc((size_t)sebp_max(list->bytes, 1));
    if (list->memory == NULL)
        return SEBP_ERROR_MEMORY;
    sebp_attention_text *texts = list->memory;
    for (int64_t i = 0; i < list->texts; i++) {
        texts[i] = (sebp_attention_text){.q_first = of_q->firsts[i],
                                         .q_before = of_q->offsets[i],
                                         .queries = of_q->offsets[i + 1] - of_q->offsets[i],
                                         .k_first = of_k->firsts[i],
                                         .k_before = of_k->offsets[i],
                                         .keys = of_k->offsets[i + 1] - of_k->offsets[i]};
    }
    sebp_attention_item *to = (sebp_attention_item *)(void *)(texts + list->texts);
    if (query_rows > 0)
        add_all(to, of_q, query_rows, q_rows, zero);
    if (key_rows > 0)
        add_all(to + list->query_items, of_k, key_rows, k_rows, zero);
    return SEBP_SUCCESS;
}

void sebp_attention_list_free(sebp_attention_list *list)
{
    free(list->memory);
    list->memory = NULL;
}
