/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench --method: what one training step costs on one layer, in time and memory, when all of
 * its weight trains (full), a product of two thin matrices beside it (LoRA), or the k elements of
 * its gradient that are largest as they are (MeProp) or in other bases (SparseGrad).
 *
 * A step has phases: forward, backward (dX, the bias, and the gradient of the weight where that
 * comes out of the same call), gradient (choosing elements), step (optimizer, and what moves the
 * weight). The methods take turns, repetition by repetition. Beside SparseGrad, each order of its
 * products that the cost model deems near its best is timed, to see whether the model chose well.
 */
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "methods.h"

enum { FORWARD, BACKWARD, GRADIENT, STEP, PHASES };
enum { ORDERS = SEBP_ROTATE_IN_OUT + 1 }; /* 0 is not one */
enum { SAMPLES = 8 };

static const double WORTH_TIMING = 2; /* times the smallest cost */

static const char *const order_names[ORDERS] = {"auto", "factors", "dy", "x", "out-in", "in-out"};

/* What is timed: a method's step by phases, or one order of products in the phase GRADIENT. */
typedef struct run {
    int phases; /* a bit each */
    int count;
    double ms[PHASES][MAX_ROUNDS], total_ms[MAX_ROUNDS];
} run;

/* The matrices of a layer. Moments come in pairs: V1 and V2 are dW's, A1 and A2 are A's. */
enum {
    X, /* M x K; here to DB for all methods */
    W, /* N x K */
    BIAS,
    Y,  /* M x N, as DY */
    DY, /* DX: M x K */
    DX,
    DB,
    DW, /* N x K, here to V2, for the full one */
    V1,
    V2,
    A, /* K x r, here to A2, for LoRA */
    DA,
    A1,
    A2,
    B, /* r x N, here to B2 */
    LORA_DB,
    B1,
    B2,
    H, /* m x r */
    DH,
    U_OUT, /* vectors in rows, r_out x N, here to R for SparseGrad */
    U_IN,  /* r_in x K */
    R,     /* r_out x r_in */
    MATRICES
};

/* A layer with what the methods need for it. */
typedef struct layer {
    const options *options;
    const shape *shape;
    sebp_context *context;
    sebp_dtype dtype;
    double activity;
    int64_t active; /* m */
    sebp_rows *rows;
    int64_t k;    /* elements that train */
    int64_t rank; /* of LoRA: about as many */
    double scale;
    sebp_adamw_options adamw;
    int64_t steps;
    sebp_matrix at[MATRICES]; /* data is NULL where not needed */
    sebp_basis *basis;
    sebp_sparse kept[METHODS]; /* by MeProp and SparseGrad, and their states */
    sebp_sparse_adamw *states[METHODS];
    run *runs[METHODS], *orders[ORDERS]; /* NULL: not asked for, or not worth it */
} layer;

static int is_asked(const layer *l, int method)
{
    return l->options->methods >> method & 1;
}

static void succeed(const layer *l, sebp_status status)
{
    if (status != SEBP_SUCCESS)
        die(FAILED, "%s: %s: %s", l->shape->name, sebp_status_string(status),
            sebp_context_message(l->context));
}

/* ---- A step ----------------------------------------------------------------------------------*/

static void forward(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    if (method == LORA)
        succeed(l, sebp_lora_forward(l->context, &at[X], &at[W], &at[BIAS], &at[A], &at[B],
                                     l->scale, l->rows, NULL, &at[H], &at[Y]));
    else
        succeed(l,
                sebp_linear_forward(l->context, &at[X], &at[W], &at[BIAS], l->rows, NULL, &at[Y]));
}

static void backward(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    if (method == LORA)
        succeed(l, sebp_lora_backward(l->context, &at[DY], &at[X], &at[W], &at[A], &at[B], &at[H],
                                      l->scale, l->rows, NULL, &at[DH], &at[DX], &at[DA],
                                      &at[LORA_DB]));
    else
        succeed(l, sebp_linear_backward(l->context, &at[DY], &at[X], &at[W], l->rows, NULL, &at[DX],
                                        method == FULL ? &at[DW] : NULL, &at[DB]));
}

static void rotate(layer *l, sebp_rotation order)
{
    succeed(l, sebp_sparsegrad_gradient(l->context, l->basis, &l->at[DY], &l->at[X], l->rows, NULL,
                                        order, &l->at[R]));
}

