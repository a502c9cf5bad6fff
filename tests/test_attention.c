/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention against plain loops in double precision, with bounds that grow with the sums, over random
 * texts, heads and options; its gradients against differences; exact cases; and bad input.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

enum { MAX_TEXTS = 6 };

/* Where texts lie. */
typedef struct layout {
    int64_t count, rows, max, active;
    int64_t first[MAX_TEXTS], length[MAX_TEXTS];
    sebp_sequences *made;
} layout;

/* An output: what it should be, and how far rounding may take it away. */
typedef struct expected {
    int64_t rows, cols;
    double *value, *bound;
} expected;

typedef struct problem {
    int64_t H, kv, D, G;
    layout queries, keys;
    sebp_attention_options options;
    int fused; /* q, k and v are columns of one matrix */
    sebp_matrix whole, q, k, v, bias, out, lse, dout, dq, dk, dv, dbias;
    int has_bias;
    /* All elements again. */
    double *at_q, *at_k, *at_v, *at_bias, *at_dout;
    expected want_out, want_lse, want_dq, want_dk, want_dv, want_dbias;
} problem;

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
static void place(layout *l)
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

static int is_active(const layout *l, int64_t row)
{
    for (int64_t s = 0; s < l->count; s++) {
        if (row >= l->first[s] && row < l->first[s] + l->length[s])
            return 1;
    }
    return 0;
}

/* Rows outside the texts hold NaN: reading them would show. */
static double *fill(const sebp_matrix *matrix, const layout *l, double size)
{
    double *copy = doubles(matrix->rows * matrix->cols);
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++) {
            int active = l == NULL || is_active(l, i);
            testing_set(matrix, i, j, active ? size * testing_uniform() : NAN);
            copy[i * matrix->cols + j] = testing_get(matrix, i, j);
        }
    }
    return copy;
}

static sebp_matrix empty_matrix(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    return testing_matrix(rows, cols, testing_stride(cols), dtype);
}

static expected expect(int64_t rows, int64_t cols)
{
    return (expected){rows, cols, doubles(rows * cols), doubles(rows * cols)};
}

static problem make_problem(int64_t max_length, int64_t max_size)
{
    problem p = {.options = SEBP_ATTENTION_OPTIONS_INIT};
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

    p.queries.count = p.keys.count = testing_between(0, MAX_TEXTS);
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
        p.whole = empty_matrix(M, wide + 2 * narrow, dtype);
        size_t bytes = sebp_dtype_bytes(dtype);
        p.q = p.k = p.v = p.whole;
        p.q.cols = wide;
        p.k.cols = p.v.cols = narrow;
        p.k.data = (char *)p.whole.data + (size_t)wide * bytes;
        p.v.data = (char *)p.k.data + (size_t)narrow * bytes;
    } else {
        p.q = empty_matrix(M, wide, dtype);
        p.k = empty_matrix(Mk, narrow, dtype);
        p.v = empty_matrix(Mk, narrow, dtype);
    }
    p.at_q = fill(&p.q, &p.queries, 1.5);
    p.at_k = fill(&p.k, &p.keys, 1.5);
    p.at_v = fill(&p.v, &p.keys, 1);
    p.has_bias = testing_chance(0.3);
    int64_t bias_rows = p.queries.max * (testing_chance(0.5) ? 1 : p.H);
    p.bias = empty_matrix(bias_rows, p.keys.max, SEBP_F32);
    p.at_bias = fill(&p.bias, NULL, 2);
    p.out = empty_matrix(M, wide, dtype);
    p.lse = empty_matrix(M, p.H, SEBP_F32);
    p.dout = empty_matrix(M, wide, dtype);
    p.at_dout = fill(&p.dout, &p.queries, 1);
    p.dq = empty_matrix(M, wide, dtype);
    p.dk = empty_matrix(Mk, narrow, dtype);
    p.dv = empty_matrix(Mk, narrow, dtype);
    p.dbias = empty_matrix(bias_rows, p.keys.max, SEBP_F32);
    p.want_out = expect(M, wide);
    p.want_lse = expect(M, p.H);
    p.want_dq = expect(M, wide);
    p.want_dk = expect(Mk, narrow);
    p.want_dv = expect(Mk, narrow);
    p.want_dbias = expect(bias_rows, p.keys.max);
    return p;
}

