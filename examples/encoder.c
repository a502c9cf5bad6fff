/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file encoder.c
 * To be read from top to bottom: the model, its forward, its backward, AdamW, judging.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "encoder.h"

/* OpenMP where there is some; without it the program is the same on one thread. */
#ifdef _OPENMP
#define DO_PRAGMA(text) _Pragma(#text)
#define PARALLEL_FOR(count) DO_PRAGMA(omp parallel for schedule(static) num_threads(count))
#define PARALLEL_FOR_UNEVEN(count) DO_PRAGMA(omp parallel for schedule(dynamic) num_threads(count))
static int thread_index(void)
{
    return omp_get_thread_num();
}
#else
#define PARALLEL_FOR(count)
#define PARALLEL_FOR_UNEVEN(count)
static int thread_index(void)
{
    return 0;
}
#endif

/* ---- the model ---- */

/** Adds a tensor; its memory comes once all are known. */
static struct tensor *new_tensor(struct model *m, const char *name, int64_t block, const char *part,
                                 int64_t rows, int64_t cols, float fill)
{
    struct tensor *tensor = &m->tensors[m->tensor_count++];
    *tensor = (struct tensor){.name = name,
                              .block = block,
                              .part = part,
                              .rows = rows,
                              .cols = cols,
                              .fill = fill,
                              .decays = isnan(fill)};
    return tensor;
}

static struct linear new_linear(struct model *m, const char *name, int64_t block,
                                int64_t in_features, int64_t out_features)
{
    struct tensor *weight = new_tensor(m, name, block, "weight", out_features, in_features, NAN);
    struct tensor *bias = new_tensor(m, name, block, "bias", 1, out_features, 0.0f);
    return (struct linear){weight, bias, NULL};
}

/** Elements from the start of a tensor to that of the next: each begins at a cache line. */
static int64_t padded(const struct tensor *tensor)
{
    return (tensor->rows * tensor->cols + 15) / 16 * 16;
}

/** The flat arrays, and each tensor's part of them. */
static void lay_out(struct pool *pool, struct model *m)
{
    for (int64_t i = 0; i < m->tensor_count; i++) {
        m->parameter_count += padded(&m->tensors[i]);
        m->trained_count += m->tensors[i].bare ? 0 : padded(&m->tensors[i]);
    }
    float *values = floats(pool, m->parameter_count), *gradients = floats(pool, m->trained_count);
    float *moments1 = floats(pool, m->trained_count), *moments2 = floats(pool, m->trained_count);
    int64_t value = 0, trained = 0;
    for (int64_t i = 0; i < m->tensor_count && !pool->failed; i++) {
        struct tensor *tensor = &m->tensors[i];
        tensor->value = values + value;
        value += padded(tensor);
        if (!tensor->bare) {
            tensor->gradient = gradients + trained;
            tensor->moment1 = moments1 + trained;
            tensor->moment2 = moments2 + trained;
            trained += padded(tensor);
        }
    }
}

static struct norm new_norm(struct model *m, const char *name, int64_t block)
{
    struct tensor *scale = new_tensor(m, name, block, "scale", 1, m->shape.hidden, 1.0f);
    return (struct norm){scale, new_tensor(m, name, block, "shift", 1, m->shape.hidden, 0.0f)};
}

