/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench: verifies and times linear layers on their active rows against the dense layer.
 *
 * A group is one layer in one dtype, with warm or cold caches. What is measured in it are runs: the
 * dense layer by each GEMM there is, the machine's bandwidth over buffers of this layer's sizes,
 * and one run a case (activity, pattern, rows given or found). Every call is verified first. Then
 * the runs take turns, repetition by repetition, so that a machine that slows down slows all alike.
 *
 *     limit      = activity x dense + bytes that must move / bandwidth
 *     efficiency = limit / measured
 *
 * The bytes that must move are the inactive rows of the result, filled with zeros, and where rows
 * are found the inactive rows of dY, all of which must be read to know them. Whatever can be done
 * in more than one way (dense product, zero fill) counts by its fastest.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "inputs.h"
#include "layers.h"
#include "machine.h"
#include "methods.h"
#include "options.h"

#include <sebp/sebp.h>

enum { MAX_RUNS = 4 * MAX_ACTIVITIES + 6, SAMPLES = 256 };

/* X: M x K, W: N x K, B: 1 x N, Y and DY: M x N, DX: M x K, DW: N x K, DB: 1 x N. FOUND is DY with
 * its inactive rows zero. */
enum { X, W, B, Y, DY, FOUND, DX, DW, DB, MATRICES };

typedef struct layer {
    sebp_matrix at[MATRICES]; /* data is NULL where not needed */
} layer;

typedef enum run_kind { CALL, READ, FILL, FILL_STREAMING } run_kind;

typedef struct run {
    run_kind kind;
    sebp_gemm gemm;
    int dense, scattered, found;
    double activity; /* as asked for */
    int64_t active;  /* m, rounded from it */
    sebp_rows *rows;
    int count;
    double ms[MAX_ROUNDS];
} run;

typedef struct group {
    const options *asked;
    const shape *sizes;
    sebp_dtype dtype;
    int cold;
    layer layers[2]; /* cold calls take them in turn */
    int layer_count;
    run *runs;
    int run_count;
} group;

/* By the fields of a run or a group of the same name. */
static const char *const scattered_names[] = {"tail", "scattered"};
static const char *const found_names[] = {"given", "found"};
static const char *const cold_names[] = {"warm", "cold"};
static const char *const forward_names[] = {"backward", "forward"};

/* ---- Inputs ----------------------------------------------------------------------------------*/

static int is_needed(const options *o, int which)
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

static int is_case(const run *r)
{
    return r->kind == CALL && !r->dense;
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
    if (o->sources & SECOND)
        add_run(g, READ);
    add_run(g, FILL);
    add_run(g, FILL_STREAMING);
    for (int scattered = 0; scattered < 2; scattered++) {
        for (int found = 0; found < 2; found++) {
            for (int i = 0; i < o->activity_count; i++) {
                if (!(o->patterns >> scattered & 1) || !(o->sources >> found & 1))
                    continue;
                run *r = add_run(g, CALL);
                r->gemm = m->gemm;
                r->scattered = scattered;
                r->found = found;
                r->activity = o->activities[i];
                r->active = (int64_t)(r->activity * (double)g->sizes->m + 0.5);
                r->active = r->active < 1 ? 1 : r->active;
            }
        }
    }
}

/* Makes dY as a run that finds its rows wants it: inactive rows zero. */
static void prepare(const run *r, const layer *l, int threads)
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

static void perform(const machine *m, const group *g, const run *r, const layer *l)
{
    const sebp_matrix *at = l->at, *filled = &at[g->asked->forward ? Y : DX];
    sebp_context *context = m->contexts[r->gemm];
    sebp_status status = SEBP_SUCCESS;
    if (r->kind == READ) {
        read_memory(at[DY].data, matrix_bytes(&at[DY]), m->memory_threads);
    } else if (r->kind != CALL) {
        fill_memory(filled->data, matrix_bytes(filled), r->kind == FILL_STREAMING,
                    m->memory_threads);
    } else if (g->asked->forward) {
        status = sebp_linear_forward(context, &at[X], &at[W], &at[B], r->rows, NULL, &at[Y]);
    } else {
        status = sebp_linear_backward(context, &at[r->found ? FOUND : DY], &at[X], &at[W],
                                      r->found ? NULL : r->rows, NULL, &at[DX], &at[DW], &at[DB]);
    }
    if (status != SEBP_SUCCESS)
        die(FAILED, "%s: %s", g->sizes->name, sebp_context_message(context));
}

