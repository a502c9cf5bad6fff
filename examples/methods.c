/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file methods.c
 * To be read from top to bottom: a layer of each method, its forward and backward; the basis phase;
 * the step; memory.
 */
#include <math.h>
#include <string.h>

#include "methods.h"

const char *const method_names[METHODS] = {"frozen",
                                           "full",
                                           "lora",
                                           "meprop",
                                           "sparsegrad",
                                           "sparsegrad-leading",
                                           "sparsegrad-leading-fixed"};

bool needs_bases(enum method method)
{
    return method >= SPARSEGRAD;
}

bool in_basis_phase(const struct settings *settings, int64_t step)
{
    return needs_bases(settings->method) && step < settings->basis_steps;
}

int64_t trained_elements(const struct settings *settings, const struct shape *shape)
{
    const int64_t H = shape->hidden, F = 4 * H, layers = 2 * shape->layers;
    switch (settings->method) {
    case FROZEN:
        return 0;
    case FULL:
        return layers * H * F;
    default:
        return layers * settings->rank * (H + F);
    }
}

/* ---- layers ---- */

/** One of LoRA's factors. */
struct factor {
    int64_t rows, cols;
    float *value, *gradient, *moment1, *moment2; /* rows x cols each */
};

/** A feed-forward weight, N x K. */
struct layer {
    struct adapter adapter; /* first, as an adapter is cast to its layer */
    struct trainer *trainer;
    struct linear *linear;
    int kind; /* 0: up, 1: down */

    struct factor a, b; /* LoRA: K x r, r x N */
    float *h;           /* m x r, from the forward to the backward */

    sebp_sparse gradient;     /* k elements, of N x K or r_out x r_in */
    struct pool indices;      /* theirs, until the support is fixed */
    sebp_sparse_adamw *state; /* NULL: not in the sparse phase */
};

/** alpha is r, so that the scale alpha / r of the product is 1. */
static const double lora_scale = 1.0;

static sebp_matrix view(const float *data, const struct factor *factor)
{
    return sebp_matrix_f32(data, factor->rows, factor->cols);
}

