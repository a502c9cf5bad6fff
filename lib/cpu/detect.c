/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file detect.c
 * Which tiers of kernels this CPU and its operating system can run, and which one is in use.
 *
 * Compiled for the baseline ISA: nothing here may use what it is asking for.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdatomic.h>
#include <string.h>

#include "cpu.h"

/* The builtins look at the CPU and at the registers that the operating system saves (XCR0). */

#ifdef SEBP_HAVE_AVX2
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if defined(SEBP_HAVE_AVX512) || defined(SEBP_HAVE_AVX512BF16)
static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef SEBP_HAVE_AVX512BF16
static bool has_avx512bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

static bool has_scalar(void)
{
    return true;
}

typedef struct tier {
    const char *isa;
    const sebp_kernels *kernels; /* NULL: not in this build */
    bool (*runs)(void);
} tier;

#if defined(SEBP_HAVE_NEON)
#define NEON &sebp_kernels_neon, has_scalar /* every AArch64 has it */
#else
#define NEON NULL, NULL
#endif
#if defined(SEBP_HAVE_AVX2)
#define AVX2 &sebp_kernels_avx2, has_avx2
#else
#define AVX2 NULL, NULL
#endif
#if defined(SEBP_HAVE_AVX512)
#define AVX512 &sebp_kernels_avx512, has_avx512
#else
#define AVX512 NULL, NULL
#endif
#if defined(SEBP_HAVE_AVX512BF16)
#define AVX512BF16 &sebp_kernels_avx512bf16, has_avx512bf16
#else
#define AVX512BF16 NULL, NULL
#endif

/* In ascending order. No machine has both NEON and AVX, so their order does not matter. */
static const tier tiers[] = {
    {"scalar", &sebp_kernels_scalar, has_scalar},
    {"neon", NEON},
    {"avx2", AVX2},
    {"avx512", AVX512},
    {"avx512bf16", AVX512BF16},
};

enum { TIERS = sizeof tiers / sizeof tiers[0] };

static bool is_runnable(const tier *candidate)
{
    return candidate->kernels != NULL && candidate->runs();
}

const sebp_kernels *sebp_cpu_tier(int index)
{
    for (int i = 0; i < TIERS; i++) {
        if (is_runnable(&tiers[i]) && index-- == 0)
            return tiers[i].kernels;
    }
    return NULL;
}

bool sebp_cpu_isa_is_known(const char *isa)
{
    for (int i = 0; i < TIERS; i++) {
        if (strcmp(tiers[i].isa, isa) == 0)
            return true;
    }
    return false;
}

static const sebp_kernels *best(const char *max_isa)
{
    const sebp_kernels *found = &sebp_kernels_scalar;
    for (int i = 0; i < TIERS; i++) {
        if (is_runnable(&tiers[i]))
            found = tiers[i].kernels;
        if (max_isa != NULL && strcmp(tiers[i].isa, max_isa) == 0)
            break;
    }
    return found;
}

/* The table of kernels: NULL until the first context is made, and the same ever after. */
static const sebp_kernels *_Atomic in_use;

const sebp_kernels *sebp_cpu_kernels(const char *max_isa)
{
    const sebp_kernels *expected = NULL;
    const sebp_kernels *wanted = best(max_isa);
    return atomic_compare_exchange_strong(&in_use, &expected, wanted) ? wanted : expected;
}

const sebp_kernels *sebp_cpu_kernels_peek(void)
{
    const sebp_kernels *kernels = atomic_load(&in_use);
    return kernels != NULL ? kernels : best(NULL);
}