int model_create(struct pool *pool, struct pool *activations, sebp_context *context,
                 const struct shape *shape, struct model *m)
{
    const int64_t H = shape->hidden, F = 4 * H, L = shape->length, B = shape->batch, M = B * L;
    enum { TENSORS_OUTSIDE_BLOCKS = 8, TENSORS_IN_BLOCK = 12 };
    *m = (struct model){.shape = *shape, .context = context};
    m->threads = sebp_context_threads(context);
    m->blocks = allocate(pool, shape->layers, sizeof *m->blocks);
    m->tensors = allocate(pool, TENSORS_OUTSIDE_BLOCKS + TENSORS_IN_BLOCK * shape->layers,
                          sizeof *m->tensors);
    if (pool->failed) {
        return complain(FAILED, "out of memory for the model");
    }
    m->token = new_tensor(m, "token", 0, "weight", shape->vocabulary, H, NAN);
    m->position = new_tensor(m, "position", 0, "weight", L, H, NAN);
    m->after_embedding = new_norm(m, "embedding", 0);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct block *block = &m->blocks[i];
        block->qkv = new_linear(m, "qkv", i, H, 3 * H);
        block->out = new_linear(m, "out", i, H, H);
        block->after_out = new_norm(m, "after_out", i);
        block->up = new_linear(m, "up", i, H, F);
        block->down = new_linear(m, "down", i, F, H);
        block->after_down = new_norm(m, "after_down", i);
        block->up.weight->bare = block->down.weight->bare = shape->bare_feed_forward;
    }
    m->pooler = new_linear(m, "pooler", 0, H, H);
    m->classifier = new_linear(m, "classifier", 0, H, shape->classes);

    lay_out(pool, m);

    m->embedding_sum = floats(activations, M * H);
    m->embedding_moments = allocate(activations, M, sizeof *m->embedding_moments);
    float *input = floats(activations, M * H);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct block *block = &m->blocks[i];
        block->input = input;
        block->qkv_values = floats(activations, M * 3 * H);
        block->weights = floats(activations, B * shape->heads * L * L);
        block->context = floats(activations, M * H);
        block->out_sum = floats(activations, M * H);
        block->middle = floats(activations, M * H);
        block->up_values = floats(activations, M * F);
        block->bent = floats(activations, M * F);
        block->down_sum = floats(activations, M * H);
        block->output = input = floats(activations, M * H);
        block->out_moments = allocate(activations, M, sizeof *block->out_moments);
        block->down_moments = allocate(activations, M, sizeof *block->down_moments);
    }
    m->pooled = floats(activations, B * H);
    m->logits = floats(activations, B * shape->classes);
    m->dlogits = floats(activations, B * shape->classes);
    m->dpooled = floats(activations, B * H);
    m->d = floats(activations, M * H);
    m->dcontext = floats(activations, M * H);
    m->dqkv = floats(activations, M * 3 * H);
    m->dbent = floats(activations, M * F);
    /* Attention: a transposed D x L and scores L x L; layer norm: two rows of H. */
    m->scratch_each = (H / shape->heads * L + L * L + 2 * H + 15) / 16 * 16;
    m->scratch = floats(activations, m->threads * m->scratch_each);

    m->batch.ids = allocate(pool, M, sizeof *m->batch.ids);
    m->batch.labels = allocate(pool, B, sizeof *m->batch.labels);
    m->batch.lengths = allocate(pool, B, sizeof *m->batch.lengths);
    m->tokens.lengths = m->batch.lengths;
    m->everything.lengths = allocate(pool, B, sizeof(int64_t));
    m->classifying.lengths = allocate(pool, B, sizeof(int64_t));
    for (int64_t s = 0; s < B && !pool->failed; s++) {
        m->everything.lengths[s] = L;
        m->classifying.lengths[s] = 1;
    }
    return pool->failed || activations->failed ? complain(FAILED, "out of memory for the model")
                                               : OK;
}

void model_initialise(struct model *m, uint64_t seed, float deviation)
{
    uint64_t state = seed;
    for (int64_t i = 0; i < m->tensor_count; i++) {
        struct tensor *tensor = &m->tensors[i];
        int64_t count = tensor->rows * tensor->cols;
        for (int64_t j = 0; j < count; j++) {
            tensor->value[j] =
                isnan(tensor->fill) ? deviation * random_normal(&state) : tensor->fill;
        }
        if (tensor->gradient != NULL) {
            memset(tensor->gradient, 0, (size_t)count * sizeof(float));
            memset(tensor->moment1, 0, (size_t)count * sizeof(float));
            memset(tensor->moment2, 0, (size_t)count * sizeof(float));
        }
    }
    m->backward_flops = 0.0;
}

void regions_destroy(struct model *m)
{
    sebp_rows **const sets[] = {&m->everything.rows, &m->tokens.rows, &m->classifying.rows,
                                &m->sequences};
    for (int i = 0; i < 4; i++) {
        sebp_rows_destroy(*sets[i]);
        *sets[i] = NULL;
    }
}

void keep_status(struct model *m, sebp_status status)
{
    if (m->status == SEBP_SUCCESS) {
        m->status = status;
    }
}

