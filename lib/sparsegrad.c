/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparsegrad.c
 * SparseGrad over the backend table: the gradient in the rotated space, and the step back.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "basis.h"
#include "call.h"
#include "integers.h"

/* ---- the order of products ---- */

double sebp_sparsegrad_cost(const sebp_basis *basis, int64_t rows, sebp_rotation rotation)
{
    if (!basis || rows < 0)
        return 0;
    double m = (double)rows, n = (double)basis->out.cols, k = (double)basis->in.cols;
    double p = (double)basis->out.rows, q = (double)basis->in.rows;
    switch (rotation) {
    case SEBP_ROTATE_AUTO:
        return sebp_sparsegrad_cost(basis, rows, sebp_sparsegrad_order(basis, rows));
    case SEBP_ROTATE_FACTORS:
        return m * (p * n + q * k + p * q);
    case SEBP_ROTATE_DY:
        return m * p * (n + k) + p * q * k;
    case SEBP_ROTATE_X:
        return m * q * (n + k) + p * q * n;
    case SEBP_ROTATE_OUT_IN:
        return m * n * k + p * n * k + p * q * k;
    case SEBP_ROTATE_IN_OUT:
        return m * n * k + q * n * k + p * q * n;
    }
    return 0;
}

/* The cheapest order that is not among those tried, a bit for each; AUTO where all are. */
static sebp_rotation cheapest(const sebp_basis *basis, int64_t m, unsigned tried)
{
    sebp_rotation best = SEBP_ROTATE_AUTO;
    double min = INFINITY;
    for (int order = SEBP_ROTATE_FACTORS; order <= SEBP_ROTATE_IN_OUT; order++) {
        double cost = sebp_sparsegrad_cost(basis, m, (sebp_rotation)order);
        if (!(tried & 1U << order) && cost < min) {
            best = (sebp_rotation)order;
            min = cost;
        }
    }
    return best;
}

sebp_rotation sebp_sparsegrad_order(const sebp_basis *basis, int64_t m)
{
    return basis && m >= 0 ? cheapest(basis, m, 0) : SEBP_ROTATE_AUTO;
}

/* ---- the gradient ---- */

/* One side of R: dY with u_out, or X with u_in. */
typedef struct side {
    sebp_operand factor; /* m x width on the active rows, width N or K */
    sebp_matrix basis;   /* rank x width */
    int64_t width, rank;
    float *wide; /* a panel of rows of a bf16 factor, widened */
} side;

/* Products are gone through in panels three times: to see how much scratch memory what is between
 * them takes, to reserve what they need themselves, and to run. */
typedef enum pass { MEASURE, RESERVE, RUN } pass;

typedef struct chain {
    const sebp_call *call;
    side out, in;
    sebp_dtype dtype; /* of both factors */
    const sebp_matrix *r;
    bool add; /* to R */
    pass pass;
    float *scratch;
    int64_t room;  /* floats there may be */
    int64_t taken; /* of them */
} chain;

static float *take(chain *chain, int64_t floats)
{
    const int64_t line = 16;
    int64_t at = chain->taken;
    chain->taken += (floats + line - 1) / line * line;
    return chain->pass == RUN ? chain->scratch + at : NULL;
}

static sebp_status multiply(const chain *chain, sebp_product product)
{
    const char *path;
    switch (chain->pass) {
    case MEASURE:
        return SEBP_SUCCESS;
    case RESERVE:
        return sebp_reserve(chain->call, &product);
    case RUN:
        break;
    }
    return sebp_run(chain->call, &product, &path);
}

static sebp_operand dense(const float *data, int64_t stride, bool transposed)
{
    return (sebp_operand){data, stride, NULL, transposed};
}

/* A side's vectors, `first` on, and of each its elements `at` on: rank x width. */
static sebp_operand vectors(const side *side, int64_t first, int64_t at, bool transposed)
{
    return dense((const float *)side->basis.data + first * side->basis.stride + at,
                 side->basis.stride, transposed);
}

/* R (+)= T V^T: T, count x depth, of the first side's vectors from `at` on; V, of all the other's,
 * their elements from `from` on. */
