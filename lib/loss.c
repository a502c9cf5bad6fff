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
#include "layer_call.h"

enum {
    MIN_CHUNK = 16,  /* classes */
    CHUNK_UNIT = 64, /* chunks larger than this are multiples of it */
    ALIGNMENT = 64   /* bytes, of what lies in scratch memory */
};

/* ---- what both losses share ---- */

static void take_options(sebp_call *call, const sebp_cross_entropy_options *given,
                         sebp_cross_entropy_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_cross_entropy_options, dbias_write) };
    *taken = (sebp_cross_entropy_options)SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

static void check_options(sebp_call *call, const sebp_cross_entropy_options *options)
{
    call->options.inactive = options->inactive;
    call->options.precision = options->precision;
    if (!(options->smoothing >= 0 && options->smoothing <= 1)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->smoothing is %g, not in [0, 1]",
                       options->smoothing);
    }
    sebp_check_option(call, "scale", options->scale, -DBL_MAX, DBL_MAX);
    sebp_check_inactive(call);
    sebp_check_write(call, "dhidden_write", options->dhidden_write);
    sebp_check_write(call, "dweight_write", options->dweight_write);
    sebp_check_write(call, "dbias_write", options->dbias_write);
    sebp_check_precision(call);
}

/* Checks the labels of M rows, which the call can read, and counts those that count. */
static int64_t count_labels(sebp_call *call, const int64_t *labels, int64_t rows, int64_t classes,
                            int64_t ignore_label)
{
    int64_t count = 0;
    for (int64_t i = 0; i < rows && sebp_call_goes_on(call); i++) {
        if (labels[i] == ignore_label)
            continue;
        count++;
        if (labels[i] < 0 || labels[i] >= classes) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "labels[%" PRId64 "] is %" PRId64 ", not in [0, %" PRId64 ")", i,
                           labels[i], classes);
        }
    }
    return count;
}

static double scale_of(const sebp_cross_entropy_options *options, int64_t count)
{
    return options->scale != 0 ? options->scale : count > 0 ? 1 / (double)count : 0;
}

/* The loss of the rows whose state is known. */
static void take_loss(sebp_call *call, const sebp_cross_entropy_work *work, double *loss)
{
    double found;
    if (!sebp_call_goes_on(call))
        return;
    sebp_call_keep(call, call->backend->sum_losses(call->device, work, &found), "the loss");
    if (sebp_call_goes_on(call))
        *loss = found;
}

/* Scratch memory for the loss of so many rows; bytes < 0: more than there can be. */
static void reserve(sebp_call *call, int64_t bytes, int64_t rows)
{
    sebp_status status =
        bytes < 0 ? SEBP_ERROR_MEMORY : call->backend->reserve_scratch(call->device, bytes);
    if (status == SEBP_ERROR_MEMORY) {
        sebp_call_fail(call, status, "no scratch memory for the loss of %" PRId64 " rows", rows);
    }
    sebp_call_keep(call, status, "reserving scratch memory");
}

/* ---- logits ---- */

sebp_status sebp_cross_entropy(sebp_context *context, const sebp_matrix *logits,
                               const int64_t *labels, const sebp_cross_entropy_options *given,
                               double *loss, const sebp_matrix *dlogits)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    enum { LOGITS, DLOGITS, COUNT };
    const sebp_argument arguments[COUNT] = {{"logits", logits, false}, {"dlogits", dlogits, true}};
    const unsigned may_be[COUNT] = {[DLOGITS] = 1U << LOGITS};
    sebp_call call = sebp_call_begin(context, "sebp_cross_entropy");
    const sebp_backend *backend = call.backend;
    sebp_cross_entropy_options options;

    if (!sebp_require(&call, "logits", logits) || !sebp_require(&call, "loss", loss) ||
        (logits->rows > 0 && !sebp_require(&call, "labels", labels))) {
        return call.status;
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[DLOGITS], &arguments[LOGITS]);
    check_options(&call, &options);
    const int64_t *read = sebp_list_to_host(&call, "labels", labels, logits->rows);
    call.m = count_labels(&call, read, logits->rows, logits->cols, options.ignore_label);
    sebp_check_shape(&call, &arguments[DLOGITS], logits->rows, logits->cols);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call))
        return sebp_call_end(&call);
    const int64_t state_bytes = (int64_t)sizeof(sebp_softmax_state);
    reserve(&call, logits->rows > INT64_MAX / state_bytes ? -1 : logits->rows * state_bytes,
            logits->rows);
    if (!sebp_call_goes_on(&call))
        return sebp_call_end(&call);
    const sebp_cross_entropy_work work = {.list = {NULL, logits->rows},
                                          .labels = labels,
                                          .ignore_label = options.ignore_label,
                                          .smoothing = options.smoothing,
                                          .scale = scale_of(&options, call.m),
                                          .classes = logits->cols,
                                          .state = backend->scratch(call.device),
                                          .logits = logits,
                                          .look = true,
                                          .dlogits = dlogits};
    sebp_call_keep(&call, backend->cross_entropy(call.device, &work), "the loss");
    take_loss(&call, &work, loss);
    sebp_report_rows(&call, logits);
    sebp_reserve_scratch(&call, 0, "");
    return sebp_call_end(&call);
}

