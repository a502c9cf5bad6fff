/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention.c Attention over texts: the checks; the work is the device's. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "call.h"
#include "integers.h"

/* The arguments of either call, in the order of `arguments` below. */
enum { DOUT, Q, K, V, BIAS, OUT, LSE, DQ, DK, DV, DBIAS, COUNT };

typedef struct attention_call {
    sebp_call call;
    sebp_argument arguments[COUNT];
    sebp_attention_options options;
    sebp_attention attention;
} attention_call;

static void check_options(attention_call *work)
{
    const sebp_attention_options *o = &work->options;
    sebp_call *call = &work->call;
    if (o->heads < 1)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->heads is %" PRId64, o->heads);
    if (o->kv_heads < 0 || (o->kv_heads > 0 && o->heads % o->kv_heads != 0)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "options->kv_heads is %" PRId64 ", which does not divide %" PRId64 " heads",
                       o->kv_heads, o->heads);
    }
    if (!isfinite((float)o->scale))
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->scale is %g", o->scale);
    /* One that f32 has no number for would be none, or no bound. */
    if (!(o->softcap >= 0) || !isfinite((float)o->softcap) ||
        (o->softcap > 0 && (float)o->softcap == 0)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->softcap is %g", o->softcap);
    }
    if (!(o->dropout >= 0 && (float)o->dropout < 1)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->dropout is %g, not in [0, 1)", o->dropout);
    }
    call->options.inactive = o->inactive;
    sebp_check_inactive(call);
}

static void check_head_size(attention_call *work)
{
    const sebp_matrix *q = work->arguments[Q].view;
    const int64_t heads = work->options.heads;
    if (!sebp_call_goes_on(&work->call))
        return;
    if (q->cols % heads != 0 || q->cols == 0) {
        sebp_call_fail(&work->call, SEBP_ERROR_SHAPE,
                       "q has %" PRId64 " columns for %" PRId64 " heads", q->cols, heads);
    } else if (q->cols / heads > SEBP_MAX_HEAD_SIZE) {
        sebp_call_fail(&work->call, SEBP_ERROR_VALUE,
                       "heads of %" PRId64 " columns, not of 1 to %d", q->cols / heads,
                       SEBP_MAX_HEAD_SIZE);
    }
}

static void check_sequences(attention_call *work)
{
    const sebp_attention *attention = &work->attention;
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    const struct {
        const char *name, *of;
        int64_t total, rows;
    } checks[] = {
        {"q_sequences", "q", sebp_sequences_total(of_q), attention->q->rows},
        {"k_sequences", "k", sebp_sequences_total(of_k), attention->k->rows},
    };
    for (int i = 0; i < 2; i++) {
        if (checks[i].total != checks[i].rows) {
            sebp_call_fail(&work->call, SEBP_ERROR_ROWS,
                           "%s are for %" PRId64 " rows but %s has %" PRId64, checks[i].name,
                           checks[i].total, checks[i].of, checks[i].rows);
        }
    }
    if (sebp_sequences_count(of_q) != sebp_sequences_count(of_k)) {
        sebp_call_fail(&work->call, SEBP_ERROR_ROWS,
                       "q_sequences has %" PRId64 " texts but k_sequences %" PRId64,
                       sebp_sequences_count(of_q), sebp_sequences_count(of_k));
    }
}

/* Rows of a bias: one for each query of the longest text, for each head or once. */
static void check_bias(attention_call *work)
{
    const sebp_matrix *bias = work->attention.bias;
    if (bias == NULL)
        return;
    const int64_t length = sebp_sequences_max_length(work->attention.q_sequences);
    const int64_t cols = sebp_sequences_max_length(work->attention.k_sequences);
    const int64_t heads = work->options.heads;
    int64_t all;
    if (__builtin_mul_overflow(heads, length, &all))
        all = -1;
    if (bias->cols == cols && (bias->rows == length || bias->rows == all))
        return;
    sebp_call_fail(&work->call, SEBP_ERROR_SHAPE,
                   "bias is %" PRId64 "x%" PRId64 " but texts of at most %" PRId64
                   " queries and %" PRId64 " keys have one of %" PRId64 " or %" PRId64
                   " times %" PRId64 " rows",
                   bias->rows, bias->cols, length, cols, length, heads, length);
}

static void check_dtypes(attention_call *work)
{
    static const int same[] = {K, V, OUT, DOUT, DQ, DK, DV}, f32[] = {BIAS, LSE, DBIAS};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        sebp_check_same_dtype(&work->call, &work->arguments[same[i]], &work->arguments[Q]);
    for (size_t i = 0; i < sizeof f32 / sizeof *f32; i++)
        sebp_check_f32(&work->call, &work->arguments[f32[i]]);
}

static void check_shapes(attention_call *work)
{
    const sebp_matrix *q = work->arguments[Q].view, *k = work->arguments[K].view;
    const sebp_matrix *bias = work->arguments[BIAS].view;
    const int64_t kv_cols = work->attention.kv_heads * work->attention.head_size;
    const struct {
        int which;
        int64_t rows, cols;
    } shapes[] = {{K, k->rows, kv_cols},
                  {V, k->rows, kv_cols},
                  {OUT, q->rows, q->cols},
                  {LSE, q->rows, work->options.heads},
                  {DOUT, q->rows, q->cols},
                  {DQ, q->rows, q->cols},
                  {DK, k->rows, kv_cols},
                  {DV, k->rows, kv_cols},
                  {DBIAS, bias != NULL ? bias->rows : 0, bias != NULL ? bias->cols : 0}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        sebp_check_shape(&work->call, &work->arguments[shapes[i].which], shapes[i].rows,
                         shapes[i].cols);
    }
}