int model_status(const struct model *m)
{
    return m->status == SEBP_SUCCESS ? OK
                                     : complain(FAILED, "%s: %s", sebp_status_string(m->status),
                                                sebp_context_message(m->context));
}

/** The row sets of the batch: made once, used by every layer. */
static void regions_make(struct model *m)
{
    const struct batch *batch = &m->batch;
    const int64_t B = batch->sequences, L = m->shape.length;
    regions_destroy(m);
    keep_status(m, sebp_rows_all(B, &m->sequences));
    keep_status(m, sebp_rows_all(B * L, &m->everything.rows));
    keep_status(m, sebp_rows_from_lengths(batch->lengths, B, L, &m->tokens.rows));
    keep_status(m, sebp_rows_from_lengths(m->classifying.lengths, B, L, &m->classifying.rows));
}

void batch_fill(struct model *m, const struct dataset *data, const int64_t *order, int64_t from,
                int64_t count, int32_t pad)
{
    const int64_t L = m->shape.length;
    m->batch.sequences = count;
    for (int64_t s = 0; s < count; s++) {
        const struct example *example = &data->examples[order != NULL ? order[from + s] : from + s];
        for (int64_t l = 0; l < L; l++) {
            m->batch.ids[s * L + l] = l < example->length ? example->ids[l] : pad;
        }
        m->batch.lengths[s] = example->length;
        m->batch.labels[s] = example->label;
    }
}

/* ---- forward ---- */

/** y = x W^T + b on some rows; the others of y stay as they are, nothing reads them. */
static void linear_forward(struct model *m, const sebp_rows *rows, sebp_matrix x,
                           const struct linear *linear, sebp_matrix y)
{
    if (m->status != SEBP_SUCCESS) {
        return;
    }
    const struct tensor *weight = linear->weight;
    sebp_matrix w = sebp_matrix_f32(weight->value, weight->rows, weight->cols);
    sebp_matrix b = sebp_matrix_f32(linear->bias->value, 1, weight->rows);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    struct adapter *adapter = linear->adapter;
    keep_status(m, adapter != NULL && adapter->forward != NULL
                       ? adapter->forward(adapter, m->context, rows, &options, &x, &w, &b, &y)
                       : sebp_linear_forward(m->context, &x, &w, &b, rows, &options, &y));
}

/** sum += residual; y = norm(sum). sum, residual, y: M x H. */
static void norm_forward(struct model *m, const sebp_rows *rows, float *sum, const float *residual,
                         const struct norm *norm, float *y, struct moments *moments)
{
    const int64_t H = m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        norm_row(sum + r * H, residual + r * H, norm->scale->value, norm->shift->value, y + r * H,
                 &moments[r], H);
    }
}

/** The first block's input: norm(token + position). */
static void embedding_forward(struct model *m, const sebp_rows *rows)
{
    const int64_t H = m->shape.hidden, L = m->shape.length, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    const struct norm *norm = &m->after_embedding;
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        float *sum = m->embedding_sum + r * H;
        memcpy(sum, m->token->value + m->batch.ids[r] * H, (size_t)H * sizeof(float));
        norm_row(sum, m->position->value + r % L * H, norm->scale->value, norm->shift->value,
                 m->blocks[0].input + r * H, &m->embedding_moments[r], H);
    }
}

/** to: columns x count, from: count x columns with rows `stride` apart. */
static void transpose(const float *from, int64_t stride, int64_t count, int64_t columns, float *to)
{
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < columns; j++) {
            to[j * count + i] = from[i * stride + j];
        }
    }
}

/**
 * For each sequence and head, with Q, K, V: L x D slices of qkv:
 *
 *     weights = softmax(Q K^T / sqrt D), padded keys masked        context = weights V
 *
 * for the queries of one region over the keys of another. Dense, every query meets all L keys, as
 * an implementation does that knows of padding only through its mask.
 */