static void free_problem(problem *p)
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
    expected *wanted[] = {&p->want_out, &p->want_lse, &p->want_dq,
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

static int sees(const problem *p, int64_t s, int64_t i, int64_t j)
{
    int64_t at = i + p->keys.length[s] - p->queries.length[s];
    const sebp_attention_options *o = &p->options;
    return !(o->causal && j > at) && !(o->window_left >= 0 && j < at - o->window_left) &&
           !(o->window_right >= 0 && j > at + o->window_right);
}

/* What dropout multiplies P by. */
static double kept(const problem *p, int64_t s, int64_t h, int64_t i, int64_t j)
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

static int64_t bias_at(const problem *p, int64_t h, int64_t i, int64_t j)
{
    int64_t first = p->bias.rows > p->queries.max ? h * p->queries.max : 0;
    return (first + i) * p->bias.cols + j;
}

static double scale_of(const problem *p)
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

static void find_row(const problem *p, int64_t s, int64_t h, int64_t i, row *r)
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

static double rounding(const problem *p, double value)
{
    return p->q.dtype == SEBP_BF16 ? fabs(value) * 0x1p-8 : 0;
}

static void reference_forward(problem *p)
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

static void add_to(expected *to, int64_t at, double value, double bound)
{
    to->value[at] += value;
    to->bound[at] += bound;
}

static void reference_backward(problem *p)
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
    expected *wanted[] = {&p->want_dq, &p->want_dk, &p->want_dv};
    for (int e = 0; e < 3; e++) {
        for (int64_t at = 0; at < wanted[e]->rows * wanted[e]->cols; at++)
            wanted[e]->bound[at] += rounding(p, wanted[e]->value[at]) + FLT_TRUE_MIN;
    }
}

/* ---- comparison ---- */

/* How many elements were compared with a number other than 0, in all tests of this process. */
static int64_t compared;

static void check_output(const problem *p, const expected *want, const sebp_matrix *got,
                         const layout *l, const char *what)
{
    for (int64_t at = 0; at < want->rows * want->cols; at++) {
        int64_t i = at / want->cols, j = at % want->cols;
        double value = testing_get(got, i, j);
        if (l != NULL && !is_active(l, i)) {
            if (p->options.inactive == SEBP_INACTIVE_ZERO)
                ck_assert_msg(value == 0, "%s(%d, %d) outside is %g", what, (int)i, (int)j, value);
            else
                ck_assert_msg(isnan(value), "%s(%d, %d) outside was written", what, (int)i, (int)j);
            continue;
        }
        double off =
            isinf(want->value[at]) && value == want->value[at] ? 0 : fabs(value - want->value[at]);
        if (!(off <= want->bound[at])) {
            ck_abort_msg("%s(%d, %d) of %dx%d is %.9g, not %.9g: off by %.3g, bound %.3g; H %d, "
                         "kv %d, D %d, causal %d, left %d, right %d, cap %g, dropout %g, bias %d",
                         what, (int)i, (int)j, (int)want->rows, (int)want->cols, value,
                         want->value[at], off, want->bound[at], (int)p->H, (int)p->kv, (int)p->D,
                         p->options.causal, (int)p->options.window_left,
                         (int)p->options.window_right, p->options.softcap, p->options.dropout,
                         p->has_bias);
        }
        compared += fabs(want->value[at]) > 8 * want->bound[at];
    }
    testing_check_matrix(got);
}

