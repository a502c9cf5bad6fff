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

static sebp_status check_options(attention_call *work)
{
    const sebp_attention_options *o = &work->options;
    const char *function = work->call.function;
    sebp_context *context = work->call.context;
    if (o->heads < 1) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: options->heads is %" PRId64, function,
                         o->heads);
    }
    if (o->kv_heads < 0 || (o->kv_heads > 0 && o->heads % o->kv_heads != 0)) {
        return sebp_fail(context, SEBP_ERROR_VALUE,
                         "%s: options->kv_heads is %" PRId64 ", which does not divide %" PRId64
                         " heads",
                         function, o->kv_heads, o->heads);
    }
    if (!isfinite((float)o->scale)) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: options->scale is %g", function, o->scale);
    }
    /* One that f32 has no number for would be none, or no bound. */
    if (!(o->softcap >= 0) || !isfinite((float)o->softcap) ||
        (o->softcap > 0 && (float)o->softcap == 0)) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: options->softcap is %g", function,
                         o->softcap);
    }
    if (!(o->dropout >= 0 && (float)o->dropout < 1)) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: options->dropout is %g, not in [0, 1)",
                         function, o->dropout);
    }
    if (o->inactive != SEBP_INACTIVE_ZERO && o->inactive != SEBP_INACTIVE_LEAVE) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: options->inactive is %d", function,
                         (int)o->inactive);
    }
    return SEBP_SUCCESS;
}

static sebp_status check_head_size(const attention_call *work)
{
    const sebp_matrix *q = work->arguments[Q].view;
    const int64_t heads = work->options.heads;
    if (q->cols % heads != 0 || q->cols == 0) {
        return sebp_fail(work->call.context, SEBP_ERROR_SHAPE,
                         "%s: q has %" PRId64 " columns for %" PRId64 " heads", work->call.function,
                         q->cols, heads);
    }
    if (q->cols / heads > SEBP_MAX_HEAD_SIZE) {
        return sebp_fail(work->call.context, SEBP_ERROR_VALUE,
                         "%s: heads of %" PRId64 " columns, not of 1 to %d", work->call.function,
                         q->cols / heads, SEBP_MAX_HEAD_SIZE);
    }
    return SEBP_SUCCESS;
}

static sebp_status check_sequences(const attention_call *work)
{
    const sebp_attention *attention = &work->attention;
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    const struct {
        const char *name, *of;
        int64_t total, rows;
    } checks[] = {{"q_sequences", "q", of_q->total, attention->q->rows},
                  {"k_sequences", "k", of_k->total, attention->k->rows}};
    for (int i = 0; i < 2; i++) {
        if (checks[i].total != checks[i].rows) {
            return sebp_fail(work->call.context, SEBP_ERROR_ROWS,
                             "%s: %s are for %" PRId64 " rows but %s has %" PRId64,
                             work->call.function, checks[i].name, checks[i].total, checks[i].of,
                             checks[i].rows);
        }
    }
    if (of_q->count != of_k->count) {
        return sebp_fail(work->call.context, SEBP_ERROR_ROWS,
                         "%s: q_sequences has %" PRId64 " texts but k_sequences %" PRId64,
                         work->call.function, of_q->count, of_k->count);
    }
    return SEBP_SUCCESS;
}

/* Rows of a bias: one for each query of the longest text, for each head or once. */
static sebp_status check_bias(const attention_call *work)
{
    const sebp_matrix *bias = work->attention.bias;
    if (bias == NULL)
        return SEBP_SUCCESS;
    const int64_t length = work->attention.q_sequences->max_length;
    const int64_t cols = work->attention.k_sequences->max_length;
    const int64_t heads = work->options.heads;
    int64_t all;
    if (__builtin_mul_overflow(heads, length, &all))
        all = -1;
    if (bias->cols == cols && (bias->rows == length || bias->rows == all))
        return SEBP_SUCCESS;
    return sebp_fail(
        work->call.context, SEBP_ERROR_SHAPE,
        "%s: bias is %" PRId64 "x%" PRId64 " but texts of at most %" PRId64 " queries and %" PRId64
        " keys have one of %" PRId64 " or %" PRId64 " times %" PRId64 " rows",
        work->call.function, bias->rows, bias->cols, length, cols, length, heads, length);
}

