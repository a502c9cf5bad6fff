/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench --method: what one training step costs on one layer, in time and memory, when all of
 * its weight trains (full), a product of two thin matrices beside it (LoRA), k elements chosen once
 * (mask), or the k elements of its gradient that are largest as they are (MeProp) or in other bases
 * (SparseGrad).
 *
 * A step has phases: forward, backward (dX, the bias, and the gradient of the weight where that
 * comes out of the same call), gradient (choosing elements), step (optimizer, and what moves the
 * weight). The methods take turns, repetition by repetition. Beside SparseGrad, each order of its
 * products that the cost model deems near its best is timed, to see whether the model chose well.
 */
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "inputs.h"
#include "method_layer.h"
#include "method_report.h"
#include "methods.h"

enum { SAMPLES = 8 };

/* ---- A step ----------------------------------------------------------------------------------*/

static void forward(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    if (method == LORA) {
        succeed(l, sebp_lora_forward(l->context, &at[X], &at[W], &at[BIAS], &at[A], &at[B],
                                     l->scale, l->rows, NULL, &at[H], &at[Y]));
    } else {
        succeed(l,
                sebp_linear_forward(l->context, &at[X], &at[W], &at[BIAS], l->rows, NULL, &at[Y]));
    }
}

static void backward(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    if (method == LORA) {
        succeed(l, sebp_lora_backward(l->context, &at[DY], &at[X], &at[W], &at[A], &at[B], &at[H],
                                      l->scale, l->rows, NULL, &at[DH], &at[DX], &at[DA],
                                      &at[LORA_DB]));
    } else {
        succeed(l, sebp_linear_backward(l->context, &at[DY], &at[X], &at[W], l->rows, NULL, &at[DX],
                                        method == FULL ? &at[DW] : NULL, &at[DB]));
    }
}

static void rotate(layer *l, sebp_rotation order)
{
    succeed(l, sebp_sparsegrad_gradient(l->context, l->basis, &l->at[DY], &l->at[X], l->rows, NULL,
                                        order, &l->at[R]));
}

static void choose(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    sebp_sparse *kept = &l->kept[method];
    if (method == MASK) {
        succeed(l, sebp_sampled_product(l->context, &at[DY], &at[X], l->rows, NULL, kept));
        return;
    }
    if (method == MEPROP) {
        succeed(l, sebp_meprop_gradient(l->context, &at[DY], &at[X], l->rows, NULL, kept));
        return;
    }
    if (sebp_sparse_adamw_support(l->states[method]) != NULL) {
        succeed(l, sebp_sparsegrad_kept(l->context, l->basis, &at[DY], &at[X], l->rows, NULL,
                                        SEBP_ROTATE_AUTO, kept));
    } else {
        rotate(l, SEBP_ROTATE_AUTO);
        succeed(l, sebp_sparse_top(l->context, &at[R], kept));
    }
}

static void dense_step(layer *l, int gradient, int weight, int moment1, int moment2)
{
    const sebp_matrix *at = l->at;
    succeed(l, sebp_adamw_step(l->context, &at[gradient], l->steps, &l->adamw, &at[weight],
                               &at[moment1], &at[moment2]));
}

static void step(layer *l, int method)
{
    if (method == FULL) {
        dense_step(l, DW, W, V1, V2);
    } else if (method == LORA) {
        dense_step(l, DA, A, A1, A2);
        dense_step(l, LORA_DB, B, B1, B2);
    } else {
        const sebp_sparse *kept = &l->kept[method];
        succeed(l, sebp_sparse_adamw_step(l->context, l->states[method], &l->adamw, kept));
        if (method != SPARSEGRAD)
            succeed(l, sebp_sparse_add(l->context, kept, &l->at[W]));
        else
            succeed(l, sebp_sparsegrad_update(l->context, l->basis, kept, &l->at[W]));
    }
}

static void perform(layer *l, int method, int phase)
{
    static void (*const phases[PHASES])(layer *, int) = {forward, backward, choose, step};
    phases[phase](l, method);
}