/* ---- hidden states and the head ---- */

typedef struct loss_head {
    sebp_call *call;
    const sebp_cross_entropy_options *options;
    const sebp_matrix *hidden, *weight, *bias, *dhidden, *dweight, *dbias;
    int64_t classes, chunk;       /* V; classes of a chunk */
    sebp_matrix logits, gradient; /* m x chunk, in scratch memory; the gradient of hidden's dtype */
    sebp_cross_entropy_work entropy;
} loss_head;

/* The products of a chunk; those that are not wanted have m = 0. */
typedef struct chunk_products {
    sebp_plan logits, dhidden, dweight;
} chunk_products;

static bool wants_gradient(const loss_head *head)
{
    return head->dhidden != NULL || head->dweight != NULL || head->dbias != NULL;
}

static void *element_at(const sebp_matrix *matrix, int64_t row, int64_t col)
{
    return (char *)matrix->data +
           (row * matrix->stride + col) * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

static sebp_matrix cols_of(const sebp_matrix *matrix, int64_t first, int64_t cols)
{
    sebp_matrix part = *matrix;
    part.data = element_at(matrix, 0, first);
    part.cols = cols;
    return part;
}

/* Plans the products of the chunk of classes from `first` on. */
static void plan_chunk(const loss_head *head, int64_t first, chunk_products *to)
{
    sebp_call *call = head->call;
    const int64_t m = call->m, k = head->hidden->cols;
    const int64_t classes = sebp_min(head->chunk, head->classes - first);
    sebp_operand weight = {element_at(head->weight, first, 0), head->weight->stride, NULL, true,
                           head->weight->dtype};

    /* logits = H[R] W_c^T + b_c:  m x c = (m x K) (c x K)^T */
    to->logits.product = (sebp_product){.m = m, .n = classes, .k = k};
    to->logits.product.a = sebp_active_operand(call, head->hidden, false);
    to->logits.product.b = weight;
    sebp_to_whole(&head->logits, &to->logits.product);
    if (head->bias != NULL) {
        to->logits.product.bias = element_at(head->bias, 0, first);
        to->logits.product.bias_dtype = head->bias->dtype;
    }
    sebp_plan_product(call, &to->logits);
    /* dH[R] (+)= G W_c:  m x K = (m x c) (c x K) */
    if (head->dhidden != NULL) {
        to->dhidden.product = (sebp_product){.m = m, .n = k, .k = classes};
        to->dhidden.product.a = sebp_whole_operand(&head->gradient, false);
        weight.transposed = false;
        to->dhidden.product.b = weight;
        to->dhidden.product.accumulate =
            first > 0 || head->options->dhidden_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, head->dhidden, &to->dhidden.product);
        sebp_plan_product(call, &to->dhidden);
    }
    /* dW_c (+)= G^T H[R]:  c x K = (m x c)^T (m x K) */
    if (head->dweight != NULL) {
        to->dweight.product = (sebp_product){.m = classes, .n = k, .k = m};
        to->dweight.product.a = sebp_whole_operand(&head->gradient, true);
        to->dweight.product.b = sebp_active_operand(call, head->hidden, false);
        to->dweight.product.accumulate = head->options->dweight_write == SEBP_ACCUMULATE;
        sebp_to_whole(head->dweight, &to->dweight.product);
        to->dweight.product.c = element_at(head->dweight, first, 0);
        sebp_plan_product(call, &to->dweight);
    }
}

