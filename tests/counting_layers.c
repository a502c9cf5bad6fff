/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file counting_layers.c
 * Attention and the row-wise layers on the tests' device. Sequences, indices, labels, positions,
 * groups and the state of a softmax are the host's and stay so; all else is translated.
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
    TRANSLATE(&found.table, &found.x, &found.y);
    return sebp_cpu_rotary(room.device->cpu, &found);
}

/* Its list says where labels lie, and is the host's as they are. */
sebp_status counting_cross_entropy(void *device, const sebp_cross_entropy_work *work)
{
    matrix_room room = {.device = device};
    sebp_cross_entropy_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    TRANSLATE(&found.logits, &found.dlogits);
    return sebp_cpu_cross_entropy(room.device->cpu, &found);
}

sebp_status counting_gather(void *device, const sebp_gather_work *work)
{
    matrix_room room = {.device = device};
    sebp_gather_work found = *work;
    ENTER(device, SEBP_ERROR_BACKEND);
    translate_list(device, &found.list);
    for (int t = 0; t < found.tables; t++)
        translate(&room, &found.from[t]);
    TRANSLATE(&found.to);
    return sebp_cpu_gather(room.device->cpu, &found);
}

sebp_status counting_sum_groups(void *device, const sebp_group_sums *sums)
{
    matrix_room room = {.device = device};
    sebp_group_sums found = *sums;
    ENTER(device, SEBP_ERROR_BACKEND);
    TRANSLATE(&found.from, &found.to);
    return sebp_cpu_sum_groups(room.device->cpu, &found);
}
