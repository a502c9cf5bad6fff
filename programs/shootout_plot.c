/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file shootout_plot.c
 * The plot: for each method a line with the metric of each seed and its memory to the left, and to
 * the right the loss curves.
 */
#include <inttypes.h>
#include <math.h>

#include "programs/plot.h"
#include "programs/shootout.h"

enum {
    PLOT_WIDTH = 1050,
    TOP = 60,
    LINE_HEIGHT = 40,
    DOTS_LEFT = 210,
    DOTS_RIGHT = 470,
    BARS_LEFT = 500,
    BARS_RIGHT = 640,
    CURVES_LEFT = 740,
    CURVES_RIGHT = 1030
};

static const char *const colors[METHODS] = {"#9a9a9a", "#222222", "#a9746e", "#f0a63a", "#3aa6a6",
                                            "#2f8f4e", "#1f5fa8", "#5aa0e0", "#c0504d"};

static double metric_at(const struct report *r, int method, int64_t seed)
{
    return 100 * metric_of(r->options, r->rows[method].runs[seed]->score);
}

/** The metric of each seed as a dot, the mean as a bar. `bottom`: where the axis is. */
static void plot_dots(FILE *file, const struct report *r, int bottom)
{
    const int mean = r->options->by_matthews ? 1 : 0;
    double low = 1e9, high = -1e9;
    for (int method = 0; method < METHODS; method++) {
        for (int64_t i = 0; r->rows[method].ran && i < r->options->seeds; i++) {
            double metric = metric_at(r, method, i);
            low = metric < low ? metric : low;
            high = metric > high ? metric : high;
        }
    }
    low = floor(low - 0.5);
    high = low + 4 * ceil((high + 0.5 - low) / 4); /* five marks at whole numbers */
    const double scale = (DOTS_RIGHT - DOTS_LEFT) / (high - low);
    for (int i = 0; i <= 4; i++) {
        double x = DOTS_LEFT + (DOTS_RIGHT - DOTS_LEFT) * i / 4.0;
        plot_line(file, x, TOP, "#ddd", 1, "V%d", bottom);
        plot_text(file, x, bottom + 18, "middle", "%.4g", low + (high - low) * i / 4.0);
    }
    plot_text(file, (DOTS_LEFT + DOTS_RIGHT) / 2.0, bottom + 38, "middle",
              "%s of dev, %s; before: %.1f",
              r->options->by_matthews ? "Matthews correlation" : "accuracy",
              r->options->by_matthews ? "x 100" : "%", 100 * metric_of(r->options, r->before));
    int y = TOP + LINE_HEIGHT / 2;
    for (int method = 0; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (!row->ran) {
            continue;
        }
        plot_text(file, DOTS_LEFT - 14, y + 4, "end", "%s", method_names[method]);
        for (int64_t i = 0; i < r->options->seeds; i++) {
            fprintf(file, "<circle cx='%.1f' cy='%d' r='4' fill='%s' fill-opacity='0.5'/>\n",
                    DOTS_LEFT + scale * (metric_at(r, method, i) - low), y, colors[method]);
        }
        plot_line(file, DOTS_LEFT + scale * (100 * row->mean[mean] - low), y - 10, colors[method],
                  3, "v20");
        y += LINE_HEIGHT;
    }
}

/** Gradient and state, and lighter what is shared. */
static void plot_bars(FILE *file, const struct report *r, int bottom)
{
    const double middle = (BARS_LEFT + BARS_RIGHT) / 2.0 + 20;
    double largest = 0.0;
    for (int method = 0; method < METHODS; method++) {
        const struct bytes *bytes = &r->rows[method].bytes;
        double all = (double)(bytes->gradient + bytes->state + bytes->shared);
        largest = r->rows[method].ran && all > largest ? all : largest;
    }
    int y = TOP + LINE_HEIGHT / 2;
    for (int method = 0; method < METHODS; method++) {
        const struct bytes *bytes = &r->rows[method].bytes;
        if (!r->rows[method].ran) {
            continue;
        }
        const double scale = largest > 0.0 ? (BARS_RIGHT - BARS_LEFT) / largest : 0.0;
        double own = scale * (double)(bytes->gradient + bytes->state);
        double shared = scale * (double)bytes->shared;
        plot_box(file, BARS_LEFT, y - 10, own, 20, colors[method], 1.0);
        plot_box(file, BARS_LEFT + own, y - 10, shared, 20, colors[method], 0.35);
        plot_text(file, BARS_LEFT + own + shared + 6, y + 4, "start", "%.0f KB",
                  1e-3 * (double)(bytes->gradient + bytes->state + bytes->shared));
        y += LINE_HEIGHT;
    }
    plot_text(file, middle, bottom + 18, "middle", "gradient + state (lighter: bases, R)");
    plot_text(file, middle, bottom + 38, "middle", "of the feed-forward weights");
}

/** Mean losses over the seeds, each point a share of the steps. */
static void plot_losses(FILE *file, const struct report *r, int bottom)
{
    enum { POINTS = 40 };
    const int64_t points = min_int64(POINTS, r->steps);
    double values[METHODS][POINTS] = {{0}};
    struct frame frame = {CURVES_LEFT, CURVES_RIGHT, TOP, bottom, 0.0, r->steps};
    for (int method = 0; method < METHODS; method++) {
        for (int64_t i = 0; r->rows[method].ran && i < r->options->seeds; i++) {
            add_means(r->rows[method].runs[i]->losses, r->steps, points, r->options->seeds,
                      values[method]);
        }
        for (int64_t p = 0; p < points; p++) {
            double value = values[method][p];
            frame.highest = value > frame.highest ? value : frame.highest;
        }
    }
    frame.highest *= 1.05;
    plot_axes(file, &frame);
    plot_text(file, (CURVES_LEFT + CURVES_RIGHT) / 2.0, bottom + 38, "middle",
              "training loss by step, mean of the seeds");
    for (int method = 0; method < METHODS; method++) {
        if (r->rows[method].ran) {
            plot_curve(file, &frame, colors[method], 2, values[method], points);
        }
    }
}

int write_plot(const struct report *r)
{
    const int64_t H = r->options->model.hidden, F = r->options->model.feed_forward;
    int bottom = TOP;
    for (int method = 0; method < METHODS; method++) {
        bottom += r->rows[method].ran ? LINE_HEIGHT : 0;
    }
    bottom = bottom > TOP + 4 * LINE_HEIGHT ? bottom : TOP + 4 * LINE_HEIGHT;
    FILE *file = plot_begin(r->options->plot, PLOT_WIDTH, bottom + 60);
    if (file == NULL) {
        return FAILED;
    }
    fputs("<g font-size='15'>\n", file);
    plot_text(file, 20, 30, "start",
              "The same model, data and seeds; of each feed-forward weight %" PRId64 " of %" PRId64
              " elements train (full: all)",
              r->options->lora_rank * (H + F), H * F);
    fputs("</g>\n", file);
    plot_dots(file, r, bottom);
    plot_bars(file, r, bottom);
    plot_losses(file, r, bottom);
    return plot_end(file, r->options->plot);
}
