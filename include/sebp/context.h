/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file context.h
 * A context holds what calls share: threads and where they run, scratch memory, the GEMM in use.
 *
 * There is no state outside contexts but the table of kernels for this CPU, which is filled once
 * and never changes, and what is known of forks. A context is used by one thread at a time; two threads with two contexts never
 * meet.
 *
 * Where memory runs out, what the library asks for itself is SEBP_ERROR_MEMORY, with nothing written.
 * The libraries underneath have ways of their own, which nothing can be done about from here:
 *
 * - OpenMP ends the process, with a line on standard error, where it cannot make its threads or has
 *   no memory for them: GCC's by exit(1), at the first call that uses several. One thread, or a
 *   parallel_for of the host's, leaves it out, but for oneDNN and LAPACK.
 * - hwloc works while a context is made. Where it says that it failed, the cores are read from the
 *   operating system's files, and placement is SEBP_ERROR_BACKEND. Not all of its small allocations
 *   are checked, though: version 2.9 may crash instead. A build --without-hwloc has none of it.
 * - oneDNN without memory for the buffers of a product is SEBP_ERROR_BACKEND, "oneDNN has no memory",
 *   and outputs may be half written. Without memory for what it makes first, objects and the code of
 *   kernels, version 2.6 ends the process, by a std::bad_alloc that no C program catches or by a
 *   crash. SEBP_GEMM_NATIVE leaves it out.
 *
 * What oneDNN holds for itself is no scratch memory of a context: about 10 MB of buffers and code
 * once it has run, and for bf16 under SEBP_GEMM_ONEDNN a primitive of about 100 KB for each kind of
 * product: a weight's shape, the direction, dtypes, strides and the number of active rows. Its cache,
 * one for the process, keeps the last 1024: some 100 MB where that number differs from batch to batch
 * (ONEDNN_PRIMITIVE_CACHE_CAPACITY, a variable of oneDNN's own, bounds it). SEBP_GEMM_AUTO gives
 * oneDNN no product in bf16.
 */
#ifndef SEBP_CONTEXT_H
#define SEBP_CONTEXT_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_context sebp_context;

/** Which matrix product does the work. */
typedef enum sebp_gemm {
    SEBP_GEMM_AUTO = 0,   /**< by shape and dtype, whichever measured faster for such a product */
    SEBP_GEMM_NATIVE = 1, /**< the library's own: gathers and scatters rows as it packs */
    SEBP_GEMM_ONEDNN =
        2 /**< oneDNN wherever it can; SEBP_ERROR_UNSUPPORTED in a build without it */
} sebp_gemm;

/** Where the context's threads run. */
typedef enum sebp_placement {
    SEBP_PLACEMENT_NONE = 0, /**< wherever the operating system puts them */
    SEBP_PLACEMENT_COMPACT =
        1, /**< bound: physical cores of one NUMA node first, faster cores first */
    SEBP_PLACEMENT_SPREAD = 2 /**< bound: physical cores over all NUMA nodes in turn */
} sebp_placement;

/** What computes. Matrices, kept elements and all else that calls read and write lie in its memory. */
typedef enum sebp_device_kind {
    SEBP_DEVICE_CPU = 0, /**< the processors of this machine, and its memory */
    SEBP_DEVICE_CUDA = 1 /**< an NVIDIA GPU; SEBP_ERROR_UNSUPPORTED in a build without it */
} sebp_device_kind;

/** One piece of work: called once for each index, from any thread, in any order. */
typedef void (*sebp_task)(void *work, int64_t index);

/**
 * A host's own thread pool. Must call task(work, i) exactly once for each i in [0, tasks) and
 * return when all are done. Called from the thread that called the library; never nested.
 */
typedef void (*sebp_parallel_for)(void *pool, int64_t tasks, sebp_task task, void *work);

typedef struct sebp_context_options {
    size_t size_bytes;        /**< sizeof(sebp_context_options), so that the struct can grow */
    int threads;              /**< 0: one for each physical core this process may use */
    sebp_placement placement; /**< default SEBP_PLACEMENT_NONE */
    sebp_gemm gemm;           /**< default SEBP_GEMM_AUTO */
    int64_t workspace_bytes;  /**< bound on our own scratch memory; 0: 64 MiB; else >= 1 MiB */
    sebp_parallel_for parallel_for; /**< NULL: OpenMP, or one thread in a build without it */
    void *pool;                     /**< handed to parallel_for */
    char *message;        /**< where one line about a failed creation is written; NULL: nowhere */
    size_t message_bytes; /**< room there, the closing NUL included; the line is cut to fit */
    sebp_device_kind device; /**< default SEBP_DEVICE_CPU */
} sebp_context_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_CONTEXT_OPTIONS_INIT                                                                  \
    {                                                                                              \
        sizeof(sebp_context_options), 0, SEBP_PLACEMENT_NONE, SEBP_GEMM_AUTO, 0, NULL, NULL, NULL, \
            0, SEBP_DEVICE_CPU                                                                     \
    }

/**
 * Makes a context.
 *
 * Read from the environment, here and nowhere else. Each overrules its option; an empty value
 * counts as unset, a value that is not in the list is SEBP_ERROR_ENVIRONMENT:
 *
 *     SEBP_NUM_THREADS  1 to 1024
 *     SEBP_PLACEMENT    none, compact, spread
 *     SEBP_GEMM         auto, native, onednn
 *     SEBP_MAX_ISA      scalar, avx2, avx512, avx512bf16, neon: no kernels above this tier, plain C
 *                       for one of another processor; a value after the first context's is checked
 *                       only
 *     SEBP_VERBOSE      0, 1: one line on standard error (linear.h) for each forward, backward and
 *                       gradient that succeeds: the functions that take rows
 *
 * Threads by default: the physical cores within the calling thread's affinity mask and its cgroup's
 * CPU quota, or OMP_NUM_THREADS where that is set. Where the mask is one of OpenMP's places, as
 * OpenMP binds the thread that loads it (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), the cores of
 * all places count instead, and no more than omp_get_num_procs(). However many are asked for, OpenMP
 * has no more than OMP_THREAD_LIMIT of them. With placement asked for, each thread is bound to
 * one core within that mask at its first piece of work; nothing is bound if OMP_PROC_BIND,
 * OMP_PLACES, GOMP_CPU_AFFINITY or KMP_AFFINITY is set, or if the host brings its own parallel_for.
 * The calling thread does a share of the work and so is bound too, until the context is destroyed.
 * A context made meanwhile sees the cores it is bound to and no others; of several bound contexts
 * the last one made is to be destroyed first, or the thread stays bound. Contexts know nothing of
 * each other: two that are placed, of two threads, start at the same core.
 *
 * After fork() a child may go on using its copy of a context: it then works on one thread with the
 * library's own GEMM, as OpenMP and oneDNN do not survive a fork, and so does LAPACK (basis.h). So
 * does a context that the child makes itself, whatever the options and variables say, where the
 * process that forked had more than one thread: any library there may have used OpenMP, which waits
 * for ever for threads that the fork has not copied. Its own parallel_for is used. A child of a
 * process that had one thread may use as many as any. All this holds if the library was loaded before
 * the fork, else see sebp_after_fork(). LAPACK on a BLAS that uses OpenMP waits like that too in a
 * build without OpenMP, or with another runtime than the BLAS has (clang's): there OMP_NUM_THREADS is
 * to be 1 from the start.
 *
 * @param options  NULL for the defaults.
 * @param context  where the context is put; untouched on error.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (context); SEBP_ERROR_SIZE (sebp.h); SEBP_ERROR_VALUE
 *         (threads outside [0, 1024], an unknown enum value, workspace_bytes negative or in
 *         [1, 1 MiB)); SEBP_ERROR_ENVIRONMENT; SEBP_ERROR_UNSUPPORTED (oneDNN asked for in a build
 *         without it, placement in a build without hwloc, a device that the build does not have); SEBP_ERROR_BACKEND (hwloc finds no cores);
 *         SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_context_create(const sebp_context_options *options,
                                         sebp_context **context);

/**
 * Says that this process is a fork of one that had threads: contexts made afterwards work on one, as
 * described above. To be called in a child that loads the library only after the fork, before it
 * makes a context; a library that was there before the fork knows by itself. Not undone.
 */
SEBP_API void sebp_after_fork(void);

/** Frees a context and its scratch memory, and undoes the binding of the calling thread. NULL:
 * nothing. */
SEBP_API void sebp_context_destroy(sebp_context *context);

/** The number of threads the context works with, at least 1; 0 for NULL. */
SEBP_API int sebp_context_threads(const sebp_context *context);

/** The most scratch memory the context has held so far, in bytes; 0 for NULL. Never over the bound.
 * What oneDNN holds for itself, as said above, is not in it. */
SEBP_API int64_t sebp_context_scratch_bytes(const sebp_context *context);

/**
 * One line about the last call on this context that failed: what, where, and the numbers at odds
 * ("sebp_linear_backward: w is 3072x768 but dy has 768 columns"). "" if none failed yet or for
 * NULL. The string lives until the next call on the context. It has less than 256 bytes: of a path
 * in it that is too long the middle is left out, never the reason, and control characters are "?".
 */
SEBP_API const char *sebp_context_message(const sebp_context *context);

SEBP_END_DECLS

#endif
