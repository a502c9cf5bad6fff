/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file top.c
 * Top-k in linear time, on all threads. A sample says roughly how large an element must be. Those
 * that are as large are counted block by block, which tells where each goes in a list, and then
 * listed: somewhat more than k, which are then cut to k. Where the sample was wrong, or too many
 * elements are equal, the k-th magnitude is found among all of them, digit by digit. The result
 * never depends on the sample.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "operations.h"

enum {
    DIGIT_BITS = 11,
    DIGITS = 1 << DIGIT_BITS,
    MIN_DIGITS = 4 << 10, /* elements that are worth counting digits for */
    MAX_DIGITS = 1 << 20, /* elements to one set of 32-bit counts */
    MIN_ROOM = 16 << 10,  /* elements in addition to k */
    MIN_BLOCK = 8 << 10,  /* elements */
    MAX_BLOCKS = 1 << 10,
    SAMPLED_ONE_OF = 128,
    MAX_SAMPLES = 64 << 10,
    RUN = 8 /* neighbours in a sample: few, as large elements lie together */
};

/* A block of elements: how many magnitudes are at least some minimum, and how many above it. Those
 * above it go to index `at` of a list, with `ties` of those that equal it. */
typedef struct block_count {
    int64_t at_least, above;
    int64_t ties, at;
} block_count;

struct sebp_top {
    int64_t k;
    int64_t room;        /* elements there is memory for: at least 2 k */
    sebp_sparse list;    /* the largest so far, k at most, by ascending index */
    uint32_t min;        /* the bits of a magnitude that later elements must have */
    int64_t *counts;     /* of digits, for each thread */
    block_count *blocks; /* of a panel */
};

/* ---- passes over the elements ---- */

/* The elements of a matrix in their order, in blocks that threads take in turn: the large ones may
 * all lie in one corner. */
typedef struct element_ranking {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    int64_t cols; /* one row where there are no gaps */
    int64_t elements, size, blocks, workers;
    uint32_t mask, found, min;
    int shift;
    int64_t *counts;
    block_count *counted;
    const block_count *listed;
    int64_t first;
    const sebp_sparse *list;
} element_ranking;

static element_ranking start_ranking(const sebp_cpu *cpu, const sebp_matrix *from, int64_t size)
{
    element_ranking ranking = {
        .kernels = cpu->kernels, .from = from, .cols = from->cols, .size = size};
    ranking.elements = from->rows * from->cols;
    if (from->stride == from->cols)
        ranking.cols = ranking.elements;
    ranking.blocks = sebp_div_ceil(ranking.elements, size);
    ranking.workers = sebp_min(ranking.blocks, sebp_cpu_threads(cpu));
    return ranking;
}

/* The elements from `at` on that lie in one row and before `end`; *n is how many. */
static const float *run_of(const element_ranking *ranking, int64_t at, int64_t end, int64_t *n)
{
    int64_t row = at / ranking->cols, col = at % ranking->cols;
    *n = sebp_min(end - at, ranking->cols - col);
    return (const float *)ranking->from->data + row * ranking->from->stride + col;
}

static int64_t block_end(const element_ranking *ranking, int64_t block)
{
    return sebp_min((block + 1) * ranking->size, ranking->elements);
}

static uint32_t magnitude_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* Two counts for each digit: where neighbours have the same digit, one addition need not wait for
 * the other. */
static void count_digits_part(void *work, int64_t worker)
{
    const element_ranking *ranking = work;
    int64_t *counts = ranking->counts + worker * DIGITS;
    memset(counts, 0, DIGITS * sizeof *counts);
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        uint32_t held[DIGITS][2] = {{0}};
        int64_t end = block_end(ranking, block);
        for (int64_t n, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits = magnitude_bits(run[i]);
                uint32_t digit = bits >> ranking->shift & (DIGITS - 1);
                held[digit][i & 1] += (bits & ranking->mask) == ranking->found;
            }
        }
        for (int d = 0; d < DIGITS; d++)
            counts[d] += (int64_t)held[d][0] + held[d][1];
    }
}

static void count_digits(sebp_cpu *cpu, const sebp_matrix *from, uint32_t mask, uint32_t found,
                         int shift, int64_t *counts)
{
    int64_t share = sebp_div_ceil(from->rows * from->cols, sebp_cpu_threads(cpu));
    element_ranking ranking =
        start_ranking(cpu, from, sebp_min(sebp_max(share, MIN_DIGITS), MAX_DIGITS));
    ranking.mask = mask;
    ranking.found = found;
    ranking.shift = shift;
    ranking.counts = counts;
    sebp_cpu_parallel(cpu, ranking.workers, count_digits_part, &ranking);
    for (int64_t worker = 1; worker < ranking.workers; worker++) {
        for (int d = 0; d < DIGITS; d++)
            counts[d] += counts[worker * DIGITS + d];
    }
}

static void count_at_least_part(void *work, int64_t worker)
{
    const element_ranking *ranking = work;
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        int64_t end = block_end(ranking, block), at_least = 0, above = 0;
        for (int64_t n, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            ranking->kernels->count_at_least(run, n, ranking->min, &at_least, &above);
        }
        ranking->counted[block] = (block_count){.at_least = at_least, .above = above};
    }
}