static sebp_status to_r(const chain *chain, const side *first, int64_t at, int64_t count,
                        const float *t, int64_t depth, int64_t from, bool accumulate)
{
    float *r = chain->r->data;
    sebp_product part = {.k = depth, .c_stride = chain->r->stride, .accumulate = accumulate};
    if (first == &chain->out) {
        part.m = count;
        part.n = chain->in.rank;
        part.a = dense(t, depth, false);
        part.b = vectors(&chain->in, 0, from, true);
        part.c = r + at * chain->r->stride;
    } else {
        part.m = chain->out.rank;
        part.n = count;
        part.a = vectors(&chain->out, 0, from, false);
        part.b = dense(t, depth, true);
        part.c = r + at;
    }
    return multiply(chain, part);
}

/* Parts of one size, of at most `max`, at least 1. */
static int64_t even_part(int64_t whole, int64_t max)
{
    max = max > 1 ? max : 1;
    int64_t parts = (whole + max - 1) / max;
    return (whole + parts - 1) / parts;
}

/* Floats that a row takes, of both factors, where it is widened. */
static int64_t wide_floats(const chain *chain)
{
    return chain->dtype == SEBP_BF16 ? chain->out.width + chain->in.width : 0;
}

static void take_wide(chain *chain, int64_t rows)
{
    bool is_wide = wide_floats(chain) > 0;
    chain->out.wide = take(chain, is_wide ? rows * chain->out.width : 0);
    chain->in.wide = take(chain, is_wide ? rows * chain->in.width : 0);
}

/* Of the active rows `count` from `first` on, as f32. */
static sebp_operand rows_of(const chain *chain, const side *side, int64_t first, int64_t count)
{
    sebp_operand rows = side->factor;
    if (rows.rows)
        rows.rows += first;
    else
        rows.data =
            (const char *)rows.data + first * rows.stride * (int64_t)sebp_dtype_bytes(chain->dtype);
    if (chain->dtype == SEBP_F32)
        return rows;
    sebp_context *context = chain->call->context;
    sebp_matrix from = {(void *)(uintptr_t)rows.data, count, side->width, rows.stride,
                        chain->dtype};
    sebp_matrix to = sebp_matrix_f32(side->wide, count, side->width);
    if (chain->pass == RUN)
        context->backend->widen_rows(context->device, &from, rows.rows, count, &to);
    return dense(side->wide, side->width, false);
}

/* (u_out^T dY^T) (X u_in), in panels of rows. */
static sebp_status rotate_factors(chain *chain)
{
    const side *out = &chain->out, *in = &chain->in;
    int64_t m = chain->call->m, p = out->rank, q = in->rank;
    int64_t rows = even_part(m, chain->room / (p + q + wide_floats(chain)));
    take_wide(chain, rows);
    float *a = take(chain, rows * p), *b = take(chain, rows * q);
    sebp_status status = SEBP_SUCCESS;
    for (int64_t i = 0; i < m && status == SEBP_SUCCESS; i += rows) {
        int64_t count = sebp_min(rows, m - i);
        /* A = dY[i] u_out: count x p */
        sebp_product to_a = {.m = count, .n = p, .k = out->width, .c = a, .c_stride = p};
        to_a.a = rows_of(chain, out, i, count);
        to_a.b = vectors(out, 0, 0, true);
        /* B = X[i] u_in: count x q */
        sebp_product to_b = {.m = count, .n = q, .k = in->width, .c = b, .c_stride = q};
        to_b.a = rows_of(chain, in, i, count);
        to_b.b = vectors(in, 0, 0, true);
        /* R (+)= A^T B */
        sebp_product last = {.m = p, .n = q, .k = count, .accumulate = chain->add || i > 0};
        last.a = dense(a, p, true);
        last.b = dense(b, q, false);
        last.c = chain->r->data;
        last.c_stride = chain->r->stride;
        status = multiply(chain, to_a);
        if (status == SEBP_SUCCESS)
            status = multiply(chain, to_b);
        if (status == SEBP_SUCCESS)
            status = multiply(chain, last);
    }
    return status;
}

/* ((u_out^T dY^T) X) u_in where out is first, u_out^T (dY^T (X u_in)) where in is: in panels of the
 * first side's vectors, and of rows. Shapes are told for out. */