static sebp_status check_dtypes(const attention_call *work)
{
    static const int same[] = {K, V, OUT, DOUT, DQ, DK, DV}, f32[] = {BIAS, LSE, DBIAS};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        sebp_status status =
            sebp_check_same_dtype(&work->call, &work->arguments[same[i]], &work->arguments[Q]);
        if (status != SEBP_SUCCESS)
            return status;
    }
    for (size_t i = 0; i < sizeof f32 / sizeof *f32; i++) {
        const sebp_argument *argument = &work->arguments[f32[i]];
        if (argument->view != NULL && argument->view->dtype != SEBP_F32) {
            return sebp_fail(work->call.context, SEBP_ERROR_DTYPE, "%s: %s is %s, not f32",
                             work->call.function, argument->name,
                             sebp_dtype_name(argument->view->dtype));
        }
    }
    return SEBP_SUCCESS;
}

static sebp_status check_shapes(const attention_call *work)
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
        sebp_status status = sebp_check_shape(&work->call, &work->arguments[shapes[i].which],
                                              shapes[i].rows, shapes[i].cols);
        if (status != SEBP_SUCCESS)
            return status;
    }
    return SEBP_SUCCESS;
}

/* Checks everything but NULL, and settles work->attention. */
static sebp_status settle(attention_call *work, const sebp_attention_options *given,
                          const sebp_sequences *q_sequences, const sebp_sequences *k_sequences)
{
    enum { FIRST_BYTES = SEBP_SIZE_THROUGH(sebp_attention_options, inactive) };
    sebp_attention_options *o = &work->options;
    sebp_argument *arguments = work->arguments;
    sebp_status status = sebp_take_any_options(&work->call, given, FIRST_BYTES, o, sizeof *o);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&work->call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = check_dtypes(work);
    if (status == SEBP_SUCCESS)
        status = check_options(work);
    if (status == SEBP_SUCCESS)
        status = check_head_size(work);
    if (status != SEBP_SUCCESS)
        return status;
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
    status = check_sequences(work);
    if (status == SEBP_SUCCESS)
        status = check_shapes(work);
    if (status == SEBP_SUCCESS)
        status = check_bias(work);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&work->call, arguments, COUNT);
    return status;
}

static sebp_status no_scratch(const sebp_call *call, sebp_status status)
{
    if (status == SEBP_SUCCESS)
        return status;
    return sebp_fail(call->context, status, "%s: no scratch memory", call->function);
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
    if (q == NULL || k == NULL || v == NULL || q_sequences == NULL || out == NULL) {
        return sebp_missing(&work.call, q == NULL             ? "q"
                                        : k == NULL           ? "k"
                                        : v == NULL           ? "v"
                                        : q_sequences == NULL ? "q_sequences"
                                                              : "out");
    }
    sebp_status status = settle(&work, options, q_sequences, k_sequences);
    if (status != SEBP_SUCCESS)
        return status;
    return no_scratch(&work.call,
                      context->backend->attention_forward(context->device, &work.attention));
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
        if (work.arguments[i].view == NULL && (i != BIAS || dbias != NULL))
            return sebp_missing(&work.call, work.arguments[i].name);
    }
    if (q_sequences == NULL)
        return sebp_missing(&work.call, "q_sequences");
    sebp_status status = settle(&work, options, q_sequences, k_sequences);
    if (status != SEBP_SUCCESS)
        return status;
    return no_scratch(&work.call,
                      context->backend->attention_backward(context->device, &work.attention));
}
