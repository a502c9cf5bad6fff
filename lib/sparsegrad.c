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

#include "basis.h"
#include "find.h"
#include "integers.h"

/* ---- the order of products ---- */

double sebp_sparsegrad_cost(const sebp_basis *basis, int64_t rows, sebp_rotation rotation)
{
    if (basis == NULL || rows < 0)
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

/* The cheapest order that has not been tried, by the bits of `tried`; AUTO where all have. */
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
    return basis != NULL && m >= 0 ? cheapest(basis, m, 0) : SEBP_ROTATE_AUTO;
}

/* ---- the gradient ---- */

/* One side of R: dY with u_out, or X with u_in. */
typedef struct basis_side {
    sebp_operand factor; /* m x width on the active rows, width N or K */
    sebp_matrix basis;   /* rank x width */
    int64_t width, rank;
    float *wide; /* a panel of rows of a bf16 factor, widened */
} basis_side;

/* The chain of products is gone through three times, in panels: to measure the scratch memory that
 * intermediate results take, to reserve what the products need themselves, and to run. */
typedef enum chain_pass { MEASURE, RESERVE, RUN } chain_pass;

typedef struct product_chain {
    sebp_call *call;
    basis_side out, in;
    sebp_dtype dtype; /* of both factors */
    const sebp_matrix *r;
    bool add; /* add to R */
    chain_pass pass;
    float *scratch;
    int64_t room;  /* the bound of scratch memory, in floats */
    int64_t taken; /* floats of it in use */
} product_chain;

static float *take(product_chain *chain, int64_t floats)
{
    const int64_t line = 16;
    int64_t at = chain->taken;
    chain->taken += sebp_round_up(floats, line);
    return chain->pass == RUN ? chain->scratch + at : NULL;
}

static void multiply(const product_chain *chain, sebp_product product)
{
    sebp_plan plan = {.product = product};
    if (chain->pass == MEASURE)
        return;
    sebp_plan_product(chain->call, &plan);
    if (chain->pass == RUN)
        sebp_run_product(chain->call, &plan);
}

static bool goes_on(const product_chain *chain)
{
    return sebp_call_goes_on(chain->call);
}

static sebp_operand dense(const float *data, int64_t stride, bool transposed)
{
    return (sebp_operand){data, stride, NULL, transposed, SEBP_F32};
}

/* The vectors of a side from `first` on, and of each the elements from `at` on: rank x width. */
static sebp_operand vectors(const basis_side *side, int64_t first, int64_t at, bool transposed)
{
    return dense((const float *)side->basis.data + first * side->basis.stride + at,
                 side->basis.stride, transposed);
}

/* R (+)= T V^T. T: count x depth, belongs to the first side's vectors from `at` on. V: all vectors
 * of the other side, their elements from `from` on. */
static void to_r(const product_chain *chain, const basis_side *first, int64_t at, int64_t count,
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
    multiply(chain, part);
}

/* The size of even pieces of at most `max` each; at least 1. */
static int64_t even_part(int64_t whole, int64_t max)
{
    return sebp_div_ceil(whole, sebp_div_ceil(whole, sebp_max(max, 1)));
}

/* Floats that a row of both factors takes where they are widened to f32. */
static int64_t wide_floats(const product_chain *chain)
{
    return chain->dtype == SEBP_BF16 ? chain->out.width + chain->in.width : 0;
}

static void take_wide(product_chain *chain, int64_t rows)
{
    bool is_wide = wide_floats(chain) > 0;
    chain->out.wide = take(chain, is_wide ? rows * chain->out.width : 0);
    chain->in.wide = take(chain, is_wide ? rows * chain->in.width : 0);
}

/* `count` of the active rows, from `first` on, as f32. */
static sebp_operand rows_of(const product_chain *chain, const basis_side *side, int64_t first,
                            int64_t count)
{
    sebp_operand rows = side->factor;
    if (rows.rows != NULL) {
        rows.rows += first;
    } else {
        rows.data =
            (const char *)rows.data + first * rows.stride * (int64_t)sebp_dtype_bytes(chain->dtype);
    }
    if (chain->dtype == SEBP_F32)
        return rows;
    sebp_matrix from = sebp_input_view(rows.data, count, side->width, rows.stride, chain->dtype);
    sebp_matrix to = sebp_matrix_f32(side->wide, count, side->width);
    sebp_call *call = chain->call;
    if (chain->pass == RUN && sebp_call_goes_on(call)) {
        sebp_call_keep(call,
                       call->backend->widen_rows(call->device, &from, rows.rows, NULL, count, &to),
                       "widening rows");
    }
    return dense(side->wide, side->width, false);
}

