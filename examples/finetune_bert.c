/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune_bert.c
 * Trains a BERT-shaped text classifier from the same seed in several modes and compares them.
 *
 * Sentences are padded to one length, and the loss does not depend on the padding: in every linear
 * layer the gradient rows of padded positions are exactly zero. The modes differ in nothing but the
 * rows they compute:
 *
 *     mode          forward       backward
 *     dense         all rows      all rows
 *     sebp          all rows      rows that can carry a gradient
 *     sebp-forward  those rows    those rows
 *
 * Every mode runs the same code below; what changes is the set of rows (struct region) handed to
 * it. So the losses agree up to rounding, and the difference in time is the work left out.
 *
 * To be read from top to bottom:
 *
 *     1. Tools        memory, messages, time, random numbers
 *     2. Options
 *     3. Text         TSV files, vocabulary, WordPiece
 *     4. Arithmetic   the row kernels: layer norm, GELU, softmax, AdamW
 *     5. Model        parameters, activations, regions
 *     6. Forward
 *     7. Backward
 *     8. AdamW
 *     9. Training
 *    10. Gradient check and parameter dump
 *    11. Report       table, CSV, SVG
 *
 * Shapes: B sequences of L tokens make M = B * L rows; H hidden, A heads of D = H / A, F = 4 H,
 * C classes, V vocabulary. Matrices are row-major. As in BERT: post-layer-norm blocks, exact GELU,
 * [CLS] pooled through a dense layer and tanh. Left out: dropout, which would need equal masks in
 * every mode, and segment embeddings, as each example is one sentence.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <sebp/sebp.h>

#ifndef SEBP_EXAMPLES_DIR
#define SEBP_EXAMPLES_DIR "examples"
#endif

/* ============================================================================================== */
/* 1. Tools                                                                                       */
/* ============================================================================================== */

/* What main() returns: all went well, something failed while running, input was refused. */
enum { OK = 0, FAILED = 1, REFUSED = 2 };

/** Writes one line to standard error and returns `status`, so that callers can `return` it. */
static int complain(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("finetune_bert: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return status;
}

/* OpenMP where there is some; without it the program is the same on one thread. */
#ifdef _OPENMP
#define DO_PRAGMA(text) _Pragma(#text)
#define PARALLEL_FOR(count) DO_PRAGMA(omp parallel for schedule(static) num_threads(count))
#define PARALLEL_FOR_UNEVEN(count) DO_PRAGMA(omp parallel for schedule(dynamic) num_threads(count))
#define SIMD          DO_PRAGMA(omp simd)
#define SIMD_SUM(...) DO_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
static int thread_index(void)
{
    return omp_get_thread_num();
}
#else
#define PARALLEL_FOR(count)
#define PARALLEL_FOR_UNEVEN(count)
#define SIMD
#define SIMD_SUM(...)
static int thread_index(void)
{
    return 0;
}
#endif

/* The compiler makes one copy of a WIDE function for each generation of x86-64 and picks one when
 * the program starts. (Not under AddressSanitizer, which is not up yet when that happens.) */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) &&       \
    !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

/** All memory comes from a pool and is freed with it. */
struct pool {
    struct chunk *chunks;
    bool failed; /* an allocation failed: the pool's pointers may be NULL */
};

struct chunk {
    struct chunk *next;
    size_t bytes;
};

enum { LINE = 64 }; /* bytes in a cache line */

/** Where the memory of a chunk begins: at the first cache line after its head. */
static void *chunk_data(struct chunk *chunk)
{
    return (void *)(((uintptr_t)(chunk + 1) + LINE - 1) / LINE * LINE);
}

/** `count` zeroed elements of `size` bytes, aligned to a cache line; NULL sets pool->failed. */
static void *allocate(struct pool *pool, int64_t count, size_t size)
{
    if (pool->failed || count < 0 || (uint64_t)count > (PTRDIFF_MAX - 2 * LINE) / size) {
        pool->failed = true;
        return NULL;
    }
    struct chunk *chunk = calloc(1, (size_t)count * size + 2 * LINE);
    if (chunk == NULL) {
        pool->failed = true;
        return NULL;
    }
    *chunk = (struct chunk){pool->chunks, (size_t)count * size};
    pool->chunks = chunk;
    return chunk_data(chunk);
}

static void pool_free(struct pool *pool)
{
    while (pool->chunks != NULL) {
        struct chunk *chunk = pool->chunks;
        pool->chunks = chunk->next;
        free(chunk);
    }
}

