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
#include "rotate.h"

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

/* The cheapest order that has not been tried, by the bits of `tried`; AUTO where all have. FACTORS costs
 * `saved` less where it computes few elements of R alone. */
static sebp_rotation cheapest(const sebp_basis *basis, int64_t m, double saved, unsigned tried)
{
    sebp_rotation best = SEBP_ROTATE_AUTO;
    double min = INFINITY;
    for (int order = SEBP_ROTATE_FACTORS; order <= SEBP_ROTATE_IN_OUT; order++) {
        double cost = sebp_sparsegrad_cost(basis, m, (sebp_rotation)order);
        if (order == SEBP_ROTATE_FACTORS)
            cost -= saved;
        if (!(tried & 1U << order) && cost < min) {
            best = (sebp_rotation)order;
            min = cost;
        }
    }
    return best;
}

sebp_rotation sebp_sparsegrad_order(const sebp_basis *basis, int64_t m)
{
    return basis != NULL && m >= 0 ? cheapest(basis, m, 0, 0) : SEBP_ROTATE_AUTO;
}

/* ---- the gradient ---- */

/* Takes the cheapest order that there is enough scratch memory for. An order that lacks memory has
 * written nothing. */
static void gradient_by_cheapest(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                                 const sebp_matrix *x, sebp_rotation *order,
                                 const sebp_rotated_target *target)
{
    /* The last product of FACTORS, m p q multiply-adds, goes where elements are computed alone. What
     * they take instead is little beside the other products. */
    double saved = 0;
    if (sebp_rotate_samples(call, target))
        saved = (double)call->m * (double)basis->out.rows * (double)basis->in.rows;
    unsigned tried = 0;
    sebp_rotation next = cheapest(basis, call->m, saved, tried);
    while (next != SEBP_ROTATE_AUTO) {
        call->status = SEBP_SUCCESS; /* the order before lacked memory */
        *order = next;
        tried |= 1U << next;
        sebp_rotate(call, basis, dy, x, next, target);
        if (call->status != SEBP_ERROR_MEMORY)
            return;
        next = cheapest(basis, call->m, saved, tried);
    }
}

static void report(const sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                   sebp_rotation order)
{
    static const char *const names[] = {"auto", "factors", "dy", "x", "out-in", "in-out"};
    if (!sebp_call_goes_on(call))
        return; /* what was refused may be the order */
    const char *const path[] = {names[order], NULL};
    sebp_report(call, dy->rows, x->cols, dy->cols, dy->dtype, path);
}

/* Checks what both functions take. */
static void check_gradient(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                           const sebp_matrix *x, const sebp_rows *rows,
                           const sebp_linear_options *options, sebp_rotation rotation,
                           const sebp_rotated_target *target)
{
    enum { DY, X, R, OUT, IN, VALUES, INDICES, COUNT };
    const sebp_sparse *kept = target->kept;
    sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false},
        [X] = {"x", x, false},
        [R] = {"r", target->r, true},
        [OUT] = {"the basis's out", &basis->out, false},
        [IN] = {"the basis's in", &basis->in, false},
    };
    sebp_take_options(call, options);
    sebp_check_views(call, arguments, OUT); /* a basis is the library's own, on the host */
    sebp_check_no_epilogue(call);
    sebp_check_unused(call, "packed_weight", call->options.packed_weight);
    sebp_check_precision(call);
    if (kept != NULL)
        sebp_check_sparse(call, "kept", kept);
    sebp_check_same_dtype(call, &arguments[X], &arguments[DY]);
    sebp_check_f32(call, &arguments[R]);
    if (rows == NULL)
        sebp_check_unweighted_rule(call, &call->options.rule);
    sebp_check_write(call, "dw_write", call->options.dw_write);
    if ((int)rotation < SEBP_ROTATE_AUTO || (int)rotation > SEBP_ROTATE_IN_OUT)
        sebp_call_fail(call, SEBP_ERROR_VALUE, "unknown rotation %d", (int)rotation);
    sebp_check_rows(call, rows, "dy", dy->rows);
    int64_t x_rows = call->options.x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(call, &arguments[DY], dy->rows, basis->out.cols);
    sebp_check_shape(call, &arguments[X], x_rows, basis->in.cols);
    sebp_check_shape(call, &arguments[R], basis->out.rows, basis->in.rows);
    if (kept != NULL)
        sebp_check_sparse_shape(call, "kept", kept, basis->out.rows, basis->in.rows);
    sebp_matrix values, indices;
    if (kept != NULL && sebp_call_goes_on(call)) {
        sebp_kept_arrays(kept, &values, &indices);
        arguments[VALUES] = (sebp_argument){"the values of kept", &values, true};
        arguments[INDICES] = (sebp_argument){"the indices of kept", &indices, false};
    }
    sebp_check_aliases(call, arguments, COUNT);
}

static void run_gradient(sebp_call *call, const sebp_basis *basis, const sebp_matrix *dy,
                         const sebp_matrix *x, sebp_rotation *rotation,
                         const sebp_rotated_target *target)
{
    if (!sebp_call_goes_on(call))
        return;
    if (*rotation == SEBP_ROTATE_AUTO)
        gradient_by_cheapest(call, basis, dy, x, rotation, target);
    else
        sebp_rotate(call, basis, dy, x, *rotation, target);
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
    const sebp_rotated_target target = {.r = r};
    check_gradient(&call, basis, dy, x, rows, options, rotation, &target);

    sebp_find_rows(&call, dy, rows);
    run_gradient(&call, basis, dy, x, &rotation, &target);
    report(&call, dy, x, rotation);
    return sebp_call_end(&call);
}

sebp_status sebp_sparsegrad_kept(sebp_context *context, const sebp_basis *basis,
                                 const sebp_matrix *dy, const sebp_matrix *x, const sebp_rows *rows,
                                 const sebp_linear_options *options, sebp_rotation rotation,
                                 const sebp_sparse *kept)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparsegrad_kept");
    if (!sebp_require(&call, "basis", basis) || !sebp_require(&call, "dy", dy) ||
        !sebp_require(&call, "x", x) || !sebp_require(&call, "kept", kept)) {
        return call.status;
    }
    sebp_rotated_target target = {.kept = kept};
    check_gradient(&call, basis, dy, x, rows, options, rotation, &target);
    if (!sebp_call_goes_on(&call) || kept->count == 0)
        return call.status;
    sebp_find_rows(&call, dy, rows);
    target.sums = sebp_make_sums(&call, kept);
    run_gradient(&call, basis, dy, x, &rotation, &target);
    sebp_write_sums(&call, target.sums, kept);
    call.backend->free(call.device, target.sums);
    report(&call, dy, x, rotation);
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
