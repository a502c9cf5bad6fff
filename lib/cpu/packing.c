/* SPDX-License-Identifier: Apache-2.0 */
/** @file packing.c Operands that are converted as they are packed. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "packing.h"

/* What is converted at a time stays in the nearest cache. Memory rows are read in runs of 1 KiB or so. */
enum {
    LANES_OF_ROWS = 32,   /* lanes, about, where memory rows are lanes */
    DEPTH_OF_ROWS = 1024, /* and elements of each */
    LANES_OF_STEPS = 256, /* lanes where memory rows are steps of the depth */
    DEPTH_OF_STEPS = 32,  /* and steps */
    LINE = 64
};

/* The largest magnitude in bf16; what is beyond is Inf or NaN. */
#define MAX_BF16 0x1.fep127F

sebp_packing sebp_packing_of(const sebp_kernels *kernels, const sebp_operand *operand, bool is_a,
                             sebp_arithmetic arithmetic)
{
    /* Where bf16 is not multiplied in pairs, packing widens it by itself. */
    bool is_bf16 = operand->dtype == SEBP_BF16;
    bool packs_bf16 = arithmetic.by_bf16 || (is_bf16 && kernels->shape_bf16.unit_elements == 1);
    sebp_packing how = {
        .slab = {operand->data, operand->stride, operand->rows,
                 is_a ? !operand->transposed : operand->transposed},
        .dtype = operand->dtype,
        .packs = packs_bf16 ? SEBP_BF16 : SEBP_F32,
        .parts = is_bf16 || !arithmetic.by_bf16 ? 1 : arithmetic.parts,
        .is_checked = arithmetic.by_bf16 && (arithmetic.parts > 1 || !is_bf16),
    };
    const sebp_tile_shape *shape = arithmetic.by_bf16 ? &kernels->shape_bf16 : &kernels->shape_f32;
    how.width = is_a ? shape->rows : shape->cols;
    how.unit_elements = shape->unit_elements;
    if (packs_bf16)
        how.pack = is_a ? kernels->pack_a_bf16 : kernels->pack_b_bf16;
    else
        how.pack = is_a ? kernels->pack_a_f32 : kernels->pack_b_f32;
    return how;
}

int64_t sebp_packing_lanes(const sebp_packing *how)
{
    const int lanes = how->slab.lanes_are_rows ? LANES_OF_ROWS : LANES_OF_STEPS;
    return sebp_max(1, lanes / how->width) * how->width;
}

static int64_t depth_of(const sebp_packing *how)
{
    return how->slab.lanes_are_rows ? DEPTH_OF_ROWS : DEPTH_OF_STEPS;
}

/* Converted rows are as far apart as this. */
static int64_t room_stride(int64_t elements)
{
    return sebp_round_up(elements, LINE / 2);
}

int64_t sebp_packing_room(const sebp_packing *how, int64_t lanes, int64_t depth)
{
    if (how->packs == how->dtype)
        return 0;
    lanes = sebp_min(lanes, sebp_packing_lanes(how));
    depth = sebp_min(depth, depth_of(how));
    int64_t rows = how->slab.lanes_are_rows ? lanes : depth;
    int64_t elements = how->slab.lanes_are_rows ? depth : lanes;
    return rows * room_stride(elements) * how->parts * (int64_t)sebp_dtype_bytes(how->packs);
}

static const void *element_at(const sebp_packing *how, int64_t row, int64_t col)
{
    int64_t listed = how->slab.rows != NULL ? how->slab.rows[row] : row;
    return (const char *)how->slab.data +
           (listed * how->slab.stride + col) * (int64_t)sebp_dtype_bytes(how->dtype);
}

/* Converts n elements into row `row` of the room, which has `rows` of them for each part. Returns
 * whether all parts are finite. */
static bool convert(const sebp_kernels *kernels, const sebp_packing *how, const void *from,
                    int64_t n, void *room, int64_t row, int64_t rows, int64_t stride)
{
    if (how->packs == how->dtype)
        return !kernels->any_above_bf16(from, n, MAX_BF16);
    if (how->packs == SEBP_F32) {
        kernels->f32_from_bf16((float *)room + row * stride, from, n);
        return true;
    }
    uint16_t *parts[SEBP_MAX_PARTS];
    for (int i = 0; i < how->parts; i++)
        parts[i] = (uint16_t *)room + (i * rows + row) * stride;
    return kernels->split_f32(parts, how->parts, from, n);
}