static float *floats(struct pool *pool, int64_t count)
{
    return allocate(pool, count, sizeof(float));
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/** splitmix64: the whole state is one counter. */
static uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/** In [0, bound). The bias of the remainder is bound / 2^64: none to speak of. */
static int64_t random_below(uint64_t *state, int64_t bound)
{
    return (int64_t)(random_next(state) % (uint64_t)bound);
}

/** The sum of four uniforms: mean 0, variance 1, nearly normal, never beyond 3.5. */
static float random_normal(uint64_t *state)
{
    uint64_t bits = random_next(state);
    uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    return ((float)sum / 65536.0f - 2.0f + 2.0f / 65536.0f) * 1.7320508f;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ============================================================================================== */
/* 2. Options                                                                                     */
/* ============================================================================================== */

enum mode { DENSE, SEBP, SEBP_FORWARD, MODES };

static const char *const mode_names[MODES] = {"dense", "sebp", "sebp-forward"};

struct options {
    int64_t layers, hidden, heads, max_length, batch, epochs, steps, threads, seed;
    double learning_rate;
    const char *train, *dev, *vocab, *mode, *plot, *csv, *dump;
    bool check_gradients, help;
};

/** One flag: exactly one of the pointers says where its value goes. */
struct flag {
    const char *name, *value, *help;
    int64_t *whole;
    double *real;
    const char **text;
    bool *set;
    double low, high; /* the range of a number */
};

#define DEFAULT_TRAIN SEBP_EXAMPLES_DIR "/sentences.tsv"

/** Reads the value of one flag. */
static int parse_value(const struct flag *flag, const char *value)
{
    char *end = NULL;
    errno = 0;
    if (flag->text != NULL) {
        *flag->text = value;
        return *value != '\0' ? OK : complain(REFUSED, "--%s: is empty", flag->name);
    }
    double number = flag->whole != NULL ? (double)strtoll(value, &end, 10) : strtod(value, &end);
    if (end == value || *end != '\0') {
        return complain(REFUSED, "--%s: '%s' is not a%s number", flag->name, value,
                        flag->whole != NULL ? " whole" : "");
    }
    if (errno != 0 || !(number >= flag->low && number <= flag->high)) {
        return complain(REFUSED, "--%s: %s is not in [%g, %g]", flag->name, value, flag->low,
                        flag->high);
    }
    if (flag->whole != NULL) {
        *flag->whole = (int64_t)number;
    } else {
        *flag->real = number;
    }
    return OK;
}

static void print_help(const struct flag *flags)
{
    puts("Usage: finetune_bert [OPTION]...\n"
         "Trains a BERT-shaped text classifier, dense and with padded rows skipped, and compares.\n"
         "Without --train it reads " DEFAULT_TRAIN ".\n");
    for (const struct flag *flag = flags; flag->name != NULL; flag++) {
        printf("  --%s%s%-*s %s\n", flag->name, *flag->value ? " " : "",
               26 - (int)strlen(flag->name) - (*flag->value ? 1 : 0), flag->value, flag->help);
    }
    puts("\nExit status: 0 done, 1 failed while running, 2 bad option or data.");
}

static int parse_options(int argc, char **argv, struct options *o)
{
    const struct flag flags[] = {
        {"layers", "N", "encoder blocks", &o->layers, 0, 0, 0, 1, 96},
        {"hidden", "N", "width, a multiple of the heads", &o->hidden, 0, 0, 0, 1, 16384},
        {"heads", "N", "attention heads", &o->heads, 0, 0, 0, 1, 256},
        {"max-length", "N", "tokens each sentence is padded to", &o->max_length, 0, 0, 0, 2, 4096},
        {"batch", "N", "sentences in a batch", &o->batch, 0, 0, 0, 1, 4096},
        {"epochs", "N", "passes over the training data", &o->epochs, 0, 0, 0, 1, 1000},
        {"steps", "N", "stop after so many steps; 0: no limit", &o->steps, 0, 0, 0, 0, 1e9},
        {"learning-rate", "X", "peak rate", 0, &o->learning_rate, 0, 0, 1e-9, 1},
        {"train", "FILE", "training data: sentence<TAB>label, or CoLA's columns", 0, 0, &o->train,
         0, 0, 0},
        {"dev", "FILE", "held-out data; else the last eighth of the training data", 0, 0, &o->dev,
         0, 0, 0},
        {"vocab", "FILE", "WordPiece vocabulary; else built from the training data", 0, 0,
         &o->vocab, 0, 0, 0},
        {"mode", "MODE", "dense, sebp, sebp-forward, both (dense, sebp) or all", 0, 0, &o->mode, 0,
         0, 0},
        {"threads", "N", "0: one for each physical core", &o->threads, 0, 0, 0, 0, 1024},
        {"seed", "N", "of parameters and order of the data", &o->seed, 0, 0, 0, 0, 1e15},
        {"plot", "FILE", "SVG with loss curves and times", 0, 0, &o->plot, 0, 0, 0},
        {"csv", "FILE", "the loss of every step in each mode", 0, 0, &o->csv, 0, 0, 0},
        {"dump-parameters", "DIR", "initial parameters and batches, for other programs", 0, 0,
         &o->dump, 0, 0, 0},
        {"check-gradients", "", "compare gradients with finite differences, then stop", 0, 0, 0,
         &o->check_gradients, 0, 0},
        {"help", "", "this text", 0, 0, 0, &o->help, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    for (int i = 1; i < argc; i++) {
        const char *equals = strchr(argv[i], '=');
        size_t length = equals != NULL ? (size_t)(equals - argv[i]) : strlen(argv[i]);
        const struct flag *flag = flags;
        while (flag->name != NULL &&
               (length != strlen(flag->name) + 2 || argv[i][0] != '-' || argv[i][1] != '-' ||
                strncmp(argv[i] + 2, flag->name, length - 2) != 0)) {
            flag++;
        }
        if (flag->name == NULL) {
            return complain(REFUSED, "unknown option '%s' (--help lists them)", argv[i]);
        }
        if (flag->set != NULL) {
            if (equals != NULL) {
                return complain(REFUSED, "--%s: takes no value", flag->name);
            }
            *flag->set = true;
            continue;
        }
        if (equals == NULL && i + 1 == argc) {
            return complain(REFUSED, "--%s: needs a value", flag->name);
        }
        int status = parse_value(flag, equals != NULL ? equals + 1 : argv[++i]);
        if (status != OK) {
            return status;
        }
    }
    if (o->help) {
        print_help(flags);
    }
    if (o->hidden % o->heads != 0) {
        return complain(REFUSED, "--heads: %lld do not divide --hidden %lld", (long long)o->heads,
                        (long long)o->hidden);
    }
    return OK;
}

/** Which modes --mode asks for. */
static int parse_mode(const char *text, bool wanted[MODES])
{
    bool all = strcmp(text, "all") == 0;
    bool both = strcmp(text, "both") == 0;
    wanted[DENSE] = all || both || strcmp(text, "dense") == 0;
    wanted[SEBP] = all || both || strcmp(text, "sebp") == 0;
    wanted[SEBP_FORWARD] = all || strcmp(text, "sebp-forward") == 0;
    if (!wanted[DENSE] && !wanted[SEBP] && !wanted[SEBP_FORWARD]) {
        return complain(REFUSED, "--mode: '%s' is not dense, sebp, sebp-forward, both or all",
                        text);
    }
    return OK;
}

/**
 * Whether a file can be written, found out before hours of training and not after. An existing file
 * keeps its contents, a new one is not left behind.
 */
static int check_writable(const char *path)
{
    bool existed = access(path, F_OK) == 0;
    FILE *file = fopen(path, "ab");
    if (file == NULL) {
        return complain(REFUSED, "%s: cannot be written: %s", path, strerror(errno));
    }
    fclose(file);
    if (!existed) {
        remove(path);
    }
    return OK;
}

/* ============================================================================================== */
/* 3. Text                                                                                        */
/* ============================================================================================== */

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

/** The whole of a file. */
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
        memcpy(kept, text, (size_t)size);
        *contents = (struct slice){kept, size};
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

/**
 * Reads `sentence<TAB>label`, or CoLA's `source<TAB>label<TAB>mark<TAB>sentence`. A first line that
 * has "label" for its label is a header.
 */
static int read_corpus(struct pool *pool, const char *path, struct corpus *corpus)
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

/** Pieces of words, found through a hash table with linear probing. */
struct vocabulary {
    struct slice *pieces; /* the id of a piece is its index */
    int64_t count;
    int32_t *table;  /* id + 1; 0: free */
    int64_t buckets; /* a power of two over twice the count */
    int32_t pad, unknown, classify, separate;
};

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

/** One piece a line, as BERT's vocab.txt. */
static int vocabulary_read(struct pool *pool, const char *path, struct vocabulary *v)
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

/** The special pieces, and every word that a corpus holds at least twice. */
static int vocabulary_build(struct pool *pool, const struct corpus *corpus, struct vocabulary *v)
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

/** Turns sentences [from, to) of a corpus into ids, at most max_length each. */
static int encode(struct pool *pool, const struct corpus *corpus, int64_t from, int64_t to,
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

/* ============================================================================================== */
/* 4. Arithmetic                                                                                  */
/* ============================================================================================== */

/* What is not a linear layer is a plain loop over one row, for the compiler to vectorise. */

/**
 * e^x for x <= 88: 2^n * e^r with |r| <= ln(2)/2, the second by its Taylor polynomial.
 * Largest relative error 2e-7; below -87 it is 0, so that masked keys have weight exactly 0.
 */
static inline float fast_exp(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float clamped = x < -87.0f ? -87.0f : x;
    union {
        float real;
        int32_t bits;
    } n = {clamped * 1.44269504f + round}, power;
    power.bits = (int32_t)((uint32_t)n.bits << 23) + 0x3f800000;
    float whole = n.real - round;
    float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return x < -87.0f ? 0.0f : p * power.real;
}

/**
 * The normal distribution's share below x, and its density at x, from one exponential.
 * The share is (1 + erf(x / sqrt 2)) / 2 by Abramowitz and Stegun 7.1.26; largest error 1.5e-7.
 */
static inline float normal_share(float x, float *density)
{
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float bell = fast_exp(-z * z);
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * bell; /* beyond |x| */
    *density = 0.39894228f * bell;
    return x < 0 ? tail : 1.0f - tail;
}

WIDE static void gelu_row(const float *x, float *y, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float density;
        y[j] = x[j] * normal_share(x[j], &density);
    }
}

/** dy becomes dx, in place. */
WIDE static void gelu_backward_row(const float *x, float *dy, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float density;
        float share = normal_share(x[j], &density);
        dy[j] *= share + x[j] * density;
    }
}

/** y = x scaled to mean 0 and variance 1, times scale, plus shift. Keeps the two in `moments`. */
struct moments {
    float mean, rstd;
};

WIDE static void norm_row(float *x, const float *residual, const float *scale, const float *shift,
                          float *y, struct moments *moments, int64_t n)
{
    const float epsilon = 1e-12f; /* BERT's */
    float sum = 0.0f, squares = 0.0f;
    SIMD_SUM(sum)
    for (int64_t j = 0; j < n; j++) {
        x[j] += residual[j];
        sum += x[j];
    }
    float mean = sum / (float)n;
    SIMD_SUM(squares)
    for (int64_t j = 0; j < n; j++) {
        squares += (x[j] - mean) * (x[j] - mean);
    }
    float rstd = 1.0f / sqrtf(squares / (float)n + epsilon);
    SIMD for (int64_t j = 0; j < n; j++)
    {
        y[j] = (x[j] - mean) * rstd * scale[j] + shift[j];
    }
    *moments = (struct moments){mean, rstd};
}

/** dy becomes dx, in place; the gradients of scale and shift are added to. */
WIDE static void norm_backward_row(const float *x, struct moments moments, const float *scale,
                                   float *dy, float *dscale, float *dshift, int64_t n)
{
    float mean = moments.mean, rstd = moments.rstd;
    float sum = 0.0f, along = 0.0f;
    SIMD_SUM(sum, along)
    for (int64_t j = 0; j < n; j++) {
        float normal = (x[j] - mean) * rstd;
        sum += dy[j] * scale[j];
        along += dy[j] * scale[j] * normal;
    }
    sum /= (float)n;
    along /= (float)n;
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float normal = (x[j] - mean) * rstd;
        dscale[j] += dy[j] * normal;
        dshift[j] += dy[j];
        dy[j] = (dy[j] * scale[j] - sum - normal * along) * rstd;
    }
}

/** c = a B: a has k elements `step` apart, B is k x n with rows `stride` apart. */
WIDE static void row_times_matrix(const float *a, int64_t step, const float *b, int64_t stride,
                                  int64_t k, float *restrict c, int64_t n)
{
    memset(c, 0, (size_t)n * sizeof *c);
    int64_t i = 0;
    for (; i + 4 <= k; i += 4, b += 4 * stride) {
        float a0 = a[i * step], a1 = a[(i + 1) * step];
        float a2 = a[(i + 2) * step], a3 = a[(i + 3) * step];
        SIMD for (int64_t j = 0; j < n; j++)
        {
            c[j] +=
                a0 * b[j] + a1 * b[j + stride] + (a2 * b[j + 2 * stride] + a3 * b[j + 3 * stride]);
        }
    }
    for (; i < k; i++, b += stride) {
        float a0 = a[i * step];
        SIMD for (int64_t j = 0; j < n; j++)
        {
            c[j] += a0 * b[j];
        }
    }
}

/** Softmax over the scaled scores of one query, in place; keys from `real` on are masked. */
WIDE static void softmax_row(float *scores, float scale, int64_t real, int64_t n)
{
    float top = scores[0];
    for (int64_t j = 1; j < real; j++) {
        top = scores[j] > top ? scores[j] : top;
    }
    for (int64_t j = real; j < n; j++) {
        scores[j] = -INFINITY;
    }
    float sum = 0.0f;
    SIMD_SUM(sum)
    for (int64_t j = 0; j < n; j++) {
        scores[j] = fast_exp((scores[j] - top) * scale);
        sum += scores[j];
    }
    float share = 1.0f / sum;
    SIMD for (int64_t j = 0; j < n; j++)
    {
        scores[j] *= share;
    }
}

/** The gradient of the weights, dp, becomes that of the unscaled scores, in place. */
WIDE static void softmax_backward_row(const float *p, float *dp, float scale, int64_t n)
{
    float along = 0.0f;
    SIMD_SUM(along)
    for (int64_t j = 0; j < n; j++) {
        along += p[j] * dp[j];
    }
    SIMD for (int64_t j = 0; j < n; j++)
    {
        dp[j] = p[j] * (dp[j] - along) * scale;
    }
}

WIDE static void add_row(float *to, const float *from, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        to[j] += from[j];
    }
}

struct adamw {
    float rate, keep; /* the step's rate over the first moment's bias; 1 - rate * decay */
    float bias2;      /* 1 / sqrt(bias of the second moment) */
};

static const float beta1 = 0.9f, beta2 = 0.999f, adamw_epsilon = 1e-6f, weight_decay = 0.01f;

WIDE static void adamw_row(struct adamw step, float keep, float *value, const float *gradient,
                           float *moment1, float *moment2, int64_t n)
{
    SIMD for (int64_t j = 0; j < n; j++)
    {
        float g = gradient[j];
        moment1[j] = beta1 * moment1[j] + (1.0f - beta1) * g;
        moment2[j] = beta2 * moment2[j] + (1.0f - beta2) * g * g;
        value[j] = value[j] * keep -
                   step.rate * moment1[j] / (sqrtf(moment2[j]) * step.bias2 + adamw_epsilon);
    }
}

/* ============================================================================================== */
/* 5. Model                                                                                       */
/* ============================================================================================== */

/** One learned tensor: a slice of the four flat arrays of the model. */
struct tensor {
    const char *name, *part; /* "qkv", "weight" */
    int64_t block;           /* 0 for what stands outside the blocks */
    int64_t rows, cols;
    float *value, *gradient, *moment1, *moment2; /* rows x cols each */
    float fill;                                  /* initial value; NaN: random */
    bool decays;                                 /* biases and norms do not */
};

/** y = x W^T + b. */
struct linear {
    struct tensor *weight; /* N x K */
    struct tensor *bias;   /* 1 x N */
};

struct norm {
    struct tensor *scale, *shift; /* 1 x H each */
};

struct block {
    struct linear qkv;      /* H -> 3H: queries, keys, values */
    struct linear out;      /* H -> H */
    struct norm after_out;  /* on out + the block's input */
    struct linear up;       /* H -> F */
    struct linear down;     /* F -> H */
    struct norm after_down; /* on down + what came after the first norm */

    /* What the forward keeps for the backward. */
    float *input;                               /* M x H: the previous block's output */
    float *qkv_values;                          /* M x 3H */
    float *weights;                             /* B x A x L x L: after softmax */
    float *context;                             /* M x H */
    float *out_sum, *middle;                    /* M x H: before and after the first norm */
    float *up_values, *bent;                    /* M x F: before and after GELU */
    float *down_sum, *output;                   /* M x H: before and after the second norm */
    struct moments *out_moments, *down_moments; /* M */
};

/**
 * The rows to compute with: the first lengths[s] of each sequence s. Three are made for a batch:
 * all of them, the tokens, and only the [CLS] tokens, whose rows alone carry a gradient where
 * nothing mixes tokens any more: in the last block after its attention.
 */
struct region {
    sebp_rows *rows;  /* among M */
    int64_t *lengths; /* B */
};

struct shape {
    int64_t layers, hidden, heads, length, batch, vocabulary, classes;
};

struct batch {
    int64_t sequences; /* B, or less in the last one of a data set */
    int32_t *ids;      /* B x L */
    int64_t *lengths;  /* B: tokens that are not padding */
    int *labels;       /* B */
};

struct model {
    struct shape shape;
    sebp_context *context;
    sebp_status status; /* of the first library call that failed; nothing runs after it */
    int threads;

    struct tensor *tensors;
    int64_t tensor_count, parameter_count;
    struct tensor *token, *position; /* V x H, L x H */
    struct norm after_embedding;
    struct block *blocks;
    struct linear pooler, classifier; /* H -> H, H -> C */

    float *embedding_sum; /* M x H: before the norm; after it: the first block's input */
    struct moments *embedding_moments;
    float *pooled;   /* B x H: after tanh */
    float *logits;   /* B x C */
    float *dlogits;  /* B x C */
    float *dpooled;  /* B x H */
    float *d;        /* M x H: the gradient on its way down through the blocks */
    float *dcontext; /* M x H */
    float *dqkv;     /* M x 3H */
    float *dbent;    /* M x F */
    float *scratch;  /* for each thread: scratch_each */
    int64_t scratch_each;

    struct batch batch;
    struct region everything, tokens, classifying;
    sebp_rows *sequences; /* all B rows, for the two layers on top */
    bool skip_forward, skip_backward;
    double backward_flops; /* of the linear layers, summed over the steps */
};

/** Adds a tensor; its memory comes once all are known. */
static struct tensor *new_tensor(struct model *m, const char *name, int64_t block, const char *part,
                                 int64_t rows, int64_t cols, float fill)
{
    struct tensor *tensor = &m->tensors[m->tensor_count++];
    *tensor = (struct tensor){.name = name,
                              .block = block,
                              .part = part,
                              .rows = rows,
                              .cols = cols,
                              .fill = fill,
                              .decays = isnan(fill)};
    m->parameter_count += (rows * cols + 15) / 16 * 16; /* each begins at a cache line */
    return tensor;
}

static struct linear new_linear(struct model *m, const char *name, int64_t block,
                                int64_t in_features, int64_t out_features)
{
    struct tensor *weight = new_tensor(m, name, block, "weight", out_features, in_features, NAN);
    return (struct linear){weight, new_tensor(m, name, block, "bias", 1, out_features, 0.0f)};
}

static struct norm new_norm(struct model *m, const char *name, int64_t block)
{
    struct tensor *scale = new_tensor(m, name, block, "scale", 1, m->shape.hidden, 1.0f);
    return (struct norm){scale, new_tensor(m, name, block, "shift", 1, m->shape.hidden, 0.0f)};
}

/**
 * Makes a model with room for batches of the shape. What each step writes before it reads comes
 * from a pool of its own, which may be the same.
 */
static int model_create(struct pool *pool, struct pool *activations, sebp_context *context,
                        const struct shape *shape, struct model *m)
{
    const int64_t H = shape->hidden, F = 4 * H, L = shape->length, B = shape->batch, M = B * L;
    enum { TENSORS_OUTSIDE_BLOCKS = 8, TENSORS_IN_BLOCK = 12 };
    *m = (struct model){.shape = *shape, .context = context};
    m->threads = sebp_context_threads(context);
    m->blocks = allocate(pool, shape->layers, sizeof *m->blocks);
    m->tensors = allocate(pool, TENSORS_OUTSIDE_BLOCKS + TENSORS_IN_BLOCK * shape->layers,
                          sizeof *m->tensors);
    if (pool->failed) {
        return complain(FAILED, "out of memory for the model");
    }
    m->token = new_tensor(m, "token", 0, "weight", shape->vocabulary, H, NAN);
    m->position = new_tensor(m, "position", 0, "weight", L, H, NAN);
    m->after_embedding = new_norm(m, "embedding", 0);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct block *block = &m->blocks[i];
        block->qkv = new_linear(m, "qkv", i, H, 3 * H);
        block->out = new_linear(m, "out", i, H, H);
        block->after_out = new_norm(m, "after_out", i);
        block->up = new_linear(m, "up", i, H, F);
        block->down = new_linear(m, "down", i, F, H);
        block->after_down = new_norm(m, "after_down", i);
    }
    m->pooler = new_linear(m, "pooler", 0, H, H);
    m->classifier = new_linear(m, "classifier", 0, H, shape->classes);

    float *flat[4];
    for (int i = 0; i < 4; i++) {
        flat[i] = floats(pool, m->parameter_count);
    }
    int64_t offset = 0;
    for (int64_t i = 0; i < m->tensor_count && !pool->failed; i++) {
        struct tensor *tensor = &m->tensors[i];
        tensor->value = flat[0] + offset;
        tensor->gradient = flat[1] + offset;
        tensor->moment1 = flat[2] + offset;
        tensor->moment2 = flat[3] + offset;
        offset += (tensor->rows * tensor->cols + 15) / 16 * 16;
    }

    m->embedding_sum = floats(activations, M * H);
    m->embedding_moments = allocate(activations, M, sizeof *m->embedding_moments);
    float *input = floats(activations, M * H);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct block *block = &m->blocks[i];
        block->input = input;
        block->qkv_values = floats(activations, M * 3 * H);
        block->weights = floats(activations, B * shape->heads * L * L);
        block->context = floats(activations, M * H);
        block->out_sum = floats(activations, M * H);
        block->middle = floats(activations, M * H);
        block->up_values = floats(activations, M * F);
        block->bent = floats(activations, M * F);
        block->down_sum = floats(activations, M * H);
        block->output = input = floats(activations, M * H);
        block->out_moments = allocate(activations, M, sizeof *block->out_moments);
        block->down_moments = allocate(activations, M, sizeof *block->down_moments);
    }
    m->pooled = floats(activations, B * H);
    m->logits = floats(activations, B * shape->classes);
    m->dlogits = floats(activations, B * shape->classes);
    m->dpooled = floats(activations, B * H);
    m->d = floats(activations, M * H);
    m->dcontext = floats(activations, M * H);
    m->dqkv = floats(activations, M * 3 * H);
    m->dbent = floats(activations, M * F);
    /* Attention: a transposed D x L and scores L x L; layer norm: two rows of H. */
    m->scratch_each = (H / shape->heads * L + L * L + 2 * H + 15) / 16 * 16;
    m->scratch = floats(activations, m->threads * m->scratch_each);

    m->batch.ids = allocate(pool, M, sizeof *m->batch.ids);
    m->batch.labels = allocate(pool, B, sizeof *m->batch.labels);
    m->batch.lengths = allocate(pool, B, sizeof *m->batch.lengths);
    m->tokens.lengths = m->batch.lengths;
    m->everything.lengths = allocate(pool, B, sizeof(int64_t));
    m->classifying.lengths = allocate(pool, B, sizeof(int64_t));
    for (int64_t s = 0; s < B && !pool->failed; s++) {
        m->everything.lengths[s] = L;
        m->classifying.lengths[s] = 1;
    }
    return pool->failed || activations->failed ? complain(FAILED, "out of memory for the model")
                                               : OK;
}

