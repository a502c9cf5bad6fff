/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tile_product.c
 * Packing and tiles of bf16 products where there is a matrix unit, over the vocabulary of tile.h.
 *
 * TILE_BLOCK x TILE_BLOCK sums of C take four tiles; two hold a step of A, and two one of B: a step is
 * TILE_SIDE units of the depth, that is 2 * TILE_SIDE elements. Each tile that is loaded is used
 * twice. A and B are packed so that the tiles of a step lie together:
 *
 *     A, step s: its upper TILE_SIDE rows, then its lower ones, row by row
 *     B, step s: its TILE_SIDE units, each of TILE_BLOCK columns
 *
 * The units that the last step lacks are zero in both. The sums leave the tiles by way of a buffer:
 * the rows of C lie anywhere, and a bias, an old value and the edges are a matter of vectors.
 */
#include "pack.h"

#if HAS_TILES

enum {
    STEP_ELEMENTS = 2 * TILE_SIDE,         /* of the depth, to a step */
    TILE_UNITS = TILE_SIDE * TILE_SIDE,    /* in a tile */
    STEP_UNITS = TILE_SIDE * TILE_BLOCK,   /* in a step of A or of B */
    A_STRIDE = TILE_ROW_BYTES,             /* bytes from a row of a packed tile to the next */
    B_STRIDE = TILE_BLOCK * sizeof(float), /* likewise, and of the buffer of sums */
    ELEMENT_BYTES = sizeof(uint16_t)
};

_Static_assert(TILE_SIDE % VEC_LANES == 0, "rows of tiles are whole vecs");

/* Steps that hold `units` units. */
INLINE int64_t steps_of(int64_t units)
{
    return (units + TILE_SIDE - 1) / TILE_SIDE;
}

/* ---- packing A ---- */

/* Memory rows are lanes: 64 bytes of one are a row of a tile. */
INLINE void pack_a_rows(float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane,
                        int64_t lanes, int64_t at, int64_t depth)
{
    for (int64_t first = 0; first < lanes; first += TILE_BLOCK, packed += sliver_units) {
        for (int64_t i = 0; i < TILE_BLOCK; i++) {
            float *to = packed + i * TILE_SIDE;
            const char *row = NULL;
            if (first + i < lanes) {
                row = memory_row(from, lane + first + i, ELEMENT_BYTES) + at * ELEMENT_BYTES;
            }
            for (int64_t step = 0; step < depth; step += STEP_ELEMENTS, to += STEP_UNITS) {
                const int64_t left = row != NULL ? depth - step : 0;
                if (left >= STEP_ELEMENTS) {
                    memcpy(to, row + step * ELEMENT_BYTES, TILE_ROW_BYTES);
                } else {
                    memset(to, 0, TILE_ROW_BYTES);
                    if (left > 0)
                        memcpy(to, row + step * ELEMENT_BYTES, (size_t)(left * ELEMENT_BYTES));
                }
            }
        }
    }
}

/* The memory rows of a step of the depth, NULL past its end. */
typedef struct step_rows {
    const char *row[STEP_ELEMENTS];
} step_rows;

INLINE step_rows rows_of_step(const sebp_slab *from, int64_t at, int64_t left)
{
    step_rows rows;
    for (int64_t i = 0; i < STEP_ELEMENTS; i++)
        rows.row[i] = i < left ? memory_row(from, at + i, ELEMENT_BYTES) : NULL;
    return rows;
}

/* Unit `u` of a step: its pairs of `n` lanes from element `at` of its memory rows on. */
INLINE vec pairs_of_unit(const step_rows *rows, int u, int64_t at, int64_t n)
{
    const char *even = rows->row[2 * u];
    if (even == NULL || n <= 0)
        return vec_zero();
    return lanes_pairs(even, rows->row[2 * u + 1], at, n);
}

/* Memory rows are steps of the depth: units and lanes are transposed in registers. A step is taken
 * across all slivers, so that reads along a memory row are long. */
INLINE void pack_a_steps(float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane,
                         int64_t lanes, int64_t at, int64_t depth)
{
    for (int64_t step = 0; step < depth; step += STEP_ELEMENTS, packed += STEP_UNITS) {
        const step_rows rows = rows_of_step(from, at + step, depth - step);
        float *sliver = packed;
        for (int64_t first = 0; first < lanes; first += TILE_BLOCK, sliver += sliver_units) {
            for (int group = 0; group < TILE_BLOCK; group += VEC_LANES) {
                const int64_t left = lanes - first - group;
                for (int u = 0; u < TILE_SIDE; u += VEC_LANES) {
                    vec block[VEC_LANES];
                    for (int i = 0; i < VEC_LANES; i++)
                        block[i] = pairs_of_unit(&rows, u + i, lane + first + group, left);
                    vec_transpose(block);
                    for (int i = 0; i < VEC_LANES; i++)
                        vec_store(sliver + (group + i) * TILE_SIDE + u, block[i]);
                }
            }
        }
    }
}

