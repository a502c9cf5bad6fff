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
 *
 * These rules leave rows out, so that dW is biased: the same rows are missing in each step. The rule
 * "sampled" mends that (winner-take-all column-row sampling, WTA-CRS: Liu et al., NeurIPS 2023, arXiv
 * 2305.15265). It keeps the rows of largest score and draws among the others. Its set carries a
 * weight w_i for each row, and
 *
 *     dW = sum over i in R of w_i dY_i^T X_i        db = sum over i in R of w_i dY_i
 *
 * are on the average over the seeds those of all rows. The weights are for dW and db alone: a dX has
 * no sum over rows, so a row that is left out of it is wrong and no weight mends that.
 *
 * Of n active rows with the scores s_1 >= s_2 >= ... >= s_n > 0, and a budget of k < n:
 *
 *     s_i = ||dY_i|| sqrt(1 + ||X_i||^2)   where X is known: the norm of what the row adds to
 *                                          [dW, db]. It gives their sum the least variance.
 *     s_i = ||dY_i||                       where it is not
 *     c   = the c < k with the least T / (k - c), T the sum of the scores after the c largest; of
 *           several the largest
 *
 * The c largest rows are kept with weight 1. k - c times one of the others is drawn, row i with
 * probability s_i / T, and each draw adds T / ((k - c) s_i) >= 1 to its weight. Draw j = 0, 1, ... is
 * the row in which u T falls, where the scores are added up in the order of the rows, and
 *
 *     u = sebp_random_uniform(seed, UINT64_MAX, 2 j)
 *         + sebp_random_uniform(seed, UINT64_MAX, 2 j + 1) / 2^24
 *
 * Probabilities are therefore multiples of 2^-48. Rows of equal score are kept or drawn together. With
 * n <= k all active rows are kept and there are no weights.
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
    SEBP_RULE_ENERGY = 3,    /**< the fewest rows that hold a share 1 - `delta` of ||dY||_F^2 */
    SEBP_RULE_SAMPLED = 4    /**< the largest rows and a sample of the others, with weights */
} sebp_rule_kind;

/** Which rows to keep. Zero-initialised it is SEBP_RULE_NONZERO. Only the fields that belong to its
 * kind are read. */
typedef struct sebp_rule {
    sebp_rule_kind kind;
    union {
        double threshold; /**< threshold: >= 0, not NaN; Inf keeps only rows with NaN or Inf */
        uint64_t seed;    /**< sampled: another seed is another sample, independent of the first */
    };
    int64_t
        count; /**< top: how many rows, >= 1; may exceed M. Sampled: the budget, or 0 for `share` */
    union {
        double delta; /**< energy: in [0, 1) */
        double
            share; /**< sampled, where count is 0: the budget is this share of the active rows, in
                         (0, 1], rounded up from the product in double */
    };
} sebp_rule;

static inline sebp_rule sebp_rule_nonzero(void)
{
    sebp_rule rule = {SEBP_RULE_NONZERO, {0.0}, 0, {0.0}};
    return rule;
}

static inline sebp_rule sebp_rule_threshold(double threshold)
{
    sebp_rule rule = {SEBP_RULE_THRESHOLD, {threshold}, 0, {0.0}};
    return rule;
}

static inline sebp_rule sebp_rule_top(int64_t count)
{
    sebp_rule rule = {SEBP_RULE_TOP, {0.0}, count, {0.0}};
    return rule;
}

static inline sebp_rule sebp_rule_energy(double delta)
{
    sebp_rule rule = {SEBP_RULE_ENERGY, {0.0}, 0, {delta}};
    return rule;
}

/** A budget that is a share of the active rows. */
static inline sebp_rule sebp_rule_sampled(double share, uint64_t seed)
{
    sebp_rule rule = {SEBP_RULE_SAMPLED, {0.0}, 0, {share}};
    rule.seed = seed;
    return rule;
}

/** A budget of `count` rows. */
static inline sebp_rule sebp_rule_sampled_count(int64_t count, uint64_t seed)
{
    sebp_rule rule = {SEBP_RULE_SAMPLED, {0.0}, count, {0.0}};
    rule.seed = seed;
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
 * decides. Memory: 8 bytes for each row of dY, which become the set. Sampled: see sebp_rows_sample(),
 * here without X.
 *
 * @param context  its threads scan dY.
 * @param dy       M x N, either dtype, any stride.
 * @param rule     NULL: SEBP_RULE_NONZERO.
 * @return also a status of sebp_matrix_check(); SEBP_ERROR_VALUE (the rule, NaN included).
 *         M = 0 or N = 0: the empty set of M rows.
 */
SEBP_API sebp_status sebp_rows_find(sebp_context *context, const sebp_matrix *dy,
                                    const sebp_rule *rule, sebp_rows **rows);

/**
 * A weighted sample of the rows of a gradient, for dW and db: SEBP_RULE_SAMPLED, whose formulas stand
 * at the top of this file.
 *
 * Where the linear layer's backward finds rows by that rule, it finds these, with X if it computes
 * dW. The set depends on dY, X and the rule alone, not on the number of threads or on the CPU, but
 * for the last bits in which sums of squares differ.
 *
 * Rows with a NaN or an Inf, in dY or X, are all kept, with weight 1, and count in the budget. Of the
 * finite rows, if there are any, at least one is kept. So rows with a NaN or an Inf, and they alone, can
 * make the set larger than the budget. A row of zeros in dY is never kept, whatever X holds. A weight is
 * at most FLT_MAX.
 *
 * Reads dY and X once, in parallel. Memory: 8 bytes for each row of dY, 12 for each row of the budget.
 *
 * @param dy    M x N, either dtype, any stride.
 * @param x     M x K, either dtype, any stride. NULL: the scores are those of dY alone.
 * @param rule  of the kind SEBP_RULE_SAMPLED.
 * @return as sebp_rows_find(); SEBP_ERROR_VALUE also for a rule of another kind, a negative count, or
 *         a count of 0 with a share outside (0, 1]; SEBP_ERROR_SHAPE (x has not M rows).
 */
SEBP_API sebp_status sebp_rows_sample(sebp_context *context, const sebp_matrix *dy,
                                      const sebp_matrix *x, const sebp_rule *rule,
                                      sebp_rows **rows);

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

/**
 * The weights of a set that was sampled: sebp_rows_count() of them, in the order of the indices, for as
 * long as the set lives; each 1 or above. NULL: all 1, as in every other set.
 *
 * A set with weights is taken by sebp_linear_backward() without dX, and by sebp_rows_dropped(), which
 * looks at the indices alone. All other functions refuse it: SEBP_ERROR_ROWS.
 */
SEBP_API const float *sebp_rows_weights(const sebp_rows *rows);

/**
 * How uncertain a sample makes the gradient: with the letters at the top of this file
 *
 *     v = T^2 / ((k - c) sum of s_i^2)        E ||error of [dW, db]||_F^2 <= v sum of s_i^2
 *
 * where X was known, else the same of db. The sum is over all active rows: it is ||[dW, db]||_F^2 if
 * what the rows add is orthogonal. So v is the variance relative to that, and 0 if nothing is drawn.
 * The bound lacks ||sum of what the drawn rows add||_F^2 / (k - c), which is not known.
 *
 * @return v >= 0; 0 without weights and for NULL; NaN where a row holds a NaN or an Inf.
 */
SEBP_API double sebp_rows_variance(const sebp_rows *rows);

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
