/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file select.c
 * Top-k in one pass: candidates are listed until there are about 2k, then cut to the k largest, whose
 * least magnitude is the floor that later elements must be above. A cut takes time linear in its
 * candidates and comes after k new ones at least, so that all of it is linear in the elements fed.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "select.h"

enum { LEAST_ROOM = 4096 }; /* candidates beside k, so that a cut is worth its histograms */

sebp_status sebp_selection_begin(sebp_selection *selection, int64_t k)
{
    *selection = (sebp_selection){.k = k};
    if (__builtin_add_overflow(k, k > LEAST_ROOM ? k : LEAST_ROOM, &selection->room) ||
        selection->room > PTRDIFF_MAX / (int64_t)sizeof(int64_t))
        return SEBP_ERROR_OVERFLOW;
    size_t room = (size_t)selection->room;
    selection->list.indices = malloc(room * sizeof *selection->list.indices);
    selection->list.values = malloc(room * sizeof *selection->list.values);
    if (selection->list.indices && selection->list.values)
        return SEBP_SUCCESS;
    sebp_selection_end(selection);
    return SEBP_ERROR_MEMORY;
}

void sebp_selection_end(sebp_selection *selection)
{
    free(selection->list.indices);
    free(selection->list.values);
    selection->list.indices = NULL;
    selection->list.values = NULL;
}

/* Magnitudes are ordered as these are; NaN and Inf come last. */
static uint32_t magnitude_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* The k-th largest magnitude of a list of at least k, digit by digit, the highest first; *ties is how
 * many of those with it are among the k. */
static uint32_t kth_magnitude(const sebp_sparse *list, int64_t k, int64_t *ties)
{
    static const int shifts[] = {20, 10, 0}, widths[] = {11, 10, 10};
    uint32_t found = 0, mask = 0;
    for (int digit = 0; digit < 3; digit++) {
        int64_t count[1 << 11] = {0};
        int shift = shifts[digit];
        uint32_t digits = (UINT32_C(1) << widths[digit]) - 1;
        for (int64_t i = 0; i < list->count; i++) {
            uint32_t bits = magnitude_bits(list->values[i]);
            if ((bits & mask) == found)
                count[bits >> shift & digits]++;
        }
        uint32_t d = digits;
        while (count[d] < k)
            k -= count[d--];
        found |= d << shift;
        mask |= digits << shift;
    }
    *ties = k;
    return found;
}

/* Cuts the candidates to the k largest. */
static void cut(sebp_selection *selection)
{
    sebp_sparse *list = &selection->list;
    int64_t ties, kept = 0;
    uint32_t least = kth_magnitude(list, selection->k, &ties);
    for (int64_t i = 0; i < list->count; i++) {
        uint32_t bits = magnitude_bits(list->values[i]);
        if (bits > least || (bits == least && ties-- > 0)) {
            list->indices[kept] = list->indices[i];
            list->values[kept++] = list->values[i];
        }
    }
    list->count = kept;
    memcpy(&selection->floor, &least, sizeof least);
    if (!isfinite(selection->floor))
        selection->floor = FLT_MAX;
    selection->is_cut = true;
}

/* Before the first cut there is no floor, and zeros count too. */
static int64_t list_all(sebp_selection *selection, const sebp_matrix *panel, int64_t first)
{
    sebp_sparse *list = &selection->list;
    int64_t elements = panel->rows * panel->cols, done = 0;
    for (; done < elements && list->count < selection->room; done++, list->count++) {
        const float *row = (const float *)panel->data + done / panel->cols * panel->stride;
        list->indices[list->count] = first + done;
        list->values[list->count] = row[done % panel->cols];
    }
    return done;
}

void sebp_selection_feed(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                         int64_t first)
{
    int64_t elements = panel->rows * panel->cols;
    int64_t done = selection->is_cut ? 0 : list_all(selection, panel, first);
    while (done < elements) {
        if (selection->list.count == selection->room)
            cut(selection);
        context->backend->list_above(context->device, panel, selection->floor, first, &done,
                                     &selection->list, selection->room);
    }
}

sebp_status sebp_selection_finish(sebp_selection *selection, const sebp_sparse *top)
{
    const sebp_sparse *list = &selection->list;
    if (list->count > selection->k)
        cut(selection);
    for (int64_t i = 0; i < list->count; i++) {
        if (!isfinite(list->values[i]))
            return SEBP_ERROR_NONFINITE;
    }
    memcpy(top->indices, list->indices, (size_t)list->count * sizeof *top->indices);
    memcpy(top->values, list->values, (size_t)list->count * sizeof *top->values);
    return SEBP_SUCCESS;
}
