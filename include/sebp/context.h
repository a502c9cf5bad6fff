/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file context.h
 * A context holds what calls share: threads and where they run, scratch memory, the GEMM in use.
 *
 * A context is used by one thread at a time; two threads with two contexts never meet. Outside its
 * contexts the library keeps two things for the whole process: the table of kernels for this CPU,
 * which is filled once and never changes, and what it knows of forks.
 *
 * All threads have to be in the default floating-point mode, which rounds to nearest and keeps denormals; the
 * library does not set it. torch.set_flush_denormal() changes it in the calling thread alone: then which
 * denormals become zero depends on who computes what, and so on the number of threads.
 *
 * Where the library itself runs out of memory, the call returns SEBP_ERROR_MEMORY and has written
 * nothing. The libraries that it uses behave in ways of their own, which it cannot change:
 *
 * - OpenMP ends the process, with a line on standard error, if it cannot make its threads or has no
 *   memory for them. GCC's does so by exit(1), at the first call that uses several threads. A
 *   context with one thread, or with a parallel_for of the host's, does not use it; oneDNN and
 *   LAPACK may use it all the same.
 * - hwloc works while a context is made. If it reports a failure, the cores are read from the
 *   operating system's files, and placement is SEBP_ERROR_BACKEND. But hwloc does not check all of
 *   its small allocations, and version 2.9 may crash instead. A build --without-hwloc does not use
 *   it.
 * - oneDNN may have no memory for the buffers of a product: the call returns SEBP_ERROR_BACKEND,
 *   the message is "oneDNN has no memory", and outputs may be half written. Or it may have none for
 *   the objects and the code of kernels that it makes first: then version 2.6 ends the process, by
 *   a std::bad_alloc that no C program catches or by a crash. SEBP_GEMM_NATIVE does not use oneDNN.
 *
 * What oneDNN holds for itself is not scratch memory of a context. Once it has run, that is about
 * 10 MB of buffers and code. For bf16 under SEBP_GEMM_ONEDNN it also holds a primitive of about
 * 100 KB for each kind of product. Kinds differ in the weight's shape, the direction, dtypes,
 * strides or the number of active rows. Its cache of primitives belongs to the process and
 * keeps the last 1024. That is some 100 MB where the number of active rows differs from batch to
 * batch. ONEDNN_PRIMITIVE_CACHE_CAPACITY, a variable of oneDNN's own, bounds the cache.
 * SEBP_GEMM_AUTO gives oneDNN no product in bf16.
 */
#ifndef SEBP_CONTEXT_H
#define SEBP_CONTEXT_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_context sebp_context;

/**
 * Which matrix product does the work.
 *
 * AUTO chooses for each product by its shape and dtype, the size of the last cache and the kernels in
 * use. This choice measures nothing, so it is the same in every run on a machine. (Whether bf16, or f32
 * below HIGHEST, is multiplied as bf16 is measured: see sebp_precision.) oneDNN gets f32 products of up
 * to 16 rows whose weight fits in the caches, dW of up to 15, and large dense ones where vectors are
 * narrow, as with AVX2. So the last bits of a row's result may depend on how many rows there are. With
 * NATIVE the bits of f32 products depend on neither the number of threads nor the other rows.
 */