/** The parameters as they are before the first step. */
static void model_initialise(struct model *m, uint64_t seed, float deviation)
{
    uint64_t state = seed;
    for (int64_t i = 0; i < m->tensor_count; i++) {
        struct tensor *tensor = &m->tensors[i];
        int64_t count = tensor->rows * tensor->cols;
        for (int64_t j = 0; j < count; j++) {
            tensor->value[j] =
                isnan(tensor->fill) ? deviation * random_normal(&state) : tensor->fill;
        }
        memset(tensor->gradient, 0, (size_t)count * sizeof(float));
        memset(tensor->moment1, 0, (size_t)count * sizeof(float));
        memset(tensor->moment2, 0, (size_t)count * sizeof(float));
    }
    m->backward_flops = 0.0;
}

static void regions_destroy(struct model *m)
{
    sebp_rows **const sets[] = {&m->everything.rows, &m->tokens.rows, &m->classifying.rows,
                                &m->sequences};
    for (int i = 0; i < 4; i++) {
        sebp_rows_destroy(*sets[i]);
        *sets[i] = NULL;
    }
}

/** Keeps the first failure. */
static void keep_status(struct model *m, sebp_status status)
{
    if (m->status == SEBP_SUCCESS) {
        m->status = status;
    }
}

/** The row sets of the batch: made once, used by every layer. */
static void regions_make(struct model *m)
{
    const struct batch *batch = &m->batch;
    const int64_t B = batch->sequences, L = m->shape.length;
    regions_destroy(m);
    keep_status(m, sebp_rows_all(B, &m->sequences));
    keep_status(m, sebp_rows_all(B * L, &m->everything.rows));
    keep_status(m, sebp_rows_from_lengths(batch->lengths, B, L, &m->tokens.rows));
    keep_status(m, sebp_rows_from_lengths(m->classifying.lengths, B, L, &m->classifying.rows));
}

