/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file pack.h
 * What gemm.c and tile_product.c share: how factors are packed, and what is fetched ahead.
 *
 * Packing is where rows are gathered, bf16 is widened and transposes happen; so gathering costs
 * nothing of its own.
 */
#ifndef SEBP_PACK_H
#define SEBP_PACK_H

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    LINE_BYTES = 64,                   /* of cache */
    LINE = LINE_BYTES / sizeof(float), /* in floats */
    FRACTION = 1 << 16                 /* 1 in fixed point, to count lines by fractions */
};

/* How a vector of units is read: `n` elements along a memory row that is a lane. */
typedef vec load_units(const void *row, int64_t at, int64_t n);

/* How a vector of lanes is read: `n` elements of one memory row, or of two, one odd in depth. */
typedef vec load_lanes(const void *even, const void *odd, int64_t at, int64_t n);

INLINE vec units_f32(const void *row, int64_t at, int64_t n)
{
    const float *from = (const float *)row + at;
    return n >= VEC_LANES ? vec_load(from) : vec_load_first(from, n);
}

INLINE vec lanes_f32(const void *even, const void *odd, int64_t at, int64_t n)
{
    (void)odd;
    return units_f32(even, at, n);
}

#if VEC_HAS_BF16_PAIRS

INLINE vec units_pairs(const void *row, int64_t at, int64_t n)
{
    return vec_load_pairs_first((const uint16_t *)row + at, n < 2 * VEC_LANES ? n : 2 * VEC_LANES);
}

INLINE vec lanes_pairs(const void *even, const void *odd, int64_t at, int64_t n)
{
    return vec_pair_bf16((const uint16_t *)even + at, odd ? (const uint16_t *)odd + at : NULL,
                         n < VEC_LANES ? n : VEC_LANES);
}

#endif

INLINE const char *memory_row(const sebp_slab *from, int64_t row, int64_t element_bytes)
{
    return (const char *)from->data +
           (from->rows != NULL ? from->rows[row] : row) * from->stride * element_bytes;
}

/* Memory rows are lanes: blocks of VEC_LANES lanes x VEC_LANES units are transposed in registers.
 */
INLINE void pack_transposed(float *packed, int64_t sliver_units, int width, const sebp_slab *from,
                            int64_t lane, int64_t lanes, int64_t at, int64_t depth,
                            int64_t element_bytes, int unit_elements, load_units *load)
{
    for (int64_t first = 0; first < lanes; first += width, packed += sliver_units) {
        for (int group = 0; group < width; group += VEC_LANES) {
            const char *row[VEC_LANES] = {NULL};
            int present = 0;
            while (present < VEC_LANES && group + present < width &&
                   first + group + present < lanes) {
                row[present] = memory_row(from, lane + first + group + present, element_bytes);
                present++;
            }
            float *to = packed + group;
            for (int64_t step = 0; step < depth; step += (int64_t)VEC_LANES * unit_elements) {
                int64_t left = depth - step;
                vec block[VEC_LANES];
                for (int i = 0; i < VEC_LANES; i++)
                    block[i] = i < present ? load(row[i], at + step, left) : vec_zero();
                vec_transpose(block);
                int64_t units = (left + unit_elements - 1) / unit_elements;
                if (units >= VEC_LANES) {
                    for (int i = 0; i < VEC_LANES; i++)
                        vec_store(to + (int64_t)i * width, block[i]);
                } else {
                    for (int i = 0; i < units; i++)
                        vec_store(to + (int64_t)i * width, block[i]);
                }
                to += (int64_t)VEC_LANES * width;
            }
        }
    }
}

/* Memory rows are steps of the depth. Rows are taken a few at a time across all slivers, so that
 * both the reads along a row and the writes into a sliver are long enough. */
INLINE void pack_straight(float *packed, int64_t sliver_units, int width, const sebp_slab *from,
                          int64_t lane, int64_t lanes, int64_t at, int64_t depth,
                          int64_t element_bytes, int unit_elements, load_lanes *load)
{
    enum { STEPS = 8 };
    for (int64_t step = 0; step < depth; step += (int64_t)STEPS * unit_elements) {
        const char *even[STEPS], *odd[STEPS];
        int steps = 0;
        for (; steps < STEPS && step + (int64_t)steps * unit_elements < depth; steps++) {
            int64_t row = at + step + (int64_t)steps * unit_elements;
            even[steps] = memory_row(from, row, element_bytes);
            odd[steps] = unit_elements == 2 && row + 1 < at + depth
                             ? memory_row(from, row + 1, element_bytes)
                             : NULL;
        }
        float *sliver = packed + step / unit_elements * width;
        for (int64_t first = 0; first < lanes; first += width, sliver += sliver_units) {
            int64_t left = lanes - first < width ? lanes - first : width;
            for (int i = 0; i < steps; i++) {
                for (int group = 0; group < width; group += VEC_LANES) {
                    int64_t n = left - group < 0 ? 0 : left - group;
                    vec_store(sliver + (int64_t)i * width + group,
                              load(even[i], odd[i], lane + first + group, n));
                }
            }
        }
    }
}

/* Fetches lines of work->ahead, from `line` on up to the fraction `due`; returns the next one. */
INLINE int64_t fetch_ahead(const sebp_tile_work *work, int64_t row_lines, int64_t line, int64_t due)
{
    for (; line * FRACTION < due; line++) {
        __builtin_prefetch(
            work->ahead[line / row_lines] + work->ahead_at + line % row_lines * LINE_BYTES, 0, 2);
    }
    return line;
}

#endif
