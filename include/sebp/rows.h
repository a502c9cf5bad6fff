/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rows.h
 * A row set: the sorted list of active rows among M, made once and used for every layer it holds
 * for.
 *
 * A set is immutable, owns its memory, belongs to no context and may be shared between threads.
 *
 * A set is made from exact knowledge (a mask, lengths, indices), or found in dY by a rule. The
 * rules "exact zeros", "noise under a threshold" and "top-k rows" are those of SEBP (Topchii,
 * Panchenko, Chekalina, EACL SRW 2026). The energy rule is this library's own. It keeps the fewest
 * rows that hold a share 1 - delta of ||dY||_F^2, which bounds the error of the gradients:
 *
 *     ||error of dX||_F <= sqrt(delta) ||dY||_F ||W||_2
 *     ||error of dW||_F <= sqrt(delta) ||dY||_F ||X||_2
 *
 * Rows are chosen by their elements, never by their sum: [1, -1] is active. +0 and -0 are zero. A
 * row that holds a NaN or an Inf is active under every rule: it ranks above every finite row.
 */
#ifndef SEBP_ROWS_H
#define SEBP_ROWS_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_rows sebp_rows;

typedef enum sebp_rule_kind {
    SEBP_RULE_NONZERO = 0,   /**< rows with any element other than +-0: exact */
    SEBP_RULE_THRESHOLD = 1, /**< rows whose largest magnitude is over `threshold` */
    SEBP_RULE_TOP = 2,       /**< the `count` rows of largest L2 norm, rows of zeros left out */
    SEBP_RULE_ENERGY = 3     /**< the fewest rows that hold a share 1 - `delta` of ||dY||_F^2 */
} sebp_rule_kind;

/** Which rows to keep. Zero-initialised it is SEBP_RULE_NONZERO. Only the field that belongs to its
 * kind is read. */
typedef struct sebp_rule {
    sebp_rule_kind kind;
    double threshold; /**< >= 0, not NaN; Inf keeps only rows with NaN or Inf */
    int64_t count;    /**< >= 1; may exceed M */
    double delta;     /**< in [0, 1) */
} sebp_rule;

static inline sebp_rule sebp_rule_nonzero(void)
{
    sebp_rule rule = {SEBP_RULE_NONZERO, 0.0, 0, 0.0};
    return rule;
}

static inline sebp_rule sebp_rule_threshold(double threshold)
{
    sebp_rule rule = {SEBP_RULE_THRESHOLD, threshold, 0, 0.0};
    return rule;
}

static inline sebp_rule sebp_rule_top(int64_t count)
{
    sebp_rule rule = {SEBP_RULE_TOP, 0.0, count, 0.0};
    return rule;
}

static inline sebp_rule sebp_rule_energy(double delta)
{
    sebp_rule rule = {SEBP_RULE_ENERGY, 0.0, 0, delta};
    return rule;
}

/**
 * All of `total` rows.
 *
 * For this and the constructors below: `rows` is where the set is put, untouched on error; free it
 * with sebp_rows_destroy(). total = 0 gives the empty set. They return SEBP_SUCCESS;
 * SEBP_ERROR_NULL; SEBP_ERROR_SIZE (negative); SEBP_ERROR_OVERFLOW; SEBP_ERROR_MEMORY; and what is
 * listed at each.
 */
SEBP_API sebp_status sebp_rows_all(int64_t total, sebp_rows **rows);

/** The rows i with mask[i] != 0. mask: `total` bytes, NULL only where total is 0. */
SEBP_API sebp_status sebp_rows_from_mask(const uint8_t *mask, int64_t total, sebp_rows **rows);

/**
 * Right-padded sequences: the active rows of sequence s are s * sequence_length to
 * s * sequence_length + lengths[s] - 1. M = sequences * sequence_length. lengths may be NULL only
 * where sequences is 0.
 *
 * @return also SEBP_ERROR_VALUE (a length below 0 or over sequence_length).
 */
SEBP_API sebp_status sebp_rows_from_lengths(const int64_t *lengths, int64_t sequences,
                                            int64_t sequence_length, sebp_rows **rows);

/**
 * The rows in a list, which is copied. indices: `count` of them, ascending, each once, each in
 * [0, total); NULL only where count is 0.
 *
 * @return also SEBP_ERROR_ROWS (out of range, unsorted, repeated).
 */
SEBP_API sebp_status sebp_rows_from_indices(const int64_t *indices, int64_t count, int64_t total,
                                            sebp_rows **rows);

/**
 * The active rows of a gradient under a rule.
 *
 * Top and energy keep exactly the rows that their definitions name. Of rows with equal norms those
 * of lowest index are kept, and the result does not depend on the number of threads. Neither rule
 * ever keeps a row of zeros. Squared norms are summed in double precision. Energy keeps every row
 * with a NaN or Inf, and takes its share over the finite rows.
 *
 * Reads dY once, in parallel. Nonzero and threshold stop reading a row at the first element that
 * decides. Memory: 8 bytes for each row of dY, which become the set.
 *
 * @param context  its threads scan dY.
 * @param dy       M x N, either dtype, any stride.
 * @param rule     NULL: SEBP_RULE_NONZERO.
 * @return also a status of sebp_matrix_check(); SEBP_ERROR_VALUE (the rule, NaN included).
 *         M = 0 or N = 0: the empty set of M rows.
 */
SEBP_API sebp_status sebp_rows_find(sebp_context *context, const sebp_matrix *dy,
                                    const sebp_rule *rule, sebp_rows **rows);

/** Frees a set. NULL: nothing. */
SEBP_API void sebp_rows_destroy(sebp_rows *rows);

/** m: how many rows are active. 0 for NULL. */
SEBP_API int64_t sebp_rows_count(const sebp_rows *rows);

/** M: how many rows there are, active or not. 0 for NULL. */
SEBP_API int64_t sebp_rows_total(const sebp_rows *rows);

/** alpha = m / M, in [0, 1]; 0 where M is 0 or for NULL. */
SEBP_API double sebp_rows_activity(const sebp_rows *rows);

/**
 * The active rows, ascending: sebp_rows_count() of them, for as long as the set lives.
 * NULL for NULL and for an empty set.
 */
SEBP_API const int64_t *sebp_rows_indices(const sebp_rows *rows);

/** What a set leaves out of a gradient. */
typedef struct sebp_dropped {
    int64_t rows;  /**< rows of dY that are not all zero and not in the set */
    double energy; /**< their share of ||dY||_F^2, in [0, 1]; NaN where dY holds NaN or Inf in any
                      row */
} sebp_dropped;

/**
 * Measures what a set leaves out of a gradient. Both results are 0 for a set that SEBP_RULE_NONZERO
 * found in the same dY.
 *
 * @param dy       M x N, M = sebp_rows_total(rows).
 * @param dropped  the result, untouched on error. energy is 0 for a dY of zeros.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_ROWS (made for
 *         another M).
 */
SEBP_API sebp_status sebp_rows_dropped(sebp_context *context, const sebp_matrix *dy,
                                       const sebp_rows *rows, sebp_dropped *dropped);

SEBP_END_DECLS

#endif