/** Fills the batch with `count` examples from `order`, or in their own order. */
static void batch_fill(struct model *m, const struct dataset *data, const int64_t *order,
                       int64_t from, int64_t count, int32_t pad)
{
    const int64_t L = m->shape.length;
    m->batch.sequences = count;
    for (int64_t s = 0; s < count; s++) {
        const struct example *example = &data->examples[order != NULL ? order[from + s] : from + s];
        for (int64_t l = 0; l < L; l++) {
            m->batch.ids[s * L + l] = l < example->length ? example->ids[l] : pad;
        }
        m->batch.lengths[s] = example->length;
        m->batch.labels[s] = example->label;
    }
}

/* ============================================================================================== */
/* 6. Forward                                                                                     */
/* ============================================================================================== */

/** y = x W^T + b on some rows; the others of y stay as they are, nothing reads them. */
static void linear_forward(struct model *m, const sebp_rows *rows, sebp_matrix x,
                           const struct linear *linear, sebp_matrix y)
{
    if (m->status != SEBP_SUCCESS) {
        return;
    }
    const struct tensor *weight = linear->weight;
    sebp_matrix w = sebp_matrix_f32(weight->value, weight->rows, weight->cols);
    sebp_matrix b = sebp_matrix_f32(linear->bias->value, 1, weight->rows);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    keep_status(m, sebp_linear_forward(m->context, &x, &w, &b, rows, &options, &y));
}

/** sum += residual; y = norm(sum). sum, residual, y: M x H. */
static void norm_forward(struct model *m, const sebp_rows *rows, float *sum, const float *residual,
                         const struct norm *norm, float *y, struct moments *moments)
{
    const int64_t H = m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        norm_row(sum + r * H, residual + r * H, norm->scale->value, norm->shift->value, y + r * H,
                 &moments[r], H);
    }
}

/** The first block's input: norm(token + position). */
static void embedding_forward(struct model *m, const sebp_rows *rows)
{
    const int64_t H = m->shape.hidden, L = m->shape.length, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    const struct norm *norm = &m->after_embedding;
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        float *sum = m->embedding_sum + r * H;
        memcpy(sum, m->token->value + m->batch.ids[r] * H, (size_t)H * sizeof(float));
        norm_row(sum, m->position->value + r % L * H, norm->scale->value, norm->shift->value,
                 m->blocks[0].input + r * H, &m->embedding_moments[r], H);
    }
}

/** to: columns x count, from: count x columns with rows `stride` apart. */
static void transpose(const float *from, int64_t stride, int64_t count, int64_t columns, float *to)
{
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < columns; j++) {
            to[j * count + i] = from[i * stride + j];
        }
    }
}

/**
 * For each sequence and head, with Q, K, V: L x D slices of qkv:
 *
 *     weights = softmax(Q K^T / sqrt D), padded keys masked        context = weights V
 *
 * for the queries of one region over the keys of another. Dense, every query meets all L keys, as
 * an implementation does that knows of padding only through its mask.
 */
static void attention_forward(struct model *m, struct block *block, const struct region *queries,
                              const struct region *keys)
{
    const int64_t H = m->shape.hidden, A = m->shape.heads, D = H / A, L = m->shape.length;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(m->threads)
    for (int64_t task = 0; task < m->batch.sequences * A; task++) {
        int64_t s = task / A, h = task % A, n = keys->lengths[s];
        const float *q = block->qkv_values + s * L * 3 * H + h * D;
        const float *k = q + H, *v = q + 2 * H;
        float *keys_by_feature = m->scratch + thread_index() * m->scratch_each; /* D x n */
        transpose(k, 3 * H, n, D, keys_by_feature);
        for (int64_t i = 0; i < queries->lengths[s]; i++) {
            float *weights = block->weights + (task * L + i) * L;
            row_times_matrix(q + i * 3 * H, 1, keys_by_feature, n, D, weights, n);
            softmax_row(weights, scale, m->batch.lengths[s], n);
            row_times_matrix(weights, 1, v, 3 * H, n, block->context + (s * L + i) * H + h * D, D);
        }
    }
}

static void gelu_forward(struct model *m, const sebp_rows *rows, const float *x, float *y)
{
    const int64_t F = 4 * m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_row(x + index[i] * F, y + index[i] * F, F);
    }
}

/** The rows of a layer that serve as queries: in the last block only [CLS] is looked at. */
static const struct region *query_region(const struct model *m, int64_t layer, bool skip)
{
    if (!skip) {
        return &m->everything;
    }
    return layer == m->shape.layers - 1 ? &m->classifying : &m->tokens;
}

/** The loss: mean cross-entropy of the batch. Leaves dlogits behind; NaN after a failure. */
static double forward(struct model *m)
{
    const int64_t H = m->shape.hidden, F = 4 * H, L = m->shape.length, C = m->shape.classes;
    const int64_t B = m->batch.sequences, M = B * L;
    regions_make(m);
    const struct region *tokens = m->skip_forward ? &m->tokens : &m->everything;
    if (m->status == SEBP_SUCCESS) {
        embedding_forward(m, tokens->rows);
    }
    for (int64_t i = 0; i < m->shape.layers && m->status == SEBP_SUCCESS; i++) {
        struct block *block = &m->blocks[i];
        const struct region *queries = query_region(m, i, m->skip_forward);
        const sebp_rows *rows = queries->rows;
        linear_forward(m, tokens->rows, sebp_matrix_f32(block->input, M, H), &block->qkv,
                       sebp_matrix_f32(block->qkv_values, M, 3 * H));
        attention_forward(m, block, queries, tokens);
        linear_forward(m, rows, sebp_matrix_f32(block->context, M, H), &block->out,
                       sebp_matrix_f32(block->out_sum, M, H));
        norm_forward(m, rows, block->out_sum, block->input, &block->after_out, block->middle,
                     block->out_moments);
        linear_forward(m, rows, sebp_matrix_f32(block->middle, M, H), &block->up,
                       sebp_matrix_f32(block->up_values, M, F));
        gelu_forward(m, rows, block->up_values, block->bent);
        linear_forward(m, rows, sebp_matrix_f32(block->bent, M, F), &block->down,
                       sebp_matrix_f32(block->down_sum, M, H));
        norm_forward(m, rows, block->down_sum, block->middle, &block->after_down, block->output,
                     block->down_moments);
    }

    /* The rows of [CLS] lie L * H elements apart: a view, not a copy. */
    sebp_matrix first = {m->blocks[m->shape.layers - 1].output, B, H, L * H, SEBP_F32};
    linear_forward(m, NULL, first, &m->pooler, sebp_matrix_f32(m->pooled, B, H));
    for (int64_t i = 0; i < B * H; i++) {
        m->pooled[i] = tanhf(m->pooled[i]);
    }
    linear_forward(m, NULL, sebp_matrix_f32(m->pooled, B, H), &m->classifier,
                   sebp_matrix_f32(m->logits, B, C));
    if (m->status != SEBP_SUCCESS) {
        return (double)NAN;
    }
    double loss = 0.0;
    for (int64_t s = 0; s < B; s++) {
        const float *logits = m->logits + s * C;
        double top = (double)logits[0], sum = 0.0;
        for (int64_t c = 1; c < C; c++) {
            top = (double)logits[c] > top ? (double)logits[c] : top;
        }
        for (int64_t c = 0; c < C; c++) {
            sum += exp((double)logits[c] - top);
        }
        loss += log(sum) + top - (double)logits[m->batch.labels[s]];
        for (int64_t c = 0; c < C; c++) {
            double share = exp((double)logits[c] - top) / sum;
            m->dlogits[s * C + c] = (float)((share - (c == m->batch.labels[s])) / (double)B);
        }
    }
    return loss / (double)B;
}

/* ============================================================================================== */
/* 7. Backward                                                                                    */
/* ============================================================================================== */