static void attention_forward(struct model *m, struct block *block, const struct region *queries,
                              const struct region *keys)
{
    const int64_t H = m->shape.hidden, A = m->shape.heads, D = H / A, L = m->shape.length;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(m->threads)
    for (int64_t task = 0; task < m->batch.sequences * A; task++) {
        int64_t s = task / A, h = task % A, n = keys->lengths[s];
        const float *q = block->qkv_values + s * L * 3 * H + h * D;
        const float *k = q + H, *v = q + 2 * H;
        float *keys_by_feature = m->scratch + thread_index() * m->scratch_each; /* D x n */
        transpose(k, 3 * H, n, D, keys_by_feature);
        for (int64_t i = 0; i < queries->lengths[s]; i++) {
            float *weights = block->weights + (task * L + i) * L;
            row_times_matrix(q + i * 3 * H, 1, keys_by_feature, n, D, weights, n);
            softmax_row(weights, scale, m->batch.lengths[s], n);
            row_times_matrix(weights, 1, v, 3 * H, n, block->context + (s * L + i) * H + h * D, D);
        }
    }
}

static void gelu_forward(struct model *m, const sebp_rows *rows, const float *x, float *y)
{
    const int64_t F = 4 * m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_row(x + index[i] * F, y + index[i] * F, F);
    }
}

/** The rows of a layer that serve as queries: in the last block only [CLS] is looked at. */
static const struct region *query_region(const struct model *m, int64_t layer, bool skip)
{
    if (!skip) {
        return &m->everything;
    }
    return layer == m->shape.layers - 1 ? &m->classifying : &m->tokens;
}

double forward(struct model *m)
{
    const int64_t H = m->shape.hidden, F = 4 * H, L = m->shape.length, C = m->shape.classes;
    const int64_t B = m->batch.sequences, M = B * L;
    regions_make(m);
    const struct region *tokens = m->skip_forward ? &m->tokens : &m->everything;
    if (m->status == SEBP_SUCCESS) {
        embedding_forward(m, tokens->rows);
    }
    for (int64_t i = 0; i < m->shape.layers && m->status == SEBP_SUCCESS; i++) {
        struct block *block = &m->blocks[i];
        const struct region *queries = query_region(m, i, m->skip_forward);
        const sebp_rows *rows = queries->rows;
        linear_forward(m, tokens->rows, sebp_matrix_f32(block->input, M, H), &block->qkv,
                       sebp_matrix_f32(block->qkv_values, M, 3 * H));
        attention_forward(m, block, queries, tokens);
        linear_forward(m, rows, sebp_matrix_f32(block->context, M, H), &block->out,
                       sebp_matrix_f32(block->out_sum, M, H));
        norm_forward(m, rows, block->out_sum, block->input, &block->after_out, block->middle,
                     block->out_moments);
        linear_forward(m, rows, sebp_matrix_f32(block->middle, M, H), &block->up,
                       sebp_matrix_f32(block->up_values, M, F));
        gelu_forward(m, rows, block->up_values, block->bent);
        linear_forward(m, rows, sebp_matrix_f32(block->bent, M, F), &block->down,
                       sebp_matrix_f32(block->down_sum, M, H));
        norm_forward(m, rows, block->down_sum, block->middle, &block->after_down, block->output,
                     block->down_moments);
    }

    /* The rows of [CLS] lie L * H elements apart: a view, not a copy. */
    sebp_matrix first = {m->blocks[m->shape.layers - 1].output, B, H, L * H, SEBP_F32};
    linear_forward(m, NULL, first, &m->pooler, sebp_matrix_f32(m->pooled, B, H));
    for (int64_t i = 0; i < B * H; i++) {
        m->pooled[i] = tanhf(m->pooled[i]);
    }
    linear_forward(m, NULL, sebp_matrix_f32(m->pooled, B, H), &m->classifier,
                   sebp_matrix_f32(m->logits, B, C));
    if (m->status != SEBP_SUCCESS) {
        return (double)NAN;
    }
    double loss = 0.0;
    for (int64_t s = 0; s < B; s++) {
        const float *logits = m->logits + s * C;
        double top = (double)logits[0], sum = 0.0;
        for (int64_t c = 1; c < C; c++) {
            top = (double)logits[c] > top ? (double)logits[c] : top;
        }
        for (int64_t c = 0; c < C; c++) {
            sum += exp((double)logits[c] - top);
        }
        loss += log(sum) + top - (double)logits[m->batch.labels[s]];
        for (int64_t c = 0; c < C; c++) {
            double share = exp((double)logits[c] - top) / sum;
            m->dlogits[s * C + c] = (float)((share - (c == m->batch.labels[s])) / (double)B);
        }
    }
    return loss / (double)B;
}