/* ---- Time ------------------------------------------------------------------------------------*/

static void measure(layer *l, int method)
{
    run *r = l->runs[method];
    double begin = now_ms();
    for (int phase = 0; phase < PHASES; phase++) {
        if (!(r->phases >> phase & 1))
            continue;
        double start = now_ms();
        perform(l, method, phase);
        r->ms[phase][r->count] = now_ms() - start;
    }
    r->total_ms[r->count++] = now_ms() - begin;
}

static void measure_order(layer *l, int order)
{
    run *r = l->orders[order];
    double begin = now_ms();
    rotate(l, (sebp_rotation)order);
    r->ms[GRADIENT][r->count++] = now_ms() - begin;
}

static void measure_all(layer *l)
{
    double begin = now_ms();
    for (int round = 0; round < MAX_ROUNDS; round++) {
        if (round >= l->asked->repetitions && now_ms() - begin >= l->asked->seconds * 1e3)
            break;
        l->steps++;
        for (int method = 0; method < METHODS; method++) {
            if (is_asked(l, method))
                measure(l, method);
        }
        for (int order = 1; order < ORDERS; order++) {
            if (l->orders[order] != NULL)
                measure_order(l, order);
        }
    }
}

/* ---- Verification ----------------------------------------------------------------------------*/

/* The sum of a matrix, by which verify_method() sees that a step has changed it. */
static double sum_of(const layer *l, int which)
{
    const sebp_matrix *a = &l->at[which];
    double sum = 0;
    for (int64_t i = 0; i < a->rows; i++) {
        for (int64_t j = 0; j < a->cols; j++)
            sum += element(a, i, j);
    }
    return sum;
}

static void verify_method(layer *l, int method)
{
    int trained = method == LORA ? B : W;
    double before = sum_of(l, trained);
    for (int phase = 0; phase < PHASES; phase++) {
        if (l->runs[method]->phases >> phase & 1)
            perform(l, method, phase);
    }
    double after = sum_of(l, trained);
    if (!isfinite(after) || after == before) {
        die(FAILED, "%s, %s: the weights sum to %g before the step and %g after", l->sizes->name,
            method_names[method], before, after);
    }
    if (l->states[method] != NULL && sebp_sparse_adamw_count(l->states[method]) != l->k) {
        die(FAILED, "%s, %s: %" PRId64 " elements were kept, not %" PRId64, l->sizes->name,
            method_names[method], sebp_sparse_adamw_count(l->states[method]), l->k);
    }
}

/* Element (i, j) of R in double precision, and the sum of its terms' magnitudes over the rows. */
static double reference(const layer *l, int64_t i, int64_t j, double *magnitude)
{
    const int64_t *active = sebp_rows_indices(l->rows);
    double sum = 0;
    *magnitude = 0;
    for (int64_t t = 0; t < l->active; t++) {
        double out = 0, in = 0;
        for (int64_t n = 0; n < l->at[DY].cols; n++)
            out += element(&l->at[DY], active[t], n) * element(&l->at[U_OUT], i, n);
        for (int64_t k = 0; k < l->at[X].cols; k++)
            in += element(&l->at[X], active[t], k) * element(&l->at[U_IN], j, k);
        sum += out * in;
        *magnitude += fabs(out * in);
    }
    return sum;
}

/* Each order of products gives the same R, up to rounding, which grows with the square root of the
 * number of terms as their signs are random: that of sums, and that of what a precision rounds. */
