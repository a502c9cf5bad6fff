/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

layer_rows layer_rows_make(int64_t total)
{
    layer_rows made = {NULL, total};
    if (testing_chance(0.4)) {
        return made;
    }
    double activity = testing_chance(0.1) ? 0 : testing_uniform() / 2 + 0.5;
    uint8_t *mask = malloc((size_t)total + 1);
    for (int64_t i = 0; i < total; i++) {
        mask[i] = (uint8_t)testing_chance(activity);
    }
    ck_assert_int_eq(sebp_rows_from_mask(mask, total, &made.rows), SEBP_SUCCESS);
    free(mask);
    return made;
}

int layer_rows_have(const layer_rows *rows, int64_t i)
{
    const int64_t *indices = sebp_rows_indices(rows->rows);
    for (int64_t k = 0; k < sebp_rows_count(rows->rows); k++) {
        if (indices[k] == i) {
            return 1;
        }
    }
    return rows->rows == NULL;
}

void layer_rows_free(layer_rows *rows)
{
    sebp_rows_destroy(rows->rows);
    rows->rows = NULL;
}

void layer_hide(const sebp_matrix *matrix, const layer_rows *rows)
{
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols && !layer_rows_have(rows, i); j++) {
            testing_set(matrix, i, j, NAN);
        }
    }
}

void layer_near(const sebp_matrix *got, int64_t row, int64_t col, double want, double bound,
                const char *what)
{
    double value = testing_get(got, row, col);
    if (got->dtype == SEBP_BF16) {
        bound += (fabs(want) + bound) * 0x1p-8 + 0x1p-134;
    }
    int same = isnan(want)   ? isnan(value)
               : isinf(want) ? value == want
                             : fabs(value - want) <= bound;
    if (!same) {
        ck_abort_msg("%s[%" PRId64 ",%" PRId64 "] is %.9g, not %.9g within %.3g", what, row, col,
                     value, want, bound);
    }
}

void layer_inactive(const sebp_matrix *got, const layer_rows *rows, sebp_inactive inactive,
                    const sebp_matrix *before, const char *what)
{
    for (int64_t i = 0; i < got->rows; i++) {
        for (int64_t j = 0; j < got->cols && !layer_rows_have(rows, i); j++) {
            double value = testing_get(got, i, j);
            double old = inactive == SEBP_INACTIVE_ZERO ? 0 : testing_get(before, i, j);
            if (!(value == old || (isnan(value) && isnan(old)))) {
                ck_abort_msg("%s: inactive row %" PRId64 " holds %g", what, i, value);
            }
        }
    }
}

void layer_not_vacuous(int64_t nonzeros, int64_t elements)
{
    ck_assert_msg(elements > 0 && nonzeros * 3 > elements,
                  "%" PRId64 " of %" PRId64 " elements are not zero", nonzeros, elements);
}

sebp_matrix layer_output(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    return testing_matrix(rows, cols, testing_stride(cols), dtype);
}

int64_t layer_any_cols(void)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.3) ? 400 : 70);
}

/* Two layer_contexts whose results must be the same bits. */
sebp_context *layer_contexts[2];

void layer_open_contexts(void)
{
    layer_contexts[0] = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    layer_contexts[1] = testing_context(SEBP_GEMM_NATIVE, 3, 0);
}

void layer_close_contexts(void)
{
    sebp_context_destroy(layer_contexts[0]);
    sebp_context_destroy(layer_contexts[1]);
}

double layer_kept(double probability, uint64_t seed, uint64_t offset, int64_t row, int64_t col,
                  int64_t cols)
{
    uint64_t element = (uint64_t)(row * ((cols + 63) / 64 * 64) + col);
    float u = sebp_random_uniform(seed, offset, element);
    return u < (float)probability ? 0 : (double)(float)(1 / (1 - probability));
}