typedef enum sebp_gemm {
    SEBP_GEMM_AUTO = 0,   /**< chosen for each product: the one that is faster */
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

/**
 * How exact products of f32 matrices must be, from the most exact on. HIGHEST, HIGH and MEDIUM mean
 * what they mean to PyTorch's torch.set_float32_matmul_precision(). Some processors multiply bf16 many
 * times faster than f32. A level allows the library to use that; where it would not be faster, the
 * library multiplies f32.
 *
 * On a CPU, each f32 is split into one, two or three bf16 whose sum is near to it, or equal to it; products of
 * parts are added up in f32 (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence
 * datatype for higher-precision computations", ARITH 2019). The error of a sum of K products a b, in
 * multiples of the sum of |a||b|, is at most what is said below and another K 2^-24 for each product of
 * parts; parts below 2^-126 count as zero. NaN and Inf give what they give in f32, but for an Inf of
 * bf16 times an f32 below 2^-126 at MEDIUM, which is NaN. Parts are rounded up as well as down: where the sum
 * of |a||b| is over 2^127, products of parts may overflow, so that the result is Inf or NaN.
 *
 * Matrices of bf16 are multiplied exactly at every level. With an f32 matrix at their side they are so
 * too, and the f32 one is as the level says. Sums of bases (basis.h) and merges of LoRA take f32's own
 * product, whatever is asked for.
 *
 * On a GPU, HIGH and MEDIUM allow TF32 where both matrices are f32, as they do in PyTorch. TF32 keeps 10 of
 * the 23 bits of f32's mantissa. The error of a sum is at most 2^-9 + K 2^-22, in the same multiples. Numbers
 * within 2^-11 of the largest f32 may count as Inf, and numbers below 2^-126 as zero, so that Inf times one of
 * these is NaN. A NaN whose mantissa has none but the last 13 bits set may count as Inf. The other products with
 * an f32 matrix are f32 multiply-adds: those at HIGHEST and SPLIT, those with a matrix of bf16, and those by
 * the library's own kernels of rows that do not begin at multiples of 16 bytes.
 *
 * Which is faster is measured when the first context of a process is made, and holds for all of its
 * contexts. It also depends on the sizes of a product: below HIGHEST a row may be rounded otherwise alone
 * than among others. Where both are about as fast, another process may choose otherwise.
 */
typedef enum sebp_precision {
    SEBP_PRECISION_DEFAULT = 0, /**< of a call: the context's; of a context: HIGHEST */
    SEBP_PRECISION_HIGHEST = 1, /**< f32 multiply-adds: K 2^-24 */
    SEBP_PRECISION_SPLIT = 2,   /**< or six products of three parts: f32's accuracy, 2^-22 */
    SEBP_PRECISION_HIGH = 3,    /**< or three products of two parts: 2^-14 */
    SEBP_PRECISION_MEDIUM = 4   /**< or the product of the matrices rounded to bf16: 2^-6.9 */
} sebp_precision;

/** What computes. All that calls read and write lies in the memory of this device: matrices, kept
 * elements, indices, labels, positions and the rest. Row sets, sequences and bases are made of lists
 * in the host's memory; numbers that a call returns, as a loss, go there. */
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
    int64_t workspace_bytes;  /**< max of the library's scratch memory; 0: 64 MiB; else >= 1 MiB */
    sebp_parallel_for parallel_for; /**< NULL: OpenMP, or one thread in a build without it */
    void *pool;                     /**< handed to parallel_for */
    char *message;        /**< where one line about a failed creation is written; NULL: nowhere */
    size_t message_bytes; /**< room there, the closing NUL included; the line is cut to fit */
    sebp_device_kind device;  /**< default SEBP_DEVICE_CPU */
    sebp_precision precision; /**< of products of f32; default SEBP_PRECISION_HIGHEST */
    int gpu;                  /**< which one, from 1 on; 0: the calling thread's current one */
    void *stream;             /**< the cudaStream_t to work on; NULL: the default stream */
} sebp_context_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_CONTEXT_OPTIONS_INIT                                                                  \
    {                                                                                              \
        sizeof(sebp_context_options), 0, SEBP_PLACEMENT_NONE, SEBP_GEMM_AUTO, 0, NULL, NULL, NULL, \
            0, SEBP_DEVICE_CPU, SEBP_PRECISION_DEFAULT, 0, NULL                                    \
    }