/** dW, db, and dx written or added to, from dy on some rows; the other rows of dy count as zero. */
static void linear_backward(struct model *m, const sebp_rows *rows, sebp_matrix dy, sebp_matrix x,
                            const struct linear *linear, sebp_matrix dx, sebp_write write)
{
    if (m->status != SEBP_SUCCESS) {
        return;
    }
    const struct tensor *weight = linear->weight;
    sebp_matrix w = sebp_matrix_f32(weight->value, weight->rows, weight->cols);
    sebp_matrix dw = sebp_matrix_f32(weight->gradient, weight->rows, weight->cols);
    sebp_matrix db = sebp_matrix_f32(linear->bias->gradient, 1, weight->rows);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    options.dx_write = write;
    keep_status(m, sebp_linear_backward(m->context, &dy, &x, &w, rows, &options, &dx, &dw, &db));
    m->backward_flops +=
        4.0 * (double)sebp_rows_count(rows) * (double)weight->rows * (double)weight->cols;
}

/** d, M x H, becomes the gradient of the norm's input, in place. */
static void norm_backward(struct model *m, const sebp_rows *rows, const float *sum,
                          const struct moments *moments, const struct norm *norm, float *d)
{
    const int64_t H = m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int part = 0; part < m->threads; part++) {
        float *dscale = m->scratch + part * m->scratch_each, *dshift = dscale + H;
        memset(dscale, 0, 2 * (size_t)H * sizeof(float));
        for (int64_t i = count * part / m->threads; i < count * (part + 1) / m->threads; i++) {
            int64_t r = index[i];
            norm_backward_row(sum + r * H, moments[r], norm->scale->value, d + r * H, dscale,
                              dshift, H);
        }
    }
    memset(norm->scale->gradient, 0, (size_t)H * sizeof(float));
    memset(norm->shift->gradient, 0, (size_t)H * sizeof(float));
    for (int part = 0; part < m->threads; part++) {
        add_row(norm->scale->gradient, m->scratch + part * m->scratch_each, H);
        add_row(norm->shift->gradient, m->scratch + part * m->scratch_each + H, H);
    }
}

static void gelu_backward(struct model *m, const sebp_rows *rows, const float *x, float *d)
{
    const int64_t F = 4 * m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_backward_row(x + index[i] * F, d + index[i] * F, F);
    }
}

/**
 * With P = weights and S the scores before scaling and softmax:
 *
 *     dP = dcontext V^T      dV = P^T dcontext
 *     dS = softmax'(P, dP)   dQ = dS K             dK = dS^T Q
 *
 * Queries outside their region have no dcontext: they add nothing to dK and dV, and their dQ is
 * zero, which is written as far as the region of the keys goes: dqkv is used on those rows.
 */
static void attention_backward(struct model *m, const struct block *block,
                               const struct region *queries, const struct region *keys)
{
    const int64_t H = m->shape.hidden, A = m->shape.heads, D = H / A, L = m->shape.length;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(m->threads)
    for (int64_t task = 0; task < m->batch.sequences * A; task++) {
        int64_t s = task / A, h = task % A;
        int64_t n = keys->lengths[s], count = queries->lengths[s];
        const float *q = block->qkv_values + s * L * 3 * H + h * D;
        const float *k = q + H, *v = q + 2 * H;
        float *dq = m->dqkv + s * L * 3 * H + h * D, *dk = dq + H, *dv = dq + 2 * H;
        const float *dcontext = m->dcontext + s * L * H + h * D;
        const float *weights = block->weights + task * L * L;
        float *values_by_feature = m->scratch + thread_index() * m->scratch_each; /* D x n */
        float *dscores = values_by_feature + D * L;                               /* count x n */
        transpose(v, 3 * H, n, D, values_by_feature);
        for (int64_t i = 0; i < count; i++) {
            float *row = dscores + i * n;
            row_times_matrix(dcontext + i * H, 1, values_by_feature, n, D, row, n);
            softmax_backward_row(weights + i * L, row, scale, n);
            row_times_matrix(row, 1, k, 3 * H, n, dq + i * 3 * H, D);
        }
        for (int64_t j = 0; j < n; j++) {
            row_times_matrix(dscores + j, n, q, 3 * H, count, dk + j * 3 * H, D);
            row_times_matrix(weights + j, L, dcontext, H, count, dv + j * 3 * H, D);
        }
        for (int64_t i = count; i < n; i++) {
            memset(dq + i * 3 * H, 0, (size_t)D * sizeof(float));
        }
    }
}

/** Adds the rows of d to the gradients of their tokens and positions. Threads share columns. */
static void embedding_backward(struct model *m, const sebp_rows *rows, const float *d)
{
    const int64_t H = m->shape.hidden, L = m->shape.length, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    memset(m->position->gradient, 0, (size_t)(L * H) * sizeof(float));
    PARALLEL_FOR(m->threads)
    for (int part = 0; part < m->threads; part++) {
        int64_t from = H * part / m->threads, columns = H * (part + 1) / m->threads - from;
        for (int64_t i = 0; i < count; i++) {
            int64_t r = index[i];
            const float *row = d + r * H + from;
            add_row(m->token->gradient + m->batch.ids[r] * H + from, row, columns);
            add_row(m->position->gradient + r % L * H + from, row, columns);
        }
    }
}

/** Zeroes the token gradients of the batch, so that the next one can add to them. */
static void embedding_clear(struct model *m)
{
    const int64_t H = m->shape.hidden;
    for (int64_t i = 0; i < m->batch.sequences * m->shape.length; i++) {
        memset(m->token->gradient + m->batch.ids[i] * H, 0, (size_t)H * sizeof(float));
    }
}

/** Every gradient of the batch's loss, from the dlogits that forward() left. */
static void backward(struct model *m)
{
    const int64_t H = m->shape.hidden, F = 4 * H, L = m->shape.length, C = m->shape.classes;
    const int64_t B = m->batch.sequences, M = B * L;
    const struct region *tokens = m->skip_backward ? &m->tokens : &m->everything;

    linear_backward(m, m->sequences, sebp_matrix_f32(m->dlogits, B, C),
                    sebp_matrix_f32(m->pooled, B, H), &m->classifier,
                    sebp_matrix_f32(m->dpooled, B, H), SEBP_OVERWRITE);
    for (int64_t i = 0; i < B * H; i++) {
        m->dpooled[i] *= 1.0f - m->pooled[i] * m->pooled[i];
    }
    if (!m->skip_backward) { /* dense, the rows of d beside [CLS] are read and so must be zero */
        memset(m->d, 0, (size_t)(M * H) * sizeof(float));
    }
    sebp_matrix first = {m->blocks[m->shape.layers - 1].output, B, H, L * H, SEBP_F32};
    sebp_matrix dfirst = {m->d, B, H, L * H, SEBP_F32};
    linear_backward(m, m->sequences, sebp_matrix_f32(m->dpooled, B, H), first, &m->pooler, dfirst,
                    SEBP_OVERWRITE);

    /* d goes down the residual stream: each branch reads it and adds its own gradient to it. */
    sebp_matrix d = sebp_matrix_f32(m->d, M, H);
    sebp_matrix dbent = sebp_matrix_f32(m->dbent, M, F);
    sebp_matrix dcontext = sebp_matrix_f32(m->dcontext, M, H);
    sebp_matrix dqkv = sebp_matrix_f32(m->dqkv, M, 3 * H);
    for (int64_t i = m->shape.layers - 1; i >= 0 && m->status == SEBP_SUCCESS; i--) {
        struct block *block = &m->blocks[i];
        const struct region *queries = query_region(m, i, m->skip_backward);
        const sebp_rows *rows = queries->rows;
        norm_backward(m, rows, block->down_sum, block->down_moments, &block->after_down, m->d);
        linear_backward(m, rows, d, sebp_matrix_f32(block->bent, M, F), &block->down, dbent,
                        SEBP_OVERWRITE);
        gelu_backward(m, rows, block->up_values, m->dbent);
        linear_backward(m, rows, dbent, sebp_matrix_f32(block->middle, M, H), &block->up, d,
                        SEBP_ACCUMULATE);
        norm_backward(m, rows, block->out_sum, block->out_moments, &block->after_out, m->d);
        linear_backward(m, rows, d, sebp_matrix_f32(block->context, M, H), &block->out, dcontext,
                        SEBP_OVERWRITE);
        attention_backward(m, block, queries, tokens);
        if (queries != tokens) { /* attention spreads the gradient from [CLS] to all tokens */
            for (int64_t s = 0; s < B; s++) {
                memset(m->d + (s * L + 1) * H, 0,
                       (size_t)((tokens->lengths[s] - 1) * H) * sizeof(float));
            }
        }
        linear_backward(m, tokens->rows, dqkv, sebp_matrix_f32(block->input, M, H), &block->qkv, d,
                        SEBP_ACCUMULATE);
    }
    if (m->status == SEBP_SUCCESS) {
        norm_backward(m, tokens->rows, m->embedding_sum, m->embedding_moments, &m->after_embedding,
                      m->d);
        embedding_backward(m, tokens->rows, m->d);
    }
}

/* ============================================================================================== */
/* 8. AdamW                                                                                       */
/* ============================================================================================== */

/** One step with decoupled decay: a single pass over parameters, gradients and moments. */
static void optimize(struct model *m, double rate, int64_t step)
{
    enum { PIECE = 1 << 14 };
    double bias1 = 1.0 - pow((double)beta1, (double)step);
    double bias2 = 1.0 - pow((double)beta2, (double)step);
    struct adamw adamw = {(float)(rate / bias1), (float)(1.0 - rate * (double)weight_decay),
                          (float)(1.0 / sqrt(bias2))};
    for (int64_t i = 0; i < m->tensor_count; i++) {
        const struct tensor *t = &m->tensors[i];
        int64_t count = t->rows * t->cols, pieces = (count + PIECE - 1) / PIECE;
        PARALLEL_FOR(m->threads)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t at = piece * PIECE;
            adamw_row(adamw, t->decays ? adamw.keep : 1.0f, t->value + at, t->gradient + at,
                      t->moment1 + at, t->moment2 + at, smaller(PIECE, count - at));
        }
    }
    embedding_clear(m);
}

