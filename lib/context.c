/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file context.c
 * Makes a context from options and the environment, which is read here and nowhere else.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"
#include "cpu/cpu.h"
#ifdef SEBP_HAVE_CUDA
#include "cuda/cuda.h"
#endif

static const int64_t DEFAULT_WORKSPACE = INT64_C(64) << 20;
static const int64_t MIN_WORKSPACE = INT64_C(1) << 20;

sebp_status sebp_fail(sebp_context *context, sebp_status status, const char *format, ...)
{
    if (context != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(context->message, sizeof context->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

static bool goes_on(char c) /* whether it continues a character of UTF-8 */
{
    return ((unsigned char)c & 0xC0) == 0x80;
}

/* Writes one line: `before`, the caller's `text`, `after`. A text that is too long loses its
 * middle, and a control character, which would break the line, becomes a question mark. */
static void write_line(char *line, size_t room, const char *before, const char *text,
                       const char *after)
{
    static const char gap[] = "...";
    const size_t rest = strlen(before) + strlen(after) + 1, length = strlen(text);
    size_t max = room > rest ? room - rest : 0, head = length, tail = 0;
    bool cut = length > max;
    if (cut) {
        max = max > sizeof gap - 1 ? max - (sizeof gap - 1) : 0;
        head = max / 3; /* the end of a path says more than its beginning */
        tail = max - head;
        while (head > 0 && goes_on(text[head]))
            head--;
        while (tail > 0 && goes_on(text[length - tail]))
            tail--;
    }
    snprintf(line, room, "%s%.*s%s%s%s", before, (int)head, text, cut ? gap : "",
             text + length - tail, after);
    for (char *c = line; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ' || *c == 127)
            *c = '?';
    }
}

sebp_status sebp_fail_about(sebp_context *context, sebp_status status, const char *function,
                            const char *text, const char *reason, ...)
{
    char before[64], after[160];
    va_list arguments;
    va_start(arguments, reason);
    vsnprintf(after, sizeof after, reason, arguments);
    va_end(arguments);
    snprintf(before, sizeof before, "%s: ", function);
    write_line(context->message, sizeof context->message, before, text, after);
    return status;
}

double sebp_milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

/* Writes the line about a failed creation where the caller wants it, and returns `status`. */
__attribute__((format(printf, 3, 4))) static sebp_status
refuse(const sebp_context_options *options, sebp_status status, const char *format, ...)
{
    if (options->message != NULL && options->message_bytes > 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(options->message, options->message_bytes, format, arguments);
        va_end(arguments);
    }
    return status;
}

/* Refuses the value of an environment variable. */
static sebp_status refuse_variable(const sebp_context_options *options, const char *name,
                                   const char *value, const char *allowed)
{
    char before[64], after[96];
    snprintf(before, sizeof before, "sebp_context_create: %s is \"", name);
    snprintf(after, sizeof after, "\", not %s", allowed);
    if (options->message != NULL && options->message_bytes > 0)
        write_line(options->message, options->message_bytes, before, value, after);
    return SEBP_ERROR_ENVIRONMENT;
}

static sebp_status check_options(const sebp_context_options *options)
{
    if (options->threads < 0 || options->threads > SEBP_MAX_THREADS) {
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: threads is %d, not 0 to %d",
                      options->threads, SEBP_MAX_THREADS);
    }
    if ((int)options->placement < SEBP_PLACEMENT_NONE ||
        (int)options->placement > SEBP_PLACEMENT_SPREAD) {
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: unknown placement %d",
                      (int)options->placement);
    }
    if ((int)options->gemm < SEBP_GEMM_AUTO || (int)options->gemm > SEBP_GEMM_ONEDNN) {
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: unknown gemm %d",
                      (int)options->gemm);
    }
    if ((int)options->precision < SEBP_PRECISION_DEFAULT ||
        (int)options->precision > SEBP_PRECISION_MEDIUM) {
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: unknown precision %d",
                      (int)options->precision);
    }
    if (options->workspace_bytes != 0 && options->workspace_bytes < MIN_WORKSPACE) {
        return refuse(options, SEBP_ERROR_VALUE,
                      "sebp_context_create: workspace_bytes is %" PRId64
                      ", not 0 or at least %" PRId64,
                      options->workspace_bytes, MIN_WORKSPACE);
    }
    if (options->device != SEBP_DEVICE_CPU && options->device != SEBP_DEVICE_CUDA) {
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: unknown device %d",
                      (int)options->device);
    }
    if (options->gpu < 0)
        return refuse(options, SEBP_ERROR_VALUE, "sebp_context_create: gpu is %d", options->gpu);
    return SEBP_SUCCESS;
}

/* A variable's value; NULL where it is unset or empty. */
static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value != NULL && value[0] != '\0' ? value : NULL;
}

