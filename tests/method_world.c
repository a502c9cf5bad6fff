/* SPDX-License-Identifier: Apache-2.0 */
/** @file method_world.c What the tests of methods work on. */
#include "config.h"

#include <math.h>
#include <string.h>

#include "methods.h"
#include "testing.h"

/* Rows and columns of each matrix, and its dtype: that of the others, or its own. */
enum { OTHERS, ALWAYS_F32, ALWAYS_BF16 };
static const struct {
    int64_t rows, cols;
    int dtype;
} shapes[PLACES] = {
    [DY] = {ROWS, OUT, OTHERS},
    [X] = {ROWS, IN, OTHERS},
    [W] = {OUT, IN, OTHERS},
    [BIAS] = {1, OUT, OTHERS},
    [Y] = {ROWS, OUT, OTHERS},
    [DX] = {ROWS, IN, OTHERS},
    [DW] = {OUT, IN, OTHERS},
    [DB] = {1, OUT, OTHERS},
    [A] = {IN, RANK, OTHERS},
    [B] = {RANK, OUT, OTHERS},
    [H] = {ACTIVE, RANK, OTHERS},
    [DH] = {ACTIVE, RANK, OTHERS},
    [DA] = {IN, RANK, OTHERS},
    [DBB] = {RANK, OUT, OTHERS},
    [R] = {RANK_OUT, RANK_IN, ALWAYS_F32},
    [GRADIENT] = {OUT, IN, OTHERS},
    [MOMENT1] = {OUT, IN, ALWAYS_F32},
    [MOMENT2] = {OUT, IN, ALWAYS_F32},
    [HALF_W] = {OUT, IN, ALWAYS_BF16},
    [RESIDUAL] = {ROWS, IN, OTHERS},
    [NORMED] = {ROWS, IN, OTHERS},
    [LAYER_OUT] = {ROWS, IN, OTHERS},
    [GAIN] = {1, IN, OTHERS},
    [SHIFT] = {1, IN, OTHERS},
    [STATISTICS] = {ROWS, 2, ALWAYS_F32},
    [DGAIN] = {1, IN, OTHERS},
    [DSHIFT] = {1, IN, OTHERS},
    [ANGLES] = {ROWS, TURNED, ALWAYS_F32},
    [KEYS] = {ROWS, HEAD, OTHERS},
    [VALUES] = {ROWS, HEAD, OTHERS},
    [LSE] = {ROWS, HEADS, ALWAYS_F32},
    [DKEYS] = {ROWS, HEAD, OTHERS},
    [DVALUES] = {ROWS, HEAD, OTHERS},
    [SCORE_BIAS] = {TEXT, TEXT, ALWAYS_F32},
    [DSCORE_BIAS] = {TEXT, TEXT, ALWAYS_F32},
    [ACTIVATED] = {ROWS, OUT, OTHERS},
    [LARGE] = {2, 10000, OTHERS},
};

static sebp_sparse random_sparse(int64_t height, int64_t width)
{
    sebp_sparse made = testing_sparse(KEPT, height, width);
    for (int i = 0; i < KEPT; i++) {
        made.indices[i] = i * (height * width / KEPT) + testing_between(0, 1);
        made.values[i] = (float)testing_uniform();
    }
    return made;
}

/* On the host, where the library makes them. */
static void make_angles(const sebp_matrix *table)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, (int64_t)4 << 20);
    testing_succeed(sebp_rotary_table(context, NULL, table), context);
    sebp_context_destroy(context);
}

static void make_lists(int64_t *lists[LISTS])
{
    enum { IGNORED = -100 };
    for (int i = 0; i < LISTS; i++)
        lists[i] = testing_alloc(ROWS * sizeof **lists, 0);
    for (int i = 0; i < ROWS; i++) {
        lists[LABELS][i] = i % 3 == 0 ? IGNORED : testing_between(0, OUT - 1);
        lists[TOKENS][i] = testing_between(0, OUT - 1);
        lists[POSITIONS][i] = testing_between(0, ROWS - 1);
    }
}