static const sebp_matrix *bias_of(const problem *p)
{
    return p->has_bias ? &p->bias : NULL;
}

static sebp_status call_forward(const problem *p, sebp_context *context)
{
    return sebp_attention_forward(context, &p->q, &p->k, &p->v, bias_of(p), p->queries.made,
                                  p->keys.made, &p->options, &p->out, &p->lse);
}

static sebp_status call_backward(const problem *p, sebp_context *context)
{
    return sebp_attention_backward(context, &p->dout, &p->q, &p->k, &p->v, bias_of(p), &p->out,
                                   &p->lse, p->queries.made, p->keys.made, &p->options, &p->dq,
                                   &p->dk, &p->dv, p->has_bias ? &p->dbias : NULL);
}

static void check_all(problem *p, sebp_context *context)
{
    reference_forward(p);
    reference_backward(p);
    testing_succeed(call_forward(p, context), context);
    check_output(p, &p->want_out, &p->out, &p->queries, "out");
    check_output(p, &p->want_lse, &p->lse, &p->queries, "lse");
    testing_succeed(call_backward(p, context), context);
    check_output(p, &p->want_dv, &p->dv, &p->keys, "dv");
    check_output(p, &p->want_dk, &p->dk, &p->keys, "dk");
    check_output(p, &p->want_dq, &p->dq, &p->queries, "dq");
    if (p->has_bias)
        check_output(p, &p->want_dbias, &p->dbias, NULL, "dbias");
}

static sebp_context *any_context(void)
{
    return testing_context(SEBP_GEMM_NATIVE, (int)testing_between(1, 4),
                           testing_chance(0.5) ? 0 : (int64_t)1 << 20);
}

/* Random problems of up to max_rows rows and heads of up to max_size columns, one in five of up to
 * large_size, against the reference. */
static void check_problems(int rounds, int64_t max_rows, int64_t max_size, int64_t large_size)
{
    compared = 0;
    for (int round = 0; testing_goes_on(round, rounds, compared, 1000); round++) {
        sebp_context *context = any_context();
        problem p = make_problem(max_rows, testing_chance(0.2) ? large_size : max_size);
        check_all(&p, context);
        free_problem(&p);
        sebp_context_destroy(context);
    }
    ck_assert_int_gt(compared, 1000);
}

START_TEST(short_texts)
{
    check_problems(300, 60, 20, 80);
}
END_TEST

/* Long enough for several blocks of queries and keys. */
START_TEST(long_texts)
{
    check_problems(12, 600, 24, 140);
}
END_TEST

/* ---- exact cases ---- */

/* Where all scores are equal P is 1 / m, and integers' means of a power of two are exact. */
START_TEST(uniform_scores_give_means)
{
    for (int64_t m = 1; m <= 512; m *= 2) {
        sebp_context *context = any_context();
        sebp_sequences *of_q = NULL, *of_k = NULL;
        const int64_t n = 3, D = 5;
        ck_assert_int_eq(sebp_sequences_from_lengths(&n, 1, &of_q), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sequences_from_lengths(&m, 1, &of_k), SEBP_SUCCESS);
        sebp_matrix q = empty_matrix(n, D, SEBP_F32), k = empty_matrix(m, D, SEBP_F32);
        sebp_matrix v = testing_random_matrix(m, D, SEBP_F32, TESTING_INTEGER);
        sebp_matrix out = empty_matrix(n, D, SEBP_F32);
        for (int64_t c = 0; c < D; c++) {
            for (int64_t i = 0; i < n; i++)
                testing_set(&q, i, c, (double)testing_between(-4, 4));
            for (int64_t j = 0; j < m; j++)
                testing_set(&k, j, c, 2);
        }
        testing_succeed(
            sebp_attention_forward(context, &q, &k, &v, NULL, of_q, of_k, NULL, &out, NULL),
            context);
        for (int64_t i = 0; i < n; i++) {
            for (int64_t c = 0; c < D; c++) {
                double sum = 0;
                for (int64_t j = 0; j < m; j++)
                    sum += testing_get(&v, j, c);
                ck_assert(testing_get(&out, i, c) == sum / (double)m);
            }
        }
        sebp_matrix *all[] = {&q, &k, &v, &out};
        for (int i = 0; i < 4; i++)
            testing_release(all[i]);
        sebp_sequences_destroy(of_q);
        sebp_sequences_destroy(of_k);
        sebp_context_destroy(context);
    }
}
END_TEST

