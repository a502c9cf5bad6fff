/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file support.c
 * Messages, memory and random numbers.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/device.h>

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
    void *data;
};

enum { LINE = 64 }; /* bytes in a cache line */

/** Fills a chunk with bytes of one value. */
static bool fill_chunk(const struct pool *pool, const struct chunk *chunk, int value)
{
    if (pool->context == NULL) {
        memset(chunk->data, value, chunk->bytes);
        return true;
    }
    void *bytes = malloc(chunk->bytes + 1);
    if (bytes == NULL) {
        return false;
    }
    memset(bytes, value, chunk->bytes);
    sebp_status status =
        sebp_device_upload(pool->context, chunk->data, bytes, (int64_t)chunk->bytes);
    free(bytes);
    return status == SEBP_SUCCESS;
}

/** A chunk's memory: the host's begins at the first cache line after its head. NULL: there is none. */
static struct chunk *make_chunk(const struct pool *pool, size_t bytes)
{
    struct chunk *chunk = malloc(sizeof *chunk + (pool->context == NULL ? bytes + 2 * LINE : 0));
    if (chunk == NULL) {
        return NULL;
    }
    *chunk = (struct chunk){.next = pool->chunks, .bytes = bytes};
    if (pool->context == NULL) {
        chunk->data = (void *)(((uintptr_t)(chunk + 1) + LINE - 1) / LINE * LINE);
    } else if (sebp_device_alloc(pool->context, (int64_t)bytes, &chunk->data) != SEBP_SUCCESS) {
        free(chunk);
        return NULL;
    }
    return chunk;
}

void *allocate(struct pool *pool, int64_t count, size_t size)
{
    if (pool->failed || count < 0 || (uint64_t)count > (PTRDIFF_MAX - 2 * LINE) / size) {
        pool->failed = true;
        return NULL;
    }
    struct chunk *chunk = make_chunk(pool, (size_t)count * size);
    if (chunk == NULL) {
        pool->failed = true;
        return NULL;
    }
    pool->chunks = chunk;
    pool->failed = !fill_chunk(pool, chunk, 0);
    return chunk->data;
}

void pool_poison(struct pool *pool)
{
    for (struct chunk *chunk = pool->chunks; chunk != NULL; chunk = chunk->next) {
        pool->failed = !fill_chunk(pool, chunk, 0xff) || pool->failed;
    }
}

void pool_free(struct pool *pool)
{
    while (pool->chunks != NULL) {
        struct chunk *chunk = pool->chunks;
        pool->chunks = chunk->next;
        if (pool->context != NULL) {
            sebp_device_free(pool->context, chunk->data);
        }
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
