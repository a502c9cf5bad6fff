/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file method_layers.c
 * The forward and the backward of a layer in each method.
 */
#include <math.h>

#include "programs/method_layers.h"
#include "programs/report.h"

static sebp_status lora_forward(struct adapter *adapter, sebp_context *context,
                                const sebp_rows *rows, const sebp_linear_options *options,
                                const sebp_matrix *x, const sebp_matrix *w, const sebp_matrix *bias,
                                const sebp_matrix *y)
{
    const struct layer *layer = (const struct layer *)adapter;
    sebp_matrix a = value_of(&layer->a), b = value_of(&layer->b);
    sebp_matrix h = sebp_matrix_f32(layer->h, sebp_rows_count(rows), layer->a.cols);
    return sebp_lora_forward(context, x, w, bias, &a, &b, lora_scale, rows, options, &h, y);
}

static sebp_status lora_backward(struct adapter *adapter, sebp_context *context,
                                 const sebp_rows *rows, const sebp_linear_options *options,
                                 const sebp_matrix *dy, const sebp_matrix *x, const sebp_matrix *w,
                                 const sebp_matrix *dx, const sebp_matrix *dbias)
{
    const struct layer *layer = (const struct layer *)adapter;
    const int64_t m = sebp_rows_count(rows), rank = layer->a.cols;
    sebp_matrix a = value_of(&layer->a), da = gradient_of(&layer->a);
    sebp_matrix b = value_of(&layer->b), db = gradient_of(&layer->b);
    sebp_matrix h = sebp_matrix_f32(layer->h, m, rank);
    sebp_matrix dh = sebp_matrix_f32(layer->trainer->r, m, rank);
    sebp_status status =
        sebp_linear_backward(context, dy, NULL, NULL, rows, options, NULL, NULL, dbias);
    if (status != SEBP_SUCCESS) {
        return status;
    }
    return sebp_lora_backward(context, dy, x, w, &a, &b, &h, lora_scale, rows, options, &dh, dx,
                              &da, &db);
}

/** The elements of the layer's gradient that are kept: of dW for a mask and MeProp, else of R. */
static sebp_status keep_elements(const struct layer *layer, sebp_context *context,
                                 const sebp_rows *rows, const sebp_matrix *dy, const sebp_matrix *x)
{
    const struct trainer *trainer = layer->trainer;
    const sebp_sparse *kept = &layer->gradient;
    if (trainer->settings.method == MASK) {
        return sebp_sampled_product(context, dy, x, rows, NULL, kept);
    }
    if (trainer->settings.method == MEPROP) {
        return sebp_meprop_gradient(context, dy, x, rows, NULL, kept);
    }
    const sebp_basis *basis = trainer->bases[layer->kind];
    if (sebp_sparse_adamw_support(layer->state) != NULL) {
        return sebp_sparsegrad_kept(context, basis, dy, x, rows, NULL, SEBP_ROTATE_AUTO, kept);
    }
    sebp_matrix r = sebp_matrix_f32(trainer->r, kept->rows, kept->cols);
    sebp_status status =
        sebp_sparsegrad_gradient(context, basis, dy, x, rows, NULL, SEBP_ROTATE_AUTO, &r);
    return status == SEBP_SUCCESS ? sebp_sparse_top(context, &r, kept) : status;
}

static sebp_status sparse_backward(struct adapter *adapter, sebp_context *context,
                                   const sebp_rows *rows, const sebp_linear_options *options,
                                   const sebp_matrix *dy, const sebp_matrix *x,
                                   const sebp_matrix *w, const sebp_matrix *dx,
                                   const sebp_matrix *db)
{
    const struct layer *layer = (const struct layer *)adapter;
    sebp_status status = keep_elements(layer, context, rows, dy, x);
    if (status == SEBP_ERROR_NONFINITE) {
        layer->trainer->refused = layer;
    }
    if (status != SEBP_SUCCESS) {
        return status;
    }
    return sebp_linear_backward(context, dy, NULL, w, rows, options, dx, NULL, db);
}

