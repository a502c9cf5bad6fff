/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench --attention: forward and backward of attention at texts of several lengths, and how near
 * they come to the rate of the library's own product, which takes turns with them.
 *
 * A pair of a query and a key that it sees counts 4 D flop in the forward and 10 D in the backward:
 * two and five products, whatever is computed twice.
 */
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "inputs.h"

enum { PRODUCT, FORWARD, BACKWARD, TIMED };
enum { Q, K, V, DOUT, OUT, DQ, DK, DV, WIDE }; /* tokens x (heads D) */
enum { SAMPLES = 24, HEADS = 12, PRODUCT_SIZE = 768 };

typedef struct shape_case {
    int64_t tokens, length, head_size;
    int causal;
    sebp_dtype dtype;
} shape_case;

typedef struct attention_work {
    const machine *m;
    const options *asked;
    shape_case of;
    sebp_attention_options attention;
    sebp_sequences *sequences;
    sebp_matrix at[WIDE], lse, x, w, y;
    double ms[TIMED][MAX_ROUNDS];
    int count;
} attention_work;

static void check_status(const attention_work *work, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        die(FAILED, "%s: %s", sebp_context_message(work->m->contexts[SEBP_GEMM_NATIVE]),
            sebp_status_string(status));
    }
}

static void perform(attention_work *work, int what)
{
    sebp_context *context = work->m->contexts[SEBP_GEMM_NATIVE];
    const sebp_matrix *at = work->at;
    if (what == PRODUCT) {
        check_status(work,
                     sebp_linear_forward(context, &work->x, &work->w, NULL, NULL, NULL, &work->y));
    } else if (what == FORWARD) {
        check_status(work,
                     sebp_attention_forward(context, &at[Q], &at[K], &at[V], NULL, work->sequences,
                                            NULL, &work->attention, &at[OUT], &work->lse));
    } else {
        check_status(work,
                     sebp_attention_backward(context, &at[DOUT], &at[Q], &at[K], &at[V], NULL,
                                             &at[OUT], &work->lse, work->sequences, NULL,
                                             &work->attention, &at[DQ], &at[DK], &at[DV], NULL));
    }
}

/* ---- verification ---- */

static double dot(const sebp_matrix *a, int64_t i, const sebp_matrix *b, int64_t j, int64_t col,
                  int64_t d)
{
    double sum = 0;
    for (int64_t c = col; c < col + d; c++)
        sum += element(a, i, c) * element(b, j, c);
    return sum;
}

/* P of query i and key j of a text, by the lse that is being verified too. */
static double probability(const attention_work *work, int64_t i, int64_t j, int64_t h)
{
    int64_t d = work->of.head_size;
    double score = dot(&work->at[Q], i, &work->at[K], j, h * d, d) / sqrt((double)d);
    return exp(score - element(&work->lse, i, h));
}

static int sees(const attention_work *work, int64_t i, int64_t j)
{
    return !work->of.causal || j <= i;
}

/* An element of out, dQ or dV, in double precision, and a bound: that of a sum of as many terms as
 * the text is long, and as many again for the error of each P. */
static double reference(const attention_work *work, int which, int64_t row, int64_t col,
                        double *bound)
{
    const sebp_matrix *at = work->at;
    const int64_t length = work->of.length, d = work->of.head_size;
    const int64_t first = row / length * length, h = col / d;
    double sum = 0, size = 0, total = 0;
    for (int64_t i = first; i < first + length; i++) {
        double p, term;
        if (which == DV ? !sees(work, i, row) : !sees(work, row, i))
            continue;
        p = which == DV ? probability(work, i, row, h) : probability(work, row, i, h);
        if (which == OUT) {
            term = p * element(&at[V], i, col);
        } else if (which == DV) {
            term = p * element(&at[DOUT], i, col);
        } else {
            double dp = dot(&at[DOUT], row, &at[V], i, h * d, d);
            double delta = dot(&at[DOUT], row, &at[OUT], row, h * d, d);
            term = p * (dp - delta) / sqrt((double)d) * element(&at[K], i, col);
            size += p * (fabs(dp) + fabs(delta));
        }
        sum += term;
        size += fabs(term);
        total += p;
    }
    if (which != DV && !(fabs(total - 1) < 1e-3))
        die(FAILED, "attention: P of row %" PRId64 ", head %" PRId64 " sums to %g", row, h, total);
    double terms = (double)(length + d);
    *bound = 8 * sqrt(terms) * (double)FLT_EPSILON * size * sqrt((double)d);
    if (work->of.dtype == SEBP_BF16)
        *bound += fabs(sum) * 0x1p-8 + (which == DQ ? size * 0x1p-8 : 0);
    return sum;
}

