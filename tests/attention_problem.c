/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention_problem.c */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention_problem.h"

static double *doubles(int64_t count)
{
    double *data = calloc((size_t)(count > 0 ? count : 1), sizeof *data);
    ck_assert_ptr_nonnull(data);
    return data;
}

/* ---- problems ---- */

static int64_t random_length(int64_t max)
{
    return testing_chance(0.1) ? 0 : testing_between(0, testing_chance(0.2) ? max : max / 8 + 1);
}

/* Lengths chosen beforehand are placed: end to end, or padded on the right or on any side. */
static void place(attention_layout *l)
{
    int64_t kind = testing_between(0, 2);
    l->rows = l->max = l->active = 0;
    for (int64_t s = 0; s < l->count; s++) {
        l->max = l->length[s] > l->max ? l->length[s] : l->max;
        l->active += l->length[s];
    }
    int64_t width = l->max + testing_between(0, 3);
    for (int64_t s = 0; s < l->count; s++) {
        l->first[s] = kind == 0 ? l->rows : s * width;
        if (kind == 2 && l->length[s] > 0)
            l->first[s] += testing_between(0, width - l->length[s]);
        l->rows = kind == 0 ? l->rows + l->length[s] : (s + 1) * width;
    }
    uint8_t *mask = calloc((size_t)l->rows + 1, 1);
    ck_assert_ptr_nonnull(mask);
    for (int64_t s = 0; s < l->count; s++)
        memset(mask + l->first[s], 1, (size_t)l->length[s]);
    sebp_status status = kind == 0 ? sebp_sequences_from_lengths(l->length, l->count, &l->made)
                         : kind == 1
                             ? sebp_sequences_from_padded(l->length, l->count, width, &l->made)
                             : sebp_sequences_from_mask(mask, l->count, width, &l->made);
    ck_assert_int_eq(status, SEBP_SUCCESS);
    free(mask);
}

int attention_is_active(const attention_layout *l, int64_t row)
{
    for (int64_t s = 0; s < l->count; s++) {
        if (row >= l->first[s] && row < l->first[s] + l->length[s])
            return 1;
    }
    return 0;
}

/* Rows outside the texts hold NaN: reading them would show. */
static double *fill(const sebp_matrix *matrix, const attention_layout *l, double size)
{
    double *copy = doubles(matrix->rows * matrix->cols);
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++) {
            int active = l == NULL || attention_is_active(l, i);
            testing_set(matrix, i, j, active ? size * testing_uniform() : NAN);
            copy[i * matrix->cols + j] = testing_get(matrix, i, j);
        }
    }
    return copy;
}

sebp_matrix attention_empty_matrix(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    return testing_matrix(rows, cols, testing_stride(cols), dtype);
}

static attention_expected expect(int64_t rows, int64_t cols)
{
    return (attention_expected){rows, cols, doubles(rows * cols), doubles(rows * cols)};
}

