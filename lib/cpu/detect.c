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
#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined __x86_64__ && defined __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu.h"

/* The builtins look at the CPU and at the registers that the operating system saves (XCR0). */

#ifdef SEBP_HAVE_AVX2
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if defined(SEBP_HAVE_AVX512) || defined(SEBP_HAVE_AVX512BF16) || defined(SEBP_HAVE_AMX)
static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(SEBP_HAVE_AVX512BF16) || defined(SEBP_HAVE_AMX)
static bool has_avx512bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

/* ---- AMX: three have to agree ---- */

const char *sebp_cpu_amx_refusal(bool is_built, bool saves_tiles, bool (*permits)(void))
{
    if (!is_built)
        return "it is not in this build";
    if (!saves_tiles)
        return "the operating system does not save its tiles";
    return permits() ? NULL : "the kernel refuses permission";
}

#ifdef __x86_64__

enum {
    AMX_BF16 = 1 << 22, /* of leaf 7 in EDX */
    AMX_TILE = 1 << 24,
    OSXSAVE = 1 << 27,        /* of leaf 1 in ECX: XGETBV may be used */
    TILE_STATES = 3 << 17,    /* of XCR0: the configuration and the data of tiles */
    TILE_DATA = 18,           /* number of the latter */
    REQUEST_PERMISSION = 4131 /* ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, which older systems lack */
};

/* What the CPU itself says, bf16 dots of vectors included: the tier has both. */
static bool cpu_has_amx(void)
{
    unsigned a, b, c, d = 0;
    const unsigned both = AMX_TILE | AMX_BF16;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & both) == both;
}

static bool system_saves_tiles(void)
{
    unsigned a, b, c = 0, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & OSXSAVE) == 0)
        return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATES) == TILE_STATES;
}

/* Linux gives the memory that saved tiles take to processes that have asked for it. */
static bool system_permits_tiles(void)
{
#ifdef __linux__
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

#endif

const char *sebp_cpu_amx_refused(void)
{
#ifdef __x86_64__
#ifdef SEBP_HAVE_AMX
    const bool is_built = true;
#else
    const bool is_built = false;
#endif
    if (cpu_has_amx())
        return sebp_cpu_amx_refusal(is_built, system_saves_tiles(), system_permits_tiles);
#endif
    return NULL;
}

#ifdef SEBP_HAVE_AMX
static bool has_amx(void)
{
    return has_avx512bf16() && cpu_has_amx() && sebp_cpu_amx_refused() == NULL;
}
#endif

/* ---- tiers ---- */

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

#if defined(SEBP_HAVE_AMX)
#define AMX &sebp_kernels_amx, has_amx
#else
#define AMX NULL, NULL
#endif

/* In ascending order. No machine has both NEON and AVX, so their order does not matter. */
static const tier tiers[] = {
    {"scalar", &sebp_kernels_scalar, has_scalar},
    {"neon", NEON},
    {"avx2", AVX2},
    {"avx512", AVX512},
    {"avx512bf16", AVX512BF16},
    {"amx", AMX},
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
