/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file text.h
 * Text files and their lines.
 */
#ifndef SEBP_MODELS_TEXT_H
#define SEBP_MODELS_TEXT_H

#include <stdint.h>

#include "models/support.h"

/** A part of a file's text; not NUL-terminated. */
struct slice {
    char *text;
    int64_t length;
};

/** The whole of a file, without the byte order mark that some editors begin UTF-8 with. */
int read_file(struct pool *pool, const char *path, struct slice *contents);

/** Takes the next line off `rest`, without its end ("\n" or "\r\n"). */
struct slice take_line(struct slice *rest);

int64_t count_lines(struct slice text);

#endif
