/* SPDX-License-Identifier: Apache-2.0 */
/** @file counting_memory.c The memory of the tests' device. */
#include "config.h"

#include <string.h>

#include "counting_inside.h"
#include "testing.h"

void *counting_behind(const counting *device, const void *pointer, int64_t bytes)
{
    if (pointer == NULL || bytes <= 0)
        return NULL;
    const char *at = pointer;
    ck_assert_msg(at >= device->handles && at < device->handles + COUNTING_ARENA,
                  "a device was handed memory of the host");
    size_t first = (size_t)(at - device->handles);
    for (int i = 0; i < device->live; i++) {
        const device_memory *piece = &device->pieces[i];
        if (first >= piece->first && first + (size_t)bytes <= piece->first + piece->bytes)
            return device->memory + first;
    }
    ck_abort_msg("a device was handed memory that is not allocated");
}

void *counting_allocate(counting *device, int64_t bytes)
{
    size_t room = (size_t)sebp_round_up(bytes > 0 ? bytes : 1, 64);
    ck_assert_int_lt(device->live, COUNTING_BLOCKS);
    if (device->live == 0)
        device->used = 0;
    ck_assert_msg(device->used + room + COUNTING_GAP <= COUNTING_ARENA,
                  "the tests' device is full");
    device->pieces[device->live++] = (device_memory){device->used, room};
    char *handle = device->handles + device->used;
    memset(device->memory + device->used, TESTING_POISON, room);
    device->used += room + COUNTING_GAP;
    return handle;
}

void counting_return(counting *device, void *handle)
{
    for (int i = 0; i < device->live && handle != NULL; i++) {
        if (device->handles + device->pieces[i].first == (char *)handle) {
            device->pieces[i] = device->pieces[--device->live];
            return;
        }
    }
    ck_assert_msg(handle == NULL, "a device was to free what it has not allocated");
}

static int64_t bytes_of(const sebp_matrix *matrix)
{
    if (matrix->rows == 0 || matrix->cols == 0)
        return 0;
    return ((matrix->rows - 1) * matrix->stride + matrix->cols) *
           (int64_t)sebp_dtype_bytes(matrix->dtype);
}

sebp_matrix counting_behind_matrix(const counting *device, const sebp_matrix *matrix)
{
    sebp_matrix found = *matrix;
    found.data = counting_behind(device, matrix->data, bytes_of(matrix));
    return found;
}

sebp_matrix counting_behind_rows(const counting *device, const sebp_matrix *matrix,
                                 const int64_t *rows, int64_t count)
{
    sebp_matrix used = *matrix;
    used.rows = rows != NULL ? (count > 0 ? rows[count - 1] + 1 : 0) : count;
    used.data = counting_behind(device, matrix->data, bytes_of(&used));
    used.rows = matrix->rows;
    return used;
}

const int64_t *counting_behind_list(const counting *device, const int64_t *rows, int64_t count)
{
    return counting_behind(device, rows, count * (int64_t)sizeof *rows);
}

sebp_sparse counting_behind_sparse(const counting *device, const sebp_sparse *sparse)
{
    sebp_sparse found = *sparse;
    found.indices =
        counting_behind(device, sparse->indices, sparse->count * (int64_t)sizeof(int64_t));
    found.values = counting_behind(device, sparse->values, sparse->count * (int64_t)sizeof(float));
    return found;
}

/* ---- for the tests ---- */

void *counting_put_bytes(counting *device, const void *from, int64_t bytes)
{
    void *memory = counting_allocate(device, bytes);
    if (bytes > 0)
        memcpy(counting_behind(device, memory, bytes), from, (size_t)bytes);
    return memory;
}

void counting_get_bytes(counting *device, void *to, const void *from, int64_t bytes)
{
    if (bytes > 0)
        memcpy(to, counting_behind(device, from, bytes), (size_t)bytes);
}

void counting_free(counting *device, void *memory)
{
    counting_return(device, memory);
}
