/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Forked children: contexts that they have inherited or make themselves, whatever in the parent has
 * used threads. A child that hangs is ended by an alarm.
 */
#include "config.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "testing.h"

static const sebp_gemm gemms[] = {SEBP_GEMM_AUTO, SEBP_GEMM_NATIVE, SEBP_GEMM_ONEDNN};

enum { GEMMS = sizeof gemms / sizeof gemms[0] };

/* A layer's backward, exact in any order, with room for a second result. */
typedef struct layer {
    sebp_matrix dy, x, w, dx, dw, dx_again, dw_again;
} layer;

static layer make_layer(void)
{
    const int64_t M = 300, N = 70, K = 90;
    layer l = {.dy = testing_matrix(M, N, N, SEBP_F32), .x = testing_matrix(M, K, K, SEBP_F32)};
    l.w = testing_matrix(N, K, K, SEBP_F32);
    l.dx = testing_matrix(M, K, K, SEBP_F32);
    l.dw = testing_matrix(N, K, K, SEBP_F32);
    l.dx_again = testing_matrix(M, K, K, SEBP_F32);
    l.dw_again = testing_matrix(N, K, K, SEBP_F32);
    testing_fill(&l.dy, TESTING_INTEGER);
    testing_fill(&l.x, TESTING_INTEGER);
    testing_fill(&l.w, TESTING_INTEGER);
    testing_zero_rows(&l.dy, 0.5);
    testing_set(&l.dy, 0, 0, 1);
    return l;
}

static void free_layer(layer *l)
{
    sebp_matrix *all[] = {&l->dy, &l->x, &l->w, &l->dx, &l->dw, &l->dx_again, &l->dw_again};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        testing_release(all[i]);
    }
}

/* The first result: what others are held against. */
static void compute_first(sebp_context *context, layer *l)
{
    testing_succeed(
        sebp_linear_backward(context, &l->dy, &l->x, &l->w, NULL, NULL, &l->dx, &l->dw, NULL),
        context);
    ck_assert_int_gt(testing_nonzeros(&l->dw), 0);
}

/* Whether a context gives the same once more. */
static int computes_again(sebp_context *context, layer *l)
{
    testing_poison(&l->dx_again);
    testing_poison(&l->dw_again);
    sebp_status status = sebp_linear_backward(context, &l->dy, &l->x, &l->w, NULL, NULL,
                                              &l->dx_again, &l->dw_again, NULL);
    return status == SEBP_SUCCESS && testing_same_bits(&l->dx, &l->dx_again) &&
           testing_same_bits(&l->dw, &l->dw_again);
}

/* What a child makes of a context of its own with `threads` threads, which it is to work with
 * `expected` of. */
static int own_context_works(sebp_gemm gemm, int threads, int expected, layer *l)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = gemm;
    options.threads = threads;
    sebp_context *own = NULL;
    int is_good = sebp_context_create(&options, &own) == SEBP_SUCCESS &&
                  sebp_context_threads(own) == expected && computes_again(own, l);
    sebp_context_destroy(own);
    return is_good;
}

/* How many threads a context has where nothing is in the way: `threads`, or 1 without OpenMP. */
static int with_openmp(int threads)
{
#ifdef _OPENMP
    return threads;
#else
    (void)threads;
    return 1;
#endif
}

/* How many threads the process has; 0: not known. */
static int count_threads(void)
{
    struct stat tasks;
    return stat("/proc/self/task", &tasks) == 0 ? (int)tasks.st_nlink - 2 : 0;
}

/* _i: the GEMM. A child goes on with its copy of a context that has computed in the parent. */
START_TEST(copied_context)
{
    if (!testing_has_gemm(gemms[_i], "copied_context")) {
        return;
    }
    sebp_context *context = testing_context(gemms[_i], 3, 0);
    layer l = make_layer();
    compute_first(context, &l);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        int is_good = sebp_context_threads(context) == 1 && computes_again(context, &l);
        sebp_context_destroy(context);
        free_layer(&l); /* valgrind looks for leaks in the child as well */
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    /* And the parent is none the worse. */
    ck_assert_int_eq(sebp_context_threads(context), with_openmp(3));
    ck_assert(computes_again(context, &l));
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* _i: the GEMM. One that another thread has made, and was the only one to use. */
typedef struct other_context {
    sebp_context *context;
    layer *l;
} other_context;

static void *compute_in_thread(void *argument)
{
    other_context *other = argument;
    compute_first(other->context, other->l);
    return NULL;
}

START_TEST(context_of_another_thread)
{
    if (!testing_has_gemm(gemms[_i], "context_of_another_thread")) {
        return;
    }
    layer l = make_layer();
    other_context other = {testing_context(gemms[_i], 2, 0), &l};
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, compute_in_thread, &other), 0);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        int is_good = sebp_context_threads(other.context) == 1 &&
                      computes_again(other.context, &l) && computes_again(other.context, &l);
        sebp_context_destroy(other.context);
        free_layer(&l);
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    sebp_context_destroy(other.context);
    free_layer(&l);
}
END_TEST