void methods_give(sebp_dtype dtype, method_given *given)
{
    int64_t active[ACTIVE];
    for (int i = 0; i < ACTIVE; i++)
        active[i] = 2 * i + (i > 7);
    ck_assert_int_eq(sebp_rows_from_indices(active, ACTIVE, ROWS, &given->rows), SEBP_SUCCESS);
    for (int i = 0; i < PLACES; i++) {
        sebp_dtype own = shapes[i].dtype == ALWAYS_F32    ? SEBP_F32
                         : shapes[i].dtype == ALWAYS_BF16 ? SEBP_BF16
                                                          : dtype;
        given->at[i] = testing_random_matrix(shapes[i].rows, shapes[i].cols, own, TESTING_REAL);
    }
    for (int64_t i = 0, next = 0; i < ROWS; i++) { /* dY has the active rows alone */
        if (next < ACTIVE && active[next] == i) {
            next++;
            continue;
        }
        for (int64_t j = 0; j < OUT; j++)
            testing_set(&given->at[DY], i, j, 0);
    }
    for (int64_t i = 0; i < OUT * IN; i++)
        testing_set(&given->at[MOMENT2], i / IN, i % IN, 0.5);
    given->in_r = random_sparse(RANK_OUT, RANK_IN);
    given->in_w = random_sparse(OUT, IN);
    sebp_matrix u_out = testing_random_matrix(RANK_OUT, OUT, SEBP_F32, TESTING_REAL);
    sebp_matrix u_in = testing_random_matrix(RANK_IN, IN, SEBP_F32, TESTING_REAL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &given->basis), SEBP_SUCCESS);
    const int64_t lengths[ROWS / TEXT] = {TEXT, 5, 0, 7};
    ck_assert_int_eq(sebp_sequences_from_padded(lengths, ROWS / TEXT, TEXT, &given->texts),
                     SEBP_SUCCESS);
    make_angles(&given->at[ANGLES]);
    make_lists(given->lists);
    testing_release(&u_out);
    testing_release(&u_in);
}

void methods_free(method_given *given)
{
    for (int i = 0; i < PLACES; i++)
        testing_release(&given->at[i]);
    for (int i = 0; i < LISTS; i++)
        testing_free(given->lists[i]);
    testing_free_sparse(&given->in_r);
    testing_free_sparse(&given->in_w);
    sebp_rows_destroy(given->rows);
    sebp_basis_destroy(given->basis);
    sebp_sequences_destroy(given->texts);
}

static int64_t bytes_of(const sebp_matrix *matrix)
{
    return ((matrix->rows - 1) * matrix->stride + matrix->cols) *
           (int64_t)sebp_dtype_bytes(matrix->dtype);
}

/* A copy of an array where the world is. */
static void *put(const method_world *world, const void *from, int64_t bytes)
{
    if (world->device != NULL)
        return world->device->put(from, bytes);
    return memcpy(testing_alloc((size_t)bytes, 0), from, (size_t)bytes);
}

static void drop(const method_world *world, void *memory)
{
    if (world->device != NULL)
        world->device->free(memory);
    else
        testing_free(memory);
}

static sebp_sparse put_sparse(const method_world *world, const sebp_sparse *sparse)
{
    sebp_sparse made = *sparse;
    made.indices = put(world, sparse->indices, sparse->count * (int64_t)sizeof *made.indices);
    made.values = put(world, sparse->values, sparse->count * (int64_t)sizeof *made.values);
    return made;
}

static void drop_sparse(const method_world *world, const sebp_sparse *sparse)
{
    drop(world, sparse->indices);
    drop(world, sparse->values);
}

void world_fill(method_world *world, const method_given *given)
{
    world->given = given;
    for (int i = 0; i < PLACES; i++) {
        world->at[i] = given->at[i];
        world->at[i].data = put(world, given->at[i].data, bytes_of(&given->at[i]));
    }
    for (int i = 0; i < LISTS; i++)
        world->lists[i] = put(world, given->lists[i], ROWS * (int64_t)sizeof *world->lists[i]);
    world->in_r = put_sparse(world, &given->in_r);
    world->in_w = put_sparse(world, &given->in_w);
    memset(world->numbers, 0, sizeof world->numbers);
}