static sebp_status rotate_one(chain *chain, const side *first, const side *second)
{
    int64_t m = chain->call->m, width = second->width;
    int64_t lines = even_part(first->rank, chain->room / 2 / width);
    int64_t rows = even_part(m, chain->room / 2 / (lines + wide_floats(chain)));
    take_wide(chain, rows);
    float *a = take(chain, rows * lines), *t = take(chain, lines * width);
    sebp_status status = SEBP_SUCCESS;
    for (int64_t v = 0; v < first->rank && status == SEBP_SUCCESS; v += lines) {
        int64_t some = sebp_min(lines, first->rank - v);
        for (int64_t i = 0; i < m && status == SEBP_SUCCESS; i += rows) {
            int64_t count = sebp_min(rows, m - i);
            /* A = dY[i] u_out[v]: count x some */
            sebp_product to_a = {.m = count, .n = some, .k = first->width, .c = a};
            to_a.a = rows_of(chain, first, i, count);
            to_a.b = vectors(first, v, 0, true);
            to_a.c_stride = some;
            /* T (+)= A^T X[i]: some x K */
            sebp_product to_t = {.m = some, .n = width, .k = count, .c = t, .accumulate = i > 0};
            to_t.a = dense(a, some, true);
            to_t.b = rows_of(chain, second, i, count);
            to_t.c_stride = width;
            status = multiply(chain, to_a);
            if (status == SEBP_SUCCESS)
                status = multiply(chain, to_t);
        }
        /* R[v] (+)= T u_in */
        if (status == SEBP_SUCCESS)
            status = to_r(chain, first, v, some, t, width, 0, chain->add);
    }
    return status;
}

/* (u_out^T (dY^T X)) u_in where out is first, u_out^T ((dY^T X) u_in) where in is: in panels of the
 * other side's columns. Shapes are told for out. */
static sebp_status rotate_gradient(chain *chain, const side *first, const side *second)
{
    int64_t width = first->width, rank = first->rank;
    int64_t cols = even_part(second->width, chain->room / (width + rank));
    float *g = take(chain, width * cols), *t = take(chain, rank * cols);
    sebp_status status = SEBP_SUCCESS;
    for (int64_t j = 0; j < second->width && status == SEBP_SUCCESS; j += cols) {
        int64_t some = sebp_min(cols, second->width - j);
        /* G = dY^T X[:, j]: N x some */
        sebp_product to_g = {.m = width, .n = some, .k = chain->call->m, .dtype = chain->dtype};
        to_g.a = first->factor;
        to_g.a.transposed = true;
        to_g.b = second->factor;
        to_g.b.data = (const char *)to_g.b.data + j * (int64_t)sebp_dtype_bytes(chain->dtype);
        to_g.c = g;
        to_g.c_stride = some;
        /* T = u_out^T G: p x some */
        sebp_product to_t = {.m = rank, .n = some, .k = width, .c = t, .c_stride = some};
        to_t.a = vectors(first, 0, 0, false);
        to_t.b = dense(g, some, false);
        status = multiply(chain, to_g);
        if (status == SEBP_SUCCESS)
            status = multiply(chain, to_t);
        /* R (+)= T u_in[j] */
        if (status == SEBP_SUCCESS)
            status = to_r(chain, first, 0, rank, t, some, j, chain->add || j > 0);
    }
    return status;
}

static sebp_status rotate(chain *chain, sebp_rotation order)
{
    side *out = &chain->out, *in = &chain->in;
    switch (order) {
    case SEBP_ROTATE_AUTO:
        break;
    case SEBP_ROTATE_FACTORS:
        return rotate_factors(chain);
    case SEBP_ROTATE_DY:
        return rotate_one(chain, out, in);
    case SEBP_ROTATE_X:
        return rotate_one(chain, in, out);
    case SEBP_ROTATE_OUT_IN:
        return rotate_gradient(chain, out, in);
    case SEBP_ROTATE_IN_OUT:
        return rotate_gradient(chain, in, out);
    }
    return SEBP_ERROR_VALUE;
}

