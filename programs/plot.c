/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file plot.c
 * SVG, written as it is drawn.
 */
#include <inttypes.h>
#include <stdarg.h>

#include "programs/plot.h"
#include "programs/report.h"

FILE *plot_begin(const char *path, int width, int height)
{
    FILE *file = report_open(path);
    if (file != NULL) {
        fprintf(file, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' ", width,
                height);
        fputs("font-family='sans-serif' font-size='12'>\n", file);
        plot_box(file, 0, 0, width, height, "white", 1.0);
    }
    return file;
}

int plot_end(FILE *file, const char *path)
{
    fputs("</svg>\n", file);
    return report_close(file, path);
}

void plot_text(FILE *file, double x, double y, const char *anchor, const char *format, ...)
{
    va_list arguments;
    fprintf(file, "<text x='%.1f' y='%.1f' text-anchor='%s'>", x, y, anchor);
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputs("</text>\n", file);
}

void plot_box(FILE *file, double x, double y, double width, double height, const char *color,
              double opacity)
{
    fprintf(file,
            "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' fill='%s' fill-opacity='%g'/>\n", x,
            y, width, height, color, opacity);
}

void plot_line(FILE *file, double x, double y, const char *color, int width, const char *format,
               ...)
{
    va_list arguments;
    fprintf(file, "<path d='M%.1f %.1f", x, y);
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fprintf(file, "' stroke='%s' stroke-width='%d'/>\n", color, width);
}

void plot_axes(FILE *file, const struct frame *frame)
{
    enum { MARKS = 4 };
    for (int i = 0; i <= MARKS; i++) {
        int y = frame->bottom - (frame->bottom - frame->top) * i / MARKS;
        int x = frame->left + (frame->right - frame->left) * i / MARKS;
        plot_line(file, frame->left, y, "#ddd", 1, "H%d", frame->right);
        plot_text(file, frame->left - 8, y + 4, "end", "%.2f", frame->highest * i / MARKS);
        plot_text(file, x, frame->bottom + 20, "middle", "%" PRId64, frame->steps * i / MARKS);
    }
}

void plot_curve(FILE *file, const struct frame *frame, const char *color, int width,
                const double *values, int64_t points)
{
    fprintf(file, "<polyline fill='none' stroke='%s' stroke-width='%d' points='", color, width);
    for (int64_t p = 0; p < points; p++) {
        fprintf(file, "%.1f,%.1f ",
                frame->left + (frame->right - frame->left) * ((double)p + 0.5) / (double)points,
                frame->bottom - (frame->bottom - frame->top) * values[p] / frame->highest);
    }
    fputs("'/>\n", file);
}

void add_means(const double *losses, int64_t steps, int64_t points, int64_t runs, double *values)
{
    for (int64_t p = 0; p < points; p++) {
        int64_t from = steps * p / points, to = steps * (p + 1) / points;
        for (int64_t i = from; i < to; i++) {
            values[p] += losses[i] / (double)((to - from) * runs);
        }
    }
}
