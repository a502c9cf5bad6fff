/* SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "inputs.h"
#include "method_report.h"

static double median(double *ms, int count)
{
    qsort(ms, (size_t)count, sizeof *ms, compare_doubles);
    return (ms[(count - 1) / 2] + ms[count / 2]) / 2;
}

/* Bytes of gradient and of optimizer state that each layer has, and of what all layers share. */
typedef struct bytes {
    double gradient, state, shared;
} bytes;

static double sum_bytes(const layer *l, const int *which, int count)
{
    double sum = 0;
    for (int i = 0; i < count; i++)
        sum += (double)matrix_bytes(&l->at[which[i]]);
    return sum;
}

static bytes bytes_of(const layer *l, int method)
{
    static const int lora_gradients[] = {DA, LORA_DB}, lora_states[] = {A1, A2, B1, B2};
    static const int full_states[] = {V1, V2}, shared[] = {U_OUT, U_IN, R};
    if (method == FULL)
        return (bytes){sum_bytes(l, (const int[]){DW}, 1), sum_bytes(l, full_states, 2), 0};
    if (method == LORA)
        return (bytes){sum_bytes(l, lora_gradients, 2), sum_bytes(l, lora_states, 4), 0};
    double of_each = sizeof(float); /* a fixed support has the index in the state */
    of_each += sebp_sparse_adamw_support(l->states[method]) == NULL ? sizeof(int64_t) : 0;
    return (bytes){of_each * (double)l->k, (double)sebp_sparse_adamw_bytes(l->states[method]),
                   method == SPARSEGRAD ? sum_bytes(l, shared, 3) : 0};
}

static void print_csv_case(const machine *m, const layer *l, const char *method, const char *order)
{
    const shape *s = l->sizes;
    printf("%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%g,%" PRId64 ",%d,%s,%s,%s,%s,",
           s->name, s->m, s->k, s->n, s->sequence, sebp_dtype_name(l->dtype), l->activity,
           l->active, m->threads, sebp_isa(), gemm_names[m->gemm], method, order);
    printf("%" PRId64 ",%" PRId64 ",", l->k, l->rank);
}

static void print_method(const machine *m, layer *l, int method, double full_ms, double full_bytes)
{
    run *r = l->runs[method];
    bytes b = bytes_of(l, method);
    double total = median(r->total_ms, r->count);
    if (l->asked->csv)
        print_csv_case(m, l, method_names[method], "");
    else
        printf("%-11s", method_names[method]);
    for (int phase = 0; phase < PHASES; phase++) {
        int is_timed = r->phases >> phase & 1;
        double ms = is_timed ? median(r->ms[phase], r->count) : 0;
        if (!l->asked->csv && !is_timed)
            printf(" %9s", "-");
        else if (!l->asked->csv)
            printf(" %9.3f", ms);
        else if (is_timed)
            printf("%.4f,", ms);
        else
            putchar(',');
    }
    if (l->asked->csv) {
        printf("%d,%.4f,%.0f,%.0f,%.0f,,ok\n", r->count, total, b.gradient, b.state, b.shared);
        return;
    }
    printf(" %9.3f", total);
    if (full_ms > 0) {
        printf(" %8.2f %9.2f %9.2f %7.2f%% %9.2f\n", total / full_ms, b.gradient * 0x1p-20,
               b.state * 0x1p-20, 100 * (b.gradient + b.state) / full_bytes, b.shared * 0x1p-20);
    } else {
        printf(" %8s %9.2f %9.2f %8s %9.2f\n", "-", b.gradient * 0x1p-20, b.state * 0x1p-20, "-",
               b.shared * 0x1p-20);
    }
}

static double model_gflop(const layer *l, int order)
{
    return 2e-9 * sebp_sparsegrad_cost(l->basis, l->active, (sebp_rotation)order);
}

static void print_orders(const machine *m, layer *l)
{
    double ms[ORDERS], best = HUGE_VAL;
    int chosen = sebp_sparsegrad_order(l->basis, l->active);
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        ms[order] = median(l->orders[order]->ms[GRADIENT], l->orders[order]->count);
        best = fmin(best, ms[order]);
    }
    if (!l->asked->csv) {
        printf("orders of SparseGrad's products, by the model and as measured; %s is chosen, %.2f "
               "times the fastest\n",
               order_names[chosen], ms[chosen] / best);
    }
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        double gflop = model_gflop(l, order);
        if (l->asked->csv) {
            print_csv_case(m, l, "sparsegrad", order_names[order]);
            printf(",,%.4f,,%d,,,,,%.4f,%s\n", ms[order], l->orders[order]->count, gflop,
                   order == chosen ? "chosen" : "ok");
        } else {
            printf("  %-9s %9.3f Gflop %9.3f ms %9.1f Gflop/s\n", order_names[order], gflop,
                   ms[order], gflop / ms[order] * 1e3);
        }
    }
}

void print_results(const machine *m, layer *l)
{
    double full_ms = 0, full_bytes = 0;
    if (is_asked(l, FULL)) {
        bytes b = bytes_of(l, FULL);
        full_ms = median(l->runs[FULL]->total_ms, l->runs[FULL]->count);
        full_bytes = b.gradient + b.state;
    }
    if (!l->asked->csv) {
        printf("%-11s %9s %9s %9s %9s %9s %8s %9s %9s %8s %9s\n", "ms, MiB", "forward", "backward",
               "gradient", "step", "total", "x full", "gradient", "state", "of full", "shared");
    }
    for (int method = 0; method < METHODS; method++) {
        if (is_asked(l, method))
            print_method(m, l, method, full_ms, full_bytes);
    }
    if (is_asked(l, SPARSEGRAD))
        print_orders(m, l);
}

void print_unmeasured(const machine *m, const layer *l, const char *status)
{
    if (!l->asked->csv)
        printf("%s\n", status);
    for (int method = 0; method < METHODS && l->asked->csv; method++) {
        if (is_asked(l, method)) {
            print_csv_case(m, l, method_names[method], "");
            printf(",,,,,,,,,,%s\n", status);
        }
    }
}

void print_heading(const machine *m, const options *o)
{
    if (o->csv) {
        puts("shape,M,K,N,sequence,dtype,activity,active_rows,threads,isa,gemm,method,order,kept,"
             "lora_rank,forward_ms,backward_ms,gradient_ms,step_ms,repetitions,total_ms,"
             "gradient_bytes,state_bytes,shared_bytes,model_gflop,status");
        return;
    }
    print_machine_line(m);
    if (!o->verify_only) {
        puts("One training step of one layer. Times are medians in ms, memory is in MiB; shared: "
             "bases\nand rotated gradient, one for all layers of a kind.");
    }
}