/**
 * Makes a context.
 *
 * It reads these environment variables; nothing else in the library reads the environment. Each
 * overrules its option. An empty value counts as unset, and a value that is not listed is
 * SEBP_ERROR_ENVIRONMENT:
 *
 *     SEBP_NUM_THREADS  1 to 1024
 *     SEBP_PLACEMENT    none, compact, spread
 *     SEBP_GEMM         auto, native, onednn
 *     SEBP_PRECISION    highest, split, high, medium: a call's own option goes before it
 *     SEBP_MAX_ISA      scalar, avx2, avx512, avx512bf16, amx, neon: no kernels above this tier, plain
 *                       C for a tier of another processor. The first context decides: afterwards the
 *                       value is checked, but changes nothing
 *     SEBP_VERBOSE      0, 1: one line on standard error (linear.h) for each forward, backward and
 *                       gradient that succeeds, which are the functions that take rows
 *
 * **How many threads.** By default one for each physical core within the calling thread's affinity
 * mask and its cgroup's CPU quota, or OMP_NUM_THREADS where that is set. OpenMP may bind the thread
 * that loads it (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY). Where the mask is one of OpenMP's
 * places, the cores of all places count instead, up to omp_get_num_procs(). However many are asked
 * for, OpenMP has no more than OMP_THREAD_LIMIT of them.
 *
 * **Where they run.** If placement is asked for, each thread is bound to one core within that mask
 * at its first piece of work. Nothing is bound if OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY or
 * KMP_AFFINITY is set, or if the host brings its own parallel_for. The calling thread does a share
 * of the work, so it is bound too, until the context is destroyed. A context made meanwhile sees
 * the cores that the thread is bound to and no others. Of several bound contexts the last one made
 * has to be destroyed first, or the thread stays bound. Contexts know nothing of each other: two
 * placed contexts of two threads start at the same core.
 *
 * **After fork().** A child may go on using its copy of a context. The copy then works on one
 * thread, with the library's own GEMM, as OpenMP and oneDNN do not survive a fork; LAPACK works on
 * one thread too (basis.h). The same holds for a context that the child makes itself, whatever the
 * options and variables say, where the process that forked had more than one thread: any library in
 * it may have used OpenMP, which would wait for ever for threads that the fork has not copied. A
 * parallel_for in its options is used. A child of a process that had one thread may use as many
 * threads as any process.
 *
 * All this holds if the library was loaded before the fork; else see sebp_after_fork(). LAPACK on a
 * BLAS that uses OpenMP also waits for ever in a build of this library without OpenMP, or with
 * another OpenMP runtime than the BLAS has (clang's). There OMP_NUM_THREADS has to be 1 from the
 * start.
 *
 * @param options  NULL for the defaults.
 * @param context  where the context is put; untouched on error.
 * **On a GPU** (SEBP_DEVICE_CUDA) the options for threads mean nothing, and placement and oneDNN are
 * refused. With SEBP_GEMM_AUTO, in a build that has cuBLASLt, it multiplies whole matrices, and also
 * listed rows of f32: in large products, if copies of the rows fit in workspace_bytes. With NATIVE it never
 * does. Attention keeps up to 2 MiB of lists on the GPU, and more where graphs read them; workspace_bytes
 * does not bound these. All that calls read and write lies in the GPU's memory (device.h), but for what a function says is the
 * host's. Making a context makes its GPU the calling thread's current one; a call
 * by a thread with another one (cudaSetDevice()) is SEBP_ERROR_BACKEND. Any thread
 * may free and destroy, whichever GPU is its current one. The stream has to outlive the context, and the row
 * sets and bases that were used on it. A context does not survive a fork().
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (context); SEBP_ERROR_SIZE (sebp.h); SEBP_ERROR_VALUE
 *         (threads outside [0, 1024], an unknown enum value, workspace_bytes negative or in
 *         [1, 1 MiB), a GPU that is not there, cudaStreamPerThread); SEBP_ERROR_ENVIRONMENT; SEBP_ERROR_UNSUPPORTED
 *         (oneDNN asked for in a build without it, placement in a build without hwloc, a device
 *         that the build does not have, a GPU of a compute capability below 8.0);
 *         SEBP_ERROR_BACKEND (hwloc finds no cores; CUDA has no driver or finds no GPU);
 *         SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_context_create(const sebp_context_options *options,
                                         sebp_context **context);

/**
 * Says that this process is a fork of one that had threads. Contexts made afterwards work on one
 * thread, as described above. A child that loads the library only after the fork calls this before
 * it makes a context. A library that was loaded before the fork knows by itself. Cannot be undone.
 */
SEBP_API void sebp_after_fork(void);

/** Frees a context and its scratch memory, and undoes the binding of the calling thread. NULL:
 * nothing. */
SEBP_API void sebp_context_destroy(sebp_context *context);

/** The number of threads the context works with, at least 1; 0 for NULL. */
SEBP_API int sebp_context_threads(const sebp_context *context);

/** The maximum of scratch memory that the context has held so far, in bytes; 0 for NULL. Never over
 * the context's bound. What oneDNN holds for itself (see above) is not in it. */
SEBP_API int64_t sebp_context_scratch_bytes(const sebp_context *context);

/**
 * One line about the last call on this context that failed: the function, what is wrong, and the
 * numbers that contradict each other ("sebp_linear_backward: w is 3072x768 but dy has 768
 * columns"). "" if no call has failed yet, and for NULL. The string lives until the next call on
 * the context. It has less than 256 bytes: of a path that is too long the middle is left out, never
 * the reason. Control characters are shown as "?".
 */
SEBP_API const char *sebp_context_message(const sebp_context *context);

SEBP_END_DECLS

#endif
