/* SPDX-License-Identifier: Apache-2.0 */
/** @file loss.c Softmax cross-entropy of logits, and of hidden states with the head's weight. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "integers.h"
#include "layers.h"

enum {
    MIN_CHUNK = 16,  /* classes */
    CHUNK_UNIT = 64, /* chunks larger than this are multiples of it */
    ALIGNMENT = 64   /* bytes, of what lies in scratch memory */
};

/* ---- what both losses share ---- */

static sebp_status take_options(const sebp_call *call, const sebp_cross_entropy_options *given,
                                sebp_cross_entropy_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_cross_entropy_options, dbias_write) };
    *taken = (sebp_cross_entropy_options)SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    return sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

static sebp_status check_options(sebp_call *call, const sebp_cross_entropy_options *options)
{
    sebp_status status;
    call->options.inactive = options->inactive;
    if (!(options->smoothing >= 0 && options->smoothing <= 1)) {
        return sebp_fail(call->context, SEBP_ERROR_VALUE,
                         "%s: options->smoothing is %g, not in [0, 1]", call->function,
                         options->smoothing);
    }
    if ((status = sebp_check_option(call, "scale", options->scale, -DBL_MAX, DBL_MAX)) ||
        (status = sebp_check_inactive(call)) ||
        (status = sebp_check_write(call, "dhidden_write", options->dhidden_write)) ||
        (status = sebp_check_write(call, "dweight_write", options->dweight_write)) ||
        (status = sebp_check_write(call, "dbias_write", options->dbias_write))) {
        return status;
    }
    return SEBP_SUCCESS;
}

/* Checks the labels of M rows and counts those that count. */
static sebp_status count_labels(const sebp_call *call, const int64_t *labels, int64_t rows,
                                int64_t classes, int64_t ignore_label, int64_t *count)
{
    *count = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (labels[i] == ignore_label) {
            continue;
        }
        if (labels[i] < 0 || labels[i] >= classes) {
            return sebp_fail(call->context, SEBP_ERROR_VALUE,
                             "%s: labels[%" PRId64 "] is %" PRId64 ", not in [0, %" PRId64 ")",
                             call->function, i, labels[i], classes);
        }
        ++*count;
    }
    return SEBP_SUCCESS;
}

static double scale_of(const sebp_cross_entropy_options *options, int64_t count)
{
    return options->scale != 0 ? options->scale : count > 0 ? 1 / (double)count : 0;
}

/* The loss of the rows whose state is known, in their order. */
static double loss_of(const sebp_cross_entropy_work *work)
{
    const double smoothing = work->smoothing;
    double total = 0;
    for (int64_t i = 0; i < work->list.count; i++) {
        const sebp_softmax_state *state = &work->state[i];
        int64_t row = work->list.rows != NULL ? work->list.rows[i] : i;
        if (work->labels[row] == work->ignore_label) {
            continue;
        }
        double loss = state->max + log(state->exp_sum);
        /* A factor of 0 takes an Inf away. */
        loss -= smoothing < 1 ? (1 - smoothing) * state->label : 0;
        loss -= smoothing > 0 ? smoothing / (double)work->classes * state->sum : 0;
        total += loss;
    }
    return work->scale * total;
}

static sebp_status no_memory(const sebp_call *call, int64_t rows)
{
    return sebp_fail(call->context, SEBP_ERROR_MEMORY,
                     "%s: no scratch memory for the loss of %" PRId64 " rows", call->function,
                     rows);
}

/* ---- logits ---- */

