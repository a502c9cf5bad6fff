/* SPDX-License-Identifier: Apache-2.0 */
/* Bad input of attention: the status, the message, and outputs as they were. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

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
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
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

/* No queries and as many heads as a number holds: there is nothing to do but to zero what no query sees, and
 * nothing is counted down. */
START_TEST(heads_without_number)
{
    const int64_t heads = INT64_C(1) << 40;
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    const int64_t no_queries = 0, one_key = 1;
    sebp_sequences *none, *empty, *one;
    ck_assert_int_eq(sebp_sequences_from_lengths(NULL, 0, &none), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sequences_from_lengths(&no_queries, 1, &empty), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sequences_from_lengths(&one_key, 1, &one), SEBP_SUCCESS);
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = heads;
    options.kv_heads = 1;
    sebp_matrix q = {NULL, 0, heads, heads, SEBP_F32}, k = {NULL, 0, 1, 1, SEBP_F32};
    testing_succeed(
        sebp_attention_forward(context, &q, &k, &k, NULL, none, NULL, &options, &q, NULL), context);
    float key = 1, gradient = 7;
    sebp_matrix lse = q, dq = q, dk = sebp_matrix_f32(&gradient, 1, 1);
    k = sebp_matrix_f32(&key, 1, 1);
    for (int with_dq = 0; with_dq < 2; with_dq++, gradient = 7) {
        testing_succeed(sebp_attention_backward(context, &q, &q, &k, &k, NULL, &q, &lse, empty, one,
                                                &options, with_dq ? &dq : NULL, &dk, NULL, NULL),
                        context);
        ck_assert(gradient == 0);
    }
    sebp_sequences_destroy(none);
    sebp_sequences_destroy(empty);
    sebp_sequences_destroy(one);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("attention errors");
    TCase *all = tcase_create("attention errors");
    tcase_set_timeout(all, 300);
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
