/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.c
 * Views of a model's arrays, and the library's calls on them.
 */
#include "models/layers.h"

/* ---- linear, GELU ---- */

static void gelu_forward(struct engine *e, const sebp_rows *rows, const sebp_matrix *x,
                         const sebp_matrix *y)
{
    sebp_activation_options options = SEBP_ACTIVATION_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    keep_status(e, sebp_activation_forward(e->context, SEBP_GELU, x, NULL, rows, &options, y));
}

static void gelu_backward(struct engine *e, const sebp_rows *rows, const sebp_matrix *x,
                          const sebp_matrix *d)
{
    sebp_activation_options options = SEBP_ACTIVATION_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    keep_status(
        e, sebp_activation_backward(e->context, SEBP_GELU, d, x, NULL, rows, &options, d, NULL));
}

/* activated: NULL, or it becomes y's GELU. */
static void forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                    const struct linear *linear, float *y, float *activated)
{
    if (has_failed(e)) {
        return;
    }
    const int64_t N = linear->weight->rows, K = linear->weight->cols;
    sebp_matrix x_view = sebp_matrix_f32(x, M, K), y_view = sebp_matrix_f32(y, M, N);
    sebp_matrix activated_view = sebp_matrix_f32(activated, M, N);
    sebp_matrix w = value_of(linear->weight), b = value_of(linear->bias);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    struct adapter *adapter = linear->adapter;
    if (adapter != NULL && adapter->forward != NULL) {
        keep_status(
            e, adapter->forward(adapter, e->context, rows, &options, &x_view, &w, &b, &y_view));
        if (activated != NULL && !has_failed(e)) {
            gelu_forward(e, rows, &y_view, &activated_view);
        }
    } else {
        options.activation = SEBP_GELU;
        options.activated = activated != NULL ? &activated_view : NULL;
        keep_status(e, sebp_linear_forward(e->context, &x_view, &w, &b, rows, &options, &y_view));
    }
}

void linear_forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                    const struct linear *linear, float *y)
{
    forward(e, rows, x, M, linear, y, NULL);
}

void linear_gelu_forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                         const struct linear *linear, float *y, float *activated)
{
    forward(e, rows, x, M, linear, y, activated);
}

/* before: NULL, or x is its GELU. */
static void backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                     const float *before, int64_t M, const struct linear *linear, float *dx,
                     sebp_write write)
{
    if (has_failed(e)) {
        return;
    }
    const int64_t N = linear->weight->rows, K = linear->weight->cols;
    sebp_matrix dy_view = sebp_matrix_f32(dy, M, N), x_view = sebp_matrix_f32(x, M, K);
    sebp_matrix dx_view = sebp_matrix_f32(dx, M, K), w = value_of(linear->weight);
    sebp_matrix before_view = sebp_matrix_f32(before, M, K), db = gradient_of(linear->bias);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    options.dx_write = write;
    struct adapter *adapter = linear->adapter;
    if (adapter != NULL && adapter->backward != NULL) {
        keep_status(e, adapter->backward(adapter, e->context, rows, &options, &dy_view, &x_view, &w,
                                         &dx_view, &db));
        if (before != NULL && !has_failed(e)) {
            gelu_backward(e, rows, &before_view, &dx_view);
        }
    } else {
        sebp_matrix dw = gradient_of(linear->weight);
        options.activation = SEBP_GELU;
        options.before = before != NULL ? &before_view : NULL;
        keep_status(e, sebp_linear_backward(e->context, &dy_view, &x_view, &w, rows, &options,
                                            &dx_view, dw.data != NULL ? &dw : NULL, &db));
    }
    e->backward_flops += 4.0 * (double)sebp_rows_count(rows) * (double)N * (double)K;
}

void linear_backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                     int64_t M, const struct linear *linear, float *dx, sebp_write write)
{
    backward(e, rows, dy, x, NULL, M, linear, dx, write);
}

void linear_gelu_backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                          const float *before, int64_t M, const struct linear *linear, float *dx)
{
    backward(e, rows, dy, x, before, M, linear, dx, SEBP_OVERWRITE);
}

/* ---- layer norm, dropout, embedding ---- */

static sebp_norm_options norm_options(struct dropout dropout)
{
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.epsilon = 1e-12; /* BERT's */
    options.dropout = dropout.probability;
    options.seed = dropout.seed;
    options.offset = dropout.offset;
    options.inactive = SEBP_INACTIVE_LEAVE;
    return options;
}

void norm_forward(struct engine *e, const sebp_rows *rows, float *x, const float *residual,
                  int64_t M, const struct norm *norm, struct dropout dropout, float *y,
                  float *statistics)
{
    if (has_failed(e)) {
        return;
    }
    const int64_t H = norm->scale->cols;
    const sebp_norm_options options = norm_options(dropout);
    sebp_matrix x_view = sebp_matrix_f32(x, M, H), y_view = sebp_matrix_f32(y, M, H);
    sebp_matrix residual_view = sebp_matrix_f32(residual, M, H);
    sebp_matrix scale = value_of(norm->scale), shift = value_of(norm->shift);
    sebp_matrix kept = sebp_matrix_f32(statistics, M, 2);
    keep_status(e, sebp_norm_forward(e->context, &x_view, residual != NULL ? &residual_view : NULL,
                                     &scale, &shift, rows, &options, &x_view, &y_view, &kept));
}