/* One chunk's logits, and of them the loss's state or the gradients, or both. */
static void run_chunk(loss_head *head, int64_t first, bool looks, bool has_logits,
                      bool takes_gradient, const char **paths)
{
    sebp_call *call = head->call;
    chunk_products to;
    plan_chunk(head, first, &to);
    if (!has_logits) {
        sebp_run_product(call, &to.logits);
        paths[0] = to.logits.path;
    }
    if (!sebp_call_goes_on(call))
        return;
    const sebp_matrix logits = cols_of(&head->logits, 0, to.logits.product.n);
    const sebp_matrix gradient = cols_of(&head->gradient, 0, to.logits.product.n);
    sebp_cross_entropy_work work = head->entropy;
    work.logits = &logits;
    work.first_class = first;
    work.look = looks;
    work.dlogits = takes_gradient ? &gradient : NULL;
    if (looks || takes_gradient)
        sebp_call_keep(call, call->backend->cross_entropy(call->device, &work), "the loss");
    if (!takes_gradient)
        return;
    if (head->dhidden != NULL) {
        sebp_run_product(call, &to.dhidden);
        paths[1] = to.dhidden.path;
    }
    if (head->dweight != NULL) {
        sebp_run_product(call, &to.dweight);
        paths[2] = to.dweight.path;
    }
    if (head->dbias != NULL && sebp_call_goes_on(call)) {
        const sebp_matrix dbias = cols_of(head->dbias, first, to.logits.product.n);
        sebp_status status = call->backend->sum_rows(call->device, &gradient, NULL, call->m, &dbias,
                                                     head->options->dbias_write == SEBP_ACCUMULATE);
        sebp_call_keep(call, status, "summing dbias");
    }
}

/* Cuts scratch memory into the rows' states, the logits and, where they are not of its dtype, the
 * gradient; settles the size of a chunk. */
static void lay_out(loss_head *head)
{
    sebp_call *call = head->call;
    const sebp_backend *backend = call->backend;
    const int64_t m = call->m, room = backend->max_scratch(call->device);
    const bool apart = wants_gradient(head) && head->hidden->dtype == SEBP_BF16;
    const int64_t class_bytes = m * (int64_t)(sizeof(float) + (apart ? sizeof(uint16_t) : 0));
    const int64_t state_bytes = sebp_round_up(m * (int64_t)sizeof(sebp_softmax_state), ALIGNMENT);
    int64_t chunk =
        class_bytes > 0 ? (room - state_bytes - 2 * ALIGNMENT) / class_bytes : head->classes;
    chunk = chunk > CHUNK_UNIT ? chunk / CHUNK_UNIT * CHUNK_UNIT : chunk;
    chunk = sebp_min(chunk, head->classes);
    head->chunk = sebp_max(chunk, 1);
    const int64_t logits_bytes = sebp_round_up(m * head->chunk * (int64_t)sizeof(float), ALIGNMENT);
    const int64_t gradient_bytes = apart ? m * head->chunk * (int64_t)sizeof(uint16_t) : 0;
    const int64_t bytes = state_bytes + logits_bytes + gradient_bytes;
    reserve(call, chunk < sebp_min(MIN_CHUNK, head->classes) ? -1 : bytes, m);
    if (!sebp_call_goes_on(call))
        return;
    head->logits = (sebp_matrix){NULL, m, head->chunk, head->chunk, SEBP_F32};
    head->gradient = head->logits;
    head->gradient.dtype = head->hidden->dtype;
    /* All that can fail for want of memory; only then is the address settled. */
    chunk_products unused;
    for (int pass = 0; pass < 2; pass++) {
        char *memory = backend->scratch(call->device);
        head->entropy.state = (sebp_softmax_state *)(void *)memory;
        head->logits.data = memory + state_bytes;
        head->gradient.data = memory + state_bytes + (apart ? logits_bytes : 0);
        if (pass == 0 && head->classes > 0) {
            plan_chunk(head, 0, &unused);
            /* What comes after the first adds to dhidden, which may take more. */
            if (head->chunk < head->classes) {
                plan_chunk(head, head->chunk, &unused);
            }
            plan_chunk(head, (head->classes - 1) / head->chunk * head->chunk, &unused);
        }
    }
}