/** Linear warm-up over the first tenth of the steps, then linear decay to zero. step: from 1. */
static double rate_at(double peak, int64_t step, int64_t steps)
{
    int64_t warm = steps / 10 + 1;
    if (step <= warm) {
        return peak * (double)step / (double)warm;
    }
    return peak * (double)(steps - step + 1) / (double)(steps - warm + 1);
}

/* ============================================================================================== */
/* 9. Training                                                                                    */
/* ============================================================================================== */

/** What one mode's training came to. */
struct run {
    bool done;
    double *losses;                                           /* of each step */
    double *forward_times, *backward_times, *optimizer_times; /* of each step, in seconds */
    double forward, backward, optimizer;                      /* their medians */
    double activity; /* tokens that are not padding, of all rows */
    double flops;    /* of the linear layers' backward, for each step */
    double correct;  /* share of the held-out data */
};

static int compare_doubles(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

/** Sorts the values. The median is not moved by the first steps, which meet cold memory. */
static double median(double *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return 0.5 * (values[(count - 1) / 2] + values[count / 2]);
}

/** A line on standard error: redrawn on a terminal, else every tenth of the way. */
static void show_progress(const char *mode, int64_t step, int64_t steps, double loss, double tokens,
                          double elapsed)
{
    enum { WIDTH = 24 };
    bool terminal = isatty(STDERR_FILENO);
    if (!terminal && step * 10 / steps == (step - 1) * 10 / steps) {
        return;
    }
    char bar[WIDTH + 1] = {0};
    for (int i = 0; i < WIDTH; i++) {
        bar[i] = i < step * WIDTH / steps ? '#' : '.';
    }
    int left = (int)(elapsed / (double)step * (double)(steps - step) + 0.5);
    fprintf(stderr, "%s%-12s [%s] step %lld/%lld  loss %.4f  %.0f tokens/s  %d:%02d left%s",
            terminal ? "\r" : "", mode, bar, (long long)step, (long long)steps, loss,
            tokens / elapsed, left / 60, left % 60, terminal ? "  " : "\n");
    if (terminal && step == steps) {
        fputc('\n', stderr);
    }
}

/** The share of a data set that the model labels right. */
static double evaluate(struct model *m, const struct dataset *data, int32_t pad)
{
    int64_t correct = 0;
    for (int64_t from = 0; from < data->count; from += m->shape.batch) {
        batch_fill(m, data, NULL, from, smaller(m->shape.batch, data->count - from), pad);
        forward(m);
        for (int64_t s = 0; s < m->batch.sequences && m->status == SEBP_SUCCESS; s++) {
            const float *logits = m->logits + s * m->shape.classes;
            int best = 0;
            for (int c = 1; c < m->shape.classes; c++) {
                best = logits[c] > logits[best] ? c : best;
            }
            correct += best == m->batch.labels[s];
        }
    }
    return (double)correct / (double)data->count;
}

static int64_t step_count(const struct options *o, const struct dataset *data)
{
    int64_t steps = (data->count + o->batch - 1) / o->batch * o->epochs;
    return o->steps > 0 ? smaller(o->steps, steps) : steps;
}

static int dump_parameters(const struct model *m, const struct options *o, int64_t steps);
static int dump_batch(const struct model *m, const struct options *o, int64_t step);

/** Trains from the seed in one mode, then measures the accuracy. */
static int train(struct model *m, const struct options *o, enum mode mode,
                 const struct dataset *data, const struct dataset *held_out, int64_t *order,
                 int32_t pad, bool dump, struct run *run)
{
    const int64_t steps = step_count(o, data);
    uint64_t shuffle = (uint64_t)o->seed + 1;
    double tokens = 0.0, rows = 0.0, started = seconds();
    m->skip_forward = mode == SEBP_FORWARD;
    m->skip_backward = mode != DENSE;
    model_initialise(m, (uint64_t)o->seed, 0.02f);
    int status = dump ? dump_parameters(m, o, steps) : OK;
    for (int64_t i = 0; i < data->count; i++) {
        order[i] = i;
    }
    int64_t next = data->count; /* the place in the order: here, the end */
    for (int64_t step = 1; step <= steps && status == OK; step++) {
        if (next == data->count) {
            next = 0;
            for (int64_t i = data->count - 1; i > 0; i--) {
                int64_t j = random_below(&shuffle, i + 1), swapped = order[i];
                order[i] = order[j];
                order[j] = swapped;
            }
        }
        int64_t count = smaller(o->batch, data->count - next);
        batch_fill(m, data, order, next, count, pad);
        next += count;
        if (dump) {
            status = dump_batch(m, o, step);
        }
        double t0 = seconds();
        run->losses[step - 1] = forward(m);
        double t1 = seconds();
        backward(m);
        double t2 = seconds();
        optimize(m, rate_at(o->learning_rate, step, steps), step);
        double t3 = seconds();
        if (m->status != SEBP_SUCCESS) {
            break;
        }
        if (!isfinite(run->losses[step - 1])) {
            return complain(FAILED,
                            "the loss of step %lld in mode %s is not finite (a smaller "
                            "--learning-rate may help)",
                            (long long)step, mode_names[mode]);
        }
        run->forward_times[step - 1] = t1 - t0;
        run->backward_times[step - 1] = t2 - t1;
        run->optimizer_times[step - 1] = t3 - t2;
        tokens += (double)sebp_rows_count(m->tokens.rows);
        rows += (double)sebp_rows_total(m->tokens.rows);
        show_progress(mode_names[mode], step, steps, run->losses[step - 1], tokens,
                      seconds() - started);
    }
    run->forward = median(run->forward_times, steps);
    run->backward = median(run->backward_times, steps);
    run->optimizer = median(run->optimizer_times, steps);
    run->activity = tokens / rows;
    run->flops = m->backward_flops / (double)steps;
    run->correct = evaluate(m, held_out, pad);
    run->done = true;
    if (status == OK && m->status != SEBP_SUCCESS) {
        status = complain(FAILED, "%s: %s", sebp_status_string(m->status),
                          sebp_context_message(m->context));
    }
    return status;
}

/* ============================================================================================== */
/* 10. Gradient check and parameter dump                                                          */
/* ============================================================================================== */

/** Fills the activations with NaN, so that a row which is read but was skipped shows. */
static void poison(struct pool *activations)
{
    for (struct chunk *chunk = activations->chunks; chunk != NULL; chunk = chunk->next) {
        memset(chunk_data(chunk), 0xff, chunk->bytes);
    }
}

/**
 * Compares the gradient of one tensor with central differences of the loss, (f(+h) - f(-h)) / 2h in
 * double precision: along the gradient itself, where the slope is its norm, and along a random
 * direction. `scratch` has room for the tensor.
 *
 * @return the larger of the two differences, over the gradient's norm; NaN for a gradient of zeros.
 */
static double check_tensor(struct model *m, const struct tensor *t, uint64_t *state, float *scratch)
{
    const double h = 2.5e-3;
    const int64_t count = t->rows * t->cols;
    double norm = 0.0, worst = 0.0;
    for (int64_t j = 0; j < count; j++) {
        norm += (double)t->gradient[j] * (double)t->gradient[j];
    }
    norm = sqrt(norm);
    memcpy(scratch, t->value, (size_t)count * sizeof(float));
    for (int direction = 0; direction < 2; direction++) {
        double loss[2], slope = 0.0;
        uint64_t signs = *state;
        for (int side = 0; side < 2; side++) {
            *state = signs; /* the same direction on both sides */
            slope = 0.0;
            for (int64_t j = 0; j < count; j++) {
                double along = (double)t->gradient[j] / norm;
                if (direction == 1 && (random_next(state) & 1) != 0) {
                    along = -along;
                }
                slope += along * (double)t->gradient[j];
                t->value[j] = scratch[j] + (float)(side == 0 ? h * along : -h * along);
            }
            loss[side] = forward(m);
            memcpy(t->value, scratch, (size_t)count * sizeof(float));
        }
        double error = fabs((loss[0] - loss[1]) / (2 * h) - slope) / norm;
        worst = error <= worst ? worst : error; /* a NaN stays */
    }
    return worst;
}

/** Every tensor of a small model in every mode. Prints one line for each mode. */
static int check_gradients(sebp_context *context, int64_t seed)
{
    /* Over 200 seeds the largest error was 1.3e-3, from the rounding of the f32 forward. */
    const double tolerance = 3e-3;
    const struct shape shape = {2, 16, 2, 12, 4, 24, 3};
    const int64_t lengths[] = {12, 5, 2, 7};
    struct pool pool = {0}, activations = {0};
    struct model m;
    int status = model_create(&pool, &activations, context, &shape, &m);
    float *scratch = floats(&pool, m.parameter_count);
    if (status == OK && pool.failed) {
        status = complain(FAILED, "out of memory for the model");
    }
    for (int mode = DENSE; mode < MODES && status == OK; mode++) {
        uint64_t state = (uint64_t)seed;
        int64_t agree = 0;
        double worst = 0.0;
        m.skip_forward = mode == SEBP_FORWARD;
        m.skip_backward = mode != DENSE;
        model_initialise(&m, (uint64_t)seed, 0.3f);
        m.batch.sequences = shape.batch;
        for (int64_t r = 0; r < shape.batch * shape.length; r++) {
            m.batch.ids[r] = (int32_t)random_below(&state, shape.vocabulary);
        }
        for (int64_t s = 0; s < shape.batch; s++) {
            m.batch.lengths[s] = lengths[s];
            m.batch.labels[s] = (int)random_below(&state, shape.classes);
        }
        for (int step = 0; step < 2; step++) { /* the second meets what the first left behind */
            poison(&activations);
            embedding_clear(&m);
            forward(&m);
            backward(&m);
        }
        for (int64_t i = 0; i < m.tensor_count && m.status == SEBP_SUCCESS; i++) {
            double error = check_tensor(&m, &m.tensors[i], &state, scratch);
            agree += error <= tolerance;
            worst = error <= worst ? worst : error;
            if (!(error <= tolerance)) {
                status =
                    complain(FAILED, "%s: the gradient of %s.%lld.%s is off by %.2g of its norm",
                             mode_names[mode], m.tensors[i].name, (long long)m.tensors[i].block,
                             m.tensors[i].part, error);
            }
        }
        printf("%-12s  %lld of %lld tensors agree; largest error %.1e of the gradient's norm\n",
               mode_names[mode], (long long)agree, (long long)m.tensor_count, worst);
    }
    if (m.status != SEBP_SUCCESS) {
        status =
            complain(FAILED, "%s: %s", sebp_status_string(m.status), sebp_context_message(context));
    }
    regions_destroy(&m);
    pool_free(&activations);
    pool_free(&pool);
    return status;
}

/** Opens DIR/name for writing or appending. */
static FILE *dump_open(const struct options *o, const char *name, const char *how)
{
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", o->dump, name);
    return length < (int)sizeof path ? fopen(path, how) : NULL;
}

static int dump_close(const struct options *o, FILE *file)
{
    bool written = file != NULL && !ferror(file);
    if (file != NULL && fclose(file) != 0) {
        written = false;
    }
    return written ? OK : complain(FAILED, "%s: cannot be written", o->dump);
}

/**
 * settings.txt: `name value` lines. tensors.txt: `name.block.part rows cols` in the order in which
 * parameters.f32 holds them, one after the other.
 */
static int dump_parameters(const struct model *m, const struct options *o, int64_t steps)
{
    FILE *settings = dump_open(o, "settings.txt", "w");
    if (settings != NULL) {
        fprintf(settings, "layers %lld\nhidden %lld\nheads %lld\nlength %lld\n",
                (long long)m->shape.layers, (long long)m->shape.hidden, (long long)m->shape.heads,
                (long long)m->shape.length);
        fprintf(settings, "classes %lld\nvocabulary %lld\nsteps %lld\n",
                (long long)m->shape.classes, (long long)m->shape.vocabulary, (long long)steps);
        fprintf(settings, "beta1 %g\nbeta2 %g\nepsilon %g\nweight_decay %g\n", (double)beta1,
                (double)beta2, (double)adamw_epsilon, (double)weight_decay);
        for (int64_t step = 1; step <= steps; step++) {
            fprintf(settings, "rate.%lld %.9g\n", (long long)step,
                    rate_at(o->learning_rate, step, steps));
        }
    }
    FILE *tensors = dump_open(o, "tensors.txt", "w");
    FILE *values = dump_open(o, "parameters.f32", "wb");
    for (int64_t i = 0; i < m->tensor_count && tensors != NULL && values != NULL; i++) {
        const struct tensor *t = &m->tensors[i];
        fprintf(tensors, "%s.%lld.%s %lld %lld\n", t->name, (long long)t->block, t->part,
                (long long)t->rows, (long long)t->cols);
        fwrite(t->value, sizeof(float), (size_t)(t->rows * t->cols), values);
    }
    int closed[] = {dump_close(o, settings), dump_close(o, tensors), dump_close(o, values)};
    return closed[0] != OK ? closed[0] : closed[1] != OK ? closed[1] : closed[2];
}

/** Adds a batch to batches.txt: a line `step label id id ...` for each sentence. */
static int dump_batch(const struct model *m, const struct options *o, int64_t step)
{
    FILE *file = dump_open(o, "batches.txt", step == 1 ? "w" : "a");
    for (int64_t s = 0; s < m->batch.sequences && file != NULL; s++) {
        fprintf(file, "%lld %d", (long long)step, m->batch.labels[s]);
        for (int64_t l = 0; l < m->batch.lengths[s]; l++) {
            fprintf(file, " %d", (int)m->batch.ids[s * m->shape.length + l]);
        }
        fputc('\n', file);
    }
    return dump_close(o, file);
}

/* ============================================================================================== */
/* 11. Report                                                                                     */
/* ============================================================================================== */

struct report {
    const struct options *options;
    int64_t steps;
    double majority; /* share of the most frequent label among the held-out data */
    struct run runs[MODES];
};

/** One row of the table: a number for each mode that ran, times `scale`. */
static void print_row(const struct report *r, const char *label, const char *format,
                      const double values[MODES])
{
    printf("%-38s", label);
    for (int mode = 0; mode < MODES; mode++) {
        if (r->runs[mode].done) {
            char text[32] = "-";
            if (!isnan(values[mode])) {
                snprintf(text, sizeof text, format, values[mode]);
            }
            printf("%14s", text);
        }
    }
    putchar('\n');
}

static void print_table(const struct report *r)
{
    double step[MODES], forward_ms[MODES], backward_ms[MODES], optimizer_ms[MODES];
    double activity[MODES], flops[MODES], faster_backward[MODES], faster_step[MODES];
    double apart[MODES], last[MODES], correct[MODES], majority[MODES];
    const struct run *dense = &r->runs[DENSE];
    printf("%-38s", "");
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        printf("%14s", mode_names[mode]);
        forward_ms[mode] = 1e3 * run->forward;
        backward_ms[mode] = 1e3 * run->backward;
        optimizer_ms[mode] = 1e3 * run->optimizer;
        step[mode] = forward_ms[mode] + backward_ms[mode] + optimizer_ms[mode];
        activity[mode] = 100 * run->activity;
        correct[mode] = 100 * run->correct;
        majority[mode] = 100 * r->majority;
        last[mode] = run->losses[r->steps - 1];
        flops[mode] = faster_backward[mode] = faster_step[mode] = apart[mode] = (double)NAN;
        if (dense->done && mode != DENSE) {
            flops[mode] = 100 * run->flops / dense->flops;
            faster_backward[mode] = dense->backward / run->backward;
            faster_step[mode] = step[DENSE] / step[mode];
            apart[mode] = 0.0;
            for (int64_t i = 0; i < r->steps; i++) {
                double difference = fabs(run->losses[i] - dense->losses[i]);
                apart[mode] = difference > apart[mode] ? difference : apart[mode];
            }
        }
    }
    putchar('\n');
    print_row(r, "time per step, ms (medians)", "%.1f", step);
    print_row(r, "  forward", "%.1f", forward_ms);
    print_row(r, "  backward", "%.1f", backward_ms);
    print_row(r, "  optimizer", "%.1f", optimizer_ms);
    print_row(r, "activity: tokens among padded rows, %", "%.1f", activity);
    print_row(r, "flop of linear backward, % of dense", "%.1f", flops);
    print_row(r, "speedup of backward", "%.2f", faster_backward);
    print_row(r, "speedup of step", "%.2f", faster_step);
    print_row(r, "loss of the last step", "%.4f", last);
    print_row(r, "largest |difference| of losses", "%.1e", apart);
    print_row(r, "held-out accuracy, %", "%.1f", correct);
    print_row(r, "  always the majority class, %", "%.1f", majority);
}

