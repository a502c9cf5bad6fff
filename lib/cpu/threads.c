/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file threads.c
 * Spreads pieces of work over threads, and binds the threads where that was asked for.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#endif

#include "cpu.h"

static bool is_copy(const sebp_cpu *cpu)
{
    return sebp_cpu_forks() != cpu->forks;
}

bool sebp_cpu_is_forked(const sebp_cpu *cpu)
{
    return is_copy(cpu) || sebp_cpu_openmp_is_lost();
}

int sebp_cpu_threads(const sebp_cpu *cpu)
{
    return is_copy(cpu) ? 1 : cpu->threads;
}

/* ---- binding ---- */

#ifdef __linux__

/* A thread of the context: its CPU, and the thread that was bound there last. */
typedef struct thread_place {
    int cpu;
    pid_t bound; /* a thread's id; 0: none yet */
} thread_place;

struct sebp_binding {
    cpu_set_t before[SEBP_MASK_SETS]; /* the calling thread's mask before it was bound */
    thread_place places[];            /* of each thread; the calling thread comes first */
};

static pid_t thread_id(void)
{
    return (pid_t)syscall(SYS_gettid);
}

sebp_status sebp_cpu_bind(sebp_cpu *cpu)
{
    size_t threads = (size_t)cpu->threads;
    struct sebp_binding *binding = calloc(1, sizeof *binding + threads * sizeof(thread_place));
    int *cpus = calloc(threads, sizeof *cpus);
    sebp_status status = SEBP_ERROR_MEMORY;
    if (binding != NULL && cpus != NULL)
        status = sebp_topology_place(cpu->placement, cpu->threads, cpus);
    if (status == SEBP_SUCCESS) {
        for (size_t i = 0; i < threads; i++)
            binding->places[i].cpu = cpus[i];
        cpu->binding = binding;
    } else {
        free(binding);
    }
    free(cpus);
    return status;
}

/* Binds the calling thread, unless it is bound already. OpenMP may have replaced a thread since the
 * last call, and the next call may come from another one; hence the id. A CPU that has gone offline
 * is no reason to fail: the thread then runs where the system puts it. */
static void bind_this_thread(sebp_cpu *cpu, int thread)
{
    thread_place *place = &cpu->binding->places[thread];
    pid_t self = thread_id();
    if (place->bound == self)
        return;
    if (thread == 0)
        sched_getaffinity(0, sizeof cpu->binding->before, cpu->binding->before);
    cpu_set_t mask[SEBP_MASK_SETS];
    CPU_ZERO_S(sizeof mask, mask);
    CPU_SET_S((size_t)place->cpu, sizeof mask, mask);
    sched_setaffinity(0, sizeof mask, mask);
    place->bound = self;
}

/* A forked child is bound as the thread was that it copies, but under another id. */
static void unbind_this_thread(const sebp_cpu *cpu, int thread)
{
    pid_t bound = cpu->binding->places[thread].bound;
    if (bound == thread_id() || (bound != 0 && is_copy(cpu)))
        sched_setaffinity(0, sizeof cpu->binding->before, cpu->binding->before);
}

/* Whether this thread is the one that was bound as the calling thread, and the others are bound
 * too. */
static bool is_bound(const sebp_cpu *cpu)
{
    const thread_place *places = cpu->binding->places;
    return !is_copy(cpu) && places[0].bound == thread_id() && places[cpu->threads - 1].bound != 0;
}

#else

sebp_status sebp_cpu_bind(sebp_cpu *cpu)
{
    (void)cpu;
    return SEBP_ERROR_UNSUPPORTED;
}

static void bind_this_thread(sebp_cpu *cpu, int thread)
{
    (void)cpu, (void)thread;
}

static void unbind_this_thread(const sebp_cpu *cpu, int thread)
{
    (void)cpu, (void)thread;
}

static bool is_bound(const sebp_cpu *cpu)
{
    (void)cpu;
    return false;
}

#endif

/* ---- work ---- */

static void run_range(sebp_task task, void *work, int64_t first, int64_t end)
{
    for (int64_t i = first; i < end; i++)
        task(work, i);
}

#ifdef _OPENMP

/* With all threads each time, as OpenMP ends those that a smaller team leaves over. */
static void run_openmp(sebp_cpu *cpu, int64_t tasks, sebp_task task, void *work)
{
#pragma omp parallel num_threads(cpu->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        if (cpu->binding != NULL)
            bind_this_thread(cpu, (int)thread);
        run_range(task, work, tasks * thread / threads, tasks * (thread + 1) / threads);
    }
}

#endif

void sebp_cpu_parallel(sebp_cpu *cpu, int64_t tasks, sebp_task task, void *work)
{
    bool alone = tasks <= 1 || sebp_cpu_threads(cpu) == 1;
    if (cpu->parallel_for != NULL && !alone) {
        cpu->parallel_for(cpu->pool, tasks, task, work);
        return;
    }
#ifdef _OPENMP
    if (!alone && !omp_in_parallel()) {
        run_openmp(cpu, tasks, task, work);
        return;
    }
#endif
    if (cpu->binding != NULL && !is_copy(cpu))
        bind_this_thread(cpu, 0);
    run_range(task, work, 0, tasks);
}

static void no_work(void *work, int64_t index)
{
    (void)work, (void)index;
}

void sebp_cpu_bind_now(sebp_cpu *cpu)
{
    if (cpu->binding != NULL && !is_bound(cpu))
        sebp_cpu_parallel(cpu, cpu->threads, no_work, NULL);
}

void sebp_cpu_unbind(sebp_cpu *cpu)
{
    if (cpu->binding == NULL)
        return;
#ifdef _OPENMP
    if (cpu->threads > 1 && is_bound(cpu) && !omp_in_parallel()) {
#pragma omp parallel num_threads(cpu->threads)
        unbind_this_thread(cpu, omp_get_thread_num());
    }
#endif
    unbind_this_thread(cpu, 0);
    free(cpu->binding);
    cpu->binding = NULL;
}
