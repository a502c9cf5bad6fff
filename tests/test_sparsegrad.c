/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SparseGrad: the rotated gradient by every order of products, the choice of elements, the step
 * back to the weight, against double precision and exactly on integers; ten steps against the
 * layer as the paper has it, with rotated weights; and bad input.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

#define MIN_SCRATCH ((int64_t)1 << 20)
#define ROTATIONS   6

/* `rank` orthonormal rows of `size`: Gram-Schmidt, twice, in double; or, for exact sums, rows of
 * the identity in any order and with any sign. */
static sebp_matrix random_vectors(int64_t rank, int64_t size, testing_values values)
{
    sebp_matrix vectors = testing_matrix(rank, size, testing_stride(size), SEBP_F32);
    double *row = calloc((size_t)(rank * size), sizeof *row);
    ck_assert_ptr_nonnull(row);
    for (int64_t i = 0; i < rank; i++) {
        if (values == TESTING_INTEGER) {
            int64_t at; /* a column that no row before has */
            int taken;
            do {
                at = testing_between(0, size - 1);
                taken = 0;
                for (int64_t j = 0; j < i; j++) {
                    taken |= row[j * size + at] != 0;
                }
            } while (taken);
            row[i * size + at] = testing_chance(0.5) ? 1 : -1;
        } else {
            for (int64_t j = 0; j < size; j++) {
                row[i * size + j] = testing_uniform();
            }
            for (int64_t past = 0; past < 2 * i; past++) {
                const double *other = row + past % i * size;
                double dot = 0;
                for (int64_t j = 0; j < size; j++) {
                    dot += other[j] * row[i * size + j];
                }
                for (int64_t j = 0; j < size; j++) {
                    row[i * size + j] -= dot * other[j];
                }
            }
            double square = 0;
            for (int64_t j = 0; j < size; j++) {
                square += row[i * size + j] * row[i * size + j];
            }
            for (int64_t j = 0; j < size; j++) {
                row[i * size + j] /= sqrt(square);
            }
        }
        for (int64_t j = 0; j < size; j++) {
            testing_set(&vectors, i, j, row[i * size + j]);
        }
    }
    free(row);
    return vectors;
}

/* A layer in a rotated space. */
typedef struct problem {
    int64_t M, N, K, p, q;
    sebp_matrix u_out, u_in; /* p x N, q x K */
    sebp_basis *basis;
    sebp_matrix dy, x;
    reference_rows active;
    sebp_rows *rows; /* NULL: found */
    sebp_linear_options options;
} problem;

static void make_basis(problem *p, testing_values values)
{
    p->u_out = random_vectors(p->p, p->N, values);
    p->u_in = random_vectors(p->q, p->K, values);
    ck_assert_int_eq(sebp_basis_from_vectors(&p->u_out, &p->u_in, &p->basis), SEBP_SUCCESS);
}

static problem make_problem(int64_t M, int64_t N, int64_t K, sebp_dtype dtype,
                            testing_values values)
{
    problem p = {.M = M, .N = N, .K = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    p.p = testing_chance(0.3) ? N : testing_between(1, N);
    p.q = testing_chance(0.3) ? K : testing_between(1, K);
    make_basis(&p, values);
    p.dy = testing_random_matrix(M, N, dtype, values);
    testing_zero_rows(&p.dy, testing_chance(0.1) ? 0 : 0.6);
    const sebp_rule rule = sebp_rule_nonzero();
    p.active = reference_rows_find(&p.dy, &rule);
    if (testing_chance(0.7)) {
        ck_assert_int_eq(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows),
                         SEBP_SUCCESS);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    for (int64_t i = 0; i < M && !p.options.x_is_compact; i++) {
        if (!reference_rows_have(&p.active, i)) { /* what must not be read */
            testing_set(&p.x, i, testing_between(0, K - 1), NAN);
        }
    }
    return p;
}

static void free_problem(problem *p)
{
    sebp_basis_destroy(p->basis);
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->u_out);
    testing_release(&p->u_in);
    testing_release(&p->dy);
    testing_release(&p->x);
}

static sebp_status call_gradient(sebp_context *context, const problem *p, int rotation,
                                 const sebp_matrix *r)
{
    return sebp_sparsegrad_gradient(context, p->basis, &p->dy, &p->x, p->rows, &p->options,
                                    (sebp_rotation)rotation, r);
}

/* ---- the gradient ---- */

static void check_gradient(sebp_context *context, problem *p, testing_values values)
{
    for (int rotation = 0; rotation < ROTATIONS; rotation++) {
        int add = testing_chance(0.5);
        p->options.dw_write = add ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        sebp_matrix r = testing_matrix(p->p, p->q, testing_stride(p->q), SEBP_F32);
        if (add) {
            testing_fill(&r, values);
        }
        reference want = reference_r(&p->u_out, &p->u_in, &p->dy, &p->x, &p->active,
                                     p->options.x_is_compact, add ? &r : NULL);
        testing_succeed(call_gradient(context, p, rotation, &r), context);
        reference_check(&want, &r, values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND,
                        "R");
        reference_free(&want);
        testing_release(&r);
    }
}

START_TEST(gradient)
{
    testing_values values = _i == 0 ? TESTING_REAL : TESTING_INTEGER;
    for (int round = 0; round < testing_rounds(60); round++) {
        sebp_context *context = testing_context(
            testing_chance(0.5) ? SEBP_GEMM_AUTO : SEBP_GEMM_NATIVE, (int)testing_between(1, 3), 0);
        problem p = make_problem(testing_between(1, 60), testing_between(1, 60),
                                 testing_between(1, 60), testing_dtype(), values);
        check_gradient(context, &p, values);
        free_problem(&p);
        sebp_context_destroy(context);
    }
}
END_TEST

