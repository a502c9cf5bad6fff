/* SPDX-License-Identifier: Apache-2.0 */
#include "rows.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "inputs.h"

enum { SAMPLES = 256 };

static _Noreturn void wrong(const group *g, const run *r, const char *what, int64_t row,
                            int64_t col, double value, double expected)
{
    die(FAILED,
        "%s (M %" PRId64 ", K %" PRId64 ", N %" PRId64 "), %s %s, gemm %s, %s, %s, %" PRId64
        " active rows: %s[%" PRId64 ",%" PRId64 "] is %.9g, should be %.9g",
        g->sizes->name, g->sizes->m, g->sizes->k, g->sizes->n, sebp_dtype_name(g->dtype),
        forward_names[g->asked->forward], gemm_names[r->gemm],
        r->dense ? "dense" : scattered_names[r->scattered], found_names[r->found], r->active, what,
        row, col, value, expected);
}

/* Element (i, j) of an output in double precision, and the sum of its terms' magnitudes. */
static double reference(const run *r, const layer *l, int which, int64_t i, int64_t j,
                        double *magnitude, int64_t *terms)
{
    const sebp_matrix *at = l->at;
    const int64_t *active = sebp_rows_indices(r->rows);
    double sum = which == Y ? element(&at[B], 0, j) : 0.0;
    *magnitude = fabs(sum);
    *terms = which == Y ? at[X].cols : which == DX ? at[DY].cols : r->active;
    for (int64_t t = 0; t < *terms; t++) {
        double term;
        if (which == Y)
            term = element(&at[X], i, t) * element(&at[W], j, t);
        else if (which == DX)
            term = element(&at[DY], i, t) * element(&at[W], t, j);
        else if (which == DW)
            term = element(&at[DY], active[t], i) * element(&at[X], active[t], j);
        else
            term = element(&at[DY], active[t], j);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

/*
 * A sample of elements against sums in double precision. Rounding errors of a sum of k terms of
 * random sign grow with sqrt(k), so 4 sqrt(k) eps sum|a||b| is wide; and yet a missing term, which
 * is at least 1/4, shows. So do those of the numbers that a precision rounds, each by the share that
 * context.h says.
 */
static void verify_sample(const machine *m, const group *g, const run *r, const layer *l, int which,
                          const char *what)
{
    const sebp_matrix *a = &l->at[which];
    const int64_t *active = sebp_rows_indices(r->rows);
    int by_row = which == Y || which == DX;
    uint64_t seed = g->asked->seed + 1000 + (uint64_t)which;
    const double rounding = rounding_of(g->asked->precision, m->on_gpu);
    for (uint64_t s = 0; s < SAMPLES; s++) {
        int64_t i = (int64_t)(random_bits(seed, 2 * s) % (uint64_t)(by_row ? r->active : a->rows));
        int64_t j = (int64_t)(random_bits(seed, 2 * s + 1) % (uint64_t)a->cols);
        int64_t terms;
        double magnitude;
        i = by_row ? active[i] : i;
        double expected = reference(r, l, which, i, j, &magnitude, &terms);
        double bound = 4 * sqrt((double)terms + 1) * (double)FLT_EPSILON * magnitude;
        bound += rounding * magnitude / sqrt((double)terms + 1) * 4;
        if (a->dtype == SEBP_BF16)
            bound += fabs(expected) * 0x1p-8;
        if (!(fabs(element(a, i, j) - expected) <= bound))
            wrong(g, r, what, i, j, element(a, i, j), expected);
    }
}

/* Every element: exactly zero in inactive rows; in others finite, and nearly all of them nonzero,
 * as sums of random numbers are. */
static void verify_whole(const group *g, const run *r, const layer *l, int which, const char *what)
{
    const sebp_matrix *a = &l->at[which];
    const int64_t *active = sebp_rows_indices(r->rows);
    int by_row = which == Y || which == DX;
    int64_t nonzero = 0, next = 0, rows = by_row ? r->active : a->rows, terms;
    double magnitude;
    for (int64_t i = 0; i < a->rows; i++) {
        int is_active = !by_row || (next < r->active && active[next] == i);
        next += is_active;
        for (int64_t j = 0; j < a->cols; j++) {
            double value = element(a, i, j);
            if (!is_active && value != 0.0)
                wrong(g, r, what, i, j, value, 0.0);
            if (!isfinite(value))
                wrong(g, r, what, i, j, value, reference(r, l, which, i, j, &magnitude, &terms));
            nonzero += value != 0.0;
        }
    }
    if ((double)nonzero < 0.9 * (double)rows * (double)a->cols) {
        die(FAILED, "%s: only %" PRId64 " of %" PRId64 " elements of %s are not zero",
            g->sizes->name, nonzero, rows * a->cols, what);
    }
}

void verify_run(const machine *m, const group *g, const run *r)
{
    static const struct {
        int which;
        const char *name;
    } outputs[] = {{Y, "Y"}, {DX, "dX"}, {DW, "dW"}, {DB, "db"}};
    const layer *l = &g->layers[0];
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (!is_needed(g->asked, outputs[i].which))
            continue;
        memset(l->at[outputs[i].which].data, 0xff, matrix_bytes(&l->at[outputs[i].which]));
        if (m->on_gpu) /* all NaN */
            copy_to_gpu(m, g, outputs[i].which);
    }
    prepare_run(r, l, m->memory_threads);
    if (m->on_gpu && r->found)
        copy_to_gpu(m, g, FOUND);
    perform_run(m, g, r, m->on_gpu ? &g->on_gpu : l);
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (is_needed(g->asked, outputs[i].which)) {
            if (m->on_gpu)
                copy_from_gpu(m, g, outputs[i].which);
            verify_sample(m, g, r, l, outputs[i].which, outputs[i].name);
            verify_whole(g, r, l, outputs[i].which, outputs[i].name);
        }
    }
}
