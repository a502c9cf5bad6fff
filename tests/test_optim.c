/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AdamW: the dense step against double precision and exactly where a step is a round number; the
 * sparse step bit for bit against the dense one on the elements that it has; states exported,
 * imported and continued; bad input.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

/* A host's parallel_for that shows whether a result hangs on the order of tasks. */
static void run_backwards(void *pool, int64_t tasks, sebp_task task, void *work)
{
    int64_t *max = pool;
    *max = tasks > *max ? tasks : *max;
    for (int64_t i = tasks - 1; i >= 0; i--) {
        task(work, i);
    }
}

static int64_t most_tasks;

static sebp_context *make_context(int threads, int host)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    options.parallel_for = host ? run_backwards : NULL;
    options.pool = host ? &most_tasks : NULL;
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    return context;
}

static void expect(sebp_status got, sebp_status want, const sebp_context *context)
{
    ck_assert_msg(got == want, "%s, not %s: %s", sebp_status_string(got), sebp_status_string(want),
                  sebp_context_message(context));
}

/* Small sizes, 0 among them. */
static int64_t random_size(void)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.5) ? 8 : 90);
}

static sebp_dtype random_dtype(void)
{
    return testing_chance(0.5) ? SEBP_F32 : SEBP_BF16;
}

static sebp_matrix random_matrix(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    int64_t stride = cols + (testing_chance(0.5) ? 0 : testing_between(1, 19));
    sebp_matrix matrix = testing_matrix(rows, cols, stride, dtype);
    testing_fill(&matrix, TESTING_REAL);
    return matrix;
}

/* What a step is made on. */
typedef struct problem {
    sebp_matrix gradient, w, moment1, moment2;
} problem;

static problem random_problem(int64_t rows, int64_t cols)
{
    problem p = {random_matrix(rows, cols, random_dtype()),
                 random_matrix(rows, cols, random_dtype()), random_matrix(rows, cols, SEBP_F32),
                 random_matrix(rows, cols, SEBP_F32)};
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            testing_set(&p.moment2, i, j, fabs(testing_uniform()));
        }
    }
    return p;
}

static problem copy_problem(const problem *p)
{
    return (problem){testing_copy(&p->gradient), testing_copy(&p->w), testing_copy(&p->moment1),
                     testing_copy(&p->moment2)};
}

static int same_problem(const problem *a, const problem *b)
{
    return testing_same_bits(&a->gradient, &b->gradient) && testing_same_bits(&a->w, &b->w) &&
           testing_same_bits(&a->moment1, &b->moment1) &&
           testing_same_bits(&a->moment2, &b->moment2);
}

static void free_problem(problem *p)
{
    testing_release(&p->gradient);
    testing_release(&p->w);
    testing_release(&p->moment1);
    testing_release(&p->moment2);
}

static sebp_adamw_options random_options(void)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = testing_chance(0.1) ? 0 : fabs(testing_uniform());
    options.beta1 = testing_chance(0.1) ? 0 : fabs(testing_uniform());
    options.beta2 = testing_chance(0.1) ? 0 : 1 - 0.5 * fabs(testing_uniform());
    options.beta2 = options.beta2 < 0.99999 ? options.beta2 : 0.9;
    options.epsilon = testing_chance(0.5) ? 1e-8 : 0.1;
    options.weight_decay = testing_chance(0.3) ? 0 : fabs(testing_uniform());
    return options;
}

/* One element of the formula in optim.h. What rounding may take a result away by: each of the few
 * operations behind it rounds once, and so did each factor. */
static void check_element(const problem *was, const problem *is, int64_t i, int64_t j, double t,
                          const sebp_adamw_options *by)
{
    const double eps = FLT_EPSILON, tiny = FLT_MIN;
    double g = testing_get(&was->gradient, i, j);
    double from1 = by->beta1 * testing_get(&was->moment1, i, j), gain1 = (1 - by->beta1) * g;
    double from2 = by->beta2 * testing_get(&was->moment2, i, j), gain2 = (1 - by->beta2) * g * g;
    double m = from1 + gain1, m_bound = 2 * eps * (fabs(from1) + fabs(gain1)) + tiny;
    double v = from2 + gain2, v_bound = 3 * eps * v + tiny;
    double root = sqrt(v) / sqrt(1 - pow(by->beta2, t)) + by->epsilon;
    double rate = by->learning_rate / (1 - pow(by->beta1, t));
    double s = -rate * m / root, s_bound = 8 * eps * fabs(s) + rate * m_bound / root;
    double kept = (1 - by->learning_rate * by->weight_decay) * testing_get(&was->w, i, j);
    double w = kept + s, w_bound = 2 * eps * (fabs(kept) + fabs(s)) + s_bound + tiny;
    w_bound += is->w.dtype == SEBP_BF16 ? 0x1p-8 * (fabs(w) + w_bound) : 0;
    double got[3] = {testing_get(&is->moment1, i, j), testing_get(&is->moment2, i, j),
                     testing_get(&is->w, i, j)};
    if (!(fabs(got[0] - m) <= m_bound) || !(fabs(got[1] - v) <= v_bound) ||
        !(fabs(got[2] - w) <= w_bound)) {
        ck_abort_msg("(%" PRId64 ", %" PRId64 "): %g %g %g, not %g %g %g", i, j, got[0], got[1],
                     got[2], m, v, w);
    }
}

