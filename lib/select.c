/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file select.c
 * Top-k in linear time, on all threads. A sample tells about how large an element must be; those that
 * are are counted, block by block, which says where each goes, then listed: somewhat more than k,
 * and these cut to k. Where the sample was wrong, or too many are equal, the k-th magnitude is found
 * among all of them, digit by digit. Whatever the sample says, the result is the same.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "select.h"

enum {
    MIN_ROOM = 16 << 10, /* elements beside k */
    MIN_BLOCK = 8 << 10, /* elements */
    MAX_BLOCKS = 1 << 10,
    SAMPLED_ONE_OF = 128,
    MAX_SAMPLES = 64 << 10,
    RUN = 8 /* samples that follow each other: few, as what is large lies together */
};

sebp_status sebp_selection_begin(sebp_context *context, sebp_selection *selection, int64_t k)
{
    *selection = (sebp_selection){.k = k};
    if (__builtin_add_overflow(k, k > MIN_ROOM ? k : MIN_ROOM, &selection->room) ||
        selection->room > PTRDIFF_MAX / (int64_t)sizeof(int64_t))
        return SEBP_ERROR_OVERFLOW;
    size_t room = (size_t)selection->room;
    size_t threads = (size_t)context->backend->threads(context->device);
    selection->list.indices = malloc(room * sizeof *selection->list.indices);
    selection->list.values = malloc(room * sizeof *selection->list.values);
    selection->counts = malloc(threads * SEBP_DIGITS * sizeof *selection->counts);
    selection->blocks = malloc(MAX_BLOCKS * sizeof *selection->blocks);
    if (selection->list.indices && selection->list.values && selection->counts && selection->blocks)
        return SEBP_SUCCESS;
    sebp_selection_end(selection);
    return SEBP_ERROR_MEMORY;
}

void sebp_selection_end(sebp_selection *selection)
{
    free(selection->list.indices);
    free(selection->list.values);
    free(selection->counts);
    free(selection->blocks);
    *selection = (sebp_selection){0};
}

/* Magnitudes are ordered as these are; NaN and Inf come last. */
static uint32_t magnitude_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* The k-th largest magnitude of a matrix of at least k elements, digit by digit, the highest first;
 * *ties is how many of those with it are among the k. */
static uint32_t kth_magnitude(sebp_context *context, const sebp_selection *selection,
                              const sebp_matrix *from, int64_t k, int64_t *ties)
{
    static const int shifts[] = {2 * SEBP_DIGIT_BITS, SEBP_DIGIT_BITS, 0};
    uint32_t found = 0, mask = 0;
    int64_t *counts = selection->counts;
    for (int digit = 0; digit < 3; digit++) {
        context->backend->count_digits(context->device, from, mask, found, shifts[digit], counts);
        uint32_t d = SEBP_DIGITS - 1;
        while (counts[d] < k)
            k -= counts[d--];
        found |= d << shifts[digit];
        mask |= (uint32_t)(SEBP_DIGITS - 1) << shifts[digit];
    }
    *ties = k;
    return found;
}

/* Cuts the list to its k largest. */
static void cut(sebp_context *context, sebp_selection *selection)
{
    sebp_sparse *list = &selection->list;
    sebp_matrix all = sebp_matrix_f32(list->values, 1, list->count);
    int64_t ties, kept = 0;
    uint32_t min = kth_magnitude(context, selection, &all, selection->k, &ties);
    for (int64_t i = 0; i < list->count; i++) {
        uint32_t bits = magnitude_bits(list->values[i]);
        bool is_kept = (bits > min) | ((bits == min) & (ties > 0)); /* no guess for a branch */
        ties -= bits == min;
        list->indices[kept] = list->indices[i];
        list->values[kept] = list->values[i];
        kept += is_kept;
    }
    list->count = kept;
    selection->min = min < 0x7FFFFFFF ? min + 1 : min; /* of equal ones the first are kept */
}

/* A magnitude that somewhat more than k elements of a panel have, most likely, by a sample of lines
 * from all over it. It lies behind the list while it is looked at. */