/* ---- backward ---- */

/** dW, db, and dx written or added to, from dy on some rows; the other rows of dy count as zero. */
static void linear_backward(struct model *m, const sebp_rows *rows, sebp_matrix dy, sebp_matrix x,
                            const struct linear *linear, sebp_matrix dx, sebp_write write)
{
    if (m->status != SEBP_SUCCESS) {
        return;
    }
    const struct tensor *weight = linear->weight;
    sebp_matrix w = sebp_matrix_f32(weight->value, weight->rows, weight->cols);
    sebp_matrix db = sebp_matrix_f32(linear->bias->gradient, 1, weight->rows);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    options.dx_write = write;
    struct adapter *adapter = linear->adapter;
    if (adapter != NULL && adapter->backward != NULL) {
        keep_status(m,
                    adapter->backward(adapter, m->context, rows, &options, &dy, &x, &w, &dx, &db));
    } else {
        sebp_matrix dw = sebp_matrix_f32(weight->gradient, weight->rows, weight->cols);
        keep_status(m, sebp_linear_backward(m->context, &dy, &x, &w, rows, &options, &dx,
                                            weight->gradient != NULL ? &dw : NULL, &db));
    }
    m->backward_flops +=
        4.0 * (double)sebp_rows_count(rows) * (double)weight->rows * (double)weight->cols;
}

/** d, M x H, becomes the gradient of the norm's input, in place. */
static void norm_backward(struct model *m, const sebp_rows *rows, const float *sum,
                          const struct moments *moments, const struct norm *norm, float *d)
{
    const int64_t H = m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int part = 0; part < m->threads; part++) {
        float *dscale = m->scratch + part * m->scratch_each, *dshift = dscale + H;
        memset(dscale, 0, 2 * (size_t)H * sizeof(float));
        for (int64_t i = count * part / m->threads; i < count * (part + 1) / m->threads; i++) {
            int64_t r = index[i];
            norm_backward_row(sum + r * H, moments[r], norm->scale->value, d + r * H, dscale,
                              dshift, H);
        }
    }
    memset(norm->scale->gradient, 0, (size_t)H * sizeof(float));
    memset(norm->shift->gradient, 0, (size_t)H * sizeof(float));
    for (int part = 0; part < m->threads; part++) {
        add_row(norm->scale->gradient, m->scratch + part * m->scratch_each, H);
        add_row(norm->shift->gradient, m->scratch + part * m->scratch_each + H, H);
    }
}

static void gelu_backward(struct model *m, const sebp_rows *rows, const float *x, float *d)
{
    const int64_t F = 4 * m->shape.hidden, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(m->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_backward_row(x + index[i] * F, d + index[i] * F, F);
    }
}

/**
 * With P = weights and S the scores before scaling and softmax:
 *
 *     dP = dcontext V^T      dV = P^T dcontext
 *     dS = softmax'(P, dP)   dQ = dS K             dK = dS^T Q
 *
 * Queries outside their region have no dcontext: they add nothing to dK and dV, and their dQ is
 * zero, which is written as far as the region of the keys goes: dqkv is used on those rows.
 */
static void attention_backward(struct model *m, const struct block *block,
                               const struct region *queries, const struct region *keys)
{
    const int64_t H = m->shape.hidden, A = m->shape.heads, D = H / A, L = m->shape.length;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(m->threads)
    for (int64_t task = 0; task < m->batch.sequences * A; task++) {
        int64_t s = task / A, h = task % A;
        int64_t n = keys->lengths[s], count = queries->lengths[s];
        const float *q = block->qkv_values + s * L * 3 * H + h * D;
        const float *k = q + H, *v = q + 2 * H;
        float *dq = m->dqkv + s * L * 3 * H + h * D, *dk = dq + H, *dv = dq + 2 * H;
        const float *dcontext = m->dcontext + s * L * H + h * D;
        const float *weights = block->weights + task * L * L;
        float *values_by_feature = m->scratch + thread_index() * m->scratch_each; /* D x n */
        float *dscores = values_by_feature + D * L;                               /* count x n */
        transpose(v, 3 * H, n, D, values_by_feature);
        for (int64_t i = 0; i < count; i++) {
            float *row = dscores + i * n;
            row_times_matrix(dcontext + i * H, 1, values_by_feature, n, D, row, n);
            softmax_backward_row(weights + i * L, row, scale, n);
            row_times_matrix(row, 1, k, 3 * H, n, dq + i * 3 * H, D);
        }
        for (int64_t j = 0; j < n; j++) {
            row_times_matrix(dscores + j, n, q, 3 * H, count, dk + j * 3 * H, D);
            row_times_matrix(weights + j, L, dcontext, H, count, dv + j * 3 * H, D);
        }
        for (int64_t i = count; i < n; i++) {
            memset(dq + i * 3 * H, 0, (size_t)D * sizeof(float));
        }
    }
}

