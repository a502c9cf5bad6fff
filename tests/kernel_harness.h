/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file kernel_harness.h
 * What the tests of kernels share: the tiers, and buffers between two forbidden pages, of which all is
 * compared, so that a byte read or written too many shows.
 */
#ifndef SEBP_TESTS_KERNEL_HARNESS_H
#define SEBP_TESTS_KERNEL_HARNESS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "lib/cpu/cpu.h"
#include "simd/simd.h"
#include "testing.h"

/* The tiers that a CPU of this family can have. */
static const struct tier {
    const char *isa;
    const sebp_kernels *kernels; /* NULL: not in this build */
} tiers[] = {
    {"scalar", &sebp_kernels_scalar},
#ifdef __x86_64__
#ifdef SEBP_HAVE_AVX2
    {"avx2", &sebp_kernels_avx2},
#else
    {"avx2", NULL},
#endif
#ifdef SEBP_HAVE_AVX512
    {"avx512", &sebp_kernels_avx512},
#else
    {"avx512", NULL},
#endif
#ifdef SEBP_HAVE_AVX512BF16
    {"avx512bf16", &sebp_kernels_avx512bf16},
#else
    {"avx512bf16", NULL},
#endif
#ifdef SEBP_HAVE_AMX
    {"amx", &sebp_kernels_amx},
#else
    {"amx", NULL},
#endif
#endif
#ifdef __aarch64__
#ifdef SEBP_HAVE_NEON
    {"neon", &sebp_kernels_neon},
#else
    {"neon", NULL},
#endif
#endif
};

enum { TIERS = sizeof tiers / sizeof tiers[0] };

/* The kernels of a tier; NULL, and the test is counted as skipped, where they cannot run. */
static inline const sebp_kernels *kernels_of(int tier, const char *test)
{
    char name[64];
    snprintf(name, sizeof name, "%s/%s", test, tiers[tier].isa);
    if (tiers[tier].kernels == NULL) {
        testing_skip(name, "not in this build");
        return NULL;
    }
    for (int i = 0; sebp_cpu_tier(i) != NULL; i++) {
        if (sebp_cpu_tier(i) == tiers[tier].kernels) {
            return tiers[tier].kernels;
        }
    }
    testing_skip(name, "this machine cannot run it");
    return NULL;
}

/* As ck_assert_msg(), but free where it holds: Check makes a note of every assertion in a file. */
#define check(holds, ...)                                                                          \
    do {                                                                                           \
        if (!(holds)) {                                                                            \
            ck_abort_msg(__VA_ARGS__);                                                             \
        }                                                                                          \
    } while (0)

/* Some bytes between forbidden pages: at the front of the open pages, at their end or in between.
 * All else in the open pages is poison: NaN. */
typedef struct buffer {
    unsigned char *data;
    unsigned char *open;
    size_t open_bytes;
    unsigned char *twin; /* what the open pages must hold at the end; NULL: not looked at */
} buffer;

static inline buffer make(int64_t count, size_t element)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t bytes = (size_t)count * element;
    buffer made = {.open_bytes = (bytes / page + 1) * page};
    unsigned char *map =
        mmap(NULL, made.open_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(map != MAP_FAILED, "no memory");
    made.open = map + page;
    check(mprotect(made.open, made.open_bytes, PROT_READ | PROT_WRITE) == 0, "no memory");
    memset(made.open, TESTING_POISON, made.open_bytes);
    int64_t max = (int64_t)((made.open_bytes - bytes) / element);
    int64_t offsets[] = {0, max, testing_between(0, max)};
    made.data = made.open + (size_t)offsets[testing_between(0, 2)] * element;
    return made;
}

/* A copy of what the buffer holds now: the test writes into it what the kernel should. */
static inline void *twin_of(buffer *made)
{
    made->twin = malloc(made->open_bytes);
    check(made->twin != NULL, "no memory");
    memcpy(made->twin, made->open, made->open_bytes);
    return made->twin + (made->data - made->open);
}

static inline void release(buffer *made)
{
    if (made->twin != NULL) {
        for (size_t i = 0; i < made->open_bytes; i++) {
            check(made->open[i] == made->twin[i], "byte %td is %02x, not %02x",
                  made->open + i - made->data, made->open[i], made->twin[i]);
        }
        free(made->twin);
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    munmap(made->open - page, made->open_bytes + 2 * page);
}

/* The mode that some programs run in: denormals taken for zero. */
static inline void flush_denormals(int on)
{
#if defined __SSE__
    _mm_setcsr(on ? _mm_getcsr() | 0x8040U : _mm_getcsr() & ~0x8040U);
#elif defined __aarch64__
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    fpcr = on ? fpcr | UINT64_C(1) << 24 : fpcr & ~(UINT64_C(1) << 24);
    __asm__ volatile("msr fpcr, %0" : : "r"(fpcr));
#else
    (void)on;
#endif
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline size_t bytes_of(int is_bf16)
{
    return is_bf16 ? sizeof(uint16_t) : sizeof(float);
}

static inline double get(const void *data, int is_bf16, int64_t i)
{
    return is_bf16 ? testing_from_bf16(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}

static inline void put(void *data, int is_bf16, int64_t i, double value)
{
    if (is_bf16) {
        ((uint16_t *)data)[i] = testing_to_bf16((float)value);
    } else {
        ((float *)data)[i] = (float)value;
    }
}

static inline double small_integer(void)
{
    return (double)(testing_between(1, 4) * (testing_chance(0.5) ? 1 : -1));
}

static inline double value_of(int integers)
{
    return integers ? small_integer() : testing_uniform();
}

/* Mostly the short rows in which all the edges are, and now and then a long one. */
static inline int64_t length(void)
{
    return testing_between(0, testing_chance(0.1) ? 3000 : 150);
}

/* A stride of rows of `cols`. */
static inline int64_t strided(int64_t cols)
{
    return cols + (testing_chance(0.3) ? 0 : testing_between(1, 40));
}

/* `count` rows out of `total`, in any order, some of them more than once. */
static inline buffer any_rows(int64_t count, int64_t total)
{
    buffer made = make(count, sizeof(int64_t));
    for (int64_t i = 0; i < count; i++) {
        ((int64_t *)(void *)made.data)[i] = testing_between(0, total - 1);
    }
    return made;
}

/* `count` rows out of `total`, ascending. */
static inline buffer ascending_rows(int64_t count, int64_t total)
{
    buffer made = make(count, sizeof(int64_t));
    int64_t taken = 0;
    for (int64_t row = 0; row < total; row++) {
        if (testing_between(0, total - row - 1) < count - taken) {
            ((int64_t *)(void *)made.data)[taken++] = row;
        }
    }
    return made;
}

#endif
