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
    LEAST_ROOM = 16 << 10, /* elements beside k */
    LEAST_BLOCK = 8 << 10, /* elements */
    MOST_BLOCKS = 1 << 10,
    SAMPLED_ONE_OF = 128,
    MOST_SAMPLES = 64 << 10,
    RUN = 8 /* samples that follow each other: few, as what is large lies together */
};

sebp_status sebp_selection_begin(sebp_context *context, sebp_selection *selection, int64_t k)
{
    *selection = (sebp_selection){.k = k};
    if (__builtin_add_overflow(k, k > LEAST_ROOM ? k : LEAST_ROOM, &selection->room) ||
        selection->room > PTRDIFF_MAX / (int64_t)sizeof(int64_t))
        return SEBP_ERROR_OVERFLOW;
    size_t room = (size_t)selection->room;
    size_t threads = (size_t)context->backend->threads(context->device);
    selection->list.indices = malloc(room * sizeof *selection->list.indices);
    selection->list.values = malloc(room * sizeof *selection->list.values);
    selection->counts = malloc(threads * SEBP_DIGITS * sizeof *selection->counts);
    selection->blocks = malloc(MOST_BLOCKS * sizeof *selection->blocks);
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
    uint32_t least = kth_magnitude(context, selection, &all, selection->k, &ties);
    for (int64_t i = 0; i < list->count; i++) {
        uint32_t bits = magnitude_bits(list->values[i]);
        bool is_kept = (bits > least) | ((bits == least) & (ties > 0)); /* no guess for a branch */
        ties -= bits == least;
        list->indices[kept] = list->indices[i];
        list->values[kept] = list->values[i];
        kept += is_kept;
    }
    list->count = kept;
    selection->least =
        least < 0x7FFFFFFF ? least + 1 : least; /* of equal ones the first are kept */
}

/* A magnitude that somewhat more than k elements of a panel have, most likely, by a sample of lines
 * from all over it. It lies behind the list while it is looked at. */
static uint32_t guess_least(sebp_context *context, const sebp_selection *selection,
                            const sebp_matrix *panel)
{
    int64_t elements = panel->rows * panel->cols;
    int64_t most = selection->room - selection->list.count;
    most = most < MOST_SAMPLES ? most : MOST_SAMPLES;
    int64_t runs = elements / SAMPLED_ONE_OF < most ? elements / SAMPLED_ONE_OF / RUN : most / RUN;
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
                          const sebp_matrix *panel, uint32_t least)
{
    int64_t elements = panel->rows * panel->cols;
    tally tally = {.size = (elements + MOST_BLOCKS - 1) / MOST_BLOCKS};
    tally.size = tally.size > LEAST_BLOCK ? tally.size : LEAST_BLOCK;
    tally.blocks = (elements + tally.size - 1) / tally.size;
    context->backend->count_at_least(context->device, panel, least, tally.size, selection->blocks);
    for (int64_t i = 0; i < tally.blocks; i++) {
        tally.at_least += selection->blocks[i].at_least;
        tally.above += selection->blocks[i].above;
    }
    return tally;
}

/* Lists those above, and of those just at `least` the first `ties`. */
static void list_blocks(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                        int64_t first, uint32_t least, const tally *tally, int64_t ties)
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
    context->backend->list_at_least(context->device, panel, least, first, tally->size,
                                    selection->blocks, list);
}

void sebp_selection_feed(sebp_context *context, sebp_selection *selection, const sebp_matrix *panel,
                         int64_t first)
{
    int64_t elements = panel->rows * panel->cols, k = selection->k;
    int64_t room = selection->room - selection->list.count; /* k at least */
    if (elements == 0)
        return;
    uint32_t least = selection->least;
    if (elements > room) {
        uint32_t guess = guess_least(context, selection, panel);
        least = guess > least ? guess : least;
    }
    tally tally = count_blocks(context, selection, panel, least);
    int64_t ties = tally.at_least - tally.above;
    /* Below `least` none is wanted if that is known, or if k are not below it. */
    bool is_low = least == selection->least || tally.at_least >= k;
    if (is_low && tally.above < k && tally.at_least > room) {
        ties = k - tally.above; /* this is the k-th magnitude */
    } else if (!is_low || tally.at_least > room) {
        uint32_t kth = kth_magnitude(context, selection, panel, k, &ties);
        if (kth < selection->least) {
            kth = selection->least;
            ties = INT64_MAX;
        }
        least = kth;
        tally = count_blocks(context, selection, panel, least);
    }
    list_blocks(context, selection, panel, first, least, &tally, ties);
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