/* (u_out^T dY^T) (X u_in), in panels of rows. */
static void rotate_factors(product_chain *chain)
{
    const basis_side *out = &chain->out, *in = &chain->in;
    int64_t m = chain->call->m, p = out->rank, q = in->rank;
    int64_t rows = even_part(m, chain->room / (p + q + wide_floats(chain)));
    take_wide(chain, rows);
    float *a = take(chain, rows * p), *b = take(chain, rows * q);
    for (int64_t i = 0; i < m && goes_on(chain); i += rows) {
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
        multiply(chain, to_a);
        multiply(chain, to_b);
        multiply(chain, last);
    }
}

/* ((u_out^T dY^T) X) u_in where `first` is out, u_out^T (dY^T (X u_in)) where it is in. In panels
 * of the first side's vectors and of rows. The comments name the shapes for out. */
static void rotate_one(product_chain *chain, const basis_side *first, const basis_side *second)
{
    int64_t m = chain->call->m, width = second->width;
    int64_t lines = even_part(first->rank, chain->room / 2 / width);
    int64_t rows = even_part(m, chain->room / 2 / (lines + wide_floats(chain)));
    take_wide(chain, rows);
    float *a = take(chain, rows * lines), *t = take(chain, lines * width);
    for (int64_t v = 0; v < first->rank && goes_on(chain); v += lines) {
        int64_t some = sebp_min(lines, first->rank - v);
        for (int64_t i = 0; i < m && goes_on(chain); i += rows) {
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
            multiply(chain, to_a);
            multiply(chain, to_t);
        }
        /* R[v] (+)= T u_in */
        to_r(chain, first, v, some, t, width, 0, chain->add);
    }
}

/* (u_out^T (dY^T X)) u_in where `first` is out, u_out^T ((dY^T X) u_in) where it is in. In panels
 * of the other side's columns. The comments name the shapes for out. */
static void rotate_gradient(product_chain *chain, const basis_side *first, const basis_side *second)
{
    int64_t width = first->width, rank = first->rank;
    int64_t cols = even_part(second->width, chain->room / (width + rank));
    float *g = take(chain, width * cols), *t = take(chain, rank * cols);
    for (int64_t j = 0; j < second->width && goes_on(chain); j += cols) {
        int64_t some = sebp_min(cols, second->width - j);
        /* G = dY^T X[:, j]: N x some */
        sebp_product to_g = {.m = width, .n = some, .k = chain->call->m};
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
        multiply(chain, to_g);
        multiply(chain, to_t);
        /* R (+)= T u_in[j] */
        to_r(chain, first, 0, rank, t, some, j, chain->add || j > 0);
    }
}

static void rotate(product_chain *chain, sebp_rotation order)
{
    basis_side *out = &chain->out, *in = &chain->in;
    switch (order) {
    case SEBP_ROTATE_AUTO: /* replaced by an order before */
        break;
    case SEBP_ROTATE_FACTORS:
        rotate_factors(chain);
        break;
    case SEBP_ROTATE_DY:
        rotate_one(chain, out, in);
        break;
    case SEBP_ROTATE_X:
        rotate_one(chain, in, out);
        break;
    case SEBP_ROTATE_OUT_IN:
        rotate_gradient(chain, out, in);
        break;
    case SEBP_ROTATE_IN_OUT:
        rotate_gradient(chain, in, out);
        break;
    }
}

/* The gradient once the active rows are known. */
static void gradient_on_rows(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                             const sebp_matrix *x, sebp_rotation order, const sebp_matrix *r)
{
    const sebp_backend *backend = call->backend;
    const int64_t slack = 4 * 16; /* at most four arrays are taken, each in whole cache lines */
    product_chain chain = {.call = call, .dtype = dy->dtype, .r = r};
    chain.out = (basis_side){.factor = sebp_active_operand(call, dy, false)};
    chain.in = (basis_side){.factor = sebp_x_operand(call, x, false)};
    sebp_basis_on_device(call, basis, &chain.out.basis, &chain.in.basis);
    basis_side *sides[] = {&chain.out, &chain.in};
    for (int i = 0; i < 2; i++) {
        sides[i]->width = sides[i]->basis.cols;
        sides[i]->rank = sides[i]->basis.rows;
    }
    chain.add = call->options.dw_write == SEBP_ACCUMULATE;
    chain.room = backend->max_scratch(call->device) / (int64_t)sizeof(float) - slack;

    if (call->m == 0) { /* R (+)= 0 */
        chain.pass = RUN;
        to_r(&chain, &chain.out, 0, chain.out.rank, NULL, 0, 0, chain.add);
        return;
    }
    rotate(&chain, order); /* in pass MEASURE, which runs no product */
    sebp_reserve_scratch(call, chain.taken * (int64_t)sizeof(float), "the rotated factors");
    for (chain.pass = RESERVE; chain.pass <= RUN && goes_on(&chain); chain.pass++) {
        chain.taken = 0;
        chain.scratch = backend->scratch(call->device);
        rotate(&chain, order);
    }
    sebp_reserve_scratch(call, 0, "");
}

