/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a context's threads run: placement, and the affinity mask as the boundary.
 */
#include "config.h"

#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <sebp/sebp.h>

#include "contexts.h"
#include "testing.h"

#ifdef __linux__
static const char *const binding_variables[] = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
                                                "KMP_AFFINITY"};

static void run_serially(void *pool, int64_t tasks, sebp_task task, void *work)
{
    (void)pool;
    for (int64_t i = 0; i < tasks; i++) {
        task(work, i);
    }
}

/* The calling thread is bound within its mask while the context lives, and not after. */
START_TEST(placement)
{
    for (size_t v = 0; v < 4; v++) {
        unsetenv(binding_variables[v]);
    }
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.placement = _i ? SEBP_PLACEMENT_SPREAD : SEBP_PLACEMENT_COMPACT;
    if (contexts_info(NULL).hwloc[0] == '\0') {
        sebp_context *none = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &none), SEBP_ERROR_UNSUPPORTED);
        testing_skip(_i ? "placement spread" : "placement compact", "built without hwloc");
        return;
    }
    if (access("/sys/devices/system/cpu/cpu0/topology", F_OK) != 0) {
        sebp_context *none = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &none), SEBP_ERROR_BACKEND);
        testing_skip(_i ? "placement spread" : "placement compact", "no /sys to find cores in");
        return;
    }
    cpu_set_t before, during, after, outside;
    ck_assert_int_eq(sched_getaffinity(0, sizeof before, &before), 0);
    sebp_context *context = contexts_create(&options);
    ck_assert_int_eq(contexts_info(context).placement, options.placement);
    ck_assert_ptr_null(contexts_info(context).placement_refused);
    contexts_check(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
    CPU_XOR(&outside, &before, &during);
    CPU_AND(&outside, &outside, &during);
    ck_assert_int_eq(CPU_COUNT(&outside), 0);
    ck_assert_int_ge(CPU_COUNT(&during), 1);
    sebp_context_destroy(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof after, &after), 0);
    ck_assert(CPU_EQUAL(&before, &after));

    /* A host's own pool is not bound. */
    options.parallel_for = run_serially;
    context = contexts_create(&options);
    contexts_check(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
    ck_assert(CPU_EQUAL(&before, &during));
    sebp_context_destroy(context);
    options.parallel_for = NULL;

    /* Nor is anything, where the user binds by OpenMP's means. */
    for (size_t v = 0; v < 4; v++) {
        setenv(binding_variables[v], v == 1 ? "cores" : "false", 1);
        context = contexts_create(&options);
        const char *refused = contexts_info(context).placement_refused;
        ck_assert_ptr_nonnull(refused);
        ck_assert_msg(strstr(refused, binding_variables[v]) != NULL, "%s", refused);
        contexts_check(context);
        ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
        ck_assert(CPU_EQUAL(&before, &during));
        sebp_context_destroy(context);
        unsetenv(binding_variables[v]);
    }
}
END_TEST

/* Binds every thread of the process, as a launcher would have: an emulator has threads of its own. */
static int bind_process(const cpu_set_t *mask)
{
    DIR *tasks = opendir("/proc/self/task");
    int good = tasks != NULL;
    for (struct dirent *entry; good && (entry = readdir(tasks)) != NULL;) {
        if (entry->d_name[0] != '.') {
            good = sched_setaffinity((pid_t)atol(entry->d_name), sizeof *mask, mask) == 0;
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return good;
}

/*
 * An affinity mask is the boundary of the threads that a context has by default. In a child, as the
 * mask is the process's and other tests may have left threads in this one.
 */
START_TEST(affinity_mask_is_the_boundary)
{
    unsetenv("OMP_NUM_THREADS");
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        cpu_set_t mask, one;
        int known = sched_getaffinity(0, sizeof mask, &mask) == 0;
        CPU_ZERO(&one);
        for (int cpu = 0; known && cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; cpu++) {
            if (CPU_ISSET(cpu, &mask)) {
                CPU_SET(cpu, &one);
            }
        }
        sebp_context *context = NULL;
        sebp_info info = {.size_bytes = sizeof info};
        int good = known && bind_process(&one) &&
                   sebp_context_create(NULL, &context) == SEBP_SUCCESS &&
                   sebp_info_get(context, &info) == SEBP_SUCCESS &&
                   sebp_context_threads(context) == 1 && info.cores == 1 && info.logical_cpus == 1;
        sebp_context_destroy(context);
        _exit(good ? 0 : 1);
    }
    testing_good_exit(child);
}
END_TEST

static void *wait_for(void *barrier)
{
    pthread_barrier_wait(barrier);
    return NULL;
}

/* It is the calling thread's mask that counts: another thread of the process may run elsewhere, as
 * those of OpenMP do once they are bound. */
START_TEST(another_thread_is_no_boundary)
{
    cpu_set_t mask, one;
    ck_assert_int_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
    if (CPU_COUNT(&mask) < 2) {
        testing_skip("another_thread_is_no_boundary", "one CPU");
        return;
    }
    unsetenv("OMP_NUM_THREADS");
    CPU_ZERO(&one);
    for (int cpu = 0; CPU_COUNT(&one) == 0; cpu++) {
        if (CPU_ISSET(cpu, &mask)) {
            CPU_SET(cpu, &one);
        }
    }
    pthread_t thread;
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, 2);
    ck_assert_int_eq(pthread_create(&thread, NULL, wait_for, &barrier), 0);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    sebp_context *context = contexts_create(NULL);
    sebp_info info = contexts_info(context);
    ck_assert_int_eq(sched_setaffinity(0, sizeof mask, &mask), 0);
    pthread_barrier_wait(&barrier);
    pthread_join(thread, NULL);
    pthread_barrier_destroy(&barrier);
    ck_assert_int_eq(sebp_context_threads(context), 1);
    ck_assert_int_eq(info.cores, 1);
    ck_assert_int_eq(info.logical_cpus, 1);
    sebp_context_destroy(context);
}
END_TEST
#else
START_TEST(another_thread_is_no_boundary)
{
    testing_skip("another_thread_is_no_boundary", "no sched_getaffinity");
}
END_TEST

START_TEST(placement)
{
    testing_skip(_i ? "placement spread" : "placement compact", "no sched_getaffinity");
}
END_TEST

START_TEST(affinity_mask_is_the_boundary)
{
    testing_skip("affinity_mask_is_the_boundary", "no sched_getaffinity");
}
END_TEST
#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("placement");
    TCase *tests = tcase_create("placement");
    tcase_add_loop_test(tests, placement, 0, 2);
    tcase_add_test(tests, affinity_mask_is_the_boundary);
    tcase_add_test(tests, another_thread_is_no_boundary);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
