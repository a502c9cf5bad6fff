/* SPDX-License-Identifier: Apache-2.0 */
#include "reference.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "testing.h"

double *reference_elements(const sebp_matrix *matrix)
{
    double *data = testing_zeros(matrix->rows * matrix->cols, sizeof *data);
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++) {
            data[i * matrix->cols + j] = testing_get(matrix, i, j);
        }
    }
    return data;
}

reference_rows reference_rows_all(int64_t total)
{
    reference_rows rows = {total, total, testing_zeros(total, sizeof(int64_t))};
    for (int64_t i = 0; i < total; i++) {
        rows.indices[i] = i;
    }
    return rows;
}

int reference_by_index(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left;
    int64_t b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

int reference_rows_have(const reference_rows *rows, int64_t i)
{
    return bsearch(&i, rows->indices, (size_t)rows->count, sizeof i, reference_by_index) != NULL;
}

int reference_rows_equal(const reference_rows *want, const sebp_rows *got)
{
    if (sebp_rows_total(got) != want->total || sebp_rows_count(got) != want->count) {
        return 0;
    }
    const int64_t *indices = sebp_rows_indices(got);
    for (int64_t r = 0; r < want->count; r++) {
        if (indices[r] != want->indices[r]) {
            return 0;
        }
    }
    return 1;
}

void reference_rows_check(reference_rows *want, sebp_rows *got)
{
    ck_assert_int_eq(sebp_rows_total(got), want->total);
    ck_assert_int_eq(sebp_rows_count(got), want->count);
    double activity = want->total > 0 ? (double)want->count / (double)want->total : 0;
    ck_assert(sebp_rows_activity(got) == activity);
    ck_assert((sebp_rows_indices(got) == NULL) == (want->count == 0));
    ck_assert(reference_rows_equal(want, got));
    sebp_rows_destroy(got);
    reference_rows_free(want);
}

reference_rows reference_rows_none(int64_t total)
{
    reference_rows rows = reference_rows_all(total);
    rows.count = 0;
    return rows;
}

void reference_rows_free(reference_rows *rows)
{
    free(rows->indices);
    rows->indices = NULL;
}

typedef struct row_facts {
    int64_t index;
    int finite;
    double largest; /* magnitude */
    double energy;  /* squared norm */
} row_facts;

static row_facts look_at_row(const sebp_matrix *dy, int64_t i)
{
    row_facts row = {i, 1, 0, 0};
    for (int64_t j = 0; j < dy->cols; j++) {
        double value = fabs(testing_get(dy, i, j));
        row.finite &= isfinite(value) != 0;
        row.largest = value > row.largest ? value : row.largest;
        row.energy += value * value;
    }
    return row;
}

/* Rows with NaN or Inf, then larger energy, then lower index. */
static int by_rank(const void *left, const void *right)
{
    const row_facts *a = left;
    const row_facts *b = right;
    if (a->finite != b->finite) {
        return a->finite - b->finite;
    }
    if (a->finite && a->energy != b->energy) {
        return a->energy > b->energy ? -1 : 1;
    }
    return a->index < b->index ? -1 : 1;
}

reference_rows reference_rows_find(const sebp_matrix *dy, const sebp_rule *rule)
{
    int64_t total = dy->rows;
    row_facts *facts = testing_zeros(total, sizeof *facts);
    for (int64_t i = 0; i < total; i++) {
        facts[i] = look_at_row(dy, i);
    }
    qsort(facts, (size_t)total, sizeof *facts, by_rank);
    int64_t nonzero = 0; /* rows of zeros stand last */
    double sum = 0;
    for (int64_t i = total - 1; i >= 0; i--) {
        nonzero += !facts[i].finite || facts[i].largest > 0;
        sum += facts[i].finite ? facts[i].energy : 0;
    }

    reference_rows rows = {total, 0, testing_zeros(total, sizeof(int64_t))};
    int64_t keep = nonzero;
    if (rule->kind == SEBP_RULE_TOP && rule->count < nonzero) {
        keep = rule->count;
    }
    if (rule->kind == SEBP_RULE_ENERGY) {
        double dropped = 0;
        while (keep > 0 && facts[keep - 1].finite &&
               dropped + facts[keep - 1].energy <= rule->delta * sum) {
            dropped += facts[--keep].energy;
        }
    }
    for (int64_t i = 0; i < keep; i++) {
        int active = rule->kind != SEBP_RULE_THRESHOLD || !facts[i].finite ||
                     facts[i].largest > rule->threshold;
        if (active) {
            rows.indices[rows.count++] = facts[i].index;
        }
    }
    qsort(rows.indices, (size_t)rows.count, sizeof *rows.indices, reference_by_index);
    free(facts);
    return rows;
}

sebp_dropped reference_dropped(const sebp_matrix *dy, const reference_rows *rows)
{
    sebp_dropped dropped = {0, 0};
    double sum = 0;
    int finite = 1;
    int64_t next = 0;
    for (int64_t i = 0; i < dy->rows; i++) {
        row_facts row = look_at_row(dy, i);
        finite &= row.finite;
        sum += row.energy;
        if (next < rows->count && rows->indices[next] == i) {
            next++;
        } else if (!row.finite || row.largest > 0) {
            dropped.rows++;
            dropped.energy += row.energy;
        }
    }
    dropped.energy = finite ? (sum > 0 ? dropped.energy / sum : 0) : NAN;
    return dropped;
}

static reference make_reference(int64_t rows, int64_t cols, int64_t terms,
                                const sebp_matrix *before)
{
    reference want = {rows, cols, terms, testing_zeros(rows * cols, sizeof(double)),
                      testing_zeros(rows * cols, sizeof(double))};
    if (before != NULL) {
        want.terms += terms > 0;
        for (int64_t i = 0; i < rows * cols; i++) {
            want.value[i] = testing_get(before, i / cols, i % cols);
        }
    }
    return want;
}

/* A row of sums is begun: the old values count in its bounds only where something is added. */
static void begin_sums(reference *want, int64_t row)
{
    for (int64_t j = 0; j < want->cols; j++) {
        want->magnitude[row * want->cols + j] = fabs(want->value[row * want->cols + j]);
    }
}

/* Adds factor * from to a row of sums. */
static void add_row(reference *want, int64_t row, double factor, const double *from)
{
    double *value = want->value + row * want->cols;
    double *magnitude = want->magnitude + row * want->cols;
    for (int64_t j = 0; j < want->cols; j++) {
        value[j] += factor * from[j];
        magnitude[j] += fabs(factor * from[j]);
    }
}

/* Where the r-th active row stands in X. */
static int64_t row_of_x(const reference_rows *rows, int64_t r, int x_is_compact)
{
    return x_is_compact ? r : rows->indices[r];
}

reference reference_y(const sebp_matrix *x, const sebp_matrix *w, const sebp_matrix *bias,
                      const reference_rows *rows, int x_is_compact)
{
    int64_t n = w->rows, k = w->cols;
    int64_t terms = rows->count > 0 ? k + (bias != NULL) : 0;
    reference want = make_reference(rows->total, n, terms, NULL);
    double *a = reference_elements(x), *b = reference_elements(w),
           *start = bias != NULL ? reference_elements(bias) : NULL;
    double *column = testing_zeros(n, sizeof *column);
    for (int64_t r = 0; r < rows->count && bias != NULL; r++) {
        add_row(&want, rows->indices[r], 1, start);
    }
    for (int64_t l = 0; l < k; l++) {
        for (int64_t j = 0; j < n; j++) {
            column[j] = b[j * k + l];
        }
        for (int64_t r = 0; r < rows->count; r++) {
            add_row(&want, rows->indices[r], a[row_of_x(rows, r, x_is_compact) * k + l], column);
        }
    }
    free(a);
    free(b);
    free(start);
    free(column);
    return want;
}

reference reference_dx(const sebp_matrix *dy, const sebp_matrix *w, const reference_rows *rows,
                       const sebp_matrix *before)
{
    int64_t n = w->rows, k = w->cols;
    reference want = make_reference(dy->rows, k, rows->count > 0 ? n : 0, before);
    double *g = reference_elements(dy), *b = reference_elements(w);
    for (int64_t r = 0; r < rows->count; r++) {
        int64_t i = rows->indices[r];
        begin_sums(&want, i);
        for (int64_t l = 0; l < n; l++) {
            add_row(&want, i, g[i * n + l], b + l * k);
        }
    }
    free(g);
    free(b);
    return want;
}

reference reference_dw(const sebp_matrix *dy, const sebp_matrix *x, const reference_rows *rows,
                       int x_is_compact, const sebp_matrix *before)
{
    int64_t n = dy->cols, k = x->cols;
    reference want = make_reference(n, k, rows->count, before);
    double *g = reference_elements(dy), *a = reference_elements(x);
    for (int64_t j = 0; j < n && rows->count > 0; j++) {
        begin_sums(&want, j);
        for (int64_t r = 0; r < rows->count; r++) {
            add_row(&want, j, g[rows->indices[r] * n + j], a + row_of_x(rows, r, x_is_compact) * k);
        }
    }
    free(g);
    free(a);
    return want;
}

reference reference_db(const sebp_matrix *dy, const reference_rows *rows, const sebp_matrix *before)
{
    int64_t n = dy->cols;
    reference want = make_reference(1, n, rows->count, before);
    double *g = reference_elements(dy);
    if (rows->count > 0) {
        begin_sums(&want, 0);
    }
    for (int64_t r = 0; r < rows->count; r++) {
        add_row(&want, 0, 1, g + rows->indices[r] * n);
    }
    free(g);
    return want;
}

/* C: m x n = A B, A: m x k, B: k x n. */
static double *multiplied(const double *a, const double *b, int64_t m, int64_t n, int64_t k)
{
    double *c = testing_zeros(m * n, sizeof *c);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t l = 0; l < k; l++) {
            double factor = a[i * k + l];
            for (int64_t j = 0; j < n && factor != 0; j++) {
                c[i * n + j] += factor * b[l * n + j];
            }
        }
    }
    return c;
}