/* Checks everything but NULL, and settles work->attention. */
static void settle(attention_call *work, const sebp_attention_options *given,
                   const sebp_sequences *q_sequences, const sebp_sequences *k_sequences)
{
    enum { FIRST_BYTES = SEBP_SIZE_THROUGH(sebp_attention_options, inactive) };
    sebp_attention_options *o = &work->options;
    sebp_argument *arguments = work->arguments;
    sebp_take_any_options(&work->call, given, FIRST_BYTES, o, sizeof *o);
    sebp_check_views(&work->call, arguments, COUNT);
    check_dtypes(work);
    check_options(work);
    check_head_size(work);
    if (!sebp_call_goes_on(&work->call))
        return;
    const int64_t head_size = arguments[Q].view->cols / o->heads;
    work->attention = (sebp_attention){
        .heads = o->heads,
        .kv_heads = o->kv_heads > 0 ? o->kv_heads : o->heads,
        .head_size = head_size,
        .scale = o->scale != 0 ? o->scale : 1 / sqrt((double)head_size),
        .softcap = o->softcap,
        .window_left =
            o->window_left < 0 ? SEBP_UNLIMITED : sebp_min(o->window_left, SEBP_UNLIMITED),
        .window_right = o->causal             ? 0
                        : o->window_right < 0 ? SEBP_UNLIMITED
                                              : sebp_min(o->window_right, SEBP_UNLIMITED),
        .dropout = o->dropout,
        .seed = o->seed,
        .offset = o->offset,
        .zero_other_rows = o->inactive == SEBP_INACTIVE_ZERO,
        .q_sequences = q_sequences,
        .k_sequences = k_sequences != NULL ? k_sequences : q_sequences,
        .q = arguments[Q].view,
        .k = arguments[K].view,
        .v = arguments[V].view,
        .bias = arguments[BIAS].view,
        .out = arguments[OUT].view,
        .lse = arguments[LSE].view,
        .dout = arguments[DOUT].view,
        .dq = arguments[DQ].view,
        .dk = arguments[DK].view,
        .dv = arguments[DV].view,
        .dbias = arguments[DBIAS].view,
    };
    check_sequences(work);
    check_shapes(work);
    check_bias(work);
    sebp_check_aliases(&work->call, arguments, COUNT);
}

/* The end of both: an operation's failure is for want of scratch memory, or the device's. */
static sebp_status finish(attention_call *work, sebp_status status)
{
    if (status == SEBP_ERROR_MEMORY)
        sebp_call_fail(&work->call, status, "no scratch memory");
    sebp_call_keep(&work->call, status, "attention");
    return sebp_call_end(&work->call);
}

sebp_status sebp_attention_forward(sebp_context *context, const sebp_matrix *q,
                                   const sebp_matrix *k, const sebp_matrix *v,
                                   const sebp_matrix *bias, const sebp_sequences *q_sequences,
                                   const sebp_sequences *k_sequences,
                                   const sebp_attention_options *options, const sebp_matrix *out,
                                   const sebp_matrix *lse)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    attention_call work = {
        .call = sebp_call_begin(context, "sebp_attention_forward"),
        .options = SEBP_ATTENTION_OPTIONS_INIT,
        .arguments = {[Q] = {"q", q, false},
                      [K] = {"k", k, false},
                      [V] = {"v", v, false},
                      [BIAS] = {"bias", bias, false},
                      [OUT] = {"out", out, true},
                      [LSE] = {"lse", lse, true}},
    };
    sebp_require_views(&work.call, &work.arguments[Q], BIAS - Q);
    sebp_require(&work.call, "q_sequences", q_sequences);
    if (!sebp_require(&work.call, "out", out))
        return work.call.status;
    settle(&work, options, q_sequences, k_sequences);
    if (!sebp_call_goes_on(&work.call))
        return work.call.status;
    return finish(&work, work.call.backend->attention_forward(work.call.device, &work.attention));
}

sebp_status
sebp_attention_backward(sebp_context *context, const sebp_matrix *dout, const sebp_matrix *q,
                        const sebp_matrix *k, const sebp_matrix *v, const sebp_matrix *bias,
                        const sebp_matrix *out, const sebp_matrix *lse,
                        const sebp_sequences *q_sequences, const sebp_sequences *k_sequences,
                        const sebp_attention_options *options, const sebp_matrix *dq,
                        const sebp_matrix *dk, const sebp_matrix *dv, const sebp_matrix *dbias)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    attention_call work = {
        .call = sebp_call_begin(context, "sebp_attention_backward"),
        .options = SEBP_ATTENTION_OPTIONS_INIT,
        .arguments = {[DOUT] = {"dout", dout, false},
                      [Q] = {"q", q, false},
                      [K] = {"k", k, false},
                      [V] = {"v", v, false},
                      [BIAS] = {"bias", bias, false},
                      [OUT] = {"out", out, false},
                      [LSE] = {"lse", lse, false},
                      [DQ] = {"dq", dq, true},
                      [DK] = {"dk", dk, true},
                      [DV] = {"dv", dv, true},
                      [DBIAS] = {"dbias", dbias, true}},
    };
    for (int i = DOUT; i <= LSE; i++) {
        if (i != BIAS || dbias != NULL)
            sebp_require(&work.call, work.arguments[i].name, work.arguments[i].view);
    }
    if (!sebp_require(&work.call, "q_sequences", q_sequences))
        return work.call.status;
    settle(&work, options, q_sequences, k_sequences);
    if (!sebp_call_goes_on(&work.call))
        return work.call.status;
    return finish(&work, work.call.backend->attention_backward(work.call.device, &work.attention));
}