void world_empty(method_world *world)
{
    for (int i = 0; i < PLACES; i++)
        drop(world, world->at[i].data);
    for (int i = 0; i < LISTS; i++)
        drop(world, world->lists[i]);
    drop_sparse(world, &world->in_r);
    drop_sparse(world, &world->in_w);
}

static bool is_near(double got, double want, double bound, sebp_dtype dtype)
{
    const double step = dtype == SEBP_BF16 ? fabs(want) / 128 : 0;
    return got == want || fabs(got - want) <= bound * (1 + fabs(want)) + step ||
           (isnan(got) && isnan(want));
}

static bool matrix_is_near(const sebp_matrix *got, const sebp_matrix *want, double bound)
{
    bool all = bound > 0 || testing_same_bits(got, want);
    for (int64_t i = 0; i < got->rows && all; i++) {
        for (int64_t j = 0; j < got->cols; j++)
            all &= is_near(testing_get(got, i, j), testing_get(want, i, j), bound, got->dtype);
    }
    return all;
}

static float min_magnitude(const sebp_sparse *of)
{
    float min = INFINITY;
    for (int64_t i = 0; i < of->count; i++)
        min = fminf(min, fabsf(of->values[i]));
    return min;
}

/* Whether each element of one is among the other's, or no larger than its smallest. */
static bool is_near_part(const sebp_sparse *one, const sebp_sparse *other, double bound)
{
    bool all = true;
    const double min = min_magnitude(other);
    for (int64_t i = 0, j = 0; i < one->count; i++) {
        while (j < other->count && other->indices[j] < one->indices[i])
            j++;
        if (j < other->count && other->indices[j] == one->indices[i])
            all &= is_near(one->values[i], other->values[j], bound, SEBP_F32);
        else
            all &= is_near(fabs((double)one->values[i]), min, bound, SEBP_F32);
    }
    return all;
}

static bool sparse_is_near(const method_device *device, const sebp_sparse *on,
                           const sebp_sparse *want, double bound)
{
    sebp_sparse got = testing_sparse(on->count, on->rows, on->cols);
    const size_t index_bytes = (size_t)on->count * sizeof *got.indices;
    const size_t value_bytes = (size_t)on->count * sizeof *got.values;
    device->get(got.indices, on->indices, (int64_t)index_bytes);
    device->get(got.values, on->values, (int64_t)value_bytes);
    const bool all = bound == 0
                         ? memcmp(got.indices, want->indices, index_bytes) == 0 &&
                               memcmp(got.values, want->values, value_bytes) == 0
                         : is_near_part(&got, want, bound) && is_near_part(want, &got, bound);
    testing_free_sparse(&got);
    return all;
}

void world_check(const method_world *on, const sebp_matrix *want, const sebp_sparse *in_r,
                 const sebp_sparse *in_w, double bound, const char *what)
{
    for (int i = 0; i < PLACES; i++) {
        sebp_matrix got = testing_copy(&want[i]);
        testing_poison(&got);
        on->device->get(got.data, on->at[i].data, bytes_of(&got));
        ck_assert_msg(matrix_is_near(&got, &want[i], bound), "%s: matrix %d differs", what, i);
        testing_release(&got);
    }
    ck_assert_msg(sparse_is_near(on->device, &on->in_r, in_r, bound), "%s: kept elements of R",
                  what);
    ck_assert_msg(sparse_is_near(on->device, &on->in_w, in_w, bound), "%s: kept elements of W",
                  what);
}

void world_check_numbers(const method_world *on, const method_world *want, const char *what)
{
    for (size_t i = 0; i < sizeof on->numbers / sizeof *on->numbers; i++) {
        ck_assert_msg(is_near(on->numbers[i], want->numbers[i], on->device->bound, SEBP_F32),
                      "%s: number %zu is %g, not %g", what, i, on->numbers[i], want->numbers[i]);
    }
}
