/* SPDX-License-Identifier: Apache-2.0 */
#include "rows.h"

#include <inttypes.h>
#include <stdio.h>

#include "inputs.h"

/* Of times in ascending order. */
static double median(const run *r)
{
    return (r->ms[(r->count - 1) / 2] + r->ms[r->count / 2]) / 2;
}

void print_rows_heading(const machine *m, const options *o)
{
    if (o->csv) {
        puts("shape,M,K,N,sequence,direction,dtype,cache,pattern,rows,activity,active_rows,threads,"
             "isa,gemm,weight,repetitions,dense_gemm,dense_ms,dense_min_ms,dense_gflops,read_gbs,"
             "fill_gbs,"
             "compact_ms,compact_min_ms,speedup,limit_ms,efficiency,gflops,status");
        return;
    }
    print_machine_line(m);
    if (!m->on_gpu && m->memory_threads != m->threads)
        puts("Built without OpenMP: bandwidth is that of 1 thread.");
    if (!o->verify_only && m->on_gpu) {
        puts("Times are medians, a call's of many in a row, until the GPU has done the last.\n"
             "efficiency = limit / compact; limit = activity x dense");
    } else if (!o->verify_only) {
        puts("Times are medians, bandwidths the best seen. efficiency = limit / compact;\n"
             "limit = activity x dense + bytes that must move / bandwidth");
    }
}

/* The fields of a line that are known before anything is measured. */
static void print_csv_case(const machine *m, const group *g, const run *r)
{
    const shape *s = g->sizes;
    printf("%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%s,%s,%s,%s,%g,%" PRId64
           ",%d,%s,%s,%s,",
           s->name, s->m, s->k, s->n, s->sequence, forward_names[g->asked->forward],
           sebp_dtype_name(g->dtype), cold_names[g->cold], scattered_names[r->scattered],
           found_names[r->found], r->activity, r->active, m->threads,
           m->on_gpu ? "cuda" : sebp_isa(), gemm_names[m->gemm], packed_names[r->packed]);
}

void print_rows_unmeasured(const machine *m, const group *g, const char *status)
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

void print_rows_results(const machine *m, const group *g)
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
    double read_ms = read == NULL ? 0 : read->ms[0], fill_ms = fill == NULL ? 0 : fill->ms[0];
    double read_gbs =
        read == NULL ? 0 : (double)matrix_bytes(&g->layers[0].at[DY]) / read_ms * 1e-6;
    double fill_bytes = (double)matrix_bytes(&g->layers[0].at[o->forward ? Y : DX]);
    double fill_gbs = fill == NULL ? 0 : fill_bytes / fill_ms * 1e-6;

    if (!o->csv) {
        printf("dense %.*f ms, %.1f Gflop/s (%s)", m->on_gpu ? 4 : 2, dense_ms, dense_gflops,
               gemm_names[dense->gemm]);
        if (fill != NULL)
            printf("; zero fill %.1f GB/s", fill_gbs);
        if (read != NULL)
            printf(", read %.1f GB/s", read_gbs);
        printf("\n%-*s %8s %6s %10s %10s %8s %10s %10s %9s\n", o->packed ? 23 : 16, "rows",
               "activity", "active", "dense ms", "compact ms", "speedup", "limit ms", "efficiency",
               "Gflop/s");
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
            printf("%-9s %-6s ", scattered_names[r->scattered], found_names[r->found]);
            if (o->packed)
                printf("%-6s ", packed_names[r->packed]);
            const int digits = m->on_gpu ? 4 : 2;
            printf("%8g %6" PRId64 " %10.*f %10.*f %8.2f %10.*f %10.2f %9.1f\n", r->activity,
                   r->active, digits, dense_ms, digits, ms, dense_ms / ms, digits, limit_ms,
                   limit_ms / ms, gflops);
        }
    }
}
