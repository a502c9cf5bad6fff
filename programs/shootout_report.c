/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file shootout_report.c
 * What the runs came to: files, summary, table.
 */
#include <inttypes.h>
#include <math.h>

#include "programs/report.h"
#include "programs/shootout.h"

void summarise(const struct options *o, struct row *row)
{
    const double n = (double)o->seeds;
    double times[MAX_SEEDS], all_times[MAX_SEEDS], solves[MAX_SEEDS], squares[2] = {0.0, 0.0};
    for (int64_t i = 0; i < o->seeds; i++) {
        const struct result *result = row->runs[i];
        row->mean[0] += result->score.accuracy / n;
        row->mean[1] += result->score.matthews / n;
        row->peak += (double)result->peak / n;
        row->later_peak += (double)result->later_peak / n;
        times[i] = result->step_seconds;
        all_times[i] = result->train_seconds;
        solves[i] = result->solve_seconds;
        row->bytes = result->bytes; /* of the last; those of a growing table differ a little */
        row->first_bytes = result->first_bytes;
    }
    for (int64_t i = 0; i < o->seeds; i++) {
        double apart[] = {row->runs[i]->score.accuracy - row->mean[0],
                          row->runs[i]->score.matthews - row->mean[1]};
        squares[0] += apart[0] * apart[0];
        squares[1] += apart[1] * apart[1];
    }
    for (int i = 0; i < 2; i++) {
        row->deviation[i] = o->seeds > 1 ? sqrt(squares[i] / (n - 1.0)) : 0.0;
    }
    row->step_seconds = median(times, o->seeds);
    row->train_seconds = median(all_times, o->seeds);
    row->solve_seconds = median(solves, o->seeds);
}

/* ---- files ---- */

/** What has been written of a file is in it, whatever becomes of this process. */
static int written(FILE *file, const char *path)
{
    return fflush(file) == 0 && !ferror(file) ? OK
                                              : complain(FAILED, "%s: cannot be written", path);
}

int begin_files(struct report *r)
{
    const struct options *o = r->options;
    int status = OK;
    if (o->csv != NULL) {
        r->csv = report_open(o->csv);
        if (r->csv == NULL) {
            return FAILED;
        }
        fputs("method,seed,rate,trained_elements,accuracy,matthews,dev_loss,step_seconds,"
              "train_seconds,solve_seconds,peak_bytes,later_peak_bytes,gradient_bytes,state_bytes,"
              "shared_bytes\n",
              r->csv);
        fprintf(r->csv, "before,,,,%.9g,%.9g,%.9g,,,,,,,,\n", r->before.accuracy,
                r->before.matthews, r->before.loss);
        status = written(r->csv, o->csv);
    }
    if (status == OK && o->losses != NULL) {
        r->losses = report_open(o->losses);
        if (r->losses == NULL) {
            return FAILED;
        }
        fputs("method,seed,step,loss\n", r->losses);
        status = written(r->losses, o->losses);
    }
    return status;
}

int add_run(const struct report *r, int method, int64_t seed, const struct result *result)
{
    const struct options *o = r->options;
    const struct row *row = &r->rows[method];
    int status = OK;
    if (r->losses != NULL) {
        for (int64_t step = 0; step < r->steps; step++) {
            fprintf(r->losses, "%s,%" PRId64 ",%" PRId64 ",%.9g\n", method_names[method], seed,
                    step + 1, result->losses[step]);
        }
        status = written(r->losses, o->losses);
    }
    if (status == OK && r->csv != NULL) {
        fprintf(r->csv,
                "%s,%" PRId64 ",%.9g,%" PRId64 ",%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%" PRId64 ",%" PRId64
                ",%" PRId64 ",%" PRId64 ",%" PRId64 "\n",
                method_names[method], seed, row->rate, row->trained, result->score.accuracy,
                result->score.matthews, result->score.loss, result->step_seconds,
                result->train_seconds, result->solve_seconds, result->peak, result->later_peak,
                result->bytes.gradient, result->bytes.state, result->bytes.shared);
        status = written(r->csv, o->csv);
    }
    return status;
}

int end_files(struct report *r, int status)
{
    const struct options *o = r->options;
    if (r->csv != NULL && report_close(r->csv, o->csv) != OK) {
        status = status == OK ? FAILED : status;
    }
    if (r->losses != NULL && report_close(r->losses, o->losses) != OK) {
        status = status == OK ? FAILED : status;
    }
    r->csv = r->losses = NULL;
    return status;
}

/* ---- the table ---- */

void print_setting(const struct report *r)
{
    const struct options *o = r->options;
    const struct data *data = r->data;
    const int64_t H = o->model.hidden, F = o->model.feed_forward, k = o->lora_rank * (H + F);
    printf("%" PRId64 " layers, hidden %" PRId64 ", %" PRId64 " heads, %" PRId64
           " words; of each feed-forward weight %" PRId64 " of %" PRId64 " elements (%.2f%%)\n",
           o->model.layers, H, o->model.heads, data->vocabulary.count, k, H * F,
           100.0 * (double)k / (double)(H * F));
    printf("%" PRId64 " sentences to train on, %" PRId64 " to choose rates by, %" PRId64
           " of dev (%.1f%% of the majority class); %" PRId64 " steps of %" PRId64 ", %" PRId64
           " seeds\n",
           data->train.count, data->validation.count, data->dev.count, 100 * data->majority,
           r->steps, o->model.batch, o->seeds);
}

