/* SPDX-License-Identifier: Apache-2.0 */
/** @file move.c Rows from here to there, and zeros. Rows are bytes, whatever their dtype. */
#include "kernels.h"

void SEBP_NAME(move_rows)(char *to, int64_t to_stride, const int64_t *to_rows, const char *from,
                          int64_t from_stride, const int64_t *from_rows, int64_t count,
                          int64_t row_bytes)
{
    if (row_bytes == 0) {
        return; /* the pointers may be NULL */
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t to_row = to_rows != NULL ? to_rows[i] : i;
        int64_t from_row = from_rows != NULL ? from_rows[i] : i;
        memcpy(to + to_row * to_stride, from + from_row * from_stride, (size_t)row_bytes);
    }
}

void SEBP_NAME(expand_rows)(char *data, int64_t stride, const int64_t *rows, int64_t count,
                            int64_t row_bytes)
{
    if (row_bytes == 0) {
        return;
    }
    /* If a row is in its place already, so are all rows before it. */
    for (int64_t i = count - 1; i >= 0 && rows[i] != i; i--) {
        memcpy(data + rows[i] * stride, data + i * stride, (size_t)row_bytes);
    }
}

void SEBP_NAME(zero)(void *data, int64_t bytes, bool stream)
{
    if (bytes == 0) {
        return;
    }
    char *at = data;
    int64_t vec_bytes = sizeof(vec);
    int64_t head = -(intptr_t)at & (vec_bytes - 1);
    if (!stream || bytes < head + vec_bytes) {
        memset(at, 0, (size_t)bytes);
        return;
    }
    memset(at, 0, (size_t)head);
    int64_t done = head;
    for (; done + vec_bytes <= bytes; done += vec_bytes) {
        vec_stream((float *)(void *)(at + done), vec_zero());
    }
    memset(at + done, 0, (size_t)(bytes - done));
}

void SEBP_NAME(stream_fence)(void)
{
    vec_stream_fence();
}
