/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file find.c
 * Rows found in a gradient by a rule, and what a set of them drops.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "find.h"
#include "integers.h"

enum { CHUNK_ROWS = 4096 }; /* of dY, measured at a time where their scores are not kept */

/* Which rows are kept: those with a score above `score`, and the first `ties` of those with it. */
typedef struct score_cut {
    double score;
    int64_t ties;
} score_cut;

static uint64_t bits_of(double score)
{
    uint64_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits;
}

static double score_of(uint64_t bits)
{
    double score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

/*
 * Finds the cut that drops as many rows as `budget` pays for, from the smallest score on. A row
 * costs its score if by_energy, else 1. There must be a row that the budget does not pay for.
 *
 * Scores are not negative, and such doubles are ordered as their bits are. So the score of the cut
 * is found digit by digit, the highest first. Among the rows that agree with the digits found so
 * far, whole groups of the next digit are dropped while the budget lasts; the group in which it
 * ends has the digit. This takes 8 passes over the scores and moves none. The dropped scores are
 * added from the small end, so that nothing cancels. By energy, rows with Inf are never in a group.
 */
static score_cut find_cut(const double *score, int64_t total, double budget, bool by_energy)
{
    enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS };
    uint64_t found = 0, mask = 0;
    double dropped = 0;
    int64_t ties = 0;
    for (int shift = 64 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        double cost[DIGITS] = {0};
        int64_t count[DIGITS] = {0};
        for (int64_t i = 0; i < total; i++) {
            uint64_t bits = bits_of(score[i]);
            if ((bits & mask) != found || (by_energy && isinf(score[i])))
                continue;
            uint64_t digit = bits >> shift & (DIGITS - 1);
            cost[digit] += by_energy ? score[i] : 1;
            count[digit]++;
        }
        double below = dropped; /* the cost of what lies below `digit` */
        int digit = 0;
        for (int d = 0; d < DIGITS && dropped <= budget; d++) {
            if (count[d] == 0)
                continue;
            digit = d; /* the last one in use, in case rounding lets the sum of all costs fit */
            below = dropped;
            dropped += cost[d];
        }
        dropped = below;
        found |= (uint64_t)digit << shift;
        mask |= (uint64_t)(DIGITS - 1) << shift;
        ties = count[digit];
    }
    double each = by_energy ? score_of(found) : 1;
    while (ties > 1 && dropped + each <= budget) { /* of equal rows the last are dropped */
        dropped += each;
        ties--;
    }
    return (score_cut){score_of(found), ties};
}

static score_cut cut_top(const double *score, int64_t total, int64_t count)
{
    int64_t nonzero = 0;
    for (int64_t i = 0; i < total; i++)
        nonzero += score[i] > 0;
    if (nonzero <= count)
        return (score_cut){0, 0};
    return find_cut(score, total, (double)(total - count), false);
}

static score_cut cut_energy(const double *score, int64_t total, double delta)
{
    double energy = 0;
    for (int64_t i = 0; i < total; i++)
        energy += isinf(score[i]) ? 0 : score[i];
    if (energy == 0)
        return (score_cut){0, 0};
    return find_cut(score, total, delta * energy, true);
}

/* Writes the indices of the rows that the cut keeps into the memory of the scores. */
static int64_t keep_rows(void *memory, int64_t total, score_cut cut)
{
    /* Index j is written over score j, j <= i, after score i has been read. The memory is malloc's,
     * so what is stored there last says which type it holds. */
    const double *score = memory;
    int64_t *indices = memory;
    int64_t count = 0;
    for (int64_t i = 0; i < total; i++) {
        double own = score[i];
        bool kept = own > cut.score;
        if (own == cut.score && cut.ties > 0) {
            cut.ties--;
            kept = true;
        }
        if (kept)
            indices[count++] = i;
    }
    return count;
}

/* Scores of all rows, and which of them the rule keeps. */
static score_cut score_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rule *rule,
                            double *score)
{
    sebp_measure measure = rule->kind == SEBP_RULE_NONZERO     ? SEBP_MEASURE_NONZERO
                           : rule->kind == SEBP_RULE_THRESHOLD ? SEBP_MEASURE_ABOVE
                                                               : SEBP_MEASURE_SQUARE_SUM;
    double limit = rule->kind == SEBP_RULE_THRESHOLD ? rule->threshold : 0;
    sebp_status status = call->backend->scan_rows(call->device, dy, measure, limit, score);
    sebp_call_keep(call, status, "looking at rows");
    if (!sebp_call_goes_on(call))
        return (score_cut){0, 0};
    if (rule->kind == SEBP_RULE_TOP)
        return cut_top(score, dy->rows, rule->count);
    if (rule->kind == SEBP_RULE_ENERGY)
        return cut_energy(score, dy->rows, rule->delta);
    return (score_cut){0, 0};
}

