/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads: contexts in threads of their own, row sets between them, and hosts that bring their own
 * parallel_for.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

#define THREADS 4
#define CALLS   6

/* One layer, and what one thread alone makes of it. */
typedef struct test_layer {
    int64_t M, N, K;
    sebp_matrix dy, x, w, bias;
    sebp_rows *rows;
    sebp_matrix dx, dw, db, y;
} test_layer;

static void make_outputs(const test_layer *sizes, sebp_matrix out[4])
{
    out[0] = testing_matrix(sizes->M, sizes->K, sizes->K, SEBP_F32);
    out[1] = testing_matrix(sizes->N, sizes->K, sizes->K, SEBP_F32);
    out[2] = testing_matrix(1, sizes->N, sizes->N, SEBP_F32);
    out[3] = testing_matrix(sizes->M, sizes->N, sizes->N, SEBP_F32);
}

static sebp_status compute(sebp_context *context, const test_layer *l, const sebp_matrix out[4])
{
    sebp_status status = sebp_linear_backward(context, &l->dy, &l->x, &l->w, l->rows, NULL, &out[0],
                                              &out[1], &out[2]);
    if (status == SEBP_SUCCESS) {
        status = sebp_linear_forward(context, &l->x, &l->w, &l->bias, l->rows, NULL, &out[3]);
    }
    return status;
}

static sebp_context *make_context(sebp_gemm gemm, int threads, sebp_parallel_for host, void *pool)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = testing_gemm(gemm);
    options.threads = threads;
    options.parallel_for = host;
    options.pool = pool;
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    return context;
}

static int equal_to_first(const test_layer *l, const sebp_matrix out[4])
{
    return testing_same_bits(&l->dx, &out[0]) && testing_same_bits(&l->dw, &out[1]) &&
           testing_same_bits(&l->db, &out[2]) && testing_same_bits(&l->y, &out[3]);
}

static test_layer make_layer(sebp_dtype dtype, testing_values values)
{
    test_layer l = {.M = 400, .N = 70, .K = 90};
    l.dy = testing_matrix(l.M, l.N, l.N, dtype);
    l.x = testing_matrix(l.M, l.K, l.K, dtype);
    l.w = testing_matrix(l.N, l.K, l.K, dtype);
    l.bias = testing_matrix(1, l.N, l.N, SEBP_F32);
    testing_fill(&l.dy, values);
    testing_fill(&l.x, values);
    testing_fill(&l.w, values);
    testing_fill(&l.bias, values);
    uint8_t *mask = calloc((size_t)l.M, 1);
    for (int64_t i = 0; i < l.M; i++) {
        mask[i] = testing_chance(0.4);
    }
    mask[1] = 1;
    ck_assert_int_eq(sebp_rows_from_mask(mask, l.M, &l.rows), SEBP_SUCCESS);
    free(mask);

    sebp_matrix out[4];
    make_outputs(&l, out);
    sebp_context *context = make_context(SEBP_GEMM_NATIVE, 1, NULL, NULL);
    ck_assert_int_eq(compute(context, &l, out), SEBP_SUCCESS);
    sebp_context_destroy(context);
    l.dx = out[0];
    l.dw = out[1];
    l.db = out[2];
    l.y = out[3];
    for (int i = 0; i < 4; i++) {
        ck_assert_int_gt(testing_nonzeros(&out[i]), 0);
    }
    return l;
}

static void free_layer(test_layer *l)
{
    sebp_matrix *all[] = {&l->dy, &l->x, &l->w, &l->bias, &l->dx, &l->dw, &l->db, &l->y};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        testing_release(all[i]);
    }
    sebp_rows_destroy(l->rows);
}

/* What a thread of a test does; it may not fail the test itself, so it counts. */
typedef struct worker {
    pthread_t thread;
    const test_layer *layer;
    sebp_gemm gemm;
    sebp_matrix out[4];
    pthread_barrier_t *start;
    int good; /* calls that came to the same bits */
} worker;

static void *work_alone(void *argument)
{
    worker *self = argument;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = testing_gemm(self->gemm);
    options.threads = 2;
    sebp_context *context = NULL;
    pthread_barrier_wait(self->start);
    sebp_status status = sebp_context_create(&options, &context);
    for (int call = 0; call < CALLS && status == SEBP_SUCCESS; call++) {
        for (int i = 0; i < 4; i++) {
            testing_poison(&self->out[i]);
        }
        sebp_rows *found = NULL;
        status = sebp_rows_find(context, &self->layer->dy, NULL, &found);
        int all_found = sebp_rows_count(found) == self->layer->M;
        sebp_rows_destroy(found);
        if (status == SEBP_SUCCESS) {
            status = compute(context, self->layer, self->out);
        }
        self->good += status == SEBP_SUCCESS && all_found && equal_to_first(self->layer, self->out);
    }
    sebp_context_destroy(context);
    return NULL;
}

/* Contexts made and used at once, over one layer and one row set; integers, so that any GEMM and
 * any order of sums comes to the same bits. */