/* Somebody else's use of OpenMP's threads. */
static int use_openmp(void)
{
    atomic_int seen = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(2)
#endif
    atomic_fetch_add(&seen, 1);
    return seen;
}

/* _i: the GEMM. The library has done nothing in the parent, but another has used OpenMP there. A
 * child's own contexts work alone, whatever they are asked for; so do its children's. */
START_TEST(own_context_after_openmp)
{
    if (!testing_has_gemm(gemms[_i], "own_context_after_openmp")) {
        return;
    }
    if (use_openmp() < 2) {
        testing_skip("own_context_after_openmp", "built without OpenMP");
        return;
    }
    layer l = make_layer();
    sebp_context *alone = testing_context(gemms[_i], 1, 0);
    compute_first(alone, &l);
    sebp_context_destroy(alone);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        int is_good =
            own_context_works(gemms[_i], 3, 1, &l) && own_context_works(gemms[_i], 0, 1, &l) &&
            setenv("SEBP_NUM_THREADS", "3", 1) == 0 && own_context_works(gemms[_i], 2, 1, &l);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            alarm(60);
            is_good = own_context_works(gemms[_i], 2, 1, &l);
            free_layer(&l);
            _exit(is_good ? 0 : 1);
        }
        int result = -1;
        is_good = is_good && waitpid(grandchild, &result, 0) == grandchild && result == 0;
        free_layer(&l);
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    free_layer(&l);
}
END_TEST

/* A host's pool, made after the fork, that counts its calls. */
static void count_calls(void *pool, int64_t tasks, sebp_task task, void *work)
{
    ++*(int *)pool;
    for (int64_t i = 0; i < tasks; i++) {
        task(work, i);
    }
}

START_TEST(own_pool_after_openmp)
{
    layer l = make_layer();
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    compute_first(context, &l);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        int calls = 0;
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = 4;
        options.parallel_for = count_calls;
        options.pool = &calls;
        sebp_context *own = NULL;
        int is_good = sebp_context_create(&options, &own) == SEBP_SUCCESS &&
                      sebp_context_threads(own) == 4 && computes_again(own, &l) && calls > 0;
        sebp_context_destroy(own);
        sebp_context_destroy(context);
        free_layer(&l);
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* A copied context leaves a pool of the parent's alone: its threads are gone. */
START_TEST(copied_pool)
{
    int calls = 0;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 4;
    options.parallel_for = count_calls;
    options.pool = &calls;
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    layer l = make_layer();
    compute_first(context, &l);
    ck_assert_int_gt(calls, 0);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        calls = 0;
        int is_good = computes_again(context, &l) && calls == 0;
        sebp_context_destroy(context);
        free_layer(&l);
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* A server that forks before it does anything else: no thread is gone, and none is given up, unless
 * the child says that one is. */
START_TEST(own_context_of_one_thread)
{
    if (count_threads() != 1) {
        testing_skip("own_context_of_one_thread", "the process has threads already");
        return;
    }
    layer l = make_layer();
    sebp_context *alone = testing_context(SEBP_GEMM_AUTO, 1, 0);
    compute_first(alone, &l);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        int is_good =
            own_context_works(SEBP_GEMM_AUTO, 3, with_openmp(3), &l) && computes_again(alone, &l);
        sebp_after_fork();
        is_good = is_good && own_context_works(SEBP_GEMM_AUTO, 3, 1, &l);
        sebp_context_destroy(alone);
        free_layer(&l);
        _exit(is_good ? 0 : 1);
    }
    testing_good_exit(child);
    sebp_context_destroy(alone);
    free_layer(&l);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("fork");
    TCase *tests = tcase_create("fork");
    tcase_add_test(tests, own_context_of_one_thread);
    tcase_add_loop_test(tests, copied_context, 0, GEMMS);
    tcase_add_loop_test(tests, context_of_another_thread, 0, GEMMS);
    tcase_add_loop_test(tests, own_context_after_openmp, 0, GEMMS);
    tcase_add_test(tests, own_pool_after_openmp);
    tcase_add_test(tests, copied_pool);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