START_TEST(dense_step_is_within_the_error_bound)
{
    for (int round = 0; round < testing_rounds(300); round++) {
        sebp_context *context = make_context((int)testing_between(1, 3), 0);
        problem p = random_problem(random_size(), random_size());
        problem was = copy_problem(&p);
        sebp_adamw_options options = random_options();
        int64_t t = testing_chance(0.5) ? testing_between(1, 4) : testing_between(1, 100000);
        expect(sebp_adamw_step(context, &p.gradient, t, &options, &p.w, &p.moment1, &p.moment2),
               SEBP_SUCCESS, context);
        ck_assert(testing_same_bits(&p.gradient, &was.gradient));
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                check_element(&was, &p, i, j, (double)t, &options);
            }
        }
        free_problem(&p);
        free_problem(&was);
        sebp_context_destroy(context);
    }
}
END_TEST

/* The first step is lr against the sign of the gradient, whatever its size. With powers of two for
 * factors and an epsilon that vanishes beside it, every operation is exact. */
START_TEST(first_dense_step_is_exact)
{
    sebp_context *context = make_context(2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.25;
    options.beta1 = 0.5;
    options.beta2 = 0.75;
    options.epsilon = 1e-30;
    options.weight_decay = 0.5;
    for (int round = 0; round < testing_rounds(40); round++) {
        problem p = random_problem(testing_between(1, 40), testing_between(1, 40));
        testing_fill(&p.gradient, TESTING_INTEGER);
        testing_fill(&p.w, TESTING_INTEGER);
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                testing_set(&p.moment1, i, j, 0);
                testing_set(&p.moment2, i, j, 0);
            }
        }
        problem was = copy_problem(&p);
        expect(sebp_adamw_step(context, &p.gradient, 1, &options, &p.w, &p.moment1, &p.moment2),
               SEBP_SUCCESS, context);
        for (int64_t i = 0; i < p.w.rows; i++) {
            for (int64_t j = 0; j < p.w.cols; j++) {
                double g = testing_get(&was.gradient, i, j);
                double w = 0.875 * testing_get(&was.w, i, j) - (g > 0 ? 0.25 : -0.25);
                if (testing_get(&p.w, i, j) != w || testing_get(&p.moment1, i, j) != 0.5 * g ||
                    testing_get(&p.moment2, i, j) != 0.25 * g * g) {
                    ck_abort_msg("w is %a, not %a", testing_get(&p.w, i, j), w);
                }
            }
        }
        free_problem(&p);
        free_problem(&was);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(dense_step_and_decay_do_not_depend_on_threads)
{
    most_tasks = 0;
    for (int round = 0; round < testing_rounds(6); round++) {
        /* Large enough to be split, with gaps between rows and without. */
        problem start = random_problem(testing_between(5, 7), testing_between(30000, 60000));
        problem first = {0};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context = make_context(threads, threads == 5);
            problem p = copy_problem(&start);
            for (int64_t t = 1; t <= 2; t++) {
                expect(sebp_adamw_step(context, &p.gradient, t, NULL, &p.w, &p.moment1, &p.moment2),
                       SEBP_SUCCESS, context);
            }
            expect(sebp_weight_decay(context, NULL, &p.w), SEBP_SUCCESS, context);
            sebp_context_destroy(context);
            if (threads == 1) {
                ck_assert(!testing_same_bits(&p.w, &start.w));
                first = p;
            } else {
                ck_assert_msg(same_problem(&p, &first), "%d threads", threads);
                free_problem(&p);
            }
        }
        free_problem(&first);
        free_problem(&start);
    }
    ck_assert_int_ge(most_tasks, 5);
}
END_TEST

