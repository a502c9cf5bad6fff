/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_list.h
 * What attention's blocks of threads have to do: a list made on the host for each call, and copied, unless
 * an earlier call had the same one.
 */
#ifndef SEBP_CUDA_ATTENTION_LIST_H
#define SEBP_CUDA_ATTENTION_LIST_H

#include "cuda.h"

SEBP_BEGIN_DECLS

/** A text: its rows, and how many there are in the texts before. */
typedef struct sebp_attention_text {
    int64_t q_first, q_before, queries;
    int64_t k_first, k_before, keys;
} sebp_attention_text;

/** In the place of a text: memory rows outside all texts, to be zeroed. */
enum { SEBP_OUTSIDE = -1, SEBP_OUTSIDE_OF_QUERIES = -2 };

/** Rows for a block to work on: of a text, `first` counted within it; or outside all texts, of the
 * pass's side or of the queries. */
typedef struct sebp_attention_item {
    int64_t first;
    int32_t text, rows;
} sebp_attention_item;

/** The texts, then the items of the queries, then those of the keys. */
typedef struct sebp_attention_list {
    void *memory; /* the host's */
    int64_t bytes;
    int64_t texts, query_items, key_items;
} sebp_attention_list;

/** Items of at most `query_rows` and `key_rows`; 0: none of them. SEBP_ERROR_MEMORY. */
sebp_status sebp_attention_list_make(const sebp_attention *attention, int64_t query_rows,
                                     int64_t key_rows, sebp_attention_list *list);
/** Items of whole texts, none of more than `key_rows` keys: each with all of its keys and, of both
 * sides, the rows outside. They count as those of the keys. */
sebp_status sebp_attention_list_make_whole(const sebp_attention *attention, int64_t key_rows,
                                           sebp_attention_list *list);
/** The list in the GPU's memory, and scratch memory beside it. SEBP_ERROR_MEMORY, SEBP_ERROR_BACKEND. */
sebp_status sebp_attention_list_put(sebp_cuda *cuda, const sebp_attention_list *list,
                                    int64_t scratch_bytes, const sebp_attention_text **texts,
                                    void **scratch);
void sebp_attention_list_free(sebp_attention_list *list);

SEBP_END_DECLS

#endif
