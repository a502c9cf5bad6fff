/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file draw.c
 * A weighted sample of the rows of a gradient: winner-take-all column-row sampling (rows.h).
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/random.h>

#include "find.h"
#include "integers.h"

enum { CHUNK_ROWS = 4096 }; /* of X, measured at a time */

/* ---- scores ---- */

static void scan(sebp_call *call, const sebp_matrix *matrix, double *square_sums)
{
    if (!sebp_call_goes_on(call))
        return;
    sebp_status status =
        call->backend->scan_rows(call->device, matrix, SEBP_MEASURE_SQUARE_SUM, 0, square_sums);
    sebp_call_keep(call, status, "looking at rows");
}

static bool has_active(const double *score, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (score[i] > 0)
            return true;
    }
    return false;
}

/* Turns the square sums of dY's rows into scores: ||dY_i|| sqrt(1 + ||X_i||^2), X NULL counting as 0.
 * Rows of zeros keep the score 0, even where X holds a NaN. Nothing under- or overflows, as the square
 * of a float is far inside the range of double. */
static void score_rows(sebp_call *call, const sebp_matrix *x, int64_t total, double *score)
{
    double of_x[CHUNK_ROWS] = {0};
    for (int64_t first = 0; first < total && sebp_call_goes_on(call); first += CHUNK_ROWS) {
        const int64_t count = sebp_min(CHUNK_ROWS, total - first);
        if (x != NULL && x->cols > 0 && has_active(score + first, count)) {
            sebp_matrix chunk = *x;
            chunk.data = (char *)x->data + first * x->stride * (int64_t)sebp_dtype_bytes(x->dtype);
            chunk.rows = count;
            scan(call, &chunk, of_x);
        }
        for (int64_t i = 0; i < count; i++) {
            double *own = &score[first + i];
            *own = *own > 0 ? sqrt(*own) * sqrt(1 + of_x[i]) : 0;
        }
    }
}

/* What there is to choose from. */
typedef struct row_counts {
    int64_t finite;    /* active rows without NaN and Inf */
    int64_t infinite;  /* those with, which are always kept */
    double square_sum; /* of the scores of the finite ones */
} row_counts;

static row_counts count_rows(const double *score, int64_t total)
{
    row_counts counts = {0, 0, 0};
    for (int64_t i = 0; i < total; i++) {
        if (isinf(score[i])) {
            counts.infinite++;
        } else if (score[i] > 0) {
            counts.finite++;
            counts.square_sum += score[i] * score[i];
        }
    }
    return counts;
}

/* How many of the finite rows are paid for. */
static int64_t finite_budget(const sebp_rule *rule, row_counts counts)
{
    int64_t active = counts.finite + counts.infinite;
    int64_t budget = rule->count > 0 ? rule->count : (int64_t)ceil(rule->share * (double)active);
    return sebp_max(budget - counts.infinite, 1);
}

/* ---- the cut ---- */

/* Rows of a score of `limit` and above are kept; among the others, whose scores add up to `sum` in the
 * order of the rows, `draws` are drawn. */
typedef struct row_draw {
    double limit, sum;
    int64_t draws;
} row_draw;

static row_draw draw_below(const double *score, int64_t total, double limit, int64_t budget)
{
    row_draw draw = {limit, 0, budget};
    for (int64_t i = 0; i < total; i++) {
        if (score[i] < limit)
            draw.sum += score[i];
        else if (!isinf(score[i]))
            draw.draws--;
    }
    return draw;
}

/*
 * Finds the c with the least T / (k - c), with more finite rows than the budget k.
 *
 * Keeping one more row makes T / (k - c) no larger if and only if the row's score is at least that. So
 * all rows with such a score are kept, which lowers T / (k - c), until none is left. This is Newton's
 * method for k t = sum of min(s_i, t), which is convex and linear between scores, from above: each step
 * makes the product of the difference and of its slope, k - c, less than a quarter. The slope is an
 * integer, so there are few steps, whatever the scores are.
 */
static row_draw find_draw(const double *score, int64_t total, int64_t budget)
{
    row_draw draw = draw_below(score, total, INFINITY, budget);
    for (;;) {
        double limit = draw.sum / (double)draw.draws;
        row_draw next = draw_below(score, total, limit, budget);
        /* Rounding lets rows that are as nothing beside the others seem to be none. */
        if (next.draws >= draw.draws || next.draws < 1)
            return draw;
        draw = next;
    }
}

/* ---- drawing ---- */

static int compare_numbers(const void *one, const void *other)
{
    double a, b;
    memcpy(&a, one, sizeof a);
    memcpy(&b, other, sizeof b);
    return (a > b) - (a < b);
}

/* Numbers in [0, 1), ascending. */
static void make_numbers(uint64_t seed, int64_t count, double *number)
{
    for (int64_t j = 0; j < count; j++) {
        const uint64_t element = 2 * (uint64_t)j;
        number[j] = (double)sebp_random_uniform(seed, UINT64_MAX, element) +
                    (double)sebp_random_uniform(seed, UINT64_MAX, element + 1) * 0x1p-24;
    }
    qsort(number, (size_t)count, sizeof *number, compare_numbers);
}