static uint32_t guess_min(sebp_context *context, const sebp_selection *selection,
                          const sebp_matrix *panel)
{
    int64_t elements = panel->rows * panel->cols;
    int64_t max = selection->room - selection->list.count;
    max = max < MAX_SAMPLES ? max : MAX_SAMPLES;
    int64_t runs = elements / SAMPLED_ONE_OF < max ? elements / SAMPLED_ONE_OF / RUN : max / RUN;
    int64_t step = runs > 0 ? elements / runs : 0, count = 0;
    float *sample = selection->list.values + selection->list.count;
    uint64_t mixed = 1;
    for (int64_t run = 0; run < runs; run++) {
        mixed =
            mixed * UINT64_C(6364136223846793005) + 1; /* no column is sampled more than others */
        int64_t at = run * step + (int64_t)((mixed >> 33) % (uint64_t)(step - RUN));
        int64_t row = at / panel->cols, col = at % panel->cols;
        for (int i = 0; i < RUN; i++) {
            sample[count++] = ((const float *)panel->data)[row * panel->stride + col];
            if (++col == panel->cols) {
                col = 0;
                row++;
            }
        }
    }
    double among = (double)selection->k / (double)elements * (double)count;
    int64_t rank = (int64_t)(1.25 * among + 4 * sqrt(among)) + 16, ties;
    if (rank > count)
        return 0;
    sebp_matrix samples = sebp_matrix_f32(sample, 1, count);
    return kth_magnitude(context, selection, &samples, rank, &ties);
}

/* A panel in blocks, and how many elements there are in all of them. */
typedef struct tally {
    int64_t size, blocks;
    int64_t at_least, above;
} tally;

static tally count_blocks(sebp_context *context, const sebp_selection *selection,
                          const sebp_matrix *panel, uint32_t min)
{
    int64_t elements = panel->rows * panel->cols;
    tally tally = {.size = (elements + MAX_BLOCKS - 1) / MAX_BLOCKS};
    tally.size = tally.size > MIN_BLOCK ? tally.size : MIN_BLOCK;
    tally.blocks = (elements + tally.size - 1) / tally.size;
    context->backend->count_at_least(context->device, panel, min, tally.size, selection->blocks);
    for (int64_t i = 0; i < tally.blocks; i++) {
        tally.at_least += selection->blocks[i].at_least;
        tally.above += selection->blocks[i].above;
    }
    return tally;
}

/* Lists those above, and of those just at `min` the first `ties`. */
static void list_blocks(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                        int64_t first, uint32_t min, const tally *tally, int64_t ties)
{
    sebp_sparse *list = &selection->list;
    for (int64_t i = 0; i < tally->blocks; i++) {
        sebp_block *block = &selection->blocks[i];
        int64_t equal = block->at_least - block->above;
        block->ties = equal < ties ? equal : ties;
        block->at = list->count;
        ties -= block->ties;
        list->count += block->above + block->ties;
    }
    context->backend->list_at_least(context->device, panel, min, first, tally->size,
                                    selection->blocks, list);
}

void sebp_selection_feed(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                         int64_t first)
{
    int64_t elements = panel->rows * panel->cols, k = selection->k;
    int64_t room = selection->room - selection->list.count; /* k at least */
    if (elements == 0)
        return;
    uint32_t min = selection->min;
    if (elements > room) {
        uint32_t guess = guess_min(context, selection, panel);
        min = guess > min ? guess : min;
    }
    tally tally = count_blocks(context, selection, panel, min);
    int64_t ties = tally.at_least - tally.above;
    /* Below `min` none is wanted if that is known, or if k are not below it. */
    bool is_low = min == selection->min || tally.at_least >= k;
    if (is_low && tally.above < k && tally.at_least > room) {
        ties = k - tally.above; /* this is the k-th magnitude */
    } else if (!is_low || tally.at_least > room) {
        uint32_t kth = kth_magnitude(context, selection, panel, k, &ties);
        if (kth < selection->min) {
            kth = selection->min;
            ties = INT64_MAX;
        }
        min = kth;
        tally = count_blocks(context, selection, panel, min);
    }
    list_blocks(context, selection, panel, first, min, &tally, ties);
    if (selection->list.count > k)
        cut(context, selection);
}

sebp_status sebp_selection_finish(sebp_context *context, const sebp_selection *selection,
                                  const sebp_sparse *top)
{
    const sebp_sparse *list = &selection->list;
    sebp_matrix values = sebp_matrix_f32(list->values, 1, list->count);
    double is_odd;
    context->backend->scan_rows(context->device, &values, SEBP_MEASURE_ABOVE, FLT_MAX, &is_odd);
    if (is_odd != 0)
        return SEBP_ERROR_NONFINITE;
    memcpy(top->indices, list->indices, (size_t)list->count * sizeof *top->indices);
    memcpy(top->values, list->values, (size_t)list->count * sizeof *top->values);
    return SEBP_SUCCESS;
}
