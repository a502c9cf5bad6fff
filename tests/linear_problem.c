/* SPDX-License-Identifier: Apache-2.0 */
#include "linear_problem.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static int64_t random_size(int64_t max)
{
    if (testing_chance(0.05)) {
        return 0;
    }
    if (testing_chance(0.1)) {
        return 1;
    }
    return testing_between(1, testing_chance(0.5) ? 20 : max);
}

/* Which of M rows are active, but for the found kinds. */
static reference_rows random_active(rows_kind kind, int64_t M)
{
    reference_rows active = reference_rows_all(M);
    int64_t low = 0, high = M; /* a run */
    double keep = 1;
    int64_t length = 1, sequence = 1;
    switch (kind) {
    case ROWS_NONE:
        high = 0;
        break;
    case ROWS_ONE:
        low = M > 0 ? testing_between(0, M - 1) : 0;
        high = M > 0 ? low + 1 : 0;
        break;
    case ROWS_RUN:
        low = testing_between(0, M);
        high = testing_between(low, M);
        break;
    case ROWS_SCATTERED:
        keep = testing_chance(0.5) ? 0.1 : 0.6;
        break;
    case ROWS_PADDED:
        sequence = testing_between(1, 12);
        length = testing_between(1, sequence);
        break;
    default:
        break;
    }
    active.count = 0;
    for (int64_t i = low; i < high; i++) {
        if (i % sequence < length && testing_chance(keep)) {
            active.indices[active.count++] = i;
        }
    }
    return active;
}

void linear_poison_row(const sebp_matrix *matrix, int64_t row)
{
    for (int64_t j = 0; j < matrix->cols; j++) {
        testing_set(matrix, row, j, testing_chance(0.5) ? NAN : INFINITY);
    }
}

linear_problem linear_problem_make(int64_t M, int64_t N, int64_t K, sebp_dtype dtype,
                                   testing_values values, rows_kind kind)
{
    linear_problem p = {.M = M, .N = N, .K = K, .dtype = dtype, .values = values};
    p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    p.dy = testing_random_matrix(M, N, dtype, values);
    p.w = testing_random_matrix(N, K, dtype, values);
    p.bias = testing_random_matrix(1, N, testing_dtype(), values);
    if (kind >= ROWS_FOUND) {
        testing_zero_rows(&p.dy, testing_chance(0.5) ? 0.2 : 0.7);
        p.options.rule.kind = (sebp_rule_kind)(kind - ROWS_FOUND);
        p.options.rule.threshold = values == TESTING_INTEGER ? 3.0 : 0.9;
        p.options.rule.count = testing_between(1, M + 2);
        p.options.rule.delta = testing_between(0, 3) * 0.25;
        p.active = reference_rows_find(&p.dy, &p.options.rule);
    } else {
        p.active = random_active(kind, M);
        testing_succeed(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows), NULL);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    p.options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_ZERO : SEBP_INACTIVE_LEAVE;

    /* What must not be read would spread. */
    for (int64_t i = 0; i < M; i++) {
        if (!reference_rows_have(&p.active, i)) {
            if (p.rows != NULL) {
                linear_poison_row(&p.dy, i);
            }
            if (!p.options.x_is_compact) {
                linear_poison_row(&p.x, i);
            }
        }
    }
    return p;
}

linear_problem linear_problem_random(testing_values values)
{
    int64_t sizes[3] = {random_size(70), random_size(70), random_size(70)};
    if (testing_chance(0.3)) {
        sizes[testing_between(0, 2)] = testing_between(100, 700);
    }
    return linear_problem_make(sizes[0], sizes[1], sizes[2], testing_dtype(), values,
                               (rows_kind)testing_between(0, ROWS_KINDS - 1));
}

void linear_problem_free(linear_problem *p)
{
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->dy);
    testing_release(&p->x);
    testing_release(&p->w);
    testing_release(&p->bias);
}

/* An output, as it was before and as it should become. */
typedef struct output {
    int wanted;
    sebp_matrix now;
    sebp_matrix before;
    reference want;
} output;

static output make_output(int64_t rows, int64_t cols, sebp_dtype dtype, int holds_values,
                          testing_values values)
{
    output out = {.wanted = 1};
    out.now = testing_matrix(rows, cols, testing_stride(cols), dtype);
    if (holds_values) {
        testing_fill(&out.now, values);
    }
    out.before = testing_copy(&out.now);
    return out;
}

static const sebp_matrix *view_of(const output *out)
{
    return out->wanted ? &out->now : NULL;
}

static void restore(output *out)
{
    if (out->wanted) {
        testing_release(&out->now);
        out->now = testing_copy(&out->before);
    }
}

static void free_output(output *out)
{
    if (out->wanted) {
        testing_release(&out->now);
        testing_release(&out->before);
        reference_free(&out->want);
    }
}

static int same_row(const sebp_matrix *a, const sebp_matrix *b, int64_t i)
{
    size_t bytes = sebp_dtype_bytes(a->dtype);
    return memcmp((const char *)a->data + (size_t)(i * a->stride) * bytes,
                  (const char *)b->data + (size_t)(i * b->stride) * bytes,
                  (size_t)a->cols * bytes) == 0;
}

