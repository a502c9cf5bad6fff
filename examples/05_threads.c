/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 05_threads.c
 * A program that has threads of its own hands them to the library; and what errors look like.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

enum { M = 1024, K = 256, N = 512, THREADS = 4 };

static float x[M * K], w[N * K], y[2][M * N];

/* ---- a parallel_for ---- */

/** The work of one call, which threads take indices from. */
struct job {
    pthread_mutex_t mutex;
    int64_t next, tasks, calls;
    sebp_task task;
    void *work;
};

static void *take_indices(void *argument)
{
    struct job *job = argument;
    for (;;) {
        pthread_mutex_lock(&job->mutex);
        int64_t index = job->next++;
        pthread_mutex_unlock(&job->mutex);
        if (index >= job->tasks) {
            return NULL;
        }
        job->task(job->work, index);
    }
}

/** task(work, i) exactly once for each i. A real program would keep its threads between calls. */
static void parallel_for(void *pool, int64_t tasks, sebp_task task, void *work)
{
    struct job *job = pool;
    pthread_t threads[THREADS];
    int started = 0;
    job->next = 0;
    job->tasks = tasks;
    job->task = task;
    job->work = work;
    job->calls++;
    while (started < THREADS - 1 &&
           pthread_create(&threads[started], NULL, take_indices, job) == 0) {
        started++;
    }
    take_indices(job); /* this thread works too, and alone where no other could be made */
    for (int i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
}

/* ---- errors ---- */

/** Each call returns a status; what it refused, and the numbers at odds, are in the message. */
static void show(const char *what, const sebp_context *context, sebp_status status)
{
    printf("%s\n    status:  %s\n    message: %s\n", what, sebp_status_string(status),
           sebp_context_message(context));
}

int main(void)
{
    for (int i = 0; i < M * K; i++) {
        x[i] = (float)rand() / (float)RAND_MAX;
    }
    for (int i = 0; i < N * K; i++) {
        w[i] = (float)rand() / (float)RAND_MAX;
    }
    sebp_matrix x_view = sebp_matrix_f32(x, M, K), w_view = sebp_matrix_f32(w, N, K);

    /* The first context has OpenMP's threads, the second those above. They never meet. */
    struct job job = {.mutex = PTHREAD_MUTEX_INITIALIZER};
    sebp_context *contexts[2] = {NULL, NULL};
    char message[256] = "";
    for (int i = 0; i < 2; i++) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.gemm = SEBP_GEMM_NATIVE; /* the same bits on any number of threads */
        options.message = message;       /* a context that is not made cannot tell why itself */
        options.message_bytes = sizeof message;
        if (i == 1) {
            options.threads = THREADS;
            options.parallel_for = parallel_for;
            options.pool = &job;
        }
        sebp_status status = sebp_context_create(&options, &contexts[i]);
        sebp_matrix y_view = sebp_matrix_f32(y[i], M, N);
        if (status == SEBP_SUCCESS) {
            status = sebp_linear_forward(contexts[i], &x_view, &w_view, NULL, NULL, NULL, &y_view);
        }
        if (status != SEBP_SUCCESS) {
            fprintf(stderr, "%s: %s\n", sebp_status_string(status),
                    contexts[i] == NULL ? message : sebp_context_message(contexts[i]));
            return 1;
        }
    }
    printf("parallel_for was called %d times; the results are %s\n\n", (int)job.calls,
           memcmp(y[0], y[1], sizeof y[0]) == 0 ? "the same, bit for bit" : "NOT the same");

    /* Refused calls leave their outputs as they were. */
    sebp_matrix y_view = sebp_matrix_f32(y[0], M, N), narrow = sebp_matrix_f32(y[0], M, N - 1);
    show("Y of 511 columns for a weight of 512 rows:", contexts[0],
         sebp_linear_forward(contexts[0], &x_view, &w_view, NULL, NULL, NULL, &narrow));
    show("dW asked for without X:", contexts[0],
         sebp_linear_backward(contexts[0], &y_view, NULL, NULL, NULL, NULL, NULL, &w_view, NULL));
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_energy(1.5);
    show("a rule that drops more than there is:", contexts[0],
         sebp_linear_backward(contexts[0], &y_view, &x_view, NULL, NULL, &options, NULL, &w_view,
                              NULL));
    printf("outputs are %s\n",
           memcmp(y[0], y[1], sizeof y[0]) == 0 ? "as they were" : "NOT as they were");
    sebp_context_destroy(contexts[0]);
    sebp_context_destroy(contexts[1]);
    return memcmp(y[0], y[1], sizeof y[0]) == 0 ? 0 : 1;
}
