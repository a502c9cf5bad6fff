/* SPDX-License-Identifier: Apache-2.0 */
/** @file fake_inside.h What the files of the runtime without a GPU share. */
#ifndef FAKE_INSIDE_H
#define FAKE_INSIDE_H

#include <cuda_runtime_api.h>

/** Keeps an error as the last one, and returns it. */
cudaError_t fake_finish(cudaError_t error);
/** Counts a call that may fail; the error that it is to have. */
cudaError_t fake_next_error();

#define MAY_FAIL()                                                                                 \
    do {                                                                                           \
        cudaError_t wanted = fake_next_error();                                                    \
        if (wanted != cudaSuccess)                                                                 \
            return fake_finish(wanted);                                                            \
    } while (0)

/** Opens the GPU's memory as long as it lives. */
struct fake_opened {
    fake_opened();
    ~fake_opened();
    fake_opened(const fake_opened &) = delete;
    fake_opened &operator=(const fake_opened &) = delete;
};

#endif