/* A whole number from 1 to SEBP_MAX_THREADS in `text` up to a character of `ends` or its end; 0:
 * none.
 */
static int parse_threads(const char *text, const char *ends)
{
    int number = 0;
    for (; *text >= '0' && *text <= '9' && number <= SEBP_MAX_THREADS; text++)
        number = 10 * number + (*text - '0');
    bool ended = *text == '\0' || strchr(ends, *text) != NULL;
    return ended && number <= SEBP_MAX_THREADS ? number : 0;
}

/* The index of a variable's value among `values`, NULL after the last; -1 where it is unset. */
static sebp_status read_choice(const sebp_context_options *options, const char *name,
                               const char *const *values, int *choice)
{
    const char *value = variable(name);
    *choice = -1;
    if (value == NULL)
        return SEBP_SUCCESS;
    for (int i = 0; values[i] != NULL; i++) {
        if (strcmp(value, values[i]) == 0) {
            *choice = i;
            return SEBP_SUCCESS;
        }
    }
    char allowed[64] = "";
    for (int i = 0, used = 0; values[i] != NULL; i++) {
        const char *before = i == 0 ? "" : values[i + 1] != NULL ? ", " : " or ";
        used += snprintf(allowed + used, sizeof allowed - (size_t)used, "%s%s", before, values[i]);
    }
    return refuse_variable(options, name, value, allowed);
}

/* Lets the environment overrule the options, and reads its other settings. */
static sebp_status read_environment(sebp_context_options *options,
                                    sebp_cpu_environment *environment, bool *verbose)
{
    static const char *const placements[] = {"none", "compact", "spread", NULL};
    static const char *const gemms[] = {"auto", "native", "onednn", NULL};
    static const char *const switches[] = {"0", "1", NULL};
    static const char *const precisions[] = {"highest", "split", "high", "medium", NULL};
    static const char *const affinity[] = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
                                           "KMP_AFFINITY"};
    int choice;
    sebp_status status;

    const char *threads = variable("SEBP_NUM_THREADS");
    if (threads != NULL) {
        options->threads = parse_threads(threads, "");
        if (options->threads == 0) {
            char allowed[32];
            snprintf(allowed, sizeof allowed, "1 to %d", SEBP_MAX_THREADS);
            return refuse_variable(options, "SEBP_NUM_THREADS", threads, allowed);
        }
    }
    if ((status = read_choice(options, "SEBP_PLACEMENT", placements, &choice)) != SEBP_SUCCESS)
        return status;
    if (choice >= 0)
        options->placement = (sebp_placement)choice;
    if ((status = read_choice(options, "SEBP_GEMM", gemms, &choice)) != SEBP_SUCCESS)
        return status;
    if (choice >= 0)
        options->gemm = (sebp_gemm)choice;
    if ((status = read_choice(options, "SEBP_PRECISION", precisions, &choice)) != SEBP_SUCCESS)
        return status;
    if (choice >= 0)
        options->precision = (sebp_precision)(SEBP_PRECISION_HIGHEST + choice);
    if ((status = read_choice(options, "SEBP_VERBOSE", switches, &choice)) != SEBP_SUCCESS)
        return status;
    *verbose = choice == 1;

    environment->max_isa = variable("SEBP_MAX_ISA");
    if (environment->max_isa != NULL && !sebp_cpu_isa_is_known(environment->max_isa)) {
        return refuse_variable(options, "SEBP_MAX_ISA", environment->max_isa,
                               "scalar, neon, avx2, avx512, avx512bf16 or amx");
    }
    /* The variable is OpenMP's, so no value of it is an error. It may be a list with a number for
     * each level. */
    const char *omp_threads = variable("OMP_NUM_THREADS");
    environment->omp_threads = omp_threads != NULL ? parse_threads(omp_threads, ", ") : 0;
    environment->affinity_variable = NULL;
    for (size_t i = 0; i < sizeof affinity / sizeof affinity[0]; i++) {
        if (variable(affinity[i]) != NULL) {
            environment->affinity_variable = affinity[i];
            break;
        }
    }
    return SEBP_SUCCESS;
}

static sebp_status check_build(const sebp_context_options *options)
{
#ifndef SEBP_HAVE_CUDA
    if (options->device == SEBP_DEVICE_CUDA) {
        return refuse(options, SEBP_ERROR_UNSUPPORTED,
                      "sebp_context_create: this build has no CUDA (configure --with-cuda)");
    }
#endif
    if (options->device == SEBP_DEVICE_CUDA && options->gemm == SEBP_GEMM_ONEDNN) {
        return refuse(options, SEBP_ERROR_UNSUPPORTED, "sebp_context_create: oneDNN is for CPUs");
    }
    if (options->device == SEBP_DEVICE_CUDA && options->placement != SEBP_PLACEMENT_NONE) {
        return refuse(options, SEBP_ERROR_UNSUPPORTED,
                      "sebp_context_create: a GPU's context has no threads to place");
    }
#ifndef SEBP_HAVE_ONEDNN
    if (options->gemm == SEBP_GEMM_ONEDNN) {
        return refuse(options, SEBP_ERROR_UNSUPPORTED,
                      "sebp_context_create: this build has no oneDNN");
    }
#endif
    if (options->placement != SEBP_PLACEMENT_NONE && !sebp_topology_can_place()) {
        return refuse(options, SEBP_ERROR_UNSUPPORTED,
                      "sebp_context_create: this build cannot place threads, as it has no hwloc");
    }
    return SEBP_SUCCESS;
}