static void verify(attention_work *work)
{
    static const struct {
        int which;
        const char *name;
    } outputs[] = {{OUT, "out"}, {DQ, "dQ"}, {DK, "dK"}, {DV, "dV"}};
    for (int i = 0; i < 4; i++)
        memset(work->at[outputs[i].which].data, 0xff, matrix_bytes(&work->at[outputs[i].which]));
    memset(work->lse.data, 0xff, matrix_bytes(&work->lse));
    perform(work, FORWARD);
    perform(work, BACKWARD);
    for (int o = 0; o < 4; o++) {
        const sebp_matrix *a = &work->at[outputs[o].which];
        int64_t zero = 0;
        for (int64_t e = 0; e < a->rows * a->cols; e++) {
            double value = element(a, e / a->cols, e % a->cols);
            if (!isfinite(value)) {
                die(FAILED, "attention: element %" PRId64 " of %s is %g", e, outputs[o].name,
                    value);
            }
            zero += value == 0;
        }
        /* A text of one query has no gradient of scores. */
        if (work->of.length > 1 &&
            zero > a->rows * a->cols / 10 + a->rows / work->of.length * a->cols) {
            die(FAILED, "attention: %" PRId64 " elements of %s are zero", zero, outputs[o].name);
        }
        for (uint64_t s = 0; s < SAMPLES && outputs[o].which != DK; s++) {
            uint64_t seed = work->asked->seed + 50 + (uint64_t)o;
            int64_t row = (int64_t)(random_bits(seed, 2 * s) % (uint64_t)a->rows);
            int64_t col = (int64_t)(random_bits(seed, 2 * s + 1) % (uint64_t)a->cols);
            double bound, want = reference(work, outputs[o].which, row, col, &bound);
            if (!(fabs(element(a, row, col) - want) <= bound)) {
                die(FAILED,
                    "attention, texts of %" PRId64 ", heads of %" PRId64 ": %s[%" PRId64 ",%" PRId64
                    "] is %.9g, should be %.9g, within %.3g",
                    work->of.length, work->of.head_size, outputs[o].name, row, col,
                    element(a, row, col), want, bound);
            }
        }
    }
}

/* ---- times ---- */

static double median(const attention_work *work, int what)
{
    return (work->ms[what][(work->count - 1) / 2] + work->ms[what][work->count / 2]) / 2;
}

static void measure(attention_work *work)
{
    const options *o = work->asked;
    double begin = now_ms();
    for (int what = 0; what < TIMED; what++)
        perform(work, what);
    while (work->count < MAX_ROUNDS &&
           (work->count < o->repetitions || now_ms() - begin < o->seconds * 1e3)) {
        for (int what = 0; what < TIMED; what++) {
            double start = now_ms();
            perform(work, what);
            work->ms[what][work->count] = now_ms() - start;
        }
        work->count++;
    }
    for (int what = 0; what < TIMED; what++)
        qsort(work->ms[what], (size_t)work->count, sizeof(double), compare_doubles);
}

/* Gflop/s of a time; pairs of queries and keys are counted that see each other. */
static double rate(const attention_work *work, double flop, double ms)
{
    const shape_case *of = &work->of;
    double length = (double)of->length;
    double seen = of->causal ? length * (length + 1) / 2 : length * length;
    double pairs = (double)(of->tokens / of->length) * seen * HEADS;
    return flop * (double)of->head_size * pairs / ms * 1e-6;
}

static void print_heading(const machine *m, const options *o)
{
    if (o->csv) {
        puts("tokens,length,heads,head_size,causal,dtype,threads,isa,repetitions,forward_ms,"
             "backward_ms,gflops,product_gflops,share,status");
        return;
    }
    print_machine_line(m);
    puts("Attention of 12 heads, its times in ms, medians; its Gflop/s, forward and backward "
         "together,\nbeside those of a linear layer of 768 by 768 on as many tokens.\n");
    printf("%6s %6s %5s %6s %5s %10s %10s %9s %9s %6s\n", "tokens", "length", "head", "causal",
           "dtype", "forward", "backward", "Gflop/s", "product", "share");
}

