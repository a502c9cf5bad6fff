/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench --choices: each product of a linear layer by the library's own GEMM, by oneDNN and by the
 * one that SEBP_GEMM_AUTO chooses, over a grid of shapes and of shares of active rows. The three take
 * turns.
 */
#define _POSIX_C_SOURCE 200809L

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "choices.h"
#include "inputs.h"

enum { AUTO = SEBP_GEMM_AUTO, WAYS = 3, PRODUCTS = 3 };

static const char *const product_names[PRODUCTS] = {"Y", "dX", "dW"};

static const struct {
    int64_t m, k, n;
} shapes[] = {
    {64, 768, 768},   {256, 128, 512},   {512, 384, 1536},  {512, 768, 768},   {1024, 768, 3072},
    {2048, 768, 768}, {2048, 3072, 768}, {4096, 768, 3072}, {512, 2048, 8192}, {1024, 4096, 4096},
};

static const double activities[] = {1, 0.5, 0.25, 0.1, 0.02};

enum {
    SHAPES = sizeof shapes / sizeof *shapes,
    ACTIVITIES = sizeof activities / sizeof *activities
};

typedef struct case_work {
    const machine *m;
    sebp_matrix x, w, y, dx, dw; /* Y and dY are one */
    sebp_rows *rows;
    sebp_linear_options options;
} case_work;

static void perform(case_work *work, int product, int way)
{
    sebp_context *context = work->m->contexts[way];
    sebp_status status;
    if (product == 0) {
        status = sebp_linear_forward(context, &work->x, &work->w, NULL, work->rows, &work->options,
                                     &work->y);
    } else {
        status = sebp_linear_backward(context, &work->y, &work->x, &work->w, work->rows,
                                      &work->options, product == 1 ? &work->dx : NULL,
                                      product == 2 ? &work->dw : NULL, NULL);
    }
    if (status != SEBP_SUCCESS)
        die(FAILED, "%s: %s", sebp_context_message(context), sebp_status_string(status));
}

/* On one thread its own time, which other programs disturb less; on several the time that passes. */
static double clock_ms(const case_work *work)
{
    struct timespec now;
    clock_gettime(work->m->threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

/* The shortest turn of each way, in milliseconds; of one that is not in this build, 0. Whoever else uses the
 * machine can only make a turn longer. */
static void measure(case_work *work, const options *o, int product, double *best)
{
    double begin = now_ms();
    for (int way = 0; way < WAYS; way++) {
        best[way] = 0;
        if (work->m->contexts[way] != NULL)
            perform(work, product, way);
    }
    for (int turn = 0; turn < o->repetitions || now_ms() - begin < o->seconds * 100; turn++) {
        for (int way = 0; way < WAYS; way++) {
            if (work->m->contexts[way] == NULL)
                continue;
            double start = clock_ms(work);
            perform(work, product, way);
            double took = clock_ms(work) - start;
            best[way] = turn == 0 || took < best[way] ? took : best[way];
        }
    }
}

/* How far behind the choices are. */
typedef struct summary {
    int cases, near;
    double worst;
} summary;

static void judge(const options *o, const double *ms, summary *all, const char *line)
{
    double best = 0;
    for (int way = AUTO + 1; way < WAYS; way++) {
        if (ms[way] > 0 && (best == 0 || ms[way] < best))
            best = ms[way];
    }
    double behind = ms[AUTO] / best;
    all->cases++;
    all->near += behind <= 1.05;
    all->worst = behind > all->worst ? behind : all->worst;
    printf(o->csv ? "%s,%.4f,%.4f,%.4f,%.3f\n" : "%s %10.4f %10.4f %10.4f %8.2f\n", line,
           ms[SEBP_GEMM_NATIVE], ms[SEBP_GEMM_ONEDNN], ms[AUTO], behind);
    fflush(stdout);
}

static sebp_matrix make(int64_t rows, int64_t cols, sebp_dtype dtype, const options *o,
                        const machine *m)
{
    sebp_matrix made = {NULL, rows, cols, cols, dtype};
    made.data = allocate(matrix_bytes(&made));
    fill_random(&made, o->seed, m->memory_threads);
    return made;
}

static void run_shape(const machine *m, const options *o, int which, sebp_dtype dtype, summary *all)
{
    const int64_t rows = shapes[which].m, k = shapes[which].k, n = shapes[which].n;
    case_work *work = allocate(sizeof *work);
    memset(work, 0, sizeof *work);
    work->m = m;
    work->options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    work->options.inactive = SEBP_INACTIVE_LEAVE;
    work->x = make(rows, k, dtype, o, m);
    work->w = make(n, k, dtype, o, m);
    work->y = make(rows, n, dtype, o, m);
    work->dx = make(rows, k, dtype, o, m);
    work->dw = make(n, k, SEBP_F32, o, m);
    for (int a = 0; a < ACTIVITIES; a++) {
        shape sizes = {"", rows, k, n, 64};
        int64_t active = (int64_t)((double)rows * activities[a]);
        sebp_status status = activities[a] == 1 ? sebp_rows_all(rows, &work->rows)
                                                : tail_rows(&sizes, o->seed, active, &work->rows);
        if (status != SEBP_SUCCESS)
            die(FAILED, "making rows: %s", sebp_status_string(status));
        for (int product = 0; product < PRODUCTS; product++) {
            double ms[WAYS];
            char line[96];
            measure(work, o, product, ms);
            snprintf(line, sizeof line,
                     o->csv ? "%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%" PRId64 ",%s"
                            : "%6" PRId64 " %6" PRId64 " %6" PRId64 " %6s %8" PRId64 " %4s",
                     rows, k, n, sebp_dtype_name(dtype), active, product_names[product]);
            judge(o, ms, all, line);
        }
        sebp_rows_destroy(work->rows);
    }
    sebp_matrix *matrices[] = {&work->x, &work->w, &work->y, &work->dx, &work->dw};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        free(matrices[i]->data);
    free(work);
}

void measure_choices(const machine *m, const options *o)
{
    summary all = {0, 0, 0};
    if (o->csv) {
        puts("M,K,N,dtype,active,product,native_ms,onednn_ms,auto_ms,auto_over_best");
    } else {
        print_machine_line(m);
        puts(
            "The shortest turns in ms of the library's own GEMM, of oneDNN and of the one that is\n"
            "chosen, and the last over the best of the two.\n");
        printf("%6s %6s %6s %6s %8s %4s %10s %10s %10s %8s\n", "M", "K", "N", "dtype", "active", "",
               "native", "onednn", "auto", "behind");
    }
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (int i = 0; i < (o->quick ? 1 : SHAPES) && (o->dtypes >> bf16 & 1); i++)
            run_shape(m, o, i, bf16 ? SEBP_BF16 : SEBP_F32, &all);
    }
    if (!o->csv) {
        printf("\nWithin 5%% of the best in %d of %d cases (%.0f%%), at most %.0f%% behind.\n",
               all.near, all.cases, 100.0 * all.near / all.cases, 100 * (all.worst - 1));
    }
}