START_TEST(contexts_at_once)
{
    sebp_info info = {.size_bytes = sizeof info};
    ck_assert_int_eq(sebp_info_get(NULL, &info), SEBP_SUCCESS);
    test_layer l = make_layer(SEBP_F32, TESTING_INTEGER);
    worker workers[THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, THREADS);
    for (int t = 0; t < THREADS; t++) {
        sebp_gemm gemm = t % 2                    ? SEBP_GEMM_NATIVE
                         : info.onednn[0] != '\0' ? SEBP_GEMM_ONEDNN
                                                  : SEBP_GEMM_AUTO;
        workers[t] = (worker){.layer = &l, .gemm = gemm, .start = &start};
        make_outputs(&l, workers[t].out);
        ck_assert_int_eq(pthread_create(&workers[t].thread, NULL, work_alone, &workers[t]), 0);
    }
    for (int t = 0; t < THREADS; t++) {
        ck_assert_int_eq(pthread_join(workers[t].thread, NULL), 0);
    }
    for (int t = 0; t < THREADS; t++) {
        ck_assert_msg(workers[t].good == CALLS, "thread %d: %d of %d calls were right", t,
                      workers[t].good, CALLS);
        for (int i = 0; i < 4; i++) {
            testing_release(&workers[t].out[i]);
        }
    }
    pthread_barrier_destroy(&start);
    free_layer(&l);
}
END_TEST

/* A host's pool: threads that take the next index until there is none. */
typedef struct pool {
    int threads;
    atomic_llong next;
    int64_t tasks;
    sebp_task task;
    void *work;
    atomic_llong done;
    int64_t calls;
    atomic_int inside; /* a nested call would find it set */
    int nested;
} pool;

static void *take_tasks(void *argument)
{
    pool *self = argument;
    int64_t i;
    while ((i = atomic_fetch_add(&self->next, 1)) < self->tasks) {
        self->task(self->work, i);
        atomic_fetch_add(&self->done, 1);
    }
    return NULL;
}

static void run_in_pool(void *argument, int64_t tasks, sebp_task task, void *work)
{
    pool *self = argument;
    self->nested |= atomic_exchange(&self->inside, 1);
    self->calls++;
    self->tasks = tasks;
    self->task = task;
    self->work = work;
    atomic_store(&self->next, 0);
    atomic_store(&self->done, 0);
    pthread_t threads[8];
    for (int t = 0; t < self->threads; t++) {
        ck_assert_int_eq(pthread_create(&threads[t], NULL, take_tasks, self), 0);
    }
    for (int t = 0; t < self->threads; t++) {
        pthread_join(threads[t], NULL);
    }
    ck_assert_int_eq(atomic_load(&self->done), tasks);
    atomic_store(&self->inside, 0);
}

/* One thread, from the last task to the first. */
static void run_backwards(void *argument, int64_t tasks, sebp_task task, void *work)
{
    pool *self = argument;
    self->calls++;
    for (int64_t i = tasks - 1; i >= 0; i--) {
        task(work, i);
    }
}

/* _i: the dtype. The library's own GEMM gives the same bits whoever runs its tasks. */
START_TEST(host_pools)
{
    test_layer l = make_layer(_i ? SEBP_BF16 : SEBP_F32, TESTING_REAL);
    for (int threads = 1; threads <= 4; threads++) {
        for (int backwards = 0; backwards < 2; backwards++) {
            pool host = {.threads = threads};
            sebp_context *context = make_context(SEBP_GEMM_NATIVE, threads,
                                                 backwards ? run_backwards : run_in_pool, &host);
            ck_assert_int_eq(sebp_context_threads(context), threads);
            sebp_matrix out[4];
            make_outputs(&l, out);
            ck_assert_int_eq(compute(context, &l, out), SEBP_SUCCESS);
            ck_assert_msg(equal_to_first(&l, out), "%d threads", threads);
            ck_assert(threads == 1 || host.calls > 0);
            ck_assert(!host.nested);

            sebp_rows *found = NULL;
            ck_assert_int_eq(sebp_rows_find(context, &l.dy, NULL, &found), SEBP_SUCCESS);
            ck_assert_int_eq(sebp_rows_count(found), l.M);
            sebp_rows_destroy(found);
            for (int i = 0; i < 4; i++) {
                testing_release(&out[i]);
            }
            sebp_context_destroy(context);
        }
    }
    free_layer(&l);
}
END_TEST

/* As many threads as asked for, OpenMP's or one, and always the same bits. */
START_TEST(thread_counts)
{
    test_layer l = make_layer(_i ? SEBP_BF16 : SEBP_F32, TESTING_REAL);
    for (int threads = 1; threads <= 9; threads++) {
        sebp_context *context = make_context(SEBP_GEMM_NATIVE, threads, NULL, NULL);
        sebp_matrix out[4];
        make_outputs(&l, out);
        ck_assert_int_eq(compute(context, &l, out), SEBP_SUCCESS);
        ck_assert_msg(equal_to_first(&l, out), "%d threads", threads);
        for (int i = 0; i < 4; i++) {
            testing_release(&out[i]);
        }
        sebp_context_destroy(context);
    }
    free_layer(&l);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("threads");
    TCase *tests = tcase_create("threads");
    tcase_add_test(tests, contexts_at_once);
    tcase_add_loop_test(tests, host_pools, 0, 2);
    tcase_add_loop_test(tests, thread_counts, 0, 2);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
