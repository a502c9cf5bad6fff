/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers_call.h
 * Good calls of row-wise layers, losses and embeddings, which tests of bad input change before they make
 * them.
 */
#ifndef SEBP_TESTS_LAYERS_CALL_H
#define SEBP_TESTS_LAYERS_CALL_H

#include <sebp/sebp.h>

#include "testing.h"

enum { ROWS = 6, COLS = 10, STRIDE = 13, VIEWS = 12 };

/** M x N matrices, but for those called VECTOR, which are 1 x N, STATISTICS, which is M x 2, and TABLE, which
 * is M x 4. */
enum { A, B, C, D, E, VECTOR, VECTOR2, VECTOR3, VECTOR4, STATISTICS, TABLE, WEIGHT };

/** What layers_call_reset() goes back to. */
typedef struct layers_call_world {
    sebp_context *context;
    sebp_rows *some_rows;
    sebp_rows *other_rows; /**< of one row more */
    sebp_matrix made[VIEWS], before[VIEWS];
} layers_call_world;

extern layers_call_world layers_call_on;

/** What a call is made with. */
typedef struct layers_call {
    sebp_context *context;
    sebp_matrix views[VIEWS];
    const sebp_matrix *at[VIEWS];
    const sebp_rows *rows;
    sebp_norm_options norm;
    sebp_activation_options activation;
    sebp_dropout_options dropout;
    sebp_rotary_options rotary;
    sebp_cross_entropy_options entropy;
    sebp_embedding_options embedding;
    sebp_activation kind;
    int64_t numbers[ROWS];
    const int64_t *list;
    sebp_embedding tables[2];
    const sebp_embedding *given_tables;
    int64_t count;
    double loss, factor;
    double *to_loss;
} layers_call;

extern layers_call call;

void layers_call_setup(void);
void layers_call_teardown(void);
void layers_call_reset(void);

/** sebp_norm_forward() and so on, with what `call` has. */
sebp_status layers_call_norm_forward(void);
sebp_status layers_call_norm_backward(void);
sebp_status layers_call_activation_forward(void);
sebp_status layers_call_activation_backward(void);
sebp_status layers_call_dropout_apply(void);
sebp_status layers_call_rotary_table(void);
sebp_status layers_call_rotary_forward(void);
sebp_status layers_call_rotary_backward(void);
sebp_status layers_call_cross_entropy(void);
sebp_status layers_call_linear_cross_entropy(void);
sebp_status layers_call_embedding_forward(void);
sebp_status layers_call_embedding_backward(void);
sebp_status layers_call_gradient_norm(void);
sebp_status layers_call_scale(void);

/** `function` failed with `got`; so it should, with nothing written and its message naming `word`. */
void layers_call_failed(sebp_status got, sebp_status want, const char *function, const char *word,
                        const char *change);

/** Makes one change to a good call of `function`, without its sebp_; it fails. */
#define FAILS(function, status, word, change)                                                      \
    do {                                                                                           \
        layers_call_reset();                                                                       \
        change;                                                                                    \
        layers_call_failed(layers_call_##function(), status, #function, word, #change);            \
    } while (0)

/* A view that is wrong by itself. */
#define BAD_VIEW(function, which, word)                                                            \
    do {                                                                                           \
        FAILS(function, SEBP_ERROR_SIZE, word, call.views[which].rows = -1);                       \
        FAILS(function, SEBP_ERROR_STRIDE, word, call.views[which].stride = 1);                    \
        FAILS(function, SEBP_ERROR_DTYPE, word, call.views[which].dtype = (sebp_dtype)9);          \
        FAILS(function, SEBP_ERROR_NULL, word, call.views[which].data = NULL);                     \
        FAILS(function, SEBP_ERROR_OVERFLOW, word, call.views[which].stride = INT64_MAX / 2);      \
    } while (0)

/* An argument of another shape, and of another dtype than the first. */
#define BAD_SHAPE(function, which, word)                                                           \
    do {                                                                                           \
        FAILS(function, SEBP_ERROR_SHAPE, word, call.views[which].cols = 1);                       \
        FAILS(function, SEBP_ERROR_SHAPE, word, call.views[which].rows = 0);                       \
    } while (0)

#define BAD_DTYPE(function, which, word)                                                           \
    FAILS(function, SEBP_ERROR_DTYPE, word, call.views[which].dtype = SEBP_BF16)

#define MISSING(function, which, word) FAILS(function, SEBP_ERROR_NULL, word, call.at[which] = NULL)

/* An output moved onto another argument, by one element, and onto all of it where it may not be. */
#define SHIFTED(function, which, onto)                                                             \
    FAILS(function, SEBP_ERROR_ALIAS, "overlaps",                                                  \
          call.views[which].data = (float *)layers_call_on.made[onto].data + 1)
#define ONTO(function, which, onto)                                                                \
    FAILS(function, SEBP_ERROR_ALIAS, "overlaps",                                                  \
          call.views[which].data = layers_call_on.made[onto].data)

#define BAD_ROWS(function)                                                                         \
    FAILS(function, SEBP_ERROR_ROWS, "row set", call.rows = layers_call_on.other_rows)

#define BAD_OPTIONS(function, options)                                                             \
    do {                                                                                           \
        FAILS(function, SEBP_ERROR_SIZE, "options", call.options.size_bytes = 3);                  \
        FAILS(function, SEBP_ERROR_VALUE, "inactive", call.options.inactive = (sebp_inactive)5);   \
        FAILS(function, SEBP_ERROR_NULL, NULL, call.context = NULL);                               \
    } while (0)

#endif
