/* SPDX-License-Identifier: Apache-2.0 */
#include "rows.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"

/* The runs of a group: each GEMM on all rows, bandwidths, and all cases. */
enum { MAX_RUNS = 8 * MAX_ACTIVITIES + 6 };

const char *const scattered_names[2] = {"tail", "scattered"};
const char *const found_names[2] = {"given", "found"};
const char *const packed_names[2] = {"plain", "packed"};
const char *const cold_names[2] = {"warm", "cold"};
const char *const forward_names[2] = {"backward", "forward"};

/* ---- Inputs ----------------------------------------------------------------------------------*/

int is_needed(const options *o, int which)
{
    if (which == X || which == W)
        return 1;
    if (which == B || which == Y)
        return o->forward;
    return !o->forward && (which != FOUND || (o->sources & SECOND));
}

/* Views without data: their shapes and dtypes. Sums over rows are kept in f32, as trainers do. */
static void place_inputs(const group *g, layer *l)
{
    for (int which = 0; which < MATRICES; which++) {
        sebp_matrix *a = &l->at[which];
        int one = which == B || which == DB, weights = which == W || which == DW;
        a->data = NULL;
        a->rows = one ? 1 : weights ? g->sizes->n : g->sizes->m;
        a->cols = which == X || which == DX || weights ? g->sizes->k : g->sizes->n;
        a->stride = a->cols;
        a->dtype = one || which == DW ? SEBP_F32 : g->dtype;
    }
}

/* `active` of M rows anywhere. */
static sebp_status scattered_rows(const group *g, int64_t active, sebp_rows **rows)
{
    int64_t *indices = allocate((size_t)active * sizeof *indices), count = 0;
    for (int64_t i = 0; i < g->sizes->m && count < active; i++) {
        if (random_unit(g->asked->seed, (uint64_t)i) * (double)(g->sizes->m - i) <
            (double)(active - count)) {
            indices[count++] = i;
        }
    }
    sebp_status status = sebp_rows_from_indices(indices, count, g->sizes->m, rows);
    free(indices);
    return status;
}

/* ---- Runs ------------------------------------------------------------------------------------*/

static run *add_run(group *g, run_kind kind)
{
    run *r = &g->runs[g->run_count++];
    memset(r, 0, sizeof *r);
    r->kind = kind;
    r->activity = 1.0;
    r->active = g->sizes->m;
    return r;
}

int is_case(const run *r)
{
    return r->kind == CALL && !r->dense;
}

/* A case, by itself and with W packed: the two take turns. */
static void add_case(group *g, const machine *m, int scattered, int found, double activity)
{
    for (int packed = 0; packed <= g->asked->packed; packed++) {
        run *r = add_run(g, CALL);
        r->gemm = m->gemm;
        r->scattered = scattered;
        r->found = found;
        r->packed = packed;
        r->activity = activity;
        r->active = (int64_t)(r->activity * (double)g->sizes->m + 0.5);
        r->active = r->active < 1 ? 1 : r->active;
    }
}

static void add_runs(group *g, const machine *m)
{
    const options *o = g->asked;
    for (int gemm = SEBP_GEMM_AUTO; gemm <= SEBP_GEMM_ONEDNN; gemm++) {
        if (m->contexts[gemm] == NULL)
            continue;
        run *r = add_run(g, CALL);
        r->dense = 1;
        r->gemm = (sebp_gemm)gemm;
    }
    if ((o->sources & SECOND) && !m->on_gpu)
        add_run(g, READ);
    if (!m->on_gpu) {
        add_run(g, FILL);
        add_run(g, FILL_STREAMING);
    }
    for (int scattered = 0; scattered < 2; scattered++) {
        for (int found = 0; found < 2; found++) {
            for (int i = 0; i < o->activity_count; i++) {
                if ((o->patterns >> scattered & 1) && (o->sources >> found & 1))
                    add_case(g, m, scattered, found, o->activities[i]);
            }
        }
    }
}