static void choose(layer *l, int method)
{
    const sebp_matrix *at = l->at;
    sebp_sparse *kept = &l->kept[method];
    if (method == MEPROP) {
        succeed(l, sebp_meprop_gradient(l->context, &at[DY], &at[X], l->rows, NULL, kept));
        return;
    }
    rotate(l, SEBP_ROTATE_AUTO);
    if (sebp_sparse_adamw_support(l->states[method]) != NULL)
        succeed(l, sebp_sparse_take(l->context, &at[R], kept));
    else
        succeed(l, sebp_sparse_top(l->context, &at[R], kept));
}

static void dense_step(layer *l, int gradient, int weight, int moment1, int moment2)
{
    const sebp_matrix *at = l->at;
    succeed(l, sebp_adamw_step(l->context, &at[gradient], l->steps, &l->adamw, &at[weight],
                               &at[moment1], &at[moment2]));
}

static void step(layer *l, int method)
{
    if (method == FULL) {
        dense_step(l, DW, W, V1, V2);
    } else if (method == LORA) {
        dense_step(l, DA, A, A1, A2);
        dense_step(l, LORA_DB, B, B1, B2);
    } else {
        const sebp_sparse *kept = &l->kept[method];
        succeed(l, sebp_sparse_adamw_step(l->context, l->states[method], &l->adamw, kept));
        if (method == MEPROP)
            succeed(l, sebp_sparse_add(l->context, kept, &l->at[W]));
        else
            succeed(l, sebp_sparsegrad_update(l->context, l->basis, kept, &l->at[W]));
    }
}

static void perform(layer *l, int method, int phase)
{
    static void (*const phases[PHASES])(layer *, int) = {forward, backward, choose, step};
    phases[phase](l, method);
}

/* ---- Time ------------------------------------------------------------------------------------*/

static void measure(layer *l, int method)
{
    run *r = l->runs[method];
    double begin = now_ms();
    for (int phase = 0; phase < PHASES; phase++) {
        if (!(r->phases >> phase & 1))
            continue;
        double start = now_ms();
        perform(l, method, phase);
        r->ms[phase][r->count] = now_ms() - start;
    }
    r->total_ms[r->count++] = now_ms() - begin;
}

static void measure_order(layer *l, int order)
{
    run *r = l->orders[order];
    double begin = now_ms();
    rotate(l, (sebp_rotation)order);
    r->ms[GRADIENT][r->count++] = now_ms() - begin;
}

static void measure_all(layer *l)
{
    double begin = now_ms();
    for (int round = 0; round < MAX_ROUNDS; round++) {
        if (round >= l->options->repetitions && now_ms() - begin >= l->options->seconds * 1e3)
            break;
        l->steps++;
        for (int method = 0; method < METHODS; method++)
            if (is_asked(l, method))
                measure(l, method);
        for (int order = 1; order < ORDERS; order++)
            if (l->orders[order] != NULL)
                measure_order(l, order);
    }
}

static double median(double *ms, int count)
{
    qsort(ms, (size_t)count, sizeof *ms, compare_doubles);
    return (ms[(count - 1) / 2] + ms[count / 2]) / 2;
}

/* ---- Verification ----------------------------------------------------------------------------*/

/* What a method trains is to have moved, to finite values: the sum of it. */
static double sum_of(const layer *l, int which)
{
    const sebp_matrix *a = &l->at[which];
    double sum = 0;
    for (int64_t i = 0; i < a->rows; i++)
        for (int64_t j = 0; j < a->cols; j++)
            sum += element(a, i, j);
    return sum;
}

static void verify_method(layer *l, int method)
{
    int trained = method == LORA ? B : W;
    double before = sum_of(l, trained);
    for (int phase = 0; phase < PHASES; phase++)
        if (l->runs[method]->phases >> phase & 1)
            perform(l, method, phase);
    double after = sum_of(l, trained);
    if (!isfinite(after) || after == before)
        die(FAILED, "%s, %s: the weights sum to %g before the step and %g after", l->shape->name,
            method_names[method], before, after);
    if (l->states[method] != NULL && sebp_sparse_adamw_count(l->states[method]) != l->k)
        die(FAILED, "%s, %s: %" PRId64 " elements were kept, not %" PRId64, l->shape->name,
            method_names[method], sebp_sparse_adamw_count(l->states[method]), l->k);
}

