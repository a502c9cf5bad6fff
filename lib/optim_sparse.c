/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file optim_sparse.c
 * AdamW on the few elements that train. The arithmetic is the dense step's, on moments gathered
 * from wherever the state keeps them.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "integers.h"
#include "moment_table.h"
#include "optim.h"

enum {
    BLOCK = 512, /* elements whose moments are gathered at a time */
    AHEAD = 16,  /* elements whose place is prefetched before it is looked at */
};

/* The largest number of steps that a state may be imported with. A double, which they are counted
 * in, still tells such numbers apart, and they cannot overflow however many steps follow. */
static const int64_t MAX_STEPS = INT64_C(1) << 53;

struct sebp_sparse_adamw {
    int64_t rows, cols;
    int64_t steps;
    int64_t count;
    /* a fixed support: `count` of each */
    int64_t *support; /* NULL: chosen anew */
    float *moment1, *moment2;
    /* chosen anew: a hash table with open addressing and linear probing */
    sebp_place *places; /* NULL: none yet */
    int64_t room;       /* places there are: a power of two of at least 64, or 0 */
    uint64_t *used; /* a bit for each place: whether a gradient had it since the last dropping */
};

/* ---- the table ---- */

/* Prefetches the places of the elements that come soon: the table is larger than the caches. */
static void fetch_ahead(const sebp_sparse_adamw *state, const int64_t *indices, int64_t count,
                        int64_t at)
{
    if (at + AHEAD < count)
        __builtin_prefetch(&state->places[sebp_first_place(indices[at + AHEAD], state->room)], 1);
}

static int64_t count_new(const sebp_sparse_adamw *state, const int64_t *indices, int64_t count)
{
    int64_t found = 0;
    for (int64_t i = 0; i < count && state->room > 0; i++) {
        fetch_ahead(state, indices, count, i);
        found += sebp_find_place(state->places, state->room, indices[i])->index >= 0;
    }
    return count - found;
}

static void take_table(sebp_sparse_adamw *state, const sebp_moment_table *made)
{
    free(state->places);
    free(state->used);
    state->places = made->places;
    state->used = made->used;
    state->room = made->room;
}

/* Makes the table large enough for the elements of a gradient too, or leaves it as it is. */
static sebp_status make_room(sebp_sparse_adamw *state, const int64_t *indices, int64_t count)
{
    if (sebp_table_room(state->count + count) <= state->room)
        return SEBP_SUCCESS;
    int64_t room = sebp_table_room(state->count + count_new(state, indices, count));
    if (room != 0 && room <= state->room)
        return SEBP_SUCCESS;
    sebp_moment_table larger;
    sebp_status status = sebp_make_table(room, &larger);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t i = 0; i < state->room; i++) {
        if (state->places[i].index >= 0)
            sebp_put_place(&larger, state->places[i], sebp_is_used(state->used, i));
    }
    take_table(state, &larger);
    return SEBP_SUCCESS;
}

/* ---- making and unmaking ---- */