static sebp_status lora_forward(struct adapter *adapter, sebp_context *context,
                                const sebp_rows *rows, const sebp_linear_options *options,
                                const sebp_matrix *x, const sebp_matrix *w, const sebp_matrix *bias,
                                const sebp_matrix *y)
{
    const struct layer *layer = (const struct layer *)adapter;
    sebp_matrix a = view(layer->a.value, &layer->a), b = view(layer->b.value, &layer->b);
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
    sebp_matrix a = view(layer->a.value, &layer->a), da = view(layer->a.gradient, &layer->a);
    sebp_matrix b = view(layer->b.value, &layer->b), db = view(layer->b.gradient, &layer->b);
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

/** The elements of the layer's gradient that are kept: of dW for MeProp, else of R. */
static sebp_status keep_elements(const struct layer *layer, sebp_context *context,
                                 const sebp_rows *rows, const sebp_matrix *dy, const sebp_matrix *x)
{
    const struct trainer *trainer = layer->trainer;
    const sebp_sparse *kept = &layer->gradient;
    if (trainer->settings.method == MEPROP) {
        return sebp_meprop_gradient(context, dy, x, rows, NULL, kept);
    }
    sebp_matrix r = sebp_matrix_f32(trainer->r, kept->rows, kept->cols);
    sebp_status status = sebp_sparsegrad_gradient(context, trainer->bases[layer->kind], dy, x, rows,
                                                  NULL, SEBP_ROTATE_AUTO, &r);
    if (status != SEBP_SUCCESS) {
        return status;
    }
    return sebp_sparse_adamw_support(layer->state) != NULL ? sebp_sparse_take(context, &r, kept)
                                                           : sebp_sparse_top(context, &r, kept);
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

static void make_factor(struct pool *pool, int64_t rows, int64_t cols, struct factor *factor)
{
    *factor = (struct factor){.rows = rows, .cols = cols};
    factor->value = floats(pool, rows * cols);
    factor->gradient = floats(pool, rows * cols);
    factor->moment1 = floats(pool, rows * cols);
    factor->moment2 = floats(pool, rows * cols);
}

/** A is random, with the variance of PyTorch's linear layers; B is zero. */
static void begin_lora(struct layer *layer, uint64_t *random)
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

/** From here on k elements of a gradient of rows x cols are kept. */
static int begin_sparse(struct layer *layer, int64_t rows, int64_t cols)
{
    struct trainer *trainer = layer->trainer;
    const struct tensor *w = layer->linear->weight;
    const int64_t k = trainer->settings.rank * (w->rows + w->cols);
    layer->gradient = (sebp_sparse){allocate(&layer->indices, k, sizeof(int64_t)),
                                    floats(&trainer->pool, k), k, rows, cols};
    sebp_status status = sebp_sparse_adamw_create(rows, cols, NULL, 0, &layer->state);
    if (trainer->pool.failed || layer->indices.failed || status != SEBP_SUCCESS) {
        return complain(FAILED, "out of memory for the elements that train");
    }
    layer->adapter = (struct adapter){NULL, sparse_backward};
    return OK;
}

/** From here on the layer trains as the rest of the model does. */
static void begin_dense(struct layer *layer)
{
    struct pool *pool = &layer->trainer->dense;
    struct tensor *w = layer->linear->weight;
    w->gradient = floats(pool, w->rows * w->cols);
    w->moment1 = floats(pool, w->rows * w->cols);
    w->moment2 = floats(pool, w->rows * w->cols);
}

/* ---- the basis phase ---- */

static int complain_about(const struct trainer *trainer, sebp_status status, const char *what)
{
    return complain(FAILED, "%s: %s: %s", what, sebp_status_string(status),
                    sebp_context_message(trainer->model->context));
}

static int refuse(const struct tensor *tensor, int64_t step)
{
    return complain(DIVERGED, "step %lld: the gradient of %s.%lld.%s holds a NaN or Inf",
                    (long long)step, tensor->name, (long long)tensor->block, tensor->part);
}

/** Adds each layer's gradient to the sums of its kind. */
static int collect(struct trainer *trainer, int64_t step)
{
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        const struct layer *layer = &trainer->layers[i];
        const struct tensor *w = layer->linear->weight;
        sebp_matrix gradient = sebp_matrix_f32(w->gradient, w->rows, w->cols);
        sebp_status status =
            sebp_basis_sums_add(trainer->model->context, trainer->sums[layer->kind], &gradient);
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(w, step)
                                                  : complain_about(trainer, status, "the sums");
        }
    }
    return OK;
}

static void destroy_sums(struct trainer *trainer)
{
    for (int kind = 0; kind < 2; kind++) {
        sebp_basis_sums_destroy(trainer->sums[kind]);
        trainer->sums[kind] = NULL;
    }
}

/** Vectors that a side of `features` directions keeps. */
static int64_t vectors(const struct settings *settings, int64_t features)
{
    return settings->method == SPARSEGRAD ? features : smaller(settings->basis_rank, features);
}

/** Makes the bases, and lets go of all that is N x K. */
static int begin_sparse_phase(struct trainer *trainer)
{
    double started = seconds();
    int64_t most = 0;
    for (int kind = 0; kind < 2; kind++) {
        const struct tensor *w = trainer->layers[kind].linear->weight; /* up, down, up, ... */
        int64_t out = vectors(&trainer->settings, w->rows);
        int64_t in = vectors(&trainer->settings, w->cols);
        sebp_status status = sebp_basis_solve(trainer->model->context, trainer->sums[kind], out, in,
                                              &trainer->bases[kind]);
        if (status != SEBP_SUCCESS) {
            return complain_about(trainer, status, "the bases");
        }
        most = out * in > most ? out * in : most;
    }
    destroy_sums(trainer);
    pool_free(&trainer->dense);
    trainer->r = floats(&trainer->pool, most);
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        struct layer *layer = &trainer->layers[i];
        struct tensor *w = layer->linear->weight;
        w->gradient = w->moment1 = w->moment2 = NULL;
        int status = begin_sparse(layer, vectors(&trainer->settings, w->rows),
                                  vectors(&trainer->settings, w->cols));
        if (status != OK) {
            return status;
        }
    }
    trainer->solve_seconds = seconds() - started;
    return OK;
}