static void run_head(loss_head *head, double *loss)
{
    sebp_call *call = head->call;
    const char *paths[] = {NULL, NULL, NULL, NULL};
    const bool one = head->chunk >= head->classes;
    for (int64_t first = 0; first < head->classes; first += head->chunk)
        run_chunk(head, first, true, false, false, paths);
    for (int64_t first = 0; wants_gradient(head) && first < head->classes; first += head->chunk)
        run_chunk(head, first, false, one, true, paths);
    if (head->dhidden != NULL && head->options->dhidden_write == SEBP_OVERWRITE)
        sebp_zero_inactive(call, head->dhidden);
    take_loss(call, &head->entropy, loss);
    if (paths[1] == NULL) {
        paths[1] = paths[2];
        paths[2] = NULL;
    }
    sebp_report(call, head->hidden->rows, head->hidden->cols, head->classes, head->hidden->dtype,
                paths);
}

/* Makes the labelled rows those of the call. */
static void find_labelled(sebp_call *call, const int64_t *labels, int64_t rows,
                          int64_t ignore_label, int64_t count)
{
    if (!sebp_call_goes_on(call))
        return;
    int64_t *indices = malloc((size_t)sebp_max(count, 1) * sizeof *indices);
    int64_t found = 0;
    for (int64_t i = 0; i < rows && indices != NULL; i++) {
        if (labels[i] != ignore_label)
            indices[found++] = i;
    }
    if (indices == NULL ||
        sebp_rows_from_indices(indices, found, rows, &call->found) != SEBP_SUCCESS) {
        sebp_call_fail(call, SEBP_ERROR_MEMORY,
                       "no memory for the list of labelled ones of %" PRId64 " rows", rows);
    }
    free(indices);
    if (sebp_call_goes_on(call))
        sebp_use_rows(call, call->found, rows);
}

sebp_status sebp_linear_cross_entropy(sebp_context *context, const sebp_matrix *hidden,
                                      const sebp_matrix *weight, const sebp_matrix *bias,
                                      const int64_t *labels,
                                      const sebp_cross_entropy_options *given, double *loss,
                                      const sebp_matrix *dhidden, const sebp_matrix *dweight,
                                      const sebp_matrix *dbias)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    enum { HIDDEN, WEIGHT, BIAS, DHIDDEN, DWEIGHT, DBIAS, COUNT };
    const sebp_argument arguments[COUNT] = {{"hidden", hidden, false},  {"weight", weight, false},
                                            {"bias", bias, false},      {"dhidden", dhidden, true},
                                            {"dweight", dweight, true}, {"dbias", dbias, true}};
    sebp_call call = sebp_call_begin(context, "sebp_linear_cross_entropy");
    sebp_cross_entropy_options options;

    if (!sebp_require_views(&call, arguments, BIAS) || !sebp_require(&call, "loss", loss) ||
        (hidden->rows > 0 && !sebp_require(&call, "labels", labels))) {
        return call.status;
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    check_options(&call, &options);
    const int64_t *read = sebp_list_to_host(&call, "labels", labels, hidden->rows);
    const int64_t count =
        count_labels(&call, read, hidden->rows, weight->rows, options.ignore_label);
    sebp_check_shape(&call, &arguments[WEIGHT], weight->rows, hidden->cols);
    sebp_check_shape(&call, &arguments[BIAS], 1, weight->rows);
    sebp_check_shape(&call, &arguments[DHIDDEN], hidden->rows, hidden->cols);
    sebp_check_shape(&call, &arguments[DWEIGHT], weight->rows, hidden->cols);
    sebp_check_shape(&call, &arguments[DBIAS], 1, weight->rows);
    sebp_check_aliases(&call, arguments, COUNT);
    find_labelled(&call, read, hidden->rows, options.ignore_label, count);
    if (!sebp_call_goes_on(&call))
        return sebp_call_end(&call);
    loss_head head = {.call = &call,
                      .options = &options,
                      .hidden = hidden,
                      .weight = weight,
                      .bias = bias,
                      .dhidden = dhidden,
                      .dweight = dweight,
                      .dbias = dbias,
                      .classes = weight->rows,
                      .entropy = {.list = sebp_list_of(&call),
                                  .labels = labels,
                                  .ignore_label = options.ignore_label,
                                  .smoothing = options.smoothing,
                                  .scale = scale_of(&options, count),
                                  .classes = weight->rows}};
    lay_out(&head);
    if (sebp_call_goes_on(&call))
        run_head(&head, loss);
    sebp_reserve_scratch(&call, 0, "");
    return sebp_call_end(&call);
}