/** step, and the loss of each mode. */
static int write_csv(const struct report *r)
{
    FILE *file = fopen(r->options->csv, "w");
    if (file == NULL) {
        return complain(FAILED, "%s: cannot be written: %s", r->options->csv, strerror(errno));
    }
    fputs("step", file);
    for (int mode = 0; mode < MODES; mode++) {
        if (r->runs[mode].done) {
            fprintf(file, ",%s", mode_names[mode]);
        }
    }
    fputc('\n', file);
    for (int64_t i = 0; i < r->steps; i++) {
        fprintf(file, "%lld", (long long)i + 1);
        for (int mode = 0; mode < MODES; mode++) {
            if (r->runs[mode].done) {
                fprintf(file, ",%.9g", r->runs[mode].losses[i]);
            }
        }
        fputc('\n', file);
    }
    bool written = !ferror(file);
    return fclose(file) == 0 && written
               ? OK
               : complain(FAILED, "%s: cannot be written", r->options->csv);
}

/* The plot: loss curves to the left, a bar of times for each mode to the right. */
enum { PLOT_WIDTH = 940, PLOT_HEIGHT = 400, TOP = 50, BOTTOM = 340, LEFT = 60, MIDDLE = 560 };

static const char *const mode_colors[MODES] = {"#f0a63a", "#1f5fa8", "#2f8f4e"};

static void plot_losses(FILE *file, const struct report *r, double highest)
{
    enum { POINTS = 240 };
    const int64_t points = smaller(POINTS, r->steps);
    for (int i = 0; i <= 4; i++) {
        int y = BOTTOM - (BOTTOM - TOP) * i / 4;
        fprintf(file, "<path d='M%d %dH%d' stroke='#ddd'/>\n", LEFT, y, MIDDLE);
        fprintf(file, "<text x='%d' y='%d' text-anchor='end'>%.2f</text>\n", LEFT - 8, y + 4,
                highest * i / 4);
    }
    for (int i = 0; i <= 4; i++) {
        fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%lld</text>\n",
                LEFT + (MIDDLE - LEFT) * i / 4, BOTTOM + 20, (long long)(r->steps * i / 4));
    }
    fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>step</text>\n", (LEFT + MIDDLE) / 2,
            BOTTOM + 42);
    int legend = LEFT + 10;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        /* Later curves are thinner, as they lie on the earlier ones. */
        fprintf(file, "<polyline fill='none' stroke='%s' stroke-width='%d' points='",
                mode_colors[mode], mode == DENSE ? 5 : 2);
        for (int64_t p = 0; p < points; p++) { /* each point is the mean of its share of steps */
            int64_t from = r->steps * p / points, to = r->steps * (p + 1) / points;
            double sum = 0.0;
            for (int64_t i = from; i < to; i++) {
                sum += run->losses[i];
            }
            fprintf(file, "%.1f,%.1f ", LEFT + (MIDDLE - LEFT) * ((double)p + 0.5) / (double)points,
                    BOTTOM - (BOTTOM - TOP) * sum / (double)(to - from) / highest);
        }
        fprintf(file, "'/>\n<path d='M%d %dh24' stroke='%s' stroke-width='%d'/>\n", legend,
                TOP - 16, mode_colors[mode], mode == DENSE ? 5 : 2);
        fprintf(file, "<text x='%d' y='%d'>loss, %s</text>\n", legend + 30, TOP - 12,
                mode_names[mode]);
        legend += 160;
    }
}