/* ---- the step ---- */

static sebp_adamw_options adamw_options(double rate, bool decays)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = rate;
    options.beta1 = (double)beta1;
    options.beta2 = (double)beta2;
    options.epsilon = (double)adamw_epsilon;
    options.weight_decay = decays ? (double)weight_decay : 0.0;
    return options;
}

/** One AdamW step of rows x cols elements. */
static sebp_status dense_step(const struct trainer *trainer, double rate, int64_t step, bool decays,
                              const struct factor *f)
{
    sebp_adamw_options options = adamw_options(rate, decays);
    sebp_matrix gradient = view(f->gradient, f), value = view(f->value, f);
    sebp_matrix moment1 = view(f->moment1, f), moment2 = view(f->moment2, f);
    return sebp_adamw_step(trainer->model->context, &gradient, step, &options, &value, &moment1,
                           &moment2);
}

static sebp_status sparse_step(const struct trainer *trainer, struct layer *layer, double rate)
{
    sebp_context *context = trainer->model->context;
    const struct tensor *tensor = layer->linear->weight;
    sebp_adamw_options options = adamw_options(rate, tensor->decays);
    sebp_matrix w = sebp_matrix_f32(tensor->value, tensor->rows, tensor->cols);
    sebp_status status = sebp_sparse_adamw_step(context, layer->state, &options, &layer->gradient);
    if (status == SEBP_SUCCESS) {
        status = sebp_weight_decay(context, &options, &w);
    }
    if (status != SEBP_SUCCESS) {
        return status;
    }
    return trainer->settings.method == MEPROP
               ? sebp_sparse_add(context, &layer->gradient, &w)
               : sebp_sparsegrad_update(context, trainer->bases[layer->kind], &layer->gradient, &w);
}

/** Goes on with the k elements of largest second moment alone, and what is known of them. */
static sebp_status fix_support(struct layer *layer)
{
    sebp_context *context = layer->trainer->model->context;
    const int64_t k = layer->gradient.count, count = sebp_sparse_adamw_count(layer->state);
    struct pool pool = {0};
    int64_t *indices = allocate(&pool, count, sizeof *indices);
    float *moment1 = floats(&pool, count), *moment2 = floats(&pool, count);
    int64_t *chosen = allocate(&pool, k, sizeof *chosen);
    float *largest = floats(&pool, k);
    sebp_sparse_adamw *fixed = NULL;
    sebp_status status = pool.failed
                             ? SEBP_ERROR_MEMORY
                             : sebp_sparse_adamw_export(layer->state, indices, moment1, moment2);
    if (status == SEBP_SUCCESS) {
        sebp_matrix all = sebp_matrix_f32(moment2, 1, count);
        sebp_sparse top = {chosen, largest, k, 1, count};
        status = sebp_sparse_top(context, &all, &top);
    }
    for (int64_t i = 0; i < k && status == SEBP_SUCCESS; i++) {
        indices[i] = indices[chosen[i]]; /* chosen[i] >= i: nothing is overwritten before its use */
        moment1[i] = moment1[chosen[i]];
        moment2[i] = moment2[chosen[i]];
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_sparse_adamw_create(layer->gradient.rows, layer->gradient.cols, indices, k,
                                          &fixed);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_sparse_adamw_import(fixed, sebp_sparse_adamw_steps(layer->state), indices,
                                          moment1, moment2, k);
    }
    if (status == SEBP_SUCCESS) {
        sebp_sparse_adamw_destroy(layer->state);
        layer->state = fixed;
        pool_free(&layer->indices);
        layer->gradient.indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(fixed);
    } else {
        sebp_sparse_adamw_destroy(fixed);
    }
    pool_free(&pool);
    return status;
}

