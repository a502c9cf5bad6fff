/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 08_gpu.c
 * One layer's backward on any device: on a GPU, where the library has been built with CUDA and there is
 * one, and else on CPUs. All that the layer reads and writes lies in the device's memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <sebp/sebp.h>

/* 8 texts padded to 128 tokens; a layer of 768 features in and 3072 out. */
enum { TEXTS = 8, LENGTH = 128, M = TEXTS * LENGTH, K = 768, N = 3072, CALLS = 5 };

static const int64_t lengths[TEXTS] = {31, 74, 12, 55, 110, 23, 48, 9};

/** The first failure, after which nothing is done any more. */
static sebp_status status = SEBP_SUCCESS;
static sebp_context *context = NULL;

static void keep(sebp_status of_call)
{
    status = status == SEBP_SUCCESS ? of_call : status;
}

/** A matrix of random numbers in the device's memory. One of M rows is of texts: its padding is zero. */
static sebp_matrix make(int64_t rows, int64_t cols)
{
    const int64_t bytes = rows * cols * (int64_t)sizeof(float);
    float *host = calloc((size_t)(rows * cols), sizeof *host);
    void *memory = NULL;
    if (host == NULL) {
        keep(SEBP_ERROR_MEMORY);
        return sebp_matrix_f32(NULL, rows, cols);
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols && (rows != M || i % LENGTH < lengths[i / LENGTH]); j++) {
            host[i * cols + j] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
        }
    }
    if (status == SEBP_SUCCESS) {
        keep(sebp_device_alloc(context, bytes, &memory));
    }
    if (status == SEBP_SUCCESS) {
        keep(sebp_device_upload(context, memory, host, bytes));
    }
    free(host);
    return sebp_matrix_f32(memory, rows, cols);
}

/** Milliseconds of a backward, of CALLS in a row: on a GPU they return before they are done. */
static double measure(const sebp_matrix *at, const sebp_rows *rows)
{
    struct timespec begin, end;
    for (int call = -1; call < CALLS && status == SEBP_SUCCESS; call++) {
        if (call == 0) { /* the first one has loaded what it needs */
            keep(sebp_device_synchronize(context));
            timespec_get(&begin, TIME_UTC);
        }
        keep(sebp_linear_backward(context, &at[0], &at[1], &at[2], rows, NULL, &at[3], &at[4],
                                  &at[5]));
    }
    if (status != SEBP_SUCCESS) {
        return 0.0;
    }
    keep(sebp_device_synchronize(context));
    timespec_get(&end, TIME_UTC);
    return (1e3 * (double)(end.tv_sec - begin.tv_sec) +
            1e-6 * (double)(end.tv_nsec - begin.tv_nsec)) /
           CALLS;
}

int main(void)
{
    char message[256] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.device = SEBP_DEVICE_CUDA;
    options.message = message;
    options.message_bytes = sizeof message;
    if (sebp_context_create(&options, &context) != SEBP_SUCCESS) {
        printf("%s; working on CPUs\n", message);
        keep(sebp_context_create(NULL, &context));
    }

    sebp_matrix at[6] = {make(M, N), make(M, K), make(N, K), make(M, K), make(N, K), make(1, N)};
    sebp_rows *rows[2] = {NULL, NULL};
    keep(sebp_rows_all(M, &rows[0]));
    keep(sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows[1]));
    double dense = measure(at, rows[0]), active = measure(at, rows[1]);

    float db[N]; /* a result, in the host's memory */
    if (status == SEBP_SUCCESS) {
        keep(sebp_device_download(context, db, at[5].data, sizeof db));
    }
    if (status == SEBP_SUCCESS) {
        printf("dense: %.3f ms   active rows only: %.3f ms   %.1f times faster\n", dense, active,
               dense / active);
        printf("db begins with %.4f\n", (double)db[0]);
    } else {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
    }
    for (int i = 0; i < 6; i++) {
        sebp_device_free(context, at[i].data);
    }
    sebp_rows_destroy(rows[0]);
    sebp_rows_destroy(rows[1]);
    sebp_context_destroy(context);
    return status == SEBP_SUCCESS ? 0 : 1;
}
