/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file support.c
 * Messages, memory and random numbers.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/support.h"

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

int64_t min_int64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int64_t div_ceil_int64(int64_t whole, int64_t part)
{
    return whole / part + (whole % part != 0);
}