static void check_left_alone(const linear_problem *p, const output *out, const char *what)
{
    for (int64_t i = 0; i < p->M; i++) {
        if (!reference_rows_have(&p->active, i) && !same_row(&out->now, &out->before, i)) {
            ck_abort_msg("inactive row %" PRId64 " of %s was written to", i, what);
        }
    }
}

static reference_mode mode_of(const linear_problem *p)
{
    return p->values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND;
}

static sebp_status call_backward(sebp_context *context, const linear_problem *p, const output *dx,
                                 const output *dw, const output *db)
{
    return sebp_linear_backward(context, &p->dy, dw->wanted ? &p->x : NULL,
                                dx->wanted ? &p->w : NULL, p->rows, &p->options, view_of(dx),
                                view_of(dw), view_of(db));
}

void linear_check_backward(sebp_context *context, linear_problem *p)
{
    output dx = {0}, dw = {0}, db = {0};
    p->options.dx_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p->options.dw_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p->options.db_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    int leave = p->options.inactive == SEBP_INACTIVE_LEAVE;
    if (testing_chance(0.8)) {
        int add = p->options.dx_write == SEBP_ACCUMULATE;
        dx = make_output(p->M, p->K, testing_dtype(), add, p->values);
        dx.want = reference_dx(&p->dy, &p->w, &p->active, add ? &dx.before : NULL);
    }
    if (testing_chance(0.8)) {
        int add = p->options.dw_write == SEBP_ACCUMULATE;
        dw = make_output(p->N, p->K, testing_dtype(), add, p->values);
        dw.want = reference_dw(&p->dy, &p->x, &p->active, p->options.x_is_compact,
                               add ? &dw.before : NULL);
    }
    if (testing_chance(0.8)) {
        int add = p->options.db_write == SEBP_ACCUMULATE;
        db = make_output(1, p->N, testing_dtype(), add, p->values);
        db.want = reference_db(&p->dy, &p->active, add ? &db.before : NULL);
    }
    sebp_matrix dy_before = testing_copy(&p->dy), x_before = testing_copy(&p->x);
    sebp_matrix w_before = testing_copy(&p->w);

    testing_succeed(call_backward(context, p, &dx, &dw, &db), context);
    if (dx.wanted && leave) {
        check_left_alone(p, &dx, "dX");
        /* They are right as they are: poison, or what was there. */
        for (int64_t i = 0; i < p->M; i++) {
            for (int64_t j = 0; j < p->K && !reference_rows_have(&p->active, i); j++) {
                dx.want.value[i * p->K + j] = testing_get(&dx.before, i, j);
            }
        }
    }
    if (dx.wanted) {
        reference_check(&dx.want, &dx.now, mode_of(p), "dX");
    }
    if (dw.wanted) {
        reference_check(&dw.want, &dw.now, mode_of(p), "dW");
    }
    if (db.wanted) {
        reference_check(&db.want, &db.now, mode_of(p), "db");
    }

    output dx_first = dx, dw_first = dw, db_first = db;
    dx_first.now = dx.wanted ? testing_copy(&dx.now) : dx.now;
    dw_first.now = dw.wanted ? testing_copy(&dw.now) : dw.now;
    db_first.now = db.wanted ? testing_copy(&db.now) : db.now;
    restore(&dx);
    restore(&dw);
    restore(&db);
    testing_succeed(call_backward(context, p, &dx, &dw, &db), context);
    ck_assert(!dx.wanted || testing_same_bits(&dx.now, &dx_first.now));
    ck_assert(!dw.wanted || testing_same_bits(&dw.now, &dw_first.now));
    ck_assert(!db.wanted || testing_same_bits(&db.now, &db_first.now));
    ck_assert(testing_same_bits(&p->dy, &dy_before) && testing_same_bits(&p->x, &x_before) &&
              testing_same_bits(&p->w, &w_before));

    testing_free(dx_first.now.data);
    testing_free(dw_first.now.data);
    testing_free(db_first.now.data);
    testing_release(&dy_before);
    testing_release(&x_before);
    testing_release(&w_before);
    free_output(&dx);
    free_output(&dw);
    free_output(&db);
}

void linear_check_forward(sebp_context *context, const linear_problem *p)
{
    const sebp_matrix *bias = testing_chance(0.7) ? &p->bias : NULL;
    output y = make_output(p->M, p->N, testing_dtype(), 0, p->values);
    y.want = reference_y(&p->x, &p->w, bias, &p->active, p->options.x_is_compact);

    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, bias, p->rows, &p->options, &y.now),
                    context);
    if (p->options.inactive == SEBP_INACTIVE_LEAVE) {
        check_left_alone(p, &y, "Y");
        for (int64_t i = 0; i < p->M; i++) {
            for (int64_t j = 0; j < p->N && !reference_rows_have(&p->active, i); j++) {
                y.want.value[i * p->N + j] = testing_get(&y.before, i, j);
            }
        }
    }
    reference_check(&y.want, &y.now, mode_of(p), "Y");

    sebp_matrix first = testing_copy(&y.now);
    restore(&y);
    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, bias, p->rows, &p->options, &y.now),
                    context);
    ck_assert(testing_same_bits(&first, &y.now));
    testing_release(&first);
    free_output(&y);
}