static double *transposed(const double *a, int64_t rows, int64_t cols)
{
    double *t = testing_zeros(rows * cols, sizeof *t);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            t[j * rows + i] = a[i * cols + j];
        }
    }
    return t;
}

static void take_magnitudes(double *a, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        a[i] = fabs(a[i]);
    }
}

/* to += A B C, A: m x k, B: k x l, C: l x n. */
static void add_product(double *to, const double *a, const double *b, const double *c, int64_t m,
                        int64_t n, int64_t k, int64_t l)
{
    double *left = multiplied(a, b, m, l, k), *all = multiplied(left, c, m, n, l);
    for (int64_t i = 0; i < m * n; i++) {
        to[i] += all[i];
    }
    free(left);
    free(all);
}

reference reference_r(const sebp_matrix *u_out, const sebp_matrix *u_in, const sebp_matrix *dy,
                      const sebp_matrix *x, const reference_rows *rows, int x_is_compact,
                      const sebp_matrix *before)
{
    int64_t p = u_out->rows, n = u_out->cols, q = u_in->rows, k = u_in->cols;
    int64_t terms = rows->count > 0 ? n + k + rows->count : 0;
    reference want = make_reference(p, q, terms, before);
    reference dw = reference_dw(dy, x, rows, x_is_compact, NULL);
    double *u = reference_elements(u_out), *v = reference_elements(u_in), *vt = transposed(v, q, k);
    for (int64_t i = 0; i < p && terms > 0; i++) {
        begin_sums(&want, i);
    }
    add_product(want.value, u, dw.value, vt, p, q, n, k);
    take_magnitudes(u, p * n);
    take_magnitudes(vt, q * k);
    add_product(want.magnitude, u, dw.magnitude, vt, p, q, n, k);
    free(u);
    free(v);
    free(vt);
    reference_free(&dw);
    return want;
}