/* The reference's gradients against differences of its forward, in double precision. */
START_TEST(reference_gradients_are_derivatives)
{
    int64_t looked = 0;
    for (int round = 0; testing_goes_on(round, 60, looked, 100); round++) {
        problem p = make_problem(12, 6);
        /* Out is linear in V, so that nothing is lost by taking it from the forward. */
        reference_forward(&p);
        reference_backward(&p);
        struct {
            double *at;
            expected *gradient;
            const layout *rows;
        } inputs[] = {{p.at_q, &p.want_dq, &p.queries},
                      {p.at_k, &p.want_dk, &p.keys},
                      {p.at_v, &p.want_dv, &p.keys},
                      {p.at_bias, &p.want_dbias, NULL}};
        for (int which = 0; which < (p.has_bias ? 4 : 3); which++) {
            int64_t count = inputs[which].gradient->rows * inputs[which].gradient->cols;
            for (int tries = 0; tries < 10 && count > 0; tries++) {
                int64_t e = testing_between(0, count - 1);
                if (inputs[which].rows != NULL &&
                    !is_active(inputs[which].rows, e / inputs[which].gradient->cols)) {
                    continue;
                }
                const double step = 1e-5, was = inputs[which].at[e];
                double loss[2] = {0, 0};
                for (int side = 0; side < 2; side++) {
                    inputs[which].at[e] = was + (side == 0 ? step : -step);
                    reference_forward(&p);
                    for (int64_t i = 0; i < p.want_out.rows * p.want_out.cols; i++) {
                        if (is_active(&p.queries, i / p.want_out.cols))
                            loss[side] += p.at_dout[i] * p.want_out.value[i];
                    }
                }
                inputs[which].at[e] = was;
                double slope = (loss[0] - loss[1]) / (2 * step);
                double want = inputs[which].gradient->value[e];
                ck_assert_msg(fabs(slope - want) <= 1e-6 * (1 + fabs(want)), "%d: %g, not %g",
                              which, slope, want);
                looked += want != 0;
            }
        }
        free_problem(&p);
    }
    ck_assert_int_gt(looked, 100);
}
END_TEST

/* ---- bits ---- */

/* Any number of threads, any workspace, and dQ found apart from dK and dV: the same bits. */
START_TEST(bits_depend_on_nothing)
{
    for (int round = 0; round < testing_rounds(20); round++) {
        problem p = make_problem(round % 4 == 3 ? 900 : 80, 40);
        const sebp_matrix *outputs[] = {&p.out, &p.lse, &p.dq, &p.dk, &p.dv, &p.dbias};
        sebp_matrix first[6];
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
        testing_succeed(call_forward(&p, context), context);
        testing_succeed(call_backward(&p, context), context);
        for (int i = 0; i < 6; i++)
            first[i] = testing_copy(outputs[i]);
        sebp_context_destroy(context);
        for (int threads = 1; threads <= 16; threads *= 2) {
            context = testing_context(SEBP_GEMM_NATIVE, threads, (int64_t)1 << 20);
            for (int i = 0; i < 6; i++)
                testing_poison(outputs[i]);
            testing_succeed(call_forward(&p, context), context);
            testing_succeed(call_backward(&p, context), context);
            for (int i = 0; i < 6; i++)
                ck_assert(testing_same_bits(outputs[i], &first[i]));
            ck_assert_int_le(sebp_context_scratch_bytes(context), (int64_t)1 << 20);
            testing_poison(&p.dq);
            testing_succeed(sebp_attention_backward(context, &p.dout, &p.q, &p.k, &p.v, bias_of(&p),
                                                    &p.out, &p.lse, p.queries.made, p.keys.made,
                                                    &p.options, &p.dq, NULL, NULL, NULL),
                            context);
            ck_assert(testing_same_bits(&p.dq, &first[2]));
            testing_poison(&p.dv);
            testing_succeed(sebp_attention_backward(context, &p.dout, &p.q, &p.k, &p.v, bias_of(&p),
                                                    &p.out, &p.lse, p.queries.made, p.keys.made,
                                                    &p.options, NULL, NULL, &p.dv, NULL),
                            context);
            ck_assert(testing_same_bits(&p.dv, &first[4]));
            sebp_context_destroy(context);
        }
        for (int i = 0; i < 6; i++)
            testing_release(&first[i]);
        free_problem(&p);
    }
}
END_TEST