/* Scratch memory for a method's chain of products: in the first pass they have taken all they take. */
static sebp_status set_aside(const sebp_call *call, int64_t floats)
{
    sebp_context *context = call->context;
    sebp_status status =
        context->backend->set_aside(context->device, floats * (int64_t)sizeof(float));
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: no scratch memory for %" PRId64 " floats",
                         call->function, floats);
    return SEBP_SUCCESS;
}

/* The gradient once the active rows are known. */
static sebp_status gradient_on_rows(const sebp_call *call, const sebp_basis *basis,
                                    const sebp_matrix *dy, const sebp_matrix *x,
                                    sebp_rotation order, const sebp_matrix *r)
{
    sebp_context *context = call->context;
    const sebp_backend *backend = context->backend;
    const int64_t slack = 4 * 16; /* four parts are taken, in whole lines */
    chain chain = {.call = call, .dtype = dy->dtype, .r = r};
    chain.out = (side){.factor = sebp_active_operand(call, dy, false), .basis = basis->out};
    chain.in = (side){.factor = sebp_x_operand(call, x, false), .basis = basis->in};
    side *sides[] = {&chain.out, &chain.in};
    for (int i = 0; i < 2; i++) {
        sides[i]->width = sides[i]->basis.cols;
        sides[i]->rank = sides[i]->basis.rows;
    }
    chain.add = call->options.dw_write == SEBP_ACCUMULATE;
    chain.room = backend->set_aside_max(context->device) / (int64_t)sizeof(float) - slack;

    if (call->m == 0) { /* R (+)= 0 */
        chain.pass = RUN;
        return to_r(&chain, &chain.out, 0, chain.out.rank, NULL, 0, 0, chain.add);
    }
    sebp_status status = rotate(&chain, order);
    if (status == SEBP_SUCCESS)
        status = set_aside(call, chain.taken);
    for (chain.pass = RESERVE; chain.pass <= RUN && status == SEBP_SUCCESS; chain.pass++) {
        chain.taken = 0;
        chain.scratch = backend->aside(context->device);
        status = rotate(&chain, order);
    }
    backend->set_aside(context->device, 0);
    return status;
}

/* By the cheapest order that there is scratch memory for: where there is none nothing was written. */
static sebp_status gradient_by_cheapest(const sebp_call *call, const sebp_basis *basis,
                                        const sebp_matrix *dy, const sebp_matrix *x,
                                        sebp_rotation *order, const sebp_matrix *r)
{
    sebp_status status = SEBP_ERROR_MEMORY;
    unsigned tried = 0;
    while (status == SEBP_ERROR_MEMORY) {
        sebp_rotation next = cheapest(basis, call->m, tried);
        if (next == SEBP_ROTATE_AUTO)
            break;
        *order = next;
        tried |= 1U << next;
        status = gradient_on_rows(call, basis, dy, x, next, r);
    }
    return status;
}

static void report(const sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                   sebp_rotation order)
{
    static const char *const names[] = {"auto", "factors", "dy", "x", "out-in", "in-out"};
    const char *const path[] = {names[order], NULL};
    sebp_report(call, dy->rows, x->cols, dy->cols, dy->dtype, path);
}

