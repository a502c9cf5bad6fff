/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file report.c
 * Times, medians, files.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "models/support.h"
#include "programs/report.h"

double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare_doubles(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

double median(double *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return 0.5 * (values[(count - 1) / 2] + values[count / 2]);
}

int check_writable(const char *path)
{
    bool existed = access(path, F_OK) == 0;
    FILE *file = fopen(path, "ab");
    if (file == NULL) {
        return complain(REFUSED, "%s: cannot be written: %s", path, strerror(errno));
    }
    fclose(file);
    if (!existed) {
        remove(path);
    }
    return OK;
}

FILE *report_open(const char *path)
{
    FILE *file = fopen(path, "w");
    if (file == NULL) {
        complain(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    }
    return file;
}

int report_close(FILE *file, const char *path)
{
    bool written = !ferror(file);
    return fclose(file) == 0 && written ? OK : complain(FAILED, "%s: cannot be written", path);
}
