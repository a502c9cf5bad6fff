/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packing.h
 * How the operands of the native GEMM are packed: as they lie, or rounded, widened or split on the
 * way, a few lanes at a time.
 */
#ifndef SEBP_CPU_PACKING_H
#define SEBP_CPU_PACKING_H

#include "cpu.h"

enum { SEBP_MAX_PARTS = 3, SEBP_MAX_TERMS = 6 };

/** How exact a product is computed: by f32 multiply-adds, or by products of as many parts of bf16. */
typedef struct sebp_arithmetic {
    bool by_bf16;
    int parts; /* of an f32; 1 where it is rounded */
} sebp_arithmetic;

/** One factor of a product. */
typedef struct sebp_packing {
    sebp_pack *pack;
    sebp_slab slab; /* as it lies in memory */
    sebp_dtype dtype;
    sebp_dtype packs; /* the dtype that `pack` reads: another than dtype where rows are converted */
    int parts;        /* each packed by itself */
    bool is_checked;  /* for NaN, Inf and what has no finite parts */
    int width;        /* lanes to a sliver */
    int unit_elements; /* of the depth, to a unit */
    int64_t sliver_units;
    int64_t part_units; /* from a part to the next */
} sebp_packing;

/** Whether an operand is packed straight from its memory rows. */
static inline bool sebp_packs_straight(const sebp_packing *how)
{
    return how->packs == how->dtype && !how->is_checked;
}

/** All but the distances of slivers and parts, for the factor A or B. */
sebp_packing sebp_packing_of(const sebp_kernels *kernels, const sebp_operand *operand, bool is_a,
                             sebp_arithmetic arithmetic);

/** Lanes, whole slivers, that are packed at a time where packing is not straight. */
int64_t sebp_packing_lanes(const sebp_packing *how);

/** Bytes of room that packing `lanes` x `depth` elements takes at most; 0 where it is straight. */
int64_t sebp_packing_room(const sebp_packing *how, int64_t lanes, int64_t depth);

/**
 * Packs `lanes` lanes from `lane` on, `depth` elements of each from `at` on.
 *
 * @param finite  for each sliver, whether all parts are finite; NULL: not wanted, where nothing is
 *              checked.
 * @param room  sebp_packing_room() bytes, 64-byte aligned.
 */
void sebp_pack_lanes(const sebp_kernels *kernels, const sebp_packing *how, float *packed,
                     int64_t lane, int64_t lanes, int64_t at, int64_t depth, bool *finite,
                     void *room);

/** An element of the factor, as f32. */
float sebp_packing_element(const sebp_packing *how, int64_t lane, int64_t at);

/* arithmetic.c */

/** A product of a part of A and one of B. */
typedef struct sebp_term {
    int8_t a, b;
} sebp_term;

/** The products of parts that a product is the sum of, of those that `parts` parts of an f32 allow;
 * returns how many. */
int sebp_terms_of(const sebp_packing *a, const sebp_packing *b, int parts, sebp_term *terms);

/** The fastest of those that are as exact as the product asks for. */
sebp_arithmetic sebp_choose_arithmetic(const sebp_cpu *cpu, const sebp_product *product);

#endif
