/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file text.c
 * TSV files, vocabulary, WordPiece.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "text.h"

static const char byte_order_mark[] = "\xEF\xBB\xBF"; /* that some editors begin UTF-8 with */

/** The whole of a file, without a byte order mark. */
static int read_file(struct pool *pool, const char *path, struct slice *contents)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return complain(REFUSED, "%s: %s", path, strerror(errno));
    }
    int64_t size = 0, room = 1 << 16;
    char *text = malloc((size_t)room);
    while (text != NULL) {
        size += (int64_t)fread(text + size, 1, (size_t)(room - size), file);
        if (size < room) {
            break;
        }
        room *= 2;
        char *grown = realloc(text, (size_t)room);
        if (grown == NULL) {
            free(text);
        }
        text = grown;
    }
    int status = OK;
    char *kept = NULL;
    if (text == NULL) {
        status = complain(FAILED, "%s: out of memory", path);
    } else if (ferror(file)) {
        status = complain(REFUSED, "%s: cannot be read: %s", path, strerror(errno));
    } else if ((kept = allocate(pool, size + 1, 1)) == NULL) {
        status = complain(FAILED, "%s: out of memory", path);
    } else {
        const int64_t mark = (int64_t)sizeof byte_order_mark - 1;
        bool marked = size >= mark && memcmp(text, byte_order_mark, (size_t)mark) == 0;
        int64_t skipped = marked ? mark : 0;
        memcpy(kept, text + skipped, (size_t)(size - skipped));
        *contents = (struct slice){kept, size - skipped};
    }
    free(text);
    fclose(file);
    return status;
}

/** Takes the next line off `rest`, without its end ("\n" or "\r\n"). */
static struct slice take_line(struct slice *rest)
{
    char *end = memchr(rest->text, '\n', (size_t)rest->length);
    int64_t length = end != NULL ? end - rest->text : rest->length;
    struct slice line = {rest->text, length};
    int64_t taken = end != NULL ? length + 1 : length;
    *rest = (struct slice){rest->text + taken, rest->length - taken};
    if (line.length > 0 && line.text[line.length - 1] == '\r') {
        line.length--;
    }
    return line;
}

static int64_t count_lines(struct slice text)
{
    int64_t lines = 0;
    while (text.length > 0) {
        take_line(&text);
        lines++;
    }
    return lines;
}

/** Lower-cases the ASCII letters of a slice where they stand. */
static struct slice fold(struct slice text)
{
    for (int64_t i = 0; i < text.length; i++) {
        char c = text.text[i];
        text.text[i] = c >= 'A' && c <= 'Z' ? (char)(c + 'a' - 'A') : c;
    }
    return text;
}

static bool slice_equals(struct slice a, const char *text)
{
    return (size_t)a.length == strlen(text) && memcmp(a.text, text, (size_t)a.length) == 0;
}

/** A label: decimal digits for [0, MOST_CLASSES); -1 for anything else. */
static int parse_label(struct slice field)
{
    int label = 0;
    for (int64_t i = 0; i < field.length; i++) {
        if (field.text[i] < '0' || field.text[i] > '9' || label >= MOST_CLASSES) {
            return -1;
        }
        label = 10 * label + (field.text[i] - '0');
    }
    return field.length > 0 && label < MOST_CLASSES ? label : -1;
}

int read_corpus(struct pool *pool, const char *path, struct corpus *corpus)
{
    struct slice rest = {0};
    int status = read_file(pool, path, &rest);
    if (status != OK) {
        return status;
    }
    corpus->sentences = allocate(pool, count_lines(rest), sizeof *corpus->sentences);
    if (pool->failed) {
        return complain(FAILED, "%s: out of memory", path);
    }
    int columns = 0;
    for (long long number = 1; rest.length > 0; number++) {
        struct slice line = take_line(&rest), fields[4];
        int found = 1;
        fields[0] = line;
        for (int64_t i = 0; i < line.length; i++) {
            if (line.text[i] == '\0') {
                return complain(REFUSED, "%s:%lld: holds a NUL byte", path, number);
            }
            if (line.text[i] == '\t' && ++found <= 4) {
                fields[found - 2].length = line.text + i - fields[found - 2].text;
                fields[found - 1] = (struct slice){line.text + i + 1, line.length - i - 1};
            }
        }
        if (found != 2 && found != 4) {
            return complain(REFUSED, "%s:%lld: %d columns where 2 or 4 are expected", path, number,
                            found);
        }
        if (columns != 0 && found != columns) {
            return complain(REFUSED, "%s:%lld: %d columns where the lines above have %d", path,
                            number, found, columns);
        }
        columns = found;
        if (number == 1 && slice_equals(fields[1], "label")) {
            continue;
        }
        int label = parse_label(fields[1]);
        if (label < 0) {
            return complain(REFUSED, "%s:%lld: label '%.*s' is not a whole number from 0 to %d",
                            path, number, (int)smaller(fields[1].length, 40), fields[1].text,
                            MOST_CLASSES - 1);
        }
        struct slice text = fold(fields[columns == 2 ? 0 : 3]);
        if (text.length == 0) {
            return complain(REFUSED, "%s:%lld: the sentence is empty", path, number);
        }
        corpus->sentences[corpus->count++] = (struct sentence){text, label, number};
        corpus->classes = label + 1 > corpus->classes ? label + 1 : corpus->classes;
    }
    return corpus->count > 0 ? OK : complain(REFUSED, "%s: holds no sentences", path);
}

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