/* Element (i, j) of R in double precision, and the sum of its terms' magnitudes over the rows. */
static double reference(const layer *l, int64_t i, int64_t j, double *magnitude)
{
    const int64_t *active = sebp_rows_indices(l->rows);
    double sum = 0;
    *magnitude = 0;
    for (int64_t t = 0; t < l->active; t++) {
        double out = 0, in = 0;
        for (int64_t n = 0; n < l->at[DY].cols; n++)
            out += element(&l->at[DY], active[t], n) * element(&l->at[U_OUT], i, n);
        for (int64_t k = 0; k < l->at[X].cols; k++)
            in += element(&l->at[X], active[t], k) * element(&l->at[U_IN], j, k);
        sum += out * in;
        *magnitude += fabs(out * in);
    }
    return sum;
}

/* Each order of products gives the same R, up to rounding, which grows with the square root of the
 * number of terms as their signs are random. */
static void verify_orders(layer *l)
{
    const sebp_matrix *r = &l->at[R];
    double expected[SAMPLES], bound[SAMPLES];
    int64_t row[SAMPLES], col[SAMPLES];
    double terms = (double)(l->shape->n + l->shape->k + l->active);
    for (int s = 0; s < SAMPLES; s++) {
        uint64_t seed = l->options->seed + 2000, index = 2 * (uint64_t)s;
        row[s] = (int64_t)(random_bits(seed, index) % (uint64_t)r->rows);
        col[s] = (int64_t)(random_bits(seed, index + 1) % (uint64_t)r->cols);
        expected[s] = reference(l, row[s], col[s], &bound[s]);
        bound[s] *= 16 * (double)FLT_EPSILON * sqrt(terms);
    }
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        memset(r->data, 0xff, matrix_bytes(r)); /* all NaN */
        rotate(l, (sebp_rotation)order);
        for (int s = 0; s < SAMPLES; s++)
            if (!(fabs(element(r, row[s], col[s]) - expected[s]) <= bound[s]))
                die(FAILED, "%s, order %s: R[%" PRId64 ",%" PRId64 "] is %.9g, should be %.9g",
                    l->shape->name, order_names[order], row[s], col[s], element(r, row[s], col[s]),
                    expected[s]);
    }
}

static void verify(layer *l)
{
    l->steps = 1;
    for (int method = 0; method < METHODS; method++)
        if (is_asked(l, method))
            verify_method(l, method);
    if (is_asked(l, SPARSEGRAD))
        verify_orders(l);
}

/* ---- Results ---------------------------------------------------------------------------------*/

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

static void print_csv_case(const machine *machine, const layer *l, const char *method,
                           const char *order)
{
    const shape *s = l->shape;
    printf("%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%g,%" PRId64 ",%d,%s,%s,%s,%s,",
           s->name, s->m, s->k, s->n, s->sequence, sebp_dtype_name(l->dtype), l->activity,
           l->active, machine->threads, sebp_isa(), gemm_names[machine->gemm], method, order);
    printf("%" PRId64 ",%" PRId64 ",", l->k, l->rank);
}

static void print_method(const machine *machine, layer *l, int method, double full_ms,
                         double full_bytes)
{
    run *r = l->runs[method];
    bytes b = bytes_of(l, method);
    double total = median(r->total_ms, r->count);
    if (l->options->csv)
        print_csv_case(machine, l, method_names[method], "");
    else
        printf("%-11s", method_names[method]);
    for (int phase = 0; phase < PHASES; phase++) {
        int is_timed = r->phases >> phase & 1;
        double ms = is_timed ? median(r->ms[phase], r->count) : 0;
        if (!l->options->csv && !is_timed)
            printf(" %9s", "-");
        else if (!l->options->csv)
            printf(" %9.3f", ms);
        else if (is_timed)
            printf("%.4f,", ms);
        else
            putchar(',');
    }
    if (l->options->csv) {
        printf("%d,%.4f,%.0f,%.0f,%.0f,,ok\n", r->count, total, b.gradient, b.state, b.shared);
        return;
    }
    printf(" %9.3f", total);
    if (full_ms > 0)
        printf(" %8.2f %9.2f %9.2f %7.2f%% %9.2f\n", total / full_ms, b.gradient * 0x1p-20,
               b.state * 0x1p-20, 100 * (b.gradient + b.state) / full_bytes, b.shared * 0x1p-20);
    else
        printf(" %8s %9.2f %9.2f %8s %9.2f\n", "-", b.gradient * 0x1p-20, b.state * 0x1p-20, "-",
               b.shared * 0x1p-20);
}

