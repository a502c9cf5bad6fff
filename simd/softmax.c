/* SPDX-License-Identifier: Apache-2.0 */
/** @file softmax.c A row's max and sum of exponentials, and what a softmax makes of them. */
#include <math.h>

#include "kernels.h"
#include "rows.h"
#include "vec_math.h"

enum {
    SUMS = 4,
    BLOCK = 1024 * VEC_LANES /* elements whose exponentials are added in f32 */
};

/* NaN is lost here, and found again in the exponentials. */
SPECIALIZED float row_max(const void *x, bool is_bf16, int64_t n)
{
    vec lowest = vec_set1(-INFINITY), max[SUMS] = {lowest, lowest, lowest, lowest};
    int64_t next = 0, whole = n - n % (SUMS * VEC_LANES);
    for (; next < whole; next += SUMS * VEC_LANES) {
        for (int i = 0; i < SUMS; i++) {
            max[i] = vec_max(max[i], vec_load_at(x, is_bf16, next + i * VEC_LANES));
        }
    }
    FOR_EACH_VEC(n - whole, {
        vec v = load_lanes(x, is_bf16, whole + at, lanes);
        if (lanes < VEC_LANES) {
            vecm is_first = vec_less(veci_to_f32(veci_lane_index()), vec_set1((float)lanes));
            v = vec_select(is_first, v, lowest);
        }
        max[0] = vec_max(max[0], v);
    });
    return vec_max_lane(vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3])));
}

SPECIALIZED double exp_sum(const void *x, bool is_bf16, int64_t n, float max, float *exps)
{
    const vec maxes = vec_set1(max);
    double total = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t size = n - first < BLOCK ? n - first : BLOCK;
        vec sum[2] = {vec_zero(), vec_zero()};
        int64_t next = 0;
        for (; next + 2 * VEC_LANES <= size; next += 2 * VEC_LANES) {
            for (int i = 0; i < 2; i++) {
                vec v = vec_load_at(x, is_bf16, first + next + i * VEC_LANES);
                vec e = vec_exp_negative(vec_sub(v, maxes));
                sum[i] = vec_add(sum[i], e);
                if (exps != NULL) {
                    vec_store(exps + first + next + i * VEC_LANES, e);
                }
            }
        }
        FOR_EACH_VEC(size - next, {
            vec v = vec_sub(load_lanes(x, is_bf16, first + next + at, lanes), maxes);
            vec e = vec_exp_negative(v);
            sum[0] = vec_add(sum[0], first_lanes(e, lanes));
            if (exps != NULL) {
                store_lanes(exps, false, first + next + at, e, lanes);
            }
        });
        total += (double)vec_sum(vec_add(sum[0], sum[1]));
    }
    return total;
}

void SEBP_NAME(softmax_sum)(const void *x, bool is_bf16, int64_t n, float *max, double *sum,
                            float *exps)
{
    if (is_bf16) {
        *max = row_max(x, true, n);
        *sum = exp_sum(x, true, n, *max, exps);
    } else {
        *max = row_max(x, false, n);
        *sum = exps != NULL ? exp_sum(x, false, n, *max, exps) : exp_sum(x, false, n, *max, NULL);
    }
}

/* In double: logits far from 0 would lose their differences in f32, and large ones overflow. */
SPECIALIZED double sum_of_differences(const void *x, bool is_bf16, int64_t n, float from)
{
    const vec froms = vec_set1(from);
    vecd sum = vecd_zero();
    FOR_EACH_VEC(n, {
        vec v = load_lanes(x, is_bf16, at, lanes);
        if (lanes < VEC_LANES) {
            vecm is_first = vec_less(veci_to_f32(veci_lane_index()), vec_set1((float)lanes));
            v = vec_select(is_first, v, froms);
        }
        sum = vecd_add(sum, vecd_sub(vecd_widen(v), vecd_widen(froms)));
    });
    return vecd_sum(sum);
}

double SEBP_NAME(row_sum)(const void *x, bool is_bf16, int64_t n, float from)
{
    return is_bf16 ? sum_of_differences(x, true, n, from) : sum_of_differences(x, false, n, from);
}

/* Of exponentials, which are f32. */
SPECIALIZED void softmax_of_exps(const sebp_softmax_row *row, bool to_is_bf16)
{
    const vec factor = vec_set1(row->factor), shift = vec_set1(row->shift);
    FOR_EACH_VEC(row->n, {
        vec e = load_lanes(row->x, false, at, lanes);
        store_lanes(row->to, to_is_bf16, at, vec_sub(vec_mul(e, factor), shift), lanes);
    });
}

SPECIALIZED void softmax(const sebp_softmax_row *row, bool x_is_bf16, bool to_is_bf16)
{
    const vec max = vec_set1(row->max), factor = vec_set1(row->factor),
              shift = vec_set1(row->shift);
    FOR_EACH_VEC(row->n, {
        vec e = vec_exp_negative(vec_sub(load_lanes(row->x, x_is_bf16, at, lanes), max));
        store_lanes(row->to, to_is_bf16, at, vec_sub(vec_mul(e, factor), shift), lanes);
    });
}

void SEBP_NAME(softmax)(const sebp_softmax_row *row)
{
    if (row->x_is_exp) {
        softmax_of_exps(row, row->to_is_bf16);
    } else if (row->x_is_bf16) {
        if (row->to_is_bf16) {
            softmax(row, true, true);
        } else {
            softmax(row, true, false);
        }
    } else if (row->to_is_bf16) {
        softmax(row, false, true);
    } else {
        softmax(row, false, false);
    }
}