static void print_case(const attention_work *work)
{
    const shape_case *of = &work->of;
    const options *o = work->asked;
    double forward = 0, backward = 0, gflops = 0, product = 0, share = 0;
    if (!o->verify_only) {
        forward = median(work, FORWARD);
        backward = median(work, BACKWARD);
        gflops = rate(work, 14, forward + backward);
        product = 2e-6 * (double)of->tokens * PRODUCT_SIZE * PRODUCT_SIZE / median(work, PRODUCT);
        share = gflops / product;
    }
    if (o->csv) {
        printf("%" PRId64 ",%" PRId64 ",%d,%" PRId64 ",%d,%s,%d,%s,%d,", of->tokens, of->length,
               HEADS, of->head_size, of->causal, sebp_dtype_name(of->dtype), work->m->threads,
               sebp_isa(), work->count);
        if (o->verify_only)
            puts(",,,,,verified");
        else
            printf("%.4f,%.4f,%.2f,%.2f,%.3f,ok\n", forward, backward, gflops, product, share);
        return;
    }
    printf("%6" PRId64 " %6" PRId64 " %5" PRId64 " %6s %5s ", of->tokens, of->length, of->head_size,
           of->causal ? "yes" : "no", sebp_dtype_name(of->dtype));
    if (o->verify_only)
        puts("verified");
    else
        printf("%10.3f %10.3f %9.1f %9.1f %6.2f\n", forward, backward, gflops, product, share);
}

static sebp_matrix filled(const attention_work *work, int64_t rows, int64_t cols, sebp_dtype dtype,
                          uint64_t seed)
{
    sebp_matrix made = {NULL, rows, cols, cols, dtype};
    made.data = allocate(matrix_bytes(&made));
    fill_random(&made, work->asked->seed * 16 + seed, work->m->memory_threads);
    return made;
}

static void run_case(const machine *m, const options *o, shape_case of)
{
    attention_work *work = allocate(sizeof *work);
    *work = (struct attention_work){.m = m, .asked = o, .of = of};
    work->attention = (sebp_attention_options)SEBP_ATTENTION_OPTIONS_INIT;
    work->attention.heads = HEADS;
    work->attention.causal = of.causal;
    int64_t texts = of.tokens / of.length;
    int64_t *lengths = allocate((size_t)texts * sizeof *lengths);
    for (int64_t i = 0; i < texts; i++)
        lengths[i] = of.length;
    check_status(work, sebp_sequences_from_lengths(lengths, texts, &work->sequences));
    free(lengths);
    for (int i = 0; i < WIDE; i++)
        work->at[i] = filled(work, of.tokens, HEADS * of.head_size, of.dtype, (uint64_t)i);
    work->lse = filled(work, of.tokens, HEADS, SEBP_F32, WIDE);
    work->x = filled(work, of.tokens, PRODUCT_SIZE, of.dtype, WIDE + 1);
    work->w = filled(work, PRODUCT_SIZE, PRODUCT_SIZE, of.dtype, WIDE + 2);
    work->y = filled(work, of.tokens, PRODUCT_SIZE, of.dtype, WIDE + 3);
    verify(work);
    if (!o->verify_only)
        measure(work);
    print_case(work);
    if (fflush(stdout) != 0)
        die(FAILED, "cannot write: %s", strerror(errno));
    sebp_sequences_destroy(work->sequences);
    for (int i = 0; i < WIDE; i++)
        free(work->at[i].data);
    free(work->lse.data);
    free(work->x.data);
    free(work->w.data);
    free(work->y.data);
    free(work);
}

void measure_attention(const machine *m, const options *o)
{
    static const int64_t lengths[] = {8, 16, 32, 64, 128, 512, 2048};
    print_heading(m, o);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            for (int wide = 0; wide < 2; wide++) {
                for (int causal = 0; causal < 2; causal++) {
                    const int64_t length = o->sequence > 0 ? o->sequence : lengths[i];
                    shape_case of = {.tokens = o->quick ? 256 : 2048,
                                     .length = length,
                                     .head_size = wide ? 128 : 64,
                                     .causal = causal,
                                     .dtype = bf16 ? SEBP_BF16 : SEBP_F32};
                    of.tokens = (of.tokens + length - 1) / length * length;
                    int is_asked = o->dtypes >> bf16 & 1 && (i == 0 || o->sequence == 0);
                    if (is_asked && !(o->quick && o->sequence == 0 && length > 128))
                        run_case(m, o, of);
                }
            }
        }
    }
}