static void count_at_least(sebp_cpu *cpu, const sebp_matrix *from, uint32_t min, int64_t size,
                           block_count *blocks)
{
    element_ranking ranking = start_ranking(cpu, from, size);
    ranking.min = min;
    ranking.counted = blocks;
    sebp_cpu_parallel(cpu, ranking.workers, count_at_least_part, &ranking);
}

/* A run of a block of whose ties some are listed, but not all. There is one such block at most. */
static int64_t list_some_ties(const float *run, int64_t n, uint32_t min, int64_t *ties,
                              int64_t first, int64_t *indices, float *values)
{
    int64_t listed = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude_bits(run[i]);
        if (bits > min || (bits == min && (*ties)-- > 0)) {
            indices[listed] = first + i;
            values[listed++] = run[i];
        }
    }
    return listed;
}

static void list_at_least_part(void *work, int64_t worker)
{
    const element_ranking *ranking = work;
    uint32_t min = ranking->min;
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        const block_count *its = &ranking->listed[block];
        int64_t end = block_end(ranking, block), ties = its->ties;
        int64_t *indices = ranking->list->indices + its->at;
        float *values = ranking->list->values + its->at;
        bool some = ties > 0 && ties < its->at_least - its->above;
        for (int64_t n, listed, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            int64_t first = ranking->first + at;
            if (some) {
                listed = list_some_ties(run, n, min, &ties, first, indices, values);
            } else {
                listed = ranking->kernels->list_at_least(run, n, min + (ties == 0), first, indices,
                                                         values);
            }
            indices += listed;
            values += listed;
        }
    }
}

static void list_at_least(sebp_cpu *cpu, const sebp_matrix *from, uint32_t min, int64_t first,
                          int64_t size, const block_count *blocks, const sebp_sparse *list)
{
    element_ranking ranking = start_ranking(cpu, from, size);
    ranking.min = min;
    ranking.listed = blocks;
    ranking.first = first;
    ranking.list = list;
    sebp_cpu_parallel(cpu, ranking.workers, list_at_least_part, &ranking);
}

/* ---- choosing ---- */

/* The k-th largest magnitude of a matrix of at least k elements, digit by digit, the highest first;
 * *ties is how many of those with it are among the k. */
static uint32_t kth_magnitude(sebp_cpu *cpu, const sebp_top *top, const sebp_matrix *from,
                              int64_t k, int64_t *ties)
{
    static const int shifts[] = {2 * DIGIT_BITS, DIGIT_BITS, 0};
    uint32_t found = 0, mask = 0;
    int64_t *counts = top->counts;
    for (int digit = 0; digit < 3; digit++) {
        count_digits(cpu, from, mask, found, shifts[digit], counts);
        uint32_t d = DIGITS - 1;
        while (counts[d] < k)
            k -= counts[d--];
        found |= d << shifts[digit];
        mask |= (uint32_t)(DIGITS - 1) << shifts[digit];
    }
    *ties = k;
    return found;
}

/* Cuts the list to its k largest. */
static void cut(sebp_cpu *cpu, sebp_top *top)
{
    sebp_sparse *list = &top->list;
    sebp_matrix all = sebp_matrix_f32(list->values, 1, list->count);
    int64_t ties, kept = 0;
    uint32_t min = kth_magnitude(cpu, top, &all, top->k, &ties);
    for (int64_t i = 0; i < list->count; i++) {
        uint32_t bits = magnitude_bits(list->values[i]);
        bool is_kept = (bits > min) | ((bits == min) & (ties > 0)); /* without a branch */
        ties -= bits == min;
        list->indices[kept] = list->indices[i];
        list->values[kept] = list->values[i];
        kept += is_kept;
    }
    list->count = kept;
    top->min = min < 0x7FFFFFFF ? min + 1 : min; /* of equal elements the first are kept */
}

/* Guesses a magnitude that somewhat more than k elements of a panel have, from a sample of short
 * runs all over it. The sample lies behind the list meanwhile. */
