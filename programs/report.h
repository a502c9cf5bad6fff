/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file report.h
 * What reports are made of: times, medians, files.
 */
#ifndef SEBP_PROGRAMS_REPORT_H
#define SEBP_PROGRAMS_REPORT_H

#include <stdint.h>
#include <stdio.h>

double seconds(void);

/** Sorts the values. The median is not moved by the first steps, which meet cold memory. */
double median(double *values, int64_t count);

/**
 * Whether a file can be written, found out before hours of training and not after. An existing file
 * keeps its contents, a new one is not left behind.
 */
int check_writable(const char *path);

/** Opens a file for writing; NULL after a message. */
FILE *report_open(const char *path);

/** Closes it. A message if any of it could not be written. */
int report_close(FILE *file, const char *path);

#endif