/** Adds the rows of d to the gradients of their tokens and positions. Threads share columns. */
static void embedding_backward(struct model *m, const sebp_rows *rows, const float *d)
{
    const int64_t H = m->shape.hidden, L = m->shape.length, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    memset(m->position->gradient, 0, (size_t)(L * H) * sizeof(float));
    PARALLEL_FOR(m->threads)
    for (int part = 0; part < m->threads; part++) {
        int64_t from = H * part / m->threads, columns = H * (part + 1) / m->threads - from;
        for (int64_t i = 0; i < count; i++) {
            int64_t r = index[i];
            const float *row = d + r * H + from;
            add_row(m->token->gradient + m->batch.ids[r] * H + from, row, columns);
            add_row(m->position->gradient + r % L * H + from, row, columns);
        }
    }
}

void embedding_clear(struct model *m)
{
    const int64_t H = m->shape.hidden;
    for (int64_t i = 0; i < m->batch.sequences * m->shape.length; i++) {
        memset(m->token->gradient + m->batch.ids[i] * H, 0, (size_t)H * sizeof(float));
    }
}

void backward(struct model *m)
{
    const int64_t H = m->shape.hidden, F = 4 * H, L = m->shape.length, C = m->shape.classes;
    const int64_t B = m->batch.sequences, M = B * L;
    const struct region *tokens = m->skip_backward ? &m->tokens : &m->everything;

    linear_backward(m, m->sequences, sebp_matrix_f32(m->dlogits, B, C),
                    sebp_matrix_f32(m->pooled, B, H), &m->classifier,
                    sebp_matrix_f32(m->dpooled, B, H), SEBP_OVERWRITE);
    for (int64_t i = 0; i < B * H; i++) {
        m->dpooled[i] *= 1.0f - m->pooled[i] * m->pooled[i];
    }
    if (!m->skip_backward) { /* dense, the rows of d beside [CLS] are read and so must be zero */
        memset(m->d, 0, (size_t)(M * H) * sizeof(float));
    }
    sebp_matrix first = {m->blocks[m->shape.layers - 1].output, B, H, L * H, SEBP_F32};
    sebp_matrix dfirst = {m->d, B, H, L * H, SEBP_F32};
    linear_backward(m, m->sequences, sebp_matrix_f32(m->dpooled, B, H), first, &m->pooler, dfirst,
                    SEBP_OVERWRITE);

    /* d goes down the residual stream: each branch reads it and adds its own gradient to it. */
    sebp_matrix d = sebp_matrix_f32(m->d, M, H);
    sebp_matrix dbent = sebp_matrix_f32(m->dbent, M, F);
    sebp_matrix dcontext = sebp_matrix_f32(m->dcontext, M, H);
    sebp_matrix dqkv = sebp_matrix_f32(m->dqkv, M, 3 * H);
    for (int64_t i = m->shape.layers - 1; i >= 0 && m->status == SEBP_SUCCESS; i--) {
        struct block *block = &m->blocks[i];
        const struct region *queries = query_region(m, i, m->skip_backward);
        const sebp_rows *rows = queries->rows;
        norm_backward(m, rows, block->down_sum, block->down_moments, &block->after_down, m->d);
        linear_backward(m, rows, d, sebp_matrix_f32(block->bent, M, F), &block->down, dbent,
                        SEBP_OVERWRITE);
        gelu_backward(m, rows, block->up_values, m->dbent);
        linear_backward(m, rows, dbent, sebp_matrix_f32(block->middle, M, H), &block->up, d,
                        SEBP_ACCUMULATE);
        norm_backward(m, rows, block->out_sum, block->out_moments, &block->after_out, m->d);
        linear_backward(m, rows, d, sebp_matrix_f32(block->context, M, H), &block->out, dcontext,
                        SEBP_OVERWRITE);
        attention_backward(m, block, queries, tokens);
        if (queries != tokens) { /* attention spreads the gradient from [CLS] to all tokens */
            for (int64_t s = 0; s < B; s++) {
                memset(m->d + (s * L + 1) * H, 0,
                       (size_t)((tokens->lengths[s] - 1) * H) * sizeof(float));
            }
        }
        linear_backward(m, tokens->rows, dqkv, sebp_matrix_f32(block->input, M, H), &block->qkv, d,
                        SEBP_ACCUMULATE);
    }
    if (m->status == SEBP_SUCCESS) {
        norm_backward(m, tokens->rows, m->embedding_sum, m->embedding_moments, &m->after_embedding,
                      m->d);
        embedding_backward(m, tokens->rows, m->d);
    }
}

