/* SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "machine.h"

uint64_t random_bits(uint64_t seed, uint64_t index)
{
    uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15u ^ (index + 1) * 0xd1342543de82ef95u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double random_unit(uint64_t seed, uint64_t index)
{
    return (double)(random_bits(seed, index) >> 11) * 0x1p-53; /* in [0, 1) */
}

void fill_random(const sebp_matrix *a, uint64_t seed, int threads)
{
    int64_t count = a->rows * a->cols;
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        for (int64_t i = count * t / threads; i < count * (t + 1) / threads; i++) {
            uint64_t bits = random_bits(seed, (uint64_t)i);
            float value = 0.5f + (float)(bits >> 40) * 0x1p-24f;
            value = bits & 1 ? value : -value;
            if (a->dtype == SEBP_F32) {
                ((float *)a->data)[i] = value;
            } else {
                uint32_t word;
                memcpy(&word, &value, sizeof word);
                ((uint16_t *)a->data)[i] = (uint16_t)(word >> 16);
            }
        }
    }
}

double element(const sebp_matrix *a, int64_t row, int64_t col)
{
    int64_t at = row * a->stride + col;
    if (a->dtype == SEBP_F32)
        return (double)((const float *)a->data)[at];
    uint32_t word = (uint32_t)((const uint16_t *)a->data)[at] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return (double)value;
}

size_t matrix_bytes(const sebp_matrix *a)
{
    return (size_t)a->rows * (size_t)a->cols * sebp_dtype_bytes(a->dtype);
}

sebp_status tail_rows(const shape *sizes, uint64_t seed, int64_t active, sebp_rows **rows)
{
    int64_t length = sizes->sequence, sequences = sizes->m / length, left = active;
    int64_t *lengths = allocate((size_t)sequences * sizeof *lengths);
    for (int64_t i = 0; i < sequences; i++) {
        int64_t rest = sequences - 1 - i; /* sequences after this one */
        double mean = (double)left / (double)(rest + 1);
        double drawn = mean * (0.5 + random_unit(seed, (uint64_t)i));
        int64_t max = left < length ? left : length;
        int64_t min = left > rest * length ? left - rest * length : 0;
        lengths[i] = (int64_t)(drawn + 0.5);
        lengths[i] = lengths[i] > max ? max : lengths[i] < min ? min : lengths[i];
        if (rest == 0)
            lengths[i] = left;
        left -= lengths[i];
    }
    sebp_status status = sebp_rows_from_lengths(lengths, sequences, length, rows);
    free(lengths);
    return status;
}