void prepare_run(const run *r, const layer *l, int threads)
{
    const sebp_matrix *dy = &l->at[DY], *found = &l->at[FOUND];
    size_t row_bytes = (size_t)dy->cols * sebp_dtype_bytes(dy->dtype);
    const int64_t *active = sebp_rows_indices(r->rows);
    if (!r->found)
        return;
    fill_memory(found->data, matrix_bytes(found), 0, threads);
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        for (int64_t i = r->active * t / threads; i < r->active * (t + 1) / threads; i++) {
            memcpy((char *)found->data + (size_t)active[i] * row_bytes,
                   (const char *)dy->data + (size_t)active[i] * row_bytes, row_bytes);
        }
    }
}

void perform_run(const machine *m, const group *g, const run *r, const layer *l)
{
    const sebp_matrix *at = l->at, *filled = &at[g->asked->forward ? Y : DX];
    sebp_context *context = m->contexts[r->gemm];
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_status status = SEBP_SUCCESS;
    options.packed_weight = r->packed ? g->packed[l - g->layers] : NULL;
    if (r->kind == READ) {
        read_memory(at[DY].data, matrix_bytes(&at[DY]), m->memory_threads);
    } else if (r->kind != CALL) {
        fill_memory(filled->data, matrix_bytes(filled), r->kind == FILL_STREAMING,
                    m->memory_threads);
    } else if (g->asked->forward) {
        status = sebp_linear_forward(context, &at[X], &at[W], &at[B], r->rows, &options, &at[Y]);
    } else {
        status =
            sebp_linear_backward(context, &at[r->found ? FOUND : DY], &at[X], &at[W],
                                 r->found ? NULL : r->rows, &options, &at[DX], &at[DW], &at[DB]);
    }
    if (status != SEBP_SUCCESS)
        die(FAILED, "%s: %s", g->sizes->name, sebp_context_message(context));
}

/* One repetition: a warm call follows another of itself, a cold one finds nothing in the caches. */
static void measure(const machine *m, const group *g, run *r, const layer *l)
{
    if (r->kind == CALL)
        prepare_run(r, l, m->memory_threads);
    if (m->on_gpu) {
        measure_on_gpu(m, g, r);
        return;
    }
    if (g->cold)
        read_memory(m->flush, m->flush_bytes, m->memory_threads);
    else
        perform_run(m, g, r, l);
    double begin = now_ms();
    perform_run(m, g, r, l);
    r->ms[r->count++] = now_ms() - begin;
}

static void measure_all(const machine *m, group *g)
{
    double begin = now_ms();
    for (int round = 0; round < MAX_ROUNDS; round++) {
        if (round >= g->asked->repetitions && now_ms() - begin >= g->asked->seconds * 1e3)
            break;
        double best_dense = HUGE_VAL;
        for (int i = 0; i < g->run_count && g->runs[i].dense && round > 0; i++)
            best_dense = fmin(best_dense, g->runs[i].ms[0]);
        for (int i = 0; i < g->run_count; i++) {
            run *r = &g->runs[i];
            /* A GEMM far from the fastest will not be the reference: spare its time. */
            if (!(r->dense && round > 0 && r->ms[0] > 2 * best_dense))
                measure(m, g, r, &g->layers[round % g->layer_count]);
        }
    }
    for (int i = 0; i < g->run_count; i++)
        qsort(g->runs[i].ms, (size_t)g->runs[i].count, sizeof(double), compare_doubles);
}

/* ---- Groups ----------------------------------------------------------------------------------*/

/* Memory for the layers of a group; 0 and a reason where there is not enough. */
static int allocate_layers(group *g, const machine *m, char *reason, size_t room)
{
    double needed = 0, available = available_memory();
    for (int i = 0; i < g->layer_count; i++) {
        place_inputs(g, &g->layers[i]);
        for (int which = 0; which < MATRICES; which++) {
            const sebp_matrix *a = &g->layers[i].at[which];
            if (is_needed(g->asked, which))
                needed += (double)a->rows * (double)a->cols * (double)sebp_dtype_bytes(a->dtype);
        }
    }
    if (needed >= (double)PTRDIFF_MAX || (available > 0 && needed > available)) {
        snprintf(reason, room, "skipped: needs %.1f GiB and %.1f GiB are available",
                 needed * 0x1p-30, available * 0x1p-30);
        return 0;
    }
    for (int i = 0; i < g->layer_count; i++) {
        for (int which = 0; which < MATRICES; which++) {
            sebp_matrix *a = &g->layers[i].at[which];
            if (!is_needed(g->asked, which))
                continue;
            a->data = allocate(matrix_bytes(a));
            fill_random(a, g->asked->seed * MATRICES + (uint64_t)which, m->memory_threads);
        }
    }
    return 1;
}