/* The memory that is needed next comes while this is converted. */
static void prefetch(const void *from, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += LINE)
        __builtin_prefetch((const char *)from + at, 0, 3);
}

/* A block of whole slivers, `depth` elements of each. */
static bool pack_block(const sebp_kernels *kernels, const sebp_packing *how, float *packed,
                       int64_t lane, int64_t lanes, int64_t at, int64_t depth, void *room)
{
    const bool is_lane = how->slab.lanes_are_rows;
    const int64_t rows = is_lane ? lanes : depth, elements = is_lane ? depth : lanes;
    const int64_t first_row = is_lane ? lane : at, first = is_lane ? at : lane;
    const int64_t stride = room_stride(elements);
    const int64_t bytes = elements * (int64_t)sebp_dtype_bytes(how->dtype);
    bool is_finite = true;
    for (int64_t i = 0; i < rows; i++) {
        if (i + 1 < rows)
            prefetch(element_at(how, first_row + i + 1, first), bytes);
        const void *from = element_at(how, first_row + i, first);
        if (!convert(kernels, how, from, elements, room, i, rows, stride))
            is_finite = false;
    }
    if (how->packs == how->dtype) {
        how->pack(packed, how->sliver_units, &how->slab, lane, lanes, at, depth);
        return is_finite;
    }
    const int64_t part_bytes = rows * stride * (int64_t)sebp_dtype_bytes(how->packs);
    for (int i = 0; i < how->parts; i++) {
        const sebp_slab converted = {(char *)room + i * part_bytes, stride, NULL, is_lane};
        how->pack(packed + i * how->part_units, how->sliver_units, &converted, 0, lanes, 0, depth);
    }
    return is_finite;
}

/* A group of whole slivers. Returns whether all parts are finite. */
static bool pack_group(const sebp_kernels *kernels, const sebp_packing *how, float *packed,
                       int64_t lane, int64_t lanes, int64_t at, int64_t depth, void *room)
{
    bool is_finite = true;
    for (int64_t done = 0; done < depth; done += depth_of(how)) {
        const int64_t steps = sebp_min(depth_of(how), depth - done);
        float *to = packed + done / how->unit_elements * how->width;
        if (!pack_block(kernels, how, to, lane, lanes, at + done, steps, room))
            is_finite = false;
    }
    return is_finite;
}

void sebp_pack_lanes(const sebp_kernels *kernels, const sebp_packing *how, float *packed,
                     int64_t lane, int64_t lanes, int64_t at, int64_t depth, bool *finite,
                     void *room)
{
    if (sebp_packs_straight(how)) {
        how->pack(packed, how->sliver_units, &how->slab, lane, lanes, at, depth);
        return;
    }
    const int64_t group = sebp_packing_lanes(how);
    for (int64_t first = 0; first < lanes; first += group) {
        const int64_t sliver = first / how->width, count = sebp_min(group, lanes - first);
        float *to = packed + sliver * how->sliver_units;
        bool is_finite = pack_group(kernels, how, to, lane + first, count, at, depth, room);
        for (int64_t i = 0; i < count && finite != NULL; i += how->width, to += how->sliver_units) {
            /* Which slivers are a group depends on where a chunk begins: each is looked at by itself. */
            const int64_t own = sebp_min(how->width, count - i);
            finite[(first + i) / how->width] =
                is_finite || (own < count &&
                              pack_group(kernels, how, to, lane + first + i, own, at, depth, room));
        }
    }
}

float sebp_packing_element(const sebp_packing *how, int64_t lane, int64_t at)
{
    const bool is_lane = how->slab.lanes_are_rows;
    const void *element = element_at(how, is_lane ? lane : at, is_lane ? at : lane);
    if (how->dtype == SEBP_F32)
        return *(const float *)element;
    uint32_t bits = (uint32_t) * (const uint16_t *)element << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