sebp_status sebp_sparsegrad_gradient(sebp_context *context, const sebp_basis *basis,
                                     const sebp_matrix *dy, const sebp_matrix *x,
                                     const sebp_rows *rows, const sebp_linear_options *options,
                                     sebp_rotation rotation, const sebp_matrix *r)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparsegrad_gradient");
    if (!basis || !dy || !x || !r)
        return sebp_missing(&call, !basis ? "basis" : !dy ? "dy" : !x ? "x" : "r");
    const sebp_argument arguments[] = {{"dy", dy, false},
                                       {"x", x, false},
                                       {"r", r, true},
                                       {"the basis's out", &basis->out, false},
                                       {"the basis's in", &basis->in, false}};
    const sebp_argument *of_dy = &arguments[0], *of_x = &arguments[1], *of_r = &arguments[2];
    enum { COUNT = sizeof arguments / sizeof *arguments };

    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, of_x, of_dy);
    if (status == SEBP_SUCCESS)
        status = sebp_check_f32(&call, of_r);
    if (status == SEBP_SUCCESS && !rows)
        status = sebp_check_rule(context, call.function, &call.options.rule);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "dw_write", call.options.dw_write);
    if (status == SEBP_SUCCESS &&
        ((int)rotation < SEBP_ROTATE_AUTO || (int)rotation > SEBP_ROTATE_IN_OUT))
        status = sebp_fail(context, SEBP_ERROR_VALUE, "%s: unknown rotation %d", call.function,
                           (int)rotation);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "dy", dy->rows);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_dy, dy->rows, basis->out.cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_x, call.options.x_is_compact ? rows->count : dy->rows,
                                  basis->in.cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_r, basis->out.rows, basis->in.rows);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    status = sebp_settle_rows(&call, dy, rows);
    if (status == SEBP_SUCCESS && rotation == SEBP_ROTATE_AUTO)
        status = gradient_by_cheapest(&call, basis, dy, x, &rotation, r);
    else if (status == SEBP_SUCCESS)
        status = gradient_on_rows(&call, basis, dy, x, rotation, r);
    if (status == SEBP_SUCCESS)
        report(&call, dy, x, rotation);
    sebp_call_end(&call);
    return status;
}

/* ---- the step ---- */

/* S by those of its rows, or of its columns, that hold any element. */
typedef struct sparse_lines {
    int64_t count;   /* p' or q' */
    int64_t *lines;  /* which they are */
    int64_t *start;  /* of each its first element: count + 1 */
    int64_t *places; /* of each element its column, or row */
    float *values;
} sparse_lines;

static void free_lines(sparse_lines *lines)
{
    free(lines->lines);
    free(lines->start);
    free(lines->places);
    free(lines->values);
}

/* Room for `elements` in at most `max` lines. */
static sebp_status make_lines(int64_t max, int64_t elements, sparse_lines *lines)
{
    *lines = (sparse_lines){
        .lines = malloc((size_t)max * sizeof(int64_t)),
        .start = calloc((size_t)max + 1, sizeof(int64_t)),
        .places = malloc((size_t)elements * sizeof(int64_t)),
        .values = malloc((size_t)elements * sizeof(float)),
    };
    if (lines->lines && lines->start && lines->places && lines->values)
        return SEBP_SUCCESS;
    free_lines(lines);
    return SEBP_ERROR_MEMORY;
}

/* S by rows, in the order of its elements. */
static sebp_status list_rows(const sebp_sparse *s, sparse_lines *rows)
{
    sebp_status status = make_lines(s->rows, s->count, rows);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t row = -1, end = 0; /* of the row */
    for (int64_t i = 0; i < s->count; i++) {
        if (s->indices[i] >= end) {
            row = s->indices[i] / s->cols;
            end = (row + 1) * s->cols;
            rows->start[rows->count] = i;
            rows->lines[rows->count++] = row;
        }
        rows->places[i] = s->indices[i] - row * s->cols;
        rows->values[i] = s->values[i];
    }
    rows->start[rows->count] = s->count;
    return SEBP_SUCCESS;
}

/* The same by columns: sorted, counting, so that in a column rows ascend. */
static sebp_status list_cols(const sebp_sparse *s, const sparse_lines *rows, sparse_lines *cols)
{
    sebp_status status = make_lines(s->cols, s->count, cols);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t *start = cols->start;
    for (int64_t i = 0; i < s->count; i++)
        start[rows->places[i] + 1]++;
    for (int64_t col = 0; col < s->cols; col++)
        start[col + 1] += start[col];
    for (int64_t line = 0; line < rows->count; line++) {
        for (int64_t i = rows->start[line]; i < rows->start[line + 1]; i++) {
            int64_t at = start[rows->places[i]]++;
            cols->places[at] = rows->lines[line];
            cols->values[at] = rows->values[i];
        }
    }
    /* Each start has moved on to its column's end; columns without elements go. */
    int64_t first = 0;
    for (int64_t col = 0; col < s->cols; col++) {
        int64_t end = start[col];
        if (end > first) {
            cols->lines[cols->count] = col;
            start[cols->count++] = first;
        }
        first = end;
    }
    start[cols->count] = s->count;
    return SEBP_SUCCESS;
}