const float *norm_backward(struct engine *e, const sebp_rows *rows, const float *sum,
                           const float *statistics, int64_t M, const struct norm *norm,
                           struct dropout dropout, float *d, float *dropped)
{
    const int64_t H = norm->scale->cols;
    const sebp_norm_options options = norm_options(dropout);
    const bool drops = dropout.probability > 0.0;
    sebp_matrix d_view = sebp_matrix_f32(d, M, H), sum_view = sebp_matrix_f32(sum, M, H);
    sebp_matrix kept = sebp_matrix_f32(statistics, M, 2), scale = value_of(norm->scale);
    sebp_matrix dscale = gradient_of(norm->scale), dshift = gradient_of(norm->shift);
    sebp_matrix dropped_view = sebp_matrix_f32(dropped, M, H);
    if (!has_failed(e)) {
        keep_status(e, sebp_norm_backward(e->context, &d_view, &sum_view, &kept, &scale, rows,
                                          &options, &d_view, drops ? &dropped_view : NULL, &dscale,
                                          &dshift));
    }
    return drops ? dropped : d;
}

void drop(struct engine *e, const sebp_rows *rows, struct dropout dropout, int64_t M, int64_t H,
          float *x)
{
    if (has_failed(e) || !(dropout.probability > 0.0)) {
        return;
    }
    sebp_dropout_options options = SEBP_DROPOUT_OPTIONS_INIT;
    options.probability = dropout.probability;
    options.seed = dropout.seed;
    options.offset = dropout.offset;
    options.inactive = SEBP_INACTIVE_LEAVE;
    sebp_matrix view = sebp_matrix_f32(x, M, H);
    keep_status(e, sebp_dropout_apply(e->context, &view, rows, &options, &view));
}

void take_rows(struct engine *e, const sebp_rows *rows, const float *table, int64_t T,
               const int64_t *indices, int64_t M, int64_t H, float *y)
{
    if (has_failed(e)) {
        return;
    }
    const sebp_embedding from = {sebp_matrix_f32(table, T, H), indices};
    sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    sebp_matrix view = sebp_matrix_f32(y, M, H);
    keep_status(e, sebp_embedding_forward(e->context, &from, 1, rows, &options, &view));
}

void embedding_forward(struct engine *e, const sebp_rows *rows, const int64_t *ids,
                       const int64_t *positions, int64_t M, const struct tensor *token,
                       const struct tensor *position, float *sum)
{
    if (has_failed(e)) {
        return;
    }
    const sebp_embedding tables[] = {{value_of(token), ids}, {value_of(position), positions}};
    sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    sebp_matrix view = sebp_matrix_f32(sum, M, token->cols);
    keep_status(e, sebp_embedding_forward(e->context, tables, 2, rows, &options, &view));
}

void embedding_backward(struct engine *e, const sebp_rows *rows, const int64_t *ids,
                        const int64_t *positions, int64_t M, const struct tensor *token,
                        const struct tensor *position, const float *d)
{
    if (has_failed(e)) {
        return;
    }
    sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
    sebp_matrix view = sebp_matrix_f32(d, M, token->cols);
    sebp_matrix dtoken = gradient_of(token), dposition = gradient_of(position);
    keep_status(e,
                sebp_embedding_backward(e->context, &view, positions, rows, &options, &dposition));
    options.write = SEBP_ACCUMULATE;
    keep_status(e, sebp_embedding_backward(e->context, &view, ids, rows, &options, &dtoken));
}

/* ---- attention ---- */

static sebp_attention_options attention_options(const struct attention *attention)
{
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = attention->heads;
    options.dropout = attention->dropout.probability;
    options.seed = attention->dropout.seed;
    options.offset = attention->dropout.offset;
    options.inactive = attention->inactive;
    return options;
}

/** Queries, keys or values of qkv: the columns from part * H on. */
static sebp_matrix part_of(const float *qkv, int64_t M, int64_t H, int part)
{
    sebp_matrix view = sebp_matrix_f32(qkv + part * H, M, H);
    view.stride = 3 * H;
    return view;
}

void attention_forward(struct engine *e, const struct attention *attention, const float *qkv,
                       int64_t M, int64_t H, float *context, float *lse)
{
    if (has_failed(e)) {
        return;
    }
    const sebp_attention_options options = attention_options(attention);
    sebp_matrix q = part_of(qkv, M, H, 0), k = part_of(qkv, M, H, 1), v = part_of(qkv, M, H, 2);
    sebp_matrix out = sebp_matrix_f32(context, M, H);
    sebp_matrix lse_view = sebp_matrix_f32(lse, M, attention->heads);
    keep_status(e, sebp_attention_forward(e->context, &q, &k, &v, NULL, attention->queries,
                                          attention->keys, &options, &out, &lse_view));
}

void attention_backward(struct engine *e, const struct attention *attention, const float *dcontext,
                        const float *qkv, const float *context, const float *lse, int64_t M,
                        int64_t H, float *dqkv)
{
    if (has_failed(e)) {
        return;
    }
    const sebp_attention_options options = attention_options(attention);
    sebp_matrix q = part_of(qkv, M, H, 0), k = part_of(qkv, M, H, 1), v = part_of(qkv, M, H, 2);
    sebp_matrix dq = part_of(dqkv, M, H, 0), dk = part_of(dqkv, M, H, 1);
    sebp_matrix dv = part_of(dqkv, M, H, 2), dout = sebp_matrix_f32(dcontext, M, H);
    sebp_matrix out = sebp_matrix_f32(context, M, H);
    sebp_matrix lse_view = sebp_matrix_f32(lse, M, attention->heads);
    keep_status(e, sebp_attention_backward(e->context, &dout, &q, &k, &v, NULL, &out, &lse_view,
                                           attention->queries, attention->keys, &options, &dq, &dk,
                                           &dv, NULL));
}