static int vocabulary_create(struct pool *pool, int64_t most, struct vocabulary *v)
{
    v->count = 0;
    v->buckets = 16;
    while (v->buckets < 2 * most) {
        v->buckets *= 2;
    }
    v->pieces = allocate(pool, most, sizeof *v->pieces);
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
        status = complain(REFUSED, "%s: holds %lld pieces", path, (long long)lines);
    }
    if (status == OK) {
        status = vocabulary_create(pool, lines, v);
    }
    while (status == OK && rest.length > 0) {
        vocabulary_add(v, take_line(&rest));
    }
    return status != OK ? status : vocabulary_specials(v, path);
}

int vocabulary_build(struct pool *pool, const struct corpus *corpus, struct vocabulary *v)
{
    int64_t words = 0;
    struct slice word;
    for (int64_t i = 0; i < corpus->count; i++) {
        for (struct slice rest = corpus->sentences[i].text; take_word(&rest, &word);) {
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
    for (int64_t i = 0; i < corpus->count; i++) {
        for (struct slice rest = corpus->sentences[i].text; take_word(&rest, &word);) {
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

int encode(struct pool *pool, const struct corpus *corpus, int64_t from, int64_t to,
           const struct vocabulary *v, int64_t max_length, struct dataset *data)
{
    data->count = to - from;
    data->cut = 0;
    data->examples = allocate(pool, data->count, sizeof *data->examples);
    int32_t *ids = allocate(pool, max_length, sizeof *ids);
    for (int64_t i = 0; i < data->count && !pool->failed; i++) {
        const struct sentence *sentence = &corpus->sentences[from + i];
        struct slice rest = sentence->text, word;
        int64_t length = 1;
        ids[0] = v->classify;
        while (length <= max_length - 1 && take_word(&rest, &word)) {
            length += word_pieces(v, word, ids + length, max_length - 1 - length);
        }
        if (length > max_length - 1) {
            length = max_length - 1;
            data->cut++;
        }
        ids[length++] = v->separate;
        struct example *example = &data->examples[i];
        example->ids = allocate(pool, length, sizeof *ids);
        if (example->ids != NULL) {
            memcpy(example->ids, ids, (size_t)length * sizeof *ids);
        }
        example->length = length;
        example->label = sentence->label;
    }
    return pool->failed ? complain(FAILED, "out of memory for the data") : OK;
}

/* ---- the order of the examples ---- */

int shuffle_begin(struct pool *pool, int64_t count, uint64_t seed, struct shuffle *shuffle)
{
    *shuffle = (struct shuffle){allocate(pool, count, sizeof(int64_t)), count, count, seed};
    if (pool->failed) {
        return complain(FAILED, "out of memory for the order of the data");
    }
    for (int64_t i = 0; i < count; i++) {
        shuffle->order[i] = i;
    }
    return OK;
}

int64_t shuffle_next(struct shuffle *shuffle, int64_t most, int64_t *from)
{
    if (shuffle->next == shuffle->count) {
        shuffle->next = 0;
        for (int64_t i = shuffle->count - 1; i > 0; i--) {
            int64_t j = random_below(&shuffle->state, i + 1), swapped = shuffle->order[i];
            shuffle->order[i] = shuffle->order[j];
            shuffle->order[j] = swapped;
        }
    }
    int64_t count = smaller(most, shuffle->count - shuffle->next);
    *from = shuffle->next;
    shuffle->next += count;
    return count;
}