/* Where half of the scratch memory, half a MiB, holds neither all rows nor all vectors. */
START_TEST(gradient_in_panels)
{
    sebp_dtype dtype = _i == 0 ? SEBP_F32 : SEBP_BF16;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, MIN_SCRATCH);
    problem p = make_problem(900, 420, 300, dtype, TESTING_REAL);
    while (p.active.count == 0) {
        free_problem(&p);
        p = make_problem(900, 420, 300, dtype, TESTING_REAL);
    }
    check_gradient(context, &p, TESTING_REAL);
    ck_assert_int_le(sebp_context_scratch_bytes(context), MIN_SCRATCH);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* A problem whose basis has these ranks, all of its rows active. */
static problem make_plain(int64_t M, int64_t N, int64_t K, int64_t p, int64_t q, sebp_dtype dtype)
{
    problem made = {.M = M, .N = N, .K = K, .p = p, .q = q, .options = SEBP_LINEAR_OPTIONS_INIT};
    make_basis(&made, TESTING_REAL);
    made.dy = testing_random_matrix(M, N, dtype, TESTING_REAL);
    made.x = testing_random_matrix(M, K, dtype, TESTING_REAL);
    const sebp_rule rule = sebp_rule_nonzero();
    made.active = reference_rows_find(&made.dy, &rule);
    return made;
}

/* Orders that keep a row of X or one like it in half of the scratch memory, 131072 floats, which it
 * is longer than: AUTO takes the cheapest of the others. */
START_TEST(cheapest_order_that_fits)
{
    static const struct {
        int64_t M, N, K, p, q;
        sebp_dtype dtype;
        sebp_rotation cheapest, fits;
    } cases[] = {
        {10, 4, 150000, 1, 2, SEBP_F32, SEBP_ROTATE_DY, SEBP_ROTATE_FACTORS},
        {10, 4, 150000, 1, 2, SEBP_BF16, SEBP_ROTATE_DY, SEBP_ROTATE_OUT_IN},
        {10, 150000, 4, 2, 1, SEBP_BF16, SEBP_ROTATE_X, SEBP_ROTATE_IN_OUT},
        {3, 150000, 150000, 1, 1, SEBP_BF16, SEBP_ROTATE_FACTORS, SEBP_ROTATE_AUTO}, /* none does */
    };
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, MIN_SCRATCH);
    sebp_rotation fits = cases[_i].fits;
    problem p = make_plain(cases[_i].M, cases[_i].N, cases[_i].K, cases[_i].p, cases[_i].q,
                           cases[_i].dtype);
    sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32), want = testing_copy(&r);
    ck_assert_int_eq(sebp_sparsegrad_order(p.basis, p.M), cases[_i].cheapest);
    testing_expect(call_gradient(context, &p, (int)cases[_i].cheapest, &r), SEBP_ERROR_MEMORY,
                   context);
    ck_assert(testing_same_bits(&r, &want)); /* poison */
    if (fits == SEBP_ROTATE_AUTO) {
        testing_expect(call_gradient(context, &p, SEBP_ROTATE_AUTO, &r), SEBP_ERROR_MEMORY,
                       context);
        ck_assert(testing_same_bits(&r, &want));
    } else {
        testing_succeed(call_gradient(context, &p, (int)fits, &want), context);
        testing_succeed(call_gradient(context, &p, SEBP_ROTATE_AUTO, &r), context);
        ck_assert(testing_same_bits(&r, &want));
        reference exact = reference_r(&p.u_out, &p.u_in, &p.dy, &p.x, &p.active, 0, NULL);
        reference_check(&exact, &r, REFERENCE_BOUND, "R");
        reference_free(&exact);
        for (int rotation = 1; rotation < ROTATIONS; rotation++) { /* no cheaper one would do */
            if (sebp_sparsegrad_cost(p.basis, p.M, (sebp_rotation)rotation) <
                sebp_sparsegrad_cost(p.basis, p.M, fits)) {
                testing_expect(call_gradient(context, &p, rotation, &r), SEBP_ERROR_MEMORY,
                               context);
            }
        }
    }
    ck_assert_int_le(sebp_context_scratch_bytes(context), MIN_SCRATCH);
    testing_release(&r);
    testing_release(&want);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(gradient_without_active_rows)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    problem p = {.M = 9, .N = 5, .K = 4, .p = 3, .q = 2, .options = SEBP_LINEAR_OPTIONS_INIT};
    make_basis(&p, TESTING_REAL);
    p.dy = testing_matrix(9, 5, 5, SEBP_F32);
    memset(p.dy.data, 0, 9 * 5 * sizeof(float));
    p.x = testing_matrix(9, 4, 4, SEBP_F32); /* poison: not read */
    for (int rotation = 0; rotation < ROTATIONS; rotation++) {
        sebp_matrix r = testing_random_matrix(3, 2, SEBP_F32, TESTING_REAL),
                    before = testing_copy(&r);
        p.options.dw_write = SEBP_ACCUMULATE;
        testing_succeed(call_gradient(context, &p, rotation, &r), context);
        ck_assert(testing_same_bits(&r, &before));
        p.options.dw_write = SEBP_OVERWRITE;
        testing_succeed(call_gradient(context, &p, rotation, &r), context);
        ck_assert_int_eq(testing_nonzeros(&r), 0);
        testing_release(&before);
        testing_release(&r);
    }
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(cheapest_order)
{
    int used[ROTATIONS] = {0};
    for (int round = 0; round < testing_rounds(400); round++) {
        problem p = {.N = testing_between(1, 40), .K = testing_between(1, 40)};
        p.p = testing_between(1, p.N);
        p.q = testing_between(1, p.K);
        make_basis(&p, TESTING_INTEGER);
        int64_t m = testing_between(0, 60);
        double M = (double)m, N = (double)p.N, K = (double)p.K, P = (double)p.p, Q = (double)p.q;
        /* Each product by its own sizes. */
        const double costs[ROTATIONS] = {0,
                                         M * N * P + M * K * Q + P * M * Q,
                                         M * N * P + P * M * K + P * K * Q,
                                         M * K * Q + N * M * Q + P * N * Q,
                                         N * M * K + P * N * K + P * K * Q,
                                         N * M * K + N * K * Q + P * N * Q};
        int best = sebp_sparsegrad_order(p.basis, m);
        ck_assert(best >= 1 && best < ROTATIONS);
        used[best]++;
        for (int rotation = 1; rotation < ROTATIONS; rotation++) {
            double cost = sebp_sparsegrad_cost(p.basis, m, (sebp_rotation)rotation);
            ck_assert_double_eq(cost, costs[rotation]);
            ck_assert(rotation < best ? costs[best] < cost : costs[best] <= cost);
        }
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, m, SEBP_ROTATE_AUTO), costs[best]);
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, m, (sebp_rotation)9), 0);
        ck_assert_double_eq(sebp_sparsegrad_cost(p.basis, -1, SEBP_ROTATE_DY), 0);
        ck_assert_int_eq(sebp_sparsegrad_order(p.basis, -1), SEBP_ROTATE_AUTO);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
    }
    for (int rotation = 1; rotation < ROTATIONS; rotation++) {
        ck_assert_msg(used[rotation] > 0 || testing_rounds(400) < 400, "order %d never came",
                      rotation);
    }
    ck_assert_double_eq(sebp_sparsegrad_cost(NULL, 1, SEBP_ROTATE_DY), 0);
    ck_assert_int_eq(sebp_sparsegrad_order(NULL, 1), SEBP_ROTATE_AUTO);
}
END_TEST