sebp_status sebp_cross_entropy(sebp_context *context, const sebp_matrix *logits,
                               const int64_t *labels, const sebp_cross_entropy_options *given,
                               double *loss, const sebp_matrix *dlogits)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { LOGITS, DLOGITS, COUNT };
    const sebp_argument arguments[COUNT] = {{"logits", logits, false}, {"dlogits", dlogits, true}};
    const unsigned may_be[COUNT] = {[DLOGITS] = 1U << LOGITS};
    sebp_call call = sebp_call_begin(context, "sebp_cross_entropy");
    const sebp_backend *backend = context->backend;
    sebp_cross_entropy_options options;
    sebp_status status;
    int64_t count;

    if (logits == NULL || loss == NULL || (labels == NULL && logits->rows > 0)) {
        return sebp_missing(&call, logits == NULL ? "logits" : loss == NULL ? "loss" : "labels");
    }
    if ((status = take_options(&call, given, &options)) ||
        (status = sebp_check_views(&call, arguments, COUNT)) ||
        (status = sebp_check_same_dtype(&call, &arguments[DLOGITS], &arguments[LOGITS])) ||
        (status = check_options(&call, &options)) ||
        (status = count_labels(&call, labels, logits->rows, logits->cols, options.ignore_label,
                               &count)) ||
        (status = sebp_check_shape(&call, &arguments[DLOGITS], logits->rows, logits->cols)) ||
        (status = sebp_check_in_place(&call, arguments, COUNT, may_be))) {
        return status;
    }
    call.m = count;
    const int64_t state_bytes = logits->rows * (int64_t)sizeof(sebp_softmax_state);
    if (logits->rows > INT64_MAX / (int64_t)sizeof(sebp_softmax_state) ||
        backend->set_aside(context->device, state_bytes) != SEBP_SUCCESS) {
        return no_memory(&call, logits->rows);
    }
    const sebp_cross_entropy_work work = {.list = {NULL, logits->rows},
                                          .labels = labels,
                                          .ignore_label = options.ignore_label,
                                          .smoothing = options.smoothing,
                                          .scale = scale_of(&options, count),
                                          .classes = logits->cols,
                                          .state = backend->aside(context->device),
                                          .logits = logits,
                                          .look = true,
                                          .dlogits = dlogits};
    status = sebp_check_done(&call, backend->cross_entropy(context->device, &work));
    if (status == SEBP_SUCCESS) {
        *loss = loss_of(&work);
        sebp_report_rows(&call, logits);
    }
    backend->set_aside(context->device, 0);
    return status;
}

/* ---- hidden states and the head ---- */

typedef struct head {
    sebp_call *call;
    const sebp_cross_entropy_options *options;
    const sebp_matrix *hidden, *weight, *bias, *dhidden, *dweight, *dbias;
    int64_t classes, chunk;       /* V; classes of a chunk */
    sebp_matrix logits, gradient; /* m x chunk, in scratch memory; the gradient of hidden's dtype */
    sebp_cross_entropy_work entropy;
} head;

/* The products of a chunk; those that are not wanted have m = 0. */
typedef struct chunk_products {
    sebp_product logits, dhidden, dweight;
} chunk_products;

static bool wants_gradient(const head *head)
{
    return head->dhidden != NULL || head->dweight != NULL || head->dbias != NULL;
}

