/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.c
 * Rows are shared out among threads here; the arithmetic of one row is in arithmetic.c.
 */
#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "models/layers.h"

/* OpenMP where there is some; without it the program is the same on one thread. */
#ifdef _OPENMP
#define DO_PRAGMA(text) _Pragma(#text)
#define PARALLEL_FOR(count)        DO_PRAGMA(omp parallel for schedule(static) num_threads(count))
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

/* ---- linear ---- */

void linear_forward(struct engine *e, const sebp_rows *rows, const float *x, int64_t M,
                    const struct linear *linear, float *y)
{
    if (e->status != SEBP_SUCCESS) {
        return;
    }
    const int64_t N = linear->weight->rows, K = linear->weight->cols;
    sebp_matrix x_view = sebp_matrix_f32(x, M, K), y_view = sebp_matrix_f32(y, M, N);
    sebp_matrix w = value_of(linear->weight), b = value_of(linear->bias);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    struct adapter *adapter = linear->adapter;
    if (adapter != NULL && adapter->forward != NULL) {
        keep_status(
            e, adapter->forward(adapter, e->context, rows, &options, &x_view, &w, &b, &y_view));
    } else {
        keep_status(e, sebp_linear_forward(e->context, &x_view, &w, &b, rows, &options, &y_view));
    }
}

void linear_backward(struct engine *e, const sebp_rows *rows, const float *dy, const float *x,
                     int64_t M, const struct linear *linear, float *dx, sebp_write write)
{
    if (e->status != SEBP_SUCCESS) {
        return;
    }
    const int64_t N = linear->weight->rows, K = linear->weight->cols;
    sebp_matrix dy_view = sebp_matrix_f32(dy, M, N), x_view = sebp_matrix_f32(x, M, K);
    sebp_matrix dx_view = sebp_matrix_f32(dx, M, K), w = value_of(linear->weight);
    sebp_matrix db = gradient_of(linear->bias);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.inactive = SEBP_INACTIVE_LEAVE;
    options.dx_write = write;
    struct adapter *adapter = linear->adapter;
    if (adapter != NULL && adapter->backward != NULL) {
        keep_status(e, adapter->backward(adapter, e->context, rows, &options, &dy_view, &x_view, &w,
                                         &dx_view, &db));
    } else {
        sebp_matrix dw = gradient_of(linear->weight);
        keep_status(e, sebp_linear_backward(e->context, &dy_view, &x_view, &w, rows, &options,
                                            &dx_view, dw.data != NULL ? &dw : NULL, &db));
    }
    e->backward_flops += 4.0 * (double)sebp_rows_count(rows) * (double)N * (double)K;
}

/* ---- layer norm, GELU, embedding ---- */

void norm_forward(struct engine *e, const sebp_rows *rows, float *sum, const float *residual,
                  const struct norm *norm, float *y, struct moments *moments)
{
    const int64_t H = norm->scale->cols, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(e->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        norm_row(sum + r * H, residual + r * H, norm->scale->value, norm->shift->value, y + r * H,
                 &moments[r], H);
    }
}

void norm_backward(struct engine *e, const sebp_rows *rows, const float *sum,
                   const struct moments *moments, const struct norm *norm, float *d)
{
    const int64_t H = norm->scale->cols, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(e->threads)
    for (int part = 0; part < e->threads; part++) {
        float *dscale = e->scratch + part * e->scratch_each, *dshift = dscale + H;
        memset(dscale, 0, 2 * (size_t)H * sizeof(float));
        for (int64_t i = count * part / e->threads; i < count * (part + 1) / e->threads; i++) {
            int64_t r = index[i];
            norm_backward_row(sum + r * H, moments[r], norm->scale->value, d + r * H, dscale,
                              dshift, H);
        }
    }
    memset(norm->scale->gradient, 0, (size_t)H * sizeof(float));
    memset(norm->shift->gradient, 0, (size_t)H * sizeof(float));
    for (int part = 0; part < e->threads; part++) {
        add_row(norm->scale->gradient, e->scratch + part * e->scratch_each, H);
        add_row(norm->shift->gradient, e->scratch + part * e->scratch_each + H, H);
    }
}

void gelu_forward(struct engine *e, const sebp_rows *rows, const float *x, float *y, int64_t F)
{
    const int64_t count = sebp_rows_count(rows), *index = sebp_rows_indices(rows);
    PARALLEL_FOR(e->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_row(x + index[i] * F, y + index[i] * F, F);
    }
}

void gelu_backward(struct engine *e, const sebp_rows *rows, const float *x, float *d, int64_t F)
{
    const int64_t count = sebp_rows_count(rows), *index = sebp_rows_indices(rows);
    PARALLEL_FOR(e->threads)
    for (int64_t i = 0; i < count; i++) {
        gelu_backward_row(x + index[i] * F, d + index[i] * F, F);
    }
}

void embedding_forward(struct engine *e, const sebp_rows *rows, const int32_t *ids,
                       const int32_t *positions, const struct tensor *token,
                       const struct tensor *position, const struct norm *norm, float *sum, float *y,
                       struct moments *moments)
{
    const int64_t H = token->cols, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    PARALLEL_FOR(e->threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t r = index[i];
        memcpy(sum + r * H, token->value + ids[r] * H, (size_t)H * sizeof(float));
        norm_row(sum + r * H, position->value + positions[r] * H, norm->scale->value,
                 norm->shift->value, y + r * H, &moments[r], H);
    }
}

