/* SPDX-License-Identifier: Apache-2.0 */
/** @file rotary.c Rotary positions: pairs of elements turned by an angle. */
#include "kernels.h"
#include "rows.h"

SPECIALIZED void turn_halves(const sebp_rotary_row *row, bool is_bf16, int64_t head)
{
    const int64_t half = row->dims / 2;
    const vec sign = vec_set1(row->inverse ? -1.0f : 1.0f);
    FOR_EACH_VEC(half, {
        vec cosine = load_lanes(row->cosine, false, at, lanes);
        vec sine = vec_mul(load_lanes(row->sine, false, at, lanes), sign);
        vec a = load_lanes(row->x, is_bf16, head + at, lanes);
        vec b = load_lanes(row->x, is_bf16, head + half + at, lanes);
        vec first = vec_sub(vec_mul(a, cosine), vec_mul(b, sine));
        vec second = vec_add(vec_mul(b, cosine), vec_mul(a, sine));
        store_lanes(row->y, is_bf16, head + at, first, lanes);
        store_lanes(row->y, is_bf16, head + half + at, second, lanes);
    });
}

/* Pairs that lie in one vec: both neighbours of an element are read from a copy, and of them the one
 * that its place, even or odd, asks for is taken. */
enum { COPY = 256 };

SPECIALIZED void turn_pairs(const sebp_rotary_row *row, bool is_bf16, int64_t head)
{
    float x[1 + COPY + VEC_LANES], cosine[COPY], sine[COPY];
    const float sign = row->inverse ? -1.0f : 1.0f;
    x[0] = 0;
    for (int64_t first = 0; first < row->dims; first += COPY) {
        int64_t size = row->dims - first < COPY ? row->dims - first : COPY;
        FOR_EACH_VEC(size,
                     vec_store(x + 1 + at, load_lanes(row->x, is_bf16, head + first + at, lanes)));
        for (int64_t j = 0; j < size; j += 2) {
            cosine[j] = cosine[j + 1] = row->cosine[(first + j) / 2];
            sine[j + 1] = sign * row->sine[(first + j) / 2];
            sine[j] = -sine[j + 1];
        }
        x[1 + size] = 0;
        FOR_EACH_VEC(size, {
            veci place = veci_add(veci_lane_index(), veci_set1((uint32_t)at));
            vec odd = veci_to_f32(veci_and(place, veci_set1(1)));
            vecm is_even = vec_less(odd, vec_set1(0.5f));
            vec before = load_lanes(x, false, at, lanes);
            vec after = load_lanes(x, false, at + 2, lanes);
            vec other =
                vec_mul(vec_select(is_even, after, before), load_lanes(sine, false, at, lanes));
            vec own =
                vec_mul(load_lanes(x, false, at + 1, lanes), load_lanes(cosine, false, at, lanes));
            store_lanes(row->y, is_bf16, head + first + at, vec_add(own, other), lanes);
        });
    }
}

SPECIALIZED void rotary(const sebp_rotary_row *row, bool is_bf16)
{
    for (int64_t head = 0; head < row->heads * row->head_size; head += row->head_size) {
        if (row->interleaved) {
            turn_pairs(row, is_bf16, head);
        } else {
            turn_halves(row, is_bf16, head);
        }
        if (row->y != row->x) {
            FOR_EACH_VEC(row->head_size - row->dims, {
                int64_t rest = head + row->dims + at;
                store_lanes(row->y, is_bf16, rest, load_lanes(row->x, is_bf16, rest, lanes), lanes);
            });
        }
    }
}

void SEBP_NAME(rotary)(const sebp_rotary_row *row)
{
    if (row->is_bf16) {
        rotary(row, true);
    } else {
        rotary(row, false);
    }
}