static double model_gflop(const layer *l, int order)
{
    return 2e-9 * sebp_sparsegrad_cost(l->basis, l->active, (sebp_rotation)order);
}

static void print_orders(const machine *machine, layer *l)
{
    double ms[ORDERS], best = HUGE_VAL;
    int chosen = sebp_sparsegrad_order(l->basis, l->active);
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        ms[order] = median(l->orders[order]->ms[GRADIENT], l->orders[order]->count);
        best = fmin(best, ms[order]);
    }
    if (!l->options->csv)
        printf("orders of SparseGrad's products, by the model and as measured; %s is chosen, %.2f "
               "times the fastest\n",
               order_names[chosen], ms[chosen] / best);
    for (int order = 1; order < ORDERS; order++) {
        if (l->orders[order] == NULL)
            continue;
        double gflop = model_gflop(l, order);
        if (l->options->csv) {
            print_csv_case(machine, l, "sparsegrad", order_names[order]);
            printf(",,%.4f,,%d,,,,,%.4f,%s\n", ms[order], l->orders[order]->count, gflop,
                   order == chosen ? "chosen" : "ok");
        } else {
            printf("  %-9s %9.3f Gflop %9.3f ms %9.1f Gflop/s\n", order_names[order], gflop,
                   ms[order], gflop / ms[order] * 1e3);
        }
    }
}

static void print_results(const machine *machine, layer *l)
{
    double full_ms = 0, full_bytes = 0;
    if (is_asked(l, FULL)) {
        bytes b = bytes_of(l, FULL);
        full_ms = median(l->runs[FULL]->total_ms, l->runs[FULL]->count);
        full_bytes = b.gradient + b.state;
    }
    if (!l->options->csv)
        printf("%-11s %9s %9s %9s %9s %9s %8s %9s %9s %8s %9s\n", "ms, MiB", "forward", "backward",
               "gradient", "step", "total", "x full", "gradient", "state", "of full", "shared");
    for (int method = 0; method < METHODS; method++)
        if (is_asked(l, method))
            print_method(machine, l, method, full_ms, full_bytes);
    if (is_asked(l, SPARSEGRAD))
        print_orders(machine, l);
}

static void print_unmeasured(const machine *machine, const layer *l, const char *status)
{
    if (!l->options->csv)
        printf("%s\n", status);
    for (int method = 0; method < METHODS && l->options->csv; method++)
        if (is_asked(l, method)) {
            print_csv_case(machine, l, method_names[method], "");
            printf(",,,,,,,,,,%s\n", status);
        }
}

static void print_heading(const machine *machine, const options *o)
{
    if (o->csv) {
        puts("shape,M,K,N,sequence,dtype,activity,active_rows,threads,isa,gemm,method,order,kept,"
             "lora_rank,forward_ms,backward_ms,gradient_ms,step_ms,repetitions,total_ms,"
             "gradient_bytes,state_bytes,shared_bytes,model_gflop,status");
        return;
    }
    print_machine_line(machine);
    if (!o->verify_only)
        puts("One training step of one layer. Times are medians in ms, memory is in MiB; shared: "
             "bases\nand rotated gradient, one for all layers of a kind.");
}

/* ---- Layers ----------------------------------------------------------------------------------*/