static void make_factor(struct pool *pool, int64_t rows, int64_t cols, struct tensor *factor)
{
    *factor = (struct tensor){.rows = rows, .cols = cols, .decays = true};
    factor->value = floats(pool, rows * cols);
    factor->gradient = floats(pool, rows * cols);
    factor->moment1 = floats(pool, rows * cols);
    factor->moment2 = floats(pool, rows * cols);
}

void begin_lora(struct layer *layer, uint64_t *random)
{
    struct trainer *trainer = layer->trainer;
    const struct tensor *w = layer->linear->weight;
    const int64_t N = w->rows, K = w->cols, r = trainer->settings.rank;
    make_factor(&trainer->pool, K, r, &layer->a);
    make_factor(&trainer->pool, r, N, &layer->b);
    layer->h =
        floats(&trainer->pool, trainer->model->shape.batch * trainer->model->shape.length * r);
    for (int64_t i = 0; i < K * r && !trainer->pool.failed; i++) {
        layer->a.value[i] = random_normal(random) / sqrtf(3.0f * (float)K);
    }
    layer->adapter = (struct adapter){lora_forward, lora_backward};
}

static int64_t kept_count(const struct layer *layer)
{
    const struct tensor *w = layer->linear->weight;
    return layer->trainer->settings.rank * (w->rows + w->cols);
}

int begin_mask(struct layer *layer, uint64_t *random)
{
    const struct tensor *w = layer->linear->weight;
    const int64_t elements = w->rows * w->cols, k = kept_count(layer);
    struct pool drawing = {0};
    int64_t *indices = allocate(&drawing, k, sizeof *indices);
    layer->gradient = (sebp_sparse){NULL, floats(&layer->trainer->pool, k), k, w->rows, w->cols};
    int64_t drawn = 0;
    for (int64_t i = 0; i < elements && indices != NULL;
         i++) { /* each set is as likely as any other */
        if (random_below(random, elements - i) < k - drawn) {
            indices[drawn++] = i;
        }
    }
    sebp_status status = SEBP_ERROR_MEMORY;
    if (indices != NULL) {
        status = sebp_sparse_adamw_create(w->rows, w->cols, indices, k, &layer->state);
    }
    pool_free(&drawing);
    if (layer->trainer->pool.failed || status != SEBP_SUCCESS) {
        return complain(FAILED, "out of memory for the elements that train");
    }
    layer->gradient.indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(layer->state);
    layer->adapter = (struct adapter){NULL, sparse_backward};
    return OK;
}

int begin_sparse(struct layer *layer, int64_t rows, int64_t cols)
{
    struct trainer *trainer = layer->trainer;
    const int64_t k = kept_count(layer);
    layer->gradient = (sebp_sparse){allocate(&layer->indices, k, sizeof(int64_t)),
                                    floats(&trainer->pool, k), k, rows, cols};
    sebp_status status = sebp_sparse_adamw_create(rows, cols, NULL, 0, &layer->state);
    if (trainer->pool.failed || layer->indices.failed || status != SEBP_SUCCESS) {
        return complain(FAILED, "out of memory for the elements that train");
    }
    layer->adapter = (struct adapter){NULL, sparse_backward};
    return OK;
}

void begin_dense(struct layer *layer)
{
    struct pool *pool = &layer->trainer->dense;
    struct tensor *w = layer->linear->weight;
    w->gradient = floats(pool, w->rows * w->cols);
    w->moment1 = floats(pool, w->rows * w->cols);
    w->moment2 = floats(pool, w->rows * w->cols);
}

int complain_about(const struct trainer *trainer, sebp_status status, const char *what)
{
    return complain(FAILED, "%s: %s: %s", what, sebp_status_string(status),
                    sebp_context_message(trainer->model->engine.context));
}

void destroy_sums(struct trainer *trainer)
{
    for (int kind = 0; kind < 2; kind++) {
        sebp_basis_sums_destroy(trainer->sums[kind]);
        trainer->sums[kind] = NULL;
    }
}
