/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file struct.c
 * Structs that grow: those of programs which were built with an older or a later header.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdio.h>
#include <string.h>

#include "internal.h"

/* A page. A size beyond it is an error, and that much memory may not be there to be read. */
enum { MAX_BYTES = 4096 };

static size_t size_of(const void *given)
{
    size_t bytes;
    memcpy(&bytes, given, sizeof bytes);
    return bytes;
}

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

sebp_status sebp_take_struct(const void *given, size_t first_bytes, void *taken, size_t bytes,
                             char why[SEBP_WHY_BYTES])
{
    const unsigned char *tail = given;
    const size_t given_bytes = size_of(given);
    if (given_bytes < first_bytes || given_bytes > MAX_BYTES) {
        snprintf(why, SEBP_WHY_BYTES, "size_bytes is %zu, not %zu to %d", given_bytes, first_bytes,
                 MAX_BYTES);
        return SEBP_ERROR_SIZE;
    }
    memcpy(taken, given, min_size(given_bytes, bytes));
    memcpy(taken, &bytes, sizeof bytes);
    for (size_t i = bytes; i < given_bytes; i++) {
        if (tail[i] != 0) {
            snprintf(why, SEBP_WHY_BYTES,
                     "size_bytes is %zu, and byte %zu asks for what a later version knows",
                     given_bytes, i);
            return SEBP_ERROR_SIZE;
        }
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_give_struct(const void *made, size_t bytes, size_t first_bytes, void *given)
{
    const size_t given_bytes = size_of(given);
    if (given_bytes < first_bytes || given_bytes > MAX_BYTES)
        return SEBP_ERROR_SIZE;
    memset(given, 0, given_bytes);
    memcpy(given, made, min_size(given_bytes, bytes));
    memcpy(given, &given_bytes, sizeof given_bytes);
    return SEBP_SUCCESS;
}
