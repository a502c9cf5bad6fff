/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tools.c
 * Messages, memory, time, random numbers, options and files of the example programs.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tools.h"

int complain(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return status;
}

/* ---- memory ---- */

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

void *allocate(struct pool *pool, int64_t count, size_t size)
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

void pool_poison(struct pool *pool)
{
    for (struct chunk *chunk = pool->chunks; chunk != NULL; chunk = chunk->next) {
        memset(chunk_data(chunk), 0xff, chunk->bytes);
    }
}

void pool_free(struct pool *pool)
{
    while (pool->chunks != NULL) {
        struct chunk *chunk = pool->chunks;
        pool->chunks = chunk->next;
        free(chunk);
    }
    pool->failed = false;
}

float *floats(struct pool *pool, int64_t count)
{
    return allocate(pool, count, sizeof(float));
}

/* ---- numbers ---- */

double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t random_below(uint64_t *state, int64_t bound)
{
    return (int64_t)(random_next(state) % (uint64_t)bound);
}

float random_normal(uint64_t *state)
{
    uint64_t bits = random_next(state);
    uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    return ((float)sum / 65536.0f - 2.0f + 2.0f / 65536.0f) * 1.7320508f;
}

int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int compare_doubles(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

double median(double *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return 0.5 * (values[(count - 1) / 2] + values[count / 2]);
}

/* ---- options ---- */

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

int parse_flags(int argc, char **argv, const struct flag *flags)
{
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
    return OK;
}

void print_flags(const struct flag *flags)
{
    for (const struct flag *flag = flags; flag->name != NULL; flag++) {
        printf("  --%s%s%-*s %s\n", flag->name, *flag->value ? " " : "",
               26 - (int)strlen(flag->name) - (*flag->value ? 1 : 0), flag->value, flag->help);
    }
}

/* ---- files ---- */

int check_writable(const char *path)
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

FILE *report_open(const char *path)
{
    FILE *file = fopen(path, "w");
    if (file == NULL) {
        complain(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    }
    return file;
}

int report_close(FILE *file, const char *path)
{
    bool written = !ferror(file);
    return fclose(file) == 0 && written ? OK : complain(FAILED, "%s: cannot be written", path);
}
