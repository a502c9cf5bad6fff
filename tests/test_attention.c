/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention against plain loops in double precision, with bounds that grow with the sums, over random
 * texts, heads and options; its gradients against differences; exact cases.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "attention_problem.h"

/* ---- comparison ---- */

/* How many elements were compared with a number other than 0, in all tests of this process. */
static int64_t compared;

static void check_output(const attention_problem *p, const attention_expected *want,
                         const sebp_matrix *got, const attention_layout *l, const char *what)
{
    for (int64_t at = 0; at < want->rows * want->cols; at++) {
        int64_t i = at / want->cols, j = at % want->cols;
        double value = testing_get(got, i, j);
        if (l != NULL && !attention_is_active(l, i)) {
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

static const sebp_matrix *bias_of(const attention_problem *p)
{
    return p->has_bias ? &p->bias : NULL;
}

static sebp_status call_forward(const attention_problem *p, sebp_context *context)
{
    return sebp_attention_forward(context, &p->q, &p->k, &p->v, bias_of(p), p->queries.made,
                                  p->keys.made, &p->options, &p->out, &p->lse);
}

static sebp_status call_backward(const attention_problem *p, sebp_context *context)
{
    return sebp_attention_backward(context, &p->dout, &p->q, &p->k, &p->v, bias_of(p), &p->out,
                                   &p->lse, p->queries.made, p->keys.made, &p->options, &p->dq,
                                   &p->dk, &p->dv, p->has_bias ? &p->dbias : NULL);
}

static void check_all(attention_problem *p, sebp_context *context)
{
    attention_reference_forward(p);
    attention_reference_backward(p);
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
        attention_problem p =
            attention_problem_make(max_rows, testing_chance(0.2) ? large_size : max_size);
        check_all(&p, context);
        attention_problem_free(&p);
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
        sebp_matrix q = attention_empty_matrix(n, D, SEBP_F32),
                    k = attention_empty_matrix(m, D, SEBP_F32);
        sebp_matrix v = testing_random_matrix(m, D, SEBP_F32, TESTING_INTEGER);
        sebp_matrix out = attention_empty_matrix(n, D, SEBP_F32);
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
        attention_problem p = attention_problem_make(12, 6);
        /* Out is linear in V, so that nothing is lost by taking it from the forward. */
        attention_reference_forward(&p);
        attention_reference_backward(&p);
        struct {
            double *at;
            attention_expected *gradient;
            const attention_layout *rows;
        } inputs[] = {{p.at_q, &p.want_dq, &p.queries},
                      {p.at_k, &p.want_dk, &p.keys},
                      {p.at_v, &p.want_dv, &p.keys},
                      {p.at_bias, &p.want_dbias, NULL}};
        for (int which = 0; which < (p.has_bias ? 4 : 3); which++) {
            int64_t count = inputs[which].gradient->rows * inputs[which].gradient->cols;
            for (int tries = 0; tries < 10 && count > 0; tries++) {
                int64_t e = testing_between(0, count - 1);
                if (inputs[which].rows != NULL &&
                    !attention_is_active(inputs[which].rows, e / inputs[which].gradient->cols)) {
                    continue;
                }
                const double step = 1e-5, was = inputs[which].at[e];
                double loss[2] = {0, 0};
                for (int side = 0; side < 2; side++) {
                    inputs[which].at[e] = was + (side == 0 ? step : -step);
                    attention_reference_forward(&p);
                    for (int64_t i = 0; i < p.want_out.rows * p.want_out.cols; i++) {
                        if (attention_is_active(&p.queries, i / p.want_out.cols))
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
        attention_problem_free(&p);
    }
    ck_assert_int_gt(looked, 100);
}
END_TEST

/* ---- bits ---- */

/* Any number of threads, any workspace, and dQ found apart from dK and dV: the same bits. */
START_TEST(bits_depend_on_nothing)
{
    for (int round = 0; round < testing_rounds(20); round++) {
        attention_problem p = attention_problem_make(round % 4 == 3 ? 900 : 80, 40);
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
        attention_problem_free(&p);
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
        sebp_matrix m[8], lse = attention_empty_matrix(n, 1, SEBP_F32);
        sebp_dtype dtype = testing_dtype();
        for (int i = 0; i < 8; i++)
            m[i] = testing_random_matrix(n, D, dtype, TESTING_REAL);
        sebp_matrix bias = testing_random_matrix(n, n, SEBP_F32, TESTING_REAL);
        sebp_matrix dbias = attention_empty_matrix(n, n, SEBP_F32);
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
    sebp_matrix zero = attention_empty_matrix(n, 1, SEBP_F32),
                one = attention_empty_matrix(n, 1, SEBP_F32);
    sebp_matrix out = attention_empty_matrix(n, 1, SEBP_F32),
                other = attention_empty_matrix(n, 1, SEBP_F32);
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
        sebp_matrix m[8], lse = attention_empty_matrix(total, 1, SEBP_F32);
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
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