static void lay_out(layer *l)
{
    int64_t m = l->shape->m, n = l->shape->n, k = l->shape->k, r = l->rank, basis_rank;
    basis_rank = l->options->basis_rank > 0 ? l->options->basis_rank : INT64_MAX;
    int64_t r_out = basis_rank < n ? basis_rank : n, r_in = basis_rank < k ? basis_rank : k;
    const struct {
        int64_t rows, cols;
        int method; /* that needs it; METHODS: all */
        sebp_dtype dtype;
    } all[MATRICES] = {
        [X] = {m, k, METHODS, l->dtype},
        [W] = {n, k, METHODS, l->dtype},
        [BIAS] = {1, n, METHODS, SEBP_F32},
        [Y] = {m, n, METHODS, l->dtype},
        [DY] = {m, n, METHODS, l->dtype},
        [DX] = {m, k, METHODS, l->dtype},
        [DB] = {1, n, METHODS, SEBP_F32},
        [DW] = {n, k, FULL, SEBP_F32},
        [V1] = {n, k, FULL, SEBP_F32},
        [V2] = {n, k, FULL, SEBP_F32},
        [A] = {k, r, LORA, l->dtype},
        [DA] = {k, r, LORA, SEBP_F32},
        [A1] = {k, r, LORA, SEBP_F32},
        [A2] = {k, r, LORA, SEBP_F32},
        [B] = {r, n, LORA, l->dtype},
        [LORA_DB] = {r, n, LORA, SEBP_F32},
        [B1] = {r, n, LORA, SEBP_F32},
        [B2] = {r, n, LORA, SEBP_F32},
        [H] = {l->active, r, LORA, l->dtype},
        [DH] = {l->active, r, LORA, l->dtype},
        [U_OUT] = {r_out, n, SPARSEGRAD, SEBP_F32},
        [U_IN] = {r_in, k, SPARSEGRAD, SEBP_F32},
        [R] = {r_out, r_in, SPARSEGRAD, SEBP_F32},
    };
    for (int i = 0; i < MATRICES; i++) {
        int is_needed = all[i].method == METHODS || is_asked(l, all[i].method);
        l->at[i] = (sebp_matrix){NULL, is_needed ? all[i].rows : 0, all[i].cols, all[i].cols,
                                 all[i].dtype};
    }
}

/* Random inputs; moments begin at zero; vectors of a basis have a length of about 1, which is all
 * that matters here. */
static void fill(const layer *l, int which, int threads)
{
    static const int moments[] = {V1, V2, A1, A2, B1, B2};
    const sebp_matrix *a = &l->at[which];
    for (size_t i = 0; i < sizeof moments / sizeof *moments; i++)
        if (which == moments[i]) {
            memset(a->data, 0, matrix_bytes(a));
            return;
        }
    fill_random(a, l->options->seed * MATRICES + (uint64_t)which, threads);
    float *vectors = a->data;
    for (int64_t i = 0; (which == U_OUT || which == U_IN) && i < a->rows * a->cols; i++)
        vectors[i] /= sqrtf((float)a->cols);
}

static void make_sparse(layer *l)
{
    if (is_asked(l, SPARSEGRAD))
        succeed(l, sebp_basis_from_vectors(&l->at[U_OUT], &l->at[U_IN], &l->basis));
    const int spaces[METHODS] = {[MEPROP] = W, [SPARSEGRAD] = R};
    for (int method = MEPROP; method < METHODS; method++) {
        const sebp_matrix *space = &l->at[spaces[method]];
        if (!is_asked(l, method))
            continue;
        l->kept[method] =
            (sebp_sparse){allocate((size_t)l->k * sizeof(int64_t)),
                          allocate((size_t)l->k * sizeof(float)), l->k, space->rows, space->cols};
        succeed(l, sebp_sparse_adamw_create(space->rows, space->cols, NULL, 0, &l->states[method]));
    }
}

/* From now on SparseGrad keeps the elements that it has just kept, listed once, in the state. */
static void fix_support(layer *l)
{
    sebp_sparse *kept = &l->kept[SPARSEGRAD];
    sebp_sparse_adamw_destroy(l->states[SPARSEGRAD]);
    succeed(l, sebp_sparse_adamw_create(kept->rows, kept->cols, kept->indices, kept->count,
                                        &l->states[SPARSEGRAD]));
    free(kept->indices);
    kept->indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(l->states[SPARSEGRAD]);
}

static run *make_run(int phases)
{
    run *r = allocate(sizeof *r);
    memset(r, 0, sizeof *r);
    r->phases = phases;
    return r;
}

static void make_runs(layer *l)
{
    enum { ALL = (1 << PHASES) - 1, NO_CHOICE = ALL & ~(1 << GRADIENT) };
    for (int method = 0; method < METHODS; method++)
        if (is_asked(l, method))
            l->runs[method] = make_run(method == FULL || method == LORA ? NO_CHOICE : ALL);
    double min = sebp_sparsegrad_cost(l->basis, l->active, SEBP_ROTATE_AUTO);
    for (int order = 1; l->basis != NULL && order < ORDERS; order++)
        if (sebp_sparsegrad_cost(l->basis, l->active, (sebp_rotation)order) <= WORTH_TIMING * min)
            l->orders[order] = make_run(1 << GRADIENT);
}