attention_problem attention_problem_make(int64_t max_length, int64_t max_size)
{
    attention_problem p = {.options = SEBP_ATTENTION_OPTIONS_INIT};
    sebp_attention_options *o = &p.options;
    p.G = testing_between(1, 3);
    p.kv = testing_between(1, 3);
    p.H = p.G * p.kv;
    p.D = testing_between(1, max_size);
    o->heads = p.H;
    o->kv_heads = p.G == 1 && testing_chance(0.5) ? 0 : p.kv;
    o->scale = testing_chance(0.5) ? 0 : testing_uniform();
    o->softcap = testing_chance(0.3) ? 0.5 + 3 * fabs(testing_uniform()) : 0;
    o->causal = testing_chance(0.4);
    o->window_left = testing_chance(0.3) ? testing_between(0, max_length / 2) : -1;
    o->window_right = testing_chance(0.3) ? testing_between(0, max_length / 2) : -1;
    o->dropout = testing_chance(0.3) ? fabs(testing_uniform()) * 0.7 : 0;
    o->seed = testing_random();
    o->offset = testing_random();
    o->inactive = testing_chance(0.5) ? SEBP_INACTIVE_ZERO : SEBP_INACTIVE_LEAVE;

    p.queries.count = p.keys.count = testing_between(0, ATTENTION_MAX_TEXTS);
    for (int64_t s = 0; s < p.queries.count; s++)
        p.queries.length[s] = random_length(max_length);
    place(&p.queries);
    int cross = testing_chance(0.4);
    if (cross) {
        for (int64_t s = 0; s < p.keys.count; s++)
            p.keys.length[s] = random_length(max_length);
        place(&p.keys);
    } else {
        p.keys = p.queries;
        p.keys.made = NULL;
    }

    sebp_dtype dtype = testing_dtype();
    int64_t M = p.queries.rows, Mk = p.keys.rows, wide = p.H * p.D, narrow = p.kv * p.D;
    p.fused = !cross && testing_chance(0.4);
    if (p.fused) {
        p.whole = attention_empty_matrix(M, wide + 2 * narrow, dtype);
        size_t bytes = sebp_dtype_bytes(dtype);
        p.q = p.k = p.v = p.whole;
        p.q.cols = wide;
        p.k.cols = p.v.cols = narrow;
        p.k.data = (char *)p.whole.data + (size_t)wide * bytes;
        p.v.data = (char *)p.k.data + (size_t)narrow * bytes;
    } else {
        p.q = attention_empty_matrix(M, wide, dtype);
        p.k = attention_empty_matrix(Mk, narrow, dtype);
        p.v = attention_empty_matrix(Mk, narrow, dtype);
    }
    p.at_q = fill(&p.q, &p.queries, 1.5);
    p.at_k = fill(&p.k, &p.keys, 1.5);
    p.at_v = fill(&p.v, &p.keys, 1);
    p.has_bias = testing_chance(0.3);
    int64_t bias_rows = p.queries.max * (testing_chance(0.5) ? 1 : p.H);
    p.bias = attention_empty_matrix(bias_rows, p.keys.max, SEBP_F32);
    p.at_bias = fill(&p.bias, NULL, 2);
    p.out = attention_empty_matrix(M, wide, dtype);
    p.lse = attention_empty_matrix(M, p.H, SEBP_F32);
    p.dout = attention_empty_matrix(M, wide, dtype);
    p.at_dout = fill(&p.dout, &p.queries, 1);
    p.dq = attention_empty_matrix(M, wide, dtype);
    p.dk = attention_empty_matrix(Mk, narrow, dtype);
    p.dv = attention_empty_matrix(Mk, narrow, dtype);
    p.dbias = attention_empty_matrix(bias_rows, p.keys.max, SEBP_F32);
    p.want_out = expect(M, wide);
    p.want_lse = expect(M, p.H);
    p.want_dq = expect(M, wide);
    p.want_dk = expect(Mk, narrow);
    p.want_dv = expect(Mk, narrow);
    p.want_dbias = expect(bias_rows, p.keys.max);
    return p;
}

void attention_problem_free(attention_problem *p)
{
    sebp_matrix *matrices[] = {&p->bias, &p->out, &p->lse, &p->dout,
                               &p->dq,   &p->dk,  &p->dv,  &p->dbias};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        testing_release(matrices[i]);
    if (p->fused) {
        testing_release(&p->whole);
    } else {
        testing_release(&p->q);
        testing_release(&p->k);
        testing_release(&p->v);
    }
    attention_expected *wanted[] = {&p->want_out, &p->want_lse, &p->want_dq,
                                    &p->want_dk,  &p->want_dv,  &p->want_dbias};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        free(wanted[i]->value);
        free(wanted[i]->bound);
    }
    double *copies[] = {p->at_q, p->at_k, p->at_v, p->at_bias, p->at_dout};
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++)
        free(copies[i]);
    sebp_sequences_destroy(p->queries.made);
    sebp_sequences_destroy(p->keys.made);
}

/* ---- the reference ---- */

static int sees(const attention_problem *p, int64_t s, int64_t i, int64_t j)
{
    int64_t at = i + p->keys.length[s] - p->queries.length[s];
    const sebp_attention_options *o = &p->options;
    return !(o->causal && j > at) && !(o->window_left >= 0 && j < at - o->window_left) &&
           !(o->window_right >= 0 && j > at + o->window_right);
}