void print_table(const struct report *r)
{
    const struct bytes *full = r->rows[FULL].ran ? &r->rows[FULL].bytes : NULL;
    bool edge = false;
    printf("\n%-24s %8s %9s %14s %14s %15s %15s %16s %9s\n", "", "", "trained", "accuracy, %",
           "Matthews", "steps/s", "peak memory, MB", "gradient + state", "bases, R");
    printf("%-24s %8s %9s %14s %14s %7s %7s %7s %7s %8s %7s %9s\n", "method", "rate", "elements",
           "of dev", "x 100", "later", "all", "all", "later", "KB", "of full", "KB");
    printf("%-24s %8s %9s %7.1f %6s %7.1f %6s\n", "before fine-tuning", "-", "-",
           100 * r->before.accuracy, "", 100 * r->before.matthews, "");
    for (int method = 0; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (!row->ran) {
            continue;
        }
        double kilobytes = 1e-3 * (double)(row->bytes.gradient + row->bytes.state);
        char share[16] = "-";
        if (full != NULL) {
            snprintf(share, sizeof share, "%.1f%%",
                     1e5 * kilobytes / (double)(full->gradient + full->state));
        }
        char speed[16] = "-"; /* too few steps to tell */
        if (isfinite(row->step_seconds)) {
            snprintf(speed, sizeof speed, "%.1f", 1.0 / row->step_seconds);
        }
        printf("%-24s %7.3g%c %9" PRId64
               " %7.1f ± %4.1f %7.1f ± %4.1f %7s %7.1f %7.1f %7.1f %8.1f %7s %9.1f\n",
               method_names[method], row->rate, row->at_the_edge ? '*' : ' ', row->trained,
               100 * row->mean[0], 100 * row->deviation[0], 100 * row->mean[1],
               100 * row->deviation[1], speed, (double)r->steps / row->train_seconds,
               1e-6 * row->peak, 1e-6 * row->later_peak, kilobytes, share,
               1e-3 * (double)row->bytes.shared);
        edge = edge || row->at_the_edge;
    }
    if (edge) {
        puts("* the best of the rates tried, but the lowest or highest of them");
    }
    for (int method = SPARSEGRAD; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (row->ran) {
            printf("%s: %" PRId64
                   " steps of full training before (%.1f KB of gradients, state and sums), "
                   "%.2f s for its bases\n",
                   method_names[method], r->options->basis_steps,
                   1e-3 * (double)(row->first_bytes.gradient + row->first_bytes.state +
                                   row->first_bytes.shared),
                   row->solve_seconds);
        }
    }
}

/* ---- differences ---- */

/**
 * What a standard error is multiplied by for an interval that holds the mean with 95% probability:
 * Student's t with so many degrees of freedom. With t = sqrt(degrees) tan(x) the density is
 * proportional to cos(x)^(degrees - 1).
 */
static double t_of(int64_t degrees)
{
    enum { STEPS = 100000 };
    const double step = acos(0.0) / STEPS, power = (double)degrees - 1.0;
    double whole = 0.0, sum = 0.0, x = 0.0;
    for (int i = 0; i < STEPS; i++) {
        whole += pow(cos((i + 0.5) * step), power);
    }
    for (int i = 0; sum < 0.95 * whole; i++) {
        sum += pow(cos((i + 0.5) * step), power);
        x = (i + 1.0) * step;
    }
    return sqrt((double)degrees) * tan(x);
}

void print_differences(const struct report *r)
{
    const struct options *o = r->options;
    const struct row *full = &r->rows[FULL];
    if (!full->ran || o->seeds < 2) {
        return;
    }
    const double n = (double)o->seeds, t = t_of(o->seeds - 1);
    printf("\nagainst full from the same seeds, with 95%% intervals (x 100):\n");
    for (int method = 0; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (!row->ran || method == FULL) {
            continue;
        }
        double mean[2], half[2], squares[2] = {0.0, 0.0};
        for (int i = 0; i < 2; i++) {
            mean[i] = row->mean[i] - full->mean[i];
        }
        for (int64_t seed = 0; seed < o->seeds; seed++) {
            const struct score a = row->runs[seed]->score, b = full->runs[seed]->score;
            const double apart[2] = {a.accuracy - b.accuracy - mean[0],
                                     a.matthews - b.matthews - mean[1]};
            squares[0] += apart[0] * apart[0];
            squares[1] += apart[1] * apart[1];
        }
        for (int i = 0; i < 2; i++) {
            half[i] = t * sqrt(squares[i] / (n - 1.0) / n);
        }
        printf("%-24s accuracy %+5.1f (%+.1f to %+.1f), Matthews %+5.1f (%+.1f to %+.1f)\n",
               method_names[method], 100 * mean[0], 100 * (mean[0] - half[0]),
               100 * (mean[0] + half[0]), 100 * mean[1], 100 * (mean[1] - half[1]),
               100 * (mean[1] + half[1]));
    }
}