START_TEST(decay_scales)
{
    sebp_context *context = make_context(2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.5;
    options.weight_decay = 1.0 / 3;
    for (int round = 0; round < testing_rounds(60); round++) {
        sebp_matrix w = random_matrix(random_size(), random_size(), random_dtype());
        sebp_matrix was = testing_copy(&w);
        expect(sebp_weight_decay(context, &options, &w), SEBP_SUCCESS, context);
        for (int64_t i = 0; i < w.rows; i++) {
            for (int64_t j = 0; j < w.cols; j++) {
                float want = (float)(1 - options.learning_rate * options.weight_decay) *
                             (float)testing_get(&was, i, j);
                testing_set(&was, i, j, (double)want);
            }
        }
        ck_assert(testing_same_bits(&w, &was));
        testing_release(&w);
        testing_release(&was);
    }
    /* No decay: not even a NaN is touched. */
    sebp_matrix poison = testing_matrix(3, 5, 7, SEBP_F32);
    sebp_matrix was = testing_copy(&poison);
    options.weight_decay = 0;
    expect(sebp_weight_decay(context, &options, &poison), SEBP_SUCCESS, context);
    ck_assert(testing_same_bits(&poison, &was));
    testing_release(&poison);
    testing_release(&was);
    sebp_context_destroy(context);
}
END_TEST

/* ---- the sparse step ---- */

/* A random choice of elements, each with the given chance, and random values. */
static sebp_sparse random_sparse(int64_t rows, int64_t cols, double chance)
{
    sebp_sparse made = {NULL, NULL, 0, rows, cols};
    made.indices = testing_alloc((size_t)(rows * cols) * sizeof(int64_t), 0);
    made.values = testing_alloc((size_t)(rows * cols) * sizeof(float), 0);
    for (int64_t at = 0; at < rows * cols; at++) {
        if (testing_chance(chance)) {
            made.indices[made.count] = at;
            made.values[made.count++] = (float)testing_uniform();
        }
    }
    return made;
}

static void fill_sparse(const sebp_sparse *sparse)
{
    for (int64_t i = 0; i < sparse->count; i++) {
        sparse->values[i] = (float)testing_uniform();
    }
}

static void free_sparse(sebp_sparse *sparse)
{
    testing_free(sparse->indices);
    testing_free(sparse->values);
}

/* What a state must hold and give: plain arrays over all elements, stepped by the dense step on
 * weights of zero. */
typedef struct state_twin {
    int64_t steps, elements;
    float *moment1, *moment2;
    unsigned char *visited;
} state_twin;

static void *zeros(int64_t count, size_t bytes)
{
    void *data = calloc((size_t)count + 1, bytes);
    ck_assert_ptr_nonnull(data);
    return data;
}

static state_twin make_twin(int64_t elements)
{
    return (state_twin){0, elements, zeros(elements, sizeof(float)), zeros(elements, sizeof(float)),
                        zeros(elements, 1)};
}

static void free_twin(state_twin *twin)
{
    free(twin->moment1);
    free(twin->moment2);
    free(twin->visited);
}

/* Steps the twin, and a sparse step beside it; both must agree to the last bit. */
static void step_both(sebp_context *context, sebp_sparse_adamw *state, state_twin *twin,
                      const sebp_adamw_options *options, const sebp_sparse *gradient)
{
    int64_t n = gradient->count;
    float *g = zeros(n, sizeof *g), *w = zeros(n, sizeof *w);
    float *m = zeros(n, sizeof *m), *v = zeros(n, sizeof *v);
    for (int64_t i = 0; i < n; i++) {
        g[i] = gradient->values[i];
        m[i] = twin->moment1[gradient->indices[i]];
        v[i] = twin->moment2[gradient->indices[i]];
    }
    sebp_matrix views[4] = {sebp_matrix_f32(g, 1, n), sebp_matrix_f32(w, 1, n),
                            sebp_matrix_f32(m, 1, n), sebp_matrix_f32(v, 1, n)};
    twin->steps++;
    expect(
        sebp_adamw_step(context, &views[0], twin->steps, options, &views[1], &views[2], &views[3]),
        SEBP_SUCCESS, context);
    expect(sebp_sparse_adamw_step(context, state, options, gradient), SEBP_SUCCESS, context);
    for (int64_t i = 0; i < n; i++) {
        twin->moment1[gradient->indices[i]] = m[i];
        twin->moment2[gradient->indices[i]] = v[i];
        twin->visited[gradient->indices[i]] = 1;
        if (gradient->values[i] != w[i]) {
            ck_abort_msg("step %" PRId64 ": element %" PRId64 " moves by %a, not %a", twin->steps,
                         gradient->indices[i], (double)gradient->values[i], (double)w[i]);
        }
    }
    testing_check(gradient->values);
    free(g);
    free(w);
    free(m);
    free(v);
}

/* A state copied out. */
typedef struct state_copy {
    int64_t steps, count;
    int64_t *indices;
    float *moment1, *moment2;
} state_copy;

static state_copy export_state(const sebp_sparse_adamw *state)
{
    int64_t count = sebp_sparse_adamw_count(state);
    state_copy made = {sebp_sparse_adamw_steps(state), count,
                       testing_alloc((size_t)count * sizeof(int64_t), 0),
                       testing_alloc((size_t)count * sizeof(float), 0),
                       testing_alloc((size_t)count * sizeof(float), 0)};
    ck_assert_int_eq(sebp_sparse_adamw_export(state, made.indices, made.moment1, made.moment2),
                     SEBP_SUCCESS);
    return made;
}

static int same_copy(const state_copy *a, const state_copy *b)
{
    size_t count = (size_t)a->count;
    return a->steps == b->steps && a->count == b->count &&
           memcmp(a->indices, b->indices, count * sizeof *a->indices) == 0 &&
           memcmp(a->moment1, b->moment1, count * sizeof *a->moment1) == 0 &&
           memcmp(a->moment2, b->moment2, count * sizeof *a->moment2) == 0;
}

static void free_copy(state_copy *copy)
{
    testing_free(copy->indices);
    testing_free(copy->moment1);
    testing_free(copy->moment2);
}

/* Whether a state holds what its twin does. */
static void check_state(const sebp_sparse_adamw *state, const state_twin *twin)
{
    state_copy got = export_state(state);
    int64_t at = 0;
    ck_assert_int_eq(got.steps, twin->steps);
    for (int64_t i = 0; i < twin->elements; i++) {
        if (twin->visited[i]) {
            ck_assert(at < got.count && got.indices[at] == i);
            if (got.moment1[at] != twin->moment1[i] || got.moment2[at] != twin->moment2[i]) {
                ck_abort_msg("the moments of element %" PRId64 " differ", i);
            }
            at++;
        }
    }
    ck_assert_int_eq(at, got.count);
    free_copy(&got);
}

static sebp_sparse_adamw *make_state(int64_t rows, int64_t cols, const sebp_sparse *support)
{
    sebp_sparse_adamw *state = NULL;
    ck_assert_int_eq(sebp_sparse_adamw_create(rows, cols, support != NULL ? support->indices : NULL,
                                              support != NULL ? support->count : 0, &state),
                     SEBP_SUCCESS);
    return state;
}

/* _i: whether the support is fixed. */
START_TEST(sparse_step_is_the_dense_one_on_its_elements)
{
    for (int round = 0; round < testing_rounds(40); round++) {
        sebp_context *context = make_context((int)testing_between(1, 3), 0);
        int64_t rows = random_size(), cols = random_size();
        sebp_adamw_options options = random_options();
        sebp_sparse support = random_sparse(rows, cols, fabs(testing_uniform()));
        sebp_sparse_adamw *state = make_state(rows, cols, _i ? &support : NULL);
        state_twin twin = make_twin(rows * cols);
        for (int64_t i = 0; _i && i < support.count; i++) {
            twin.visited[support.indices[i]] = 1;
        }
        for (int step = 0; step < 12; step++) {
            if (_i) {
                sebp_sparse gradient = support;
                fill_sparse(&gradient);
                if (testing_chance(0.5)) { /* as the state itself lists it */
                    gradient.indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(state);
                }
                step_both(context, state, &twin, &options, &gradient);
            } else {
                sebp_sparse gradient = random_sparse(rows, cols, 0.5 * fabs(testing_uniform()));
                step_both(context, state, &twin, &options, &gradient);
                free_sparse(&gradient);
            }
        }
        check_state(state, &twin);
        sebp_sparse_adamw_destroy(state);
        free_twin(&twin);
        free_sparse(&support);
        sebp_context_destroy(context);
    }
}
END_TEST

/* On all elements at once, weights and moments are those of a dense training, bit for bit. */
START_TEST(sparse_step_on_all_elements_is_dense_training)
{
    const int64_t ROWS = 37, COLS = 53, ALL = 37 * 53;
    sebp_context *context = make_context(2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.weight_decay = 0;
    sebp_matrix w[2], gradient = testing_matrix(ROWS, COLS, COLS, SEBP_F32);
    sebp_matrix m = testing_matrix(ROWS, COLS, COLS, SEBP_F32), v = testing_copy(&m);
    memset(m.data, 0, (size_t)ALL * sizeof(float));
    memset(v.data, 0, (size_t)ALL * sizeof(float));
    sebp_sparse sparse = random_sparse(ROWS, COLS, 2);
    ck_assert_int_eq(sparse.count, ALL);
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        sebp_sparse_adamw *state = make_state(ROWS, COLS, NULL);
        memset(m.data, 0, (size_t)ALL * sizeof(float));
        memset(v.data, 0, (size_t)ALL * sizeof(float));
        w[0] = random_matrix(ROWS, COLS, (sebp_dtype)dtype);
        w[1] = testing_copy(&w[0]);
        sebp_matrix was = testing_copy(&w[0]);
        for (int64_t t = 1; t <= 5; t++) {
            testing_fill(&gradient, TESTING_REAL);
            memcpy(sparse.values, gradient.data, (size_t)ALL * sizeof(float));
            expect(sebp_adamw_step(context, &gradient, t, &options, &w[0], &m, &v), SEBP_SUCCESS,
                   context);
            expect(sebp_sparse_adamw_step(context, state, &options, &sparse), SEBP_SUCCESS,
                   context);
            expect(sebp_sparse_add(context, &sparse, &w[1]), SEBP_SUCCESS, context);
        }
        ck_assert(testing_same_bits(&w[0], &w[1]) && !testing_same_bits(&w[0], &was));
        sebp_sparse_adamw_destroy(state);
        testing_release(&w[0]);
        testing_release(&w[1]);
        testing_release(&was);
    }
    testing_release(&gradient);
    testing_release(&m);
    testing_release(&v);
    free_sparse(&sparse);
    sebp_context_destroy(context);
}
END_TEST

/* A state that is copied out and into a fresh one goes on bit for bit. _i: whether the support is
 * fixed. */
START_TEST(training_goes_on_after_import)
{
    sebp_context *context = make_context(1, 0);
    for (int round = 0; round < testing_rounds(20); round++) {
        int64_t rows = testing_between(1, 60), cols = testing_between(1, 60);
        sebp_sparse support = random_sparse(rows, cols, 0.3);
        sebp_sparse_adamw *states[2];
        for (int i = 0; i < 2; i++) {
            states[i] = make_state(rows, cols, _i ? &support : NULL);
        }
        for (int step = 0; step < 10; step++) {
            if (step == 5) {
                state_copy saved = export_state(states[0]);
                ck_assert_int_eq(sebp_sparse_adamw_import(states[1], saved.steps, saved.indices,
                                                          saved.moment1, saved.moment2,
                                                          saved.count),
                                 SEBP_SUCCESS);
                free_copy(&saved);
            }
            sebp_sparse gradient[2] = {random_sparse(rows, cols, _i ? 0 : 0.2), {0}};
            if (_i) {
                free_sparse(&gradient[0]);
                gradient[0] = random_sparse(rows, cols, 2);
                memcpy(gradient[0].indices, support.indices,
                       (size_t)support.count * sizeof(int64_t));
                gradient[0].count = support.count;
            }
            gradient[1] = gradient[0];
            gradient[1].values = testing_alloc((size_t)(rows * cols) * sizeof(float), 0);
            memcpy(gradient[1].values, gradient[0].values,
                   (size_t)gradient[0].count * sizeof(float));
            for (int i = 0; i < (step < 5 ? 1 : 2); i++) {
                expect(sebp_sparse_adamw_step(context, states[i], NULL, &gradient[i]), SEBP_SUCCESS,
                       context);
            }
            if (step >= 5) {
                ck_assert_mem_eq(gradient[0].values, gradient[1].values,
                                 (size_t)gradient[0].count * sizeof(float));
            }
            testing_free(gradient[1].values);
            free_sparse(&gradient[0]);
        }
        state_copy last[2] = {export_state(states[0]), export_state(states[1])};
        ck_assert(same_copy(&last[0], &last[1]));
        for (int i = 0; i < 2; i++) {
            free_copy(&last[i]);
            sebp_sparse_adamw_destroy(states[i]);
        }
        free_sparse(&support);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(a_state_takes_the_memory_it_should)
{
    sebp_context *context = make_context(1, 0);
    const int64_t SIZE = 300;
    sebp_sparse all = random_sparse(SIZE, SIZE, 2);
    sebp_sparse_adamw *fixed = make_state(SIZE, SIZE, &all), *grows = make_state(SIZE, SIZE, NULL);
    int64_t head = sebp_sparse_adamw_bytes(grows); /* no element yet */
    ck_assert_int_eq(sebp_sparse_adamw_bytes(fixed), head + 16 * all.count);
    sebp_sparse one = all;
    one.count = 1;
    for (int64_t i = 0; i < all.count; i++, one.indices++) {
        one.values[0] = 1;
        expect(sebp_sparse_adamw_step(context, grows, NULL, &one), SEBP_SUCCESS, context);
        int64_t count = sebp_sparse_adamw_count(grows);
        int64_t bytes = sebp_sparse_adamw_bytes(grows) - head;
        ck_assert(count == i + 1 && (double)bytes >= 16 / 0.75 * (double)count);
        ck_assert(bytes <= 1024 || (double)bytes < 2 * 16 / 0.75 * (double)count);
    }
    ck_assert_int_eq(sebp_sparse_adamw_steps(grows), all.count);
    sebp_sparse_adamw_destroy(fixed);
    sebp_sparse_adamw_destroy(grows);
    free_sparse(&all);
    sebp_context_destroy(context);
}
END_TEST

/* ---- bad input ---- */

/* A good dense call, changed before it is made; it fails and leaves everything as it was. */
#define DENSE(want, word, change)                                                                  \
    do {                                                                                           \
        problem p = copy_problem(&good), was;                                                      \
        sebp_matrix *gradient = &p.gradient, *w = &p.w, *moment1 = &p.moment1;                     \
        sebp_matrix *moment2 = &p.moment2;                                                         \
        sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;                                      \
        int64_t t = 1;                                                                             \
        problem views = p;                                                                         \
        change;                                                                                    \
        was = copy_problem(&views);                                                                \
        sebp_status got = sebp_adamw_step(context, gradient, t, &options, w, moment1, moment2);    \
        ck_assert_msg(got == (want), "%s: %s", #change, sebp_status_string(got));                  \
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", #change,  \
                      sebp_context_message(context));                                              \
        ck_assert_msg(same_problem(&views, &was), "%s: written to", #change);                      \
        free_problem(&was);                                                                        \
        free_problem(&views);                                                                      \
        (void)gradient, (void)w, (void)moment1, (void)moment2;                                     \
    } while (0)

#define DENSE_VIEW(name)                                                                           \
    do {                                                                                           \
        DENSE(SEBP_ERROR_NULL, #name, name = NULL);                                                \
        DENSE(SEBP_ERROR_NULL, #name, name->data = NULL);                                          \
        DENSE(SEBP_ERROR_SIZE, #name, name->rows = -1);                                            \
        DENSE(SEBP_ERROR_DTYPE, #name, name->dtype = (sebp_dtype)2);                               \
        DENSE(SEBP_ERROR_STRIDE, #name, name->stride = 1);                                         \
        DENSE(SEBP_ERROR_OVERFLOW, #name, name->stride = INT64_MAX);                               \
    } while (0)

START_TEST(dense_step_refuses_bad_input)
{
    sebp_context *context = make_context(2, 0);
    problem good = random_problem(9, 9);
    for (size_t i = 0; i < 2; i++) { /* either dtype of gradient and weight, in turn */
        testing_release(&good.gradient);
        testing_release(&good.w);
        good.gradient = random_matrix(9, 9, (sebp_dtype)i);
        good.w = random_matrix(9, 9, (sebp_dtype)(1 - i));
        DENSE_VIEW(gradient);
        DENSE_VIEW(w);
        DENSE_VIEW(moment1);
        DENSE_VIEW(moment2);
        DENSE(SEBP_ERROR_DTYPE, "moment1", moment1->dtype = SEBP_BF16);
        DENSE(SEBP_ERROR_DTYPE, "moment2", moment2->dtype = SEBP_BF16);
        DENSE(SEBP_ERROR_SHAPE, "w", w->rows--);
        DENSE(SEBP_ERROR_SHAPE, "moment1", moment1->cols--);
        DENSE(SEBP_ERROR_SHAPE, "moment2", moment2->rows--);
        DENSE(SEBP_ERROR_SHAPE, "w", gradient->cols--);
        DENSE(SEBP_ERROR_ALIAS, "moment", moment1->data = moment2->data);
        DENSE(SEBP_ERROR_ALIAS, "w", w->data = moment1->data);
        if (i == SEBP_F32) { /* else it may not suit w's dtype */
            DENSE(SEBP_ERROR_ALIAS, "w", w->data = gradient->data);
        }
        DENSE(SEBP_ERROR_VALUE, "step", t = 0);
        DENSE(SEBP_ERROR_VALUE, "step", t = INT64_MIN);
        DENSE(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes--);
        DENSE(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 0);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = -1e-9);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = NAN);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = INFINITY);
        DENSE(SEBP_ERROR_VALUE, "learning_rate", options.learning_rate = 1e300);
        DENSE(SEBP_ERROR_VALUE, "beta1", options.beta1 = 1);
        DENSE(SEBP_ERROR_VALUE, "beta1", options.beta1 = -0.1);
        DENSE(SEBP_ERROR_VALUE, "beta2", options.beta2 = 1);
        DENSE(SEBP_ERROR_VALUE, "beta2", options.beta2 = NAN);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = 0);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = 1e-60);
        DENSE(SEBP_ERROR_VALUE, "epsilon", options.epsilon = -1);
        DENSE(SEBP_ERROR_VALUE, "weight_decay", options.weight_decay = -1);
        DENSE(SEBP_ERROR_VALUE, "weight_decay", options.weight_decay = INFINITY);
        /* Each fits into f32, what is computed of them does not. */
        DENSE(SEBP_ERROR_VALUE, "learning_rate * weight_decay",
              (options.learning_rate = 1e20, options.weight_decay = 1e20));
        DENSE(SEBP_ERROR_VALUE, "learning_rate / (1 - beta1^t)",
              (options.learning_rate = 1e38, options.weight_decay = 0, t = 1));
        DENSE(SEBP_ERROR_VALUE, "learning_rate / (1 - beta1^t)",
              (options.learning_rate = 1e23, options.beta1 = 1 - 0x1p-53, t = 1));
        const double odd[] = {NAN, INFINITY, -INFINITY};
        for (int at = 0; at < 9; at++) {
            DENSE(SEBP_ERROR_NONFINITE, "gradient", testing_set(gradient, at, 8 - at, odd[at % 3]));
        }
    }
    ck_assert_int_eq(
        sebp_adamw_step(NULL, &good.gradient, 1, NULL, &good.w, &good.moment1, &good.moment2),
        SEBP_ERROR_NULL);
    free_problem(&good);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(decay_refuses_bad_input)
{
    sebp_context *context = make_context(1, 0);
    sebp_matrix w = random_matrix(3, 4, SEBP_F32), was = testing_copy(&w), bad = w;
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    ck_assert_int_eq(sebp_weight_decay(NULL, NULL, &w), SEBP_ERROR_NULL);
    expect(sebp_weight_decay(context, NULL, NULL), SEBP_ERROR_NULL, context);
    bad.stride = 3;
    expect(sebp_weight_decay(context, NULL, &bad), SEBP_ERROR_STRIDE, context);
    options.size_bytes--;
    expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_SIZE, context);
    options.size_bytes++;
    options.weight_decay = NAN;
    expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_VALUE, context);
    options.learning_rate = options.weight_decay = 2e19;
    expect(sebp_weight_decay(context, &options, &w), SEBP_ERROR_VALUE, context);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "learning_rate * weight_decay"));
    ck_assert(testing_same_bits(&w, &was));
    /* As a decay is no step, it does not divide by 1 - beta1^t. */
    options.learning_rate = 1e38;
    options.weight_decay = 1e-38;
    expect(sebp_weight_decay(context, &options, &w), SEBP_SUCCESS, context);
    for (int64_t i = 0; i < 3; i++) {
        for (int64_t j = 0; j < 4; j++) {
            ck_assert(fabs(testing_get(&w, i, j)) < 1e-6);
        }
    }
    testing_release(&w);
    testing_release(&was);
    sebp_context_destroy(context);
}
END_TEST

/* A good sparse step, changed before it is made; state and gradient stay as they were. */
#define SPARSE(want, word, change)                                                                 \
    do {                                                                                           \
        int64_t indices[3] = {2, 7, 11};                                                           \
        float values[3] = {1, -2, 3};                                                              \
        sebp_sparse view = {indices, values, 3, 3, 5}, *gradient = &view;                          \
        sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;                                      \
        state_copy before = export_state(state);                                                   \
        change;                                                                                    \
        float were[3] = {values[0], values[1], values[2]};                                         \
        sebp_status got = sebp_sparse_adamw_step(context, state, &options, gradient);              \
        ck_assert_msg(got == (want), "%s: %s", #change, sebp_status_string(got));                  \
        ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", #change,  \
                      sebp_context_message(context));                                              \
        ck_assert_mem_eq(values, were, sizeof were);                                               \
        state_copy after = export_state(state);                                                    \
        ck_assert_msg(same_copy(&before, &after), "%s: the state has changed", #change);           \
        free_copy(&before);                                                                        \
        free_copy(&after);                                                                         \
    } while (0)

/* _i: whether the support is fixed. */
START_TEST(sparse_step_refuses_bad_input)
{
    sebp_context *context = make_context(1, 0);
    int64_t support[3] = {2, 7, 11};
    float values[3] = {1, 2, 3};
    sebp_sparse gradient = {support, values, 3, 3, 5};
    sebp_sparse_adamw *state = make_state(3, 5, _i ? &gradient : NULL);
    expect(sebp_sparse_adamw_step(context, state, NULL, &gradient), SEBP_SUCCESS, context);
    SPARSE(SEBP_ERROR_NULL, "gradient", gradient = NULL);
    SPARSE(SEBP_ERROR_NULL, "gradient", gradient->indices = NULL);
    SPARSE(SEBP_ERROR_NULL, "gradient", gradient->values = NULL);
    SPARSE(SEBP_ERROR_SIZE, "gradient", gradient->count = -1);
    SPARSE(SEBP_ERROR_SIZE, "gradient", gradient->rows = -1);
    SPARSE(SEBP_ERROR_OVERFLOW, "gradient", gradient->rows = gradient->cols = INT64_MAX);
    SPARSE(SEBP_ERROR_VALUE, "gradient", (gradient->rows = 1, gradient->cols = 2));
    SPARSE(SEBP_ERROR_SHAPE, "3x5", (gradient->rows = 5, gradient->cols = 3));
    SPARSE(SEBP_ERROR_ROWS, "gradient", indices[0] = -1);
    SPARSE(SEBP_ERROR_ROWS, "gradient", indices[2] = 15);
    SPARSE(SEBP_ERROR_ROWS, "gradient", indices[1] = 2);
    SPARSE(SEBP_ERROR_ROWS, "gradient", indices[1] = 12);
    SPARSE(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 1);
    SPARSE(SEBP_ERROR_VALUE, "beta1", options.beta1 = 2);
    SPARSE(SEBP_ERROR_VALUE, "learning_rate * weight_decay",
           (options.learning_rate = 1e20, options.weight_decay = 1e20));
    SPARSE(SEBP_ERROR_VALUE, "learning_rate / (1 - beta1^t)", /* t = 2: 1 - 0.81 */
           (options.learning_rate = 1e38, options.weight_decay = 0));
    SPARSE(SEBP_ERROR_NONFINITE, "gradient", values[2] = NAN);
    SPARSE(SEBP_ERROR_NONFINITE, "gradient", values[0] = -INFINITY);
    if (_i) {
        SPARSE(SEBP_ERROR_ROWS, "support", indices[1] = 6);
        SPARSE(SEBP_ERROR_ROWS, "support", gradient->count = 2);
    }
    ck_assert_int_eq(sebp_sparse_adamw_step(NULL, state, NULL, &gradient), SEBP_ERROR_NULL);
    expect(sebp_sparse_adamw_step(context, NULL, NULL, &gradient), SEBP_ERROR_NULL, context);
    ck_assert_int_eq(sebp_sparse_adamw_steps(state), 1);

    /* It is the step's own t that counts: this rate is too large for the first steps alone. */
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 1e38;
    options.weight_decay = 0;
    for (int t = 2; t <= 4; t++) { /* 1 - 0.9^t: 0.19, 0.271, 0.344 */
        float next[3] = {1, -2, 3};
        sebp_sparse values_of_3 = {support, next, 3, 3, 5};
        expect(sebp_sparse_adamw_step(context, state, t < 4 ? NULL : &options, &values_of_3),
               SEBP_SUCCESS, context);
    }
    sebp_sparse_adamw_destroy(state);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(states_refuse_bad_input)
{
    const int64_t good[3] = {0, 5, 14}, unsorted[3] = {5, 0, 14}, twice[3] = {0, 0, 14};
    const int64_t outside[3] = {0, 5, 15}, negative[3] = {-1, 5, 14};
    const int64_t *bad[] = {unsorted, twice, outside, negative};
    sebp_sparse_adamw *made = NULL;
    ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, good, 3, NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, NULL, 3, &made), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_create(-3, 5, NULL, 0, &made), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_sparse_adamw_create(3, -5, NULL, 0, &made), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, good, -1, &made), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_sparse_adamw_create(INT64_MAX, 5, NULL, 0, &made), SEBP_ERROR_OVERFLOW);
    ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, good, 16, &made), SEBP_ERROR_ROWS);
    for (int i = 0; i < 4; i++) {
        ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, bad[i], 3, &made), SEBP_ERROR_ROWS);
    }
    ck_assert_ptr_null(made);

    for (int fixed = 0; fixed < 2; fixed++) {
        sebp_sparse support = {(int64_t *)(uintptr_t)good, NULL, 3, 3, 5};
        sebp_sparse_adamw *state = make_state(3, 5, fixed ? &support : NULL);
        float m[3] = {1, -2, 3}, v[3] = {0, 2, INFINITY}, no[3] = {1, NAN, 1},
              minus[3] = {1, 1, -1};
        ck_assert_int_eq(sebp_sparse_adamw_import(state, 7, good, m, v, 3), SEBP_SUCCESS);
        state_copy before = export_state(state);
#define IMPORT(want, ...) ck_assert_int_eq(sebp_sparse_adamw_import(__VA_ARGS__), want)
        IMPORT(SEBP_ERROR_NULL, NULL, 1, good, m, v, 3);
        IMPORT(SEBP_ERROR_NULL, state, 1, NULL, m, v, 3);
        IMPORT(SEBP_ERROR_NULL, state, 1, good, NULL, v, 3);
        IMPORT(SEBP_ERROR_NULL, state, 1, good, m, NULL, 3);
        IMPORT(SEBP_ERROR_SIZE, state, 1, good, m, v, -1);
        IMPORT(SEBP_ERROR_VALUE, state, -1, good, m, v, 3);
        IMPORT(SEBP_ERROR_VALUE, state, INT64_MAX, good, m, v, 3);
        IMPORT(SEBP_ERROR_VALUE, state, INT64_MAX - 1, good, m, v, 3);
        IMPORT(SEBP_ERROR_VALUE, state, (INT64_C(1) << 53) + 1, good, m, v, 3);
        IMPORT(SEBP_ERROR_VALUE, state, 1, good, no, v, 3);
        IMPORT(SEBP_ERROR_VALUE, state, 1, good, m, no, 3);
        IMPORT(SEBP_ERROR_VALUE, state, 1, good, m, minus, 3);
        IMPORT(SEBP_ERROR_ROWS, state, 1, good, m, v, 16);
        for (int i = 0; i < 4; i++) {
            IMPORT(SEBP_ERROR_ROWS, state, 1, bad[i], m, v, 3);
        }
        if (fixed) {
            IMPORT(SEBP_ERROR_ROWS, state, 1, good, m, v, 2);
        }
        float moments[3];
        int64_t indices[3];
        ck_assert_int_eq(sebp_sparse_adamw_export(NULL, indices, moments, moments),
                         SEBP_ERROR_NULL);
        ck_assert_int_eq(sebp_sparse_adamw_export(state, NULL, moments, moments), SEBP_ERROR_NULL);
        ck_assert_int_eq(sebp_sparse_adamw_export(state, indices, NULL, moments), SEBP_ERROR_NULL);
        ck_assert_int_eq(sebp_sparse_adamw_export(state, indices, moments, NULL), SEBP_ERROR_NULL);
        state_copy after = export_state(state);
        ck_assert(same_copy(&before, &after) && after.steps == 7);
        free_copy(&before);
        free_copy(&after);
        sebp_sparse_adamw_destroy(state);
    }

    /* Of a matrix so large that only its size tells of a count that it is none: no array has as many
     * elements, and none is read. */
    const int64_t large = INT64_C(1) << 31;
    sebp_sparse_adamw *state = make_state(large, large, NULL);
    float moments[3] = {0};
    IMPORT(SEBP_ERROR_OVERFLOW, state, 1, good, moments, moments, INT64_C(1) << 61);
    IMPORT(SEBP_ERROR_OVERFLOW, state, 1, good, moments, moments, INT64_C(1) << 60);
    IMPORT(SEBP_ERROR_OVERFLOW, state, 1, good, moments, moments, INT64_C(3) << 58);
    ck_assert_int_eq(
        sebp_sparse_adamw_create(large, large, good, INT64_MAX / (int64_t)sizeof *good + 1, &made),
        SEBP_ERROR_OVERFLOW);
    sebp_sparse view = {(int64_t *)(uintptr_t)good, moments, INT64_C(1) << 61, large, large};
    ck_assert_int_eq(sebp_sparse_check(&view), SEBP_ERROR_OVERFLOW);
    ck_assert_ptr_null(made);

    /* From the last number of steps that is taken training goes on. */
    sebp_context *context = make_context(1, 0);
    view.count = 3;
    IMPORT(SEBP_SUCCESS, state, INT64_C(1) << 53, good, moments, moments, 3);
    for (int i = 0; i < 3; i++) {
        expect(sebp_sparse_adamw_step(context, state, NULL, &view), SEBP_SUCCESS, context);
    }
    ck_assert_int_eq(sebp_sparse_adamw_steps(state), (INT64_C(1) << 53) + 3);
    sebp_sparse_adamw_destroy(state);
    sebp_context_destroy(context);

    sebp_sparse_adamw_destroy(NULL);
    ck_assert_int_eq(sebp_sparse_adamw_count(NULL), 0);
    ck_assert_int_eq(sebp_sparse_adamw_steps(NULL), 0);
    ck_assert_int_eq(sebp_sparse_adamw_bytes(NULL), 0);
    ck_assert_ptr_null(sebp_sparse_adamw_support(NULL));
}
END_TEST