void SEBP_NAME(pack_a_bf16)(float *packed, int64_t sliver_units, const sebp_slab *from,
                            int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    if (from->lanes_are_rows)
        pack_a_rows(packed, sliver_units, from, lane, lanes, at, depth);
    else
        pack_a_steps(packed, sliver_units, from, lane, lanes, at, depth);
}

/* ---- packing B ---- */

void SEBP_NAME(pack_b_bf16)(float *packed, int64_t sliver_units, const sebp_slab *from,
                            int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    if (from->lanes_are_rows) {
        pack_transposed(packed, sliver_units, TILE_BLOCK, from, lane, lanes, at, depth,
                        ELEMENT_BYTES, 2, units_pairs);
    } else {
        pack_straight(packed, sliver_units, TILE_BLOCK, from, lane, lanes, at, depth, ELEMENT_BYTES,
                      2, lanes_pairs);
    }
    const int64_t units = (depth + 1) / 2, missing = steps_of(units) * TILE_SIDE - units;
    for (int64_t first = 0; first < lanes && missing > 0; first += TILE_BLOCK) {
        memset(packed + first / TILE_BLOCK * sliver_units + units * TILE_BLOCK, 0,
               (size_t)(missing * TILE_BLOCK) * sizeof *packed);
    }
}

/* Step `s` of B, straight from its memory rows. */
INLINE void pack_b_step(const sebp_tile_work *work, int64_t s)
{
    float *to = work->b + s * STEP_UNITS;
    for (int64_t u = s * TILE_SIDE; u < (s + 1) * TILE_SIDE; u++, to += TILE_BLOCK) {
        const char *even = u < work->units ? work->b_rows[2 * u] + work->b_at : NULL, *odd = NULL;
        if (even != NULL && work->b_rows[2 * u + 1] != NULL)
            odd = work->b_rows[2 * u + 1] + work->b_at;
        for (int j = 0; j < TILE_BLOCK; j += VEC_LANES)
            vec_store(to + j, even != NULL ? lanes_pairs(even, odd, j, VEC_LANES) : vec_zero());
    }
}

/* ---- sums ---- */

/* The tiles: C's upper left sums, its upper right ones and so on, and a step of A and of B. */
#define UPPER_LEFT  0
#define UPPER_RIGHT 1
#define LOWER_LEFT  2
#define LOWER_RIGHT 3
#define A_UPPER     4
#define A_LOWER     5
#define B_LEFT      6
#define B_RIGHT     7

/* What is fetched while the tiles multiply, spread evenly over the steps: C's rows into L2, as L1 may
 * not hold all of them, and what is ahead. */
typedef struct fetching {
    int64_t row_due, row_more, row; /* of C */
    int64_t line_due, line_more, line;
} fetching;

INLINE fetching begin_fetching(const sebp_tile_work *work, int64_t steps)
{
    fetching at = {.line = work->ahead_line, .line_due = work->ahead_line * FRACTION};
    if (steps == 0)
        return at;
    if (work->rows == TILE_BLOCK && work->cols == TILE_BLOCK && !work->stream)
        at.row_more = (TILE_BLOCK * FRACTION + steps - 1) / steps;
    if (work->ahead != NULL)
        at.line_more = work->ahead_lines * FRACTION / steps;
    return at;
}

INLINE void fetch(const sebp_tile_work *work, fetching *at)
{
    const int64_t row_lines = (TILE_BLOCK * ELEMENT_BYTES + LINE_BYTES - 1) / LINE_BYTES;
    const float *const *fetched = work->accumulate ? work->from : (const float *const *)work->c;
    at->row_due += at->row_more;
    for (; at->row < TILE_BLOCK && at->row * FRACTION < at->row_due; at->row++) {
        for (int j = 0; j < TILE_BLOCK; j += LINE)
            __builtin_prefetch(fetched[at->row] + work->c_at + j, 0, 2);
    }
    at->line_due += at->line_more;
    at->line = fetch_ahead(work, row_lines, at->line, at->line_due);
}

/* sums: TILE_BLOCK x TILE_BLOCK = A B. Without `lower` the lower half of it, and without `right` the
 * right half, is not there, nor computed. Where `pack_b`, a step of B is packed while the tiles
 * multiply the one before. */