/* Heads of every size, the largest too, fit in the smallest workspace with all options. */
START_TEST(large_heads)
{
    for (int64_t D = SEBP_MAX_HEAD_SIZE; D >= 1; D = D * 3 / 4) {
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, (int64_t)1 << 20);
        const int64_t n = 70;
        sebp_sequences *texts = NULL;
        ck_assert_int_eq(sebp_sequences_from_lengths(&n, 1, &texts), SEBP_SUCCESS);
        sebp_matrix m[8], lse = empty_matrix(n, 1, SEBP_F32);
        sebp_dtype dtype = testing_dtype();
        for (int i = 0; i < 8; i++)
            m[i] = testing_random_matrix(n, D, dtype, TESTING_REAL);
        sebp_matrix bias = testing_random_matrix(n, n, SEBP_F32, TESTING_REAL);
        sebp_matrix dbias = empty_matrix(n, n, SEBP_F32);
        sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
        options.dropout = 0.1;
        testing_succeed(sebp_attention_forward(context, &m[0], &m[1], &m[2], &bias, texts, NULL,
                                               &options, &m[3], &lse),
                        context);
        testing_succeed(sebp_attention_backward(context, &m[4], &m[0], &m[1], &m[2], &bias, &m[3],
                                                &lse, texts, NULL, &options, &m[5], &m[6], &m[7],
                                                &dbias),
                        context);
        for (int i = 0; i < 8; i++)
            testing_release(&m[i]);
        testing_release(&lse);
        testing_release(&bias);
        testing_release(&dbias);
        sebp_sequences_destroy(texts);
        sebp_context_destroy(context);
    }
}
END_TEST

/* ---- dropout ---- */

/* With V = 1 a row of out is the sum of what dropout has left: its mean is 1, its variance that of m
 * independent draws; another offset draws others. */
START_TEST(dropout_has_the_right_moments)
{
    sebp_context *context = any_context();
    const int64_t n = 400;
    const double p = 0.25;
    sebp_sequences *texts = NULL;
    ck_assert_int_eq(sebp_sequences_from_lengths(&n, 1, &texts), SEBP_SUCCESS);
    sebp_matrix zero = empty_matrix(n, 1, SEBP_F32), one = empty_matrix(n, 1, SEBP_F32);
    sebp_matrix out = empty_matrix(n, 1, SEBP_F32), other = empty_matrix(n, 1, SEBP_F32);
    for (int64_t i = 0; i < n; i++) {
        testing_set(&zero, i, 0, 0);
        testing_set(&one, i, 0, 1);
    }
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.dropout = p;
    options.seed = testing_random();
    testing_succeed(sebp_attention_forward(context, &zero, &zero, &one, NULL, texts, NULL, &options,
                                           &out, NULL),
                    context);
    options.offset = 1;
    testing_succeed(sebp_attention_forward(context, &zero, &zero, &one, NULL, texts, NULL, &options,
                                           &other, NULL),
                    context);
    double mean = 0, variance = 0, product = 0;
    for (int64_t i = 0; i < n; i++) {
        double off = testing_get(&out, i, 0) - 1, off_other = testing_get(&other, i, 0) - 1;
        mean += off / (double)n;
        variance += off * off / (double)n;
        product += off * off_other / (double)n;
    }
    const double want = p / (1 - p) / (double)n, sigma = sqrt(want);
    ck_assert_double_le(fabs(mean), 6 * sigma / sqrt((double)n));
    ck_assert_double_le(fabs(variance - want), 6 * want * sqrt(2 / (double)n));
    ck_assert_double_le(fabs(product), 6 * want / sqrt((double)n));
    testing_release(&zero);
    testing_release(&one);
    testing_release(&out);
    testing_release(&other);
    sebp_sequences_destroy(texts);
    sebp_context_destroy(context);
}
END_TEST

