/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file info.h
 * What the library is, what it was built with, and what it found on this machine.
 */
#ifndef SEBP_INFO_H
#define SEBP_INFO_H

#include <stddef.h>

#include <sebp/context.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/** The version of the library that is running: "0.1.0". Never NULL. */
SEBP_API const char *sebp_version(void);

/**
 * The tier of kernels in use: "scalar", "avx2", "avx512", "avx512bf16", "amx" or "neon"; before the
 * first context is made, the tier that it would use without SEBP_MAX_ISA. Never NULL.
 */
SEBP_API const char *sebp_isa(void);

/** How many tiers of this build this CPU and its operating system can run. */
SEBP_API int sebp_isa_count(void);

/** Tier `index` of sebp_isa_count(), "scalar" first, the best last; NULL out of range. */
SEBP_API const char *sebp_isa_name(int index);

typedef struct sebp_info {
    size_t size_bytes; /**< sizeof(sebp_info), set by the caller, so that the struct can grow */
    char onednn[32];   /**< version of oneDNN at run time, "2.6.3"; "": built without */
    char hwloc[32];    /**< version of hwloc at run time, "2.9.0"; "": built without */
    int openmp;        /**< the date of OpenMP's standard, 201511; 0: built without */
    int cores;         /**< physical cores this process may use */
    int logical_cpus;  /**< logical CPUs this process may use */
    int numa_nodes;    /**< NUMA nodes among them; 1 if not known */
    int core_kinds;    /**< kinds of cores among them; 1 if not known or all alike */
    double cpu_quota;  /**< the cgroup's limit in CPUs; 0: none */
    size_t l2_bytes;   /**< L2 cache of a core; an assumed 512 KiB if not known */
    size_t l3_bytes;   /**< L3 cache that the cores share; 0 if none or not known */
    sebp_placement placement; /**< the context's; for a NULL context the default */
    sebp_gemm gemm;           /**< likewise */
    const char
        *placement_refused;  /**< the variable that forbids binding threads as asked; else NULL */
    const char *amx_refused; /**< why the tier amx does not run on a CPU that has AMX; else NULL */
    char cuda[32];           /**< version of the CUDA runtime, "13.0"; "": built without */
    char gpu[64];            /**< the GPU of a context that works on one; else "" */
} sebp_info;

/**
 * Fills `info` about the machine and a context. Strings live as long as the program.
 *
 * @param context  NULL: what a context made now with default options would have, if no
 *                 environment variable were set.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (info); SEBP_ERROR_SIZE (size_bytes less than in version
 *         0.1.0, or more than 4096).
 */
SEBP_API sebp_status sebp_info_get(const sebp_context *context, sebp_info *info);

SEBP_END_DECLS

#endif