sebp_status sebp_rows_find(sebp_context *context, const sebp_matrix *dy, const sebp_rule *rule,
                           sebp_rows **rows)
{
    const sebp_rule nonzero = sebp_rule_nonzero();
    const sebp_argument of_dy = {"dy", dy, false};
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_rows_find");
    if (!sebp_require(&call, "dy", dy) || !sebp_require(&call, "rows", rows))
        return call.status;
    if (rule == NULL)
        rule = &nonzero;
    sebp_check_views(&call, &of_dy, 1);
    sebp_check_rule(&call, rule);
    if (!sebp_call_goes_on(&call))
        return call.status;
    if (rule->kind == SEBP_RULE_SAMPLED) {
        sebp_draw_rows(&call, dy, NULL, rule, NULL, rows);
        return call.status;
    }

    int64_t total = dy->rows, room = dy->cols > 0 ? total : 0, count = 0;
    sebp_rows *made;
    sebp_status status = sebp_rows_make(total, room, &made);
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(&call, status, "%" PRId64 " rows: %s", total, sebp_status_string(status));
        return call.status;
    }
    if (room > 0) {
        /* The memory of the set holds the scores first. */
        score_cut cut = score_rows(&call, dy, rule, (double *)(void *)made->indices);
        if (!sebp_call_goes_on(&call)) {
            sebp_rows_destroy(made);
            return call.status;
        }
        count = keep_rows(made->indices, total, cut);
    }
    return sebp_rows_finish(made, count, rows);
}

/* ---- for a method ---- */

void sebp_find_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows)
{
    if (rows == NULL && sebp_call_goes_on(call)) {
        /* The message is that of sebp_rows_find(). */
        call->status = sebp_rows_find(call->context, dy, &call->options.rule, &call->found);
        rows = call->found;
    }
    if (sebp_call_goes_on(call))
        sebp_use_rows(call, rows, dy->rows);
}

/* ---- what is dropped ---- */

sebp_status sebp_rows_dropped(sebp_context *context, const sebp_matrix *dy, const sebp_rows *rows,
                              sebp_dropped *dropped)
{
    const sebp_argument of_dy = {"dy", dy, false};
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_rows_dropped");
    if (!sebp_require(&call, "dy", dy) || !sebp_require(&call, "rows", rows) ||
        !sebp_require(&call, "dropped", dropped)) {
        return call.status;
    }
    sebp_check_views(&call, &of_dy, 1);
    if (rows->total != dy->rows) {
        sebp_call_fail(&call, SEBP_ERROR_ROWS,
                       "the set was made for %" PRId64 " rows but dy has %" PRId64, rows->total,
                       dy->rows);
    }

    double score[CHUNK_ROWS], kept_energy = 0, dropped_energy = 0;
    int64_t dropped_rows = 0, listed = 0;
    sebp_matrix chunk = *dy;
    int64_t total = dy->cols > 0 ? dy->rows : 0;
    for (int64_t first = 0; first < total && sebp_call_goes_on(&call); first += CHUNK_ROWS) {
        chunk.data = (char *)dy->data + first * dy->stride * (int64_t)sebp_dtype_bytes(dy->dtype);
        chunk.rows = sebp_min(CHUNK_ROWS, total - first);
        sebp_status status =
            call.backend->scan_rows(call.device, &chunk, SEBP_MEASURE_SQUARE_SUM, 0, score);
        sebp_call_keep(&call, status, "looking at rows");
        for (int64_t i = 0; i < chunk.rows && sebp_call_goes_on(&call); i++) {
            if (listed < rows->count && rows->indices[listed] == first + i) {
                listed++;
                kept_energy += score[i];
            } else {
                dropped_rows += score[i] > 0;
                dropped_energy += score[i];
            }
        }
    }
    if (!sebp_call_goes_on(&call))
        return call.status;
    double energy = kept_energy + dropped_energy;
    dropped->rows = dropped_rows;
    dropped->energy = isinf(energy) ? NAN : energy > 0 ? dropped_energy / energy : 0;
    return SEBP_SUCCESS;
}
