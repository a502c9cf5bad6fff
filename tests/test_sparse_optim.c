/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AdamW's sparse step bit for bit against the dense one on the elements that it has; states exported,
 * imported and continued; and their bad input.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "optim.h"
#include "testing.h"

/* A random choice of elements, each with the given chance, and random values. */
static sebp_sparse random_sparse(int64_t rows, int64_t cols, double chance)
{
    sebp_sparse made = testing_sparse(rows * cols, rows, cols);
    made.count = 0;
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

/* What a state must hold and give: plain arrays over all elements, stepped by the dense step on
 * weights of zero. */
typedef struct state_twin {
    int64_t steps, elements;
    float *moment1, *moment2;
    unsigned char *visited;
} state_twin;

static state_twin make_twin(int64_t elements)
{
    return (state_twin){0, elements, testing_zeros(elements, sizeof(float)),
                        testing_zeros(elements, sizeof(float)), testing_zeros(elements, 1)};
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
    float *g = testing_zeros(n, sizeof *g), *w = testing_zeros(n, sizeof *w);
    float *m = testing_zeros(n, sizeof *m), *v = testing_zeros(n, sizeof *v);
    for (int64_t i = 0; i < n; i++) {
        g[i] = gradient->values[i];
        m[i] = twin->moment1[gradient->indices[i]];
        v[i] = twin->moment2[gradient->indices[i]];
    }
    sebp_matrix views[4] = {sebp_matrix_f32(g, 1, n), sebp_matrix_f32(w, 1, n),
                            sebp_matrix_f32(m, 1, n), sebp_matrix_f32(v, 1, n)};
    twin->steps++;
    testing_succeed(
        sebp_adamw_step(context, &views[0], twin->steps, options, &views[1], &views[2], &views[3]),
        context);
    testing_succeed(sebp_sparse_adamw_step(context, state, options, gradient), context);
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
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), 0);
        int64_t rows = optim_size(), cols = optim_size();
        sebp_adamw_options options = optim_options();
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
                testing_free_sparse(&gradient);
            }
        }
        check_state(state, &twin);
        sebp_sparse_adamw_destroy(state);
        free_twin(&twin);
        testing_free_sparse(&support);
        sebp_context_destroy(context);
    }
}
END_TEST

