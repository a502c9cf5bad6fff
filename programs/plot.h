/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file plot.h
 * SVG: a canvas, text, and loss curves in a frame.
 */
#ifndef SEBP_PROGRAMS_PLOT_H
#define SEBP_PROGRAMS_PLOT_H

#include <stdint.h>
#include <stdio.h>

/** Opens a file with a white canvas; NULL after a message. */
FILE *plot_begin(const char *path, int width, int height);

/** Ends it. A message if any of it could not be written. */
int plot_end(FILE *file, const char *path);

/** Text at a place. anchor: "start", "middle" or "end". It holds no <, > or &. */
void plot_text(FILE *file, double x, double y, const char *anchor, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 5, 6)))
#endif
    ;

void plot_box(FILE *file, double x, double y, double width, double height, const char *color,
              double opacity);

/** A line from a place, as SVG's path says it: "h24", "V300". */
void plot_line(FILE *file, double x, double y, const char *color, int width, const char *format,
               ...)
#ifdef __GNUC__
    __attribute__((format(printf, 6, 7)))
#endif
    ;

/** Where curves are drawn, and what its corners stand for: 0 to `highest`, 0 to `steps`. */
struct frame {
    int left, right, top, bottom;
    double highest;
    int64_t steps;
};

/** Grid lines with losses, and steps below. */
void plot_axes(FILE *file, const struct frame *frame);

/** A curve of `points` values, each a share of the steps. */
void plot_curve(FILE *file, const struct frame *frame, const char *color, int width,
                const double *values, int64_t points);

/** The means of `points` shares of `steps` values, each added to values[p] over `runs`. */
void add_means(const double *losses, int64_t steps, int64_t points, int64_t runs, double *values);

#endif
