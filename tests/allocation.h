/* SPDX-License-Identifier: Apache-2.0 */
/** @file allocation.h The calls whose allocations are made to fail, and the layer that they are made on. */
#ifndef SEBP_TESTS_ALLOCATION_H
#define SEBP_TESTS_ALLOCATION_H

#include <sebp/sebp.h>

#include "testing.h"

/** Elements that a call keeps. */
enum { ALLOCATION_KEPT = 20 };

/** What every call is made on, and what it writes. */
typedef struct allocation_world {
    sebp_matrix dy, x, w, bias, dx, dw, db, y; /**< a linear layer */
    sebp_matrix a, b, h, dh, da, lora_db;      /**< beside it with LoRA */
    sebp_matrix r;                             /**< in a rotated space */
    sebp_rows *rows;
    sebp_sequences *sequences;
    sebp_matrix texts_q, texts_out, texts_lse, texts_sums, texts_dq, texts_dk; /**< of attention */
    sebp_basis *basis;
    sebp_basis_sums *sums;
    int64_t kept_indices[ALLOCATION_KEPT];
    float kept_values[ALLOCATION_KEPT];
    sebp_sparse kept; /**< of the two lists above */
    sebp_dropped dropped;
    double loss;
} allocation_world;

extern allocation_world on;

/** A file with a basis. */
extern const char allocation_basis_path[];

void allocation_setup(void);
void allocation_teardown(void);

/** The matrices that calls write. */
enum { ALLOCATION_OUTPUTS = 13 };
extern const sebp_matrix *const allocation_outputs[ALLOCATION_OUTPUTS];

/** Poisons everything that calls write. */
void allocation_poison(void);
/** Whether nothing of it has been written. */
int allocation_is_poison(void);

/** A call that is made to fail. `result` takes what it makes. It does nothing besides: where the library is
 * linked in, Check's own memory would be counted as the library's. */
typedef sebp_status (*allocation_call)(sebp_context *context, void **result);

typedef struct allocation_target {
    const char *name;
    allocation_call call;
    void (*destroy)(void *result);
    int min; /**< allocations there must be */
} allocation_target;

extern const allocation_target allocation_targets[];
extern const int allocation_target_count;

/** The `destroy` of calls that make row sets. */
void allocation_destroy_rows(void *set);

#endif
