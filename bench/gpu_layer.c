/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "inputs.h"
#include "rows.h"

static const double MIN_MS = 20; /* of calls in a row: they are told from the clock's own time */
enum { MAX_CALLS = 2000 };

/* Any context does for memory: all of them work on one GPU, and on one stream. */
static sebp_context *context_of(const machine *m)
{
    return m->contexts[m->gemm];
}

static void succeed(const machine *m, const group *g, sebp_status status)
{
    if (status != SEBP_SUCCESS)
        die(FAILED, "%s: %s", g->sizes->name, sebp_context_message(context_of(m)));
}

void copy_to_gpu(const machine *m, const group *g, int which)
{
    const sebp_matrix *from = &g->layers[0].at[which];
    succeed(m, g,
            sebp_device_upload(context_of(m), g->on_gpu.at[which].data, from->data,
                               (int64_t)matrix_bytes(from)));
}

void copy_from_gpu(const machine *m, const group *g, int which)
{
    const sebp_matrix *to = &g->layers[0].at[which];
    succeed(m, g,
            sebp_device_download(context_of(m), to->data, g->on_gpu.at[which].data,
                                 (int64_t)matrix_bytes(to)));
}

void put_layer_on_gpu(const machine *m, group *g)
{
    for (int which = 0; which < MATRICES; which++) {
        sebp_matrix *a = &g->on_gpu.at[which];
        *a = g->layers[0].at[which];
        a->data = NULL;
        if (!is_needed(g->asked, which))
            continue;
        succeed(m, g, sebp_device_alloc(context_of(m), (int64_t)matrix_bytes(a), &a->data));
        copy_to_gpu(m, g, which);
    }
}

void free_layer_on_gpu(const machine *m, group *g)
{
    for (int which = 0; which < MATRICES; which++)
        sebp_device_free(context_of(m), g->on_gpu.at[which].data);
}

static double time_calls(const machine *m, const group *g, const run *r, int calls)
{
    succeed(m, g, sebp_device_synchronize(context_of(m)));
    double begin = now_ms();
    for (int i = 0; i < calls; i++)
        perform_run(m, g, r, &g->on_gpu);
    succeed(m, g, sebp_device_synchronize(context_of(m)));
    return now_ms() - begin;
}

void measure_on_gpu(const machine *m, const group *g, run *r)
{
    if (r->found)
        copy_to_gpu(m, g, FOUND);
    perform_run(m, g, r, &g->on_gpu);
    if (r->calls == 0) {
        /* The first call of a kernel also loads it. */
        double ms = fmin(time_calls(m, g, r, 1), time_calls(m, g, r, 1));
        r->calls = (int)fmin(fmax(ceil(MIN_MS / ms), 1), MAX_CALLS);
    }
    r->ms[r->count++] = time_calls(m, g, r, r->calls) / r->calls;
}