reference reference_stepped(const sebp_matrix *u_out, const sebp_matrix *u_in, const sebp_sparse *s,
                            const sebp_matrix *before)
{
    int64_t p = u_out->rows, n = u_out->cols, q = u_in->rows, k = u_in->cols;
    reference want = make_reference(n, k, s->count > 0 ? p + q : 0, before);
    double *u = reference_elements(u_out), *ut = transposed(u, p, n), *v = reference_elements(u_in);
    double *dense = testing_zeros(p * q, sizeof *dense);
    for (int64_t i = 0; i < s->count; i++) {
        dense[s->indices[i]] = s->values[i];
    }
    for (int64_t i = 0; i < n && s->count > 0; i++) {
        begin_sums(&want, i);
    }
    add_product(want.value, ut, dense, v, n, k, p, q);
    take_magnitudes(ut, n * p);
    take_magnitudes(dense, p * q);
    take_magnitudes(v, q * k);
    add_product(want.magnitude, ut, dense, v, n, k, p, q);
    free(u);
    free(ut);
    free(v);
    free(dense);
    return want;
}

void reference_free(reference *want)
{
    free(want->value);
    free(want->magnitude);
    want->value = want->magnitude = NULL;
}

/* |a - b| for numbers; 0 where both are NaN or the same Inf; else Inf. */
static double distance(double a, double b)
{
    if (isnan(a) || isnan(b) || isinf(a) || isinf(b)) {
        return (isnan(a) && isnan(b)) || a == b ? 0 : INFINITY;
    }
    return fabs(a - b);
}

