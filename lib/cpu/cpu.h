/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file cpu.h
 * CPUs as a device: kernels, threads, placement, scratch memory.
 */
#ifndef SEBP_CPU_H
#define SEBP_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "../backend.h"
#include "../integers.h"
#include "simd/simd.h"

/** Of cpu_set_t: room for 16384 CPUs, whatever the C library was built for. */
enum { SEBP_MASK_SETS = 16 };

/* detect.c: the best tier of kernels. Compiled for the baseline ISA. */

/** Runnable tiers, scalar first; NULL past the last. */
const sebp_kernels *sebp_cpu_tier(int index);

/** Whether `isa` names a tier, of this build and this machine or of another. */
bool sebp_cpu_isa_is_known(const char *isa);

/** The kernels in use. The first call fills the table, once, atomically: no tier above `max_isa`,
 * or the best where it is NULL. Later calls look at what is there. */
const sebp_kernels *sebp_cpu_kernels(const char *max_isa);

/** Why AMX is not used on a CPU that has it; NULL where it can be, and where the CPU has none. Asks
 * the kernel for permission, which then holds for the process. */
const char *sebp_cpu_amx_refused(void);

/** The same of a CPU that has it: `permits` is asked where nothing else speaks against it. */
const char *sebp_cpu_amx_refusal(bool is_built, bool saves_tiles, bool (*permits)(void));

/** What the table holds, or would hold if filled now. */
const sebp_kernels *sebp_cpu_kernels_peek(void);

/* topology.c */

typedef struct sebp_topology {
    int cores;        /* physical cores within the affinity mask */
    int logical_cpus; /* within the affinity mask */
    int numa_nodes;
    int core_kinds;
    double cpu_quota; /* cgroup limit in CPUs; 0: none */
    size_t l2_bytes;
    size_t l3_bytes;
    char hwloc[32]; /* its version at run time; "": built without */
} sebp_topology;

/** Reads the topology as it is now: by hwloc if it was built in, else from the operating system's
 * own files. */
void sebp_topology_read(sebp_topology *topology);

/** The number of physical cores that the quota leaves room for, at least 1. */
int sebp_topology_default_threads(const sebp_topology *topology);

/** Chooses a logical CPU for each of `threads` threads, by the rule of `placement`. */
sebp_status sebp_topology_place(sebp_placement placement, int threads, int *cpus);

/** Whether this build can bind threads to CPUs. */
bool sebp_topology_can_place(void);

/* threads.c */

enum { SEBP_MAX_THREADS = 1024 };

/** What the kernels take, in nanoseconds: a multiply-add of a tile, and an element that is packed, split
 * (for each part) or widened. */
typedef struct sebp_rates {
    double tile_f32, tile_bf16;
    double pack_f32, pack_bf16, split, widen;
} sebp_rates;

typedef struct sebp_cpu {
    const sebp_kernels *kernels;
    sebp_rates rates;
    int threads;
    sebp_gemm gemm;
    sebp_placement placement;
    const char *placement_refused;
    struct sebp_binding *binding;   /* NULL: threads are not bound */
    sebp_parallel_for parallel_for; /* the host's; NULL: our own */
    void *pool;
    unsigned forks;          /* sebp_cpu_forks() as it was made: a copy of it works alone */
    sebp_topology topology;  /* as it was found when the context was made */
    int64_t workspace_bytes; /* the bound */
    int64_t reserved_bytes;  /* of scratch, its first: reserved for a method */
    bool scratch_is_settled; /* a product has run since they were: scratch must not move */
    char *scratch;
    int64_t scratch_bytes;
    int64_t scratch_max; /* the most it has been */
} sebp_cpu;

/** Calls task(work, i) for each i in [0, tasks), spread over the threads; returns when all are
 * done. */
void sebp_cpu_parallel(sebp_cpu *cpu, int64_t tasks, sebp_task task, void *work);

/** The number of threads that work: 1 in a copy that a fork has made, else cpu->threads. */
int sebp_cpu_threads(const sebp_cpu *cpu);

/** Whether the context is such a copy, or must not use OpenMP because a parent had threads. */
bool sebp_cpu_is_forked(const sebp_cpu *cpu);

/** From now on each thread is bound at its first piece of work, as cpu->placement says. */
sebp_status sebp_cpu_bind(sebp_cpu *cpu);

/** Binds every thread that is to be bound, before a library underneath uses them. */
void sebp_cpu_bind_now(sebp_cpu *cpu);

/** Gives the threads back the affinity that the calling thread had. */
void sebp_cpu_unbind(sebp_cpu *cpu);

/* fork.c */

/** How many forks lie between the process that loaded the library and this one. */
unsigned sebp_cpu_forks(void);

/** Whether a parent of this process had threads. OpenMP might wait for them for ever, so it is not
 * used then. */
bool sebp_cpu_openmp_is_lost(void);

/* arithmetic.c */

/** Measures the rates where there is a choice by them, in a fraction of a millisecond.
 * SEBP_ERROR_MEMORY. */
sebp_status sebp_cpu_measure(const sebp_kernels *kernels, sebp_rates *rates);

/* backend.c */

extern const sebp_backend sebp_cpu_backend;

/* device.c */

/** What the environment says about a context on CPUs, read when it is made. */
typedef struct sebp_cpu_environment {
    const char *max_isa; /* no kernels above this tier; NULL: any */
    int omp_threads;     /* the number of threads where the options leave it open; 0: not said */
    const char *affinity_variable; /* the one that says already where threads go; NULL: none */
} sebp_cpu_environment;

/** options: checked, with the environment already applied. */
sebp_status sebp_cpu_create(const sebp_context_options *options,
                            const sebp_cpu_environment *environment, sebp_cpu **cpu);

/** Whether writes of `bytes` should go past the caches: they are so many that a reader would not
 * find them there. */
bool sebp_cpu_streams(const sebp_cpu *cpu, int64_t bytes);

/** The bound of scratch memory less what is reserved for a method. */
int64_t sebp_cpu_workspace(const sebp_cpu *cpu);

/** Scratch memory of at least `bytes` beside what is reserved for a method, 64-byte aligned; NULL:
 * none, or over the bound. Where there must be more than before, what it held is lost, and what is
 * reserved too. Asked for again with no more bytes it cannot fail. */
void *sebp_cpu_scratch(sebp_cpu *cpu, int64_t bytes);

/* onednn.c, in a build with it. */

void sebp_onednn_version(char *text, size_t bytes);

#endif
