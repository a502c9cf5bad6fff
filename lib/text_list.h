/* SPDX-License-Identifier: Apache-2.0 */
/** @file text_list.h The insides of sequences. */
#ifndef SEBP_LIB_TEXT_LIST_H
#define SEBP_LIB_TEXT_LIST_H

#include <stdint.h>

#include <sebp/sequences.h>

struct sebp_sequences {
    int64_t count, total, max_length;
    int64_t *firsts;  /* count: the first row of each text; owns the offsets' memory too */
    int64_t *offsets; /* count + 1: cumulative lengths */
};

#endif
