/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gemm.c
 * Packing and tiles of the native GEMM, over the vector vocabulary; of bf16 only where the ISA has
 * no tiles of its own (tile_product.c).
 *
 * A tile holds TILE_ROWS x TILE_VECS vectors of C in registers. At each unit of the depth it loads
 * TILE_VECS vectors of packed B and broadcasts TILE_ROWS numbers of packed A.
 */
#include "pack.h"

enum { TILE_COLS = TILE_VECS * VEC_LANES };

/* A vector stored at each unit may spill into the next unit, which is written after it; with more
 * than one vector to a unit it would spill into what is written before. */
_Static_assert(TILE_ROWS <= VEC_LANES || TILE_ROWS % VEC_LANES == 0,
               "a sliver of A is packed in order");

INLINE void pack_f32(float *packed, int64_t sliver_units, int width, const sebp_slab *from,
                     int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    if (from->lanes_are_rows)
        pack_transposed(packed, sliver_units, width, from, lane, lanes, at, depth, 4, 1, units_f32);
    else
        pack_straight(packed, sliver_units, width, from, lane, lanes, at, depth, 4, 1, lanes_f32);
}

void SEBP_NAME(pack_a_f32)(float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane,
                           int64_t lanes, int64_t at, int64_t depth)
{
    pack_f32(packed, sliver_units, TILE_ROWS, from, lane, lanes, at, depth);
}

void SEBP_NAME(pack_b_f32)(float *packed, int64_t sliver_units, const sebp_slab *from, int64_t lane,
                           int64_t lanes, int64_t at, int64_t depth)
{
    pack_f32(packed, sliver_units, TILE_COLS, from, lane, lanes, at, depth);
}

/* sum + a * b: of f32, or of pairs of bf16. */
typedef vec multiply_add(vec sum, vec a, vec b);

INLINE vec multiply_f32(vec sum, vec a, vec b)
{
    return vec_fma(a, b, sum);
}

/* What depends on the dtype of a product: how B is read as it is packed, and how it is multiplied.
 */
typedef struct arithmetic {
    multiply_add *multiply;
    load_lanes *load;
    int unit_elements;
    int64_t element_bytes;
} arithmetic;

/* One row of a tile: TILE_VECS vectors, of which `cols` numbers lie in C; from: NULL or added. */
INLINE void store_row(float *to, const float *from, const vec *sum, int64_t cols, const float *bias)
{
    for (int j = 0; j < TILE_VECS; j++) {
        int64_t at = (int64_t)j * VEC_LANES, n = cols - at;
        if (n <= 0)
            return;
        if (n > VEC_LANES)
            n = VEC_LANES;
        vec result = sum[j];
        if (from != NULL)
            result = vec_add(vec_load_first(from + at, n), result);
        if (bias != NULL)
            result = vec_add(result, vec_load_first(bias + at, n));
        vec_store_first(to + at, result, n);
    }
}

/* Where a tile has B from: packed, or from its memory rows, and then leaves it packed or not. */
typedef enum b_source { PACKED, ROWS, ROWS_TO_PACK } b_source;

/* Unit `u` of a tile: `height` numbers of packed A times TILE_VECS vectors of B. */
INLINE void add_unit(int height, b_source source, arithmetic with, const sebp_tile_work *work,
                     int64_t u, vec sum[TILE_ROWS][TILE_VECS])
{
    const float *a = work->a + u * TILE_ROWS;
    float *b = source != ROWS ? work->b + u * TILE_COLS : NULL;
    vec lanes[TILE_VECS];
    if (source != PACKED) {
        const char *const *row = work->b_rows + u * with.unit_elements;
        const char *even = row[0] + work->b_at, *odd = NULL;
        if (with.unit_elements == 2 && row[1] != NULL)
            odd = row[1] + work->b_at;
        for (int j = 0; j < TILE_VECS; j++)
            lanes[j] = with.load(even, odd, (int64_t)j * VEC_LANES, VEC_LANES);
        for (int j = 0; j < TILE_VECS && source == ROWS_TO_PACK; j++)
            vec_store(b + j * VEC_LANES, lanes[j]);
    } else {
        for (int j = 0; j < TILE_VECS; j++)
            lanes[j] = vec_load(b + j * VEC_LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
        vec row = vec_set1(a[i]);
        for (int j = 0; j < TILE_VECS; j++)
            sum[i][j] = with.multiply(sum[i][j], row, lanes[j]);
    }
}

/* A tile of `height` rows, of which the first work->rows are stored. All but `work` is known when
 * compiled, so that the sums stay in registers. Whatever is not arithmetic is done once in a round
 * of units: a core that another thread shares has no instructions to spare. */
INLINE void tile_of(int height, b_source source, arithmetic with, const sebp_tile_work *work)
{
    enum { ROUND = TILE_ROWS * TILE_VECS < 16 ? 8 : 4 };
    const int64_t units = work->units, rounds = units / ROUND;
    const int64_t row_lines = (TILE_COLS * with.element_bytes + LINE_BYTES - 1) / LINE_BYTES;
    const int64_t more = work->ahead != NULL && rounds ? work->ahead_lines * FRACTION / rounds : 0;
    int64_t line = work->ahead_line, due = line * FRACTION;
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 16
        for (int j = 0; j < TILE_VECS; j++)
            sum[i][j] = vec_zero();
    }
    const bool is_whole = work->rows == height && work->cols == TILE_COLS;
    const int64_t fetched = is_whole && !work->stream ? height : 0;
    const float *const *fetch = work->accumulate ? work->from : (const float *const *)work->c;
    int64_t u = 0;
    for (; u < rounds * ROUND; u += ROUND) {
        for (int64_t i = u; i < u + ROUND && i < fetched; i++) {
            /* a row of C, or of what it is added to, a unit; into L2, as L1 may not hold all */
            for (int j = 0; j < TILE_COLS; j += LINE)
                __builtin_prefetch(fetch[i] + work->c_at + j, 0, 2);
        }
        due += more;
        line = fetch_ahead(work, row_lines, line, due);
#pragma GCC unroll 8
        for (int i = 0; i < ROUND; i++)
            add_unit(height, source, with, work, u + i, sum);
    }
    for (; u < units; u++)
        add_unit(height, source, with, work, u, sum);
    if (is_whole && work->stream) {
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
            for (int j = 0; j < TILE_VECS; j++)
                vec_stream(work->c[i] + work->c_at + (int64_t)j * VEC_LANES, sum[i][j]);
        }
    } else if (is_whole && work->bias == NULL) {
        /* nearly every tile: straight from the registers */
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
            float *to = work->c[i] + work->c_at;
            for (int j = 0; j < TILE_VECS; j++) {
                if (work->accumulate)
                    sum[i][j] = vec_add(
                        vec_load(work->from[i] + work->c_at + (int64_t)j * VEC_LANES), sum[i][j]);
                vec_store(to + (int64_t)j * VEC_LANES, sum[i][j]);
            }
        }
    } else {
        /* the loop below indexes by what is not known when compiled, so it gets a copy: an array that it
         * read would not stay in registers, for any tile */
        vec copy[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 16
            for (int j = 0; j < TILE_VECS; j++)
                copy[i][j] = sum[i][j];
        }
        for (int i = 0; i < work->rows; i++) {
            const float *from = work->accumulate ? work->from[i] + work->c_at : NULL;
            store_row(work->c[i] + work->c_at, from, copy[i], work->cols, work->bias);
        }
    }
}