/* Whether all of it can be done; else a reason why not. */
static int open_layer(layer *l, const machine *machine, char *reason, size_t room)
{
    double needed = 0, available = available_memory();
    const sebp_matrix *r = &l->at[R];
    if (is_asked(l, SPARSEGRAD) && (double)l->k > (double)r->rows * (double)r->cols) {
        snprintf(reason, room, "skipped: %" PRId64 " x %" PRId64 " vectors have fewer elements",
                 r->rows, r->cols);
        return 0;
    }
    for (int i = 0; i < MATRICES; i++)
        needed += (double)l->at[i].rows * (double)l->at[i].cols *
                  (double)sebp_dtype_bytes(l->at[i].dtype) *
                  (i == U_OUT || i == U_IN ? 2 : 1); /* a basis copies them */
    if (needed >= (double)PTRDIFF_MAX || (available > 0 && needed > available)) {
        snprintf(reason, room, "skipped: needs %.1f GiB and %.1f GiB are available",
                 needed * 0x1p-30, available * 0x1p-30);
        return 0;
    }
    succeed(l, tail_rows(l->shape, l->options->seed, l->active, &l->rows));
    for (int i = 0; i < MATRICES; i++)
        if (l->at[i].rows > 0) {
            l->at[i].data = allocate(matrix_bytes(&l->at[i]));
            fill(l, i, machine->memory_threads);
        }
    make_sparse(l);
    make_runs(l);
    return 1;
}

static void close_layer(layer *l)
{
    for (int i = 0; i < MATRICES; i++)
        free(l->at[i].data);
    for (int method = 0; method < METHODS; method++) {
        if (sebp_sparse_adamw_support(l->states[method]) == NULL)
            free(l->kept[method].indices);
        free(l->kept[method].values);
        sebp_sparse_adamw_destroy(l->states[method]);
        free(l->runs[method]);
    }
    for (int order = 0; order < ORDERS; order++)
        free(l->orders[order]);
    sebp_basis_destroy(l->basis);
    sebp_rows_destroy(l->rows);
}

static void compare_on(const machine *machine, layer *l)
{
    const shape *s = l->shape;
    char reason[128];
    double elements = (double)s->n * (double)s->k;
    l->active = (int64_t)(l->activity * (double)s->m + 0.5);
    l->active = l->active < 1 ? 1 : l->active;
    l->k = (int64_t)(l->options->kept * elements + 0.5);
    l->k = l->k < 1 ? 1 : l->k;
    l->rank = (l->k + (s->n + s->k) / 2) / (s->n + s->k);
    l->rank = l->rank < 1 ? 1 : l->rank;
    l->scale = 2; /* as is usual: alpha is twice the rank */
    l->adamw = (sebp_adamw_options)SEBP_ADAMW_OPTIONS_INIT;
    l->adamw.learning_rate = 0.1; /* so that a bf16 weight moves */
    lay_out(l);
    if (!l->options->csv)
        printf("\n%s: M %" PRId64 ", K %" PRId64 ", N %" PRId64 ", %s; %" PRId64
               " active rows; %" PRId64 " elements kept, LoRA of rank %" PRId64 "\n",
               s->name, s->m, s->k, s->n, sebp_dtype_name(l->dtype), l->active, l->k, l->rank);
    if (!open_layer(l, machine, reason, sizeof reason)) {
        print_unmeasured(machine, l, reason);
        return;
    }
    verify(l);
    if (l->options->fixed_support && is_asked(l, SPARSEGRAD))
        fix_support(l);
    if (l->options->verify_only) {
        print_unmeasured(machine, l, "verified");
    } else {
        measure_all(l);
        print_results(machine, l);
    }
    close_layer(l);
}

void compare_methods(const machine *machine, const options *o)
{
    print_heading(machine, o);
    for (int i = 0; i < o->shape_count; i++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int j = 0; j < o->activity_count && (o->dtypes >> bf16 & 1); j++) {
                layer l = {.options = o, .shape = &o->shapes[i], .activity = o->activities[j]};
                l.context = machine->contexts[machine->gemm];
                l.dtype = bf16 ? SEBP_BF16 : SEBP_F32;
                compare_on(machine, &l);
                if (fflush(stdout) != 0)
                    die(FAILED, "cannot write: %s", strerror(errno));
            }
}
