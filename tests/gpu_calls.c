/* SPDX-License-Identifier: Apache-2.0 */
/** @file gpu_calls.c */
#include "config.h"

#include <stdlib.h>
#include <string.h>

#include "gpu_calls.h"
#include "testing.h"

static const struct {
    const char *name;
    int64_t rows, cols;
} shapes[PLACES] = {
    [DY] = {"dy", M, N},     [X] = {"x", M, K},   [W] = {"w", N, K},
    [BIAS] = {"bias", 1, N}, [DX] = {"dx", M, K}, [DW] = {"dw", N, K},
    [DB] = {"db", 1, N},     [Y] = {"y", M, N},   [LSE] = {"lse", M, 2},
};

gpu_world on;

void *gpu_put(const void *from, int64_t bytes)
{
    void *memory = NULL;
    testing_succeed(sebp_device_alloc(on.context, bytes, &memory), on.context);
    testing_succeed(sebp_device_upload(on.context, memory, from, bytes), on.context);
    return memory;
}

static int64_t bytes_of(const sebp_matrix *matrix)
{
    return matrix->rows * matrix->cols * (int64_t)sizeof(float);
}

void gpu_fill(void)
{
    for (int i = 0; i < PLACES; i++) {
        on.host[i] = testing_matrix(shapes[i].rows, shapes[i].cols, shapes[i].cols, SEBP_F32);
        if (i <= BIAS)
            testing_fill(&on.host[i], TESTING_REAL);
        on.gpu[i] = on.host[i];
        on.gpu[i].data = gpu_put(on.host[i].data, bytes_of(&on.host[i]));
        on.given[i] = on.gpu[i];
    }
    for (int i = 0; i < M; i++)
        on.labels[i] = LABEL;
    on.gpu_labels = gpu_put(on.labels, sizeof on.labels);
    const int64_t lengths[2] = {M / 2, M / 2};
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths, 2, &on.texts), SEBP_SUCCESS);
    int64_t indices[2] = {-1, -1};
    float values[2] = {0, 0};
    on.kept =
        (sebp_sparse){gpu_put(indices, sizeof indices), gpu_put(values, sizeof values), 2, M, K};
}

void gpu_empty(void)
{
    for (int i = 0; i < PLACES; i++) {
        sebp_device_free(on.context, on.gpu[i].data);
        testing_release(&on.host[i]);
    }
    sebp_device_free(on.context, on.gpu_labels);
    sebp_device_free(on.context, on.kept.indices);
    sebp_device_free(on.context, on.kept.values);
    sebp_sequences_destroy(on.texts);
}

/* Whether an output holds poison on the GPU, too. */
static bool is_untouched(place which)
{
    const size_t bytes = (size_t)bytes_of(&on.host[which]);
    unsigned char *found = malloc(bytes);
    ck_assert_ptr_nonnull(found);
    testing_succeed(sebp_device_download(on.context, found, on.gpu[which].data, (int64_t)bytes),
                    on.context);
    bool all = memcmp(found, on.host[which].data, bytes) == 0;
    free(found);
    return all;
}

void gpu_expect_untouched(const char *what)
{
    for (int i = DX; i < PLACES; i++)
        ck_assert_msg(is_untouched((place)i), "%s: %s has been written", what, shapes[i].name);
}

static sebp_status call_forward(void)
{
    return sebp_linear_forward(on.context, &on.given[X], &on.given[W], &on.given[BIAS], NULL, NULL,
                               &on.given[Y]);
}

static sebp_status call_backward(void)
{
    return sebp_linear_backward(on.context, &on.given[DY], &on.given[X], &on.given[W], NULL, NULL,
                                &on.given[DX], &on.given[DW], &on.given[DB]);
}

/* X is queries, keys and values, of two heads. */
static sebp_status call_attention(void)
{
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = 2;
    return sebp_attention_forward(on.context, &on.given[X], &on.given[X], &on.given[X], NULL,
                                  on.texts, NULL, &options, &on.given[DX], &on.given[LSE]);
}

static sebp_status call_loss(void)
{
    double loss = -7;
    sebp_status status =
        sebp_cross_entropy(on.context, &on.given[DY], on.gpu_labels, NULL, &loss, &on.given[Y]);
    ck_assert(status == SEBP_SUCCESS || loss == -7);
    return status;
}

static sebp_status call_top(void)
{
    return sebp_sparse_top(on.context, &on.given[X], &on.kept);
}

const gpu_call gpu_calls[GPU_CALLS] = {
    {"linear_forward", call_forward, {{X, "x"}, {W, "w"}, {BIAS, "bias"}, {Y, "y"}}, 4},
    {"linear_backward",
     call_backward,
     {{DY, "dy"}, {X, "x"}, {W, "w"}, {DX, "dx"}, {DW, "dw"}, {DB, "db"}},
     6},
    {"attention_forward", call_attention, {{X, "q"}, {DX, "out"}, {LSE, "lse"}}, 3},
    {"cross_entropy", call_loss, {{DY, "logits"}, {Y, "dlogits"}}, 2},
    {"sparse_top", call_top, {{X, "r"}}, 1},
};
