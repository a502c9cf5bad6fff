/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file counting_layers.c
 * Attention and the row-wise layers on the tests' device. Sequences are the host's and stay so; all
 * else is translated.
 */
#include "config.h"

#include "counting_inside.h"

/* The matrices of one operation, translated. */
typedef struct matrix_room {
    const counting *device;
    sebp_matrix at[SEBP_MAX_TABLES + 12];
    int used;
} matrix_room;

/* Replaces a matrix by what lies behind it; one that is absent stays absent. */
static void translate(matrix_room *room, const sebp_matrix **matrix)
{
    if (*matrix != NULL) {
        room->at[room->used] = counting_behind_matrix(room->device, *matrix);
        *matrix = &room->at[room->used++];
    }
}

static void translate_all(matrix_room *room, const sebp_matrix **const *matrices, size_t count)
{
    for (size_t i = 0; i < count; i++)
        translate(room, matrices[i]);
}

static void translate_list(const counting *device, sebp_row_list *list)
{
    list->rows = counting_behind_list(device, list->rows, list->count);
}

/* Of an array with an element for each row, so far as a list that is translated goes. */
static const int64_t *behind_rows_of(const counting *device, const int64_t *array,
                                     const sebp_row_list *list)
{
    int64_t count = list->count;
    if (list->rows != NULL && count > 0)
        count = list->rows[count - 1] + 1;
    return counting_behind_list(device, array, count);
}

/* Translates the matrices whose addresses are given, into `room`. */
#define TRANSLATE(...)                                                                             \
    do {                                                                                           \
        const sebp_matrix **const matrices[] = {__VA_ARGS__};                                      \
        translate_all(&room, matrices, sizeof matrices / sizeof *matrices);                        \
    } while (0)

/* ---- attention ---- */

static sebp_attention translate_attention(matrix_room *to, const sebp_attention *attention)
{
    sebp_attention found = *attention;
    const sebp_matrix **const matrices[] = {&found.q,    &found.k,   &found.v,    &found.out,
                                            &found.bias, &found.lse, &found.dout, &found.dq,
                                            &found.dk,   &found.dv,  &found.dbias};
    translate_all(to, matrices, sizeof matrices / sizeof *matrices);
    return found;
}

sebp_status counting_attention_forward(void *device, const sebp_attention *attention)
{
    matrix_room room = {.device = device};
    ENTER(device, SEBP_ERROR_MEMORY);
    const sebp_attention found = translate_attention(&room, attention);
    return sebp_cpu_attention_forward(room.device->cpu, &found);
}

sebp_status counting_attention_backward(void *device, const sebp_attention *attention)
{
    matrix_room room = {.device = device};
    ENTER(device, SEBP_ERROR_MEMORY);
    const sebp_attention found = translate_attention(&room, attention);
    return sebp_cpu_attention_backward(room.device->cpu, &found);
}

/* ---- row-wise layers ---- */

sebp_status counting_norm_forward(void *device, const sebp_norm_work *work)
{
    matrix_room room = {.device = device};
    sebp_norm_work found = *work;
    ENTER(device, SEBP_ERROR_MEMORY);
    translate_list(device, &found.list);
    TRANSLATE(&found.x, &found.residual, &found.gain, &found.shift, &found.h, &found.y,
              &found.statistics);
    return sebp_cpu_norm_forward(room.device->cpu, &found);
}

sebp_status counting_norm_backward(void *device, const sebp_norm_back_work *work)
{
    matrix_room room = {.device = device};
    sebp_norm_back_work found = *work;
    ENTER(device, SEBP_ERROR_MEMORY);
    translate_list(device, &found.list);
    TRANSLATE(&found.dy, &found.h, &found.statistics, &found.gain, &found.dh, &found.dx,
              &found.dgain, &found.dshift);
    return sebp_cpu_norm_backward(room.device->cpu, &found);
}

sebp_status counting_activation(void *device, const sebp_activation_work *work)
{
    matrix_room room = {.device = device};
    sebp_activation_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    translate_list(device, &found.list);
    TRANSLATE(&found.x, &found.up, &found.y, &found.dy, &found.dx, &found.dup);
    return sebp_cpu_activation(room.device->cpu, &found);
}

sebp_status counting_dropout(void *device, const sebp_dropout_work *work)
{
    matrix_room room = {.device = device};
    sebp_dropout_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    translate_list(device, &found.list);
    TRANSLATE(&found.x, &found.y);
    return sebp_cpu_dropout(room.device->cpu, &found);
}

sebp_status counting_rotary(void *device, const sebp_rotary_work *work)
{
    matrix_room room = {.device = device};
    sebp_rotary_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    translate_list(device, &found.list);
    found.positions = behind_rows_of(device, found.positions, &found.list);
    TRANSLATE(&found.table, &found.x, &found.y);
    return sebp_cpu_rotary(room.device->cpu, &found);
}

static sebp_cross_entropy_work behind_state(const counting *device,
                                            const sebp_cross_entropy_work *work)
{
    sebp_cross_entropy_work found = *work;
    translate_list(device, &found.list);
    found.labels = behind_rows_of(device, found.labels, &found.list);
    found.state =
        counting_behind(device, found.state, found.list.count * (int64_t)sizeof *found.state);
    return found;
}

sebp_status counting_cross_entropy(void *device, const sebp_cross_entropy_work *work)
{
    matrix_room room = {.device = device};
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_cross_entropy_work found = behind_state(device, work);
    TRANSLATE(&found.logits, &found.dlogits);
    return sebp_cpu_cross_entropy(room.device->cpu, &found);
}

sebp_status counting_sum_losses(void *device, const sebp_cross_entropy_work *work, double *loss)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded += (int64_t)sizeof *loss;
    const sebp_cross_entropy_work found = behind_state(device, work);
    return sebp_cpu_sum_losses(self->cpu, &found, loss);
}

sebp_status counting_gather(void *device, const sebp_gather_work *work)
{
    matrix_room room = {.device = device};
    sebp_gather_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    translate_list(device, &found.list);
    for (int t = 0; t < found.tables; t++) {
        translate(&room, &found.from[t]);
        found.indices[t] = behind_rows_of(device, found.indices[t], &found.list);
    }
    TRANSLATE(&found.to);
    return sebp_cpu_gather(room.device->cpu, &found);
}

sebp_status counting_sum_groups(void *device, const sebp_group_sums *sums)
{
    matrix_room room = {.device = device};
    sebp_group_sums found = *sums;
    ENTER(device, SEBP_ERROR_BACKEND);
    TRANSLATE(&found.from, &found.to);
    if (found.groups > 0) {
        found.start = counting_behind_list(device, found.start, found.groups + 1);
        found.rows = counting_behind_list(device, found.rows, found.start[found.groups]);
        found.target = counting_behind_list(device, found.target, found.groups);
    }
    return sebp_cpu_sum_groups(room.device->cpu, &found);
}
