/* SPDX-License-Identifier: Apache-2.0 */
/** @file sequences.c Where the texts of a batch lie. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdbool.h>
#include <stdlib.h>

#include <sebp/rows.h>

#include "integers.h"
#include "text_list.h"

/* `count` texts, of which nothing is known yet. */
static sebp_status make_sequences(int64_t count, sebp_sequences **made)
{
    if (count > SEBP_MAX_IN_ARRAY / 2 - 1)
        return SEBP_ERROR_OVERFLOW;
    sebp_sequences *sequences = calloc(1, sizeof *sequences);
    if (sequences == NULL)
        return SEBP_ERROR_MEMORY;
    sequences->firsts = calloc((size_t)(2 * count + 1), sizeof *sequences->firsts);
    if (sequences->firsts == NULL) {
        free(sequences);
        return SEBP_ERROR_MEMORY;
    }
    sequences->offsets = sequences->firsts + count;
    sequences->count = count;
    *made = sequences;
    return SEBP_SUCCESS;
}

/* Text `s`, after those before it. */
static void set_text(sebp_sequences *sequences, int64_t s, int64_t first, int64_t length)
{
    sequences->firsts[s] = first;
    sequences->offsets[s + 1] = sequences->offsets[s] + length;
    sequences->max_length = sebp_max(sequences->max_length, length);
}

sebp_status sebp_sequences_from_lengths(const int64_t *lengths, int64_t count,
                                        sebp_sequences **sequences)
{
    if (sequences == NULL || (lengths == NULL && count != 0))
        return SEBP_ERROR_NULL;
    if (count < 0)
        return SEBP_ERROR_SIZE;
    if (count > SEBP_MAX_IN_ARRAY)
        return SEBP_ERROR_OVERFLOW;
    int64_t total = 0;
    for (int64_t s = 0; s < count; s++) {
        if (lengths[s] < 0)
            return SEBP_ERROR_VALUE;
        if (__builtin_add_overflow(total, lengths[s], &total))
            return SEBP_ERROR_OVERFLOW;
    }
    sebp_sequences *made;
    sebp_status status = make_sequences(count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t s = 0; s < count; s++)
        set_text(made, s, made->offsets[s], lengths[s]);
    made->total = total;
    *sequences = made;
    return SEBP_SUCCESS;
}

/* Whether `count` texts of `sequence_length` rows each may be, and how many rows they have. */
static sebp_status check_padded(int64_t count, int64_t sequence_length, int64_t *total)
{
    if (count < 0 || sequence_length < 0)
        return SEBP_ERROR_SIZE;
    if (count > SEBP_MAX_IN_ARRAY || __builtin_mul_overflow(count, sequence_length, total))
        return SEBP_ERROR_OVERFLOW;
    return SEBP_SUCCESS;
}

sebp_status sebp_sequences_from_padded(const int64_t *lengths, int64_t count,
                                       int64_t sequence_length, sebp_sequences **sequences)
{
    int64_t total = 0;
    if (sequences == NULL || (lengths == NULL && count != 0))
        return SEBP_ERROR_NULL;
    sebp_status status = check_padded(count, sequence_length, &total);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t s = 0; s < count; s++) {
        if (lengths[s] < 0 || lengths[s] > sequence_length)
            return SEBP_ERROR_VALUE;
    }
    sebp_sequences *made;
    status = make_sequences(count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t s = 0; s < count; s++)
        set_text(made, s, s * sequence_length, lengths[s]);
    made->total = total;
    *sequences = made;
    return SEBP_SUCCESS;
}

/* The first run of bytes that are not 0, and whether it is the only one. */
static bool find_run(const uint8_t *mask, int64_t length, int64_t *first, int64_t *run)
{
    int64_t at = 0;
    while (at < length && mask[at] == 0)
        at++;
    *first = at < length ? at : 0;
    for (*run = 0; at < length && mask[at] != 0; at++)
        ++*run;
    while (at < length && mask[at] == 0)
        at++;
    return at == length;
}