/* ---- NaN ---- */

START_TEST(nan_stays_in_its_text)
{
    sebp_context *context = any_context();
    const int64_t lengths[3] = {7, 40, 300}, total = 347, D = 9;
    sebp_sequences *texts = NULL;
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths, 3, &texts), SEBP_SUCCESS);
    for (int bad = 0; bad < 4; bad++) {
        sebp_matrix m[8], lse = empty_matrix(total, 1, SEBP_F32);
        for (int i = 0; i < 8; i++)
            m[i] = testing_random_matrix(total, D, SEBP_F32, TESTING_REAL);
        testing_set(bad < 3 ? &m[bad] : &m[4], 20, 3, bad % 2 ? INFINITY : NAN);
        testing_succeed(sebp_attention_forward(context, &m[0], &m[1], &m[2], NULL, texts, NULL,
                                               NULL, &m[3], &lse),
                        context);
        testing_succeed(sebp_attention_backward(context, &m[4], &m[0], &m[1], &m[2], NULL, &m[3],
                                                &lse, texts, NULL, NULL, &m[5], &m[6], &m[7], NULL),
                        context);
        int64_t spread = 0;
        for (int64_t at = 0; at < total * D; at++) {
            for (int i = 5; i < 8; i++) {
                double value = testing_get(&m[i], at / D, at % D);
                ck_assert(isfinite(value) || (at / D >= 7 && at / D < 47));
                spread += !isfinite(value);
            }
        }
        ck_assert_int_gt(spread, 0);
        for (int i = 0; i < 8; i++)
            testing_release(&m[i]);
        testing_release(&lse);
    }
    sebp_sequences_destroy(texts);
    sebp_context_destroy(context);
}
END_TEST

/* ---- bad input ---- */

/* Everything that either call takes. */
static struct bad {
    sebp_context *context;
    sebp_matrix view[11], good[11], before[11]; /* as given, as they are, what they held */
    const sebp_matrix *at[11]; /* q, k, v, bias, out, lse, dout, dq, dk, dv, dbias */
    sebp_sequences *texts, *fewer, *longer;
    const sebp_sequences *q_texts, *k_texts;
    sebp_attention_options options;
} bad;

enum { Q, K, V, BIAS, OUT, LSE, DOUT, DQ, DK, DV, DBIAS };

static void reset_bad(void)
{
    for (int i = 0; i < 11; i++) {
        bad.view[i] = bad.good[i];
        bad.at[i] = &bad.view[i];
    }
    bad.options = (sebp_attention_options)SEBP_ATTENTION_OPTIONS_INIT;
    bad.options.heads = 2;
    bad.q_texts = bad.texts;
    bad.k_texts = NULL;
}