/** Whether a tensor that has a gradient is trained. */
static bool trains(const struct trainer *trainer, const struct tensor *t)
{
    const struct model *m = trainer->model;
    return !trainer->settings.head_only || t->bare || t == m->pooler.weight ||
           t == m->pooler.bias || t == m->classifier.weight || t == m->classifier.bias;
}

int trainer_step(struct trainer *trainer, double rate, int64_t step)
{
    struct model *m = trainer->model;
    const struct settings *settings = &trainer->settings;
    sebp_status status = SEBP_SUCCESS;
    if (in_basis_phase(settings, step - 1)) {
        int collected = collect(trainer, step);
        if (collected != OK) {
            return collected;
        }
    }
    for (int64_t i = 0; i < m->tensor_count; i++) {
        const struct tensor *t = &m->tensors[i];
        struct factor whole = {t->rows, t->cols, t->value, t->gradient, t->moment1, t->moment2};
        if (t->gradient != NULL && trains(trainer, t)) {
            status = dense_step(trainer, rate, step, t->decays, &whole);
        }
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(t, step)
                                                  : complain_about(trainer, status, "AdamW");
        }
    }
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        struct layer *layer = &trainer->layers[i];
        if (settings->method == LORA) {
            status = dense_step(trainer, rate, step, true, &layer->a);
            if (status == SEBP_SUCCESS) {
                status = dense_step(trainer, rate, step, true, &layer->b);
            }
        } else if (layer->state != NULL) {
            status = sparse_step(trainer, layer, rate);
            if (status == SEBP_SUCCESS && settings->method == FIXED &&
                sebp_sparse_adamw_steps(layer->state) == settings->fix_support_after) {
                status = fix_support(layer);
            }
        }
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(layer->linear->weight, step)
                                                  : complain_about(trainer, status, "the step");
        }
    }
    embedding_clear(m);
    return needs_bases(settings->method) && step == settings->basis_steps
               ? begin_sparse_phase(trainer)
               : OK;
}

int trainer_status(const struct trainer *trainer, int64_t step)
{
    return trainer->refused != NULL ? refuse(trainer->refused->linear->weight, step)
                                    : model_status(trainer->model);
}

/* ---- beginning and end ---- */

int trainer_create(struct model *m, const struct settings *settings, uint64_t seed,
                   struct trainer *trainer)
{
    const int64_t H = m->shape.hidden, F = 4 * H;
    *trainer = (struct trainer){.settings = *settings, .model = m};
    trainer->layer_count = 2 * m->shape.layers;
    trainer->layers = allocate(&trainer->pool, trainer->layer_count, sizeof *trainer->layers);
    int status = OK;
    for (int kind = 0; kind < 2 && needs_bases(settings->method) && status == OK; kind++) {
        if (sebp_basis_sums_create(kind == 0 ? F : H, kind == 0 ? H : F, &trainer->sums[kind]) !=
            SEBP_SUCCESS) {
            status = complain(FAILED, "out of memory for the sums of gradients");
        }
    }
    for (int64_t i = 0; i < trainer->layer_count && !trainer->pool.failed && status == OK; i++) {
        struct layer *layer = &trainer->layers[i];
        struct block *block = &m->blocks[i / 2];
        *layer = (struct layer){.trainer = trainer, .kind = (int)(i % 2)};
        layer->linear = layer->kind == 0 ? &block->up : &block->down;
        layer->linear->adapter = &layer->adapter;
        const struct tensor *w = layer->linear->weight;
        if (settings->method == LORA) {
            begin_lora(layer, &seed);
        } else if (settings->method == MEPROP) {
            status = begin_sparse(layer, w->rows, w->cols);
        } else if (settings->method != FROZEN) {
            begin_dense(layer);
        }
    }
    if (settings->method == LORA) { /* dH: M x r */
        trainer->r = floats(&trainer->pool, m->shape.batch * m->shape.length * settings->rank);
    }
    if (status == OK && (trainer->pool.failed || trainer->dense.failed)) {
        status = complain(FAILED, "out of memory for the method");
    }
    return status;
}

