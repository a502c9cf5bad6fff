/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file shootout_run.c
 * One run, in a process of its own.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "programs/report.h"
#include "programs/shootout.h"

/* ---- memory and parameters ---- */

/** The most memory this process has held since it began, or since forget_peak(). */
static int64_t peak_memory(void)
{
    int64_t kilobytes = -1;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL) {
        if (sscanf(line, "VmHWM: %" SCNd64 " kB", &kilobytes) == 1) {
            break;
        }
    }
    if (status != NULL) {
        fclose(status);
    }
    struct rusage usage;
    if (kilobytes < 0 && getrusage(RUSAGE_SELF, &usage) == 0) {
        kilobytes = usage.ru_maxrss;
    }
    return 1024 * kilobytes;
}

/** Counts the peak from here on, where the kernel allows it. */
static void forget_peak(void)
{
    FILE *file = fopen("/proc/self/clear_refs", "w");
    if (file != NULL) {
        fputs("5", file);
        fclose(file);
    }
}

/** Random parameters, and over them those of pretraining, as far as the shapes agree. */
static void begin_with(struct bert *m, const struct shared *shared, int classes)
{
    bert_initialise(m, (uint64_t)shared->options->model.seed, 0.02f);
    if (!shared->is_pretrained) {
        return;
    }
    int64_t count = m->parameters.count;
    if (classes != shared->data->pretrain_classes) { /* another head: the last two tensors */
        count = m->parameters.tensors[m->parameters.tensor_count - 2].value -
                m->parameters.tensors[0].value;
    }
    memcpy(m->parameters.tensors[0].value, shared->pretrained, (size_t)count * sizeof(float));
}

/* ---- one run ---- */

/** What the training loop's calls need. */
struct progress {
    const struct task *task;
    struct trainer *trainer;
    struct result *result;
    double *times; /* of the timed steps */
    int64_t timed;
};

static int optimize(void *with, double rate, int64_t step)
{
    struct trainer *trainer = ((struct progress *)with)->trainer;
    int status = trainer_status(trainer, step);
    return status == OK ? trainer_step(trainer, rate, step) : status;
}

static int after_step(void *with, int64_t step, double loss, struct step_times times)
{
    (void)loss;
    struct progress *progress = with;
    struct result *result = progress->result;
    const double took = times.forward + times.backward + times.optimizer;
    result->train_seconds += took;
    if (step >= progress->task->first_timed) {
        progress->times[progress->timed++] = took;
    }
    if (step == 1) {
        result->first_bytes = trainer_bytes(progress->trainer);
    }
    if (step + 1 == progress->task->first_timed) {
        result->peak = peak_memory();
        forget_peak();
    }
    return OK;
}

/** Trains and judges. */
static int run(const struct shared *shared, const struct task *task, struct bert *m,
               struct trainer *trainer, struct pool *pool, struct result *result)
{
    const struct options *o = shared->options;
    struct progress progress = {task, trainer, result, NULL, 0};
    const struct training training = {.data = task->train,
                                      .batch = o->model.batch,
                                      .steps = task->steps,
                                      .seed = task->seed + 1,
                                      .rate = task->rate,
                                      .optimize = optimize,
                                      .after = after_step,
                                      .with = &progress};
    progress.times = allocate(pool, task->steps + 1, sizeof *progress.times);
    if (progress.times == NULL) {
        return complain(FAILED, "out of memory for the times");
    }
    int status = train(m, pool, &training, result->losses);
    if (status != OK) {
        return status;
    }
    result->bytes = trainer_bytes(trainer);
    result->solve_seconds = trainer->solve_seconds;
    result->step_seconds =
        progress.timed > 0 ? median(progress.times, progress.timed) : (double)NAN;
    result->later_peak = peak_memory();
    result->peak = result->later_peak > result->peak ? result->later_peak : result->peak;
    status = o->unmerged ? OK : trainer_merge(trainer);
    if (status == OK) {
        result->score = judge(m, task->judged);
        status = bert_status(m);
    }
    if (status == OK && !isfinite(result->score.loss)) {
        status = complain(DIVERGED, "the loss of the judged data is not finite");
    }
    result->done = status == OK;
    return status;
}

/** Makes a context, a model and what trains it, and lets go of them. */
static int run_alone(const struct shared *shared, const struct task *task, struct result *result)
{
    const struct options *o = shared->options;
    sebp_context *context = NULL;
    int status = make_context(SEBP_DEVICE_CPU, o->model.threads, &context);
    if (status != OK) {
        return status;
    }
    if (task == NULL) {
        status = has_bases(context) ? OK : REFUSED;
        sebp_context_destroy(context);
        return status;
    }
    const struct bert_shape shape = {.layers = o->model.layers,
                                     .hidden = o->model.hidden,
                                     .heads = o->model.heads,
                                     .feed_forward = o->model.feed_forward,
                                     .length = o->model.max_length,
                                     .batch = o->model.batch,
                                     .vocabulary = shared->data->vocabulary.count,
                                     .classes = task->classes,
                                     .pad = shared->data->vocabulary.pad,
                                     .dropout = o->model.dropout,
                                     .bare_feed_forward = true};
    struct pool pool = {0};
    struct bert m;
    struct trainer trainer = {0};
    status = bert_create(&pool, &pool, &pool, context, &shape, &m);
    if (status == OK) {
        m.mode = BERT_SKIP;
        begin_with(&m, shared, task->classes);
        status = trainer_create(&m, &task->settings, task->seed, &trainer);
    }
    if (status == OK) {
        status = run(shared, task, &m, &trainer, &pool, result);
    }
    if (status == OK && task->train == &shared->data->pretrain) {
        memcpy(shared->pretrained, m.parameters.tensors[0].value,
               (size_t)m.parameters.count * sizeof(float));
    }
    trainer_destroy(&trainer);
    bert_destroy(&m);
    pool_free(&pool);
    sebp_context_destroy(context);
    return status;
}

/* ---- processes ---- */

void *share(int64_t bytes)
{
    void *memory =
        mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory != MAP_FAILED ? memory : NULL;
}

int64_t result_bytes(int64_t steps)
{
    return (int64_t)sizeof(struct result) + steps * (int64_t)sizeof(double);
}

int run_task(const struct shared *shared, const struct task *task, struct result *result)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        exit(run_alone(shared, task, result));
    }
    if (child < 0) {
        return complain(FAILED, "no process for a run: %s", strerror(errno));
    }
    int status = 0;
    pid_t ended;
    do {
        ended = waitpid(child, &status, 0);
    } while (ended < 0 && errno == EINTR);
    if (ended < 0) {
        return complain(FAILED, "a run cannot be waited for: %s", strerror(errno));
    }
    if (WIFSIGNALED(status)) {
        return complain(FAILED, "a run was ended by signal %d", WTERMSIG(status));
    }
    return WEXITSTATUS(status);
}
