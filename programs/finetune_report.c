/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune_report.c
 * The table, the losses, the plot.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "programs/finetune.h"
#include "programs/plot.h"
#include "programs/report.h"

/** One row of the table: a number for each mode that ran. */
static void print_row(const struct report *r, const char *label, const char *format,
                      const double values[BERT_MODES])
{
    printf("%-38s", label);
    for (int mode = 0; mode < BERT_MODES; mode++) {
        if (r->runs[mode].done) {
            char text[32] = "-";
            if (!isnan(values[mode])) {
                snprintf(text, sizeof text, format, values[mode]);
            }
            printf("%11s", text);
        }
    }
    putchar('\n');
}

static double largest_difference(const struct report *r, const struct run *a, const struct run *b)
{
    double largest = 0.0;
    for (int64_t i = 0; i < r->steps; i++) {
        double difference = fabs(a->losses[i] - b->losses[i]);
        largest = difference > largest ? difference : largest;
    }
    return largest;
}

void print_table(const struct report *r)
{
    double step[BERT_MODES], forward_ms[BERT_MODES], backward_ms[BERT_MODES];
    double optimizer_ms[BERT_MODES], activity[BERT_MODES], flops[BERT_MODES];
    double faster_backward[BERT_MODES], faster_step[BERT_MODES], apart[BERT_MODES];
    double last[BERT_MODES], correct[BERT_MODES], majority[BERT_MODES];
    const struct run *dense = &r->runs[BERT_DENSE];
    printf("%-38s", "");
    for (int mode = 0; mode < BERT_MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        printf("%11s", mode_names[mode]);
        forward_ms[mode] = 1e3 * run->forward;
        backward_ms[mode] = 1e3 * run->backward;
        optimizer_ms[mode] = 1e3 * run->optimizer;
        step[mode] = forward_ms[mode] + backward_ms[mode] + optimizer_ms[mode];
        activity[mode] = 100 * run->activity;
        correct[mode] = 100 * run->correct;
        majority[mode] = 100 * r->majority;
        last[mode] = run->losses[r->steps - 1];
        flops[mode] = faster_backward[mode] = faster_step[mode] = apart[mode] = (double)NAN;
        if (dense->done && mode != BERT_DENSE) {
            flops[mode] = 100 * run->flops / dense->flops;
            faster_backward[mode] = dense->backward / run->backward;
            faster_step[mode] = step[BERT_DENSE] / step[mode];
            apart[mode] = largest_difference(r, run, dense);
        }
    }
    putchar('\n');
    print_row(r, "time per step, ms (medians)", "%.1f", step);
    print_row(r, "  forward", "%.1f", forward_ms);
    print_row(r, "  backward", "%.1f", backward_ms);
    print_row(r, "  optimizer", "%.1f", optimizer_ms);
    print_row(r, "activity: tokens among padded rows, %", "%.1f", activity);
    print_row(r, "flop of linear backward, % of dense", "%.1f", flops);
    print_row(r, "speedup of backward", "%.2f", faster_backward);
    print_row(r, "speedup of step", "%.2f", faster_step);
    print_row(r, "loss of the last step", "%.4f", last);
    print_row(r, "largest |difference| of losses", "%.1e", apart);
    print_row(r, "held-out accuracy, %", "%.1f", correct);
    print_row(r, "  always the majority class, %", "%.1f", majority);
}

int write_csv(const struct report *r)
{
    FILE *file = report_open(r->options->csv);
    if (file == NULL) {
        return FAILED;
    }
    fputs("step", file);
    for (int mode = 0; mode < BERT_MODES; mode++) {
        if (r->runs[mode].done) {
            fprintf(file, ",%s", mode_names[mode]);
        }
    }
    fputc('\n', file);
    for (int64_t i = 0; i < r->steps; i++) {
        fprintf(file, "%" PRId64, i + 1);
        for (int mode = 0; mode < BERT_MODES; mode++) {
            if (r->runs[mode].done) {
                fprintf(file, ",%.9g", r->runs[mode].losses[i]);
            }
        }
        fputc('\n', file);
    }
    return report_close(file, r->options->csv);
}

