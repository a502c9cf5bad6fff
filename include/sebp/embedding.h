/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file embedding.h
 * Rows of tables by their index, and the tables' gradients.
 */
#ifndef SEBP_EMBEDDING_H
#define SEBP_EMBEDDING_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/** The most tables whose rows are added in one pass. */
enum { SEBP_MAX_TABLES = 4 };

/** A table, and which of its rows each token takes. */
typedef struct sebp_embedding {
    sebp_matrix table; /**< V x N */
    const int64_t
        *indices; /**< M of them in the device's memory, each in [0, V), used of active rows alone;
                               NULL only where M is 0 */
} sebp_embedding;

typedef struct sebp_embedding_options {
    size_t size_bytes;      /**< sizeof(sebp_embedding_options), so that the struct can grow */
    sebp_inactive inactive; /**< inactive rows of y; forward only */
    int64_t padding_index;  /**< backward: tokens with it add nothing; below 0: none. Default -1 */
    sebp_write write;       /**< backward: of dtable */
} sebp_embedding_options;

/** Options as they are by default, with size_bytes set. */
#define SEBP_EMBEDDING_OPTIONS_INIT                                                                \
    {                                                                                              \
        sizeof(sebp_embedding_options), SEBP_INACTIVE_ZERO, -1, SEBP_OVERWRITE                     \
    }

/**
 * y = the sum over tables of the row that its index names: one table, or word, position and type as
 * BERT has them. Added in their order in f32 and rounded once. Reads a row of each table and writes y:
 * (tables + 1) * 4 bytes an element in f32, less where tables stay in the cache.
 *
 * @param tables   `count` of them, 1 to SEBP_MAX_TABLES, of y's dtype.
 * @param rows     NULL: all.
 * @param options  NULL: the defaults.
 * @param y        M x N; it overlaps no table.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE (count too); a status of
 *         sebp_matrix_check(); SEBP_ERROR_DTYPE; SEBP_ERROR_VALUE (an option, an index);
 *         SEBP_ERROR_ROWS; SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS.
 */
SEBP_API sebp_status sebp_embedding_forward(sebp_context *context, const sebp_embedding *tables,
                                            int count, const sebp_rows *rows,
                                            const sebp_embedding_options *options,
                                            const sebp_matrix *y);

/**
 * dtable[v] (+)= the sum of the rows of dy whose index is v, in f32, rounded once: on CPUs in their
 * order, on a GPU in one that depends on how many they are; the same bits for every number of
 * threads. Other rows of dtable become 0 under SEBP_OVERWRITE. Reads dy, writes the rows named, and
 * zeroes the rest. Memory: 56 bytes an active token.
 *
 * @param dy       M x N.
 * @param indices  M of them, as in the forward.
 * @param rows     NULL: all. Inactive rows of dy add nothing.
 * @param options  NULL: the defaults.
 * @param dtable   V x N, either dtype; it overlaps nothing.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_VALUE (an option, an index); SEBP_ERROR_ROWS; SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_embedding_backward(sebp_context *context, const sebp_matrix *dy,
                                             const int64_t *indices, const sebp_rows *rows,
                                             const sebp_embedding_options *options,
                                             const sebp_matrix *dtable);

SEBP_END_DECLS

#endif