/* A tile at the lower edge has a height of its own: computing rows that are not there would cost as
 * much as those that are. */
INLINE void tile_from(b_source source, arithmetic with, const sebp_tile_work *work)
{
    _Static_assert(TILE_ROWS % 2 == 0 && TILE_ROWS <= 16, "heights go by two");
#define TRY_HEIGHT(height)                                                                         \
    if (TILE_ROWS > (height) && work->rows <= (height)) {                                          \
        tile_of((height) < TILE_ROWS ? (height) : TILE_ROWS, source, with, work);                  \
        return;                                                                                    \
    }
    TRY_HEIGHT(2)
    TRY_HEIGHT(4)
    TRY_HEIGHT(6)
    TRY_HEIGHT(8)
    TRY_HEIGHT(10)
    TRY_HEIGHT(12)
    TRY_HEIGHT(14)
#undef TRY_HEIGHT
    tile_of(TILE_ROWS, source, with, work);
}

INLINE void tile(arithmetic with, const sebp_tile_work *work)
{
    if (!work->pack_b)
        tile_from(PACKED, with, work);
    else if (work->b == NULL)
        tile_from(ROWS, with, work);
    else
        tile_of(TILE_ROWS, ROWS_TO_PACK, with, work);
}

void SEBP_NAME(tile_f32)(const sebp_tile_work *work)
{
    tile((arithmetic){multiply_f32, lanes_f32, 1, 4}, work);
}

#if !HAS_TILES

#if VEC_HAS_BF16_DOT

enum { BF16_UNIT = 2 }; /* elements of bf16 to a unit */
#define units_bf16 units_pairs
#define lanes_bf16 lanes_pairs

#else

enum { BF16_UNIT = 1 };

INLINE vec units_bf16(const void *row, int64_t at, int64_t n)
{
    const uint16_t *from = (const uint16_t *)row + at;
    return n >= VEC_LANES ? vec_load_bf16(from) : vec_load_bf16_first(from, n);
}

INLINE vec lanes_bf16(const void *even, const void *odd, int64_t at, int64_t n)
{
    (void)odd;
    return units_bf16(even, at, n);
}

#endif

INLINE void pack_bf16(float *packed, int64_t sliver_units, int width, const sebp_slab *from,
                      int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    if (from->lanes_are_rows) {
        pack_transposed(packed, sliver_units, width, from, lane, lanes, at, depth, 2, BF16_UNIT,
                        units_bf16);
    } else {
        pack_straight(packed, sliver_units, width, from, lane, lanes, at, depth, 2, BF16_UNIT,
                      lanes_bf16);
    }
}

void SEBP_NAME(pack_a_bf16)(float *packed, int64_t sliver_units, const sebp_slab *from,
                            int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    pack_bf16(packed, sliver_units, TILE_ROWS, from, lane, lanes, at, depth);
}

void SEBP_NAME(pack_b_bf16)(float *packed, int64_t sliver_units, const sebp_slab *from,
                            int64_t lane, int64_t lanes, int64_t at, int64_t depth)
{
    pack_bf16(packed, sliver_units, TILE_COLS, from, lane, lanes, at, depth);
}

#if VEC_HAS_BF16_DOT
INLINE vec multiply_bf16(vec sum, vec a, vec b)
{
    return vec_dot_bf16(sum, a, b);
}
#else
#define multiply_bf16 multiply_f32
#endif

void SEBP_NAME(tile_bf16)(const sebp_tile_work *work)
{
    tile((arithmetic){multiply_bf16, lanes_bf16, BF16_UNIT, 2}, work);
}

#endif