struct bytes trainer_bytes(const struct trainer *trainer)
{
    struct bytes bytes = {0};
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        const struct layer *layer = &trainer->layers[i];
        const struct tensor *w = layer->linear->weight;
        int64_t dense = w->gradient != NULL ? w->rows * w->cols : 0;
        dense += layer->a.rows * layer->a.cols + layer->b.rows * layer->b.cols;
        int64_t element = 0;
        if (layer->state != NULL) { /* the indices of a fixed support are the state's own */
            element = sebp_sparse_adamw_support(layer->state) != NULL ? 4 : 12;
        }
        bytes.gradient += 4 * dense + element * layer->gradient.count;
        bytes.state += 8 * dense + sebp_sparse_adamw_bytes(layer->state);
    }
    int64_t largest = 0;
    for (int kind = 0; kind < 2; kind++) {
        sebp_matrix sides[] = {sebp_basis_out(trainer->bases[kind]),
                               sebp_basis_in(trainer->bases[kind])};
        bytes.shared += 4 * (sides[0].rows * sides[0].stride + sides[1].rows * sides[1].stride);
        int64_t r = sides[0].rows * sides[1].rows;
        largest = r > largest ? r : largest;
        if (trainer->sums[kind] != NULL) {
            const struct tensor *w = trainer->layers[kind].linear->weight;
            bytes.shared += 4 * (w->rows * w->rows + w->cols * w->cols);
        }
    }
    bytes.shared += 4 * largest;
    return bytes;
}

int trainer_merge(struct trainer *trainer)
{
    for (int64_t i = 0; i < trainer->layer_count && trainer->settings.method == LORA; i++) {
        struct layer *layer = &trainer->layers[i];
        const struct tensor *tensor = layer->linear->weight;
        sebp_matrix a = view(layer->a.value, &layer->a), b = view(layer->b.value, &layer->b);
        sebp_matrix w = sebp_matrix_f32(tensor->value, tensor->rows, tensor->cols);
        sebp_status status = sebp_lora_merge(trainer->model->context, &a, &b, lora_scale, &w);
        if (status != SEBP_SUCCESS) {
            return complain_about(trainer, status, "merging");
        }
        layer->linear->adapter = NULL;
    }
    return OK;
}

void trainer_destroy(struct trainer *trainer)
{
    for (int64_t i = 0; trainer->layers != NULL && i < trainer->layer_count; i++) {
        sebp_sparse_adamw_destroy(trainer->layers[i].state);
        pool_free(&trainer->layers[i].indices);
    }
    destroy_sums(trainer);
    for (int kind = 0; kind < 2; kind++) {
        sebp_basis_destroy(trainer->bases[kind]);
    }
    pool_free(&trainer->dense);
    pool_free(&trainer->pool);
}

bool has_bases(sebp_context *context)
{
    const float one[1] = {1.0f};
    sebp_matrix gradient = sebp_matrix_f32(one, 1, 1);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    sebp_status status = sebp_basis_sums_create(1, 1, &sums);
    if (status == SEBP_SUCCESS) {
        status = sebp_basis_sums_add(context, sums, &gradient);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_basis_solve(context, sums, 1, 1, &basis);
    }
    if (status != SEBP_SUCCESS) {
        complain(OK, "SparseGrad is left out: %s: %s", sebp_status_string(status),
                 sebp_context_message(context));
    }
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    return status == SEBP_SUCCESS;
}