/* Both calls, or one of them where only that has what is wrong. */
static void fails(sebp_status want, int forward, int backward)
{
    const sebp_matrix *const *at = bad.at;
    if (forward) {
        testing_expect(sebp_attention_forward(bad.context, at[Q], at[K], at[V], at[BIAS],
                                              bad.q_texts, bad.k_texts, &bad.options, at[OUT],
                                              at[LSE]),
                       want, bad.context);
    }
    if (backward) {
        testing_expect(sebp_attention_backward(bad.context, at[DOUT], at[Q], at[K], at[V], at[BIAS],
                                               at[OUT], at[LSE], bad.q_texts, bad.k_texts,
                                               &bad.options, at[DQ], at[DK], at[DV], at[DBIAS]),
                       want, bad.context);
    }
    const char *message = sebp_context_message(bad.context);
    ck_assert(want == SEBP_SUCCESS || strstr(message, "sebp_attention_") == message);
    for (int i = 0; i < 11 && want != SEBP_SUCCESS; i++)
        ck_assert(testing_same_bits(&bad.before[i], &bad.good[i]));
    reset_bad();
}

START_TEST(bad_input)
{
    const int64_t lengths[3] = {3, 0, 5};
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths, 3, &bad.texts), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths + 2, 1, &bad.fewer), SEBP_SUCCESS);
    const int64_t two[2] = {3, 5};
    ck_assert_int_eq(sebp_sequences_from_lengths(two, 2, &bad.longer), SEBP_SUCCESS);
    bad.context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    for (int i = 0; i < 11; i++) {
        int is_bias = i == BIAS || i == DBIAS;
        bad.good[i] = testing_matrix(is_bias ? 5 : 8, is_bias ? 5 : i == LSE ? 2 : 6, 7, SEBP_F32);
        testing_fill(&bad.good[i], TESTING_REAL);
    }
    reset_bad();
    fails(SEBP_SUCCESS, 1, 1);
    for (int i = 0; i < 11; i++)
        bad.before[i] = testing_copy(&bad.good[i]);
    static const int of_forward[] = {Q, K, V, OUT}, of_backward[] = {Q, K, V, OUT, LSE, DOUT, BIAS};
    for (size_t i = 0; i < sizeof of_forward / sizeof *of_forward; i++) {
        bad.at[of_forward[i]] = NULL;
        fails(SEBP_ERROR_NULL, 1, 0);
    }
    for (size_t i = 0; i < sizeof of_backward / sizeof *of_backward; i++) {
        bad.at[of_backward[i]] = NULL;
        fails(SEBP_ERROR_NULL, 0, 1);
    }
    bad.q_texts = NULL;
    fails(SEBP_ERROR_NULL, 1, 1);
    ck_assert_int_eq(sebp_attention_forward(NULL, bad.at[Q], bad.at[K], bad.at[V], NULL, bad.texts,
                                            NULL, NULL, bad.at[OUT], NULL),
                     SEBP_ERROR_NULL);
