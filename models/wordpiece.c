/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file wordpiece.c
 * Words, the vocabulary, and words cut into its pieces.
 */
#include <inttypes.h>
#include <string.h>

#include "models/wordpiece.h"

/* BERT's basic tokenizer, for ASCII: words are lower-cased and cut at blanks, and each punctuation
 * mark is a word. Other bytes of UTF-8 pass through as parts of words; accents are kept. */

static bool is_blank(char c)
{
    return (unsigned char)c <= ' ' || c == 127;
}

static bool is_punctuation(char c)
{
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
}

/** Takes the next word off `rest`; false if there is none. */
static bool take_word(struct slice *rest, struct slice *word)
{
    int64_t i = 0;
    while (i < rest->length && is_blank(rest->text[i])) {
        i++;
    }
    int64_t start = i;
    if (i < rest->length && is_punctuation(rest->text[i])) {
        i++;
    } else {
        while (i < rest->length && !is_blank(rest->text[i]) && !is_punctuation(rest->text[i])) {
            i++;
        }
    }
    *word = (struct slice){rest->text + start, i - start};
    *rest = (struct slice){rest->text + i, rest->length - i};
    return word->length > 0;
}

static int vocabulary_create(struct pool *pool, int64_t room, struct vocabulary *v)
{
    v->count = 0;
    v->buckets = 16;
    while (v->buckets < 2 * room) {
        v->buckets *= 2;
    }
    v->pieces = allocate(pool, room, sizeof *v->pieces);
    v->table = allocate(pool, v->buckets, sizeof *v->table);
    return pool->failed ? complain(FAILED, "out of memory for the vocabulary") : OK;
}

/**
 * Where `prefix` followed by `word` is or would be: its bucket.
 * Pieces that go on with a word are spelled with the prefix "##" in the file.
 */
static int64_t vocabulary_find(const struct vocabulary *v, const char *prefix, struct slice word)
{
    size_t before = strlen(prefix), length = (size_t)word.length;
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < before + length; i++) {
        char c = i < before ? prefix[i] : word.text[i - before];
        hash = (hash ^ (unsigned char)c) * 1099511628211u;
    }
    int64_t bucket = (int64_t)(hash & (uint64_t)(v->buckets - 1));
    while (v->table[bucket] != 0) {
        struct slice piece = v->pieces[v->table[bucket] - 1];
        if ((size_t)piece.length == before + length && memcmp(piece.text, prefix, before) == 0 &&
            (length == 0 || memcmp(piece.text + before, word.text, length) == 0)) {
            break;
        }
        bucket = (bucket + 1) & (v->buckets - 1);
    }
    return bucket;
}

/** The id of `prefix` followed by `word`; -1 if there is no such piece. */
static int32_t vocabulary_id(const struct vocabulary *v, const char *prefix, struct slice word)
{
    return v->table[vocabulary_find(v, prefix, word)] - 1;
}

/** Adds a piece; one that is there already keeps its id. */
static void vocabulary_add(struct vocabulary *v, struct slice piece)
{
    int64_t bucket = vocabulary_find(v, "", piece);
    v->pieces[v->count++] = piece;
    if (v->table[bucket] == 0) {
        v->table[bucket] = (int32_t)v->count;
    }
}

static const char *const special_names[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"};

/** Finds the four special pieces; `path` is for the message. */
static int vocabulary_specials(struct vocabulary *v, const char *path)
{
    int32_t *const ids[] = {&v->pad, &v->unknown, &v->classify, &v->separate};
    for (int i = 0; i < 4; i++) {
        *ids[i] = vocabulary_id(v, special_names[i], (struct slice){0});
        if (*ids[i] < 0) {
            return complain(REFUSED, "%s: lacks %s", path, special_names[i]);
        }
    }
    return OK;
}

int vocabulary_read(struct pool *pool, const char *path, struct vocabulary *v)
{
    struct slice rest = {0};
    int status = read_file(pool, path, &rest);
    int64_t lines = status == OK ? count_lines(rest) : 0;
    if (status == OK && (lines == 0 || lines > INT32_MAX / 2)) {
        status = complain(REFUSED, "%s: holds %" PRId64 " pieces", path, lines);
    }
    if (status == OK) {
        status = vocabulary_create(pool, lines, v);
    }
    while (status == OK && rest.length > 0) {
        vocabulary_add(v, take_line(&rest));
    }
    return status != OK ? status : vocabulary_specials(v, path);
}

int vocabulary_build(struct pool *pool, const struct slice *texts, int64_t count,
                     struct vocabulary *v)
{
    int64_t words = 0;
    struct slice word;
    for (int64_t i = 0; i < count; i++) {
        for (struct slice rest = texts[i]; take_word(&rest, &word);) {
            words++;
        }
    }
    struct vocabulary all = {0};
    int32_t *seen = allocate(pool, words, sizeof *seen);
    int status = vocabulary_create(pool, words, &all);
    if (status == OK) {
        status = vocabulary_create(pool, words + 4, v);
    }
    if (status != OK) {
        return status;
    }
    for (int i = 0; i < 4; i++) {
        int64_t length = (int64_t)strlen(special_names[i]);
        char *name = allocate(pool, length, 1);
        if (name == NULL) {
            return complain(FAILED, "out of memory for the vocabulary");
        }
        memcpy(name, special_names[i], (size_t)length);
        vocabulary_add(v, (struct slice){name, length});
    }
    for (int64_t i = 0; i < count; i++) {
        for (struct slice rest = texts[i]; take_word(&rest, &word);) {
            int32_t id = vocabulary_id(&all, "", word);
            if (id < 0) {
                id = (int32_t)all.count;
                vocabulary_add(&all, word);
            }
            if (++seen[id] == 2) {
                vocabulary_add(v, word);
            }
        }
    }
    return vocabulary_specials(v, "the vocabulary");
}

/**
 * WordPiece: of each word the longest piece that begins it, then of the rest the longest piece that
 * goes on with it; a word that cannot be spelled this way is one [UNK].
 *
 * @param ids  room for `room` ids.
 * @return the number of pieces, which may exceed the room; those beyond it are not written.
 */
static int64_t word_pieces(const struct vocabulary *v, struct slice word, int32_t *ids,
                           int64_t room)
{
    enum { LONGEST_WORD = 100 }; /* bytes; BERT's own bound */
    int64_t count = 0;
    for (int64_t start = 0; start < word.length;) {
        int32_t id = -1;
        int64_t length = word.length <= LONGEST_WORD ? word.length - start : 0;
        for (; length > 0; length--) {
            struct slice piece = {word.text + start, length};
            id = vocabulary_id(v, start > 0 ? "##" : "", piece);
            if (id >= 0) {
                break;
            }
        }
        if (id < 0) {
            if (room > 0) {
                ids[0] = v->unknown;
            }
            return 1;
        }
        if (count < room) {
            ids[count] = id;
        }
        count++;
        start += length;
    }
    return count;
}

int64_t tokenize(const struct vocabulary *v, struct slice text, int64_t max_length, int32_t *ids,
                 bool *cut)
{
    struct slice word;
    int64_t length = 1;
    ids[0] = v->classify;
    while (length <= max_length - 1 && take_word(&text, &word)) {
        length += word_pieces(v, word, ids + length, max_length - 1 - length);
    }
    *cut = length > max_length - 1;
    length = min_int64(length, max_length - 1);
    ids[length++] = v->separate;
    return length;
}