static uint32_t guess_min(sebp_cpu *cpu, const sebp_top *top, const sebp_matrix *panel)
{
    int64_t elements = panel->rows * panel->cols;
    int64_t max = sebp_min(top->room - top->list.count, MAX_SAMPLES);
    int64_t runs = sebp_min(elements / SAMPLED_ONE_OF, max) / RUN;
    int64_t step = runs > 0 ? elements / runs : 0, count = 0;
    float *sample = top->list.values + top->list.count;
    uint64_t mixed = 1;
    for (int64_t run = 0; run < runs; run++) {
        /* Pseudo-random, so that no column is sampled more often than others. */
        mixed = mixed * UINT64_C(6364136223846793005) + 1;
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
    double among = (double)top->k / (double)elements * (double)count;
    int64_t rank = (int64_t)(1.25 * among + 4 * sqrt(among)) + 16, ties;
    if (rank > count)
        return 0;
    sebp_matrix samples = sebp_matrix_f32(sample, 1, count);
    return kth_magnitude(cpu, top, &samples, rank, &ties);
}

/* A panel in blocks, and the counts of all blocks together. */
typedef struct block_tally {
    int64_t size, blocks;
    int64_t at_least, above;
} block_tally;

static block_tally count_blocks(sebp_cpu *cpu, const sebp_top *top, const sebp_matrix *panel,
                                uint32_t min)
{
    int64_t elements = panel->rows * panel->cols;
    block_tally tally = {.size = sebp_max(sebp_div_ceil(elements, MAX_BLOCKS), MIN_BLOCK)};
    tally.blocks = sebp_div_ceil(elements, tally.size);
    count_at_least(cpu, panel, min, tally.size, top->blocks);
    for (int64_t i = 0; i < tally.blocks; i++) {
        tally.at_least += top->blocks[i].at_least;
        tally.above += top->blocks[i].above;
    }
    return tally;
}

/* Lists the elements above `min`, and the first `ties` of those that equal it. */
static void list_blocks(sebp_cpu *cpu, sebp_top *top, const sebp_matrix *panel, int64_t first,
                        uint32_t min, const block_tally *tally, int64_t ties)
{
    sebp_sparse *list = &top->list;
    for (int64_t i = 0; i < tally->blocks; i++) {
        block_count *block = &top->blocks[i];
        int64_t equal = block->at_least - block->above;
        block->ties = sebp_min(equal, ties);
        block->at = list->count;
        ties -= block->ties;
        list->count += block->above + block->ties;
    }
    list_at_least(cpu, panel, min, first, tally->size, top->blocks, list);
}

sebp_status sebp_cpu_top_feed(void *device, sebp_top *top, const sebp_matrix *panel, int64_t first)
{
    sebp_cpu *cpu = device;
    int64_t elements = panel->rows * panel->cols, k = top->k;
    int64_t room = top->room - top->list.count; /* at least k */
    if (elements == 0)
        return SEBP_SUCCESS;
    uint32_t min = top->min;
    if (elements > room) {
        uint32_t guess = guess_min(cpu, top, panel);
        min = guess > min ? guess : min;
    }
    block_tally tally = count_blocks(cpu, top, panel, min);
    int64_t ties = tally.at_least - tally.above;
    /* Nothing below `min` is wanted if that was known before, or if k elements are not below it. */
    bool is_low = min == top->min || tally.at_least >= k;
    if (is_low && tally.above < k && tally.at_least > room) {
        ties = k - tally.above; /* this is the k-th magnitude */
    } else if (!is_low || tally.at_least > room) {
        uint32_t kth = kth_magnitude(cpu, top, panel, k, &ties);
        if (kth < top->min) {
            kth = top->min;
            ties = INT64_MAX;
        }
        min = kth;
        tally = count_blocks(cpu, top, panel, min);
    }
    list_blocks(cpu, top, panel, first, min, &tally, ties);
    if (top->list.count > k)
        cut(cpu, top);
    return SEBP_SUCCESS;
}

/* ---- the operation ---- */

void sebp_cpu_top_end(void *device, sebp_top *top)
{
    (void)device;
    if (top != NULL) {
        free(top->list.indices);
        free(top->list.values);
        free(top->counts);
        free(top->blocks);
        free(top);
    }
}

sebp_status sebp_cpu_top_begin(void *device, int64_t k, sebp_top **made)
{
    int64_t room;
    if (__builtin_add_overflow(k, sebp_max(k, MIN_ROOM), &room) ||
        room > PTRDIFF_MAX / (int64_t)sizeof(int64_t)) {
        return SEBP_ERROR_OVERFLOW;
    }
    size_t elements = (size_t)room, threads = (size_t)sebp_cpu_threads(device);
    sebp_top *top = calloc(1, sizeof *top);
    if (top == NULL)
        return SEBP_ERROR_MEMORY;
    top->k = k;
    top->room = room;
    top->list.indices = malloc(elements * sizeof *top->list.indices);
    top->list.values = malloc(elements * sizeof *top->list.values);
    top->counts = malloc(threads * DIGITS * sizeof *top->counts);
    top->blocks = malloc(MAX_BLOCKS * sizeof *top->blocks);
    if (top->list.indices == NULL || top->list.values == NULL || top->counts == NULL ||
        top->blocks == NULL) {
        sebp_cpu_top_end(device, top);
        return SEBP_ERROR_MEMORY;
    }
    *made = top;
    return SEBP_SUCCESS;
}

sebp_status sebp_cpu_top_finish(void *device, const sebp_top *top, const sebp_sparse *to)
{
    const sebp_sparse *list = &top->list;
    sebp_matrix values = sebp_matrix_f32(list->values, 1, list->count);
    double is_odd;
    sebp_cpu_scan_rows(device, &values, SEBP_MEASURE_ABOVE, FLT_MAX, &is_odd);
    if (is_odd != 0)
        return SEBP_ERROR_NONFINITE;
    memcpy(to->indices, list->indices, (size_t)list->count * sizeof *to->indices);
    memcpy(to->values, list->values, (size_t)list->count * sizeof *to->values);
    return SEBP_SUCCESS;
}