static sebp_status check_indices(const int64_t *indices, int64_t count, int64_t elements)
{
    for (int64_t i = 0; i < count; i++) {
        if (indices[i] < (i > 0 ? indices[i - 1] + 1 : 0) || indices[i] >= elements)
            return SEBP_ERROR_ROWS;
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_sparse_adamw_create(int64_t rows, int64_t cols, const int64_t *support,
                                     int64_t count, sebp_sparse_adamw **made)
{
    int64_t elements;
    if (made == NULL || (support == NULL && count > 0))
        return SEBP_ERROR_NULL;
    if (rows < 0 || cols < 0 || count < 0)
        return SEBP_ERROR_SIZE;
    if (__builtin_mul_overflow(rows, cols, &elements))
        return SEBP_ERROR_OVERFLOW;
    if (count > elements) /* refused before `count` indices are read */
        return SEBP_ERROR_ROWS;
    if (count > SEBP_MAX_IN_ARRAY)
        return SEBP_ERROR_OVERFLOW;
    sebp_status status = check_indices(support, count, elements);
    if (status != SEBP_SUCCESS)
        return status;

    sebp_sparse_adamw *state = calloc(1, sizeof *state);
    if (state == NULL)
        return SEBP_ERROR_MEMORY;
    state->rows = rows;
    state->cols = cols;
    if (support != NULL) {
        size_t room = count > 0 ? (size_t)count : 1;
        state->support = malloc(room * sizeof *state->support);
        state->moment1 = calloc(room, sizeof *state->moment1);
        state->moment2 = calloc(room, sizeof *state->moment2);
        if (state->support == NULL || state->moment1 == NULL || state->moment2 == NULL) {
            sebp_sparse_adamw_destroy(state);
            return SEBP_ERROR_MEMORY;
        }
        memcpy(state->support, support, (size_t)count * sizeof *support);
        state->count = count;
    }
    *made = state;
    return SEBP_SUCCESS;
}

void sebp_sparse_adamw_destroy(sebp_sparse_adamw *state)
{
    if (state != NULL) {
        free(state->support);
        free(state->moment1);
        free(state->moment2);
        free(state->places);
        free(state->used);
        free(state);
    }
}

/* ---- the step ---- */

static bool is_support(const sebp_sparse_adamw *state, const int64_t *indices, int64_t count)
{
    return count == state->count &&
           (indices == state->support || count == 0 ||
            memcmp(indices, state->support, (size_t)count * sizeof *indices) == 0);
}

static void step_values(sebp_call *call, const sebp_adamw_options *options, int64_t step,
                        float *values, float *moment1, float *moment2, int64_t n)
{
    sebp_matrix s = sebp_matrix_f32(values, 1, n);
    sebp_matrix m = sebp_matrix_f32(moment1, 1, n), v = sebp_matrix_f32(moment2, 1, n);
    sebp_status status = call->backend->adamw(call->device, options, step, &s, &s, &m, &v, true);
    sebp_call_keep(call, status, "stepping");
}

/* The table has room for all of them. */
static void step_places(sebp_call *call, const sebp_adamw_options *options,
                        sebp_sparse_adamw *state, const sebp_sparse *gradient)
{
    float moment1[BLOCK], moment2[BLOCK];
    sebp_place *block[BLOCK];
    for (int64_t first = 0; first < gradient->count; first += BLOCK) {
        int64_t n = gradient->count - first < BLOCK ? gradient->count - first : BLOCK;
        for (int64_t i = 0; i < n; i++) {
            int64_t index = gradient->indices[first + i];
            fetch_ahead(state, gradient->indices, gradient->count, first + i);
            block[i] = sebp_find_place(state->places, state->room, index);
            if (block[i]->index < 0) {
                *block[i] = (sebp_place){index, 0, 0};
                state->count++;
            }
            sebp_set_used(state->used, block[i] - state->places, true);
            moment1[i] = block[i]->moment1;
            moment2[i] = block[i]->moment2;
        }
        step_values(call, options, state->steps, gradient->values + first, moment1, moment2, n);
        for (int64_t i = 0; i < n; i++) {
            block[i]->moment1 = moment1[i];
            block[i]->moment2 = moment2[i];
        }
    }
}

static void check_gradient(sebp_call *call, const sebp_sparse_adamw *state,
                           const sebp_sparse *gradient)
{
    sebp_check_sparse(call, "gradient", gradient);
    if (sebp_call_goes_on(call) && state->support != NULL &&
        !is_support(state, gradient->indices, gradient->count)) {
        sebp_call_fail(call, SEBP_ERROR_ROWS, "gradient is not on the state's fixed support");
    }
    sebp_check_sparse_shape(call, "gradient", gradient, state->rows, state->cols);
    sebp_check_sparse_finite(call, "gradient", gradient);
}

sebp_status sebp_sparse_adamw_step(sebp_context *context, sebp_sparse_adamw *state,
                                   const sebp_adamw_options *given, const sebp_sparse *gradient)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_adamw_step");
    sebp_adamw_options options;
    if (!sebp_require(&call, "state", state) || !sebp_require(&call, "gradient", gradient))
        return call.status;
    sebp_check_host_memory(&call); /* the moments of the state are in host memory */
    sebp_take_adamw_options(&call, given, &options);
    sebp_check_adamw_options(&call, &options, state->steps + 1);
    check_gradient(&call, state, gradient);
    if (sebp_call_goes_on(&call) && state->support == NULL) {
        sebp_status status = make_room(state, gradient->indices, gradient->count);
        if (status != SEBP_SUCCESS) {
            sebp_call_fail(&call, status,
                           "no memory for the moments of %" PRId64 " elements and more",
                           state->count);
        }
    }
    if (!sebp_call_goes_on(&call))
        return call.status;
    state->steps++;
    if (state->support != NULL) {
        step_values(&call, &options, state->steps, gradient->values, state->moment1, state->moment2,
                    state->count);
    } else {
        step_places(&call, &options, state, gradient);
    }
    return sebp_call_end(&call);
}

/* ---- dropping ---- */

sebp_status sebp_sparse_adamw_drop_unused(sebp_sparse_adamw *state)
{
    if (state == NULL)
        return SEBP_ERROR_NULL;
    if (state->room == 0)
        return SEBP_SUCCESS;
    int64_t kept = 0;
    for (int64_t i = 0; i < state->room; i++)
        kept += sebp_is_used(state->used, i);
    sebp_moment_table made;
    sebp_status status = sebp_make_table(sebp_table_room(kept), &made);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t i = 0; i < state->room; i++) {
        if (sebp_is_used(state->used, i))
            sebp_put_place(&made, state->places[i], false);
    }
    take_table(state, &made);
    state->count = kept;
    return SEBP_SUCCESS;
}