/* One repetition: a warm call follows another of itself, a cold one finds nothing in the caches. */
static void measure(const machine *m, const group *g, run *r, const layer *l)
{
    if (r->kind == CALL)
        prepare(r, l, m->memory_threads);
    if (g->cold)
        read_memory(m->flush, m->flush_bytes, m->memory_threads);
    else
        perform(m, g, r, l);
    double begin = now_ms();
    perform(m, g, r, l);
    r->ms[r->count++] = now_ms() - begin;
}

/* Of times in ascending order. */
static double median(const run *r)
{
    return (r->ms[(r->count - 1) / 2] + r->ms[r->count / 2]) / 2;
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

/* ---- Verification ----------------------------------------------------------------------------*/

static _Noreturn void wrong(const group *g, const run *r, const char *what, int64_t row,
                            int64_t col, double value, double expected)
{
    die(FAILED,
        "%s (M %" PRId64 ", K %" PRId64 ", N %" PRId64 "), %s %s, gemm %s, %s, %s, %" PRId64
        " active rows: %s[%" PRId64 ",%" PRId64 "] is %.9g, should be %.9g",
        g->sizes->name, g->sizes->m, g->sizes->k, g->sizes->n, sebp_dtype_name(g->dtype),
        forward_names[g->asked->forward], gemm_names[r->gemm],
        r->dense ? "dense" : scattered_names[r->scattered], found_names[r->found], r->active, what,
        row, col, value, expected);
}

/* Element (i, j) of an output in double precision, and the sum of its terms' magnitudes. */
static double reference(const run *r, const layer *l, int which, int64_t i, int64_t j,
                        double *magnitude, int64_t *terms)
{
    const sebp_matrix *at = l->at;
    const int64_t *active = sebp_rows_indices(r->rows);
    double sum = which == Y ? element(&at[B], 0, j) : 0.0;
    *magnitude = fabs(sum);
    *terms = which == Y ? at[X].cols : which == DX ? at[DY].cols : r->active;
    for (int64_t t = 0; t < *terms; t++) {
        double term;
        if (which == Y)
            term = element(&at[X], i, t) * element(&at[W], j, t);
        else if (which == DX)
            term = element(&at[DY], i, t) * element(&at[W], t, j);
        else if (which == DW)
            term = element(&at[DY], active[t], i) * element(&at[X], active[t], j);
        else
            term = element(&at[DY], active[t], j);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

/*
 * A sample of elements against sums in double precision. Rounding errors of a sum of k terms of
 * random sign grow with sqrt(k), so 4 sqrt(k) eps sum|a||b| is wide; and yet a missing term, which
 * is at least 1/4, shows.
 */
static void verify_sample(const group *g, const run *r, const layer *l, int which, const char *what)
{
    const sebp_matrix *a = &l->at[which];
    const int64_t *active = sebp_rows_indices(r->rows);
    int by_row = which == Y || which == DX;
    uint64_t seed = g->asked->seed + 1000 + (uint64_t)which;
    for (uint64_t s = 0; s < SAMPLES; s++) {
        int64_t i = (int64_t)(random_bits(seed, 2 * s) % (uint64_t)(by_row ? r->active : a->rows));
        int64_t j = (int64_t)(random_bits(seed, 2 * s + 1) % (uint64_t)a->cols);
        int64_t terms;
        double magnitude;
        i = by_row ? active[i] : i;
        double expected = reference(r, l, which, i, j, &magnitude, &terms);
        double bound = 4 * sqrt((double)terms + 1) * (double)FLT_EPSILON * magnitude;
        if (a->dtype == SEBP_BF16)
            bound += fabs(expected) * 0x1p-8;
        if (!(fabs(element(a, i, j) - expected) <= bound))
            wrong(g, r, what, i, j, element(a, i, j), expected);
    }
}

/* Every element: exactly zero in inactive rows; in others finite, and nearly all of them nonzero,
 * as sums of random numbers are. */
static void verify_whole(const group *g, const run *r, const layer *l, int which, const char *what)
{
    const sebp_matrix *a = &l->at[which];
    const int64_t *active = sebp_rows_indices(r->rows);
    int by_row = which == Y || which == DX;
    int64_t nonzero = 0, next = 0, rows = by_row ? r->active : a->rows, terms;
    double magnitude;
    for (int64_t i = 0; i < a->rows; i++) {
        int is_active = !by_row || (next < r->active && active[next] == i);
        next += is_active;
        for (int64_t j = 0; j < a->cols; j++) {
            double value = element(a, i, j);
            if (!is_active && value != 0.0)
                wrong(g, r, what, i, j, value, 0.0);
            if (!isfinite(value))
                wrong(g, r, what, i, j, value, reference(r, l, which, i, j, &magnitude, &terms));
            nonzero += value != 0.0;
        }
    }
    if ((double)nonzero < 0.9 * (double)rows * (double)a->cols) {
        die(FAILED, "%s: only %" PRId64 " of %" PRId64 " elements of %s are not zero",
            g->sizes->name, nonzero, rows * a->cols, what);
    }
}

static void verify(const machine *m, const group *g, const run *r)
{
    static const struct {
        int which;
        const char *name;
    } outputs[] = {{Y, "Y"}, {DX, "dX"}, {DW, "dW"}, {DB, "db"}};
    const layer *l = &g->layers[0];
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (is_needed(g->asked, outputs[i].which)) /* all NaN */
            memset(l->at[outputs[i].which].data, 0xff, matrix_bytes(&l->at[outputs[i].which]));
    }
    prepare(r, l, m->memory_threads);
    perform(m, g, r, l);
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (is_needed(g->asked, outputs[i].which)) {
            verify_sample(g, r, l, outputs[i].which, outputs[i].name);
            verify_whole(g, r, l, outputs[i].which, outputs[i].name);
        }
    }
}

/* ---- Results ---------------------------------------------------------------------------------*/

static void print_heading(const machine *m, const options *o)
{
    if (o->csv) {
        puts("shape,M,K,N,sequence,direction,dtype,cache,pattern,rows,activity,active_rows,threads,"
             "isa,gemm,repetitions,dense_gemm,dense_ms,dense_min_ms,dense_gflops,read_gbs,fill_gbs,"
             "compact_ms,compact_min_ms,speedup,limit_ms,efficiency,gflops,status");
        return;
    }
    print_machine_line(m);
    if (m->memory_threads != m->threads)
        puts("Built without OpenMP: bandwidth is that of 1 thread.");
    if (!o->verify_only) {
        puts("Times are medians, bandwidths the best seen. efficiency = limit / compact;\n"
             "limit = activity x dense + bytes that must move / bandwidth");
    }
}

/* The fields of a line that are known before anything is measured. */
static void print_csv_case(const machine *m, const group *g, const run *r)
{
    const shape *s = g->sizes;
    printf("%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%s,%s,%s,%s,%g,%" PRId64
           ",%d,%s,%s,",
           s->name, s->m, s->k, s->n, s->sequence, forward_names[g->asked->forward],
           sebp_dtype_name(g->dtype), cold_names[g->cold], scattered_names[r->scattered],
           found_names[r->found], r->activity, r->active, m->threads, sebp_isa(),
           gemm_names[m->gemm]);
}

static void print_unmeasured(const machine *m, const group *g, const char *status)
{
    if (!g->asked->csv)
        printf("%s\n", status);
    for (int i = 0; i < g->run_count && g->asked->csv; i++) {
        if (!is_case(&g->runs[i]))
            continue;
        print_csv_case(m, g, &g->runs[i]);
        printf(",,,,,,,,,,,,,%s\n", status);
    }
}

static void print_results(const machine *m, const group *g)
{
    const run *dense = NULL, *read = NULL, *fill = NULL;
    const options *o = g->asked;
    for (int i = 0; i < g->run_count; i++) {
        const run *r = &g->runs[i];
        if (r->dense && (dense == NULL || median(r) < median(dense)))
            dense = r;
        if (r->kind == READ)
            read = r;
        if ((r->kind == FILL || r->kind == FILL_STREAMING) &&
            (fill == NULL || r->ms[0] < fill->ms[0])) {
            fill = r;
        }
    }
    double row_gflop = (o->forward ? 2e-9 : 4e-9) * (double)g->sizes->k * (double)g->sizes->n;
    double dense_ms = median(dense);
    double dense_gflops = row_gflop * (double)g->sizes->m / dense_ms * 1e3;
    double read_ms = read == NULL ? 0 : read->ms[0], fill_ms = fill->ms[0];
    double read_gbs =
        read == NULL ? 0 : (double)matrix_bytes(&g->layers[0].at[DY]) / read_ms * 1e-6;
    double fill_gbs = (double)matrix_bytes(&g->layers[0].at[o->forward ? Y : DX]) / fill_ms * 1e-6;

    if (!o->csv) {
        printf("dense %.2f ms, %.1f Gflop/s (%s); zero fill %.1f GB/s", dense_ms, dense_gflops,
               gemm_names[dense->gemm], fill_gbs);
        if (read != NULL)
            printf(", read %.1f GB/s", read_gbs);
        printf("\n%-16s %8s %6s %10s %10s %8s %10s %10s %9s\n", "rows", "activity", "active",
               "dense ms", "compact ms", "speedup", "limit ms", "efficiency", "Gflop/s");
    }
    for (int i = 0; i < g->run_count; i++) {
        const run *r = &g->runs[i];
        if (!is_case(r))
            continue;
        double activity = (double)r->active / (double)g->sizes->m, ms = median(r);
        double limit_ms = activity * dense_ms + (1 - activity) * fill_ms;
        limit_ms += r->found ? (1 - activity) * read_ms : 0;
        double gflops = row_gflop * (double)r->active / ms * 1e3;
        if (o->csv) {
            print_csv_case(m, g, r);
            printf("%d,%s,%.4f,%.4f,%.2f,%.2f,%.2f,%.4f,%.4f,%.3f,%.4f,%.4f,%.2f,ok\n", r->count,
                   gemm_names[dense->gemm], dense_ms, dense->ms[0], dense_gflops, read_gbs,
                   fill_gbs, ms, r->ms[0], dense_ms / ms, limit_ms, limit_ms / ms, gflops);
        } else {
            printf("%-9s %-6s %8g %6" PRId64 " %10.2f %10.2f %8.2f %10.2f %10.2f %9.1f\n",
                   scattered_names[r->scattered], found_names[r->found], r->activity, r->active,
                   dense_ms, ms, dense_ms / ms, limit_ms, limit_ms / ms, gflops);
        }
    }
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
        print_unmeasured(m, g, reason);
        return;
    }
    make_rows(g);
    for (int i = 0; i < g->run_count; i++) {
        if (g->runs[i].kind == CALL)
            verify(m, g, &g->runs[i]);
    }
    if (g->asked->verify_only) {
        print_unmeasured(m, g, "verified");
    } else {
        measure_all(m, g);
        print_results(m, g);
    }
    for (int i = 0; i < g->run_count; i++)
        sebp_rows_destroy(g->runs[i].rows);
    for (int i = 0; i < g->layer_count; i++) {
        for (int which = 0; which < MATRICES; which++)
            free(g->layers[i].at[which].data);
    }
}

/* All layers, on some of their rows and on all. */
static void compare_rows(const machine *m, const options *o)
{
    print_heading(m, o);
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

int main(int argc, char **argv)
{
    options o;
    machine m;
    parse_options(&o, argc, argv);
    open_machine(&m, &o);
    if (o.layer)
        measure_layers(&m, &o);
    else if (o.attention)
        measure_attention(&m, &o);
    else if (o.methods != 0)
        compare_methods(&m, &o);
    else
        compare_rows(&m, &o);
    free_options(&o);
    close_machine(&m);
    return 0;
}