/* ---- kept elements ---- */

static double at(const sebp_matrix *matrix, int64_t index)
{
    return testing_get(matrix, index / matrix->cols, index % matrix->cols);
}

static double *in_double(const sebp_matrix *matrix)
{
    double *data = calloc((size_t)(matrix->rows * matrix->cols), sizeof *data);
    ck_assert_ptr_nonnull(data);
    for (int64_t i = 0; i < matrix->rows * matrix->cols; i++) {
        data[i] = at(matrix, i);
    }
    return data;
}

enum { CONTEXTS = 4 };
static const int context_threads[CONTEXTS] = {1, 2, 3, 8};

/* Each k of `ks`, on any number of threads, against a sort of all elements. */
static void check_tops(sebp_context *const *contexts, const sebp_matrix *r, const int64_t *ks,
                       int count)
{
    int64_t total = r->rows * r->cols;
    int64_t *order = malloc((size_t)total * sizeof *order);
    int64_t *want = malloc((size_t)total * sizeof *want);
    ck_assert(order != NULL && want != NULL);
    double *all = in_double(r);
    reference_rank(all, total, order);
    for (int c = 0; c < count; c++) {
        int64_t k = ks[c];
        memcpy(want, order, (size_t)k * sizeof *want);
        qsort(want, (size_t)k, sizeof *want, reference_by_index);
        for (int t = 0; t < CONTEXTS; t++) {
            sebp_sparse top = testing_sparse(k, r->rows, r->cols);
            testing_succeed(sebp_sparse_top(contexts[t], r, &top), contexts[t]);
            for (int64_t i = 0; i < k; i++) {
                if (top.indices[i] != want[i] || (double)top.values[i] != all[want[i]]) {
                    ck_abort_msg("%d threads: element %" PRId64 " of %" PRId64 " is %" PRId64
                                 ", not %" PRId64,
                                 context_threads[t], i, k, top.indices[i], want[i]);
                }
            }
            testing_free_sparse(&top);
        }
    }
    free(all);
    free(order);
    free(want);
}

/* Values in an order that is hard on a selection in one pass. */
typedef enum value_shape {
    RANDOM,
    TIES,
    EQUAL,
    ZEROS,
    RISING,
    FALLING,
    CORNER,
    RUNS,
    DENORMALS,
    BITS,
    SHAPES
} value_shape;

static void fill_shape(const sebp_matrix *r, value_shape shape)
{
    int64_t total = r->rows * r->cols;
    int is_large = 0;
    for (int64_t i = 0; i < total; i++) {
        double value = testing_uniform();
        uint32_t bits;
        float odd;
        switch (shape) {
        case TIES:
            value = floor(3 * value);
            break;
        case EQUAL:
            value = testing_chance(0.5) ? 2.5 : -2.5;
            break;
        case ZEROS:
            value = testing_chance(0.01) ? value : testing_chance(0.5) ? 0.0 : -0.0;
            break;
        case RISING:
            value = (double)(i + 1) * (value < 0 ? -1 : 1);
            break;
        case FALLING:
            value = (double)(total - i);
            break;
        case CORNER: /* as a rotated gradient is */
            value /= (double)((1 + i / r->cols) * (1 + i % r->cols));
            break;
        case RUNS: /* of which a sample has too many, or too few */
            is_large = i % 128 == 0 ? testing_chance(0.1) : is_large;
            value = is_large ? value : 1e-3 * value;
            break;
        case DENORMALS: /* and ties among them */
            value = (double)testing_between(-40, 40) * 0x1p-149;
            break;
        case BITS: /* any magnitude, denormals too */
            do {
                bits = (uint32_t)testing_random();
                memcpy(&odd, &bits, sizeof odd);
            } while (!isfinite(odd));
            value = odd;
            break;
        case RANDOM:
        case SHAPES:
            break;
        }
        testing_set(r, i / r->cols, i % r->cols, value);
    }
}