sebp_status sebp_sequences_from_mask(const uint8_t *mask, int64_t count, int64_t sequence_length,
                                     sebp_sequences **sequences)
{
    int64_t total = 0;
    if (sequences == NULL || (mask == NULL && count != 0 && sequence_length != 0))
        return SEBP_ERROR_NULL;
    sebp_status status = check_padded(count, sequence_length, &total);
    if (status != SEBP_SUCCESS)
        return status;
    sebp_sequences *made;
    status = make_sequences(count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t s = 0; s < count; s++) {
        int64_t first = 0, run = 0;
        if (sequence_length > 0 &&
            !find_run(mask + s * sequence_length, sequence_length, &first, &run)) {
            sebp_sequences_destroy(made);
            return SEBP_ERROR_ROWS;
        }
        set_text(made, s, s * sequence_length + first, run);
    }
    made->total = total;
    *sequences = made;
    return SEBP_SUCCESS;
}

/* Cumulative lengths of either size. */
static sebp_status from_offsets(const int64_t *wide, const int32_t *narrow, int64_t count,
                                sebp_sequences **sequences)
{
    if (sequences == NULL || (wide == NULL && narrow == NULL))
        return SEBP_ERROR_NULL;
    if (count < 0)
        return SEBP_ERROR_SIZE;
    if (count > SEBP_MAX_IN_ARRAY - 1)
        return SEBP_ERROR_OVERFLOW;
    int64_t before = 0;
    for (int64_t s = 0; s <= count; s++) {
        int64_t offset = wide != NULL ? wide[s] : narrow[s];
        if (s == 0 ? offset != 0 : offset < before)
            return SEBP_ERROR_VALUE;
        before = offset;
    }
    sebp_sequences *made;
    sebp_status status = make_sequences(count, &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t s = 0; s < count; s++) {
        int64_t end = wide != NULL ? wide[s + 1] : narrow[s + 1];
        set_text(made, s, made->offsets[s], end - made->offsets[s]);
    }
    made->total = before;
    *sequences = made;
    return SEBP_SUCCESS;
}

sebp_status sebp_sequences_from_offsets(const int64_t *offsets, int64_t count,
                                        sebp_sequences **sequences)
{
    return from_offsets(offsets, NULL, count, sequences);
}

sebp_status sebp_sequences_from_offsets32(const int32_t *offsets, int64_t count,
                                          sebp_sequences **sequences)
{
    return from_offsets(NULL, offsets, count, sequences);
}

void sebp_sequences_destroy(sebp_sequences *sequences)
{
    if (sequences != NULL) {
        free(sequences->firsts);
        free(sequences);
    }
}

int64_t sebp_sequences_count(const sebp_sequences *sequences)
{
    return sequences != NULL ? sequences->count : 0;
}

int64_t sebp_sequences_total(const sebp_sequences *sequences)
{
    return sequences != NULL ? sequences->total : 0;
}

int64_t sebp_sequences_max_length(const sebp_sequences *sequences)
{
    return sequences != NULL ? sequences->max_length : 0;
}

const int64_t *sebp_sequences_firsts(const sebp_sequences *sequences)
{
    return sequences != NULL ? sequences->firsts : NULL;
}

const int64_t *sebp_sequences_offsets(const sebp_sequences *sequences)
{
    return sequences != NULL ? sequences->offsets : NULL;
}

sebp_status sebp_sequences_rows(const sebp_sequences *sequences, sebp_rows **rows)
{
    if (sequences == NULL || rows == NULL)
        return SEBP_ERROR_NULL;
    const int64_t active = sequences->offsets[sequences->count];
    if (active > SEBP_MAX_IN_ARRAY) {
        return SEBP_ERROR_OVERFLOW;
    }
    int64_t *indices = malloc((size_t)sebp_max(active, 1) * sizeof *indices);
    if (indices == NULL)
        return SEBP_ERROR_MEMORY;
    for (int64_t s = 0; s < sequences->count; s++) {
        for (int64_t i = sequences->offsets[s]; i < sequences->offsets[s + 1]; i++)
            indices[i] = sequences->firsts[s] + i - sequences->offsets[s];
    }
    sebp_status status = sebp_rows_from_indices(indices, active, sequences->total, rows);
    free(indices);
    return status;
}