static void pack_weights(group *g, const machine *m)
{
    for (int i = 0; i < g->layer_count; i++) {
        sebp_context *context = m->contexts[m->gemm];
        g->packed[i] = NULL;
        if (!g->asked->packed)
            continue;
        if (sebp_packed_weight_create(context, &g->layers[i].at[W], 0, &g->packed[i]) !=
            SEBP_SUCCESS)
            die(FAILED, "%s: %s", g->sizes->name, sebp_context_message(context));
    }
}

static void make_rows(group *g)
{
    for (int i = 0; i < g->run_count; i++) {
        run *r = &g->runs[i];
        if (r->kind != CALL)
            continue;
        sebp_status status = r->dense ? sebp_rows_all(g->sizes->m, &r->rows)
                             : r->scattered
                                 ? scattered_rows(g, r->active, &r->rows)
                                 : tail_rows(g->sizes, g->asked->seed, r->active, &r->rows);
        if (status != SEBP_SUCCESS)
            die(FAILED, "%s: making rows: %s", g->sizes->name, sebp_status_string(status));
        if (sebp_rows_count(r->rows) != r->active) {
            die(FAILED, "%s: made %" PRId64 " rows for %" PRId64, g->sizes->name,
                sebp_rows_count(r->rows), r->active);
        }
    }
}

static void run_group(const machine *m, group *g)
{
    char reason[128];
    const shape *s = g->sizes;
    g->layer_count = g->cold ? 2 : 1;
    g->run_count = 0;
    add_runs(g, m);
    if (!g->asked->csv) {
        printf("\n%s: M %" PRId64 ", K %" PRId64 ", N %" PRId64 ", %s %s, %s\n", s->name, s->m,
               s->k, s->n, sebp_dtype_name(g->dtype), forward_names[g->asked->forward],
               cold_names[g->cold]);
    }
    if (!allocate_layers(g, m, reason, sizeof reason)) {
        print_rows_unmeasured(m, g, reason);
        return;
    }
    make_rows(g);
    pack_weights(g, m);
    if (m->on_gpu)
        put_layer_on_gpu(m, g);
    for (int i = 0; i < g->run_count; i++) {
        if (g->runs[i].kind == CALL)
            verify_run(m, g, &g->runs[i]);
    }
    if (g->asked->verify_only) {
        print_rows_unmeasured(m, g, "verified");
    } else {
        measure_all(m, g);
        print_rows_results(m, g);
    }
    if (m->on_gpu)
        free_layer_on_gpu(m, g);
    for (int i = 0; i < g->run_count; i++)
        sebp_rows_destroy(g->runs[i].rows);
    for (int i = 0; i < g->layer_count; i++) {
        sebp_packed_weight_destroy(g->packed[i]);
        for (int which = 0; which < MATRICES; which++)
            free(g->layers[i].at[which].data);
    }
}

void compare_rows(const machine *m, const options *o)
{
    print_rows_heading(m, o);
    run *runs = allocate(MAX_RUNS * sizeof *runs);
    for (int i = 0; i < o->shape_count; i++) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int cold = 0; cold < 2; cold++) {
                group g = {.asked = o, .sizes = &o->shapes[i], .cold = cold, .runs = runs};
                if (!(o->dtypes >> bf16 & 1) || !(o->caches >> cold & 1))
                    continue;
                g.dtype = bf16 ? SEBP_BF16 : SEBP_F32;
                run_group(m, &g);
                if (fflush(stdout) != 0)
                    die(FAILED, "cannot write: %s", strerror(errno));
            }
        }
    }
    free(runs);
}
