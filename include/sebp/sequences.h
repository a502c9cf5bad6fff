/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sequences.h
 * Sequences: where each text of a batch lies among the rows of a matrix. Attention needs to
 * know it; a row set (rows.h) alone does not say it.
 *
 * The rows of a text follow each other, and texts follow each other in order. They may lie end to
 * end (packed), or with rows between them that belong to none (padded). A text may be empty.
 *
 * Sequences are immutable, own their memory, belong to no context and may be shared between threads.
 */
#ifndef SEBP_SEQUENCES_H
#define SEBP_SEQUENCES_H

#include <stdint.h>

#include <sebp/rows.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef struct sebp_sequences sebp_sequences;

/**
 * Texts that lie end to end, among as many rows as they have together.
 *
 * For this and the constructors below: lengths, or what stands in their place, are copied and may be
 * NULL only where there are none; `sequences` is where the result is put, untouched on error; free
 * it with sebp_sequences_destroy(). count = 0 makes sequences without texts. They return SEBP_SUCCESS;
 * SEBP_ERROR_NULL; SEBP_ERROR_SIZE (a negative size); SEBP_ERROR_VALUE (a length or an offset that
 * cannot be); SEBP_ERROR_OVERFLOW; SEBP_ERROR_MEMORY; and what they add themselves.
 *
 * @param lengths  `count` of them, each >= 0.
 */
SEBP_API sebp_status sebp_sequences_from_lengths(const int64_t *lengths, int64_t count,
                                                 sebp_sequences **sequences);

/** Texts padded on the right: text s has the first lengths[s] of the rows from s * sequence_length
 * on, of count * sequence_length. Each length is in [0, sequence_length]. */
SEBP_API sebp_status sebp_sequences_from_padded(const int64_t *lengths, int64_t count,
                                                int64_t sequence_length,
                                                sebp_sequences **sequences);

/**
 * Texts padded on any side: text s has those of the rows from s * sequence_length on whose mask is
 * not 0. mask: count * sequence_length bytes.
 *
 * @return also SEBP_ERROR_ROWS (the rows of a text do not follow each other).
 */
SEBP_API sebp_status sebp_sequences_from_mask(const uint8_t *mask, int64_t count,
                                              int64_t sequence_length, sebp_sequences **sequences);

/** Texts that lie end to end, by their cumulative lengths, as flash-attention has them in cu_seqlens:
 * text s has the rows offsets[s] to offsets[s + 1] - 1. offsets: count + 1, never NULL, the first 0,
 * none below the one before. */
SEBP_API sebp_status sebp_sequences_from_offsets(const int64_t *offsets, int64_t count,
                                                 sebp_sequences **sequences);

/** As sebp_sequences_from_offsets(), of 32 bits. */
SEBP_API sebp_status sebp_sequences_from_offsets32(const int32_t *offsets, int64_t count,
                                                   sebp_sequences **sequences);

/** Frees them. NULL: nothing. */
SEBP_API void sebp_sequences_destroy(sebp_sequences *sequences);

/** How many texts there are, empty ones included. 0 for NULL, as in the functions below. */
SEBP_API int64_t sebp_sequences_count(const sebp_sequences *sequences);

/** M: among how many rows they lie. */
SEBP_API int64_t sebp_sequences_total(const sebp_sequences *sequences);

/** The length of the longest. */
SEBP_API int64_t sebp_sequences_max_length(const sebp_sequences *sequences);

/** The first row of each text, sebp_sequences_count() of them, for as long as the sequences live.
 * NULL for NULL. */
SEBP_API const int64_t *sebp_sequences_firsts(const sebp_sequences *sequences);

/** Their cumulative lengths: one more than there are texts, the first 0, the last the number of
 * active rows: where the texts would begin if they lay end to end. NULL for NULL. */
SEBP_API const int64_t *sebp_sequences_offsets(const sebp_sequences *sequences);

/**
 * The row set of the rows that belong to a text, among sebp_sequences_total().
 *
 * @param rows  where the set is put, untouched on error; free it with sebp_rows_destroy().
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_OVERFLOW (more rows than
 *         an array has); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sequences_rows(const sebp_sequences *sequences, sebp_rows **rows);

SEBP_END_DECLS

#endif
