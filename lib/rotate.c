/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rotate.c
 * The chain of products that makes R, over the backend table, in panels that fit in the scratch memory.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "basis.h"
#include "integers.h"
#include "rotate.h"

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
    sebp_matrix r;    /* in the scratch memory where elements are read from it */
    bool add;         /* add to R */
    const sebp_rotated_target *target;
    bool samples; /* the last product computes the elements alone, and there is no R */
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
    float *r = chain->r.data; /* NULL: in the scratch memory, in a pass that computes nothing */
    sebp_product part = {.k = depth, .c_stride = chain->r.stride, .accumulate = accumulate};
    if (first == &chain->out) {
        part.m = count;
        part.n = chain->in.rank;
        part.a = dense(t, depth, false);
        part.b = vectors(&chain->in, 0, from, true);
        part.c = r != NULL ? r + at * chain->r.stride : NULL;
    } else {
        part.m = chain->out.rank;
        part.n = count;
        part.a = vectors(&chain->out, 0, from, false);
        part.b = dense(t, depth, true);
        part.c = r != NULL ? r + at : NULL;
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

/* R (+)= A^T B, A: count x p, B: count x q, or of that the elements kept. */
static void to_last(const product_chain *chain, const float *a, const float *b, int64_t count,
                    bool is_later)
{
    const sebp_operand of_a = dense(a, chain->out.rank, true);
    const sebp_operand of_b = dense(b, chain->in.rank, false);
    if (!chain->samples) {
        multiply(chain, (sebp_product){.m = chain->out.rank,
                                       .n = chain->in.rank,
                                       .k = count,
                                       .accumulate = chain->add || is_later,
                                       .a = of_a,
                                       .b = of_b,
                                       .c = chain->r.data,
                                       .c_stride = chain->r.stride});
        return;
    }
    sebp_call *call = chain->call;
    sebp_sampled elements = {.m = count, .a = of_a, .b = of_b, .accumulate = is_later};
    elements.a.transposed = false;
    elements.kept = chain->target->kept;
    elements.sums = chain->pass == RUN ? chain->target->sums : NULL;
    if (chain->pass != MEASURE && goes_on(chain)) {
        sebp_call_keep(call, call->backend->sampled_product(call->device, &elements),
                       "summing elements");
    }
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
        multiply(chain, to_a);
        multiply(chain, to_b);
        to_last(chain, a, b, count, i > 0);
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
    if (chain->target->r == NULL && !chain->samples)
        chain->r.data = take(chain, out->rank * in->rank);
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

/* Whether an R in the scratch memory leaves at least as much to the panels. */
static bool fits(const sebp_call *call, int64_t rank_out, int64_t rank_in)
{
    const int64_t bytes = call->backend->max_scratch(call->device);
    return rank_in <= bytes / (int64_t)sizeof(float) / 2 / rank_out;
}

bool sebp_rotate_samples(const sebp_call *call, const sebp_rotated_target *target)
{
    const sebp_backend *backend = call->backend;
    const sebp_sparse *kept = target->kept;
    if (kept == NULL)
        return false;
    const sebp_sampled elements = {.m = call->m, .kept = kept};
    return !fits(call, kept->rows, kept->cols) ||
           backend->sampled_is_cheaper(call->device, &elements);
}

/* Elements of no rows are zero. */
static void zero_elements(sebp_call *call, const sebp_rotated_target *target)
{
    const sebp_sampled none = {.kept = target->kept, .sums = target->sums};
    sebp_call_keep(call, call->backend->sampled_product(call->device, &none), "summing elements");
}

/* The elements of an R in the scratch memory. */
static void take_elements(const product_chain *chain)
{
    sebp_call *call = chain->call;
    sebp_sparse result = *chain->target->kept;
    result.values = chain->target->sums;
    sebp_status status = call->backend->take_elements(call->device, &chain->r, 0, &result);
    if (status == SEBP_ERROR_NONFINITE)
        sebp_call_fail(call, status, "an element of kept is NaN or Inf");
    sebp_call_keep(call, status, "reading elements");
}

void sebp_rotate(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                 const sebp_matrix *x, sebp_rotation order, const sebp_rotated_target *target)
{
    const sebp_backend *backend = call->backend;
    const int64_t slack = 5 * 16; /* at most five arrays are taken, each in whole cache lines */
    product_chain chain = {.call = call, .dtype = dy->dtype, .target = target};
    chain.out = (basis_side){.factor = sebp_active_operand(call, dy, false)};
    chain.in = (basis_side){.factor = sebp_x_operand(call, x, false)};
    sebp_basis_on_device(call, basis, &chain.out.basis, &chain.in.basis);
    basis_side *sides[] = {&chain.out, &chain.in};
    for (int i = 0; i < 2; i++) {
        sides[i]->width = sides[i]->basis.cols;
        sides[i]->rank = sides[i]->basis.rows;
    }
    chain.room = backend->max_scratch(call->device) / (int64_t)sizeof(float) - slack;
    if (target->r != NULL) {
        chain.r = *target->r;
        chain.add = call->options.dw_write == SEBP_ACCUMULATE;
    } else {
        chain.samples = order == SEBP_ROTATE_FACTORS && sebp_rotate_samples(call, target);
        chain.r = sebp_matrix_f32(NULL, chain.out.rank, chain.in.rank);
        if (!chain.samples && fits(call, chain.out.rank, chain.in.rank)) {
            chain.room -= chain.out.rank * chain.in.rank;
        } else if (!chain.samples) {
            chain.room = 0; /* R is too large */
        }
    }

    if (call->m == 0 && target->r == NULL) {
        zero_elements(call, target);
        return;
    }
    if (call->m == 0) { /* R (+)= 0 */
        chain.pass = RUN;
        to_r(&chain, &chain.out, 0, chain.out.rank, NULL, 0, 0, chain.add);
        return;
    }
    if (chain.room < 1) {
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no scratch memory for the rotated factors");
        return;
    }
    rotate(&chain, order); /* in pass MEASURE, which runs no product */
    sebp_reserve_scratch(call, chain.taken * (int64_t)sizeof(float), "the rotated factors");
    for (chain.pass = RESERVE; chain.pass <= RUN && goes_on(&chain); chain.pass++) {
        chain.taken = 0;
        chain.scratch = backend->scratch(call->device);
        rotate(&chain, order);
    }
    if (goes_on(&chain) && target->r == NULL && !chain.samples)
        take_elements(&chain);
    sebp_reserve_scratch(call, 0, "");
}
