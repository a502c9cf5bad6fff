/* SPDX-License-Identifier: Apache-2.0 */
/** @file counting_inside.h What the files of the tests' device share. */
#ifndef SEBP_TESTS_COUNTING_INSIDE_H
#define SEBP_TESTS_COUNTING_INSIDE_H

#include <stdbool.h>
#include <stddef.h>

#include "counting.h"
#include "lib/cpu/layers.h"
#include "lib/cpu/operations.h"

enum { COUNTING_BLOCKS = 4096, COUNTING_GAP = 4096 };
static const size_t COUNTING_ARENA = (size_t)1 << 30;

/** A piece of memory that is allocated. */
typedef struct device_memory {
    size_t first, bytes; /* within the arena */
} device_memory;

struct counting {
    sebp_cpu *cpu;
    char *handles; /* pages that nobody may touch */
    char *memory;  /* what lies behind them */
    device_memory pieces[COUNTING_BLOCKS];
    int live;
    int packed;  /* weights */
    size_t used; /* of the arena */
    void *scratch;
    bool overlaps; /* operations may be at work at once */
    int64_t operations, fails_at, uploaded, downloaded;
};

/** Counts an operation, and returns the status where it is to fail. */
#define ENTER(device, status)                                                                      \
    do {                                                                                           \
        counting *entered = device;                                                                \
        if (++entered->operations == entered->fails_at)                                            \
            return status;                                                                         \
    } while (0)

/* counting_memory.c */

/** What lies behind `bytes` from a pointer into the device's memory on; NULL for NULL. */
void *counting_behind(const counting *device, const void *pointer, int64_t bytes);
void *counting_allocate(counting *device, int64_t bytes);
void counting_return(counting *device, void *handle);

sebp_matrix counting_behind_matrix(const counting *device, const sebp_matrix *matrix);
/** Of a matrix whose rows are listed only so far as the list goes. */
sebp_matrix counting_behind_rows(const counting *device, const sebp_matrix *matrix,
                                 const int64_t *rows, int64_t count);
const int64_t *counting_behind_list(const counting *device, const int64_t *rows, int64_t count);
sebp_sparse counting_behind_sparse(const counting *device, const sebp_sparse *sparse);

/* counting_layers.c */

sebp_status counting_attention_forward(void *device, const sebp_attention *attention);
sebp_status counting_attention_backward(void *device, const sebp_attention *attention);
sebp_status counting_norm_forward(void *device, const sebp_norm_work *work);
sebp_status counting_norm_backward(void *device, const sebp_norm_back_work *work);
sebp_status counting_activation(void *device, const sebp_activation_work *work);
sebp_status counting_dropout(void *device, const sebp_dropout_work *work);
sebp_status counting_rotary(void *device, const sebp_rotary_work *work);
sebp_status counting_cross_entropy(void *device, const sebp_cross_entropy_work *work);
sebp_status counting_sum_losses(void *device, const sebp_cross_entropy_work *work, double *loss);
sebp_status counting_gather(void *device, const sebp_gather_work *work);
sebp_status counting_sum_groups(void *device, const sebp_group_sums *sums);

#endif