static const void *row_of(const sebp_matrix *matrix, int64_t row)
{
    return (const char *)matrix->data +
           row * matrix->stride * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

static const void *col_of(const sebp_matrix *matrix, int64_t col)
{
    return (const char *)matrix->data + col * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

static sebp_matrix cols_of(const sebp_matrix *matrix, int64_t first, int64_t cols)
{
    sebp_matrix part = *matrix;
    part.data = (void *)(uintptr_t)col_of(matrix, first);
    part.cols = cols;
    return part;
}

static chunk_products describe(const head *head, int64_t first)
{
    const sebp_call *call = head->call;
    const int64_t m = call->m, k = head->hidden->cols;
    const int64_t classes = sebp_min(head->chunk, head->classes - first);
    const sebp_dtype dtype = head->hidden->dtype;
    chunk_products to = {.logits = {.m = 0}};
    sebp_operand weight = {row_of(head->weight, first), head->weight->stride, NULL, true};

    /* logits = H[R] W_c^T + b_c:  m x c = (m x K) (c x K)^T */
    to.logits = (sebp_product){.m = m, .n = classes, .k = k, .dtype = dtype};
    to.logits.a = sebp_active_operand(call, head->hidden, false);
    to.logits.b = weight;
    sebp_to_whole(&head->logits, &to.logits);
    if (head->bias != NULL) {
        to.logits.bias = col_of(head->bias, first);
        to.logits.bias_dtype = head->bias->dtype;
    }
    /* dH[R] (+)= G W_c:  m x K = (m x c) (c x K) */
    if (head->dhidden != NULL) {
        to.dhidden = (sebp_product){.m = m, .n = k, .k = classes, .dtype = dtype};
        to.dhidden.a = sebp_whole_operand(&head->gradient, false);
        weight.transposed = false;
        to.dhidden.b = weight;
        to.dhidden.accumulate = first > 0 || head->options->dhidden_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, head->dhidden, &to.dhidden);
    }
    /* dW_c (+)= G^T H[R]:  c x K = (m x c)^T (m x K) */
    if (head->dweight != NULL) {
        to.dweight = (sebp_product){.m = classes, .n = k, .k = m, .dtype = dtype};
        to.dweight.a = sebp_whole_operand(&head->gradient, true);
        to.dweight.b = sebp_active_operand(call, head->hidden, false);
        to.dweight.accumulate = head->options->dweight_write == SEBP_ACCUMULATE;
        sebp_to_whole(head->dweight, &to.dweight);
        to.dweight.c = (void *)(uintptr_t)row_of(head->dweight, first);
    }
    return to;
}

static sebp_status reserve(const head *head, int64_t first)
{
    const chunk_products to = describe(head, first);
    sebp_status status = sebp_reserve(head->call, &to.logits);
    if (status == SEBP_SUCCESS && head->dhidden != NULL) {
        status = sebp_reserve(head->call, &to.dhidden);
    }
    if (status == SEBP_SUCCESS && head->dweight != NULL) {
        status = sebp_reserve(head->call, &to.dweight);
    }
    return status;
}

/* The chunk's logits, looked at for the loss. */
static sebp_status look(head *head, int64_t first, bool look, const char **path)
{
    const chunk_products to = describe(head, first);
    sebp_context *context = head->call->context;
    sebp_status status = sebp_run(head->call, &to.logits, path);
    if (status == SEBP_SUCCESS && look) {
        const sebp_matrix logits = cols_of(&head->logits, 0, to.logits.n);
        sebp_cross_entropy_work work = head->entropy;
        work.logits = &logits;
        work.first_class = first;
        work.look = true;
        status =
            sebp_check_done(head->call, context->backend->cross_entropy(context->device, &work));
    }
    return status;
}

/* What the chunk's logits, which lie there, give to the gradients. */
static sebp_status take_gradient(head *head, int64_t first, const char **path)
{
    const chunk_products to = describe(head, first);
    sebp_context *context = head->call->context;
    const sebp_matrix logits = cols_of(&head->logits, 0, to.logits.n);
    const sebp_matrix gradient = cols_of(&head->gradient, 0, to.logits.n);
    sebp_cross_entropy_work work = head->entropy;
    work.logits = &logits;
    work.first_class = first;
    work.dlogits = &gradient;
    sebp_status status =
        sebp_check_done(head->call, context->backend->cross_entropy(context->device, &work));
    if (status == SEBP_SUCCESS && head->dhidden != NULL) {
        status = sebp_run(head->call, &to.dhidden, &path[0]);
    }
    if (status == SEBP_SUCCESS && head->dweight != NULL) {
        status = sebp_run(head->call, &to.dweight, &path[1]);
    }
    if (status == SEBP_SUCCESS && head->dbias != NULL) {
        const sebp_matrix dbias = cols_of(head->dbias, first, to.logits.n);
        context->backend->sum_rows(context->device, &gradient, NULL, head->call->m, &dbias,
                                   head->options->dbias_write == SEBP_ACCUMULATE);
    }
    return status;
}

/* Cuts scratch memory into the rows' states, the logits and, where they are not of its dtype, the
 * gradient; settles the size of a chunk. */
static sebp_status lay_out(head *head)
{
    sebp_context *context = head->call->context;
    const sebp_backend *backend = context->backend;
    const int64_t m = head->call->m, room = backend->set_aside_max(context->device);
    const bool apart = wants_gradient(head) && head->hidden->dtype == SEBP_BF16;
    const int64_t class_bytes = m * (int64_t)(sizeof(float) + (apart ? sizeof(uint16_t) : 0));
    const int64_t state_bytes = sebp_round_up(m * (int64_t)sizeof(sebp_softmax_state), ALIGNMENT);
    int64_t chunk =
        class_bytes > 0 ? (room - state_bytes - 2 * ALIGNMENT) / class_bytes : head->classes;
    chunk = chunk > CHUNK_UNIT ? chunk / CHUNK_UNIT * CHUNK_UNIT : chunk;
    chunk = sebp_min(chunk, head->classes);
    if (chunk < sebp_min(MIN_CHUNK, head->classes)) {
        return no_memory(head->call, m);
    }
    head->chunk = sebp_max(chunk, 1);
    const int64_t logits_bytes = sebp_round_up(m * head->chunk * (int64_t)sizeof(float), ALIGNMENT);
    const int64_t gradient_bytes = apart ? m * head->chunk * (int64_t)sizeof(uint16_t) : 0;
    if (backend->set_aside(context->device, state_bytes + logits_bytes + gradient_bytes) !=
        SEBP_SUCCESS) {
        return no_memory(head->call, m);
    }
    head->logits = (sebp_matrix){NULL, m, head->chunk, head->chunk, SEBP_F32};
    head->gradient = head->logits;
    head->gradient.dtype = head->hidden->dtype;
    /* All that can fail for want of memory; only then is the address settled. */
    const int64_t chunks = sebp_div_ceil(head->classes, head->chunk);
    sebp_status status = reserve(head, 0);
    if (status == SEBP_SUCCESS && chunks > 1) {
        status = reserve(head, (chunks - 1) * head->chunk);
    }
    char *memory = backend->aside(context->device);
    head->entropy.state = (sebp_softmax_state *)(void *)memory;
    head->logits.data = memory + state_bytes;
    head->gradient.data = memory + state_bytes + (apart ? logits_bytes : 0);
    return status;
}

static sebp_status run_head(head *head, double *loss)
{
    sebp_call *call = head->call;
    const char *paths[] = {NULL, NULL, NULL, NULL};
    const bool one = head->chunk >= head->classes;
    sebp_status status = SEBP_SUCCESS;
    for (int64_t first = 0; first < head->classes && status == SEBP_SUCCESS; first += head->chunk) {
        status = look(head, first, true, &paths[0]);
    }
    const double found = status == SEBP_SUCCESS ? loss_of(&head->entropy) : 0;
    for (int64_t first = 0; wants_gradient(head) && first < head->classes && status == SEBP_SUCCESS;
         first += head->chunk) {
        if (!one) {
            status = look(head, first, false, &paths[0]);
        }
        if (status == SEBP_SUCCESS) {
            status = take_gradient(head, first, &paths[1]);
        }
    }
    if (status != SEBP_SUCCESS) {
        return status;
    }
    if (head->dhidden != NULL && head->options->dhidden_write == SEBP_OVERWRITE) {
        sebp_zero_inactive(call, head->dhidden);
    }
    *loss = found;
    if (paths[1] == NULL) {
        paths[1] = paths[2];
        paths[2] = NULL;
    }
    sebp_report(call, head->hidden->rows, head->hidden->cols, head->classes, head->hidden->dtype,
                paths);
    return SEBP_SUCCESS;
}

/* The labelled rows, as a set. */
static sebp_status find_labelled(sebp_call *call, const int64_t *labels, int64_t rows,
                                 int64_t ignore_label, int64_t count)
{
    int64_t *indices = malloc((size_t)sebp_max(count, 1) * sizeof *indices);
    if (indices == NULL) {
        return no_memory(call, rows);
    }
    int64_t found = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (labels[i] != ignore_label) {
            indices[found++] = i;
        }
    }
    sebp_status status = sebp_rows_from_indices(indices, found, rows, &call->found);
    free(indices);
    if (status != SEBP_SUCCESS) {
        return no_memory(call, rows);
    }
    call->rows = call->found;
    call->m = found;
    return SEBP_SUCCESS;
}

