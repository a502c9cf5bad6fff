/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file text.h
 * From a TSV file to token ids: sentences with labels, a WordPiece vocabulary, data sets, and the
 * order in which an epoch goes through one.
 */
#ifndef SEBP_EXAMPLES_TEXT_H
#define SEBP_EXAMPLES_TEXT_H

#include <stdint.h>

#include "tools.h"

/** A slice of a file's text; not NUL-terminated. */
struct slice {
    char *text;
    int64_t length;
};

struct sentence {
    struct slice text;
    int label;
    long long line; /* where it stands in its file, for messages */
};

/** What a TSV file holds. */
struct corpus {
    struct sentence *sentences;
    int64_t count;
    int classes; /* the largest label, plus 1 */
};

enum { MOST_CLASSES = 100 };

/* In the files below a UTF-8 byte order mark is skipped. */

/**
 * Reads `sentence<TAB>label`, or CoLA's `source<TAB>label<TAB>mark<TAB>sentence`. A first line that
 * has "label" for its label is a header.
 */
int read_corpus(struct pool *pool, const char *path, struct corpus *corpus);

/** Pieces of words, found through a hash table with linear probing. */
struct vocabulary {
    struct slice *pieces; /* the id of a piece is its index */
    int64_t count;
    int32_t *table;  /* id + 1; 0: free */
    int64_t buckets; /* a power of two over twice the count */
    int32_t pad, unknown, classify, separate;
};

/** One piece a line, as BERT's vocab.txt. */
int vocabulary_read(struct pool *pool, const char *path, struct vocabulary *v);

/** The special pieces, and every word that a corpus holds at least twice. */
int vocabulary_build(struct pool *pool, const struct corpus *corpus, struct vocabulary *v);

/** A sentence as the model sees it: [CLS] pieces [SEP], without padding. */
struct example {
    int32_t *ids;
    int64_t length;
    int label;
};

struct dataset {
    struct example *examples;
    int64_t count;
    int64_t cut; /* sentences longer than the maximum */
};

/** Turns sentences [from, to) of a corpus into ids, at most max_length each. */
int encode(struct pool *pool, const struct corpus *corpus, int64_t from, int64_t to,
           const struct vocabulary *v, int64_t max_length, struct dataset *data);

/** The order of a data set's examples, shuffled anew for each epoch. */
struct shuffle {
    int64_t *order; /* count */
    int64_t count, next;
    uint64_t state; /* of the random numbers */
};

/** Begins before the first epoch. */
int shuffle_begin(struct pool *pool, int64_t count, uint64_t seed, struct shuffle *shuffle);

/** The places in `order` of the next batch: from `*from` on as many as are returned, `most` or what
 * the epoch has left. */
int64_t shuffle_next(struct shuffle *shuffle, int64_t most, int64_t *from);

#endif
