/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file small_product.c
 * Products of blocks that lie in cache, without packing: A is read element by element, so it may be
 * strided either way, and B a vec at a time along its rows.
 */
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_COLS = TILE_VECS * VEC_LANES, THIRDS = (TILE_ROWS + 2) / 3 };

/* Where a tile's rows of A begin, every third of them: the two between are a stride or two away, so
 * that addresses stay in registers. */
typedef struct rows_of_a {
    const float *third[THIRDS];
    int64_t row;
} rows_of_a;

INLINE void add_unit(int height, const rows_of_a *a, const float *b, vec sum[TILE_ROWS][TILE_VECS])
{
    vec lanes[TILE_VECS];
    for (int j = 0; j < TILE_VECS; j++)
        lanes[j] = vec_load(b + j * VEC_LANES);
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
        vec element = vec_set1(a->third[i / 3][i % 3 * a->row]);
        for (int j = 0; j < TILE_VECS; j++)
            sum[i][j] = vec_fma(element, lanes[j], sum[i][j]);
    }
}

/* A tile of `height` rows, of which `rows` are stored. */
INLINE void tile_of(int height, bool along, const sebp_small_product *work, const float *from_a,
                    const float *b, float *c, int64_t rows, int64_t cols)
{
    vec sum[TILE_ROWS][TILE_VECS];
    for (int i = 0; i < height; i++) {
        for (int j = 0; j < TILE_VECS; j++)
            sum[i][j] = vec_zero();
    }
    rows_of_a a = {.row = along ? work->a_row : 1};
    for (int i = 0; i < THIRDS; i++)
        a.third[i] = from_a + (3 * i < height ? 3 * i * a.row : 0);
    const int64_t step = along ? 1 : work->a_unit, b_unit = work->b_unit;
    /* A unit at a time: of several, loads would come first and drive sums out of registers. */
    for (int64_t u = 0; u < work->units; u++, b += b_unit) {
        add_unit(height, &a, b, sum);
        for (int i = 0; i < THIRDS; i++)
            a.third[i] += step;
    }
    if (rows == height && cols == TILE_COLS) {
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
            for (int j = 0; j < TILE_VECS; j++) {
                float *to = c + i * work->c_row + j * VEC_LANES;
                vec_store(to, work->accumulate ? vec_add(vec_load(to), sum[i][j]) : sum[i][j]);
            }
        }
        return;
    }
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < TILE_VECS; j++) {
            const int64_t left = cols - (int64_t)j * VEC_LANES;
            const int64_t n = left < 0 ? 0 : left < VEC_LANES ? left : VEC_LANES;
            float *to = c + i * work->c_row + j * VEC_LANES;
            vec result = sum[i][j];
            if (n == 0)
                continue;
            if (work->accumulate)
                result = vec_add(vec_load_first(to, n), result);
            vec_store_first(to, result, n);
        }
    }
}

INLINE void tile(bool along, const sebp_small_product *work, const float *a, const float *b,
                 float *c, int64_t rows, int64_t cols)
{
    _Static_assert(TILE_ROWS % 2 == 0 && TILE_ROWS <= 14, "heights go by two");
#define TRY_HEIGHT(height)                                                                         \
    if (TILE_ROWS > (height) && rows <= (height)) {                                                \
        tile_of((height) < TILE_ROWS ? (height) : TILE_ROWS, along, work, a, b, c, rows, cols);    \
        return;                                                                                    \
    }
    TRY_HEIGHT(2)
    TRY_HEIGHT(4)
    TRY_HEIGHT(6)
    TRY_HEIGHT(8)
    TRY_HEIGHT(10)
    TRY_HEIGHT(12)
#undef TRY_HEIGHT
    tile_of(TILE_ROWS, along, work, a, b, c, rows, cols);
}

INLINE void multiply(bool along, const sebp_small_product *work)
{
    const int64_t a_row = along ? work->a_row : 1;
    for (int64_t row = 0; row < work->rows; row += TILE_ROWS) {
        const int64_t rows = work->rows - row < TILE_ROWS ? work->rows - row : TILE_ROWS;
        for (int64_t col = 0; col < work->cols; col += TILE_COLS) {
            const int64_t cols = work->cols - col < TILE_COLS ? work->cols - col : TILE_COLS;
            tile(along, work, work->a + row * a_row, work->b + col,
                 work->c + row * work->c_row + col, rows, cols);
        }
    }
}

void SEBP_NAME(small_product)(const sebp_small_product *work)
{
    if (work->a_unit == 1) {
        multiply(true, work);
    } else {
        multiply(false, work);
    }
}