/* What dropout multiplies P by. */
static double kept(const attention_problem *p, int64_t s, int64_t h, int64_t i, int64_t j)
{
    if (p->options.dropout == 0)
        return 1;
    int64_t before = 0;
    for (int64_t t = 0; t < s; t++)
        before += p->keys.length[t];
    int64_t line = h * p->keys.active + before + j, groups = (p->queries.max + 63) / 64;
    float u =
        sebp_random_uniform(p->options.seed, p->options.offset, (uint64_t)(line * groups * 64 + i));
    return u < (float)p->options.dropout ? 0 : (double)(float)(1 / (1 - p->options.dropout));
}

static int64_t bias_at(const attention_problem *p, int64_t h, int64_t i, int64_t j)
{
    int64_t first = p->bias.rows > p->queries.max ? h * p->queries.max : 0;
    return (first + i) * p->bias.cols + j;
}

static double scale_of(const attention_problem *p)
{
    return p->options.scale != 0 ? p->options.scale : 1 / sqrt((double)p->D);
}

/* One row of a head: scores, P, and their bounds. */
typedef struct row {
    double *score, *slope, *p, *scale;
    double bound; /* of any score that is seen */
    double lse;
} row;

static row make_row(int64_t m)
{
    return (row){doubles(m), doubles(m), doubles(m), doubles(m), 0, 0};
}

static void free_row(row *r)
{
    free(r->score);
    free(r->slope);
    free(r->p);
    free(r->scale);
}

static void find_row(const attention_problem *p, int64_t s, int64_t h, int64_t i, row *r)
{
    const double *q = p->at_q + (p->queries.first[s] + i) * p->H * p->D + h * p->D;
    const int64_t m = p->keys.length[s];
    double max = -INFINITY, sum = 0, scale = scale_of(p), cap = p->options.softcap;
    r->bound = 0;
    for (int64_t j = 0; j < m; j++) {
        const double *k = p->at_k + (p->keys.first[s] + j) * p->kv * p->D + h / p->G * p->D;
        double dot = 0, size = 0;
        r->slope[j] = 1;
        r->score[j] = -INFINITY;
        if (!sees(p, s, i, j))
            continue;
        for (int64_t c = 0; c < p->D; c++) {
            dot += scale * q[c] * k[c];
            size += fabs(scale * q[c] * k[c]);
        }
        double bound = FLT_EPSILON * (double)(p->D + 4) * size;
        if (cap > 0) {
            double bounded = tanh(dot / cap);
            dot = cap * bounded;
            r->slope[j] = 1 - bounded * bounded;
            bound += cap * 0x1p-21;
        }
        if (p->has_bias) {
            dot += p->at_bias[bias_at(p, h, i, j)];
            bound += FLT_EPSILON * fabs(dot);
        }
        r->score[j] = dot;
        r->bound = fmax(r->bound, bound + FLT_EPSILON * fabs(dot));
        max = fmax(max, dot);
    }
    for (int64_t j = 0; j < m; j++)
        sum += isinf(max) ? 0 : exp(r->score[j] - max);
    r->lse = sum > 0 ? max + log(sum) : -INFINITY;
    for (int64_t j = 0; j < m; j++) {
        r->p[j] = sum > 0 ? exp(r->score[j] - r->lse) : 0;
        r->scale[j] = r->p[j] > 0 ? kept(p, s, h, i, j) : 1;
    }
}

/* Relative error of P of the forward, and of the backward, which starts from lse. */
static double forward_error(const row *r, int64_t m)
{
    return 2 * r->bound + FLT_EPSILON * (double)(m + 20);
}

static double backward_error(const row *r, int64_t m)
{
    return 2 * r->bound + forward_error(r, m) + 4 * FLT_EPSILON * (fabs(r->lse) + 4);
}

static double rounding(const attention_problem *p, double value)
{
    return p->q.dtype == SEBP_BF16 ? fabs(value) * 0x1p-8 : 0;
}