void reference_check(const reference *want, const sebp_matrix *got, reference_mode mode,
                     const char *what)
{
    ck_assert(got->rows == want->rows && got->cols == want->cols);
    int64_t computed = 0, nonzeros = 0;
    for (int64_t at = 0; at < want->rows * want->cols; at++) {
        int64_t i = at / want->cols, j = at % want->cols;
        double value = want->value[at];
        double bound = 0;
        if (mode == REFERENCE_BOUND && isfinite(value)) {
            /* A sum of n terms in any order is off by n eps/2 at most; products may underflow. */
            bound = (double)want->terms * (FLT_EPSILON * want->magnitude[at] + FLT_TRUE_MIN);
            if (got->dtype == SEBP_BF16 && want->magnitude[at] > 0) {
                bound += (fabs(value) + bound) * 0x1p-8;
            }
        } else if (got->dtype == SEBP_BF16) {
            value = testing_from_bf16(testing_to_bf16((float)value));
        }
        double off = distance(testing_get(got, i, j), value);
        if (!(off <= bound)) {
            ck_abort_msg("%s(%" PRId64 ", %" PRId64 ") of %" PRId64 " x %" PRId64
                         " is %.9g, not %.9g: bound %.3g",
                         what, i, j, want->rows, want->cols, testing_get(got, i, j), value, bound);
        }
        computed += want->magnitude[at] != 0;
        nonzeros += want->magnitude[at] != 0 && value != 0;
    }
    /* Sums of small integers come to zero now and then, but not three times in four. */
    ck_assert_msg(want->terms == 0 || want->rows * want->cols == 0 || computed > 0,
                  "%s: nothing was computed, which proves nothing", what);
    ck_assert_msg(computed < 16 || nonzeros > computed / 4,
                  "%s: %" PRId64 " of %" PRId64 " sums are zero, which proves nothing", what,
                  computed - nonzeros, computed);
    testing_check_matrix(got);
}

static const double *ranked;

/* Larger magnitudes first, of equal ones lower indices. */
static int by_magnitude(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    double one = fabs(ranked[a]), other = fabs(ranked[b]);
    return one != other ? (one < other) - (one > other) : (a > b) - (a < b);
}

void reference_rank(const double *elements, int64_t count, int64_t *order)
{
    for (int64_t i = 0; i < count; i++) {
        order[i] = i;
    }
    ranked = elements;
    qsort(order, (size_t)count, sizeof *order, by_magnitude);
}