#define WITH(change, status, forward, backward)                                                    \
    change;                                                                                        \
    fails(status, forward, backward)
    WITH(bad.options.size_bytes = 3, SEBP_ERROR_SIZE, 1, 1);
    WITH(bad.options.heads = 0, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.kv_heads = -1, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.kv_heads = 3, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.scale = NAN, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.scale = 1e300, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.softcap = -1, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.softcap = NAN, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.softcap = INFINITY, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.softcap = 1e-300, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.dropout = 1, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.dropout = 1 - 1e-12, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.dropout = -0.1, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.dropout = NAN, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.inactive = (sebp_inactive)7, SEBP_ERROR_VALUE, 1, 1);
    WITH(bad.options.heads = 4, SEBP_ERROR_SHAPE, 1, 1);
    WITH(bad.options.kv_heads = 1, SEBP_ERROR_SHAPE, 1, 1);
    WITH(bad.q_texts = bad.fewer, SEBP_ERROR_ROWS, 1, 1);
    WITH(bad.k_texts = bad.fewer, SEBP_ERROR_ROWS, 1, 1);
    WITH(bad.k_texts = bad.longer, SEBP_ERROR_ROWS, 1, 1);
    for (int i = 0; i < 11; i++) {
        int forward = i <= LSE;
        WITH(bad.view[i].dtype = (sebp_dtype)9, SEBP_ERROR_DTYPE, forward, 1);
        WITH(bad.view[i].dtype = SEBP_BF16, SEBP_ERROR_DTYPE, forward, 1);
        WITH(bad.view[i].cols--, SEBP_ERROR_SHAPE, forward, 1);
        WITH(bad.view[i].stride = 1, SEBP_ERROR_STRIDE, forward, 1);
        WITH(bad.view[i].rows = -1, SEBP_ERROR_SIZE, forward, 1);
        WITH(bad.view[i].data = NULL, SEBP_ERROR_NULL, forward, 1);
        for (int j = DQ; j <= DBIAS; j++) {
            if (i != j && bad.good[i].rows == bad.good[j].rows &&
                bad.good[i].cols == bad.good[j].cols) {
                WITH(bad.at[j] = &bad.view[i], SEBP_ERROR_ALIAS, 0, 1);
            }
        }
    }
    WITH(bad.at[OUT] = &bad.view[V], SEBP_ERROR_ALIAS, 1, 0);
#undef WITH
    for (int i = 0; i < 11; i++) {
        testing_release(&bad.good[i]);
        testing_release(&bad.before[i]);
    }
    sebp_sequences_destroy(bad.texts);
    sebp_sequences_destroy(bad.fewer);
    sebp_sequences_destroy(bad.longer);
    sebp_context_destroy(bad.context);
}
END_TEST

/* A head larger than there may be. */
START_TEST(too_large_a_head)
{
    sebp_context *context = any_context();
    sebp_sequences *texts = NULL;
    ck_assert_int_eq(sebp_sequences_from_lengths(NULL, 0, &texts), SEBP_SUCCESS);
    sebp_matrix view = sebp_matrix_f32(NULL, 0, SEBP_MAX_HEAD_SIZE + 1);
    testing_expect(
        sebp_attention_forward(context, &view, &view, &view, NULL, texts, NULL, NULL, &view, NULL),
        SEBP_ERROR_VALUE, context);
    view.cols = 0;
    testing_expect(
        sebp_attention_forward(context, &view, &view, &view, NULL, texts, NULL, NULL, &view, NULL),
        SEBP_ERROR_SHAPE, context);
    sebp_sequences_destroy(texts);
    sebp_context_destroy(context);
}
END_TEST

/* No texts and as many heads as a number holds: there is nothing to do, and nothing is counted down. */
START_TEST(heads_without_number)
{
    const int64_t heads = INT64_C(1) << 40;
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_sequences *none;
    ck_assert_int_eq(sebp_sequences_from_lengths(NULL, 0, &none), SEBP_SUCCESS);
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = heads;
    options.kv_heads = 1;
    sebp_matrix q = {NULL, 0, heads, heads, SEBP_F32}, k = {NULL, 0, 1, 1, SEBP_F32};
    testing_succeed(
        sebp_attention_forward(context, &q, &k, &k, NULL, none, NULL, &options, &q, NULL), context);
    sebp_sequences_destroy(none);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("attention");
    TCase *all = tcase_create("attention");
    tcase_set_timeout(all, 300);
    tcase_add_test(all, short_texts);
    tcase_add_test(all, long_texts);
    tcase_add_test(all, uniform_scores_give_means);
    tcase_add_test(all, reference_gradients_are_derivatives);
    tcase_add_test(all, bits_depend_on_nothing);
    tcase_add_test(all, large_heads);
    tcase_add_test(all, dropout_has_the_right_moments);
    tcase_add_test(all, nan_stays_in_its_text);
    tcase_add_test(all, bad_input);
    tcase_add_test(all, too_large_a_head);
    tcase_add_test(all, heads_without_number);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