INLINE void multiply(bool lower, bool right, bool pack_b, const sebp_tile_work *work, float *sums)
{
    tile_set t;
    tile_zero(&t, UPPER_LEFT);
    tile_zero(&t, UPPER_RIGHT);
    tile_zero(&t, LOWER_LEFT);
    tile_zero(&t, LOWER_RIGHT);
    const int64_t steps = steps_of(work->units);
    const float *a = work->a, *b = work->b;
    fetching at = begin_fetching(work, steps);
    if (pack_b && steps > 0)
        pack_b_step(work, 0);
    for (int64_t s = 0; s < steps; s++, a += STEP_UNITS, b += STEP_UNITS) {
        tile_load(&t, A_UPPER, a, A_STRIDE);
        tile_load(&t, B_LEFT, b, B_STRIDE);
        tile_dot(&t, UPPER_LEFT, A_UPPER, B_LEFT);
        if (right) {
            tile_load(&t, B_RIGHT, b + TILE_SIDE, B_STRIDE);
            tile_dot(&t, UPPER_RIGHT, A_UPPER, B_RIGHT);
        }
        if (lower) {
            tile_load(&t, A_LOWER, a + TILE_UNITS, A_STRIDE);
            tile_dot(&t, LOWER_LEFT, A_LOWER, B_LEFT);
        }
        if (lower && right)
            tile_dot(&t, LOWER_RIGHT, A_LOWER, B_RIGHT);
        if (pack_b && s + 1 < steps)
            pack_b_step(work, s + 1);
        fetch(work, &at);
    }
    tile_store(&t, UPPER_LEFT, sums, B_STRIDE);
    if (right)
        tile_store(&t, UPPER_RIGHT, sums + TILE_SIDE, B_STRIDE);
    if (lower)
        tile_store(&t, LOWER_LEFT, sums + TILE_SIDE * TILE_BLOCK, B_STRIDE);
    if (lower && right)
        tile_store(&t, LOWER_RIGHT, sums + TILE_SIDE * TILE_BLOCK + TILE_SIDE, B_STRIDE);
}

/* One row of C, of which `n` elements are there from `to` on: its sums, and what is added; from: NULL
 * or added, too. */
INLINE void store_sums(float *to, const float *from, const float *sums, int64_t n,
                       const float *bias)
{
    vec result = vec_load(sums);
    if (from != NULL)
        result = vec_add(vec_load_first(from, n), result);
    if (bias != NULL)
        result = vec_add(result, vec_load_first(bias, n));
    vec_store_first(to, result, n);
}

INLINE void store_edge(const sebp_tile_work *work, const float *sums)
{
    for (int64_t i = 0; i < work->rows; i++, sums += TILE_BLOCK) {
        float *to = work->c[i] + work->c_at;
        const float *from = work->accumulate ? work->from[i] + work->c_at : NULL;
        for (int64_t j = 0; j < work->cols; j += VEC_LANES) {
            const int64_t left = work->cols - j, n = left < VEC_LANES ? left : VEC_LANES;
            const float *bias = work->bias != NULL ? work->bias + j : NULL;
            store_sums(to + j, from != NULL ? from + j : NULL, sums + j, n, bias);
        }
    }
}

/* All rows and columns are there. */
INLINE void store_whole(bool stream, bool accumulate, const sebp_tile_work *work, const float *sums)
{
    for (int64_t i = 0; i < TILE_BLOCK; i++, sums += TILE_BLOCK) {
        float *to = work->c[i] + work->c_at;
        for (int j = 0; j < TILE_BLOCK; j += VEC_LANES) {
            vec result = vec_load(sums + j);
            if (stream) {
                vec_stream(to + j, result);
                continue;
            }
            if (accumulate)
                result = vec_add(vec_load(work->from[i] + work->c_at + j), result);
            vec_store(to + j, result);
        }
    }
}

void SEBP_NAME(tile_bf16)(const sebp_tile_work *work)
{
    _Alignas(LINE_BYTES) float sums[TILE_BLOCK * TILE_BLOCK];
    const bool is_whole = work->rows == TILE_BLOCK && work->cols == TILE_BLOCK;
    const bool lower = work->rows > TILE_SIDE, right = work->cols > TILE_SIDE;
    if (work->pack_b && lower)
        multiply(true, true, true, work, sums);
    else if (work->pack_b)
        multiply(false, true, true, work, sums);
    else if (lower && right)
        multiply(true, true, false, work, sums);
    else if (lower)
        multiply(true, false, false, work, sums);
    else if (right)
        multiply(false, true, false, work, sums);
    else
        multiply(false, false, false, work, sums);

    if (is_whole && work->stream)
        store_whole(true, false, work, sums);
    else if (is_whole && work->bias == NULL && work->accumulate)
        store_whole(false, true, work, sums);
    else if (is_whole && work->bias == NULL)
        store_whole(false, false, work, sums);
    else
        store_edge(work, sums);
}

void SEBP_NAME(configure_tiles)(void)
{
    tile_configure();
}

void SEBP_NAME(release_tiles)(void)
{
    tile_release();
}

#else

void SEBP_NAME(configure_tiles)(void)
{
}

void SEBP_NAME(release_tiles)(void)
{
}

#endif