START_TEST(top)
{
    sebp_context *contexts[CONTEXTS];
    for (int t = 0; t < CONTEXTS; t++) {
        contexts[t] = testing_context(SEBP_GEMM_AUTO, context_threads[t], 0);
    }
    for (int round = 0; round < testing_rounds(12); round++) {
        int64_t rows = testing_between(1, 40), cols = testing_between(1, 40), all = rows * cols;
        sebp_matrix r = testing_matrix(rows, cols, testing_stride(cols), SEBP_F32);
        fill_shape(&r, (value_shape)_i);
        check_tops(contexts, &r, (int64_t[]){1, testing_between(1, all), all - (all > 1), all}, 4);
        testing_release(&r);
    }
    /* More elements than there are ever candidates, in many blocks. */
    for (int round = 0; round < testing_rounds(3); round++) {
        int64_t rows = testing_between(200, 300), cols = testing_between(200, 300);
        int64_t all = rows * cols;
        sebp_matrix r = testing_matrix(rows, cols, testing_stride(cols), SEBP_F32);
        fill_shape(&r, (value_shape)_i);
        check_tops(contexts, &r,
                   (int64_t[]){1, testing_between(1, 100), testing_between(1, 10000),
                               testing_between(8000, 12000), testing_between(1, all), all - 1, all},
                   7);
        testing_release(&r);
    }
    for (int t = 0; t < CONTEXTS; t++) {
        sebp_context_destroy(contexts[t]);
    }
}
END_TEST

START_TEST(top_refuses_nan_and_inf)
{
    const double odd[] = {NAN, INFINITY, -INFINITY};
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t size = testing_chance(0.5) ? 150 : 10, last = size * size - 1;
        sebp_matrix r = testing_random_matrix(size, size, SEBP_F32, TESTING_REAL);
        int64_t count = testing_chance(0.5) ? 1 : last / 2; /* also more of them than k */
        for (int64_t i = 0; i < count; i++) {
            int64_t where = testing_between(0, last);
            testing_set(&r, where / size, where % size, odd[testing_between(0, 2)]);
        }
        sebp_sparse room = testing_sparse(testing_between(1, 30), size, size);
        ck_assert_int_eq(sebp_sparse_top(context, &r, &room), SEBP_ERROR_NONFINITE);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "NaN or Inf"));
        for (int64_t i = 0; i < room.count; i++) {
            ck_assert(room.indices[i] == -1 && isnan(room.values[i]));
        }
        testing_free_sparse(&room);
        testing_release(&r);
    }
    sebp_context_destroy(context);
}
END_TEST

/* Each element with the given chance; the first is kept where none else is. */
static sebp_sparse random_sparse(int64_t rows, int64_t cols, double chance, testing_values values)
{
    sebp_matrix numbers = testing_matrix(1, rows * cols, rows * cols, SEBP_F32);
    testing_fill(&numbers, values);
    int64_t count = 0, *indices = malloc((size_t)(rows * cols) * sizeof *indices);
    ck_assert_ptr_nonnull(indices);
    for (int64_t i = 0; i < rows * cols; i++) {
        if (testing_chance(chance)) {
            indices[count++] = i;
        }
    }
    if (count == 0) {
        indices[count++] = 0;
    }
    sebp_sparse made = testing_sparse(count, rows, cols);
    memcpy(made.indices, indices, (size_t)count * sizeof *indices);
    memcpy(made.values, numbers.data, (size_t)count * sizeof(float));
    free(indices);
    testing_release(&numbers);
    return made;
}

START_TEST(take_and_add)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    for (int round = 0; round < testing_rounds(100); round++) {
        int64_t rows = testing_between(1, 40), cols = testing_between(1, 40);
        sebp_sparse s = random_sparse(rows, cols, 0.3, TESTING_REAL);
        sebp_matrix w = testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL);
        sebp_matrix want = testing_copy(&w);
        for (int64_t i = 0; i < s.count; i++) {
            int64_t row = s.indices[i] / cols, col = s.indices[i] % cols;
            testing_set(&want, row, col, (float)at(&want, s.indices[i]) + s.values[i]);
        }
        testing_succeed(sebp_sparse_add(context, &s, &w), context);
        ck_assert(testing_same_bits(&w, &want));

        sebp_matrix r = testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL);
        for (int64_t i = 0; i < rows * cols; i++) { /* what is not kept is not read */
            if (bsearch(&i, s.indices, (size_t)s.count, sizeof i, reference_by_index) == NULL) {
                testing_set(&r, i / cols, i % cols, NAN);
            }
        }
        testing_succeed(sebp_sparse_take(context, &r, &s), context);
        for (int64_t i = 0; i < s.count; i++) {
            ck_assert((double)s.values[i] == at(&r, s.indices[i]));
        }
        sebp_sparse before = testing_sparse(s.count, rows, cols);
        memcpy(before.values, s.values, (size_t)s.count * sizeof(float));
        int64_t bad = s.indices[testing_between(0, s.count - 1)];
        testing_set(&r, bad / cols, bad % cols, testing_chance(0.5) ? NAN : INFINITY);
        ck_assert_int_eq(sebp_sparse_take(context, &r, &s), SEBP_ERROR_NONFINITE);
        ck_assert_mem_eq(s.values, before.values, (size_t)s.count * sizeof(float));
        testing_free_sparse(&before);
        testing_free_sparse(&s);
        testing_release(&r);
        testing_release(&w);
        testing_release(&want);
    }
    sebp_context_destroy(context);
}
END_TEST

/* ---- the step ---- */

static void check_update(sebp_context *context, const problem *p, const sebp_sparse *s,
                         sebp_dtype dtype, testing_values values)
{
    sebp_matrix w = testing_random_matrix(p->N, p->K, dtype, values), before = testing_copy(&w);
    reference want = reference_stepped(&p->u_out, &p->u_in, s, &before);
    testing_succeed(sebp_sparsegrad_update(context, p->basis, s, &w), context);
    reference_check(&want, &w, values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND, "W");
    reference_free(&want);
    testing_release(&w);
    testing_release(&before);
}