void embedding_backward(struct engine *e, const sebp_rows *rows, const int32_t *ids,
                        const int32_t *positions, const struct tensor *token,
                        const struct tensor *position, const float *d)
{
    const int64_t H = token->cols, count = sebp_rows_count(rows);
    const int64_t *index = sebp_rows_indices(rows);
    memset(position->gradient, 0, (size_t)(position->rows * H) * sizeof(float));
    PARALLEL_FOR(e->threads)
    for (int part = 0; part < e->threads;
         part++) { /* threads share columns: rows may be one token's */
        int64_t from = H * part / e->threads, columns = H * (part + 1) / e->threads - from;
        for (int64_t i = 0; i < count; i++) {
            int64_t r = index[i];
            const float *row = d + r * H + from;
            add_row(token->gradient + ids[r] * H + from, row, columns);
            add_row(position->gradient + positions[r] * H + from, row, columns);
        }
    }
}

/* ---- attention ---- */

int64_t layer_scratch(int64_t heads, int64_t H, int64_t L)
{
    /* Attention: a transposed D x L and scores L x L; layer norm: two rows of H. */
    return (H / heads * L + L * L + 2 * H + 15) / 16 * 16;
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

/** Where the weights of a text and head begin; its rows lie `*room` apart. */
static int64_t weights_start(const struct texts *texts, int64_t heads, int64_t s, int64_t h,
                             int64_t *room)
{
    *room = texts->starts[s + 1] - texts->starts[s];
    return heads * texts->squares[s] + h * *room * *room;
}

void attention_forward(struct engine *e, const struct texts *texts, const struct region *queries,
                       const struct region *keys, int64_t heads, int64_t H, const float *qkv,
                       float *weights, float *context)
{
    const int64_t D = H / heads;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(e->threads)
    for (int64_t task = 0; task < texts->count * heads; task++) {
        int64_t s = task / heads, h = task % heads, n = keys->lengths[s], room;
        int64_t first = texts->starts[s];
        const float *q = qkv + first * 3 * H + h * D, *k = q + H, *v = q + 2 * H;
        float *own = weights + weights_start(texts, heads, s, h, &room);
        float *keys_by_feature = e->scratch + thread_index() * e->scratch_each; /* D x n */
        transpose(k, 3 * H, n, D, keys_by_feature);
        for (int64_t i = 0; i < queries->lengths[s]; i++) {
            float *row = own + i * room;
            row_times_matrix(q + i * 3 * H, 1, keys_by_feature, n, D, row, n);
            softmax_row(row, scale, texts->tokens[s], n);
            row_times_matrix(row, 1, v, 3 * H, n, context + (first + i) * H + h * D, D);
        }
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
void attention_backward(struct engine *e, const struct texts *texts, const struct region *queries,
                        const struct region *keys, int64_t heads, int64_t H, const float *qkv,
                        const float *weights, const float *dcontext, float *dqkv)
{
    const int64_t D = H / heads;
    const float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR_UNEVEN(e->threads)
    for (int64_t task = 0; task < texts->count * heads; task++) {
        int64_t s = task / heads, h = task % heads, room;
        int64_t first = texts->starts[s], n = keys->lengths[s], count = queries->lengths[s];
        const float *q = qkv + first * 3 * H + h * D, *k = q + H, *v = q + 2 * H;
        float *dq = dqkv + first * 3 * H + h * D, *dk = dq + H, *dv = dq + 2 * H;
        const float *down = dcontext + first * H + h * D;
        const float *own = weights + weights_start(texts, heads, s, h, &room);
        float *values_by_feature = e->scratch + thread_index() * e->scratch_each; /* D x n */
        float *dscores = values_by_feature + D * n;                               /* count x n */
        transpose(v, 3 * H, n, D, values_by_feature);
        for (int64_t i = 0; i < count; i++) {
            float *row = dscores + i * n;
            row_times_matrix(down + i * H, 1, values_by_feature, n, D, row, n);
            softmax_backward_row(own + i * room, row, scale, n);
            row_times_matrix(row, 1, k, 3 * H, n, dq + i * 3 * H, D);
        }
        for (int64_t j = 0; j < n; j++) {
            row_times_matrix(dscores + j, n, q, 3 * H, count, dk + j * 3 * H, D);
            row_times_matrix(own + j, room, down, H, count, dv + j * 3 * H, D);
        }
        for (int64_t i = count; i < n; i++) {
            memset(dq + i * 3 * H, 0, (size_t)D * sizeof(float));
        }
    }
}

/* ---- loss ---- */

double cross_entropy(const float *logits, const int *labels, int64_t B, int64_t C, float *dlogits)
{
    double loss = 0.0;
    for (int64_t s = 0; s < B; s++) {
        const float *row = logits + s * C;
        double max = (double)row[0], sum = 0.0;
        for (int64_t c = 1; c < C; c++) {
            max = (double)row[c] > max ? (double)row[c] : max;
        }
        for (int64_t c = 0; c < C; c++) {
            sum += exp((double)row[c] - max);
        }
        loss += log(sum) + max - (double)row[labels[s]];
        for (int64_t c = 0; c < C; c++) {
            double share = exp((double)row[c] - max) / sum;
            dlogits[s * C + c] = (float)((share - (c == labels[s])) / (double)B);
        }
    }
    return loss / (double)B;
}
