/* SPDX-License-Identifier: Apache-2.0 */
/** @file step.c What an optimizer does to weights. */
#include "kernels.h"

/* The factors of a step in every lane. */
typedef struct lanes {
    vec beta1, gain1, beta2, gain2, root2, epsilon, rate, keep;
} lanes;

/* The steps of a vec of elements; *m and *v become their new moments. */
static inline vec step_of(const lanes *by, vec g, vec *m, vec *v)
{
    *m = vec_fma(by->beta1, *m, vec_mul(by->gain1, g));
    *v = vec_fma(by->beta2, *v, vec_mul(by->gain2, vec_mul(g, g)));
    return vec_div(vec_mul(by->rate, *m), vec_fma(vec_sqrt(*v), by->root2, by->epsilon));
}

static inline void adamw(const sebp_adamw_work *work, bool g_is_bf16, bool w_is_bf16)
{
    const lanes by = {vec_set1(work->beta1), vec_set1(work->gain1), vec_set1(work->beta2),
                      vec_set1(work->gain2), vec_set1(work->root2), vec_set1(work->epsilon),
                      vec_set1(work->rate),  vec_set1(work->keep)};
    float *moment1 = work->moment1, *moment2 = work->moment2;
    int64_t at = 0;
    for (; at + VEC_LANES <= work->n; at += VEC_LANES) {
        vec m = vec_load(moment1 + at), v = vec_load(moment2 + at);
        vec w = step_of(&by, vec_load_at(work->g, g_is_bf16, at), &m, &v);
        if (!work->step_alone) {
            w = vec_fma(by.keep, vec_load_at(work->w, w_is_bf16, at), w);
        }
        vec_store(moment1 + at, m);
        vec_store(moment2 + at, v);
        vec_store_at(work->w, w_is_bf16, at, w);
    }
    int64_t rest = work->n - at;
    vec m = vec_load_first(moment1 + at, rest), v = vec_load_first(moment2 + at, rest);
    vec w = step_of(&by, vec_load_at_first(work->g, g_is_bf16, at, rest), &m, &v);
    if (!work->step_alone) {
        w = vec_fma(by.keep, vec_load_at_first(work->w, w_is_bf16, at, rest), w);
    }
    vec_store_first(moment1 + at, m, rest);
    vec_store_first(moment2 + at, v, rest);
    vec_store_at_first(work->w, w_is_bf16, at, w, rest);
}

void SEBP_NAME(adamw)(const sebp_adamw_work *work)
{
    if (work->g_is_bf16) {
        if (work->w_is_bf16) {
            adamw(work, true, true);
        } else {
            adamw(work, true, false);
        }
    } else if (work->w_is_bf16) {
        adamw(work, false, true);
    } else {
        adamw(work, false, false);
    }
}

static inline void scale(void *data, bool is_bf16, int64_t n, float factor)
{
    vec factors = vec_set1(factor);
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec_store_at(data, is_bf16, at, vec_mul(factors, vec_load_at(data, is_bf16, at)));
    }
    vec rest = vec_mul(factors, vec_load_at_first(data, is_bf16, at, n - at));
    vec_store_at_first(data, is_bf16, at, rest, n - at);
}

void SEBP_NAME(scale_f32)(float *data, int64_t n, float factor)
{
    scale(data, false, n, factor);
}

void SEBP_NAME(scale_bf16)(uint16_t *data, int64_t n, float factor)
{
    scale(data, true, n, factor);
}