START_TEST(update)
{
    testing_values values = _i == 0 ? TESTING_REAL : TESTING_INTEGER;
    for (int round = 0; round < testing_rounds(200); round++) {
        sebp_context *context =
            testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), MIN_SCRATCH);
        problem p = {.N = testing_between(1, 60), .K = testing_between(1, 60)};
        p.p = testing_between(1, p.N);
        p.q = testing_between(1, p.K);
        make_basis(&p, values);
        /* Few elements leave rows and columns of zeros, in few rows or in few columns. */
        sebp_sparse s =
            random_sparse(p.p, p.q, testing_chance(0.5) ? 0.02 : testing_uniform(), values);
        check_update(context, &p, &s, testing_dtype(), values);
        s.count = 0;
        check_update(context, &p, &s, testing_dtype(), values);
        testing_free_sparse(&s);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
        sebp_context_destroy(context);
    }
}
END_TEST

/* By rows and by columns, in panels of W: a bf16 element is still rounded once. */
START_TEST(update_in_panels)
{
    for (int tall = 0; tall < 2; tall++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, MIN_SCRATCH);
        problem p = {.N = tall ? 1500 : 300, .K = tall ? 300 : 1500};
        p.p = tall ? 200 : 130;
        p.q = tall ? 130 : 200;
        make_basis(&p, TESTING_INTEGER);
        sebp_sparse s = random_sparse(p.p, p.q, 0.05, TESTING_INTEGER);
        check_update(context, &p, &s, SEBP_F32, TESTING_INTEGER);
        check_update(context, &p, &s, SEBP_BF16, TESTING_INTEGER);
        ck_assert_int_le(sebp_context_scratch_bytes(context), MIN_SCRATCH);
        testing_free_sparse(&s);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
        sebp_context_destroy(context);
    }
}
END_TEST

/* ---- all of it ---- */

START_TEST(any_number_of_threads_gives_the_same_bits)
{
    for (int round = 0; round < testing_rounds(10); round++) {
        sebp_dtype dtype = testing_dtype();
        problem p = make_problem(testing_between(50, 200), testing_between(50, 200),
                                 testing_between(50, 200), dtype, TESTING_REAL);
        int rotation = (int)testing_between(0, ROTATIONS - 1);
        int64_t k = testing_between(1, p.p * p.q);
        sebp_matrix w = testing_random_matrix(p.N, p.K, dtype, TESTING_REAL), first_r = {0},
                    first_w = {0};
        sebp_sparse first_top = {0};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context = testing_context(SEBP_GEMM_NATIVE, threads, 0);
            sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32), stepped = testing_copy(&w);
            sebp_sparse top = testing_sparse(k, p.p, p.q);
            testing_succeed(call_gradient(context, &p, rotation, &r), context);
            testing_succeed(sebp_sparse_top(context, &r, &top), context);
            testing_succeed(sebp_sparsegrad_update(context, p.basis, &top, &stepped), context);
            sebp_context_destroy(context);
            if (threads == 1) {
                first_r = r;
                first_w = stepped;
                first_top = top;
                continue;
            }
            ck_assert(testing_same_bits(&r, &first_r));
            ck_assert(testing_same_bits(&stepped, &first_w));
            ck_assert_mem_eq(top.indices, first_top.indices, (size_t)k * sizeof(int64_t));
            ck_assert_mem_eq(top.values, first_top.values, (size_t)k * sizeof(float));
            testing_release(&r);
            testing_release(&stepped);
            testing_free_sparse(&top);
        }
        testing_release(&first_r);
        testing_release(&first_w);
        testing_free_sparse(&first_top);
        testing_release(&w);
        free_problem(&p);
    }
}
END_TEST

/*
 * The layer as the paper has it, in double: the weight rotated once, V = u_out^T W u_in, N x K; in
 * each step the input rotated, X u_in, the output rotated back; Adam on the k largest elements of
 * V's gradient alone, each with moments of its own; and at the end W = u_out V u_in^T.
 */
typedef struct paper {
    int64_t M, N, K;
    const double *u, *v; /* N x N and K x K, vectors as columns */
    double *weight;      /* V */
    double *moment1, *moment2;
} paper;

static double *product(const double *a, int a_transposed, const double *b, int b_transposed,
                       int64_t m, int64_t n, int64_t k)
{
    double *c = calloc((size_t)(m * n), sizeof *c);
    ck_assert_ptr_nonnull(c);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            for (int64_t l = 0; l < k; l++) {
                c[i * n + j] += (a_transposed ? a[l * m + i] : a[i * k + l]) *
                                (b_transposed ? b[j * k + l] : b[l * n + j]);
            }
        }
    }
    return c;
}

/* Y = (X u_in) V^T u_out^T */
static double *paper_forward(const paper *layer, const double *x)
{
    double *rotated = product(x, 0, layer->v, 0, layer->M, layer->K, layer->K);
    double *inner = product(rotated, 0, layer->weight, 1, layer->M, layer->N, layer->K);
    double *y = product(inner, 0, layer->u, 1, layer->M, layer->N, layer->N);
    free(rotated);
    free(inner);
    return y;
}

/* dV = (dY u_out)^T (X u_in) */
static double *paper_gradient(const paper *layer, const double *x, const double *dy)
{
    double *rotated_x = product(x, 0, layer->v, 0, layer->M, layer->K, layer->K);
    double *rotated_dy = product(dy, 0, layer->u, 0, layer->M, layer->N, layer->N);
    double *gradient = product(rotated_dy, 1, rotated_x, 0, layer->N, layer->K, layer->M);
    free(rotated_x);
    free(rotated_dy);
    return gradient;
}

static void paper_step(paper *layer, const double *gradient, const int64_t *kept, int64_t count,
                       int t, const sebp_adamw_options *o)
{
    double lr = o->learning_rate, beta1 = o->beta1, beta2 = o->beta2;
    for (int64_t i = 0; i < count; i++) {
        double g = gradient[kept[i]];
        double *m = &layer->moment1[kept[i]], *v = &layer->moment2[kept[i]];
        *m = beta1 * *m + (1 - beta1) * g;
        *v = beta2 * *v + (1 - beta2) * g * g;
        double corrected = *v / (1 - pow(beta2, t));
        layer->weight[kept[i]] -= lr / (1 - pow(beta1, t)) * *m / (sqrt(corrected) + o->epsilon);
    }
}