void attention_reference_forward(attention_problem *p)
{
    for (int64_t s = 0; s < p->queries.count; s++) {
        const int64_t m = p->keys.length[s];
        row r = make_row(m);
        for (int64_t at = 0; at < p->queries.length[s] * p->H; at++) {
            const int64_t i = at / p->H, h = at % p->H, row_at = p->queries.first[s] + i;
            find_row(p, s, h, i, &r);
            p->want_lse.value[row_at * p->H + h] = r.lse;
            p->want_lse.bound[row_at * p->H + h] =
                forward_error(&r, m) + FLT_EPSILON * (isinf(r.lse) ? 0 : fabs(r.lse));
            for (int64_t c = 0; c < p->D; c++) {
                double sum = 0, size = 0;
                for (int64_t j = 0; j < m; j++) {
                    double v = p->at_v[(p->keys.first[s] + j) * p->kv * p->D + h / p->G * p->D + c];
                    if (r.p[j] > 0) {
                        sum += r.p[j] * r.scale[j] * v;
                        size += r.p[j] * r.scale[j] * fabs(v);
                    }
                }
                int64_t to = row_at * p->H * p->D + h * p->D + c;
                p->want_out.value[to] = sum;
                p->want_out.bound[to] =
                    size * (forward_error(&r, m) + FLT_EPSILON * (double)(m + 8)) +
                    rounding(p, sum) + FLT_TRUE_MIN;
            }
        }
        free_row(&r);
    }
}

static void add_to(attention_expected *to, int64_t at, double value, double bound)
{
    to->value[at] += value;
    to->bound[at] += bound;
}

void attention_reference_backward(attention_problem *p)
{
    const double eps = FLT_EPSILON, scale = scale_of(p);
    for (int64_t s = 0; s < p->queries.count; s++) {
        const int64_t m = p->keys.length[s], n = p->queries.length[s];
        row r = make_row(m);
        for (int64_t at = 0; at < n * p->H; at++) {
            const int64_t i = at / p->H, h = at % p->H;
            const int64_t q_at = (p->queries.first[s] + i) * p->H * p->D + h * p->D;
            find_row(p, s, h, i, &r);
            const double *dout = p->at_dout + q_at, *q = p->at_q + q_at;
            double delta = 0, delta_bound = 0;
            for (int64_t c = 0; c < p->D; c++) {
                double out = p->want_out.value[q_at + c];
                delta += dout[c] * out;
                delta_bound += fabs(dout[c]) *
                               (p->want_out.bound[q_at + c] + eps * (double)(p->D + 2) * fabs(out));
            }
            const double off = backward_error(&r, m);
            for (int64_t j = 0; j < m; j++) {
                if (r.p[j] == 0)
                    continue;
                const int64_t k_at = (p->keys.first[s] + j) * p->kv * p->D + h / p->G * p->D;
                double dp = 0, dp_bound = 0;
                for (int64_t c = 0; c < p->D; c++) {
                    dp += r.scale[j] * dout[c] * p->at_v[k_at + c];
                    dp_bound += r.scale[j] * fabs(dout[c] * p->at_v[k_at + c]);
                }
                const double size = fabs(dp) + fabs(delta);
                double before = r.p[j] * (dp - delta), ds = before * r.slope[j];
                double bound = r.p[j] * (size * (off + 4 * eps + (r.slope[j] < 1 ? 0x1p-19 : 0)) +
                                         eps * (double)(p->D + 4) * dp_bound + delta_bound);
                if (p->has_bias) {
                    add_to(&p->want_dbias, bias_at(p, h, i, j), before,
                           bound + eps * (double)(p->queries.count * p->H) * fabs(before));
                }
                for (int64_t c = 0; c < p->D; c++) {
                    const double k = p->at_k[k_at + c], kept_p = r.p[j] * r.scale[j];
                    add_to(&p->want_dq, q_at + c, scale * ds * k,
                           fabs(scale * k) * (bound + eps * (double)(m + 8) * fabs(ds)));
                    add_to(&p->want_dk, k_at + c, scale * ds * q[c],
                           fabs(scale * q[c]) * (bound + eps * (double)(n * p->G + 8) * fabs(ds)));
                    add_to(&p->want_dv, k_at + c, kept_p * dout[c],
                           kept_p * fabs(dout[c]) * (off + eps * (double)(n * p->G + 8)));
                }
            }
        }
        free_row(&r);
    }
    attention_expected *wanted[] = {&p->want_dq, &p->want_dk, &p->want_dv};
    for (int e = 0; e < 3; e++) {
        for (int64_t at = 0; at < wanted[e]->rows * wanted[e]->cols; at++)
            wanted[e]->bound[at] += rounding(p, wanted[e]->value[at]) + FLT_TRUE_MIN;
    }
}