/* Nothing to step on is a step all the same. */
START_TEST(empty_steps_are_legal)
{
    sebp_context *context = make_context(2, 0);
    sebp_matrix none = {NULL, 0, 5, 5, SEBP_F32};
    expect(sebp_adamw_step(context, &none, 1, NULL, &none, &none, &none), SEBP_SUCCESS, context);
    none = (sebp_matrix){NULL, 5, 0, 0, SEBP_F32};
    expect(sebp_adamw_step(context, &none, 1, NULL, &none, &none, &none), SEBP_SUCCESS, context);
    expect(sebp_weight_decay(context, NULL, &none), SEBP_SUCCESS, context);

    const int64_t nothing[1] = {0};
    for (int fixed = 0; fixed < 2; fixed++) {
        sebp_sparse_adamw *state = NULL;
        ck_assert_int_eq(sebp_sparse_adamw_create(3, 5, fixed ? nothing : NULL, 0, &state),
                         SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_support(state) != NULL, fixed);
        sebp_sparse empty = {NULL, NULL, 0, 3, 5};
        expect(sebp_sparse_adamw_step(context, state, NULL, &empty), SEBP_SUCCESS, context);
        ck_assert_int_eq(sebp_sparse_adamw_steps(state), 1);
        ck_assert_int_eq(sebp_sparse_adamw_count(state), 0);
        ck_assert_int_eq(sebp_sparse_adamw_export(state, NULL, NULL, NULL), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_import(state, 9, NULL, NULL, NULL, 0), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sparse_adamw_steps(state), 9);
        sebp_sparse_adamw_destroy(state);
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("optim");
    TCase *dense = tcase_create("dense");
    tcase_add_test(dense, dense_step_is_within_the_error_bound);
    tcase_add_test(dense, first_dense_step_is_exact);
    tcase_add_test(dense, dense_step_and_decay_do_not_depend_on_threads);
    tcase_add_test(dense, decay_scales);
    suite_add_tcase(suite, dense);
    TCase *sparse = tcase_create("sparse");
    tcase_add_loop_test(sparse, sparse_step_is_the_dense_one_on_its_elements, 0, 2);
    tcase_add_test(sparse, sparse_step_on_all_elements_is_dense_training);
    tcase_add_loop_test(sparse, training_goes_on_after_import, 0, 2);
    tcase_add_test(sparse, a_state_takes_the_memory_it_should);
    suite_add_tcase(suite, sparse);
    TCase *bad = tcase_create("bad input");
    tcase_add_test(bad, dense_step_refuses_bad_input);
    tcase_add_test(bad, decay_refuses_bad_input);
    tcase_add_loop_test(bad, sparse_step_refuses_bad_input, 0, 2);
    tcase_add_test(bad, states_refuse_bad_input);
    tcase_add_test(bad, empty_steps_are_legal);
    suite_add_tcase(suite, bad);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