/* A context on CPUs. */
static sebp_status make_cpu_context(const sebp_context_options *options,
                                    const sebp_cpu_environment *environment, bool verbose,
                                    sebp_context **context)
{
    sebp_cpu *cpu;
    sebp_status status = sebp_cpu_create(options, environment, &cpu);
    if (status == SEBP_SUCCESS) {
        status = sebp_context_make(&sebp_cpu_backend, cpu, verbose, context);
        if (status != SEBP_SUCCESS)
            sebp_cpu_backend.destroy(cpu);
    }
    if (status == SEBP_SUCCESS)
        return status;
    return refuse(options, status, "sebp_context_create: %s",
                  status == SEBP_ERROR_BACKEND ? "hwloc failed" : sebp_status_string(status));
}

#ifdef SEBP_HAVE_CUDA
static sebp_status make_gpu_context(const sebp_context_options *options, bool verbose,
                                    sebp_context **context)
{
    sebp_cuda *cuda;
    char why[SEBP_WHY_BYTES] = "";
    sebp_status status = sebp_cuda_create(options, &cuda, why);
    if (status == SEBP_SUCCESS) {
        status = sebp_context_make(&sebp_cuda_backend, cuda, verbose, context);
        if (status != SEBP_SUCCESS)
            sebp_cuda_backend.destroy(cuda);
    }
    if (status == SEBP_SUCCESS)
        return status;
    return refuse(options, status, "sebp_context_create: %s",
                  why[0] != '\0' ? why : sebp_status_string(status));
}
#endif

sebp_status sebp_context_create(const sebp_context_options *given, sebp_context **context)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_context_options, message_bytes) };
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_cpu_environment environment = {0};
    bool verbose = false;
    char why[SEBP_WHY_BYTES];
    sebp_status status = given != NULL
                             ? sebp_take_struct(given, BYTES_0_1_0, &options, sizeof options, why)
                             : SEBP_SUCCESS;
    if (context == NULL)
        return refuse(&options, SEBP_ERROR_NULL, "sebp_context_create: context is NULL");
    if (status != SEBP_SUCCESS)
        return refuse(&options, status, "sebp_context_create: %s", why);
    status = check_options(&options);
    if (status == SEBP_SUCCESS)
        status = read_environment(&options, &environment, &verbose);
    if (status == SEBP_SUCCESS)
        status = check_build(&options);
    if (status != SEBP_SUCCESS)
        return status;
    if (options.workspace_bytes == 0)
        options.workspace_bytes = DEFAULT_WORKSPACE;
#ifdef SEBP_HAVE_CUDA
    if (options.device == SEBP_DEVICE_CUDA)
        status = make_gpu_context(&options, verbose, context);
    else
#endif
        status = make_cpu_context(&options, &environment, verbose, context);
    if (status == SEBP_SUCCESS)
        (*context)->precision = options.precision;
    return status;
}

sebp_status sebp_context_make(const sebp_backend *backend, void *state, bool verbose,
                              sebp_context **context)
{
    sebp_context *made = calloc(1, sizeof *made);
    sebp_device *device = calloc(1, sizeof *device);
    if (made == NULL || device == NULL) {
        free(made);
        free(device);
        return SEBP_ERROR_MEMORY;
    }
    *device = (sebp_device){.backend = backend, .state = state, .holders = 1};
    made->device = device;
    made->verbose = verbose;
    *context = made;
    return SEBP_SUCCESS;
}

void sebp_context_destroy(sebp_context *context)
{
    if (context != NULL) {
        sebp_device_release(context->device);
        free(context);
    }
}

int sebp_context_threads(const sebp_context *context)
{
    /* Only CPUs have threads, so no table of operations counts them. */
    bool is_cpu = context != NULL && context->device->backend == &sebp_cpu_backend;
    return is_cpu ? sebp_cpu_threads(context->device->state) : context != NULL;
}

int64_t sebp_context_scratch_bytes(const sebp_context *context)
{
    return context != NULL ? context->device->backend->scratch_bytes(context->device->state) : 0;
}

const char *sebp_context_message(const sebp_context *context)
{
    return context != NULL ? context->message : "";
}
