/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "options.h"

enum { MAX_SIZE = 1000000000 };

const char *const gemm_names[3] = {"auto", "native", "onednn"};
const char *const precision_names[PRECISIONS] = {"highest", "split", "high", "medium"};
const char *const method_names[METHODS] = {"full", "lora", "mask", "meprop", "sparsegrad"};

_Noreturn void die(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fputs("sebp-bench: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(status);
}

static const char usage[] =
    "Usage: sebp-bench [OPTION]...\n"
    "Verify and time the backward of linear layers on their active rows, or training methods.\n"
    "\n"
    "      --shapes FILE         layers, lines of: name M K N [SEQUENCE]\n"
    "      --shape MxK:N         a layer of M rows, K in_features, N out_features; repeatable\n"
    "      --activity LIST       shares of active rows (1,.5,.25,.1,.05,.02)\n"
    "      --pattern WHICH       where they are: tail, scattered, both (tail)\n"
    "      --rows WHICH          given, found or both (both; forward: given)\n"
    "      --sequence L          length of a padded sequence (the file's, or M)\n"
    "      --dtype WHICH         f32, bf16 or both (f32)\n"
    "      --warm, --cold        state of the caches; give both for both (warm)\n"
    "      --forward             time the forward instead\n"
    "      --packed              time each case with W kept packed as well\n"
    "      --attention           time attention at texts of several lengths instead\n"
    "      --layer               time row-wise layers instead\n"
    "      --choices             time the choice of the matrix product instead, beside all\n"
    "      --device WHICH        cpu or cuda, a GPU: calls are timed by the clock, many in a row, "
    "from\n"
    "                            the first until the GPU has done the last (cpu)\n"
    "      --method LIST         compare training methods: full, lora, mask, meprop,\n"
    "                            sparsegrad\n"
    "      --kept SHARE          of a weight's elements, that they train (0.0119)\n"
    "      --basis-rank R        leading vectors of SparseGrad's bases (all)\n"
    "      --fixed-support       SparseGrad chooses its elements once, not in each step\n"
    "      --gemm WHICH          auto, native or onednn (auto)\n"
    "      --precision WHICH     highest, split, high or medium, of products of f32 (highest)\n"
    "      --threads N           (one for each physical core)\n"
    "      --repetitions N       at least so many for each case (7)\n"
    "      --seconds S           and at least so long for each layer (1)\n"
    "      --seed N              of the random numbers (1)\n"
    "      --verify-only         time nothing\n"
    "      --quick               one small layer and few cases, unless said otherwise\n"
    "      --csv                 one comma-separated line for each case\n"
    "      --help, --version\n";

/* A whole number in [1, MAX_SIZE], then the character `end`; *text is left behind both. */
static int parse_size(const char **text, char end, int64_t *value)
{
    char *after;
    long long parsed = strtoll(*text, &after, 10);
    if (after == *text || *after != end || parsed < 1 || parsed > MAX_SIZE)
        return 0;
    *text = after + (end != '\0');
    *value = parsed;
    return 1;
}

/* A number of an option; a whole one if `whole`. */
static double number(const char *name, const char *text, double low, double high, int whole)
{
    char *after;
    double value = strtod(text, &after);
    if (after == text || *after != '\0' || !(value >= low && value <= high) ||
        (whole && value != floor(value))) {
        die(USAGE, "--%s: '%s' is not a %snumber from %.0f to %.0f", name, text,
            whole ? "whole " : "", low, high);
    }
    return value;
}

/* Which of `count` words a value is. */
static int word(const char *name, const char *text, const char *const *words, int count)
{
    for (int i = 0; i < count; i++) {
        if (strcmp(text, words[i]) == 0)
            return i;
    }
    char all[64] = "";
    for (int i = 0; i < count; i++) {
        const char *between = i == 0 ? "" : i + 1 < count ? ", " : " or ";
        size_t used = strlen(all);
        snprintf(all + used, sizeof all - used, "%s%s", between, words[i]);
    }
    die(USAGE, "--%s: '%s' is not %s", name, text, all);
}

static int either(const char *name, const char *text, const char *first, const char *second)
{
    const char *words[] = {first, second, "both"};
    return word(name, text, words, 3) + 1;
}

static void set_activities(options *o, const char *list)
{
    o->activity_count = 0;
    for (const char *at = list;; at++) {
        char *after;
        double value = strtod(at, &after);
        if (after == at || (*after != '\0' && *after != ',') || !(value > 0.0 && value <= 1.0))
            die(USAGE, "--activity: '%s' is not a list of numbers over 0 and up to 1", list);
        if (o->activity_count == MAX_ACTIVITIES)
            die(USAGE, "--activity: more than %d numbers", MAX_ACTIVITIES);
        o->activities[o->activity_count++] = value;
        at = after;
        if (*at == '\0')
            return;
    }
}

static void set_methods(options *o, const char *list)
{
    for (const char *at = list;; at++) {
        size_t length = strcspn(at, ",");
        int method = 0;
        while (method < METHODS && (strlen(method_names[method]) != length ||
                                    strncmp(at, method_names[method], length) != 0)) {
            method++;
        }
        if (method == METHODS) {
            die(USAGE, "--method: '%s' is not a list of %s, %s, %s, %s and %s", list,
                method_names[0], method_names[1], method_names[2], method_names[3],
                method_names[4]);
        }
        o->methods |= 1 << method;
        at += length;
        if (*at == '\0')
            return;
    }
}

static void add_shape(options *o, const shape *added)
{
    o->shapes = realloc(o->shapes, (size_t)(o->shape_count + 1) * sizeof *o->shapes);
    if (o->shapes == NULL)
        die(FAILED, "out of memory");
    o->shapes[o->shape_count++] = *added;
}

static void add_shape_option(options *o, const char *text)
{
    shape s = {"", 0, 0, 0, 0};
    const char *at = text;
    if (!parse_size(&at, 'x', &s.m) || !parse_size(&at, ':', &s.k) || !parse_size(&at, '\0', &s.n))
        die(USAGE, "--shape: '%s' is not MxK:N, each from 1 to %d", text, MAX_SIZE);
    s.sequence = s.m;
    snprintf(s.name, sizeof s.name, "%.*s-%" PRId64, (int)strcspn(text, ":"), text, s.n);
    add_shape(o, &s);
}

/* One line of a file of shapes: name M K N [SEQUENCE], blank, or a # comment. */
static void add_shape_line(options *o, const char *file, int line_number, char *line)
{
    static const char blanks[] = " \t\r\n";
    shape s = {"", 0, 0, 0, 0};
    int64_t *sizes[] = {&s.m, &s.k, &s.n, &s.sequence};
    char *state = NULL;
    line[strcspn(line, "#")] = '\0';
    const char *name = strtok_r(line, blanks, &state);
    if (name == NULL)
        return;
    if (strlen(name) >= sizeof s.name || strpbrk(name, ",\"") != NULL) {
        die(USAGE, "%s:%d: the name '%s' is over %zu characters or holds a comma or a quote", file,
            line_number, name, sizeof s.name - 1);
    }
    strcpy(s.name, name);
    for (int i = 0; i < 4; i++) {
        const char *text = strtok_r(NULL, blanks, &state);
        if (text == NULL && i == 3) {
            s.sequence = s.m;
        } else if (text == NULL) {
            die(USAGE, "%s:%d: a line is: name M K N [SEQUENCE]", file, line_number);
        } else if (!parse_size(&text, '\0', sizes[i])) {
            die(USAGE, "%s:%d: '%s' is not a whole number from 1 to %d", file, line_number, text,
                MAX_SIZE);
        }
    }
    const char *rest = strtok_r(NULL, blanks, &state);
    if (rest != NULL)
        die(USAGE, "%s:%d: '%s' is one word too many", file, line_number, rest);
    if (s.m % s.sequence != 0)
        die(USAGE, "%s:%d: M is not a multiple of SEQUENCE", file, line_number);
    add_shape(o, &s);
}

static void add_shapes(options *o, const char *name)
{
    char line[512];
    int before = o->shape_count;
    FILE *file = fopen(name, "r");
    if (file == NULL)
        die(USAGE, "%s: %s", name, strerror(errno));
    for (int i = 1; fgets(line, sizeof line, file) != NULL; i++) {
        if (strchr(line, '\n') == NULL && !feof(file))
            die(USAGE, "%s:%d: the line is over %zu characters", name, i, sizeof line - 2);
        int marked = i == 1 && strncmp(line, "\xEF\xBB\xBF", 3) == 0; /* a byte order mark */
        add_shape_line(o, name, i, line + (marked ? 3 : 0));
    }
    if (ferror(file))
        die(USAGE, "%s: %s", name, strerror(errno));
    if (o->shape_count == before)
        die(USAGE, "%s: holds no shapes", name);
    fclose(file);
}

static void set_option(options *o, const char *name, const char *value)
{
    static const char *const devices[] = {"cpu", "cuda"};
    if (strcmp(name, "shapes") == 0)
        add_shapes(o, value);
    else if (strcmp(name, "shape") == 0)
        add_shape_option(o, value);
    else if (strcmp(name, "activity") == 0)
        set_activities(o, value);
    else if (strcmp(name, "method") == 0)
        set_methods(o, value);
    else if (strcmp(name, "kept") == 0)
        o->kept = number(name, value, 1e-9, 1, 0);
    else if (strcmp(name, "basis-rank") == 0)
        o->basis_rank = (int64_t)number(name, value, 1, MAX_SIZE, 1);
    else if (strcmp(name, "pattern") == 0)
        o->patterns = either(name, value, "tail", "scattered");
    else if (strcmp(name, "rows") == 0)
        o->sources = either(name, value, "given", "found");
    else if (strcmp(name, "dtype") == 0)
        o->dtypes = either(name, value, "f32", "bf16");
    else if (strcmp(name, "device") == 0)
        o->on_gpu = word(name, value, devices, 2);
    else if (strcmp(name, "gemm") == 0)
        o->gemm = (sebp_gemm)word(name, value, gemm_names, 3);
    else if (strcmp(name, "precision") == 0)
        o->precision = word(name, value, precision_names, PRECISIONS);
    else if (strcmp(name, "sequence") == 0)
        o->sequence = (int64_t)number(name, value, 1, MAX_SIZE, 1);
    else if (strcmp(name, "threads") == 0)
        o->threads = (int)number(name, value, 1, 1024, 1);
    else if (strcmp(name, "repetitions") == 0)
        o->repetitions = (int)number(name, value, 1, MAX_ROUNDS, 1);
    else if (strcmp(name, "seconds") == 0)
        o->seconds = number(name, value, 0, 1e6, 0);
    else if (strcmp(name, "seed") == 0)
        o->seed = (uint64_t)number(name, value, 0, MAX_SIZE, 1);
}

static void parse_arguments(options *o, int argc, char **argv)
{
    int warm = 0, cold = 0, help = 0, version = 0, index, result;
    const struct option known[] = {
        {"shapes", required_argument, NULL, 0},
        {"shape", required_argument, NULL, 0},
        {"activity", required_argument, NULL, 0},
        {"method", required_argument, NULL, 0},
        {"kept", required_argument, NULL, 0},
        {"basis-rank", required_argument, NULL, 0},
        {"pattern", required_argument, NULL, 0},
        {"rows", required_argument, NULL, 0},
        {"device", required_argument, NULL, 0},
        {"dtype", required_argument, NULL, 0},
        {"gemm", required_argument, NULL, 0},
        {"precision", required_argument, NULL, 0},
        {"sequence", required_argument, NULL, 0},
        {"threads", required_argument, NULL, 0},
        {"repetitions", required_argument, NULL, 0},
        {"seconds", required_argument, NULL, 0},
        {"seed", required_argument, NULL, 0},
        {"warm", no_argument, &warm, FIRST},
        {"cold", no_argument, &cold, SECOND},
        {"forward", no_argument, &o->forward, 1},
        {"packed", no_argument, &o->packed, 1},
        {"attention", no_argument, &o->attention, 1},
        {"layer", no_argument, &o->layer, 1},
        {"choices", no_argument, &o->choices, 1},
        {"fixed-support", no_argument, &o->fixed_support, 1},
        {"verify-only", no_argument, &o->verify_only, 1},
        {"quick", no_argument, &o->quick, 1},
        {"csv", no_argument, &o->csv, 1},
        {"help", no_argument, &help, 1},
        {"version", no_argument, &version, 1},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    while ((result = getopt_long(argc, argv, ":", known, &index)) != -1) {
        if (result == ':')
            die(USAGE, "%s needs a value; try --help", argv[optind - 1]);
        if (result == '?')
            die(USAGE, "%s is not an option, or takes no value; try --help", argv[optind - 1]);
        if (known[index].flag == NULL)
            set_option(o, known[index].name, optarg);
    }
    if (optind < argc)
        die(USAGE, "'%s' is not an option; try --help", argv[optind]);
    if (help || version) {
        if (help)
            fputs(usage, stdout);
        else
            printf("sebp-bench %s\n", sebp_version());
        if (fflush(stdout) != 0)
            die(FAILED, "cannot write: %s", strerror(errno));
        exit(0);
    }
    if (o->forward && (o->sources & SECOND))
        die(USAGE, "--rows: the forward is given its rows, it does not find them");
    o->caches = warm | cold;
    if (o->methods != 0 && (o->forward || o->patterns || o->sources || o->caches))
        die(USAGE, "--method goes with neither --forward, --pattern, --rows, --warm nor --cold");
    if (o->attention && (o->methods != 0 || o->forward || o->patterns || o->sources || o->caches ||
                         o->shape_count > 0 || o->activity_count > 0)) {
        die(USAGE,
            "--attention goes with --sequence, --dtype, --threads, --repetitions, --seconds, "
            "--seed, --verify-only, --quick and --csv alone");
    }
    if (o->layer && (o->methods != 0 || o->forward || o->patterns || o->sources || o->caches ||
                     o->shape_count > 0 || o->activity_count > 0 || o->sequence > 0)) {
        die(USAGE, "--layer goes with --dtype, --threads, --repetitions, --seconds, --seed, "
                   "--verify-only, --quick and --csv alone");
    }
    if (o->choices &&
        (o->methods != 0 || o->forward || o->patterns || o->sources || o->caches ||
         o->shape_count > 0 || o->activity_count > 0 || o->sequence > 0 || o->verify_only)) {
        die(USAGE, "--choices goes with --dtype, --precision, --threads, --repetitions, --seconds, "
                   "--seed, --quick and --csv alone");
    }
    if (o->packed && (o->methods != 0 || o->attention || o->layer || o->choices))
        die(USAGE, "--packed goes with neither --method, --attention, --layer nor --choices");
    if (o->on_gpu && (o->methods != 0 || o->attention || o->layer || o->choices || o->packed ||
                      o->caches != 0 || o->threads != 0)) {
        die(USAGE, "--device cuda goes with neither --method, --attention, --layer, --choices, "
                   "--packed, --warm, --cold nor --threads");
    }
    if (o->methods == 0 && (o->kept > 0 || o->basis_rank > 0 || o->fixed_support))
        die(USAGE, "--kept, --basis-rank and --fixed-support need --method");
}

static void add_default_shapes(options *o)
{
    static const char *const folders[] = {SEBP_PKGDATADIR, "../bench", "bench"};
    const char *file = o->methods != 0 ? "mlp-shapes.txt" : "shapes.txt";
    for (size_t i = 0; i < sizeof folders / sizeof *folders && o->shape_count == 0; i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s/%s", folders[i], file);
        if (access(name, R_OK) == 0)
            add_shapes(o, name);
    }
    if (o->shape_count == 0)
        die(USAGE, "no %s/%s: use --shapes FILE or --shape MxK:N", folders[0], file);
}

/* Fills in what was not asked for. */
static void complete_options(options *o)
{
    if (o->dtypes == 0)
        o->dtypes = FIRST;
    if (o->layer || o->attention || o->choices)
        return;
    if (o->shape_count == 0 && o->quick)
        add_shape(o, &(shape){"quick", 512, 192, 320, 64});
    if (o->shape_count == 0)
        add_default_shapes(o);
    if (o->activity_count == 0 && o->methods != 0)
        set_activities(o, o->quick ? ".25" : "1,.2");
    if (o->activity_count == 0)
        set_activities(o, o->quick ? "1,.25,.05" : "1,.5,.25,.1,.05,.02");
    if (o->kept == 0)
        o->kept = 0.0119;
    if (o->patterns == 0)
        o->patterns = o->quick ? BOTH : FIRST;
    if (o->sources == 0)
        o->sources = o->forward ? FIRST : BOTH;
    if (o->caches == 0)
        o->caches = FIRST;
    for (int i = 0; i < o->shape_count && o->sequence > 0; i++) {
        if (o->shapes[i].m % o->sequence != 0) {
            die(USAGE, "--sequence: the %" PRId64 " rows of %s are not a multiple of %" PRId64,
                o->shapes[i].m, o->shapes[i].name, o->sequence);
        }
        o->shapes[i].sequence = o->sequence;
    }
}

void parse_options(options *o, int argc, char **argv)
{
    memset(o, 0, sizeof *o);
    o->gemm = SEBP_GEMM_AUTO;
    const char *precision = getenv("SEBP_PRECISION");
    if (precision != NULL && precision[0] != '\0')
        o->precision = word("precision", precision, precision_names, PRECISIONS);
    o->repetitions = 7;
    o->seconds = 1;
    o->seed = 1;
    parse_arguments(o, argc, argv);
    complete_options(o);
}

void free_options(options *o)
{
    free(o->shapes);
}
