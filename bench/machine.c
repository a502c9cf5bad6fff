/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#include "machine.h"

void *allocate(size_t bytes)
{
    void *block = NULL;
    if (posix_memalign(&block, 64, bytes + 1) != 0)
        die(FAILED, "cannot allocate %zu bytes", bytes);
    return block;
}

/* What follows "key" and blanks, a colon among them, on its first line in a file of /proc. */
static int proc_value(const char *file_name, const char *key, char *value, size_t room)
{
    char line[512];
    int found = 0;
    FILE *file = fopen(file_name, "r");
    if (file == NULL)
        return 0;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, key, strlen(key)) != 0)
            continue;
        const char *text = line + strlen(key);
        text += strspn(text, " \t:");
        snprintf(value, room, "%.*s", (int)strcspn(text, "\n"), text);
        found = 1;
    }
    fclose(file);
    return found;
}

static sebp_context *make_context(const options *o, sebp_gemm gemm)
{
    char message[256] = "";
    sebp_context_options wanted = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *context = NULL;
    wanted.device = o->on_gpu ? SEBP_DEVICE_CUDA : SEBP_DEVICE_CPU;
    wanted.threads = o->threads;
    wanted.gemm = gemm;
    wanted.precision = (sebp_precision)(SEBP_PRECISION_HIGHEST + o->precision);
    wanted.message = message;
    wanted.message_bytes = sizeof message;
    sebp_status status = sebp_context_create(&wanted, &context);
    if (status != SEBP_SUCCESS) {
        die(status == SEBP_ERROR_MEMORY || status == SEBP_ERROR_BACKEND ? FAILED : USAGE, "%s",
            message[0] ? message : sebp_status_string(status));
    }
    return context;
}

void open_machine(machine *m, const options *o)
{
    memset(m, 0, sizeof *m);
    m->info.size_bytes = sizeof m->info;
    m->precision = o->precision;
    unsetenv("SEBP_PRECISION"); /* the options have it */
    sebp_context *context = make_context(o, o->gemm);
    sebp_status status = sebp_info_get(context, &m->info);
    if (status != SEBP_SUCCESS)
        die(FAILED, "sebp_info_get: %s", sebp_status_string(status));
    m->on_gpu = o->on_gpu;
    m->gemm = m->info.gemm;
    m->contexts[m->gemm] = context;
    m->threads = sebp_context_threads(context);

    /* The dense reference is the fastest of all, whatever the environment wants measured. */
    unsetenv("SEBP_GEMM");
    if (o->choices && m->contexts[SEBP_GEMM_AUTO] == NULL)
        m->contexts[SEBP_GEMM_AUTO] = make_context(o, SEBP_GEMM_AUTO);
    if (m->contexts[SEBP_GEMM_NATIVE] == NULL)
        m->contexts[SEBP_GEMM_NATIVE] = make_context(o, SEBP_GEMM_NATIVE);
    if (!m->on_gpu && m->info.onednn[0] != '\0' && m->contexts[SEBP_GEMM_ONEDNN] == NULL)
        m->contexts[SEBP_GEMM_ONEDNN] = make_context(o, SEBP_GEMM_ONEDNN);

#ifdef _OPENMP
    m->memory_threads = m->on_gpu ? omp_get_max_threads() : m->threads;
#else
    m->memory_threads = 1;
#endif
    if (!proc_value("/proc/cpuinfo", "model name", m->cpu, sizeof m->cpu))
        strcpy(m->cpu, "unknown CPU");
    if (o->caches & SECOND) {
        m->flush_bytes =
            ((size_t)64 << 20) + 2 * m->info.l3_bytes + 2 * m->info.l2_bytes * (size_t)m->threads;
        m->flush = allocate(m->flush_bytes);
        memset(m->flush, 1, m->flush_bytes);
    }
}

void close_machine(machine *m)
{
    for (int gemm = 0; gemm < 3; gemm++)
        sebp_context_destroy(m->contexts[gemm]);
    free(m->flush);
}

double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

/* Slice t of `bytes`, a multiple of 64 bytes but for the last. */
static void slice(size_t bytes, int t, int threads, size_t *begin, size_t *end)
{
    size_t lines = bytes / 64;
    *begin = lines * (size_t)t / (size_t)threads * 64;
    *end = t + 1 == threads ? bytes : lines * ((size_t)t + 1) / (size_t)threads * 64;
}

/* Moves every cache line to a core, by one word of each: compiled for any CPU, that is as fast as
 * its widest loads. Volatile, as nothing is done with the words. */
void read_memory(const void *memory, size_t bytes, int threads)
{
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        size_t begin, end;
        slice(bytes, t, threads, &begin, &end);
        for (size_t at = begin; at + 64 <= end; at += 64)
            (void)*(const volatile uint64_t *)((const char *)memory + at);
    }
}

void fill_memory(void *memory, size_t bytes, int streaming, int threads)
{
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        size_t begin, end;
        slice(bytes, t, threads, &begin, &end);
#ifdef __SSE2__
        for (; streaming && begin + 16 <= end; begin += 16)
            _mm_stream_si128((__m128i *)(void *)((char *)memory + begin), _mm_setzero_si128());
        _mm_sfence();
#else
        (void)streaming;
#endif
        memset((char *)memory + begin, 0, end - begin);
    }
}

double rounding_of(int precision, int on_gpu)
{
    static const double on_cpus[PRECISIONS] = {0, 0x1p-22, 0x1p-14, 0x1p-6};
    static const double on_gpus[PRECISIONS] = {0, 0, 0x1p-9, 0x1p-9};
    return (on_gpu ? on_gpus : on_cpus)[precision];
}

int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double available_memory(void)
{
    char value[64];
    if (!proc_value("/proc/meminfo", "MemAvailable", value, sizeof value))
        return 0;
    return strtod(value, NULL) * 1024;
}

void print_machine_line(const machine *m)
{
    if (m->on_gpu) {
        printf("sebp-bench %s: %s, CUDA %s, gemm %s, precision %s\n", sebp_version(), m->info.gpu,
               m->info.cuda, gemm_names[m->gemm], precision_names[m->precision]);
        return;
    }
    printf("sebp-bench %s: %s, %d thread%s, %s kernels, gemm %s", sebp_version(), m->cpu,
           m->threads, m->threads == 1 ? "" : "s", sebp_isa(), gemm_names[m->gemm]);
    if (m->precision != HIGHEST)
        printf(", precision %s", precision_names[m->precision]);
    if (m->info.onednn[0] != '\0')
        printf(", oneDNN %s\n", m->info.onednn);
    else
        puts(", without oneDNN");
}