/*
 * Writes the indices of the rows that are kept or drawn into the memory of the scores, and their
 * weights. Returns how many they are.
 *
 * The scores are added up as in draw_below(), so that the last sum is draw->sum: each number, the
 * largest of them 1 - 2^-48, times that is less, and falls into a row.
 */
static int64_t take_rows(void *memory, int64_t total, const row_draw *draw, const double *number,
                         float *weights)
{
    /* Index j is written over score j, j <= i, after score i has been read. */
    const double *score = memory;
    int64_t *indices = memory;
    int64_t count = 0, used = 0;
    double sum = 0;
    for (int64_t i = 0; i < total; i++) {
        const double own = score[i];
        const int64_t before = used;
        double weight = 1;
        if (own < draw->limit) {
            sum += own;
            while (used < draw->draws && number[used] * draw->sum < sum)
                used++;
            if (used == before)
                continue;
            weight = (double)(used - before) * (draw->sum / ((double)draw->draws * own));
        }
        weights[count] = (float)fmin(weight, FLT_MAX);
        indices[count++] = i;
    }
    return count;
}

/* Writes the indices of the active rows, which may lie where the scores do. */
static int64_t take_active_rows(const void *memory, int64_t total, int64_t *indices)
{
    const double *score = memory;
    int64_t count = 0;
    for (int64_t i = 0; i < total; i++) {
        if (score[i] > 0)
            indices[count++] = i;
    }
    return count;
}

/* ---- the sets ---- */

static sebp_rows *make_set(sebp_call *call, int64_t total, int64_t room)
{
    sebp_rows *made = NULL;
    if (!sebp_call_goes_on(call))
        return NULL;
    sebp_status status = sebp_rows_make(total, room, &made);
    if (status != SEBP_SUCCESS)
        sebp_call_fail(call, status, "%" PRId64 " rows: %s", total, sebp_status_string(status));
    return made;
}

/* Of a set whose memory holds the scores, of which more are active than the budget pays for. */
static int64_t sample_set(sebp_call *call, sebp_rows *set, row_counts counts, int64_t budget,
                          uint64_t seed)
{
    row_draw draw = find_draw((double *)(void *)set->indices, set->total, budget);
    double *number = malloc((size_t)draw.draws * sizeof *number);
    sebp_status status =
        number != NULL ? sebp_rows_make_weights(set, counts.infinite + budget) : SEBP_ERROR_MEMORY;
    int64_t count = 0;
    if (status == SEBP_SUCCESS) {
        make_numbers(seed, draw.draws, number);
        count = take_rows(set->indices, set->total, &draw, number, set->weights);
        set->variance = counts.infinite > 0
                            ? NAN
                            : draw.sum / (double)draw.draws * (draw.sum / counts.square_sum);
    } else {
        sebp_call_fail(call, status, "no memory for a sample of %" PRId64 " rows", budget);
    }
    free(number);
    return count;
}

void sebp_draw_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                    const sebp_rule *rule, sebp_rows **nonzero, sebp_rows **sampled)
{
    const int64_t total = dy->rows, room = dy->cols > 0 ? total : 0;
    int64_t active = 0, count = 0;
    sebp_rows *set = make_set(call, total, room), *all = NULL;
    if (nonzero != NULL)
        all = make_set(call, total, room);
    if (room > 0 && sebp_call_goes_on(call)) {
        double *score = (double *)(void *)set->indices; /* the memory of the set holds them first */
        scan(call, dy, score);
        score_rows(call, x, total, score);
    }
    if (room > 0 && sebp_call_goes_on(call)) {
        const row_counts counts = count_rows((double *)(void *)set->indices, total);
        const int64_t budget = finite_budget(rule, counts);
        if (all != NULL)
            active = take_active_rows(set->indices, total, all->indices);
        if (counts.finite > budget)
            count = sample_set(call, set, counts, budget, rule->seed);
        else
            count = take_active_rows(set->indices, total, set->indices);
    }
    if (sebp_call_goes_on(call)) {
        if (all != NULL)
            sebp_rows_finish(all, active, nonzero);
        sebp_rows_finish(set, count, sampled);
    } else {
        sebp_rows_destroy(all);
        sebp_rows_destroy(set);
    }
}

sebp_status sebp_rows_sample(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                             const sebp_rule *rule, sebp_rows **rows)
{
    const sebp_argument arguments[] = {{"dy", dy, false}, {"x", x, false}};
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_rows_sample");
    if (!sebp_require(&call, "dy", dy) || !sebp_require(&call, "rule", rule) ||
        !sebp_require(&call, "rows", rows)) {
        return call.status;
    }
    sebp_check_views(&call, arguments, 2);
    sebp_check_rule(&call, rule);
    if (rule->kind != SEBP_RULE_SAMPLED) {
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "the rule's kind is %d, not SEBP_RULE_SAMPLED",
                       (int)rule->kind);
    }
    if (x != NULL)
        sebp_check_shape(&call, &arguments[1], dy->rows, x->cols);
    if (sebp_call_goes_on(&call))
        sebp_draw_rows(&call, dy, x, rule, NULL, rows);
    return call.status;
}
