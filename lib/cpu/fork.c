/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file fork.c
 * Notices forks. A child has one thread, whatever its parent had, but not all runtimes of OpenMP know
 * that: GNU's waits for ever for the threads that are gone. Any library of the parent's may have used
 * it, so that a child of a parent that had threads uses no OpenMP at all.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <pthread.h>
#include <stdatomic.h>

#ifdef __has_include
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
#define HAVE_SINGLE_THREADED
#endif
#endif
#ifndef HAVE_SINGLE_THREADED
#include <sys/stat.h>
#endif

#include "cpu.h"

/* Written in a child while it has one thread, or before there are contexts. */
static unsigned forks;
static bool parent_had_threads; /* this process's parent, or one of its parents */
static atomic_bool has_threads; /* looked at before each fork, by the thread that forks */

/* Where it cannot be known the answer is no. */
static bool is_single_threaded(void)
{
#ifdef HAVE_SINGLE_THREADED
    return __libc_single_threaded != 0;
#else
    struct stat tasks; /* a folder has two links of its own, and one for each folder in it */
    return stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink == 3;
#endif
}

static void before_fork(void)
{
    has_threads = !is_single_threaded();
}

static void in_child(void)
{
    forks++;
    parent_had_threads = parent_had_threads || has_threads;
}

/* At load time, as a process may use OpenMP, and fork, before it makes a context. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(before_fork, NULL, in_child);
}

void sebp_after_fork(void)
{
    parent_had_threads = true;
}

unsigned sebp_cpu_forks(void)
{
    return forks;
}

bool sebp_cpu_openmp_is_lost(void)
{
    return parent_had_threads;
}