/* Takes the cheapest order that there is enough scratch memory for. An order that lacks memory has
 * written nothing. */
static void gradient_by_cheapest(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                                 const sebp_matrix *x, sebp_rotation *order, const sebp_matrix *r)
{
    unsigned tried = 0;
    sebp_rotation next = cheapest(basis, call->m, tried);
    while (next != SEBP_ROTATE_AUTO) {
        call->status = SEBP_SUCCESS; /* the order before lacked memory */
        *order = next;
        tried |= 1U << next;
        gradient_on_rows(call, basis, dy, x, next, r);
        if (call->status != SEBP_ERROR_MEMORY)
            return;
        next = cheapest(basis, call->m, tried);
    }
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
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparsegrad_gradient");
    if (!sebp_require(&call, "basis", basis) || !sebp_require(&call, "dy", dy) ||
        !sebp_require(&call, "x", x) || !sebp_require(&call, "r", r)) {
        return call.status;
    }
    enum { DY, X, R, OUT, IN, COUNT };
    const sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false},
        [X] = {"x", x, false},
        [R] = {"r", r, true},
        [OUT] = {"the basis's out", &basis->out, false},
        [IN] = {"the basis's in", &basis->in, false},
    };
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, OUT); /* a basis is the library's own, on the host */
    sebp_check_no_epilogue(&call);
    sebp_check_unused(&call, "packed_weight", call.options.packed_weight);
    sebp_check_precision(&call);
    sebp_check_same_dtype(&call, &arguments[X], &arguments[DY]);
    sebp_check_f32(&call, &arguments[R]);
    if (rows == NULL)
        sebp_check_unweighted_rule(&call, &call.options.rule);
    sebp_check_write(&call, "dw_write", call.options.dw_write);
    if ((int)rotation < SEBP_ROTATE_AUTO || (int)rotation > SEBP_ROTATE_IN_OUT)
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "unknown rotation %d", (int)rotation);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    int64_t x_rows = call.options.x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(&call, &arguments[DY], dy->rows, basis->out.cols);
    sebp_check_shape(&call, &arguments[X], x_rows, basis->in.cols);
    sebp_check_shape(&call, &arguments[R], basis->out.rows, basis->in.rows);
    sebp_check_aliases(&call, arguments, COUNT);

    sebp_find_rows(&call, dy, rows);
    if (sebp_call_goes_on(&call)) {
        if (rotation == SEBP_ROTATE_AUTO)
            gradient_by_cheapest(&call, basis, dy, x, &rotation, r);
        else
            gradient_on_rows(&call, basis, dy, x, rotation, r);
        report(&call, dy, x, rotation);
    }
    return sebp_call_end(&call);
}

/* ---- the step ---- */

sebp_status sebp_sparsegrad_update(sebp_context *context, const sebp_basis *basis,
                                   const sebp_sparse *s, const sebp_matrix *w)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparsegrad_update");
    if (!sebp_require(&call, "basis", basis) || !sebp_require(&call, "s", s) ||
        !sebp_require(&call, "w", w)) {
        return call.status;
    }
    const sebp_argument arguments[] = {{"w", w, true},
                                       {"the basis's out", &basis->out, false},
                                       {"the basis's in", &basis->in, false}};
    enum { COUNT = sizeof arguments / sizeof *arguments };
    sebp_check_views(&call, arguments, 1); /* a basis is the library's own, on the host */
    sebp_check_sparse(&call, "s", s);
    sebp_check_sparse_finite(&call, "s", s);
    sebp_check_sparse_shape(&call, "s", s, basis->out.rows, basis->in.rows);
    sebp_check_shape(&call, &arguments[0], basis->out.cols, basis->in.cols);
    sebp_check_aliases(&call, arguments, COUNT);
    if (!sebp_call_goes_on(&call) || s->count == 0)
        return call.status;

    sebp_matrix out, in;
    sebp_basis_on_device(&call, basis, &out, &in);
    if (sebp_call_goes_on(&call)) {
        sebp_status status = call.backend->sparse_update(call.device, s, &out, &in, w);
        sebp_call_keep(&call, status, "adding to w");
    }
    return sebp_call_end(&call);
}
