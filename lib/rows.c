/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rows.c
 * Row sets: made from indices, masks or lengths, and read.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>
#include <string.h>

#include "integers.h"
#include "row_set.h"

sebp_status sebp_rows_make(int64_t total, int64_t room, sebp_rows **made)
{
    if (room > SEBP_MAX_IN_ARRAY)
        return SEBP_ERROR_OVERFLOW;
    sebp_rows *rows = calloc(1, sizeof *rows);
    if (rows == NULL)
        return SEBP_ERROR_MEMORY;
    rows->total = total;
    rows->copies = sebp_copies_make();
    if (room > 0)
        rows->indices = malloc((size_t)room * sizeof *rows->indices);
    if (rows->copies == NULL || (room > 0 && rows->indices == NULL)) {
        sebp_rows_destroy(rows);
        return SEBP_ERROR_MEMORY;
    }
    *made = rows;
    return SEBP_SUCCESS;
}

sebp_status sebp_rows_make_weights(sebp_rows *rows, int64_t room)
{
    rows->weight_copies = sebp_copies_make();
    if (rows->weight_copies != NULL)
        rows->weights = malloc((size_t)room * sizeof *rows->weights);
    return rows->weights != NULL ? SEBP_SUCCESS : SEBP_ERROR_MEMORY;
}

sebp_status sebp_rows_finish(sebp_rows *rows, int64_t count, sebp_rows **made)
{
    rows->count = count;
    rows->is_run = count == 0 || rows->indices[count - 1] - rows->indices[0] == count - 1;
    *made = rows;
    return SEBP_SUCCESS;
}

sebp_status sebp_rows_all(int64_t total, sebp_rows **rows)
{
    if (rows == NULL)
        return SEBP_ERROR_NULL;
    if (total < 0)
        return SEBP_ERROR_SIZE;
    sebp_rows *made;
    sebp_status status = sebp_rows_make(total, total, &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t i = 0; i < total; i++)
        made->indices[i] = i;
    return sebp_rows_finish(made, total, rows);
}

sebp_status sebp_rows_from_mask(const uint8_t *mask, int64_t total, sebp_rows **rows)
{
    if (rows == NULL || (mask == NULL && total != 0))
        return SEBP_ERROR_NULL;
    if (total < 0)
        return SEBP_ERROR_SIZE;
    int64_t count = 0;
    for (int64_t i = 0; i < total; i++)
        count += mask[i] != 0;
    sebp_rows *made;
    sebp_status status = sebp_rows_make(total, count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    count = 0;
    for (int64_t i = 0; i < total; i++) {
        if (mask[i] != 0)
            made->indices[count++] = i;
    }
    return sebp_rows_finish(made, count, rows);
}

sebp_status sebp_rows_from_lengths(const int64_t *lengths, int64_t sequences,
                                   int64_t sequence_length, sebp_rows **rows)
{
    if (rows == NULL || (lengths == NULL && sequences != 0))
        return SEBP_ERROR_NULL;
    if (sequences < 0 || sequence_length < 0)
        return SEBP_ERROR_SIZE;
    int64_t total, count = 0;
    if (__builtin_mul_overflow(sequences, sequence_length, &total) || sequences > SEBP_MAX_IN_ARRAY)
        return SEBP_ERROR_OVERFLOW;
    for (int64_t s = 0; s < sequences; s++) {
        if (lengths[s] < 0 || lengths[s] > sequence_length)
            return SEBP_ERROR_VALUE;
        count += lengths[s];
    }
    sebp_rows *made;
    sebp_status status = sebp_rows_make(total, count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    count = 0;
    for (int64_t s = 0; s < sequences; s++) {
        for (int64_t i = 0; i < lengths[s]; i++)
            made->indices[count++] = s * sequence_length + i;
    }
    return sebp_rows_finish(made, count, rows);
}

sebp_status sebp_rows_from_indices(const int64_t *indices, int64_t count, int64_t total,
                                   sebp_rows **rows)
{
    if (rows == NULL || (indices == NULL && count != 0))
        return SEBP_ERROR_NULL;
    if (count < 0 || total < 0)
        return SEBP_ERROR_SIZE;
    if (count > total) /* some come twice: refused before `count` indices are read */
        return SEBP_ERROR_ROWS;
    if (count > SEBP_MAX_IN_ARRAY)
        return SEBP_ERROR_OVERFLOW;
    for (int64_t i = 0; i < count; i++) {
        int64_t min = i > 0 ? indices[i - 1] + 1 : 0;
        if (indices[i] < min || indices[i] >= total)
            return SEBP_ERROR_ROWS;
    }
    sebp_rows *made;
    sebp_status status = sebp_rows_make(total, count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    if (count > 0)
        memcpy(made->indices, indices, (size_t)count * sizeof *indices);
    return sebp_rows_finish(made, count, rows);
}

void sebp_rows_destroy(sebp_rows *rows)
{
    if (rows != NULL) {
        sebp_copies_destroy(rows->copies);
        sebp_copies_destroy(rows->weight_copies);
        free(rows->indices);
        free(rows->weights);
        free(rows);
    }
}

int64_t sebp_rows_count(const sebp_rows *rows)
{
    return rows != NULL ? rows->count : 0;
}

int64_t sebp_rows_total(const sebp_rows *rows)
{
    return rows != NULL ? rows->total : 0;
}

double sebp_rows_activity(const sebp_rows *rows)
{
    return rows != NULL && rows->total > 0 ? (double)rows->count / (double)rows->total : 0;
}

const int64_t *sebp_rows_indices(const sebp_rows *rows)
{
    return rows != NULL && rows->count > 0 ? rows->indices : NULL;
}

const float *sebp_rows_weights(const sebp_rows *rows)
{
    return rows != NULL ? rows->weights : NULL;
}

double sebp_rows_variance(const sebp_rows *rows)
{
    return rows != NULL ? rows->variance : 0;
}
