/* SPDX-License-Identifier: Apache-2.0 */
/** @file test_backend_attention.c As test_backend.c, of attention. Rows outside the texts hold NaN in
 * inputs. */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include <sebp/sequences.h>

#include "sides.h"

static const double EPS = FLT_EPSILON;
static const double SCALE = 1.0 / 64, CAP = 5;

enum { MAX_TEXTS = 4, SHORT = 24, LONG = 300, MAX_HEAD = 16, WIDE_HEAD = 144 };

/* A random attention, of small integers: its scores are exact without a cap. */
typedef struct problem {
    sebp_attention options; /* without its matrices */
    sebp_sequences *own_keys, *queries;
    pair q, k, v, bias, out, lse;
    sebp_dtype dtype;
} problem;

static sebp_sequences *random_texts(int64_t count, int64_t max)
{
    int64_t lengths[MAX_TEXTS];
    sebp_sequences *made;
    lengths[0] = testing_between(1, max);
    for (int64_t s = 1; s < count; s++)
        lengths[s] = testing_chance(0.2) ? 0 : testing_between(1, max);
    succeed(testing_chance(0.5)
                ? sebp_sequences_from_lengths(lengths, count, &made)
                : sebp_sequences_from_padded(lengths, count, max + testing_between(0, 3), &made));
    return made;
}

static pair text_input(const sebp_sequences *texts, int64_t cols, sebp_dtype dtype)
{
    const int64_t *first = sebp_sequences_firsts(texts), *offset = sebp_sequences_offsets(texts);
    const int64_t total = sebp_sequences_total(texts), count = sebp_sequences_count(texts);
    sebp_matrix host = testing_random_matrix(total, cols, dtype, TESTING_INTEGER);
    for (int64_t row = 0, s = 0; row < total; row++) {
        while (s < count && row >= first[s] + offset[s + 1] - offset[s])
            s++;
        if (s == count || row < first[s])
            poison_row(&host, row);
    }
    return put_pair(&host);
}

static problem make_problem(void)
{
    const int64_t max = testing_chance(0.1) ? LONG : SHORT, texts = testing_between(1, MAX_TEXTS);
    problem made = {.dtype = testing_dtype(), .queries = random_texts(texts, max)};
    sebp_attention *o = &made.options;
    if (testing_chance(0.4))
        made.own_keys = random_texts(texts, max);
    o->q_sequences = made.queries;
    o->k_sequences = made.own_keys != NULL ? made.own_keys : made.queries;
    o->kv_heads = testing_between(1, 2);
    o->heads = o->kv_heads * testing_between(1, 3);
    o->head_size = testing_between(1, testing_chance(0.4) ? WIDE_HEAD : MAX_HEAD);
    if (testing_chance(0.5)) /* rows may begin at 16 bytes, and then GPUs copy them by other ways */
        o->head_size = (o->head_size + 7) / 8 * 8;
    o->scale = SCALE;
    o->softcap = testing_chance(0.3) ? CAP : 0;
    o->window_left = testing_chance(0.3) ? testing_between(0, 10) : SEBP_UNLIMITED;
    o->window_right = testing_chance(0.3) ? testing_between(0, 10) : SEBP_UNLIMITED;
    o->dropout = testing_chance(0.4) ? 0.5 : 0;
    o->seed = testing_random();
    o->offset = testing_random();
    o->zero_other_rows = testing_chance(0.5);
    made.q = text_input(o->q_sequences, o->heads * o->head_size, made.dtype);
    made.k = text_input(o->k_sequences, o->kv_heads * o->head_size, made.dtype);
    made.v = text_input(o->k_sequences, o->kv_heads * o->head_size, made.dtype);
    made.bias.is_absent = testing_chance(0.6);
    if (!made.bias.is_absent) {
        const int64_t rows = sebp_sequences_max_length(o->q_sequences);
        made.bias = make_pair(testing_chance(0.5) ? rows : rows * o->heads,
                              sebp_sequences_max_length(o->k_sequences), SEBP_F32, TESTING_INTEGER);
    }
    const int64_t m = sebp_sequences_total(o->q_sequences);
    made.out = make_pair(m, o->heads * o->head_size, made.dtype, TESTING_REAL);
    made.lse = make_pair(m, o->heads, SEBP_F32, TESTING_REAL);
    return made;
}

/* All but what the backward alone has. */
static sebp_attention attention_on(const problem *p, int i)
{
    sebp_attention made = p->options;
    made.q = on(&p->q, i);
    made.k = on(&p->k, i);
    made.v = on(&p->v, i);
    made.bias = on(&p->bias, i);
    made.out = on(&p->out, i);
    made.lse = on(&p->lse, i);
    return made;
}