/* ---- what it holds ---- */

int64_t sebp_sparse_adamw_count(const sebp_sparse_adamw *state)
{
    return state != NULL ? state->count : 0;
}

int64_t sebp_sparse_adamw_steps(const sebp_sparse_adamw *state)
{
    return state != NULL ? state->steps : 0;
}

const int64_t *sebp_sparse_adamw_support(const sebp_sparse_adamw *state)
{
    return state != NULL ? state->support : NULL;
}

int64_t sebp_sparse_adamw_bytes(const sebp_sparse_adamw *state)
{
    const int64_t each = sizeof(int64_t) + 2 * sizeof(float);
    if (state == NULL)
        return 0;
    return (int64_t)sizeof *state +
           (state->support != NULL ? state->count * each
                                   : state->room * (int64_t)sizeof(sebp_place) + state->room / 8);
}

static int by_index(const void *left, const void *right)
{
    int64_t a = ((const sebp_place *)left)->index, b = ((const sebp_place *)right)->index;
    return (a > b) - (a < b);
}

/* A copy of the table's elements by ascending index; NULL: no memory. There is at least one. */
static sebp_place *sorted_places(const sebp_sparse_adamw *state)
{
    sebp_place *sorted = malloc((size_t)state->count * sizeof *sorted);
    if (sorted == NULL)
        return NULL;
    int64_t taken = 0;
    for (int64_t i = 0; i < state->room; i++) {
        if (state->places[i].index >= 0)
            sorted[taken++] = state->places[i];
    }
    qsort(sorted, (size_t)state->count, sizeof *sorted, by_index);
    return sorted;
}

sebp_status sebp_sparse_adamw_export(const sebp_sparse_adamw *state, int64_t *indices,
                                     float *moment1, float *moment2)
{
    if (state == NULL ||
        (state->count > 0 && (indices == NULL || moment1 == NULL || moment2 == NULL))) {
        return SEBP_ERROR_NULL;
    }
    size_t count = (size_t)state->count;
    if (count == 0)
        return SEBP_SUCCESS;
    if (state->support != NULL) {
        memcpy(indices, state->support, count * sizeof *indices);
        memcpy(moment1, state->moment1, count * sizeof *moment1);
        memcpy(moment2, state->moment2, count * sizeof *moment2);
        return SEBP_SUCCESS;
    }
    sebp_place *sorted = sorted_places(state);
    if (sorted == NULL)
        return SEBP_ERROR_MEMORY;
    for (size_t i = 0; i < count; i++) {
        indices[i] = sorted[i].index;
        moment1[i] = sorted[i].moment1;
        moment2[i] = sorted[i].moment2;
    }
    free(sorted);
    return SEBP_SUCCESS;
}