/*
 * W += u_out S u_in^T with S by rows: T = S u_in^T, p' x K, then W += u_out[I] T, in panels of W's
 * columns. By columns: T = S^T u_out^T, q' x N, then W += T^T u_in[J]^T, in panels of its rows. Each
 * element of W is added to once.
 */
static sebp_status add_step(const sebp_call *call, const sebp_basis *basis,
                            const sparse_lines *lines, bool by_cols, const sebp_matrix *w)
{
    sebp_context *context = call->context;
    const sebp_backend *backend = context->backend;
    const sebp_matrix *near = by_cols ? &basis->out : &basis->in; /* what S is multiplied into */
    const sebp_matrix *far = by_cols ? &basis->in : &basis->out;
    int64_t width = near->cols, count = lines->count;
    int64_t room = backend->set_aside_max(context->device) / (int64_t)sizeof(float);
    int64_t panel = even_part(width, room / count);
    int64_t step = (by_cols ? w->stride : 1) * (int64_t)sebp_dtype_bytes(w->dtype);
    sebp_sparse_lines sparse = {count, lines->start, lines->places, lines->values};
    /* Lines that follow each other, as all of them do, are a matrix that any GEMM takes as it lies. */
    int64_t first = lines->lines[0];
    bool is_run = lines->lines[count - 1] - first == count - 1;
    const float *far_data = (const float *)far->data + (is_run ? first * far->stride : 0);

    sebp_status status = set_aside(call, count * panel);
    for (pass pass = RESERVE; pass <= RUN && status == SEBP_SUCCESS; pass++) {
        float *t = backend->aside(context->device);
        for (int64_t j = 0; j < width && status == SEBP_SUCCESS; j += panel) {
            int64_t some = sebp_min(panel, width - j);
            sebp_operand of_t = dense(t, some, by_cols);
            sebp_operand of_far = {far_data, far->stride, is_run ? NULL : lines->lines, !by_cols};
            sebp_product product = {.k = count, .c_stride = w->stride, .c_dtype = w->dtype};
            product.m = by_cols ? some : w->rows;
            product.n = by_cols ? w->cols : some;
            product.a = by_cols ? of_t : of_far;
            product.b = by_cols ? of_far : of_t;
            product.c = (char *)w->data + j * step;
            product.accumulate = true;
            if (pass == RESERVE) {
                status = sebp_reserve(call, &product);
                continue;
            }
            const char *path;
            sebp_matrix from = {(float *)near->data + j, near->rows, some, near->stride, SEBP_F32};
            sebp_matrix to = sebp_matrix_f32(t, count, some);
            backend->sparse_product(context->device, &sparse, &from, &to);
            status = sebp_run(call, &product, &path);
        }
    }
    backend->set_aside(context->device, 0);
    return status;
}

sebp_status sebp_sparsegrad_update(sebp_context *context, const sebp_basis *basis,
                                   const sebp_sparse *s, const sebp_matrix *w)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparsegrad_update");
    if (!basis || !s || !w)
        return sebp_missing(&call, !basis ? "basis" : !s ? "s" : "w");
    const sebp_argument arguments[] = {{"w", w, true},
                                       {"the basis's out", &basis->out, false},
                                       {"the basis's in", &basis->in, false}};
    enum { COUNT = sizeof arguments / sizeof *arguments };
    sebp_status status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse(&call, "s", s);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_finite(&call, "s", s);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_shape(&call, "s", s, basis->out.rows, basis->in.rows);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[0], basis->out.cols, basis->in.cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS || s->count == 0)
        return status;

    sparse_lines rows, cols;
    status = list_rows(s, &rows);
    if (status == SEBP_SUCCESS) {
        status = list_cols(s, &rows, &cols);
        if (status != SEBP_SUCCESS)
            free_lines(&rows);
    }
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: no memory for %" PRId64 " elements", call.function,
                         s->count);
    double n = (double)w->rows, k = (double)w->cols, kept = (double)s->count;
    bool by_cols = n * k * (double)cols.count + kept * n < n * k * (double)rows.count + kept * k;
    status = add_step(&call, basis, by_cols ? &cols : &rows, by_cols, w);
    free_lines(&rows);
    free_lines(&cols);
    return status;
}
