/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file device.c
 * CPUs as a device: made and unmade, its memory, scratch memory, and what there is to know of it.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "operations.h"

enum {
    ALIGNMENT = 64,
    ASSUMED_CACHE = 4 << 20 /* where the L3 cache is not known */
};

/* ---- making and unmaking ---- */

/* The number of threads that the options ask for, else the environment, else the machine. */
static int wanted_threads(const sebp_context_options *options,
                          const sebp_cpu_environment *environment, const sebp_topology *topology)
{
    if (options->threads > 0)
        return options->threads;
    if (environment->omp_threads > 0)
        return environment->omp_threads;
    return (int)sebp_min(sebp_topology_default_threads(topology), SEBP_MAX_THREADS);
}

/* A pool of the host's has as many threads as are wanted. OpenMP has no more than OMP_THREAD_LIMIT,
 * and one in a child process that has lost OpenMP's threads. */
static int count_threads(const sebp_context_options *options,
                         const sebp_cpu_environment *environment, const sebp_topology *topology)
{
    int threads = wanted_threads(options, environment, topology);
    if (options->parallel_for != NULL)
        return threads;
#ifdef _OPENMP
    if (sebp_cpu_openmp_is_lost())
        return 1;
    return (int)sebp_max(sebp_min(threads, omp_get_thread_limit()), 1);
#else
    return 1;
#endif
}

sebp_status sebp_cpu_create(const sebp_context_options *options,
                            const sebp_cpu_environment *environment, sebp_cpu **made)
{
    sebp_cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL)
        return SEBP_ERROR_MEMORY;
    sebp_topology_read(&cpu->topology);
    cpu->threads = count_threads(options, environment, &cpu->topology);
    cpu->gemm = options->gemm;
    cpu->placement = options->placement;
    cpu->parallel_for = options->parallel_for;
    cpu->pool = options->pool;
    cpu->forks = sebp_cpu_forks();
    cpu->workspace_bytes = options->workspace_bytes;
    if (cpu->placement != SEBP_PLACEMENT_NONE) {
        cpu->placement_refused =
            cpu->parallel_for != NULL ? "parallel_for" : environment->affinity_variable;
        sebp_status status = cpu->placement_refused == NULL ? sebp_cpu_bind(cpu) : SEBP_SUCCESS;
        if (status != SEBP_SUCCESS) {
            free(cpu);
            return status;
        }
    }
    cpu->kernels = sebp_cpu_kernels(environment->max_isa);
    sebp_status status = sebp_cpu_measure(cpu->kernels, &cpu->rates);
    if (status != SEBP_SUCCESS) {
        sebp_cpu_destroy(cpu);
        return status;
    }
    *made = cpu;
    return SEBP_SUCCESS;
}

void sebp_cpu_destroy(void *device)
{
    sebp_cpu *cpu = device;
    sebp_cpu_unbind(cpu);
    free(cpu->scratch);
    free(cpu);
}

/* ---- memory: the host's own ---- */

sebp_status sebp_cpu_alloc(void *device, int64_t bytes, void **memory)
{
    (void)device;
    return posix_memalign(memory, ALIGNMENT, (size_t)sebp_max(bytes, 1)) == 0 ? SEBP_SUCCESS
                                                                              : SEBP_ERROR_MEMORY;
}

void sebp_cpu_free(void *device, void *memory)
{
    (void)device;
    free(memory);
}

sebp_status sebp_cpu_copy(void *device, void *to, const void *from, int64_t bytes)
{
    (void)device;
    if (bytes > 0)
        memcpy(to, from, (size_t)bytes);
    return SEBP_SUCCESS;
}

sebp_status sebp_cpu_synchronize(void *device)
{
    (void)device; /* each operation is done when it returns */
    return SEBP_SUCCESS;
}

void sebp_cpu_let_overlap(void *device, bool overlap)
{
    (void)device; /* each operation has all threads */
    (void)overlap;
}

