/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include "failing.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

/* Tests run on one thread, so plain variables will do. */
static int armed;       /* count the library's allocations, and fail one */
static int64_t fail_at; /* which, from 1; 0: none */
int64_t failing_asked_for;

int failing_live_count;

#ifndef SANITIZED

#define LIVE_MOST 4096
static void *live[LIVE_MOST];

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void (*next_free)(void *);

/* dlsym() may itself want memory before it has found any. */
static unsigned char early[8192] __attribute__((aligned(64)));
static size_t early_used;

static void *early_alloc(size_t bytes)
{
    size_t rounded = (bytes + 63) / 64 * 64;
    if (rounded > sizeof early - early_used) {
        return NULL;
    }
    void *data = early + early_used;
    early_used += rounded;
    return data;
}

static int is_early(const void *data)
{
    return (uintptr_t)data >= (uintptr_t)early &&
           (uintptr_t)data < (uintptr_t)(early + sizeof early);
}

static void find_next(void)
{
    static int looking;
    if (looking) {
        return;
    }
    looking = 1;
    /* ISO C has no cast from an object pointer to a function pointer; POSIX has its bits. */
    void *found[] = {dlsym(RTLD_NEXT, "malloc"),         dlsym(RTLD_NEXT, "calloc"),
                     dlsym(RTLD_NEXT, "realloc"),        dlsym(RTLD_NEXT, "aligned_alloc"),
                     dlsym(RTLD_NEXT, "posix_memalign"), dlsym(RTLD_NEXT, "free")};
    memcpy(&next_calloc, &found[1], sizeof found[1]);
    memcpy(&next_realloc, &found[2], sizeof found[2]);
    memcpy(&next_aligned_alloc, &found[3], sizeof found[3]);
    memcpy(&next_posix_memalign, &found[4], sizeof found[4]);
    memcpy(&next_free, &found[5], sizeof found[5]);
    memcpy(&next_malloc, &found[0], sizeof found[0]);
}

/* Whether the code at `caller` is the library's: in its shared object, or in this program where it
 * is linked in. */
static int is_library(const void *caller)
{
    Dl_info library, other;
    return dladdr(caller, &other) != 0 &&
           dladdr((const void *)(uintptr_t)sebp_version, &library) != 0 &&
           other.dli_fbase == library.dli_fbase;
}

/* Whether this allocation is to fail. */
static int fails(const void *caller)
{
    if (!armed || !is_library(caller)) {
        return 0;
    }
    return ++failing_asked_for == fail_at;
}

static void *remember(void *data, const void *caller)
{
    if (armed && data != NULL && is_library(caller) && failing_live_count < LIVE_MOST) {
        live[failing_live_count++] = data;
    }
    return data;
}

static void forget(const void *data)
{
    for (int i = 0; i < failing_live_count; i++) {
        if (live[i] == data) {
            live[i] = live[--failing_live_count];
            return;
        }
    }
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (next_malloc == NULL) {
        return early_alloc(bytes);
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL) : remember(next_malloc(bytes), CALLER);
}

void *calloc(size_t count, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (next_malloc == NULL) {
        return early_alloc(count * bytes); /* fresh, so zero */
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL) : remember(next_calloc(count, bytes), CALLER);
}

void *realloc(void *data, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (fails(CALLER)) {
        errno = ENOMEM;
        return NULL;
    }
    void *moved = next_realloc(data, bytes);
    if (moved != NULL) {
        forget(data);
    }
    return remember(moved, CALLER);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL)
                         : remember(next_aligned_alloc(alignment, bytes), CALLER);
}

int posix_memalign(void **data, size_t alignment, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (fails(CALLER)) {
        return ENOMEM;
    }
    int error = next_posix_memalign(data, alignment, bytes);
    if (error == 0) {
        remember(*data, CALLER);
    }
    return error;
}

void free(void *data)
{
    if (data == NULL || is_early(data)) {
        return;
    }
    if (next_malloc == NULL) {
        find_next();
    }
    forget(data);
    next_free(data);
}

#endif /* SANITIZED */

void failing_arm(int64_t which)
{
    armed = 1;
    fail_at = which;
    failing_asked_for = 0;
}

void failing_disarm(void)
{
    armed = 0;
}

int failing_works(const char *test)
{
    sebp_rows *rows = NULL;
    failing_arm(0);
    ck_assert_int_eq(sebp_rows_all(10, &rows), SEBP_SUCCESS);
    failing_disarm();
    sebp_rows_destroy(rows);
    if (failing_asked_for == 0) {
        testing_skip(test, "malloc is a sanitizer's or valgrind's");
    }
    return failing_asked_for > 0;
}
