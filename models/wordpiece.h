/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file wordpiece.h
 * BERT's tokenizer: a WordPiece vocabulary, and a text as the ids of its pieces.
 */
#ifndef SEBP_MODELS_WORDPIECE_H
#define SEBP_MODELS_WORDPIECE_H

#include <stdbool.h>
#include <stdint.h>

#include "models/support.h"
#include "models/text.h"

/** Pieces of words, found through a hash table with linear probing. */
struct vocabulary {
    struct slice *pieces; /* the id of a piece is its index */
    int64_t count;
    int32_t *table;  /* id + 1; 0: free */
    int64_t buckets; /* a power of two over twice the count */
    int32_t pad, unknown, classify, separate;
};

/** One piece a line, as BERT's vocab.txt; a byte order mark is skipped. */
int vocabulary_read(struct pool *pool, const char *path, struct vocabulary *v);

/** The special pieces, and every word that the texts, in lower case, hold at least twice. */
int vocabulary_build(struct pool *pool, const struct slice *texts, int64_t count,
                     struct vocabulary *v);

/**
 * A text as the model sees it: [CLS] pieces [SEP], without padding.
 *
 * @param text        in lower case.
 * @param max_length  >= 2.
 * @param ids         room for max_length ids.
 * @param cut         whether the text is longer than that.
 * @return how many ids there are.
 */
int64_t tokenize(const struct vocabulary *v, struct slice text, int64_t max_length, int32_t *ids,
                 bool *cut);

#endif