/* The k in [low, high] whose element and the next one differ most in magnitude, so that rounding
 * does not choose; and those k elements, ascending. */
static int64_t clear_cut(const double *gradient, int64_t N, int64_t K, int64_t low, int64_t high,
                         int64_t *kept)
{
    reference_rank(gradient, N * K, kept);
    int64_t best = low;
    double widest = 0;
    for (int64_t k = low; k <= high; k++) {
        double gap = fabs(gradient[kept[k - 1]]) / fabs(gradient[kept[k]]);
        if (gap > widest) {
            widest = gap;
            best = k;
        }
    }
    qsort(kept, (size_t)best, sizeof *kept, reference_by_index);
    return best;
}

START_TEST(ten_steps_are_the_papers)
{
    int is_fixed = _i;
    const int64_t M = 40, N = 24, K = 32;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    problem p = {.M = M, .N = N, .K = K, .p = N, .q = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    make_basis(&p, TESTING_REAL);
    sebp_matrix w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL), start = testing_copy(&w);
    p.dy = testing_matrix(M, N, N, SEBP_F32);
    p.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
    p.active = reference_rows_all(M);
    sebp_matrix target = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
    sebp_matrix y = testing_matrix(M, N, N, SEBP_F32), r = testing_matrix(N, K, K, SEBP_F32);

    /* u_out and u_in have their vectors as columns. */
    double *rows_out = in_double(&p.u_out), *rows_in = in_double(&p.u_in), *w0 = in_double(&w);
    double *u = calloc((size_t)(N * N), sizeof *u), *v = calloc((size_t)(K * K), sizeof *v);
    for (int64_t i = 0; i < N * N; i++) {
        u[i % N * N + i / N] = rows_out[i];
    }
    for (int64_t i = 0; i < K * K; i++) {
        v[i % K * K + i / K] = rows_in[i];
    }
    double *half = product(u, 1, w0, 0, N, K, N);
    paper layer = {.M = M, .N = N, .K = K, .u = u, .v = v};
    layer.weight = product(half, 0, v, 0, N, K, K);
    layer.moment1 = calloc((size_t)(N * K), sizeof(double));
    layer.moment2 = calloc((size_t)(N * K), sizeof(double));
    double *x = in_double(&p.x), *wanted = in_double(&target);

    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.01;
    sebp_sparse_adamw *state = NULL;
    int64_t *kept = malloc((size_t)(N * K) * sizeof *kept), k = 0;
    for (int t = 1; t <= 10; t++) {
        /* The loss is half of |Y - target|^2. */
        double *dy = paper_forward(&layer, x);
        for (int64_t i = 0; i < M * N; i++) {
            dy[i] -= wanted[i];
        }
        double *gradient = paper_gradient(&layer, x, dy);
        if (t == 1 || !is_fixed) {
            k = clear_cut(gradient, N, K, 20, 120, kept);
        }
        paper_step(&layer, gradient, kept, k, t, &options);
        free(dy);
        free(gradient);

        testing_succeed(sebp_linear_forward(context, &p.x, &w, NULL, NULL, NULL, &y), context);
        for (int64_t i = 0; i < M * N; i++) {
            testing_set(&p.dy, i / N, i % N, at(&y, i) - at(&target, i));
        }
        sebp_sparse s = testing_sparse(k, N, K);
        testing_succeed(call_gradient(context, &p, t % ROTATIONS, &r), context);
        if (t == 1 || !is_fixed) {
            testing_succeed(sebp_sparse_top(context, &r, &s), context);
        } else {
            memcpy(s.indices, sebp_sparse_adamw_support(state), (size_t)k * sizeof *kept);
            testing_succeed(sebp_sparse_take(context, &r, &s), context);
        }
        ck_assert_mem_eq(s.indices, kept, (size_t)k * sizeof *kept);
        if (t == 1) {
            testing_succeed(sebp_sparse_adamw_create(N, K, is_fixed ? s.indices : NULL,
                                                     is_fixed ? k : 0, &state),
                            context);
        }
        testing_succeed(sebp_sparse_adamw_step(context, state, &options, &s), context);
        testing_succeed(sebp_sparsegrad_update(context, p.basis, &s, &w), context);
        testing_free_sparse(&s);
    }
    free(half);
    half = product(u, 0, layer.weight, 0, N, K, N);
    double *reverted = product(half, 0, v, 1, N, K, K), moved = 0, off = 0;
    for (int64_t i = 0; i < N * K; i++) {
        moved = fmax(moved, fabs(reverted[i] - at(&start, i)));
        off = fmax(off, fabs(reverted[i] - at(&w, i)));
    }
    ck_assert_msg(moved > 0.01, "the weight moved by %g, which proves nothing", moved);
    ck_assert_msg(off < 1e-5, "the weight is off by %g, having moved by %g", off, moved);

    double *all[] = {rows_out,     rows_in,       w0,           u, v, half, reverted, x, wanted,
                     layer.weight, layer.moment1, layer.moment2};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
    free(kept);
    sebp_sparse_adamw_destroy(state);
    testing_release(&w);
    testing_release(&start);
    testing_release(&target);
    testing_release(&y);
    testing_release(&r);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* A NaN or an Inf in an active row is refused at the choice of elements, of either kind: no state
 * and no weight is reached. */
START_TEST(nonfinite_gradients_stop_the_step)
{
    const double odd[] = {NAN, INFINITY, -INFINITY};
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    for (int round = 0; round < testing_rounds(30); round++) {
        int64_t N = testing_between(2, 30), K = testing_between(2, 30), M = testing_between(2, 30);
        problem p = {
            .M = M, .N = N, .K = K, .p = testing_between(1, N), .q = testing_between(1, K)};
        p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
        make_basis(&p, TESTING_REAL);
        p.dy = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
        p.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
        p.active = reference_rows_all(M);
        testing_set(round % 2 ? &p.dy : &p.x, testing_between(0, M - 1), testing_between(0, 1),
                    odd[round % 3]);
        sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32);
        sebp_sparse room = testing_sparse(testing_between(1, p.p * p.q), p.p, p.q);
        int64_t first = 0;
        float value = 5;
        sebp_sparse support = {&first, &value, 1, p.p, p.q};
        testing_succeed(call_gradient(context, &p, round % ROTATIONS, &r), context);
        ck_assert_int_eq(sebp_sparse_top(context, &r, &room), SEBP_ERROR_NONFINITE);
        ck_assert(room.indices[0] == -1 && isnan(room.values[0]));
        ck_assert_int_eq(sebp_sparse_take(context, &r, &support), SEBP_ERROR_NONFINITE);
        ck_assert(value == 5);
        testing_free_sparse(&room);
        testing_release(&r);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* ---- bad input ---- */

static void check_refusal(const sebp_context *context, sebp_status got, sebp_status want,
                          const char *word, const char *change)
{
    ck_assert_msg(got == want, "%s: %s", change, sebp_status_string(got));
    ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", change,
                  sebp_context_message(context));
}

/* Good calls, changed before they are made. */

#define GRADIENT_REFUSES(want, word, change)                                                       \
    do {                                                                                           \
        sebp_matrix dy_view = p.dy, x_view = p.x, r_view = r;                                      \
        sebp_matrix *dy = &dy_view, *x = &x_view, *to = &r_view;                                   \
        const sebp_basis *basis = p.basis;                                                         \
        const sebp_rows *rows = p.rows;                                                            \
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;                                    \
        sebp_rotation rotation = SEBP_ROTATE_AUTO;                                                 \
        change;                                                                                    \
        check_refusal(                                                                             \
            context,                                                                               \
            sebp_sparsegrad_gradient(context, basis, dy, x, rows, &options, rotation, to), want,   \
            word, #change);                                                                        \
        ck_assert_msg(testing_same_bits(&r, &r_before), "%s: written to", #change);                \
    } while (0)

#define UPDATE_REFUSES(want, word, change)                                                         \
    do {                                                                                           \
        sebp_matrix w_view = w, *to = &w_view;                                                     \
        sebp_sparse s_view = s, *step = &s_view;                                                   \
        const sebp_basis *basis = p.basis;                                                         \
        change;                                                                                    \
        check_refusal(context, sebp_sparsegrad_update(context, basis, step, to), want, word,       \
                      #change);                                                                    \
        ck_assert_msg(testing_same_bits(&w, &w_before), "%s: written to", #change);                \
    } while (0)

#define SPARSE_REFUSES(function, want, word, change)                                               \
    do {                                                                                           \
        sebp_matrix r_view = r, *from = &r_view;                                                   \
        sebp_sparse s_view = s, *kept = &s_view;                                                   \
        change;                                                                                    \
        check_refusal(context, function(context, from, kept), want, word, #change);                \
    } while (0)

static sebp_status add_swapped(sebp_context *context, const sebp_matrix *w, const sebp_sparse *s)
{
    return sebp_sparse_add(context, s, w);
}

START_TEST(bad_input_is_refused)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, MIN_SCRATCH);
    problem p = {.N = 5, .K = 6, .p = 3, .q = 4};
    make_basis(&p, TESTING_REAL);
    p.dy = testing_random_matrix(8, 5, SEBP_F32, TESTING_REAL);
    p.x = testing_random_matrix(8, 6, SEBP_F32, TESTING_REAL);
    sebp_rows *other_rows = NULL;
    ck_assert_int_eq(sebp_rows_all(8, &p.rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_all(9, &other_rows), SEBP_SUCCESS);
    sebp_matrix r = testing_random_matrix(3, 4, SEBP_F32, TESTING_REAL),
                r_before = testing_copy(&r);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "basis", basis = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "dy", dy = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "x", x = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "r", to = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 3);
    GRADIENT_REFUSES(SEBP_ERROR_STRIDE, "dy", dy->stride = 4);
    GRADIENT_REFUSES(SEBP_ERROR_SIZE, "x", x->rows = -1);
    GRADIENT_REFUSES(SEBP_ERROR_DTYPE, "x", x->dtype = SEBP_BF16);
    GRADIENT_REFUSES(SEBP_ERROR_DTYPE, "r is bf16", to->dtype = SEBP_BF16);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rule",
                     (rows = NULL, options.rule.kind = (sebp_rule_kind)9));
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "dw_write", options.dw_write = (sebp_write)2);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rotation 6", rotation = (sebp_rotation)6);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rotation -1", rotation = (sebp_rotation)-1);
    GRADIENT_REFUSES(SEBP_ERROR_ROWS, "9", rows = other_rows);
    GRADIENT_REFUSES(SEBP_ERROR_ROWS, "x_is_compact", (rows = NULL, options.x_is_compact = 1));
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "dy is 8x4", dy->cols = 4);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "x is 8x5", x->cols = 5);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "x is 7x6", x->rows = 7);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "r is 2x4", to->rows = 2);
    GRADIENT_REFUSES(SEBP_ERROR_ALIAS, "overlaps dy", to->data = dy->data);
    GRADIENT_REFUSES(SEBP_ERROR_ALIAS, "overlaps the basis",
                     to->data = sebp_basis_in(p.basis).data);
    ck_assert_int_eq(
        sebp_sparsegrad_gradient(NULL, p.basis, &p.dy, &p.x, NULL, NULL, SEBP_ROTATE_AUTO, &r),
        SEBP_ERROR_NULL);

    sebp_matrix w = testing_random_matrix(5, 6, SEBP_F32, TESTING_REAL),
                w_before = testing_copy(&w);
    int64_t indices[] = {1, 5, 11};
    float values[] = {1, 2, 3};
    sebp_sparse s = {indices, values, 3, 3, 4};
    UPDATE_REFUSES(SEBP_ERROR_NULL, "basis", basis = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s is NULL", step = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "w is NULL", to = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s", step->values = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s", step->indices = NULL);
    UPDATE_REFUSES(SEBP_ERROR_STRIDE, "w", to->stride = 5);
    UPDATE_REFUSES(SEBP_ERROR_SIZE, "s", step->count = -1);
    UPDATE_REFUSES(SEBP_ERROR_SHAPE, "s is 4x3", (step->rows = 4, step->cols = 3));
    UPDATE_REFUSES(SEBP_ERROR_SHAPE, "w is 4x6", to->rows = 4);
    UPDATE_REFUSES(SEBP_ERROR_ALIAS, "basis", to->data = sebp_basis_out(p.basis).data);
    const int64_t bad[][3] = {{1, 5, 12}, {1, 1, 2}, {5, 1, 11}, {-1, 5, 11}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memcpy(indices, bad[i], sizeof indices);
        ck_assert_int_eq(sebp_sparse_check(&s), SEBP_ERROR_ROWS);
        UPDATE_REFUSES(SEBP_ERROR_ROWS, "s", (void)0);
        SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_ROWS, "kept", (void)0);
    }
    memcpy(indices, (int64_t[]){1, 5, 11}, sizeof indices);
    const float odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        values[1] = odd[i];
        UPDATE_REFUSES(SEBP_ERROR_NONFINITE, "element 1", (void)0);
        SPARSE_REFUSES(add_swapped, SEBP_ERROR_NONFINITE, "element 1", (void)0);
    }
    values[1] = 2;
    ck_assert_int_eq(sebp_sparsegrad_update(NULL, p.basis, &s, &w), SEBP_ERROR_NULL);

    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "r is NULL", from = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "top is NULL", kept = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "top", kept->indices = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_STRIDE, "r", from->stride = 3);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_DTYPE, "r is bf16", from->dtype = SEBP_BF16);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_SIZE, "top", kept->count = -1);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_VALUE, "k is 0", kept->count = 0);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_VALUE, "k is 13", kept->count = 13);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_OVERFLOW, "top", kept->rows = INT64_MAX);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_SHAPE, "top", (kept->rows = 4, kept->cols = 3));
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_NULL, "kept is NULL", kept = NULL);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_DTYPE, "r is bf16", from->dtype = SEBP_BF16);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_VALUE, "kept", kept->count = 13);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_SHAPE, "kept", (kept->rows = 4, kept->cols = 3));
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_NULL, "w is NULL", from = NULL);
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_NULL, "s is NULL", kept = NULL);
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_SHAPE, "s", (kept->rows = 4, kept->cols = 3));
    ck_assert_int_eq(sebp_sparse_check(NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_check(&s), SEBP_SUCCESS);
    ck_assert(testing_same_bits(&r, &r_before));

    sebp_rows_destroy(other_rows);
    p.active = reference_rows_all(0);
    testing_release(&r);
    testing_release(&r_before);
    testing_release(&w);
    testing_release(&w_before);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* A row of A alone is more than half of the scratch memory holds. */
START_TEST(too_little_scratch)
{
    const int64_t K = _i == 0 ? 150000 : 300000; /* of less than all the scratch memory, and more */
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, MIN_SCRATCH);
    sebp_matrix u_out = random_vectors(1, 1, TESTING_INTEGER);
    sebp_matrix u_in = testing_matrix(1, K, K, SEBP_F32);
    memset(u_in.data, 0, (size_t)K * sizeof(float));
    testing_set(&u_in, 0, 7, 1);
    problem p = {.options = SEBP_LINEAR_OPTIONS_INIT};
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &p.basis), SEBP_SUCCESS);
    p.dy = testing_random_matrix(2, 1, SEBP_BF16, TESTING_REAL);
    p.x = testing_random_matrix(2, K, SEBP_BF16, TESTING_REAL);
    sebp_matrix r = testing_matrix(1, 1, 1, SEBP_F32);
    ck_assert_int_eq(call_gradient(context, &p, SEBP_ROTATE_FACTORS, &r), SEBP_ERROR_MEMORY);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "scratch"));
    ck_assert(isnan(testing_get(&r, 0, 0)));
    testing_succeed(call_gradient(context, &p, SEBP_ROTATE_OUT_IN, &r), context); /* in panels */
    testing_release(&r);
    p.active = reference_rows_all(0);
    p.u_out = u_out;
    p.u_in = u_in;
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparsegrad");
    TCase *tests = tcase_create("sparsegrad");
    tcase_add_loop_test(tests, gradient, 0, 2);
    tcase_add_loop_test(tests, gradient_in_panels, 0, 2);
    tcase_add_loop_test(tests, cheapest_order_that_fits, 0, 4);
    tcase_add_test(tests, gradient_without_active_rows);
    tcase_add_test(tests, cheapest_order);
    tcase_add_loop_test(tests, top, 0, SHAPES);
    tcase_add_test(tests, top_refuses_nan_and_inf);
    tcase_add_test(tests, take_and_add);
    tcase_add_loop_test(tests, update, 0, 2);
    tcase_add_test(tests, update_in_panels);
    tcase_add_test(tests, any_number_of_threads_gives_the_same_bits);
    tcase_add_loop_test(tests, ten_steps_are_the_papers, 0, 2);
    tcase_add_test(tests, nonfinite_gradients_stop_the_step);
    tcase_add_test(tests, bad_input_is_refused);
    tcase_add_loop_test(tests, too_little_scratch, 0, 2);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