bool sebp_cpu_owns(void *device, const void *memory)
{
    (void)device;
    (void)memory;
    return true;
}

const char *sebp_cpu_why(const void *device)
{
    (void)device; /* a product that fails says it in its plan's path */
    return "";
}

/* ---- scratch memory ---- */

void *sebp_cpu_scratch(sebp_cpu *cpu, int64_t bytes)
{
    bytes += cpu->reserved_bytes;
    if (bytes > cpu->workspace_bytes)
        return NULL;
    if (bytes > cpu->scratch_bytes || cpu->scratch == NULL) {
        if (cpu->scratch_is_settled)
            return NULL; /* a method that runs has something there */
        bytes =
            sebp_min(sebp_max(sebp_round_up(bytes, ALIGNMENT), ALIGNMENT), cpu->workspace_bytes);
        free(cpu->scratch); /* before the new memory is allocated, so that the two never add up */
        cpu->scratch = NULL;
        cpu->scratch_bytes = 0;
        void *scratch = NULL;
        if (posix_memalign(&scratch, ALIGNMENT, (size_t)bytes) != 0)
            return NULL;
        cpu->scratch = scratch;
        cpu->scratch_bytes = bytes;
        cpu->scratch_max = sebp_max(cpu->scratch_max, bytes);
    }
    return cpu->scratch + cpu->reserved_bytes;
}

int64_t sebp_cpu_workspace(const sebp_cpu *cpu)
{
    return cpu->workspace_bytes - cpu->reserved_bytes;
}

int64_t sebp_cpu_max_scratch(const void *device)
{
    return ((const sebp_cpu *)device)->workspace_bytes / 2 / ALIGNMENT * ALIGNMENT;
}

sebp_status sebp_cpu_reserve_scratch(void *device, int64_t bytes)
{
    sebp_cpu *cpu = device;
    if (bytes > sebp_cpu_max_scratch(device))
        return SEBP_ERROR_MEMORY;
    cpu->scratch_is_settled = false;
    cpu->reserved_bytes = sebp_round_up(bytes, ALIGNMENT);
    if (sebp_cpu_scratch(cpu, 0) != NULL)
        return SEBP_SUCCESS;
    cpu->reserved_bytes = 0;
    return SEBP_ERROR_MEMORY;
}

void *sebp_cpu_method_scratch(const void *device)
{
    return ((const sebp_cpu *)device)->scratch;
}

int64_t sebp_cpu_scratch_bytes(const void *device)
{
    return ((const sebp_cpu *)device)->scratch_max;
}

/* ---- what there is to know ---- */

bool sebp_cpu_streams(const sebp_cpu *cpu, int64_t bytes)
{
    int64_t cache = cpu->topology.l3_bytes > 0 ? (int64_t)cpu->topology.l3_bytes : ASSUMED_CACHE;
    return bytes > cache / 2;
}

void sebp_cpu_info(const void *device, sebp_info *info)
{
    const sebp_cpu *cpu = device;
    sebp_topology topology;
    if (cpu != NULL) {
        topology = cpu->topology;
        info->placement = cpu->placement;
        info->placement_refused = cpu->placement_refused;
        info->gemm = cpu->gemm;
    } else {
        sebp_topology_read(&topology);
        info->placement = SEBP_PLACEMENT_NONE;
        info->gemm = SEBP_GEMM_AUTO;
    }
    info->cores = topology.cores;
    info->logical_cpus = topology.logical_cpus;
    info->numa_nodes = topology.numa_nodes;
    info->core_kinds = topology.core_kinds;
    info->cpu_quota = topology.cpu_quota;
    info->l2_bytes = topology.l2_bytes;
    info->l3_bytes = topology.l3_bytes;
    memcpy(info->hwloc, topology.hwloc, sizeof info->hwloc);
    info->amx_refused = sebp_cpu_amx_refused();
}