/* ---- the plot: loss curves to the left, a bar of times for each mode to the right ---- */

enum { PLOT_WIDTH = 1000, PLOT_HEIGHT = 400, TOP = 50, BOTTOM = 340, LEFT = 60, MIDDLE = 560 };

static const char *const mode_colors[BERT_MODES] = {"#f0a63a", "#1f5fa8", "#2f8f4e", "#8e4ba8"};

static void plot_losses(FILE *file, const struct report *r)
{
    enum { POINTS = 240 };
    const int64_t points = min_int64(POINTS, r->steps);
    struct frame frame = {LEFT, MIDDLE, TOP, BOTTOM, 0.0, r->steps};
    for (int mode = 0; mode < BERT_MODES; mode++) {
        const struct run *run = &r->runs[mode];
        for (int64_t i = 0; i < r->steps && run->done; i++) {
            frame.highest = run->losses[i] > frame.highest ? run->losses[i] : frame.highest;
        }
    }
    frame.highest *= 1.05;
    plot_axes(file, &frame);
    plot_text(file, (LEFT + MIDDLE) / 2.0, BOTTOM + 42, "middle", "step");
    int legend = LEFT + 10;
    for (int mode = 0; mode < BERT_MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        double values[POINTS] = {0};
        add_means(run->losses, r->steps, points, 1, values);
        const int width = mode == BERT_DENSE ? 5 : 2; /* those drawn later lie on it */
        plot_curve(file, &frame, mode_colors[mode], width, values, points);
        plot_line(file, legend, TOP - 16, mode_colors[mode], width, "h24");
        plot_text(file, legend + 30, TOP - 12, "start", "loss, %s", mode_names[mode]);
        legend += 125;
    }
}

static void plot_times(FILE *file, const struct report *r)
{
    static const char *const parts[] = {"forward", "backward", "optimizer"};
    static const char *const colors[] = {"#9ec5e8", "#c0504d", "#b8b8b8"};
    const int left = MIDDLE + 70, width = 60;
    double longest = 0.0;
    for (int mode = 0; mode < BERT_MODES; mode++) {
        const struct run *run = &r->runs[mode];
        double time = run->forward + run->backward + run->optimizer;
        longest = run->done && time > longest ? time : longest;
    }
    int column = 0;
    for (int mode = 0; mode < BERT_MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        const double times[] = {run->forward, run->backward, run->optimizer};
        const int x = left + column++ * (width + 30);
        double y = BOTTOM;
        for (int part = 0; part < 3; part++) {
            double height = (BOTTOM - TOP) * times[part] / longest;
            y -= height;
            plot_box(file, x, y, width, height, colors[part], 1.0);
            if (height > 14) {
                plot_text(file, x + width / 2.0, y + height / 2 + 4, "middle", "%.1f",
                          1e3 * times[part]);
            }
        }
        plot_text(file, x + width / 2.0, BOTTOM + 20, "middle", "%s", mode_names[mode]);
    }
    for (int part = 0; part < 3; part++) {
        const int x = MIDDLE + 60 + part * 100;
        plot_box(file, x, TOP - 22, 12, 12, colors[part], 1.0);
        plot_text(file, x + 18, TOP - 12, "start", "%s", parts[part]);
    }
    plot_text(file, MIDDLE + 70, BOTTOM + 42, "start", "median time per step, ms");
}

int write_plot(const struct report *r)
{
    FILE *file = plot_begin(r->options->plot, PLOT_WIDTH, PLOT_HEIGHT);
    if (file == NULL) {
        return FAILED;
    }
    plot_losses(file, r);
    plot_times(file, r);
    return plot_end(file, r->options->plot);
}
