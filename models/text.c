/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file text.c
 * Text files and their lines.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/text.h"

static const char byte_order_mark[] = "\xEF\xBB\xBF"; /* that some editors begin UTF-8 with */

int read_file(struct pool *pool, const char *path, struct slice *contents)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return complain(REFUSED, "%s: %s", path, strerror(errno));
    }
    int64_t size = 0, room = 1 << 16;
    char *text = malloc((size_t)room);
    while (text != NULL) {
        size += (int64_t)fread(text + size, 1, (size_t)(room - size), file);
        if (size < room) {
            break;
        }
        room *= 2;
        char *grown = realloc(text, (size_t)room);
        if (grown == NULL) {
            free(text);
        }
        text = grown;
    }
    int status = OK;
    char *kept = NULL;
    if (text == NULL) {
        status = complain(FAILED, "%s: out of memory", path);
    } else if (ferror(file)) {
        status = complain(REFUSED, "%s: cannot be read: %s", path, strerror(errno));
    } else if ((kept = allocate(pool, size + 1, 1)) == NULL) {
        status = complain(FAILED, "%s: out of memory", path);
    } else {
        const int64_t mark = (int64_t)sizeof byte_order_mark - 1;
        bool marked = size >= mark && memcmp(text, byte_order_mark, (size_t)mark) == 0;
        int64_t skipped = marked ? mark : 0;
        memcpy(kept, text + skipped, (size_t)(size - skipped));
        *contents = (struct slice){kept, size - skipped};
    }
    free(text);
    fclose(file);
    return status;
}

struct slice take_line(struct slice *rest)
{
    char *end = memchr(rest->text, '\n', (size_t)rest->length);
    int64_t length = end != NULL ? end - rest->text : rest->length;
    struct slice line = {rest->text, length};
    int64_t taken = end != NULL ? length + 1 : length;
    *rest = (struct slice){rest->text + taken, rest->length - taken};
    if (line.length > 0 && line.text[line.length - 1] == '\r') {
        line.length--;
    }
    return line;
}

int64_t count_lines(struct slice text)
{
    int64_t lines = 0;
    while (text.length > 0) {
        take_line(&text);
        lines++;
    }
    return lines;
}