static void verify_orders(layer *l)
{
    const sebp_matrix *r = &l->at[R];
    double expected[SAMPLES], bound[SAMPLES];
    int64_t row[SAMPLES], col[SAMPLES];
    double terms = (double)(l->sizes->n + l->sizes->k + l->active);
    for (int s = 0; s < SAMPLES; s++) {
        uint64_t seed = l->asked->seed + 2000, index = 2 * (uint64_t)s;
        row[s] = (int64_t)(random_bits(seed, index) % (uint64_t)r->rows);
        col[s] = (int64_t)(random_bits(seed, index + 1) % (uint64_t)r->cols);
        expected[s] = reference(l, row[s], col[s], &bound[s]);
        bound[s] *= 16 * ((double)FLT_EPSILON * sqrt(terms) +
                          rounding_of(l->asked->precision, 0) / sqrt((double)l->active + 1));
    }
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        memset(r->data, 0xff, matrix_bytes(r)); /* all NaN */
        rotate(l, (sebp_rotation)order);
        for (int s = 0; s < SAMPLES; s++) {
            if (!(fabs(element(r, row[s], col[s]) - expected[s]) <= bound[s])) {
                die(FAILED, "%s, order %s: R[%" PRId64 ",%" PRId64 "] is %.9g, should be %.9g",
                    l->sizes->name, order_names[order], row[s], col[s], element(r, row[s], col[s]),
                    expected[s]);
            }
        }
    }
}

/* Of the elements that a mask keeps, some against double precision. */
static void verify_mask(layer *l)
{
    const int64_t *active = sebp_rows_indices(l->rows);
    sebp_sparse *kept = &l->kept[MASK];
    choose(l, MASK);
    for (int s = 0; s < SAMPLES; s++) {
        int64_t i = (int64_t)(random_bits(l->asked->seed + 4000, (uint64_t)s) % (uint64_t)l->k);
        int64_t row = kept->indices[i] / kept->cols, col = kept->indices[i] % kept->cols;
        double sum = 0, magnitude = 0;
        for (int64_t t = 0; t < l->active; t++) {
            double term = element(&l->at[DY], active[t], row) * element(&l->at[X], active[t], col);
            sum += term;
            magnitude += fabs(term);
        }
        double bound = 16 * (double)FLT_EPSILON * sqrt((double)l->active) * magnitude;
        if (!(fabs((double)kept->values[i] - sum) <= bound)) {
            die(FAILED, "%s, mask: dW[%" PRId64 ",%" PRId64 "] is %.9g, should be %.9g",
                l->sizes->name, row, col, (double)kept->values[i], sum);
        }
    }
}

static void verify(layer *l)
{
    l->steps = 1;
    for (int method = 0; method < METHODS; method++) {
        if (is_asked(l, method))
            verify_method(l, method);
    }
    if (is_asked(l, MASK))
        verify_mask(l);
    if (is_asked(l, SPARSEGRAD))
        verify_orders(l);
}

/* ---- Comparison ------------------------------------------------------------------------------*/

static void compare_on(const machine *m, layer *l)
{
    const shape *s = l->sizes;
    char reason[128];
    place_inputs(l);
    if (!l->asked->csv) {
        printf("\n%s: M %" PRId64 ", K %" PRId64 ", N %" PRId64 ", %s; %" PRId64
               " active rows; %" PRId64 " elements kept, LoRA of rank %" PRId64 "\n",
               s->name, s->m, s->k, s->n, sebp_dtype_name(l->dtype), l->active, l->k, l->rank);
    }
    if (!open_layer(l, m, reason, sizeof reason)) {
        print_unmeasured(m, l, reason);
        return;
    }
    verify(l);
    if (l->asked->fixed_support && is_asked(l, SPARSEGRAD))
        fix_support(l, SPARSEGRAD);
    if (l->asked->verify_only) {
        print_unmeasured(m, l, "verified");
    } else {
        measure_all(l);
        print_results(m, l);
    }
    close_layer(l);
}

void compare_methods(const machine *m, const options *o)
{
    print_heading(m, o);
    for (int i = 0; i < o->shape_count; i++) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int j = 0; j < o->activity_count && (o->dtypes >> bf16 & 1); j++) {
                layer l = {.asked = o, .sizes = &o->shapes[i], .activity = o->activities[j]};
                l.context = m->contexts[m->gemm];
                l.dtype = bf16 ? SEBP_BF16 : SEBP_F32;
                compare_on(m, &l);
                if (fflush(stdout) != 0)
                    die(FAILED, "cannot write: %s", strerror(errno));
            }
        }
    }
}
