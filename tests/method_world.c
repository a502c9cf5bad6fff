/* SPDX-License-Identifier: Apache-2.0 */
/** @file method_world.c What the tests of methods work on. */
#include "config.h"

#include <string.h>

#include "methods.h"
#include "testing.h"

/* Rows and columns of each matrix, and whether it is f32 whatever the others are. */
static const struct {
    int64_t rows, cols;
    int is_f32;
} shapes[PLACES] = {
    [DY] = {ROWS, OUT, 0},
    [X] = {ROWS, IN, 0},
    [W] = {OUT, IN, 0},
    [BIAS] = {1, OUT, 0},
    [Y] = {ROWS, OUT, 0},
    [DX] = {ROWS, IN, 0},
    [DW] = {OUT, IN, 0},
    [DB] = {1, OUT, 0},
    [A] = {IN, RANK, 0},
    [B] = {RANK, OUT, 0},
    [H] = {ACTIVE, RANK, 0},
    [DH] = {ACTIVE, RANK, 0},
    [DA] = {IN, RANK, 0},
    [DBB] = {RANK, OUT, 0},
    [R] = {RANK_OUT, RANK_IN, 1},
    [GRADIENT] = {OUT, IN, 0},
    [MOMENT1] = {OUT, IN, 1},
    [MOMENT2] = {OUT, IN, 1},
    [RESIDUAL] = {ROWS, IN, 0},
    [NORMED] = {ROWS, IN, 0},
    [LAYER_OUT] = {ROWS, IN, 0},
    [GAIN] = {1, IN, 0},
    [SHIFT] = {1, IN, 0},
    [STATISTICS] = {ROWS, 2, 1},
    [DGAIN] = {1, IN, 0},
    [DSHIFT] = {1, IN, 0},
    [ANGLES] = {ROWS, TURNED, 1},
    [KEYS] = {ROWS, HEAD, 0},
    [VALUES] = {ROWS, HEAD, 0},
    [LSE] = {ROWS, HEADS, 1},
    [DKEYS] = {ROWS, HEAD, 0},
    [DVALUES] = {ROWS, HEAD, 0},
    [SCORE_BIAS] = {TEXT, TEXT, 1},
    [DSCORE_BIAS] = {TEXT, TEXT, 1},
    [ACTIVATED] = {ROWS, OUT, 0},
    [LARGE] = {2, 10000, 0},
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
        given->at[i] = testing_random_matrix(shapes[i].rows, shapes[i].cols,
                                             shapes[i].is_f32 ? SEBP_F32 : dtype, TESTING_REAL);
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

static sebp_sparse copy_sparse(const sebp_sparse *sparse)
{
    sebp_sparse copy = testing_sparse(sparse->count, sparse->rows, sparse->cols);
    memcpy(copy.indices, sparse->indices, (size_t)sparse->count * sizeof *copy.indices);
    memcpy(copy.values, sparse->values, (size_t)sparse->count * sizeof *copy.values);
    return copy;
}

void world_fill(method_world *world, const method_given *given)
{
    world->given = given;
    for (int i = 0; i < PLACES; i++) {
        world->at[i] = world->device != NULL ? counting_put(world->device, &given->at[i])
                                             : testing_copy(&given->at[i]);
    }
    for (int i = 0; i < LISTS; i++) {
        const size_t bytes = ROWS * sizeof *world->lists[i];
        if (world->device != NULL) {
            world->lists[i] = counting_put_bytes(world->device, given->lists[i], (int64_t)bytes);
        } else {
            world->lists[i] = testing_alloc(bytes, 0);
            memcpy(world->lists[i], given->lists[i], bytes);
        }
    }
    if (world->device != NULL) {
        world->in_r = counting_put_sparse(world->device, &given->in_r);
        world->in_w = counting_put_sparse(world->device, &given->in_w);
    } else {
        world->in_r = copy_sparse(&given->in_r);
        world->in_w = copy_sparse(&given->in_w);
    }
    memset(world->numbers, 0, sizeof world->numbers);
}

void world_empty(method_world *world)
{
    for (int i = 0; i < PLACES; i++) {
        if (world->device != NULL)
            counting_free(world->device, world->at[i].data);
        else
            testing_release(&world->at[i]);
    }
    for (int i = 0; i < LISTS; i++) {
        if (world->device != NULL)
            counting_free(world->device, world->lists[i]);
        else
            testing_free(world->lists[i]);
    }
    if (world->device != NULL) {
        counting_free_sparse(world->device, &world->in_r);
        counting_free_sparse(world->device, &world->in_w);
    } else {
        testing_free_sparse(&world->in_r);
        testing_free_sparse(&world->in_w);
    }
}

static int same_sparse(counting *device, const sebp_sparse *on, const sebp_sparse *want)
{
    sebp_sparse got = testing_sparse(on->count, on->rows, on->cols);
    counting_get_sparse(device, on, &got);
    size_t count = (size_t)on->count;
    int same = memcmp(got.indices, want->indices, count * sizeof *got.indices) == 0 &&
               memcmp(got.values, want->values, count * sizeof *got.values) == 0;
    testing_free_sparse(&got);
    return same;
}

void world_check(const method_world *on, const sebp_matrix *want, const sebp_sparse *in_r,
                 const sebp_sparse *in_w, const char *what)
{
    for (int i = 0; i < PLACES; i++) {
        sebp_matrix got = testing_copy(&want[i]);
        testing_poison(&got);
        counting_get(on->device, &on->at[i], &got);
        ck_assert_msg(testing_same_bits(&got, &want[i]), "%s: matrix %d has other bits", what, i);
        testing_release(&got);
    }
    ck_assert_msg(same_sparse(on->device, &on->in_r, in_r), "%s: kept elements of R", what);
    ck_assert_msg(same_sparse(on->device, &on->in_w, in_w), "%s: kept elements of W", what);
}
