/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file moment_table.h
 * The moments of elements that are chosen anew: a hash table with open addressing and linear
 * probing. Its size is a power of two.
 */
#ifndef SEBP_MOMENT_TABLE_H
#define SEBP_MOMENT_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include <sebp/status.h>

enum { SEBP_MIN_PLACES = 64 /* the size of the smallest table: a word of bits */ };

/** A place of the table: one element, or none. */
typedef struct sebp_place {
    int64_t index; /* -1: free */
    float moment1, moment2;
} sebp_place;

/** Multiplies by 2^64 over the golden ratio, which moves neighbouring indices far apart. */
static inline int64_t sebp_first_place(int64_t index, int64_t room)
{
    uint64_t mixed = (uint64_t)index * UINT64_C(0x9E3779B97F4A7C15);
    return (int64_t)(mixed >> (64 - __builtin_ctzll((uint64_t)room)));
}

/** The place of an element, or the free place where it would go. */
static inline sebp_place *sebp_find_place(sebp_place *places, int64_t room, int64_t index)
{
    int64_t at = sebp_first_place(index, room);
    while (places[at].index != index && places[at].index >= 0)
        at = (at + 1) & (room - 1);
    return &places[at];
}

/** The size of the smallest table that `count` elements fill to at most three quarters; 0: there is
 * none. */
static inline int64_t sebp_table_room(int64_t count)
{
    int64_t room = SEBP_MIN_PLACES;
    while (room / 4 * 3 < count) {
        if (room > PTRDIFF_MAX / 2 / (int64_t)sizeof(sebp_place))
            return 0;
        room *= 2;
    }
    return room;
}

/** A table without elements: its places and their bits. */
typedef struct sebp_moment_table {
    sebp_place *places;
    uint64_t *used;
    int64_t room;
} sebp_moment_table;

static inline sebp_status sebp_make_table(int64_t room, sebp_moment_table *made)
{
    if (room == 0)
        return SEBP_ERROR_MEMORY;
    *made = (sebp_moment_table){.places = malloc((size_t)room * sizeof *made->places),
                                .used = calloc((size_t)room / 64, sizeof *made->used),
                                .room = room};
    if (made->places == NULL || made->used == NULL) {
        free(made->places);
        free(made->used);
        return SEBP_ERROR_MEMORY;
    }
    for (int64_t i = 0; i < room; i++)
        made->places[i].index = -1;
    return SEBP_SUCCESS;
}

static inline bool sebp_is_used(const uint64_t *used, int64_t at)
{
    return (used[at / 64] >> (at % 64) & 1) != 0;
}

static inline void sebp_set_used(uint64_t *used, int64_t at, bool value)
{
    used[at / 64] |= (uint64_t)value << (at % 64);
}

/** Puts an element into a table that has room for it and does not have it. */
static inline void sebp_put_place(sebp_moment_table *to, sebp_place element, bool used)
{
    sebp_place *at = sebp_find_place(to->places, to->room, element.index);
    *at = element;
    sebp_set_used(to->used, at - to->places, used);
}

#endif