static void plot_times(FILE *file, const struct report *r, double longest)
{
    static const char *const parts[] = {"forward", "backward", "optimizer"};
    static const char *const colors[] = {"#9ec5e8", "#c0504d", "#b8b8b8"};
    const int left = MIDDLE + 70, width = 60;
    int column = 0;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        const double times[] = {run->forward, run->backward, run->optimizer};
        int x = left + column++ * (width + 40);
        double y = BOTTOM;
        for (int part = 0; part < 3; part++) {
            double height = (BOTTOM - TOP) * times[part] / longest;
            y -= height;
            fprintf(file, "<rect x='%d' y='%.1f' width='%d' height='%.1f' fill='%s'/>\n", x, y,
                    width, height, colors[part]);
            if (height > 14) {
                fprintf(file, "<text x='%d' y='%.1f' text-anchor='middle'>%.1f</text>\n",
                        x + width / 2, y + height / 2 + 4, 1e3 * times[part]);
            }
        }
        fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%s</text>\n", x + width / 2,
                BOTTOM + 20, mode_names[mode]);
    }
    for (int part = 0; part < 3; part++) {
        int x = MIDDLE + 60 + part * 100;
        fprintf(file, "<rect x='%d' y='%d' width='12' height='12' fill='%s'/>\n", x, TOP - 22,
                colors[part]);
        fprintf(file, "<text x='%d' y='%d'>%s</text>\n", x + 18, TOP - 12, parts[part]);
    }
    fprintf(file, "<text x='%d' y='%d'>median time per step, ms</text>\n", MIDDLE + 70,
            BOTTOM + 42);
}

static int write_plot(const struct report *r)
{
    double highest = 0.0, longest = 0.0;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        double time = run->forward + run->backward + run->optimizer;
        longest = run->done && time > longest ? time : longest;
        for (int64_t i = 0; i < r->steps && run->done; i++) {
            highest = run->losses[i] > highest ? run->losses[i] : highest;
        }
    }
    FILE *file = fopen(r->options->plot, "w");
    if (file == NULL) {
        return complain(FAILED, "%s: cannot be written: %s", r->options->plot, strerror(errno));
    }
    fprintf(file, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' ", PLOT_WIDTH,
            PLOT_HEIGHT);
    fputs("font-family='sans-serif' font-size='12'>\n", file);
    fprintf(file, "<rect width='%d' height='%d' fill='white'/>\n", PLOT_WIDTH, PLOT_HEIGHT);
    plot_losses(file, r, 1.05 * highest);
    plot_times(file, r, longest);
    fputs("</svg>\n", file);
    bool written = !ferror(file);
    return fclose(file) == 0 && written
               ? OK
               : complain(FAILED, "%s: cannot be written", r->options->plot);
}

/* ============================================================================================== */

/** The text of the experiment: training and held-out data under one vocabulary. */
struct data {
    struct dataset train, held_out;
    struct vocabulary vocabulary;
    int classes;
    double majority;
};

static int load_data(struct pool *pool, const struct options *o, struct data *data)
{
    struct corpus train = {0}, dev = {0};
    int status = read_corpus(pool, o->train, &train);
    if (status == OK && o->dev != NULL) {
        status = read_corpus(pool, o->dev, &dev);
    }
    if (status != OK) {
        return status;
    }
    data->classes = train.classes;
    if (train.classes < 2) {
        return complain(REFUSED, "%s: every label is 0: nothing to learn", o->train);
    }
    for (int64_t i = 0; i < dev.count; i++) {
        if (dev.sentences[i].label >= train.classes) {
            return complain(REFUSED, "%s:%lld: label %d, but the training data has only 0 to %d",
                            o->dev, dev.sentences[i].line, dev.sentences[i].label,
                            train.classes - 1);
        }
    }
    if (o->dev == NULL) {
        if (train.count < 8) {
            return complain(REFUSED, "%s: %lld sentences are too few to hold an eighth out",
                            o->train, (long long)train.count);
        }
        dev = train;
        train.count -= train.count / 8;
        dev.sentences += train.count;
        dev.count -= train.count;
    }
    status = o->vocab != NULL ? vocabulary_read(pool, o->vocab, &data->vocabulary)
                              : vocabulary_build(pool, &train, &data->vocabulary);
    if (status == OK) {
        status =
            encode(pool, &train, 0, train.count, &data->vocabulary, o->max_length, &data->train);
    }
    if (status == OK) {
        status =
            encode(pool, &dev, 0, dev.count, &data->vocabulary, o->max_length, &data->held_out);
    }
    int64_t of_label[MOST_CLASSES] = {0}, most = 0;
    for (int64_t i = 0; i < dev.count; i++) {
        int64_t count = ++of_label[dev.sentences[i].label];
        most = count > most ? count : most;
    }
    data->majority = (double)most / (double)dev.count;
    return status;
}

/** Trains in each mode asked for and reports. */
static int experiment(struct pool *pool, sebp_context *context, const struct options *o,
                      const bool wanted[MODES])
{
    struct data data = {0};
    struct model m = {0};
    int status = load_data(pool, o, &data);
    if (status == OK && o->dump != NULL && mkdir(o->dump, 0777) != 0 && errno != EEXIST) {
        status = complain(REFUSED, "%s: cannot be made: %s", o->dump, strerror(errno));
    }
    if (status == OK) {
        status = check_writable(o->plot);
    }
    if (status == OK && o->csv != NULL) {
        status = check_writable(o->csv);
    }
    if (status != OK) {
        return status;
    }

    struct shape shape = {o->layers,     o->hidden, o->heads,
                          o->max_length, o->batch,  data.vocabulary.count,
                          data.classes};
    struct report report = {o, step_count(o, &data.train), data.majority, {{0}}};
    status = model_create(pool, pool, context, &shape, &m);
    int64_t *order = allocate(pool, data.train.count, sizeof *order);
    for (int mode = 0; mode < MODES; mode++) {
        struct run *run = &report.runs[mode];
        run->losses = allocate(pool, report.steps, sizeof(double));
        run->forward_times = allocate(pool, report.steps, sizeof(double));
        run->backward_times = allocate(pool, report.steps, sizeof(double));
        run->optimizer_times = allocate(pool, report.steps, sizeof(double));
    }
    if (status == OK && pool->failed) {
        status = complain(FAILED, "out of memory for the losses");
    }
    if (status != OK) {
        return status;
    }
    printf(
        "%lld layers, hidden %lld, %lld heads, %lld words, %.1f million parameters; %d threads\n",
        (long long)o->layers, (long long)o->hidden, (long long)o->heads,
        (long long)data.vocabulary.count, 1e-6 * (double)m.parameter_count, m.threads);
    printf("%lld sentences, %lld held out, padded to %lld tokens (%lld longer ones are cut); "
           "%lld steps of %lld\n\n",
           (long long)data.train.count, (long long)data.held_out.count, (long long)o->max_length,
           (long long)(data.train.cut + data.held_out.cut), (long long)report.steps,
           (long long)o->batch);
    fflush(stdout);

    const char *dump = o->dump;
    for (int mode = 0; mode < MODES && status == OK; mode++) {
        if (wanted[mode]) {
            status = train(&m, o, (enum mode)mode, &data.train, &data.held_out, order,
                           data.vocabulary.pad, dump != NULL, &report.runs[mode]);
            dump = NULL; /* every mode begins with the same parameters and batches */
        }
    }
    regions_destroy(&m);
    if (status == OK) {
        print_table(&report);
        status = write_plot(&report);
    }
    if (status == OK && o->csv != NULL) {
        status = write_csv(&report);
    }
    if (status == OK) {
        printf("\nplot: %s\n", o->plot);
    }
    return status;
}

int main(int argc, char **argv)
{
    struct options options = {
        .layers = 2,
        .hidden = 128,
        .heads = 4,
        .max_length = 128,
        .batch = 16,
        .epochs = 5,
        .threads = 0,
        .seed = 1,
        .learning_rate = 5e-4,
        .train = DEFAULT_TRAIN,
        .mode = "both",
        .plot = "finetune_bert.svg",
    };
    bool wanted[MODES];
    int status = parse_options(argc, argv, &options);
    if (status == OK) {
        status = parse_mode(options.mode, wanted);
    }
    if (status != OK || options.help) {
        return status;
    }
    char message[200] = "";
    sebp_context_options context_options = SEBP_CONTEXT_OPTIONS_INIT;
    context_options.threads = (int)options.threads;
    context_options.message = message;
    context_options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status created = sebp_context_create(&context_options, &context);
    if (created != SEBP_SUCCESS) {
        return complain(FAILED, "%s: %s", sebp_status_string(created), message);
    }
    struct pool pool = {0};
    status = options.check_gradients ? check_gradients(context, options.seed)
                                     : experiment(&pool, context, &options, wanted);
    pool_free(&pool);
    sebp_context_destroy(context);
    if (fflush(stdout) != 0 && status == OK) {
        status = complain(FAILED, "standard output: cannot be written");
    }
    return status;
}