/* Drops all but out and lse. */
static void drop_inputs(problem *p)
{
    drop_pair(&p->q);
    drop_pair(&p->k);
    drop_pair(&p->v);
    drop_pair(&p->bias);
    sebp_sequences_destroy(p->own_keys);
    sebp_sequences_destroy(p->queries);
}

/* The largest magnitude of a score, bias included. */
static double largest_score(const problem *p)
{
    return 16 * (double)p->options.head_size * SCALE + 4;
}

/* How far P is off on both sides together, of its magnitude: by exp, whose argument is rounded, the
 * sum and, where scores are capped, tanh. */
static double probability_error(const problem *p)
{
    const double keys = (double)sebp_sequences_max_length(p->options.k_sequences);
    return EPS * (keys + 8 + 2 * largest_score(p)) + (p->options.softcap > 0 ? CAP * 0x1p-20 : 0);
}

/* The largest relative error of a factor of a product, P or dS, that the tested device rounds to
 * bf16: include/sebp/attention.h says which does. */
static double factor_error(const problem *p)
{
    const bool rounds = p->dtype == SEBP_BF16 && strcmp(tested.backend->name, "cuda") == 0;
    return rounds ? 0x1p-9 : 0;
}

START_TEST(forward)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        problem p = make_problem();
        if (testing_chance(0.3)) {
            drop_pair(&p.lse);
            p.lse.is_absent = true;
        }
        for (int i = 0; i < 2; i++) {
            const sebp_attention attention = attention_on(&p, i);
            succeed(side_of(i).backend->attention_forward(side_of(i).device, &attention));
        }
        const double error = probability_error(&p);
        compare_pair(&p.out, 8 * (error + factor_error(&p))); /* |v| <= 4, and dropout doubles */
        compare_pair(&p.lse, error + 2 * EPS * largest_score(&p));
        drop_inputs(&p);
    }
    destroy_sides();
}
END_TEST

/* Makes out and lse those of the scalar forward on both devices. */
static void run_forward(problem *p)
{
    const sebp_attention attention = attention_on(p, 1);
    succeed(scalar.backend->attention_forward(scalar.device, &attention));
    pair *all[] = {&p->out, &p->lse};
    for (int i = 0; i < 2; i++) {
        drop(tested, all[i]->of[0].data);
        sebp_matrix host = take(scalar, &all[i]->of[1]);
        *all[i] = put_pair(&host);
    }
}

/*
 * dP and delta are at most 32 d each, so dS = P (dP - delta) is off by no more than P times `off`. The
 * P of a query add up to 1; those of a key to at most the number of its queries.
 */
START_TEST(backward)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        problem p = make_problem();
        run_forward(&p);
        const sebp_attention *o = &p.options;
        const int64_t m = sebp_sequences_total(o->q_sequences);
        const int64_t keys = sebp_sequences_total(o->k_sequences);
        pair dout = text_input(o->q_sequences, o->heads * o->head_size, p.dtype);
        pair dq = maybe_pair(m, o->heads * o->head_size, p.dtype);
        pair dk = maybe_pair(keys, o->kv_heads * o->head_size, p.dtype);
        pair dv = maybe_pair(keys, o->kv_heads * o->head_size, p.dtype);
        pair dbias = {.is_absent = true};
        if (!p.bias.is_absent)
            dbias = maybe_pair(p.bias.of[0].rows, p.bias.of[0].cols, SEBP_F32);
        for (int i = 0; i < 2; i++) {
            sebp_attention attention = attention_on(&p, i);
            attention.dout = on(&dout, i);
            attention.dq = on(&dq, i);
            attention.dk = on(&dk, i);
            attention.dv = on(&dv, i);
            attention.dbias = on(&dbias, i);
            succeed(side_of(i).backend->attention_backward(side_of(i).device, &attention));
        }
        const double d = (double)o->head_size, error = probability_error(&p);
        const double tanh_error = o->softcap > 0 ? 0x1p-18 : 0;
        const double off = 64 * d * (3 * error + EPS * (d + 4) + tanh_error);
        const double off_rounded = off + 64 * d * factor_error(&p);
        const double queries =
            (double)sebp_sequences_max_length(o->q_sequences) * (double)(o->heads / o->kv_heads);
        compare_pair(&dq, 4 * SCALE * off_rounded);
        compare_pair(&dk, 4 * SCALE * off_rounded * queries);
        compare_pair(&dv, 8 * queries * (2 * error + EPS * queries + factor_error(&p)));
        compare_pair(&dbias, off * (double)(MAX_TEXTS * o->heads));
        drop_pair(&dout);
        drop_pair(&p.out);
        drop_pair(&p.lse);
        drop_inputs(&p);
    }
    destroy_sides();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("backend, attention");
    TCase *tests = tcase_create("operations");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, forward, 0, count_devices());
    tcase_add_loop_test(tests, backward, 0, count_devices());
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