sebp_status sebp_linear_cross_entropy(sebp_context *context, const sebp_matrix *hidden,
                                      const sebp_matrix *weight, const sebp_matrix *bias,
                                      const int64_t *labels,
                                      const sebp_cross_entropy_options *given, double *loss,
                                      const sebp_matrix *dhidden, const sebp_matrix *dweight,
                                      const sebp_matrix *dbias)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { HIDDEN, WEIGHT, BIAS, DHIDDEN, DWEIGHT, DBIAS, COUNT };
    const sebp_argument arguments[COUNT] = {{"hidden", hidden, false},  {"weight", weight, false},
                                            {"bias", bias, false},      {"dhidden", dhidden, true},
                                            {"dweight", dweight, true}, {"dbias", dbias, true}};
    sebp_call call = sebp_call_begin(context, "sebp_linear_cross_entropy");
    sebp_cross_entropy_options options;
    sebp_status status;
    int64_t count;

    if (hidden == NULL || weight == NULL || loss == NULL || (labels == NULL && hidden->rows > 0)) {
        return sebp_missing(&call, hidden == NULL   ? "hidden"
                                   : weight == NULL ? "weight"
                                   : loss == NULL   ? "loss"
                                                    : "labels");
    }
    if ((status = take_options(&call, given, &options)) ||
        (status = sebp_check_views(&call, arguments, COUNT)) ||
        (status = sebp_check_same_dtype(&call, &arguments[WEIGHT], &arguments[HIDDEN])) ||
        (status = check_options(&call, &options)) ||
        (status = count_labels(&call, labels, hidden->rows, weight->rows, options.ignore_label,
                               &count)) ||
        (status = sebp_check_shape(&call, &arguments[WEIGHT], weight->rows, hidden->cols)) ||
        (status = sebp_check_shape(&call, &arguments[BIAS], 1, weight->rows)) ||
        (status = sebp_check_shape(&call, &arguments[DHIDDEN], hidden->rows, hidden->cols)) ||
        (status = sebp_check_shape(&call, &arguments[DWEIGHT], weight->rows, hidden->cols)) ||
        (status = sebp_check_shape(&call, &arguments[DBIAS], 1, weight->rows)) ||
        (status = sebp_check_aliases(&call, arguments, COUNT)) ||
        (status = find_labelled(&call, labels, hidden->rows, options.ignore_label, count))) {
        return status;
    }
    head head = {.call = &call,
                 .options = &options,
                 .hidden = hidden,
                 .weight = weight,
                 .bias = bias,
                 .dhidden = dhidden,
                 .dweight = dweight,
                 .dbias = dbias,
                 .classes = weight->rows,
                 .entropy = {.list = {call.rows->indices, call.m},
                             .labels = labels,
                             .ignore_label = options.ignore_label,
                             .smoothing = options.smoothing,
                             .scale = scale_of(&options, count),
                             .classes = weight->rows}};
    status = lay_out(&head);
    if (status == SEBP_SUCCESS) {
        status = run_head(&head, loss);
    }
    context->backend->set_aside(context->device, 0);
    sebp_call_end(&call);
    return status;
}