/* On all elements at once, weights and moments are those of a dense training, bit for bit. */
START_TEST(sparse_step_on_all_elements_is_dense_training)
{
    const int64_t ROWS = 37, COLS = 53, ALL = 37 * 53;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.weight_decay = 0;
    sebp_matrix w[2], gradient = testing_matrix(ROWS, COLS, COLS, SEBP_F32);
    sebp_matrix m = testing_matrix(ROWS, COLS, COLS, SEBP_F32), v = testing_copy(&m);
    sebp_sparse sparse = random_sparse(ROWS, COLS, 2);
    ck_assert_int_eq(sparse.count, ALL);
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        sebp_sparse_adamw *state = make_state(ROWS, COLS, NULL);
        memset(m.data, 0, (size_t)ALL * sizeof(float));
        memset(v.data, 0, (size_t)ALL * sizeof(float));
        w[0] = testing_random_matrix(ROWS, COLS, (sebp_dtype)dtype, TESTING_REAL);
        w[1] = testing_copy(&w[0]);
        sebp_matrix was = testing_copy(&w[0]);
        for (int64_t t = 1; t <= 5; t++) {
            testing_fill(&gradient, TESTING_REAL);
            memcpy(sparse.values, gradient.data, (size_t)ALL * sizeof(float));
            testing_succeed(sebp_adamw_step(context, &gradient, t, &options, &w[0], &m, &v),
                            context);
            testing_succeed(sebp_sparse_adamw_step(context, state, &options, &sparse), context);
            testing_succeed(sebp_sparse_add(context, &sparse, &w[1]), context);
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
    testing_free_sparse(&sparse);
    sebp_context_destroy(context);
}
END_TEST

/* A state that is copied out and into a fresh one goes on bit for bit. _i: whether the support is
 * fixed. */
START_TEST(training_goes_on_after_import)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
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
                testing_free_sparse(&gradient[0]);
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
                testing_succeed(sebp_sparse_adamw_step(context, states[i], NULL, &gradient[i]),
                                context);
            }
            if (step >= 5) {
                ck_assert_mem_eq(gradient[0].values, gradient[1].values,
                                 (size_t)gradient[0].count * sizeof(float));
            }
            testing_free(gradient[1].values);
            testing_free_sparse(&gradient[0]);
        }
        state_copy last[2] = {export_state(states[0]), export_state(states[1])};
        ck_assert(same_copy(&last[0], &last[1]));
        for (int i = 0; i < 2; i++) {
            free_copy(&last[i]);
            sebp_sparse_adamw_destroy(states[i]);
        }
        testing_free_sparse(&support);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(a_state_takes_the_memory_it_should)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    const int64_t SIZE = 30 + testing_rounds(270);
    sebp_sparse all = random_sparse(SIZE, SIZE, 2);
    sebp_sparse_adamw *fixed = make_state(SIZE, SIZE, &all), *grows = make_state(SIZE, SIZE, NULL);
    int64_t head = sebp_sparse_adamw_bytes(grows); /* no element yet */
    ck_assert_int_eq(sebp_sparse_adamw_bytes(fixed), head + 16 * all.count);
    sebp_sparse one = all;
    one.count = 1;
    for (int64_t i = 0; i < all.count; i++, one.indices++) {
        one.values[0] = 1;
        testing_succeed(sebp_sparse_adamw_step(context, grows, NULL, &one), context);
        int64_t count = sebp_sparse_adamw_count(grows);
        int64_t bytes = sebp_sparse_adamw_bytes(grows) - head;
        ck_assert(count == i + 1 && (double)bytes >= 16 / 0.75 * (double)count);
        ck_assert(bytes <= 64 * 16 + 8 || (double)bytes <= 2 * 16.125 / 0.75 * (double)count);
    }
    ck_assert_int_eq(sebp_sparse_adamw_steps(grows), all.count);
    sebp_sparse_adamw_destroy(fixed);
    sebp_sparse_adamw_destroy(grows);
    testing_free_sparse(&all);
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
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    int64_t support[3] = {2, 7, 11};
    float values[3] = {1, 2, 3};
    sebp_sparse gradient = {support, values, 3, 3, 5};
    sebp_sparse_adamw *state = make_state(3, 5, _i ? &gradient : NULL);
    testing_succeed(sebp_sparse_adamw_step(context, state, NULL, &gradient), context);
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
    testing_expect(sebp_sparse_adamw_step(context, NULL, NULL, &gradient), SEBP_ERROR_NULL,
                   context);
    ck_assert_int_eq(sebp_sparse_adamw_steps(state), 1);

    /* It is the step's own t that counts: this rate is too large for the first steps alone. */
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 1e38;
    options.weight_decay = 0;
    for (int t = 2; t <= 4; t++) { /* 1 - 0.9^t: 0.19, 0.271, 0.344 */
        float next[3] = {1, -2, 3};
        sebp_sparse values_of_3 = {support, next, 3, 3, 5};
        testing_succeed(
            sebp_sparse_adamw_step(context, state, t < 4 ? NULL : &options, &values_of_3), context);
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
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    view.count = 3;
    IMPORT(SEBP_SUCCESS, state, INT64_C(1) << 53, good, moments, moments, 3);
    for (int i = 0; i < 3; i++) {
        testing_succeed(sebp_sparse_adamw_step(context, state, NULL, &view), context);
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

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparse optim");
    TCase *sparse = tcase_create("sparse");
    tcase_add_loop_test(sparse, sparse_step_is_the_dense_one_on_its_elements, 0, 2);
    tcase_add_test(sparse, sparse_step_on_all_elements_is_dense_training);
    tcase_add_loop_test(sparse, training_goes_on_after_import, 0, 2);
    tcase_add_test(sparse, a_state_takes_the_memory_it_should);
    suite_add_tcase(suite, sparse);
    TCase *bad = tcase_create("bad input");
    tcase_add_loop_test(bad, sparse_step_refuses_bad_input, 0, 2);
    tcase_add_test(bad, states_refuse_bad_input);
    suite_add_tcase(suite, bad);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