/* ---- AdamW ---- */

void optimize(struct model *m, double rate, int64_t step)
{
    enum { PIECE = 1 << 14 };
    double bias1 = 1.0 - pow((double)beta1, (double)step);
    double bias2 = 1.0 - pow((double)beta2, (double)step);
    struct adamw adamw = {(float)(rate / bias1), (float)(1.0 - rate * (double)weight_decay),
                          (float)(1.0 / sqrt(bias2))};
    for (int64_t i = 0; i < m->tensor_count; i++) {
        const struct tensor *t = &m->tensors[i];
        int64_t count = t->rows * t->cols, pieces = (count + PIECE - 1) / PIECE;
        PARALLEL_FOR(m->threads)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t at = piece * PIECE;
            adamw_row(adamw, t->decays ? adamw.keep : 1.0f, t->value + at, t->gradient + at,
                      t->moment1 + at, t->moment2 + at, smaller(PIECE, count - at));
        }
    }
    embedding_clear(m);
}

double rate_at(double peak, int64_t step, int64_t steps)
{
    int64_t warm = steps / 10 + 1;
    if (step <= warm) {
        return peak * (double)step / (double)warm;
    }
    return peak * (double)(steps - step + 1) / (double)(steps - warm + 1);
}

/* ---- judging ---- */

/**
 * The correlation of what was judged with the labels, for any number of classes (Gorodkin, 2004);
 * of two it is Matthews's. counts: C x C, by label and judgement.
 */
static double correlation(const int64_t *counts, int64_t C)
{
    double all = 0.0, right = 0.0, both = 0.0, labelled = 0.0, judged = 0.0;
    for (int64_t c = 0; c < C; c++) {
        double row = 0.0, column = 0.0;
        for (int64_t i = 0; i < C; i++) {
            row += (double)counts[c * C + i];
            column += (double)counts[i * C + c];
        }
        all += row;
        right += (double)counts[c * C + c];
        both += row * column;
        labelled += row * row;
        judged += column * column;
    }
    double spread = (all * all - labelled) * (all * all - judged);
    return spread > 0.0 ? (right * all - both) / sqrt(spread) : 0.0;
}

struct score judge(struct model *m, const struct dataset *data, int32_t pad)
{
    const int64_t C = m->shape.classes;
    int64_t counts[MOST_CLASSES * MOST_CLASSES] = {0}, correct = 0;
    double loss = 0.0;
    for (int64_t from = 0; from < data->count; from += m->shape.batch) {
        batch_fill(m, data, NULL, from, smaller(m->shape.batch, data->count - from), pad);
        loss += forward(m) * (double)m->batch.sequences;
        for (int64_t s = 0; s < m->batch.sequences && m->status == SEBP_SUCCESS; s++) {
            const float *logits = m->logits + s * C;
            int best = 0;
            for (int c = 1; c < C; c++) {
                best = logits[c] > logits[best] ? c : best;
            }
            correct += best == m->batch.labels[s];
            counts[m->batch.labels[s] * C + best]++;
        }
    }
    return (struct score){(double)correct / (double)data->count, correlation(counts, C),
                          loss / (double)data->count};
}