sebp_status sebp_sparse_adamw_export_used(const sebp_sparse_adamw *state, uint8_t *used)
{
    if (state == NULL || (state->count > 0 && used == NULL))
        return SEBP_ERROR_NULL;
    if (state->count == 0)
        return SEBP_SUCCESS;
    if (state->support != NULL) {
        memset(used, 1, (size_t)state->count);
        return SEBP_SUCCESS;
    }
    sebp_place *sorted = sorted_places(state);
    if (sorted == NULL)
        return SEBP_ERROR_MEMORY;
    for (int64_t i = 0; i < state->count; i++) {
        const sebp_place *at = sebp_find_place(state->places, state->room, sorted[i].index);
        used[i] = sebp_is_used(state->used, at - state->places);
    }
    free(sorted);
    return SEBP_SUCCESS;
}

sebp_status sebp_sparse_adamw_import_used(sebp_sparse_adamw *state, const uint8_t *used,
                                          int64_t count)
{
    if (state == NULL || (count > 0 && used == NULL))
        return SEBP_ERROR_NULL;
    if (count != state->count)
        return SEBP_ERROR_SIZE;
    for (int64_t i = 0; i < count; i++) {
        if (used[i] > 1)
            return SEBP_ERROR_VALUE;
    }
    if (state->support != NULL || count == 0)
        return SEBP_SUCCESS;
    sebp_place *sorted = sorted_places(state);
    if (sorted == NULL)
        return SEBP_ERROR_MEMORY;
    memset(state->used, 0, (size_t)state->room / 8);
    for (int64_t i = 0; i < count; i++) {
        const sebp_place *at = sebp_find_place(state->places, state->room, sorted[i].index);
        sebp_set_used(state->used, at - state->places, used[i] != 0);
    }
    free(sorted);
    return SEBP_SUCCESS;
}

static sebp_status check_import(const sebp_sparse_adamw *state, int64_t steps,
                                const int64_t *indices, const float *moment1, const float *moment2,
                                int64_t count)
{
    if (state == NULL || (count > 0 && (indices == NULL || moment1 == NULL || moment2 == NULL)))
        return SEBP_ERROR_NULL;
    if (count < 0)
        return SEBP_ERROR_SIZE;
    if (steps < 0 || steps > MAX_STEPS)
        return SEBP_ERROR_VALUE;
    int64_t elements = state->rows * state->cols;
    if (count > elements || (state->support != NULL && !is_support(state, indices, count)))
        return SEBP_ERROR_ROWS;
    if (sebp_table_room(count) == 0) /* no array has as many elements */
        return SEBP_ERROR_OVERFLOW;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(moment1[i]) || !(moment2[i] >= 0))
            return SEBP_ERROR_VALUE;
    }
    return check_indices(indices, count, elements);
}

sebp_status sebp_sparse_adamw_import(sebp_sparse_adamw *state, int64_t steps,
                                     const int64_t *indices, const float *moment1,
                                     const float *moment2, int64_t count)
{
    sebp_status status = check_import(state, steps, indices, moment1, moment2, count);
    if (status != SEBP_SUCCESS)
        return status;
    if (state->support != NULL) {
        if (count > 0) {
            memcpy(state->moment1, moment1, (size_t)count * sizeof *moment1);
            memcpy(state->moment2, moment2, (size_t)count * sizeof *moment2);
        }
    } else {
        sebp_moment_table made;
        status = sebp_make_table(sebp_table_room(count), &made);
        if (status != SEBP_SUCCESS)
            return status;
        for (int64_t i = 0; i < count; i++)
            sebp_put_place(&made, (sebp_place){indices[i], moment1[i], moment2[i]}, true);
        take_table(state, &made);
        state->count = count;
    }
    state->steps = steps;
    return SEBP_SUCCESS;
}
